"""Kernels for accelerators, on the arrays of one device: JAX's attention, and the KV cache's write.

Queries are the last T of S keys: S = T is plain causal attention, S > T a continuation. Padding and
packing are segment ids: a query sees the keys up to and including itself that have its own id.
Dimension key: B batch, T queries, S keys, N query heads, K kv heads, H head dim.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

Array = jax.Array

# A TPU's vector register has 128 lanes. Blocks of 512 keep the matrix unit busy (512 multiplications
# for each key that is read) and a block's scores within the vector memory of every TPU since v4.
LANES, LARGEST_BLOCK = 128, 512

# Keys of a tile. With a mask and half a tile of keys at the end, dq is NaN where all scores of a query
# are low: cuDNN up to 9.25 scores the empty half 0 (pytorch#196678, on an H100).
CUDNN_TILE = 128

# Name of the results that flash attention keeps for its backward pass, for `jax.checkpoint`'s policies.
RESIDUALS = "flash_attention"


def causal_attention(
    plain: Callable[[], Array],
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    segment_ids_BS: Array | None = None,
) -> Array:
    """Causal attention by the kernel of the platform that the program is lowered for.

    The choice is the compiler's, not the tracer's: a program compiled on a laptop for a TPU gets the
    TPU's kernel. A program for a CPU contains no trace of kernels.

    Args:
        plain: the same attention in plain XLA.
        q_BTNH: [B, T, N, H] queries, the last T of the S tokens.
        k_BSKH, v_BSKH: [B, S, K, H].
        segment_ids_BS: [B, S] int32. None: one segment.

    Returns:
        [B, T, N, H], of q's dtype.
    """
    kernels = {"tpu": flash_attention, "default": lambda *_: plain()}
    # Tracing cuDNN's function asks the installed library, so there has to be one.
    if jax.default_backend() == "gpu" and _cudnn_takes(q_BTNH, k_BSKH):
        kernels["cuda"] = cudnn_attention
    return jax.lax.platform_dependent(q_BTNH, k_BSKH, v_BSKH, segment_ids_BS, **kernels)


def flash_attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    segment_ids_BS: Array | None = None,
    *,
    interpret: bool = False,
) -> Array:
    """JAX's splash attention for TPU, with its backward pass; softmax in float32.

    Source: Dao et al. (2205.14135); the sparse blocks: jax.experimental.pallas.ops.tpu.

    Args:
        q_BTNH, k_BSKH, v_BSKH, segment_ids_BS: see `causal_attention`.
        interpret: run the kernel's body by XLA, on any device (slow; for tests).

    Returns:
        [B, T, N, H], of q's dtype.
    """
    (T, N, H), S = q_BTNH.shape[1:], k_BSKH.shape[1]
    block_q, block_kv = _block(T), _block(S)
    # Padding keys are in every query's future, and padding queries are cut off.
    scaled_BTNH = (q_BTNH.astype(jnp.float32) * H**-0.5).astype(k_BSKH.dtype)
    q = _pad(scaled_BTNH, block_q).transpose(0, 2, 1, 3)
    k, v = (_pad(x_BSKH, block_kv).transpose(0, 2, 1, 3) for x_BSKH in (k_BSKH, v_BSKH))
    segments = None
    if segment_ids_BS is not None:
        segments = splash.SegmentIds(
            q=_pad(segment_ids_BS[:, S - T :], block_q), kv=_pad(segment_ids_BS, block_kv)
        )
    mask = _CausalMask((q.shape[2], k.shape[2]), offset=S - T)
    kernel = splash.make_splash_mha_single_device(
        splash_mask.MultiHeadMask([mask] * N),
        block_sizes=_block_sizes(block_q, block_kv, H),
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )
    run = _exact if q.dtype == jnp.float32 else _run
    out_BNTH = run(kernel, q, k, v, segments)[:, :, :T]
    return out_BNTH.transpose(0, 2, 1, 3).astype(q_BTNH.dtype)


def _run(kernel: Callable[..., Array], *arrays: Array) -> Array:
    return jax.vmap(kernel)(*arrays)


@jax.custom_vjp
def _exact(kernel: Callable[..., Array], *arrays: Array) -> Array:
    """`_run` with float32 products in both passes; a TPU would round their factors to bfloat16.

    JAX traces a backward pass outside of the context of the function's call, so it gets its own.
    """
    with jax.default_matmul_precision("highest"):
        return _run(kernel, *arrays)


def _exact_forward(kernel, *arrays):
    with jax.default_matmul_precision("highest"):
        return jax.vjp(_run, kernel, *arrays)


def _exact_backward(pullback, gradient):
    with jax.default_matmul_precision("highest"):
        return pullback(gradient)


_exact.defvjp(_exact_forward, _exact_backward)


class _CausalMask(splash_mask.CausalMask):
    """The causal mask, which splash attention evaluates to classify each block.

    Two corners suffice: some key of a block is seen if the last query sees the first key, and all
    keys are seen if the first query sees the last. In full, 65,536 tokens take half a minute.
    """

    def __getitem__(self, block: tuple[slice, slice]) -> np.ndarray:
        queries, keys = block
        some = queries.stop - 1 + self.offset >= keys.start
        every = queries.start + self.offset >= keys.stop - 1
        return np.asarray([some, every])

    # A class that defines one of the two has to define the other.
    __eq__, __hash__ = splash_mask.CausalMask.__eq__, splash_mask.CausalMask.__hash__


def _block(length: int) -> int:
    """Length of a block: as few blocks as possible, each the same number of whole registers."""
    count = -(-length // LARGEST_BLOCK)
    return -(-length // (count * LANES)) * LANES


def _pad(x: Array, block: int) -> Array:
    """[B, T, …] with zeros after the T tokens, up to a multiple of the block."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2))


