"""Completions that share their prompt: the same numbers as each alone, and what must not change them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.llama.lora import LoRAConfig
from models.llama.model import LLaMa
from tests.test_lora import adapters
from tests.test_sft_trainer import compare, fast, gradients, variant
from trainers.grpo_trainer import GRPOConfig, GRPOTrainer
from utils import cross_entropy
from utils.cross_entropy import token_logprobs

B, G, P, C = 3, 4, 10, 6
PROMPT_LENGTHS = np.int32([10, 1, 6])
LENGTHS = np.array([[6, 1, 3, 5], [2, 0, 6, 4], [1, 6, 2, 2]])
LORA = LoRAConfig(rank=3, alpha=4.5)


@functools.cache
def full_batch():
    """Of every length, padded with ids that count elsewhere."""
    rng = np.random.default_rng(0)
    noise = lambda: rng.normal(size=(B, G, C)).astype(np.float32)
    mask = np.arange(C) < LENGTHS[..., None]
    old = (-5 + 0.3 * noise()) * mask
    return {
        "prompts": rng.integers(3, 160, (B, P)).astype(np.int32),
        "prompt_lengths": PROMPT_LENGTHS,
        "tokens": rng.integers(3, 160, (B, G, C)).astype(np.int32),
        "target_mask": mask,
        "counts": np.ones((B, G), np.float32),
        "advantages": rng.normal(size=(B, G)).astype(np.float32),
        "sampler_logprobs": old + 0.1 * noise() * mask,
        "old_logprobs": old,
        "ref_logprobs": old + 0.1 * noise() * mask,
    }


def batch(*without, **changes):
    return {k: v for k, v in full_batch().items() if k not in without} | changes


def trainer(name="biases", *, remat="none", dtype=None, lora=None, **config):
    config = {"max_completion_len": C, "temperature": 0.8} | config
    model = LLaMa(variant(name)[1], dtype=dtype, remat=remat)
    return GRPOTrainer(model, GRPOConfig(**config), lora)


@functools.partial(fast, static_argnums=0)
def shared(trainer, params, frozen, batch, weights):
    """(log-probs and entropies, gradient of the weighted sum of log-probs)."""

    def total(params):
        found = trainer.logprobs(trainer.model_params(params, frozen), batch)
        return jnp.sum(found[0] * weights), found

    grads, found = jax.grad(total, has_aux=True)(params)
    return found, grads


@functools.partial(fast, static_argnums=0)
def alone(trainer, params, frozen, rows, lengths, weights):
    """The same by one plain forward pass in which each completion has a row with its prompt."""

    def total(params):
        params = trainer.model_params(params, frozen)
        logits = LLaMa(trainer.model.config).apply({"params": params}, rows)[0]
        logprobs = jax.nn.log_softmax(logits[:, :-1] / trainer.config.temperature)
        entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
        picked = jnp.take_along_axis(logprobs, rows[:, 1:, None], axis=-1)[..., 0]
        at = lengths[:, None] - 1 + jnp.arange(C)
        found = tuple(jnp.take_along_axis(x, at, axis=1) for x in (picked, entropy))
        return jnp.sum(found[0] * weights.reshape(-1, C)), found

    grads, found = jax.grad(total, has_aux=True)(params)
    return tuple(x.reshape(B, G, C) for x in found), grads


def rows_of(batch):
    """[B · G, P + C] of each prompt with each of its completions, and the prompts' lengths."""
    rows = np.zeros((B * G, P + C), np.int32)
    for row, (i, j) in zip(rows, np.ndindex(B, G)):
        n = batch["prompt_lengths"][i]
        row[: n + C] = [*batch["prompts"][i, :n], *batch["tokens"][i, j]]
    return rows, np.repeat(batch["prompt_lengths"], G)


@functools.partial(fast, static_argnums=(0, 4))
def score(trainer, params, frozen, batch, reference=False):
    return trainer.score(params, frozen, batch, reference=reference)


SLOW = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, remat, lora",
    [
        ("biases", "none", None),
        pytest.param("tied", "dots", None, marks=SLOW),
        pytest.param("mha", "block", LORA, marks=SLOW),
    ],
)
def test_log_probs_and_gradients_are_those_of_each_completion_alone(name, remat, lora):
    """Grouped, one and as many kv heads; biases; llama3's RoPE; heads of another size; adapters."""
    it, params = trainer(name, remat=remat, lora=lora), variant(name)[2]
    params, frozen = (adapters(lora, name), params) if lora else (params, {})
    mask = batch()["target_mask"]
    weights = np.random.default_rng(1).normal(size=mask.shape).astype(np.float32) * mask
    found, grads = shared(it, params, frozen, batch(), weights)
    wanted, wanted_grads = alone(it, params, frozen, *rows_of(batch()), weights)
    for ours, theirs in zip(found, wanted):
        assert not np.asarray(ours)[~mask].any()
        np.testing.assert_allclose(ours, np.where(mask, theirs, 0), atol=1e-5)
    compare(grads, wanted_grads, 1e-5)


