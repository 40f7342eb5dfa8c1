"""Trackers: a run's numbers for TensorBoard, Weights & Biases or Trackio, beside metrics.jsonl.

A tracker is made from the run's folder and its first step, takes records and is closed. What it raises
costs one warning and stops nothing (`trainers.runs.metrics.MetricsLog`). Projects, keys and servers are
the packages' own settings: `wandb login`, WANDB_PROJECT, WANDB_MODE=offline, TRACKIO_SPACE_ID.
"""

import contextlib
import importlib.util
import secrets
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from utils.files import atomic_file, flatten, read_json

# Extras of this project, which install the packages, by the tracker's name.
_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
NAMES = tuple(_PACKAGES)


class Tracker(Protocol):
    """Takes a run's records."""

    def __call__(self, record: dict[str, Any]) -> None:
        """Sends a record, with its "step"."""

    def close(self) -> None:
        """Sends what is left."""


def open_tracker(name: str, folder: Path, start_step: int) -> Tracker:
    """The tracker of a name, for the run in a folder.

    Args:
        name: one of NAMES.
        folder: the run's; run.json in it becomes the tracker's config.
        start_step: the first step that this process will send; above 1 the tracker's run continues.
    """
    trackers = {"tensorboard": _TensorBoard, "wandb": _Wandb, "trackio": _Trackio}
    return trackers[name](folder, start_step)


def not_installed(names: tuple[str, ...]) -> list[str]:
    """Advice about trackers whose packages are not here, one text each."""

    def absent(package: str) -> bool:
        found = importlib.util.find_spec(package)
        return found is None or found.origin is None  # a folder of that name is no package

    return [
        f"track={name} needs a package: pip install 'altiplano[{name}]'"
        for name in names
        if absent(_PACKAGES[name])
    ]


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record by their paths, without its step."""
    return {
        name: value
        for name, value in flatten(record).items()
        if isinstance(value, (int, float)) and name != "step"
    }


class _TensorBoard:
    """TensorBoard's event files, through tensorboardX's synchronous writer.

    SummaryWriter's thread dies of a full disk (tensorboardX 2.6), and its queue then blocks for ever.
    """

    def __init__(self, folder: Path, start_step: int):
        import tensorboardX  # here, as the others: optional

        folder = folder / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        self._x = tensorboardX
        # tensorboardX names files by the second: a second run within it would overwrite the first.
        name = f".{time.time_ns()}"
        self._writer = self._x.event_file_writer.EventsWriter(str(folder / "events"), name)
        self.close = self._writer.close
        if start_step:  # hides the events that an interrupted run wrote from there on
            session = self._x.proto.event_pb2.SessionLog
            self._event(start_step, session_log=session(status=session.START))

    def __call__(self, record: dict[str, Any]) -> None:
        for name, value in _numbers(record).items():
            self._event(record["step"], summary=self._x.summary.scalar(name, value))
        self._writer.flush()

    def _event(self, step: int, **what: Any) -> None:
        event = self._x.proto.event_pb2.Event(wall_time=time.time(), step=step, **what)
        self._writer.write_event(event)


class _Wandb:
    """A run of Weights & Biases."""

    def __init__(self, folder: Path, start_step: int):
        import wandb

        self._run = wandb.init(
            id=_run_id(folder / "wandb.id", start_step),
            resume="allow",
            name=folder.resolve().name,
            dir=str(folder),
            config=_settings(folder),
            settings={"console": "off"},  # it would stand between the terminal and our progress
        )
        self.close = self._run.finish

    def __call__(self, record: dict[str, Any]) -> None:
        # It has the steps that a resumed run repeats, and takes none twice.
        if record["step"] >= self._run.step:
            self._run.log(_numbers(record), step=record["step"])


class _Trackio:
    """A run of Trackio, in the project "altiplano"."""

    def __init__(self, folder: Path, start_step: int):
        import trackio

        number = _run_id(folder / "trackio.id", start_step)
        with contextlib.redirect_stdout(sys.stderr):
            self._run = trackio.init(
                "altiplano",
                name=f"{folder.resolve().name}-{number}",
                resume="allow",
                config=_settings(folder),
            )

    def __call__(self, record: dict[str, Any]) -> None:
        self._run.log(_numbers(record), step=record["step"])

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._run.finish()


def _run_id(path: Path, start_step: int) -> str:
    """The id of a tracker's run, kept in a file: a new one, or that of the run which continues."""
    if start_step <= 1 or not path.exists():
        with atomic_file(path) as file:
            file.write(secrets.token_hex(4).encode())
    return path.read_text()


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    return read_json(path) if path.exists() else {}
