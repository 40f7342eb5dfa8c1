"""Training from the command line: `python train.py sft --data … --out_dir …`."""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports ends the program without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import console
from generate import random_key
from models.llama.config import ModelConfig
from models.llama.hub import DEFAULT_MODEL, resolve
from models.llama.load import load_checkpoint, load_config, save_checkpoint
from models.llama.lora import LoRAConfig
from models.llama.model import LLaMa, Params, init_params
from models.llama.tokenizer import Tokenizer, check_against_model, load_tokenizer
from trainers.checkpoint import Checkpointer
from trainers.data import DataConfig, Dataset, load_dataset, tokenizer_digest
from trainers.loop import Progress, fit
from trainers.metrics import MetricsLog, ProgressBar
from trainers.resume import check_resume
from trainers.sft_trainer import SFTConfig, SFTTrainer
from trainers.trainer import Trainer, TrainState
from utils.errors import CheckpointError, ConfigError, is_int, raise_all
from utils.files import atomic_file
from utils.memory import human
from utils.train_memory import check_training_fits, peak_bytes, training_bytes

# What trains on two cores and 8 GB with the default model; see `sft` for their meaning.
_LEARNING_RATE, _LORA_LEARNING_RATE = 2e-5, 2e-4

_REMATS = ("none", "dots", "block")


def sft(
    data: str,
    out_dir: str,
    ckpt_dir: str = DEFAULT_MODEL,
    tokenizer_path: str | None = None,
    eval_data: str | None = None,
    max_steps: int = 100,
    batch_size: int = 8,
    micro_batch_size: int | None = 4,
    seq_len: int = 512,
    packing: bool = False,
    mask: str = "auto",
    overlong: str = "truncate",
    chat_format: str | None = None,
    skip_bad: int = 0,
    lr: float | None = None,
    optimizer: str = "adamw",
    schedule: str = "cosine",
    warmup_steps: int | None = None,
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
    lora_rank: int = 0,
    lora_alpha: float | None = None,
    dtype: str = "auto",
    param_dtype: str = "float32",
    state_dtype: str = "float32",
    remat: str = "dots",
    seed: int = 0,
    save_every: int = 50,
    eval_every: int = 50,
    keep: int = 2,
    resume: bool = False,
    resume_step: int | None = None,
    allow_data_change: bool = False,
    allow_config_change: bool = False,
    tensorboard: bool = False,
    export: bool = True,
    debug: bool = False,
) -> None:
    """Fine-tunes on conversations, prompts with completions, or texts.

    Args:
        data: a .jsonl or .jsonl.gz file, or a data set on the hub, of {"messages": […]},
            {"prompt": …, "completion": …} or {"text": …}.
        out_dir: gets run.json, metrics.jsonl, checkpoints/ and at the end export/.
        ckpt_dir: the model to start from, as for generate.py.
        tokenizer_path: a tokenizer file or folder; default: the checkpoint's own.
        eval_data: as data; its loss decides which checkpoint is the best.
        max_steps: optimizer steps of the whole run.
        batch_size: rows an optimizer step.
        micro_batch_size: rows computed at once: less needs less memory; the update is the same.
        seq_len: tokens of the longest row.
        packing: several examples share a row.
        mask: what is learnt: auto, assistant, last, completion or all.
        overlong: what happens to longer examples: truncate, drop or split.
        chat_format: llama2, llama3 or the name of one of the checkpoint's templates.
        skip_bad: so many broken rows are left out.
        lr: the peak learning rate; default: 2e-5, with LoRA 2e-4.
        optimizer: adamw, adafactor, lion or muon.
        schedule: constant, linear, cosine or wsd.
        warmup_steps: default: 3 % of max_steps.
        weight_decay: not on norms and biases.
        clip_norm: of the gradients; 0 is off.
        lora_rank: above 0 trains adapters of that rank next to the frozen model.
        lora_alpha: default: twice the rank.
        dtype: of activations: float32, bfloat16, or auto: float32 on a CPU, bfloat16 elsewhere.
        param_dtype: of the trained parameters.
        state_dtype: of the optimizer's moments.
        remat: what the backward pass computes again: none, dots or block; block needs least memory.
        seed: of adapters and of the data's order.
        save_every: steps between checkpoints.
        eval_every: steps between evaluations.
        keep: how many of the newest checkpoints stay, beside the best.
        resume: go on from out_dir's newest checkpoint that is whole.
        resume_step: go on from this step's checkpoint.
        allow_data_change: go on although the data is not the same.
        allow_config_change: go on although the learning rate, batch size and the like differ.
        tensorboard: write event files too.
        export: write the model to out_dir/export in Hugging Face's format.
        debug: show the traceback of an error.
    """
    stop = console.StopSignals()
    console.keep_compilations()
    # All flags before anything is fetched and loaded: a wrong one should not cost that time.
    lora_of = functools.partial(LoRAConfig, rank=lora_rank, alpha=lora_alpha)
    default_lr = _LEARNING_RATE if lora_rank == 0 else _LORA_LEARNING_RATE
    config_of = functools.partial(
        SFTConfig,
        optimizer=optimizer,
        learning_rate=default_lr if lr is None else lr,
        schedule=schedule,
        warmup_steps=_warmup(max_steps) if warmup_steps is None else warmup_steps,
        max_steps=max_steps,
        weight_decay=weight_decay,
        clip_norm=None if clip_norm == 0 else clip_norm,
        state_dtype=state_dtype,
        micro_batch_size=micro_batch_size,
        param_dtype=param_dtype,
        save_every=save_every,
        eval_every=eval_every,
    )
    data_of = functools.partial(
        DataConfig,
        seq_len=seq_len,
        batch_size=batch_size,
        packing=packing,
        mask=mask,
        overlong=overlong,
        seed=seed,
        chat_format=chat_format,
    )
    run_of = functools.partial(
        Run,
        out_dir=Path(out_dir),
        keep=keep,
        resume=resume or resume_step is not None,
        resume_step=resume_step,
        allow_data_change=allow_data_change,
        allow_config_change=allow_config_change,
        tensorboard=tensorboard,
        export=export,
    )
    config, data_config, lora, run, compute, remat = console.all_of(
        config_of,
        data_of,
        lora_of if lora_rank != 0 else lambda: None,
        run_of,
        functools.partial(console.compute_dtype, dtype),
        functools.partial(_known_remat, remat),
    )
    key = random_key(seed)
    source = load_source(ckpt_dir, tokenizer_path)
    dataset = load_dataset(data, source.tokenizer, data_config, skip_bad=skip_bad)
    dataset.check_full_batch()
    say_counts("data", dataset)
    evaluated = None
    if eval_data is not None:
        evaluated = load_dataset(eval_data, source.tokenizer, data_config)
        say_counts("eval_data", evaluated)
    trainer_of = lambda model: SFTTrainer(LLaMa(model, compute, remat), config, lora)
    run.train(trainer_of, source, dataset, evaluated, key, stop)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """The model that a run starts from: its files, and what was read of them first."""

    path: Path
    tokenizer_path: Path
    tokenizer: Tokenizer


