"""Distillation: both divergences against TRL and torch, their expected gradients, and whole runs."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from trl.experimental.gkd import GKDTrainer

from models.llama.lora import LoRAConfig
from models.llama.model import LLaMa
from models.llama.quantize import quantize_params
from tests import test_grpo_truth_table as truth
from tests.oracles.torch_training import _by_path, _trainable
from tests.test_grpo_oracle import PROMPTS, rollout
from tests.test_sft_trainer import LENGTHS, compare, dataset, gradients, variant
from trainers.distill_trainer import KINDS, DistillConfig, DistillTrainer, SoftTrainer, divergence
from trainers.sft_trainer import SFTConfig
from utils import cross_entropy
from utils.int8 import dequantize

BETA = {"forward": 0, "reverse": 1}  # TRL's

# --- The function ---


@pytest.fixture
def chunks_of_32(monkeypatch):
    """30 of 75 tokens count: one chunk; else three."""
    monkeypatch.setattr(cross_entropy, "_CHUNK_LOGITS", 1)
    assert cross_entropy.chunk_size(75, 50) == 32


@functools.partial(jax.jit, static_argnums=(0, 6))
def ours(kind, x, head, y, teacher, weights, temperature=1.0):
    """((KL, entropy), gradients by x and by head), scaled by what comes after."""

    def scaled(x, head):
        sums = divergence(kind, x, head, y, teacher, weights, temperature)
        return 3 * sums[0] + 5 * jax.lax.stop_gradient(sums[1]), sums

    grads, sums = jax.grad(scaled, (0, 1), has_aux=True)(x, head)
    return sums, grads


def arrays(size=1.0):
    rng = np.random.default_rng(0)
    shapes = ((75, 16), (50, 16), (75, 24), (50, 24))
    found = [(size * rng.normal(size=shape)).astype(np.float32) for shape in shapes]
    return *found, (rng.random(75) < 0.4).astype(np.float32)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_are_trls(chunks_of_32, kind, temperature):
    for weights in (arrays()[4], np.ones(75, np.float32)):
        x, head, y, teacher = (torch.tensor(a, requires_grad=True) for a in arrays()[:4])
        student, theirs = x @ head.T, (y @ teacher.T).detach()
        labels = torch.where(torch.from_numpy(weights) > 0, 0, -100)[None]
        loss = GKDTrainer.generalized_jsd_loss(
            student[None], theirs[None], labels, BETA[kind], temperature, reduction="sum"
        )
        (3 * loss).backward()
        (kl, entropy), grads = ours(kind, *arrays()[:4], weights, temperature)
        assert abs(float(kl) - loss.item()) < 1e-5 * loss.item()
        logprobs = torch.log_softmax(student / temperature, -1)
        wanted = -((logprobs.exp() * logprobs).sum(-1) @ torch.from_numpy(weights)).item()
        assert abs(float(entropy) - wanted) < 1e-5 * wanted
        for found, wanted in zip(grads, (x.grad, head.grad)):
            worst = np.abs(found - wanted.numpy()).max() / wanted.abs().max().item()
            assert worst < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_any_size_are_finite_and_no_weight_is_no_divergence(chunks_of_32, kind):
    (kl, entropy), grads = ours(kind, *arrays(size=60.0))
    assert all(np.isfinite(x).all() for x in (kl, entropy, *grads)) and kl > 1e3
    x, head, y, teacher, _ = arrays()
    (kl, entropy), grads = ours(kind, x, head, y, teacher, np.zeros(75, np.float32))
    assert kl == entropy == 0 and not any(g.any() for g in grads)


# --- What the gradients are, in expectation, by enumeration ---


class Table:
    """A model whose hidden states say a token's place: its head is the table of logits."""

    def apply(self, variables, tokens_BT, *, positions_BT=None, hidden=True, **_):
        """The place after the prompt's one token."""
        places = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        return jax.nn.one_hot(places if positions_BT is None else positions_BT, 3), None

    __hash__ = object.__hash__


