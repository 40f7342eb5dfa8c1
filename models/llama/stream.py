"""From the tensors of a file to the arrays of the model, one parameter at a time."""

import collections
import concurrent.futures
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from models.llama.layout import Leaf, decoding_groups, fused_path, to_half_split

Params = dict[str, Any]
Progress = Callable[[str, int, int], None]

_BLOCK = 1 << 16  # elements checked together: they stay in the processor's cache


class TensorSource(Protocol):
    """What the reader of a file format gives. `read` may be called from several threads.

    One that can read a part of a tensor alone has `read_part(name, slices)` too.

    Attributes:
        description: the file or folder, for messages.
        shapes: by tensor name, as numpy has them.
        dtypes: by tensor name: what `read` returns (float32 for quantised tensors).
    """

    description: str
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, np.dtype]

    def read(self, name: str) -> np.ndarray:
        """The tensor in a new array, dequantised where needed."""


def read_params(
    source: TensorSource,
    parts: list[Leaf],
    dtype: np.dtype,
    *,
    decoding: bool = False,
    progress: Progress | None = None,
) -> tuple[Params, dict[str, int]]:
    """Reads, casts and places every parameter.

    Tensors are read by a few threads (numpy and the system calls release the interpreter). A
    parameter is begun before the one before it is done, so that a big tensor alone in its parameter
    keeps no thread waiting; never more than two, so that host memory stays bounded where the
    arrays go to another device.

    Args:
        source: the file.
        parts: what to read.
        dtype: of all parameters.
        decoding: whether in the layout of `models.llama.model.for_decoding`.
        progress: called with (what, bytes done, bytes in all).

    Returns:
        (params, broken): broken has the number of NaN and infinities by tensor name, where any.
    """
    total = sum(math.prod(leaf.shape) * len(leaf.names) for leaf in parts) * dtype.itemsize
    done, params, broken = 0, {}, {}
    groups = decoding_groups(parts) if decoding else [[leaf] for leaf in parts]
    pending: collections.deque = collections.deque()
    pool = concurrent.futures.ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1))
    try:
        for i in range(len(groups) + 1):
            if i < len(groups):
                pending.append(_begin(pool, source, groups[i], dtype, decoding))
            if len(pending) < 2 and i < len(groups):
                continue
            group, arrays, fills = pending.popleft()
            for name, n_bytes, fill in fills:
                if bad := fill.result():
                    broken[name] = bad
                done += n_bytes
                if progress is not None:
                    progress("loading weights", done, total)
            _insert(params, group[0], arrays, decoding)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return params, broken


def _begin(pool, source: TensorSource, group: list[Leaf], dtype: np.dtype, decoding: bool):
    """(group, its arrays, what fills them: (tensor's name, bytes, a future) each).

    The arrays are one with a layer axis, or for decoding one a layer, in which the parameters of the
    group are rows below each other.
    """
    rows, layers = sum(leaf.shape[0] for leaf in group), len(group[0].names)
    shape = (rows, *group[0].shape[1:])
    if decoding:
        arrays = [_aligned_empty(shape, dtype) for _ in range(layers)]
    else:
        arrays = _aligned_empty((layers, *shape), dtype)
    fills, start = [], 0
    for leaf in group:
        for name, array in zip(leaf.names, arrays):
            out = array[start : start + leaf.shape[0]]
            fills.append((name, out.nbytes, pool.submit(_fill, source, leaf, name, out)))
        start += leaf.shape[0]
    return group, arrays, fills


def _fill(source: TensorSource, leaf: Leaf, name: str, out: np.ndarray) -> int:
    """Reads one tensor into `out`; returns the number of NaN and infinities."""
    x = source.read(name)
    if leaf.heads:
        x = to_half_split(x, leaf.heads)
    with np.errstate(over="ignore", invalid="ignore"):  # counted below
        np.copyto(out.reshape(x.shape), x, casting="unsafe")
    return count_nonfinite(out)


def count_nonfinite(x: np.ndarray) -> int:
    """How many elements are NaN or infinite: all bits of the exponent set."""
    bits = x.reshape(-1).view(f"u{x.itemsize}")
    infinity = np.array(np.inf, x.dtype).view(bits.dtype)
    magnitude = np.invert(np.array(-0.0, x.dtype).view(bits.dtype))
    blocks = (bits[i : i + _BLOCK] for i in range(0, bits.size, _BLOCK))
    return sum(int(np.count_nonzero((block & magnitude) >= infinity)) for block in blocks)


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array at a multiple of 64 bytes, which JAX on CPU needs to alias it."""
    n_bytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(n_bytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + n_bytes].view(dtype).reshape(shape)


def _insert(params: Params, leaf: Leaf, arrays: Sequence[np.ndarray], decoding: bool) -> None:
    """Hands the arrays of a group, `leaf` its first, to JAX. On CPU that copies nothing."""
    *parents, name = (fused_path(leaf.path) if decoding else leaf.path).split("/")
    if not leaf.stacked:
        params[name] = jax.device_put(arrays[0])
        return
    if not decoding:
        nodes, arrays = [params.setdefault("layers", {})], [arrays]
    else:
        nodes = params.setdefault("layers", tuple({} for _ in arrays))
    for node, array in zip(nodes, arrays):
        for key in parents[1:]:
            node = node.setdefault(key, {})
        node[name] = jax.device_put(array)
