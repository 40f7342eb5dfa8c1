"""Command lines: flags from config dataclasses, `--help`, errors as one line, signals, progress.

A command is a function whose parameters are config dataclasses; each field with a flag (`utils.fields`)
is a flag. A parameter's default, an instance, states the command's own defaults, and its name is the
heading of its flags in `--help`. A flag that several groups have is given to each of them.

    def main(prompts: PromptFlags, sampler: TopP = TopP(0.6, 0.9)) -> None: …

The command's docstring is the head of its `--help`; an example is a paragraph of it.
"""

import contextlib
import dataclasses
import gc
import glob
import io
import logging
import os
import re
import shlex
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib
import platformdirs
import rich.console
import rich.progress
import rich.table

from utils import distributed, fields
from utils.console import usage
from utils.console.flags import parse_flags, read_flags
from utils.errors import AltiplanoError, ArtifactError, ConfigError, printable

BROKEN_PIPE, INTERRUPTED, PREEMPTED = 141, 130, 75

# What stdin may hold: far more than any context.
MAX_STDIN_BYTES = 16 << 20

# What libtpu, where it is installed, is told without a TPU: it would look for one and for the others
# of its slice, and print that it found none.
NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}

# Compiled programs that are kept from earlier starts.
_KEPT_BYTES = 1 << 30
_BROKEN_ENTRY = re.compile(
    "Error (reading|writing) persistent compilation cache entry for '([^']+)'"
)

# Faults of a jaxlib that reach a user of this program, by version. 0.10.2's (jax#39103) does not:
# tests/test_numerics.py has found no shape of ours that it computes wrong.
_JAXLIB_FAULTS = {"0.11.1": "copies whole buffers at each step of a loop (jax#40101)"}

# A function of configs; None is exit code 0.
Command = Callable[..., int | None]

stderr = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessFlags(fields.Config):
    """The flag of a command that several processes may run together."""

    distributed: str | None = fields.field(
        None,
        'this process is one of several: "coordinator=HOST:PORT,processes=4,process=0", or "auto": '
        "as the launcher says; Slurm, Open MPI and JAX_COORDINATOR_ADDRESS need no flag",
    )


def run(command: Command) -> None:
    """Runs a command line; an error becomes one line and the documented exit code.

    `--debug` shows the traceback as well. Of several processes (`distributed.read_launch`, by
    `ProcessFlags` or the environment) only the first writes.
    """
    gc.freeze()
    gc.enable()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.showwarning = _warn
    _settle_libraries()
    if sys.stdout is None:  # closed by the caller: nothing that is written can be seen
        sys.stdout = open(os.devnull, "w")
    sys.stdout.reconfigure(encoding="utf-8")  # whatever the locale: a model may say anything
    code = _run(command, "--debug" in sys.argv)
    distributed.leave(code)
    if code:
        sys.exit(code)


def _settle_libraries() -> None:
    """Sets what the libraries take from the environment, before they start."""
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    if not chips and "tpu" not in os.environ.get("JAX_PLATFORMS", ""):
        os.environ.update(NO_TPU | dict(os.environ))
    # All is float32 by design; JAX's own attention kernels do not compile with 64 bits.
    jax.config.update("jax_enable_x64", False)
    # The hub's retries: the error that ends them has a line of ours. By name if it is imported, else
    # later. lm-eval repeats flags and what a task leaves to it.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    for name in ("huggingface_hub", "lm_eval"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _warn(message: Warning | str, *_: Any) -> None:
    broken = _BROKEN_ENTRY.match(str(message))
    if broken:  # JAX would keep the file, and warn at each start: without it, it writes a new one
        folder = Path(jax.config.jax_compilation_cache_dir)
        for path in folder.glob(f"{glob.escape(broken[2])}*-cache"):
            path.unlink(missing_ok=True)
    if not broken or broken[1] == "writing":
        say(str(message), "warning: ")


def _run(command: Command, debug: bool) -> int:
    """Returns the exit code."""
    try:
        code = 0
        if {"--help", "-h"} & set(sys.argv[1:]):
            print(fields.help_page(command, sys.argv[0]), end="")
        elif "--version" in sys.argv[1:]:
            print(f"altiplano {usage.version()}")
        else:
            given = parse_flags(command, sys.argv[1:])
            if "config" in given:
                given = read_flags(command, given["config"]) | given
            _join_others(given.get("distributed"))
            if fault := _JAXLIB_FAULTS.get(jaxlib.__version__):
                say(f"jaxlib {jaxlib.__version__} {fault}; pip install -U jax", "warning: ")
            code = command(**fields.build(command, given)) or 0
        sys.stdout.flush()
        return code
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


def _join_others(flag: str | None) -> None:
    """If this is one of several processes, meets the others; all but the first are silent then."""
    launch = distributed.read_launch(flag, os.environ)
    if launch is None:
        return
    # gloo logs each connection to stdout. Redirect it to stderr: stdout carries the user's text only.
    kept = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = open(kept, "w", encoding="utf-8")
    distributed.start(launch, say)
    if jax.process_index() > 0:
        stderr.quiet, sys.stdout = True, open(os.devnull, "w")


def run_one_of(commands: dict[str, Command]) -> None:
    """Runs the command that the first argument names."""
    name = usage.require_command()
    sys.argv[:2] = [f"{sys.argv[0]} {name}"]
    run(commands[name])


def command_line() -> str:
    """The command that this process was started with, for a shell."""
    return f"python {sys.argv[0]} {shlex.join(sys.argv[1:])}"


