"""Computes a step of a GRPO run again from what it saved, for the study of losses."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from models.llama.model import Params
from trainers.grpo_trainer import GRPOConfig, GRPOTrainer
from trainers.runs.checkpoint import CheckpointReader
from trainers.runs.metrics import whole_lines
from trainers.runs.recipes import saved_config
from trainers.runs.saved import open_run, read_settings
from trainers.runs.start import start
from trainers.report.rollouts import from_record
from trainers.optimizer import learning_rate
from trainers.rollout import Layout, Rollout, RolloutConfig, parts
from trainers.trainer import Batch, TrainState
from utils.errors import ConfigError, DataError
from utils.fields import Config, again, field, integer
from utils.files import flatten, parse_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepFlags(Config):
    """The step that is computed again."""

    run: str = field(help="the run's folder, its --out_dir")
    step: int = field(help="optimizer step, from 1", allowed=integer(1))
    json: bool = field(False, "one JSON object instead of a table")


# Flags of the loss that replace the run's; None keeps its value.
LossFlags = dataclasses.make_dataclass(
    "LossFlags",
    [
        (f.name, f.type | None, again(GRPOConfig, f.name, None))
        for f in dataclasses.fields(GRPOConfig)
        if f.name in ("loss", "beta", "kl", "ratio_level", "tis_cap", "dual_clip")
        or f.name.startswith("epsilon")
    ],
    bases=(Config,),
    frozen=True,
    kw_only=True,
)


class SavedRun(NamedTuple):
    """A GRPO run, with its state before some step.

    Attributes:
        trainer, rollout: as the run's flags made them.
        state: after fewer updates than the step has.
        frozen: as in the run.
        records: lines of rollouts.jsonl by their step.
        logged: metrics.jsonl's line of the step, values by their path.
    """

    trainer: GRPOTrainer
    rollout: RolloutConfig
    state: TrainState
    frozen: Params
    records: Mapping[int, dict[str, Any]]
    logged: Mapping[str, float] = {}


def read_run(folder: Path, step: int) -> SavedRun:
    """Reads a run's folder, with the newest state that is saved before a step.

    Raises ConfigError, DataError or CheckpointError if the folder does not hold that.
    """
    settings = read_settings(folder)
    train = settings["train"]
    if "loss" not in train:
        raise ConfigError(f"{folder} is not a run of `train.py grpo`: run.json has no loss")
    # Before a model is loaded: whether all rollouts are there that lead to the step.
    rollout = saved_config(RolloutConfig, train)
    records = {r["step"]: r for r in _records(folder / "rollouts.jsonl")}
    reader = CheckpointReader(folder / "checkpoints")
    from_step = max((n for n in reader.steps if n < step), default=0)
    for n in (step, *range(from_step + 1, step)):
        _first_update(records, rollout, n)
    logged = [flatten(r) for r in _records(folder / "metrics.jsonl") if r["step"] == step]

    _, source, trainer = open_run(folder, settings)
    dtype = trainer.config.param_dtype if trainer.lora is None else trainer.model.dtype
    params = source.base.params(dtype)
    state, frozen = start(trainer, source, params, jax.random.key(train["seed"]))
    if from_step:
        state = reader.restore(jax.eval_shape(lambda: state), step=from_step).state
    return SavedRun(trainer, rollout, state, frozen, records, logged[-1] if logged else {})


def _records(path: Path) -> list[dict[str, Any]]:
    return [parse_json(line, where, DataError) for where, line in whole_lines(path)]


def replay_step(
    run: SavedRun, step: int, others: Mapping[str, Mapping[str, Any]] = {}
) -> dict[str, dict[str, float | None]]:
    """Losses and gradients of one update, from the state of an earlier one.

    Updates in between are done again from their saved completions; nothing is sampled.

    Args:
        run: its state is donated.
        step: the update, from 1.
        others: by name, fields of GRPOConfig that differ from the run's.

    Returns:
        For "run" and each other name: `loss`, `grad_norm` and the metrics of `GRPOTrainer.derive`;
        for the run also `lr`, `targets`, `tokens` and the rollout's own numbers; for the others also
        `difference`, the norm of the difference of both gradients over that of the run's, and
        `cosine` between them. First, as "logged", metrics.jsonl's numbers of the run's names.

    Raises:
        ConfigError: a rollout that is needed is not there.
        DataError: it is broken.
    """
    batch, state = _batch(run, step), _advance(run, step)
    found, first = {}, None
    for name, changes in {"run": {}, **others}.items():
        changed = dataclasses.replace(run.trainer.config, **changes)
        trainer = dataclasses.replace(run.trainer, config=changed)
        if changed.beta > 0 and "ref_logprobs" not in batch:
            if not run.frozen:
                raise ConfigError(
                    "the run had no reference (beta 0), so beta above 0 has none here"
                )
            batch["ref_logprobs"] = trainer.score(state.params, run.frozen, batch, reference=True)
        gradients, means = _gradients(trainer, state.params, run.frozen, batch, state.key)
        norm = optax.tree.norm(gradients)
        values = {k: float(v) for k, v in means.items()}
        found[name] = trainer.derive(values) | {"grad_norm": float(norm)}
        if first is None:
            first, first_norm = gradients, norm
            found[name] |= _measured(run, step, batch)
            continue
        off = optax.tree.norm(jax.tree.map(jnp.subtract, gradients, first))
        dot = optax.tree.vdot(gradients, first)
        found[name] |= {
            "difference": float(off / first_norm),
            "cosine": float(dot / (norm * first_norm)),
        }
    return {"logged": {k: v for k, v in run.logged.items() if k in found["run"]}, **found}


def _measured(run: SavedRun, step: int, batch: Batch) -> dict[str, float | None]:
    """A step's numbers that depend on no gradient, by the names of metrics.jsonl."""
    work = run.trainer.work(batch)
    rate = learning_rate(run.trainer.config)(step - 1)
    values = {"lr": float(rate), "targets": work.targets, "tokens": work.tokens}
    if not run.rollout.refills:  # else the log counts groups that were replaced, too
        values |= flatten(_rollout(run, step)[0].metrics())
    return values


