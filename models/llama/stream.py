"""From the tensors of a file to the arrays of the model, one parameter at a time."""

import collections
import concurrent.futures
import math
import os
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np

from models.llama.layout import Leaf, to_half_split

Params = dict[str, Any]
Progress = Callable[[str, int, int], None]

_BLOCK = 1 << 16  # elements checked together: they stay in the processor's cache


class TensorSource(Protocol):
    """What the reader of a file format gives. `read` may be called from several threads.

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
    source: TensorSource, parts: list[Leaf], dtype: np.dtype, progress: Progress | None
) -> tuple[Params, dict[str, int]]:
    """Reads, casts and places every parameter.

    Tensors are read by a few threads (numpy and the system calls release the interpreter). A
    parameter is begun before the one before it is done, so that a big tensor alone in its parameter
    keeps no thread waiting; never more than two, so that host memory stays bounded where the
    arrays go to another device.

    Returns:
        (params, broken): broken has the number of NaN and infinities by tensor name, where any.
    """
    total = sum(math.prod(leaf.shape) * len(leaf.names) for leaf in parts) * dtype.itemsize
    done, params, broken = 0, {}, {}
    pending: collections.deque = collections.deque()
    pool = concurrent.futures.ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1))
    try:
        for i in range(len(parts) + 1):
            if i < len(parts):
                pending.append(_begin(pool, source, parts[i], dtype))
            if len(pending) < 2 and i < len(parts):
                continue
            leaf, out, fills = pending.popleft()
            for name, layer, fill in zip(leaf.names, out, fills):
                if bad := fill.result():
                    broken[name] = bad
                done += layer.nbytes
                if progress is not None:
                    progress("loading weights", done, total)
            # On CPU this takes over the aligned buffer without a copy.
            _insert(params, leaf.path, jax.device_put(out if leaf.stacked else out[0]))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return params, broken


def _begin(pool, source: TensorSource, leaf: Leaf, dtype: np.dtype):
    """(leaf, its array with a layer axis, a future for each layer that fills it)."""
    out = _aligned_empty((len(leaf.names), *leaf.shape), dtype)
    fills = [pool.submit(_fill, source, leaf, *pair) for pair in zip(leaf.names, out)]
    return leaf, out, fills


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


def _insert(params: Params, path: tuple[str, ...], array: jax.Array) -> None:
    for key in path[:-1]:
        params = params.setdefault(key, {})
    params[path[-1]] = array
