"""Measures a model from the command line: `evaluate.py ppl --data …`, `task --task …`, `lm_eval --tasks …`."""

import signal

from utils.console import usage

if __name__ == "__main__":  # Ctrl-C during the imports ends the program without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    usage.require_command()

import dataclasses
import json as jsonlib
import math
from collections.abc import Callable, Iterator
from typing import Any

from models.llama.chat_format import TemplateFlags
from models.llama.checkpoint import compute_dtype
from models.llama.decoding import GenerationConfig
from models.llama.load import DecodingModelFlags, ModelFlags, load_model, open_model
from models.llama.model import LLaMa
from trainers.data import OVERLONG, WINDOWS, DataConfig, DataFlags, Dataset, load_dataset
from trainers.environments.player import scorer_of
from trainers.rewards.accuracy import EvaluationConfig, evaluate_task
from trainers.rewards.flags import TaskFlags
from trainers.rewards.tasks import task_names
from trainers.runs.run import load_source
from trainers.sft_trainer import SFTConfig, SFTTrainer
from trainers.trainer import Batch
from utils.clock import moment
from utils.console import cli
from utils.distributed import from_first, is_first
from utils.errors import ConfigError, is_int
from utils.fields import Config, again, field, integer, integers, number, one_of
from utils.files import atomic_file


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowsConfig(DataConfig):
    """Rows in the order of the file, as long as the model's context allows."""

    seq_len: int | None = again(
        DataConfig,
        "seq_len",
        None,
        help="longest row, in tokens; default: 512, or the model's context if that is less",
    )
    overlong: str = again(
        DataConfig,
        "overlong",
        WINDOWS,
        help="examples longer than a row: score every token once, in windows of seq_len of which the "
        "last reaches back for context; or keep the start, drop them, or split texts into parts",
        allowed=one_of(WINDOWS, *OVERLONG),
    )
    batch_size: int = again(DataConfig, "batch_size", 4, help="rows at once")
    shuffle: bool = again(DataConfig, "shuffle", False)
    seed: int = again(DataConfig, "seed", 0, flag="")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputFlags(Config):
    """How the result is written."""

    json: bool = field(False, "one JSON object instead of text")


def ppl(
    *,
    data: DataFlags,
    rows: RowsConfig,
    model: ModelFlags,
    output: OutputFlags,
    processes: cli.ProcessFlags,
) -> None:
    """Perplexity of a data set: exp of the mean loss over all its targets.

    Example: python evaluate.py ppl --data held_out.jsonl --ckpt_dir run/export
    """
    cli.Signals()
    cli.keep_compilations()
    with cli.progress() as report:
        checkpoint, tokenizer = open_model(model, progress=report, say=cli.note)
        context = checkpoint.config.max_seq_len
        if rows.seq_len is None:
            rows = dataclasses.replace(rows, seq_len=min(512, context))
        options = dict(skip_bad=data.skip_bad, moment=moment())
        dataset = load_dataset(data.data, tokenizer, rows, **options)
        dataset.check_context(context)
        dtype = compute_dtype(model.dtype)
        params = checkpoint.params(dtype, progress=report)
        trainer = SFTTrainer(LLaMa(checkpoint.config, dtype), SFTConfig())
        means = trainer.derive(trainer.evaluate(params, {}, _reported(dataset, report)))
    means["targets"] = int(means.pop("weight"))
    if output.json:
        cli.write(jsonlib.dumps(means | {"counts": dataset.counts}) + "\n")
        return
    cli.write(
        f"perplexity {means['perplexity']:.4f}, loss {means['loss']:.4f} nats, "
        f"accuracy {means['accuracy']:.1%}, over {_counted(dataset.counts)}\n"
    )


def _counted(counts: dict[str, int]) -> str:
    """Says how many tokens were scored, and how many were not."""
    rows = counts["read"] - counts["bad"]
    rows -= counts["dropped_no_target"] + counts["dropped_overlong"]
    text = f"{counts['targets']:,} tokens of {rows:,} examples"
    if counts["split"]:
        text += f" ({counts['split']:,} of them in windows)"
    cut = counts["truncated"] + counts["dropped_overlong"]
    left_out = f"; {counts['targets_left_out']:,} tokens of {cut:,} too long ones are left out"
    return text + left_out * bool(counts["targets_left_out"])


