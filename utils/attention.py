"""Attention behind one function, which picks the kernel.

Today that is plain XLA everywhere; the kernels for TPU and GPU belong in `attention` and nowhere else.
Dimension key: B batch, T queries, S keys, N query heads, K kv heads, G = N / K, H head dim.
"""

import jax
import jax.numpy as jnp

Array = jax.Array

# Queries a block: bounds the score matrix in memory, and causal blocks skip the keys after them.
QUERY_BLOCK = 512


def attention(
    q_BTNH: Array,
    k_BKSH: Array,
    v_BKSH: Array,
    *,
    slots_BT: Array | None = None,
    key_mask_BS: Array | None = None,
    segment_ids_BT: Array | None = None,
) -> Array:
    """Causal grouped-query attention; softmax in float32.

    Source: Vaswani et al. (1706.03762) eq. 1; grouped heads: Ainslie et al. (2305.13245).

    Args:
        q_BTNH: [B, T, N, H] queries; query head n reads kv head n // G.
        k_BKSH, v_BKSH: [B, K, S, H] keys and values, slot by slot.
        slots_BT: [B, T] int32, the slot of each query: it sees slots up to its own. None: the
            queries are the keys (S = T), each sees those up to itself.
        key_mask_BS: [B, S] bool, False hides a key. None: all are seen.
        segment_ids_BT: [B, T] int32, only where S = T: a query sees keys of its own segment.

    Returns:
        [B, T, N, H]; a query that sees no key gives zeros.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BKSH.shape[1]
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    q_BKGTH = (q_BKGTH.astype(jnp.float32) * H**-0.5).astype(q_BTNH.dtype)
    blocks = []
    for start in range(0, T, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, T)
        # Without slots, keys after the block's last query are in its future: leave them out.
        keys = slice(0, stop if slots_BT is None else k_BKSH.shape[2])
        queries = slice(start, stop)
        if slots_BT is None:
            seen = jnp.arange(start, stop)[None, :, None] >= jnp.arange(stop)
        else:
            seen = slots_BT[:, queries, None] >= jnp.arange(k_BKSH.shape[2])
        if key_mask_BS is not None:
            seen = seen & key_mask_BS[:, None, keys]
        if segment_ids_BT is not None:
            seen = seen & (segment_ids_BT[:, queries, None] == segment_ids_BT[:, None, keys])
        q, k, v = q_BKGTH[:, :, :, queries], k_BKSH[:, :, keys], v_BKSH[:, :, keys]
        blocks.append(_softmax_attention(q, k, v, seen[:, None, None]))
    out_BKGTH = blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=3)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _softmax_attention(q_BKGTH: Array, k_BKSH: Array, v_BKSH: Array, seen_BKGTS: Array) -> Array:
    """softmax(q·k over the keys that are seen)·v; the division comes last, on the small array."""
    f32 = jnp.float32
    scores = jnp.einsum("bkgth,bksh->bkgts", q_BKGTH, k_BKSH, preferred_element_type=f32)
    scores = jnp.where(seen_BKGTS, scores, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    # A row with nothing to see has top = -inf: exp(-inf - 0) = 0 everywhere, and not NaN.
    weights = jnp.exp(scores - jnp.where(top == -jnp.inf, 0, top))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(v_BKSH.dtype)
    out = jnp.einsum("bkgts,bksh->bkgth", weights, v_BKSH, preferred_element_type=f32)
    return (out / jnp.where(total == 0, 1, total)).astype(q_BKGTH.dtype)
