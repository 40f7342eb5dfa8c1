"""The model against transformers on tiny random checkpoints, and against itself."""

import functools
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from models.llama.config import ModelConfig
from models.llama.load import load_checkpoint
from models.llama.model import LLaMa, init_cache, init_params, for_decoding
from tests import tiny
from tests.tiny_gguf import write_gguf

T = 96
TOKENS = np.random.default_rng(0).integers(3, 160, (2, T)).astype(np.int32)


@functools.cache
def load(name):
    """(model, params in float32) of a tiny checkpoint."""
    config, params = load_checkpoint(tiny.hf_model(name)[0], dtype="float32")
    return LLaMa(config), params


@functools.partial(jax.jit, static_argnames="model")
def forward(model, params, tokens, **kwargs):
    return model.apply({"params": params}, tokens, **kwargs)


def their_logits(model, tokens):
    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(tokens)).long()).logits.float().numpy()


@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_logits_equal_transformers_at_all_positions(name):
    model, params = load(name)
    logits, cache = forward(model, params, TOKENS)
    assert cache is None and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, their_logits(tiny.hf_model(name)[1], TOKENS), atol=2e-4)


@pytest.mark.parametrize(
    "name, platform",
    [(name, "cpu") for name in ("gqa", "biases", "qwen2_tied", "qwen3_biases")]
    + [("gqa", "tpu")],  # whose values lie as its keys
)
def test_cached_equals_uncached_in_chunks_and_steps(name, platform):
    model, params = load(name)
    whole, _ = forward(model, params, TOKENS)
    params = for_decoding(params)
    cache, outs = init_cache(model.config, 2, 96, jnp.float32, platform), []
    assert cache.values_axis == (2 if platform == "tpu" else 1)
    for start, stop in ((0, 40), (40, 80), *((i, i + 1) for i in range(80, T))):
        logits, cache = forward(model, params, TOKENS[:, start:stop], cache=cache)
        outs.append(logits)
        cache = cache.resized(128)
    np.testing.assert_allclose(np.concatenate(outs, axis=1), whole, rtol=1e-5, atol=5e-5)
    assert cache.lengths.tolist() == [T, T] and not cache.empty


@pytest.mark.parametrize("kind", ["meta", "meta-2-shards", "gguf"])
@pytest.mark.parametrize("name", ["gqa", "llama3_meta"])
def test_meta_and_gguf_files_give_the_same_logits(name, kind, tmp_path):
    theirs = tiny.hf_model(name)[1]
    if kind == "gguf":
        path = tmp_path / "model.gguf"
        write_gguf(path, theirs.config, theirs.state_dict())
    else:
        path = tiny.write_meta(tmp_path / "meta", theirs, shards=2 if "2" in kind else 1)
    config, params = load_checkpoint(path, dtype="float32")
    logits, _ = forward(LLaMa(config), params, TOKENS)
    np.testing.assert_allclose(logits, their_logits(theirs, TOKENS), atol=2e-4)


def assert_same_logits(ours, others):
    """Equal but for the order of sums, which XLA is free to choose for each program and processor.

    Three layers and the head are some 30 such sums in a row, each off by up to a unit in the last
    place of the largest number.
    """
    room = 32 * np.finfo(np.float32).eps * np.abs(others).max()
    np.testing.assert_allclose(ours, others, rtol=0, atol=room)


def test_unstacked_layers_give_the_same_logits():
    model, params = load("gqa")
    stacked, _ = forward(model, params, TOKENS)
    unstacked, _ = forward(model, for_decoding(params), TOKENS)
    assert_same_logits(stacked, unstacked)


def test_a_stacked_model_takes_a_cache_too():
    model, params = load("gqa")
    cache = init_cache(model.config, 2, T, jnp.float32)
    stacked, _ = forward(model, params, TOKENS, cache=cache)
    assert_same_logits(stacked, forward(model, params, TOKENS)[0])


def test_logits_for_some_positions_only():
    model, params = load("tied")
    at = jnp.asarray([[0, 95, 7], [64, 64, 2]])
    some, _ = forward(model, params, TOKENS, logits_at_BM=at)
    whole, _ = forward(model, params, TOKENS)
    assert_same_logits(some, np.take_along_axis(whole, at[..., None], 1))


