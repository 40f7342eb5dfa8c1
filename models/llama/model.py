"""Llama as Flax modules: they declare parameters and call the ops, nothing else.

Parameters (L layers stacked on a leading axis, matrices [out, in] as in checkpoints):

    embed [V, D]   layers/attn/{wq, wk, wv, wo}   layers/mlp/{w_gate, w_up, w_down}
    layers/attn/{q_norm, k_norm} [L, H] (Qwen3)
    layers/{attn_norm, ffn_norm} [L, D]   final_norm [D]   lm_head [V, D] (absent when tied)

`layers` may also be a tuple of L dicts, one per layer (`for_decoding`). The same blocks train, prefill
and decode: training scans over stacked layers, since compile time then does not grow with depth, and
decoding unrolls them, since a scan would copy each layer's weights and cache in every step.
Dimension key: B batch, T new tokens, L layers, D model dim, N query heads, K kv heads, H head dim,
F ffn dim, V vocab.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.ad_checkpoint import checkpoint_name

from models.llama.config import ModelConfig, inv_frequencies
from models.llama.layout import PARAM_AXES, decoding_axes, fused_path, param_axes
from models.llama.lora import LoRAConfig, adapter_axes
from utils import detours, ops, sharding
from utils.attention import attend
from utils.int8 import dequantize
from utils.kernels import LANES, RESIDUALS
from utils.kvcache import KVCache, LayerCache, held_heads, layout
from utils.sharding import DECODING, LOOKED_UP, LOOKUP, TRAINING, ShardingRules
from utils.sharding import constrain, share_rows

Array = jax.Array
Params = dict[str, Any]

_DECODING_AXES = decoding_axes(PARAM_AXES | adapter_axes(LoRAConfig()))
_HEADS = ("batch", "tokens", "heads", None)  # logical axes of [B, T, N, H]


class Attention(nn.Module):
    """Grouped-query attention with RoPE."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD, rope, masks, cache: LayerCache | None = None):
        """[B, T, D] -> ([B, T, D], the layer's new cache)."""
        c = self.config
        q_dim, kv_dim = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        sizes = {"q": q_dim, "k": kv_dim, "v": kv_dim}
        projected = _project_all(self, x_BTD, "qkv", sizes)
        wo = _dense(self, "o", (c.dim, q_dim), depth=c.n_layers)
        # q, k, v stay sharded like the weights that made them. In decoding they then move to where
        # the cache is. In training with a `context` axis they move after RoPE (`attend`): before it,
        # XLA would send RoPE's gradient in float32, twice the bytes.
        by_weights = TRAINING if cache is None else DECODING
        by_heads = TRAINING if cache is None else cache.rules
        projected = (constrain(y, by_weights, "batch", "tokens", "heads") for y in projected)
        q_BTNH, k_BTKH, v_BTKH = (_heads(y, c.head_dim, by_heads) for y in projected)
        if "layers/attn/q_norm" in param_axes(c):
            q_BTNH, k_BTKH = _rms_norm(self, "q_norm", q_BTNH), _rms_norm(self, "k_norm", k_BTKH)
        rotated = (ops.apply_rope(y, rope) for y in (q_BTNH, k_BTKH))
        q_BTNH, k_BTKH = (constrain(y, by_heads, *_HEADS) for y in rotated)
        out_BTNH, cache = attend(q_BTNH, k_BTKH, v_BTKH, masks, cache)
        out_BTD = out_BTNH.reshape(*x_BTD.shape[:2], q_dim)
        return _linear("o", constrain(out_BTD, by_weights, "batch", "tokens", "heads"), wo), cache


def _heads(y_BTD: Array, head_dim: int, rules: ShardingRules) -> Array:
    """[B, T, N · H] -> [B, T, N, H]."""
    return constrain(y_BTD.reshape(*y_BTD.shape[:2], -1, head_dim), rules, *_HEADS)


