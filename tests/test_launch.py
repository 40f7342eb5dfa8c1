"""Programs that are started as one of several processes, and what they refuse before they meet."""

import subprocess
import sys
import time

import pytest

import chat
from tests import cli
from tests.processes import free_port
from tests.programs import Done, check_error

ALONE = "single process, and this is one of several", "use python generate.py --chat"


def test_a_chat_of_several_processes_is_refused_at_once():
    environment = cli.environment() | {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1"}
    done = cli.run("chat.py", "--ckpt_dir", str(cli.checkpoint()), env=environment)
    check_error(Done(done.returncode, done.stdout, done.stderr), 2, *ALONE)


@pytest.mark.parametrize(
    "variables, flags",
    [
        ({"SLURM_STEP_NUM_TASKS": "2"}, []),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, []),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, []),
        ({}, ["--distributed=auto"]),
        ({}, ["--distributed", "auto"]),
    ],
)
def test_what_says_that_a_chat_is_not_alone(monkeypatch, capfd, variables, flags):
    monkeypatch.setattr(sys, "argv", ["chat.py", *flags])
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as left:
        chat.check_alone()
    check_error(Done(left.value.code, "", capfd.readouterr().err), 2, *ALONE)


def test_a_chat_that_is_alone_starts(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["chat.py", "--system", "distributed"])
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    chat.check_alone()


BUG = """
import os, sys, time
from utils import distributed
process, coordinator = int(sys.argv[1]), sys.argv[2]
launch = distributed.Launch(coordinator=coordinator, processes=2, process=process, timeout=60)
distributed.start(launch, lambda text: os.write(2, text.encode()))
if process == 1:
    raise KeyError("a bug")
time.sleep(60)
"""


@pytest.mark.slow
def test_a_bug_in_one_process_ends_another_that_waits_for_nothing():
    coordinator, pipe = f"127.0.0.1:{free_port()}", subprocess.PIPE
    started = [
        subprocess.Popen(
            [sys.executable, "-c", BUG, str(i), coordinator], cwd=cli.ROOT, stderr=pipe, text=True
        )
        for i in range(2)
    ]
    try:
        bug = started[1].communicate(timeout=60)[1]
        end = time.monotonic()
        other = started[0].communicate(timeout=60)[1]
    finally:
        for process in started:
            process.kill()
    assert time.monotonic() - end < 5
    assert [process.returncode for process in started] == [1, 1], other
    assert "KeyError: 'a bug'" in bug
    assert "process 1 has ended with an error" in other
