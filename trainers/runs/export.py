"""Exporting: from a run's state to a model's folder."""

import functools
import shlex
from pathlib import Path

import jax
import numpy as np

from models.llama.load import save_checkpoint
from models.llama.model import Params
from models.llama.tokenizer import load_tokenizer
from trainers.trainer import Trainer, TrainState
from utils import distributed
from utils.console import cli


def export(
    folder: Path,
    trainer: Trainer,
    state: TrainState,
    frozen: Params,
    tokenizer: Path,
    dtype: np.dtype,
    template: str | None = None,
) -> None:
    """Writes the trained model, adapters merged, in Hugging Face's format; replaces an older export.

    `template` is the chat template that it was trained with; None: the tokenizer's own, if any.
    """
    save = functools.partial(
        save_checkpoint, format="hf", tokenizer=tokenizer, template=template, overwrite=True
    )
    with cli.busy("exporting"):
        params = jax.tree.map(lambda x: x.astype(dtype), trainer.export_params(state, frozen))
        params = distributed.to_first(params)
        distributed.from_first(lambda: save(folder, trainer.model.config, params))
    chat = " --chat" * (template is not None or load_tokenizer(tokenizer).chat_template is not None)
    told = shlex.quote(str(folder))
    cli.say(f"exported to {folder}: python generate.py --ckpt_dir {told}{chat}", "")
