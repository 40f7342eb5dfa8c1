"""Training checkpoints: written in the background, whole or not at all, and checked when read.

    folder/step-00000012/manifest.json    digests of all the rest; written last
                         meta.json        config and position in the data
                         state/           the arrays, in Orbax's format

Names that start with a dot are being written or removed; no reader looks at them. Several processes
write their own parts of the arrays at once, into a folder that all of them see; the first does the rest.
"""

import concurrent.futures
import contextlib
import functools
import json
import math
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from trainers.runs.manifest import Manifest, Restored, check_digests, describe, explaining
from trainers.runs.manifest import finish_arrays, read_arrays, read_manifest, to_host
from trainers.runs.manifest import write_arrays, write_manifest
from utils import distributed
from utils.errors import CheckpointError, is_int, raise_all, reason
from utils.fields import integer
from utils.files import FolderLock, atomic_directory, fsync_tree, hide_folders
from utils.files import read_json, reading_folder, try_writing
from utils.memory import return_freed_memory

_META, _STATE = "meta.json", "state"
_META_MAX_BYTES = 1 << 26

# What is being written, or was taken out of sight.
LEFTOVER, LOCK = re.compile(r"\.step-\d+\.(tmp|old)-[0-9a-f]+"), ".lock"


class CheckpointReader:
    """Reads a folder of checkpoints, also while somebody else writes into it."""

    def __init__(self, folder: str | Path):
        self.folder = Path(os.path.abspath(folder))

    @property
    def has_past(self) -> bool:
        """Whether there is a checkpoint, or a broken one; what a killed save leaves is neither."""
        there = self._names() if self.folder.exists() else []
        return not all(LEFTOVER.fullmatch(name) for name in there)

    @property
    def steps(self) -> list[int]:
        """Numbers of the checkpoints whose files are all there, in order; [] for an empty folder.

        Raises:
            CheckpointError: there is something in the folder, but no complete checkpoint.
        """
        complete, broken = self._sort_out()
        if not complete and self._names():
            raise self._none(broken)
        return complete

    @property
    def best(self) -> int | None:
        """The step with the lowest score; None if none has one."""
        scores = [(read_manifest(self._path(step), step).score, step) for step in self.steps]
        return min((x for x in scores if x[0] is not None), default=(0, None))[1]

    def _sort_out(self) -> tuple[list[int], list[str]]:
        """Numbers of complete checkpoints, and what is wrong with the others."""
        complete, broken = [], []
        for step in self._numbers():
            try:
                read_manifest(self._path(step), step)
                complete.append(step)
            except OSError as e:
                broken.append(reason(e))
        return complete, broken

    def restore(self, like: Any, *, step: int | None = None) -> Restored:
        """A checkpoint, once every byte of it is known to be what was saved.

        Args:
            like: a tree of arrays or ShapeDtypeStructs: what is expected, and the shardings it is
                put on.
            step: which; None for the newest that is whole. A warning names each broken newer one.

        Raises:
            CheckpointError: there is none, that step is broken, or it holds other arrays.
        """
        check = check_digests
        if distributed.several():  # the first reads every byte, for all
            step, check = distributed.from_first(lambda: self._whole(step)), lambda *_: None
        with self._find(step, check) as (folder, manifest):
            meta = read_json(folder / _META, max_bytes=_META_MAX_BYTES, error=CheckpointError)
            state = read_arrays(folder / _STATE, like, manifest.arrays)
            return Restored(step=manifest.step, state=state, meta=meta)

    def _whole(self, step: int | None) -> int:
        with self._find(step, check_digests) as (_, manifest):
            return manifest.step

    def read_meta(self, step: int | None = None) -> dict[str, Any]:
        """Reads the meta of a checkpoint without its arrays.

        Args:
            step: which; None for the newest whose files are all there. `restore` looks closer and
                may find an older one: its own meta is what counts then.

        Raises:
            CheckpointError: there is none, or that step is broken.
        """

        with self._find(step, functools.partial(check_digests, names=[_META])) as (folder, _):
            return read_json(folder / _META, max_bytes=_META_MAX_BYTES, error=CheckpointError)

    @contextlib.contextmanager
    def _find(
        self, step: int | None, check: Callable[[Path, Manifest], None]
    ) -> Iterator[tuple[Path, Manifest]]:
        """A checkpoint that passes `check`, `step` or the newest; no writer removes it meanwhile."""
        broken: list[str] = []
        numbers = self._numbers() if step is None else [step]
        while numbers:
            number = numbers.pop()
            folder = self._path(number)
            with contextlib.ExitStack() as stack:
                try:
                    stack.enter_context(reading_folder(folder))
                    manifest = read_manifest(folder, number)
                    check(folder, manifest)
                except OSError as e:
                    if step is not None:
                        raise CheckpointError(
                            f"cannot use step {step}: {reason(e)}; there are {self._numbers()}"
                        ) from e
                    if not os.path.lexists(folder):
                        # A writer removed it; there is a newer one.
                        numbers = self._numbers()
                        continue
                    broken.append(reason(e))
                    if numbers:
                        warnings.warn(
                            f"checkpoint {folder.name} is broken, an older one is tried:"
                            f" {broken[-1]}",
                            stacklevel=4,
                        )
                else:
                    yield folder, manifest
                    return
        raise self._none(broken)

    def _none(self, broken: Iterable[str]) -> CheckpointError:
        there = ", ".join(self._names()[:5]) or "nothing"
        why = "".join(f"; {reason}" for reason in broken)
        return CheckpointError(
            f"{self.folder} holds no complete checkpoint, only {there}{why}; mend it, or start"
            " anew in another folder"
        )

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _numbers(self) -> list[int]:
        """Step numbers of folders named like checkpoints, sorted; times are ignored, since clocks jump."""
        digits = [name[5:] for name in self._names() if name.startswith("step-")]
        numbers = sorted(int(d) for d in digits if d.isdecimal() and d.isascii())
        return [n for n in numbers if self._path(n).name in self._names()]

    def _names(self) -> list[str]:
        try:
            names = sorted(os.listdir(self.folder))
        except OSError as e:
            raise CheckpointError(f"cannot read folder {self.folder}: {reason(e)}") from e
        return [name for name in names if name[0] != "." or LEFTOVER.fullmatch(name)]


