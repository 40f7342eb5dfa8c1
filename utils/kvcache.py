"""The KV cache: fixed buffers a layer, filled row by row.

A token's slot is its index in its row, so rows of different lengths need no padding mask: a query in
slot t sees slots 0..t, and what lies behind a row's length is overwritten before it is ever seen.
"""

import functools

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

    Attributes:
        k, v: one array a layer, [X, H, S] and [X, S, H] with X = B · K, see
            `utils.attention.heads_first`; values also as [X, H, S], see `values_axis`. Keys are
            already rotated. On a mesh each device holds its
            own rows' heads, so that X's order is a device's own and nothing else may index it.
        lengths: [B] int32, filled slots of each row.
        empty: true only for a new cache. It is static: the first pass attends among the new tokens
            alone and never reads the buffers.
        rules: how rows and heads lie on a mesh, see `layout`; static.
        values_axis: that of the values' slots, 1 or 2; static. A TPU pads the last axis to registers
            of 128: heads of 64 would take twice their memory there.
    """

    k: tuple[Array, ...]
    v: tuple[Array, ...]
    lengths: Array
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
        zeros = lambda *shape: sharding.constrain_tree(jnp.zeros(shape, dtype), spec)
        k = tuple(zeros(B * K, H, S) for _ in range(n_layers))
        sides = (S, H) if values_axis == 1 else (H, S)
        v = tuple(zeros(B * K, *sides) for _ in range(n_layers))
        lengths = jnp.zeros((B,), jnp.int32)
        return cls(k, v, lengths, empty=True, rules=rules, values_axis=values_axis)

    @property
    def capacity(self) -> int:
        """Slots a row, S."""
        return self.k[0].shape[2]

    def resized(self, capacity: int) -> "KVCache":
        """The same rows in buffers of `capacity` slots; the filled slots must fit."""
        more = capacity - self.capacity
        fit = lambda x, axis: jax.lax.pad(
            x, jnp.zeros((), x.dtype), [(0, more * (i == axis), 0) for i in range(3)]
        )
        v = tuple(fit(x, self.values_axis) for x in self.v)
        return self.replace(k=tuple(fit(x, 2) for x in self.k), v=v)

    def repeated(self, times: int, n_kv_heads: int) -> "KVCache":
        """Each row `times` times, side by side: one prefill for several samples of a prompt.

        Where a mesh shares so many rows in another way (`layout`), they go there, and each of the
        model's n_kv_heads is held once.
        """
        B = self.lengths.shape[0]
        rules, held = layout(B * times, n_kv_heads), len(self.k[0]) // B
        copies = 1 if rules == self.rules else held // n_kv_heads

        def repeat(x_X):
            x_BK = _split(x_X, B, self.rules)[:, ::copies]
            return _merge(jnp.repeat(x_BK, times, axis=0), rules)

        return self.replace(
            k=tuple(map(repeat, self.k)),
            v=tuple(map(repeat, self.v)),
            lengths=jnp.repeat(self.lengths, times),
            rules=rules,
        )


def _split(x_X: Array, rows: int, rules: ShardingRules) -> Array:
    """A buffer's merged axis as rows and heads, which XLA knows how to share."""
    axes = _axes(rows, len(x_X) // rows, rules)
    own = rows // sharding.axis_size(axes[0])
    local = lambda x_X: x_X.reshape(own, -1, *x_X.shape[1:])
    return sharding.per_device(local, (PartitionSpec(sum(axes, ())),), PartitionSpec(*axes))(x_X)


def _merge(x_BK: Array, rules: ShardingRules) -> Array:
    """The inverse of `_split`, by other rules perhaps."""
    axes = _axes(*x_BK.shape[:2], rules)
    local = lambda x_BK: x_BK.reshape(-1, *x_BK.shape[2:])
    return sharding.per_device(local, (PartitionSpec(*axes),), PartitionSpec(sum(axes, ())))(x_BK)


def layout(rows: int, n_kv_heads: int) -> ShardingRules:
    """How a mesh shares a cache: by heads while there are enough, else by rows if those can be shared."""
    by_rows = rows % sharding.axis_size(BY_ROWS.batch) == 0
    return BY_ROWS if n_kv_heads % sharding.axis_size(DECODING.heads) and by_rows else DECODING


def buffer_spec(rows: int, heads: int, rules: ShardingRules) -> PartitionSpec:
    """How a mesh shares a layer's buffers: their merged axis by rows and by heads."""
    return PartitionSpec(sum(_axes(rows, heads, rules), ()))


def _axes(rows: int, heads: int, rules: ShardingRules) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Mesh axes of rows, and of heads."""
    return sharding.fitting(rules.batch, rows), sharding.fitting(rules.heads, heads)


def held_heads(n_heads: int, n_kv_heads: int, rules: ShardingRules) -> int:
    """Kv heads that are computed and cached: a mesh with more parts than heads needs each several times.

    Where neither heads nor parts are a multiple of the other, every device has them all.
    """
    parts = sharding.axis_size(rules.heads)
    return parts if parts % n_kv_heads == 0 and n_heads % parts == 0 else n_kv_heads


def write(buffer_X: Array, new_X: Array, lengths_B: Array, axis: int) -> Array:
    """Puts each row's T new entries at its slots lengths..lengths + T - 1.

    `dynamic_update_slice` clamps: past the end it would overwrite the last slots in silence, so
    callers check with `check_capacity` on the host first.

    Args:
        buffer_X: [X, H, S] or [X, S, H], X = B · K.
        new_X: the same with T instead of S.
        lengths_B: [B] int32.
        axis: that of the slots, 2 or 1.

    Returns:
        The buffer with the new entries.
    """
    new_X = new_X.astype(buffer_X.dtype)
    heads = buffer_X.shape[0] // lengths_B.shape[0]
    if heads == buffer_X.shape[0]:
        return jax.lax.dynamic_update_slice_in_dim(buffer_X, new_X, lengths_B[0], axis)
    put = lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(row, new, at, axis - 1)
    puts, arguments = jax.vmap(put), (buffer_X, new_X, jnp.repeat(lengths_B, heads))
    if new_X.shape[axis] > 1 or not kernels.writes_tokens(buffer_X, axis):
        return puts(*arguments)
    token = functools.partial(kernels.write_token, axis=axis)
    return jax.lax.platform_dependent(*arguments, tpu=token, default=puts)


def check_capacity(lengths: np.ndarray, new_tokens: int, capacity: int) -> None:
    """Raises SamplingError, on the host, if a row's new tokens do not fit.

    Args:
        lengths: [B] filled slots a row.
        new_tokens: tokens to add to each row.
        capacity: slots a row.
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
