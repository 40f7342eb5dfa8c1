"""Run metrics: metrics.jsonl, trackers, and the FLOPs and times that speed is told in.

Nothing here may stop a run: a sink that fails costs one warning, and training continues.
"""

import contextlib
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

from models.llama.config import ModelConfig
from trainers.runs.trackers import open_tracker
from trainers.trainer import Trainer, Work
from utils import distributed
from utils.clock import PhaseClock
from utils.errors import DataError
from utils.files import InputFile, atomic_file
from utils.memory import peak_memory_bytes
from utils.ops import precision
from utils.sharding import current_mesh

Sink = Callable[[dict], None]


class MetricsLog:
    """Writes records to `<folder>/metrics.jsonl`, one JSON object per line, and to other sinks.

    A context manager, and the `Log` of `trainers.loop.fit`. The system has each line when `write`
    returns, so that a killed process loses none. A sink that fails (the disk is full, the file is
    closed) is tried again with the next record; there is one warning in all.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        name: str = "metrics.jsonl",
        track: Sequence[str] = (),
        start_step: int = 0,
        sinks: Sequence[Sink] = (),
        watch: Callable[[str, str], None] | None = None,
    ):
        """
        Args:
            folder: created if it is not there.
            name: the file's name.
            track: names of trackers that get the records too (trainers/runs/trackers.py).
            start_step: the first step that this run will write. Lines from there on were written
                after the checkpoint that the run resumes from: they are dropped, so that no step is
                there twice and a resumed run leaves the same curve.
            sinks: called with every record, for example a `StepTable`.
            watch: called with the name and the shape of every phase that begins.
        """
        folder = Path(folder)
        self.watch, self._warned = watch, False
        self._stack = contextlib.ExitStack()
        self._sinks: list[Sink] = []
        if not distributed.is_first():
            return
        openers = [functools.partial(_JsonLines, folder / name)]
        openers += [functools.partial(open_tracker, tracker, folder) for tracker in track]
        for opener in openers:
            with self._warning_once():
                sink = opener(start_step)
                self._stack.callback(sink.close)
                self._sinks.append(sink)
        self._sinks += sinks

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_) -> None:
        with self._warning_once():
            self._stack.close()

    def recorder(self, trainer: Trainer) -> "contextlib.closing[RunRecorder]":
        """Measures one run of a trainer, until the context ends."""
        return contextlib.closing(RunRecorder(self, trainer))

    def write(self, record: dict) -> None:
        """Hands a record to every sink.

        Args:
            record: names to numbers, texts, lists and dicts of them, with its "step". Scalars of numpy
                and JAX become numbers, numbers that are not finite null: JSON has neither.
        """
        # Outside the guard below: an array may bring an error of the computation that makes it.
        plain = _as_json(record)
        for sink in self._sinks:
            with self._warning_once():
                sink(plain)

    @contextlib.contextmanager
    def _warning_once(self) -> Iterator[None]:
        try:
            yield
        except Exception as e:  # whatever a sink raises, training is worth more
            if not self._warned:
                self._warned = True
                reason = f"{type(e).__name__}: {' '.join(str(e).split())}"
                warnings.warn(
                    f"some metrics are not written, training continues: {reason}", stacklevel=4
                )


class RunRecorder:
    """The `Recorder` of one run (`trainers.loop`): times its phases, and adds its speed to the records."""

    def __init__(self, log: MetricsLog, trainer: Trainer):
        self._trainer, self.write = trainer, log.write
        mesh = current_mesh()
        dtype = trainer.model.dtype or trainer.config.param_dtype
        # Before the clock listens: measuring compiles too.
        self._peak = (1 if mesh is None else mesh.size) * matmul_peak(dtype)
        self.phase = PhaseClock(watch=log.watch)
        self.close = self.phase.close

    def write_step(self, record: dict[str, Any], work: Work) -> None:
        """Writes a step's record, with speed, memory, seconds by phase and compilations."""
        lap = self.phase.take()
        # Compilation has an entry of its own: it does not make the step slow.
        busy = lap.busy("step")
        lora, model = self._trainer.lora is not None, self._trainer.model.config
        flops = work.tokens * train_flops_per_token(model, work.mean_context, lora=lora)
        measured = {
            "targets": work.targets,
            "tokens": work.tokens,
            "tokens_per_s": work.tokens / busy,
            "model_flops_per_s": flops / busy,
            "mfu": flops / busy / self._peak,
            "memory": peak_memory_bytes(),
            "seconds": lap.seconds,
            "compilations": lap.compilations,
        }
        self.write(record | measured)


