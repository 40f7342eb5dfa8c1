"""Environments that work, misbehave or return nonsense, for processes of their own."""

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import numpy as np

from tests.reward_faults import FAULTS, HARMLESS
from utils.errors import ConfigError

USER = {"role": "user", "content": "go on"}


def spin():
    """Hangs without sleeping."""
    while True:
        pass


def refuse():
    """Raises an error that is meant for people."""
    raise ConfigError("x is 0, expected 1")


def leave_and_hang():
    """Hangs in its parent's process group."""
    os.setpgid(0, os.getsid(0))
    time.sleep(1000)


ACTIONS = {name: action for name, (action, _) in FAULTS.items()}
ACTIONS |= {"spin": spin, "leave": leave_and_hang, "for people": refuse}
ACTIONS |= {action.__name__: action for action in HARMLESS}
# What `step` may not return, and how that is put.
NONSENSE = {
    "nothing": (None, r"step returned None \(NoneType\), expected \(messages, reward, done\)"),
    "a pair": (([USER], 1.0), r"step returned \(\[.*, expected \(messages, reward, done\)"),
    "a text": (("ok", 1.0, False), "step returned wrong messages: .* got 'ok'"),
    "a message": ((USER, 1.0, False), "step returned wrong messages: .* got {'role': 'user'"),
    "no messages": (([], 1.0, False), r"step returned wrong messages: .*non-empty list, got \[\]"),
    "an assistant": (([{"role": "assistant", "content": ""}], 0, True), ".*of role 'assistant'"),
    "a system": (([{"role": "system", "content": ""}], 0, True), ".*of role 'system'"),
    "a role": (([USER, {"role": "x", "content": ""}], 0, True), ".*message 1: role 'x'"),
    "no text": (([{"role": "user", "content": 3}], 0, True), ".*message 0: content is 3"),
    "half a letter": (([{"role": "user", "content": "\ud800"}], 0, True), ".*message 0"),
    "a set": (({1}, 0, True), "step returned what JSON cannot hold: Object of type set is not"),
    "True": (
        ([], True, True),
        r"step returned the reward True \(bool\), which is not a real number",
    ),
    "a word": (([], "1", True), r"step returned the reward '1' \(str\), which is not a real"),
    "infinity": (
        ([], -np.inf, True),
        r"step returned the reward -inf \(float\), which is infinite",
    ),
    "no bool": (([], 1.0, 1), r"step returned done=1 \(int\), expected True or False"),
}


class Faulty:
    """Answers "3" with three messages, and does or returns what else the assistant's text names."""

    def __init__(self, prefix="question "):
        self.prefix = prefix
        self.turns = 0
        self.tools = (self.double,)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # then nobody can wait for children

    def double(self, x: int) -> int:
        """Doubles a number.

        Args:
            x: the number.
        """
        print("printed")
        self.turns += 10
        return x * 2

    def examples(self, size, seed):
        return [{"text": f"{seed} {i}"} for i in range(size)]

    def reset(self, example):
        if example["text"] in ACTIONS:
            ACTIONS[example["text"]]()
        if example["text"] == "nothing":
            return []
        return [USER | {"content": f"{self.prefix}{example['text']}"}]

    def step(self, message):
        self.turns += 1
        text = message["content"]
        if text in NONSENSE:
            return NONSENSE[text][0]
        if text in ACTIONS:
            ACTIONS[text]()
        if text == "numpy":
            return (), np.float32(0.5), np.bool_(True)
        if text == "nan":
            return None, float("nan"), True
        if text == "random":
            return [USER | {"content": f"{random.random()} {np.random.random()}"}], None, False
        if text == "inherited":
            found = []
            for fd in range(3, 100):
                with contextlib.suppress(OSError):
                    found += [fd] * os.get_inheritable(fd)
            return [USER | {"content": f"{found}"}], None, False
        if text == "ids":
            ids = f"{os.getpid()} {os.getppid()} {os.getpgid(0)} {os.getsid(0)}"
            return [USER | {"content": ids}], None, False
        return [USER | {"content": f"turn {self.turns}"}] * int(text), 1, False


class Unmade(Faulty):
    """Cannot be made."""

    def __init__(self, fault):
        ACTIONS[fault]()


def note_pids(folder, hang):
    """Writes the numbers of its process, its parent and a child that stays, then hangs."""
    child = os.fork()
    if child:
        Path(folder, f"{os.getpid()}.tmp").write_text(f"{os.getpid()} {child} {os.getppid()}")
        os.rename(Path(folder, f"{os.getpid()}.tmp"), Path(folder, f"{os.getpid()}.pids"))
        hang()
    time.sleep(1000)
