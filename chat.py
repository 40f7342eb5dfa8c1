"""Chat in a terminal: `python chat.py`, then type; /help lists the commands."""

import gc
import signal

if __name__ == "__main__":
    # Ctrl-C during the imports ends the program without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.disable()  # until cli.run: imports make much that stays, and looking at it takes time

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.markup import escape

import sampling
from conversation import Conversation
from models.llama.chat_format import chat_format_for, check_messages
from models.llama.decoding import GenerationConfig
from models.llama.generation import context_length, random_key
from models.llama.hub import DEFAULT_MODEL
from models.llama.loading import load_model
from models.llama.tokenizer import decode_utf8
from utils import cli, distributed
from utils.errors import AltiplanoError, ConfigError, DataError
from utils.files import atomic_file, read_json

with contextlib.suppress(ImportError):  # not on Windows
    import readline  # noqa: F401, gives input() line editing and a history

HELP = '''\
/reset               forget the conversation; the system message stays
/system TEXT         set the system message (without TEXT: the model's own)
/regen               answer the last message again
/save FILE           write the conversation to a file
/load FILE           go on with a saved one
/set NAME VALUE      temperature, top_p, top_k, min_p, repetition_penalty or max_gen_len
/help, /quit
A line that ends in \\ goes on in the next one. Lines between two lines of """ are one message,
which may begin with a /. Ctrl-C stops an answer; twice while nothing is being answered, it leaves.'''

MAX_CONVERSATION_BYTES = 16 << 20


class Terminal:
    """Reads lines, runs commands, prints answers. With stdin piped, an error ends it."""

    def __init__(self, conversation: Conversation, interrupts: cli.Signals):
        self._chat, self._interrupts = conversation, interrupts
        self._clock = cli.Clock()
        self._interactive = sys.stdin is not None and sys.stdin.isatty()
        self._lines = 0

    def loop(self) -> None:
        """Until /quit or the end of the input."""
        while (read := self._read()) is not None:
            text, is_command = read
            try:
                if is_command and text.split()[0] == "/quit":
                    return
                elif is_command:
                    self._command(*_split_command(text))
                elif text.strip():
                    self._say(self._chat.answer(text))
            except AltiplanoError as e:
                if not self._interactive:
                    raise
                cli.say(str(e))

    def _read(self) -> tuple[str, bool] | None:
        """The next (message or command, whether it is a command); None at the end."""
        self._interrupts.set(raises=True, leave_at=None)
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
                cli.stderr.print("\n[dim]Ctrl-C again or /quit leaves[/]")

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
        """The next line. Raises EOFError at the end, DataError if it is no text or huge."""
        self._lines += 1
        if self._interactive:
            if not sys.stdout.isatty():  # input() would write the prompt there, between answers
                cli.stderr.print(prompt, end="")
                prompt = ""
            try:
                return input(prompt)
            except UnicodeDecodeError as e:
                raise DataError(f"the line is not UTF-8: byte {e.object[e.start]:#04x}") from e
        limit = cli.MAX_STDIN_BYTES
        data = b"" if sys.stdin is None else sys.stdin.buffer.readline(limit + 1)
        if not data:
            raise EOFError
        if len(data) > limit:
            raise DataError(f"line {self._lines} of stdin has over {limit} bytes: no message")
        text = decode_utf8(data, f"line {self._lines} of stdin")
        return text.removesuffix("\n").removesuffix("\r")

    def _say(self, pieces: Iterator[str]) -> None:
        """Prints an answer as it comes; Ctrl-C stops it, and the conversation goes on."""
        self._interrupts.set(leave_at=2)
        with cli.busy("reading"):
            first = next(pieces)
        self._clock.lap()
        try:
            cli.write(first)
            for piece in pieces if not self._interrupts.count else ():
                cli.write(piece)
                if self._interrupts.count:
                    break
        finally:
            pieces.close()
            cli.write("\n")
        self._status(self._clock.lap(), stopped=self._interrupts.count > 0)

    def _status(self, seconds: float, stopped: bool) -> None:
        chat = self._chat
        if chat.dropped:
            cli.stderr.print(
                f"[dim]the context is full: the oldest {chat.dropped} messages are dropped[/]"
            )
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


def _split_command(text: str) -> tuple[str, str]:
    name, *rest = text.split(maxsplit=1)
    return name, rest[0].strip() if rest else ""


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
    if messages != []:
        check_messages(messages, add_generation_prompt=False)
    return messages


