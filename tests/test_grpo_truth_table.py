"""What each loss's gradient is, in expectation, on policies small enough to enumerate.

A policy is a table of logits [3 positions, 4 tokens]. Its completions are all 64 of three tokens, or, where
token 3 ends one, the 40 of up to three. The expectation over them of what `trainers.grpo_trainer` computes
is differentiated by JAX in float64, and compared with finite differences of the same expectation
written in numpy from the papers' equations, for every combination of every option. Then it is compared
with what one wants: the gradients of the expected reward and of the KL divergence. Those numbers are the
tables of docs/grpo.md; `python -m tests.test_grpo_truth_table --write` writes them there.
"""

import functools
import itertools
import re
import sys
from collections.abc import Callable
from math import comb
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainers.grpo_trainer import (
    KLS,
    LOSSES,
    RATIO_LEVELS,
    SCALES,
    aggregate,
    clipped_surrogate,
    group_advantages,
    importance_ratio,
    kl_penalty,
    sampler_weight,
)

DOC = Path(__file__).parents[1] / "docs" / "grpo.md"
LENGTH, VOCAB, STOP = 3, 4, 3
LOW, HIGH, DUAL, CAP, BETA = 0.2, 0.28, 1.5, 1.05, 0.7

# Where the ratio is cut: nowhere; the surrogate's two bounds; and the dual clip.
CLIPS = {"no clip": (1.0, 1e6, None), "clip": (LOW, HIGH, None), "dual clip": (LOW, HIGH, DUAL)}
# Who sampled: the old policy; a sampler that differs from it; the same, with its weight.
SAMPLINGS = ("old", "gap", "tis")
# With "none" no penalty. The last is not offered: r·k3 with the ratio of the whole sequence.
PENALTIES = ("none", *KLS, "sequence_ratio_k3")
OPTIONS = (RATIO_LEVELS, tuple(CLIPS), SAMPLINGS, PENALTIES)
VARIANTS = list(itertools.product(*OPTIONS))
# A step has two completions; bnpo with one and with two of them in a micro-batch.
AGGREGATIONS = (*LOSSES, "bnpo of 1")


class World(NamedTuple):
    """All completions [n, 3], which of their tokens exist, and their rewards [n]."""

    tokens: np.ndarray
    mask: np.ndarray
    rewards: np.ndarray


class Policies(NamedTuple):
    """Logits [3, 4] of the policy, of when it was the sampler, of the sampler itself, the reference."""

    new: np.ndarray
    old: np.ndarray
    sampler: np.ndarray
    ref: np.ndarray


@functools.cache
def world(stops: bool) -> World:
    found = {}
    for tokens in itertools.product(range(VOCAB), repeat=LENGTH):
        length = tokens.index(STOP) + 1 if stops and STOP in tokens else LENGTH
        found[tokens[:length]] = length
    rows = np.array([[*o, *[0] * (LENGTH - len(o))] for o in found])
    mask = np.arange(LENGTH) < np.array(list(found.values()))[:, None]
    rewards = [float(1 in o) + 0.5 * (o[-1] == 3) for o in found]
    return World(rows, mask.astype(float), np.array(rewards))


@functools.cache
def policies(on_policy: bool) -> Policies:
    # Sines stand for random numbers: the same on every machine.
    noise = lambda a, size: size * np.sin(a * np.arange(1, 13) + a).reshape(LENGTH, VOCAB)
    new, old, ref = noise(1.7, 0.8), noise(1.7, 0.8) + noise(2.9, 0.5), noise(0.6, 0.7)
    old = new if on_policy else old
    return Policies(new, old, old + noise(2.3, 0.15), ref)


# --- What the trainer computes, differentiated by JAX ---


def step_loss(kind, values_2C, mask_2C):
    """The loss of a step of two completions."""
    micro_batches = [slice(0, 1), slice(1, 2)] if kind == "bnpo of 1" else [slice(0, 2)]
    kind = kind.removesuffix(" of 1")
    parts = [
        aggregate(values_2C[i], mask_2C[i], jnp.ones(2)[i], kind, LENGTH) for i in micro_batches
    ]
    total, weight = (sum(x) for x in zip(*parts))
    return total / jnp.where(weight > 0, weight, 1)


