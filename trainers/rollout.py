"""Rollouts on the host: completions with rewards and advantages, as batches and as lines of rollouts.jsonl.

Dimension key: B prompts, G completions of each (group_size), P prompt tokens, C completion tokens, F
reward functions.
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from models.llama.decoding import Detokenizer
from trainers.grpo_trainer import SCALES, group_advantages
from trainers.trainer import Batch
from utils.errors import ConfigError, DataError, is_int
from utils.fields import ALWAYS, CONFIG, Config, field, integer, number, one_of

_BY_TOKEN = ("logprobs", "old_logprobs", "ref_logprobs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig(Config):
    """Sampling of completions, and the number of updates on them.

    `refills` is dynamic sampling (DAPO, 2503.14476, section 3.2). After the first of several
    `iterations`, ratios are not 1. For `scale` see `group_advantages`.
    """

    prompts_per_step: int = field(8, "prompts per rollout", integer(1), resume=CONFIG)
    group_size: int = field(
        8,
        "completions per prompt",
        integer(2)._replace(
            expected="an integer of at least 2: one completion has no group to be better than"
        ),
        resume=CONFIG,
    )
    scale: str = field(
        "group",
        "advantages are divided by the deviation of a group or batch, or not at all",
        one_of(*SCALES),
        resume=CONFIG,
    )
    iterations: int = field(1, "passes over each rollout", integer(1), resume=CONFIG)
    mini_batches: int = field(
        1, "optimizer updates in each pass over a rollout", integer(1), resume=CONFIG
    )
    refills: int = field(
        0,
        "dynamic sampling: rounds that replace groups of equal rewards by further prompts",
        integer(0),
        resume=CONFIG,
    )
    branches: int | None = field(
        None,
        "completions that share one computation of their prompt, a divisor of group_size; None: all",
        integer(1),
        flag="",
        resume=ALWAYS,
    )
    top_p: float = field(
        1.0,
        "probability of the nucleus that is sampled from; other than 1 biases the ratio",
        number(above=0, most=1),
        resume=CONFIG,
    )
    top_k: int = field(
        0,
        "sample from this many likeliest tokens; other than 0 biases the ratio",
        integer(0),
        resume=CONFIG,
    )
    seed: int = field(
        0,
        "seed of the prompts' order, of sampling and of adapters",
        integer(0, 2**32 - 1),
        resume=CONFIG,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_p != 1 or self.top_k:
            warnings.warn(
                f"top_p={self.top_p} and top_k={self.top_k} sample from another distribution than "
                "the one that log-probs are of: importance ratios are biased",
                stacklevel=2,
            )

    def problems(self) -> list[str]:
        out = super().problems()
        group, branches = self.group_size, self.branches
        if is_int(branches) and branches > 0 and is_int(group) and group % branches:
            out.append(f"branches={branches}, expected a divisor of group_size ({group}), or None")
        if not out and self.prompts_per_step % self.mini_batches:
            out.append(
                f"mini_batches={self.mini_batches}, expected a divisor of prompts_per_step "
                f"({self.prompts_per_step})"
            )
        return out

    @property
    def updates(self) -> int:
        """Optimizer steps per rollout."""
        return self.iterations * self.mini_batches


def rows_at_once(micro_batch_size: Any, group_size: Any) -> tuple[Any, int | None]:
    """Completions at once as (rows at once, completions per row, see RolloutConfig.branches)."""
    both = is_int(micro_batch_size) and is_int(group_size)
    if not both or micro_batch_size < 1 or group_size < 1:
        return micro_batch_size, None  # the configs complain
    divisors = (n for n in range(min(micro_batch_size, group_size), 0, -1) if group_size % n == 0)
    branches = next(divisors)
    return max(micro_batch_size // branches, 1), branches


def check_context(prompts: Sequence["Prompt"], max_completion_len: int, context: int) -> None:
    """Raises ConfigError if the longest prompt and a completion exceed the model's context."""
    longest = max(len(prompt.ids) for prompt in prompts)
    if longest + max_completion_len > context:
        raise ConfigError(
            f"the longest prompt has {longest} tokens and max_completion_len={max_completion_len}: "
            f"{longest + max_completion_len} exceed the model's context of {context}; shorten either"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt.

    Attributes:
        text: as rewards see it; of a conversation, its last user's message.
        ids: as the model reads it, with the tokens that start an assistant's answer.
        columns: the other fields of its row, for rewards.
    """

    text: str
    ids: tuple[int, ...]
    columns: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout:
    """Completions with their rewards and advantages.

    Attributes:
        prompts: B.
        texts: B lists of G.
        functions: F names of reward functions.
        tokens: [B, G, C] int32, zeros after a completion's length.
        lengths: [B, G], up to and including the stop token.
        stopped: [B, G] bool, False where the length limit came first.
        logprobs: [B, G, C] float32, the sampler's; 0 after a completion's length.
        scores: [B, G, F] float64, NaN where a function gave none.
        rewards: [B, G] float64, weighted sums; NaN where unscorable.
        advantages: [B, G] float32.
        old_logprobs, ref_logprobs: [B, G, C] float32, the trainer's before the first update and the
            reference's, where they are needed.
    """

    prompts: Sequence[Prompt]
    texts: Sequence[Sequence[str]]
    functions: tuple[str, ...]
    tokens: np.ndarray
    lengths: np.ndarray
    stopped: np.ndarray
    logprobs: np.ndarray
    scores: np.ndarray
    rewards: np.ndarray
    advantages: np.ndarray
    old_logprobs: np.ndarray | None = None
    ref_logprobs: np.ndarray | None = None

    @property
    def valid(self) -> np.ndarray:
        """[B, G] bool: completions that have a reward."""
        return ~np.isnan(self.rewards)

    @property
    def varied(self) -> np.ndarray:
        """[B] bool: groups whose rewards are not all equal."""
        return (self.advantages != 0).any(axis=1)

    def with_advantages(self, scale: str) -> "Rollout":
        """The rollout with advantages by `group_advantages`."""
        rewards = np.nan_to_num(self.rewards).astype(np.float32)
        advantages = group_advantages(rewards, self.valid, scale)
        return dataclasses.replace(self, advantages=np.asarray(advantages))

    def take(self, groups: Sequence[int]) -> "Rollout":
        """The rollout of some of the groups."""
        groups = list(groups)

        def some(x):
            if isinstance(x, np.ndarray):
                return x[groups]
            return x if x is None or isinstance(x, tuple) else [x[i] for i in groups]

        fields = dataclasses.fields(self)
        return Rollout(**{f.name: some(getattr(self, f.name)) for f in fields})

    def joined(self, other: "Rollout") -> "Rollout":
        """The rollout of both rollouts' groups."""

        def both(x, y):
            if isinstance(x, np.ndarray):
                return np.concatenate([x, y])
            return x if x is None or isinstance(x, tuple) else [*x, *y]

        names = [f.name for f in dataclasses.fields(self)]
        return Rollout(**{n: both(getattr(self, n), getattr(other, n)) for n in names})

    def batch(self, layout: "Layout", *, mask_truncated: bool = False) -> Batch:
        """The batch that GRPOTrainer trains on; see its `loss`."""
        B, G = self.lengths.shape
        mask_BGC = np.arange(layout.width) < self.lengths[..., None]
        mask_BGC &= self.valid[..., None]
        if mask_truncated:
            mask_BGC &= self.stopped[..., None]
        prompts_BP = np.zeros((B, layout.prompt_width), np.int32)
        for row, prompt in zip(prompts_BP, self.prompts):
            row[: len(prompt.ids)] = prompt.ids
        # A row is a prompt with `branches` of its completions.
        times = G // layout.branches

        def by_prompt(x):  # [B, …] -> [rows, …]
            return np.repeat(x, times, axis=0)

        def cut(x):  # [B, G, …] -> [rows, branches, …]
            return x.reshape(-1, layout.branches, *x.shape[2:])

        def by_token(x):  # [B, G, C] -> [rows, branches, width]
            return cut(x[..., : layout.width])

        batch = {
            "prompts": by_prompt(prompts_BP),
            "prompt_lengths": by_prompt(np.asarray([len(p.ids) for p in self.prompts], np.int32)),
            "tokens": by_token(self.tokens),
            "target_mask": by_token(mask_BGC),
            "counts": cut(self.valid.astype(np.float32)),
            "advantages": cut(self.advantages),
            "sampler_logprobs": by_token(self.logprobs),
        }
        for name in ("old_logprobs", "ref_logprobs"):
            if (values := getattr(self, name)) is not None:
                batch[name] = by_token(values)
        return batch

    def metrics(self) -> dict[str, Any]:
        """Numbers for the step's record: rewards, lengths, the share of groups with nothing to learn."""
        known = self.rewards[self.valid]
        by_function = {
            name: _mean(scores[~np.isnan(scores)])
            for name, scores in zip(self.functions, np.moveaxis(self.scores, -1, 0))
        }
        return {
            "reward": _mean(known),
            "reward_std": float(np.std(known)) if known.size else None,
            "rewards": by_function,
            "zero_std": float(np.mean(~self.varied)),
            "unscorable": float(np.mean(~self.valid)),
            "length_mean": float(np.mean(self.lengths)),
            "length_max": int(np.max(self.lengths)),
            "truncated": float(np.mean(~self.stopped)),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """The shape of a batch.

    Attributes:
        prompt_width: tokens P of a prompt, padded.
        width: tokens C of a completion, padded.
        branches: completions per row.
    """

    prompt_width: int
    width: int
    branches: int


def parts(batch: Batch, n: int) -> list[Batch]:
    """The batch in n parts with the same number of rows."""
    return [{name: np.split(x, n)[i] for name, x in batch.items()} for i in range(n)]


def to_record(
    step: int, rollout: Rollout, layout: Layout, tokenizer: Detokenizer
) -> dict[str, Any]:
    """A line of rollouts.jsonl, with all that a step needs to be computed again.

    `step` is the first update on the rollout.

    `prompts`, each with `text`, `ids`, `columns` and `completions`; each of these with `text`, `ids`,
    `tokens` (the text of each id), `mask`, `logprobs`, where there are `old_logprobs` and
    `ref_logprobs`, `rewards` by function, `reward` (null: unscorable), `advantage` and `finish`.
    """

    def completion(b: int, g: int) -> dict[str, Any]:
        n = int(rollout.lengths[b, g])
        ids = rollout.tokens[b, g, :n].tolist()
        scores = dict(zip(rollout.functions, map(_number, rollout.scores[b, g])))
        arrays = {name: getattr(rollout, name) for name in _BY_TOKEN}
        return {
            "text": rollout.texts[b][g],
            "ids": ids,
            "tokens": [tokenizer.token_bytes(i).decode("utf-8", "replace") for i in ids],
            "mask": [int(rollout.valid[b, g])] * n,
            **{k: _floats(x[b, g, :n]) for k, x in arrays.items() if x is not None},
            "rewards": scores,
            "reward": _number(rollout.rewards[b, g]),
            "advantage": _floats(rollout.advantages[b, g : g + 1])[0],
            "finish": "stop" if rollout.stopped[b, g] else "length",
        }

    prompts = [
        {
            "text": prompt.text,
            "ids": list(prompt.ids),
            "columns": dict(prompt.columns),
            "completions": [completion(b, g) for g in range(rollout.lengths.shape[1])],
        }
        for b, prompt in enumerate(rollout.prompts)
    ]
    shape = {"prompt_width": layout.prompt_width, "width": layout.width}
    return {"step": step, **shape, "branches": layout.branches, "prompts": prompts}


def from_record(record: dict[str, Any], where: str) -> tuple[Rollout, Layout]:
    """The rollout of a `to_record`. Raises DataError, naming `where`, if something is missing."""
    try:
        layout = Layout(**{k: int(record[k]) for k in ("prompt_width", "width", "branches")})
        groups = [prompt["completions"] for prompt in record["prompts"]]
        lengths = np.asarray([[len(c["ids"]) for c in group] for group in groups], np.int64)

        def by_token(name: str, dtype: Any) -> np.ndarray | None:
            if name not in groups[0][0]:
                return None
            out = np.zeros((*lengths.shape, layout.width), dtype)
            for b, group in enumerate(groups):
                for g, one in enumerate(group):
                    out[b, g, : lengths[b, g]] = one[name]
            return out

        def each(name: str) -> list[list]:
            return [[one[name] for one in group] for group in groups]

        functions = tuple(groups[0][0]["rewards"])
        scores = [[[one["rewards"][f] for f in functions] for one in group] for group in groups]
        rollout = Rollout(
            prompts=[
                Prompt(text=p["text"], ids=tuple(p["ids"]), columns=p["columns"])
                for p in record["prompts"]
            ],
            texts=each("text"),
            functions=functions,
            tokens=by_token("ids", np.int32),
            lengths=lengths,
            stopped=np.asarray([[f == "stop" for f in row] for row in each("finish")]),
            scores=np.asarray(scores, np.float64),
            rewards=np.asarray(each("reward"), np.float64),
            advantages=np.asarray(each("advantage"), np.float32),
            **{name: by_token(name, np.float32) for name in _BY_TOKEN},
        )
    except (KeyError, TypeError, ValueError, IndexError) as e:
        text = f"{where}: not a rollout of this program ({type(e).__name__}: {e!s:.100})"
        raise DataError(f"{text}; it is written by `train.py grpo`") from e
    return rollout, layout


def _floats(values: np.ndarray) -> list[float]:
    """float32 numbers in the shortest form that reads back as the same float32."""
    return [float(str(value)) for value in values.astype(np.float32)]


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _mean(values: np.ndarray) -> float | None:
    return float(np.mean(values)) if values.size else None
