"""A run's folder, opened again after the run: its settings, its model and its trainer."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from models.llama.checkpoint import Checkpoint, open_checkpoint
from models.llama.lora import LoRAConfig
from models.llama.model import LLaMa
from trainers.grpo_trainer import GRPOConfig, GRPOTrainer
from trainers.planning.job import rows_at_once
from trainers.sft_trainer import SFTConfig, SFTTrainer
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
    train, source = settings["train"], open_checkpoint(settings["source"]["ckpt_dir"])
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
    if "group_size" in train:
        at_once, _ = rows_at_once(train["micro_batch_size"], train["group_size"])
        config = saved_config(GRPOConfig, train | {"micro_batch_size": at_once})
        return OpenedRun(settings, source, GRPOTrainer(model, config, lora, train["vocab_limit"]))
    return OpenedRun(settings, source, SFTTrainer(model, saved_config(SFTConfig, train), lora))


def saved_config(cls: type, train: dict[str, Any]) -> Any:
    """A config from its fields among a run's settings."""
    return cls(**{f.name: train[f.name] for f in dataclasses.fields(cls) if f.name in train})