def _block_sizes(q: int, kv: int, head_dim: int) -> splash.BlockSizes:
    """The same blocks in all three kernels.

    Head dims that do not fill registers go on the second-last axis: 64 would be padded to 128 in
    memory. The fused backward kernel is not used: it would write a dq for every block of keys.
    """
    layout = splash.QKVLayout.SEQ_MINOR if head_dim % LANES else splash.QKVLayout.HEAD_DIM_MINOR
    return splash.BlockSizes(
        **{name: q for name in ("block_q", "block_q_dkv", "block_q_dq")},
        **{name: kv for name in ("block_kv", "block_kv_dkv", "block_kv_dq")},
        **{name: layout for name in ("q_layout", "k_layout", "v_layout")},
    )


def cudnn_attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    segment_ids_BS: Array | None = None,
    *,
    implementation: str = "cudnn",
) -> Array:
    """cuDNN's flash attention for CUDA GPUs, with its backward pass.

    Segments take a bias of [B, 1, T, S], which all heads share, and padding up to whole tiles.

    Args:
        q_BTNH, k_BSKH, v_BSKH, segment_ids_BS: see `causal_attention`.
        implementation: see `jax.nn.dot_product_attention`; "xla" runs anywhere (for tests).

    Returns:
        [B, T, N, H], of q's dtype.
    """
    T, S, seen = q_BTNH.shape[1], k_BSKH.shape[1], None
    if segment_ids_BS is not None or S > T:
        q_BTNH, k_BSKH, v_BSKH = (_pad(x, CUDNN_TILE) for x in (q_BTNH, k_BSKH, v_BSKH))
    if segment_ids_BS is not None:
        queries, keys = (
            _pad(ids, CUDNN_TILE) for ids in (segment_ids_BS[:, S - T :], segment_ids_BS)
        )
        seen = queries[:, None, :, None] == keys[:, None, None, :]
    if S > T:
        # cuDNN's causal mask begins at the first key.
        causal = jnp.tri(q_BTNH.shape[1], k_BSKH.shape[1], S - T, dtype=bool)[None, None]
        seen = causal if seen is None else seen & causal
    out_BTNH = jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, mask=seen, is_causal=S == T, implementation=implementation
    )
    return out_BTNH[:, :T]


def _cudnn_takes(q_BTNH: Array, k_BSKH: Array) -> bool:
    """Whether cuDNN has a kernel for these arrays on every GPU since Ampere."""
    half = q_BTNH.dtype == k_BSKH.dtype and q_BTNH.dtype in (jnp.bfloat16, jnp.float16)
    return half and q_BTNH.shape[-1] % 8 == 0 and q_BTNH.shape[-1] <= 128


# Rows whose tiles a TPU holds at once: 32 tiles of keys take 1 MiB of its vector memory.
_ROWS_AT_ONCE = 32