def test_packed_segments_equal_separate_rows():
    model, params = load("llama3_8")
    lengths = (50, 20, 26)
    segments = np.repeat(np.arange(3), lengths)[None]
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    packed, _ = forward(model, params, TOKENS[:1], segment_ids_BT=segments, positions_BT=positions)
    start = 0
    for n in lengths:
        alone, _ = forward(model, params, TOKENS[:1, start : start + n])
        np.testing.assert_allclose(packed[:, start : start + n], alone, atol=2e-5)
        start += n


def test_positions_are_the_callers():
    """With gaps: RoPE is relative, so that packed or padded rows cannot show whether they are used."""
    model, params = load("llama3_8")
    positions = np.cumsum(np.random.default_rng(1).integers(1, 5, (2, 40)), axis=1)
    given, _ = forward(model, params, TOKENS[:, :40], positions_BT=positions)
    with torch.no_grad():
        theirs = tiny.hf_model("llama3_8")[1](
            torch.from_numpy(TOKENS[:, :40]).long(), position_ids=torch.from_numpy(positions)
        )
    np.testing.assert_allclose(given, theirs.logits.numpy(), atol=2e-4)
    assert np.abs(given - forward(model, params, TOKENS[:, :40])[0]).max() > 0.1


def test_left_padding_is_invisible():
    model, params = load("gqa")
    pad, n = 13, 40
    tokens = np.zeros((1, pad + n), np.int32)
    tokens[0, pad:] = TOKENS[0, :n]
    mask = np.arange(pad + n)[None] >= pad
    positions = np.maximum(np.arange(pad + n)[None] - pad, 0)
    padded, _ = forward(model, params, tokens, key_mask_BS=mask, positions_BT=positions)
    alone, _ = forward(model, params, TOKENS[:1, :n])
    np.testing.assert_allclose(padded[:, pad:], alone, atol=2e-5)
    assert np.isfinite(padded).all()


def test_bfloat16_is_near_float32():
    model, params = load("gqa")
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    high, _ = forward(model, params, TOKENS)
    logits, _ = forward(model, low, TOKENS)
    assert logits.dtype == jnp.float32
    assert np.sqrt(np.mean((logits - high) ** 2)) < 0.05 * np.std(high)


@pytest.mark.parametrize("name", ["biases", "qwen3_biases"])
def test_init_has_the_shapes_of_a_checkpoint(name):
    model, loaded = load(name)
    params = init_params(model.config, jax.random.key(0))
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    assert shapes(params) == shapes(loaded)
    assert sum(x.size for x in jax.tree.leaves(params)) == model.config.n_params
    logits, _ = forward(model, params, TOKENS)
    # Near-uniform at the start: the loss of an untrained model is log(vocabulary).
    assert abs(float(jax.nn.logsumexp(logits, -1).mean()) - np.log(160)) < 0.1


def test_a_layer_s_scale_at_init_follows_depth():
    config = ModelConfig(**{**vars(load("gqa")[0].config), "n_layers": 8})
    layers = init_params(config, jax.random.key(1))["layers"]
    assert np.std(layers["attn"]["wq"]) == pytest.approx(0.02, rel=0.05)
    assert np.std(layers["attn"]["wo"]) == pytest.approx(0.02 / 4, rel=0.05)
    assert np.std(layers["mlp"]["w_down"]) == pytest.approx(0.02 / 4, rel=0.05)


def test_gradients_reach_every_parameter():
    model, params = load("biases")
    loss = lambda p: jnp.mean(model.apply({"params": p}, TOKENS)[0] ** 2)
    grads = jax.jit(jax.grad(loss))(params)
    # Adding one number to all scores of a query changes nothing: the key bias alone has gradient 0.
    grads["layers"]["attn"].pop("bk")
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))


def test_layers_that_nothing_else_holds_are_freed_once_they_are_split():
    params = jax.tree.map(jnp.copy, load("gqa")[1])
    expected = for_decoding(params)
    kept = params["layers"]["mlp"]["w_down"]
    freed = [weakref.ref(x) for x in jax.tree.leaves(params["layers"]) if x is not kept]
    jax.tree.map(np.testing.assert_array_equal, for_decoding(params, donate=True), expected)
    assert kept.sum() != 0 and [ref for ref in freed if ref() is not None] == []
