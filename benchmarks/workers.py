"""Programs that are measured in processes of their own, one step at a time, as a driver asks.

So each has a peak of memory of its own, only one computes at a time, and the steps of all are close
in time: a slow moment of the machine hits them alike. A question and its answer are a line of JSON.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


class Worker:
    """A program under measurement; a context manager that ends it.

    Args:
        script: a file of benchmarks/ that calls `serve`.
        settings: what its `serve` hands to the program.
    """

    def __init__(self, script: str, **settings: Any):
        command = [sys.executable, str(ROOT / "benchmarks" / script), json.dumps(settings)]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self._process.stdin.close()
        self._process.wait()

    def ask(self, method: str, *args: Any) -> Any:
        """Calls a method of the program and waits for what it returns."""
        self._process.stdin.write(json.dumps([method, args]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self._process.args} ended, see its messages above")
        return json.loads(answer)

    def kill(self) -> None:
        """Ends the program in the middle of whatever it does."""
        self._process.kill()
        self._process.wait()

    def peak_bytes(self) -> int:
        """The most memory that the process has held (VmHWM)."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return (
            int(dict(line.split(":", 1) for line in status.splitlines())["VmHWM"].split()[0]) * 1024
        )


def serve(program: Callable[..., Any]) -> None:
    """Makes the program of the settings in argv and answers a driver's questions until it is gone."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    made = program(**json.loads(sys.argv[1]))
    for question in sys.stdin:
        method, args = json.loads(question)
        answers.write(json.dumps(getattr(made, method)(*args)) + "\n")
        answers.flush()
