"""Rewards: plain Python functions, each in a process of its own, so that none can take a run along.

A crash, an exception or a hang costs the prompt that it happens on, by name; a wrong type, a wrong
length or an infinity is a bug in the function and stops the run.
"""

import dataclasses
import importlib
import math
import operator
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from multiprocessing import connection

import numpy as np

from trainers.rewards.functions import READY_MADE
from trainers.rewards.process import RewardProcess
from trainers.rollout import Prompt
from utils import distributed
from utils.errors import ConfigError, DataError, TrainError, is_number, raise_all

# So many prompts in a row time out, and a function is not asked about the rest of the batch.
MAX_TIMEOUTS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reward:
    """A reward function with its weight.

    Attributes:
        name: as logs name it.
        function: called by keyword with `prompts` and `completions` (lists of text), `completion_ids`
            (lists of token ids) and one list per column of the data, so it may name those that it
            wants and take the others as `**_`. Returns a list of one number per completion; None or
            NaN for one that it cannot score. It sees the whole batch at once, groups of one prompt
            together; after a failure, one prompt's completions at a time.
        weight: of this function in the total; 0: it is only logged.

    Raises:
        ConfigError: lists everything that is wrong.
    """

    name: str
    function: Callable[..., Sequence[float | None]]
    weight: float = 1.0

    def __post_init__(self) -> None:
        problems = []
        if not isinstance(self.name, str) or not self.name:
            problems.append(f"name is {self.name!r}, expected a text")
        if not callable(self.function):
            problems.append(f"{self.function!r} is {type(self.function).__name__}, not callable")
        if not is_number(self.weight) or not math.isfinite(self.weight):
            problems.append(f"weight is {self.weight!r}, expected a finite number")
        raise_all(f"reward {self.name!r}", problems)


