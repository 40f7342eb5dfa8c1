"""Eight-bit matrices: products next to float64, models next to the matrices that they stand for."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from models.llama.config import ModelConfig
from models.llama.load import load_checkpoint, save_checkpoint
from models.llama.lora import LoRAConfig
from models.llama.model import LLaMa, for_decoding, init_cache, init_params
from models.llama.quantize import quantize_params
from tests import small_grpo, tiny
from trainers.on_policy import decoding_params
from trainers.sft_trainer import SFTConfig, SFTTrainer
from utils.errors import ArtifactError, ConfigError
from utils.int8 import Int8, dequantize, project, quantize


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def tokens(config: ModelConfig, *shape: int):
    return jax.random.randint(jax.random.key(2), shape, 0, config.vocab_size)


def test_values_are_the_nearest_and_zeros_stay():
    x = draw(2, 5, 33)
    x[1, 3] = 0
    for found in (quantize(x), quantize(jnp.asarray(x))):
        assert found.values.dtype == np.int8 and found.scales.dtype == np.float32
        stands_for = np.asarray(found.values, np.float64) * np.asarray(found.scales)[..., None]
        assert (abs(stands_for - x) <= 0.5001 * np.asarray(found.scales)[..., None]).all()
        assert (
            abs(np.asarray(found.values)).max() == 127 and not np.asarray(found.values)[1, 3].any()
        )
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, quantize(jnp.asarray(x))), quantize(x))


@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("out, width", [(1024, 96), (131, 1024), (6, 33), (1536, 40), (8, 4096)])
def test_products_are_those_of_the_matrix_that_it_stands_for(rows, out, width):
    x, weight = draw(rows, 1, width), quantize(jnp.asarray(draw(out, width, seed=1)))
    x[..., 3] = 300.0  # an outlier, as trained models have them
    want = x.astype(np.float64) @ np.asarray(weight.astype(np.float32), np.float64).T
    found = np.asarray(jax.jit(project)(jnp.asarray(x), weight))
    assert found.shape == (rows, 1, out) and found.dtype == np.float32
    scale = np.linalg.norm(x, axis=-1, keepdims=True) * np.asarray(weight.scales) * 127
    # A single row is rounded to 8,000 levels or more of its largest number.
    assert (abs(found - want) / scale).max() < (1e-3 if rows == 1 else 3e-6)
    if rows > 1:
        alone = np.asarray(jax.jit(project)(jnp.asarray(x[:1]), weight))
        assert (abs(alone - want[:1]) / scale[:1]).max() < 1e-3


def test_a_row_of_zeros_and_one_that_is_not_finite():
    weight = quantize(jnp.asarray(draw(64, 32)))
    assert not project(jnp.zeros((1, 32)), weight).any()
    for bad in (np.nan, np.inf):
        for rows in (1, 2):
            assert not jnp.isfinite(project(jnp.full((rows, 32), bad), weight)).any()


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_the_gradient_by_the_input(dtype, bound):
    weight = quantize(jnp.asarray(draw(640, 24)))
    x, dy = jnp.asarray(draw(3, 24, seed=1), dtype), draw(3, 640, seed=2)
    found = jax.jit(jax.grad(lambda x: (project(x, weight) * dy).sum()))(x)
    want = dy.astype(np.float64) @ np.asarray(weight.astype(np.float32), np.float64)
    assert found.dtype == x.dtype
    assert np.linalg.norm(np.asarray(found, np.float64) - want) < bound * np.linalg.norm(want)


@pytest.mark.parametrize("name", ["gqa", "qwen3_biases", "biases"])
def test_a_model_computes_with_the_matrices_that_they_stand_for(name):
    config, params = load_checkpoint(tiny.hf_model(name)[0])
    narrow, model = quantize_params(params), LLaMa(config)
    stored = sum(x.nbytes for x in jax.tree.leaves(narrow))
    assert stored < 0.4 * sum(x.nbytes for x in jax.tree.leaves(params))
    run = jax.jit(lambda params, ids, cache=None: model.apply({"params": params}, ids, cache=cache))
    ids = tokens(config, 2, 12)
    want = run(dequantize(narrow), ids)[0]
    for layout in (narrow, for_decoding(narrow)):
        assert abs(run(layout, ids)[0] - want).max() < 1e-4
    # Token by token, each a single row.
    step, cache = for_decoding(narrow), init_cache(config, 1, 64, jnp.float32)
    for t in range(4):
        logits, cache = run(step, ids[:1, t : t + 1], cache)
        assert abs(logits[0, 0] - want[0, t]).max() < 2e-3
    floats = run(params, ids)[0]
    assert abs(want - floats).max() < 0.1 * abs(floats).max()


def test_quantised_while_loading_equals_quantised_afterwards(tmp_path):
    for name in ("gqa", "bf16", "sharded"):
        folder = tiny.hf_model(name)[0]
        for decoding in (False, True):
            found = load_checkpoint(folder, dtype="float32", quantize=True, decoding=decoding)[1]
            config, params = load_checkpoint(folder, dtype="float32", decoding=decoding)
            chex.assert_trees_all_equal(found, quantize_params(params))


def test_saved_loaded_and_refused(tmp_path):
    config, params = load_checkpoint(tiny.hf_model("qwen3_biases")[0], quantize=True)
    for shard in (5_000_000_000, 50_000):
        folder = tmp_path / str(shard)
        save_checkpoint(folder, config, params, max_shard_bytes=shard)
        again, found = load_checkpoint(folder)
        assert again == config
        chex.assert_trees_all_equal(found, params)
        decoding = load_checkpoint(folder, decoding=True)[1]
        chex.assert_trees_all_equal(decoding, for_decoding(params))
    with pytest.raises(ValueError, match="qwen3_int8"):
        AutoModelForCausalLM.from_pretrained(folder)
    config, params = load_checkpoint(tiny.hf_model("gqa")[0], quantize=True)
    with pytest.raises(ConfigError, match="Meta's format has no eight-bit"):
        save_checkpoint(tmp_path / "meta", config, params, format="meta")


@pytest.mark.parametrize("fault", ["no scale", "short scale", "not said", "float"])
def test_broken_files_are_refused_by_name(tmp_path, fault):
    config, params = load_checkpoint(tiny.hf_model("gqa")[0], quantize=True)
    save_checkpoint(tmp_path, config, params)
    file, name = tmp_path / "model.safetensors", "model.layers.0.mlp.down_proj.weight"
    tensors = load_file(file)
    if fault == "no scale":
        del tensors[f"{name}_scale"]
    elif fault == "short scale":
        tensors[f"{name}_scale"] = tensors[f"{name}_scale"][:-1]
    elif fault == "float":
        tensors[name] = tensors[name].astype(np.float32)
        del tensors[f"{name}_scale"]
    else:
        settings = json.loads((tmp_path / "config.json").read_text())
        settings |= {"model_type": "llama", "architectures": None}
        (tmp_path / "config.json").write_text(json.dumps(settings))
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="dtype 'I8'" if fault == "not said" else name):
        load_checkpoint(tmp_path)


@pytest.mark.slow
def test_adapters_over_an_int8_base_train_and_sample_alike():
    lora = LoRAConfig(rank=2)
    of = small_grpo.trainer(lora=lora, dtype=jnp.float32)
    base = quantize_params(init_params(small_grpo.MODEL, jax.random.key(0)))
    state, frozen = of.init(base, jax.random.key(1))
    # b is zero at first: adapters that say something.
    params = jax.tree.map(lambda x: x + 0.05 * jnp.asarray(draw(*x.shape)), state.params)
    state = state.replace(params=params)
    ids = tokens(small_grpo.MODEL, 3, 9)
    trained = of.model.apply({"params": of.model_params(params, frozen)}, ids)[0]
    policy = decoding_params(of, state, frozen)
    chex.assert_trees_all_equal_dtypes(policy["layers"][0]["attn"]["wq"], frozen["embed"])
    assert abs(of.model.apply({"params": policy}, ids)[0] - trained).max() < 1e-4
    exported = of.export_params(state, frozen)
    assert not any(
        isinstance(x, Int8)
        for x in jax.tree.leaves(exported, is_leaf=lambda x: isinstance(x, Int8))
    )
    assert abs(of.model.apply({"params": exported}, ids)[0] - trained).max() < 1e-4


@pytest.mark.slow
def test_a_step_over_an_int8_base_is_that_over_the_matrices_it_stands_for():
    model, config = LLaMa(small_grpo.MODEL), SFTConfig(learning_rate=0.01, max_steps=2)
    base = quantize_params(init_params(small_grpo.MODEL, jax.random.key(0)))
    batch = {"tokens": np.asarray(tokens(small_grpo.MODEL, 2, 16))}
    batch["target_mask"] = np.ones_like(batch["tokens"], bool)
    batch["target_mask"][:, 0] = False
    found = []
    trainer = SFTTrainer(model=model, config=config, lora=LoRAConfig(rank=2))
    for params in (base, dequantize(base)):
        state, frozen = trainer.init(params, jax.random.key(1))
        gradients, loss = trainer.gradients(state.params, frozen, batch, jax.random.key(0))
        found.append((gradients, loss.total))
    chex.assert_trees_all_close(*found, rtol=1e-4, atol=1e-6)
    with pytest.raises(ConfigError, match="pass --lora_rank"):
        SFTTrainer(model=model, config=config).init(base, jax.random.key(1))
