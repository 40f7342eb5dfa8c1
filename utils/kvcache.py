"""The KV cache: fixed buffers a layer, filled row by row.

A token's slot is its index in its row, so rows of different lengths need no padding mask: a query in
slot t sees slots 0..t, and what lies behind a row's length is overwritten before it is ever seen.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from utils.errors import SamplingError

Array = jax.Array


@flax.struct.dataclass
class KVCache:
    """Keys and values of the tokens so far; immutable, a forward pass returns the next one.

    Attributes:
        k, v: one array a layer, [B, K, S, H]; keys are already rotated.
        lengths: [B] int32, filled slots of each row.
        empty: true only for a new cache. It is static: the first pass attends among the new tokens
            alone and never reads the buffers.
    """

    k: tuple[Array, ...]
    v: tuple[Array, ...]
    lengths: Array
    empty: bool = flax.struct.field(pytree_node=False, default=False)

    @classmethod
    def create(cls, shape_BKSH: tuple[int, ...], n_layers: int, dtype) -> "KVCache":
        """A cache of zeros: n_layers times two arrays of `shape_BKSH` = [B, K, S, H]."""
        buffers = [jnp.zeros(shape_BKSH, dtype) for _ in range(2 * n_layers)]
        lengths = jnp.zeros((shape_BKSH[0],), jnp.int32)
        return cls(tuple(buffers[:n_layers]), tuple(buffers[n_layers:]), lengths, empty=True)

    @property
    def capacity(self) -> int:
        """Slots a row, S."""
        return self.k[0].shape[2]

    def resized(self, capacity: int) -> "KVCache":
        """The same rows in buffers of `capacity` slots; the filled slots must fit."""
        keep = min(capacity, self.capacity)
        widths = ((0, 0), (0, 0), (0, capacity - keep), (0, 0))
        fit = lambda x: jnp.pad(x[:, :, :keep], widths)
        return self.replace(k=tuple(map(fit, self.k)), v=tuple(map(fit, self.v)))

    def repeated(self, times: int) -> "KVCache":
        """Each row `times` times, side by side: one prefill for several samples of a prompt."""
        return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), self)


def write(buffer_BKSH: Array, new_BTKH: Array, lengths_B: Array) -> Array:
    """Puts each row's T new entries at its slots lengths..lengths + T - 1.

    `dynamic_update_slice` clamps: past the end it would overwrite the last slots in silence, so
    callers check with `check_capacity` on the host first.

    Args:
        buffer_BKSH: [B, K, S, H].
        new_BTKH: [B, T, K, H].
        lengths_B: [B] int32.

    Returns:
        [B, K, S, H].
    """
    new_BKTH = new_BTKH.transpose(0, 2, 1, 3).astype(buffer_BKSH.dtype)
    if buffer_BKSH.shape[0] == 1:
        return jax.lax.dynamic_update_slice(buffer_BKSH, new_BKTH, (0, 0, lengths_B[0], 0))
    write_row = lambda row, new, start: jax.lax.dynamic_update_slice(row, new, (0, start, 0))
    return jax.vmap(write_row)(buffer_BKSH, new_BKTH, lengths_B)


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
