"""A training run from the command line: its folder, its checkpoints, its export."""

import abc
import contextlib
import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from models.llama.config import ModelConfig
from models.llama.hub import resolve
from models.llama.load import load_checkpoint, load_config, save_checkpoint
from models.llama.loading import use_mesh
from models.llama.lora import LoRAConfig
from models.llama.model import REMATS, LLaMa, Params, init_params
from models.llama.tokenizer import Tokenizer, check_against_model, load_tokenizer
from trainers.checkpoint import Checkpointer
from trainers.data import Dataset, tokenizer_digest
from trainers.grpo_trainer import GRPOConfig, GRPOTrainer
from trainers.identity import files_digest, key_words, versions
from trainers.loop import Data, Evaluation, Progress, fit
from trainers.metrics import MetricsLog, ProgressBar
from trainers.on_policy import RolloutData, Sampler, TaskEvaluation
from trainers.planning.estimate import check_memory, grpo_bytes, sft_bytes
from trainers.resume import check_resume
from trainers.rewards.accuracy import EvaluationConfig
from trainers.rewards.pool import RewardPool
from trainers.rewards.tasks import Task
from trainers.rollout import RolloutConfig
from trainers.sft_trainer import SFTConfig, SFTTrainer
from trainers.trainer import Trainer, TrainState
from utils import cli, processes, sharding
from utils.errors import CheckpointError, ConfigError, is_int, raise_all
from utils.files import atomic_file

_STOPPING = "finishing this step, then saving; press Ctrl-C again to quit at once"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """The model that a run starts from: its files, and what was read of them first."""

    path: Path
    tokenizer_path: Path
    tokenizer: Tokenizer


def load_source(ckpt_dir: str, tokenizer_path: str | None, mesh: str | None) -> Source:
    """Finds or fetches a checkpoint, and loads its tokenizer; devices will share it as `mesh` says."""
    with cli.progress() as report:
        path = resolve(ckpt_dir, report)
    use_mesh(mesh, path)
    found = Path(tokenizer_path or path)
    return Source(path=path, tokenizer_path=found, tokenizer=load_tokenizer(found))


