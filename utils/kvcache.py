"""The KV cache: fixed buffers per layer, filled row by row.

A token's slot is its index in its row, so rows of different lengths need no padding mask: a query in
slot t sees slots 0..t, and slots after a row's length are overwritten before they are ever seen.
Dimension key: B rows, T new tokens, S slots, K kv heads, H head dim, X = B · K.
"""

import functools
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from utils import kernels, sharding
from utils.errors import SamplingError
from utils.sharding import BY_ROWS, DECODING, ShardingRules

Array = jax.Array


@flax.struct.dataclass
class KVCache:
    """Keys and values of the tokens so far; immutable, a forward pass returns the next one.

    >>> cache = KVCache.create((2, 1, 64, 16), n_layers=3, dtype="float32")
    >>> cache.capacity, cache.lengths.tolist(), cache.layer(0).k.shape
    (64, [0, 0], (2, 16, 64))
    >>> cache.resized(96).capacity
    96

    Attributes:
        k, v: one array per layer, [X, H, S] and [X, S, H] with X = B · K, see
            `utils.attention.heads_first`; values also as [X, H, S], see `values_axis`. Keys are
            already rotated. On a mesh each device holds the heads of its own rows: the order of X
            is the device's own, and nothing else may index it.
        lengths: [B] int32, filled slots of each row.
        tokens_BS: int32, the token of each slot; what is sampled next may depend on them.
        empty: true only for a new cache. It is static: the first pass attends among the new tokens
            alone and never reads the buffers.
        rules: how a mesh shares rows and heads, see `layout`; static.
        values_axis: axis of the values' slots, 1 or 2; static. A TPU pads the last axis to registers
            of 128: heads of 64 would take twice their memory there.
    """

    k: tuple[Array, ...]
    v: tuple[Array, ...]
    lengths: Array
    tokens_BS: Array
    empty: bool = flax.struct.field(pytree_node=False, default=False)
    rules: ShardingRules = flax.struct.field(pytree_node=False, default=DECODING)
    values_axis: int = flax.struct.field(pytree_node=False, default=1)

    @classmethod
    def create(
        cls,
        shape_BKSH: tuple[int, ...],
        n_layers: int,
        dtype,
        rules: ShardingRules = DECODING,
        values_axis: int = 1,
    ) -> "KVCache":
        """A cache of zeros: for n_layers, of B rows, K kv heads, S slots and head dim H."""
        B, K, S, H = shape_BKSH
        spec = buffer_spec(B, K, rules)

        def zeros(*sides: int) -> tuple[Array, ...]:
            buffers = (jnp.zeros((B * K, *sides), dtype) for _ in range(n_layers))
            return tuple(sharding.constrain_tree(buffer, spec) for buffer in buffers)

        v = zeros(S, H) if values_axis == 1 else zeros(H, S)
        lengths, tokens_BS = jnp.zeros((B,), jnp.int32), jnp.zeros((B, S), jnp.int32)
        return cls(zeros(H, S), v, lengths, tokens_BS, True, rules, values_axis)

    @property
    def capacity(self) -> int:
        """Slots per row, S."""
        return self.k[0].shape[2]

    def layer(self, i: int) -> "LayerCache":
        """The part of layer i."""
        return LayerCache(
            self.k[i], self.v[i], self.lengths, self.empty, self.rules, self.values_axis
        )

    def appended(self, layers: Sequence["LayerCache"], tokens_BT: Array) -> "KVCache":
        """The cache after each of its layers took the keys and values of new tokens."""
        B, T = tokens_BT.shape
        slots = jnp.arange(B)[:, None], self.lengths[:, None] + jnp.arange(T)
        return self.replace(
            k=tuple(layer.k for layer in layers),
            v=tuple(layer.v for layer in layers),
            lengths=self.lengths + T,
            tokens_BS=self.tokens_BS.at[slots].set(tokens_BT),
            empty=False,
        )

    def resized(self, capacity: int) -> "KVCache":
        """The same rows in buffers of `capacity` slots; the filled slots must fit."""
        more = capacity - self.capacity

        def fit(x_X: Array, axis: int) -> Array:
            widths = [(0, more * (i == axis), 0) for i in range(x_X.ndim)]
            return jax.lax.pad(x_X, jnp.zeros((), x_X.dtype), widths)

        v = tuple(fit(x, self.values_axis) for x in self.v)
        k, tokens_BS = tuple(fit(x, 2) for x in self.k), fit(self.tokens_BS, 1)
        return self.replace(k=k, v=v, tokens_BS=tokens_BS)

    def repeated(self, times: int, n_kv_heads: int) -> "KVCache":
        """Each row `times` times, side by side: one prefill for several samples per prompt.

        Where the mesh shares that many rows in another way (`layout`), they go there, and each of
        the model's n_kv_heads is held once.
        """
        B = self.lengths.shape[0]
        rules, held = layout(B * times, n_kv_heads), len(self.k[0]) // B
        copies = 1 if rules == self.rules else held // n_kv_heads

        def repeat(x_X: Array) -> Array:
            x_BK = _split(x_X, B, self.rules)[:, ::copies]
            return _merge(jnp.repeat(x_BK, times, axis=0), rules)

        return self.replace(
            k=tuple(map(repeat, self.k)),
            v=tuple(map(repeat, self.v)),
            lengths=jnp.repeat(self.lengths, times),
            tokens_BS=jnp.repeat(self.tokens_BS, times, axis=0),
            rules=rules,
        )


