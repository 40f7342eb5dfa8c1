"""A training run as one watches it: its phases, a table of steps, samples of what it writes, a summary."""

import contextlib
import math
import operator
import time
from collections.abc import Iterable
from typing import Any

import rich.console
import rich.progress

from utils.console import cli
from utils.errors import printable
from utils.memory import human

# Phases of `trainers.loop` that take long, as people call them; some compile when they are new.
_PHASES = {"preflight": "compiling", "step": "training", "rollout": "sampling"}
_PHASES |= {
    "reward": "scoring",
    "old": "computing log-probs",
    "reference": "computing the reference",
}
_PHASES |= {"eval": "evaluating", "save": "saving"}
_COMPILING = ("rollout", "old", "reference", "eval")

# (key of a record, head of its column, form of its values)
_COLUMNS = (
    ("step", "step", "{:d}"),
    ("reward", "reward", "{:.3f}"),
    ("loss", "loss", "{:.4f}"),
    ("eval", "eval", "{:.4f}"),
    ("margin", "margin", "{:.3f}"),
    ("accuracy", "accuracy", "{:.1%}"),
    ("kl", "kl", "{:.4f}"),
    ("entropy", "entropy", "{:.3f}"),
    ("length_mean", "length", "{:.1f}"),
    ("truncated", "truncated", "{:.0%}"),
    ("lr", "lr", "{:.1e}"),
    ("tokens_per_s", "tok/s", "{:,.0f}"),
    ("elapsed", "elapsed", "{}"),
    ("left", "left", "{}"),
)
_LEAST_LINES, _LEAST_SAMPLES = 20, 10  # per run
_SHOWN_CHARACTERS = 240


