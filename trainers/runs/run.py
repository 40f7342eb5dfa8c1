"""A training run: from a model's files to metrics, checkpoints and an export in one folder."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib

from models.llama.generation import random_key
from models.llama.load import Checkpoint, ModelFlags, compute_dtype, open_model, save_checkpoint
from models.llama.lora import LoRAConfig
from models.llama.model import REMATS, LLaMa, Params, init_params
from models.llama.tokenizer import Tokenizer
from trainers.runs.checkpoint import Checkpointer
from trainers.data import DataConfig, tokenizer_digest
from trainers.grpo_trainer import GRPOConfig
from trainers.loop import Progress, Session, fit
from trainers.runs.metrics import MetricsLog, ProgressBar
from trainers.planning.estimate import check_memory
from trainers.runs.recipes import Recipe
from trainers.rollout import RolloutConfig
from trainers.sft_trainer import SFTConfig
from trainers.trainer import Trainer, TrainState
from utils import distributed, sharding
from utils.console import cli
from utils.errors import ArtifactError, CheckpointError, ConfigError
from utils.fields import (
    ALWAYS,
    CONFIG,
    DATA,
    NEVER,
    Config,
    Setting,
    field,
    integer,
    one_of,
    setting,
)
from utils.files import InputFile, atomic_file, flatten, list_folder
from utils.distributed import check_replicas

_STOPPING = "finishing this step, then saving; press Ctrl-C again to quit at once"
_ROOT = Path(__file__).parents[2]

# A digest covers this many blocks of a larger file, evenly spread: another model differs everywhere.
_BLOCKS, _BLOCK_BYTES = 64, 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """A run's folder: what is written there, and how it starts."""

    out_dir: str = field(
        help="folder for run.json, metrics.jsonl, checkpoints/ and the final export/"
    )
    resume: bool = field(False, "resume from the newest intact checkpoint in out_dir")
    resume_step: int | None = field(None, "resume from the checkpoint of this step", integer(0))
    allow_data_change: bool = field(False, "resume although the data is not the same")
    allow_config_change: bool = field(
        False, "resume although the learning rate, batch size and the like differ"
    )
    keep: int = field(2, "newest checkpoints to keep, beside the best one", integer(1))
    export: bool = field(True, "write the model to out_dir/export in Hugging Face's format")
    tensorboard: bool = field(False, "write TensorBoard's event files too")
    check_every: int = field(
        100, "steps between comparisons of the parameters' copies on a mesh; 0: none", integer(0)
    )
    remat: str = field(
        "dots",
        "what the backward pass computes again; block needs least memory",
        one_of(*REMATS),
        resume=ALWAYS,
    )

    @property
    def folder(self) -> Path:
        """`out_dir`."""
        return Path(self.out_dir)

    @property
    def resumes(self) -> bool:
        """Whether the run starts from a checkpoint."""
        return self.resume or self.resume_step is not None


class Source(NamedTuple):
    """The model that a run starts from: its checkpoint, its tokenizer, and the dtype of activations."""

    checkpoint: Checkpoint
    tokenizer_path: Path
    tokenizer: Tokenizer
    dtype: Any


def load_source(flags: ModelFlags) -> Source:
    """Finds or fetches a checkpoint, loads its tokenizer, and shares it over the mesh from here on."""
    with cli.progress() as report:
        checkpoint, tokenizer = open_model(flags, progress=report, say=cli.note)
    tokenizer_path = Path(flags.tokenizer_path or checkpoint.path)
    return Source(checkpoint, tokenizer_path, tokenizer, compute_dtype(flags.dtype))


class Run(NamedTuple):
    """A run that can start: `prepare` has checked it.

    Attributes:
        meta: what its checkpoints are of, for `check_resume`.
        like: shapes and places of its state.
        key: the source of all that is random.
    """

    config: RunConfig
    recipe: Recipe
    source: Source
    trainer: Trainer
    meta: dict[str, Any]
    like: TrainState
    key: jax.Array


def train(recipe: Recipe, source: Source, config: RunConfig, seed: int, stop: cli.Signals) -> int:
    """Trains from a model's weights, or from a checkpoint, to the exported model.

    Args:
        recipe: the kind of training with its data.
        source: the model.
        config: the run's folder.
        seed: of all that is random.
        stop: ends the run after a step.

    Returns:
        The exit code: 0, or that of the signal which stopped the run before its end.
    """
    run = prepare(recipe, source, config, seed)
    with contextlib.ExitStack() as stack:
        checkpointer = _open_folder(run, stack)
        state, frozen, progress = restore_or_init(run, checkpointer)
        state = _fit(run, state, frozen, progress, checkpointer, stop, stack)
    stop.set(leave_at=1)  # nothing is left to finish: the export is written whole or not at all
    step, code = int(state.step), distributed.agree(stop.code or 0)
    if code and (config.export or step < run.trainer.config.max_steps):
        cli.say(f"stopped; step {step} is saved, continue with --resume", "")
        return code
    if config.export:
        export(run, state, frozen)
    return 0


