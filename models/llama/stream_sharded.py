"""Parameters onto a mesh: each process reads the parts of its own devices, a parameter at a time."""

import concurrent.futures
import functools
import math
import os
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from models.llama.layout import PARAM_AXES, Leaf, decoding_axes, to_half_split
from models.llama.stream import Params, Progress, TensorSource, count_nonfinite
from utils import sharding

Part = tuple[slice, ...]


def read_sharded(
    source: TensorSource,
    parts: list[Leaf],
    dtype: np.dtype,
    *,
    decoding: bool = False,
    progress: Progress | None = None,
) -> tuple[Params, dict[str, int]]:
    """Reads, casts and places every parameter on the context mesh.

    Args:
        source, parts, dtype, decoding, progress: see `models.llama.stream.read_params`; matrices stay
            apart for decoding.

    Returns:
        (params, broken) as `read_params`; `broken` counts what this process has read.

    Raises:
        ConfigError: the mesh does not divide a parameter; before anything is read.
    """
    shapes = _shapes(parts, dtype, decoding)
    rules, table = sharding.TRAINING, PARAM_AXES
    if decoding:
        rules, table = sharding.DECODING, decoding_axes(PARAM_AXES)
    specs = sharding.specs(shapes, lambda: table, rules, all_rows=False)
    total = sum(math.prod(leaf.shape) * len(leaf.names) for leaf in parts) * dtype.itemsize
    done, params, broken = 0, {}, {}
    with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for leaf in parts:
            for path, names in _arrays(leaf, decoding):
                x, bad = _place(pool, source, leaf, names, shapes[path], specs[path])
                broken |= bad
                _insert(params, path.split("/"), x)
                done += x.nbytes
                if progress is not None:
                    progress("loading weights", done, total)
    if decoding:
        params["layers"] = tuple(params["layers"][str(i)] for i in range(len(params["layers"])))
    return params, broken


def _arrays(leaf: Leaf, decoding: bool) -> list[tuple[str, tuple[str, ...]]]:
    """(path, its tensors' names) of each array that a leaf becomes: one, or one a layer."""
    if leaf.stacked and decoding:
        rest = leaf.path.removeprefix("layers/")
        return [(f"layers/{i}/{rest}", (n,)) for i, n in enumerate(leaf.names)]
    return [(leaf.path, leaf.names)]


def _shapes(parts: list[Leaf], dtype: np.dtype, decoding: bool) -> dict[str, Any]:
    shapes = {}
    for leaf in parts:
        stacked = (len(leaf.names),) if leaf.stacked and not decoding else ()
        for path, _ in _arrays(leaf, decoding):
            shapes[path] = jax.ShapeDtypeStruct((*stacked, *leaf.shape), dtype)
    return shapes


def _place(
    pool, source: TensorSource, leaf: Leaf, names: tuple[str, ...], like, spec: PartitionSpec
) -> tuple[jax.Array, dict[str, int]]:
    """One array on the mesh, and how many numbers of each tensor are NaN or infinite."""
    where = NamedSharding(jax.sharding.get_mesh(), spec)
    wanted = {
        device: tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, like.shape))
        for device, index in where.addressable_devices_indices_map(like.shape).items()
    }
    # Devices of one process have neighbouring parts: what all of them need is read once.
    box = tuple(
        slice(min(s.start for s in axis), max(s.stop for s in axis))
        for axis in zip(*wanted.values())
    )
    stacked = len(like.shape) > len(leaf.shape)
    host = np.empty(tuple(s.stop - s.start for s in box), like.dtype)
    outs = host if stacked else [host]
    part = box[1:] if stacked else box
    fills = {
        name: pool.submit(_fill, source, leaf, name, part, out) for name, out in zip(names, outs)
    }
    broken = {name: count for name, fill in fills.items() if (count := fill.result())}
    inside = lambda index: tuple(
        slice(s.start - b.start, s.stop - b.start) for s, b in zip(index, box)
    )
    pieces = [
        jax.device_put(np.ascontiguousarray(host[inside(index)]), device)
        for device, index in wanted.items()
    ]
    return jax.make_array_from_single_device_arrays(like.shape, where, pieces), broken


def _fill(source: TensorSource, leaf: Leaf, name: str, part: Part, out: np.ndarray) -> int:
    """Reads a part of one tensor into `out`; returns the number of NaN and infinities."""
    if hasattr(source, "read_part") and not leaf.heads:
        x = source.read_part(name, part)
    else:  # a quantised or reordered tensor is read whole, one at a time
        x = source.read(name)
        if leaf.heads:
            x = to_half_split(x, leaf.heads).reshape(x.shape)
        x = x[part]
    with np.errstate(over="ignore", invalid="ignore"):  # counted below
        np.copyto(out, x, casting="unsafe")
    return count_nonfinite(out)


def _insert(params: Params, path: list[str], x: jax.Array) -> None:
    *parents, name = path
    node = functools.reduce(lambda node, key: node.setdefault(key, {}), parents, params)
    node[name] = x