@functools.cache
def expected_gradient(name: str, stops: bool) -> np.ndarray:
    """E[∇ Σ of the tokens' losses], [12], by the trainer's own loss of each completion."""
    p, (tokens, mask, _) = truth.policies(False), truth.world(stops)
    head = lambda logits: {"embed": jnp.asarray(logits.T, jnp.float32)}
    of = lambda logits: np.where(mask, truth.probabilities(logits, tokens), 1.0).prod(1)
    # Given rows are the teacher's; the others the student's, or, off-policy, an older student's.
    chance = of({"forward": p.ref, "stale": p.old}.get(name.split()[-1], p.new))
    if name == "forward":
        trainer = SoftTrainer(Table(), SFTConfig(), teacher=Table())
        rows = np.pad(tokens, ((0, 0), (1, 0)))
        batch = {
            "tokens": rows[:, None],
            "target_mask": np.pad(mask > 0, ((0, 0), (1, 0)))[:, None],
        }
    else:
        config = DistillConfig(divergence=name.split()[0])
        trainer = DistillTrainer(Table(), config, teacher=Table())
        old = np.where(mask, np.log(truth.probabilities(p.old, tokens)), 0)
        batch = {
            "prompts": np.zeros((len(rows := tokens), 1, 1), np.int32),
            "prompt_lengths": np.ones((len(rows), 1), np.int32),
            "tokens": rows[:, None, None],
            "target_mask": (mask > 0)[:, None, None],
        }
        if name.endswith("stale"):
            batch["old_logprobs"] = old[:, None, None].astype(np.float32)

    def expected(params):
        params = trainer.model_params(params, {"teacher": head(p.ref)})
        one = lambda row: trainer.loss(params, row, jax.random.key(0)).total
        return jnp.float32(chance) @ jax.vmap(one)(batch)

    return np.asarray(jax.jit(jax.grad(expected))(head(p.new))["embed"]).T.ravel()


ROWS = {
    "`distill`, `reverse`": ("reverse", "E[Σ ∇KL(π_t ‖ T_t)]"),
    "`distill`, `sampled`": ("sampled", "E[Σ log(π/T) ∇log π]"),
    "… on samples of an older student": ("sampled stale", "E_old[Σ r log(π/T) ∇log π]"),
    "`sft --teacher`, rows of the teacher": ("forward", "E_T[Σ ∇KL(T_t ‖ π_t)]"),
}
COLUMNS = {
    "equal lengths: ∇KL(π‖T)": (False, "kl"),
    "∇KL(T‖π)": (False, "reverse"),
    "lengths differ: ∇KL(π‖T) by state": (True, "kl by state"),
    "∇KL(π‖T) ": (True, "kl"),
    "∇KL(T‖π) ": (True, "reverse"),
}


def table() -> list[str]:
    rows = {}
    for row, (name, formula) in ROWS.items():
        found = [
            # What is on-policy there visits the contexts of today's student.
            truth.compare(expected_gradient(name, stops), truth.wanted(True, stops)[target], 1e-5)
            for stops, target in COLUMNS.values()
        ]
        rows[row, formula] = found
    return truth.markdown(("loss", "gradient", *COLUMNS), rows)


@pytest.mark.slow
def test_the_table_in_the_docs_is_what_the_code_computes():
    text = DOC.read_text()
    found = truth.with_tables(text, TABLES)
    assert found == text, "run python -m tests.test_distill_trainer --write"


# --- Through models: a student, and a teacher of another shape ---


def trainer(divergence="reverse", lora=None, **config):
    """A trainer of "biases", taught by "tied", which has fewer rows than the student's embedding."""
    student, teacher = (LLaMa(variant(name)[1]) for name in ("biases", "tied"))
    config = dict(micro_batch_size=None) | config
    if divergence == "forward":
        return SoftTrainer(student, SFTConfig(**config), lora, 150, teacher)
    config = DistillConfig(divergence=divergence, max_completion_len=6, **config)
    return DistillTrainer(student, config, lora, 150, teacher)


def found(of, batch):
    return gradients(of, variant("biases")[2], batch, {"teacher": variant("tied")[2]})