class Job(abc.ABC):
    """What a run does: supervised training or GRPO."""

    @abc.abstractmethod
    def trainer(self, model: ModelConfig) -> Trainer:
        """The trainer for a model. Raises ConfigError if they do not fit."""

    @abc.abstractmethod
    def memory(self, trainer: Trainer) -> dict[str, int]:
        """Bytes by parts, at the peak."""

    @abc.abstractmethod
    def describe(self, trainer: Any) -> dict[str, dict[str, Any]]:
        """What goes into a checkpoint's meta under "data" and, beside the trainer's, "train"."""

    @abc.abstractmethod
    def open(
        self, trainer: Trainer, out_dir: Path, start_step: int, stack: contextlib.ExitStack
    ) -> tuple[Data, Dataset | Evaluation | None]:
        """What `fit` trains on and evaluates; whatever is to be closed goes onto the stack."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTJob(Job):
    """Supervised training; `evaluated` is the data of its evaluations."""

    config: SFTConfig
    dataset: Dataset
    evaluated: Dataset | None
    lora: LoRAConfig | None
    dtype: Any
    remat: str

    def trainer(self, model: ModelConfig) -> SFTTrainer:
        self.dataset.check_context(model.max_seq_len)
        sharding.check_rows(batch_size=self.dataset.config.batch_size)
        for width in self.dataset.buckets:
            sharding.check_tokens(model.n_heads, seq_len=width)
        llama = LLaMa(model, self.dtype, self.remat)
        return SFTTrainer(llama, _shared_micro_batches(self.config), self.lora)

    def memory(self, trainer: Trainer) -> dict[str, int]:
        return sft_bytes(trainer, self.dataset.config.batch_size, self.dataset.buckets[-1])

    def describe(self, trainer: Any) -> dict[str, dict[str, Any]]:
        data = self.dataset.config
        names = ("batch_size", "seq_len", "packing", "seed")
        return {
            "data": {"digest": self.dataset.digest, "shuffle": data.shuffle},
            "train": {name: getattr(data, name) for name in names},
        }

    def open(self, trainer, out_dir, start_step, stack):
        return self.dataset, self.evaluated


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPOJob(Job):
    """GRPO on a task; `evaluated` is the task of its evaluations, with as many `eval_samples`."""

    config: GRPOConfig
    rollout: RolloutConfig
    task: Task
    evaluated: Task | None
    eval_samples: int
    tokenizer: Tokenizer
    lora: LoRAConfig | None
    dtype: Any
    remat: str
    reward_timeout: float
    reward_failure: str
    rollouts: bool

    def trainer(self, model: ModelConfig) -> GRPOTrainer:
        self._check_rows()
        limit = min(self.tokenizer.vocab_size, model.vocab_size)
        llama = LLaMa(model, self.dtype, self.remat)
        limit = limit if limit < model.vocab_size else None
        return GRPOTrainer(llama, _shared_micro_batches(self.config), self.lora, limit)

    def _check_rows(self) -> None:
        """A row is a prompt with `branches` of its completions; flags are in completions."""
        c = self.rollout
        branches = c.branches or c.group_size
        rows = c.prompts_per_step // c.mini_batches * (c.group_size // branches)
        # By how it comes about: the user knows those numbers.
        step = f"prompts_per_step x group_size / mini_batches / {branches} completions a row"
        sharding.check_rows(**{step: rows})

    def memory(self, trainer: Trainer) -> dict[str, int]:
        at_once = self.config.micro_batch_size
        return grpo_bytes(trainer, self.rollout, self.task.longest, at_once)

    def describe(self, trainer: Any) -> dict[str, dict[str, Any]]:
        return {
            "data": {"digest": self.task.digest, "task": self.task.name},
            "train": dataclasses.asdict(self.rollout) | {"vocab_limit": trainer.vocab_limit},
        }

    def open(self, trainer, out_dir, start_step, stack):
        scoring = dict(timeout=self.reward_timeout, on_failure=self.reward_failure)
        pool = stack.enter_context(RewardPool(self.task.rewards, **scoring))
        log, evaluation = None, None
        if self.rollouts:
            name = "rollouts.jsonl"
            log = stack.enter_context(MetricsLog(out_dir, name=name, start_step=start_step))
        sampler = Sampler(trainer, self.rollout, self.task, self.tokenizer, pool)
        if self.evaluated is not None:
            config = EvaluationConfig(
                samples=self.eval_samples,
                temperature=self.config.temperature,
                max_completion_len=self.config.max_completion_len,
                batch_size=self.rollout.prompts_per_step * 2,
            )
            evaluation = TaskEvaluation(trainer, self.evaluated, self.tokenizer, pool, config)
        return RolloutData(sampler, log), evaluation


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
    check_every: int = 100

    def __post_init__(self):
        problems = []
        if not is_int(self.keep) or self.keep < 1:
            problems.append(f"keep={self.keep!r}, expected an integer from 1")
        step = self.resume_step
        if step is not None and not (is_int(step) and step >= 0):
            problems.append(f"resume_step={step!r}, expected an integer from 0")
        if not is_int(self.check_every) or self.check_every < 0:
            problems.append(f"check_every={self.check_every!r}, expected an integer from 0")
        raise_all("Run", problems)

    def train(
        self,
        job: Job,
        source: Source,
        key: jax.Array,
        stop: cli.Signals,
    ) -> None:
        """From the model's weights to the exported model; goes on from a checkpoint if asked to."""
        trainer = job.trainer(load_config(source.path))
        check_against_model(source.tokenizer, trainer.model.config.vocab_size)
        meta = describe(trainer, source, job)
        if processes.several():
            settings = dataclasses.asdict(self) | {"seed": key_words(key)}
            known = {"settings": settings, "checkpoint": files_digest(source.path)}
            processes.check_same(versions() | known | meta)
        check_memory(job.memory(trainer), functools.partial(cli.say, kind=""))
        like = jax.eval_shape(
            lambda key: trainer.init(init_params(trainer.model.config, key), key)[0], key
        )
        if sharding.current_mesh() is not None:
            like = sharding.shapes_on(jax.sharding.get_mesh(), like, trainer.state_specs(like))
        need_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(like))
        with contextlib.ExitStack() as stack:
            checkpointer = stack.enter_context(
                Checkpointer(self.out_dir / "checkpoints", keep=self.keep, need_bytes=need_bytes)
            )
            self._check_start(checkpointer)
            if self.resume:
                state, progress = self._restore(checkpointer, like, meta)
                frozen = load_params(trainer, source, frozen=True) if trainer.keeps_frozen else {}
            else:
                state, frozen = trainer.init(load_params(trainer, source), key, donate=True)
                progress = Progress()
            if processes.is_first():
                with atomic_file(self.out_dir / "run.json") as file:
                    paths = {"ckpt_dir": str(source.path), "tokenizer": str(source.tokenizer_path)}
                    file.write(json.dumps(meta | {"source": paths}, indent=1).encode())
            start_step = int(state.step) + 1
            data, evaluated = job.open(trainer, self.out_dir, start_step, stack)
            bar = ProgressBar(trainer.config.max_steps, console=cli.stderr)
            stack.enter_context(bar)
            logged = dict(tensorboard=self.tensorboard, start_step=start_step, sinks=[bar])
            log = stack.enter_context(MetricsLog(self.out_dir, **logged))
            stop.set(leave_at=2, notice=_STOPPING)
            state, _ = fit(
                trainer,
                state,
                frozen,
                data,
                eval_data=evaluated,
                log=log,
                checkpointer=checkpointer,
                meta=meta,
                progress=progress,
                should_stop=lambda: stop.code is not None,
                check_every=self.check_every,
            )
        stop.set(leave_at=1)  # nothing is left to finish: the export is written whole or not at all
        step, code = int(state.step), processes.agree(stop.code or 0)
        if code and (self.export or step < trainer.config.max_steps):
            cli.say(f"stopped after step {step}, which is saved; --resume goes on", "")
            sys.exit(code)
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
            cli.say(f"changed: {change}", "")
        cli.say(f"going on after step {restored.step}", "")
        if saved["data"] != meta["data"]:
            progress = dataclasses.replace(progress, position=None)
        return restored.state, progress

    def _export(self, trainer: Trainer, state: TrainState, frozen: Params, source: Source) -> None:
        folder = self.out_dir / "export"
        save = functools.partial(
            save_checkpoint, format="hf", tokenizer=source.tokenizer_path, overwrite=True
        )
        with cli.busy("exporting"):
            params = processes.to_first(trainer.export_params(state, frozen))
            processes.from_first(lambda: save(folder, trainer.model.config, params))
        cli.say(f"exported to {folder}: python generate.py --ckpt_dir {folder} --chat", "")


