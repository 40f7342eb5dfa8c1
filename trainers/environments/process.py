"""Environments in processes, seen from the run: what an episode is asked, and what it answers.

A crash, an exception or a hang costs the episode that it happens in. What an environment must not
return is a bug in it and stops the run.
"""

import contextlib
import difflib
import inspect
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection, reduction
from pathlib import Path
from typing import Any

from models.llama.chat.messages import Message, read_messages
from trainers.environments import Environment, Example
from trainers.rewards.functions import import_attribute
from trainers.rewards.process import Process, Worker
from utils.errors import ConfigError, DataError, TrainError, raise_all

READY = {
    "calculator": "trainers.environments.games:Calculator",
    "guess": "trainers.environments.games:Guess",
    "search": "trainers.environments.search:Search",
    "verifiers": "trainers.environments.verifiers:Verifiers",
}
_ROOT = str(Path(__file__).parents[2])
# -P: a module of the user's must not be taken for one of Python's before sys.path is the run's.
_START = f"import sys; sys.path.insert(0, {_ROOT!r}); from trainers.environments import worker"
_COMMAND = ["-P", "-c", f"{_START}; worker.main()"]
# Least seconds for what happens once in a run: to make the instance, and to list examples.
_ONCE = 60.0


@dataclass(frozen=True, kw_only=True)
class EnvironmentSpec:
    """An environment as `--env` and `--env_args` name it.

    Attributes:
        name: as the user gave it.
        make: the class; see `trainers.environments.Environment`, from which it need not inherit.
        args: keyword arguments for it.

    Raises:
        ConfigError: lists everything that is wrong.
    """

    name: str
    make: Callable[..., Any]
    args: Mapping[str, Any]

    def __post_init__(self) -> None:
        problems = []
        if not isinstance(self.make, type):
            problems.append(f"{self.make!r:.80} is not a class")
        else:
            for name in ("reset", "step"):
                method = getattr(self.make, name, None)
                if not callable(method) or method is getattr(Environment, name):
                    problems.append(f"{self.make.__name__} has no {name}")
            try:
                inspect.signature(self.make).bind(**self.args)
            except TypeError as error:
                problems.append(f"with the arguments {dict(self.args)}: {error}")
            except ValueError:  # a class without a signature
                pass
        raise_all(f"environment {self.name!r}", problems)