def verdict(found: Mapping[str, Mapping[str, float | None]], dtype: Any) -> tuple[bool, str]:
    """(whether the run's numbers are those that were logged, and that in words).

    Args:
        found: as `replay_step` returns it.
        dtype: of the model's activations. Numbers agree within 2 of its epsilons, 1e-4 at least, and
            1e-5 near 0: the program that repeats a step is another one than the run's.
    """
    relative = max(1e-4, 2 * float(jnp.finfo(dtype).eps))
    logged, again, off = found["logged"], found["run"], {}
    if not logged:
        return False, "metrics.jsonl has no line of this step: nothing to compare with"
    for name, value in logged.items():
        if value is None or again[name] is None:  # null: not finite, or nothing to measure
            off[name] = 0.0 if value is again[name] else math.inf
        else:
            largest = max(abs(value), abs(again[name]), 1e-5 / relative)
            off[name] = abs(value - again[name]) / largest
    wrong = [name for name, by in off.items() if not by <= relative]
    if wrong:
        return False, f"differs from metrics.jsonl: {', '.join(wrong)} ({len(off)} compared)"
    most = max(off, key=off.get)
    return True, (
        f"repeated: all {len(off)} numbers agree with metrics.jsonl, "
        f"to {off[most]:.1e} at least ({most})"
    )


def _advance(run: SavedRun, step: int) -> TrainState:
    """The state before an update, by doing those since the saved one again."""
    state = run.state
    while (done := int(state.step)) + 1 < step:
        state, _ = run.trainer.train_step(state, run.frozen, _batch(run, done + 1))
        if int(state.step) == done:
            raise ConfigError(f"the update to step {done + 1} is skipped when it is done again")
    return state


@functools.partial(jax.jit, static_argnums=0)
def _gradients(trainer: GRPOTrainer, params, frozen, batch, key):
    gradients, loss = trainer.gradients(params, frozen, batch, key)
    return gradients, loss.means()


def _first_update(records: Mapping[int, Any], config: RolloutConfig, step: int) -> int:
    """The first update on the rollout that serves a step."""
    start = max((n for n in records if n <= step), default=None)
    if start is None or step - start >= config.updates:
        saved = f"steps {min(records)} to {max(records)}" if records else "none"
        raise ConfigError(f"no rollout for step {step} is saved; rollouts.jsonl has {saved}")
    return start


def _rollout(run: SavedRun, step: int) -> tuple[Rollout, Layout, int]:
    """(the rollout that serves a step, its layout, the updates on it before that step)."""
    start = _first_update(run.records, run.rollout, step)
    return *from_record(run.records[start], f"the rollout of step {start}"), step - start


def _batch(run: SavedRun, step: int) -> Batch:
    """The batch of the update to `step`."""
    rollout, layout, before = _rollout(run, step)
    batch = rollout.batch(layout, mask_truncated=run.trainer.config.mask_truncated)
    return parts(batch, run.rollout.mini_batches)[before % run.rollout.mini_batches]
