"""Samplers against the exact distribution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sampling import Greedy, TopP, check_sampler, penalize, traced, truncate
from tests.oracles.nucleus import probabilities
from utils.errors import SamplingError

V = 97
LOGITS = np.random.default_rng(0).standard_normal(V).astype(np.float32) * 2
# A vocabulary of several blocks of ids (sampling._BLOCK), the last of which is not full.
MANY_LOGITS = np.random.default_rng(1).standard_normal(700).astype(np.float32) * 2


@functools.partial(jax.jit, static_argnames="draws")
def draw(sampler, logits, draws, seed=0):
    keys = jax.random.split(jax.random.key(seed), draws)
    return sampler(jnp.broadcast_to(logits, (draws, len(logits))), keys)


FILTERS = [
    dict(),
    dict(temperature=0.5),
    dict(temperature=1.7, top_p=0.9),
    dict(top_k=10),
    dict(min_p=0.1),
    dict(temperature=0.8, top_k=20, top_p=0.7, min_p=0.05),
    dict(top_k=1),
    dict(top_p=0.3),
]


@pytest.mark.parametrize(
    ("numbers", "logits"),
    [(numbers, LOGITS) for numbers in FILTERS]
    + [(numbers, MANY_LOGITS) for numbers in (dict(), dict(top_p=0.9, top_k=400))],
    ids=lambda x: str(x) if isinstance(x, dict) else f"V={len(x)}",
)
def test_draws_follow_the_exact_distribution(numbers, logits):
    n = 10000 if len(logits) == V else 5000
    exact = probabilities(logits, **numbers)
    tokens, logprobs = draw(traced(TopP(**numbers)), logits, n)
    counts = np.bincount(tokens, minlength=len(logits))
    assert (counts[exact == 0] == 0).all()
    # Pearson's chi-square over cells of at least 5 expected draws, the rest as one cell.
    big = exact * n >= 5
    observed = np.append(counts[big], counts[~big].sum())
    expected = np.append(exact[big], exact[~big].sum()) * n
    cells = expected > 0
    chi2 = (((observed - expected)[cells] ** 2) / expected[cells]).sum()
    degrees = cells.sum() - 1
    assert chi2 < degrees + 5 * np.sqrt(2 * degrees) + 1e-6
    # The log-prob is of the distribution after temperature and before truncation.
    full = probabilities(logits, numbers.get("temperature", 1.0))
    np.testing.assert_allclose(logprobs, np.log(full[np.asarray(tokens)]), atol=1e-4)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    values=st.lists(
        st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, -3.0, 7.0]), min_size=40, max_size=40
    ),
    top_k=st.sampled_from([0, 1, 2, 5, 39, 40, 1000]),
    top_p=st.sampled_from([1e-12, 0.1, 0.37, 0.5, 0.83, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
)
def test_the_kept_set_is_that_of_a_sort_ties_included(values, top_k, top_p, min_p):
    logits = np.asarray(values, np.float32)
    weights = jnp.asarray(np.exp(logits - logits.max()))[None]
    arguments = jnp.int32(top_k), jnp.float32(top_p), jnp.float32(min_p)
    kept = np.asarray(jax.jit(truncate)(weights, *arguments))[0] > 0
    exact = probabilities(logits, 1.0, top_k, top_p, min_p) > 0
    assert kept.any()
    if (kept != exact).any():
        # Only where a cumulated mass falls on the limit within float32's rounding may they differ.
        p = probabilities(logits, 1.0, top_k)
        before = np.cumsum(np.sort(p)[::-1])
        assert np.abs(before - top_p).min() < 1e-6


@pytest.mark.covers("C5")
def test_filters_at_their_ends():
    one = lambda **kw: set(np.unique(draw(traced(TopP(**kw)), LOGITS, 500)[0]).tolist())
    best = {int(LOGITS.argmax())}
    assert one(top_p=1e-12) == one(top_k=1) == one(min_p=1.0) == best
    everything = draw(traced(TopP()), LOGITS, 500)[0]
    for off in (dict(top_p=1), dict(top_k=0), dict(top_k=V + 5), dict(min_p=0)):
        np.testing.assert_array_equal(draw(traced(TopP(**off)), LOGITS, 500)[0], everything)
    equal = np.zeros(V, np.float32)
    tokens = draw(traced(TopP(top_k=3)), equal, 500)[0]
    assert set(np.unique(tokens).tolist()) == {0, 1, 2}  # among equals, the lowest ids


@pytest.mark.covers("C4")
def test_temperatures():
    greedy, greedy_logprobs = draw(Greedy(), LOGITS, 3)
    assert greedy.tolist() == [int(LOGITS.argmax())] * 3
    for zero in (0, 0.0, -0.0):
        tokens, logprobs = draw(traced(TopP(temperature=zero)), LOGITS, 3)
        assert tokens.tolist() == greedy.tolist()
        np.testing.assert_allclose(logprobs, greedy_logprobs, rtol=1e-5)
    for tiny in (1e-30, 1e-45):
        tokens, logprobs = draw(traced(TopP(temperature=tiny, top_p=0.9)), LOGITS, 50)
        assert set(tokens.tolist()) == {int(LOGITS.argmax())} and np.isfinite(logprobs).all()
    tokens, logprobs = draw(traced(TopP(temperature=1e6)), LOGITS, 5000)
    assert len(np.unique(tokens)) > 0.9 * V and np.isfinite(logprobs).all()


@pytest.mark.covers("C4", "C5")
@pytest.mark.parametrize(
    "numbers",
    [{"temperature": x} for x in (-1.0, float("nan"), float("inf"), "hot", None, True)]
    + [{"top_p": x} for x in (0, -0.1, 1.0001, float("nan"))]
    + [{"top_k": x} for x in (-1, 1.5)]
    + [{"min_p": x} for x in (-0.1, 1.1)]
    + [{"repetition_penalty": x} for x in (0, -1, float("inf"))],
    ids=str,
)
def test_numbers_out_of_range_are_refused(numbers):
    with pytest.raises(SamplingError, match=next(iter(numbers))):
        check_sampler(TopP(**numbers))


def test_all_wrong_numbers_are_named_at_once():
    with pytest.raises(SamplingError, match="temperature.*top_p.*top_k"):
        check_sampler(TopP(temperature=-1, top_p=2, top_k=-3))


@pytest.mark.covers("C6")
def test_huge_equal_and_masked_logits():
    huge = np.asarray([1e30, -1e30, 1e30, 0], np.float32)
    tokens, logprobs = draw(traced(TopP(top_p=0.9)), huge, 200)
    assert set(tokens.tolist()) == {0, 2}
    np.testing.assert_allclose(logprobs, np.log(0.5), rtol=1e-5)
    masked = np.asarray([-np.inf, 1, -np.inf, 1], np.float32)
    assert set(draw(traced(TopP()), masked, 200)[0].tolist()) == {1, 3}
    assert draw(Greedy(), np.asarray([0, 5, 5], np.float32), 1)[0].tolist() == [1]


def test_a_row_does_not_depend_on_its_mates():
    keys = jax.random.split(jax.random.key(3), 16)
    logits = np.random.default_rng(1).standard_normal((16, V)).astype(np.float32)
    sampler = jax.jit(traced(TopP(temperature=0.9, top_p=0.95)).__call__)
    together = sampler(jnp.asarray(logits), keys)[0]
    alone = [int(sampler(logits[i : i + 1], keys[i : i + 1])[0][0]) for i in range(16)]
    assert together.tolist() == alone
    order = np.random.default_rng(2).permutation(16)
    np.testing.assert_array_equal(sampler(logits[order], keys[order])[0], together[order])


def test_other_numbers_do_not_retrace():
    traces = []

    @jax.jit
    def run(sampler, logits, keys):
        traces.append(1)
        return sampler(logits, keys)

    keys = jax.random.split(jax.random.key(0), 2)
    for numbers in (dict(), dict(temperature=0), dict(top_p=0.5, top_k=7), dict(min_p=1)):
        run(traced(TopP(**numbers)), jnp.zeros((2, V)), keys)
    assert len(traces) == 1


def test_repetition_penalty_is_transformers_own():
    torch = pytest.importorskip("torch")
    from transformers import RepetitionPenaltyLogitsProcessor

    ids = [3, 50, 50, 96, *np.flatnonzero(LOGITS < 0)[:3].tolist()]
    processor = RepetitionPenaltyLogitsProcessor(1.3)
    theirs = processor(torch.tensor([ids]), torch.from_numpy(LOGITS[None].copy()))
    seen = np.zeros((1, V), bool)
    seen[0, ids] = True
    np.testing.assert_allclose(penalize(LOGITS[None], seen, 1.3), theirs.numpy(), rtol=1e-6)
    np.testing.assert_array_equal(penalize(LOGITS[None], seen, None), LOGITS[None])


def test_a_penalty_makes_what_was_seen_less_likely_whatever_its_sign():
    logits, seen = np.float32([[2, -2, 2, -2, 0]]), np.array([[True, True, False, False, True]])
    assert penalize(logits, seen, 2.0).tolist() == [[1, -4, 2, -2, 0]]
    assert penalize(logits, seen, 0.5).tolist() == [[4, -1, 2, -2, 0]]