def write_rows(plain: Callable[..., Array], buffer_X, new_X, slots_X, axis: int) -> Array:
    """Puts new entries into a slot of each row by the kernel of the platform; arguments: `write_token`.

    Args:
        plain: the same in plain XLA, of (buffer_X, new_X, slots_X).
    """
    if new_X.shape[axis] > 1 or not writes_tokens(buffer_X, axis):
        return plain(buffer_X, new_X, slots_X)
    token = functools.partial(write_token, axis=axis)
    return jax.lax.platform_dependent(buffer_X, new_X, slots_X, tpu=token, default=plain)


def writes_tokens(buffer_X: Array, axis: int) -> bool:
    """Whether `write_token` takes the buffer: a TPU's tiles divide heads and slots."""
    lanes, sublanes = buffer_X.shape[2], buffer_X.shape[1]
    whole = lanes % LANES == 0 and sublanes % (32 // buffer_X.dtype.itemsize) == 0
    return whole and (axis == 2 or sublanes % LANES == 0)


def write_token(
    buffer_X: Array, new_X: Array, slots_X: Array, *, axis: int, interpret: bool = False
) -> Array:
    """Puts one new entry into a slot of each row, in place; moves only the tiles that it touches.

    XLA for TPU would loop over the rows, and move the whole buffer onto the chip and back for that.

    Args:
        buffer_X: [X, H, S] or [X, S, H], for which `writes_tokens` holds.
        new_X: the same with 1 instead of S, of the buffer's dtype.
        slots_X: [X] int32; past the end is the last slot, as for `dynamic_update_slice`.
        axis: axis of the slots, 2 or 1.
        interpret: see `flash_attention`.

    Returns:
        The buffer with the new entries.
    """
    # A slot past the end would be in another row's memory.
    slots_X = jnp.clip(slots_X, 0, buffer_X.shape[axis] - 1)
    itemsize = buffer_X.dtype.itemsize
    tile = LANES if axis == 2 else 32 // itemsize  # lanes or sublanes of a tile in memory
    X, head_dim = len(buffer_X), buffer_X.shape[3 - axis]
    rows = max(n for n in range(1, _ROWS_AT_ONCE + 1) if X % n == 0)
    sides = (head_dim, tile) if axis == 2 else (tile, head_dim)
    in_place = pl.BlockSpec(memory_space=pltpu.HBM)
    new_rows = pl.BlockSpec((rows, *new_X.shape[1:]), lambda i, slots: (i, 0, 0))
    return pl.pallas_call(
        functools.partial(_write_tiles, axis=axis, tile=tile),
        out_shape=jax.ShapeDtypeStruct(buffer_X.shape, buffer_X.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(X // rows,),
            in_specs=[new_rows, in_place],
            out_specs=in_place,
            scratch_shapes=[
                pltpu.VMEM((rows, *sides), buffer_X.dtype),
                pltpu.SemaphoreType.DMA((rows,)),
            ],
        ),
        input_output_aliases={2: 0},
        cost_estimate=pl.CostEstimate(
            flops=0, transcendentals=0, bytes_accessed=X * head_dim * (2 * tile + 1) * itemsize
        ),
        name="write_token",
        interpret=interpret,
    )(slots_X, new_X, buffer_X)


def _write_tiles(slots, new, _, buffer, tiles, done, *, axis: int, tile: int) -> None:
    """The kernel: fetches the tiles of some rows at once, changes a lane or sublane, writes them back."""
    rows = len(tiles)
    first = pl.program_id(0) * rows

    def move(back: bool) -> None:
        copies = []
        for i in range(rows):
            start = pl.multiple_of(slots[first + i] // tile * tile, tile)
            at = [first + i, slice(None), slice(None)]
            at[axis] = pl.ds(start, tile)
            ends = (tiles.at[i], buffer.at[*at]) if back else (buffer.at[*at], tiles.at[i])
            copies.append(pltpu.make_async_copy(*ends, done.at[i]))
            copies[-1].start()
        for copy in copies:
            copy.wait()

    move(back=False)
    for i in range(rows):
        place = jax.lax.broadcasted_iota(jnp.int32, tiles.shape[1:], axis - 1)
        here = place == slots[first + i] % tile
        tiles[i] = jnp.where(here, jnp.broadcast_to(new[i], here.shape), tiles[i])
    move(back=True)
