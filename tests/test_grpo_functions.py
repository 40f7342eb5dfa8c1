"""Each of GRPO's pure functions alone, at its edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.llama.lora import LoRAConfig
from tests.oracles import grpo_torch
from trainers.grpo_trainer import (
    KLS,
    LOSSES,
    MAX_LOG_RATIO,
    RATIO_LEVELS,
    GRPOConfig,
    GRPOTrainer,
    aggregate,
    clipped_surrogate,
    group_advantages,
    importance_ratio,
    kl_penalty,
    sampler_weight,
)
from trainers.rollout import Rollout, RolloutConfig
from utils.errors import ConfigError

advantages = jax.jit(group_advantages, static_argnums=2)


def of_group(rewards, scale="group"):
    """One group's advantages; None has no score, and stands for anything at all."""
    values = [np.nan if r is None else r for r in rewards]
    found = advantages(np.float32([values]), np.array([[r is not None for r in rewards]]), scale)
    return np.asarray(found)[0]


# --- group_advantages ---


@pytest.mark.parametrize("scale", ["group", "none", "rloo"])
def test_advantages_are_those_of_float64(scale):
    for rewards in (
        [0, 1],
        [1, 0, 0, 0.25],
        [3, None, 5, -2],
        [2, None],
        [1e6, 1e6 + 800, 1e6 - 3],
    ):
        wanted = grpo_torch.group_advantages(rewards, scale)
        np.testing.assert_allclose(of_group(rewards, scale), wanted, rtol=2e-4, atol=1e-6)


def test_the_batch_is_one_spread_for_all_groups():
    rewards = np.float32([[0, 1, 2, np.nan], [10, 14, 10, 14], [5, 5, 5, 5]])
    valid = ~np.isnan(rewards)
    off = rewards - np.nanmean(rewards, axis=1, keepdims=True)
    # Around the mean of all, not of each group: as far as the batch is spread.
    wanted = off / (np.std(rewards[valid], ddof=1) + 1e-4)
    found = np.asarray(advantages(rewards, valid, "batch"))
    np.testing.assert_allclose(found, np.where(valid, wanted, 0), rtol=1e-5)
    assert not found[2].any() and found[0, 3] == 0


def test_reinforce_is_the_reward_itself():
    assert of_group([3, None, 1, 1], "reinforce").tolist() == [3, 0, 1, 1]
    assert of_group([2, 2], "reinforce").tolist() == [2, 2]


@pytest.mark.covers("D13")
@pytest.mark.parametrize("scale", ["group", "batch", "none", "rloo"])
def test_equal_rewards_are_exactly_zero(scale):
    for rewards in (
        [0.35] * 7,
        [0.1] * 3 + [None],
        [1e6 / 3] * 8,
        [0.0] * 4,
        [-7.7] * 5,
        [1 / 3, 2 / 3 - 1 / 3, 1 - 2 / 3],
    ):
        assert (of_group(rewards, scale) == 0).all(), rewards


@pytest.mark.covers("D13")
def test_what_rounding_leaves_of_equal_rewards_is_not_divided_by_itself():
    """A sum of rewards by different functions differs in its last bit."""
    one = np.float32(0.35)
    rewards = [one] * 7 + [np.nextafter(one, np.float32(1))]
    assert len(set(rewards)) == 2 and np.std(rewards, ddof=1) > 0
    assert (of_group(rewards) == 0).all()
    # The smallest difference that somebody meant is kept.
    assert abs(of_group([0.35] * 7 + [0.36])).max() > 1


@pytest.mark.covers("D13")
@pytest.mark.parametrize("rewards", [[3.5, None, None], [None, None], [None, 1e6]])
def test_a_group_with_one_score_or_none_teaches_nothing(rewards):
    for scale in ("group", "batch", "none", "rloo"):
        assert (of_group(rewards, scale) == 0).all()


@pytest.mark.covers("D13")
def test_a_group_of_one_is_refused():
    with pytest.raises(ConfigError, match="group_size=1, expected an integer of at least 2"):
        RolloutConfig(group_size=1)


@pytest.mark.covers("D13")
def test_the_share_of_groups_that_teach_nothing_is_known():
    rewards = np.array([[1, 1, 1], [0, 1, np.nan], [0.35, 0.35, np.nan], [np.nan] * 3])
    tokens, lengths = np.zeros((4, 3, 2), np.int32), np.ones((4, 3), int)
    found = Rollout(
        prompts=[None] * 4,
        texts=[[""] * 3] * 4,
        functions=("f",),
        tokens=tokens,
        lengths=lengths,
        stopped=lengths > 0,
        logprobs=tokens.astype(np.float32),
        scores=rewards[..., None],
        rewards=rewards,
        advantages=np.zeros((4, 3), np.float32),
    ).with_advantages("group")
    assert found.varied.tolist() == [False, True, False, False]
    assert found.metrics()["zero_std"] == 0.75


