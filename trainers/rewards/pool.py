"""Rewards in processes: each function runs in its own, so that none can take the run down with it.

A crash, an exception or a hang costs the prompt that it happens on, and is reported by name. A wrong
type, a wrong length or an infinity is a bug in the function and stops the run.
"""

import dataclasses
import math
import time
from collections.abc import Generator, Sequence
from contextlib import suppress
from multiprocessing import connection
from typing import Any

import numpy as np

from trainers.rewards.failures import Failure, FailureLog
from trainers.rewards.functions import Reward
from trainers.rewards.process import RewardProcess
from trainers.rollout import Prompt
from utils import distributed
from utils.errors import DataError, TrainError, is_number, raise_all

# After this many time-outs in a row, a function is not asked about the rest of the batch.
MAX_TIMEOUTS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of R rows by F functions.

    Attributes:
        values: [F, R] float64; NaN where the function gave None or NaN, or failed.
        failed: [F, R] bool; True for the whole group on which a function raised, crashed or timed out.
    """

    values: np.ndarray
    failed: np.ndarray

    def total(self, weights: Sequence[float]) -> np.ndarray:
        """The weighted sum of each row, [R] float64; NaN for a row that is unscorable.

        A function that gave None for a row does not apply there and is left out. A row that no
        function scored is unscorable, and so is a whole group that a function failed on: its rewards
        could not be compared with one another. Functions of weight 0 do not count.

        Raises:
            TrainError: a sum is infinite.
        """
        weights = np.asarray(weights, np.float64)
        values, failed = self.values[weights != 0], self.failed[weights != 0]
        with np.errstate(over="ignore", invalid="ignore"):
            total = weights[weights != 0] @ np.where(np.isnan(values), 0.0, values)
        unscorable = np.isnan(values).all(0) | failed.any(0)
        overflow = np.flatnonzero(~np.isfinite(total) & ~unscorable)
        if overflow.size:
            row = overflow[0]
            raise TrainError(f"the rewards of row {row} add up to {total[row]}; scale them down")
        return np.where(unscorable, np.nan, total)


def reward_rows(prompts: Sequence[Prompt], group_size: int) -> tuple[list[str], dict[str, list]]:
    """(texts, columns) for a RewardPool: one row per completion, a prompt's completions together."""
    rows = [prompt for prompt in prompts for _ in range(group_size)]
    columns = {name: [row.columns[name] for row in rows] for name in prompts[0].columns}
    return [row.text for row in rows], columns


