"""The oracle of training against transformers' own loss, and its own rules."""

import numpy as np
import pytest
import torch

from models.llama.load import load_checkpoint
from tests import tiny
from tests.oracles.torch_training import adamw_recipe, loss_and_grads
from utils.files import flatten

RECIPE = dict(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, clip=1.0)


def batch_of(lengths, width, seed=0):
    """Unpacked rows, padded on the right with ids that count elsewhere, random targets."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, 160, (len(lengths), width)).astype(np.int32)
    mask = (rng.random(tokens.shape) < 0.6) & (np.arange(width) < np.array(lengths)[:, None])
    mask[:, 0] = False
    return {"tokens": tokens, "target_mask": mask}


def pack(batch, lengths, gap):
    """The rows of a batch in one row, `gap` tokens of padding after each."""
    out = {key: [] for key in ("tokens", "target_mask", "segment_ids", "positions")}
    for i, length in enumerate(lengths):
        pad = np.zeros(gap, int)
        parts = {key: batch[key][i, :length] for key in ("tokens", "target_mask")}
        parts |= {"segment_ids": np.full(length, i + 1), "positions": np.arange(length)}
        for key, values in parts.items():
            out[key] += [values, pad]
    return {key: np.concatenate(values)[None] for key, values in out.items()}


@pytest.mark.parametrize("name", ["gqa", "qwen3_biases", "biases"])
def test_loss_and_gradients_are_those_of_transformers(name):
    folder, model = tiny.hf_model(name)
    batch = batch_of([24, 17, 9], 24)
    found = loss_and_grads(model, [batch])
    labels = torch.from_numpy(np.where(batch["target_mask"], batch["tokens"], -100)).long()
    ids = torch.from_numpy(batch["tokens"]).long()
    parameters = {k: v.detach().clone().requires_grad_() for k, v in model.named_parameters()}
    call = dict(input_ids=ids, labels=labels, use_cache=False)
    loss = torch.func.functional_call(model, parameters, (), call).loss
    loss.backward()
    assert abs(found.loss - loss.item()) < 1e-5 * loss.item()
    assert found.weight == batch["target_mask"].sum()
    _, params = load_checkpoint(folder)
    assert {k: v.shape for k, v in flatten(params).items()} == {
        k: v.shape for k, v in found.grads.items()
    }
    for path, theirs in (
        ("embed", "model.embed_tokens.weight"),
        ("layers/attn/wq", "model.layers.{}.self_attn.q_proj.weight"),
        ("layers/ffn_norm", "model.layers.{}.post_attention_layernorm.weight"),
    ):
        grads = [parameters[theirs.format(i)].grad.numpy() for i in range(3)]
        grads = np.stack(grads) if "{}" in theirs else grads[0]
        np.testing.assert_allclose(found.grads[path], grads, atol=1e-5 * np.abs(grads).max())


def test_packed_rows_and_micro_batches_are_the_same_sum():
    _, model = tiny.hf_model("gqa")
    lengths = [20, 13, 7]
    batch = batch_of(lengths, 20)
    rows = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(3)]
    whole = loss_and_grads(model, [batch])
    for batches in (rows, [pack(batch, lengths, 0)], [pack(batch, lengths, 3)]):
        other = loss_and_grads(model, batches)
        assert other.weight == whole.weight
        np.testing.assert_allclose(other.nll_sum, whole.nll_sum, rtol=1e-6)
        for path, grad in whole.grads.items():
            np.testing.assert_allclose(other.grads[path], grad, atol=1e-5 * np.abs(grad).max())


@pytest.mark.slow
def test_adamw_learns_by_its_settings_and_leaves_the_model_alone():
    _, model = tiny.hf_model("biases")
    before = {name: p.clone() for name, p in model.named_parameters()}
    steps = [[batch_of([24, 9], 24)]] * 4
    losses = adamw_recipe(model, steps, **RECIPE)
    assert losses[0] == loss_and_grads(model, steps[0]).loss
    assert np.all(np.diff(losses) < 0)
    assert adamw_recipe(model, steps, **RECIPE | dict(lr=[1e-3] * 4)) == losses
    still = adamw_recipe(model, steps, **RECIPE | dict(lr=0.0))
    assert still == [losses[0]] * 4
    for change in (
        dict(betas=(0.5, 0.95)),
        dict(weight_decay=10.0),
        dict(clip=1e-9),
        dict(eps=1.0),
    ):
        assert adamw_recipe(model, steps, **RECIPE | change)[-1] != losses[-1]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
