"""DPOTrainer against torch and TRL; what must not change a step; its references; its place in a run."""

import collections
import copy
import functools
import importlib
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from models.llama.formats import hf
from models.llama.lora import LoRAConfig
from models.llama.model import LLaMa
from tests import tiny
from tests.oracles import dpo_torch
from tests.oracles.torch_training import _by_path, _trainable
from tests.small_runs import MODEL, curve, digest
from tests.test_sft_trainer import compare, fast, gradients, params_of, variant
from trainers.data import Examples
from trainers.dpo_trainer import LOSSES, DPOConfig, DPOTrainer, preference_loss, preference_scores
from trainers.loop import Progress, Session, fit
from trainers.pairs import PairConfig, PairDataset, ReferencedPairs
from trainers.planning.estimate import sft_bytes
from trainers.runs.checkpoint import Checkpointer
from trainers.runs.metrics import MetricsLog
from trainers.runs.recipes import DPORecipe
from trainers.sft_trainer import SFTConfig, SFTTrainer
from utils.errors import CheckpointError, ConfigError

P, C = 9, 7
PROMPTS = np.int32([9, 1, 4, 6])
LENGTHS = np.array([[7, 2], [1, 1], [3, 6], [5, 7]])
VARIANTS = {name: dict(loss=name, beta=0.3) for name in LOSSES}
VARIANTS |= {"cdpo": dict(loss="sigmoid", beta=0.3, label_smoothing=0.2)}
VARIANTS["simpo"] = dict(loss="simpo", beta=2.5, gamma=0.8)


def equations(name):
    """The same numbers by the oracle's names."""
    known = VARIANTS[name]
    smoothing = known.get("label_smoothing", 0.0)
    return known["loss"], known["beta"], smoothing, known.get("gamma", 0.0)


@functools.cache
def full_batch():
    """Of every length, padded with ids that count elsewhere, and a mask with a hole, as tools leave."""
    rng = np.random.default_rng(0)
    mask = np.arange(C) < LENGTHS[..., None]
    mask[3, 1, 2:4] = False
    return {
        "prompts": rng.integers(3, 60, (4, P)).astype(np.int32),
        "prompt_lengths": PROMPTS,
        "tokens": rng.integers(3, 60, (4, 2, C)).astype(np.int32),
        "target_mask": mask,
    }


def trainer(config=MODEL, lora=None, **options):
    known = dict(micro_batch_size=None, loss="sigmoid", beta=0.3)
    return DPOTrainer(LLaMa(config, jnp.float32, "none"), DPOConfig(**known | options), lora)


@functools.cache
def torch_models():
    """A policy and a reference of MODEL's size."""
    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    sizes |= dict(num_attention_heads=2, num_key_value_heads=1)
    config = LlamaConfig(**tiny.BASE | sizes)
    assert hf.to_config(config.to_dict()) == MODEL
    return tuple(tiny.random_model(config, seed) for seed in (0, 5))


@functools.cache
def small():
    """Their weights."""
    return tuple(params_of(model, MODEL) for model in torch_models())


# --- The loss ---


@pytest.mark.parametrize("name", VARIANTS)
def test_each_pairs_loss_and_gradient_are_those_of_the_equations(name):
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 9, (6, 2))
    logps, reference = -rng.random((2, 6, 2)) * 9
    wanted = torch.tensor(logps, requires_grad=True)
    loss, beta, epsilon, gamma = equations(name)
    for row, old, n in zip(wanted, torch.tensor(reference), lengths):
        pair = zip(row, old)
        dpo_torch.pair_loss(loss, *pair, n, beta, epsilon, gamma).backward(retain_graph=True)

    def total(logps):
        scores = preference_scores(logps, reference, lengths, loss)
        return jnp.sum(preference_loss(scores[:, 0] - scores[:, 1], loss, beta, epsilon, gamma))

    with jax.enable_x64(True):
        found = np.asarray(jax.grad(total)(jnp.asarray(logps)))
    assert np.abs(found).max() > 1e-3
    np.testing.assert_allclose(found, wanted.grad.numpy(), atol=1e-12)


def torch_step(name, policy, reference):
    """(loss, gradients) of the batch, each answer alone behind its prompt, unpadded."""
    policy = _trainable(policy)
    loss = dpo_torch.batch_loss(policy, reference, full_batch(), *equations(name))
    loss.backward()
    return loss.item(), _by_path(policy)


