"""pass@k, intervals, and the evaluation of a task, against brute force and against plain generation."""

import itertools
import json
import math
import random

import jax
import numpy as np
import pytest

from generate import generate
from models.llama.decoding import GenerationConfig
from models.llama.load import load_checkpoint
from models.llama.model import LLaMa
from models.llama.tokenizer import load_tokenizer
from sampling import Greedy, TopP
from tests import cli
from trainers.rewards import accuracy
from trainers.rewards.accuracy import EvaluationConfig, bootstrap_interval, evaluate_task
from trainers.rewards.accuracy import _measures, mean_interval, pass_at_k
from trainers.rewards.failures import Failure
from trainers.rewards.functions import Reward
from trainers.rewards.pool import RewardPool, Scores
from trainers.rewards.tasks import Task
from trainers.rollout import Prompt
from utils.errors import ConfigError

# pass@k ------------------------------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([i < c for i in range(n)], k))
            assert pass_at_k(n, c, k) == sum(map(any, subsets)) / len(subsets), (n, c, k)


def test_pass_at_k_is_unbiased():
    # Over all that n samples may give, its mean is the probability that one of k is right.
    for n, k, p in ((8, 1, 0.15), (8, 8, 0.15), (10, 4, 0.5), (12, 3, 0.01)):
        chances = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
        mean = sum(chance * pass_at_k(n, c, k) for c, chance in enumerate(chances))
        assert mean == pytest.approx(1 - (1 - p) ** k, rel=1e-12)


def test_pass_at_k_of_many_samples_is_exact():
    assert pass_at_k(10_000, 1, 100) == 0.01
    assert pass_at_k(10_000, 9_901, 100) == 1
    assert pass_at_k(1000, 0, 1000) == 0


@pytest.mark.parametrize("n, c, k", [(3, 4, 1), (3, -1, 1), (3, 1, 4), (3, 1, 0), (0, 0, 1)])
def test_pass_at_k_of_what_cannot_be_is_refused(n, c, k):
    with pytest.raises(ConfigError, match=f"n={n}, c={c}, k={k}"):
        pass_at_k(n, c, k)


# Intervals ---------------------------------------------------------------------------------------


def test_the_interval_is_that_of_all_resamples_where_they_can_be_listed():
    values = [0.0, 0.3, 1.0, 5.0]
    means = [np.mean(drawn) for drawn in itertools.product(values, repeat=len(values))]
    for level in (0.95, 0.8, 0.5):
        expected = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
        found = bootstrap_interval(values, level, samples=200_000)
        np.testing.assert_allclose(found, expected, atol=0.03)


def test_the_interval_of_many_prompts_is_the_normal_one():
    p, n = 0.3, 1000
    values = [1.0] * int(n * p) + [0.0] * int(n * (1 - p))
    half = 1.959964 * math.sqrt(p * (1 - p) / n)
    np.testing.assert_allclose(bootstrap_interval(values), [p - half, p + half], atol=2e-3)


def test_the_interval_holds_the_true_mean_as_often_as_it_says():
    rng, held = np.random.default_rng(0), 0
    for trial in range(300):
        low, high = bootstrap_interval(rng.binomial(8, 0.3, 100) / 8, samples=500, seed=trial)
        held += low <= 0.3 <= high
    assert 0.915 < held / 300 < 0.975


def test_the_interval_does_not_change_from_one_call_to_the_next_and_may_be_of_one_prompt():
    values = np.random.default_rng(0).random(20)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values) != bootstrap_interval(values, seed=1)
    # samples need not be a multiple of what is drawn at once
    low, high = bootstrap_interval(values, samples=1)
    assert low == high != values.mean()
    assert bootstrap_interval(values, samples=1001) != bootstrap_interval(values, samples=1000)
    assert bootstrap_interval([0.25]) == bootstrap_interval([0.25] * 9) == (0.25, 0.25)


