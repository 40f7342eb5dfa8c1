"""One device = eight fake ones: logits, training, GRPO, sampling and loading, on six meshes."""

import json
import os
import subprocess
import sys

import pytest

from tests import cli, compiling
from tests.mesh_checks import MESHES, SELECTED

CHECKS = (
    "logits",
    "logits, odd heads",
    "continuations",
    "sft",
    "sft, micro-batches",
    "sft, odd heads",
    "sft, lora",
    "sft, adafactor",
    "grpo",
    "dpo",
    "distill",
    "greedy",
    "greedy, odd heads",
    "two samples a prompt",
    "as many prompts",
    "as many prompts, odd heads",
    "eight samples a prompt",
    "eight samples a prompt, odd heads",
    "turns",
    "load, hf",
    "load, meta",
    "load for decoding",
    "load, int8",
    "logits, int8",
)
PAIRS = [(mesh, check) for check in CHECKS for mesh in SELECTED.get(check, MESHES)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    env = os.environ | compiling.environment(optimized=False)
    env["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
    args = [sys.executable, "-m", "tests.mesh_checks", tmp_path_factory.mktemp("mesh"), *MESHES]
    done = subprocess.run(args, cwd=cli.ROOT, env=env, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    found = map(json.loads, done.stdout.splitlines())
    return {(row["mesh"], row["check"]): row["problem"] for row in found}


@pytest.mark.slow
@pytest.mark.parametrize("mesh, check", PAIRS)
def test_eight_devices_compute_what_one_does(results, mesh, check):
    assert results[mesh, check] is None, results[mesh, check]


@pytest.mark.slow
def test_no_check_is_forgotten(results):
    assert set(results) == set(PAIRS)
