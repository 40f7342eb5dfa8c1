"""Starts train.py and evaluate.py as a user's shell would, and looks at what they leave behind."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orbax.checkpoint as ocp

from tests import cli
from tests.small_runs import curve
from trainers.runs.checkpoint import CheckpointReader


class Done(NamedTuple):
    """A program that ended."""

    code: int
    stdout: str
    stderr: str


class Programs:
    """Starts train.py and evaluate.py, one after the other; see train_script.py."""

    def __init__(self, folder: Path):
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.train_script"],
            cwd=cli.ROOT,
            env=cli.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._folder, self._number = folder, 0

    def start(self, program: str, *args: object, patch: str = "", **options: object):
        """(process id, a function that waits for the end and returns Done)."""
        self._number += 1
        out, err = (self._folder / f"{self._number}.{kind}" for kind in ("out", "err"))
        out = options.pop("stdout", out)
        argv = [program, *map(str, args), *flags(options)]
        order = dict(argv=argv, stdout=str(out), stderr=str(err), patch=patch)
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        pid = int(self._server.stdout.readline())

        def wait() -> Done:
            code = int(self._server.stdout.readline())
            text = out.read_text() if isinstance(out, Path) else ""
            return Done(code, text, err.read_text())

        return pid, wait

    def run(self, *args: object, **options: object) -> Done:
        """A program to its end."""
        return self.start(*args, **options)[1]()

    def close(self) -> None:
        """Ends the server, which waits for nothing."""
        self._server.stdin.close()
        self._server.wait(30)


def flags(options: dict[str, object]) -> list[str]:
    """As on a command line; True is a flag alone, False one with `no` before it, None none."""
    out = []
    for name, value in options.items():
        if isinstance(value, bool):
            out.append(f"--{name}" if value else f"--no{name}")
        elif value is not None:
            out.append(f"--{name}={value}")
    return out


# Signals, as patches name them.
TERM, INT = "signal.SIGTERM", "signal.SIGINT"
CODES = {TERM: 75, INT: 130}


def arrays(folder: Path, step: int) -> tuple[dict[str, tuple], object]:
    """A checkpoint's (dtype, shape, bits) by the array's name, read by Orbax alone; and its meta."""
    reader = CheckpointReader(folder / "checkpoints")
    state = reader.folder / f"step-{step:08d}" / "state"
    tree = ocp.Checkpointer(ocp.StandardCheckpointHandler()).restore(state)
    found = {name: (str(x.dtype), x.shape, np.asarray(x).tobytes()) for name, x in tree.items()}
    return found, reader.read_meta(step)


def assert_same_run(folder: Path, whole: Path, step: int) -> None:
    """Both runs ended at `step`, with the same bits and the same curve."""
    got, expected = arrays(folder, step), arrays(whole, step)
    assert got[1] == expected[1]
    assert got[0].keys() == expected[0].keys()
    assert [name for name in got[0] if got[0][name] != expected[0][name]] == []
    assert curve(folder) == curve(whole)


def check_error(done: Done, code: int, *patterns: str) -> None:
    """The program ended with that code and one line, which has the patterns."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.code == code, done.stderr
    assert len(lines) == 1 and lines[0] == done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr
    for pattern in patterns:
        assert re.search(pattern, lines[0]), (pattern, lines[0])


def wait_for_lines(folder: Path, count: int, pid: int) -> None:
    """Returns once metrics.jsonl has that many lines, or the process has ended."""
    path = folder / "metrics.jsonl"
    while Path(f"/proc/{pid}").exists():
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.001)
