"""The process that one reward function runs in: calls arrive pickled, answers go back as JSON.

`trainers.rewards.process.RewardProcess` starts this file by its path, so it imports nothing of this
package and is up in some 50 ms. Whatever the function does to its process, the pool sees an answer, a
closed socket or silence.
"""

import errno
import json
import math
import numbers
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def main() -> None:
    """Serves the socket on standard input, which carries sys.path, then the function, then calls."""
    connection = open_socket()
    frames = serve_alone(connection)
    # The function runs in the main thread, which functions with signals (SIGALRM) need.
    sys.path[:] = pickle.loads(frames.get())
    code = frames.get()
    function = None
    while True:
        call = frames.get()
        try:
            if function is None:
                function = pickle.loads(code)
            arguments = pickle.loads(call)
            answer = check(function(**arguments), len(arguments["completions"]))
        # SystemExit too: nothing that the function raises ends the worker.
        except BaseException as error:
            answer = {"failed": describe(error)}
        if connection.closed:  # this is a child that the function forked and did not end
            return
        connection.send_bytes(json.dumps(answer).encode())


def open_socket() -> Connection:
    """Takes the socket from standard input, which becomes empty; prints go to standard error."""
    connection = Connection(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout = sys.stderr
    # A parent that ignores SIGINT passes that on.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return connection


def serve_alone(connection: Connection) -> queue.SimpleQueue[bytes]:
    """Messages from a connection that this process has for itself, and that it ends with."""
    # A child that the user's code forks must not answer, take calls or hold the socket open.
    os.register_at_fork(after_in_child=connection.close)
    frames: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=receive, args=(connection, frames), daemon=True).start()
    return frames


def receive(connection: Connection, frames: queue.SimpleQueue, once: bool = False) -> None:
    """Reads at all times, so that even a hanging function ends when the run's process does.

    Native code that holds the interpreter's lock keeps running until the pool's timeout.
    """
    try:
        while True:
            frames.put(connection.recv_bytes())
            if once:
                return
    except (EOFError, OSError) as error:
        if getattr(error, "errno", None) == errno.EBADF:
            return  # the function closed the socket; the pool notices, and the exit code says more
        # The worker leads its own process group, so its forked children end with it.
        os.killpg(os.getpid(), signal.SIGKILL)


def describe(error: BaseException) -> str:
    """One line: the exception's type, its text, and the function's last own line before it."""
    try:
        text = " ".join(str(error).split())[:200]
    except Exception:  # some exceptions cannot even be printed
        text = ""
    # The frame after the worker's is the function's; deeper ones may be a library's.
    places = [(f.f_code.co_filename, line) for f, line in traceback.walk_tb(error.__traceback__)]
    own = next((file for file, _ in places if file != places[0][0]), places[0][0])
    file, line = next(place for place in reversed(places) if place[0] == own)
    place = f"{Path(file).name}:{line}"
    return f"{type(error).__name__}{text and ': '}{text} ({place})"


def check(result: Any, rows: int) -> dict[str, Any]:
    """The result of a reward function as plain numbers.

    Args:
        result: a list, a tuple or an array of rank 1 (numpy, torch, jax).
        rows: number of completions that the function was asked about.

    Returns:
        {"values": [float | None]}, None for a row that the function cannot score (None or NaN); or
        {"invalid": the bug, "row": index or None}: asking about other prompts would not help.
    """
    if getattr(result, "ndim", 0) == 1 and hasattr(result, "tolist"):
        result = result.tolist()
    if not isinstance(result, (list, tuple)):
        return {"invalid": f"returned {show(result)}, not a list of {rows} numbers", "row": None}
    if len(result) != rows:
        text = f"returned {len(result)} values for {rows} completions"
        return {"invalid": text, "row": None}
    values = [number(value) for value in result]
    for row, (given, value) in enumerate(zip(result, values)):
        if isinstance(value, str):
            text = f"returned {show(given)}, {value}; expected a finite number, or None or NaN"
            return {"invalid": text + " for a completion that it cannot score", "row": row}
    return {"values": values}


def number(value: Any) -> float | str | None:
    """The value as a float, None if it is missing or NaN, or what is wrong with it."""
    if getattr(value, "shape", None) == ():  # a scalar of numpy, torch or jax
        value = value.item()
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return "which is not a real number"
    try:
        value = float(value)
    except OverflowError:
        return "which float64 cannot hold"
    if math.isinf(value):
        return "which is infinite"
    return None if math.isnan(value) else value


def show(value: Any) -> str:
    """A value's beginning and its type, on one line."""
    text = " ".join(repr(value).split())
    return f"{text[:60]}{'…' * (len(text) > 60)} ({type(value).__name__})"


if __name__ == "__main__":
    main()
