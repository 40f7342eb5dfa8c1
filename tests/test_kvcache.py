"""The KV cache: writes, growth, capacity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from utils.errors import SamplingError
from utils.kvcache import KVCache, check_capacity, write


@pytest.mark.parametrize("rows", [1, 3])
def test_each_row_is_written_at_its_own_length(rows):
    rng = np.random.default_rng(rows)
    buffer = rng.standard_normal((rows, 2, 10, 4)).astype(np.float32)
    new = rng.standard_normal((rows, 3, 2, 4)).astype(np.float32)
    lengths = np.asarray([7, 0, 4][:rows], np.int32)
    out = np.asarray(jax.jit(write)(buffer, new, lengths))
    expected = buffer.copy()
    for row, start in enumerate(lengths):
        expected[row, :, start : start + 3] = new[row].transpose(1, 0, 2)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.covers("C1")
def test_capacity_is_checked_on_the_host():
    check_capacity(np.asarray([3, 5]), 3, 8)
    with pytest.raises(SamplingError, match="row 1 holds 5 tokens and 4 more exceed .* 8 slots"):
        check_capacity(np.asarray([3, 5]), 4, 8)


def test_resized_and_repeated_keep_the_rows():
    cache = KVCache.create((2, 1, 4, 3), n_layers=2, dtype=jnp.float32)
    assert cache.empty and cache.capacity == 4
    filled = jnp.arange(24.0).reshape(2, 1, 4, 3)
    cache = cache.replace(k=(filled, filled + 1), lengths=jnp.asarray([2, 4]))
    grown = cache.resized(6)
    assert grown.capacity == 6
    np.testing.assert_array_equal(grown.k[1][:, :, :4], filled + 1)
    twice = cache.repeated(2)
    assert twice.lengths.tolist() == [2, 2, 4, 4]
    np.testing.assert_array_equal(twice.k[0], filled[jnp.asarray([0, 0, 1, 1])])