def prepare(recipe: Recipe, source: Source, config: RunConfig, seed: int) -> Run:
    """Checks that model, recipe and machine fit, and that all processes were started alike."""
    key = random_key(seed)
    trainer = recipe.trainer(LLaMa(source.checkpoint.config, source.dtype, config.remat))
    meta = describe(trainer, source, recipe)
    if distributed.several():
        settings = dataclasses.asdict(config) | {"seed": seed}
        known = {"settings": settings, "checkpoint": files_digest(source.checkpoint.path)}
        distributed.check_same(versions() | known | meta)
    check_memory(recipe.memory(trainer), functools.partial(cli.say, kind=""))
    like = jax.eval_shape(
        lambda key: trainer.init(init_params(trainer.model.config, key), key)[0], key
    )
    if sharding.current_mesh() is not None:
        like = sharding.shapes_on(jax.sharding.get_mesh(), like, trainer.specs(like))
    return Run(config, recipe, source, trainer, meta, like, key)


def _open_folder(run: Run, stack: contextlib.ExitStack) -> Checkpointer:
    """The folder's checkpoints; neither overwrites an old run nor resumes from nothing."""
    folder, resumes = run.config.folder, run.config.resumes
    need_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(run.like))
    checkpointer = stack.enter_context(
        Checkpointer(folder / "checkpoints", keep=run.config.keep, need_bytes=need_bytes)
    )
    steps = checkpointer.steps
    if steps and not resumes:
        raise CheckpointError(
            f"{folder} holds a run that got to step {steps[-1]}; pass --resume to continue it, or "
            "another --out_dir"
        )
    if resumes and not steps:
        raise CheckpointError(f"{folder} has no checkpoint to resume from; start without --resume")
    return checkpointer


def restore_or_init(run: Run, checkpointer: Checkpointer) -> tuple[TrainState, Params, Progress]:
    """(state, frozen parameters, progress) of a checkpoint or of the model; writes run.json."""
    trainer = run.trainer
    if run.config.resumes:
        state, progress = _restore(run, checkpointer)
        frozen = load_params(run, frozen=True) if trainer.keeps_frozen else {}
    else:
        params = load_params(run, frozen=trainer.lora is not None)
        (state, frozen), progress = trainer.init(params, run.key, donate=True), Progress()
    if distributed.is_first():
        paths = {
            "ckpt_dir": str(run.source.checkpoint.path),
            "tokenizer": str(run.source.tokenizer_path),
        }
        with atomic_file(run.config.folder / "run.json") as file:
            file.write(json.dumps(run.meta | {"source": paths}, indent=1).encode())
    return state, frozen, progress


def _restore(run: Run, checkpointer: Checkpointer) -> tuple[TrainState, Progress]:
    """A checkpoint's state; says what differs from it."""
    step = run.config.resume_step
    check = functools.partial(
        check_resume,
        now=run.meta,
        allow_data_change=run.config.allow_data_change,
        allow_config_change=run.config.allow_config_change,
    )
    # Before the arrays, as another optimizer's cannot be read; then by what was read in the end.
    check(checkpointer.read_meta(step))
    restored = checkpointer.restore(run.like, step=step)
    for change in check(restored.meta):
        cli.say(f"changed: {change}", "")
    cli.say(f"resuming from step {restored.step} of {run.trainer.config.max_steps}", "")
    progress = Progress(**restored.meta["progress"])
    if restored.meta["data"] != run.meta["data"]:
        progress = dataclasses.replace(progress, position=None)
    return restored.state, progress


def load_params(run: Run, *, frozen: bool) -> Params:
    """The model's parameters; those of a frozen model have the dtype in which it computes."""
    dtype = run.trainer.model.dtype if frozen else run.trainer.config.param_dtype
    with cli.progress() as report:
        return run.source.checkpoint.params(dtype, progress=report)


def _fit(
    run: Run,
    state: TrainState,
    frozen: Params,
    progress: Progress,
    checkpointer: Checkpointer,
    stop: cli.Signals,
    stack: contextlib.ExitStack,
) -> TrainState:
    """Steps until the end or a signal, with the run's data, logs and progress bar."""
    config, start_step = run.config, int(state.step) + 1
    data, evaluated = run.recipe.open(run.trainer, config.folder, start_step, stack)
    bar = stack.enter_context(ProgressBar(run.trainer.config.max_steps, console=cli.stderr))
    log = MetricsLog(
        config.folder, tensorboard=config.tensorboard, start_step=start_step, sinks=[bar]
    )
    session = Session(
        progress=progress,
        meta=run.meta,
        should_stop=lambda: stop.code is not None,
        check=functools.partial(_check_copies, run),
        agree=distributed.agree,
    )
    stop.set(leave_at=2, notice=_STOPPING)
    state, _ = fit(
        run.trainer,
        state,
        frozen,
        data,
        eval_data=evaluated,
        log=stack.enter_context(log),
        checkpointer=checkpointer,
        session=session,
    )
    return state


def _check_copies(run: Run, state: TrainState) -> None:
    """Compares the copies of the parameters on a mesh, every `check_every` steps."""
    every = run.config.check_every
    if every and int(state.step) % every == 0:
        check_replicas(state.params, run.trainer.specs(state).params)