def torchs(rows, kind, temperature=1.0):
    """(loss, gradients) of rows (ids, number of the first target) by TRL's loss of torch's logits."""
    models = _trainable(variant("biases")[0]), variant("tied")[0]
    logits = [[], []]
    for ids, first in rows:
        for model, some in zip(models, logits):
            out = model(input_ids=torch.tensor([ids]), use_cache=False).logits
            some.append(out[0, first - 1 : -1, :150])
    logits = [torch.cat(some)[None] for some in logits]
    loss = GKDTrainer.generalized_jsd_loss(*logits, None, BETA[kind], temperature, reduction="sum")
    loss = loss / logits[0].shape[1]
    loss.backward()
    return loss.item(), _by_path(models[0])


def completions():
    """(prompt + completion, number of its first target), of those with tokens that count."""
    batch = rollout()
    for i, j in np.ndindex(batch["tokens"].shape[:2]):
        if n := batch["target_mask"][i, j].sum():
            yield [*PROMPTS[i], *batch["tokens"][i, j, :n].tolist()], len(PROMPTS[i])


@pytest.mark.slow
def test_the_gradient_of_every_parameter_is_trls():
    """Of ragged completions, masked and padded."""
    wanted, theirs = torchs(completions(), "reverse", 0.7)
    grads, loss = found(trainer(temperature=0.7), rollout())
    assert abs(float(loss.means()["loss"]) - wanted) < 1e-5 * wanted
    assert float(loss.weight) == rollout()["target_mask"].sum()
    compare(grads, theirs)


@pytest.mark.slow
def test_on_given_rows_it_is_trls():
    rows = [(np.random.default_rng(n).integers(3, 150, n).tolist(), n // 2) for n in (9, 40, 2, 17)]
    wanted, theirs = torchs(rows, "forward")
    batch = {"tokens": np.zeros((4, 48), np.int32), "target_mask": np.zeros((4, 48), bool)}
    for i, (ids, first) in enumerate(rows):
        batch["tokens"][i, : len(ids)], batch["target_mask"][i, first : len(ids)] = ids, True
    grads, loss = found(trainer("forward"), batch)
    assert abs(float(loss.means()["loss"]) - wanted) < 1e-5 * wanted
    compare(grads, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["reverse", "forward"])
def test_how_rows_are_cut_ordered_and_packed_changes_nothing(kind):
    batch = rollout() if kind == "reverse" else dataset(LENGTHS, 48, packing=False)
    grads, loss = found(trainer(kind), batch)
    other = {name: x[::-1] for name, x in batch.items()}
    if kind == "forward":
        other = dataset(LENGTHS, 48, packing=True)
    others, cut = found(trainer(kind, micro_batch_size=2), other)
    for name, value in loss.means().items():
        np.testing.assert_allclose(cut.means()[name], value, rtol=2e-5, err_msg=name)
    compare(others, grads, 2e-5)


@pytest.mark.slow
def test_adapters_and_a_teacher_in_eight_bits():
    """Only adapters have gradients, and the exported student is the base with them merged."""
    of, base = trainer(lora=LoRAConfig(rank=4)), variant("biases")[2]
    state, frozen = of.init(base, jax.random.key(0))
    frozen = frozen | {"teacher": quantize_params(variant("tied")[2])}
    first = of.eval_step(state.params, frozen, rollout()).means()["loss"]
    for _ in range(3):
        state, metrics = of.train_step(state, frozen, rollout())
    assert metrics["loss"] < first and set(state.params) == {"layers"}
    assert jax.tree.structure(of.export_params(state, frozen)) == jax.tree.structure(base)
    whole = frozen | {"teacher": dequantize(frozen["teacher"])}
    loss = [of.eval_step(state.params, f, rollout()).means()["loss"] for f in (frozen, whole)]
    np.testing.assert_allclose(*loss, rtol=1e-4)


DOC = truth.DOC.parent / "distillation.md"
TABLES = {"gradients": table}

if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    DOC.write_text(truth.with_tables(DOC.read_text(), TABLES))
