"""Detours around XLA: the results are the same, and the straight way is slower or takes more memory.

Each function says what XLA does without it and what that costs, measured with jaxlib 0.10 on x86-64.
Which way a program goes depends on the platform that it is lowered for, on the CPU's instructions and
on jaxlib's version, never on a timing. `benchmarks/detours.py` shows which way is faster on the
machine in hand.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib

Array = jax.Array
Block = Callable[[Array, Any, Any], Array]


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this machine's CPU has products of bfloat16 (AVX512_BF16, AMX), as far as Linux tells."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)


def tied(*arrays: Any) -> tuple[Any, ...]:
    """The arrays, or trees of them, as values of which XLA can compute none before it has all.

    XLA for CPU converts a bfloat16 matrix that a decode loop reads before the loop begins: all weights,
    and the whole embedding table for the sake of one row per step. Tied to the step's own input,
    the matrix is converted where it is read.
    """
    return jax.lax.optimization_barrier(arrays)


def computed_once(tree: Any) -> Any:
    """A tree of arrays that XLA fuses into nothing that reads them.

    XLA computes a cheap value again in each fusion that reads it: every cosine of RoPE for each head
    of each layer.
    """
    return jax.lax.optimization_barrier(tree)


def apart_from_dot(x: Array) -> Array:
    """x, as an operand that XLA for CPU computes once and not inside a product's loops.

    It fuses all cheap operations before a one-row product into its inner loop, barriers or not: what
    made x is computed again for each output, in the int8 decode step 10 operations per weight. An
    integer division counts as expensive; XLA does not know that it divides by 1, and LLVM does.
    """
    bits = jax.lax.bitcast_convert_type(x, f"int{8 * x.dtype.itemsize}")
    one = 1 + ((bits.reshape(-1)[0] & 1) > 1).astype(bits.dtype)
    bits = jax.lax.div(bits, jnp.broadcast_to(one, bits.shape))
    return jax.lax.bitcast_convert_type(bits, x.dtype)


def ready_together(*arrays: Array) -> tuple[Array, ...]:
    """The arrays, none of which is used before all are computed.

    The output head's gradient is summed in float32 and cast to bfloat16. XLA casts it where it is
    used, at the end of the backward pass, and keeps the float32 array until then.
    """
    return jax.lax.optimization_barrier(arrays)


def product(dot: Callable[..., Array], a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """dot(a, b, a_axis, b_axis), which contracts an axis of a with one of b; on a CPU in its best form.

    Args:
        dot: what computes it elsewhere, of any arrays and axes.
        a: float32 or bfloat16, of any rank.
        b: a matrix of a's dtype.
        a_axis, b_axis: counted from 0.
    """
    on_cpu, straight = None, functools.partial(dot, a_axis=a_axis, b_axis=b_axis)
    rows, narrow = a.size // a.shape[a_axis], a.dtype == jnp.bfloat16
    projects = a_axis == a.ndim - 1 and b_axis == 1  # a @ b.T
    if projects and 1 < rows <= 32:
        on_cpu = _of_few_rows
    elif projects and rows == 1 and narrow:
        on_cpu = _of_one_row
    elif narrow and not multiplies_bfloat16() and (rows >= 256 or a_axis == 0):
        on_cpu = _in_float32
    elif narrow and multiplies_bfloat16() and a_axis == 0:
        on_cpu = _of_copy
    if on_cpu is None:
        return straight(a, b)
    on_cpu = functools.partial(on_cpu, dot, a_axis, b_axis)
    return jax.lax.platform_dependent(a, b, cpu=on_cpu, default=straight)


def _of_one_row(dot: Callable, a_axis: int, b_axis: int, x: Array, weight: Array) -> Array:
    """XLA reads the matrix at 2 GB/s for one row of bfloat16.

    x @ weight.T is read at 40 to 50 up to jaxlib 0.11.0 and at 4 since, that row twice at 20 to 40
    (Zen 5).
    """
    x, weight = tied(x, weight)
    if jaxlib.version.__version_info__ < (0, 11, 1):
        row = apart_from_dot(x.reshape(1, -1).astype(jnp.float32))
        return jnp.dot(row, weight.astype(jnp.float32).T).reshape(*x.shape[:-1], -1)
    return dot(jnp.broadcast_to(x, (2, *x.shape[1:])), weight, a_axis, b_axis)[:1]


def _of_few_rows(dot: Callable, a_axis: int, b_axis: int, x: Array, weight: Array) -> Array:
    """XLA packs the second operand anew in each product: so the few rows are the second one.

    A float32 decode step of 16 rows takes 32 ms so, and 40 without (Zen 5). In bfloat16 the straight
    form is as fast, if no copy of the matrix is turned before a loop begins: 23 and 25.5 ms.
    """
    x, weight = tied(x, weight)
    if x.dtype != jnp.float32:
        return dot(x, weight, a_axis, b_axis)
    y = dot(weight, _laid_out(x.reshape(-1, x.shape[-1])), 1, 1)
    return _laid_out(y).T.reshape(*x.shape[:-1], -1)


def _of_copy(dot: Callable, a_axis: int, b_axis: int, a: Array, b: Array) -> Array:
    """XLA would multiply in float32 what is contracted over its first axis.

    That makes 350 GFLOP/s, and a copy by columns with its product 760 (Zen 5). The result is laid out
    too: XLA cannot compute a product of bfloat16 into which it has moved a transposition.
    """
    return _laid_out(dot(_laid_out(a.T), b, 1, b_axis))


def _in_float32(dot: Callable, a_axis: int, b_axis: int, a: Array, b: Array) -> Array:
    """On a CPU without products of bfloat16 XLA does 150 GFLOP/s in it, and 240 in float32.

    On 2 cores that have them (Zen 4) it is the other way round, 419 and 190 at most.
    """
    a, b = tied(a, b)
    return dot(a.astype(jnp.float32), b.astype(jnp.float32), a_axis, b_axis)


def _laid_out(x: Array) -> Array:
    """A matrix, as one that XLA lays out row after row. Only a barrier and a reshape make it so."""
    return jax.lax.optimization_barrier(x[None])[0]


def sum_of_squares(x: Array) -> Array:
    """The sum of x² over the last axis, which stays as 1; on a CPU, of a single row as x · x.

    XLA for CPU makes three kernels of a sum over more than 32 numbers, one after the other, and one of
    a product: in an int8 decode step of the default model the norms' were 5 % of the time.
    """

    def by_product(x):
        row = x.reshape(-1)
        return jnp.dot(row, row, precision=jax.lax.Precision.HIGHEST).reshape(*x.shape[:-1], 1)

    def by_sum(x):
        return jnp.sum(x * x, axis=-1, keepdims=True)

    if x.size > x.shape[-1]:
        return by_sum(x)
    return jax.lax.platform_dependent(x, cpu=by_product, default=by_sum)


def update_in_place(
    update: Callable[..., tuple[Any, Any]],
    gradients: Any,
    scale: Array,
    updated: Array,
    params: Any,
    moments: Any,
) -> tuple[Any, Any]:
    """update(gradients, scale, updated, params, moments) -> (new params, new moments).

    On a CPU the moments are updated after the parameters, which read the old moments, and XLA is made
    to see that order. Otherwise it copies all moments before the forward pass.
    """

    def params_first(gradients, scale, updated, params, moments):
        new, _ = update(gradients, scale, updated, params, moments)
        new, gradients, updated = jax.lax.optimization_barrier((new, gradients, updated))
        # Always true, but not for XLA. A barrier alone is gone before XLA decides on copies.
        first = sum(x.reshape(-1)[0] for x in jax.tree.leaves(new))
        updated = updated & ((first < jnp.inf) | ~(first < 0))
        return new, update(gradients, scale, updated, params, moments)[1]

    return jax.lax.platform_dependent(
        gradients, scale, updated, params, moments, cpu=params_first, default=update
    )


def scan(block: Block, x: Array, layers: Any, constants: Any) -> Array:
    """block(…block(block(x, layer 0, constants), layer 1, constants)…), as a loop over stacked layers.

    XLA for CPU has no bfloat16 slices in jaxlib 0.10: it converts a stack that a loop reads to float32
    before the loop, and copies all of a stack for each layer that the loop writes. There the stacks are
    tied to the loop, and what the backward pass is given, and gives, goes through it as integers of the
    same bits. An SFT step in bfloat16 takes 1.25 times as long without, and 1.3 times the memory (Zen 5);
    in jaxlib 0.12 a loop takes as long either way. Float32 goes through JAX's own loop.

    Args:
        block: (x, layer, constants) -> the next x; may be a `jax.checkpoint`.
        x: of one shape and dtype in all layers.
        layers: a tree of arrays with the layers on their first axis.
        constants: a tree of arrays that all layers see, which get no gradient.
    """
    narrow = any(array.dtype == jnp.bfloat16 for array in jax.tree.leaves((x, layers)))
    # A mesh, also of one device, may be that of another platform: plan.py compiles for TPUs on a CPU.
    here = jax.default_backend() == "cpu" and jax.sharding.get_abstract_mesh().empty
    if not (narrow and here):
        return jax.lax.scan(lambda x, layer: (block(x, layer, constants), None), x, layers)[0]
    return _scan_on_cpu(block, x, layers, constants)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan_on_cpu(block: Block, x: Array, layers: Any, constants: Any) -> Array:
    stacks, structure = jax.tree.flatten(layers)

    def step(x, i):
        layer = jax.tree.unflatten(structure, _slices(stacks, i, x))
        return block(x, layer, constants), None

    return jax.lax.scan(step, x, jnp.arange(len(stacks[0])))[0]


def _scan_forward(block: Block, x: Any, layers: Any, constants: Any):
    """Saves what `jax.vjp` of each block saves, less the layer's own arrays and the constants."""
    trained = [leaf.perturbed for leaf in jax.tree.leaves(layers)]
    x, layers, constants = jax.tree.map(lambda leaf: leaf.value, (x, layers, constants))
    stacks, structure = jax.tree.flatten(layers)
    index, fixed = jnp.arange(len(stacks[0])), jax.tree.leaves(constants)
    vjps = {}  # what is the same for all layers

    def step(x, i):
        leaves = _slices(stacks, i, x)

        def of_trained(x, some):
            layer = _filled(trained, some, leaves)
            return block(x, jax.tree.unflatten(structure, layer), constants)

        y, vjp = jax.vjp(of_trained, x, [leaf for leaf, t in zip(leaves, trained) if t])
        saved, vjps["structure"] = jax.tree.flatten(vjp)
        places = {id(array): place for place, array in enumerate((*leaves, *fixed))}
        vjps["places"] = [places.get(id(array)) for array in saved]
        return y, _bits([array for array in saved if id(array) not in places])

    y, kept = jax.lax.scan(step, x, index)

    def backward(stacks, kept, fixed, dy):
        def step(dy, part):
            i, kept = part
            known, places = (*_slices(stacks, i, dy), *fixed), vjps["places"]
            found = [None if place is None else known[place] for place in places]
            saved = _filled([place is None for place in places], _values(kept), found)
            dx, dlayer = jax.tree.unflatten(vjps["structure"], saved)(dy)
            return dx, _bits(dlayer)

        dx, found = jax.lax.scan(step, dy, (index, kept), reverse=True)
        dlayers = _filled(trained, _values(found), [None] * len(trained))
        return dx, jax.tree.unflatten(structure, dlayers), None

    return y, jax.tree_util.Partial(backward, stacks, kept, fixed)


_scan_on_cpu.defvjp(_scan_forward, lambda _, backward, dy: backward(dy), symbolic_zeros=True)


def _slices(stacks: list[Array], i: Array, x: Array) -> list[Array]:
    """Layer i of each stack; tied to x, so that no stack is converted before a loop begins."""
    *stacks, _ = tied(*stacks, x)
    return [_values(jax.lax.dynamic_index_in_dim(_bits(s), i, keepdims=False)) for s in stacks]


def _filled(gaps: list[bool], values: list, others: list) -> list:
    """The others, with the next value in each gap."""
    values = iter(values)
    return [next(values) if gap else other for gap, other in zip(gaps, others)]


def _bits(tree: Any) -> Any:
    """The tree with each bfloat16 array as integers of the same bits."""
    return _viewed(tree, jnp.bfloat16, jnp.uint16)


def _values(tree: Any) -> Any:
    """The tree that `_bits` was given."""
    return _viewed(tree, jnp.uint16, jnp.bfloat16)


def _viewed(tree: Any, this: Any, that: Any) -> Any:
    def view(x):
        return jax.lax.bitcast_convert_type(x, that) if x.dtype == this else x

    return jax.tree.map(view, tree)