def export(run: Run, state: TrainState, frozen: Params) -> None:
    """Writes the trained model, adapters merged, in Hugging Face's format."""
    folder = run.config.folder / "export"
    save = functools.partial(
        save_checkpoint, format="hf", tokenizer=run.source.tokenizer_path, overwrite=True
    )
    with cli.busy("exporting"):
        params = distributed.to_first(run.trainer.export_params(state, frozen))
        distributed.from_first(lambda: save(folder, run.trainer.model.config, params))
    cli.say(f"exported to {folder}: python generate.py --ckpt_dir {folder} --chat", "")


def describe(trainer: Trainer, source: Source, recipe: Recipe) -> dict[str, Any]:
    """The meta of a run's checkpoints: its model, tokenizer, data, settings and adapters."""
    numerics = {"dtype": jnp.dtype(trainer.model.dtype).name, "remat": trainer.model.remat}
    known = recipe.meta(trainer)
    return {
        "model": dataclasses.asdict(trainer.model.config),
        "tokenizer": tokenizer_digest(source.tokenizer),
        "data": known["data"],
        "train": dataclasses.asdict(trainer.config) | known["train"] | numerics,
        "lora": dataclasses.asdict(trainer.lora) if trainer.lora is not None else {},
    }


# Settings by their path in a checkpoint's meta.
_SETTINGS = {
    f"train.{f.name}": setting(f)
    for config in (SFTConfig, GRPOConfig, DataConfig, RolloutConfig, RunConfig)
    for f in dataclasses.fields(config)
} | {f"lora.{f.name}": setting(f) for f in dataclasses.fields(LoRAConfig)}
_SETTINGS["train.dtype"] = Setting(flag="dtype")

# How each kind of difference is refused.
_ADVICE = {
    CONFIG: "change back, or pass --allow_config_change",
    DATA: "change back, or pass --allow_data_change",
    NEVER: "never allowed: start anew in another --out_dir",
}


def check_resume(
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    allow_data_change: bool = False,
    allow_config_change: bool = False,
) -> list[str]:
    """Compares the settings of a checkpoint with those of the run that resumes from it.

    The rules stand on the configs' fields; a setting without one must not differ.

    Args:
        saved, now: as `describe` makes them; the "progress" of a checkpoint may differ.
        allow_data_change: whether the data may differ.
        allow_config_change: whether the learning rate, batch size and the like may.

    Returns:
        The differences that are allowed, "--flag saved → now" each.

    Raises:
        ConfigError: some are not allowed; all of those are named, with the flag that would allow them.
    """
    allowed, refused = [], {}
    old, new = _flat_json(saved), _flat_json(now)
    for path in sorted(old.keys() | new.keys()):
        before, after = old.get(path, "absent"), new.get(path, "absent")
        if before == after:
            continue
        known = _SETTINGS.get(path, Setting(resume=DATA if path.startswith("data.") else NEVER))
        text = f"{f'--{known.flag}' if known.flag else path} {before} → {after}"
        if known.resume == ALWAYS or {CONFIG: allow_config_change, DATA: allow_data_change}.get(
            known.resume
        ):
            allowed.append(text)
        else:
            refused.setdefault(known.resume, []).append(text)
    if refused:
        listed = (f"{', '.join(texts)} ({_ADVICE[rule]})" for rule, texts in refused.items())
        raise ConfigError("these settings differ from the checkpoint's: " + "; ".join(listed))
    return allowed


def _flat_json(meta: Mapping[str, Any]) -> dict[str, str]:
    """A meta's values as JSON by their paths: a tuple is the list that it was saved as, 1 is not true."""
    known = {name: value for name, value in meta.items() if name != "progress"}
    return {path: json.dumps(value) for path, value in flatten(known, ".").items()}


def versions() -> dict[str, str]:
    """The versions of the code (a digest of its files) and of what it runs on."""
    code = hashlib.sha256()
    for room in ("models", "trainers", "utils"):
        for path in sorted((_ROOT / room).rglob("*.py")):
            code.update(path.relative_to(_ROOT).as_posix().encode() + path.read_bytes())
    python = ".".join(map(str, sys.version_info[:2]))
    known = {"code": code.hexdigest()[:16], "jax": jax.__version__, "jaxlib": jaxlib.__version__}
    return known | {"python": python}


def files_digest(path: Path) -> str:
    """A digest of a checkpoint's files: names, sizes, and up to 64 MiB of the content of each.

    Raises ArtifactError if a file cannot be read.
    """
    digest = hashlib.sha256()
    for name in list_folder(path) if path.is_dir() else [""]:
        if (path / name).is_dir():
            continue
        file = InputFile(path / name, ArtifactError)
        digest.update(f"{name} {file.size} ".encode())
        step = max(_BLOCK_BYTES, (file.size - _BLOCK_BYTES) // (_BLOCKS - 1))
        for offset in range(0, file.size, step):
            digest.update(file.read(offset, min(_BLOCK_BYTES, file.size - offset)))
    return digest.hexdigest()[:16]
