"""Computes a step of a GRPO run again from what it saved, for whoever studies losses."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from models.llama.load import load_checkpoint, load_config
from models.llama.lora import LoRAConfig
from models.llama.model import LLaMa, Params
from trainers.checkpoint import CheckpointReader
from trainers.grpo_trainer import GRPOConfig, GRPOTrainer
from trainers.metrics import whole_lines
from trainers.rollout import RolloutConfig, parts
from trainers.rollout_file import from_record
from trainers.trainer import Batch, TrainState
from utils.errors import ConfigError, DataError, is_int
from utils.files import parse_json, read_json


class SavedRun:
    """A GRPO run's folder, with the state before one of its steps.

    Attributes:
        trainer, rollout: as the run's flags made them.
        state, frozen: after `step` - 1 updates or fewer: the newest that is saved.
        records: lines of rollouts.jsonl by their step.
        logged: what metrics.jsonl says of the step, numbers only.
    """

    def __init__(self, folder: Path, step: int):
        """Raises ConfigError, DataError or CheckpointError if the folder does not hold that."""
        if not is_int(step) or step < 1:
            raise ConfigError(f"step={step!r}, expected an integer from 1")
        settings = read_json(folder / "run.json", error=DataError)
        if "loss" not in settings.get("train", {}):
            raise ConfigError(f"{folder} is not a run of `train.py grpo`: run.json has no loss")
        train, lora = settings["train"], settings["lora"]
        fields = lambda cls: {
            f.name: train[f.name] for f in dataclasses.fields(cls) if f.name in train
        }
        source = Path(settings["source"]["ckpt_dir"])
        model = LLaMa(load_config(source), jnp.dtype(train["dtype"]), train["remat"])
        lora = LoRAConfig(**lora) if lora else None
        config, limit = GRPOConfig(**fields(GRPOConfig)), settings["train"]["vocab_limit"]
        self.trainer = GRPOTrainer(model, config, lora, limit)
        self.rollout = RolloutConfig(**fields(RolloutConfig))
        self.records = {r["step"]: r for r in _records(folder / "rollouts.jsonl")}
        logged = [r for r in _records(folder / "metrics.jsonl") if r["step"] == step]
        numbers = {k: v for k, v in (logged or [{}])[-1].items() if isinstance(v, float)}
        self.logged = {k: numbers[k] for k in ("loss", "grad_norm", "entropy") if k in numbers}
        self.state, self.frozen = self._state(folder / "checkpoints", source, train["seed"], step)

    def _state(self, checkpoints: Path, source: Path, seed: int, step: int):
        trainer, key = self.trainer, jax.random.key(seed)
        dtype = trainer.model.dtype if trainer.lora is not None else trainer.config.param_dtype
        params = load_checkpoint(source, dtype=dtype)[1]
        state, frozen = trainer.init(params, key)
        reader = CheckpointReader(checkpoints)
        if earlier := [n for n in reader.steps if n < step]:
            state = reader.restore(jax.eval_shape(lambda: state), step=earlier[-1]).state
        return state, frozen


def _records(path: Path) -> list[dict[str, Any]]:
    return [parse_json(line, where, DataError) for where, line in whole_lines(path)]


def replay_step(
    trainer: GRPOTrainer,
    rollout: RolloutConfig,
    state: TrainState,
    frozen: Params,
    records: Mapping[int, dict[str, Any]],
    step: int,
    others: Mapping[str, Mapping[str, Any]] = {},
) -> dict[str, dict[str, float]]:
    """Losses and gradients of one update, from the state of an earlier one.

    Updates in between are done again from their saved completions; nothing is sampled.

    Args:
        trainer, rollout: the run's.
        state: after fewer than `step` updates; donated.
        frozen: as in the run.
        records: lines of rollouts.jsonl by their step.
        step: the update, from 1.
        others: for each name, fields of GRPOConfig that differ from the run's.

    Returns:
        For "run" and each other name: `loss`, `grad_norm` and the metrics of `GRPOTrainer.derive`;
        for the others also `difference`, the norm of the difference of both gradients over that of
        the run's, and `cosine` between them.

    Raises:
        ConfigError: a rollout that is needed is not there.
        DataError: it is broken.
    """
    batch = _batch(trainer, rollout, records, step)
    while int(state.step) + 1 < step:
        before = int(state.step)
        state, metrics = trainer.train_step(
            state, frozen, _batch(trainer, rollout, records, before + 1)
        )
        if int(state.step) == before:
            raise ConfigError(f"the update to step {before + 1} is skipped when it is done again")
    found, first = {}, None
    for name, changes in {"run": {}, **others}.items():
        changed = dataclasses.replace(
            trainer, config=dataclasses.replace(trainer.config, **changes)
        )
        if changed.config.beta > 0 and "ref_logprobs" not in batch:
            if not frozen:
                raise ConfigError(
                    "the run had no reference (beta 0), so beta above 0 has none here"
                )
            batch["ref_logprobs"] = changed.score(state.params, frozen, batch, reference=True)
        gradients, means = _gradients(changed, state.params, frozen, batch, state.key)
        norm = optax.tree.norm(gradients)
        values = {k: float(v) for k, v in means.items()}
        found[name] = changed.derive(values) | {"grad_norm": float(norm)}
        if first is None:
            first, first_norm = gradients, norm
        else:
            off = optax.tree.norm(jax.tree.map(jnp.subtract, gradients, first))
            dot = optax.tree.vdot(gradients, first)
            found[name] |= {"difference": float(off / first_norm)}
            found[name] |= {"cosine": float(dot / (norm * first_norm))}
    return found


@functools.partial(jax.jit, static_argnums=0)
def _gradients(trainer: GRPOTrainer, params, frozen, batch, key):
    gradients, loss = trainer.gradients(params, frozen, batch, key)
    return gradients, loss.means()


def _batch(trainer: GRPOTrainer, config: RolloutConfig, records, step: int) -> Batch:
    """The batch of the update to `step`."""
    earlier = [n for n in records if n <= step]
    start = max(earlier, default=None)
    if start is None or step - start >= config.updates:
        there = f"{min(records)} to {max(records)}" if records else "none"
        raise ConfigError(f"no rollout for step {step} is saved; there are those of steps {there}")
    rollout, layout = from_record(records[start], f"the rollout of step {start}")
    batch = rollout.batch(layout, mask_truncated=trainer.config.mask_truncated)
    return parts(batch, config.mini_batches)[(step - start) % config.mini_batches]
