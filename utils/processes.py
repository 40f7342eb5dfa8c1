"""Several processes that run one program: what they tell each other between its steps.

JAX's own collectives carry it, so all processes must come by in the same order. Where there is one
process, nothing is sent.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from utils import errors
from utils.errors import ConfigError, TrainError
from utils.trees import flatten

# How long the others may take until they come by: rewards, digests of a checkpoint, an export.
WAIT_SECONDS = 1800


def several() -> bool:
    """Whether there are other processes."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def barrier() -> None:
    """Returns once all processes are here.

    Raises:
        TrainError: some did not come; they are named.
    """
    if not several():
        return
    try:
        # Not one of the collectives: those wait for ever, and do not say for whom.
        multihost.get_barrier_sync_fn()(key="altiplano", timeout_ms=WAIT_SECONDS * 1000)
    except (jax.errors.JaxRuntimeError, ValueError) as e:
        reason = " ".join(str(e).split())
        raise TrainError(f"processes did not come together: {reason:.600}") from e


def agree(flag: bool | int = 0, error: Exception | None = None) -> int:
    """The largest flag of all processes; raises on all of them if one brings an error.

    Args:
        flag: what this process says, from 0.
        error: what happened to this process; it is raised here, and one that names this process
            elsewhere, with the same exit code.
    """
    if not several():
        if error is not None:
            raise error
        return int(flag)
    barrier()
    told = multihost_utils.process_allgather(np.asarray([flag, error is not None], np.int32))
    if not told[:, 1].any():
        return int(told[:, 0].max())
    mine = "" if error is None else json.dumps([type(error).__name__, str(error)])
    texts = gather(mine)
    process = int(np.flatnonzero(told[:, 1])[0])
    if error is None:
        name, message = json.loads(texts[process])
        kind = getattr(errors, name, TrainError)
        text = message if kind is not TrainError or name == "TrainError" else f"{name}: {message}"
        error = kind(f"process {process}: {text}")
        error.everywhere = True
    raise error


def gather(text: str) -> list[str]:
    """The texts of all processes, in their order."""
    if not several():
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    width = 1 << int(sizes.max()).bit_length()  # few shapes, as each is compiled
    rows = multihost_utils.process_allgather(np.pad(data, (0, width - len(data))))
    return [rows[i, :n].tobytes().decode() for i, n in enumerate(sizes.reshape(-1))]


def together(make: Callable[[], Any]) -> Any:
    """What `make` returns here, once all processes have called theirs; raises on all if one fails."""
    value, error = None, None
    try:
        value = make()
    except Exception as e:  # whatever it is, the others wait to hear of it
        error = e
    agree(error=error)
    return value


def from_first(make: Callable[[], Any]) -> Any:
    """What `make` returns on the first process, on all of them, as JSON has it; or its error."""
    if not several():
        return make()
    value = together(make if is_first() else lambda: None)
    data = np.frombuffer(json.dumps(value).encode() if is_first() else b"", np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    padded = np.zeros(1 << size.bit_length(), np.uint8)
    padded[: len(data)] = data
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded))[:size].tobytes())


def to_first(tree: Any) -> Any:
    """A tree's arrays in the host memory of the first process, one after the other; else None."""
    if not several():
        return tree

    def fetch(x: jax.Array) -> np.ndarray | None:
        x = multihost_utils.process_allgather(x, tiled=True)
        return x if is_first() else None

    return jax.tree.map(fetch, tree)


def check_same(values: dict[str, Any]) -> None:
    """All processes were started alike.

    Args:
        values: by names that a user knows, nested dicts among them; what JSON can say.

    Raises:
        ConfigError: on all processes; names a process that is not like the first, and each value.
    """
    rows = [json.loads(row) for row in gather(json.dumps(flatten(values, "."), default=str))]
    for process, row in enumerate(rows):
        names = [name for name in rows[0] | row if row.get(name) != rows[0].get(name)]
        if names:
            listed = "; ".join(
                f"{name} is {row.get(name)!r:.60}, and {rows[0].get(name)!r:.60} there"
                for name in names[:5]
            )
            error = ConfigError(
                f"process {process} is not like process 0: {listed}; start all with the same "
                "flags, files and code"
            )
            error.everywhere = True
            raise error
