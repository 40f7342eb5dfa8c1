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

Array = jax.Array
Dot = Callable[[Array, Array], Array]


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
    """The integers x, as an operand that XLA for CPU computes once and not inside a product's loops.

    It fuses all cheap operations before a one-row product into its inner loop, barriers or not: what
    made x is computed again for each output, in the int8 decode step 10 operations per weight. An
    integer division counts as expensive; XLA does not know that it divides by 1.
    """
    one = 1 + (x.reshape(-1)[0] == jnp.iinfo(x.dtype).min).astype(x.dtype)
    return jax.lax.div(x, jnp.broadcast_to(one, x.shape))


def ready_together(*arrays: Array) -> tuple[Array, ...]:
    """The arrays, none of which is used before all are computed.

    The output head's gradient is summed in float32 and cast to bfloat16. XLA casts it where it is
    used, at the end of the backward pass, and keeps the float32 array until then.
    """
    return jax.lax.optimization_barrier(arrays)


def dot_of_one_row(dot: Dot, x: Array, weight: Array) -> Array:
    """dot(x, weight) of a single bfloat16 row x; on a CPU, of that row twice.

    XLA for CPU reads the matrix at 1.5 GB/s for one row, and at 10 GB/s for two.
    """

    def of_two_rows(x, weight):
        x, weight = tied(x, weight)
        return dot(jnp.broadcast_to(x, (2, *x.shape[1:])), weight)[:1]

    return jax.lax.platform_dependent(x, weight, cpu=of_two_rows, default=dot)


def dot_of_many_rows(dot: Dot, a: Array, b: Array) -> Array:
    """dot(a, b) of many bfloat16 rows; on a CPU without products of bfloat16, in float32.

    XLA does 150 GFLOP/s in bfloat16 there, and 240 in float32. On 2 cores that have them (Zen 4) it is
    the other way round, 419 and 190 at most: prefill takes 1.8 times as long in float32.
    """

    def in_float32(a, b):
        a, b = tied(a, b)
        return dot(a.astype(jnp.float32), b.astype(jnp.float32))

    on_cpu = dot if multiplies_bfloat16() else in_float32
    return jax.lax.platform_dependent(a, b, cpu=on_cpu, default=dot)


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
