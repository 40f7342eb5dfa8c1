"""The processes that environments run in: a server makes the instance and forks a child per episode.

`trainers.environments.process.EnvironmentServer` starts `main` with a socket as standard input.
Whatever an environment does to its process, the run sees an answer, a closed socket or silence.
"""

import json
import os
import pickle
import queue
import random
import signal
import sys
import threading
import time
import warnings
from contextlib import suppress
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

from models.llama.chat.tools import function_schema, run_call
from trainers.rewards.worker import describe, number, open_socket, receive, serve_alone, show
from utils.errors import AltiplanoError, reason


def main() -> None:
    """Makes the environment, then serves commands until the run ends; the children end with it."""
    control = open_socket()
    os.register_at_fork(after_in_child=control.close)
    sys.path[:] = pickle.loads(control.recv_bytes())
    code = control.recv_bytes()
    # Ends a class that hangs with the run; it is over before the first fork, which wants no threads.
    frames: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    first = threading.Thread(target=receive, args=(control, frames, True), daemon=True)
    first.start()
    answer = {}
    try:
        make, args = pickle.loads(code)
        environment = make(**args)
    except BaseException as error:
        answer = {"failed": _why(error)}
    control.send_bytes(json.dumps(answer).encode())
    command = frames.get()
    first.join()
    getattr(sys.modules.get("numpy"), "random", None)  # imports it, once and not in every child
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Python 3.12 warns of threads, and numpy's products have some.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    if child := _fork_children(control, command):
        _serve(environment, *child)


def _fork_children(control: Connection, command: bytes) -> tuple[Connection, int] | None:
    """Forks and ends children as the run says. Returns in a child: its connection and its seed."""
    children: dict[int, int] = {}
    ending: set[int] = set()
    while command:
        order = json.loads(command)
        ending = {pid for pid in ending if not os.waitpid(pid, os.WNOHANG)[0]}
        if "end" in order:
            pid = children.pop(order["end"], None)
            code = _end(pid, order["patience"]) if pid else -signal.SIGKILL
            control.send_bytes(json.dumps([order["end"], code]).encode())
        elif "drop" in order:
            if pid := children.pop(order["drop"], None):
                _kill(pid)
                ending.add(pid)
        else:
            connection = Connection(reduction.recv_handle(control))
            os.set_inheritable(connection.fileno(), False)
            try:
                pid = os.fork()
            except OSError as error:  # too many processes
                answer = {"failed": f"cannot start a process: {error.strerror}"}
                connection.send_bytes(json.dumps(answer).encode())
            else:
                if not pid:
                    return connection, order["seed"]
                with suppress(OSError):  # whoever comes first, so that `_end` finds the group
                    os.setpgid(pid, pid)
                children[order["start"]] = pid
            connection.close()  # a child has its own socket, and no other child's
        try:
            command = control.recv_bytes()
        except (EOFError, OSError):
            command = b""
    for pid in children.values():
        _kill(pid)
    return None


def _end(pid: int, patience: float) -> int:
    """Ends a child with its group, after `patience` seconds at the latest. Returns its exit code."""
    deadline = time.monotonic() + patience
    while not (ended := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.01)
    _kill(pid)
    return os.waitstatus_to_exitcode((ended if ended[0] else os.waitpid(pid, 0))[1])


def _kill(pid: int) -> None:
    for kill in (os.killpg, os.kill):  # a child may have left its group, and outlive it
        with suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


def _serve(environment: Any, connection: Connection, seed: int) -> None:
    """Answers the calls of one episode."""
    os.setpgid(0, 0)
    frames = serve_alone(connection)
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed % 2**32)
    while True:
        method, arguments = json.loads(frames.get())
        try:
            answer = _encode(_call(environment, method, arguments))
        # SystemExit too: nothing that an environment raises ends its process.
        except BaseException as error:
            answer = _encode({"failed": _why(error)})
        if connection.closed:  # this is a child that the environment forked and did not end
            return
        connection.send_bytes(answer)


def _why(error: BaseException) -> str:
    """An error in one line; an error for people without its type and place."""
    return reason(error) if isinstance(error, AltiplanoError) else describe(error)


def _encode(answer: dict[str, Any]) -> bytes:
    try:
        return json.dumps(answer, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        text = f"returned what JSON cannot hold: {reason(error)}"
        return json.dumps({"invalid": text}).encode()


def _call(environment: Any, method: str, arguments: list) -> dict[str, Any]:
    tools = getattr(environment, "tools", ())
    if method == "tools":
        schemas = [tool if isinstance(tool, dict) else function_schema(tool) for tool in tools]
        return {"schemas": schemas}
    if method == "examples":
        return {"examples": list(environment.examples(*arguments))}
    if method == "reset":
        return check_step((environment.reset(*arguments), None, False))
    calls = arguments[0].get("tool_calls")
    if not calls or getattr(environment, "answers_calls", False):
        return check_step(environment.step(*arguments)) | {"calls": len(calls or ())}
    functions = {tool.__name__: tool for tool in tools}
    messages = [run_call(call, functions) for call in calls]
    errors = sum(message["content"].startswith("Error: ") for message in messages)
    return _answer(messages, None, False) | {"calls": len(calls), "errors": errors}


def check_step(result: Any) -> dict[str, Any]:
    """The result of `step`: "messages" as they are, "reward", "done"; or {"invalid": the bug}."""
    if not isinstance(result, (list, tuple)) or len(result) != 3:
        return {"invalid": f"returned {show(result)}, expected (messages, reward, done)"}
    messages, reward, done = result
    value = number(reward)
    if isinstance(value, str):
        text = f"returned the reward {show(reward)}, {value}"
        return {"invalid": f"{text}; expected a finite number, or None or NaN for none"}
    if getattr(done, "shape", None) == ():  # numpy's
        done = done.item()
    if not isinstance(done, bool):
        return {"invalid": f"returned done={show(done)}, expected True or False"}
    return _answer(messages, value, done)


def _answer(messages: Any, reward: float | None, done: bool) -> dict[str, Any]:
    return {"messages": messages, "reward": reward, "done": done, "calls": 0, "errors": 0}
