"""Computes a step of a GRPO run again from what it saved, for the study of losses."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from models.llama.load import open_checkpoint
from models.llama.lora import LoRAConfig
from models.llama.model import LLaMa, Params
from trainers.runs.checkpoint import CheckpointReader
from trainers.grpo_trainer import GRPOConfig, GRPOTrainer
from trainers.runs.metrics import whole_lines
from trainers.report.rollouts import from_record
from trainers.rollout import RolloutConfig, parts
from trainers.trainer import Batch, TrainState
from utils.errors import ConfigError, DataError
from utils.files import parse_json, read_json


class SavedRun(NamedTuple):
    """A GRPO run, with its state before some step.

    Attributes:
        trainer, rollout: as the run's flags made them.
        state: after fewer updates than the step has.
        frozen: as in the run.
        records: lines of rollouts.jsonl by their step.
        logged: numbers of metrics.jsonl at the step.
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
    settings = read_json(folder / "run.json", error=DataError)
    if "loss" not in settings.get("train", {}):
        raise ConfigError(f"{folder} is not a run of `train.py grpo`: run.json has no loss")
    train, source = settings["train"], open_checkpoint(settings["source"]["ckpt_dir"])

    def saved(cls: type) -> Any:
        return cls(**{f.name: train[f.name] for f in dataclasses.fields(cls) if f.name in train})

    model = LLaMa(source.config, jnp.dtype(train["dtype"]), train["remat"])
    lora = LoRAConfig(**settings["lora"]) if settings["lora"] else None
    trainer = GRPOTrainer(model, saved(GRPOConfig), lora, train["vocab_limit"])
    dtype = model.dtype if lora is not None else trainer.config.param_dtype
    params = source.params(dtype)
    state, frozen = trainer.init(params, jax.random.key(train["seed"]))
    reader = CheckpointReader(folder / "checkpoints")
    if earlier := [n for n in reader.steps if n < step]:
        state = reader.restore(jax.eval_shape(lambda: state), step=earlier[-1]).state
    logged = [r for r in _records(folder / "metrics.jsonl") if r["step"] == step]
    numbers = logged[-1] if logged else {}
    return SavedRun(
        trainer=trainer,
        rollout=saved(RolloutConfig),
        state=state,
        frozen=frozen,
        records={r["step"]: r for r in _records(folder / "rollouts.jsonl")},
        logged={
            name: numbers[name]
            for name in ("loss", "grad_norm", "entropy")
            if isinstance(numbers.get(name), float)
        },
    )


def _records(path: Path) -> list[dict[str, Any]]:
    return [parse_json(line, where, DataError) for where, line in whole_lines(path)]


def replay_step(
    run: SavedRun, step: int, others: Mapping[str, Mapping[str, Any]] = {}
) -> dict[str, dict[str, float]]:
    """Losses and gradients of one update, from the state of an earlier one.

    Updates in between are done again from their saved completions; nothing is sampled.

    Args:
        run: its state is donated.
        step: the update, from 1.
        others: by name, fields of GRPOConfig that differ from the run's.

    Returns:
        For "run" and each other name: `loss`, `grad_norm` and the metrics of `GRPOTrainer.derive`;
        for the others also `difference`, the norm of the difference of both gradients over that of
        the run's, and `cosine` between them.

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
            continue
        off = optax.tree.norm(jax.tree.map(jnp.subtract, gradients, first))
        dot = optax.tree.vdot(gradients, first)
        found[name] |= {
            "difference": float(off / first_norm),
            "cosine": float(dot / (norm * first_norm)),
        }
    return found


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


def _batch(run: SavedRun, step: int) -> Batch:
    """The batch of the update to `step`."""
    records, config = run.records, run.rollout
    start = max((n for n in records if n <= step), default=None)
    if start is None or step - start >= config.updates:
        saved = f"steps {min(records)} to {max(records)}" if records else "none"
        raise ConfigError(f"no rollout for step {step} is saved; rollouts.jsonl has {saved}")
    rollout, layout = from_record(records[start], f"the rollout of step {start}")
    batch = rollout.batch(layout, mask_truncated=run.trainer.config.mask_truncated)
    return parts(batch, config.mini_batches)[(step - start) % config.mini_batches]