class Checkpointer(CheckpointReader):
    """The one writer of a folder of checkpoints. A context manager."""

    def __init__(
        self,
        folder: str | Path,
        *,
        keep: int = 2,
        keep_best: bool = True,
        need_bytes: int = 0,
        clock: Callable[[], float] = time.time,
    ):
        """Takes the folder, and proves that a checkpoint can be written there.

        Args:
            folder: made if absent.
            keep: how many of the newest checkpoints stay.
            keep_best: the one with the lowest score stays too.
            need_bytes: what one checkpoint takes, if that is known.
            clock: Unix time in seconds, for people to read.

        Raises:
            ConfigError: keep or need_bytes is no such number.
            CheckpointError: the folder is another writer's, or cannot be written.
        """
        whole = {"keep": integer(1), "need_bytes": integer(0)}
        given = {"keep": keep, "need_bytes": need_bytes}
        bad = [
            f"{k}={given[k]!r}, expected {r.expected}"
            for k, r in whole.items()
            if not r.fits(given[k])
        ]
        raise_all("Checkpointer", bad)
        super().__init__(folder)
        self._keep, self._keep_best, self._clock = keep, keep_best, clock
        self._lock: FolderLock | None = None
        try:
            locked = distributed.from_first(self._take)
            distributed.together(lambda: self._try_out(locked, need_bytes))
            # The step that the run goes on from. None: there is something, and nothing was restored.
            self._base = None if self._names() else -1
        except BaseException:
            self._release()
            raise
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future | None = None

    @property
    def steps(self) -> list[int]:
        """CheckpointReader.steps without the save that is under way."""
        # In a folder that was empty the first save under way is no broken past.
        return self._sort_out()[0] if self._base == -1 else super().steps

    def start_anew(self) -> None:
        """Starts a run in a folder that has no past."""
        self._base = None if self.has_past else -1

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        try:
            self.close()
        except CheckpointError as e:
            if kind is None:
                raise
            # The error that is under way says more.
            warnings.warn(str(e), stacklevel=2)

    def save(
        self, step: int, state: Any, meta: dict[str, Any], *, score: float | None = None
    ) -> None:
        """Saves in the background; the arrays may be changed or donated once this returns.

        The first save after `restore` removes newer checkpoints than the restored one: they are
        not this run's past.

        Args:
            step: larger than the last one's; for the last one itself nothing is done.
            state: a tree of arrays, keys of jax.random among them.
            meta: what JSON can say.
            score: lower is better; NaN and infinities never are.

        Raises:
            CheckpointError: an earlier save failed (raised once), the folder holds checkpoints
                and none was restored, or the step is not larger.
        """
        self.wait()
        if self._base is None:
            raise CheckpointError(
                f"{self.folder} holds {', '.join(self._names()[:5])}; resume from there, or choose"
                " another folder"
            )
        if step == self._base:
            return
        if not is_int(step) or step < self._base:
            raise CheckpointError(f"cannot save step {step!r} after step {self._base}")
        try:
            text = json.dumps(meta, indent=1, allow_nan=False).encode()
        except (TypeError, ValueError) as e:
            raise CheckpointError(f"cannot save step {step}: its meta is not JSON: {e}") from e
        known = {
            "step": step,
            "saved_at": self._clock(),
            "score": float(score) if score is not None and math.isfinite(score) else None,
            "arrays": describe(state),
        }
        if distributed.several():
            self._write(known, state, text)
        else:
            self._pending = self._thread.submit(self._write, known, to_host(state), text)
            # In the same thread, once it has let go of the copy.
            self._thread.submit(return_freed_memory)

    def wait(self) -> None:
        """The last save is on disk when this returns. Raises CheckpointError, once, if it failed."""
        if self._pending is not None:
            done, self._pending = concurrent.futures.wait([self._pending]).done.pop(), None
            done.result()

    def close(self) -> None:
        """Waits, and gives the folder back. May be called twice. Raises CheckpointError as wait."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._release()

    def _take(self) -> str:
        """Makes and locks the folder; returns what the lock's file holds."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(self.folder / LOCK, self._clock())
            return (self.folder / LOCK).read_text()
        except CheckpointError:
            raise
        except OSError as e:
            raise CheckpointError(f"cannot write into {self.folder}: {reason(e)}") from e

    def _try_out(self, locked: str, need_bytes: int) -> None:
        """Raises CheckpointError if this process could not write here; `locked` is what `_take` returned."""
        lock = self.folder / LOCK
        if not lock.is_file() or lock.read_text() != locked:
            raise CheckpointError(
                f"{self.folder} is not the folder that process 0 sees; all processes need one that "
                "they share"
            )
        free = shutil.disk_usage(self.folder).free
        if free < need_bytes:
            raise CheckpointError(
                f"{self.folder} has {free} bytes free, a checkpoint needs {need_bytes}; free some, "
                "or choose another folder"
            )
        try:
            try_writing(self.folder)
        except OSError as e:
            raise CheckpointError(f"cannot write into {self.folder}: {reason(e)}") from e

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def restore(self, like: Any, *, step: int | None = None) -> Restored:
        """CheckpointReader.restore; the next `save` continues from that step."""
        self.wait()
        restored = super().restore(like, step=step)
        self._base = restored.step
        if newer := [n for n in self._numbers() if n > self._base]:
            warnings.warn(f"the next save removes the newer steps {newer}", stacklevel=2)
        return restored

    def _write(self, known: dict[str, Any], state: Any, meta: bytes) -> None:
        """Writes a checkpoint; of several processes one that fails fails for all."""
        step, stack = known["step"], contextlib.ExitStack()

        @explaining(self.folder, step)
        def begin() -> str:
            self._sweep()
            folder = stack.enter_context(atomic_directory(self._path(step)))
            (folder / _META).write_bytes(meta)
            (folder / _STATE).mkdir()
            return folder.name

        @explaining(self.folder, step)
        def write() -> None:
            write_arrays(folder / _STATE, state)

        @explaining(self.folder, step)
        def finish() -> None:
            finish_arrays(folder / _STATE)
            self._describe(folder, known)
            stack.close()
            self._base = step
            self._retain()

        with stack:
            folder = self.folder / distributed.from_first(begin)
            distributed.together(write)
            distributed.from_first(finish)
        self._base = step

    def _describe(self, folder: Path, known: dict[str, Any]) -> None:
        """Writes the manifest, which makes the checkpoint complete, and hides steps that are not its past."""
        fsync_tree(folder)
        write_manifest(folder, **known)
        self._hide((n for n in self._numbers() if n > self._base), even_if_read=True)

    def _retain(self) -> None:
        """Removes what need not stay, now that a newer checkpoint is on disk."""
        kept = {*self.steps[-self._keep :], *([self.best] if self._keep_best else [])}
        self._hide(step for step in self._numbers() if step not in kept)
        self._sweep()

    def _hide(self, steps: Iterable[int], *, even_if_read: bool = False) -> None:
        hide_folders([self._path(step) for step in steps], even_if_read=even_if_read)

    def _sweep(self) -> None:
        """Removes what is hidden, or was left behind by a save that was killed."""
        for path in [self.folder / name for name in self._names() if LEFTOVER.fullmatch(name)]:
            path.unlink() if path.is_symlink() else shutil.rmtree(path)
