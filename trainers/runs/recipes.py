"""Recipes: the kinds of training that `train.py` knows, each with its data. A new kind is a subclass."""

import abc
import contextlib
import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from models.llama.chat_format import ChatFormat
from models.llama.lora import LoRAConfig
from models.llama.model import LLaMa, Params
from models.llama.tokenizer import Tokenizer
from trainers.data import DataConfig, Dataset
from trainers.distill_trainer import DistillConfig, DistillTrainer, SamplesConfig, SoftTrainer
from trainers.distill_trainer import Teacher, TeacherFlags
from trainers.dpo_trainer import DPOConfig, DPOTrainer
from trainers.environments.episodes import EpisodeConfig
from trainers.environments.player import scorer_of
from trainers.environments.rollouts import EpisodeData
from trainers.grpo_trainer import GRPOConfig, GRPOTrainer
from trainers.loop import Data, Evaluation
from trainers.runs.metrics import MetricsLog
from trainers.on_policy import RolloutData
from trainers.pairs import PairConfig, PairDataset, ReferencedPairs
from trainers.planning.estimate import grpo_bytes, sft_bytes, teacher_bytes
from trainers.planning.job import rows_at_once
from trainers.report.rollouts import recorder
from trainers.rewards.accuracy import EvaluationConfig, TaskEvaluation
from trainers.rewards.tasks import Task
from trainers.rollout import Layout, Rollout, RolloutConfig, check_context
from trainers.sft_trainer import SFTConfig, SFTTrainer
from trainers.trainer import TrainConfig, Trainer
from utils import sharding
from utils.console.steps import StepTable
from utils.memory import return_freed_memory


