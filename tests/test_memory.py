"""Bytes: predicted and counted ones are equal, and what cannot fit is refused before it is tried."""

import os

import jax
import jax.numpy as jnp
import pytest

from models.llama.model import cache_shape, init_cache, init_params
from models.llama.presets import PRESETS
from models.llama.formats import hf
from tests import tiny
from utils import memory
from utils.errors import ArtifactError
from utils.files import read_json


@pytest.fixture
def config():
    return hf.to_config(read_json(tiny.hf_model("gqa")[0] / "config.json"))


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1049, "1.0 kB"),
        (99_449, "99.4 kB"),
        (99_500, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.0 MB"),
        (16 << 20, "16.8 MB"),
        (538_060_032, "538 MB"),
        (999_499_999, "999 MB"),
        (2 * 10**12, "2.0 TB"),
        (5 * 10**16, "50000 TB"),
    ],
)
def test_human(n_bytes, text):
    assert memory.human(n_bytes) == text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_predictions_are_what_the_arrays_take(config, dtype):
    params = jax.eval_shape(
        lambda key: init_params(config, key, jnp.dtype(dtype)), jax.random.key(0)
    )
    taken = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    assert memory.params_bytes(config.n_params, dtype) == taken
    cache = init_cache(config, 3, 40, jnp.dtype(dtype))
    predicted = memory.cache_bytes(cache_shape(config, 3, 40), config.n_layers, dtype)
    assert predicted == memory.tree_bytes((cache.k, cache.v))


def test_known_sizes():
    # Llama 2 7B in half precision; its cache takes 512 kB a token.
    config = PRESETS["llama-2-7b"]
    assert memory.params_bytes(config.n_params, "float16") == 13_476_831_232
    assert memory.cache_bytes(cache_shape(config, 1, 1), config.n_layers, "float16") == 512 * 1024


def test_available_bytes():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < memory.available_bytes() <= total


def test_available_bytes_where_the_system_does_not_say(monkeypatch):
    def fail(*_):
        raise OSError

    monkeypatch.setattr("builtins.open", fail)
    assert memory.available_bytes() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    monkeypatch.setattr(os, "sysconf", fail)
    assert memory.available_bytes() is None
    memory.check_fits({"anything": 10**18})  # nobody knows: it is tried


@pytest.mark.covers("C14")
def test_check_fits(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 5_000_000)
    memory.check_fits({"this": 2_000_000, "that": 3_000_000})
    message = "out of memory: 2.0 MB for this, 3.0 MB for that are needed and 5.0 MB are available"
    with pytest.raises(ArtifactError, match=message):
        memory.check_fits({"this": 2_000_001, "that": 3_000_000})
