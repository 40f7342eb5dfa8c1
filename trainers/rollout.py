"""Rollouts on the host: completions with rewards and advantages, and the batches made of them.

Dimension key: B prompts, G completions of each (group_size), P prompt tokens, C completion tokens, F
reward functions.
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trainers.grpo_trainer import SCALES, group_advantages
from trainers.trainer import Batch
from utils.errors import ConfigError, is_int
from utils.fields import ALWAYS, CONFIG, Config, field, integer, number, one_of


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
        "advantages: reward less its group's mean, divided by the deviation of the group or batch, or "
        "not at all (none); rloo: less the mean of the others; reinforce: the reward itself",
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


def check_context(prompts: Sequence["Prompt"], max_completion_len: int, context: int) -> None:
    """Raises ConfigError if the longest prompt and a completion exceed the model's context."""
    longest = max(len(prompt.ids) for prompt in prompts)
    if (n := longest + max_completion_len) > context:
        raise ConfigError(
            f"the longest prompt has {longest} tokens and max_completion_len={max_completion_len}: {n} "
            f"exceed the model's context of {context}; lower it or --max_prompt_len, or set --max_seq_len"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt.

    Attributes:
        text: as rewards see it; of a conversation, its last user's message.
        ids: as the model reads it, with the tokens that start an assistant's answer.
        columns: the other fields of its row, for rewards.
        messages: those that it writes, if it is a conversation.
    """

    text: str
    ids: tuple[int, ...]
    columns: Mapping[str, Any]
    messages: tuple[Mapping[str, Any], ...] = ()


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

        return type(self)(**{name: some(x) for name, x in vars(self).items()})

    def joined(self, other: "Rollout") -> "Rollout":
        """The rollout of both rollouts' groups."""

        def both(x, y):
            if isinstance(x, np.ndarray):
                return np.concatenate([x, y])
            return x if x is None or isinstance(x, tuple) else [*x, *y]

        pairs = ((name, x, getattr(other, name)) for name, x in vars(self).items())
        return type(self)(**{name: both(x, y) for name, x, y in pairs})

    def batch(self, layout: "Layout", *, mask_truncated: bool = False) -> Batch:
        """The batch that GRPOTrainer trains on; see its `loss`."""
        B, G = self.lengths.shape
        mask_BGC = np.arange(layout.width) < self.lengths[..., None]
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
        """Numbers for the step's record: lengths and, where there are functions, rewards."""
        known = self.rewards[self.valid]
        by_function = {
            name: _mean(scores[~np.isnan(scores)])
            for name, scores in zip(self.functions, np.moveaxis(self.scores, -1, 0))
        }
        found = {
            "length_mean": float(np.mean(self.lengths)),
            "length_max": int(np.max(self.lengths)),
            "truncated": float(np.mean(~self.stopped)),
        }
        if self.functions:
            found |= {"reward": _mean(known), "rewards": by_function}
            found["reward_std"] = float(np.std(known)) if known.size else None
            found["zero_std"] = float(np.mean(~self.varied))
            found["unscorable"] = float(np.mean(~self.valid))
        return found


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


def _mean(values: np.ndarray) -> float | None:
    return float(np.mean(values)) if values.size else None
