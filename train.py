"""Training from the command line: `python train.py sft --data …`, `python train.py grpo --task …`."""

import signal

from utils.console import pages, usage

if __name__ == "__main__":  # Ctrl-C during the imports ends the program without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    pages.use_huge_pages()
    usage.require_command()

import dataclasses
import functools
import itertools
import json
import math
import sys
from datetime import datetime
from pathlib import Path
from typing import ClassVar

from models.llama.load import ModelFlags
from models.llama.lora import LoRAConfig
from models.llama.tokenizer import Tokenizer
from trainers.data import DataConfig, DataFlags, Dataset, load_dataset
from trainers.distill_trainer import DistillConfig, SamplesConfig
from trainers.distill_trainer import SoftTeacherFlags, Teacher, TeacherFlags
from trainers.dpo_trainer import DPOConfig
from trainers.grpo_trainer import GRPOConfig
from trainers.pairs import PairConfig, PairFlags, load_pairs
from trainers.planning.job import rows_at_once
from trainers.runs.recipes import DistillRecipe, DPORecipe, GRPORecipe, SFTRecipe, SoftRecipe
from trainers.report.replay import LossFlags, StepFlags, read_run, replay_step, verdict
from trainers.report.report import write_report
from trainers.rewards.flags import TaskFlags
from trainers.rewards.tasks import Task, task_names
from trainers.rollout import RolloutConfig
from trainers.runs.export import ExportFlags, export_run
from trainers.runs.folder import RunConfig
from trainers.runs.run import Source, load_source, train
from trainers.sft_trainer import SFTConfig
from trainers.trainer import TrainConfig
from utils.console import cli
from utils.errors import plural
from utils.fields import Config, again, as_flags, field, integer, number, one_of, texts

# The seed of the prompts that `--eval_size` holds out: no run has it by chance.
_EVAL_SEED = 1_000_003


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingDataFlags(DataFlags):
    """Files of supervised training."""

    eval_data: str | None = field(None, "as data; its loss decides which checkpoint is the best")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpochFlags(Config):
    """The run's length, which may be told in epochs."""

    made: ClassVar[type[SFTConfig]]
    max_steps: int | None = again(
        SFTConfig, "max_steps", None, help="optimizer steps of the whole run; default: 100"
    )
    epochs: float | None = field(
        None, "passes over the data, in place of max_steps", number(above=0)
    )

    def problems(self) -> list[str]:
        both = self.max_steps is not None and self.epochs is not None
        return super().problems() + ["pass either max_steps=N or epochs=N"] * both

    def config(self, epoch: float) -> SFTConfig:
        """The config of a run whose epochs have that many steps."""
        known = {f.name: getattr(self, f.name) for f in dataclasses.fields(self.made)}
        if self.max_steps is None:
            del known["max_steps"]
        if self.epochs is not None:
            known["max_steps"] = math.ceil(self.epochs * epoch)
        return self.made(**known)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTFlags(EpochFlags, SFTConfig):
    """SFTConfig, where the run's length may be told in epochs."""

    made = SFTConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPOFlags(EpochFlags, DPOConfig):
    """DPOConfig, where the run's length may be told in epochs."""

    made = DPOConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAFlags(LoRAConfig):
    """LoRAConfig, where rank 0 means none."""

    rank: int = field(
        0,
        "rank of the adapters trained next to the frozen model; 0: train the model itself",
        integer(0),
        flag="lora_rank",
    )

    @property
    def config(self) -> LoRAConfig | None:
        """The adapters, if there are any."""
        return LoRAConfig(rank=self.rank, alpha=self.alpha) if self.rank else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPOTaskFlags(TaskFlags):
    """The task that GRPO trains on, and how it is scored and evaluated."""

    task_size: int = field(10_000, "prompts of the task", integer(1))
    eval_size: int = field(
        0, "held-out prompts of the task, none of which is trained on", integer(0)
    )
    eval_data: str | None = field(None, "as data, for evaluations")
    eval_samples: int = field(1, "completions per prompt in an evaluation", integer(1))
    reward_failure: str = field(
        "unscorable",
        "what a crash or time-out of a reward does: leave its prompts out, or stop the run",
        one_of("unscorable", "stop"),
    )
    rollouts: bool = field(
        True, "write all completions to rollouts.jsonl, for `report` and `replay`"
    )

    def load_both(
        self, tokenizer: Tokenizer, seed: int, moment: datetime | None = None
    ) -> tuple[Task, Task | None]:
        """(what is trained on, what is evaluated)."""
        held_out, load = None, functools.partial(self.load, tokenizer, moment=moment)
        # What is held out is chosen first: it is then the same for every seed and size.
        if self.eval_size if self.data is None else self.eval_data:
            held_out = load(size=self.eval_size, seed=_EVAL_SEED, data=self.eval_data)
        return load(size=self.task_size, seed=seed, exclude=held_out), held_out


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptFlags(GRPOTaskFlags):
    """The prompts that a student answers, and how its answers are scored, if they are."""

    needs_reward: ClassVar[bool] = False

    def problems(self) -> list[str]:
        alone = self.reward is None and self.eval_data is not None
        return super().problems() + ["--eval_data needs --reward"] * alone


