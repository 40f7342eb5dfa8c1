"""A checkpoint's folder, to the bit: arrays in Orbax's format, and a manifest of digests written last."""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from utils import distributed
from utils.errors import CheckpointError, reason
from utils.files import InputFile, fsync, read_json

NAME = "manifest.json"
_VERSION = 1
_CHUNK = 1 << 24
_MAX_BYTES = 1 << 26


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents of one checkpoint's folder.

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
    """A checkpoint that was read.

    Attributes:
        step: its number.
        state: the tree of arrays, in the shape of `like`.
        meta: what was saved beside them.
    """

    step: int
    state: Any
    meta: dict[str, Any]


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


@contextlib.contextmanager
def explaining(folder: Path, step: int) -> Iterator[None]:
    """Turns whatever is raised into a CheckpointError of that step."""
    try:
        yield
    # Orbax and TensorStore raise whatever they like.
    except Exception as e:
        raise CheckpointError(
            f"cannot save step {step} in {folder}: {reason(e)}; earlier checkpoints are untouched"
        ) from e


# Arrays -----------------------------------------------------------------------------------------


def describe(state: Any) -> dict[str, tuple[list[int], str]]:
    """(shape, dtype's name) by the array's path in the tree; works for ShapeDtypeStructs too."""
    return {name: (list(x.shape), str(x.dtype)) for name, x in _by_name(state).items()}


def to_host(state: Any) -> dict[str, np.ndarray]:
    """Copies in the host's memory by the array's path in the tree.

    Copies even on a CPU: the caller donates its arrays next. Typed random keys become their data.
    """
    return {name: np.array(_plain(x)) for name, x in _by_name(state).items()}


def write_arrays(folder: Path, state: Any) -> None:
    """Writes a tree of arrays into the folder, which is there: of several processes each its own parts.

    The handler and not Orbax's Checkpointer, which copies nothing on a CPU when it writes in the
    background, shows its folder before the digests are known, and has all processes wait in its
    barriers for one that fails.

    Raises:
        Exception: of any kind, from Orbax or TensorStore.
    """
    # Orbax's tree is flat, so that a checkpoint does not depend on the classes of the state's.
    plain = {name: _plain(x) for name, x in _by_name(state).items()}
    _writer().save(epath.Path(folder), args=ocp.args.PyTreeSave(plain))


def finish_arrays(folder: Path) -> None:
    """Joins the parts, once every process has written its own. Raises as `write_arrays`."""
    _writer().finalize(epath.Path(folder))


def _writer() -> ocp.PyTreeCheckpointHandler:
    """A handler that holds no copy of the arrays.

    Orbax's default copies what lies in host memory, and holds all of it once more when compressed:
    that tripled the memory of a save, for 8 % less of a float32 state on disk.
    """
    of = ocp.type_handlers
    registry = of.create_type_handler_registry(
        (np.ndarray, of.NumpyHandler(deepcopy_host_arrays=False)),
        (jax.Array, of.get_type_handler(jax.Array)),
    )
    return ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)


def read_arrays(folder: Path, like: Any, described: Mapping[str, tuple[list[int], str]]) -> Any:
    """The tree of arrays in a folder whose bytes are known to be right.

    Args:
        folder: what `write_arrays` made.
        like: the tree that is expected, of arrays or ShapeDtypeStructs; their shardings are used.
        described: what `describe` said of the tree that was saved.

    Raises:
        CheckpointError: other arrays were saved than are expected, or Orbax cannot read them.
    """
    wanted = _by_name(like)
    _check_same({k: (list(shape), dtype) for k, (shape, dtype) in described.items()}, like, folder)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    plain = {}
    for name, leaf in wanted.items():
        data = jax.eval_shape(_plain, leaf)
        sharding = getattr(leaf, "sharding", None) or here
        # Of a key, its words have an axis more.
        sharding = here if _is_key(leaf) and not sharding.is_fully_replicated else sharding
        plain[name] = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)
    try:
        arrays = distributed.together(
            lambda: _handler().restore(epath.Path(folder), args=ocp.args.StandardRestore(plain))
        )
    # Orbax and TensorStore raise whatever they like.
    except Exception as e:
        raise CheckpointError(f"cannot read {folder}: {' '.join(str(e).split()):.500}") from e
    leaves = [_as_key(arrays[n], x) if _is_key(x) else arrays[n] for n, x in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _check_same(saved: dict[str, tuple[list[int], str]], like: Any, folder: Path) -> None:
    # Orbax would cast without a word.
    wanted = describe(like)
    problems = [f"{name} is not in it" for name in wanted if name not in saved]
    problems += [f"{name} is not expected" for name in saved if name not in wanted]
    for name in wanted.keys() & saved.keys():
        (got_shape, got), (shape, dtype) = saved[name], wanted[name]
        if (got_shape, got) != (shape, dtype):
            problems.append(f"{name} is {got}{got_shape}, expected {dtype}{shape}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{folder} is of another state: {'; '.join(sorted(problems)[:5])}{more}"
        )


def _handler() -> ocp.StandardCheckpointHandler:
    return ocp.StandardCheckpointHandler()


def _by_name(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}
    if len(named) < len(leaves):
        raise CheckpointError("two arrays of the state have one path; no key may hold a dot")
    return named


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _as_key(data: jax.Array, like: Any) -> jax.Array:
    impl: list[Any] = []
    # key_impl wants an array; a tracer is one.
    jax.eval_shape(lambda key: impl.append(jax.random.key_impl(key)), like)
    key = jax.random.wrap_key_data(data, impl=impl[0])
    sharding = getattr(like, "sharding", None)
    return key if sharding is None else jax.device_put(key, sharding)
