"""Chat in a terminal: `python chat.py`, then type; /help lists the commands."""

import gc
import signal

if __name__ == "__main__":
    # Ctrl-C during the imports ends the program without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.disable()  # until cli.run: imports make much that stays, and looking at it takes time

import dataclasses
import glob
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

import fire
from rich.markup import escape

from models.llama.chat_format import TemplateFlags, chat_format_for
from models.llama.chat.conversation import SAMPLER, Conversation
from models.llama.generation import context_length, random_key
from models.llama.load import DecodingModelFlags, load_model
from models.llama.chat.messages import read_messages, read_tools
from sampling import TopP
from utils import distributed
from utils.clock import PhaseClock
from utils.console import cli
from utils.console.terminal import Answer, Lines
from utils.errors import AltiplanoError, ConfigError, DataError, plural
from utils.fields import Config, again, field, integer, misfit, setting
from utils.files import atomic_file, read_json

HELP = '''\
/reset               forget the conversation; the system message stays
/system TEXT         set the system message; "" is an empty one; without TEXT: the template's own
/regen               answer the last message again
/undo                take back the last message and its answer
/save FILE           write the conversation to a file
/load FILE           continue with a saved one
/set NAME VALUE      change the sampler or max_gen_len; /set alone lists their values
/help, /quit, /exit
A paste of several lines is one message. A line that ends in \\ continues in the next one. Lines between two lines of """ are one message,
which may begin with a /. Tab completes commands. Ctrl-C stops an answer; at the prompt, press it twice to leave.'''

COMMANDS = sorted(set(re.findall("/[a-z]+", HELP)))

MAX_CONVERSATION_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatFlags(Config):
    """A conversation's settings."""

    system: str | None = field(
        None, "the system message, empty as well; default: the template's own"
    )
    chat_format: str | None = again(TemplateFlags, "chat_format", None)
    template_args: str | None = again(TemplateFlags, "template_args", None)
    max_gen_len: int | None = field(
        None, "tokens per answer at most; default: 512, or half the context", integer(0)
    )
    max_seq_len: int | None = field(
        None,
        "the context; default: the model's. The oldest turns are dropped when it is full",
        integer(1, 2**31 - 1),
    )
    seed: int = field(0, "the same seed and messages give the same answers", integer(0, 2**32 - 1))


class Terminal:
    """Reads lines, runs commands, prints answers. With stdin piped, an error ends it."""

    def __init__(self, conversation: Conversation, lines: Lines, signals: cli.Signals):
        self._chat, self._lines, self._signals = conversation, lines, signals
        self._clock = PhaseClock(tracing=True)

    def loop(self) -> None:
        """Runs until /quit or the end of the input."""
        while (read := self._read()) is not None:
            text, is_command = read
            try:
                if is_command and text.split()[0] in ("/quit", "/exit"):
                    return
                elif is_command:
                    name, rest = (*text.split(maxsplit=1), "")[:2]
                    self._command(name, rest.strip())
                elif text.strip():
                    self._say(self._chat.answer(text))
            except AltiplanoError as e:
                if not self._lines.interactive:
                    raise
                cli.say(str(e))

    def _read(self) -> tuple[str, bool] | None:
        """The next (message or command, whether it is a command); None at the end."""
        self._signals.set(raises=True, leave_at=None)
        interrupted = False
        while True:
            try:
                return self._lines.read()
            except EOFError:
                if self._lines.interactive:
                    cli.stderr.print()
                return None
            except DataError as e:
                if not self._lines.interactive:
                    raise
                cli.say(str(e))
            except KeyboardInterrupt:
                if interrupted or not self._lines.interactive:
                    raise
                interrupted = True
                cli.stderr.print("\n[dim]press Ctrl-C again or type /quit to leave[/]")

    def _say(self, pieces: Iterator[str]) -> None:
        """Prints an answer as it comes; Ctrl-C stops it, and the conversation goes on."""
        self._signals.set(leave_at=2)
        with cli.busy("reading; new lengths compile first"):
            first = next(pieces)
        answer = Answer()
        try:
            with self._clock("answer"):
                answer.write(first)
                for piece in pieces if not self._signals.count else ():
                    answer.write(piece)
                    if self._signals.count:
                        break
        finally:
            pieces.close()
            answer.write("\n")
        self._status(self._clock.take().busy("answer"), stopped=self._signals.count > 0)

    def _status(self, seconds: float, stopped: bool) -> None:
        chat = self._chat
        if chat.dropped:
            dropped = f"dropped the oldest {chat.dropped} messages"
            cli.stderr.print(f"[dim]the context is full: {dropped}[/]")
        if self._lines.interactive:
            n = chat.answer_tokens
            cli.stderr.print(
                f"[dim]{'stopped; ' * stopped}{plural(n, 'token')}, {max(n - 1, 0) / seconds:.1f} tok/s; "
                f"{chat.tokens} of {chat.context} tokens used[/]"
            )

    def _command(self, name: str, rest: str) -> None:
        chat = self._chat
        if name == "/reset":
            chat.reset()
            self._note("the conversation is forgotten; the system message stays")
        elif name == "/undo":
            self._note(f"taken back, with its answer: {chat.undo()!r:.60}")
        elif name == "/system":
            chat.set_system("" if rest == '""' else rest or None)
            owner = "yours" if rest else "the template's own"
            self._note(f"the system message is {owner} from the next answer on")
        elif name == "/regen":
            self._say(chat.regenerate())
        elif name == "/save":
            _save(rest, chat)
        elif name == "/load":
            _load(rest, chat)
            self._note(f"{len(chat.messages)} messages read from {rest}")
        elif name == "/set":
            _set(chat, rest.split())
            self._note(f"{' is '.join(rest.split())}" * bool(rest))
        elif name == "/help":
            cli.stderr.print(escape(HELP))
        else:
            raise ConfigError(f"unknown command {name:.80}; /help lists them")

    def _note(self, said: str) -> None:
        """Says to a person what a command did."""
        if said and self._lines.interactive:
            cli.note(said)


