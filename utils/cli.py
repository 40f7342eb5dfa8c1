"""What the command lines share: arguments, errors as one line, Ctrl-C, progress, kept compilations."""

import contextlib
import functools
import gc
import inspect
import io
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import fire
import jax
import platformdirs
import rich.console
import rich.progress

from utils import distributed
from utils.errors import AltiplanoError, ArtifactError, ConfigError

BROKEN_PIPE, INTERRUPTED, PREEMPTED = 141, 130, 75

# What stdin may hold: far more than any context.
MAX_STDIN_BYTES = 16 << 20

DEFAULT_QUESTION = "What is the capital of France?"

# What a terminal would obey instead of showing it, but for tab and newline.
_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\ufffd")

stderr = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)


def run(command: Callable[..., None]) -> None:
    """Runs a command line; an error becomes one line and the documented exit code.

    `--debug` shows the traceback as well. Of several processes (`distributed.read_launch`, by the
    command's `--distributed` or the environment) only the first writes.
    """
    gc.freeze()
    gc.enable()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.showwarning = lambda message, *_: say(str(message), "warning: ")
    if sys.stdout is None:  # closed by the caller: nothing that is written can be seen
        sys.stdout = open(os.devnull, "w")
    sys.stdout.reconfigure(encoding="utf-8")  # whatever the locale: a model may say anything
    code = _run(command, "--debug" in sys.argv)
    distributed.leave(code)
    if code:
        sys.exit(code)


def _run(command: Callable[..., None], debug: bool) -> int:
    """Returns the exit code."""
    try:
        if (arguments := _parse_arguments(command)) is not None:
            _join_others(arguments.get("distributed"))
            command(**arguments)
        sys.stdout.flush()
    except AltiplanoError as e:
        return _report(str(e), e.exit_code, debug, everywhere=getattr(e, "everywhere", False))
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        return INTERRUPTED
    except BrokenPipeError:
        return BROKEN_PIPE
    except OSError as e:
        return _report(f"cannot write or read: {e}", 1, debug)
    except SystemExit as e:
        return e.code or 0
    except Exception as e:
        if distributed.lost(e):
            distributed.abandon(_report(f"another process is gone: {e}", 1, debug))
        if not isinstance(e, MemoryError) and "RESOURCE_EXHAUSTED" not in str(e):
            raise
        return _report(f"out of memory: {e}", ArtifactError.exit_code, debug)
    return 0


def _join_others(flag: str | None) -> None:
    """If this is one of several processes, meets the others; all but the first are silent then."""
    launch = distributed.read_launch(flag, os.environ)
    if launch is None:
        return
    # gloo tells on stdout of each connection; what is written there is the user's text alone.
    kept = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = open(kept, "w", encoding="utf-8")
    distributed.start(launch, say)
    if jax.process_index() > 0:
        stderr.quiet, sys.stdout = True, open(os.devnull, "w")


def run_one_of(commands: dict[str, Callable[..., None]]) -> None:
    """As `run`, of the command that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in commands:
        sys.argv[:2] = [f"{sys.argv[0]} {name}"]
        return run(commands[name])
    names = ", ".join(commands)
    asked = name in ("-h", "--help")
    say(
        f"{sys.argv[0]} {name!r:.40}: expected a command: {names}; each has --help",
        "" if asked else "error: ",
    )
    sys.exit(0 if asked else ConfigError.exit_code)


def _parse_arguments(command: Callable[..., None]) -> dict[str, Any] | None:
    """The arguments of `command` in sys.argv, or None after --help.

    fire itself would call the command first and complain of what is left over afterwards, read
    `--prompt 12` as a number and `--json false` as a true value.
    """
    signature, found = inspect.signature(command), {}
    kinds = {name: p.annotation for name, p in signature.parameters.items()}

    @functools.wraps(command)
    def record(*args: Any, **flags: Any) -> None:
        found.update(signature.bind(*args, **flags).arguments)

    texts = {name: str for name, kind in kinds.items() if kind in (str, str | None)}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            fire.Fire(fire.decorators.SetParseFns(**texts)(record))
    except fire.core.FireExit as e:
        if e.code:
            reason = said.getvalue().partition("\n")[0].removeprefix("ERROR: ")
            raise ConfigError(f"{reason}; --help lists the flags") from e
        print(said.getvalue(), end="")
        return None
    for name, value in found.items():
        if name in texts and value == "True" and not any(a.endswith("True") for a in sys.argv):
            raise ConfigError(f'--{name} needs a value; one that starts with -- as --{name}="…"')
        if kinds[name] in (bool, bool | None) and not isinstance(value, kinds[name]):
            raise ConfigError(f"--{name} is on or off, got {value!r}; --no{name} turns it off")
    return found


def all_of(*make: Callable[[], Any]) -> list[Any]:
    """What each returns, or one ConfigError with the problems of all."""
    made, problems = [], []
    for one in make:
        try:
            made.append(one())
        except ConfigError as e:
            problems.append(str(e))
    if problems:
        raise ConfigError("; ".join(problems))
    return made


def _report(message: str, code: int, debug: bool, everywhere: bool = False) -> int:
    """Says an error; one that all processes have is said by the first alone."""
    if debug:
        traceback.print_exc()
    if stderr.quiet and not everywhere:
        stderr.quiet, message = False, f"process {jax.process_index()}: {message}"
    say(message)
    return code


def say(message: str, kind: str = "error: ") -> None:
    """Says on stderr, in one line, what is wrong."""
    stderr.print(kind + " ".join(message.translate(_CONTROLS).split()), markup=False)


def write(text: str) -> None:
    """Writes a model's text to stdout at once; a terminal is not given control characters."""
    print(text.translate(_CONTROLS) if sys.stdout.isatty() else text, end="", flush=True)


