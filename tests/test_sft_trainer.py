"""Supervised training against torch: loss, the gradient of every parameter, and twenty steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoConfig

from models.llama.formats import hf
from models.llama.layout import leaves
from models.llama.model import LLaMa
from tests import tiny
from tests.oracles.torch_training import adamw_recipe, loss_and_grads
from tests.test_torch_training import batch_of
from trainers.data import DataConfig, Dataset
from trainers.data import Examples
from trainers.sft_trainer import SFTConfig, SFTTrainer, next_tokens
from utils.files import flatten

VARIANTS = {
    "biases": tiny.VARIANTS["biases"],  # of both kinds; grouped heads, an output head of its own
    "tied": tiny.VARIANTS["mqa"]
    | tiny.VARIANTS["tied"]
    | tiny.VARIANTS["head_dim"]  # 4 · 24, not the model's 64
    | dict(model_type="qwen3")  # norms of queries and keys
    | tiny.VARIANTS["llama3_8"],
}


@functools.cache
def variant(name):
    """(torch model, our config, our parameters), with the same weights."""
    model = tiny.random_model(AutoConfig.for_model(**(tiny.BASE | VARIANTS.get(name, {}))))
    config = hf.to_config(model.config.to_dict())
    return model, config, params_of(model, config)


def params_of(model, config):
    """The weights of a torch model as our parameters."""
    state, params = model.state_dict(), {}
    for leaf in leaves(config, "hf"):
        arrays = [state[key].numpy() for key in leaf.names]
        *parents, last = leaf.path.split("/")
        inside = params
        for part in parents:
            inside = inside.setdefault(part, {})
        inside[last] = jnp.asarray(np.stack(arrays) if leaf.stacked else arrays[0])
    return params


def fast(function, **options):
    """Compiled in half the time."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0}, **options)


# One function for all tests, so that what several of them need is compiled once.
_gradients = fast(lambda t, p, f, b: t.gradients(p, f, b, jax.random.key(0)), static_argnums=0)


def gradients(trainer, params, batch, frozen=None):
    """(gradients, Loss) of a batch."""
    return _gradients(trainer, params, frozen or {}, batch)


def dataset(lengths, seq_len, *, packing, seed=0):
    """The dataset of some random examples, as trainers.data makes its batches; in one batch."""
    rng, examples = np.random.default_rng(seed), Examples(seq_len, "truncate")
    for length in lengths:
        mask = rng.random(length) < 0.5
        mask[length // 2] = True
        ids = rng.integers(3, 160, length).tolist()
        examples.add(ids, mask.tolist(), is_text=False)
    shape = dict(seq_len=seq_len, packing=packing)
    config = DataConfig(batch_size=len(lengths), shuffle=False, **shape)
    data = Dataset("made here", config, examples, "no digest")
    return next(data.epoch_batches())


def compare(found, wanted, tolerance=1e-4):
    """Trees of gradients, each leaf to a share of its largest entry."""
    found, wanted = flatten(found), flatten(wanted) if "layers" in wanted else wanted
    assert found.keys() == wanted.keys()
    for path, theirs in wanted.items():
        ours, theirs = np.asarray(found[path]), np.asarray(theirs)
        assert ours.shape == theirs.shape and ours.dtype == np.float32 and theirs.any(), path
        worst = np.abs(ours - theirs).max() / np.abs(theirs).max()
        assert worst < tolerance, f"{path}: {worst}"


LENGTHS = [40, 9, 25, 33, 2, 17, 40, 11]


@pytest.mark.covers("D8")
@pytest.mark.parametrize("name", VARIANTS)
def test_packed_loss_and_every_gradient_are_torchs(name):
    model, config, params = variant(name)
    batch = dataset(LENGTHS, 48, packing=True)
    assert batch["segment_ids"].max() > 1 and not batch["segment_ids"][-1].any()
    wanted = loss_and_grads(model, [batch])
    grads, loss = gradients(
        SFTTrainer(LLaMa(config), SFTConfig(micro_batch_size=None)), params, batch
    )
    assert abs(float(loss.means()["loss"]) - wanted.loss) < 1e-5 * wanted.loss
    assert float(loss.weight) == wanted.weight
    compare(grads, wanted.grads)


@pytest.mark.covers("D8")
def test_unpacked_batches_are_the_same_examples():
    model, _, _ = variant("biases")
    packed = loss_and_grads(model, [dataset(LENGTHS, 48, packing=True)])
    padded = loss_and_grads(model, [dataset(LENGTHS, 48, packing=False)])
    assert packed.weight == padded.weight and abs(packed.loss - padded.loss) < 1e-6 * padded.loss


def test_twenty_steps_follow_the_same_recipe_in_torch():
    model, config, params = variant("gqa")
    recipe = dict(learning_rate=2e-3, warmup_steps=5, max_steps=20, schedule="cosine")
    recipe |= dict(weight_decay=0.5, clip_norm=1.0, beta2=0.95)
    trainer = SFTTrainer(LLaMa(config), SFTConfig(micro_batch_size=2, **recipe))
    # Bigram text, so that there is something to learn.
    batches = []
    for seed in range(4):
        batch = batch_of([24, 17, 9, 24, 12], 24, seed)
        for t in range(1, 24):
            batch["tokens"][:, t] = (batch["tokens"][:, t - 1] * 7 + 3) % 160
        batches.append(batch)
    state, _ = trainer.init(params, jax.random.key(0))
    step = fast(lambda state, batch: trainer.train_step(state, {}, batch))
    found, norms, rates = [], [], []
    for i in range(20):
        state, metrics = step(state, batches[i % 4])
        found.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
        rates.append(float(metrics["lr"]))
    half_cosine = [1e-3 * (1 + np.cos(np.pi * i / 15)) for i in range(15)]
    wanted_rates = [2e-3 * (i + 1) / 5 for i in range(5)] + half_cosine
    np.testing.assert_allclose(rates, wanted_rates, rtol=1e-4)
    wanted = adamw_recipe(
        model,
        [[batches[i % 4]] for i in range(20)],
        lr=wanted_rates,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.5,
        clip=1.0,
    )
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-3)
    assert max(norms) > 1 and found[-1] < 0.7 * found[0]


