"""DPO and its relatives: preferences between two answers to one prompt, learnt without sampling.

A pair is a group of two completions: its prompt is computed once for both (`branches` of attention).
Dimension key: B pairs, P prompt tokens, C completion tokens; 2 is (chosen, rejected).
`docs/dpo.md` has the equations side by side, and each loss's gradient.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from models.llama.model import Params
from trainers.grpo_trainer import GRPOConfig, GRPOTrainer
from trainers.sft_trainer import SFTConfig, SFTTrainer
from trainers.trainer import Batch, Loss, Work, split_rows
from utils import sharding
from utils.fields import CONFIG, again, field, number, one_of

Array = jax.Array

LOSSES = ("sigmoid", "hinge", "ipo", "simpo")
# Losses whose scores are means over a completion's tokens, and not sums.
_PER_TOKEN = ("ipo", "simpo")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPOConfig(SFTConfig):
    """The numbers of the loss; see `preference_loss`."""

    base_rates: ClassVar[tuple[float, float]] = (1e-6, 1e-5)
    learning_rate: float | None = again(
        SFTConfig, "learning_rate", None, help="peak learning rate; default: 1e-6, with LoRA 1e-5"
    )
    micro_batch_size: int | None = again(
        SFTConfig,
        "micro_batch_size",
        4,
        help="pairs in memory at once (at least one per device); smaller saves memory and changes "
        "nothing else",
    )
    loss: str = field("sigmoid", "loss of a pair", one_of(*LOSSES), resume=CONFIG)
    beta: float | None = field(
        None,
        "scale of rewards: smaller lets the model move further; default: 0.1, for simpo 2",
        number(above=0),
        resume=CONFIG,
    )
    label_smoothing: float = field(
        0.0,
        "share of pairs that may be labelled the wrong way round (cDPO), for the sigmoid loss",
        number(0, below=0.5),
        resume=CONFIG,
    )
    gamma: float = field(1.0, "margin of the simpo loss", number(0), resume=CONFIG)
    precompute_reference: bool = field(
        False,
        "compute the reference's log-probs once, before the first step, and keep no copy of it",
        resume=CONFIG,
    )

    def __post_init__(self) -> None:
        if self.beta is None:
            object.__setattr__(self, "beta", 2.0 if self.loss == "simpo" else 0.1)
        super().__post_init__()

    def problems(self) -> list[str]:
        out = super().problems()
        if self.label_smoothing and self.loss != "sigmoid":
            out.append(f"label_smoothing={self.label_smoothing} is for loss=sigmoid alone")
        if self.precompute_reference and self.loss == "simpo":
            out.append("precompute_reference=True, but loss=simpo has no reference")
        return out

    @property
    def needs_reference(self) -> bool:
        return self.loss != "simpo" and not self.precompute_reference


def preference_scores(logps: Array, reference: Array, lengths: Array, kind: str) -> Array:
    """Scores that a loss compares: log π/ref, per token for "ipo"; log π per token for "simpo".

    TRL averages "ipo" over tokens too: its maintainers have it from the paper's authors, whose
    equation is of whole answers.

    Args:
        logps, reference: [B, 2] sums of a completion's log-probs; `reference` is not read for "simpo".
        lengths: [B, 2] tokens of the completions.
        kind: one of LOSSES.
    """
    scores = logps if kind == "simpo" else logps - reference
    return scores / jnp.maximum(lengths, 1) if kind in _PER_TOKEN else scores


def preference_loss(
    gap: Array, kind: str, beta: float, label_smoothing: float = 0.0, gamma: float = 0.0
) -> Array:
    """The loss of each pair, of h = score of chosen - score of rejected (`preference_scores`).

    - "sigmoid": -log σ(β·h). DPO (Rafailov et al., 2305.18290), eq. 7. With label smoothing ε: -(1 - ε)
      log σ(β·h) - ε log σ(-β·h). cDPO (Mitchell, "A note on DPO with noisy preferences", 2023).
    - "hinge": max(0, 1 - β·h). SLiC (Zhao et al., 2305.10425), eq. 1, on the normalised ratios of RSO
      (Liu et al., 2309.06657).
    - "ipo": (h - 1 / (2β))². IPO (Azar et al., 2310.12036), eq. 17, whose τ is β.
    - "simpo": -log σ(β·h - γ). SimPO (Meng et al., 2405.14734), eq. 6.

    >>> print(preference_loss(jnp.zeros(2), "ipo", 0.5))
    [1. 1.]

    Args:
        gap: [B], h.
        kind: one of LOSSES.
        beta, label_smoothing, gamma: see DPOConfig.
    """
    if kind == "hinge":
        return jax.nn.relu(1 - beta * gap)
    if kind == "ipo":
        return (gap - 1 / (2 * beta)) ** 2
    logit = beta * gap - (gamma if kind == "simpo" else 0)
    right, wrong = jax.nn.log_sigmoid(logit), jax.nn.log_sigmoid(-logit)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


@dataclasses.dataclass(frozen=True)
class DPOTrainer(SFTTrainer):
    """Trains on pairs of completions, see `trainers.pairs`.

    A batch holds `prompts` [B, P] int32, padded on the right, with `prompt_lengths` [B]; `tokens` [B,
    2, C] int32; `target_mask` [B, 2, C] bool, the tokens whose log-probs are summed; and with
    `precompute_reference` `reference` [B, 2], the reference's sums.

    The loss is the mean over the pairs of the whole batch. The reference is the frozen model: a copy,
    or the base under adapters, see `Trainer.init`.
    """

    config: DPOConfig

    @property
    def _group(self) -> GRPOTrainer:
        """Computes log-probs of completions that share their prompt."""
        return GRPOTrainer(self.model, GRPOConfig())

    def model_params(self, params: Params, frozen: Params) -> Params:
        """With the reference beside it, if there is one."""
        whole = super().model_params(params, frozen)
        return whole | {"reference": frozen} if self.config.needs_reference else whole

    def loss(self, params: Params, batch: Batch, key: Array) -> Loss:
        """Sums over a micro-batch's pairs; in nats.

        Also `reward_chosen` and `reward_rejected`, β times what the loss compares; `margin`, their
        difference; `accuracy`, the share of pairs whose margin is positive, ties being half right;
        `logp_chosen` and `logp_rejected` of whole completions; and `kl`, the mean over completions
        of (log π/ref)² / 2, how far the model has moved from the reference on them.
        """
        c, params = self.config, dict(params)
        reference = params.pop("reference", None)
        lengths = jnp.sum(batch["target_mask"], axis=-1, dtype=jnp.float32)
        known = jnp.all(lengths > 0, axis=-1).astype(jnp.float32)
        logps = self.logps(params, batch)
        before = batch.get("reference", jnp.zeros_like(logps))
        if reference is not None:
            before = jax.lax.stop_gradient(self.logps(reference, batch))
        rewards = c.beta * preference_scores(logps, before, lengths, c.loss)
        margin = rewards[:, 0] - rewards[:, 1]
        by_pair = {
            "reward_chosen": rewards[:, 0],
            "reward_rejected": rewards[:, 1],
            "margin": margin,
            "accuracy": (jnp.sign(margin) + 1) / 2,
            "logp_chosen": logps[:, 0],
            "logp_rejected": logps[:, 1],
        }
        if c.loss != "simpo":
            by_pair["kl"] = jnp.mean((logps - before) ** 2, axis=-1) / 2
        losses = preference_loss(margin / c.beta, c.loss, c.beta, c.label_smoothing, c.gamma)
        return Loss(
            total=jnp.sum(losses * known),
            weight=jnp.sum(known),
            sums={name: jnp.sum(value * known) for name, value in by_pair.items()},
        )

    def logps(self, params: Params, batch: Batch) -> Array:
        """Sums of the completions' log-probs, [B, 2] float32."""
        return jnp.sum(self._group.logprobs(params, batch)[0], axis=-1)

    @functools.partial(jax.jit, static_argnums=0)
    def score(self, model: Params, batch: Batch) -> Array:
        """Sums of a batch's log-probs [B, 2] by a model, a micro-batch at a time."""
        size, n_rows = self.config.micro_batch_size, len(batch["prompts"])
        size = min(size or n_rows, n_rows)
        sums = jax.lax.map(lambda rows: self.logps(model, rows), split_rows(batch, size))
        return sharding.replicate(sums.reshape(-1, 2)[:n_rows])

    def work(self, batch: Batch) -> Work:
        """Counts a prompt once per pair."""
        return self._group.work(batch)

    def derive(self, means: dict[str, float]) -> dict[str, float]:
        """Returns the means per pair as they are."""
        return means