def test_in_bfloat16_they_are_close():
    params, weights = variant("biases")[2], np.zeros((B, G, C), np.float32)
    wanted, _ = alone(trainer(), params, {}, *rows_of(batch()), weights)
    found = fast(trainer(dtype=jnp.bfloat16).logprobs)(params, batch())
    mask = batch()["target_mask"]
    gap = np.abs(np.asarray(found[0]) - wanted[0])[mask]
    assert found[0].dtype == jnp.float32 and 1e-3 < gap.max() < 0.5 and gap.mean() < 0.06


def test_rows_of_the_head_that_are_no_tokens_have_no_probability():
    params, x = variant("biases")[2], batch(tokens=batch()["tokens"] % 100)
    it = GRPOTrainer(trainer().model, trainer().config, vocab_limit=100)
    rows, _ = rows_of(x)
    logits = fast(LLaMa(it.model.config).apply)({"params": params}, rows)[0][..., :100]
    logprobs = jax.nn.log_softmax(logits / 0.8)
    found = score(it, params, {}, x)
    for row, (i, j) in zip(logprobs, np.ndindex(B, G)):
        n, first = LENGTHS[i, j], PROMPT_LENGTHS[i] - 1
        wanted = row[first + np.arange(n), x["tokens"][i, j, :n]]
        np.testing.assert_allclose(found[i, j, :n], wanted, atol=1e-5)


# --- What must not change a step ---

OPTIONS = dict(loss="grpo", beta=0.1, tis_cap=1.2, ratio_level="sequence")


@functools.cache
def reference():
    return gradients(trainer(**OPTIONS), variant("biases")[2], batch())


