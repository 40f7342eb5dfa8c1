"""GRPOTrainer's loss and gradients against torch, of all variants, and against TRL's own code."""

import collections
import functools
import importlib
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from models.llama.model import LLaMa
from tests.oracles import grpo_torch
from tests.oracles.torch_training import _by_path, _trainable
from tests.test_sft_trainer import compare, fast, gradients, variant
from trainers.grpo_trainer import KLS, LOSSES, RATIO_LEVELS, GRPOConfig, GRPOTrainer
from trainers.grpo_trainer import group_advantages

MAX_LEN, VOCAB = 6, 7
# Tokens that count of each completion; None: it has no score. 0: it was cut off, and masked.
LENGTHS = np.array([[4, 1, 6, 3], [2, None, 5, 6], [0, 6, 1, 0]], object)
# The longest completion that there may be is longer than any of this batch.
CLIPS = dict(epsilon_low=0.2, epsilon_high=0.28, max_completion_len=MAX_LEN + 3)


class Given(GRPOTrainer):
    """Of logits that are given instead of a model's: the parameters, of all completions."""

    def logprobs(self, params, batch):
        logprobs = jax.nn.log_softmax(params["logits"][batch["index"]])
        picked = jnp.take_along_axis(logprobs, batch["tokens"][..., None], -1)[..., 0]
        return picked, jnp.zeros_like(picked)


@functools.cache
def given():
    """(params, batch) with every kind of completion, far enough off-policy for every clip."""
    rng = np.random.default_rng(0)
    shape = (*LENGTHS.shape, MAX_LEN)
    logits = rng.normal(size=(*shape, VOCAB)).astype(np.float32)
    tokens = rng.integers(0, VOCAB, shape).astype(np.int32)
    logprobs = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), tokens[..., None], -1)
    old = logprobs[..., 0] + 0.4 * rng.normal(size=shape)
    old[0] = old[0].mean(-1, keepdims=True)
    lengths = np.where(LENGTHS == None, 3, LENGTHS).astype(int)  # noqa: E711
    batch = {
        "index": np.arange(len(LENGTHS)),
        "tokens": tokens,
        "target_mask": np.arange(MAX_LEN) < lengths[..., None],
        "counts": (LENGTHS != None).astype(np.float32),  # noqa: E711
        "advantages": rng.normal(size=LENGTHS.shape),
        "old_logprobs": old,
        "sampler_logprobs": old + 0.2 * rng.normal(size=shape),
        "ref_logprobs": old + 0.5 * rng.normal(size=shape),
    }
    # One is clipped above as a sequence, of one the dual clip cuts the sequence, one teaches nothing.
    batch["advantages"][[0, 2, 0], [1, 2, 2]] = 0.8, -1.8, 0
    single = lambda x: x.astype(np.float32) if x.dtype == np.float64 else x
    return {"logits": logits}, {name: single(x) for name, x in batch.items()}


def completions(batch, logprobs, at):
    """Those of rows `at` with a score, without their padding."""
    out = []
    for i, j in itertools.product(at, range(batch["counts"].shape[1])):
        if batch["counts"][i, j]:
            n = batch["target_mask"][i, j].sum()
            policy = logprobs[i][j][:n]
            old, sampler, ref = (
                (
                    torch.from_numpy(batch[f"{name}_logprobs"][i, j, :n])
                    if f"{name}_logprobs" in batch
                    else policy.detach()
                )
                for name in ("old", "sampler", "ref")
            )
            advantage = float(batch["advantages"][i, j])
            out.append(grpo_torch.Completion(policy, old, sampler, ref, advantage))
    return out


def equations(config: GRPOConfig) -> grpo_torch.Equations:
    return grpo_torch.Equations(*(getattr(config, n) for n in grpo_torch.Equations._fields))


def torchs(config, parts=([0, 1, 2],)):
    """(loss, its gradient by the logits) by torch; `parts` are the rows of each micro-batch."""
    params, batch = given()
    logits = torch.tensor(params["logits"], requires_grad=True)
    tokens = torch.from_numpy(batch["tokens"]).long()
    logprobs = torch.log_softmax(logits, -1).gather(-1, tokens[..., None])[..., 0]
    micro_batches = [completions(batch, logprobs, rows) for rows in parts]
    loss = grpo_torch.step_loss(micro_batches, equations(config))
    loss.backward()
    return loss.item(), logits.grad.numpy()


def same(config, found, wanted):
    (grads, loss), (value, wanted_grads) = found, wanted
    assert abs(float(loss.means()["loss"]) - value) < 1e-5, config
    worst = np.abs(grads["logits"] - wanted_grads).max()
    assert worst < 1e-5 * np.abs(wanted_grads).max(), config
    return wanted_grads