def sft(
    data: TrainingDataFlags,
    model: ModelFlags,
    rows: DataConfig,
    training: SFTFlags,
    lora: LoRAFlags,
    run: RunConfig,
    processes: cli.ProcessFlags,
    teacher: SoftTeacherFlags,
) -> int:
    """Fine-tunes on conversations, prompts with completions, or texts.

    Example: python train.py sft --data chats.jsonl --out_dir run --lora_rank 16
    """
    return _supervised(SFTRecipe, data, model, rows, training, lora, run, teacher)


def dpo(
    data: PairFlags,
    model: ModelFlags,
    rows: PairConfig,
    training: DPOFlags,
    lora: LoRAFlags,
    run: RunConfig,
    processes: cli.ProcessFlags,
) -> int:
    """Trains on preferences: chosen answers made more likely than rejected ones, without sampling.

    Example: python train.py dpo --data pairs.jsonl --out_dir run --lora_rank 16
    """
    return _supervised(DPORecipe, data, model, rows, training, lora, run, SoftTeacherFlags())


def _supervised(recipe, data, model, rows, training, lora, run, teacher) -> int:
    """Trains on a file of rows."""
    stop, load = _start(), load_pairs if recipe is DPORecipe else load_dataset
    source = load_source(model)
    moment = run.moment()
    read = functools.partial(load, tokenizer=source.tokenizer, config=rows, moment=moment)
    dataset = read(data.data, skip_bad=data.skip_bad)
    dataset.check_full_batch()
    _say_counts("data", data.data, dataset)
    evaluated = None
    if data.eval_data is not None:
        evaluated = read(data.eval_data)
        _say_counts("eval", data.eval_data, evaluated)
    config = training.config(len(dataset) / rows.batch_size)
    known = dict(config=config, lora=lora.config, dataset=dataset, evaluated=evaluated)
    if teacher.teacher is not None:
        recipe, known["teacher"] = SoftRecipe, _open_teacher(teacher, source)
    flags = as_flags(data, model, rows, training, lora, run, teacher)
    return train(recipe(**known), source, run, rows.seed, stop, flags)


def grpo(
    task: GRPOTaskFlags,
    model: ModelFlags,
    rollout: RolloutConfig,
    training: GRPOConfig,
    lora: LoRAFlags,
    run: RunConfig,
    processes: cli.ProcessFlags,
) -> int:
    """Trains on rewards with GRPO: groups of completions, better ones made more likely.

    Example: python train.py grpo --task reasoning_gym:chain_sum --out_dir run --lora_rank 16
    """
    return _on_policy(GRPORecipe, task, model, rollout, training, lora, run)


def distill(
    task: PromptFlags,
    model: ModelFlags,
    teacher: TeacherFlags,
    rollout: SamplesConfig,
    training: DistillConfig,
    lora: LoRAFlags,
    run: RunConfig,
    processes: cli.ProcessFlags,
) -> int:
    """Trains on a teacher's distributions of the model's own completions; rewards are only measured.

    Example: python train.py distill --teacher big --task reasoning_gym:chain_sum --out_dir run
    """
    return _on_policy(DistillRecipe, task, model, rollout, training, lora, run, teacher=teacher)


def _on_policy(
    kind: type[GRPORecipe],
    task: GRPOTaskFlags,
    model: ModelFlags,
    rollout: RolloutConfig,
    training: TrainConfig,
    lora: LoRAFlags,
    run: RunConfig,
    **more: Config,
) -> int:
    """Trains on samples of the model; `more`: configs of one kind alone, see its recipe."""
    stop, flags = _start(), as_flags(task, model, rollout, training, lora, run, *more.values())
    at_once, branches = rows_at_once(training.micro_batch_size, rollout.group_size)
    source = load_source(model, task.max_seq_len)
    if "teacher" in more:
        more["teacher"] = _open_teacher(more["teacher"], source)
    prompts, evaluated = task.load_both(source.tokenizer, rollout.seed, run.moment())
    first = source.tokenizer.decode(prompts.prompts[0].ids)
    cli.note(f"data: {prompts.name} · {prompts.counted}")
    cli.note(f"the first, as the model reads it: {first!r:.600}")
    recipe = kind(
        config=dataclasses.replace(training, micro_batch_size=at_once),
        rollout=dataclasses.replace(rollout, branches=branches),
        lora=lora.config,
        task=prompts,
        episodes=task.episodes,
        evaluated=evaluated,
        eval_samples=task.eval_samples,
        tokenizer=source.tokenizer,
        reward_timeout=task.reward_timeout,
        reward_failure=task.reward_failure,
        rollouts=task.rollouts,
        completions_at_once=training.micro_batch_size,
        **more,
    )
    return train(recipe, source, run, rollout.seed, stop, flags)


