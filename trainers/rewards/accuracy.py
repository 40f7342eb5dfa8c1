"""Accuracy of a model on a task: means of rewards and pass@k over its prompts, with intervals."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.llama.decoding import Completions, GenerationConfig
from models.llama.generation import generate, random_key
from models.llama.model import LLaMa, Params, for_decoding
from models.llama.tokenizer import Tokenizer
from sampling import TopP
from trainers.environments.episodes import Played
from trainers.environments.player import Player
from trainers.grpo_trainer import GRPOTrainer
from trainers.loop import Evaluation
from trainers.on_policy import decoding_params
from trainers.rewards.pool import RewardPool, reward_rows
from trainers.rewards.tasks import Task
from trainers.rollout import Prompt, check_context
from trainers.trainer import TrainState
from utils.clock import Lap, PhaseClock
from utils.errors import ConfigError, is_int
from utils.fields import Config, field, integer, number
from utils.memory import return_freed_memory

# A completion is right if its score is at least this.
SOLVED = 1.0

# Number of resamples drawn at once; with 1000 prompts they take 8 MB.
_CHUNK = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Config):
    """Samples and measures of a task's evaluation."""

    samples: int = field(1, "completions per prompt", integer(1, 1 << 16))
    k: tuple[int, ...] = field((1,), "k's of pass@k, at most samples")
    temperature: float = field(1.0, "sampling temperature; 0: greedy, one sample", number(0))
    max_completion_len: int = field(
        64, "tokens per completion; a longer one is cut, and scored as it is", integer(1, 1 << 24)
    )
    batch_size: int = field(8, "prompts at once", integer(1, 1 << 16))
    seed: int = field(0, "seed of the samples", integer(0, 2**32 - 1))

    def problems(self) -> list[str]:
        out = super().problems()
        if is_int(self.samples):
            if wrong := [k for k in self.k if not is_int(k) or not 1 <= k <= self.samples]:
                out.append(f"k={wrong[0]!r:.40}, expected 1 to samples ({self.samples})")
            if self.temperature == 0 and self.samples > 1:
                out.append(
                    f"samples={self.samples} at temperature 0 would all be the same; expected 1"
                )
        return out


def pass_at_k(n: int, c: int, k: int) -> float:
    """An unbiased estimate of the probability that at least one of k samples is right.

    It is 1 - (n - c choose k) / (n choose k), in integers. Source: Chen et al. (2107.03374), equation 1.

    Args:
        n: samples.
        c: the right ones among them, 0 to n.
        k: 1 to n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ConfigError(f"pass@k of n={n}, c={c}, k={k}: expected 0 <= c <= n and 1 <= k <= n")
    everything = math.comb(n, k)
    return (everything - math.comb(n - c, k)) / everything


def bootstrap_interval(
    values: Sequence[float], level: float = 0.95, samples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """An interval for the mean over all prompts of a task, from some of them, by percentile bootstrap.

    Prompts are resampled, so the interval covers both the choice of prompts and the luck of their
    samples. It cannot see what was not drawn: `mean_interval` is for any values.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 13.3.

    Args:
        values: one per prompt; none is NaN.
        level: share of the resampled means within the interval.
        samples: number of resamples.
        seed: the same seed gives the same interval.

    Returns:
        (low, high).
    """
    values = np.asarray(values, np.float64)
    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, samples, _CHUNK):
        shape = (min(_CHUNK, samples - start), len(values))
        means.append(values[rng.integers(len(values), size=shape)].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def wilson_interval(mean: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval for a probability of which n draws have this mean; (0, 0.39) for 0 of 6.

    Source: Wilson (1927); Brown, Cai and DasGupta (2001), equation 4. z is that of 95 %.
    """
    middle = mean + z * z / (2 * n)
    half = z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return (0.0 if mean == 0 else low, 1.0 if mean == 1 else high)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """A 95 % interval for the mean over all prompts of a task, from one value for each of some.

    Wilson's for values of 0 and 1, and where all are equal between them: nothing within [0, 1] varies
    more. Otherwise the bootstrap's; of equal values outside [0, 1] it is only that value.
    """
    values = np.asarray(values, np.float64)
    inside = values.min() >= 0 and values.max() <= 1
    if np.isin(values, (0, 1)).all() or inside and np.ptp(values) == 0:
        return wilson_interval(float(values.mean()), len(values))
    return bootstrap_interval(values)


