"""Rollouts on the host: completions with rewards and advantages, as batches and as lines of a file.

Dimension key: B prompts, G completions of each (group_size), P prompt tokens, C completion tokens, F
reward functions.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from trainers.grpo_trainer import SCALES, group_advantages
from trainers.rewards.tasks import Prompt
from trainers.trainer import Batch
from utils.errors import is_int, is_number, raise_all


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """What is sampled, and how often it is used.

    Attributes:
        prompts_per_step: prompts of a rollout.
        group_size: completions of each prompt.
        scale: what advantages are divided by, see `group_advantages`.
        iterations: how often a rollout is trained on; after the first time, ratios are not 1.
        mini_batches: updates that one iteration is cut into, by prompts.
        refills: dynamic sampling (DAPO, 2503.14476, section 3.2): groups whose rewards are all equal
            are replaced by groups of further prompts, in so many more rounds of sampling; 0: never.
        branches: completions that share one computation of their prompt, a divisor of group_size;
            None: all.
        top_p, top_k: of sampling; other than 1 and 0, the ratios are biased.
        seed: of the prompts' order.
    """

    prompts_per_step: int = 8
    group_size: int = 8
    scale: str = "group"
    iterations: int = 1
    mini_batches: int = 1
    refills: int = 0
    branches: int | None = None
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self):
        out = []

        def need(name: str, ok: bool, expected: str) -> None:
            if not ok:
                out.append(f"{name}={getattr(self, name)!r}, expected {expected}")

        least = dict(prompts_per_step=1, iterations=1, mini_batches=1, refills=0, top_k=0, seed=0)
        for name, low in least.items():
            value = getattr(self, name)
            need(name, is_int(value) and value >= low, f"an integer from {low}")
        group, branches = self.group_size, self.branches
        fits = is_int(group) and group >= 2
        need("group_size", fits, "an integer from 2: one completion has no group to be better than")
        need("scale", self.scale in SCALES, f"one of {', '.join(SCALES)}")
        need("seed", not is_int(self.seed) or self.seed < 2**32, "at most 2^32 - 1")
        need("top_p", is_number(self.top_p) and 0 < self.top_p <= 1, "a number in (0, 1]")
        divides = branches is None or (
            is_int(branches) and branches >= 1 and fits and group % branches == 0
        )
        need("branches", divides, f"a divisor of group_size ({group!r}), or None")
        if not out:
            whole = self.prompts_per_step % self.mini_batches == 0
            need("mini_batches", whole, f"a divisor of prompts_per_step ({self.prompts_per_step})")
        raise_all("RolloutConfig", out)
        if self.top_p != 1 or self.top_k:
            warnings.warn(
                f"top_p={self.top_p} and top_k={self.top_k} sample from another distribution than "
                "the one that log-probs are of: importance ratios are biased",
                stacklevel=2,
            )

    @property
    def updates(self) -> int:
        """Optimizer steps a rollout."""
        return self.iterations * self.mini_batches


def rows_at_once(micro_batch_size: Any, group_size: Any) -> tuple[Any, int | None]:
    """Completions at once as (rows of a batch at once, completions a row: RolloutConfig.branches)."""
    both = is_int(micro_batch_size) and is_int(group_size)
    if not both or micro_batch_size < 1 or group_size < 1:
        return micro_batch_size, None  # the configs complain
    divisors = (n for n in range(min(micro_batch_size, group_size), 0, -1) if group_size % n == 0)
    branches = next(divisors)
    return max(micro_batch_size // branches, 1), branches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout:
    """Completions with all that was found out about them.

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
        """The same with advantages by `group_advantages`."""
        rewards = np.nan_to_num(self.rewards).astype(np.float32)
        advantages = group_advantages(rewards, self.valid, scale)
        return dataclasses.replace(self, advantages=np.asarray(advantages))

    def take(self, groups: Sequence[int]) -> "Rollout":
        """Some of its groups."""
        groups = list(groups)

        def some(x):
            if isinstance(x, np.ndarray):
                return x[groups]
            return x if x is None or isinstance(x, tuple) else [x[i] for i in groups]

        fields = dataclasses.fields(self)
        return Rollout(**{f.name: some(getattr(self, f.name)) for f in fields})

    def joined(self, other: "Rollout") -> "Rollout":
        """Its groups, and those of another one."""

        def both(x, y):
            if isinstance(x, np.ndarray):
                return np.concatenate([x, y])
            return x if x is None or isinstance(x, tuple) else [*x, *y]

        names = [f.name for f in dataclasses.fields(self)]
        return Rollout(**{n: both(getattr(self, n), getattr(other, n)) for n in names})

    def batch(self, layout: "Layout", *, mask_truncated: bool = False) -> Batch:
        """What GRPOTrainer trains on."""
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
        by_prompt = lambda x: np.repeat(x, times, axis=0)
        cut = lambda x: x.reshape(-1, layout.branches, *x.shape[2:])
        by_token = lambda x: cut(x[..., : layout.width])
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
        """What a run says of it: rewards, lengths, how many groups have nothing to learn."""
        known = self.rewards[self.valid]
        mean = lambda x: float(np.mean(x)) if x.size else None
        by_function = {
            name: mean(scores[~np.isnan(scores)])
            for name, scores in zip(self.functions, np.moveaxis(self.scores, -1, 0))
        }
        return {
            "reward": mean(known),
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
        branches: completions a row.
    """

    prompt_width: int
    width: int
    branches: int


def parts(batch: Batch, n: int) -> list[Batch]:
    """A batch in n of equally many rows."""
    return [{name: np.split(x, n)[i] for name, x in batch.items()} for i in range(n)]
