"""What a run says of itself: metrics.jsonl, TensorBoard, a progress bar, and what speed is measured by.

Nothing here may stop a training: a sink that fails is warned of once, and the run goes on.
"""

import contextlib
import datetime
import errno
import functools
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress

from models.llama.config import ModelConfig
from utils import processes
from utils.errors import ConfigError, DataError
from utils.files import InputFile, atomic_file

Sink = Callable[[dict], None]


class MetricsLog:
    """Writes records to `<folder>/metrics.jsonl`, one JSON object a line, and to other sinks.

    A context manager. Each line is with the system when `write` returns, so that a killed process
    loses none. A sink that fails (the disk is full, the file is closed) is tried again with the next
    record; one warning is given in all.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        name: str = "metrics.jsonl",
        tensorboard: bool = False,
        start_step: int = 0,
        sinks: Sequence[Sink] = (),
    ):
        """
        Args:
            folder: made if it is not there.
            name: of the file.
            tensorboard: also write event files to `<folder>/tensorboard`.
            start_step: the first step that this run will write. Lines from there on are of a run
                that was interrupted after its last checkpoint: they are dropped, no step is there
                twice and a resumed run leaves the same curve.
            sinks: called with every record, for example a `ProgressBar`.

        Raises:
            ConfigError: tensorboardX is asked for and not installed.
        """
        folder = Path(folder)
        self._warned = False
        self._stack = contextlib.ExitStack()
        self._sinks: list[Sink] = []
        if tensorboard:
            _import_tensorboard()
        if not processes.is_first():
            return
        openers = {_JsonLines: folder / name}
        openers |= {_TensorBoard: folder / "tensorboard"} if tensorboard else {}
        for opener, path in openers.items():
            with self._warning_once():
                sink = opener(path, start_step)
                self._stack.callback(sink.close)
                self._sinks.append(sink)
        self._sinks += sinks

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_) -> None:
        with self._warning_once():
            self._stack.close()

    def write(self, record: dict) -> None:
        """Hands a record to every sink.

        Args:
            record: names to numbers, texts, lists and dicts of them, with its "step". Scalars of numpy
                and JAX become numbers, numbers that are not finite null: JSON has neither.
        """
        # Outside the guard below: an array may bring an error of the computation that makes it.
        plain = _plain(record)
        for sink in self._sinks:
            with self._warning_once():
                sink(plain)

    @contextlib.contextmanager
    def _warning_once(self) -> Iterator[None]:
        try:
            yield
        except Exception as e:  # a sink may raise anything, and training is worth more than it
            if not self._warned:
                self._warned = True
                reason = f"{type(e).__name__}: {e}"
                warnings.warn(
                    f"metrics are not all written, training goes on: {reason}", stacklevel=4
                )


class _JsonLines:
    """The sink to a file of JSON lines, continued from where `start_step` says."""

    def __init__(self, path: Path, start_step: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            lines = path.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) < start_step]
            if kept != lines:
                with atomic_file(path) as file:
                    file.writelines(kept)
        self._file = open(path, "ab", buffering=0)
        self.close = self._file.close

    def __call__(self, record: dict) -> None:
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        if (written := self._file.write(line)) < len(line):
            self._file.truncate(self._file.tell() - written)  # no half line before the next one
            raise OSError(errno.ENOSPC, "no space for a whole line", self._file.name)


def _step_of(line: bytes) -> float:
    """The step of a line; infinite where it is not whole, as a kill or a power cut may leave it."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else math.inf
        return step if isinstance(step, int) else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def whole_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """(`file:line`, line) of a file of records, without the half line that a kill may have left.

    Raises DataError if the file cannot be read.
    """
    InputFile(path, DataError)  # refuses a pipe, before open() waits for its other end
    with open(path, "rb") as file:
        for i, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                yield f"{path}:{i}", line