class FeedForward(nn.Module):
    """The gated feed-forward layer."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD):
        c = self.config
        sizes = {"_gate": c.ffn_dim, "_up": c.ffn_dim}
        gate, up = _project_all(self, x_BTD, "_gate_up", sizes)
        w_down = _dense(self, "_down", (c.dim, c.ffn_dim), depth=c.n_layers)
        return _linear("_down", ops.feed_forward(x_BTD, gate, up, c.activation), w_down)


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each on the normed input and added back."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD, rope, masks, cache: LayerCache | None = None):
        """[B, T, D] -> ([B, T, D], the layer's new cache)."""
        rules = TRAINING if cache is None else DECODING
        normed_BTD = _rms_norm(self, "attn_norm", x_BTD)
        attn_BTD, cache = Attention(self.config, name="attn")(normed_BTD, rope, masks, cache)
        x_BTD = constrain(x_BTD + attn_BTD, rules, "batch", "tokens", None)
        normed_BTD = _rms_norm(self, "ffn_norm", x_BTD)
        x_BTD = x_BTD + FeedForward(self.config, name="mlp")(normed_BTD)
        return constrain(x_BTD, rules, "batch", "tokens", None), cache


class LLaMa(nn.Module):
    """The whole model: `LLaMa(config).apply({"params": params}, tokens_BT) -> (logits_BTV, None)`.

    Attributes:
        config: sizes and constants of the model.
        dtype: dtype of activations and products; default: the parameters' own. Parameters are cast
            where they are used.
        remat: how much a training step computes again in its backward pass: "none", "dots"
            (everything except the results of matrix products and of attention kernels) or "block"
            (everything except each block's input).
    """

    config: ModelConfig
    dtype: Any = None
    remat: str = "none"

    @nn.compact
    def __call__(
        self,
        tokens_BT: Array,
        *,
        positions_BT: Array | None = None,
        segment_ids_BT: Array | None = None,
        key_mask_BS: Array | None = None,
        branches: tuple[Array, Array] | None = None,
        cache: KVCache | None = None,
        logits_at_BM: Array | None = None,
        hidden: bool = False,
    ) -> tuple[Array, KVCache | None]:
        """The causal forward pass, over new tokens alone or after those in a cache.

        Args:
            tokens_BT: [B, T] int32.
            positions_BT: [B, T] int32, RoPE's index; default: a token's index in its row.
            segment_ids_BT: [B, T] int32, packed documents; attention stays inside one. No cache.
            key_mask_BS: [B, S] bool, False hides a key, for example left padding. S is T, or the
                cache's capacity where it already holds tokens.
            branches: ([B, P] bool, [B, A, C] bool) where T = P + A · C: a prefix and A branches of
                it, see `utils.attention`; needs positions. No cache.
            cache: a row's T new tokens take the slots after its `lengths`. They must fit
                (`kvcache.check_capacity`); the new cache's lengths count all T.
            logits_at_BM: [B, M] int32, the tokens whose logits are wanted; default: all T.
            hidden: return the head's input instead of logits: losses multiply it with `head_matrix`
                in chunks.

        Returns:
            logits [B, T or M, V] float32, or hidden states [B, T or M, D]; and the new cache (None
            without one).
        """
        c = self.config
        embed_VD = self.param("embed", nn.initializers.normal(0.02), (c.vocab_size, c.dim))
        index_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        if cache is not None:
            index_BT = index_BT + cache.lengths[:, None]
        fresh = cache is None or cache.empty
        masks = {
            "slots_BT": None if fresh else index_BT,
            "key_mask_BS": key_mask_BS,
            "segment_ids_BT": segment_ids_BT,
            "branches": branches,
        }
        inv_freq = jnp.asarray(inv_frequencies(c.head_dim, c.rope_theta, c.rope_scaling))
        rope = ops.rope_angles(index_BT if positions_BT is None else positions_BT, inv_freq)
        rope = detours.computed_once(rope)
        x_BTD = _embed(embed_VD, tokens_BT, self.dtype, TRAINING if cache is None else DECODING)
        if cache is None and not isinstance(self.variables["params"].get("layers"), tuple):
            x_BTD = self._scanned_layers(x_BTD, rope, masks)
        else:
            x_BTD, cache = self._unrolled_layers(x_BTD, rope, masks, cache, tokens_BT)
        if logits_at_BM is not None:
            x_BTD = jnp.take_along_axis(x_BTD, logits_at_BM[..., None], axis=1)
        x_BTD = _rms_norm(self, "final_norm", x_BTD)
        head_VD = embed_VD
        if not c.tie_embeddings:
            head_VD = self.param("lm_head", nn.initializers.normal(0.02), (c.vocab_size, c.dim))
        if hidden:
            return x_BTD, cache
        logits_BTV = ops.project(x_BTD, head_VD)
        if cache is not None:
            # Computed where the head is; then each device samples from whole rows.
            logits_BTV = share_rows(constrain(logits_BTV, DECODING, "batch", None, "vocab"))
        return logits_BTV, cache

    def _scanned_layers(self, x_BTD, rope, masks):
        """All layers as one loop: compile time does not grow with depth."""
        if self.is_initializing():
            stack = nn.scan(
                TransformerBlock,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=self.config.n_layers,
            )
            return stack(self.config, name="layers")(x_BTD, rope, masks)[0]

        def block(x_BTD, layer, constants):  # not by `_block`: its jit changes how XLA rounds
            return TransformerBlock(self.config).apply({"params": layer}, x_BTD, *constants)[0]

        if (policy := _REMAT[self.remat]) is not None:
            # The loop over layers is barrier enough against merging both computations.
            block = jax.checkpoint(block, policy=policy, prevent_cse=False)
        return detours.scan(block, x_BTD, self.variables["params"]["layers"], (rope, masks))

    def _unrolled_layers(self, x_BTD, rope, masks, cache, tokens_BT):
        """Layer after layer, so that XLA updates each layer's cache in place and copies no weights."""
        new = []
        for i, layer in enumerate(_layers(self.variables["params"]["layers"])):
            part = cache and cache.layer(i)
            x_BTD, part = _block(self.config, layer, x_BTD, rope, masks, part)
            new.append(part)
        return x_BTD, cache and cache.appended(new, tokens_BT)


# Names of the results that `remat="dots"` keeps: those of matrix products and of a kernel.
_DOTS = ("q", "k", "v", "o", "_gate", "_up", "_down", RESIDUALS)
_REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.save_only_these_names(*_DOTS),
    "block": jax.checkpoint_policies.nothing_saveable,
}
REMATS = tuple(_REMAT)