def expected_losses(new, p: Policies, world: World, pairs):
    """[variants, aggregations] by the pure functions: the mean over all steps, by their chance.

    A step is one of `pairs` [n², 2].
    """
    tokens, mask, rewards = world
    rows = lambda logits: mask * jax.nn.log_softmax(logits)[jnp.arange(LENGTH), tokens]
    new, old, sampler, ref = map(rows, p._replace(new=new))
    chance_of = lambda logprobs_nC: jnp.exp(logprobs_nC.sum(1)) * mask[:, 0]
    advantages = rewards - chance_of(old) @ rewards
    ratios = {level: importance_ratio(new, old, mask, level) for level in RATIO_LEVELS}
    surrogate = {
        (level, clip): clipped_surrogate(ratios[level], advantages, *numbers)
        for level, (clip, numbers) in itertools.product(RATIO_LEVELS, CLIPS.items())
    }
    weight = {"old": 1, "gap": 1, "tis": sampler_weight(old, sampler, mask, CAP)}
    penalty = {kl: kl_penalty(new, ref, ratios["token"], kl) for kl in KLS}
    penalty["sequence_ratio_k3"] = kl_penalty(new, ref, ratios["sequence"], "ratio_k3")
    penalty["none"] = jnp.zeros_like(new)
    values = [
        surrogate[level, clip] * weight[sampling] + BETA * penalty[kl]
        for level, clip, sampling, kl in VARIANTS
    ]
    sampled_by = [old if sampling == "old" else sampler for _, _, sampling, _ in VARIANTS]

    def mean(values_nC, logprobs_nC):
        chance = jnp.prod(chance_of(logprobs_nC)[pairs], axis=1)
        losses = lambda pair: [
            step_loss(kind, values_nC[pair], mask[pair]) for kind in AGGREGATIONS
        ]
        return chance @ jnp.stack(jax.vmap(losses)(pairs), axis=1)

    losses = jax.lax.map(lambda x: mean(*x), (jnp.stack(values), jnp.stack(sampled_by)))
    return losses, losses


@functools.cache
def computed(on_policy: bool, stops: bool) -> tuple[np.ndarray, dict[tuple, np.ndarray]]:
    """(expected losses [variants, aggregations], gradients [aggregations, 12] by variant)."""
    with jax.enable_x64(True):
        p, known = policies(on_policy), world(stops)
        # Filled up with completions of nothing, so that both worlds are one program.
        fill = VOCAB**LENGTH - len(known.rewards)
        padded = World(*(np.pad(x, [(0, fill)] + [(0, 0)] * (x.ndim - 1)) for x in known))
        pairs = np.array(list(itertools.product(range(len(padded.rewards)), repeat=2)))
        grads, losses = _jacobian(p.new, p, padded, pairs)
    assert grads.dtype == losses.dtype == np.float64
    grads = np.asarray(grads).reshape(len(VARIANTS), -1, LENGTH * VOCAB)
    return np.asarray(losses), dict(zip(VARIANTS, grads))


_jacobian = jax.jit(jax.jacfwd(expected_losses, has_aux=True))


# --- The same from the papers' equations, in numpy, differentiated by finite differences ---


def probabilities(logits, tokens):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return (e / e.sum(-1, keepdims=True))[np.arange(LENGTH), tokens]


def paper_losses(stops: bool, p: Policies) -> np.ndarray:
    """[variants, aggregations], by cases instead of min and clip, with probabilities and not logs."""
    tokens, mask, rewards = world(stops)
    lengths = mask.sum(1)
    new, old, sampler, ref = (np.where(mask, probabilities(x, tokens), 1.0) for x in p)
    A = (rewards - old.prod(1) @ rewards)[:, None]
    x = ref / new
    k3 = x - 1 - np.log(x)
    penalty = {"none": 0 * x, "k1": -np.log(x), "k2": np.log(x) ** 2 / 2, "k3": k3}
    sequence_ratio = (new / old).prod(1, keepdims=True) ** (1 / lengths[:, None])
    penalty |= {"ratio_k3": new / old * k3, "sequence_ratio_k3": sequence_ratio * k3}
    out = []
    for level, clip, sampling, kl in VARIANTS:
        low, high, dual = CLIPS[clip]
        r = new / old if level == "token" else sequence_ratio * np.ones_like(new)
        falls = np.maximum(r, 1 - low)
        falls = falls if dual is None else np.minimum(falls, dual)
        loss = -A * np.where(A > 0, np.minimum(r, 1 + high), falls)
        if sampling == "tis":
            loss = loss * np.minimum(old / sampler, CAP)
        loss = (loss + BETA * penalty[kl]) * mask
        chance = (old if sampling == "old" else sampler).prod(1)
        sums = loss.sum(1)
        by_token = np.add.outer(sums, sums) / np.add.outer(lengths, lengths)
        by_row, by_step = chance @ (sums / lengths), chance @ by_token @ chance
        means = {"grpo": by_row, "bnpo of 1": by_row, "dapo": by_step, "bnpo": by_step}
        out.append([(means | {"dr_grpo": chance @ sums / LENGTH})[kind] for kind in AGGREGATIONS])
    return np.array(out)


