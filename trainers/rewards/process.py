"""The process that a reward function runs in, seen from outside: start, ask, answer, kill.

Inside is `trainers.rewards.worker`.
"""

import inspect
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import connection
from pathlib import Path
from typing import Any

import cloudpickle

from utils.errors import ConfigError


class RewardProcess:
    """A reward's process: started when it is asked something, ended by `kill`.

    Attributes:
        title: for messages.
        connection: to wait on, when it has been asked.
        deadline: until when it may take (time.monotonic).
    """

    def __init__(self, name: str, function: Callable, timeout: float):
        """
        Args:
            name: of the reward.
            function: see `trainers.rewards.Reward`; sent with cloudpickle, so that functions of a
                notebook can go too.
            timeout: seconds for an answer.

        Raises:
            ConfigError: the function cannot be sent.
        """
        self.title = f"reward {name!r}"
        self.connection: connection.Connection | None = None
        self.deadline = 0.0
        self._timeout = timeout
        self._process: subprocess.Popen | None = None
        self._function = function
        try:
            self._code = cloudpickle.dumps(function)
        except Exception as error:  # whatever the function drags along raises what it likes
            text = f"{self.title} cannot be sent to a process of its own: {error}"
            raise ConfigError(f"{text}; define it in a module") from error

    def check_takes(self, batch: dict[str, list]) -> None:
        """Raises ConfigError if the function cannot be called with these arguments."""
        try:
            inspect.signature(self._function).bind(**batch)
        except TypeError as error:
            text = f"{self.title} is called with {', '.join(batch)}: {error}"
            raise ConfigError(f"{text}; take what it does not use as **_") from error
        except ValueError:  # a builtin without a signature
            pass

    def ask(self, batch: dict[str, list], start: int, stop: int) -> "RewardProcess":
        """Sends some rows of the batch; returns itself."""
        part = {name: list(values)[start:stop] for name, values in batch.items()}
        frames = [pickle.dumps(part)]
        if self._process is None:
            self._start()
            frames = [pickle.dumps(sys.path), self._code, *frames]
        with suppress(OSError):  # it has died: `answer` will say so
            for frame in frames:
                self.connection.send_bytes(frame)
        self.deadline = time.monotonic() + self._timeout
        return self

    def answer(self) -> dict[str, Any]:
        """Of the function: "values"; "invalid" and "row"; or "failed" and whether by "timeout"."""
        try:
            if self.connection.poll():
                return {"timeout": False} | json.loads(self.connection.recv_bytes())
            self.kill()
            return {"failed": f"timed out after {self._timeout:g} s", "timeout": True}
        except (EOFError, OSError):
            self._let_end()
            code = self.kill()
            how = signal.strsignal(-code) if code < 0 else f"exit code {code}"
            return {"failed": f"its process ended ({how})", "timeout": False}

    def _start(self) -> None:
        self.connection, theirs = connection.Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, Path(__file__).with_name("worker.py")],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for us; and one signal ends all that it forks
            )

    def _let_end(self) -> None:
        """Waits up to a second for the end of a process that has closed its connection.

        What it exits with says more than that it was killed. It is not fetched: see `kill`.
        """
        if not hasattr(os, "waitid"):  # macOS before Python 3.13
            time.sleep(1.0)
            return
        how = os.WEXITED | os.WNOHANG | os.WNOWAIT
        for _ in range(100):
            if os.waitid(os.P_PID, self._process.pid, how):
                return
            time.sleep(0.01)

    def kill(self) -> int:
        """Ends the process, if there is one, with its group. Returns its exit code."""
        if self._process is None:
            return 0
        # Before wait(), while its number is still taken; macOS refuses where all have ended.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        code = self._process.wait()
        self.connection.close()
        self._process = None
        return code