def head_matrix(params: Params) -> Array:
    """[V, D] of the output head: `lm_head`, or `embed` where they are tied; never an Int8."""
    return dequantize(params.get("lm_head", params["embed"]))


def init_params(config: ModelConfig, key: Array, dtype=jnp.float32) -> Params:
    """Random parameters for training from scratch: normal with std 0.02, projections into the residual
    stream divided by sqrt(2 L) (GPT-2, section 2.3), norms 1.
    """
    params = LLaMa(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]
    return jax.tree.map(lambda x: x.astype(dtype), params)


def cache_shape(config: ModelConfig, batch: int, capacity: int) -> tuple[int, int, int, int]:
    """[B, K, S, H] of a KV cache's buffers."""
    heads = held_heads(config.n_heads, config.n_kv_heads, layout(batch, config.n_kv_heads))
    return batch, heads, capacity, config.head_dim


def init_cache(
    config: ModelConfig, batch: int, capacity: int, dtype, platform: str | None = None
) -> KVCache:
    """An empty KVCache for `batch` rows of `capacity` slots, laid out for a platform; default: JAX's."""
    shape, rules = cache_shape(config, batch, capacity), layout(batch, config.n_kv_heads)
    narrow = (platform or jax.default_backend()) == "tpu" and config.head_dim % LANES > 0
    return KVCache.create(shape, config.n_layers, dtype, rules, values_axis=2 if narrow else 1)


def for_decoding(params: Params, *, donate: bool = False) -> Params:
    """The same parameters in the layout for decoding. Copies the layers' weights.

    `layers` becomes a tuple of one dict per layer, since a decode step on stacked layers would copy
    every weight out of the stack first. q, k, v become one matrix, and so do gate, up: fewer and
    larger products. On a mesh they stay apart, sharded by `utils.sharding.DECODING`.

    Args:
        params: stacked; parameters in the layout for decoding are returned as they are.
        donate: take the layers out of `params`, so that a stacked array that nothing else holds is
            freed once it is split, and two whole models are never held.
    """
    if isinstance(params["layers"], tuple):
        return params
    stacked = traverse_util.flatten_dict((params.pop if donate else params.get)("layers"), sep="/")
    layers: list[dict[str, Array]] = [{} for _ in range(len(stacked["attn_norm"]))]
    for path, sources in _decoding_sources(stacked).items():
        for i, layer in enumerate(layers):
            parts = [stacked[source][i] for source in sources]
            x = parts[0] if len(parts) == 1 else jax.tree.map(_below_each_other, *parts)
            layer[path] = _place_for_decoding(f"layers/{i}/{path}", x)
        jax.block_until_ready(layers)
        for source in sources if donate else ():
            del stacked[source]
    rest = {name: _place_for_decoding(name, x) for name, x in params.items() if name != "layers"}
    return {**rest, "layers": tuple(traverse_util.unflatten_dict(x, sep="/") for x in layers)}


def _below_each_other(*rows: Array) -> Array:
    return jnp.concatenate(rows)