@pytest.mark.covers("D14")
@pytest.mark.parametrize("loss", LOSSES)
def test_every_variant_is_torchs(loss):
    params, batch = given()
    seen = []
    for level, kl, dual, cap in itertools.product(
        RATIO_LEVELS, (None, *KLS), (None, 1.4), (None, 1.1)
    ):
        penalty = dict(beta=0.3, kl=kl) if kl else {}
        options = dict(ratio_level=level, dual_clip=dual, tis_cap=cap)
        config = GRPOConfig(loss=loss, **CLIPS, **options, **penalty)
        found = Given(None, config).gradients(params, {}, batch, jax.random.key(0))
        seen.append(same(config, found, torchs(config)))
    flat = np.reshape(seen, (len(seen), -1))
    apart = np.abs(flat[:, None] - flat).max(-1) + np.eye(len(seen))
    assert apart.min() > 1e-4  # no two variants agree on this batch


@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_are_torchs(loss):
    """The second is filled up with a row of zeros."""
    params, batch = given()
    config = GRPOConfig(loss=loss, micro_batch_size=2, ratio_level="sequence", beta=0.3, **CLIPS)
    same(config, gradients(Given(None, config), params, batch), torchs(config, [[0, 1], [2]]))


# --- Through a model ---

PROMPTS = [[5, 17, 90, 33, 8], [12], [150, 3, 44, 71, 20, 9, 61, 100, 7]]