def _report(message: str, code: int, debug: bool, everywhere: bool = False) -> int:
    """Says an error; one that all processes have is said by the first alone."""
    if debug:
        traceback.print_exc()
    if stderr.quiet and not everywhere:
        stderr.quiet, message = False, f"process {jax.process_index()}: {message}"
    say(message)
    return code


def say(message: str, kind: str = "error: ") -> None:
    """Says on stderr, in one line, what is wrong: in colour on a terminal, unless NO_COLOR is set."""
    style = {"error: ": "red", "warning: ": "yellow"}.get(kind)
    stderr.print(kind + " ".join(printable(message).split()), markup=False, style=style)


def note(message: str) -> None:
    """Says on stderr, in one line, what a user may want to know."""
    say(message, "")


def write(text: str) -> None:
    """Writes a model's text to stdout at once; a terminal is not given control characters."""
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def ask(prompt: str) -> str:
    """A line typed at a prompt, without its end. Raises EOFError at the end of stdin."""
    return input(prompt)


class Signals:
    """Ends the process at Ctrl-C, or counts it for whoever looks; SIGTERM too if asked for.

    Python handles a signal between two of its own steps, and a compilation is one step of many
    seconds. So a thread waits for the byte that a signal writes into a pipe.

    Attributes:
        count: signals since `set`.
        code: the exit code of the first one: 130 for Ctrl-C, 75 for SIGTERM; None: none came.
        leaving: called before the process ends at once.
    """

    CODES = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: PREEMPTED}

    def __init__(self, *, sigterm: bool = False, raises: bool = False, leave_at: int | None = 1):
        self._numbers = self.CODES if sigterm else [signal.SIGINT]
        self.code: int | None = None
        self.leaving: Callable[[], None] | None = None
        self.set(raises=raises, leave_at=leave_at)
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()

    def set(self, *, raises: bool = False, leave_at: int | None = 1, notice: str = "") -> None:
        """Counts from 0 again.

        Args:
            raises: whether Ctrl-C raises KeyboardInterrupt, as soon as Python can.
            leave_at: the count at which the process ends at once; None: never.
            notice: said at a signal that does not end the process.
        """
        self.count, self._leave_at, self._notice = 0, leave_at, notice
        for number in self._numbers:
            # Python writes the byte only for a signal that has a handler.
            signal.signal(number, signal.default_int_handler if raises else lambda *_: None)

    def _watch(self, reader: int) -> None:
        while True:
            if (number := os.read(reader, 1)[0]) not in self._numbers:
                continue
            self.count += 1
            if self.count == self._leave_at:
                # stdout is flushed after every write: nothing is lost.
                stderr.show_cursor(True)
                if self.leaving is not None:
                    self.leaving()
                os._exit(self.CODES[number])
            self.code = self.code or self.CODES[number]
            if self._notice:
                say(self._notice, "")


def busy(what: str) -> contextlib.AbstractContextManager:
    """Shows on a terminal that something of unknown length goes on, while the context lasts."""
    return stderr.status(f"[dim]{what}[/]") if stderr.is_terminal else contextlib.nullcontext()


def bars(
    clock: rich.progress.ProgressColumn, console: rich.console.Console = stderr
) -> rich.progress.Progress:
    """Progress bars on a terminal, which vanish with their context; elsewhere nothing."""
    columns = rich.progress.TextColumn("{task.description}"), rich.progress.BarColumn()
    columns += rich.progress.TaskProgressColumn(), clock
    return rich.progress.Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    )


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A callback (what, done, in all) that draws progress bars on stderr while the context lasts."""
    tasks: dict[str, Any] = {}
    with bars(rich.progress.TimeRemainingColumn()) as shown:

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = shown.add_task(what)
            shown.update(tasks[what], completed=done, total=total or None)

        yield report


def check_writable(out: str | None, flag: str = "--out") -> None:
    """Before anything is computed, raises ConfigError if a flag's file could not be written."""
    folder = Path(os.path.abspath(out or "")).parent
    if out is not None and not os.access(folder, os.W_OK):
        raise ConfigError(f"{flag} {out}: cannot write into the folder {folder}; make it first")


def table(heads: Sequence[str], rows: Iterable[Sequence[str] | None], title: str = "") -> str:
    """A table as text: the first column to the left, numbers to the right; None draws a line."""
    out = rich.table.Table(title=title or None)
    for i, head in enumerate(heads):
        out.add_column(head, justify="right" if i else "left")
    for row in rows:
        out.add_section() if row is None else out.add_row(*row)
    page = rich.console.Console(file=io.StringIO(), width=1000, markup=False)
    page.print(out)
    return page.file.getvalue()


def keep_compilations() -> None:
    """Compiled programs go to the user's cache folder, so that a second start need not compile."""
    folder = platformdirs.user_cache_path("altiplano") / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        warnings.warn(f"compiled programs are not kept: {e}", stacklevel=2)
        return
    _drop_oldest(folder, _KEPT_BYTES)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # JAX's own bound writes nothing any more once an entry has lost its -atime file (jax#39880).
    jax.config.update("jax_compilation_cache_max_size", -1)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _drop_oldest(folder: Path, most: int) -> None:
    """Removes the compiled programs that were not used for longest, beyond so many bytes."""
    found, kept = [], 0
    for path in folder.glob("*-cache"):
        with contextlib.suppress(OSError):  # another process removed it
            status = path.stat()
            found.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    for _, size, path in sorted(found, reverse=True):
        kept += size
        if kept > most:
            with contextlib.suppress(OSError):
                path.unlink()