reward = st.none() | st.floats(-1e3, 1e3, width=32) | st.sampled_from([0, 1])


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.lists(reward, min_size=4, max_size=4), st.sampled_from(["group", "none", "rloo"]))
def test_advantages_of_any_group(rewards, scale):
    found = of_group(rewards, scale)
    known = [i for i, r in enumerate(rewards) if r is not None]
    assert np.isfinite(found).all() and all(found[i] == 0 for i in set(range(4)) - {*known})
    scale_of = max([1, *(abs(rewards[i]) for i in known)])
    assert abs(found.sum()) <= 1e-3 * scale_of
    for i in known:
        for j in known:
            assert not (found[i] > found[j] and rewards[i] < rewards[j])
    spread = np.std([rewards[i] for i in known], ddof=1) if len(known) > 1 else 0
    if spread > 1e-3 * scale_of:
        wanted = grpo_torch.group_advantages(rewards, scale)
        np.testing.assert_allclose(found, wanted, rtol=1e-2, atol=1e-3)


# --- importance_ratio ---


@pytest.mark.covers("D15")
@pytest.mark.parametrize("level", RATIO_LEVELS)
def test_the_same_policy_has_ratio_one_to_the_bit(level):
    logprobs = -np.float32(np.random.default_rng(0).exponential(5, (3, 4, 9)))
    mask = np.float32(np.random.default_rng(1).random((3, 4, 9)) < 0.6)
    assert (np.asarray(importance_ratio(logprobs, logprobs, mask, level)) == 1).all()


@pytest.mark.covers("D15")
@pytest.mark.parametrize("level", RATIO_LEVELS)
@pytest.mark.parametrize("gap", [21.0, 200.0, 1e4, 3e38, np.inf])
@pytest.mark.parametrize("sign", [1, -1])
def test_ratios_do_not_overflow_and_their_gradients_neither(level, gap, sign):
    old = np.float32([[-1, -2, -3]])
    new = old + np.float32([[sign * gap, 0, 0]])
    mask = np.float32([[1, 1, 0]])

    def loss(new):
        ratio = importance_ratio(new, old, mask, level)
        values = clipped_surrogate(ratio, jnp.float32([-2.0]), 0.2, 0.2)
        values += kl_penalty(new, old, importance_ratio(new, old, mask))
        return jnp.sum(values), ratio

    (value, ratio), grads = jax.value_and_grad(loss, has_aux=True)(new)
    assert np.isfinite(value) and np.isfinite(ratio).all() and np.isfinite(grads).all()
    limit = np.float32(np.exp(min(gap / (2 if level == "sequence" else 1), MAX_LOG_RATIO) * sign))
    np.testing.assert_allclose(ratio[0, 0], limit, rtol=1e-5)
    assert ratio[0, 2] == 1


@pytest.mark.covers("D15")
def test_a_log_prob_that_is_no_number_is_not_hidden():
    """It reaches the loss, and the step is skipped."""
    for level in RATIO_LEVELS:
        ratio = importance_ratio(
            np.float32([[np.nan, 0]]), np.zeros((1, 2)), np.ones((1, 2)), level
        )
        assert np.isnan(ratio[0, 0])


@pytest.mark.covers("D14")
def test_masked_tokens_have_ratio_one_and_no_gradient_whatever_they_are():
    old, mask = np.float32([[-1, -2, np.inf], [5, 6, np.nan]]), np.float32([[1, 1, 0], [0, 0, 0]])
    for level in RATIO_LEVELS:
        both = lambda new: (lambda r: (jnp.sum(r), r))(importance_ratio(new, old, mask, level))
        grads, ratio = jax.grad(both, has_aux=True)(jnp.float32([[-1, -2, 7], [-np.inf, 0, 1e9]]))
        assert (ratio == 1).all() and (np.asarray(grads) * (1 - mask) == 0).all()


def test_a_sequences_ratio_is_the_geometric_mean_of_its_tokens():
    rng = np.random.default_rng(2)
    new, old = rng.normal(size=(2, 5, 7)).astype(np.float32)
    mask = np.float32(np.arange(7) < np.array([7, 1, 3, 0, 6])[:, None])
    ratios = [
        np.prod(np.exp(n - o)[m > 0]) ** (1 / max(m.sum(), 1)) for n, o, m in zip(new, old, mask)
    ]
    found = importance_ratio(new, old, mask, "sequence")
    np.testing.assert_allclose(found, np.where(mask > 0, np.array(ratios)[:, None], 1), rtol=1e-5)


# --- clipped_surrogate, kl_penalty, sampler_weight ---