def _decoding_sources(stacked: Mapping[str, Array]) -> dict[str, list[str]]:
    """A layer's paths in the layout for decoding, each with the stacked paths that it is fused from."""
    adapted = any(path.endswith("_a") for path in stacked)  # over an Int8, which takes no update
    if sharding.current_mesh() is not None or adapted:
        return {path: [path] for path in stacked}
    # In the table's order, q before k before v: JAX sorts dicts by their keys.
    rank = {path.removeprefix("layers/"): i for i, path in enumerate(PARAM_AXES)}
    sources: dict[str, list[str]] = {}
    for path in sorted(stacked, key=lambda path: rank.get(path, len(rank))):
        fused = fused_path(f"layers/{path}").removeprefix("layers/")
        sources.setdefault(fused, []).append(path)
    return sources


def _place_for_decoding(path: str, x: Array) -> Array:
    """Puts a parameter where the context mesh has it in decoding."""
    specs = sharding.param_specs({path: x}, _DECODING_AXES, DECODING, all_rows=False)
    return sharding.place({path: x}, specs)[path]


def _embed(table_VD: Array, tokens_BT: Array, dtype: Any, rules: ShardingRules) -> Array:
    """Looks up the tokens' rows of the embedding, in dtype."""
    if rules is TRAINING:
        tokens_BT = constrain(tokens_BT, LOOKUP, "batch", "tokens")
    x_BTD = ops.embed(table_VD, tokens_BT)
    x_BTD = x_BTD.astype(dtype or x_BTD.dtype)
    if rules is TRAINING:
        for step in (LOOKUP, LOOKED_UP):
            x_BTD = constrain(x_BTD, step, "batch", "tokens", "embed")
    return constrain(x_BTD, rules, "batch", "tokens", None)


# A jit inside a jit is traced once for all layers; XLA inlines it.
@functools.partial(jax.jit, static_argnames="config")
def _block(config, layer, x_BTD, rope, masks, cache):
    """One TransformerBlock on its own parameters."""
    return TransformerBlock(config).apply({"params": layer}, x_BTD, rope, masks, cache)


def _layers(layers):
    """One dict per layer, from a tuple of them or from a stack."""
    if isinstance(layers, tuple):
        return layers
    count = jax.tree.leaves(layers)[0].shape[0]
    return [jax.tree.map(lambda leaf: leaf[i], layers) for i in range(count)]


def _dense(module: nn.Module, name: str, shape: tuple[int, int], depth: int = 0):
    """Declares matrix `w{name}` and the table's bias `b{name}`; depth scales a residual output.

    Returns (weight, bias or None, (a, b) or None): LoRA's matrices if the tree has them
    (models/llama/lora.py).
    """
    std = 0.02 / (2 * depth) ** 0.5 if depth else 0.02
    weight = module.param(f"w{name}", nn.initializers.normal(std), shape)
    vector, lora = None, None
    if f"layers/{module.name}/b{name}" in param_axes(module.config):
        vector = module.param(f"b{name}", nn.initializers.zeros, shape[:1])
    if module.has_variable("params", f"w{name}_a"):
        lora = tuple(module.get_variable("params", f"w{name}_{half}") for half in "ab")
    return weight, vector, lora


def _linear(name: str, x_BTD: Array, dense) -> Array:
    """Applies a declared `_dense` to x; the result, of x's dtype, is named for `remat`."""
    return checkpoint_name(ops.linear(x_BTD, *dense), name)


def _project_all(module: nn.Module, x_BTD: Array, fused: str, sizes: dict[str, int]) -> list[Array]:
    """Applies the matrix of each name in `sizes` to x, or the fused matrix of `for_decoding`."""
    if module.has_variable("params", f"w{fused}"):
        weight, bias = (module.get_variable("params", f"{kind}{fused}") for kind in "wb")
        y = ops.linear(x_BTD, weight, bias)
        return jnp.split(y, np.cumsum(list(sizes.values()))[:-1], axis=-1)
    width = x_BTD.shape[-1]
    layers = [_dense(module, name, (size, width)) for name, size in sizes.items()]
    return list(map(checkpoint_name, ops.linear_all(x_BTD, layers), sizes))


def _rms_norm(module: nn.Module, name: str, x: Array) -> Array:
    """Declares the norm's weight and applies it over x's last axis."""
    weight = module.param(name, nn.initializers.ones, x.shape[-1:])
    return ops.rms_norm(x, weight.astype(x.dtype), module.config.norm_eps)
