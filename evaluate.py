"""Measures a model from the command line: `python evaluate.py ppl --data …`, `… task --task …`."""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports ends the program without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import io
import json as jsonlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rich.console
import rich.table

from models.llama.hub import DEFAULT_MODEL
from models.llama.load import ModelFlags, compute_dtype, open_model
from models.llama.model import LLaMa
from trainers.data import DataConfig, Dataset, load_dataset
from trainers.rewards.accuracy import EvaluationConfig, evaluate_task
from trainers.rewards.pool import RewardPool, load_reward
from trainers.rewards.tasks import load_prompts, load_task
from trainers.sft_trainer import SFTConfig, SFTTrainer
from trainers.trainer import Batch
from utils import cli
from utils.distributed import from_first, is_first
from utils.errors import ConfigError
from utils.files import atomic_file, parse_json

# Failures of rewards that are shown one by one.
_FAILURES = 5


def ppl(
    data: str,
    ckpt_dir: str = DEFAULT_MODEL,
    tokenizer_path: str | None = None,
    seq_len: int | None = None,
    batch_size: int = 4,
    packing: bool = False,
    mask: str = "auto",
    overlong: str = "truncate",
    chat_format: str | None = None,
    skip_bad: int = 0,
    dtype: str = "auto",
    mesh: str | None = None,
    json: bool = False,
    distributed: str | None = None,
    debug: bool = False,
) -> None:
    """Perplexity of a data set: exp of the mean loss over all its targets.

    Args:
        data: a .jsonl or .jsonl.gz file, or a data set on the hub, of {"messages": […]},
            {"prompt": …, "completion": …} or {"text": …}.
        ckpt_dir: a checkpoint folder, a .gguf file, a Hugging Face id, or the default model's name.
        tokenizer_path: a tokenizer file or folder; default: the checkpoint's own.
        seq_len: tokens of the longest row; default: 512, or the model's context if that is less.
        batch_size: rows at once.
        packing: several examples share a row: the same numbers, sooner.
        mask: what is predicted: auto, assistant, last, completion or all.
        overlong: what happens to longer examples: truncate, drop or split.
        chat_format: llama2, llama3 or the name of one of the checkpoint's templates.
        skip_bad: so many broken rows are left out.
        dtype: float32, bfloat16, or auto: float32 on a CPU, bfloat16 elsewhere.
        mesh: how devices share the model, "data=2,fsdp=4"; default: all devices, as fits it.
        json: one JSON object, with the counts of what became of the rows.
        distributed: this process is one of several, see train.py; the first writes.
        debug: show the traceback of an error.
    """
    cli.Signals()
    cli.keep_compilations()
    config = DataConfig(
        seq_len=512 if seq_len is None else seq_len,
        batch_size=batch_size,
        packing=packing,
        mask=mask,
        overlong=overlong,
        shuffle=False,
        chat_format=chat_format,
    )
    dtype = compute_dtype(dtype)
    source = ModelFlags(ckpt_dir=ckpt_dir, tokenizer_path=tokenizer_path, mesh=mesh)
    with cli.progress() as report:
        checkpoint, tokenizer = open_model(source, progress=report, say=cli.note)
        context = checkpoint.config.max_seq_len
        if seq_len is None:
            config = dataclasses.replace(config, seq_len=min(config.seq_len, context))
        dataset = load_dataset(data, tokenizer, config, skip_bad=skip_bad)
        dataset.check_context(context)
        params = checkpoint.params(dtype, progress=report)
        trainer = SFTTrainer(LLaMa(checkpoint.config), SFTConfig())
        means = trainer.derive(trainer.evaluate(params, {}, _reported(dataset, report)))
    means["targets"] = int(means.pop("weight"))
    if json:
        cli.write(jsonlib.dumps(means | {"counts": dataset.counts}) + "\n")
        return
    cli.write(
        f"perplexity {means['perplexity']:.4f}, loss {means['loss']:.4f} nats, "
        f"accuracy {means['accuracy']:.1%}, over {means['targets']:,} tokens of "
        f"{dataset.counts['examples']:,} examples\n"
    )


def _reported(dataset: Dataset, report) -> Iterator[Batch]:
    total = math.ceil(len(dataset) / dataset.config.batch_size)
    for done, batch in enumerate(dataset.epoch_batches()):
        report("batches", done, total)
        yield batch


