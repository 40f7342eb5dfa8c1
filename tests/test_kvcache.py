"""The KV cache: writes, growth, capacity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from utils.errors import SamplingError
from utils.kvcache import KVCache, check_capacity, held_heads, layout, write
from utils.sharding import BY_ROWS, DECODING, MESH_AXES


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("axis", [1, 2])
def test_each_row_is_written_at_its_own_length(rows, axis):
    rng = np.random.default_rng(rows)
    slots_last = lambda x: x if axis == 2 else x.swapaxes(1, 2)
    buffer = rng.standard_normal((rows * 2, 4, 10)).astype(np.float32)
    new = rng.standard_normal((rows * 2, 4, 3)).astype(np.float32)
    lengths = np.asarray([7, 0, 4][:rows], np.int32)
    run = jax.jit(write, static_argnames="axis")
    out = run(slots_last(buffer), slots_last(new), lengths, axis=axis)
    expected = buffer.copy()
    for i in range(rows * 2):
        start = lengths[i // 2]
        expected[i, :, start : start + 3] = new[i]
    np.testing.assert_array_equal(slots_last(np.asarray(out)), expected)


@pytest.mark.covers("C1")
def test_capacity_is_checked_on_the_host():
    check_capacity(np.asarray([3, 5]), 3, 8)
    with pytest.raises(SamplingError, match="row 1 holds 5 tokens and 4 more exceed .* 8 slots"):
        check_capacity(np.asarray([3, 5]), 4, 8)


def test_resized_and_repeated_keep_the_rows():
    cache = KVCache.create((2, 3, 4, 5), n_layers=2, dtype=jnp.float32)
    assert cache.empty and cache.capacity == 4
    k, v = jnp.arange(120.0).reshape(6, 5, 4), -jnp.arange(120.0).reshape(6, 4, 5)
    cache = cache.replace(k=(k, k + 1), v=(v, v + 1), lengths=jnp.asarray([2, 4]))
    grown = cache.resized(6)
    assert grown.capacity == 6
    np.testing.assert_array_equal(grown.k[1][:, :, :4], k + 1)
    np.testing.assert_array_equal(grown.v[1][:, :4], v + 1)
    twice = cache.repeated(2, 3)
    assert twice.lengths.tolist() == [2, 2, 4, 4]
    order = jnp.asarray([0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5])
    np.testing.assert_array_equal(twice.k[0], k[order])
    np.testing.assert_array_equal(twice.v[0], v[order])


@pytest.mark.parametrize(
    "rows, n_kv_heads, rules, held",
    [
        (8, 8, DECODING, 8),  # as many heads as parts
        (8, 2, BY_ROWS, 2),
        (3, 2, DECODING, 4),  # rows that cannot be shared: each head is held twice
        (8, 3, BY_ROWS, 3),
        (3, 3, DECODING, 3),
    ],
)
def test_a_cache_lies_by_rows_where_heads_are_too_few(rows, n_kv_heads, rules, held):
    mesh = AbstractMesh((1, 4, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    with jax.sharding.use_abstract_mesh(mesh):
        assert layout(rows, n_kv_heads) == rules
        assert held_heads(4 * n_kv_heads, n_kv_heads, rules) == held


def test_repeated_rows_go_to_where_so_many_lie_with_each_head_once():
    mesh = AbstractMesh((1, 4, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    with jax.sharding.use_abstract_mesh(mesh):
        make = lambda: KVCache.create((2, 4, 8, 3), n_layers=1, dtype=jnp.float32)
        few = jax.eval_shape(make)
        many = jax.eval_shape(lambda: make().repeated(4, 2))
        still = jax.eval_shape(lambda: make().repeated(3, 2))
    assert (few.rules, few.k[0].shape) == (DECODING, (8, 3, 8))
    assert (many.rules, many.k[0].shape, many.v[0].shape) == (BY_ROWS, (16, 3, 8), (16, 8, 3))
    assert (still.rules, still.k[0].shape) == (DECODING, (24, 3, 8))