def load_reward(spec: str) -> Reward:
    """The reward that a flag names.

    Args:
        spec: a name in READY_MADE or "module:function", with "=0.5" for a weight other than 1.

    Raises:
        ConfigError: no such name, module or function, or importing the module fails.
    """
    name, equals, weight = str(spec).partition("=")
    try:
        weight = float(weight) if equals else 1.0
    except ValueError as error:
        text = f"reward {spec!r}: the weight is {weight!r}, expected a number"
        raise ConfigError(f"{text}, for example {name}=0.5") from error
    if name in READY_MADE:
        return Reward(name=name, function=READY_MADE[name], weight=weight)
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        known = ", ".join(READY_MADE)
        raise ConfigError(f"reward {name!r}: expected module:function, or one of {known}")
    try:
        loaded = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        if isinstance(error, ModuleNotFoundError):
            text += "; is its folder on PYTHONPATH?"
        raise ConfigError(f"reward {name!r}: importing {module} fails: {text}") from error
    try:
        function = operator.attrgetter(attribute)(loaded)
    except AttributeError as error:
        raise ConfigError(f"reward {name!r}: {module} has no {attribute}") from error
    return Reward(name=f"{module}.{attribute}", function=function, weight=weight)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """What F functions say of R rows.

    Attributes:
        values: [F, R] float64; NaN where the function gave None or NaN, or failed.
        failed: [F, R] bool; whole groups, on which the function raised, crashed or timed out.
    """

    values: np.ndarray
    failed: np.ndarray

    def total(self, weights: Sequence[float]) -> np.ndarray:
        """The weighted sum of each row, [R] float64; NaN for a row that is unscorable.

        A function that gave None for a row is left out there, as one that does not apply. A row that
        no function scored is unscorable, and so is a whole group that a function failed on: with a
        part missing, its rewards would compare what is not comparable. Functions of weight 0 have no
        say.

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
    """Runs rewards, each in a worker process of its own, all at once. A context manager.

    Workers start at the first call and stay. One whose function crashes or times out is killed with
    all that it has forked, and a new one is asked prompt by prompt, so that only the prompts are lost
    that it really fails on. Prints of a function go to standard error. A worker ends with the process
    that started it, and Ctrl-C does not reach it.

    Attributes:
        names: of the rewards, in the order of their scores.
        failures: of the last call, one line each: "reward 'f' on prompt 3 ('What is …'): timed out …".
    """

    def __init__(
        self, rewards: Sequence[Reward], *, timeout: float = 60.0, on_failure: str = "unscorable"
    ):
        """
        Args:
            rewards: one at least; names differ.
            timeout: seconds for a call, be it of a batch or of one prompt. When 3 prompts in a row
                time out, the rest of the batch counts as failed without being asked about.
            on_failure: "unscorable": the groups of rows that a function fails on are marked in
                `Scores.failed`. "stop": the first one raises TrainError.

        Raises:
            ConfigError: lists everything that is wrong.
        """
        names = [reward.name for reward in rewards]
        problems = [f"{n!r} is there twice" for n in sorted(set(names)) if names.count(n) > 1]
        if not names:
            problems.append("no reward is given")
        if not is_number(timeout) or not 0 < timeout < math.inf:
            problems.append(f"timeout is {timeout!r}, expected a positive number of seconds")
        if on_failure not in ("unscorable", "stop"):
            problems.append(f"on_failure is {on_failure!r}, expected 'unscorable' or 'stop'")
        raise_all("rewards", problems)
        self.names = tuple(names)
        self.failures: list[str] = []
        self._weights = [reward.weight for reward in rewards]
        self._stop = on_failure == "stop"
        self._processes = [
            RewardProcess(reward.name, reward.function, timeout) for reward in rewards
        ]

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *_) -> None:
        self.close()

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

    def __call__(
        self,
        prompts: list[str],
        completions: list[str],
        completion_ids: list[list[int]],
        columns: dict[str, list],
        group_size: int,
    ) -> Scores:
        """Scores a batch. Of several processes the first does, and tells the others.

        Args:
            prompts: the text of each row's prompt, R of them.
            completions: the text of each row.
            completion_ids: the tokens of each row.
            columns: further fields of the prompts, R values each.
            group_size: that many consecutive rows belong to one prompt.

        Raises:
            TrainError: a function returned what is no reward, or failed while that is to stop.
            ConfigError: a function cannot take these columns.
            DataError: the lists do not fit together.
        """
        rows = dict(prompts=prompts, completions=completions, completion_ids=completion_ids)

        def score() -> tuple[list, list, list[str]]:
            scores = self._call(rows, columns, group_size)
            return scores.values.tolist(), scores.failed.tolist(), self.failures

        values, failed, self.failures = distributed.from_first(score)
        return Scores(values=np.asarray(values, np.float64), failed=np.asarray(failed, bool))

    def _call(self, batch: dict[str, list], columns: dict[str, list], group_size: int) -> Scores:
        lengths = {name: len(x) for name, x in (batch | columns).items()}
        if batch.keys() & columns.keys() or len(set(lengths.values())) > 1:
            raise DataError(f"rewards: columns must have names and lengths that fit, got {lengths}")
        if (n := len(batch["prompts"])) % group_size:
            raise DataError(f"rewards: {n} rows are no groups of {group_size}")
        batch |= columns
        for process in self._processes:
            process.check_takes(batch)
        self.failures = []
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

    def _score(
        self,
        process: RewardProcess,
        values: np.ndarray,
        failed: np.ndarray,
        batch: dict[str, list],
        group_size: int,
    ) -> Generator[RewardProcess, dict, None]:
        """Fills one function's rows; yields its process when it has been asked, gets the answer."""
        rows = len(values)
        whole = answer = yield process.ask(batch, 0, rows)
        if _store(process, answer, values, 0):
            return
        timeouts = 0
        for start in range(0, rows, group_size):
            prompt = start // group_size
            if timeouts == MAX_TIMEOUTS:
                failed[start:] = True
                text = f"{process.title} from prompt {prompt} on: not asked"
                self.failures.append(f"{text}, {timeouts} prompts in a row timed out")
                return
            if rows > group_size:  # of a single prompt, the answer is there
                answer = yield process.ask(batch, start, start + group_size)
            if _store(process, answer, values[start : start + group_size], start):
                timeouts = 0
                continue
            timeouts = timeouts + 1 if answer["timeout"] else 0
            failed[start : start + group_size] = True
            text = " ".join(batch["prompts"][start][:60].split())
            text = f"{process.title} on prompt {prompt} ({text!r}): {answer['failed']}"
            self.failures.append(text)
            if self._stop:
                raise TrainError(text)
        if not failed.any():
            text = f"{process.title} on the batch, and on no prompt alone: {whole['failed']}"
            self.failures.append(text)


def _store(process: RewardProcess, answer: dict, values: np.ndarray, start: int) -> bool:
    """Writes the answer for rows from `start` on; whether it has values. Raises TrainError for a bug."""
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