def task(
    task: str | None = None,
    data: str | None = None,
    reward: str | None = None,
    task_args: str | None = None,
    size: int = 200,
    seed: int = 1,
    ckpt_dir: str = DEFAULT_MODEL,
    tokenizer_path: str | None = None,
    samples: int | None = None,
    k: str | None = None,
    temperature: float = 1.0,
    max_completion_len: int = 64,
    batch_size: int = 8,
    chat: bool | None = None,
    system: str | None = None,
    chat_format: str | None = None,
    skip_bad: int = 0,
    reward_timeout: float = 60.0,
    dtype: str = "auto",
    mesh: str | None = None,
    out: str | None = None,
    json: bool = False,
    distributed: str | None = None,
    debug: bool = False,
) -> None:
    """How well a model does a task: each reward's mean and pass@k, with 95 % intervals.

    Args:
        task: reasoning_gym:NAME, for example reasoning_gym:chain_sum.
        data: instead of a task, a .jsonl or .jsonl.gz file of {"prompt": …}; its other fields are
            columns for the rewards.
        reward: for data: module:function, or a ready-made one by name; several with commas between.
        task_args: a JSON object with the task's own arguments.
        size: prompts of the task.
        seed: of the task's prompts and of the samples.
        ckpt_dir: a checkpoint folder, a .gguf file, a Hugging Face id, or the default model's name.
        tokenizer_path: a tokenizer file or folder; default: the checkpoint's own.
        samples: completions a prompt; default: 8, or 1 at temperature 0.
        k: of pass@k, several with commas between; default: 1 and samples.
        temperature: 0 is greedy.
        max_completion_len: tokens; a longer completion is cut, and scored as it is.
        batch_size: prompts at once.
        chat: a prompt is a user's message; default: if the model has a chat template.
        system: the system message.
        chat_format: llama2, llama3 or the name of one of the checkpoint's templates.
        skip_bad: so many broken rows of the data are left out.
        reward_timeout: seconds that a reward may take for a batch.
        dtype: float32, bfloat16, or auto: float32 on a CPU, bfloat16 elsewhere.
        mesh: how devices share the model, "data=2,fsdp=4"; default: all devices, as fits it.
        out: a .jsonl file for the completions with their scores.
        json: one JSON object instead of a table.
        distributed: this process is one of several, see train.py; the first scores and writes.
        debug: show the traceback of an error.
    """
    cli.Signals()
    cli.keep_compilations()
    # All flags before the model is fetched and loaded: a wrong one should not cost that time.
    samples = (8 if temperature != 0 else 1) if samples is None else samples
    config, dtype, args, rewards, out = cli.all_of(
        lambda: EvaluationConfig(
            samples=samples,
            k=_numbers(k) if k else tuple(sorted({1, samples})),
            temperature=temperature,
            max_completion_len=max_completion_len,
            batch_size=batch_size,
            seed=seed,
        ),
        lambda: compute_dtype(dtype),
        lambda: task_args_of(task, data, task_args),
        lambda: rewards_of(data, reward),
        lambda: from_first(lambda: _writable(out)),
    )
    prompting = dict(chat=chat, system=system, chat_format=chat_format)
    source = ModelFlags(ckpt_dir=ckpt_dir, tokenizer_path=tokenizer_path, mesh=mesh)
    with cli.progress() as report:
        checkpoint, tokenizer = open_model(source, progress=report, say=cli.note)
        if task is not None:
            asked = load_task(task, tokenizer, args=args, size=size, seed=seed, **prompting)
        else:
            asked = load_prompts(data, tokenizer, rewards, skip_bad=skip_bad, **prompting)
        params = checkpoint.params(dtype, decoding=True, progress=report)
        model, rows = LLaMa(checkpoint.config), []
        with RewardPool(asked.rewards, timeout=reward_timeout) as pool:
            found = evaluate_task(
                model, params, tokenizer, asked, pool, config, report=report, write=rows.append
            )
    for message in found["failures"][:_FAILURES]:
        cli.say(message, "warning: ")
    if more := found["failures"][_FAILURES:]:
        cli.say(f"and {len(more)} more failures of rewards", "warning: ")
    if json:
        cli.write(jsonlib.dumps(found) + "\n")
    else:
        _show(found)
    if out is not None and is_first():
        with atomic_file(out) as file:
            file.writelines(jsonlib.dumps(row).encode() + b"\n" for row in rows)


def _numbers(text: str) -> tuple[int, ...]:
    """`--k`: whole numbers with commas between."""
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError as e:
        raise ConfigError(f"--k {text!r:.40}, expected numbers with commas between, as 1,8") from e


def task_args_of(
    task: str | None, data: str | None, task_args: str | None
) -> dict[str, Any] | None:
    """--task_args, where --task or --data is given."""
    if (task is None) == (data is None):
        raise ConfigError("pass --task or --data, one of them")
    if task_args is None:
        return None
    if task is None:
        raise ConfigError("--task_args are of a --task")
    return parse_json(task_args.encode(), "--task_args")


def rewards_of(data: str | None, reward: str | None) -> list[Any]:
    """--reward, which --data needs."""
    if (data is None) != (reward is None):
        raise ConfigError("--data needs --reward, and a --task has rewards of its own")
    return [load_reward(spec.strip()) for spec in reward.split(",")] if reward else []


def _writable(out: str | None) -> str | None:
    folder = Path(os.path.abspath(out or "")).parent
    if out is not None and not os.access(folder, os.W_OK):
        raise ConfigError(f"--out {out}: cannot write into the folder {folder}; make it first")
    return out


def _show(found: dict[str, Any]) -> None:
    """Writes what evaluate_task found as a table and a line."""
    names = list(next(iter(found["rewards"].values())))
    table = rich.table.Table(title=f"{found['task']}: {found['prompts']} prompts, 95 % intervals")
    table.add_column("reward")
    for name in names:
        table.add_column(name, justify="right")
    for reward, measures in found["rewards"].items():
        table.add_row(reward, *(_cell(measures[name]) for name in names))
    if len(found["rewards"]) > 1:
        table.add_row("weighted sum", *(_cell(found["total"].get(name, "")) for name in names))
    # As text first: what a terminal is given goes through cli.write.
    page = rich.console.Console(file=io.StringIO(), width=60 + 30 * len(names), markup=False)
    page.print(table)
    cli.write(page.file.getvalue())
    cli.write(
        f"{found['samples']} completions a prompt at temperature {found['temperature']:g}, "
        f"{found['mean_length']:.1f} tokens on average, {found['truncated']:.1%} truncated; "
        f"{found['tokens_per_s']:.0f} tok/s\n"
    )


def _cell(measure: dict[str, Any] | int | str) -> str:
    if not isinstance(measure, dict):
        return str(measure)
    if measure["value"] is None:
        return "–"
    return f"{measure['value']:.3f} [{measure['low']:.3f}, {measure['high']:.3f}]"


if __name__ == "__main__":
    cli.run_one_of({"ppl": ppl, "task": task})
