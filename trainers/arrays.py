"""A tree of arrays to a folder in Orbax's format and back, to the bit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from utils import processes
from utils.errors import CheckpointError


def describe(state: Any) -> dict[str, tuple[list[int], str]]:
    """(shape, dtype's name) by the array's path in the tree; works for ShapeDtypeStructs too."""
    return {name: (list(x.shape), str(x.dtype)) for name, x in _by_name(state).items()}


def to_host(state: Any) -> dict[str, np.ndarray]:
    """Copies in the host's memory by the array's path in the tree.

    Copies even on a CPU: the caller donates its arrays next. Typed random keys become their data.
    """
    return {name: np.array(_plain(x)) for name, x in _by_name(state).items()}


def write_arrays(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes what `to_host` made into the new folder `folder`.

    Not Orbax's asynchronous checkpointer: it copies nothing on a CPU, and its folder is seen by
    readers before it is on disk and before its digests are known.

    Raises:
        Exception: of any kind, from Orbax or TensorStore.
    """
    # Orbax's tree is flat, so that a checkpoint does not depend on the classes of the state's.
    ocp.Checkpointer(_handler()).save(folder, args=ocp.args.StandardSave(dict(arrays)))


def write_part(folder: Path, state: Any) -> None:
    """Writes this process's part of the arrays into the folder, which is there.

    Not Orbax's Checkpointer: the others would wait in its barriers for one that fails.

    Raises:
        Exception: of any kind, from Orbax or TensorStore.
    """
    plain = {name: _plain(x) for name, x in _by_name(state).items()}
    _handler().save(epath.Path(folder), args=ocp.args.StandardSave(plain))


def finish_parts(folder: Path) -> None:
    """Joins the parts, once all processes have written theirs. Raises as `write_part`."""
    _handler().finalize(epath.Path(folder))


def read_arrays(folder: Path, like: Any, described: Mapping[str, tuple[list[int], str]]) -> Any:
    """The tree of arrays in a folder whose bytes are known to be right.

    Args:
        folder: what `write_arrays` made.
        like: the tree that is expected, of arrays or ShapeDtypeStructs; their shardings are used.
        described: what `describe` said of the tree that was saved.

    Raises:
        CheckpointError: other arrays were saved than are expected, or Orbax cannot read them.
    """
    wanted = _by_name(like)
    _check_same({k: (list(shape), dtype) for k, (shape, dtype) in described.items()}, like, folder)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    plain = {}
    for name, leaf in wanted.items():
        data = jax.eval_shape(_plain, leaf)
        sharding = getattr(leaf, "sharding", None) or here
        # Of a key, its words have an axis more.
        sharding = here if _is_key(leaf) and not sharding.is_fully_replicated else sharding
        plain[name] = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)
    try:
        arrays = processes.together(
            lambda: _handler().restore(epath.Path(folder), args=ocp.args.StandardRestore(plain))
        )
    # Orbax and TensorStore raise whatever they like.
    except Exception as e:
        raise CheckpointError(f"cannot read {folder}: {' '.join(str(e).split()):.500}") from e
    leaves = [_as_key(arrays[n], x) if _is_key(x) else arrays[n] for n, x in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _check_same(saved: dict[str, tuple[list[int], str]], like: Any, folder: Path) -> None:
    # Orbax would cast without a word.
    wanted = describe(like)
    problems = [f"{name} is not in it" for name in wanted if name not in saved]
    problems += [f"{name} is not expected" for name in saved if name not in wanted]
    for name in wanted.keys() & saved.keys():
        (got_shape, got), (shape, dtype) = saved[name], wanted[name]
        if (got_shape, got) != (shape, dtype):
            problems.append(f"{name} is {got}{got_shape}, expected {dtype}{shape}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{folder} is of another state: {'; '.join(sorted(problems)[:5])}{more}"
        )


def _handler() -> ocp.StandardCheckpointHandler:
    return ocp.StandardCheckpointHandler()


def _by_name(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}
    if len(named) < len(leaves):
        raise CheckpointError("two arrays of the state have one path; no key may hold a dot")
    return named


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _as_key(data: jax.Array, like: Any) -> jax.Array:
    impl: list[Any] = []
    # key_impl wants an array; a tracer is one.
    jax.eval_shape(lambda key: impl.append(jax.random.key_impl(key)), like)
    key = jax.random.wrap_key_data(data, impl=impl[0])
    sharding = getattr(like, "sharding", None)
    return key if sharding is None else jax.device_put(key, sharding)
