"""Supervised fine-tuning: cross-entropy on the tokens that a mask selects."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from models.llama.model import LLaMa, Params, head_matrix
from trainers.trainer import Batch, Loss, TrainConfig, Trainer, Work
from utils.cross_entropy import cross_entropy
from utils.fields import again

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainConfig):
    """TrainConfig with the defaults of supervised training, which adds no settings."""

    base_rates: ClassVar[tuple[float, float]] = (2e-5, 2e-4)
    learning_rate: float | None = again(
        TrainConfig, "learning_rate", None, help="peak learning rate; default: 2e-5, with LoRA 2e-4"
    )
    warmup_steps: int | None = again(
        TrainConfig, "warmup_steps", None, help="steps of warm-up from 0; default: 3 % of max_steps"
    )
    micro_batch_size: int | None = again(TrainConfig, "micro_batch_size", 4)
    eval_every: int = again(TrainConfig, "eval_every", 50)


@dataclasses.dataclass(frozen=True)
class SFTTrainer(Trainer):
    """Trains on `tokens` [B, T] with `target_mask` [B, T], see `trainers.data`.

    The loss is the mean over all targets of the whole batch, in nats.
    """

    def __post_init__(self) -> None:
        if self.config.warmup_steps is None:
            warmup = round(0.03 * self.config.max_steps)
            object.__setattr__(
                self, "config", dataclasses.replace(self.config, warmup_steps=warmup)
            )
        super().__post_init__()

    def loss(self, params: Params, batch: Batch, key: Array) -> Loss:
        """Sums over a micro-batch's targets; also `entropy` (nats) and `accuracy`."""
        targets_BT, weights_BT = next_tokens(batch)
        hidden_BTD = hidden_states(self.model, params, batch)
        sums = cross_entropy(hidden_BTD, head_matrix(params), targets_BT, weights_BT)
        return Loss(
            total=sums.nll,
            weight=jnp.sum(weights_BT),
            sums={"entropy": sums.entropy, "accuracy": sums.correct},
        )

    def work(self, batch: Batch) -> Work:
        """Counts each row, or packed document, up to its last target."""
        lengths = document_lengths(batch)
        tokens = int(lengths.sum())
        return Work(
            targets=int(np.sum(batch["target_mask"])),
            tokens=tokens,
            mean_context=float((lengths**2).sum()) / max(tokens, 1),
        )

    def derive(self, means: dict[str, float]) -> dict[str, float]:
        """Adds `perplexity`."""
        return means | {"perplexity": math.exp(min(means["loss"], 700.0))}


def hidden_states(model: LLaMa, params: Params, batch: Batch) -> Array:
    """The head's input at each token, [B, T, D]."""
    places = dict(positions_BT=batch.get("positions"), segment_ids_BT=batch.get("segment_ids"))
    return model.apply({"params": params}, batch["tokens"], **places, hidden=True)[0]


def next_tokens(batch: Batch) -> tuple[Array, Array]:
    """The one shift: (the token after each, its weight 0 or 1), [B, T] int32 and float32."""
    wanted_BT = _shift(batch["target_mask"])
    if "segment_ids" in batch:  # never from one document into the next
        wanted_BT &= batch["segment_ids"] == _shift(batch["segment_ids"])
    return _shift(batch["tokens"]), wanted_BT.astype(jnp.float32)


def _shift(x_BT: Array) -> Array:
    """Each column's right neighbour, zeros last."""
    return jnp.pad(x_BT[:, 1:], ((0, 0), (0, 1)))


def document_lengths(batch: Batch) -> np.ndarray:
    """[documents] int64, each document's tokens up to its last target: those that the loss depends on.

    A row is one document unless `segment_ids` says otherwise.
    """
    mask_BT = np.asarray(batch["target_mask"])
    segments_BT = np.asarray(batch.get("segment_ids", np.ones(mask_BT.shape, int)))
    places = np.arange(mask_BT.size)
    # Row by row: segments are numbered from 1 within each, and 0 is padding.
    ids = (places // mask_BT.shape[1]) * (segments_BT.max(initial=0) + 1) + segments_BT.reshape(-1)
    inside = segments_BT.reshape(-1) > 0
    _, starts, document = np.unique(ids[inside], return_index=True, return_inverse=True)
    ends = np.zeros(len(starts), np.int64)
    np.maximum.at(ends, document, np.where(mask_BT.reshape(-1), places + 1, 0)[inside])
    return np.maximum(ends - places[inside][starts], 0)