class _JsonLines:
    """The sink to a file of JSON lines; drops the lines from `start_step` on first."""

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
    """The step of a line; infinite if it is not whole, as after a kill or a power cut."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else math.inf
        return step if isinstance(step, int) else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def whole_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """(`file:line`, line) of a file of records, without the half line that a kill may have left.

    Raises DataError if the file cannot be read.
    """
    InputFile(path, DataError)  # refuses a pipe: open() would wait for its other end
    with open(path, "rb") as file:
        for i, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                yield f"{path}:{i}", line


def earlier_records(path: Path) -> list[dict]:
    """The records of a file, as far as it can be read: for what a person is shown."""
    found = []
    with contextlib.suppress(DataError, ValueError):
        for _, line in whole_lines(path):
            found.append(json.loads(line))
    return found


def _as_json(x: Any) -> Any:
    """x in the types that JSON has."""
    if isinstance(x, dict):
        return {str(key): _as_json(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_as_json(value) for value in x]
    if isinstance(x, (np.ndarray, np.generic, jax.Array)):
        return _as_json(np.asarray(x).tolist())
    if isinstance(x, float) and not math.isfinite(x):
        return None
    return x


def train_flops_per_token(config: ModelConfig, mean_context: float, *, lora: bool = False) -> float:
    """Model FLOPs of one training step per token: those of the maths, without recomputation.

    A multiplication by a matrix costs 2 FLOPs per parameter forward, 2 for the input's gradient and 2
    for the matrix's own. LoRA saves the last 2; its own matrices (under 1 %) are not counted. The
    head counts, the embedding's look-up does not. Attention: 12 · L · N · H per key that is seen; a
    causal mask leaves half of the context (as MaxText counts; PaLM's formula, 2204.02311 appendix B,
    counts all).

    Args:
        config: the model.
        mean_context: mean over tokens of the length of their row, or packed document.
        lora: the model's own matrices are frozen.
    """
    c = config
    layer = sum(math.prod(shape) for shape in c.matrix_shapes.values())
    matrices = c.n_layers * layer + c.vocab_size * c.dim
    attention = 12 * c.n_layers * c.n_heads * c.head_dim * mean_context / 2
    return (4 if lora else 6) * matrices + attention


# (m, n, k) of products [m, k] · [n, k] by backend: square ones, and those of a small model.
MATMUL_SHAPES = {"cpu": ((1024,) * 3, (2048,) * 3, (1024, 1536, 576), (1024, 4096, 2048))}
_ACCELERATOR_SHAPES = ((8192,) * 3, (8192, 14336, 4096))


@functools.cache
def matmul_peak(dtype: Any, *, seconds: float = 0.5) -> float:
    """FLOP/s of the best of a few matrix products on the default device: a model's upper limit.

    Jitted and as exact as the model's. Measured once per process.

    Args:
        dtype: of the factors.
        seconds: how long to measure, compilation aside.
    """
    shapes = MATMUL_SHAPES.get(jax.default_backend(), _ACCELERATOR_SHAPES)
    return max(_matmul_flops(shape, jnp.dtype(dtype), seconds / len(shapes)) for shape in shapes)


def _matmul_flops(shape: tuple[int, int, int], dtype: np.dtype, seconds: float) -> float:
    m, n, k = shape

    @jax.jit
    def dot(a, b):
        options = {"precision": precision(a), "preferred_element_type": jnp.float32}
        return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), **options)

    draw = np.random.default_rng(0).standard_normal
    a, b = (jnp.asarray(draw((rows, k), np.float32), dtype) for rows in (m, n))
    dot(a, b).block_until_ready()
    best, end = math.inf, time.monotonic() + seconds
    while best == math.inf or time.monotonic() < end:
        start = time.perf_counter()
        dot(a, b).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * m * n * k / best
