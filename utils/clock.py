"""Seconds by phase, and those of XLA's compilations among them."""

import contextlib
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import NamedTuple

import jax

from utils import distributed


class Lap(NamedTuple):
    """Times that a PhaseClock measured since the last lap.

    Attributes:
        seconds: by phase.
        compiling: those of `seconds` in which XLA compiled.
        compilations: (the function and the shape it was compiled for, seconds).
    """

    seconds: dict[str, float]
    compiling: dict[str, float]
    compilations: list[tuple[str, float]]

    def busy(self, phase: str) -> float:
        """Seconds of a phase without its compilations; above 0, to divide by."""
        return max(self.seconds[phase] - self.compiling.get(phase, 0.0), 1e-9)


class PhaseClock:
    """Seconds by phase, `with clock("step", "tokens [8, 512]"): …`, and XLA's compilations until `close`.

    Phases do not nest. A program from the cache of compilations counts as compiled: its shape was new
    to the process. With `tracing`, the seconds of tracing and lowering count as compiling too.
    `watch` is called with the name and the shape of each phase that begins.
    """

    def __init__(self, *, tracing: bool = False, watch: Callable[[str, str], None] | None = None):
        self._counted = "/jax/core/compile/" + "backend_compile" * (not tracing)
        self._watch = watch
        self._now, self._lap = ("", ""), Lap({}, {}, [])
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def close(self) -> None:
        """Stops listening to compilations."""
        jax.monitoring.unregister_event_duration_listener(self._on_event)

    @contextlib.contextmanager
    def __call__(self, phase: str, shape: str = "", /) -> Iterator[None]:
        """Adds the block's seconds to a phase, even if the block raises.

        `shape` names what is compiled within.
        """
        self._now, start = (phase, shape), time.monotonic()
        if self._watch is not None:
            self._watch(phase, shape)
        try:
            yield
        finally:
            _add(self._lap.seconds, phase, time.monotonic() - start)
            self._now = "", ""

    def take(self) -> Lap:
        """The Lap since the last call."""
        taken, self._lap = self._lap, Lap({}, {}, [])
        return taken

    def _on_event(self, event: str, seconds: float, **about) -> None:
        phase, shape = self._now
        if event.startswith(self._counted):
            _add(self._lap.compiling, phase, seconds)
        if event.startswith("/jax/core/compile/backend_compile"):
            name = str(about.get("fun_name", "")).removeprefix("jit(").removesuffix(")")
            self._lap.compilations.append((f"{name} {shape}".strip(), seconds))


def _add(totals: dict[str, float], name: str, seconds: float) -> None:
    totals[name] = totals.get(name, 0.0) + seconds


def moment() -> datetime:
    """The time on the first process's clock: what all processes write as today's."""
    return datetime.fromisoformat(distributed.from_first(lambda: datetime.now().isoformat()))