def _watch_signals(watch: Callable[[int], None]) -> None:
    """Runs `watch(file descriptor)` in a thread; each signal writes its number as a byte there."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=watch, args=(reader,), daemon=True).start()


class Interrupts:
    """What Ctrl-C does from now on: raise KeyboardInterrupt, and the second time end the process.

    Python handles a signal between two of its own steps, and a compilation is one step of many
    seconds. A thread that waits for the signal's byte is not held up by it.

    Attributes:
        count: how often Ctrl-C was pressed since `set`.
    """

    def __init__(self):
        self.set(raises=True, leave_at=2)
        _watch_signals(self._watch)

    def set(self, *, raises: bool, leave_at: int | None) -> None:
        """Starts to count anew.

        Args:
            raises: whether Ctrl-C raises KeyboardInterrupt, as soon as Python can.
            leave_at: the count at which the process ends at once; None: never.
        """
        self.count, self._leave_at = 0, leave_at
        signal.signal(signal.SIGINT, signal.default_int_handler if raises else lambda *_: None)

    def _watch(self, reader: int) -> None:
        while True:
            if os.read(reader, 1) == bytes([signal.SIGINT]):
                self.count += 1
                if self.count == self._leave_at:
                    # stdout is flushed after every write: nothing is lost.
                    stderr.show_cursor(True)
                    os._exit(INTERRUPTED)


class StopSignals:
    """SIGTERM and Ctrl-C for a training run: the first ends it after its step, the second at once.

    As with `Interrupts`, a thread waits for the signal, since Python may be within a compilation.

    Attributes:
        code: None, or the exit code of the signal that came: 75 for SIGTERM, 130 for Ctrl-C.
        at_once: whether the first ends it at once too, as there is no step to finish: at first so.
    """

    CODES = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: PREEMPTED}

    def __init__(self):
        self.code: int | None = None
        self.at_once = True
        for number in self.CODES:
            signal.signal(number, lambda *_: None)
        _watch_signals(self._watch)

    def _watch(self, reader: int) -> None:
        while True:
            code = self.CODES[signal.Signals(os.read(reader, 1)[0])]
            if self.at_once or self.code is not None:
                stderr.show_cursor(True)
                os._exit(code)
            self.code = code
            say("stopping after this step; once more leaves at once", "")


def busy(what: str) -> contextlib.AbstractContextManager:
    """Shows on a terminal that something of unknown length goes on, while the context lasts."""
    return stderr.status(f"[dim]{what}[/]") if stderr.is_terminal else contextlib.nullcontext()


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A callback (what, done, in all) that draws progress bars on stderr while the context lasts."""
    columns = rich.progress.TextColumn("{task.description}"), rich.progress.BarColumn()
    columns += rich.progress.TaskProgressColumn(), rich.progress.TimeRemainingColumn()
    tasks: dict[str, Any] = {}
    with rich.progress.Progress(
        *columns, console=stderr, transient=True, disable=not stderr.is_terminal
    ) as bars:

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what)
            bars.update(tasks[what], completed=done, total=total or None)

        yield report


def keep_compilations() -> None:
    """Compiled programs go to the user's cache folder, so that a second start need not compile."""
    folder = platformdirs.user_cache_path("altiplano") / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        warnings.warn(f"compiled programs are not kept: {e}", stacklevel=2)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class Clock:
    """Seconds since the last lap, less those that JAX spent on tracing and compiling."""

    def __init__(self):
        self.compile_seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)
        self._lap()

    def _on_event(self, event: str, seconds: float, **_) -> None:
        if event.startswith("/jax/core/compile/"):
            self.compile_seconds += seconds

    def _lap(self) -> tuple[float, float]:
        self._start = time.perf_counter(), self.compile_seconds
        return self._start

    def lap(self) -> float:
        """Seconds since the last lap, without compilation."""
        (wall, compiled), (now, compiled_now) = self._start, self._lap()
        return max(now - wall - (compiled_now - compiled), 1e-9)
