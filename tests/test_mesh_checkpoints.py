"""Checkpoints that one mesh wrote and another reads, files of two steps in one, and how a process starts."""

import os
import shutil
import socket
import subprocess
import sys

import pytest

from tests import cli, small_runs
from trainers.runs.checkpoint import Checkpointer, CheckpointReader
from utils.distributed import Launch, read_launch, start
from utils.errors import CheckpointError, ConfigError


@pytest.mark.slow
@pytest.mark.covers("D23", "E8")
def test_every_bit_comes_back_on_another_mesh_and_a_copy_that_differs_is_found(tmp_path):
    ways = [
        (1, "one", "data=1"),
        (8, "2x4", "data=2,fsdp=4", "one"),
        (8, "4x2", "data=4,fsdp=2", "2x4"),
        (2, "two", "tensor=2", "4x2"),
    ]
    for devices, *arguments in ways:
        flags = f"--xla_force_host_platform_device_count={devices}"
        env = os.environ | {"XLA_FLAGS": flags + " --xla_backend_optimization_level=0"}
        args = [sys.executable, "-m", "tests.mesh_checkpoints", str(tmp_path), *arguments]
        done = subprocess.run(args, cwd=cli.ROOT, env=env, capture_output=True, text=True)
        assert done.stdout == "fine\n", done.stderr


@pytest.mark.covers("E7")
def test_parts_of_two_steps_are_no_checkpoint(tmp_path):
    trainer = small_runs.trainer()
    state, _ = small_runs.start(trainer)
    with Checkpointer(tmp_path) as writer:
        writer.save(1, state, {})
        writer.save(2, state.replace(step=state.step + 2), {})
    parts = [tmp_path / f"step-0000000{step}" / "state" for step in (1, 2)]
    shutil.rmtree(parts[1])
    shutil.copytree(*parts)
    for step, pattern in ((2, "cannot use step 2"), (None, "")):
        reader = CheckpointReader(tmp_path)
        if step is None:
            with pytest.warns(UserWarning, match="step-00000002 is broken"):
                assert reader.restore(state).step == 1
            continue
        with pytest.raises(CheckpointError, match=pattern):
            reader.restore(state, step=step)


def test_how_a_process_is_started():
    assert read_launch(None, {}) is None
    assert read_launch(None, {"SLURM_STEP_NUM_TASKS": "1"}) is None
    assert read_launch(None, {"SLURM_STEP_NUM_TASKS": "4"}) == Launch()
    assert read_launch(None, {"TPU_WORKER_HOSTNAMES": "a,b"}) == Launch()
    assert read_launch("auto,timeout=9", {}) == Launch(timeout=9)
    known = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    expected = Launch(coordinator="a:1", processes=2, process=1)
    assert read_launch(None, known) == expected
    assert read_launch("coordinator=a:1,processes=2,process=1", {}) == expected


@pytest.mark.covers("E3")
@pytest.mark.parametrize(
    "flag, message",
    [
        ("coordinator=a:1,processes=2,process=2", "process=2, expected one of 0..1"),
        (
            "coordinator=a,processes=0,process=0",
            "coordinator='a', expected host:port.*; processes=0",
        ),
        ("coordinator=a:99999", "expected host:port"),
        ("processes=two", "processes='two', expected a number"),
        ("hosts=2", "hosts='2', expected one of"),
        ("coordinator=a:1,timeout=0", "timeout=0, expected an integer of at least 1"),
    ],
)
def test_a_wrong_start_is_refused(flag, message):
    with pytest.raises(ConfigError, match=f"--distributed: .*{message}"):
        read_launch(flag, {})


@pytest.mark.covers("E3")
def test_a_port_that_is_taken_is_refused():
    with socket.create_server(("", 0)) as taken:
        address = f"localhost:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match="port .* of the coordinator is taken"):
            start(Launch(coordinator=address, processes=2, process=0), print)
