"""Attention behind one function: plain XLA, or an accelerator's kernel (`utils.kernels`).

On a mesh, each device attends with its own rows and heads (`attend`).
Dimension key: B batch, T queries, S keys, N query heads, K kv heads, G = N / K, H head dim, X = B · K;
of branches (`attention`): P tokens of a prefix, A branches, C tokens of a branch.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from utils import kernels, sharding
from utils.kvcache import LayerCache, held_heads
from utils.ops import precision

Array = jax.Array

# Queries per block. Blocks bound the score matrix in memory, and a causal block skips the keys after
# it: four blocks spare 3/8 of the work.
SMALLEST_BLOCK, LARGEST_BLOCK = 128, 512


def attend(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    masks: dict[str, Any],
    cache: LayerCache | None = None,
) -> tuple[Array, LayerCache | None]:
    """Writes new keys and values into a layer's cache, if there is one, and attends.

    Args:
        q_BTNH, k_BTKH, v_BTKH: queries, keys and values of the new tokens.
        masks: keyword arguments of `attention`.
        cache: the layer's cache.

    Returns:
        ([B, T, N, H], the layer's new cache).
    """
    rules = sharding.MEETING if cache is None else cache.rules
    B, N, K = len(q_BTNH), q_BTNH.shape[2], k_BTKH.shape[2]
    held = held_heads(N, K, rules)
    k_BTKH, v_BTKH = (jnp.repeat(x, held // K, axis=2) for x in (k_BTKH, v_BTKH))
    rows = PartitionSpec(sharding.fitting(rules.batch, B))
    values = PartitionSpec(*rows, None, sharding.fitting(rules.heads, held))
    caches = cache and cache.specs()

    def local(q_BTNH, k_BTKH, v_BTKH, masks, cache):
        k_XHS, v_XSH = heads_first(k_BTKH, v_BTKH)
        if cache is not None:
            cache, k_XHS, v_XSH = cache.append(k_XHS, v_XSH)
        return attention(q_BTNH, k_XHS, v_XSH, **masks), cache

    run = sharding.per_device(local, (values, values, values, rows, caches), (values, caches))
    return run(q_BTNH, k_BTKH, v_BTKH, masks, cache)


def heads_first(k_BTKH: Array, v_BTKH: Array) -> tuple[Array, Array]:
    """Keys and values as `attention` and the KV cache hold them: k_XHS and v_XSH.

    One merged axis X, since XLA updates a buffer with an axis of size 1 through copies of the whole;
    keys transposed, so that scores are a plain matrix product and no step rearranges anything.
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
        slots_BT: [B, T] int32, the slot of each query, which sees slots up to its own. None: the
            queries' own tokens are the keys (S = T), and each sees the keys up to itself.
        key_mask_BS: [B, S] bool, False hides a key. None: no key is hidden.
        segment_ids_BT: [B, T] int32, only where S = T: a query sees keys of its own segment.
        branches: ([B, P] bool, [B, A, C] bool), only where S = T = P + A · C and alone: each row is a
            prefix and A branches, of which each sees the prefix and itself. False is padding on the
            right.

    Returns:
        [B, T, N, H], of q's dtype. The result of a query whose own key is hidden is finite; in plain
        XLA it is zeros where the query sees no key.
    """
    if branches is not None:
        return _branched(q_BTNH, k_XHS, v_XSH, *branches)
    masks = (slots_BT, key_mask_BS, segment_ids_BT)
    plain = functools.partial(_in_blocks, q_BTNH, k_XHS, v_XSH, *masks)
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


def _in_blocks(q_BTNH, k_XHS, v_XSH, slots_BT, key_mask_BS, segment_ids_BT) -> Array:
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
    q_BTNH: Array, k_XHS: Array, v_XSH: Array, prefix_mask_BP: Array, branch_mask_BAC: Array
) -> Array:
    """`attention` of the prefixes as rows of their own, then of the branches, each after its prefix."""
    (B, P), (_, A, C) = prefix_mask_BP.shape, branch_mask_BAC.shape
    N, H = q_BTNH.shape[2:]
    K = k_XHS.shape[0] // B
    prefix_BPNH = attention(q_BTNH[:, :P], k_XHS[:, :, :P], v_XSH[:, :P])

    def for_each_branch(x_X: Array) -> Array:
        x_B1K = x_X.reshape(B, 1, K, *x_X.shape[1:])
        return jnp.broadcast_to(x_B1K, (B, A, K, *x_X.shape[1:]))

    k_BAKHC = k_XHS[:, :, P:].reshape(B, K, H, A, C).transpose(0, 3, 1, 2, 4)
    v_BAKCH = v_XSH[:, P:].reshape(B, K, A, C, H).transpose(0, 2, 1, 3, 4)
    k_BAKHS = jnp.concatenate([for_each_branch(k_XHS[:, :, :P]), k_BAKHC], axis=-1)
    v_BAKSH = jnp.concatenate([for_each_branch(v_XSH[:, :P]), v_BAKCH], axis=-2)
    seen_BAP = jnp.broadcast_to(prefix_mask_BP[:, None], (B, A, P))
    seen_RS = jnp.concatenate([seen_BAP, branch_mask_BAC], axis=-1).reshape(B * A, P + C)
    q_RCNH = q_BTNH[:, P:].reshape(B * A, C, N, H)
    k_XHS, v_XSH = k_BAKHS.reshape(B * A * K, H, P + C), v_BAKSH.reshape(B * A * K, P + C, H)
    slots_RC = jnp.broadcast_to(P + jnp.arange(C), (B * A, C))
    plain = functools.partial(_in_blocks, q_RCNH, k_XHS, v_XSH, slots_RC, seen_RS, None)
    out_RCNH = _by_platform(plain, q_RCNH, k_XHS, v_XSH, seen_RS, None)
    return jnp.concatenate([prefix_BPNH, out_RCNH.reshape(B, A * C, N, H)], axis=1)


def _softmax_attention(q_XGTH: Array, k_XHS: Array, v_XSH: Array, seen_BTS: Array) -> Array:
    """softmax(q · k over the seen keys) · v; the division comes last, on the small array."""
    products = {"precision": precision(v_XSH), "preferred_element_type": jnp.float32}
    scores = jnp.einsum("xgth,xhs->xgts", q_XGTH, k_XHS, **products)
    by_row = scores.reshape(seen_BTS.shape[0], -1, *scores.shape[2:])
    scores = jnp.where(seen_BTS[:, None], by_row, -jnp.inf).reshape(scores.shape)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    # A row with nothing to see has top = -inf: exp(-inf - 0) = 0 everywhere, and not NaN.
    weights = jnp.exp(scores - jnp.where(top == -jnp.inf, 0, top))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(v_XSH.dtype)
    out = jnp.einsum("xgts,xsh->xgth", weights, v_XSH, **products)
    return out / jnp.where(total == 0, 1, total)
