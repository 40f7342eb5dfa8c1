"""Chat in a terminal: `python chat.py`, then type; /help lists the commands."""

import gc
import signal

if __name__ == "__main__":
    # Ctrl-C during the imports ends the program without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.disable()  # until cli.run: imports make much that stays, and looking at it takes time

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import fire
import jax
import readline  # noqa: F401, gives input() line editing and a history
from rich.markup import escape

from models.llama.chat_format import ChatFormat, chat_format_for
from models.llama.decoding import GenerationConfig
from models.llama.generation import Generation, context_length, random_key, stream_text
from models.llama.load import DecodingModelFlags, Model, load_model
from models.llama.messages import read_messages
from models.llama.tokenizer import decode_utf8
from sampling import TopP
from utils import distributed
from utils.console import cli
from utils.clock import PhaseClock
from utils.errors import AltiplanoError, ConfigError, DataError, SamplingError
from utils.fields import Config, field, integer, misfit, setting
from utils.files import atomic_file, read_json
from utils.kvcache import KVCache

HELP = '''\
/reset               forget the conversation; the system message stays
/system TEXT         set the system message (without TEXT: the model's own)
/regen               answer the last message again
/save FILE           write the conversation to a file
/load FILE           continue with a saved one
/set NAME VALUE      change the sampler or max_gen_len; /set alone lists their values
/help, /quit
A line that ends in \\ continues in the next one. Lines between two lines of """ are one message,
which may begin with a /. Ctrl-C stops an answer; at the prompt, press it twice to leave.'''

MAX_CONVERSATION_BYTES = 16 << 20
SAMPLER = TopP(temperature=0.6, top_p=0.9)

# Slots of a new conversation's cache. Each decode step reads all of them, so it starts small.
MIN_SLOTS = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatFlags(Config):
    """A conversation's settings."""

    system: str | None = field(None, "the system message; default: the template's own")
    chat_format: str | None = field(
        None, "llama2, llama3 or the name of one of the checkpoint's templates"
    )
    max_gen_len: int | None = field(
        None, "tokens per answer at most; default: 512, or half the context", integer(0)
    )
    max_seq_len: int | None = field(
        None,
        "the context; default: the model's. The oldest turns are dropped when it is full",
        integer(1),
    )
    seed: int = field(0, "the same seed and messages give the same answers", integer(0, 2**32 - 1))