def same(found):
    (grads, loss), (wanted_grads, wanted) = found, reference()
    for name, value in wanted.means().items():
        np.testing.assert_allclose(loss.means()[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    compare(grads, wanted_grads, 1e-5)


def by_completion(change):
    """The batch with `change` done to all arrays [B, G, …]."""
    prompts = ("prompts", "prompt_lengths")
    return {k: v if k in prompts else change(v) for k, v in batch().items()}


@SLOW
def test_micro_batches():
    """The second is filled up with a row of zeros."""
    same(gradients(trainer(**OPTIONS, micro_batch_size=2), variant("biases")[2], batch()))


def test_the_order_of_prompts_and_of_completions():
    order = np.array([2, 0, 1])
    found = {k: v[order] for k, v in by_completion(lambda x: x[:, [3, 1, 0, 2]]).items()}
    same(gradients(trainer(**OPTIONS), variant("biases")[2], found))


@pytest.mark.covers("D14")
def test_widths_of_padding_its_ids_rows_of_zeros_and_groups_cut_in_two_rows():
    cut = lambda x: x.reshape(2 * B, G // 2, *x.shape[2:])
    twice = lambda x: np.repeat(x, 2, axis=0)

    def widen(x, axis, by, fill=0):
        pad = [(0, by if i == axis else 0) for i in range(x.ndim)]
        return np.pad(x, pad, constant_values=fill)

    found = {}
    for name, x in batch().items():
        if name == "prompts":
            x = np.where(np.arange(P) < PROMPT_LENGTHS[:, None], x, 7)
            x = widen(x, 1, 7, fill=7)
        elif name == "tokens":
            x = widen(np.where(batch()["target_mask"], x, 9), 2, 5, fill=9)
        elif x.shape[2:]:
            x = widen(x, 2, 5)
        x = twice(x) if name.startswith("prompt") else cut(x)
        found[name] = widen(x, 0, 2)  # rows of zeros
    same(gradients(trainer(**OPTIONS), variant("biases")[2], found))


def test_only_what_is_read_has_a_gradient():
    """No embedding of padding, or of a completion's last token, which nothing is predicted from."""
    mask = batch()["target_mask"]
    prompts, tokens = batch()["prompts"] % 50 + 100, batch()["tokens"] % 50 + 50
    tokens[~mask], prompts[np.arange(P) >= PROMPT_LENGTHS[:, None]] = 3, 4
    last = mask & (np.arange(C) == LENGTHS[..., None] - 1)
    tokens[last] = 5
    found = batch(prompts=prompts, tokens=tokens)
    grads, _ = gradients(trainer(**OPTIONS), variant("biases")[2], found)
    touched = np.asarray(grads["embed"]).any(axis=1)
    read = set(prompts[prompts >= 100]) | set(tokens[mask & ~last])
    assert set(np.flatnonzero(touched)) == read and not {3, 4, 5} & read


@pytest.mark.covers("D13")
def test_equal_rewards_have_exactly_no_gradient():
    equal = batch("old_logprobs", advantages=np.zeros((B, G), np.float32))
    grads, loss = gradients(trainer(), variant("biases")[2], equal)
    assert float(loss.total) == 0 and float(loss.weight) == LENGTHS.sum()
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(grads))


# --- Steps ---


@pytest.mark.covers("D15")
def test_on_policy_the_ratio_is_one_and_the_gradient_is_not_zero():
    A = batch()["advantages"] - np.average(batch()["advantages"], weights=LENGTHS)
    grads, loss = gradients(
        trainer(), variant("biases")[2], batch("old_logprobs", advantages=np.float32(A))
    )
    assert float(loss.maxima["ratio_max"]) == 1
    assert abs(float(loss.means()["loss"])) < 1e-6 and np.abs(grads["embed"]).max() > 1e-4
    metrics = trainer().derive({k: float(v) for k, v in loss.means().items()})
    assert metrics["clip_low"] == metrics["clip_high"] == 0 and "kl" not in metrics


@pytest.mark.covers("D14", "D15")
def test_metrics_are_means_over_tokens():
    _, loss = gradients(trainer(**OPTIONS), variant("biases")[2], batch())
    metrics = trainer().derive({k: float(v) for k, v in loss.means().items()})
    x, mask = batch(), batch()["target_mask"]
    (logprobs, entropy), _ = shared(trainer(), variant("biases")[2], {}, x, 0 * x["old_logprobs"])
    mean = lambda values: np.broadcast_to(values, mask.shape)[mask].mean()
    log_ratio = (np.asarray(logprobs) - x["old_logprobs"]) * mask
    ratio = np.exp(log_ratio.sum(-1) / np.maximum(LENGTHS, 1))[..., None]
    A, gap = x["advantages"][..., None], np.abs(x["old_logprobs"] - x["sampler_logprobs"])
    d = x["ref_logprobs"] - np.asarray(logprobs)
    wanted = {
        "entropy": mean(entropy),
        "kl": mean(np.exp(log_ratio) * (np.expm1(d) - d)),
        "clip_low": mean((ratio < 0.8) & (A < 0)),
        "clip_high": mean((ratio > 1.2) & (A > 0)),
        "gap_mean": mean(gap),
        "gap_max": gap[mask].max(),
        "ratio_max": np.broadcast_to(ratio, mask.shape)[mask].max(),
        "advantage": mean(np.abs(A)),
    }
    assert metrics.keys() == wanted.keys() | {"loss"}
    for name, value in wanted.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-4, err_msg=name)
    assert 0 < metrics["clip_low"] < 1 and 0 < metrics["clip_high"] < 1


# One program for several tests; it has its state's buffers taken from it, as in a run.
STEPPED = dict(beta=0.1, kl="k2", learning_rate=1e-2)


@functools.cache
def stepped():
    it = trainer(**STEPPED)
    return it, fast(lambda s, f, b: it.train_step(s, f, b), donate_argnums=0)


def start(it):
    """(state, reference) that take over a copy of the model."""
    return it.init(jax.tree.map(jnp.copy, variant("biases")[2]), jax.random.key(0), donate=True)


@pytest.mark.covers("D14")
def test_a_batch_of_which_nothing_counts_is_no_step():
    it, step = stepped()
    nothing = batch(target_mask=np.zeros((B, G, C), bool))
    after, metrics = step(*start(it), nothing)
    assert metrics["loss"] == metrics["grad_norm"] == metrics["weight"] == after.step == 0
    assert metrics["finite"] and not metrics["updated"]
    for a, b in zip(jax.tree.leaves(after.params), jax.tree.leaves(variant("biases")[2])):
        assert (np.asarray(a) == np.asarray(b)).all()


@pytest.mark.covers("D15")
@pytest.mark.parametrize("old", [-1e4, 1e4])
def test_old_log_probs_of_another_policy_give_a_finite_step(old):
    """e^10000 would be the ratio."""
    it, step = stepped()
    old = np.where(batch()["target_mask"], old, 0).astype(np.float32)
    after, metrics = step(*start(it), batch(old_logprobs=old))
    assert metrics["updated"] and np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after.params))
    assert metrics["gap_max"] > 9e3  # and it is seen