class Recipe(abc.ABC):
    """A kind of training with its data; `evaluated`: None if there are no evaluations.

    Attributes:
        configs: the configs whose fields are a run's settings "train".
    """

    configs: ClassVar[tuple[type, ...]]
    evaluated: Any

    @classmethod
    @abc.abstractmethod
    def reopened(cls, model: LLaMa, train: dict[str, Any], lora: LoRAConfig | None) -> Trainer:
        """The trainer of a run with these settings, on one device."""

    @property
    @abc.abstractmethod
    def data(self) -> Dataset | Task:
        """The data set or the task that it trains on."""

    @property
    def chat(self) -> ChatFormat | None:
        """The chat format of its conversations; None if it has none."""
        return self.data.chat

    @property
    def _moment(self) -> dict[str, str]:
        """The time that its chat template writes as today's, for meta's "data"."""
        moment = self.chat and self.chat.template.moment
        return {"moment": moment.isoformat()} if moment else {}

    @abc.abstractmethod
    def trainer(self, model: LLaMa) -> Trainer:
        """The trainer of a model. Raises ConfigError if they do not fit."""

    def frozen(self, trainer: Trainer, frozen: Params) -> Params:
        """The frozen parameters, with those of other models added."""
        return frozen

    @abc.abstractmethod
    def memory(self, trainer: Trainer, quantize: str | None) -> dict[str, int]:
        """Bytes at the peak, by parts, with a frozen base in eight bits for "int8"."""

    @abc.abstractmethod
    def meta(self, trainer: Trainer) -> dict[str, dict[str, Any]]:
        """The checkpoint's entries "data" and, beside the trainer's config, "train"."""

    @abc.abstractmethod
    def open(
        self,
        trainer: Trainer,
        folder: Path,
        start_step: int,
        stack: contextlib.ExitStack,
        table: StepTable,
    ) -> tuple[Data, Dataset | Evaluation | None]:
        """The data that `fit` trains on and evaluates; the stack closes what has to be closed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTRecipe(Recipe):
    """Supervised training; `evaluated` is the data of its evaluations."""

    configs = (SFTConfig, DataConfig)
    config: SFTConfig
    lora: LoRAConfig | None
    dataset: Dataset
    evaluated: Dataset | None

    @classmethod
    def reopened(cls, model, train, lora) -> SFTTrainer:
        return SFTTrainer(model, saved_config(SFTConfig, train), lora)

    @property
    def data(self) -> Dataset:
        return self.dataset

    def trainer(self, model: LLaMa) -> SFTTrainer:
        self.dataset.check_context(model.config.max_seq_len)
        sharding.check_rows(batch_size=self.dataset.config.batch_size)
        for width in self.dataset.buckets:
            sharding.check_tokens(model.config.n_heads, seq_len=width)
        return SFTTrainer(model, _in_whole_rounds(self.config), self.lora)

    def memory(self, trainer: SFTTrainer, quantize: str | None) -> dict[str, int]:
        rows, longest = self.dataset.config.batch_size, self.dataset.buckets[-1]
        return sft_bytes(trainer, rows, longest, quantize)

    def meta(self, trainer: SFTTrainer) -> dict[str, dict[str, Any]]:
        config = dataclasses.asdict(self.dataset.config)
        # The digest covers the other fields.
        names = ("batch_size", "seq_len", "packing", "seed")
        return {
            "data": {"digest": self.dataset.digest, "shuffle": config["shuffle"]} | self._moment,
            "train": {name: config[name] for name in names if name in config},
        }

    def open(self, trainer, folder, start_step, stack, table):
        return self.dataset, self.evaluated


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPORecipe(SFTRecipe):
    """Training on preferences; `evaluated` is the pairs of its evaluations."""

    configs = (DPOConfig, PairConfig)
    config: DPOConfig
    dataset: PairDataset
    evaluated: PairDataset | None

    @classmethod
    def reopened(cls, model, train, lora) -> DPOTrainer:
        return DPOTrainer(model, saved_config(DPOConfig, train), lora)

    def trainer(self, model: LLaMa) -> DPOTrainer:
        known = super().trainer(model)
        return DPOTrainer(model, known.config, self.lora)

    def memory(self, trainer: DPOTrainer, quantize: str | None) -> dict[str, int]:
        """Bytes of twice as many rows, each a prompt with one answer."""
        at_once = trainer.config.micro_batch_size
        config = dataclasses.replace(trainer.config, micro_batch_size=at_once and 2 * at_once)
        twice = dataclasses.replace(trainer, config=config)
        rows, longest = self.dataset.config.batch_size, self.dataset.buckets[-1]
        return sft_bytes(twice, 2 * rows, longest, quantize)

    def open(self, trainer, folder, start_step, stack, table):
        if not trainer.config.precompute_reference:
            return self.dataset, self.evaluated
        path = folder / "reference.json"
        return ReferencedPairs(trainer, self.dataset, self.evaluated, path), self.evaluated


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPORecipe(Recipe):
    """GRPO on a task; `evaluated` is the task of its evaluations."""

    configs = (GRPOConfig, RolloutConfig, EpisodeConfig)
    config: GRPOConfig
    rollout: RolloutConfig
    episodes: EpisodeConfig = EpisodeConfig()
    lora: LoRAConfig | None
    task: Task
    evaluated: Task | None
    eval_samples: int
    tokenizer: Tokenizer
    reward_timeout: float
    reward_failure: str
    rollouts: bool
    completions_at_once: int | None = None  # --micro_batch_size; the config's counts rows

    @classmethod
    def reopened(cls, model, train, lora) -> GRPOTrainer:
        at_once, _ = rows_at_once(train["micro_batch_size"], train["group_size"])
        config = saved_config(GRPOConfig, train | {"micro_batch_size": at_once})
        return GRPOTrainer(model, config, lora, train["vocab_limit"])

    @property
    def data(self) -> Task:
        return self.task

    def trainer(self, model: LLaMa) -> GRPOTrainer:
        self._check_rows()
        for task in filter(None, (self.task, self.evaluated)):
            context = model.config.max_seq_len
            check_context(task.prompts, self.config.max_completion_len, context)
        limit = min(self.tokenizer.vocab_size, model.config.vocab_size)
        limit = limit if limit < model.config.vocab_size else None
        return GRPOTrainer(model, _in_whole_rounds(self.config), self.lora, limit)

    def _check_rows(self) -> None:
        """A row is a prompt with `branches` of its completions; flags count completions."""
        c = self.rollout
        branches = c.branches or c.group_size
        rows = c.prompts_per_step // c.mini_batches * (c.group_size // branches)
        # Named by how it comes about: the user knows those numbers.
        step = f"prompts_per_step x group_size / mini_batches / {branches} completions per row"
        sharding.check_rows(**{step: rows})

    def memory(self, trainer: GRPOTrainer, quantize: str | None) -> dict[str, int]:
        at_once = self.config.micro_batch_size
        return grpo_bytes(trainer, self.rollout, self.task.longest, at_once, quantize)

    def meta(self, trainer: GRPOTrainer) -> dict[str, dict[str, Any]]:
        return {
            "data": {"digest": self.task.digest, "task": self.task.name} | self._moment,
            "train": dataclasses.asdict(self.rollout)
            | (dataclasses.asdict(self.episodes) if self.task.environment else {})
            | {"vocab_limit": trainer.vocab_limit, "micro_batch_size": self.completions_at_once},
        }

    def open(self, trainer, folder, start_step, stack, table):
        how = self.reward_timeout, self.reward_failure
        pool = stack.enter_context(scorer_of(self.task, self.episodes, *how))
        record, evaluation = None, None
        if self.rollouts:
            log = MetricsLog(folder, name="rollouts.jsonl", start_step=start_step)
            line = stack.enter_context(log).write
            record = recorder(line, self.tokenizer, lambda: [*pool.failed.kinds.values()])

        def write(step: int, rollout: Rollout, layout: Layout) -> None:
            return_freed_memory()  # the policy's, in pieces too small for malloc to give back
            if record is not None:
                record(step, rollout, layout)
            if table.wants_sample(step):
                b = int(rollout.varied.argmax())  # the first that has better and worse ones
                scored = list(zip(rollout.rewards[b].tolist(), rollout.texts[b]))
                table.sample(step, rollout.prompts[b].text, scored)

        kind = RolloutData if self.task.environment is None else EpisodeData
        reader = self.task.reader(self.tokenizer)
        data = kind(trainer, self.rollout, self.task.prompts, reader, pool, write)
        if self.evaluated is not None:
            config = EvaluationConfig(
                samples=self.eval_samples,
                temperature=self.config.temperature,
                max_completion_len=self.config.max_completion_len,
                batch_size=self.rollout.prompts_per_step * 2,
            )
            evaluation = TaskEvaluation(trainer, self.evaluated, self.tokenizer, pool, config)
        return data, evaluation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Taught(Recipe):
    """A kind of training with a teacher next to the student."""

    teacher: Teacher

    def frozen(self, trainer: Trainer, frozen: Params) -> Params:
        return {**frozen, "teacher": self.teacher.checkpoint.params(trainer.model.dtype)}

    def memory(self, trainer: Trainer, quantize: str | None) -> dict[str, int]:
        known = super().memory(trainer, quantize)
        return known | teacher_bytes(trainer, self.teacher.settings["teacher_quantize"])

    def meta(self, trainer: Trainer) -> dict[str, dict[str, Any]]:
        known = super().meta(trainer)
        return known | {"train": known["train"] | self.teacher.settings}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillRecipe(Taught, GRPORecipe):
    """On-policy distillation on the prompts of a task; its rewards are only measured."""

    configs = (DistillConfig, SamplesConfig, EpisodeConfig, TeacherFlags)
    config: DistillConfig

    def trainer(self, model: LLaMa) -> DistillTrainer:
        known, teacher = super().trainer(model), self.teacher.model(model)
        check_context(self.task.prompts, self.config.max_completion_len, teacher.config.max_seq_len)
        limit = self.teacher.vocab_limit(known.vocab_limit or model.config.vocab_size)
        limit = known.vocab_limit if limit is None else limit
        return DistillTrainer(model, known.config, self.lora, limit, teacher)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftRecipe(Taught, SFTRecipe):
    """Supervised training on the distributions of a teacher."""

    configs = (*SFTRecipe.configs, TeacherFlags)

    def trainer(self, model: LLaMa) -> SoftTrainer:
        known, teacher = super().trainer(model), self.teacher.model(model)
        self.dataset.check_context(teacher.config.max_seq_len)
        limit = self.teacher.vocab_limit(model.config.vocab_size)
        return SoftTrainer(model, known.config, self.lora, limit, teacher)


def _in_whole_rounds(config: TrainConfig) -> TrainConfig:
    """A trainer's config whose micro-batches have a row per device of the mesh at least."""
    rows = sharding.whole_rounds(config.micro_batch_size)
    return dataclasses.replace(config, micro_batch_size=rows)


# By a setting that only runs of that kind have.
RECIPES: dict[str, type[Recipe]] = {
    "divergence": DistillRecipe,
    "group_size": GRPORecipe,
    "label_smoothing": DPORecipe,
    "packing": SFTRecipe,
}


def saved_config(cls: type, train: dict[str, Any]) -> Any:
    """A config from its fields among a run's settings."""
    return cls(**{f.name: train[f.name] for f in dataclasses.fields(cls) if f.name in train})