@pytest.mark.covers("N5")
def test_the_interval_of_0_and_1_is_wilsons():
    statsmodels = {(0, 6): (0, 0.3903343), (6, 6): (0.6096657, 1), (3, 10): (0.1077913, 0.6032219)}
    for (right, n), expected in statsmodels.items():
        values = [1.0] * right + [0.0] * (n - right)
        np.testing.assert_allclose(mean_interval(values), expected, atol=1e-6)
    assert mean_interval([0.0] * 200) == pytest.approx((0, 0.0188453), abs=1e-6)
    # Equal shares say little; of what is not within [0, 1] no bound is known.
    assert mean_interval([0.5] * 4) == mean_interval([0.0, 1.0] * 2)
    assert mean_interval([2.0] * 4) == (2.0, 2.0)
    values = np.random.default_rng(0).random(20)
    assert mean_interval(values) == bootstrap_interval(values)
    measures = _measures(np.zeros((6, 4)), (1, 4))
    for name in ("mean", "pass@1", "pass@4"):
        assert (measures[name]["low"], round(measures[name]["high"], 3)) == (0.0, 0.39)


# Evaluation --------------------------------------------------------------------------------------


class Pool(RewardPool):
    """Calls functions in this process; None in a list becomes NaN, as RewardPool has it."""

    def __init__(self, task, failures=()):
        super().__init__(task.rewards)
        self._functions = [reward.function for reward in task.rewards]
        self._told, self.calls = list(failures), []

    def __call__(self, prompts, completions, completion_ids, columns, group_size):
        self.calls.append((prompts, completions, completion_ids, columns, group_size))
        told = [self._told.pop(0)] if prompts and self._told else []
        self._failures = [Failure("reward 'f'", "on", what, 0) for what in told]
        values = [f(prompts, completions, completion_ids, **columns) for f in self._functions]
        values = np.asarray(values, np.float64)
        return Scores(values=values, failed=np.zeros(values.shape, bool))


def even(prompts, completions, completion_ids, **_):
    """Right where the ids' sum is a multiple of 3; half right where it is one less."""
    return [{0: 1.0, 2: 0.5}.get(sum(ids) % 3, 0.0) for ids in completion_ids]


def picky(prompts, completions, completion_ids, **_):
    """Cannot score the first prompt, nor completions with an "e"."""
    rows = zip(prompts, completions)
    return [None if "e" in text or prompt == "p0" else float("a" in text) for prompt, text in rows]


@pytest.fixture(scope="module")
def loaded():
    """(model, params, tokenizer)."""
    config, params = load_checkpoint(cli.checkpoint(), decoding=True)
    return LLaMa(config), params, load_tokenizer(cli.checkpoint())


LENGTHS = (3, 16, 9, 4, 11)


def task(lengths=LENGTHS, functions=(even, picky)) -> Task:
    """Prompts of random tokens."""
    rng = random.Random(0)
    prompts = (
        Prompt(text=f"p{i}", ids=tuple(rng.choices(range(3, 90), k=n)), columns={"number": i})
        for i, n in enumerate(lengths)
    )
    rewards = (Reward(name=f.__name__, function=f, weight=w) for f, w in zip(functions, (2.0, 0.5)))
    return Task(name="random", prompts=tuple(prompts), rewards=tuple(rewards))


CONFIG = EvaluationConfig(samples=4, k=(1, 3, 4), max_completion_len=40, batch_size=2, seed=5)


def evaluated(loaded, of=None, pool=None, **config):
    """(what evaluate_task returns, the rows that it wrote)."""
    of, rows = of or task(), []
    config = EvaluationConfig(**dict(vars(CONFIG)) | config)
    return evaluate_task(*loaded, of, pool or Pool(of), config, write=rows.append), rows


@pytest.fixture(scope="module")
def whole(loaded):
    return evaluated(loaded)


