"""Starts train.py in several processes that meet on this machine, each with its own faults."""

import contextlib
import os
import signal
import socket
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

from tests.programs import Done, Programs


class Group:
    """As many starters as there are processes at most; see programs.Programs."""

    def __init__(self, folder: Path, most: int):
        self._stack = contextlib.ExitStack()
        self._starters = []
        for i in range(most):
            (folder / str(i)).mkdir()
            self._starters.append(Programs(folder / str(i)))
            self._stack.callback(self._starters[-1].close)

    def close(self) -> None:
        """Ends the starters."""
        self._stack.close()

    def start(
        self,
        count: int,
        *args: object,
        patches: dict[int, str] | None = None,
        options_of: dict[int, dict[str, object]] | None = None,
        launch: dict[int, str] | None = None,
        devices: int = 1,
        **options: object,
    ):
        """(process ids, a function that waits for all: a list of Done).

        Args:
            count: processes.
            args: of the command line.
            patches: by process, see train_script.py.
            options_of: by process, instead of others.
            launch: by process, of --distributed, instead of what is right.
            devices: of each process.
            options: of the command line.
        """
        port, started = free_port(), []
        flag = f"--xla_force_host_platform_device_count={devices}"
        setup = f"import os; os.environ['XLA_FLAGS'] += ' {flag}'\n"
        for i, starter in enumerate(self._starters[:count]):
            right = f"coordinator=127.0.0.1:{port},processes={count},process={i},timeout=60"
            mine = options | (options_of or {}).get(i, {})
            mine["distributed"] = (launch or {}).get(i, right).replace("PORT", str(port))
            patch = setup + (patches or {}).get(i, "")
            started.append(starter.start(*args, patch=patch, **mine))

        def wait() -> list[Done]:
            return [wait_for() for _, wait_for in started]

        return [pid for pid, _ in started], wait

    def run(self, *args, **options) -> list[Done]:
        """All processes to their end."""
        return self.start(*args, **options)[1]()


def before(place: str, action: str) -> str:
    """A patch that does something before a call, "module.Class, 'function', 2": see train_script.at."""
    owner = place.partition(",")[0]
    module = ".".join(part for part in owner.split(".") if part.islower())
    return (
        f"import errno, os, signal, time, {module}\nfrom utils import errors\n"
        f"def act(): {action}\nat({place}, act)\n"
    )


def said(done: Done) -> list[str]:
    """Its lines on stderr, without gloo's own."""
    return [line for line in done.stderr.splitlines() if "[Gloo]" not in line]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def gone_within(pids: list[int], seconds: float) -> bool:
    """Whether all processes end in that time; whoever does not is killed."""
    end = time.monotonic() + seconds
    there = lambda: [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    while there() and time.monotonic() < end:
        time.sleep(0.05)
    late = there()
    for pid in late:
        os.kill(pid, signal.SIGKILL)
    return not late


def arrays(folder: Path, step: int) -> dict[str, tuple]:
    """A checkpoint's (dtype, shape, bits) by the array's name, whatever mesh wrote it."""
    state = folder / "checkpoints" / f"step-{step:08d}" / "state"
    handler = ocp.PyTreeCheckpointHandler()
    names = handler.metadata(state).tree
    plain = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
    tree = ocp.Checkpointer(handler).restore(state, args=ocp.args.PyTreeRestore(restore_args=plain))
    return {name: (str(x.dtype), x.shape, np.asarray(x).tobytes()) for name, x in tree.items()}