@pytest.mark.parametrize(
    "ratio, advantage, dual, loss, slope",
    [
        (1.0, 2, None, -2, -2),
        (1.25, 2, None, -2.5, -2),  # between the two bounds of 0.8 and 1.3
        (1.5, 2, None, -2.6, 0),
        (0.5, 2, None, -1, -2),  # not clipped: the policy may go back
        (0.5, -2, None, 1.6, 0),
        (1.5, -2, None, 3, 2),
        (9.0, -2, None, 18, 2),
        (9.0, -2, 4.0, 8, 0),
        (9.0, 2, 4.0, -2.6, 0),
        (3.0, -2, 4.0, 6, 2),
        (1.5, 0, None, 0, 0),
    ],
)
def test_the_surrogate_by_cases(ratio, advantage, dual, loss, slope):
    total = lambda r: jnp.sum(clipped_surrogate(r, jnp.float32([advantage]), 0.2, 0.3, dual))
    value, grad = jax.value_and_grad(total)(jnp.full((1, 1), ratio))
    np.testing.assert_allclose([value, grad[0, 0]], [loss, slope], rtol=1e-6)


@pytest.mark.covers("D15")
@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("epsilon", [0.2, 0.0])
def test_at_ratio_one_the_whole_gradient_passes(advantage, epsilon):
    """On-policy both sides of the minimum are equal, and with epsilon 0 at a corner of the clip too."""
    total = lambda r: jnp.sum(clipped_surrogate(r, jnp.float32([advantage]), epsilon, epsilon))
    assert jax.grad(total)(jnp.ones((1, 1)))[0, 0] == -advantage


def test_penalties_are_those_of_float64_also_near_the_reference():
    rng = np.random.default_rng(3)
    for size in (1e-3, 0.1, 3.0, 15.0):
        d = rng.normal(size=50) * size
        d = np.clip(d, -19, 19).astype(np.float32)
        ratio = np.float32(rng.random(50) + 0.5)
        exact = d.astype(np.float64)
        k3 = np.expm1(exact) - exact
        wanted = {"k1": -exact, "k2": exact**2 / 2, "k3": k3, "ratio_k3": ratio * k3}
        for kind in KLS:
            found = np.asarray(kl_penalty(np.zeros(50, np.float32), d, ratio, kind))
            room = 4e-7 * np.abs(d) * (kind in ("k3", "ratio_k3"))
            assert (np.abs(found - wanted[kind]) <= room + 1e-6 * np.abs(wanted[kind])).all(), kind


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.floats(-200, 0, width=32), st.floats(-200, 0, width=32))
def test_k3_is_never_negative_and_zero_at_the_reference(new, ref):
    assert kl_penalty(np.float32(new), np.float32(ref), 1.0, "k3") >= 0
    for kind in KLS:
        assert kl_penalty(np.float32(new), np.float32(new), 1.0, kind) == 0
        assert np.isfinite(kl_penalty(np.float32(new), np.float32(ref), 1.0, kind))


def test_on_policy_k2_and_ratio_k3_have_the_same_gradient_for_each_token():
    new, ref = np.float32([-1, -2, -0.1, -5]), np.float32([-2, -0.5, -0.1, -9])

    def grad(kind):
        ratio = lambda x: importance_ratio(x, new, np.ones(4))
        return jax.grad(lambda x: jnp.sum(kl_penalty(x, ref, ratio(x), kind)))(new)

    np.testing.assert_allclose(grad("ratio_k3"), grad("k2"), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grad("k2"), new - ref, rtol=1e-5)


def test_the_samplers_weight_is_cut_and_constant():
    old, sampler = np.float32([[-1, -1, -1, -1]]), np.float32([[-1.1, -3, -0.5, -1e30]])
    mask = np.float32([[1, 1, 1, 0]])
    weight = lambda old: jnp.sum(sampler_weight(old, sampler, mask, 2.0))
    found = sampler_weight(old, sampler, mask, 2.0)
    np.testing.assert_allclose(found, [[np.exp(0.1), 2, np.exp(-0.5), 1]], rtol=1e-6)
    assert not np.asarray(jax.grad(weight)(old)).any()
    assert sampler_weight(old, -np.full((1, 4), np.inf), mask, 1e12)[0, 0] == np.float32(np.exp(20))


# --- aggregate ---


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.covers("D14")
def test_empty_completions(kind):
    """Those of a batch, and a batch of nothing else; NaN where masked stays out."""
    values = np.full((2, 3, 4), np.nan, np.float32)
    total, weight = aggregate(values, np.zeros((2, 3, 4)), np.ones((2, 3)), kind, 4)
    assert total == 0 and weight == {"dapo": 0, "bnpo": 0, "grpo": 6, "dr_grpo": 24}[kind]
    values[0, 0, :2] = 3, 5
    mask = np.isfinite(values).astype(np.float32)
    total, weight = aggregate(values, mask, np.ones((2, 3)), kind, 4)
    expected = {"dapo": 8 / 2, "bnpo": 4, "grpo": 4 / 6, "dr_grpo": 8 / 24}[kind]
    assert total / weight == np.float32(expected)
    grads = jax.grad(lambda v: aggregate(v, mask, np.ones((2, 3)), kind, 4)[0])(values)
    assert np.isfinite(grads).all() and not (np.asarray(grads) * (1 - mask)).any()


