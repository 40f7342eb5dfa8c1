"""What a run says that it will hold: this machine's memory, or that of each accelerator of a mesh."""

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from transformers import LlamaConfig

from models.llama.lora import LoRAConfig
from models.llama.model import LLaMa, init_params
from models.llama.quantize import quantize_params
from models.llama.presets import PRESETS
from tests import cli, tiny
from trainers.grpo_trainer import GRPOConfig, GRPOTrainer
from trainers.planning import estimate
from trainers.planning.estimate import check_memory, estimate_job, grpo_bytes, sft_bytes
from trainers.planning.job import Job
from trainers.rollout import RolloutConfig
from trainers.sft_trainer import SFTConfig, SFTTrainer
from utils.errors import ArtifactError, ConfigError
from utils.sharding import MESH_AXES

MODEL = PRESETS["llama-3.1-8b"]
SIZES = {"data": 1, "fsdp": 4, "context": 2, "tensor": 2}
LLAMA = LLaMa(MODEL, jnp.dtype("bfloat16"), "block")
BITS = dict(param_dtype="bfloat16", state_dtype="bfloat16")


@pytest.fixture(params=["one", "mesh"])
def sizes(request, monkeypatch):
    """The sizes of the context mesh, of accelerators."""
    monkeypatch.setattr(estimate.jax, "default_backend", lambda: "tpu")
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
    assert sft_bytes(trainer, 32, 4096) == wanted
    assert wanted["parameters"] == pytest.approx(
        2 * MODEL.n_params / (16 if sizes is SIZES else 1), rel=1e-3
    )
    assert sft_bytes(trainer, 1, MODEL.max_seq_len + 16)  # which is a warning, and no error
    lora = SFTTrainer(LLAMA, SFTConfig(micro_batch_size=None, **BITS), LoRAConfig(rank=8))
    wanted = worst(sizes, kind="lora", lora_rank=8, batch=32, seq=4096)
    assert sft_bytes(lora, 32, 4096) == wanted


@pytest.mark.parametrize("branches, rows, micro", [(None, 2, 16), (4, 1, 4), (None, None, None)])
def test_so_is_grpo_and_its_reference_is_shared_too(sizes, branches, rows, micro):
    config = GRPOConfig(beta=0.1, max_completion_len=768, **BITS)
    rollout = RolloutConfig(prompts_per_step=16, group_size=8, branches=branches)
    shape = dict(batch=128, seq=1024, prompt_len=256, micro_batch_size=micro)
    found = grpo_bytes(GRPOTrainer(LLAMA, config), rollout, 256, rows)
    reference = found.pop("reference")
    assert found == worst(sizes, kind="grpo", **shape)
    assert reference == 2 * MODEL.n_params // (16 if sizes is SIZES else 1)
    plain = GRPOTrainer(LLAMA, dataclasses.replace(config, beta=0.0))
    assert grpo_bytes(plain, rollout, 256, rows) == found


def test_what_a_device_cannot_hold_is_refused_with_the_way_out(sizes, monkeypatch):
    device = type("Device", (), {"memory_stats": lambda self: {"bytes_limit": 10 * 10**9}})()
    monkeypatch.setattr(estimate.jax, "local_devices", lambda: [device])
    said = []
    check_memory({"parameters": 8 * 10**9, "activations": 2 * 10**9}, said.append)
    where = " on each of 16 devices" if sizes is SIZES else ""
    assert said == [f"memory of a step{where}: 10.0 GB (parameters 8.0 GB, activations 2.0 GB)"]
    refusal = f"a step{where} needs about 12.0 GB .*has 10.0 GB per device.*plan.py"
    with pytest.raises(ArtifactError, match=refusal):
        check_memory({"parameters": 12 * 10**9}, said.append)
    monkeypatch.setattr(estimate, "available_bytes", lambda: 10**9)
    with pytest.raises(ArtifactError, match="a save copies 2.0 GB to the host, and 1.0 GB are"):
        check_memory({"parameters": 8 * 10**9}, said.append, saved=2 * 10**9)


