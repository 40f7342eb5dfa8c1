"""A run's folder, opened again after the run: its settings, its model and its trainer."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from models.llama.checkpoint import Checkpoint, open_checkpoint
from models.llama.lora import LoRAConfig
from models.llama.model import LLaMa
from trainers.runs.recipes import RECIPES
from trainers.trainer import Trainer
from utils.errors import ConfigError, DataError
from utils.files import read_json


class OpenedRun(NamedTuple):
    """The parts that a run was made of.

    Attributes:
        settings: run.json.
        source: the model that it started from.
        trainer: as its flags made it, on one device.
    """

    settings: dict[str, Any]
    source: Checkpoint
    trainer: Trainer


def read_settings(folder: Path) -> dict[str, Any]:
    """run.json of a run's folder. Raises DataError if it is none."""
    settings = read_json(folder / "run.json", error=DataError)
    if missing := {"model", "train", "lora", "source"} - settings.keys():
        raise DataError(f"{folder}/run.json is not a run's: it has no {', '.join(sorted(missing))}")
    return settings


def open_run(folder: Path, settings: dict[str, Any]) -> OpenedRun:
    """Opens the model of a run, and makes its trainer.

    Args:
        folder: the run's.
        settings: as `read_settings` gives them.

    Raises:
        ConfigError: the model's weights are not those that the run started from.
    """
    train, files = settings["train"], settings["source"]
    source = open_checkpoint(files["ckpt_dir"], adapter=files.get("adapter"))
    if source.digest() != settings.get("base_weights"):
        raise ConfigError(
            f"the weights in {source.path} are not those that {folder} started from; put those back "
            "(run.json has their digest, base_weights)"
        )
    context = settings["model"]["max_seq_len"]
    source = source._replace(config=dataclasses.replace(source.config, max_seq_len=context))
    source = source._replace(quantize=train["quantize"] is not None)
    model = LLaMa(source.config, jnp.dtype(train["dtype"]), train["remat"])
    lora = LoRAConfig(**settings["lora"]) if settings["lora"] else None
    recipe = next(RECIPES[name] for name in RECIPES if name in train)
    return OpenedRun(settings, source, recipe.reopened(model, train, lora))
