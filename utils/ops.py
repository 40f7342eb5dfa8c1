"""The maths of a Llama layer as pure functions on plain arrays.

Dimension key: B batch, T new tokens, D model dim, N query heads, K kv heads, H head dim, F ffn dim.
Matrices are [out, in], as checkpoints store them. What must be exact is computed in float32.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x @ weight.T + bias, accumulated in float32.

    Args:
        x: [..., in].
        weight: [out, in], of x's dtype.
        bias: [out] or None.

    Returns:
        [..., out], of x's dtype.
    """
    y = project(x, weight)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(x.dtype)


def project(x: Array, weight: Array) -> Array:
    """x @ weight.T in float32: [..., in] × [out, in] -> [..., out] float32."""
    if x.dtype == jnp.float32:
        return _dot(x, weight)
    rows = x.size // x.shape[-1]
    on_cpu = _dot_of_two_rows if rows == 1 else _dot_in_float32 if rows >= 256 else _dot
    return jax.lax.platform_dependent(x, weight, cpu=on_cpu, default=_dot)


def _dot(x: Array, weight: Array) -> Array:
    contract_last = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, contract_last, preferred_element_type=jnp.float32)


def _dot_in_float32(x: Array, weight: Array) -> Array:
    """For many bfloat16 rows: XLA's CPU back end makes 150 GFLOP/s of them and 240 of float32."""
    # Tied to x, or XLA converts all weights before a loop that multiplies with them.
    x, weight = jax.lax.optimization_barrier((x, weight))
    return _dot(x.astype(jnp.float32), weight.astype(jnp.float32))


def _dot_of_two_rows(x: Array, weight: Array) -> Array:
    """For one bfloat16 row: XLA's CPU back end reads the matrix at 1.5 GB/s, and at 10 for two."""
    x, weight = jax.lax.optimization_barrier((x, weight))  # as above
    return _dot(jnp.broadcast_to(x, (2, *x.shape[1:])), weight)[:1]


def embed(table: Array, tokens: Array) -> Array:
    """The rows of a table: [V, D], [B, T] int32 -> [B, T, D]."""
    # Tied to the tokens, or XLA's CPU back end converts a bfloat16 table before a decode loop: all
    # of it, in each call, for the sake of one row.
    table, tokens = jax.lax.optimization_barrier((table, tokens))
    return table[tokens]


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Root-mean-square norm over the last axis, in Hugging Face's order of casts.

    Source: Zhang and Sennrich 2019 (1910.07467) eq. 4.

    Args:
        x: [..., D].
        weight: [D].
        eps: added to the mean square.

    Returns:
        [..., D], of x's dtype.
    """
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale).astype(x.dtype) * weight


def rope_angles(positions: Array, inv_freq: Array) -> tuple[Array, Array]:
    """cos and sin of every position's angles.

    Args:
        positions: [B, T] int32.
        inv_freq: [H / 2] float32, see `utils.rope.inv_frequencies`.

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
        gate, up: [..., F] the two projections.
        activation: a key of `ACTIVATIONS`.

    Returns:
        [..., F], of x's dtype; the down projection follows.
    """
    gated = ACTIVATIONS[activation](gate.astype(jnp.float32)) * up.astype(jnp.float32)
    return gated.astype(x.dtype)
