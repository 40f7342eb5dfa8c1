"""Chat in a terminal: `python chat.py`, then type; /help lists the commands."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fire
import jax
import rich.console
from rich.markup import escape

import console
import sampling
from decoding import Generation, GenerationConfig
from generate import random_key, stream_text
from models.llama.chat_format import ChatFormat, chat_format_for, check_messages
from models.llama.hub import DEFAULT_MODEL
from utils.errors import AltiplanoError, ConfigError, DataError, SamplingError
from utils.files import atomic_file, read_json
from utils.kvcache import KVCache

HELP = '''\
/reset               forget the conversation
/system TEXT         set the system message (without TEXT: the model's own)
/regen               answer the last message again
/save FILE           write the conversation to a file
/load FILE           go on with a saved one
/set NAME VALUE      temperature, top_p, top_k, min_p, repetition_penalty or max_gen_len
/help, /quit
A line that ends in \\ goes on in the next one; so does everything between two lines of """.
Ctrl-C stops an answer.'''

MAX_CONVERSATION_BYTES = 16 << 20


class Conversation:
    """Messages, and the KV cache of those that the model has read.

    Attributes:
        messages: the system message, if any, then user and assistant in turn.
        sampler: may be replaced between answers.
        max_gen_len: tokens an answer.
        dropped: messages that the last answer had to leave out, the oldest ones, for lack of room.
    """

    def __init__(self, model: console.Model, format: ChatFormat, context: int, key: jax.Array):
        self._model, self._format, self._context, self._key = model, format, context, key
        self._cache: KVCache | None = None
        self._cached: list[int] = []  # the tokens whose keys and values the cache holds
        self._answers = 0
        self.messages: list[dict[str, str]] = []
        self.sampler = sampling.TopP(0.6, 0.9)
        self.max_gen_len = min(512, context // 2)
        self.dropped = 0

    @property
    def tokens(self) -> int:
        """Tokens in the cache."""
        return len(self._cached)

    def set_system(self, text: str) -> None:
        """Sets the system message; an empty one leaves it to the template."""
        if self.messages and self.messages[0]["role"] == "system":
            self.messages.pop(0)
        if text:
            self.messages.insert(0, {"role": "system", "content": text})

    def answer(self, text: str) -> Iterator[str]:
        """Yields the answer to a user's message as it comes.

        What was said so far stays in the conversation if the caller stops early. On an error the
        message is taken back.
        """
        self.messages.append({"role": "user", "content": text})
        said = ""
        try:
            for piece in self._generate():
                said += piece
                yield piece
        except AltiplanoError:
            self.messages.pop()
            raise
        except BaseException:
            self.messages.append({"role": "assistant", "content": said})
            raise
        self.messages.append({"role": "assistant", "content": said})

    def regenerate(self) -> Iterator[str]:
        """Answers the last user message again."""
        while self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        if not self.messages or self.messages[-1]["role"] != "user":
            raise DataError("there is no message to answer again")
        return self.answer(self.messages.pop()["content"])

    def _generate(self) -> Iterator[str]:
        ids = self._fitting_ids()
        kept = _common_prefix(ids[:-1], self._cached)  # one token at least has to be read
        cache, self._cache = self._cache, None  # it is donated: nobody may use it again
        if cache is not None:
            cache = cache.replace(lengths=cache.lengths * 0 + kept)
        tokenizer = self._model.tokenizer
        config = GenerationConfig(
            max_new_tokens=self.max_gen_len,
            max_seq_len=self._context,
            stop_ids=tokenizer.stop_ids,
            vocab_limit=self._model.vocab_limit,
        )
        run = Generation(self._model.llama, self._model.params, self.sampler, config)
        key = jax.random.fold_in(self._key, self._answers)
        self._answers += 1
        self._cached = []
        run.start([ids[kept:]], key=key, cache=cache)
        try:
            yield from stream_text(run, tokenizer)
        finally:
            self._cache = run.state.cache
            self._cached = (ids + run.completions().row(0))[: int(self._cache.lengths[0])]

    def _fitting_ids(self) -> list[int]:
        """The conversation as tokens; whole oldest turns are dropped until an answer fits."""
        self.dropped = 0
        while True:
            ids = self._format.encode_chat(self.messages)
            if len(ids) + self.max_gen_len <= self._context:
                return ids
            start = int(self.messages[0]["role"] == "system")
            turn = self.messages[start : start + 2]
            if len(self.messages) - start < 3:
                raise SamplingError(
                    f"the message takes {len(ids)} tokens and an answer {self.max_gen_len}: that "
                    f"exceeds the context of {self._context}; shorten it or /set max_gen_len"
                )
            del self.messages[start : start + len(turn)]
            self.dropped += len(turn)


def _common_prefix(a: list[int], b: list[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return min(len(a), len(b))


class Terminal:
    """Reads lines, runs commands, prints answers."""

    def __init__(self, conversation: Conversation):
        self._chat = conversation
        self._out = rich.console.Console(highlight=False, soft_wrap=True)
        self._interactive = sys.stdin is not None and sys.stdin.isatty()

    def loop(self) -> None:
        """Until /quit or the end of the input."""
        while (text := self._read()) is not None:
            try:
                if not text.strip():
                    continue
                if not text.startswith("/"):
                    self._say(self._chat.answer(text))
                elif text.split()[0] == "/quit":
                    return
                else:
                    self._command(*_split_command(text))
            except AltiplanoError as e:
                console.stderr.print(f"[red]error:[/] {escape(' '.join(str(e).split()))}")

    def _read(self) -> str | None:
        """The next message or command, of one or more lines; None at the end."""
        try:
            text = self._line("> ")
            if text.strip() == '"""':
                lines = []
                while (line := self._line(". ")).strip() != '"""':
                    lines.append(line)
                return "\\n".join(lines)
            while text.endswith("\\\\"):
                text = text[:-1] + "\\n" + self._line(". ")
            return text
        except EOFError:
            return None
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            console.stderr.print("\\n[dim]/quit leaves[/]")
            return ""

    def _line(self, prompt: str) -> str:
        try:
            return input(prompt if self._interactive else "")
        except UnicodeDecodeError as e:
            raise DataError(f"stdin is not UTF-8: byte {e.object[e.start]:#04x}") from e

    def _say(self, pieces: Iterator[str]) -> None:
        """Prints an answer as it comes; Ctrl-C stops it, and the conversation goes on."""
        try:
            for piece in pieces:
                self._out.print(piece, end="", markup=False)
                self._out.file.flush()
        except KeyboardInterrupt:
            pieces.close()
            console.stderr.print("[dim]… stopped[/]", end="")
        self._out.print()
        if self._chat.dropped:
            n = self._chat.dropped
            console.stderr.print(
                f"[dim]the context is full: the oldest {n} messages are dropped[/]"
            )

    def _command(self, name: str, rest: str) -> None:
        chat = self._chat
        if name == "/reset":
            chat.messages.clear()
        elif name == "/system":
            chat.set_system(rest)
        elif name == "/regen":
            self._say(chat.regenerate())
        elif name == "/save":
            _save(rest, chat.messages)
        elif name == "/load":
            chat.messages[:] = _load(rest)
        elif name == "/set":
            _set(chat, *(rest.split() + ["", ""])[:2])
        elif name == "/help":
            console.stderr.print(escape(HELP))
        else:
            raise ConfigError(f"unknown command {name}; /help lists them")


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


def _load(path: str) -> list[dict[str, str]]:
    if not path:
        raise ConfigError("/load needs a file")
    file = Path(path).expanduser()
    messages = read_json(file, max_bytes=MAX_CONVERSATION_BYTES, error=DataError).get("messages")
    if messages != []:
        check_messages(messages, add_generation_prompt=False)
    return messages


def _set(chat: Conversation, name: str, value: str) -> None:
    """/set NAME VALUE; raises ConfigError or SamplingError and changes nothing if it is wrong."""
    fields = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_gen_len")
    if name not in fields:
        raise ConfigError(f"/set {name}: expected one of {', '.join(fields)}")
    try:
        number: Any = int(value) if name in ("top_k", "max_gen_len") else float(value)
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
    debug: bool = False,
) -> None:
    """Chats in the terminal; /help lists the commands.

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
        debug: show the traceback of an error.
    """
    console.keep_compilations()
    sampler = sampling.TopP(temperature, top_p, top_k, min_p, repetition_penalty)
    sampling.check_sampler(sampler)
    key = random_key(seed)
    GenerationConfig(max_new_tokens=max_gen_len, max_seq_len=max_seq_len)
    model = console.load_model(ckpt_dir, tokenizer_path, dtype)
    format = chat_format_for(model.tokenizer, chat_format)
    context = max_seq_len or model.llama.config.max_seq_len
    conversation = Conversation(model, format, context, key)
    conversation.sampler = sampler
    conversation.max_gen_len = max_gen_len or conversation.max_gen_len
    conversation.set_system(system or "")
    if sys.stdin is not None and sys.stdin.isatty():
        console.stderr.print(f"[dim]{escape(ckpt_dir)} · /help lists the commands[/]")
    Terminal(conversation).loop()


if __name__ == "__main__":
    texts = ("ckpt_dir", "tokenizer_path", "system", "chat_format", "dtype")
    console.run(fire.decorators.SetParseFns(**dict.fromkeys(texts, str))(main))
