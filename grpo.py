"""GRPO from the command line: `python train.py grpo`, and what looks at its runs: `replay`, `report`."""

import functools
import io
import json as jsonlib
from pathlib import Path

import rich.console
import rich.table

from evaluate import rewards_of, task_args_of
from models.llama.generation import random_key
from models.llama.hub import DEFAULT_MODEL
from models.llama.loading import compute_dtype
from trainers.grpo_trainer import GRPOConfig
from trainers.replay import SavedRun, replay_step
from trainers.report.report import write_report
from trainers.rewards.tasks import load_prompts, load_task
from trainers.rollout import RolloutConfig, rows_at_once
from trainers.run import GRPOJob, Run, known_remat, load_source, lora_config
from utils import cli

# (Without LoRA, with it): adapters start at zero and want larger steps.
_LEARNING_RATES = 1e-6, 1e-5

# Of the prompts that `--eval_size` holds out: a number that is no run's seed by chance.
_EVAL_SEED = 1_000_003


def grpo(
    out_dir: str,
    task: str | None = None,
    task_args: str | None = None,
    task_size: int = 10_000,
    data: str | None = None,
    reward: str | None = None,
    eval_size: int = 0,
    eval_data: str | None = None,
    eval_samples: int = 1,
    ckpt_dir: str = DEFAULT_MODEL,
    tokenizer_path: str | None = None,
    chat: bool | None = None,
    system: str | None = None,
    chat_format: str | None = None,
    max_steps: int = 100,
    prompts_per_step: int = 8,
    group_size: int = 8,
    max_completion_len: int = 512,
    micro_batch_size: int | None = 8,
    loss: str = "dapo",
    beta: float = 0.0,
    kl: str = "ratio_k3",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    dual_clip: float | None = None,
    ratio_level: str = "token",
    scale: str = "group",
    tis_cap: float | None = None,
    mask_truncated: bool = False,
    iterations: int = 1,
    mini_batches: int = 1,
    refills: int = 0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    lr: float | None = None,
    optimizer: str = "adamw",
    schedule: str = "constant",
    warmup_steps: int = 0,
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
    lora_rank: int = 0,
    lora_alpha: float | None = None,
    reward_timeout: float = 60.0,
    reward_failure: str = "unscorable",
    dtype: str = "auto",
    mesh: str | None = None,
    param_dtype: str = "float32",
    state_dtype: str = "float32",
    remat: str = "dots",
    seed: int = 0,
    save_every: int = 50,
    eval_every: int = 0,
    keep: int = 2,
    rollouts: bool = True,
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
    """Trains on rewards with GRPO: groups of completions, better ones made more likely.

    Args:
        out_dir: gets run.json, metrics.jsonl, rollouts.jsonl, checkpoints/ and at the end export/.
        task: reasoning_gym:NAME, for example reasoning_gym:chain_sum.
        task_args: a JSON object with the task's own arguments.
        task_size: prompts of the task.
        data: instead of a task, a .jsonl or .jsonl.gz file of {"prompt": …}; its other fields are
            columns for the rewards.
        reward: for data: module:function, or a ready-made one by name, with =0.5 for a weight;
            several with commas between.
        eval_size: held-out prompts of the task, none of which is trained on.
        eval_data: as data, for evaluations.
        eval_samples: completions of each prompt in an evaluation.
        ckpt_dir: the model to start from, as for generate.py.
        tokenizer_path: a tokenizer file or folder; default: the checkpoint's own.
        chat: a prompt is a user's message; default: if the model has a chat template.
        system: the system message.
        chat_format: llama2, llama3 or the name of one of the checkpoint's templates.
        max_steps: optimizer steps of the whole run.
        prompts_per_step: prompts of a rollout.
        group_size: completions of each prompt.
        max_completion_len: tokens; a longer completion is cut, and scored as it is.
        micro_batch_size: completions computed at once, on a mesh a group a device at least: less
            needs less memory.
        loss: how token losses are averaged: dapo, grpo, bnpo or dr_grpo.
        beta: weight of the KL penalty; at 0 there is no reference model.
        kl: its estimator: ratio_k3, k1, k2 or k3.
        epsilon: the ratio is clipped to 1 ± epsilon.
        epsilon_high: the upper bound, if it is another one.
        dual_clip: bounds the ratio where the advantage is negative.
        ratio_level: one ratio a token, or one a sequence (GSPO).
        scale: what advantages are divided by: the deviation of a group or batch, or none.
        tis_cap: truncated importance sampling, for a sampler with other numbers.
        mask_truncated: completions without a stop have no loss.
        iterations: how often a rollout is trained on.
        mini_batches: updates that each of these is cut into.
        refills: dynamic sampling: rounds that replace groups of equal rewards.
        temperature: of sampling and of all log-probs.
        top_p: of sampling; other than 1 it biases the ratio.
        top_k: of sampling; other than 0 it biases the ratio.
        lr: the peak learning rate; default: 1e-6, with LoRA 1e-5.
        optimizer: adamw, adafactor, lion or muon.
        schedule: constant, linear, cosine or wsd.
        warmup_steps: linear from 0.
        weight_decay: not on norms and biases.
        clip_norm: of the gradients; 0 is off.
        lora_rank: above 0 trains adapters of that rank next to the frozen model.
        lora_alpha: default: twice the rank.
        reward_timeout: seconds that a reward may take for a batch.
        reward_failure: what a crash or time-out of a reward does: unscorable leaves its prompts out,
            stop ends the run.
        dtype: of activations: float32, bfloat16, or auto: float32 on a CPU, bfloat16 elsewhere.
        mesh: how devices share the model, "data=2,fsdp=4"; default: all devices, as fits it.
        param_dtype: of the trained parameters.
        state_dtype: of the optimizer's moments.
        remat: what the backward pass computes again: none, dots or block; block needs least memory.
        seed: of adapters, of the prompts' order and of sampling.
        save_every: steps between checkpoints.
        eval_every: steps between evaluations; 0: only before the first and after the last.
        keep: how many of the newest checkpoints stay, beside the best.
        rollouts: write all completions to rollouts.jsonl, for `report` and `replay`.
        resume: go on from out_dir's newest checkpoint that is whole.
        resume_step: go on from this step's checkpoint.
        allow_data_change: go on although the prompts are not the same.
        allow_config_change: go on although the learning rate, the loss and the like differ.
        tensorboard: write event files too.
        export: write the model to out_dir/export in Hugging Face's format.
        check_every: steps between comparisons of the parameters' copies on a mesh; 0: none.
        distributed: this process is one of several, "coordinator=HOST:PORT,processes=4,process=0", or
            "auto": as the launcher says. Slurm, Open MPI and JAX_COORDINATOR_ADDRESS need no flag.
        debug: show the traceback of an error.
    """
    stop = cli.Signals(sigterm=True)
    cli.keep_compilations()
    at_once, branches = rows_at_once(micro_batch_size, group_size)
    config_of = functools.partial(
        GRPOConfig,
        optimizer=optimizer,
        learning_rate=_LEARNING_RATES[lora_rank != 0] if lr is None else lr,
        schedule=schedule,
        warmup_steps=warmup_steps,
        max_steps=max_steps,
        weight_decay=weight_decay,
        clip_norm=None if clip_norm == 0 else clip_norm,
        state_dtype=state_dtype,
        micro_batch_size=at_once,
        param_dtype=param_dtype,
        save_every=save_every,
        eval_every=eval_every,
        loss=loss,
        beta=beta,
        kl=kl,
        epsilon_low=epsilon,
        epsilon_high=epsilon if epsilon_high is None else epsilon_high,
        dual_clip=dual_clip,
        ratio_level=ratio_level,
        tis_cap=tis_cap,
        mask_truncated=mask_truncated,
        temperature=temperature,
        max_completion_len=max_completion_len,
    )
    rollout_of = functools.partial(
        RolloutConfig,
        prompts_per_step=prompts_per_step,
        group_size=group_size,
        scale=scale,
        iterations=iterations,
        mini_batches=mini_batches,
        refills=refills,
        branches=branches,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
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
    config, rollout, lora, run, compute, remat, args, rewards = cli.all_of(
        config_of,
        rollout_of,
        functools.partial(lora_config, lora_rank, lora_alpha),
        run_of,
        functools.partial(compute_dtype, dtype),
        functools.partial(known_remat, remat),
        functools.partial(task_args_of, task, data, task_args),
        functools.partial(rewards_of, data, reward),
    )
    key = random_key(seed)
    source = load_source(ckpt_dir, tokenizer_path, mesh)
    prompting = dict(chat=chat, system=system, chat_format=chat_format)
    evaluated = None
    if task is not None:
        load = functools.partial(load_task, task, source.tokenizer, args=args, **prompting)
        # What is held out is chosen first: it is then the same for every seed and size.
        if eval_size:
            evaluated = load(size=eval_size, seed=_EVAL_SEED)
        prompts = load(size=task_size, seed=seed, exclude=evaluated)
    else:
        prompts = load_prompts(data, source.tokenizer, rewards, **prompting)
        if eval_data is not None:
            evaluated = load_prompts(eval_data, source.tokenizer, rewards, **prompting)
    first = source.tokenizer.decode(prompts.prompts[0].ids)
    cli.say(f"{len(prompts.prompts):,} prompts, the longest of {prompts.longest} tokens", "")
    cli.say(f"the first, as the model reads it: {first!r:.600}", "")
    job = GRPOJob(
        config=config,
        rollout=rollout,
        task=prompts,
        evaluated=evaluated,
        eval_samples=eval_samples,
        tokenizer=source.tokenizer,
        lora=lora,
        dtype=compute,
        remat=remat,
        reward_timeout=reward_timeout,
        reward_failure=reward_failure,
        rollouts=rollouts,
    )
    run.train(job, source, key, stop)


def replay(
    run: str,
    step: int,
    loss: str | None = None,
    beta: float | None = None,
    kl: str | None = None,
    epsilon: float | None = None,
    epsilon_high: float | None = None,
    dual_clip: float | None = None,
    ratio_level: str | None = None,
    tis_cap: float | None = None,
    json: bool = False,
    debug: bool = False,
) -> None:
    """Computes a step's loss and gradients again from its saved completions, with other losses too.

    Starts from the newest checkpoint before that step, or from the model that the run started from,
    and repeats the updates in between. Without another loss it shows that the run can be repeated.

    Args:
        run: the run's folder, its --out_dir.
        step: the optimizer step, from 1.
        loss: another one than the run's, as for grpo.
        beta: another one than the run's, as the following flags.
        kl: as for grpo.
        epsilon: as for grpo.
        epsilon_high: as for grpo.
        dual_clip: as for grpo.
        ratio_level: as for grpo.
        tis_cap: as for grpo.
        json: one JSON object instead of a table.
        debug: show the traceback of an error.
    """
    cli.Signals()
    cli.keep_compilations()
    changes = dict(loss=loss, beta=beta, kl=kl, epsilon_low=epsilon, epsilon_high=epsilon_high)
    changes |= dict(dual_clip=dual_clip, ratio_level=ratio_level, tis_cap=tis_cap)
    changes = {name: value for name, value in changes.items() if value is not None}
    past = SavedRun(Path(run), step)
    others = {"changed": changes} if changes else {}
    with cli.busy("computing"):
        found = replay_step(
            past.trainer, past.rollout, past.state, past.frozen, past.records, step, others
        )
    found = {"logged": past.logged} | found
    if json:
        cli.write(jsonlib.dumps(found) + "\n")
        return
    names = list(dict.fromkeys(name for values in found.values() for name in values))
    table = rich.table.Table(title=f"step {step} of {run}")
    table.add_column("")
    for name in found:
        table.add_column(name, justify="right")
    for name in names:
        cells = (found[column].get(name) for column in found)
        table.add_row(name, *("" if cell is None else f"{cell:.8g}" for cell in cells))
    page = rich.console.Console(file=io.StringIO(), width=40 + 20 * len(found), markup=False)
    page.print(table)
    cli.write(page.file.getvalue())


def report(run: str, out: str | None = None, pngs: bool = False, debug: bool = False) -> None:
    """Writes a page with a run's curves and completions: one HTML file, to be opened anywhere.

    Args:
        run: the run's folder, its --out_dir.
        out: the file; default: report.html in that folder.
        pngs: the charts as PNG files beside it too.
        debug: show the traceback of an error.
    """
    cli.write(f"{write_report(run, out, pngs=pngs)}\n")
