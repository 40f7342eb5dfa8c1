"""GRPO: group-relative advantages, a clipped surrogate, and a KL penalty, as small pure functions.

Groups are an explicit axis: every array of a batch is [B, …] by prompts or [B, M, …] by completions.
Dimension key: B prompts, M members of a group (a prompt's completions), P prompt tokens, C completion
tokens, D model dim. A `mask` is 1 at the tokens that count. `docs/grpo.md` has each loss's gradient.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from models.llama.model import Params, head_matrix
from trainers.trainer import Batch, Loss, TrainConfig, Trainer, Work, split_rows
from utils import sharding
from utils.cross_entropy import token_logprobs
from utils.errors import is_number
from utils.fields import CONFIG, again, field, integer, number, one_of

Array = jax.Array

LOSSES = ("dapo", "grpo", "bnpo", "dr_grpo")
KLS = ("ratio_k3", "k1", "k2", "k3")
RATIO_LEVELS = ("token", "sequence")
SCALES = ("group", "batch", "none", "rloo", "reinforce")

# Log-ratios are clipped to this, beyond which they have no gradient: exp of it, and products of such
# ratios, are finite.
MAX_LOG_RATIO = 20.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPOConfig(TrainConfig):
    """The numbers of the loss; see `aggregate` for `loss` and `kl_penalty` for `kl`.

    A Trainer counts `micro_batch_size` in rows, the command line in completions: see `rows_at_once`.
    """

    base_rates: ClassVar[tuple[float, float]] = (1e-6, 1e-5)
    learning_rate: float | None = again(
        TrainConfig, "learning_rate", None, help="peak learning rate; default: 1e-6, with LoRA 1e-5"
    )
    schedule: str = again(TrainConfig, "schedule", "constant")
    micro_batch_size: int | None = again(
        TrainConfig,
        "micro_batch_size",
        8,
        help="completions in memory at once (at least one group per device); smaller saves memory "
        "and changes nothing else",
    )
    eval_every: int = again(
        TrainConfig,
        "eval_every",
        0,
        help="steps between evaluations; 0: only before the first and after the last",
    )
    loss: str = field(
        "dapo", "how the losses of tokens are averaged", one_of(*LOSSES), resume=CONFIG
    )
    beta: float = field(
        0.0, "weight of the KL penalty; 0: no reference model", number(0), resume=CONFIG
    )
    kl: str = field("ratio_k3", "estimator of the KL penalty", one_of(*KLS), resume=CONFIG)
    epsilon_low: float = field(
        0.2, "ratios are clipped to 1 ± this", number(0, below=1), flag="epsilon", resume=CONFIG
    )
    epsilon_high: float | None = field(
        None, "upper clip bound, if not epsilon (DAPO's clip-higher)", number(0), resume=CONFIG
    )
    dual_clip: float | None = field(
        None,
        "ratios are also cut at this, above 1 + epsilon_high, where the advantage is negative",
        number(),
        resume=CONFIG,
    )
    ratio_level: str = field(
        "token", "one ratio per token, or per sequence (GSPO)", one_of(*RATIO_LEVELS), resume=CONFIG
    )
    tis_cap: float | None = field(
        None,
        "cap of the trainer/sampler ratio (truncated importance sampling); off by default",
        number(above=0),
        resume=CONFIG,
    )
    mask_truncated: bool = field(
        False, "leave completions without a stop token out of the loss", resume=CONFIG
    )
    temperature: float = field(
        1.0,
        "temperature of sampling and of all log-probs",
        number(above=0)._replace(expected="a number above 0: greedy samples have no ratio"),
        resume=CONFIG,
    )
    max_completion_len: int = field(
        512,
        "tokens per completion; a longer one is cut and scored as it is",
        integer(1),
        resume=CONFIG,
    )

    def __post_init__(self) -> None:
        if self.epsilon_high is None:
            object.__setattr__(self, "epsilon_high", self.epsilon_low)
        super().__post_init__()

    def problems(self) -> list[str]:
        out = super().problems()
        cut, high = self.dual_clip, self.epsilon_high
        if is_number(cut) and is_number(high) and not cut > 1 + high:
            out.append(f"dual_clip={cut}, expected a number above 1 + epsilon_high ({1 + high})")
        return out

    @property
    def needs_reference(self) -> bool:
        return self.beta > 0


@functools.partial(jax.jit, static_argnames="scale")
def group_advantages(rewards_BM: Array, valid_BM: Array, scale: str = "group") -> Array:
    """How much better than its group each completion is; 0 for one that is not valid.

    >>> rewards = np.array([[0.0, 1.0], [5.0, 5.0]])
    >>> print(group_advantages(rewards, np.ones((2, 2), bool), "none"))
    [[-0.5  0.5]
     [ 0.   0. ]]

    Source: DeepSeekMath (2402.03300) section 4.1.2; "none": Dr. GRPO (2503.20783) section 3.2;
    "rloo": Ahmadian et al. (2402.14740); "reinforce": Williams 1992.

    Args:
        rewards_BM: [B, M] float32, anything where not valid.
        valid_BM: [B, M] bool, False at completions that could not be scored: mean and deviation
            leave them out.
        scale: "group": (R - mean) / (std + 1e-4), std of the group with n - 1; "batch": std of all
            valid rewards; "none": R - mean; "rloo": R - mean of the others, which is n / (n - 1)
            times as much; "reinforce": R.

    Returns:
        [B, M] float32; exactly 0 in a group whose rewards are equal, except for "reinforce".
    """
    if scale == "reinforce":
        return jnp.where(valid_BM, rewards_BM, 0)
    # Scaled to ±1 first: the squares of large rewards would overflow.
    size = jnp.maximum(1, jnp.max(jnp.where(valid_BM, jnp.abs(rewards_BM), 0)))
    rewards_BM = jnp.where(valid_BM, rewards_BM / size, 0)

    def deviations(axis) -> tuple[Array, Array]:
        n = jnp.sum(valid_BM, axis=axis, keepdims=True)
        mean = jnp.sum(rewards_BM, axis=axis, keepdims=True) / jnp.maximum(n, 1)
        off = jnp.where(valid_BM, rewards_BM - mean, 0)
        variance = jnp.sum(off**2, axis=axis, keepdims=True) / jnp.maximum(n - 1, 1)
        return off, jnp.sqrt(variance)

    off_BM, std_B1 = deviations(1)
    # Equal rewards leave a rounding error, which must not be divided by itself.
    largest_B1 = jnp.max(jnp.abs(rewards_BM), axis=1, keepdims=True)
    differs_B1 = std_B1 > 1e-6 * jnp.maximum(1 / size, largest_B1)
    divisor = {"group": std_B1, "batch": deviations((0, 1))[1]}.get(scale)
    advantages_BM = off_BM * size if divisor is None else off_BM / (divisor + 1e-4 / size)
    if scale == "rloo":
        n_B1 = jnp.sum(valid_BM, axis=1, keepdims=True)
        advantages_BM *= n_B1 / jnp.maximum(n_B1 - 1, 1)
    return jnp.where(valid_BM & differs_B1, advantages_BM, 0)


def importance_ratio(logprobs: Array, old: Array, mask: Array, level: str = "token") -> Array:
    """How much more probable than when it was sampled: exp(new - old), 1 where masked.

    Source: per token PPO (1707.06347) eq. 6; per sequence GSPO (2507.18071) eq. 7: exp of the mean
    log-ratio of its tokens.

    Args:
        logprobs, old, mask: [..., C].
        level: "token" or "sequence".

    Returns:
        [..., C], the same for all tokens of a sequence at level "sequence". Finite: log-ratios are
        cut at ±20.
    """
    log_ratio = jnp.where(mask > 0, logprobs - old, 0)
    if level == "sequence":
        length = jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1)
        log_ratio = jnp.sum(log_ratio, axis=-1, keepdims=True) / length
        log_ratio = jnp.where(mask > 0, log_ratio, 0)
    return jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def clipped_surrogate(
    ratio: Array,
    advantages: Array,
    epsilon_low: float,
    epsilon_high: float,
    dual_clip: float | None = None,
) -> Array:
    """The loss per token: -min(r·A, clip(r, 1 - low, 1 + high)·A).

    Source: PPO (1707.06347) eq. 7; two bounds: DAPO (2503.14476) eq. 10; dual clip: r is cut at
    dual_clip first, which bounds the loss where A < 0 (1912.09729, eq. 8).

    Args:
        ratio: [..., C].
        advantages: [...], one per sequence.
        epsilon_low, epsilon_high: how far the ratio may be from 1.
        dual_clip: above 1 + epsilon_high, or None.
    """
    advantages = advantages[..., None]
    clipped = jnp.clip(ratio, 1 - epsilon_low, 1 + epsilon_high)
    if dual_clip is not None:
        ratio = jnp.minimum(ratio, dual_clip)
    plain, clipped = ratio * advantages, clipped * advantages
    # Where both are equal, the gradient is the plain one's. jnp.minimum would take half of each, and
    # with a bound of 0 a ratio of 1 is at a corner of the clip too.
    return -jnp.where(plain <= clipped, plain, clipped)


def kl_penalty(logprobs: Array, ref: Array, ratio: Array, kind: str = "ratio_k3") -> Array:
    """An estimate per token of KL(policy ‖ reference), with d = ref - new.

    k1 = -d; k2 = d²/2; k3 = e^d - d - 1 (Schulman, "Approximating KL divergence"); ratio_k3 = r·k3.
    As a loss on samples of the policy, k1 has zero expected gradient, k3 that of KL(reference ‖
    policy), k2 and ratio_k3 that of KL(policy ‖ reference).

    Args:
        logprobs, ref: [..., C].
        ratio: [..., C] per token, even where the surrogate's is per sequence.
        kind: one of KLS.
    """
    d = jnp.clip(ref - logprobs, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    if kind == "k1":
        return -d
    if kind == "k2":
        return d**2 / 2
    k3 = jnp.expm1(d) - d
    return k3 if kind == "k3" else ratio * k3


def sampler_weight(old: Array, sampler: Array, mask: Array, cap: float) -> Array:
    """Truncated importance sampling: min(p_old / p_sampler, cap) per token, without a gradient.

    Corrects for a sampler whose log-probs differ from the trainer's. Source: Ionides 2008; Yao et
    al. 2025, "Your efficient RL framework secretly brings you off-policy RL training".
    """
    log_ratio = jnp.where(mask > 0, old - sampler, 0)
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(jnp.minimum(log_ratio, MAX_LOG_RATIO)), cap))


def aggregate(
    values: Array, mask: Array, counts: Array, kind: str, max_completion_len: int
) -> tuple[Array, Array]:
    """Token losses as (total, weight); micro-batches add both up before the one division.

    Args:
        values, mask: [..., C].
        counts: [...], 1 for completions that count, even without a token that does.
        kind: "grpo": mean over completions of their tokens' mean (DeepSeekMath eq. 3); "dapo": mean
            over all tokens of the optimizer step (DAPO eq. 8); "bnpo": mean over micro-batches of
            the mean over their tokens; "dr_grpo": sum over completions · max_completion_len.
        max_completion_len: for "dr_grpo".
    """
    values = jnp.where(mask > 0, values, 0)
    tokens, completions = jnp.sum(mask), jnp.sum(counts)
    if kind == "grpo":
        lengths = jnp.maximum(jnp.sum(mask, axis=-1), 1)
        return jnp.sum(jnp.sum(values, axis=-1) / lengths), completions
    if kind == "dapo":
        return jnp.sum(values), tokens
    if kind == "bnpo":
        return jnp.sum(values) / jnp.maximum(tokens, 1), (tokens > 0).astype(jnp.float32)
    return jnp.sum(values), completions * max_completion_len


# Metrics that are sums over tokens; divided by the number of tokens when logged.
_PER_TOKEN = ("entropy", "kl", "clip_low", "clip_high", "gap_mean", "advantage")


@dataclasses.dataclass(frozen=True)
class GRPOTrainer(Trainer):
    """Trains on groups of completions, see `trainers.rollout`.

    A batch holds `prompts` [B, P] int32, padded on the right, with `prompt_lengths` [B]; `tokens` [B,
    M, C] int32; `target_mask` [B, M, C] bool, the sampled tokens; `counts` [B, M] float32, 1 for a
    completion that was scored, else 0; `advantages` [B, M]; `sampler_logprobs` [B, M, C]; where the
    policy is no longer the sampler's, `old_logprobs`; with beta > 0 `ref_logprobs`.

    A prompt is computed once for its group: completions are branches of it (`utils.attention`).
    With beta > 0 the frozen parameters are the reference, see `Trainer.init`.

    Attributes:
        vocab_limit: ids from here on are never sampled and have no probability, for models whose
            embedding has more rows than the tokenizer has tokens; None: all rows are tokens.
    """

    config: GRPOConfig
    vocab_limit: int | None = None

    def loss(self, params: Params, batch: Batch, key: Array) -> Loss:
        """Sums over a micro-batch's completions; `derive` lists the metrics."""
        c = self.config
        mask = batch["target_mask"] * batch["counts"][..., None]
        logprobs, entropy = self.logprobs(params, batch)
        old = batch.get("old_logprobs", jax.lax.stop_gradient(logprobs))
        advantages = batch["advantages"]
        ratio = importance_ratio(logprobs, old, mask, c.ratio_level)
        values = clipped_surrogate(ratio, advantages, c.epsilon_low, c.epsilon_high, c.dual_clip)
        if c.tis_cap is not None:
            values *= sampler_weight(old, batch["sampler_logprobs"], mask, c.tis_cap)
        per_token = {}
        if c.beta > 0:
            by_token = importance_ratio(logprobs, old, mask)
            per_token["kl"] = kl_penalty(logprobs, batch["ref_logprobs"], by_token, c.kl)
            values += c.beta * per_token["kl"]
        total, weight = aggregate(values, mask, batch["counts"], c.loss, c.max_completion_len)
        sign = advantages[..., None]
        gap = jnp.abs(old - batch["sampler_logprobs"]) * mask
        per_token |= {
            "entropy": entropy,
            "clip_low": (ratio < 1 - c.epsilon_low) & (sign < 0),
            "clip_high": (ratio > 1 + c.epsilon_high) & (sign > 0),
            "gap_mean": gap,
            "advantage": jnp.abs(sign),
        }
        sums = {name: jnp.sum(value * mask) for name, value in per_token.items()}
        return Loss(
            total=total,
            weight=weight,
            sums=sums | {"tokens": jnp.sum(mask)},
            maxima={"ratio_max": jnp.max(ratio * mask), "gap_max": jnp.max(gap)},
        )

    def states(self, params: Params, batch: Batch) -> Array:
        """The head's input for each token of a completion, [B, M * C, D]."""
        prompts_BP, tokens_BMC = batch["prompts"], batch["tokens"]
        (B, P), (_, M, C) = prompts_BP.shape, tokens_BMC.shape
        lengths_B = batch["prompt_lengths"]
        inputs_BT = jnp.concatenate([prompts_BP, tokens_BMC.reshape(B, -1)], axis=1)
        place_BC = lengths_B[:, None] + jnp.arange(C)
        place_BT = jnp.broadcast_to(place_BC[:, None], (B, M, C)).reshape(B, -1)
        prefix_BP = jnp.broadcast_to(jnp.arange(P), (B, P))
        inside_BMC = jnp.ones((B, M, C), bool)
        hidden_BTD, _ = self.model.apply(
            {"params": params},
            inputs_BT,
            positions_BT=jnp.concatenate([prefix_BP, place_BT], axis=1),
            branches=(prefix_BP < lengths_B[:, None], inside_BMC),
            hidden=True,
        )
        # A completion's first token is predicted by the prompt's last.
        last_B11 = jnp.maximum(lengths_B - 1, 0)[:, None, None]
        first_B1D = jnp.take_along_axis(hidden_BTD, last_B11, axis=1)
        first_BM1D = jnp.broadcast_to(first_B1D[:, None], (B, M, 1, hidden_BTD.shape[-1]))
        # What its last token predicts is not needed.
        rest_BMCD = hidden_BTD[:, P:].reshape(B, M, C, -1)[:, :, :-1]
        return jnp.concatenate([first_BM1D, rest_BMCD], axis=2).reshape(B, M * C, -1)

    def logprobs(self, params: Params, batch: Batch) -> tuple[Array, Array]:
        """(log-probs of the tokens, entropies of the policy there), [B, M, C] float32, 0 if masked."""
        B, M, C = batch["tokens"].shape
        head_VD, temperature = head_matrix(params)[: self.vocab_limit], self.config.temperature
        rows = (batch[name].reshape(B, M * C) for name in ("tokens", "target_mask"))
        found = token_logprobs(self.states(params, batch), head_VD, *rows, temperature)
        return found[0].reshape(B, M, C), found[1].reshape(B, M, C)

    @functools.partial(jax.jit, static_argnums=0, static_argnames="reference")
    def score(
        self, params: Params, frozen: Params, batch: Batch, *, reference: bool = False
    ) -> Array:
        """Log-probs of a batch's tokens [B, M, C], by the policy or by the reference."""
        model = frozen if reference else self.model_params(params, frozen)
        rows = {k: batch[k] for k in ("prompts", "prompt_lengths", "tokens", "target_mask")}
        size, n_rows = self.config.micro_batch_size, len(rows["prompts"])
        if size is None or size >= n_rows:
            return sharding.replicate(self.logprobs(model, rows)[0])
        parts = jax.lax.map(lambda part: self.logprobs(model, part)[0], split_rows(rows, size))
        return sharding.replicate(parts.reshape(-1, *parts.shape[2:])[:n_rows])

    def work(self, batch: Batch) -> Work:
        """Counts a prompt once per row; its completions see all of it."""
        prompts_B1 = np.asarray(batch["prompt_lengths"], np.float64)[:, None]
        counts_BM1 = np.asarray(batch.get("counts", 1.0))[..., None]
        counted_BMC = np.asarray(batch["target_mask"]) * counts_BM1  # others may stand between
        lengths_BM = np.max(counted_BMC * np.arange(1.0, counted_BMC.shape[-1] + 1), axis=-1)
        tokens = prompts_B1.sum() + lengths_BM.sum()
        seen = (prompts_B1**2).sum() + (lengths_BM * (2 * prompts_B1 + lengths_BM)).sum()
        return Work(
            targets=int(counted_BMC.sum()),
            tokens=int(tokens),
            mean_context=float(seen / max(tokens, 1)),
        )

    def derive(self, means: dict[str, float]) -> dict[str, float]:
        """Means per token: `entropy`, `clip_low`, `clip_high`, `gap_mean`, `advantage` (its size), `kl`.

        `kl` is there if beta > 0: without a reference it is not measured.
        """
        tokens = means.get("tokens") or 1.0
        means = {k: v / tokens if k in _PER_TOKEN else v for k, v in means.items()}
        return {k: v for k, v in means.items() if k != "tokens"}