def _reported(dataset: Dataset, report: Callable[[str, int, int], None]) -> Iterator[Batch]:
    total = math.ceil(len(dataset) / dataset.config.batch_size)
    for done, batch in enumerate(dataset.epoch_batches()):
        report("batches", done, total)
        yield batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasuredTaskFlags(TaskFlags):
    """The task that is measured."""

    size: int = field(200, "prompts of the task", integer(1, 1 << 20))
    skip_bad: int = again(DataFlags, "skip_bad", 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig(EvaluationConfig):
    """EvaluationConfig with numbers of samples and of k that go together."""

    samples: int | None = again(
        EvaluationConfig,
        "samples",
        None,
        help="completions per prompt; default: 8, or 1 at temperature 0",
    )
    k: tuple[int, ...] = again(
        EvaluationConfig,
        "k",
        (),
        help="comma-separated k's of pass@k; default: 1 and samples",
        parse=integers,
    )
    seed: int = again(
        EvaluationConfig, "seed", 1, help="seed of the task's prompts and of the samples"
    )

    def __post_init__(self) -> None:
        if self.samples is None:
            object.__setattr__(self, "samples", 8 if self.temperature != 0 else 1)
        if not self.k and is_int(self.samples):
            object.__setattr__(self, "k", tuple(sorted({1, self.samples})))
        super().__post_init__()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableFlags(Config):
    """How the result is written."""

    json: bool = field(False, "one JSON object instead of a table")
    out: str | None = field(None, "a .jsonl file for the completions with their scores")


def task(
    *,
    task: MeasuredTaskFlags,
    sampling: SamplingConfig,
    model: ModelFlags,
    output: TableFlags,
    processes: cli.ProcessFlags,
) -> None:
    """How well a model does a task: each reward's mean and pass@k, with 95 % intervals.

    Example: python evaluate.py task --task reasoning_gym:chain_sum --ckpt_dir run/export
    """
    if task.task == "list":
        cli.write("".join(f"{name}\n" for name in task_names()))
        return
    cli.Signals()
    cli.keep_compilations()
    from_first(lambda: cli.check_writable(output.out))
    source = load_source(model, task.max_seq_len)
    with cli.progress() as report:
        options = dict(skip_bad=task.skip_bad, moment=moment())
        asked = task.load(source.tokenizer, size=task.size, seed=sampling.seed, **options)
        if asked.dropped:
            cli.note(f"data: {asked.counted}")
        params = source.checkpoint.params(source.dtype, decoding=True, progress=report)
        llama, rows = LLaMa(source.checkpoint.config, source.dtype), []
        with scorer_of(asked, task.episodes, task.reward_timeout) as pool:
            found = evaluate_task(
                llama,
                params,
                source.tokenizer,
                asked,
                pool,
                sampling,
                report=report,
                write=rows.append,
            )
    cli.write(jsonlib.dumps(found) + "\n" if output.json else _page(found))
    if output.out is not None and is_first():
        with atomic_file(output.out) as file:
            file.writelines(jsonlib.dumps(row).encode() + b"\n" for row in rows)


def _page(found: dict[str, Any]) -> str:
    """The result of evaluate_task as a table and a line."""
    heads = ["reward", *next(iter(found["rewards"].values()))]
    measured = dict(found["rewards"])
    if len(measured) > 1:
        measured["weighted sum"] = found["total"]
    rows = [
        [name, *(_cell(measures.get(head, "")) for head in heads[1:])]
        for name, measures in measured.items()
    ]
    title = f"{found['task']}: {found['prompts']} prompts, 95 % intervals"
    return cli.table(heads, rows, title) + (
        f"{found['samples']} completions per prompt at temperature {found['temperature']:g}, "
        f"{found['mean_length']:.1f} tokens on average, {found['truncated']:.1%} truncated; "
        f"{found['tokens_per_s']:.0f} tok/s\n"
    )


def _cell(measure: dict[str, Any] | int | str) -> str:
    if not isinstance(measure, dict):
        return str(measure)
    if measure["value"] is None:
        return "–"
    return f"{measure['value']:.3f} [{measure['low']:.3f}, {measure['high']:.3f}]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class HarnessFlags(Config):
    """Tasks of lm-eval, and how it measures them."""

    tasks: str = field(
        help="names with commas between, as lm-eval has them (arc_easy,hellaswag), patterns (mmlu_*) "
        "or .yaml files; `list`: only names them all"
    )
    include_path: str | None = field(None, "a folder of tasks of one's own, as lm-eval's YAML")
    num_fewshot: int | None = field(
        None, "examples before each question; default: the task's own", integer(0)
    )
    limit: float | None = field(
        None, "only the first so many questions per task, or a share below 1", number(above=0)
    )
    batch_size: int = field(16, "texts at once; fewer where they are long", integer(1, 1 << 16))
    apply_chat_template: bool = field(
        False, "questions are a user's messages, written in the checkpoint's chat template"
    )
    fewshot_as_multiturn: bool = field(
        True, "in a chat, examples are turns of their own, and not one message with the question"
    )
    system_instruction: str | None = field(None, "a system message, or a text before each question")
    chat_format: str | None = again(TemplateFlags, "chat_format", None)
    template_args: str | None = again(TemplateFlags, "template_args", None)
    max_seq_len: int | None = again(GenerationConfig, "max_seq_len", None)
    confirm_run_unsafe_code: bool = field(
        False, "allow tasks that run code which the model writes, unprotected"
    )
    output: str | None = field(None, "a file for lm-eval's results as JSON")

    def problems(self) -> list[str]:
        alone = not self.apply_chat_template and (self.chat_format or self.template_args)
        message = "--chat_format and --template_args need --apply_chat_template"
        return super().problems() + [message] * bool(alone)

    def load(self) -> tuple[Any, Any]:
        """(the module that needs lm-eval, the tasks that it has). Raises ConfigError without lm-eval."""
        try:  # slow to import, and optional
            from trainers.evaluation import harness
        except ModuleNotFoundError as e:
            text = f"lm_eval needs the package {e.name}: pip install 'altiplano[eval]'"
            raise ConfigError(text) from e
        return harness, harness.Tasks(self.include_path, self.confirm_run_unsafe_code)


def lm_eval(*, tasks: HarnessFlags, model: DecodingModelFlags, processes: cli.ProcessFlags) -> None:
    """Standard evaluations by EleutherAI's Language Model Evaluation Harness (lm-eval).

    Example: python evaluate.py lm_eval --tasks arc_easy,hellaswag --limit 100
    """
    from_first(lambda: cli.check_writable(tasks.output, "--output"))
    harness, known = tasks.load()
    if tasks.tasks == "list":
        cli.write("".join(f"{name}\n" for name in known.all_tasks))
        return
    cli.Signals()
    cli.keep_compilations()
    with cli.progress() as report:
        loaded = load_model(model, progress=report, say=cli.note)
    lm = harness.AltiplanoLM(
        loaded,
        batch_size=tasks.batch_size,
        max_length=tasks.max_seq_len,
        chat_format=tasks.chat_format,
        template_args=tasks.template_args,
    )
    passed = "num_fewshot limit batch_size apply_chat_template fewshot_as_multiturn".split()
    results = harness.evaluate_tasks(
        lm,
        tasks.tasks.split(","),
        known,
        model_args={"pretrained": model.ckpt_dir},
        log_samples=False,
        system_instruction=tasks.system_instruction,
        **{name: getattr(tasks, name) for name in passed},
    )
    cli.write(harness.as_table(results))
    if tasks.output is not None and is_first():
        with atomic_file(tasks.output) as file:
            file.write(harness.as_json(results).encode())


COMMANDS = {"ppl": ppl, "task": task, "lm_eval": lm_eval}

if __name__ == "__main__":
    cli.run_one_of(COMMANDS)