class Conversation:
    """Messages, and the KV cache of those that the model has read.

    Attributes:
        messages: the system message, if any, then user and assistant in turn.
        context: tokens of messages and answer together, at most.
        sampler: may be replaced between answers.
        max_gen_len: tokens per answer, at most.
        dropped: messages, the oldest ones, that the last answer left out for lack of room.
        answer_tokens: tokens of the last answer.
    """

    def __init__(
        self,
        model: Model,
        format: ChatFormat,
        context: int,
        key: jax.Array,
        sampler: TopP = SAMPLER,
        max_gen_len: int | None = None,
    ):
        self._model, self._format, self._key = model, format, key
        self._cache: KVCache | None = None
        self._cached: list[int] = []  # the tokens whose keys and values the cache holds
        self._answers = 0
        self.messages: list[dict[str, str]] = []
        self.context = context
        self.sampler = sampler
        self.max_gen_len = min(512, context // 2) if max_gen_len is None else max_gen_len
        self.dropped = self.answer_tokens = 0

    @property
    def tokens(self) -> int:
        """Tokens in the cache."""
        return len(self._cached)

    def reset(self) -> None:
        """Forgets all messages but the system's."""
        self.messages = [m for m in self.messages if m["role"] == "system"]

    def set_system(self, text: str) -> None:
        """Sets the system message; an empty one leaves it to the template."""
        others = [m for m in self.messages if m["role"] != "system"]
        self.messages = [{"role": "system", "content": text}] * bool(text) + others

    def answer(self, text: str) -> Iterator[str]:
        """Yields the answer to a user's message as it comes.

        A caller that stops early keeps the message and the answer so far in the conversation; an
        error leaves it as it was.
        """
        return self._answer([*self.messages, {"role": "user", "content": text}])

    def regenerate(self) -> Iterator[str]:
        """Answers the last user message again; see `answer`."""
        users = [i for i, m in enumerate(self.messages) if m["role"] == "user"]
        if not users:
            raise DataError("there is no message to answer again")
        return self._answer(self.messages[: users[-1] + 1])

    def _answer(self, messages: list[dict[str, str]]) -> Iterator[str]:
        messages, ids = self._fit(messages)
        said = ""
        with contextlib.suppress(GeneratorExit):  # a caller that stops keeps what was said
            for piece in self._generate(ids):
                said += piece
                yield piece
        self.messages = [*messages, {"role": "assistant", "content": said}]

    def _fit(self, messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[int]]:
        """(messages, their tokens), without the oldest turns if an answer needs their room."""
        self.dropped = 0
        while True:
            ids = self._format.encode_chat(messages)
            if len(ids) + self.max_gen_len <= self.context:
                return messages, ids
            start = int(messages[0]["role"] == "system")
            users = [i for i, m in enumerate(messages) if m["role"] == "user" and i > start]
            if not users:
                raise SamplingError(
                    f"the message takes {len(ids)} tokens and an answer {self.max_gen_len}: that "
                    f"exceeds the context of {self.context}; shorten it or /set max_gen_len"
                )
            self.dropped += users[0] - start
            messages = messages[:start] + messages[users[0] :]

    def _generate(self, ids: list[int]) -> Iterator[str]:
        # At least one token has to be read.
        kept = len(os.path.commonprefix([ids[:-1], self._cached]))
        # The cache is donated: after an error nobody knows what is in it.
        cache, self._cache, self._cached = self._cache, None, []
        if cache is not None:
            cache = cache.replace(lengths=cache.lengths * 0 + kept)
        tokenizer = self._model.tokenizer.answers
        config = GenerationConfig(
            max_new_tokens=self.max_gen_len,
            max_seq_len=self.context,
            stop_ids=tokenizer.stop_ids,
            vocab_limit=self._model.vocab_limit,
        )
        run = Generation(self._model.llama, self._model.params, self.sampler, config)
        # A key per row: one that depended on the ids read here would depend on the cache.
        key = jax.random.fold_in(self._key, self._answers)[None]
        self._answers += 1
        # A larger cache compiles again, so it doubles.
        room = max(MIN_SLOTS, 1 << (len(ids) + self.max_gen_len - 1).bit_length())
        run.start([ids[kept:]], key=key, cache=cache, room=min(room, self.context))
        with contextlib.suppress(GeneratorExit):
            yield from stream_text(run, tokenizer)
        completion = run.completions().row(0)
        self.answer_tokens = len(completion)
        self._cache = run.state.cache
        self._cached = (ids + completion)[: int(self._cache.lengths[0])]


class Terminal:
    """Reads lines, runs commands, prints answers. With stdin piped, an error ends it."""

    def __init__(self, conversation: Conversation, signals: cli.Signals):
        self._chat, self._signals = conversation, signals
        self._clock = PhaseClock(tracing=True)
        self._interactive = sys.stdin is not None and sys.stdin.isatty()
        self._lines = 0

    def loop(self) -> None:
        """Runs until /quit or the end of the input."""
        while (read := self._read()) is not None:
            text, is_command = read
            try:
                if is_command and text.split()[0] == "/quit":
                    return
                elif is_command:
                    name, rest = (*text.split(maxsplit=1), "")[:2]
                    self._command(name, rest.strip())
                elif text.strip():
                    self._say(self._chat.answer(text))
            except AltiplanoError as e:
                if not self._interactive:
                    raise
                cli.say(str(e))

    def _read(self) -> tuple[str, bool] | None:
        """The next (message or command, whether it is a command); None at the end."""
        self._signals.set(raises=True, leave_at=None)
        interrupted = False
        while True:
            try:
                return self._read_lines()
            except EOFError:
                if self._interactive:
                    cli.stderr.print()
                return None
            except DataError as e:
                if not self._interactive:
                    raise
                cli.say(str(e))
            except KeyboardInterrupt:
                if interrupted or not self._interactive:
                    raise
                interrupted = True
                cli.stderr.print("\n[dim]press Ctrl-C again or type /quit to leave[/]")

    def _read_lines(self) -> tuple[str, bool]:
        text = self._line("> ")
        block = text.strip() == '"""'
        lines = [] if block else [text]
        # The end of the input ends a message too.
        with contextlib.suppress(EOFError):
            if block:
                while (line := self._line(". ")).strip() != '"""':
                    lines.append(line)
            else:
                while lines[-1].endswith("\\"):
                    lines[-1] = lines[-1][:-1]
                    lines.append(self._line(". "))
        return "\n".join(lines), text.startswith("/")

    def _line(self, prompt: str) -> str:
        """The next line. Raises EOFError at the end, DataError if it is not text, or huge."""
        self._lines += 1
        if self._interactive:
            if not sys.stdout.isatty():  # input() would write the prompt there, between answers
                cli.stderr.print(prompt, end="")
                prompt = ""
            try:
                return input(prompt)
            except UnicodeDecodeError as e:
                raise DataError(f"the line is not UTF-8: byte {e.object[e.start]:#04x}") from e
        where, limit = f"line {self._lines} of stdin", cli.MAX_STDIN_BYTES
        data = b"" if sys.stdin is None else sys.stdin.buffer.readline(limit + 1)
        if not data:
            raise EOFError
        if len(data) > limit:
            raise DataError(f"{where} has over {limit} bytes, too many for a message")
        return decode_utf8(data, where).removesuffix("\n").removesuffix("\r")

    def _say(self, pieces: Iterator[str]) -> None:
        """Prints an answer as it comes; Ctrl-C stops it, and the conversation goes on."""
        self._signals.set(leave_at=2)
        with cli.busy("reading"):
            first = next(pieces)
        try:
            with self._clock("answer"):
                cli.write(first)
                for piece in pieces if not self._signals.count else ():
                    cli.write(piece)
                    if self._signals.count:
                        break
        finally:
            pieces.close()
            cli.write("\n")
        self._status(self._clock.take().busy("answer"), stopped=self._signals.count > 0)

    def _status(self, seconds: float, stopped: bool) -> None:
        chat = self._chat
        if chat.dropped:
            dropped = f"dropped the oldest {chat.dropped} messages"
            cli.stderr.print(f"[dim]the context is full: {dropped}[/]")
        if self._interactive:
            n = chat.answer_tokens
            cli.stderr.print(
                f"[dim]{'stopped; ' * stopped}{n} tokens, {max(n - 1, 0) / seconds:.1f} tok/s; "
                f"{chat.tokens} of {chat.context} tokens used[/]"
            )

    def _command(self, name: str, rest: str) -> None:
        chat = self._chat
        if name == "/reset":
            chat.reset()
        elif name == "/system":
            chat.set_system(rest)
        elif name == "/regen":
            self._say(chat.regenerate())
        elif name == "/save":
            _save(rest, chat.messages)
        elif name == "/load":
            chat.messages = _load(rest)
        elif name == "/set":
            _set(chat, rest.split())
        elif name == "/help":
            cli.stderr.print(escape(HELP))
        else:
            raise ConfigError(f"unknown command {name:.80}; /help lists them")


def _save(path: str, messages: list[dict[str, str]]) -> None:
    if not path:
        raise ConfigError("/save needs a file")
    try:
        with atomic_file(Path(path).expanduser()) as f:
            f.write(json.dumps({"messages": messages}, ensure_ascii=False, indent=1).encode())
    except OSError as e:
        raise DataError(f"cannot write {path}: {e.strerror}") from e
    cli.say(f"{len(messages)} messages written to {path}", kind="")


def _load(path: str) -> list[dict[str, str]]:
    if not path:
        raise ConfigError("/load needs a file")
    file = Path(path).expanduser()
    messages = read_json(file, max_bytes=MAX_CONVERSATION_BYTES, error=DataError).get("messages")
    return messages if messages == [] else read_messages(messages)


def _set(chat: Conversation, words: list[str]) -> None:
    """/set NAME VALUE, or /set to list; raises ConfigError and changes nothing if it is wrong."""
    settings = {f.name: f for f in dataclasses.fields(chat.sampler)}
    settings |= {f.name: f for f in dataclasses.fields(ChatFlags) if f.name == "max_gen_len"}
    if not words:
        for name, f in settings.items():
            value = getattr(chat.sampler, name, chat.max_gen_len)
            cli.say(f"{name} {value}: {setting(f).help}", kind="")
        return
    name, *given = words
    if name not in settings:
        raise ConfigError(f"/set has no {name!r:.40}; it has {', '.join(settings)}")
    if len(given) != 1:
        raise ConfigError(f"/set {name} needs a value; /set alone lists the current ones")
    value = fire.parser.DefaultParseValue(given[0])  # as a flag's value is read
    if expected := misfit(settings[name], value).removesuffix(", or None"):
        raise ConfigError(f"/set {name} must be {expected}, got {given[0]:.40}")
    if name == "max_gen_len":
        chat.max_gen_len = value
    else:
        chat.sampler = chat.sampler.replace(**{name: value})


def main(*, chat: ChatFlags, sampler: TopP = SAMPLER, model: DecodingModelFlags) -> None:
    """Chats in the terminal; /help lists the commands. With stdin piped, each line is a message.

    Example: python chat.py --system "Answer in one sentence."
    """
    signals = cli.Signals(raises=True, leave_at=2)
    cli.keep_compilations()
    with cli.progress() as report:
        loaded = load_model(model, progress=report, say=cli.note)
    context = context_length(loaded.llama.config, chat.max_seq_len)
    format = chat_format_for(loaded.tokenizer, chat.chat_format)
    key = random_key(chat.seed)
    conversation = Conversation(loaded, format, context, key, sampler, chat.max_gen_len)
    conversation.set_system(chat.system or "")
    if sys.stdin is not None and sys.stdin.isatty():
        cli.stderr.print(f"[dim]{escape(model.ckpt_dir)} · /help lists the commands[/]")
    Terminal(conversation, signals).loop()


def check_alone() -> None:
    """Ends the program if it is one of several processes, before it waits for the others."""
    if distributed.launched(os.environ) or any(
        argument.partition("=")[0] == "--distributed" for argument in sys.argv[1:]
    ):
        cli.say(
            "chat.py is a single process, and this is one of several (--distributed, "
            "JAX_COORDINATOR_ADDRESS or a launcher such as srun); start it alone, or use "
            "python generate.py --chat, which several processes can run together"
        )
        sys.exit(ConfigError.exit_code)


if __name__ == "__main__":
    check_alone()
    cli.run(main)
