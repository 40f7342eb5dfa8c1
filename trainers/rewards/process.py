"""Processes that a user's code runs in, seen from outside: asked by messages, answered in JSON."""

import inspect
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import connection
from pathlib import Path
from typing import Any

import cloudpickle

from utils.errors import ConfigError


class Process:
    """A process that gives one answer to each question, or none: then it is ended.

    Attributes:
        title: names what runs in it, in messages.
        connection: becomes readable when the answer is there, or the process has ended.
        deadline: latest time of the answer (time.monotonic).
    """

    def __init__(self, title: str, timeout: float):
        """
        Args:
            title: see the class.
            timeout: seconds per answer.
        """
        self.title = title
        self.connection: connection.Connection | None = None
        self.deadline = 0.0
        self._timeout = timeout

    def send(self, *frames: bytes) -> None:
        """Asks, in one or more messages."""
        with suppress(OSError):  # it has died: `answer` will say so
            for frame in frames:
                self.connection.send_bytes(frame)
        self.deadline = time.monotonic() + self._timeout

    def answer(self) -> dict[str, Any]:
        """The answer, once it is there or the deadline has passed; or "failed", and whether by "timeout"."""
        try:
            if self.connection.poll():
                return {"timeout": False} | json.loads(self.connection.recv_bytes())
            self.kill()
            return {"failed": f"timed out after {self._timeout:g} s", "timeout": True}
        except (EOFError, OSError):
            # A process that has closed its connection may be about to exit: its code says why.
            code = self.kill(patience=1.0)
            how = signal.strsignal(-code) if code < 0 else f"exit code {code}"
            return {"failed": f"its process ended ({how})", "timeout": False}

    def wait(self) -> dict[str, Any]:
        """Waits for the `answer`."""
        connection.wait([self.connection], max(self.deadline - time.monotonic(), 0.0))
        return self.answer()

    def kill(self, patience: float = 0.0) -> int:
        """Ends the process, if there is one, with its group. Returns its exit code.

        Args:
            patience: seconds in which it may end by itself.
        """
        raise NotImplementedError


class Worker(Process):
    """A Python process of its own, started by the first question and ended by `kill`.

    Its standard input is a socket, which carries sys.path, an object, and the questions.
    """

    def __init__(self, title: str, sent: Any, timeout: float, command: Sequence[str | Path]):
        """
        Args:
            title: see `Process`.
            sent: the object; with cloudpickle, so that it may come from a notebook.
            timeout: seconds per answer.
            command: arguments for Python.

        Raises:
            ConfigError: the object cannot be sent.
        """
        super().__init__(title, timeout)
        self._process: subprocess.Popen | None = None
        self._command = command
        try:
            self._code = cloudpickle.dumps(sent)
        except Exception as error:  # whatever the object drags along raises what it likes
            text = f"{self.title} cannot be sent to a process of its own: {error}"
            raise ConfigError(f"{text}; define it in a module") from error

    @property
    def running(self) -> bool:
        """Whether it has been started, and not been ended from here."""
        return self._process is not None

    def send(self, *frames: bytes) -> None:
        """See `Process.send`."""
        if not self.running:
            self._start()
            frames = (pickle.dumps(sys.path), self._code, *frames)
        super().send(*frames)

    def _start(self) -> None:
        self.connection, theirs = connection.Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, *self._command],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for us; and one signal ends all that it forks
            )

    def kill(self, patience: float = 0.0) -> int:
        """See `Process.kill`."""
        if self._process is None:
            return 0
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        # The group outlives its leader as long as a forked child does. macOS refuses where all have ended.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        code = self._process.wait()
        self.connection.close()
        self._process = None
        return code


class RewardProcess(Worker):
    """The process of one reward; inside it runs `trainers.rewards.worker`."""

    def __init__(self, name: str, function: Callable, timeout: float):
        """
        Args:
            name: the reward's.
            function: see `Reward`.
            timeout: seconds per answer.

        Raises:
            ConfigError: the function cannot be sent.
        """
        command = [Path(__file__).with_name("worker.py")]
        super().__init__(f"reward {name!r}", function, timeout, command)
        self._function = function

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
        """Sends some rows of the batch; returns itself. It answers "values", or "invalid" and "row"."""
        part = {name: list(values)[start:stop] for name, values in batch.items()}
        self.send(pickle.dumps(part))
        return self