def test_completions_are_those_of_generate_up_to_a_stop_and_within_the_vocabulary(loaded, whole):
    model, params, tokenizer = loaded
    found, rows = whole
    limit = tokenizer.vocab_size
    assert limit < model.config.vocab_size  # so there are rows that must not be sampled
    config = GenerationConfig(max_new_tokens=40, n=4, stop_ids=frozenset({1}), vocab_limit=limit)
    key = jax.random.key(5)
    for i, prompt in enumerate(task().prompts):
        keys = jax.random.fold_in(key, i)[None]
        done = generate(model, params, [list(prompt.ids)], TopP(), config, key=keys)
        for j, row in enumerate(rows[4 * i : 4 * i + 4]):
            assert (row["prompt"], row["sample"], row["ids"]) == (f"p{i}", j, done.row(j))
            stopped = done.finish_reason[j] == "stop"
            said = done.row(j)[: done.lengths[j] - stopped]
            assert row["completion"] == tokenizer.decode(said, skip_special=True)
            assert row["finish_reason"] == done.finish_reason[j]
    assert len(rows) == 20
    assert found["mean_length"] == np.mean([len(row["ids"]) for row in rows])
    cut = [row for row in rows if row["finish_reason"] == "length"]
    assert 0 < len(cut) < 20 and found["truncated"] == len(cut) / 20
    assert all(len(row["ids"]) == 40 and 1 not in row["ids"] for row in cut)
    assert all(row["ids"].index(1) == len(row["ids"]) - 1 for row in rows if row not in cut)


def test_rewards_see_prompts_texts_ids_and_columns_in_groups(loaded):
    of = task()
    pool = Pool(of)
    _, rows = evaluated(loaded, of, pool)
    prompts, texts, ids, numbers = ([] for _ in range(4))
    assert pool.calls[0] == ([], [], [], {"number": []}, 1)  # whether they take these columns
    for call in pool.calls[1:]:
        assert call[4] == 4 and len(call[0]) in (8, 4)
        for found, part in zip((prompts, texts, ids, numbers), (*call[:3], call[3]["number"])):
            found += part
    assert prompts == [row["prompt"] for row in rows]
    assert texts == [row["completion"] for row in rows]
    assert ids == [row["ids"] for row in rows]
    assert numbers == [i for i in range(5) for _ in range(4)]


def brute(rows, name, k):
    """(mean of the prompts' means, pass@k, unscorable rows) of what was written."""
    groups = [rows[i : i + 4] for i in range(0, len(rows), 4)]
    groups = [[r["scores"][name] for r in g if r["scores"][name] is not None] for g in groups]
    means = [sum(g) / len(g) for g in groups if g]
    passes = []
    for g in groups:
        if subsets := list(itertools.combinations([score >= 1 for score in g], k)):
            passes.append(sum(map(any, subsets)) / len(subsets))
    return means, passes, 20 - sum(map(len, groups))


def test_the_measures_are_those_of_the_scores_that_were_written(whole):
    found, rows = whole
    for function in (even, picky):
        name = function.__name__
        for row in rows:
            score = function([row["prompt"]], [row["completion"]], [row["ids"]])[0]
            assert row["scores"][name] == score
        measures = found["rewards"][name]
        assert list(measures) == ["mean", "pass@1", "pass@3", "pass@4", "unscorable"]
        for k in (1, 3, 4):
            means, passes, unscorable = brute(rows, name, k)
            for values, measure in ((means, measures["mean"]), (passes, measures[f"pass@{k}"])):
                assert measure["prompts"] == len(values)
                if values:
                    assert measure["value"] == pytest.approx(np.mean(values))
                    assert (measure["low"], measure["high"]) == mean_interval(values)
            assert measures["unscorable"] == unscorable
    # What cannot be scored is left out, of a mean, and where too few are left of pass@k too.
    picked = found["rewards"]["picky"]
    assert picked["mean"]["prompts"] == 4 and picked["unscorable"] > 4
    assert picked["pass@4"]["prompts"] < picked["pass@1"]["prompts"] == 4
    assert found["rewards"]["even"]["unscorable"] == 0
    json.dumps(found, allow_nan=False)


def test_the_total_is_the_weighted_sum_of_what_could_be_scored(whole):
    found, rows = whole
    total = lambda s: 2.0 * s["even"] + 0.5 * (s["picky"] or 0.0)
    assert found["total"]["mean"]["value"] == pytest.approx(
        np.mean([total(r["scores"]) for r in rows])
    )
    assert found["total"]["mean"]["prompts"] == 5 and found["total"]["unscorable"] == 0