@pytest.mark.covers("N2")
def test_a_step_that_this_machine_cannot_hold_is_refused_with_every_part(monkeypatch):
    model = LLaMa(PRESETS["smollm2-135m"], jnp.dtype("float32"))
    parts = sft_bytes(SFTTrainer(model, SFTConfig(micro_batch_size=None)), 4, 256)
    saved, said = 10**9, []
    total = sum(parts.values()) + saved + estimate._PROGRAMS
    monkeypatch.setattr(estimate, "memory_bytes", lambda: 5 * 10**8)  # held already
    for free in (total, None):
        monkeypatch.setattr(estimate, "available_bytes", lambda: free)
        check_memory(parts, said.append, saved=saved)
    assert re.match("memory of training: 6.4 GB .*a save 1.0 GB, .*this program 500 MB", said[0])
    monkeypatch.setattr(estimate, "available_bytes", lambda: total - 1)
    with pytest.raises(ArtifactError, match="out of memory: training needs about 6.4 GB") as caught:
        check_memory(parts, said.append, saved=saved)
    message = str(caught.value)
    for word in (*parts, "a save", "--micro_batch_size", "shorter", "--remat block", "--lora_rank"):
        assert word in message
    assert "\n" not in message


# Each save is still held while the next step runs.
SLOW_SAVES = """
import sys, time
from trainers.runs import checkpoint
write = checkpoint.write_arrays
checkpoint.write_arrays = lambda *of: (time.sleep(5), write(*of))
import train
from utils.console import cli
sys.argv[0] = "train.py"
cli.run_one_of(train.COMMANDS)
"""
GRPO = "--reward tests.grpo_rewards:ones --prompts_per_step 4 --group_size 4 --max_completion_len 8"


@pytest.mark.slow
@pytest.mark.covers("N2")
@pytest.mark.parametrize(
    "words", ["sft --seq_len 64 --batch_size 4", f"grpo {GRPO}", f"grpo {GRPO} --lora_rank 8"]
)
def test_a_run_of_many_saves_holds_what_was_announced(tmp_path, words):
    """Of 44M parameters, whose state is three times what the interpreter holds."""
    model = shutil.copytree(cli.checkpoint(), tmp_path / "model")
    sizes = dict(vocab_size=16384, hidden_size=1024, intermediate_size=3072, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=8, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1)
    tiny.random_model(LlamaConfig(**(tiny.BASE | sizes))).save_pretrained(model)
    row = {"prompt": "How many?", "completion": "twelve " * 4}
    (tmp_path / "data.jsonl").write_text(f"{json.dumps(row)}\n" * 8)
    files = dict(ckpt_dir=model, data=tmp_path / "data.jsonl", out_dir=tmp_path / "run")
    words += "".join(f" --{name} {path}" for name, path in files.items())
    words += " --max_steps 3 --save_every 1 --noexport"
    done = subprocess.run(
        [sys.executable, "-c", SLOW_SAVES, *words.split()],
        cwd=cli.ROOT,
        env=cli.environment(optimized=True),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    announced = float(re.search(r"memory of training: ([\d.]+) [MG]B", done.stderr)[1])
    announced *= 10**6 if announced > 100 else 10**9
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    peak = max(json.loads(line)["memory"] for line in lines)
    assert 0.75 * announced < peak < 1.05 * announced, done.stderr


def test_a_base_in_eight_bits_takes_a_quarter():
    """As counted by the arrays themselves."""
    config = dataclasses.replace(MODEL, max_seq_len=4096)
    params = jax.eval_shape(
        lambda: quantize_params(init_params(config, jax.random.key(0), "bfloat16"))
    )
    wanted = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(params))
    for kind, name in (("lora", "frozen parameters"), ("generate", "parameters")):
        job = Job(model=config, kind=kind, batch=2, seq=256, quantize="int8")
        for program in estimate_job(job, dict.fromkeys(MESH_AXES, 1)):
            assert program.parts[name] == wanted
    with pytest.raises(ConfigError, match="eight bits cannot be trained; pass --lora_rank"):
        Job(model=config, kind="sft", quantize="int8")
