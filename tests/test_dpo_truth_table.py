"""What each preference loss's gradient is, in expectation, and where it vanishes.

A policy is a table of logits of all completions of up to three tokens. Two completions are sampled from
the reference, and one is preferred with the chance of Bradley and Terry: σ(difference of rewards). The
expectation over all pairs of what `trainers.dpo_trainer` computes is differentiated by JAX in float64, and
compared with finite differences of the papers' equations in numpy. Then it is compared with what one
wants: the table of docs/dpo.md; `python -m tests.test_dpo_truth_table --write` writes it there.
"""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.test_grpo_truth_table import compare, differences, markdown, with_tables, world
from trainers.dpo_trainer import preference_loss, preference_scores

DOC = Path(__file__).parents[1] / "docs" / "dpo.md"
BETA, EPSILON, GAMMA = 0.5, 0.2, 0.3
# By name: the loss, its smoothing, and the chance that a label is the wrong way round.
ROWS = {
    "`sigmoid`": ("sigmoid", 0.0, 0.0),
    "`sigmoid`, a fifth of the labels wrong": ("sigmoid", 0.0, EPSILON),
    "… `label_smoothing` 0.2": ("sigmoid", EPSILON, EPSILON),
    "`hinge`": ("hinge", 0.0, 0.0),
    "`ipo`": ("ipo", 0.0, 0.0),
    "`simpo`": ("simpo", 0.0, 0.0),
}
FORMULAS = {
    "sigmoid": "−β E[σ(−βh) (s₊ − s₋)]",
    "hinge": "−β E[(βh < 1) (s₊ − s₋)]",
    "smoothed": "−β E[(σ(−βh) − ε) (s₊ − s₋)]",
    "ipo": "E[(2h − 1/β) (s₊/len₊ − s₋/len₋)]",
    "simpo": "−β E[σ(γ − βh) (s₊/len₊ − s₋/len₋)]",
}


@functools.cache
def setting(stops: bool):
    """(logits of the reference, rewards, lengths) of all completions."""
    lengths = world(stops).mask.sum(1)
    n = np.arange(1, len(lengths) + 1)
    return np.sin(1.7 * n), 1.3 * np.sin(2.9 * n + 1), lengths


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum()


def chances(stops: bool, wrong: float) -> np.ndarray:
    """[n, n]: that both are sampled, and the first is said to be preferred."""
    reference, rewards, _ = setting(stops)
    better = 1 / (1 + np.exp(rewards - rewards[:, None]))
    sampled = softmax(reference)
    return np.outer(sampled, sampled) * ((1 - wrong) * better + wrong * better.T)


def computed(logits, stops: bool, row: str):
    """(expected loss, its gradient) by the trainer's functions."""
    kind, smoothing, wrong = ROWS[row]
    reference, _, lengths = setting(stops)
    first, second = np.indices((len(lengths),) * 2).reshape(2, -1)

    def loss(logits):
        pairs = lambda x: jnp.stack([x[first], x[second]], 1)
        sides = jax.nn.log_softmax(logits), jax.nn.log_softmax(reference), lengths
        scores = preference_scores(*map(pairs, sides), kind)
        losses = preference_loss(scores[:, 0] - scores[:, 1], kind, BETA, smoothing, GAMMA)
        return chances(stops, wrong).ravel() @ losses

    with jax.enable_x64(True):
        value, gradient = jax.value_and_grad(loss)(jnp.asarray(logits))
    assert gradient.dtype == np.float64
    return float(value), np.asarray(gradient)


def paper(logits, stops: bool, row: str) -> float:
    """The expected loss from the papers' equations, in odds and not in logs where they have both."""
    kind, smoothing, wrong = ROWS[row]
    reference, _, lengths = setting(stops)
    new, old = softmax(logits), softmax(reference)
    if kind == "simpo":  # eq. 6
        reward = BETA / lengths * np.log(new)
        odds = np.exp(np.subtract.outer(reward, reward) - GAMMA)
        losses = np.log(1 + 1 / odds)
    elif kind == "ipo":  # eq. 17, of means over tokens
        ratio = (new / old) ** (1 / lengths)
        losses = (np.log(np.divide.outer(ratio, ratio)) - 1 / (2 * BETA)) ** 2
    else:
        odds = np.divide.outer(new / old, new / old) ** BETA
        losses = (1 - smoothing) * np.log(1 + 1 / odds) + smoothing * np.log(1 + odds)
        losses = np.maximum(0, 1 - np.log(odds)) if kind == "hinge" else losses
    return (chances(stops, wrong) * losses).sum()


# --- What one wants ---


def win_rate(logits, stops: bool) -> float:
    """The chance that a completion is preferred to one of the reference."""
    reference, rewards, _ = setting(stops)
    better = 1 / (1 + np.exp(rewards - rewards[:, None]))
    return softmax(logits) @ better @ softmax(reference)


def optimum(stops: bool, of: str) -> np.ndarray:
    """Log-probs of the policy that is wanted: with the most reward, or the most wins with IPO's means over
    tokens, less β times its KL divergence from the reference.
    """
    reference, rewards, lengths = setting(stops)
    reference = np.log(softmax(reference))
    if of == "reward":
        return np.log(softmax(reference + rewards / BETA))
    better = 1 / (1 + np.exp(rewards - rewards[:, None]))
    per_token = better @ np.exp(reference) / BETA
    low, high = -50.0, 50.0  # of the constant that makes it a distribution
    for _ in range(100):
        middle = (low + high) / 2
        sum_ = np.exp(reference + lengths * (per_token + middle)).sum()
        low, high = (low, middle) if sum_ > 1 else (middle, high)
    return reference + lengths * (per_token + low)


def preference_table() -> list[str]:
    columns = ("at ref: −∇ win rate", "at ref·exp(r/β)", "at ref·exp(len·(p/β + c))")
    rows = {}
    for name, (kind, smoothing, _) in ROWS.items():
        cells = rows[name, FORMULAS["smoothed" if smoothing else kind]] = []
        for stops in (False, True):
            start = setting(stops)[0]
            at_ref = computed(start, stops, name)[1]
            cells.append(compare(at_ref, differences(lambda x: -win_rate(x, stops), start)))
            for of in ("reward", "win rate"):
                size = np.linalg.norm(computed(optimum(stops, of), stops, name)[1])
                share = size / np.linalg.norm(at_ref)
                cells.append("**0**" if share < 1e-9 else f"{share:.2f}")
    return markdown(
        ("loss", "gradient", *columns, *(f"lengths differ: {c}" for c in columns)), rows
    )


TABLES = {"preferences": preference_table}


@pytest.mark.parametrize("row", ROWS)
def test_every_loss_has_the_value_and_the_gradient_of_the_papers_equations(row):
    stops = True
    logits = setting(stops)[0] + 0.6 * np.cos(np.arange(len(setting(stops)[0])))
    value, gradient = computed(logits, stops, row)
    np.testing.assert_allclose(value, paper(logits, stops, row), rtol=1e-12)
    exact = differences(lambda x: paper(x, stops, row), logits)
    assert np.abs(gradient - exact).max() < 1e-7 * np.abs(exact).max()


def test_the_table_in_the_docs_is_what_the_code_computes():
    text = DOC.read_text()
    assert with_tables(text, TABLES) == text, "run python -m tests.test_dpo_truth_table --write"


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    DOC.write_text(with_tables(DOC.read_text(), TABLES))