def test_nothing_can_be_scored(loaded):
    none = lambda prompts, completions, completion_ids, **_: [None] * len(prompts)
    found, rows = evaluated(loaded, task(functions=[none]))
    (measures,) = found["rewards"].values()
    nothing = {"value": None, "low": None, "high": None, "prompts": 0}
    assert measures == {"unscorable": 20} | dict.fromkeys(
        ("mean", "pass@1", "pass@3", "pass@4"), nothing
    )
    assert all(list(row["scores"].values()) == [None] for row in rows)


def test_the_batch_size_changes_nothing(loaded, whole):
    timed = ("batch_size", "seconds", "tokens_per_s")
    of = lambda found: {name: value for name, value in found.items() if name not in timed}
    for batch_size in (1, 100):
        found, rows = evaluated(loaded, batch_size=batch_size)
        assert rows == whole[1] and of(found) == of(whole[0])
    assert evaluated(loaded, seed=6)[1] != whole[1]


def test_every_batch_has_the_shape_of_the_first(loaded, monkeypatch):
    sizes = []
    spy = lambda *args, **options: sizes.append(len(args[2])) or generate(*args, **options)
    monkeypatch.setattr(accuracy, "generate", spy)
    assert evaluated(loaded)[0]["prompts"] == 5 and sizes == [2, 2, 2]


def test_equal_prompts_get_samples_of_their_own(loaded):
    twice = task(lengths=(6,))
    twice = Task(name="twice", prompts=twice.prompts * 2, rewards=twice.rewards)
    rows = evaluated(loaded, twice)[1]
    assert len({tuple(row["ids"]) for row in rows}) == 8


def test_temperature_0_is_greedy_and_the_prompts_are_reported(loaded):
    model, params, _ = loaded
    of, calls = task(), []
    config = EvaluationConfig(temperature=0, max_completion_len=9, batch_size=2)
    found = evaluate_task(*loaded, of, Pool(of), config, report=lambda *call: calls.append(call))
    for prompt, ids in zip(
        of.prompts, evaluated(loaded, of, temperature=0.0, samples=1, k=(1,))[1]
    ):
        done = generate(
            model, params, [list(prompt.ids)], Greedy(), GenerationConfig(max_new_tokens=40)
        )
        assert ids["ids"] == done.row(0)
    assert calls == [("prompts", 0, 5), ("prompts", 2, 5), ("prompts", 4, 5)]
    assert found["task"] == "random" and found["digest"] == of.digest and found["prompts"] == 5
    assert found["temperature"] == 0 and found["samples"] == 1
    assert found["tokens_per_s"] > 0 and {"generation", "rewards"} < found["seconds"].keys()


def test_failures_of_all_batches_are_returned(loaded):
    of = task()
    found, _ = evaluated(loaded, of, Pool(of, ["first", "second"]))
    assert found["failures"] == ["reward 'f' on: first", "reward 'f' on: second"]


def test_what_does_not_fit_the_context_is_said_before_anything_is_sampled(loaded, monkeypatch):
    monkeypatch.setattr(accuracy, "generate", lambda *_, **__: pytest.fail("it samples"))
    with pytest.raises(ConfigError, match="longest prompt has 16 tokens.*241: 257 exceed.*256"):
        evaluated(loaded, max_completion_len=241)
    with pytest.raises(pytest.fail.Exception):
        evaluated(loaded, max_completion_len=240)


@pytest.mark.covers("C4")
def test_all_that_is_wrong_with_a_config_is_said_at_once():
    wrong = dict(samples=0, max_completion_len=0, batch_size=1.5, seed=-1, temperature=float("nan"))
    with pytest.raises(ConfigError) as caught:
        EvaluationConfig(**wrong, k=(0,))
    for name in (*wrong, "k"):
        assert f"{name}=" in str(caught.value)
    for wrong, pattern in (
        (dict(samples=4, k=(1, 5)), "k=5, expected 1 to samples .4."),
        (dict(samples=2, temperature=0.0), "samples=2 at temperature 0"),
        (dict(temperature=-1), "temperature=-1"),
        (dict(temperature=math.inf), "temperature=inf"),
        (dict(temperature="hot"), "temperature='hot'"),
        (dict(samples=True), "samples=True"),
    ):
        with pytest.raises(ConfigError, match=pattern):
            EvaluationConfig(**wrong)