@pytest.mark.parametrize("kind", LOSSES)
def test_the_width_of_a_batch_changes_nothing(kind):
    """Least of all dr_grpo's constant: a step's width is that of its longest completion."""
    values, mask = np.float32([[[3, 5, 0, 0], [1, 0, 0, 0]]]), np.float32(
        [[[1, 1, 0, 0], [1, 0, 0, 0]]]
    )
    found = []
    for width in (2, 3, 4):
        given = values[..., :width], mask[..., :width], np.ones((1, 2)), kind, 10
        total, weight = aggregate(*given)
        found.append(float(total / weight))
    expected = {"dapo": 9 / 3, "bnpo": 3, "grpo": (4 + 1) / 2, "dr_grpo": 9 / (2 * 10)}[kind]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.covers("D14")
@pytest.mark.parametrize("kind", LOSSES)
def test_a_completion_that_is_one_stop_token(kind):
    values, mask = np.float32([[[7, 0, 0]]]), np.float32([[[1, 0, 0]]])
    total, weight = aggregate(values, mask, np.ones((1, 1)), kind, 3)
    assert total / weight == np.float32(7 / 3 if kind == "dr_grpo" else 7)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(st.data())
def test_parts_add_up_and_rows_of_zeros_weigh_nothing(data):
    lengths = np.array(data.draw(st.lists(st.integers(0, 5), min_size=6, max_size=6)))
    counts = np.float32(data.draw(st.lists(st.booleans(), min_size=6, max_size=6)))
    mask = np.float32(np.arange(5) < (lengths * (counts > 0))[:, None])
    values = np.random.default_rng(4).normal(size=(6, 5)).astype(np.float32)
    for kind in ("dapo", "grpo", "dr_grpo"):
        of = lambda at: np.array(aggregate(values[at], mask[at], counts[at], kind, 5))
        whole = of(slice(None))
        np.testing.assert_allclose(of(slice(0, 2)) + of(slice(2, 6)), whole, rtol=1e-5, atol=1e-5)
        pad = lambda x: np.concatenate([x, np.zeros((3, *x.shape[1:]), x.dtype)])
        padded = aggregate(pad(values), pad(mask), pad(counts), kind, 5)
        np.testing.assert_allclose(padded, whole, rtol=1e-6, atol=1e-6)


# --- GRPOConfig ---

BAD = {
    "loss": "ppo",
    "beta": -0.1,
    "kl": "k4",
    "epsilon_low": 1.0,
    "epsilon_high": float("nan"),
    "dual_clip": 0.9,
    "ratio_level": "word",
    "tis_cap": 0,
    "mask_truncated": 1,
    "temperature": 0.0,
    "max_completion_len": 0,
    "learning_rate": -1.0,
    "micro_batch_size": 0,
}


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(ConfigError) as error:
        GRPOConfig(**BAD)
    for name, value in BAD.items():
        assert f"{name}={value!r}" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "name, value",
    [
        *BAD.items(),
        ("beta", float("inf")),
        ("beta", True),
        ("beta", "0.1"),
        ("epsilon_low", -0.1),
        ("epsilon_high", -0.1),
        ("dual_clip", 1.2),
        ("dual_clip", float("inf")),
        ("tis_cap", float("nan")),
        ("tis_cap", -1.0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("max_completion_len", 3.0),
        ("max_completion_len", True),
        ("loss", None),
    ],
)
def test_each_bad_number_is_named(name, value):
    with pytest.raises(ConfigError, match=f"{name}="):
        GRPOConfig(**{name: value})


def test_good_numbers_at_their_edges():
    GRPOConfig(epsilon_low=0.0, epsilon_high=0, dual_clip=1.01, tis_cap=1, beta=0)
    GRPOConfig(max_completion_len=1, temperature=1e-3, mask_truncated=True)
    default = GRPOConfig()
    assert (default.loss, default.beta, default.epsilon_low, default.epsilon_high) == (
        "dapo",
        0,
        0.2,
        0.2,
    )
    assert (default.clip_norm, default.temperature) == (1.0, 1.0)
    for lora, rate in ((None, 1e-6), (LoRAConfig(), 1e-5)):
        assert GRPOTrainer(None, default, lora).config.learning_rate == rate
    assert GRPOConfig(epsilon_low=0.1).epsilon_high == 0.1