def _set(chat: Conversation, words: list[str]) -> None:
    """/set NAME VALUE; raises ConfigError or SamplingError and changes nothing if it is wrong."""
    fields = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_gen_len")
    if len(words) != 2 or words[0] not in fields:
        raise ConfigError(f"/set needs a name and a value; names are {', '.join(fields)}")
    name, value = words
    try:
        number = int(value) if name in ("top_k", "max_gen_len") else float(value)
    except ValueError as e:
        raise ConfigError(f"/set {name} {value}: expected a number") from e
    if name == "max_gen_len":
        GenerationConfig(max_new_tokens=number)
        chat.max_gen_len = number
        return
    sampler = chat.sampler.replace(**{name: number})
    sampling.check_sampler(sampler)
    chat.sampler = sampler


def main(
    ckpt_dir: str = DEFAULT_MODEL,
    tokenizer_path: str | None = None,
    system: str | None = None,
    chat_format: str | None = None,
    max_gen_len: int | None = None,
    max_seq_len: int | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float | None = None,
    seed: int = 0,
    dtype: str = "auto",
    allow_extra: bool = False,
    check_finite: bool = False,
    tie: bool | None = None,
    mesh: str | None = None,
    debug: bool = False,
) -> None:
    """Chats in the terminal; /help lists the commands. With stdin piped, a line is a message.

    Args:
        ckpt_dir: a checkpoint folder, a .gguf file, a Hugging Face id, or the default model's name.
        tokenizer_path: a tokenizer file or folder; default: the checkpoint's own.
        system: the system message; default: the template's own.
        chat_format: llama2, llama3 or the name of one of the checkpoint's templates.
        max_gen_len: tokens an answer at most; default: 512, or half the context.
        max_seq_len: the context; default: the model's. Oldest turns are dropped when it is full.
        temperature: divides the logits; 0 takes the most probable token each time.
        top_p: nucleus sampling, in (0, 1]; 1 is off.
        top_k: only the k most probable tokens; 0 is off.
        min_p: only tokens of at least min_p times the largest probability; 0 is off.
        repetition_penalty: above 1 makes tokens that were there less likely.
        seed: the same seed and messages give the same answers.
        dtype: float32, bfloat16, float16, or auto: float32 on a CPU, bfloat16 elsewhere.
        allow_extra: ignore tensors of the checkpoint that the model does not have.
        check_finite: refuse weights with NaN or infinity, instead of a warning.
        tie: use the embedding as output head, whatever the file says; --notie: the file's own head.
        mesh: how devices share the model, "data=2,tensor=4"; default: all devices, as fits it.
        debug: show the traceback of an error.
    """
    interrupts = cli.Signals(raises=True, leave_at=2)
    cli.keep_compilations()
    sampler = sampling.TopP(temperature, top_p, top_k, min_p, repetition_penalty)
    sampling.check_sampler(sampler)
    key = random_key(seed)
    GenerationConfig(max_new_tokens=max_gen_len, max_seq_len=max_seq_len)
    options = {"allow_extra": allow_extra, "check_finite": check_finite, "tie": tie}
    model = load_model(ckpt_dir, tokenizer_path, dtype, mesh, **options)
    context = context_length(model.llama.config, max_seq_len)
    conversation = Conversation(model, chat_format_for(model.tokenizer, chat_format), context, key)
    conversation.sampler = sampler
    if max_gen_len is not None:
        conversation.max_gen_len = max_gen_len
    conversation.set_system(system or "")
    if sys.stdin is not None and sys.stdin.isatty():
        cli.stderr.print(f"[dim]{escape(ckpt_dir)} · /help lists the commands[/]")
    Terminal(conversation, interrupts).loop()


def check_alone() -> None:
    """Ends one of several processes, before it waits for the others: they have one terminal."""
    if distributed.launched(os.environ) or any(
        argument.partition("=")[0] == "--distributed" for argument in sys.argv[1:]
    ):
        cli.say(
            "chat.py is a single process, and this is one of several (--distributed, "
            "JAX_COORDINATOR_ADDRESS or a launcher such as srun); start it alone, or use "
            "python generate.py --chat, which several run together"
        )
        sys.exit(ConfigError.exit_code)


if __name__ == "__main__":
    check_alone()
    cli.run(main)
