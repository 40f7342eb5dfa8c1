"""Rewards that misbehave on a completion "bad" and else give each text's length, for worker processes."""

import ctypes
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path


def lengths(completions, **_):
    """A reward that works."""
    return [float(len(text)) for text in completions]


@dataclasses.dataclass(frozen=True)
class OnBad:
    """`lengths`, but for the completions "bad", on which it does something first."""

    action: Callable[[], None]

    def __call__(self, completions, **_):
        if "bad" in completions:
            self.action()
        return lengths(completions)


class Unprintable(Exception):
    """An exception that cannot even be shown."""

    def __str__(self):
        raise ValueError("no")


def raise_error():
    raise ValueError("two\nlines")


def raise_unprintable():
    raise Unprintable


def recurse():
    recurse()


def read_null():
    ctypes.string_at(0)


def ignore_sigterm_and_hang():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    time.sleep(1000)


def hang_in_native_code():
    ctypes.PyDLL(None).sleep(1000)  # holds the interpreter's lock: no thread of it runs


def leave_child_and_die():
    if os.fork() == 0:
        time.sleep(1000)
    os._exit(7)


# What it does, and how the pool puts it.
FAULTS = {
    "raise": (raise_error, r"ValueError: two lines \(reward_faults\.py:\d+\)"),
    "unprintable": (raise_unprintable, r"Unprintable \(reward_faults\.py:\d+\)"),
    "recursion": (recurse, r"RecursionError: maximum recursion .*\(reward_faults\.py:\d+\)"),
    "sys.exit": (sys.exit, r"SystemExit \(reward_faults\.py:\d+\)"),
    "interrupt": (lambda: signal.raise_signal(signal.SIGINT), r"KeyboardInterrupt .*"),
    "exit 0": (lambda: os._exit(0), r"its process ended \(exit code 0\)"),
    "exit 3": (lambda: os._exit(3), r"its process ended \(exit code 3\)"),
    "segfault": (read_null, r"its process ended \(Segmentation fault\)"),
    "abort": (os.abort, r"its process ended \(Aborted\)"),
    "kill": (lambda: os.kill(os.getpid(), signal.SIGKILL), r"its process ended \(Killed\)"),
    "close all": (lambda: os.closerange(0, 1000), r"its process ended \(exit code \d+\)"),
    "orphan": (leave_child_and_die, r"its process ended \(exit code 7\)"),
    "hang": (ignore_sigterm_and_hang, r"timed out after 3 s"),
    "hang in C": (hang_in_native_code, r"timed out after 3 s"),
    "stop": (lambda: os.kill(os.getpid(), signal.SIGSTOP), r"timed out after 3 s"),
}


def print_much():
    print("x" * 1_000_000)
    os.write(1, b"y" * 1_000_000)


def fork_and_return():
    os.fork()  # parent and child both return from the reward


def close_standard_files():
    os.closerange(0, 3)


def replace_standard_files():
    sys.stdin = sys.stdout = sys.stderr = None
    sys.__stdout__ = None
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)


def fork_for_good():
    if os.fork() == 0:
        time.sleep(1000)


def thread_for_good():
    threading.Thread(target=time.sleep, args=(1000,)).start()


def run_a_program():
    assert subprocess.run(["cat"], capture_output=True).stdout == b""  # its input is empty too


# Bad manners that cost nothing.
HARMLESS = [print_much, fork_and_return, close_standard_files, replace_standard_files]
HARMLESS += [fork_for_good, run_a_program, thread_for_good]


def note_pids(folder, completions, **_):
    """Writes the numbers of its process and of a child to `folder`, then hangs."""
    child = os.fork()
    if child:
        Path(folder, "pids.tmp").write_text(f"{os.getpid()} {child}")
        os.rename(Path(folder, "pids.tmp"), Path(folder, "pids"))
    time.sleep(1000)


def meet(mine, other, completions, **_):
    """Returns when both have been called."""
    Path(mine).touch()
    while not Path(other).exists():
        time.sleep(0.01)
    return lengths(completions)


def whoami(completions, **_):
    """The number of its process."""
    return [float(os.getpid())] * len(completions)