def evaluate_task(
    model: LLaMa,
    params: Params,
    tokenizer: Tokenizer,
    task: Task,
    pool: RewardPool | Player,
    config: EvaluationConfig,
    *,
    report: Callable[[str, int, int], None] | None = None,
    write: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Samples completions of every prompt of a task and scores them.

    The same seed gives the same completions, whatever the batch size.

    Args:
        model: with its context length.
        params: its parameters, as for `generate`.
        tokenizer: the model's.
        task: prompts and rewards.
        pool: runs the task's rewards, or plays its episodes.
        config: see EvaluationConfig.
        report: called with ("prompts", done, total).
        write: called with each completion: prompt, sample, completion, ids, finish_reason, and
            scores by the reward's name, None where it is unscorable.

    Returns:
        `rewards`: for each reward `mean` (of the prompts' means), `pass@k` and the number of
        `unscorable` rows, which are left out of both; `total`: that of the weighted sum. Each
        measure is {value, low, high, prompts}: 95 % interval, and prompts that count; all null if
        none does. `truncated`: the share of completions without a stop; `mean_length` in tokens;
        `tokens_per_s` without compilation; `seconds` by phase; `failures` of rewards, as texts;
        and the task and the config.

    Raises:
        ConfigError: a prompt and max_completion_len exceed the context, or a reward cannot take the
            task's columns.
        TrainError: see RewardPool.
    """
    check_context(task.prompts, config.max_completion_len, model.config.max_seq_len)
    # A call without rows shows, before anything is sampled, whether the rewards take these columns.
    if task.environment is None:
        pool([], [], [], reward_rows(task.prompts[:1], 0)[1], 1)
    params = for_decoding(params)
    size = min(config.batch_size, len(task.prompts))
    scores, totals, lengths, cut, failures = [], [], [], [], []
    with contextlib.closing(PhaseClock()) as clock:
        for start in range(0, len(task.prompts), size):
            if report is not None:
                report("prompts", start, len(task.prompts))
            # The last batch is filled up, since another size would compile again.
            indices = np.minimum(np.arange(start, start + size), len(task.prompts) - 1)
            prompts = task.prompts[start : start + size]
            with clock("generation"):
                asked, *how = _asked(model, tokenizer, task, config, indices)
                if task.environment is not None:
                    played = pool.play(model, params, asked, *how)[: len(prompts) * config.samples]
                else:
                    ids, (*how, key) = [prompt.ids for prompt in asked], how
                    done = generate(model, params, ids, *how, key=key)
            with clock("rewards"):
                if task.environment is not None:
                    records, *found = _scored_episodes(played, config.samples)
                else:
                    how = task.reader(tokenizer), pool
                    records, *found = _scored(prompts, config.samples, done, *how)
            scores.append(found[0])
            totals.append(found[1])
            failures += pool.failures
            lengths += [len(record["ids"]) for record in records]
            cut += [record["finish_reason"] == "length" for record in records]
            for record in records if write is not None else ():
                write(record)
        lap = clock.take()
    asked = {"task": task.name, "digest": task.digest, "prompts": len(task.prompts)}
    asked |= dataclasses.asdict(config)
    found = _measured(pool.names, np.concatenate(scores), np.concatenate(totals), config.k)
    found |= {"failures": failures, "truncated": float(np.mean(cut))}
    return asked | found | {"mean_length": float(np.mean(lengths))} | _speed(lap, sum(lengths))


def _speed(lap: Lap, tokens: int) -> dict[str, Any]:
    """`tokens_per_s` without compilation, and `seconds` by phase."""
    compilation = sum(lap.compiling.values())
    generation = max(lap.seconds["generation"] - compilation, 1e-9)
    return {
        "tokens_per_s": tokens / generation,
        "seconds": lap.seconds | {"compilation": compilation},
    }


class TaskEvaluation(Evaluation):
    """Completions of held-out prompts, scored by a task's rewards."""

    def __init__(
        self,
        trainer: GRPOTrainer,
        task: Task,
        tokenizer: Tokenizer,
        pool: RewardPool | Player,
        config: EvaluationConfig,
    ):
        self._trainer = trainer
        self._how = tokenizer, task, pool, config

    def evaluate(self, state: TrainState, frozen: Params) -> dict[str, float]:
        """`reward`, with the ends of its 95 % interval, each function's mean, and `failures`."""
        policy = decoding_params(self._trainer, state, frozen)
        found = evaluate_task(self._trainer.model, policy, *self._how)
        del policy
        return_freed_memory()
        total = found["total"]["mean"]
        values = {name: measures["mean"]["value"] for name, measures in found["rewards"].items()}
        values |= {"reward": total["value"], "reward_low": total["low"]}
        values |= {"reward_high": total["high"], "length_mean": found["mean_length"]}
        values |= self._how[2].report()
        return values | {"score": math.inf if total["value"] is None else -total["value"]}


def _asked(
    model: LLaMa, tokenizer: Tokenizer, task: Task, config: EvaluationConfig, indices: np.ndarray
) -> tuple[list[Prompt], TopP, GenerationConfig, jax.Array]:
    """(the prompts with these numbers, and how they are completed).

    Each number has its own key, so that equal prompts get different samples: the interval takes them
    for independent draws from the task.
    """
    key = random_key(config.seed)
    generation = GenerationConfig(
        max_new_tokens=config.max_completion_len,
        n=config.samples,
        stop_ids=tokenizer.stop_ids,
        vocab_limit=min(tokenizer.vocab_size, model.config.vocab_size),
    )
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(indices, jnp.uint32))
    prompts = [task.prompts[i] for i in indices]
    return prompts, TopP(temperature=config.temperature), generation, keys


def _scored(
    prompts: Sequence[Prompt], n: int, done: Completions, tokenizer: Tokenizer, pool: RewardPool
) -> tuple[list[dict[str, Any]], np.ndarray, np.ndarray]:
    """The rows of these prompts, of n samples each: (their records, [P, n, F] scores, [P, n] totals)."""
    rows = range(len(prompts) * n)  # later rows only fill up the batch
    texts, ids = [done.text(i, tokenizer) for i in rows], [done.row(i) for i in rows]
    scores, totals = pool.score(prompts, texts, ids, n)
    records = [
        {
            "prompt": prompts[i // n].text,
            "sample": i % n,
            "completion": texts[i],
            "ids": ids[i],
            "finish_reason": done.finish_reason[i],
            "scores": dict(zip(pool.names, map(_finite, scores[i]))),
        }
        for i in rows
    ]
    return records, scores.reshape(len(prompts), n, -1), totals.reshape(len(prompts), n)


def _scored_episodes(
    played: Sequence[Played], n: int
) -> tuple[list[dict[str, Any]], np.ndarray, np.ndarray]:
    """The same as `_scored`, of episodes."""
    records = [
        {
            "prompt": episode.prompt.text,
            "sample": i % n,
            "completion": episode.text,
            "ids": episode.ids,
            "finish_reason": "stop" if episode.stopped else "length",
            "scores": {"episode": _finite(episode.reward)},
            "episode": episode.record,
        }
        for i, episode in enumerate(played)
    ]
    totals = np.asarray([episode.reward for episode in played]).reshape(-1, n)
    return records, totals[..., None], totals


def _measured(names, scores: np.ndarray, totals: np.ndarray, ks: Sequence[int]) -> dict[str, Any]:
    """`rewards` and `total` of [prompts, samples, F] scores and [prompts, samples] weighted sums."""
    by_reward = zip(names, np.moveaxis(scores, -1, 0))
    rewards = {name: _measures(values, ks) for name, values in by_reward}
    return {"rewards": rewards, "total": _measures(totals, ())}


def _measures(scores_PN: np.ndarray, ks: Sequence[int]) -> dict[str, Any]:
    """Mean and pass@k of scores [prompts, samples], where NaN is unscorable."""
    groups = [row[~np.isnan(row)] for row in scores_PN]
    measures: dict[str, Any] = {"mean": _measure([g.mean() for g in groups if len(g)])}
    for k in ks:
        rates = [pass_at_k(len(g), int((g >= SOLVED).sum()), k) for g in groups if len(g) >= k]
        measures[f"pass@{k}"] = _measure(rates)
    return measures | {"unscorable": int(np.isnan(scores_PN).sum())}


def _measure(values: Sequence[float]) -> dict[str, Any]:
    if not len(values):
        return {"value": None, "low": None, "high": None, "prompts": 0}
    low, high = mean_interval(values)
    return {"value": float(np.mean(values)), "low": low, "high": high, "prompts": len(values)}


def _finite(score: float) -> float | None:
    return None if math.isnan(score) else float(score)
