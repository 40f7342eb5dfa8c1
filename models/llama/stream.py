"""The one reader of tensors: from a file to the arrays of the model, one array at a time.

Where there is a context mesh, each process reads the parts of its own devices; without one, a single
device gets each array whole.
"""

import collections
import concurrent.futures
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from models.llama.layout import PARAM_AXES, Leaf, TensorSource, decoding_axes, decoding_groups
from models.llama.layout import fused_path, to_half_split
from utils import sharding
from utils.int8 import Int8, quantize as to_int8

Params = dict[str, Any]
Progress = Callable[[str, int, int], None]
Part = tuple[slice, ...]

_BLOCK = 1 << 16  # elements checked together: they stay in the processor's cache
_F32 = np.dtype(np.float32)
_THREADS = min(4, os.cpu_count() or 1)


class _Array(NamedTuple):
    """An array to be made.

    Attributes:
        path: in the params, "layers/attn/wq", or "layers/0/attn/wqkv" for decoding.
        shape: the whole array's.
        tensors: (its leaf, its name, the layer or rows of the array that it fills) of each tensor.
    """

    path: str
    shape: tuple[int, ...]
    tensors: list[tuple[Leaf, str, Any]]


def read_params(
    source: TensorSource,
    parts: list[Leaf],
    dtype: np.dtype,
    *,
    quantize: bool = False,
    decoding: bool = False,
    progress: Progress | None = None,
) -> tuple[Params, dict[str, int]]:
    """Reads, casts and places every parameter.

    A few threads read tensors (numpy and the system calls release the interpreter). An array is begun
    before the one before it is done, so that a big tensor that is an array of its own keeps no thread
    waiting; host memory stays bounded where the arrays go to another device.

    Args:
        source: the file.
        parts: the parameters to read, in this order.
        dtype: of all parameters.
        quantize: make each matrix an Int8, as it is read: no more than a few of them are in memory
            as floats.
        decoding: use the layout of `models.llama.model.for_decoding`.
        progress: called with (what, bytes done, bytes in all).

    Returns:
        (params, broken): broken counts NaN and infinities by tensor name, of what this process read.

    Raises:
        ConfigError: the mesh does not divide a parameter; before anything is read.
    """
    todo = collections.deque(_arrays(parts, decoding))
    places = _shardings(todo, dtype, decoding)
    total = sum(_bytes(leaf, dtype, quantize) * len(leaf.names) for leaf in parts)
    done, params, broken = 0, {}, {}
    pending: collections.deque = collections.deque()
    pool = concurrent.futures.ThreadPoolExecutor(max_workers=_THREADS)
    try:
        while todo or pending:
            reading = sum(len(fills) for _, _, fills in pending)
            if todo and (len(pending) < 2 or reading < 2 * _THREADS):
                array = todo.popleft()
                pending.append(_begin(pool, source, array, quantize, dtype, places[array.path]))
                continue
            array, host, fills = pending.popleft()
            for (leaf, name, _), fill in zip(array.tensors, fills, strict=True):
                if bad := fill.result():
                    broken[name] = bad
                done += _bytes(leaf, dtype, quantize)
                if progress is not None:
                    progress("loading weights", done, total)
            _insert(params, array.path, _place(host, array.shape, places[array.path]))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    if decoding:
        params["layers"] = tuple(params["layers"].values())
    return params, broken


def _bytes(leaf: Leaf, dtype: np.dtype, quantize: bool) -> int:
    """Bytes in memory of one of a parameter's tensors."""
    narrow = quantize and len(leaf.shape) == 2
    return leaf.shape[0] * (leaf.shape[1] + 4) if narrow else math.prod(leaf.shape) * dtype.itemsize


def _arrays(parts: list[Leaf], decoding: bool) -> Iterator[_Array]:
    """The arrays that parameters become: one each, or one per layer for decoding.

    On a single device the matrices that decoding multiplies as one are rows below each other.
    """
    if not decoding:
        for leaf in parts:
            if leaf.stacked:
                tensors = [(leaf, name, i) for i, name in enumerate(leaf.names)]
                yield _Array(leaf.path, (len(leaf.names), *leaf.shape), tensors)
            else:
                yield _Array(leaf.path, leaf.shape, [(leaf, leaf.names[0], ...)])
        return
    fused = sharding.current_mesh() is None
    for group in decoding_groups(parts) if fused else [[leaf] for leaf in parts]:
        ends = np.cumsum([leaf.shape[0] for leaf in group])
        rows = [slice(int(end) - leaf.shape[0], int(end)) for leaf, end in zip(group, ends)]
        rows = rows if len(group) > 1 else [...]
        path = fused_path(group[0].path) if fused else group[0].path
        for i in range(len(group[0].names)):
            yield _Array(
                path.replace("layers/", f"layers/{i}/"),
                (int(ends[-1]), *group[0].shape[1:]),
                [(leaf, leaf.names[i], where) for leaf, where in zip(group, rows)],
            )