class StepTable:
    """A sink of `MetricsLog` that shows a run's steps and phases; a context manager.

    The table is the same on a terminal and in a file: twenty lines in all, one every 20 s, and each
    evaluation. A terminal shows the present phase under it, a file says each phase when it is new.
    """

    def __init__(
        self,
        total: int,
        *,
        evaluates: bool = False,
        every: float = 20.0,
        console: rich.console.Console | None = None,
    ):
        """
        Args:
            total: the run's last step.
            evaluates: whether some records have an evaluation's numbers.
            every: seconds after which a line is due.
            console: default: stderr.
        """
        self._total, self._evaluates, self._every = total, evaluates, every
        self._console = console or cli.stderr
        self._start, self._printed = time.monotonic(), -math.inf
        self._first: tuple[float, int] | None = None  # the first step's end; it has compiled
        self._columns: list[tuple[str, str, str]] = []
        self._phase, self._said = "", set()
        self._records: list[dict[str, Any]] = []
        self._bars = cli.bars(rich.progress.TimeElapsedColumn(), self._console)
        self._task = self._bars.add_task("starting", total=total)

    def __enter__(self) -> "StepTable":
        self._bars.start()
        return self

    def __exit__(self, *_) -> None:
        self._bars.stop()

    def remember(self, records: Iterable[dict]) -> None:
        """Counts records of earlier sessions of the run, for the summary."""
        self._records += map(_measured, records)

    def watch(self, phase: str, shape: str = "") -> None:
        """Names the present phase, by its name in `trainers.loop` and what it compiles."""
        what = _PHASES.get(phase, "")
        if not what or (what == self._phase and not shape):
            return
        self._phase = what
        if phase == "preflight":
            what += f" the step for {shape.removesuffix(' (preflight)')}"
        elif phase in _COMPILING and phase not in self._said:
            what += " (the first time it compiles)"
        done = self._records[-1]["step"] if self._records else 0
        self._bars.reset(self._task, description=what, completed=done, total=self._total)
        key = what if phase == "preflight" else phase
        if not self._console.is_terminal and key not in self._said:
            self._say(f"{what} …")
        self._said.add(key)

    def __call__(self, record: dict) -> None:
        """Shows a record of `MetricsLog`."""
        now, row = time.monotonic(), _measured(record)
        self._records.append(row)
        step, score = row["step"], row.get("eval")
        if step == 0:
            return self._say(f"before training: eval {_number('{:.4f}', score)}")
        first_time, first_step = self._first = self._first or (now, step)
        due = step >= self._total or step == first_step or score is not None
        due = due or step % math.ceil(self._total / _LEAST_LINES) == 0
        if not due and now - self._printed < self._every and record.get("updated", True):
            return
        self._printed, row["elapsed"] = now, _clock(now - self._start)
        if first_step < step < self._total:
            row["left"] = _clock((now - first_time) / (step - first_step) * (self._total - step))
        if not self._columns:
            self._columns = self._choose(row)
            self._say("  ".join(f"{head:>{_width(head)}}" for _, head, _ in self._columns))
        cells = (
            f"{_number(form, row[key]) if key in row else '':>{_width(head)}}"
            for key, head, form in self._columns
        )
        skipped = "" if record.get("updated", True) else "  skipped"
        self._say("  ".join(cells).rstrip() + skipped)

    def _choose(self, row: dict[str, Any]) -> list[tuple[str, str, str]]:
        """The columns of a table that begins with a row."""
        known = row.keys() | {"left"} | ({"eval"} if self._evaluates else set())
        # A policy's loss hovers around 0: its reward is what one watches, and KL or else entropy.
        known -= {"loss"} if "reward" in row else {"entropy"}
        known -= {"entropy"} if "kl" in row else set()
        known -= {"kl"} if "margin" in row else {"accuracy"}  # of pairs; and not of tokens
        return [column for column in _COLUMNS if column[0] in known]

    def wants_sample(self, step: int) -> bool:
        """Whether a completion of a step is to be shown: of the first, and of a few others."""
        return step == 1 or step % math.ceil(self._total / _LEAST_SAMPLES) == 0

    def sample(self, step: int, prompt: str, scored: list[tuple[float, str]]) -> None:
        """Shows a prompt with the best and the worst of its completions, (reward, text) each."""
        known = sorted((p for p in scored if not math.isnan(p[0])), key=operator.itemgetter(0))
        self._say(f"  step {step}, a prompt  {_cut(prompt)}")
        ends = [("best", known[-1]), ("worst", known[0])] if known else [("", scored[0])]
        for name, (reward, text) in ends:
            number = "" if math.isnan(reward) else f"{reward:+.3f}"
            self._say(f"  {name:>6} {number:>6}  {_cut(text)}")

    def summary(self, memory: int) -> str:
        """How the run went, in a line; `memory` is its peak in bytes."""
        parts = [f"done in {_clock(time.monotonic() - self._start)}"]
        steps = [row for row in self._records if row["step"] > 0]
        for name in ("reward", "loss"):
            values = [row[name] for row in steps if row.get(name) is not None]
            if values:
                parts.append(f"{name} {values[0]:.4g} → {values[-1]:.4g}")
                break
        scores = [row for row in self._records if row.get("eval") is not None]
        if scores:
            best = min(scores, key=lambda row: row["score"])
            first, last = scores[0]["eval"], scores[-1]["eval"]
            parts.append(f"eval {first:.4g} → {last:.4g} (best: step {best['step']})")
        return " · ".join([*parts, f"peak memory {human(memory)}"])

    def _say(self, line: str) -> None:
        with contextlib.suppress(OSError):  # no terminal any more: the run is worth more
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _measured(record: dict) -> dict[str, Any]:
    """A record's numbers by the columns' keys; `score` of an evaluation: lower is better."""
    row = {key: record[key] for key, _, _ in _COLUMNS if key in record}
    for name, sign in (("eval_reward", -1), ("eval_loss", 1)):
        if record.get(name) is not None:
            row |= {"eval": record[name], "score": sign * record[name]}
            break
    return row


def _number(form: str, value: Any) -> str:
    """None stands for a number that is not finite."""
    return "nan" if value is None else form.format(value)


def _width(head: str) -> int:
    return max(len(head), 7)


def _clock(seconds: float) -> str:
    """Seconds as [h:]mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _cut(text: str) -> str:
    """A text as one line of a bounded length."""
    line = " ".join(printable(text).split())
    return line if len(line) <= _SHOWN_CHARACTERS else line[:_SHOWN_CHARACTERS] + " …"
