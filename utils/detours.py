"""Detours around XLA: the results are the same, and the straight way is slower or takes more memory.

Each function says what XLA does without it and what that costs, measured with jaxlib 0.10 on x86-64.
Which way a program goes depends on the platform that it is lowered for and on the CPU's instructions,
never on a timing. `benchmarks/detours.py` shows which way is faster on the machine in hand.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib

from utils import sharding

Array = jax.Array
Dot = Callable[[Array, Array], Array]
Block = Callable[[Array, Any, Any], Array]


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this machine's CPU has products of bfloat16 (AVX512_BF16, AMX), as far as Linux tells."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)


def tied(*arrays: Array) -> tuple[Array, ...]:
    """The arrays, as values of which XLA can compute none before it has all.

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


def dot_of_one_row(dot: Dot, x: Array, weight: Array) -> Array:
    """dot(x, weight) of a single bfloat16 row x; on a CPU, in the form that this XLA compiles well.

    The straight form reads the matrix at 2 GB/s there, x @ weight.T at 40 to 50 up to jaxlib 0.11.0 and
    at 4 since, that row twice at 20 to 40 (Zen 5).
    """

    def of_two_rows(x, weight):
        x, weight = tied(x, weight)
        return dot(jnp.broadcast_to(x, (2, *x.shape[1:])), weight)[:1]

    def of_transposed(x, weight):
        x, weight = tied(x, weight)
        row = apart_from_dot(x.reshape(1, -1).astype(jnp.float32))
        return jnp.dot(row, weight.astype(jnp.float32).T).reshape(*x.shape[:-1], -1)

    on_cpu = of_transposed if jaxlib.version.__version_info__ < (0, 11, 1) else of_two_rows
    return jax.lax.platform_dependent(x, weight, cpu=on_cpu, default=dot)


def dot_of_few_rows(dot: Dot, x: Array, weight: Array) -> Array:
    """dot(x, weight) of 2 to 32 rows; on a CPU as (weight @ x.T).T in float32, and tied in bfloat16."""

    def on_cpu(x, weight):
        x, weight = tied(x, weight)
        if x.dtype != jnp.float32:
            return dot(x, weight)
        rows = x.reshape(-1, x.shape[-1])
        y = dot(weight, jax.lax.optimization_barrier(rows[None])[0])
        return jax.lax.optimization_barrier(y[None])[0].T.reshape(*x.shape[:-1], -1)

    if x.size == x.shape[-1] or x.dtype == jnp.float16:
        return dot(x, weight)
    return jax.lax.platform_dependent(x, weight, cpu=on_cpu, default=dot)


def dot_of_many_rows(dot: Dot, a: Array, b: Array) -> Array:
    """dot(a, b) of many bfloat16 rows; on a CPU without products of bfloat16, in float32.

    XLA does 150 GFLOP/s in bfloat16 there, and 240 in float32. On 2 cores that have them (Zen 4) it is
    the other way round, 419 and 190 at most: prefill takes 1.8 times as long in float32.
    """
    on_cpu = dot if multiplies_bfloat16() else functools.partial(_in_float32, dot)
    return jax.lax.platform_dependent(a, b, cpu=on_cpu, default=dot)


def dot_of_transposed(dot: Dot, a: Array, b: Array) -> Array:
    """dot(a, b) of bfloat16, where a [R, K] is a transposed matrix; on a CPU, of a's copy by rows.

    XLA for CPU would multiply in float32: 350 GFLOP/s, where the copy and its product make 760 (Zen 5).
    """

    def of_copy(a, b):
        # Not a barrier alone: only a reshape gives the dot an operand that is laid out by rows.
        return dot(jax.lax.optimization_barrier(a[None])[0], b)

    on_cpu = of_copy if multiplies_bfloat16() else functools.partial(_in_float32, dot)
    return jax.lax.platform_dependent(a, b, cpu=on_cpu, default=dot)


def _in_float32(dot: Dot, a: Array, b: Array) -> Array:
    a, b = tied(a, b)
    return dot(a.astype(jnp.float32), b.astype(jnp.float32))


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

    XLA for CPU has no bfloat16 slices: it converts a stack that a loop reads to float32 before the
    loop, and copies all of a stack for each layer that the loop writes. There the stacks are tied to the
    loop, and what the backward pass is given, and gives, goes through it as integers of the same bits.
    An SFT step in bfloat16 takes 1.25 times as long without, and 1.3 times the memory (Zen 5).

    Args:
        block: (x, layer, constants) -> the next x; may be a `jax.checkpoint`.
        x: of one shape and dtype in all layers.
        layers: a tree of arrays with the layers on their first axis.
        constants: a tree of arrays that all layers see, which get no gradient.
    """
    if jax.default_backend() != "cpu" or sharding.current_mesh() is not None:
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
        places = {id(array): i for i, array in enumerate((*leaves, *fixed))}
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