def _shardings(
    arrays: collections.deque[_Array], dtype: np.dtype, decoding: bool
) -> dict[str, NamedSharding | None]:
    """Where each array goes on the context mesh, by its path; None without a mesh."""
    if sharding.current_mesh() is None:
        return dict.fromkeys(array.path for array in arrays)
    shapes = {array.path: jax.ShapeDtypeStruct(array.shape, dtype) for array in arrays}
    rules, table = sharding.TRAINING, PARAM_AXES
    if decoding:
        rules, table = sharding.DECODING, decoding_axes(PARAM_AXES)
    specs = sharding.param_specs(shapes, table, rules, all_rows=False)
    return {path: NamedSharding(jax.sharding.get_mesh(), spec) for path, spec in specs.items()}


def _begin(pool, source: TensorSource, array: _Array, quantize: bool, dtype: np.dtype, place):
    """(array, this process's box of it, a future per tensor that fills the box)."""
    box = _box(array.shape, place)
    shape = tuple(s.stop - s.start for s in box)
    if quantize and len(array.tensors[0][0].shape) == 2:
        host = Int8(_aligned_empty(shape, np.dtype(np.int8)), _aligned_empty(shape[:-1], _F32))
    else:
        host = _aligned_empty(shape, dtype)
    fills = []
    for leaf, name, where in array.tensors:
        part = box[len(box) - len(leaf.shape) :]
        if isinstance(where, slice):  # rows of a fused matrix, on a single device: all of it
            part = (slice(0, leaf.shape[0]), *part[1:])
        fills.append(pool.submit(_fill, source, leaf, name, part, host[where]))
    return array, host, fills


def _box(shape: tuple[int, ...], place: NamedSharding | None) -> Part:
    """The part of an array that holds the parts of all devices of this process.

    They are neighbours: what several of them need is read once.
    """
    wanted = [(slice(None),) * len(shape)]
    if place is not None:
        wanted = place.addressable_devices_indices_map(shape).values()
    spans = [[s.indices(n)[:2] for s, n in zip(index, shape)] for index in wanted]
    return tuple(
        slice(min(start for start, _ in axis), max(stop for _, stop in axis))
        for axis in zip(*spans)
    )


def _fill(source: TensorSource, leaf: Leaf, name: str, part: Part, out: np.ndarray | Int8) -> int:
    """Reads a part of one tensor into `out`; returns the number of NaN and infinities."""
    if isinstance(out, Int8):
        return _fill_int8(source, leaf, name, part, out)
    if out.shape != leaf.shape and hasattr(source, "read_part") and not leaf.heads:
        x = source.read_part(name, part)
    else:  # a quantised or reordered tensor is read whole, one at a time
        x = source.read(name)
        if leaf.heads:
            x = to_half_split(x, leaf.heads)
        if out.shape != leaf.shape:
            x = x.reshape(leaf.shape)[part]
    with np.errstate(over="ignore", invalid="ignore"):  # counted below
        np.copyto(out.reshape(x.shape), x, casting="unsafe")
    return count_nonfinite(out)


def _fill_int8(source: TensorSource, leaf: Leaf, name: str, part: Part, out: Int8) -> int:
    """`_fill` in eight bits; returns the number of rows with NaN or infinities."""
    rows, columns = part
    if hasattr(source, "read_int8"):
        values, out.scales[:] = source.read_int8(name, rows)
        out.values[:] = values[:, columns]
        return count_nonfinite(out.scales)
    # A scale is that of a whole row, whatever columns are wanted.
    x = np.empty((rows.stop - rows.start, leaf.shape[1]), source.dtypes[name])
    _fill(source, leaf, name, (rows, slice(0, leaf.shape[1])), x)
    for start in range(0, len(x), step := max(_BLOCK // leaf.shape[1], 1)):
        some = slice(start, start + step)
        with np.errstate(invalid="ignore"):
            found = to_int8(x[some])
        out.values[some], out.scales[some] = found.values[:, columns], found.scales
    return count_nonfinite(out.scales)


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


def _place(
    host: np.ndarray | Int8, shape: tuple[int, ...], place: NamedSharding | None
) -> jax.Array | Int8:
    """Hands this process's box of an array to JAX. On a single CPU device that copies nothing."""
    if isinstance(host, Int8):
        of_rows = place and NamedSharding(place.mesh, PartitionSpec(*place.spec[:-1]))
        values, scales = _place(host.values, shape, place), _place(host.scales, shape[:-1], of_rows)
        return Int8(values, scales)
    if place is None:
        return jax.device_put(host)
    box = _box(shape, place)
    pieces = []
    for device, index in place.addressable_devices_indices_map(shape).items():
        spans = [s.indices(n)[:2] for s, n in zip(index, shape)]
        inside = (slice(lo - b.start, hi - b.start) for (lo, hi), b in zip(spans, box))
        pieces.append(jax.device_put(np.ascontiguousarray(host[tuple(inside)]), device))
    return jax.make_array_from_single_device_arrays(shape, place, pieces)


def _insert(params: Params, path: str, x: jax.Array) -> None:
    *parents, name = path.split("/")
    for key in parents:
        params = params.setdefault(key, {})
    params[name] = x
