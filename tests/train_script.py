"""A child process for each line on stdin, which runs a program as a user's shell would.

Line: JSON with `argv`, the paths `stdout` and `stderr`, and `patch`, code that the child runs first:
how a fault is injected at an exact place. Answers: the child's process id, then its exit code (minus
the signal that ended it). Children are forked, as importing JAX takes longer than what is tested.
"""

import functools
import importlib
import json
import os
import signal
import sys
import time
import traceback

import evaluate
import generate
import train
from tests import compiling
from trainers.runs import metrics
from utils.console import cli as console

COMMANDS = {
    "train.py": train.COMMANDS,
    "evaluate.py": evaluate.COMMANDS,
}
# Each run would measure its machine with both cores for a second: a quarter of what it takes in all.
metrics.MATMUL_SHAPES = {"cpu": ((64, 64, 64),)}
metrics.matmul_peak = functools.partial(metrics.matmul_peak, seconds=0.0)


def at(owner: object, name: str, number: int, action) -> None:
    """Does something before the call `number` of a function, for patches."""
    original, calls = getattr(owner, name), []

    def wrapped(*args, **options):
        calls.append(None)
        if len(calls) == number:
            action()
        return original(*args, **options)

    setattr(owner, name, wrapped)


def send(*signals: signal.Signals) -> None:
    """Sends signals to this process, and gives it time to see each, for patches."""
    for number in signals:
        os.kill(os.getpid(), number)
        time.sleep(0.5)


def run(argv: list[str], stdout: str, stderr: str, patch: str) -> int:
    """Returns the exit code."""
    for path, stream in ((stdout, 1), (stderr, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.argv = argv
    try:
        exec(patch, {"at": at, "send": send})
        if argv[0] == "generate.py":
            console.run(generate.main)
        else:
            console.run_one_of(COMMANDS[argv[0]])
    except SystemExit as e:
        return e.code or 0
    except BaseException:  # whatever it is, the interpreter would show it
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    compiling.collect_seldom()
    for line in sys.stdin:
        if "reasoning_gym" in line:  # its import takes longer than JAX's: once for all
            importlib.import_module("reasoning_gym")
        child = os.fork()
        if child == 0:
            os._exit(run(**json.loads(line)))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