def test_the_next_token_is_the_target_and_never_another_documents():
    batch = {
        "tokens": jnp.array([[5, 6, 7, 8, 9, 0], [1, 2, 3, 4, 5, 6]]),
        "target_mask": jnp.array([[0, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1]], bool),
    }
    targets, weights = next_tokens(batch)
    assert targets.tolist() == [[6, 7, 8, 9, 0, 0], [2, 3, 4, 5, 6, 0]]
    assert weights.tolist() == [[1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]]
    assert (targets.dtype, weights.dtype) == (jnp.int32, jnp.float32)
    segments = jnp.array([[1, 1, 1, 2, 2, 0], [1, 1, 2, 2, 3, 3]])
    _, weights = next_tokens(batch | {"segment_ids": segments})
    assert weights.tolist() == [[1, 0, 0, 1, 0, 0], [1, 0, 1, 0, 1, 0]]


def test_accuracy_and_entropy_are_those_of_the_logits():
    _, config, params = variant("biases")
    batch = dataset(LENGTHS, 48, packing=False)
    forward = fast(lambda tokens: LLaMa(config).apply({"params": params}, tokens)[0][:, :-1])
    for t in range(2, 48, 3):  # some tokens are what the model would say
        batch["tokens"][:, t] = forward(batch["tokens"])[:, t - 1].argmax(-1)
    logits = np.asarray(forward(batch["tokens"]), np.float64)
    weights = batch["target_mask"][:, 1:]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    entropy = (-(np.exp(logprobs) * logprobs).sum(-1) * weights).sum() / weights.sum()
    accuracy = (logits.argmax(-1) == batch["tokens"][:, 1:])[weights].mean()
    assert 0.2 < accuracy < 0.8
    found = gradients(SFTTrainer(LLaMa(config), SFTConfig(micro_batch_size=None)), params, batch)[
        1
    ].means()
    np.testing.assert_allclose(found["entropy"], entropy, rtol=1e-5)
    np.testing.assert_allclose(found["accuracy"], accuracy, rtol=1e-6)


@pytest.mark.slow
def test_bfloat16_activations_give_float32_gradients_close_to_those_of_float32():
    model, config, params = variant("biases")
    batch = dataset(LENGTHS, 48, packing=True)
    wanted = loss_and_grads(model, [batch])
    trainer = SFTTrainer(LLaMa(config, dtype=jnp.bfloat16), SFTConfig(micro_batch_size=None))
    grads, loss = gradients(trainer, params, batch)
    assert abs(float(loss.means()["loss"]) - wanted.loss) < 2e-2
    for path, theirs in wanted.grads.items():
        ours = np.asarray(flatten(grads)[path])
        assert ours.dtype == np.float32
        cosine = (ours * theirs).sum() / np.linalg.norm(ours) / np.linalg.norm(theirs)
        assert cosine > 0.99, path
