"""What a run will hold in memory: said, and checked, before anything is loaded."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from models.llama.model import cache_shape
from trainers.planning import job as planning
from trainers.planning.estimate import estimate_job
from trainers.planning.train_memory import check_training_fits, peak_bytes, training_bytes
from trainers.rollout import RolloutConfig
from trainers.trainer import Trainer
from utils import cli, sharding
from utils.errors import ConfigError
from utils.memory import cache_bytes, human, params_bytes

# A job's closed form is right to 6 %.
_MARGIN = 1.1


def sft_bytes(trainer: Trainer, rows: int, seq_len: int) -> dict[str, int]:
    """Bytes of supervised training by parts, at its peak: of this machine's memory, or of each accelerator's.

    Args:
        trainer: the trainer.
        rows: of a batch.
        seq_len: tokens of the longest row.
    """
    if jax.default_backend() == "cpu":
        return _on_cpu(trainer, trainer.config, rows, seq_len)
    kind = "sft" if trainer.lora is None else "lora"
    micro = trainer.config.micro_batch_size
    return _on_each_device(
        trainer, kind=kind, batch=rows, seq=seq_len, prompt_len=1, micro_batch_size=micro
    )


def grpo_bytes(
    trainer: Trainer, rollout: RolloutConfig, prompt_len: int, rows_at_once: int | None
) -> dict[str, int]:
    """The same for GRPO: of a step, or of a rollout next to all that a step starts from.

    Args:
        trainer: the trainer.
        rollout: what is sampled.
        prompt_len: tokens of the longest prompt.
        rows_at_once: of a micro-batch, as asked for: a mesh may make them more.
    """
    config, model = trainer.config, trainer.model.config
    rows = rollout.prompts_per_step * rollout.group_size
    seq_len = prompt_len + config.max_completion_len
    # In completions.
    micro = rows_at_once and rows_at_once * (rollout.branches or rollout.group_size)
    on_cpu = jax.default_backend() == "cpu"
    copy = params_bytes(model.n_params, jnp.dtype(trainer.model.dtype))
    held = copy if on_cpu else copy // sharding.axis_size(sharding.DECODING.heads)
    reference = {"reference": held} if config.beta > 0 and trainer.lora is None else {}
    if not on_cpu:
        return reference | _on_each_device(
            trainer,
            kind="grpo",
            batch=rows,
            seq=seq_len,
            prompt_len=prompt_len,
            group_size=rollout.group_size,
            micro_batch_size=micro,
        )
    in_completions = dataclasses.replace(config, micro_batch_size=micro)
    step = _on_cpu(trainer, in_completions, rows, seq_len) | reference
    stays = ("parameters", "frozen parameters", "optimizer", "reference")
    sampling = {name: n for name, n in step.items() if name in stays}
    sampling["policy for sampling"] = copy
    shape = cache_shape(model, rows, seq_len)
    sampling["KV cache"] = cache_bytes(shape, model.n_layers, jnp.float32)
    return max(step, sampling, key=peak_bytes)


def check_memory(parts: dict[str, int]) -> None:
    """Says what the largest step will hold, and that it fits. Raises ConfigError if it does not."""
    on_cpu, mesh = jax.default_backend() == "cpu", sharding.current_mesh()
    where = "" if on_cpu or mesh is None else f" on each of {mesh.size} devices"
    listed = ", ".join(f"{name} {human(n)}" for name, n in parts.items())
    cli.say(f"memory of a step{where}: {human(peak_bytes(parts))} ({listed})", "")
    if on_cpu:
        return check_training_fits(parts)
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is not None and peak_bytes(parts) > _MARGIN * limit:
        raise ConfigError(
            f"out of memory: a step needs about {human(peak_bytes(parts))} of a device ({listed}), "
            f"which has {human(limit)}; use a smaller micro_batch_size or seq_len, remat=block, LoRA "
            "or more devices: plan.py --search finds what fits"
        )


def _on_cpu(trainer: Trainer, config: Any, rows: int, seq_len: int) -> dict[str, int]:
    return training_bytes(
        trainer.model.config,
        config,
        rows=rows,
        seq_len=seq_len,
        dtype=trainer.model.dtype,
        remat=trainer.model.remat,
        lora=trainer.lora,
        frozen_dtype=trainer.model.dtype,
    )


def _on_each_device(trainer: Trainer, **shape: Any) -> dict[str, int]:
    """The parts of the job's fullest program, by its closed form."""
    config = trainer.config
    job = planning.Job(
        model=trainer.model.config,
        lora_rank=0 if trainer.lora is None else trainer.lora.rank,
        remat=trainer.model.remat,
        dtype=jnp.dtype(trainer.model.dtype).name,
        param_dtype=config.param_dtype,
        state_dtype=config.state_dtype,
        optimizer=config.optimizer,
        **shape,
    )
    mesh = sharding.current_mesh()
    sizes = dict.fromkeys(sharding.MESH_AXES, 1) if mesh is None else dict(mesh.shape)
    return max(estimate_job(job, sizes), key=lambda program: program.peak_bytes).parts