def load_environment(spec: str, args: Mapping[str, Any]) -> EnvironmentSpec:
    """The environment that flags name.

    Args:
        spec: a name in READY or "module:Class".
        args: keyword arguments for the class.

    Raises:
        ConfigError: no such name, module or class, importing it fails, or it is no environment.
    """
    close = difflib.get_close_matches(spec, READY, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    expected = f"module:Class, or one of {', '.join(READY)}{hint}"
    make = import_attribute(READY.get(spec, spec), f"environment {spec!r}", expected)
    return EnvironmentSpec(name=spec, make=make, args=args)


class EnvironmentServer:
    """Starts episodes of an environment, each in a process of its own. A context manager.

    The first call starts a server process, which makes the instance and is forked for each episode,
    so that an episode starts in milliseconds. An environment prints to standard error. All processes
    end with the run, and Ctrl-C does not reach them.
    """

    def __init__(self, spec: EnvironmentSpec, timeout: float):
        """
        Args:
            spec: which environment.
            timeout: seconds per `reset` and `step`.

        Raises:
            ConfigError: the class cannot be sent to another process.
        """
        self.name, self.title = spec.name, f"environment {spec.name!r}"
        self._spec = spec
        self._timeout = timeout
        self._once = max(_ONCE, 10 * timeout)
        sent = (spec.make, dict(spec.args))
        self._worker = Worker(self.title, sent, self._once, _COMMAND)
        self._keys = itertools.count()

    def __enter__(self) -> "EnvironmentServer":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def examples(self, size: int, seed: int) -> list[dict[str, Any]]:
        """The environment's own examples. Raises ConfigError: there are none, or others."""
        if getattr(self._spec.make, "examples", None) in (None, Environment.examples):
            raise ConfigError(f"{self.title} has no examples of its own; pass --data FILE")
        with contextlib.closing(self._fork(seed, self._once)) as episode:
            episode.send_call("examples", size, seed)
            try:
                answer = episode.wait()
            except TrainError as error:
                raise ConfigError(str(error)) from error
        if "failed" in answer:
            raise ConfigError(f"{self.title}: examples fails: {answer['failed']}")
        examples = answer["examples"]
        n = len(examples)
        if not all(isinstance(example, dict) for example in examples) or not 1 <= n <= size:
            text = f"{self.title}: examples returned {examples!r:.80}"
            raise ConfigError(f"{text}, {n} items; expected 1 to {size} JSON objects")
        return examples

    def openings(
        self, examples: Sequence[Example]
    ) -> tuple[list[list[Message]], list[dict[str, Any]]]:
        """The first messages of each example's episodes, and the schemas of the environment's tools.

        Raises:
            DataError: `reset` fails on an example, which is named by its index.
            ConfigError: a tool cannot be described.
        """
        openings = []
        with contextlib.closing(self._fork(0, self._timeout)) as episode:
            for index, example in enumerate(examples):
                episode.send_call("reset", example)
                try:
                    answer = episode.wait()
                except TrainError as error:
                    raise DataError(f"example {index}: {error}") from error
                if "failed" in answer:
                    text = f"example {index}: {self.title}: reset fails"
                    raise DataError(f"{text}: {answer['failed']}")
                openings.append(answer["messages"])
            episode.send_call("tools")
            answer = episode.wait()
        if "failed" in answer:
            raise ConfigError(f"{self.title}: its tools: {answer['failed']}")
        return openings, answer["schemas"]

    def start(self, example: Example, seed: int) -> "Episode":
        """Starts an episode, whose first answer is its first messages."""
        episode = self._fork(seed, self._timeout)
        episode.send_call("reset", example)
        return episode

    def close(self) -> None:
        """Ends all processes; the next call would start new ones."""
        self._close()

    def _close(self) -> int:
        if self._worker.running:
            self._worker.connection.close()  # it ends its children
        return self._worker.kill(patience=5.0)

    def _fork(self, seed: int, timeout: float) -> "Episode":
        key = next(self._keys)
        try:
            ours, theirs = connection.Pipe()
        except OSError as error:
            text = f"{self.title}: cannot open a socket for another episode: {error.strerror}"
            raise ConfigError(
                f"{text}; raise `ulimit -n`, or sample fewer rows at a time"
            ) from error
        with theirs:
            for _ in range(2):  # a server that somebody has killed is started again
                if not self._worker.running:
                    self._start()
                try:
                    self._tell(start=key, seed=seed)
                    reduction.send_handle(self._worker.connection, theirs.fileno(), 0)
                    break
                except OSError:
                    self.close()
        return Episode(self, key, ours, timeout)

    def _start(self) -> None:
        try:
            self._worker.send()
            answer = self._worker.wait()
            if "failed" in answer:
                raise ConfigError(f"{self.title} cannot be made: {answer['failed']}")
        except BaseException:  # Ctrl-C too: its answer must not be taken for another
            self.close()
            raise

    def _tell(self, **order: Any) -> None:
        self._worker.connection.send_bytes(json.dumps(order).encode())

    def drop(self, key: int) -> None:
        """Ends an episode's process with its group, and does not wait for that."""
        with contextlib.suppress(OSError):  # the server has ended, and so do its children
            self._tell(drop=key)

    def end(self, key: int, patience: float) -> int:
        """Ends an episode's process with its group. Returns its exit code."""
        try:
            self._tell(end=key, patience=patience)
            ended = None
            while ended != key:  # a reply that Ctrl-C has left behind is not for this one
                ended, code = json.loads(self._worker.connection.recv_bytes())
            return code
        except (EOFError, OSError):  # the server has ended, and so do its children
            return self._close()


class Episode(Process):
    """One episode: it is asked by `EnvironmentServer.start`, then by `ask`, and answers each time."""

    def __init__(self, server: EnvironmentServer, key: int, ours: Any, timeout: float):
        super().__init__(server.title, timeout)
        self.connection = ours
        self._server, self._key = server, key
        self._method = ""

    def ask(self, message: Message) -> None:
        """Sends an assistant's message: to the tools that it calls, or to `step`."""
        self.send_call("step", message)

    def send_call(self, method: str, *arguments: Any) -> None:
        """Calls a method of the environment."""
        self._method = method
        self.send(json.dumps([method, arguments], default=dict).encode())

    def answer(self) -> dict[str, Any]:
        """The environment's answer.

        Returns:
            "messages" that follow, "reward" (a finite float or None), "done", and the number of tool
            "calls", of which "errors" failed. Or "failed", and whether by "timeout".

        Raises:
            TrainError: it returned something else.
        """
        answer = super().answer()
        problem = answer.get("invalid")
        if "messages" in answer:
            try:
                answer["messages"] = _read(answer, self._method)
            except DataError as error:
                problem = f"returned wrong messages: {error}"
        if problem:
            raise TrainError(f"{self.title}: {self._method} {problem}")
        return answer

    def kill(self, patience: float = 0.0) -> int:
        """See `Process.kill`."""
        code = self._server.end(self._key, patience)
        self.connection.close()
        return code

    def close(self) -> None:
        """Ends it."""
        if not self.connection.closed:
            self._server.drop(self._key)
            self.connection.close()


def _read(answer: dict[str, Any], method: str) -> list[Message]:
    """An answer's messages. Raises DataError."""
    if answer["messages"] in ([], None) and answer["done"]:
        return []
    messages = read_messages(answer["messages"])
    roles = [message["role"] for message in messages]
    if method == "reset" and roles[-1] == "assistant":
        raise DataError("the last one is the assistant's; there is nothing to answer")
    if method == "step" and (wrong := {"assistant", "system"}.intersection(roles)):
        raise DataError(f"step returned a message of role {wrong.pop()!r}")
    return messages