def _complete(words: list[str], text: str) -> Sequence[str]:
    """Tab's proposals for the word after some words of a line."""
    if words and words[0] in ("/load", "/save"):
        return sorted(glob.glob(glob.escape(os.path.expanduser(text)) + "*"))
    known = {(): COMMANDS, ("/set",): _settings()}.get(tuple(words), ())
    return [f"{name} " for name in known if name.startswith(text)] * bool(words or text)


def _settings() -> dict[str, dataclasses.Field]:
    """The fields that /set changes."""
    settings = {f.name: f for f in dataclasses.fields(TopP)}
    return settings | {f.name: f for f in dataclasses.fields(ChatFlags) if f.name == "max_gen_len"}


def _save(path: str, chat: Conversation) -> None:
    if not path:
        raise ConfigError("/save needs a file")
    moment = chat.format.template.moment
    said = {"messages": chat.messages} | ({"tools": chat.tools} if chat.tools else {})
    said |= {"moment": moment.isoformat()} if moment else {}
    try:
        with atomic_file(Path(path).expanduser()) as f:
            f.write(json.dumps(said, ensure_ascii=False, indent=1).encode())
    except OSError as e:
        raise DataError(f"cannot write {path}: {e.strerror}") from e
    cli.say(f"{len(chat.messages)} messages written to {path}", kind="")


def _load(path: str, chat: Conversation) -> None:
    if not path:
        raise ConfigError("/load needs a file")
    file = Path(path).expanduser()
    said = read_json(file, max_bytes=MAX_CONVERSATION_BYTES, error=DataError)
    messages, tools = said.get("messages"), read_tools(said.get("tools"))
    messages = messages if messages == [] else read_messages(messages)
    if (moment := said.get("moment")) is not None:  # the date that the template writes
        try:
            chat.format = chat.format.at(datetime.fromisoformat(moment))
        except (TypeError, ValueError) as e:
            raise DataError(
                f"{path}: moment is {moment!r:.40}, expected a time as /save writes"
            ) from e
    chat.messages, chat.tools = messages, tools


def _set(chat: Conversation, words: list[str]) -> None:
    """/set NAME VALUE, or /set to list; raises ConfigError and changes nothing if it is wrong."""
    settings = _settings()
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


def main(*, model: DecodingModelFlags, chat: ChatFlags, sampler: TopP = SAMPLER) -> None:
    """Chats in the terminal; /help lists the commands. With stdin piped, each line is a message.

    Example: python chat.py --system "Answer in one sentence."
    """
    signals = cli.Signals(raises=True, leave_at=2)
    cli.keep_compilations()
    with Lines(COMMANDS, _complete) as lines:
        signals.leaving = lines.restore
        with cli.progress() as report:
            loaded = load_model(model, progress=report, say=cli.note)
        context = context_length(loaded.llama.config, chat.max_seq_len)
        format = chat_format_for(loaded.tokenizer, chat.chat_format, chat.template_args)
        key = random_key(chat.seed)
        conversation = Conversation(loaded, format, context, key, sampler, chat.max_gen_len)
        conversation.set_system(chat.system)
        if lines.interactive:
            cli.stderr.print(f"[dim]{escape(model.ckpt_dir)} · /help lists the commands[/]")
        Terminal(conversation, lines, signals).loop()


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
