"""Eight-bit matrices: `Int8` stands for a frozen matrix, and `project` multiplies with it.

Source: symmetric scales per row and per token, as in LLM.int8() (2208.07339) section 2.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from utils import detours, sharding
from utils.ops import matmul

Array = jax.Array

_LEVELS = 127  # of a weight, on either side of 0
_BLOCK = 2048  # inputs that are rounded with a step of their own, for a single row
# Bytes of a matrix that are converted to float32 together, for few rows and for many: what was fastest
# where the last cache has 32 MB.
_TILES, _MANY = (1 << 20, 1 << 23), 64


@flax.struct.dataclass
class Int8:
    """A matrix as int8 values times a scale per row; `astype` and `[]` are those of an array.

    `ops.project_all` leaves the product to it.

    Attributes:
        values: [..., out, in] int8, -127..127.
        scales: [..., out] float32.
    """

    values: Array
    scales: Array

    shape = property(lambda self: self.values.shape)
    ndim = property(lambda self: self.values.ndim)
    dtype = property(lambda self: self.scales.dtype)

    def astype(self, dtype) -> Array:
        """The matrix that it stands for, [..., out, in]."""
        return (self.values.astype(jnp.float32) * self.scales[..., None]).astype(dtype)

    def project(self, x: Array) -> Array:
        """x @ the matrix.T in float32; see the function."""
        return project(x, self)

    def __getitem__(self, index) -> "Int8":
        return Int8(self.values[index], self.scales[index])

    def __len__(self) -> int:
        return len(self.values)


def quantize(x: Array | np.ndarray) -> Int8:
    """The nearest Int8 of a matrix [..., out, in]; in numpy, if x is numpy's."""
    xp = np if isinstance(x, np.ndarray) else jnp
    x = x.astype(xp.float32)
    scales = abs(x).max(axis=-1) * np.float32(1 / _LEVELS)  # XLA would not divide by a constant
    values = xp.rint(x * xp.where(scales > 0, 1 / xp.where(scales > 0, scales, 1), 0)[..., None])
    return Int8(values.astype(xp.int8), scales)


def dequantize(tree: Any) -> Any:
    """A tree with a float32 matrix for each Int8."""
    return _map(lambda x: x.astype(jnp.float32) if isinstance(x, Int8) else x, tree)


def cast(tree: Any, dtype: Any) -> Any:
    """A tree of arrays in a dtype; each Int8 as it is."""
    return _map(lambda x: x if isinstance(x, Int8) else x.astype(dtype), tree)


def _map(function: Callable[[Any], Any], tree: Any) -> Any:
    """`jax.tree.map` for which an Int8 is a leaf."""
    return jax.tree.map(function, tree, is_leaf=lambda x: isinstance(x, Int8))


@jax.custom_vjp
def project(x: Array, weight: Int8) -> Array:
    """x @ weight.T in float32: [..., in] × [out, in] -> [..., out] float32. No gradient by weight.

    On a CPU a single row is rounded to integers, in blocks whose int32 sums cannot overflow (8,000
    levels or more): XLA then reads the matrix at the memory's speed. It does not vectorise a float32 sum,
    whose order would change. Several rows are multiplied with some of the matrix at a time, converted
    to float32. Elsewhere the matrix is converted to x's dtype inside the product.
    """
    if sharding.current_mesh() is not None:
        return _converted(x, weight)
    # Tied, as XLA would convert all matrices before a decode loop begins.
    on_cpu = _of_one_row if x.size == x.shape[-1] else _by_tiles
    return jax.lax.platform_dependent(*detours.tied(x, weight), cpu=on_cpu, default=_converted)


def _converted(x: Array, weight: Int8) -> Array:
    return matmul(x, weight.values.astype(x.dtype), -1, 1) * weight.scales


def _of_one_row(x: Array, weight: Int8) -> Array:
    width = x.shape[-1]
    block = _BLOCK if width % _BLOCK == 0 else width
    levels = min(2**15 - 1, (2**31 - 1) // (_LEVELS * block))
    y = 0.0
    for start in range(0, width, block):
        x_1D = x[..., start : start + block].reshape(1, -1).astype(jnp.float32)
        step = jnp.max(jnp.abs(x_1D)) / levels
        # As int16 that the product widens: LLVM then multiplies pairs in one instruction (vpmaddwd).
        x_1D = jnp.rint(x_1D / jnp.where(step > 0, step, 1)).astype(jnp.int16)
        x_1D = detours.apart_from_dot(x_1D).astype(jnp.int32)
        # As x @ weight.T, not as a product of both last axes: only so XLA makes one loop of it.
        transposed = weight.values[:, start : start + block].astype(jnp.int32).T
        y += step * jnp.dot(x_1D, transposed, preferred_element_type=jnp.int32)
    return (y * weight.scales).reshape(*x.shape[:-1], -1)


def _by_tiles(x: Array, weight: Int8) -> Array:
    *lead, width = x.shape
    x_RD, out = x.reshape(-1, width).astype(jnp.float32), len(weight)
    most = min(_TILES[len(x_RD) >= _MANY] // (4 * width), out)
    tile = max((n for n in range(1, most + 1) if out % n == 0), default=1)
    if tile < most // 8 or tile == out:
        return _converted(x.astype(jnp.float32), weight)
    tiles = weight.values.reshape(-1, tile, width)
    y = jax.lax.map(lambda part: matmul(x_RD, part.astype(jnp.float32), -1, 1), tiles)
    return (y.swapaxes(0, 1).reshape(-1, out) * weight.scales).reshape(*lead, out)


def _forward(x: Array, weight: Int8):
    return project(x, weight), (weight, jnp.zeros(0, x.dtype))


def _backward(saved, dy: Array):
    """By x as if nothing were rounded."""
    weight, like = saved

    def product(dtype, dy, values):
        return matmul(dy.astype(dtype), values.astype(dtype), -1, 0)

    in_float32, in_x_dtype = (functools.partial(product, d) for d in (jnp.float32, like.dtype))
    arguments = dy * weight.scales, weight.values
    dx = jax.lax.platform_dependent(*arguments, cpu=in_float32, default=in_x_dtype)
    none = Int8(np.zeros(weight.shape, jax.dtypes.float0), jnp.zeros_like(weight.scales))
    return dx.astype(like.dtype), none


project.defvjp(_forward, _backward)
