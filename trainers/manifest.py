"""What a checkpoint's folder must hold, to the bit: written last, checked before anything else."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from utils.errors import CheckpointError
from utils.files import InputFile, fsync, read_json

NAME = "manifest.json"
_VERSION = 1
_CHUNK = 1 << 24
_MAX_BYTES = 1 << 26


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is known of one checkpoint.

    Attributes:
        step: its number.
        saved_at: Unix time in seconds; nothing is decided by it.
        score: lower is better, or None.
        arrays: (shape, dtype's name) by the array's path in the state.
        files: (bytes, SHA-256 in hexadecimal) by path below the folder.
    """

    step: int
    saved_at: float
    score: float | None
    arrays: dict[str, tuple[list[int], str]]
    files: dict[str, tuple[int, str]]


def write_manifest(folder: Path, **known: Any) -> None:
    """Describes what lies in `folder` now, in a file there that is on disk on return.

    Args:
        folder: the checkpoint, complete but for this file.
        known: the fields of Manifest but for `files`.
    """
    files = {name: _digest(folder, name) for name in _file_names(folder)}
    body = dataclasses.asdict(Manifest(**known, files=files)) | {"version": _VERSION}
    path = folder / NAME
    path.write_bytes(_render(body))
    fsync(path)
    fsync(folder)


def read_manifest(folder: Path, step: int) -> Manifest:
    """The manifest of the folder of checkpoint `step`; exactly the files it lists are there.

    Sizes are compared, contents are not: `check_digests` does that.

    Raises:
        CheckpointError: the manifest is broken, or a file is missing, too many or of a wrong size.
    """
    path = folder / NAME
    body = read_json(path, max_bytes=_MAX_BYTES, error=CheckpointError)
    if body.get("version") != _VERSION:
        raise CheckpointError(
            f"{path} has version {body.get('version')!r:.20}, expected {_VERSION}; use the release"
            " that wrote it"
        )
    body.pop("sha256", None)
    # The one text that says this: not a space may differ.
    if _render(body) != path.read_bytes():
        raise CheckpointError(f"{path} is damaged: its own digest does not match")
    del body["version"]
    manifest = Manifest(**body)
    if manifest.step != step:
        raise CheckpointError(f"{path} is of step {manifest.step}, expected step {step}")
    found = set(_file_names(folder))
    problems = [f"{name} is missing" for name in sorted(manifest.files.keys() - found)]
    problems += [f"{name} is not in the manifest" for name in sorted(found - manifest.files.keys())]
    for name in sorted(found & manifest.files.keys()):
        size, expected = os.lstat(folder / name).st_size, manifest.files[name][0]
        if size != expected:
            problems.append(f"{name} has {size} bytes, expected {expected}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{folder}: {'; '.join(problems[:5])}{more}")
    return manifest


def check_digests(folder: Path, manifest: Manifest, names: list[str] | None = None) -> None:
    """Every file, or those of `names`, has the content it was saved with.

    Raises:
        CheckpointError: the first file that has not is named.
    """
    for name in manifest.files if names is None else names:
        size, expected = manifest.files[name]
        got_size, got = _digest(folder, name)
        if (got_size, got) != (size, expected):
            raise CheckpointError(
                f"{folder}/{name} is damaged: SHA-256 {got[:12]}…, expected {expected[:12]}…"
            )


def _render(body: dict[str, Any]) -> bytes:
    def text(value: dict[str, Any]) -> bytes:
        return json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"

    return text(body | {"sha256": hashlib.sha256(text(body)).hexdigest()})


def _digest(folder: Path, name: str) -> tuple[int, str]:
    file = InputFile(folder / name, CheckpointError)
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(_CHUNK, file.size)))
    for offset in range(0, file.size, _CHUNK):
        part = buffer[: file.size - offset]
        file.read_into(offset, part)
        digest.update(part)
    return file.size, digest.hexdigest()


def _file_names(folder: Path) -> list[str]:
    """Sorted paths of all that is no folder below `folder`, but for the manifest."""

    def refuse(e: OSError) -> None:
        raise CheckpointError(f"cannot read folder {e.filename}: {e.strerror}") from e

    names = [
        os.path.relpath(os.path.join(parent, name), folder)
        for parent, _, files in os.walk(folder, onerror=refuse)
        for name in files
    ]
    return sorted(name for name in names if name != NAME)