@flax.struct.dataclass
class LayerCache:
    """One layer's buffers of a `KVCache`, with the same names."""

    k: Array
    v: Array
    lengths: Array
    empty: bool = flax.struct.field(pytree_node=False)
    rules: ShardingRules = flax.struct.field(pytree_node=False)
    values_axis: int = flax.struct.field(pytree_node=False)

    def append(self, k_XHT: Array, v_XTH: Array) -> tuple["LayerCache", Array, Array]:
        """Writes each row's T new tokens into the slots after its length.

        Returns:
            (the layer's new cache; the keys [X, H, S] and values [X, S, H] that the new tokens
            attend to: their own, S = T, where the cache was empty).
        """
        k_XHT, v_XTH = k_XHT.astype(self.k.dtype), v_XTH.astype(self.v.dtype)
        k = write(self.k, k_XHT, self.lengths, axis=2)
        v = write(self.v, self._turned(v_XTH), self.lengths, axis=self.values_axis)
        new = self.replace(k=k, v=v)
        return (new, k_XHT, v_XTH) if self.empty else (new, k, self._turned(v))

    def _turned(self, v: Array) -> Array:
        """Values [X, S, H] as the buffer has them, and back."""
        return v if self.values_axis == 1 else v.swapaxes(1, 2)

    def specs(self) -> "LayerCache":
        """How the mesh shares each array."""
        rows = len(self.lengths)
        spec = buffer_spec(rows, len(self.k) // rows, self.rules)
        lengths = PartitionSpec(sharding.fitting(self.rules.batch, rows))
        return self.replace(k=spec, v=spec, lengths=lengths)


def _split(x_X: Array, rows: int, rules: ShardingRules) -> Array:
    """[X, …] -> [B, K, …], which XLA knows how to share."""
    axes = _axes(rows, len(x_X) // rows, rules)
    own = rows // sharding.axis_size(axes[0])
    run = sharding.per_device(
        lambda x_X: x_X.reshape(own, -1, *x_X.shape[1:]),
        (PartitionSpec(sum(axes, ())),),
        PartitionSpec(*axes),
    )
    return run(x_X)


def _merge(x_BK: Array, rules: ShardingRules) -> Array:
    """[B, K, …] -> [X, …], perhaps by other rules than those of `_split`."""
    axes = _axes(*x_BK.shape[:2], rules)
    run = sharding.per_device(
        lambda x_BK: x_BK.reshape(-1, *x_BK.shape[2:]),
        (PartitionSpec(*axes),),
        PartitionSpec(sum(axes, ())),
    )
    return run(x_BK)


def layout(rows: int, n_kv_heads: int) -> ShardingRules:
    """Rules for a cache of that size: by heads if the mesh divides them, else by rows if it divides those."""
    by_rows = rows % sharding.axis_size(BY_ROWS.batch) == 0
    return BY_ROWS if n_kv_heads % sharding.axis_size(DECODING.heads) and by_rows else DECODING


def buffer_spec(rows: int, heads: int, rules: ShardingRules) -> PartitionSpec:
    """How a mesh shares a layer's buffers: their merged axis by rows and by heads."""
    return PartitionSpec(sum(_axes(rows, heads, rules), ()))


def _axes(rows: int, heads: int, rules: ShardingRules) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Mesh axes of rows, and of heads."""
    return sharding.fitting(rules.batch, rows), sharding.fitting(rules.heads, heads)


def held_heads(n_heads: int, n_kv_heads: int, rules: ShardingRules) -> int:
    """Number of kv heads to compute and cache: a mesh with more parts than heads needs copies.

    Where neither number is a multiple of the other, every device has all heads.
    """
    parts = sharding.axis_size(rules.heads)
    return parts if parts % n_kv_heads == 0 and n_heads % parts == 0 else n_kv_heads


def write(buffer_X: Array, new_X: Array, lengths_B: Array, axis: int) -> Array:
    """Puts each row's T new entries into its slots lengths..lengths + T - 1.

    `dynamic_update_slice` clamps: past the end it would overwrite the last slots in silence, so
    callers check with `check_capacity` on the host first.

    Args:
        buffer_X: [X, H, S] or [X, S, H], X = B · K.
        new_X: the same with T instead of S, of the buffer's dtype.
        lengths_B: [B] int32.
        axis: axis of the slots, 2 or 1.

    Returns:
        The buffer with the new entries.
    """
    heads = buffer_X.shape[0] // lengths_B.shape[0]
    if heads == buffer_X.shape[0]:
        return jax.lax.dynamic_update_slice_in_dim(buffer_X, new_X, lengths_B[0], axis)
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=axis - 1)
    return kernels.write_rows(jax.vmap(put), buffer_X, new_X, jnp.repeat(lengths_B, heads), axis)


def check_capacity(lengths: np.ndarray, new_tokens: int, capacity: int) -> None:
    """Raises SamplingError, on the host, if a row's new tokens do not fit.

    Args:
        lengths: [B] filled slots per row.
        new_tokens: tokens to add to each row.
        capacity: slots per row.
    """
    for row, length in enumerate(np.asarray(lengths)):
        if length + new_tokens > capacity:
            raise SamplingError(
                f"row {row} holds {length} tokens and {new_tokens} more exceed the KV cache's "
                f"{capacity} slots; make the cache larger"
            )


def bucket(n: int, least: int) -> int:
    """The smallest buffer size that holds n: least · {1, 1.5, 2, 3, 4, 6, 8, …}."""
    size = least
    while size < n:
        size *= 2
    smaller = size * 3 // 4
    return int(smaller if size > least and smaller >= n else size)