def differences(function, logits: np.ndarray, h: float = 1e-5) -> np.ndarray:
    """The gradient of a function by logits, [..., 12]."""
    steps = (h * np.eye(logits.size)).reshape(-1, *logits.shape)
    sides = [(function(logits + s) - function(logits - s)) / (2 * h) for s in steps]
    return np.moveaxis(np.array(sides), 0, -1)


# --- What one wants ---


def wanted(on_policy: bool, stops: bool) -> dict[str, np.ndarray]:
    """Exact gradients by the policy's logits, [12], of what the losses stand for."""
    p, (tokens, mask, rewards) = policies(on_policy), world(stops)
    of = lambda logits: np.where(mask, probabilities(logits, tokens), 1.0)
    old, ref = of(p.old), of(p.ref)
    alive = lambda chance: np.array([chance[mask[:, t] > 0].sum() for t in range(LENGTH)])
    visits = alive(old.prod(1))
    distribution = lambda x: np.exp(x) / np.exp(x).sum(1, keepdims=True)
    by_state = lambda x: visits @ (
        distribution(x) * np.log(distribution(x) / distribution(p.ref))
    ).sum(1)
    kl = lambda a, b: a.prod(1) @ np.log(a / b).sum(1)
    functions = {
        "reward": lambda x: -of(x).prod(1) @ rewards,
        "kl": lambda x: kl(of(x), ref),
        "reverse": lambda x: kl(ref, of(x)),
        "kl by state": by_state,
    }
    return {name: differences(f, p.new).ravel() for name, f in functions.items()}


def compare(found: np.ndarray, target: np.ndarray, precision: float = 1e-7) -> str:
    """A table's cell: whether found is a multiple of the target, or the cosine between them."""
    size = np.linalg.norm(found)
    if size < precision / 10:
        return "0"
    factor = found @ target / (target @ target)
    if np.linalg.norm(found - factor * target) < precision * size:
        return "**exact**" if abs(factor - 1) < 10 * precision else f"**exact** × {factor:.3f}"
    return f"{found @ target / (size * np.linalg.norm(target)):.3f}"


# The gradient on-policy, s being ∇log π of a completion's tokens, summed; what `paper_losses` leads to.
FORMULAS = {
    "dapo": "E[Σᵢ Aᵢ sᵢ / Σᵢ lenᵢ]",
    "grpo": "E[A s / len]",
    "bnpo": "as `dapo`, within a micro-batch",
    "dr_grpo": "E[A s] / L",
    "bnpo of 1": "E[A s / len]",
    "ratio_k3": "E[Σ log(π/ref) ∇log π]",
    "k1": "E[Σ ∇log π] = 0",
    "k2": "E[Σ log(π/ref) ∇log π]",
    "k3": "E[Σ (1 − ref/π) ∇log π]",
    "sequence_ratio_k3": "E[Σ k3 · s/len + (1 − ref/π) ∇log π]",
}
NAMES = {"bnpo of 1": "`bnpo`, micro-batches of 1", "sequence_ratio_k3": "(k3 × sequence ratio)"}


def surrogate_table() -> list[str]:
    columns = {
        "on-policy, equal lengths": (True, False, "clip", "old"),
        "on-policy": (True, True, "clip", "old"),
        "off-policy, no clip": (False, True, "no clip", "old"),
        "off-policy": (False, True, "clip", "old"),
        "… `dual_clip`": (False, True, "dual clip", "old"),
        "sampler ≠ trainer": (True, True, "clip", "gap"),
        "… `tis_cap`": (True, True, "clip", "tis"),
    }
    rows = {}
    for (k, loss), level in itertools.product(enumerate(AGGREGATIONS), RATIO_LEVELS):
        rows[NAMES.get(loss, f"`{loss}`"), FORMULAS[loss], level] = [
            compare(
                computed(on, stops)[1][level, clip, sampling, "none"][k],
                wanted(on, stops)["reward"],
            )
            for on, stops, clip, sampling in columns.values()
        ]
    return markdown(("loss", "on-policy gradient", "ratio", *columns), rows)


