"""Programs that are started as one of several processes, and what they refuse before they meet."""

import sys

import pytest

import chat
from tests import cli
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
