"""Starting a run from a model: new parameters to train, or those of an adapter that goes on."""

import dataclasses

import jax

from models.llama.checkpoint import Checkpoint
from models.llama.lora import attach
from models.llama.model import Params
from trainers.runs.recipes import Recipe
from trainers.trainer import Trainer, TrainState
from utils.errors import ConfigError


def with_adapter(recipe: Recipe, checkpoint: Checkpoint) -> Recipe:
    """The recipe that trains the adapter which the model was opened with, if any."""
    if checkpoint.adapter is None:
        return recipe
    if recipe.lora is not None:
        raise ConfigError(
            "--adapter goes on training an adapter of its own rank; leave out --lora_rank"
        )
    return dataclasses.replace(recipe, lora=checkpoint.lora)


def start(
    trainer: Trainer,
    checkpoint: Checkpoint,
    params: Params,
    key: jax.Array,
    *,
    donate: bool = False,
) -> tuple[TrainState, Params]:
    """`Trainer.init`, with the checkpoint's adapter in place of new ones; `params` are without it."""
    state, frozen = trainer.init(params, key, donate=donate)
    if checkpoint.adapter is not None:
        state = state.replace(params=checkpoint.adapter_params(trainer.config.param_dtype))
    return state, with_reference(trainer, checkpoint, frozen)


def with_reference(trainer: Trainer, checkpoint: Checkpoint, frozen: Params) -> Params:
    """The frozen parameters; the adapter is attached where the loss compares with the model at the start.

    `Trainer.model_params` replaces it by the trained one, `Trainer.export_params` leaves it out.
    """
    if checkpoint.adapter is None or not trainer.config.needs_reference:
        return frozen
    return attach(frozen, checkpoint.adapter_params(trainer.model.dtype), checkpoint.lora)
