"""Talking in a terminal: lines and pastes, no echo while the program writes, words that stay whole."""

import contextlib
import select
import shutil
import signal
import sys
import termios
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import platformdirs
import readline
from rich.cells import cell_len

from utils.console import cli
from utils.errors import DataError, printable

# Lines that follow each other within this time, in seconds, were pasted, or typed in advance.
PASTE_GAP = 0.03
HISTORY_LINES = 1000


class Lines:
    """Messages and commands from a terminal, or from a piped stdin; a context.

    Within it a terminal shows what is typed only at a prompt; what was typed before appears there.
    Its settings are restored on every way out, signals included.

    Args:
        commands: words that begin with a /: such a line is no part of a paste.
        complete: Tab's proposals, from the words before the cursor and the one that is being typed.

    Attributes:
        interactive: whether stdin is a terminal.
    """

    def __init__(
        self, commands: Sequence[str], complete: Callable[[list[str], str], Sequence[str]]
    ):
        self.interactive = sys.stdin is not None and sys.stdin.isatty()
        self._commands, self._complete = [[name] for name in commands], complete
        self._count, self._settings, self._kept = 0, None, []
        self._history = platformdirs.user_state_path("altiplano") / "chat_history"

    def __enter__(self) -> "Lines":
        if self.interactive:
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
                signal.signal(number, _leave)
            self._set_up_readline()
            self._hush()
        return self

    def __exit__(self, *_: Any) -> None:
        self.restore()

    def _set_up_readline(self) -> None:
        if "libedit" in (readline.__doc__ or ""):  # of macOS
            readline.parse_and_bind("bind ^I rl_complete")
        else:
            readline.parse_and_bind("set enable-bracketed-paste on")
            readline.parse_and_bind("set echo-control-characters off")
            readline.parse_and_bind("tab: complete")
        readline.set_completer_delims(" ")
        readline.set_completer(self._completion)
        readline.set_history_length(HISTORY_LINES)
        with contextlib.suppress(OSError):
            self._history.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._history.touch(0o600)  # for its owner alone
            readline.read_history_file(self._history)

    def _completion(self, text: str, index: int) -> str | None:
        words = readline.get_line_buffer()[: readline.get_begidx()].split()
        return [*self._complete(words, text), None][index]

    def _hush(self) -> None:
        """Echo off, and no lines made of what is typed: readline gets it as it came."""
        with contextlib.suppress(termios.error):
            self._settings = termios.tcgetattr(sys.stdin)
            quiet = list(self._settings)
            quiet[3] &= ~(termios.ECHO | termios.ICANON)
            quiet[3] |= termios.NOFLSH  # Ctrl-C drops nothing that was typed
            termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)

    def restore(self) -> None:
        """Gives the terminal its own settings back."""
        settings, self._settings = self._settings, None
        if settings is not None:
            with contextlib.suppress(termios.error):
                termios.tcsetattr(sys.stdin, termios.TCSANOW, settings)

    def read(self) -> tuple[str, bool]:
        """The next (message or command, whether it is a command).

        Raises:
            EOFError: at the end.
            DataError: a line is not text, or huge.
        """
        text = self._kept.pop() if self._kept else self._line("> ")
        command = text.split(maxsplit=1)[:1] in self._commands
        if "\n" in text:  # a paste in brackets, which readline returns as one line
            return text.strip("\n"), command
        lines, block, pasted = [text], text.strip() == '"""', False
        # The end of the input ends a message too.
        with contextlib.suppress(EOFError):
            if block:
                lines = []
                while (line := self._line(". ")).strip() != '"""':
                    lines.append(line)
            while not block and ((more := self._pending(command)) or lines[-1].endswith("\\")):
                if not more:
                    lines[-1] = lines[-1][:-1]
                line = self._line(". ")
                if more and line.split(maxsplit=1)[:1] in self._commands:  # typed in advance
                    self._kept.append(line)
                    break
                lines.append(line)
                pasted |= more
        return "\n".join(lines), text.startswith("/") and not pasted

    def _pending(self, command: bool) -> bool:
        """Whether a message goes on: more was typed than a line, faster than by hand."""
        wait = [sys.stdin], [], [], PASTE_GAP
        return self.interactive and not command and bool(select.select(*wait)[0])

    def _line(self, prompt: str) -> str:
        self._count += 1
        where = "the line" if self.interactive else f"line {self._count} of stdin"
        try:
            return self._ask(prompt) if self.interactive else self._piped(where)
        except UnicodeDecodeError as e:
            at = f"byte {e.object[e.start]:#04x} at offset {e.start}"
            raise DataError(f"{where} is not UTF-8: {at}") from e

    def _piped(self, where: str) -> str:
        data = b"" if sys.stdin is None else sys.stdin.buffer.readline(cli.MAX_STDIN_BYTES + 1)
        if not data:
            raise EOFError
        if len(data) > cli.MAX_STDIN_BYTES:
            raise DataError(f"{where} has over {cli.MAX_STDIN_BYTES} bytes, too many for a message")
        return data.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")

    def _ask(self, prompt: str) -> str:
        """One line, or one paste, typed at a prompt."""
        coloured = sys.stdout.isatty() and cli.stderr.color_system and not cli.stderr.no_color
        if coloured:
            prompt = f"\001\x1b[32m\002{prompt}"  # what is typed has the prompt's colour
        if not sys.stdout.isatty():  # input() would write the prompt there, between answers
            cli.stderr.print(prompt, end="")
            prompt = ""
        self.restore()
        known = readline.get_current_history_length()
        try:
            return cli.ask(prompt)
        finally:
            self._hush()
            if coloured:
                _show("\x1b[0m")
            if new := readline.get_current_history_length() - known:
                with contextlib.suppress(OSError):
                    readline.append_history_file(new, self._history)


def _leave(number: int, _: Any) -> NoReturn:
    """Ends the program by way of its `finally`s, with a shell's code for the signal."""
    raise SystemExit(128 + number)


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


class Answer:
    """Writes an answer to a terminal as it comes; a word that does not fit begins a new line.

    A word is shown as far as it is known, and taken back if its end does not fit.
    """

    def __init__(self):
        self._column, self._word = 0, ""  # cells of the line, and the word at its end
        self._wraps = sys.stdout.isatty() and not cli.stderr.is_dumb_terminal

    def write(self, text: str) -> None:
        """Adds a piece of the answer."""
        if not self._wraps:
            return cli.write(text)
        width = shutil.get_terminal_size().columns
        _show("".join(self._placed(c, width) for c in printable(text)))

    def _placed(self, c: str, width: int) -> str:
        """A character, with what puts it in its place."""
        if c == "\n":
            self._column, self._word = 0, ""
            return c
        self._column += 8 - self._column % 8 if c == "\t" else cell_len(c)
        before, self._word = self._word, "" if c.isspace() else self._word + c
        if self._column < width:  # the last column stays empty: a cursor behind it is nowhere
            return c
        moved = cell_len(before)
        if c.isspace() or not self._word:
            self._column = 0
            return "\n"
        self._column = moved + cell_len(c)
        if self._column > width // 2:  # too long to be moved
            self._column, self._word = cell_len(c), c
            return "\n" + c
        return (f"\x1b[{moved}D\x1b[K" if moved else "") + "\n" + self._word