def lora_config(rank: int, alpha: float | None) -> LoRAConfig | None:
    """--lora_rank and --lora_alpha; rank 0 is none."""
    return None if rank == 0 else LoRAConfig(rank=rank, alpha=alpha)


def known_remat(remat: str) -> str:
    """--remat. Raises ConfigError if it is unknown."""
    if remat not in REMATS:
        raise ConfigError(f"--remat {remat!r:.40}, expected one of {', '.join(REMATS)}")
    return remat


def _shared_micro_batches(config: Any) -> Any:
    """A trainer's config whose micro-batches are whole rounds of the mesh: a row a device at least."""
    rows = sharding.whole_rounds(config.micro_batch_size)
    return dataclasses.replace(config, micro_batch_size=rows)


def _without_progress(meta: dict[str, Any]) -> tuple[dict[str, Any], Progress]:
    return {k: v for k, v in meta.items() if k != "progress"}, Progress(**meta["progress"])


def load_params(trainer: Trainer, source: Source, *, frozen: bool | None = None) -> Params:
    """The model's parameters; a frozen model is only read, and has the dtype in which it is used."""
    frozen = trainer.lora is not None if frozen is None else frozen
    dtype = trainer.model.dtype if frozen else trainer.config.param_dtype
    with cli.progress() as report:
        return load_checkpoint(source.path, dtype=dtype, progress=report)[1]


def describe(trainer: Trainer, source: Source, job: Job) -> dict[str, Any]:
    """What a checkpoint is of, for `check_resume`."""
    numerics = {"dtype": jnp.dtype(trainer.model.dtype).name, "remat": trainer.model.remat}
    known = job.describe(trainer)
    return {
        "model": dataclasses.asdict(trainer.model.config),
        "tokenizer": tokenizer_digest(source.tokenizer),
        "data": known["data"],
        "train": dataclasses.asdict(trainer.config) | known["train"] | numerics,
        "lora": dataclasses.asdict(trainer.lora) if trainer.lora is not None else {},
    }