class RewardPool:
    """Runs rewards side by side, each in a worker process of its own. A context manager.

    Workers start at the first call and stay. A worker whose function crashes or times out is killed
    with everything that it has forked, and a new one is asked prompt by prompt, so that only the
    prompts that the function fails on are lost. A function prints to standard error. A worker ends
    with the process that started it, and Ctrl-C does not reach it.

    Attributes:
        names: of the rewards, in the order of their scores.
        failures: one line per failure in the last call: "reward 'f' on prompt 3 ('What is …'): timed out …".
        failed: tells, counts and reports them by kind.
    """

    def __init__(
        self, rewards: Sequence[Reward], *, timeout: float = 60.0, on_failure: str = "unscorable"
    ):
        """
        Args:
            rewards: their names differ; none: all rows are unscorable.
            timeout: seconds per call, for a batch or for one prompt. After 3 prompts in a row that
                time out, the rest of the batch counts as failed and is not asked about.
            on_failure: "unscorable": the groups of rows that a function fails on are marked in
                `Scores.failed`. "stop": the first one raises TrainError.

        Raises:
            ConfigError: lists everything that is wrong.
        """
        names = [reward.name for reward in rewards]
        problems = [f"{n!r} is given twice" for n in sorted(set(names)) if names.count(n) > 1]
        if not is_number(timeout) or not 0 < timeout < math.inf:
            problems.append(f"timeout is {timeout!r}, expected a positive number of seconds")
        if on_failure not in ("unscorable", "stop"):
            problems.append(f"on_failure is {on_failure!r}, expected 'unscorable' or 'stop'")
        raise_all("rewards", problems)
        self.names = tuple(names)
        self.failed = FailureLog()
        self._failures: list[Failure] = []  # of the last call
        self._weights = [reward.weight for reward in rewards]
        self._stop = on_failure == "stop"
        self._processes = [
            RewardProcess(reward.name, reward.function, timeout) for reward in rewards
        ]

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *_) -> None:
        self.close()
        self.failed.close()

    @property
    def failures(self) -> list[str]:
        return [failure.line for failure in self._failures]

    def close(self) -> None:
        """Ends all workers; the next call would start new ones."""
        for process in self._processes:
            process.kill()

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: list[str],
        completion_ids: list[list[int]],
        group_size: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores groups of completions, see `__call__`: ([R, F] values, [R] weighted sums)."""
        texts, columns = reward_rows(prompts, group_size)
        scores = self(texts, completions, completion_ids, columns, group_size)
        return scores.values.T, scores.total(self._weights)

    def report(self) -> dict[str, Any]:
        """The `failures` since the last report, see FailureLog."""
        return self.failed.report()

    def __call__(
        self,
        prompts: list[str],
        completions: list[str],
        completion_ids: list[list[int]],
        columns: dict[str, list],
        group_size: int,
    ) -> Scores:
        """Scores a batch. Where there are several processes, the first one does and tells the others.

        Warns of the first failure of each kind.

        Args:
            prompts: the text of each row's prompt, R of them.
            completions: the text of each row.
            completion_ids: the tokens of each row.
            columns: further fields of the prompts, R values each.
            group_size: consecutive rows that belong to one prompt.

        Raises:
            TrainError: a function returned something that is not a reward, or failed with on_failure="stop".
            ConfigError: a function cannot take these columns.
            DataError: the lists do not fit together.
        """
        rows = dict(prompts=prompts, completions=completions, completion_ids=completion_ids)

        def score() -> tuple[list, list, list]:
            scores = self._call(rows, columns, group_size)
            return scores.values.tolist(), scores.failed.tolist(), self._failures

        values, failed, failures = distributed.from_first(score)
        self._failures = [Failure(*failure) for failure in failures]
        self.failed.count(self._failures, len(completions), stacklevel=3)
        shape = len(self.names), len(completions)
        values, failed = np.reshape(values, shape), np.reshape(failed, shape)
        return Scores(values=values.astype(np.float64), failed=failed.astype(bool))

    def _call(self, batch: dict[str, list], columns: dict[str, list], group_size: int) -> Scores:
        lengths = {name: len(x) for name, x in (batch | columns).items()}
        if batch.keys() & columns.keys() or len(set(lengths.values())) > 1:
            raise DataError(f"rewards: columns must have names and lengths that fit, got {lengths}")
        if (n := len(batch["prompts"])) % group_size:
            raise DataError(f"rewards: {n} rows, expected a multiple of group_size={group_size}")
        batch |= columns
        for process in self._processes:
            process.check_takes(batch)
        self._failures = []
        shape = (len(self._processes), n)
        scores = Scores(values=np.full(shape, np.nan), failed=np.zeros(shape, bool))
        parts = zip(self._processes, scores.values, scores.failed)
        try:
            if n:
                _run([self._score(*part, batch, group_size) for part in parts])
        except BaseException:  # Ctrl-C too: an answer to this call must not be taken for the next
            self.close()
            raise
        return scores

    def _fail(self, process: RewardProcess, where: str, what: str, lost: int) -> str:
        """Notes a failure; returns its line."""
        self._failures.append(Failure(process.title, where, what, lost))
        return self._failures[-1].line

    def _score(
        self,
        process: RewardProcess,
        values: np.ndarray,
        failed: np.ndarray,
        batch: dict[str, list],
        group_size: int,
    ) -> Generator[RewardProcess, dict, None]:
        """Fills one function's rows. Yields its process after each question; is sent the answer."""
        rows = len(values)
        whole = answer = yield process.ask(batch, 0, rows)
        if _store(process, answer, values, 0):
            return
        timeouts = 0
        for start in range(0, rows, group_size):
            prompt = start // group_size
            if timeouts == MAX_TIMEOUTS:
                failed[start:] = True
                what = f"not asked, {timeouts} prompts in a row timed out"
                self._fail(process, f"from prompt {prompt} on", what, rows - start)
                return
            if rows > group_size:  # of a single prompt, the answer is there
                answer = yield process.ask(batch, start, start + group_size)
            if _store(process, answer, values[start : start + group_size], start):
                timeouts = 0
                continue
            timeouts = timeouts + 1 if answer["timeout"] else 0
            failed[start : start + group_size] = True
            text = " ".join(batch["prompts"][start][:60].split())
            where = f"on prompt {prompt} ({text!r})"
            line = self._fail(process, where, answer["failed"], group_size)
            if self._stop:
                raise TrainError(line)
        if not failed.any():
            self._fail(process, "on the batch, and on no prompt alone", whole["failed"], 0)


def _store(process: RewardProcess, answer: dict, values: np.ndarray, start: int) -> bool:
    """Stores an answer's values; returns whether it has any. Raises TrainError for a bug."""
    if "invalid" in answer:
        row = "" if answer["row"] is None else f", row {start + answer['row']}"
        raise TrainError(f"{process.title}{row}: {answer['invalid']}")
    if "values" in answer:
        values[:] = answer["values"]  # None becomes NaN
    return "values" in answer


def _run(tasks: list[Generator[RewardProcess, dict, None]]) -> None:
    """Runs `RewardPool._score` of several workers side by side, in this thread."""
    answers = [(task, None) for task in tasks]
    waiting: dict[Generator, RewardProcess] = {}
    while True:
        for task, answer in answers:
            waiting.pop(task, None)
            with suppress(StopIteration):
                waiting[task] = task.send(answer)
        if not waiting:
            return
        left = min(process.deadline for process in waiting.values()) - time.monotonic()
        ready = connection.wait(
            [process.connection for process in waiting.values()], max(left, 0.0)
        )
        now = time.monotonic()
        answers = [
            (task, process.answer())
            for task, process in waiting.items()
            if process.connection in ready or now >= process.deadline
        ]
