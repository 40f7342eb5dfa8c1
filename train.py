"""Training from the command line: `python train.py sft --data …`, `python train.py grpo --task …`."""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports ends the program without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import functools
from pathlib import Path
from typing import Any

import grpo
from models.llama.generation import random_key
from models.llama.hub import DEFAULT_MODEL
from models.llama.loading import compute_dtype
from trainers.data import DataConfig, Dataset, load_dataset
from trainers.run import Run, SFTJob, known_remat, load_source, lora_config
from trainers.sft_trainer import SFTConfig
from utils import cli
from utils.errors import is_int

# (Without LoRA, with it): adapters start at zero and want larger steps.
_SFT_RATES = 2e-5, 2e-4


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
    mesh: str | None = None,
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
    check_every: int = 100,
    distributed: str | None = None,
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
        micro_batch_size: rows computed at once, on a mesh a row a device at least: less needs less
            memory; the update is the same.
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
        mesh: how devices share the model, "data=2,fsdp=4"; default: all devices, as fits it.
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
        check_every: steps between comparisons of the parameters' copies on a mesh; 0: none.
        distributed: this process is one of several, "coordinator=HOST:PORT,processes=4,process=0", or
            "auto": as the launcher says. Slurm, Open MPI and JAX_COORDINATOR_ADDRESS need no flag.
        debug: show the traceback of an error.
    """
    stop = cli.Signals(sigterm=True)
    cli.keep_compilations()
    # All flags before anything is fetched and loaded: a wrong one should not cost that time.
    config_of = functools.partial(
        SFTConfig,
        optimizer=optimizer,
        learning_rate=_SFT_RATES[lora_rank != 0] if lr is None else lr,
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
        check_every=check_every,
    )
    config, data_config, lora, run, compute, remat = cli.all_of(
        config_of,
        data_of,
        functools.partial(lora_config, lora_rank, lora_alpha),
        run_of,
        functools.partial(compute_dtype, dtype),
        functools.partial(known_remat, remat),
    )
    key = random_key(seed)
    source = load_source(ckpt_dir, tokenizer_path, mesh)
    dataset = load_dataset(data, source.tokenizer, data_config, skip_bad=skip_bad)
    dataset.check_full_batch()
    say_counts("data", dataset)
    evaluated = None
    if eval_data is not None:
        evaluated = load_dataset(eval_data, source.tokenizer, data_config)
        say_counts("eval_data", evaluated)
    job = SFTJob(
        config=config,
        dataset=dataset,
        evaluated=evaluated,
        lora=lora,
        dtype=compute,
        remat=remat,
    )
    run.train(job, source, key, stop)


def say_counts(name: str, dataset: Dataset) -> None:
    """One line of what became of the rows."""
    told = ", ".join(f"{value:,} {key}" for key, value in dataset.counts.items() if value)
    cli.say(f"{name}: {told.replace('_', ' ')}", "")


def _warmup(max_steps: Any) -> int:
    return round(0.03 * max_steps) if is_int(max_steps) and max_steps > 0 else 0


COMMANDS = {"sft": sft, "grpo": grpo.grpo, "replay": grpo.replay, "report": grpo.report}

if __name__ == "__main__":
    cli.run_one_of(COMMANDS)