def load_source(ckpt_dir: str, tokenizer_path: str | None) -> Source:
    """Finds or fetches a checkpoint, and loads its tokenizer."""
    with console.progress() as report:
        path = resolve(ckpt_dir, report)
    found = Path(tokenizer_path or path)
    return Source(path=path, tokenizer_path=found, tokenizer=load_tokenizer(found))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run's folder: what is written there, and what it may go on from.

    `run.json` (the flags' meaning), `metrics.jsonl`, `checkpoints/`, `export/`.
    """

    out_dir: Path
    keep: int
    resume: bool
    resume_step: int | None
    allow_data_change: bool
    allow_config_change: bool
    tensorboard: bool
    export: bool

    def __post_init__(self):
        problems = []
        if not is_int(self.keep) or self.keep < 1:
            problems.append(f"keep={self.keep!r}, expected an integer from 1")
        step = self.resume_step
        if step is not None and not (is_int(step) and step >= 0):
            problems.append(f"resume_step={step!r}, expected an integer from 0")
        raise_all("Run", problems)

    def train(
        self,
        trainer_of: Callable[[ModelConfig], Trainer],
        source: Source,
        dataset: Dataset,
        evaluated: Dataset | None,
        key: jax.Array,
        stop: console.StopSignals,
    ) -> None:
        """From the model's weights to the exported model; goes on from a checkpoint if asked to."""
        trainer = trainer_of(load_config(source.path))
        check_against_model(source.tokenizer, trainer.model.config.vocab_size)
        dataset.check_context(trainer.model.config.max_seq_len)
        check_memory(trainer, dataset)
        like = jax.eval_shape(
            lambda key: trainer.init(init_params(trainer.model.config, key), key)[0], key
        )
        need_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(like))
        meta = describe(trainer, source, dataset)
        with contextlib.ExitStack() as stack:
            checkpointer = stack.enter_context(
                Checkpointer(self.out_dir / "checkpoints", keep=self.keep, need_bytes=need_bytes)
            )
            self._check_start(checkpointer)
            if self.resume:
                state, progress = self._restore(checkpointer, like, meta)
                frozen = load_params(trainer, source) if trainer.lora is not None else {}
            else:
                state, frozen = trainer.init(load_params(trainer, source), key, donate=True)
                progress = Progress()
            with atomic_file(self.out_dir / "run.json") as file:
                file.write(json.dumps(meta, indent=1).encode())
            bar = stack.enter_context(ProgressBar(trainer.config.max_steps))
            logged = dict(tensorboard=self.tensorboard, start_step=int(state.step) + 1, sinks=[bar])
            log = stack.enter_context(MetricsLog(self.out_dir, **logged))
            stop.at_once = False
            state, _ = fit(
                trainer,
                state,
                frozen,
                dataset,
                eval_data=evaluated,
                log=log,
                checkpointer=checkpointer,
                meta=meta,
                progress=progress,
                should_stop=lambda: stop.code is not None,
            )
        stop.at_once = True  # nothing is left to finish: the export is written whole or not at all
        step = int(state.step)
        if stop.code is not None and (self.export or step < trainer.config.max_steps):
            console.say(f"stopped after step {step}, which is saved; --resume goes on", "")
            sys.exit(stop.code)
        if self.export:
            self._export(trainer, state, frozen, source)

    def _check_start(self, checkpointer: Checkpointer) -> None:
        """Never begins anew over an old run, nor goes on from nothing."""
        steps = checkpointer.steps
        if steps and not self.resume:
            raise CheckpointError(
                f"{self.out_dir} holds a run that got to step {steps[-1]}; pass --resume to go on, "
                "or another --out_dir"
            )
        if self.resume and not steps:
            raise CheckpointError(
                f"--resume: {self.out_dir} holds no checkpoint; leave it out to start"
            )

    def _restore(
        self, checkpointer: Checkpointer, like: TrainState, meta: dict[str, Any]
    ) -> tuple[TrainState, Progress]:
        """What a checkpoint of this run holds; says what is not the same."""
        check = functools.partial(
            check_resume,
            now=meta,
            allow_data_change=self.allow_data_change,
            allow_config_change=self.allow_config_change,
        )
        # Before the arrays, as another optimizer's cannot be read; then of what was read in the end.
        check(_without_progress(checkpointer.read_meta(self.resume_step))[0])
        restored = checkpointer.restore(like, step=self.resume_step)
        saved, progress = _without_progress(restored.meta)
        changes = check(saved)
        for change in changes:
            console.say(f"changed: {change}", "")
        console.say(f"going on after step {restored.step}", "")
        if saved["data"] != meta["data"]:
            progress = dataclasses.replace(progress, position=None)
        return restored.state, progress

    def _export(self, trainer: Trainer, state: TrainState, frozen: Params, source: Source) -> None:
        params = trainer.export_params(state, frozen)
        folder = self.out_dir / "export"
        with console.busy("exporting"):
            save_checkpoint(
                folder,
                trainer.model.config,
                params,
                format="hf",
                tokenizer=source.tokenizer_path,
                overwrite=True,
            )
        console.say(f"exported to {folder}: python generate.py --ckpt_dir {folder} --chat", "")


