"""A run's folder: its flags, and run.json, which says what the run was made of."""

import dataclasses
import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
import jaxlib

from models.llama.layout import DTYPES
from models.llama.model import REMATS
from trainers.runs.checkpoint import CheckpointReader
from trainers.runs import trackers
from utils import clock, distributed
from utils.console import cli, usage
from utils.fields import ALWAYS, Config, Range, field, integer, one_of, texts
from utils.files import atomic_file

_ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """A run's folder: what is written there, and how it starts."""

    out_dir: str = field(
        help="folder for run.json, metrics.jsonl, checkpoints/ and the final export/"
    )
    resume: bool | str = field(
        False,
        "resume from the newest intact checkpoint in out_dir; --resume auto starts where there is none",
        Range("true, false or auto", lambda x: isinstance(x, bool) or x == "auto"),
        parse=lambda text: {"True": True, "False": False}.get(text, text),
    )
    resume_step: int | None = field(None, "resume from the checkpoint of this step", integer(0))
    allow_data_change: bool = field(False, "resume although the data is not the same")
    allow_config_change: bool = field(
        False, "resume although the learning rate, batch size and the like differ"
    )
    keep: int = field(2, "newest checkpoints to keep, beside the best one", integer(1))
    export: bool = field(True, "write the model to out_dir/export in Hugging Face's format")
    export_dtype: str | None = field(
        None, "dtype of the export; default: that of the model's own files", one_of(*DTYPES)
    )
    track: tuple[str, ...] = field(
        (),
        "a tracker that gets the metrics too: tensorboard, wandb or trackio; may be repeated",
        Range(f"some of {', '.join(trackers.NAMES)}", {*trackers.NAMES}.issuperset),
        parse=texts,
    )
    check_every: int = field(
        100, "steps between comparisons of the parameters' copies on a mesh; 0: none", integer(0)
    )
    remat: str = field(
        "dots",
        "what the backward pass computes again; block needs least memory",
        one_of(*REMATS),
        resume=ALWAYS,
    )

    def problems(self) -> list[str]:
        return super().problems() or trackers.not_installed(self.track)

    @property
    def folder(self) -> Path:
        """`out_dir`."""
        return Path(self.out_dir)

    @property
    def checkpoints(self) -> Path:
        """The folder's checkpoints."""
        return self.folder / "checkpoints"

    @property
    def resumes(self) -> bool:
        """Whether the run starts from a checkpoint; broken ones are no reason for `auto` to start anew."""
        if self.resume == "auto" and self.resume_step is None:
            return CheckpointReader(self.checkpoints).has_past
        return bool(self.resume) or self.resume_step is not None

    def moment(self) -> datetime:
        """When the run began: the time that a chat template writes as today's, on a resume too."""

        def began() -> str | None:
            past = CheckpointReader(self.checkpoints)
            known = past.read_meta(self.resume_step) if self.resumes and past.has_past else {}
            return known.get("data", {}).get("moment")

        saved = distributed.from_first(began)
        return datetime.fromisoformat(saved) if saved else clock.moment()


def write_run(config: RunConfig, known: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
    """Writes run.json: what the run is of, and all that repeats it.

    Args:
        config: the run's.
        known: the meta of its checkpoints, and where its model was read.
        flags: those that start it; how it resumes is left out.
    """
    asked = {k: v for k, v in flags.items() if not k.startswith(("resume", "allow_"))}
    how = {
        "command": cli.command_line(),
        "flags": asked,
        "folder": os.getcwd(),
        "host": socket.gethostname(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": {"altiplano": usage.version()} | versions(),
        "commit": _commit(),
    }
    with atomic_file(config.folder / "run.json") as file:
        file.write(json.dumps({**known, "run": how}, indent=1).encode())


def _commit() -> str | None:
    """The commit of this code, "-dirty" if files differ from it; None where there is no git."""
    if not (_ROOT / ".git").exists():
        return None
    words = [
        "git",
        "-C",
        str(_ROOT),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def versions() -> dict[str, str]:
    """The versions of the code (a digest of its files) and of what it runs on."""
    code = hashlib.sha256()
    for room in ("models", "trainers", "utils"):
        for path in sorted((_ROOT / room).rglob("*.py")):
            code.update(path.relative_to(_ROOT).as_posix().encode() + path.read_bytes())
    python = ".".join(map(str, sys.version_info[:2]))
    known = {"code": code.hexdigest()[:16], "jax": jax.__version__, "jaxlib": jaxlib.__version__}
    return known | {"python": python}
