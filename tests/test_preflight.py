"""What a run says that it will hold: this machine's memory, or that of each accelerator of a mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from models.llama.lora import LoRAConfig
from models.llama.model import LLaMa
from models.llama.presets import PRESETS
from trainers.grpo_trainer import GRPOConfig, GRPOTrainer
from trainers.planning import preflight
from trainers.planning.estimate import estimate_job
from trainers.planning.job import Job
from trainers.rollout import RolloutConfig
from trainers.sft_trainer import SFTConfig, SFTTrainer
from utils.errors import ConfigError
from utils.sharding import MESH_AXES

MODEL = PRESETS["llama-3.1-8b"]
SIZES = {"data": 1, "fsdp": 4, "context": 2, "tensor": 2}
LLAMA = LLaMa(MODEL, jnp.dtype("bfloat16"), "block")
BITS = dict(param_dtype="bfloat16", state_dtype="bfloat16")


@pytest.fixture(params=["one", "mesh"])
def sizes(request, monkeypatch):
    """The sizes of the context mesh, of accelerators."""
    monkeypatch.setattr(preflight.jax, "default_backend", lambda: "tpu")
    if request.param == "one":
        yield dict.fromkeys(MESH_AXES, 1)
        return
    mesh = AbstractMesh(tuple(SIZES.values()), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    with jax.sharding.use_abstract_mesh(mesh):
        yield SIZES


def worst(sizes, **job):
    known = dict(model=MODEL, prompt_len=1, remat="block", **BITS)
    programs = estimate_job(Job(**known | job), sizes)
    return max(programs, key=lambda program: program.peak_bytes).parts


def test_supervised_training_is_what_plan_py_estimates_for_each_device(sizes):
    trainer = SFTTrainer(LLAMA, SFTConfig(micro_batch_size=4, **BITS))
    wanted = worst(sizes, kind="sft", batch=32, seq=4096, micro_batch_size=4)
    assert preflight.sft_bytes(trainer, 32, 4096) == wanted
    assert wanted["parameters"] == pytest.approx(
        2 * MODEL.n_params / (16 if sizes is SIZES else 1), rel=1e-3
    )
    lora = SFTTrainer(LLAMA, SFTConfig(micro_batch_size=None, **BITS), LoRAConfig(rank=8))
    wanted = worst(sizes, kind="lora", lora_rank=8, batch=32, seq=4096)
    assert preflight.sft_bytes(lora, 32, 4096) == wanted


@pytest.mark.parametrize("branches, rows, micro", [(None, 2, 16), (4, 1, 4), (None, None, None)])
def test_so_is_grpo_and_its_reference_is_shared_too(sizes, branches, rows, micro):
    config = GRPOConfig(beta=0.1, max_completion_len=768, **BITS)
    rollout = RolloutConfig(prompts_per_step=16, group_size=8, branches=branches)
    shape = dict(batch=128, seq=1024, prompt_len=256, micro_batch_size=micro)
    found = preflight.grpo_bytes(GRPOTrainer(LLAMA, config), rollout, 256, rows)
    reference = found.pop("reference")
    assert found == worst(sizes, kind="grpo", **shape)
    assert reference == 2 * MODEL.n_params // (16 if sizes is SIZES else 1)
    plain = GRPOTrainer(LLAMA, dataclasses.replace(config, beta=0.0))
    assert preflight.grpo_bytes(plain, rollout, 256, rows) == found


def test_what_a_device_cannot_hold_is_refused_with_the_way_out(sizes, monkeypatch):
    device = type("Device", (), {"memory_stats": lambda self: {"bytes_limit": 10 * 10**9}})()
    monkeypatch.setattr(preflight.jax, "local_devices", lambda: [device])
    said = []
    monkeypatch.setattr(preflight.cli, "say", lambda text, _: said.append(text))
    preflight.check_memory({"parameters": 8 * 10**9, "activations": 2 * 10**9})
    where = " on each of 16 devices" if sizes is SIZES else ""
    assert said == [f"memory of a step{where}: 10.0 GB (parameters 8.0 GB, activations 2.0 GB)"]
    with pytest.raises(
        ConfigError, match=r"needs about 12.0 GB of a device .*has 10.0 GB.*plan.py"
    ):
        preflight.check_memory({"parameters": 12 * 10**9})