def check_memory(trainer: Trainer, dataset: Dataset) -> None:
    """Says what the largest step will hold in memory, and that it fits, before anything is loaded."""
    parts = training_bytes(
        trainer.model.config,
        trainer.config,
        rows=dataset.config.batch_size,
        seq_len=dataset.buckets[-1],
        dtype=trainer.model.dtype,
        remat=trainer.model.remat,
        lora=trainer.lora,
        frozen_dtype=trainer.model.dtype,
    )
    listed = ", ".join(f"{name} {human(n)}" for name, n in parts.items())
    console.say(f"memory of a step: {human(peak_bytes(parts))} ({listed})", "")
    if jax.default_backend() == "cpu":
        check_training_fits(parts)


def _without_progress(meta: dict[str, Any]) -> tuple[dict[str, Any], Progress]:
    return {k: v for k, v in meta.items() if k != "progress"}, Progress(**meta["progress"])


def load_params(trainer: Trainer, source: Source) -> Params:
    """The model's parameters; a frozen model is only read, and has the dtype in which it is used."""
    frozen = trainer.lora is not None
    dtype = trainer.model.dtype if frozen else trainer.config.param_dtype
    with console.progress() as report:
        return load_checkpoint(source.path, dtype=dtype, progress=report)[1]


def describe(trainer: Trainer, source: Source, dataset: Dataset) -> dict[str, Any]:
    """What a checkpoint is of, for `check_resume`."""
    data = dataset.config
    shape = {name: getattr(data, name) for name in ("batch_size", "seq_len", "packing", "seed")}
    numerics = {"dtype": jnp.dtype(trainer.model.dtype).name, "remat": trainer.model.remat}
    return {
        "model": dataclasses.asdict(trainer.model.config),
        "tokenizer": tokenizer_digest(source.tokenizer),
        "data": {"digest": dataset.digest, "shuffle": data.shuffle},
        "train": dataclasses.asdict(trainer.config) | shape | numerics,
        "lora": dataclasses.asdict(trainer.lora) if trainer.lora is not None else {},
    }


def say_counts(name: str, dataset: Dataset) -> None:
    """One line of what became of the rows."""
    told = ", ".join(f"{value:,} {key}" for key, value in dataset.counts.items() if value)
    console.say(f"{name}: {told.replace('_', ' ')}", "")


def _known_remat(remat: str) -> str:
    if remat not in _REMATS:
        raise ConfigError(f"--remat {remat!r:.40}, expected one of {', '.join(_REMATS)}")
    return remat


def _warmup(max_steps: Any) -> int:
    return round(0.03 * max_steps) if is_int(max_steps) and max_steps > 0 else 0


if __name__ == "__main__":
    console.run_one_of({"sft": sft})