def kl_table() -> list[str]:
    columns = {
        "on-policy, equal lengths: ∇KL(π‖ref)": (True, False, "kl"),
        "∇KL(ref‖π)": (True, False, "reverse"),
        "off-policy: ∇KL(π‖ref)": (False, False, "kl"),
        "on-policy, lengths differ: ∇KL by state": (True, True, "kl by state"),
        "∇KL(π‖ref)": (True, True, "kl"),
    }
    rows = {}
    for kl in PENALTIES[1:]:
        rows[NAMES.get(kl, f"`{kl}`"), FORMULAS[kl]] = cells = []
        for on, stops, target in columns.values():
            grads = computed(on, stops)[1]
            both, alone = (grads["token", "clip", "old", k] for k in (kl, "none"))
            penalty = (both - alone)[AGGREGATIONS.index("dr_grpo")] * LENGTH / BETA
            cells.append(compare(penalty, wanted(on, stops)[target]))
    return markdown(("`kl`", "on-policy gradient", *columns), rows)


CHANCES, GROUP = (0.02, 0.1, 0.3, 0.5, 0.9), 8


@functools.cache
def advantage_factors(scale: str) -> np.ndarray:
    """E[Σ A ∇log p] / group_size as a multiple of ∇p, for rewards 1 with chance p, else 0.

    A batch of two groups, the other one with p = 0.5. What matters of a group is how many are right.
    """
    rights = list(itertools.product(range(GROUP + 1), repeat=2))
    rewards = np.array([[np.arange(GROUP) < n for n in pair] for pair in rights], np.float64)
    with jax.enable_x64(True):
        valid = jnp.ones((2, GROUP), bool)
        A = np.asarray(jax.vmap(lambda r: group_advantages(r, valid, scale))(jnp.asarray(rewards)))
    out = []
    for p in CHANCES:
        binomial = lambda n, p: comb(GROUP, n) * p**n * (1 - p) ** (GROUP - n)
        chance = np.array([binomial(n, p) * binomial(m, 0.5) for n, m in rights])
        score = (rewards[:, 0] - p) / (p * (1 - p))
        out.append(chance @ (A[:, 0] * score).mean(1))
    return np.array(out)


def advantage_table() -> list[str]:
    rows = {(f"`{scale}`",): [f"{x:.3f}" for x in advantage_factors(scale)] for scale in SCALES}
    return markdown(("`scale`", *(f"p = {p}" for p in CHANCES)), rows)


def markdown(head: tuple, rows: dict[tuple, list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *((*names, *cells) for names, cells in rows.items())]
    return ["| " + " | ".join(line) + " |" for line in lines]


TABLES = {"surrogate": surrogate_table, "kl": kl_table, "advantages": advantage_table}


def with_tables(text: str, tables: dict[str, Callable[[], list[str]]] = TABLES) -> str:
    """The document with its tables computed again."""
    for name, table in tables.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        assert text.count(start) == text.count(end) == 1
        block = start + "\n" + "\n".join(table()) + "\n\n" + end
        text = re.sub(f"{start}.*?{end}", lambda _: block, text, flags=re.DOTALL)
    return text


# --- The tests ---

CASES = [(True, False), (True, True), (False, False), (False, True)]


@pytest.mark.parametrize("on_policy, stops", CASES)
def test_every_variant_has_the_gradient_of_the_papers_equations(on_policy, stops):
    p = policies(on_policy)
    exact = differences(lambda new: paper_losses(stops, p._replace(new=new)), p.new)
    for variant, wanted in zip(VARIANTS, exact):
        found = computed(on_policy, stops)[1][variant]
        error = np.abs(found - wanted).max(1) / np.abs(wanted).max(1)
        assert (error < 1e-7).all(), (variant, dict(zip(AGGREGATIONS, error)))


@pytest.mark.parametrize("on_policy, stops", CASES)
def test_every_variant_has_the_value_of_the_papers_equations(on_policy, stops):
    found, _ = computed(on_policy, stops)
    np.testing.assert_allclose(found, paper_losses(stops, policies(on_policy)), atol=1e-13)


def test_every_option_makes_a_difference_here():
    """Or a combination would be compared without its option at work."""
    _, found = computed(False, True)
    for axis, options in enumerate(OPTIONS):
        for variant, option in itertools.product(VARIANTS, options):
            other = (*variant[:axis], option, *variant[axis + 1 :])
            assert variant == other or np.abs(found[variant] - found[other]).max() > 1e-4


def test_the_table_in_the_docs_is_what_the_code_computes():
    text = DOC.read_text()
    assert with_tables(text) == text, "run python -m tests.test_grpo_truth_table --write"


def test_float64_stays_in_here():
    computed(True, False)
    assert jnp.ones(()).dtype == jnp.float32


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    DOC.write_text(with_tables(DOC.read_text()))
