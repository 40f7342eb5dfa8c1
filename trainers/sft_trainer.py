"""Supervised fine-tuning: cross-entropy on the tokens that a mask selects."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from models.llama.model import Params, head_matrix
from trainers.trainer import Batch, Loss, TrainConfig, Trainer
from utils.cross_entropy import cross_entropy

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainConfig):
    """As TrainConfig; supervised training has no numbers of its own."""


@dataclasses.dataclass(frozen=True)
class SFTTrainer(Trainer):
    """Trains on `tokens` [B, T] with `target_mask` [B, T], see `trainers.data`.

    The loss is the mean over all targets of the whole batch, in nats.
    """

    def loss(self, params: Params, batch: Batch, key: Array) -> Loss:
        """Sums over a micro-batch's targets; also `entropy` (nats) and `accuracy`."""
        targets_BT, weights_BT = next_tokens(batch)
        hidden_BTD, _ = self.model.apply(
            {"params": params},
            batch["tokens"],
            positions_BT=batch.get("positions"),
            segment_ids_BT=batch.get("segment_ids"),
            hidden=True,
        )
        sums = cross_entropy(hidden_BTD, head_matrix(params), targets_BT, weights_BT)
        return Loss(
            total=sums.nll,
            weight=jnp.sum(weights_BT),
            sums={"entropy": sums.entropy, "accuracy": sums.correct},
        )

    def derive(self, means: dict[str, float]) -> dict[str, float]:
        """With `perplexity`."""
        return means | {"perplexity": math.exp(min(means["loss"], 700.0))}


def next_tokens(batch: Batch) -> tuple[Array, Array]:
    """The one shift: (the token after each, its weight 0 or 1), [B, T] int32 and float32."""
    shift = lambda x: jnp.pad(x[:, 1:], ((0, 0), (0, 1)))
    wanted_BT = shift(batch["target_mask"])
    if "segment_ids" in batch:  # never from one document into the next
        wanted_BT &= batch["segment_ids"] == shift(batch["segment_ids"])
    return shift(batch["tokens"]), wanted_BT.astype(jnp.float32)