class _TensorBoard:
    """The sink to TensorBoard's event files.

    Through tensorboardX's synchronous writer: SummaryWriter's thread dies of a full disk, and the
    queue to it then blocks for ever.
    """

    def __init__(self, folder: Path, start_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._x = _import_tensorboard()
        # Named by the second: without the suffix, a second run within it would overwrite the first.
        name = f".{time.time_ns()}"
        self._writer = self._x.event_file_writer.EventsWriter(str(folder / "events"), name)
        self.close = self._writer.close
        if start_step:  # hides what an interrupted run wrote from there on
            session = self._x.proto.event_pb2.SessionLog
            self._event(start_step, session_log=session(status=session.START))

    def __call__(self, record: dict) -> None:
        for name, value in _scalars(record):
            self._event(record["step"], summary=self._x.summary.scalar(name, value))
        self._writer.flush()

    def _event(self, step: int, **what: Any) -> None:
        event = self._x.proto.event_pb2.Event(wall_time=time.time(), step=step, **what)
        self._writer.write_event(event)


def _import_tensorboard():
    try:
        import tensorboardX
    except ImportError as e:
        raise ConfigError(
            "TensorBoard needs tensorboardX, which is not installed; pip install tensorboardX"
        ) from e
    return tensorboardX


def _scalars(record: dict, prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name != "step":
            yield prefix + name, value


def _plain(x: Any) -> Any:
    """x in what JSON has."""
    if isinstance(x, dict):
        return {str(key): _plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(value) for value in x]
    if isinstance(x, (np.ndarray, np.generic, jax.Array)):
        return _plain(np.asarray(x).tolist())
    if isinstance(x, float) and not math.isfinite(x):
        return None
    return x


class ProgressBar:
    """A sink that shows a run's steps with its latest numbers; a context manager.

    A bar on a terminal. Elsewhere (a file, a notebook) a line now and then, which needs no widgets.
    """

    # Key of a record, what follows or precedes it, and how it is written.
    _SHOWN = (("loss", "loss {:.4f}"), ("reward", "reward {:.3f}"), ("lr", "lr {:.1e}"))
    _SHOWN += (("tokens_per_s", "{:,.0f} tok/s"),)

    def __init__(
        self, total: int, *, every: float = 20.0, console: rich.console.Console | None = None
    ):
        """
        Args:
            total: the step that a run ends with.
            every: seconds between two lines where there is no terminal.
            console: default: stderr.
        """
        self._total, self._every = total, every
        self._console = console or rich.console.Console(stderr=True)
        self._first: tuple[float, int] | None = None
        self._printed = -math.inf
        columns = rich.progress.BarColumn(), rich.progress.TextColumn("{task.description}")
        self._bars = rich.progress.Progress(
            *columns, console=self._console, disable=not self._console.is_terminal
        )
        self._task = self._bars.add_task("", total=total)

    def __enter__(self) -> "ProgressBar":
        self._bars.start()
        return self

    def __exit__(self, *_) -> None:
        self._bars.stop()

    def __call__(self, record: dict) -> None:
        """Shows a record of `MetricsLog`."""
        now, step = time.monotonic(), record["step"]
        first_time, first_step = self._first = self._first or (now, step)
        parts = [f"step {step}/{self._total}"]
        # A number that is None was not finite.
        parts += [
            form.format(math.nan if record[key] is None else record[key])
            for key, form in self._SHOWN
            if key in record
        ]
        if first_step < step < self._total:  # the first step's time is mostly compilation
            seconds = (now - first_time) / (step - first_step) * (self._total - step)
            parts.append(f"ETA {datetime.timedelta(seconds=round(seconds))}")
        text = " · ".join(parts)
        if self._console.is_terminal:
            self._bars.update(self._task, completed=step, description=text)
        elif now - self._printed >= self._every or step >= self._total:
            self._printed = now
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class PhaseClock:
    """Seconds by phase: `with clock("data"): …`. Phases do not nest."""

    def __init__(self):
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Adds the block's seconds to a phase, also where the block raises."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.monotonic() - start

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        taken, self._seconds = self._seconds, {}
        return taken


class Compilations:
    """What XLA compiled, for how long, and for which shape; `close` ends it.

    A program that comes from the cache of compilations counts: its shape was new to the process.
    """

    def __init__(self):
        self._expected = ""
        self._found: list[tuple[str, float]] = []
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def close(self) -> None:
        """Stops to listen."""
        jax.monitoring.unregister_event_duration_listener(self._on_event)

    def expect(self, what: str) -> None:
        """Names what would cause a compilation from now on: "tokens int32[8,512]"."""
        self._expected = what

    def take(self) -> list[tuple[str, float]]:
        """(the compiled function and what was expected, seconds) since the last call."""
        taken, self._found = self._found, []
        return taken

    def _on_event(self, event: str, seconds: float, **about) -> None:
        if event.startswith("/jax/core/compile/backend_compile"):
            name = str(about.get("fun_name", "")).removeprefix("jit(").removesuffix(")")
            self._found.append((f"{name} {self._expected}".strip(), seconds))


def train_flops_per_token(config: ModelConfig, mean_context: float, *, lora: bool = False) -> float:
    """Model FLOPs of one training step per token: what the maths needs, not what is recomputed.

    A multiplication by a matrix costs 2 FLOPs a parameter forward, 2 for the input's gradient and 2
    for the matrix's own; LoRA does without the last, and its own matrices (under 1 %) are not
    counted. The head counts, the look-up of the embedding does not. Attention: 12 · L · N · H a key
    that is seen, of which a causal mask leaves half of the context (as MaxText counts; PaLM's
    formula, 2204.02311 appendix B, counts all).

    Args:
        config: the model.
        mean_context: tokens of the row, or packed of the document, that a token is in; mean over
            tokens.
        lora: the model's own matrices are frozen.
    """
    c = config
    attn = 2 * c.dim * c.head_dim * (c.n_heads + c.n_kv_heads)
    matrices = c.n_layers * (attn + 3 * c.dim * c.ffn_dim) + c.vocab_size * c.dim
    attention = 12 * c.n_layers * c.n_heads * c.head_dim * mean_context / 2
    return (4 if lora else 6) * matrices + attention


# m, n, k of products [m, k] · [n, k] by backend: square ones, and as in a small model.
MATMUL_SHAPES = {"cpu": ((1024,) * 3, (2048,) * 3, (1024, 1536, 576), (1024, 4096, 2048))}
_ACCELERATOR_SHAPES = ((8192,) * 3, (8192, 14336, 4096))


@functools.cache
def matmul_peak(dtype: Any, *, seconds: float = 0.5) -> float:
    """FLOP/s of the best of a few matrix products on the default device: what a model could reach.

    Jitted `dot_general`, accumulated in float32 as the model's are. Measured once a process.

    Args:
        dtype: of the factors.
        seconds: how long to measure, beside compilation.
    """
    shapes = MATMUL_SHAPES.get(jax.default_backend(), _ACCELERATOR_SHAPES)
    return max(_matmul_flops(shape, jnp.dtype(dtype), seconds / len(shapes)) for shape in shapes)


def _matmul_flops(shape: tuple[int, int, int], dtype: np.dtype, seconds: float) -> float:
    m, n, k = shape
    dot = jax.jit(
        lambda a, b: jax.lax.dot_general(
            a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
    )
    draw = np.random.default_rng(0).standard_normal
    a, b = (jnp.asarray(draw((rows, k), np.float32), dtype) for rows in (m, n))
    dot(a, b).block_until_ready()
    best, end = math.inf, time.monotonic() + seconds
    while best == math.inf or time.monotonic() < end:
        start = time.perf_counter()
        dot(a, b).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * m * n * k / best


def peak_memory_bytes() -> int | None:
    """The most memory held so far: of this process on a CPU, else of the fullest local device.

    None where the system does not say. Not `ru_maxrss`: Linux hands it on to child processes.
    """
    if jax.default_backend() != "cpu":
        stats = [device.memory_stats() or {} for device in jax.local_devices()]
        return max(
            (s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s), default=None
        )
    try:
        with open("/proc/self/status") as f:
            fields = dict(line.split(":", 1) for line in f)
        return int(fields["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