def test_the_loss_and_every_gradient_are_torchs():
    loss, grads = torch_step("sigmoid", *torch_models())
    np.testing.assert_allclose(reference_step()[1].means()["loss"], loss, rtol=1e-5)
    compare(reference_step()[0], grads, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_so_are_those_of_every_variant_of_a_larger_model(name):
    model, config, params = variant("biases")
    other, rng = copy.deepcopy(model), np.random.default_rng(7)
    for weight in other.parameters():
        weight += 0.05 * torch.tensor(rng.normal(size=weight.shape), dtype=weight.dtype)
    loss, wanted = torch_step(name, model, other)
    frozen = params_of(other, config) if name != "simpo" else {}
    grads, found = gradients(trainer(config, **VARIANTS[name]), params, full_batch(), frozen)
    np.testing.assert_allclose(found.means()["loss"], loss, rtol=1e-5)
    compare(grads, wanted, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_the_loss_and_its_gradient_are_trls(name):
    rng = np.random.default_rng(2)
    lengths = rng.integers(1, C + 1, 6)  # of three chosen, then of three rejected
    mask = np.pad(np.arange(C) < lengths[:, None], ((0, 0), (1, 0)))
    logprobs, before = -rng.random((2, 6, C)).astype(np.float32) * mask[:, 1:]
    leaf = torch.tensor(logprobs, requires_grad=True)
    loss, beta, epsilon, gamma = equations(name)
    if name in ("simpo", "cdpo"):  # TRL's DPOTrainer no longer smooths labels
        cpo = importlib.import_module("trl.experimental.cpo").CPOTrainer
        scores = leaf.sum(1) - torch.tensor(before.sum(1))
        scores = leaf.sum(1) / torch.tensor(lengths) if name == "simpo" else scores
        known = dict(loss_type=loss, beta=beta, simpo_gamma=gamma, label_smoothing=epsilon)
        known |= dict(alpha=0.0, accelerator=types.SimpleNamespace(device="cpu"))
        losses, *_ = cpo.cpo_loss(types.SimpleNamespace(**known), scores[:3], scores[3:])
        theirs = losses.mean()
    else:
        trl = importlib.import_module("trl")
        fake, inputs = fake_trl(loss, beta, epsilon, leaf), {
            "input_ids": torch.zeros(6, C + 1, dtype=torch.long),
            "attention_mask": torch.ones(6, C + 1),
            "completion_mask": torch.tensor(mask).long(),
            "ref_chosen_logps": torch.tensor(before[:3].sum(1)),
            "ref_rejected_logps": torch.tensor(before[3:].sum(1)),
        }
        theirs = trl.DPOTrainer._compute_loss(fake, fake.model, inputs, False)
    theirs.backward()

    def total(logprobs):
        by_pair = [jnp.stack([x[:3], x[3:]], 1) for x in (logprobs.sum(1), before.sum(1), lengths)]
        scores = preference_scores(*by_pair, loss)
        return jnp.mean(preference_loss(scores[:, 0] - scores[:, 1], loss, beta, epsilon, gamma))

    found, grads = jax.value_and_grad(total)(jnp.asarray(logprobs))
    np.testing.assert_allclose(found, theirs.item(), rtol=1e-6)
    np.testing.assert_allclose(grads, leaf.grad.numpy(), rtol=1e-5, atol=1e-7)


def fake_trl(loss, beta, epsilon, logprobs) -> types.SimpleNamespace:
    """What `_compute_loss` reads of its trainer, whose model has these log-probs."""
    same = torch.zeros_like(logprobs)
    known = dict(log_probs=logprobs, entropy=same, mean_logits=same, is_top1=same > 0)
    return types.SimpleNamespace(
        model=FakeModel(known),
        accelerator=types.SimpleNamespace(
            device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        loss_types=[loss],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=epsilon,
        f_divergence_type="reverse_kl",
        precompute_ref_logps=True,
        ld_alpha=None,
        aux_loss_enabled=False,
        use_weighting=False,
        _total_train_tokens=0,
        _tp_size=1,
        _metrics={"train": collections.defaultdict(list)},
    )


class FakeModel:
    """A model with given results."""

    training = True

    def __init__(self, known):
        self._known = known

    def __call__(self, **inputs):
        return types.SimpleNamespace(**self._known)


# --- What must not change a step ---


@functools.cache
def reference_step():
    return gradients(trainer(), small()[0], full_batch(), small()[1])


def same(found):
    (grads, loss), (wanted_grads, wanted) = found, reference_step()
    assert float(loss.weight) == float(wanted.weight) == 4
    for name, value in wanted.means().items():
        np.testing.assert_allclose(loss.means()[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    compare(grads, wanted_grads, 1e-5)


@pytest.mark.covers("D9")
def test_order_widths_of_padding_its_ids_and_micro_batches():
    """Two of three rows: the last row of the second is of zeros, as batches are filled up."""
    order, wide = np.array([2, 0, 3, 1]), {}
    for name, x in full_batch().items():
        x = x[order]
        if name == "prompts":
            x = np.where(np.arange(P) < PROMPTS[order][:, None], x, 7)
            x = np.pad(x, ((0, 0), (0, 5)), constant_values=7)
        elif name == "tokens":
            x = np.pad(x, ((0, 0), (0, 0), (0, 4)), constant_values=9)
        elif name == "target_mask":
            x = np.pad(x, ((0, 0), (0, 0), (0, 4)))
        wide[name] = np.pad(x, [(0, 1)] + [(0, 0)] * (x.ndim - 1))  # and a row of zeros
    same(gradients(trainer(micro_batch_size=3), small()[0], wide, small()[1]))


def test_swapped_answers_have_the_opposite_margin():
    swapped = {k: x[:, ::-1] if x.ndim == 3 else x for k, x in full_batch().items()}
    found = gradients(trainer(), small()[0], swapped, small()[1])[1].means()
    wanted = reference_step()[1].means()
    np.testing.assert_allclose(found["margin"], -wanted["margin"], rtol=1e-5)
    np.testing.assert_allclose(found["accuracy"], 1 - wanted["accuracy"])
    np.testing.assert_allclose(found["logp_chosen"], wanted["logp_rejected"], rtol=1e-6)


# --- References ---


@pytest.mark.slow
def test_a_precomputed_reference_is_the_same_step():
    sums = fast(lambda t, p, b: t.score(p, b), static_argnums=0)
    rows = np.asarray(sums(trainer(micro_batch_size=3), small()[1], full_batch()))
    it = trainer(precompute_reference=True)
    same(gradients(it, small()[0], full_batch() | {"reference": rows}))


@pytest.mark.parametrize("lora", [None, pytest.param(LoRAConfig(rank=2), marks=pytest.mark.slow)])
def test_before_the_first_step_nothing_is_preferred(lora):
    """The reference is a copy, or the base under adapters: margins are 0, and a tie is half right."""
    it = trainer(lora=lora)
    state, frozen = it.init(small()[0], jax.random.key(0))
    found = gradients(it, state.params, full_batch(), frozen)[1].means()
    np.testing.assert_allclose(found["loss"], np.log(2), rtol=1e-6)
    assert found["accuracy"] == 0.5 and abs(found["margin"]) < 1e-6 and found["kl"] < 1e-9
    assert it.work(full_batch()).targets == full_batch()["target_mask"].sum()


def test_who_keeps_a_copy():
    assert trainer().keeps_frozen and not trainer(loss="simpo").keeps_frozen
    assert not trainer(precompute_reference=True).keeps_frozen


def test_a_config_that_fits_no_loss():
    assert DPOConfig().beta == 0.1 and DPOConfig(loss="simpo").beta == 2
    bad = dict(label_smoothing=0.1, precompute_reference=True)
    with pytest.raises(
        ConfigError, match="label_smoothing=0.1 is for.*loss=simpo has no reference"
    ):
        DPOConfig(loss="simpo", **bad)
    for wrong in (dict(beta=0), dict(label_smoothing=0.5), dict(gamma=-1), dict(loss="dpo")):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))}="):
            DPOConfig(**wrong)


# --- In a run ---

STEPS = 5


@functools.cache
def pairs(seed=0, count=7, longest=(15, 12)):
    """Random pairs; the longest prompt and answer decide how many shapes batches have."""
    rng = np.random.default_rng(seed)
    config, prompts = PairConfig(seq_len=256, batch_size=2), []
    examples = Examples(config.seq_len, "drop")
    for i in range(count):
        prompts.append(int(rng.integers(2, longest[0] if i % 3 else 15)))
        prompt = rng.integers(0, 60, prompts[-1]).tolist()
        for n in rng.integers(1, longest[1], 2):
            mask = [False] * len(prompt) + [True] * int(n)
            examples.add(prompt + rng.integers(0, 60, n).tolist(), mask, is_text=False)
    return PairDataset("pairs", config, examples, prompts, f"digest {seed}")


def go_on(folder, stop_at=STEPS, **options):
    """Starts or resumes as train.py does; stops behind the step `stop_at`: (digest, curve)."""
    known = dict(learning_rate=0.03, max_steps=STEPS, warmup_steps=1, save_every=2, eval_every=2)
    lora = LoRAConfig(rank=2) if options.pop("lora", False) else None
    it = trainer(lora=lora, **known | options)
    state, frozen = it.init(small()[0], jax.random.key(1))
    folder.mkdir(exist_ok=True)
    # Its own copies: a reference is written into them.
    data, held_out = (fresh(pairs(*of)) for of in ((0, 7), (1, 3)))
    source = data
    if it.config.precompute_reference:
        source = ReferencedPairs(it, data, held_out, folder / "reference.json")
    progress, at = Progress(), 0
    with Checkpointer(folder / "checkpoints") as checkpointer:
        if checkpointer.steps:
            restored = checkpointer.restore(jax.eval_shape(lambda: state))
            state, at = restored.state, restored.step
            progress = Progress(**restored.meta["progress"])
        steps = [at]
        sinks = [lambda record: steps.append(record["step"])]
        with MetricsLog(folder, start_step=at + 1, sinks=sinks) as log:
            session = Session(progress=progress, should_stop=lambda: steps[-1] >= stop_at)
            known = dict(log=log, checkpointer=checkpointer, session=session)
            state, _ = fit(it, state, frozen, source, eval_data=held_out, **known)
    return digest(state), curve(folder)


def fresh(data):
    other = copy.copy(data)
    other.reference = None
    return other


@pytest.mark.covers("D24", "P6")
@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [dict(precompute_reference=True), dict(lora=True, precompute_reference=True)]
)
def test_interrupted_at_every_step(tmp_path, options):
    whole = go_on(tmp_path / "whole", **options)
    for step in (1, 2, STEPS):
        found = go_on(tmp_path / "each", stop_at=step, **options)
    assert found == whole
    last = whole[1][-1]
    assert {"margin", "accuracy", "eval_loss", "eval_accuracy", "eval_margin"} <= last.keys()
    assert last["step"] == STEPS and whole[1][0]["margin"] < last["margin"]
    # The reference is the model that it starts from.
    np.testing.assert_allclose(whole[1][0]["loss"], np.log(2), rtol=1e-6)


@pytest.mark.covers("P6")
def test_a_reference_that_is_lost_is_not_made_up(tmp_path):
    go_on(tmp_path / "run", stop_at=1, precompute_reference=True)
    path = tmp_path / "run" / "reference.json"
    good = path.read_text()
    known = json.loads(good)
    known["sums"][0][0][0] += 1
    other = json.loads(good) | {"of": ["another", "one"]}
    cases = {
        json.dumps(known): "is broken",
        json.dumps(other): "is of other data",
        good[:-9]: "is not valid JSON",
        None: "No such file|does not exist|no such",
    }
    for text, said in cases.items():
        path.unlink() if text is None else path.write_text(text)
        with pytest.raises(CheckpointError, match=said):
            go_on(tmp_path / "run", precompute_reference=True)


def test_memory_is_that_of_two_rows_per_pair_and_of_the_copy():
    data, model = fresh(pairs()), LLaMa(MODEL, jnp.float32)

    def memory(**options):
        known = dict(config=DPOConfig(micro_batch_size=1, **options), lora=None)
        recipe = DPORecipe(dataset=data, evaluated=None, **known)
        return recipe.memory(recipe.trainer(model), None)

    longest = data.buckets[-1]
    assert longest == sum(data.shapes[-1]) >= 27
    wanted = sft_bytes(SFTTrainer(model, SFTConfig(micro_batch_size=2)), 4, longest)
    assert memory(loss="simpo") == memory(precompute_reference=True) == wanted
    assert memory() == {"reference": 4 * MODEL.n_params} | wanted