@functools.cache
def rollout():
    """Prompts with completions, padded on the right with ids that count elsewhere."""
    _, batch = given()
    rng = np.random.default_rng(1)
    prompts = rng.integers(3, 160, (3, 12)).astype(np.int32)
    for row, prompt in zip(prompts, PROMPTS):
        row[: len(prompt)] = prompt
    rows = {k: v for k, v in batch.items() if k not in ("index", "tokens")}
    rows["tokens"] = rng.integers(3, 160, batch["tokens"].shape).astype(np.int32)
    lengths = np.array([len(prompt) for prompt in PROMPTS], np.int32)
    return rows | {"prompts": prompts, "prompt_lengths": lengths}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, padding, on_policy, options",
    [
        ("biases", "left", True, dict(loss="dapo", temperature=0.7)),
        (
            "tied",
            "right",
            False,
            dict(loss="bnpo", beta=0.2, kl="k3", micro_batch_size=2, tis_cap=1.1),
        ),
        pytest.param(
            "tied",
            "left",
            False,
            dict(loss="grpo", beta=0.2, ratio_level="sequence", dual_clip=1.5, temperature=1.3),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_gradient_of_every_parameter_is_torchs(name, padding, on_policy, options):
    model, config, params = variant(name)
    model = _trainable(model)
    options = GRPOConfig(**CLIPS, **options)
    batch = dict(rollout())
    if on_policy:
        del batch["old_logprobs"]
    rows = list(np.ndindex(LENGTHS.shape))
    ids = [batch["tokens"][i, j, : batch["target_mask"][i, j].sum()].tolist() for i, j in rows]
    logprobs = grpo_torch.completion_logprobs(
        model,
        [PROMPTS[i] for i, _ in rows],
        ids,
        temperature=options.temperature,
        padding=padding,
    )
    if not on_policy:  # near the policy, or all of it is clipped
        batch |= near(batch, logprobs)
    parts = [[0, 1], [2]] if options.micro_batch_size == 2 else [[0, 1, 2]]
    G = LENGTHS.shape[1]
    logprobs = [logprobs[i * G : (i + 1) * G] for i in range(len(PROMPTS))]
    wanted = grpo_torch.step_loss(
        [completions(batch, logprobs, part) for part in parts], equations(options)
    )
    wanted.backward()
    grads, loss = gradients(GRPOTrainer(LLaMa(config), options), params, batch)
    assert abs(float(loss.means()["loss"]) - wanted.item()) < 1e-5
    compare(grads, _by_path(model))


def near(batch, logprobs):
    """Old, sampler's and reference's log-probs as far from these as they were in `given`."""
    _, first = given()
    found = {}
    padded = np.zeros(batch["target_mask"].shape, np.float32)
    for at, row in zip(np.ndindex(LENGTHS.shape), logprobs):
        padded[at][: len(row)] = row.detach().numpy()
    rng = np.random.default_rng(2)
    found["old_logprobs"] = padded + 0.3 * rng.normal(size=padded.shape).astype(np.float32)
    for name in ("sampler_logprobs", "ref_logprobs"):
        found[name] = found["old_logprobs"] + first[name] - first["old_logprobs"]
    return found


# --- TRL ---


@pytest.mark.parametrize("loss", LOSSES)
def test_every_variant_that_trl_has_is_trls(loss):
    """Its `_compute_loss` without a model. It has no KL weighed by a token's ratio at sequence level."""
    trl = importlib.import_module("trl.trainer.grpo_trainer")
    params, batch = given()
    # TRL has no completions without a score.
    batch = batch | {"counts": np.ones_like(batch["counts"])}
    rows = {name: torch.from_numpy(x.reshape(-1, *x.shape[2:])) for name, x in batch.items()}
    for level, kl, delta, cap in itertools.product(
        RATIO_LEVELS, (None, "k3", "ratio_k3"), (None, 1.4), (None, 1.1)
    ):
        if level == "sequence" and kl == "ratio_k3":
            continue
        penalty = dict(beta=0.04, kl=kl) if kl else {}
        options = dict(ratio_level=level, dual_clip=delta, tis_cap=cap)
        config = GRPOConfig(loss=loss, **CLIPS, **options, **penalty)
        logits = torch.tensor(params["logits"]).flatten(0, 1).requires_grad_()
        logprobs = torch.log_softmax(logits, -1).gather(-1, rows["tokens"].long()[..., None])
        inputs = {
            "prompt_ids": torch.zeros(len(logits), 1),
            "prompt_mask": torch.ones(len(logits), 1),
            "completion_ids": rows["tokens"],
            "completion_mask": rows["target_mask"].float(),
            "advantages": rows["advantages"],
            "old_per_token_logps": rows["old_logprobs"],
            "ref_per_token_logps": rows["ref_logprobs"],
            "num_items_in_batch": rows["target_mask"].sum(),
        }
        gap = torch.exp(rows["old_logprobs"] - rows["sampler_logprobs"])
        inputs["importance_sampling_ratio"] = gap.clamp(max=cap or 1)
        fake = fake_trl(config, lambda *_, **__: (logprobs[..., 0], torch.zeros_like(gap), None))
        theirs = trl.GRPOTrainer._compute_loss(fake, fake.model, inputs)
        theirs.backward()
        found = Given(None, config).gradients(params, {}, batch, jax.random.key(0))
        same(config, found, (theirs.item(), logits.grad.numpy().reshape(params["logits"].shape)))


def test_rloo_is_trls():
    """Its loss is of whole sequences: on-policy, `dr_grpo` has its gradient, divided by a constant."""
    trl = importlib.import_module("trl.trainer.rloo_trainer")
    params, batch = given()
    batch = {name: x for name, x in batch.items() if name != "old_logprobs"}
    batch |= {"counts": np.ones_like(batch["counts"])}
    rewards = np.random.default_rng(3).normal(size=LENGTHS.shape).astype(np.float32)
    batch["advantages"] = np.array(group_advantages(rewards, rewards < 9, "rloo"))
    rows = {name: torch.from_numpy(x.reshape(-1, *x.shape[2:])) for name, x in batch.items()}
    logits = torch.tensor(params["logits"]).flatten(0, 1).requires_grad_()
    logprobs = torch.log_softmax(logits, -1).gather(-1, rows["tokens"].long()[..., None])[..., 0]
    mask, others = rows["target_mask"].float(), torch.from_numpy(rewards)
    inputs = {
        "prompt_ids": torch.zeros(len(logits), 1),
        "prompt_mask": torch.ones(len(logits), 1),
        "completion_ids": rows["tokens"],
        "completion_mask": mask,
        "advantages": (others - (others.sum(1, keepdim=True) - others) / 3).flatten(),
        "old_logps": (logprobs * mask).sum(1).detach(),
    }
    config = GRPOConfig(loss="dr_grpo", **CLIPS)
    fake = fake_trl(config, lambda *_, **__: (logprobs, torch.zeros_like(mask), None))
    theirs = trl.RLOOTrainer._compute_loss(fake, fake.model, inputs)
    theirs.backward()
    grads, _ = Given(None, config).gradients(params, {}, batch, jax.random.key(0))
    wanted = logits.grad.numpy().reshape(params["logits"].shape)
    np.testing.assert_allclose(grads["logits"] * config.max_completion_len, wanted, atol=1e-6)


def fake_trl(config: GRPOConfig, logprobs) -> types.SimpleNamespace:
    """What `_compute_loss` reads of its trainer."""
    return types.SimpleNamespace(
        model=types.SimpleNamespace(training=True),
        args=types.SimpleNamespace(
            delta=config.dual_clip,
            use_bias_correction_kl=config.kl == "ratio_k3",
            steps_per_generation=1,
        ),
        accelerator=types.SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        loss_type=config.loss,
        beta=config.beta,
        epsilon_low=config.epsilon_low,
        epsilon_high=config.epsilon_high,
        importance_sampling_level=config.ratio_level,
        max_completion_length=config.max_completion_len,
        use_vllm=config.tis_cap is not None,
        vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=1,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        _entropy_bonus_enabled=False,
        _get_per_token_logps_and_entropies=logprobs,
        _metrics={"train": collections.defaultdict(list)},
    )