def _open_teacher(flags: TeacherFlags, source: Source) -> Teacher:
    with cli.progress() as report:
        return Teacher(flags, source.tokenizer, report)


def _start() -> cli.Signals:
    """Signals end the process until a run has a step to finish; compiled programs are kept."""
    cli.keep_compilations()
    return cli.Signals(sigterm=True)


def _say_counts(use: str, name: str, dataset: Dataset) -> None:
    """Says in one line how many rows there are, and how many were left out or changed."""
    count = dict(dataset.counts)
    del count["read"]
    ignored = ", ".join(count.pop("ignored"))
    steps = len(dataset) / dataset.config.batch_size
    parts = [
        f"{use}: {name}",
        plural(count.pop("examples"), "example"),
        f"{plural(count.pop('tokens'), 'token')}, {count.pop('targets'):,} learnt",
        plural(count.pop("rows"), "row"),
    ]
    parts += [f"1 epoch = {steps:,.6g} step" + "s" * (steps != 1)] * (use == "data")
    parts += [f"{number:,} {what.replace('_', ' ')}" for what, number in count.items() if number]
    parts += [f"columns that are ignored: {ignored:.300}"] * bool(ignored)
    cli.note(" · ".join(parts))


def replay(step: StepFlags, different_loss: LossFlags) -> None:
    """Computes a step's loss and gradients again from its saved completions, with other losses too.

    Starts from the newest checkpoint before that step, or from the model that the run started from,
    and repeats the updates in between. Without another loss it shows that the run can be repeated.

    Example: python train.py replay --run run --step 5 --loss grpo
    """
    cli.Signals()
    cli.keep_compilations()
    changes = dataclasses.asdict(different_loss)
    changes = {name: value for name, value in changes.items() if value is not None}
    past, others = read_run(Path(step.run), step.step), {"changed": changes} if changes else {}
    with cli.busy("computing"):
        found = replay_step(past, step.step, others)
    agrees, said = verdict(found, past.trainer.model.dtype)
    if step.json:
        cli.write(json.dumps(found | {"agrees": agrees}) + "\n")
        return
    names = dict.fromkeys(name for values in found.values() for name in values)
    shown = {name: [values.get(name) for values in found.values()] for name in names}
    rows = [
        [name, *("" if value is None else f"{value:.8g}" for value in values)]
        for name, values in shown.items()
    ]
    cli.write(cli.table(["", *found], rows, f"step {step.step} of {step.run}"))
    if changes:
        cli.write("difference: of both gradients, over the run's; cosine: between both gradients\n")
    cli.write(f"{said}\n")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PageFlags(Config):
    """The page of a run, or of several."""

    run: tuple[str, ...] = field(
        help="the run's folder, its --out_dir; given twice, two runs side by side", parse=texts
    )
    out: str | None = field(
        None,
        "the file; default: report.html in that folder, comparison.html in the first of several",
    )
    pngs: bool = field(False, "write the charts as PNG files beside it too")


def report(page: PageFlags) -> None:
    """Writes a page with a run's curves and completions: one HTML file, to be opened anywhere.

    Example: python train.py report --run run
    """
    cli.check_writable(page.out)
    cli.write(f"{write_report(page.run, page.out, pngs=page.pngs)}\n")


def export(checkpoint: ExportFlags) -> None:
    """Writes a checkpoint of a run as a model in Hugging Face's format, and its adapter in PEFT's.

    Example: python train.py export --run run --best
    """
    cli.Signals()
    export_run(
        Path(checkpoint.run),
        checkpoint.out and Path(checkpoint.out),
        step=checkpoint.step,
        best=checkpoint.best,
        dtype=checkpoint.dtype,
    )


def list_tasks() -> None:
    """Lists the tasks by name."""
    cli.write("".join(f"{name}\n" for name in task_names()))


COMMANDS = {
    "sft": sft,
    "dpo": dpo,
    "grpo": grpo,
    "distill": distill,
    "export": export,
    "replay": replay,
    "report": report,
}

if __name__ == "__main__":
    if {"--task=list", ("--task", "list")} & {*sys.argv, *itertools.pairwise(sys.argv)}:
        del sys.argv[1:]  # needs no other flag
        cli.run(list_tasks)
    else:
        cli.run_one_of(COMMANDS)
