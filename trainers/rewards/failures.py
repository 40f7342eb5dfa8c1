"""Failures of what runs in processes of its own: told once per kind, counted, and reported."""

import collections
import re
import warnings
from typing import Any, NamedTuple


class Failure(NamedTuple):
    """One failure.

    Attributes:
        title: names the reward or environment.
        where: what it failed on.
        what: how; an exception as "Type: text (file:line)".
        lost: number of completions that it costs.
    """

    title: str
    where: str
    what: str
    lost: int

    @property
    def line(self) -> str:
        """The failure for people."""
        return f"{self.title} {self.where}: {self.what}"

    @property
    def kind(self) -> str:
        """The same for an exception of the same type from the same place."""
        place = re.sub(r": .*(?= \([^()]*:\d+\)$)", "", self.what)  # without the exception's text
        return f"{self.title}: {place}"


class FailureLog:
    """Failures by kind.

    Attributes:
        kinds: those since the last `report`, {"first": a line, "completions": number lost} each.
    """

    def __init__(self):
        self.kinds: dict[str, dict[str, Any]] = {}
        self._said: dict[str, int] = {}  # rows lost by kind: when it was warned of, and in all
        self._lost: collections.Counter[str] = collections.Counter()

    def count(self, failures: list[Failure], rows: int, stacklevel: int = 2) -> None:
        """Counts those of a batch of `rows` completions, and warns of the first of each new kind."""
        found: dict[str, dict[str, Any]] = {}
        for failure in failures:
            entry = {"first": failure.line, "completions": 0}
            found.setdefault(failure.kind, entry)["completions"] += failure.lost
        for kind, entry in found.items():
            lost = entry["completions"]
            if kind not in self._said:
                self._said[kind] = lost
                text = f"{entry['first']}; {lost} of {rows} completions unscorable"
                warnings.warn(text, stacklevel=stacklevel + 1)
            self._lost[kind] += lost
            self.kinds.setdefault(kind, entry | {"completions": 0})["completions"] += lost

    def report(self) -> dict[str, Any]:
        """The `failures` since the last report, one of `kinds` each; {} if there are none."""
        kinds, self.kinds = self.kinds, {}
        return {"failures": [*kinds.values()]} if kinds else {}

    def close(self) -> None:
        """Warns of what was lost in all, where that is more than was told."""
        for kind, lost in self._lost.items():
            if lost > self._said[kind]:
                warnings.warn(f"{kind}: {lost} completions unscorable in all", stacklevel=3)
