"""The maths of a Llama layer as pure functions on plain arrays.

Dimension key: B batch, T new tokens, D model dim, N query heads, H head dim, F ffn dim, V vocab, R rows.
Matrices are [out, in], as checkpoints store them. Norms, angles and activations are float32 inside.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from utils import detours

Array = jax.Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def linear(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    lora: tuple[Array, Array] | None = None,
) -> Array:
    """x @ weight.T + bias, accumulated in float32.

    Args:
        x: [..., in].
        weight: [out, in], cast to x's dtype, or an `Int8`.
        bias: [out] or None.
        lora: None, or a [rank, in] and b [out, rank], whose product is added to the weight without
            being formed. Source: LoRA (2106.09685) eq. 3.

    Returns:
        [..., out], of x's dtype.
    """
    return linear_all(x, [(weight, bias, lora)])[0]


def linear_all(x: Array, layers: Sequence[tuple]) -> list[Array]:
    """`linear` of x with each of several (weight, bias, lora).

    The gradients by x are added up before they are rounded. On a mesh, their sum is then reduced once
    over the devices that share the outputs, and not each of them.
    """
    products = project_all(x, tuple(weight for weight, _, _ in layers))
    return [_with_bias(x, y, *layer[1:]) for y, layer in zip(products, layers)]


def _with_bias(x: Array, y: Array, bias: Array | None, lora: tuple[Array, Array] | None) -> Array:
    if lora is not None:
        a, b = (matrix.astype(x.dtype) for matrix in lora)
        y = y + project(project(x, a).astype(x.dtype), b)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(x.dtype)


def project(x: Array, weight: Array) -> Array:
    """x @ weight.T in float32: [..., in] × [out, in] -> [..., out] float32.

    The weight is cast to x's dtype, or an `Int8`. The gradients are also products in x's dtype,
    accumulated in float32.
    """
    return project_all(x, (weight,))[0]


def project_all(x: Array, weights: tuple[Array, ...]) -> tuple[Array, ...]:
    """`project` of x with each of several weights."""
    if hasattr(weights[0], "project"):  # it stands for a matrix, as an Int8 does
        return tuple(weight.project(x) for weight in weights)
    return _project_all(x, tuple(weight.astype(x.dtype) for weight in weights))


@jax.custom_vjp
def _project_all(x: Array, weights: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(matmul(x, weight, x.ndim - 1, 1) for weight in weights)


def _project_forward(x: Array, weights: tuple[Array, ...]):
    return _project_all(x, weights), (x, weights)


def _project_backward(saved, dys: tuple[Array, ...]):
    x, weights = saved
    dys = [dy.astype(x.dtype) for dy in dys]
    dx = sum(matmul(dy, weight, dy.ndim - 1, 0) for dy, weight in zip(dys, weights))
    dweights = (matmul(_rows(dy), _rows(x), 0, 0) for dy in dys)
    return dx.astype(x.dtype), tuple(d.astype(w.dtype) for d, w in zip(dweights, weights))


def _rows(x: Array) -> Array:
    """[..., D] -> [R, D]."""
    return x.reshape(-1, x.shape[-1])


_project_all.defvjp(_project_forward, _project_backward)


def matmul(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """Contracts an axis of a with an axis of b, accumulated in float32."""
    return detours.product(_dot, a, b, a_axis % a.ndim, b_axis)


def _dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    axes = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, precision(a), preferred_element_type=jnp.float32)


def precision(x: Array) -> jax.lax.Precision | None:
    """HIGHEST for float32: GPUs and TPUs would round to TF32 or bfloat16, logits by 5e-4."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def embed(table: Array, tokens: Array) -> Array:
    """Looks up rows of a table: [V, D], [B, T] int32 -> [B, T, D]."""
    table, tokens = detours.tied(table, tokens)
    return table[tokens]


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Root-mean-square norm over the last axis, in Hugging Face's order of casts.

    The weight's gradient is summed in float32. Source: Zhang and Sennrich 2019 (1910.07467) eq. 4.

    Args:
        x, weight: [..., D] and [D].
        eps: added to the mean square.

    Returns:
        [..., D], of x's dtype.
    """
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(detours.sum_of_squares(x32) / x.shape[-1] + eps)
    return _times((x32 * scale).astype(x.dtype), weight)


@jax.custom_vjp
def _times(x: Array, weight: Array) -> Array:
    # Not in float32: XLA for TPUs would widen the next product's matrix too.
    return x * weight


def _times_backward(saved, dy: Array):
    x, weight = saved
    by_weight = _rows(dy.astype(jnp.float32) * x.astype(jnp.float32)).sum(axis=0)
    return (dy * weight).astype(x.dtype), by_weight.astype(weight.dtype)


_times.defvjp(lambda x, weight: (_times(x, weight), (x, weight)), _times_backward)


def rope_angles(positions: Array, inv_freq: Array) -> tuple[Array, Array]:
    """cos and sin of every position's angles.

    Args:
        positions: [B, T] int32.
        inv_freq: [H / 2] float32, see `models.llama.config.inv_frequencies`.

    Returns:
        Two arrays [B, T, 1, H / 2] float32.
    """
    angles = positions.astype(jnp.float32)[..., None, None] * inv_freq
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x_BTNH: Array, rope: tuple[Array, Array]) -> Array:
    """Rotates each pair (i, i + H/2) of a head, Hugging Face's half-split pairing.

    Source: RoFormer (2104.09864) eq. 34.

    Args:
        x_BTNH: [B, T, N, H].
        rope: cos and sin from `rope_angles`.

    Returns:
        [B, T, N, H], of x's dtype.
    """
    cos, sin = rope
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


def feed_forward(x: Array, gate: Array, up: Array, activation: str) -> Array:
    """The gated half of the feed-forward layer: act(gate) · up, in float32, then x's dtype.

    Source: Shazeer 2020 (2002.05202) eq. 6.

    Args:
        x: only its dtype is used.
        gate, up: [..., F], the two projections.
        activation: a key of `ACTIVATIONS`.

    Returns:
        [..., F], of x's dtype; the down projection follows.
    """
    gated = ACTIVATIONS[activation](gate.astype(jnp.float32)) * up.astype(jnp.float32)
    return gated.astype(x.dtype)
