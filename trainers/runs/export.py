"""Exporting: from a run's state to a model's folder."""

import dataclasses
import functools
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from models.llama.layout import DTYPES
from models.llama.load import save_adapter, save_checkpoint
from models.llama.model import Params, init_params
from models.llama.tokenizer import load_tokenizer
from trainers.runs.checkpoint import CheckpointReader
from trainers.runs.saved import open_run, read_settings
from trainers.trainer import Trainer, TrainState
from utils import distributed, sharding
from utils.console import cli
from utils.errors import ConfigError
from utils.fields import Config, field, integer, one_of
from utils.sharding import default_mesh, make_mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportFlags(Config):
    """The checkpoint of a run that becomes a model, and where."""

    run: str = field(help="the run's folder, its --out_dir")
    step: int | None = field(None, "the checkpoint's step; default: the newest", integer(0))
    best: bool = field(False, "the checkpoint with the lowest score in an evaluation")
    out: str | None = field(
        None, "the model's folder, default: export in the run's; an adapter goes to OUT-adapter"
    )
    dtype: str | None = field(
        None, "dtype of the weights; default: as in the model that was trained", one_of(*DTYPES)
    )

    def problems(self) -> list[str]:
        both = ["pass either step=N or best=true"] if self.best and self.step is not None else []
        return super().problems() + both


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


def export_adapter(folder: Path, trainer: Trainer, state: TrainState, base: str) -> None:
    """Writes the trained adapters, if there are any, in PEFT's format; replaces older ones.

    `base` names the model that they belong to.
    """
    if trainer.lora is None:
        return
    config, tree = trainer.model.config, distributed.to_first(state.params)
    save = functools.partial(save_adapter, folder, config, tree, trainer.lora, base=base)
    distributed.from_first(lambda: save(overwrite=True))
    cli.say(f"adapter for peft, or --adapter: {folder}", "")


def export_run(
    folder: Path,
    out: Path | None,
    *,
    step: int | None = None,
    best: bool = False,
    dtype: str | None = None,
) -> None:
    """Exports a checkpoint of a run that ended, was killed, or trains still.

    Several devices share its state, whatever mesh the run had.

    Args:
        folder: the run's.
        out: the model's folder; an older one is replaced. Adapters go to another one, whose name has
            "-adapter" behind it. None: "export" and "adapter" in the run's folder.
        step: which checkpoint; None: the newest.
        best: the one with the lowest score instead.
        dtype: of the weights; None: that of the model which the run started from.

    Raises ConfigError, DataError or CheckpointError if the folder does not hold that.
    """
    settings, reader = read_settings(folder), CheckpointReader(folder / "checkpoints")
    if best and (step := reader.best) is None:
        raise ConfigError(
            f"no checkpoint in {folder} has a score; the run needs --eval_data, or --step"
        )
    _, source, trainer = open_run(folder, settings)
    key = jax.random.key(settings["train"]["seed"])
    like = jax.eval_shape(
        lambda key: trainer.init(init_params(trainer.model.config, key), key)[0], key
    )
    if jax.device_count() > 1:
        jax.set_mesh(make_mesh(default_mesh(trainer.model.config, jax.device_count())))
        like = sharding.shapes_on(jax.sharding.get_mesh(), like, trainer.specs(like))
    restored = reader.restore(like, step=step)
    with cli.progress() as report:
        lora = trainer.lora is not None
        frozen = source.base.params(trainer.model.dtype, progress=report) if lora else {}
    cli.say(f"step {restored.step} of {folder}", "")
    files, dtype = settings["source"], jnp.dtype(dtype or source.dtype)
    tokenizer, template = Path(files["tokenizer"]), files.get("template")
    model = out or folder / "export"
    export(model, trainer, restored.state, frozen, tokenizer, dtype, template)
    adapter = Path(f"{out}-adapter") if out else folder / "adapter"
    export_adapter(adapter, trainer, restored.state, files.get("name", files["ckpt_dir"]))
