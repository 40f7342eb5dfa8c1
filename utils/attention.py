"""Attention behind one function: plain XLA, or an accelerator's kernel (`utils.kernels`).

On a mesh, each device attends with its own rows and heads (`attend`).
Dimension key: B batch, T queries, S keys, N query heads, K kv heads, G = N / K, H head dim, X = B · K.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from utils import kernels, kvcache, sharding

Array = jax.Array

# Queries a block. Blocks bound the score matrix in memory, and a causal block skips the keys after it:
# four blocks spare 3/8 of the work.
SMALLEST_BLOCK, LARGEST_BLOCK = 128, 512


def attend(
    q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, masks: dict[str, Any], kv: tuple | None
) -> tuple[Array, tuple[Array, Array] | None]:
    """Writes new keys and values into a layer's cache, if there is one, and attends.

    Args:
        q_BTNH, k_BTKH, v_BTKH: the new tokens'.
        masks: keyword arguments of `attention`.
        kv: None, or a cache's (k, v, lengths, empty, values_axis, rules), see `utils.kvcache.KVCache`.

    Returns:
        ([B, T, N, H], the new (k, v) or None).
    """
    empty, values_axis, rules = (False, 1, sharding.MEETING) if kv is None else kv[3:]
    turned = lambda v: v if values_axis == 1 else v.swapaxes(1, 2)

    def local(q_BTNH, k_BTKH, v_BTKH, masks, kv):
        k_XHS, v_XSH = heads_first(k_BTKH, v_BTKH)
        if kv is not None:
            k_buffer, v_buffer, lengths_B = kv
            k_XHS, v_XSH = k_XHS.astype(k_buffer.dtype), v_XSH.astype(v_buffer.dtype)
            kv = (
                kvcache.write(k_buffer, k_XHS, lengths_B, axis=2),
                kvcache.write(v_buffer, turned(v_XSH), lengths_B, axis=values_axis),
            )
            if not empty:
                k_XHS, v_XSH = kv[0], turned(kv[1])
        return attention(q_BTNH, k_XHS, v_XSH, **masks), kv

    held = kvcache.held_heads(q_BTNH.shape[2], k_BTKH.shape[2], rules)
    k_BTKH, v_BTKH = (jnp.repeat(x, held // x.shape[2], axis=2) for x in (k_BTKH, v_BTKH))
    batch = sharding.fitting(rules.batch, len(q_BTNH))
    heads = sharding.fitting(rules.heads, held)
    rows, values = PartitionSpec(batch), PartitionSpec(batch, None, heads)
    buffers = kv and (kvcache.buffer_spec(len(q_BTNH), held, rules),) * 2
    run = sharding.per_device(
        local, (values, values, values, rows, kv and (*buffers, rows)), (values, buffers)
    )
    return run(q_BTNH, k_BTKH, v_BTKH, masks, kv and kv[:3])


def heads_first(k_BTKH: Array, v_BTKH: Array) -> tuple[Array, Array]:
    """Keys and values as `attention` and the KV cache hold them: k_XHS and v_XSH.

    One merged axis X, since XLA updates a buffer with an axis of size 1 through copies of the whole;
    keys transposed, so that scores are a plain matrix product with nothing to rearrange a step.
    """
    B, T, K, H = k_BTKH.shape
    k_XHS = k_BTKH.transpose(0, 2, 3, 1).reshape(B * K, H, T)
    return k_XHS, v_BTKH.transpose(0, 2, 1, 3).reshape(B * K, T, H)


def attention(
    q_BTNH: Array,
    k_XHS: Array,
    v_XSH: Array,
    *,
    slots_BT: Array | None = None,
    key_mask_BS: Array | None = None,
    segment_ids_BT: Array | None = None,
    branches: tuple[Array, Array] | None = None,
) -> Array:
    """Causal grouped-query attention; softmax in float32.

    Source: Vaswani et al. (1706.03762) eq. 1; grouped heads: Ainslie et al. (2305.13245).

    Args:
        q_BTNH: [B, T, N, H] queries; query head n reads kv head n // G.
        k_XHS, v_XSH: [B · K, H, S] keys and [B · K, S, H] values, see `heads_first`.
        slots_BT: [B, T] int32, the slot of each query: it sees slots up to its own. None: the
            queries are the keys (S = T), each sees those up to itself.
        key_mask_BS: [B, S] bool, False hides a key. None: all are seen.
        segment_ids_BT: [B, T] int32, only where S = T: a query sees keys of its own segment.
        branches: ([B, P] bool, [B, G, C] bool), only where S = T = P + G · C and alone: each row is a
            prefix and G ways to go on from it, which see the prefix and themselves. False is padding
            on the right.

    Returns:
        [B, T, N, H], of q's dtype. What a query whose own key is hidden gives is finite, and zeros
        in plain XLA where it sees no key.
    """
    if branches is not None:
        return _branched(q_BTNH, k_XHS, v_XSH, *branches)
    masks = (slots_BT, key_mask_BS, segment_ids_BT)
    plain = functools.partial(_plain, q_BTNH, k_XHS, v_XSH, *masks)
    if slots_BT is not None:
        return plain()
    return _by_platform(plain, q_BTNH, k_XHS, v_XSH, *masks[1:])


def _by_platform(plain, q_BTNH, k_XHS, v_XSH, key_mask_BS, segment_ids_BS) -> Array:
    """`plain()`, or the kernel of the platform, for queries that are the last T of S tokens."""
    (B, T), (_, H, S) = q_BTNH.shape[:2], k_XHS.shape
    if T < SMALLEST_BLOCK:
        return plain()
    k_BSKH = k_XHS.reshape(B, -1, H, S).transpose(0, 3, 1, 2)
    v_BSKH = v_XSH.reshape(B, -1, S, H).transpose(0, 2, 1, 3)
    if key_mask_BS is not None:
        ids = 0 if segment_ids_BS is None else segment_ids_BS
        segment_ids_BS = jnp.where(key_mask_BS, ids, jnp.iinfo(jnp.int32).min)
    return kernels.causal_attention(plain, q_BTNH, k_BSKH, v_BSKH, segment_ids_BS)


def _plain(q_BTNH, k_XHS, v_XSH, slots_BT, key_mask_BS, segment_ids_BT) -> Array:
    """`attention` in plain XLA, a block of queries at a time."""
    B, T, N, H = q_BTNH.shape
    S, K = k_XHS.shape[2], k_XHS.shape[0] // B
    q_XGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(-1, N // K, T, H)
    q_XGTH = (q_XGTH.astype(jnp.float32) * H**-0.5).astype(k_XHS.dtype)
    blocks, step = [], min(max(T // 4, SMALLEST_BLOCK), LARGEST_BLOCK)
    for start in range(0, T, step):
        stop = min(start + step, T)
        # Without slots, keys after the block's last query are in its future: leave them out.
        queries, keys = slice(start, stop), slice(0, stop if slots_BT is None else S)
        if slots_BT is None:
            seen = jnp.arange(start, stop)[None, :, None] >= jnp.arange(stop)
        else:
            seen = slots_BT[:, queries, None] >= jnp.arange(S)
        if key_mask_BS is not None:
            seen = seen & key_mask_BS[:, None, keys]
        if segment_ids_BT is not None:
            seen = seen & (segment_ids_BT[:, queries, None] == segment_ids_BT[:, None, keys])
        q, k, v = q_XGTH[:, :, queries], k_XHS[:, :, keys], v_XSH[:, keys]
        blocks.append(_softmax_attention(q, k, v, seen))
    out_XGTH = blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=2)
    out_BTKGH = out_XGTH.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4)
    return out_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype)


def _branched(
    q_BTNH: Array, k_XHS: Array, v_XSH: Array, prefix_mask_BP: Array, branch_mask_BGC: Array
) -> Array:
    """The prefixes as rows of their own, then the branches, each after its prefix's keys."""
    (B, P), (_, G, C) = prefix_mask_BP.shape, branch_mask_BGC.shape
    N, H = q_BTNH.shape[2:]
    K = k_XHS.shape[0] // B
    prefix_BPNH = attention(q_BTNH[:, :P], k_XHS[:, :, :P], v_XSH[:, :P])
    shared = lambda x: jnp.broadcast_to(x.reshape(B, 1, K, *x.shape[1:]), (B, G, K, *x.shape[1:]))
    k_own = k_XHS[:, :, P:].reshape(B, K, H, G, C).transpose(0, 3, 1, 2, 4)
    v_own = v_XSH[:, P:].reshape(B, K, G, C, H).transpose(0, 2, 1, 3, 4)
    k = jnp.concatenate([shared(k_XHS[:, :, :P]), k_own], axis=-1)
    v = jnp.concatenate([shared(v_XSH[:, :P]), v_own], axis=-2)
    seen_BGP = jnp.broadcast_to(prefix_mask_BP[:, None], (B, G, P))
    seen = jnp.concatenate([seen_BGP, branch_mask_BGC], axis=-1).reshape(B * G, P + C)
    q = q_BTNH[:, P:].reshape(B * G, C, N, H)
    k, v = k.reshape(B * G * K, H, P + C), v.reshape(B * G * K, P + C, H)
    slots_BT = jnp.broadcast_to(P + jnp.arange(C), (B * G, C))
    plain = functools.partial(_plain, q, k, v, slots_BT, seen, None)
    out = _by_platform(plain, q, k, v, seen, None)
    return jnp.concatenate([prefix_BPNH, out.reshape(B, G * C, N, H)], axis=1)


def _softmax_attention(q_XGTH: Array, k_XHS: Array, v_XSH: Array, seen_BTS: Array) -> Array:
    """softmax(q·k over the keys that are seen)·v; the division comes last, on the small array."""
    f32 = jnp.float32
    scores = jnp.einsum("xgth,xhs->xgts", q_XGTH, k_XHS, preferred_element_type=f32)
    by_row = scores.reshape(seen_BTS.shape[0], -1, *scores.shape[2:])
    scores = jnp.where(seen_BTS[:, None], by_row, -jnp.inf).reshape(scores.shape)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    # A row with nothing to see has top = -inf: exp(-inf - 0) = 0 everywhere, and not NaN.
    weights = jnp.exp(scores - jnp.where(top == -jnp.inf, 0, top))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(v_XSH.dtype)
    out = jnp.einsum("xgts,xsh->xgth", weights, v_XSH, preferred_element_type=f32)
    return out / jnp.where(total == 0, 1, total)