@pytest.mark.covers("D15")
def test_the_reference_is_a_copy_that_outlives_the_policys_buffers():
    it, step = stepped()
    state, frozen = start(it)
    for _ in range(2):
        state, metrics = step(state, frozen, batch())
    assert metrics["updated"]
    before = score(it, variant("biases")[2], {}, batch())
    assert (score(it, state.params, frozen, batch(), True) == before).all()
    assert np.abs(score(it, state.params, frozen, batch()) - before).max() > 0.01
    assert trainer().init(frozen, jax.random.key(0))[1] == {}  # without a penalty, none


def test_score_is_the_policys_log_probs_also_in_micro_batches():
    params = variant("biases")[2]
    (wanted, _), _ = shared(trainer(), params, {}, batch(), np.zeros((B, G, C), np.float32))
    for it in (trainer(micro_batch_size=2), trainer(**STEPPED)):
        np.testing.assert_allclose(score(it, params, {}, batch()), wanted, atol=1e-5)


def test_the_reference_under_lora_is_the_base_model():
    params, it = variant("biases")[2], trainer(lora=LORA, beta=0.1)
    state, frozen = it.init(params, jax.random.key(0))
    assert frozen is params  # at no cost
    base, moved = score(trainer(**STEPPED), params, {}, batch()), adapters(LORA, "biases")
    np.testing.assert_allclose(score(it, moved, frozen, batch(), True), base, atol=1e-6)
    assert np.abs(score(it, moved, frozen, batch()) - base).max() > 0.1
    np.testing.assert_allclose(score(it, state.params, frozen, batch()), base, atol=1e-5)


# --- token_logprobs ---

N, D, V = 75, 16, 50


def head_inputs(share=0.5):
    rng = np.random.default_rng(5)
    x, head = rng.normal(size=(N, D)), rng.normal(size=(V, D))
    targets, wanted = rng.integers(0, V, N).astype(np.int32), rng.random(N) < share
    weights = rng.normal(size=N).astype(np.float32)
    return x.astype(np.float32), head.astype(np.float32), targets, wanted, weights


def plainly(x, head, targets, wanted, temperature):
    logprobs = jax.nn.log_softmax(x @ head.T / temperature)
    entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
    picked = jnp.take_along_axis(logprobs, targets[:, None], axis=1)[:, 0]
    return jnp.where(wanted, picked, 0), jnp.where(wanted, entropy, 0)


def head_gradients(function, temperature, by=(0, 1)):
    """((log-probs, entropies), gradients of their weighted sum)."""

    def total(x, head, targets, wanted, weights):
        found = function(x, head, targets, wanted, temperature)
        return jnp.sum(found[0] * weights), found

    return fast(lambda *given: jax.grad(total, by, has_aux=True)(*given)[::-1])


@pytest.mark.parametrize("temperature, share", [(1.0, 0.5), (0.3, 1.0), (2, 0.0)])
def test_token_logprobs_in_chunks_are_those_of_a_log_softmax(monkeypatch, temperature, share):
    monkeypatch.setattr(cross_entropy, "_CHUNK_LOGITS", 1)
    assert cross_entropy.chunk_size(N, V) == 32
    given = head_inputs(share)
    with jax.default_matmul_precision("highest"):
        found, grads = head_gradients(token_logprobs, temperature)(*given)
        wanted, wanted_grads = head_gradients(plainly, temperature)(*given)
    for ours, theirs in zip((*found, *grads), (*wanted, *wanted_grads)):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * max(np.abs(theirs).max(), 1))
        assert share or not np.asarray(ours).any()


@pytest.mark.parametrize("by", [0, 1])
def test_one_gradient_alone_and_no_product_for_the_other(by):
    given = head_inputs()
    both = head_gradients(token_logprobs, 0.7)
    one = head_gradients(token_logprobs, 0.7, by)
    np.testing.assert_allclose(one(*given)[1], both(*given)[1][by], rtol=1e-6)
    products = lambda f: f.lower(*given).as_text().count("dot_general")
    assert products(one) == products(both) - 1


def test_entropies_have_no_gradient_and_huge_logits_are_finite():
    x, head, targets, wanted, _ = head_inputs()
    entropy = lambda x: jnp.sum(token_logprobs(x, head, targets, wanted, 1.0)[1])
    assert not np.asarray(jax.grad(entropy)(x)).any()
    for found in token_logprobs(x * 1e5, head, targets, wanted, 0.1):
        assert np.isfinite(found).all()
