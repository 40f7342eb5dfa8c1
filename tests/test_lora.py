"""LoRA: its gradients against autograd through W + s·B·A, and what it must leave alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from models.llama.layout import MATRICES, leaves
from models.llama.lora import TARGETS, LoRAConfig, attach, init_lora, merge
from models.llama.model import LLaMa
from tests.test_sft_trainer import compare, fast, gradients, variant
from tests.test_torch_training import batch_of
from trainers.sft_trainer import SFTConfig, SFTTrainer
from utils.files import flatten

LORA = LoRAConfig(rank=3, alpha=4.5)  # scaled by 1.5


@functools.cache
def adapters(lora=LORA, name="biases"):
    """A tree whose b is not zero."""
    _, config, _ = variant(name)
    tree = init_lora(config, lora, jax.random.key(1))
    rng = np.random.default_rng(5)
    noise = lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.1, x.dtype)
    return jax.tree.map_with_path(lambda p, x: noise(x) if p[-1].key.endswith("_b") else x, tree)


def torch_gradients(model, config, tree, scale, batch):
    """(loss, gradients by path of A and B) with the adapted weights formed."""
    trained = {k: torch.tensor(np.asarray(v), requires_grad=True) for k, v in flatten(tree).items()}
    weights = dict(model.named_parameters())
    for leaf in leaves(config, "hf"):
        if f"{leaf.path}_a" in trained:
            update = trained[f"{leaf.path}_b"] @ trained[f"{leaf.path}_a"] * scale
            weights |= {hf: weights[hf] + update[i] for i, hf in enumerate(leaf.names)}
    ids = torch.from_numpy(batch["tokens"]).long()
    call = dict(input_ids=ids, use_cache=False)
    logits = torch.func.functional_call(model, weights, (), call).logits[:, :-1]
    labels = ids.where(torch.from_numpy(batch["target_mask"]), torch.tensor(-100))[:, 1:]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    return loss.item(), {path: x.grad.numpy() for path, x in trained.items()}


def test_loss_and_every_gradient_are_torchs():
    model, config, params = variant("biases")
    batch, tree = batch_of([24, 17, 9], 24), adapters()
    loss, wanted = torch_gradients(model, config, tree, 1.5, batch)
    grads, found = gradients(SFTTrainer(LLaMa(config), SFTConfig(), LORA), tree, batch, params)
    assert abs(float(found.means()["loss"]) - loss) < 1e-5 * loss
    compare(grads, wanted)
    assert len(wanted) == 2 * len(TARGETS)


@fast
def logits(params):
    return LLaMa(variant("biases")[1]).apply(
        {"params": params}, batch_of([24, 17, 9], 24)["tokens"]
    )[0]


def test_a_new_adapter_changes_no_bit_and_a_merged_one_is_the_attached_one():
    _, config, params = variant("biases")
    base = logits(params)
    new = init_lora(config, LORA, jax.random.key(0))
    np.testing.assert_array_equal(logits(attach(params, new, LORA)), base)
    same = merge(params, new, LORA)
    jax.tree.map(np.testing.assert_array_equal, same, params)
    attached = logits(attach(params, adapters(), LORA))
    merged = merge(params, adapters(), LORA)
    assert np.abs(attached - base).max() > 0.1
    np.testing.assert_allclose(logits(merged), attached, atol=1e-5 * np.abs(attached).max())
    for name, part in MATRICES.items():
        tree = {k: np.asarray(v, np.float64) for k, v in adapters()["layers"][part].items()}
        wanted = params["layers"][part][name] + 1.5 * tree[f"{name}_b"] @ tree[f"{name}_a"]
        np.testing.assert_allclose(merged["layers"][part][name], wanted, atol=1e-5)


def test_merging_rounds_once():
    _, config, params = variant("biases")
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    exact = merge(jax.tree.map(lambda x: x.astype(jnp.float32), rounded), adapters(), LORA)
    wanted = jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact)
    jax.tree.map(np.testing.assert_array_equal, merge(rounded, adapters(), LORA), wanted)


@pytest.mark.parametrize("name", ["biases", "tied"])
def test_a_new_tree_has_the_shapes_of_its_targets(name):
    _, config, params = variant(name)
    lora = LoRAConfig(rank=5, targets=("wq", "w_down"))
    tree = init_lora(config, lora, jax.random.key(0))
    assert {part: set(inner) for part, inner in tree["layers"].items()} == {
        "attn": {"wq_a", "wq_b"},
        "mlp": {"w_down_a", "w_down_b"},
    }
    for part, matrix in (("attn", "wq"), ("mlp", "w_down")):
        depth, out_dim, in_dim = params["layers"][part][matrix].shape
        a, b = (tree["layers"][part][f"{matrix}_{half}"] for half in "ab")
        assert (a.shape, b.shape) == ((depth, 5, in_dim), (depth, out_dim, 5))
        assert not np.asarray(b).any()
        assert 0.9 < np.abs(a).max() * in_dim**0.5 <= 1 and abs(a.mean()) < 0.1 * in_dim**-0.5
    assert attach(params, tree, lora)["layers"]["attn"].keys() - params["layers"][
        "attn"
    ].keys() == {
        "wq_a",
        "wq_b",
    }
    assert "wq_a" not in params["layers"]["attn"], "the caller's tree is as it was"


def test_the_scale():
    assert LoRAConfig(rank=7).scale == 2.0 and LoRAConfig(rank=8, alpha=4).scale == 0.5


def test_only_adapters_are_trained_and_a_bfloat16_base_stays_as_it_is():
    """One step, compiled once: what it returns, and what is left alone."""
    _, config, params = variant("biases")
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    before = jax.tree.map(np.asarray, base)
    lora = LoRAConfig(rank=2, targets=("wv", "w_up"))
    trainer = SFTTrainer(LLaMa(config), SFTConfig(learning_rate=0.1), lora)
    state, frozen = trainer.init(base, jax.random.key(0))
    assert frozen is base
    sizes = sum(x.size for x in jax.tree.leaves(state.params))
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert sum(x.size for x in moments) == 2 * sizes  # two moments of what is trained
    first = jax.tree.map(np.asarray, state.params)
    step = fast(lambda s, f, b: trainer.train_step(s, f, b))
    batch = batch_of([24, 17, 9], 24)
    state, metrics = step(state, frozen, batch)
    # a has no gradient yet: b is 0.
    b_moved = state.params["layers"]["attn"]["wv_b"] != first["layers"]["attn"]["wv_b"]
    assert metrics["updated"] and b_moved.all()
    state, after = step(state, frozen, batch)
    assert after["loss"] < metrics["loss"]
    assert np.any(state.params["layers"]["attn"]["wv_a"] != first["layers"]["attn"]["wv_a"])
    jax.tree.map(np.testing.assert_array_equal, frozen, before)
    exported = trainer.export_params(state, frozen)
    same = lambda path: np.array_equal(flatten(exported)[path], flatten(before)[path])
    changed = {path for path in flatten(before) if not same(path)}
    assert changed == {"layers/attn/wv", "layers/mlp/w_up"}
    assert jax.tree.map(lambda x: x.dtype, exported) == jax.tree.map(lambda x: x.dtype, before)


def products(trainer, params, frozen):
    """Multiply-adds of all matrix products of one gradient, by XLA's own count of the program."""
    rows = {"tokens": np.zeros((4, 64), np.int32), "target_mask": np.ones((4, 64), bool)}
    compute = lambda p, f: trainer.gradients(p, f, rows, jax.random.key(0))[0]
    return jax.jit(compute).lower(params, frozen).cost_analysis()["flops"]


def test_no_gradient_of_a_frozen_matrix_is_computed():
    _, config, params = variant("biases")
    lora = LoRAConfig(rank=1)
    tree = init_lora(config, lora, jax.random.key(0))
    model = LLaMa(config)
    full = products(SFTTrainer(model, SFTConfig()), params, {})
    adapted = products(SFTTrainer(model, SFTConfig(), lora), tree, params)
    # Forward, gradients by activations, and by weights: the last third goes.
    assert adapted < 0.75 * full
