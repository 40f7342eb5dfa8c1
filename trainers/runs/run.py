"""A training run: from a model's files to metrics, checkpoints and an export in one folder."""

import contextlib
import dataclasses
import functools
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.llama.generation import context_length, random_key
from models.llama.hub import commit_of
from models.llama.checkpoint import Checkpoint, compute_dtype
from models.llama.load import ModelFlags, open_model
from models.llama.model import LLaMa, Params, init_params
from models.llama.tokenizer import Tokenizer
from trainers.data import tokenizer_digest
from trainers.loop import Progress, Session, fit
from trainers.planning.estimate import check_memory
from trainers.runs.checkpoint import Checkpointer, CheckpointReader
from trainers.runs.export import export, export_adapter
from trainers.runs.folder import RunConfig, versions, write_run
from trainers.runs.metrics import MetricsLog, earlier_records
from trainers.runs.recipes import Recipe
from trainers.runs.resume import check_resume, keep_first_defaults
from trainers.runs.start import start, with_adapter, with_reference
from trainers.trainer import Trainer, TrainState
from utils import distributed, sharding
from utils.console import cli
from utils.console.steps import StepTable
from utils.distributed import check_replicas
from utils.errors import CheckpointError
from utils.memory import peak_memory_bytes

_STOPPING = "finishing this step, then saving; press Ctrl-C again to quit at once"


class Source(NamedTuple):
    """The model that a run starts from: its checkpoint, its tokenizer, and the dtype of activations.

    `name` is the user's word for it.
    """

    checkpoint: Checkpoint
    tokenizer_path: Path
    tokenizer: Tokenizer
    dtype: Any
    name: str


def load_source(flags: ModelFlags, max_seq_len: int | None = None) -> Source:
    """Finds or fetches a checkpoint, loads its tokenizer, and shares it over the mesh from here on.

    `max_seq_len` is the context; None: as the files say. Warns if it is more than that.
    """
    with cli.progress() as report:
        checkpoint, tokenizer = open_model(flags, progress=report, say=cli.note)
    context = context_length(checkpoint.config, max_seq_len)
    config = dataclasses.replace(checkpoint.config, max_seq_len=context)
    checkpoint = checkpoint._replace(config=config)
    tokenizer_path = Path(flags.tokenizer_path or checkpoint.path)
    return Source(checkpoint, tokenizer_path, tokenizer, compute_dtype(flags.dtype), flags.ckpt_dir)


class Run(NamedTuple):
    """A run that can start: `prepare` has checked it.

    Attributes:
        meta: what its checkpoints are of, for `check_resume`.
        like: shapes and places of its state.
        key: the source of all that is random.
        flags: the command line's, for run.json.
    """

    config: RunConfig
    recipe: Recipe
    source: Source
    trainer: Trainer
    meta: dict[str, Any]
    like: TrainState
    key: jax.Array
    flags: dict[str, Any]


def train(
    recipe: Recipe,
    source: Source,
    config: RunConfig,
    seed: int,
    stop: cli.Signals,
    flags: dict[str, Any] = {},
) -> int:
    """Trains from a model's weights, or from a checkpoint, to the exported model.

    Args:
        recipe: the kind of training with its data.
        source: the model.
        config: the run's folder.
        seed: of all that is random.
        stop: ends the run after a step.
        flags: the command line's, for run.json.

    Returns:
        The exit code: 0, or that of the signal which stopped the run before its end.
    """
    # Looked up once: the run's own checkpoints come soon.
    resume = distributed.from_first(lambda: config.resumes)
    run = prepare(recipe, source, dataclasses.replace(config, resume=resume), seed, flags)
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
        folder = config.folder / "export"
        dtype = jnp.dtype(config.export_dtype or source.checkpoint.dtype)
        tokenizer = source.tokenizer_path
        export(folder, run.trainer, state, frozen, tokenizer, dtype, _template(recipe))
        export_adapter(config.folder / "adapter", run.trainer, state, source.name)
    cli.note(f"report: python train.py report --run {shlex.quote(config.out_dir)}")
    return 0


def _template(recipe: Recipe) -> str | None:
    """The chat template that a run trains with."""
    return recipe.chat and recipe.chat.template.as_rendered


def prepare(
    recipe: Recipe, source: Source, config: RunConfig, seed: int, flags: dict[str, Any]
) -> Run:
    """Checks that model, recipe and machine fit, and that all processes were started alike."""
    key, recipe = random_key(seed), with_adapter(recipe, source.checkpoint)
    model = LLaMa(source.checkpoint.config, source.dtype, config.remat)
    trainer = recipe.trainer(model)
    past = CheckpointReader(config.checkpoints)
    if config.resumes and past.has_past:
        saved = past.read_meta(config.resume_step)["train"]
        recipe = keep_first_defaults(recipe, trainer, saved)
        trainer = recipe.trainer(model)
    meta = describe(trainer, source, recipe)
    if distributed.several():
        settings = dataclasses.asdict(config) | {"seed": seed}
        distributed.check_same(versions() | {"settings": settings} | meta)
    like = jax.eval_shape(
        lambda key: trainer.init(init_params(trainer.model.config, key), key)[0], key
    )
    parts = [f"model: {source.name}", f"{trainer.model.config.n_params / 1e6:,.1f}M parameters"]
    if trainer.lora is not None:
        trained = sum(x.size for x in jax.tree.leaves(like.params)) / 1e6
        parts.append(f"LoRA rank {trainer.lora.rank} ({trained:,.2f}M trained)")
    cli.note(" · ".join(parts))
    saved = _bytes(like) // jax.process_count()
    needed = recipe.memory(trainer, meta["train"]["quantize"])
    check_memory(needed, cli.note, saved=saved)
    if sharding.current_mesh() is not None:
        like = sharding.shapes_on(jax.sharding.get_mesh(), like, trainer.specs(like))
    return Run(config, recipe, source, trainer, meta, like, key, flags)


