"""A folder of checkpoints as files: whether one could be written there, and how one goes away."""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from utils.errors import CheckpointError
from utils.files import fsync, hide_folder

# What is being written, or was taken out of sight.
LEFTOVER, LOCK = re.compile(r"\.step-\d+\.(tmp|old)-[0-9a-f]+"), ".lock"

# The longest path that Orbax makes in a step's folder, and the folder's own while it is written.
_DEEPEST = (
    ".step-00000000.tmp-00000000",
    "state.orbax-checkpoint-tmp/ocdbt.process_000/d",
    "0" * 32,
)


def try_out(folder: Path, locked: str, need_bytes: int) -> None:
    """Raises CheckpointError if a checkpoint could not be written: found out before training.

    Args:
        folder: of the checkpoints.
        locked: what the first process wrote into its lock.
        need_bytes: of one checkpoint.
    """
    lock = folder / LOCK
    if not lock.is_file() or lock.read_text() != locked:
        raise CheckpointError(
            f"{folder} is not the folder that process 0 sees; all processes need one that they share"
        )
    free = shutil.disk_usage(folder).free
    if free < need_bytes:
        raise CheckpointError(
            f"{folder} has {free} bytes free, a checkpoint needs {need_bytes}; free some, or choose"
            " another folder"
        )
    probe = folder / f".probe-{secrets.token_hex(8)}"
    try:
        deep = (probe / os.path.join(*_DEEPEST)).parent
        deep.mkdir(parents=True)
        with open(deep / _DEEPEST[-1], "xb") as f:
            f.write(bytes(1 << 16))
            f.flush()
            os.fsync(f.fileno())
        shutil.rmtree(probe)
    except OSError as e:
        shutil.rmtree(probe, ignore_errors=True)
        raise CheckpointError(f"cannot write into {folder}: {reason(e)}") from e


def reason(e: BaseException) -> str:
    """One line."""
    text = str(e) or type(e).__name__
    if isinstance(e, OSError) and e.strerror:
        text = f"{e.strerror.lower()}: {e.filename}" if e.filename else e.strerror.lower()
    return " ".join(text.split())[:500]


@contextlib.contextmanager
def explaining(folder: Path, step: int) -> Iterator[None]:
    """Turns whatever is raised into a CheckpointError of that step."""
    try:
        yield
    # Orbax and TensorStore raise whatever they like.
    except Exception as e:
        raise CheckpointError(
            f"cannot save step {step} in {folder}: {reason(e)}; earlier checkpoints are untouched"
        ) from e


def hide(paths: Sequence[Path], *, even_if_read: bool) -> None:
    """Takes checkpoints of one folder out of sight in one go each: never is half a one to be seen.

    One that is being read is left for the next time, unless `even_if_read`.
    """
    for path in paths:
        new = path.with_name(f".{path.name}.old-{secrets.token_hex(4)}")
        if even_if_read or not path.is_dir():
            os.rename(path, new)
        else:
            hide_folder(path, new)
    if paths:
        fsync(paths[0].parent)


def sweep(paths: Iterable[Path]) -> None:
    """Removes files, links and folders for good."""
    for path in paths:
        path.unlink() if path.is_symlink() else shutil.rmtree(path)