def _bytes(like: TrainState) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(like))


def _open_folder(run: Run, stack: contextlib.ExitStack) -> Checkpointer:
    """The folder's checkpoints; neither overwrites an old run nor resumes from nothing."""
    folder, resumes = run.config.folder, run.config.resumes
    checkpointer = stack.enter_context(
        Checkpointer(run.config.checkpoints, keep=run.config.keep, need_bytes=_bytes(run.like))
    )
    if not resumes:
        checkpointer.start_anew()
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
        frozen = with_reference(trainer, run.source.checkpoint, frozen)
    else:
        params = load_params(run, frozen=trainer.lora is not None)
        state, frozen = start(trainer, run.source.checkpoint, params, run.key, donate=True)
        progress = Progress()
    if distributed.is_first():
        paths = {
            "ckpt_dir": str(run.source.checkpoint.path),
            "commit": commit_of(run.source.checkpoint.path),
            "name": run.source.name,
            "adapter": run.source.checkpoint.adapter and str(run.source.checkpoint.adapter.path),
            "tokenizer": str(run.source.tokenizer_path),
            "template": _template(run.recipe),
            "data_commit": run.recipe.data.commit,
            "eval_commit": run.recipe.evaluated and run.recipe.evaluated.commit,
        }
        write_run(run.config, run.meta | {"source": paths}, run.flags)
    return state, run.recipe.frozen(trainer, frozen), progress


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
    last, progress = run.trainer.config.max_steps, Progress(**restored.meta["progress"])
    if restored.step < last:
        cli.say(f"resuming from step {restored.step} of {last}", "")
    else:
        cli.say(
            f"already finished: step {restored.step} of {last}; a larger --max_steps goes on", ""
        )
    then, now = restored.meta, run.meta
    if (then["data"], then["train"].get("seed")) != (now["data"], now["train"].get("seed")):
        progress = dataclasses.replace(progress, position=None)  # another order, from its start
    return restored.state, progress


def load_params(run: Run, *, frozen: bool) -> Params:
    """The model's parameters; those of a frozen model have the dtype in which it computes."""
    dtype = run.trainer.model.dtype if frozen else run.trainer.config.param_dtype
    with cli.progress() as report:
        return run.source.checkpoint.base.params(dtype, progress=report)


def _fit(
    run: Run,
    state: TrainState,
    frozen: Params,
    progress: Progress,
    checkpointer: Checkpointer,
    stop: cli.Signals,
    stack: contextlib.ExitStack,
) -> TrainState:
    """Steps until the end or a signal, with the run's data and logs."""
    config, start_step = run.config, int(state.step) + 1
    table = StepTable(run.trainer.config.max_steps, evaluates=run.recipe.evaluated is not None)
    data, evaluated = run.recipe.open(run.trainer, config.folder, start_step, stack, table)
    log = MetricsLog(
        config.folder,
        track=config.track,
        start_step=start_step,
        sinks=[table],
        watch=table.watch,
    )
    if start_step > 1:
        table.remember(earlier_records(config.folder / "metrics.jsonl"))
    stack.enter_context(table)
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
    if int(state.step) == run.trainer.config.max_steps:
        cli.note(table.summary(peak_memory_bytes()))
    return state


def _check_copies(run: Run, state: TrainState) -> None:
    """Compares the copies of the parameters on a mesh, every `check_every` steps."""
    every = run.config.check_every
    if every and int(state.step) % every == 0:
        check_replicas(state.params, run.trainer.specs(state).params)


def describe(trainer: Trainer, source: Source, recipe: Recipe) -> dict[str, Any]:
    """The meta of a run's checkpoints: its model, tokenizer, data, settings and adapters."""
    numerics = {"dtype": jnp.dtype(trainer.model.dtype).name, "remat": trainer.model.remat}
    numerics["quantize"] = "int8" if source.checkpoint.quantize else None
    known = recipe.meta(trainer)
    return {
        "model": dataclasses.asdict(trainer.model.config),
        "base_weights": source.checkpoint.digest(),
        "tokenizer": tokenizer_digest(source.tokenizer),
        "data": known["data"],
        "train": dataclasses.asdict(trainer.config) | known["train"] | numerics,
        "lora": dataclasses.asdict(trainer.lora) if trainer.lora is not None else {},
    }
