"""Meta's consolidated.*.pth, with the shards of several model-parallel ranks merged. No JAX here.

torch unpickles with `weights_only=True`, and only names, shapes and places of the tensors: fake
tensors hold no data, and record where in the file it is. The bytes are then read from there, so that
nothing is mapped into memory or held twice.
"""

import math
import pickletools
import re
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from models.llama.layout import same_bits
from utils.errors import ArtifactError, ConfigError
from utils.files import InputFile, list_folder, member_path

_DTYPES = {
    "torch.float32": np.dtype(np.float32),
    "torch.float16": np.dtype(np.float16),
    "torch.bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_SHARD_NAME = re.compile(r"consolidated\.(\d{2})\.pth")

# What a file of plain tensors refers to. torch's own list is longer, and has `bytearray`, with which
# a pickle of 100 bytes fills the memory.
_GLOBALS = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"}
_GLOBALS |= {f"torch {kind}Storage" for kind in ("Float", "Half", "BFloat16")}
# Llama 3.1 405B has 1,138 tensors a shard: 150 kB of pickle and 1,150 zip entries.
_MAX_PICKLE, _MAX_RECORDS = 1 << 19, 1 << 14


class MetaFolder:
    """The tensors of a folder of consolidated.NN.pth, merged: a TensorSource.

    Attributes:
        description: the folder.
        shapes: by Meta's tensor names, of the whole model.
        dtypes: by tensor name.
    """

    def __init__(self, folder: str | Path, dim: Any):
        """Reads what every shard has.

        Args:
            folder: has consolidated.00.pth and so on.
            dim: of params.json: by it one sees on which axis the embedding is split.

        Raises:
            ArtifactError: a shard is missing, broken, or unlike the others.
        """
        self.description = str(folder)
        names = [name for name in list_folder(folder) if _SHARD_NAME.fullmatch(name)]
        expected = [f"consolidated.{rank:02d}.pth" for rank in range(len(names))]
        if names != expected or not names:
            lacking = sorted(set(expected or ["consolidated.00.pth"]) - set(names))
            raise ArtifactError(f"{folder} has a gap in its shards: no {', '.join(lacking)}")
        self._shards = [_Shard(member_path(folder, name)) for name in names]
        first = self._shards[0].tensors
        for shard in self._shards[1:]:
            if differing := sorted(first.keys() ^ shard.tensors.keys()):
                raise ArtifactError(f"{shard.path} and shard 00 differ: {differing[0]!r:.200}")
            for name, tensor in shard.tensors.items():
                if tensor[:2] != first[name][:2]:
                    raise ArtifactError(
                        f"{shard.path}: {name!r:.200} is {list(tensor[0])} {tensor[1]}, in shard "
                        f"00 {list(first[name][0])} {first[name][1]}; shards must be alike"
                    )
        self._axes = {name: _axis(name, shape, dim) for name, (shape, *_) in first.items()}
        self.shapes = {name: self._merged(name, shape) for name, (shape, *_) in first.items()}
        self.dtypes = {name: dtype for name, (_, dtype, _) in first.items()}

    def _merged(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        axis = self._axes[name]
        return tuple(n * len(self._shards) if i == axis else n for i, n in enumerate(shape))

    def read(self, name: str) -> np.ndarray:
        """The merged tensor, in an array of its own.

        Raises ArtifactError if a file changed, or the shards' copies of a replicated tensor differ.
        """
        axis, out = self._axes[name], np.empty(self.shapes[name], self.dtypes[name])
        if axis is not None:
            for shard, place in zip(self._shards, np.split(out, len(self._shards), axis)):
                shard.read_into(name, place)
            return out
        self._shards[0].read_into(name, out)
        part = np.empty_like(out)
        for shard in self._shards[1:]:
            shard.read_into(name, part)
            if not same_bits(out, part):
                raise ArtifactError(f"{shard.path}: {name!r:.200} differs from shard 00's copy")
        return out


def _axis(name: str, shape: tuple[int, ...], dim: Any) -> int | None:
    """The axis that model-parallel ranks split a tensor on; None where each has all of it.

    Source: ColumnParallelLinear, RowParallelLinear and the embeddings of Meta's llama code.
    """
    if len(shape) != 2:
        return None
    if name.endswith((".wo.weight", ".w2.weight")):
        return 1
    # Llama 1 and 2 split the embedding by features, Llama 3 by words.
    return 1 if name == "tok_embeddings.weight" and shape[1] != dim else 0


class _Shard:
    """One .pth file: tensors by name as (shape, dtype, offset in the file)."""

    def __init__(self, path: Path):
        self.path, self._file = path, InputFile(path)
        records = _records(path, self._file)
        self.tensors: dict[str, tuple[tuple[int, ...], np.dtype, int]] = {}
        for name, tensor in _unpickle(path).items():
            self.tensors[name] = _locate(f"{path}: tensor {name!r:.200}", tensor, records)

    def read_into(self, name: str, out: np.ndarray) -> None:
        """Fills `out`, which may be any view of the tensor's shape and dtype."""
        whole = out if out.flags.c_contiguous else np.empty(out.shape, out.dtype)
        raw = memoryview(whole.reshape(-1).view(np.uint8))
        self._file.read_into(self.tensors[name][2], raw)
        if whole is not out:
            out[...] = whole


def _records(path: Path, file: InputFile) -> dict[int, int]:
    """Where each stored record of the zip file starts, and its size in bytes.

    Refuses what torch.save never writes: compression, duplicates, overlaps, other paths, and a
    pickle that is large or refers to more than tensors.
    """
    if bytes(file.read(0, min(4, file.size))) != b"PK\x03\x04":
        raise ArtifactError(
            f"{path} is no zip file: truncated, or in torch's format of before 1.6; load it with "
            "torch and save it again"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
            _check_entries(path, entries)
            pickle_name = next(e.filename for e in entries if e.filename.endswith("/data.pkl"))
            _check_pickle(path, archive.read(pickle_name))
            order = pickle_name.replace("data.pkl", "byteorder")
            if order in archive.namelist() and archive.read(order) != b"little":
                raise ArtifactError(f"{path} has big-endian numbers; save it again on this machine")
    except ArtifactError:
        raise
    except (zipfile.BadZipFile, struct.error, OSError, ValueError, RuntimeError, EOFError) as e:
        raise ArtifactError(f"{path} is broken: {str(e):.200}") from e
    out, end = {}, 0
    for entry in entries:
        name_len, extra_len = struct.unpack("<HH", file.read(entry.header_offset + 26, 4))
        start = entry.header_offset + 30 + name_len + extra_len
        if entry.header_offset < end or start + entry.file_size > file.size:
            raise ArtifactError(
                f"{path}: record {entry.filename!r:.200} overlaps another, or is cut"
            )
        end = start + entry.file_size
        out[start] = entry.file_size
    return out


def _check_entries(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    names = [entry.filename for entry in entries]
    if len(names) > _MAX_RECORDS:
        raise ArtifactError(f"{path} has {len(names)} records, expected at most {_MAX_RECORDS}")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ArtifactError(f"{path} has record {twice!r:.200} twice")
    root = names[0].partition("/")[0] if names else ""
    for entry in entries:
        parts = entry.filename.split("/")
        if parts[0] != root or not root or ".." in parts or "" in parts:
            raise ArtifactError(f"{path}: record {entry.filename!r:.200} is outside {root!r:.200}/")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise ArtifactError(f"{path}: record {entry.filename!r:.200} is compressed")
    sizes = {entry.filename: entry.file_size for entry in entries}
    if not 0 < sizes.get(f"{root}/data.pkl", 0) <= _MAX_PICKLE:
        raise ArtifactError(f"{path} has no data.pkl of 1 to {_MAX_PICKLE} bytes: no torch file")


def _check_pickle(path: Path, data: bytes) -> None:
    for op, arg, _ in pickletools.genops(data):
        if isinstance(arg, int) and arg < 0:
            raise ArtifactError(f"{path} has the number {arg}: no size of a tensor is negative")
        is_global = op.name in ("GLOBAL", "INST")
        if (is_global and arg not in _GLOBALS) or op.name == "STACK_GLOBAL":
            what = repr(arg) if is_global else "a computed name"
            raise ArtifactError(
                f"{path} refers to {what:.200}: it holds more than plain tensors of float32, "
                "float16 and bfloat16"
            )


def _unpickle(path: Path) -> dict[str, Any]:
    """The file's fake tensors by name."""
    torch, fake_mode = import_torch()
    try:
        # torch tells about deprecations of its own while it loads.
        with warnings.catch_warnings(action="ignore"), fake_mode():
            out = torch.load(path, map_location="cpu", weights_only=True)
    # A broken pickle makes torch raise nearly anything.
    except Exception as e:
        reason = " ".join(str(e).split())
        raise ArtifactError(f"torch cannot read {path}: {type(e).__name__} {reason:.200}") from e
    if not isinstance(out, dict) or not out:
        raise ArtifactError(f"{path} holds no dict of tensors")
    for name, tensor in out.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ArtifactError(f"{path} holds {name!r:.200}, which is no tensor")
    return out


def import_torch():
    """(torch, its FakeTensorMode). Raises ConfigError where torch is not installed."""
    try:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
    except ImportError as e:
        raise ConfigError(
            "Meta's .pth files need torch: pip install 'altiplano[torch]', or use the safetensors"
        ) from e
    return torch, FakeTensorMode


def _locate(where: str, tensor, records: dict[int, int]) -> tuple[tuple[int, ...], np.dtype, int]:
    """(shape, dtype, offset in the file) of a fake tensor, checked against its record."""
    dtype = _DTYPES[str(tensor.dtype)]  # _GLOBALS allows no other storage
    shape = tuple(tensor.shape)
    if not tensor.is_contiguous():
        raise ArtifactError(f"{where} has strides {tuple(tensor.stride())}, expected contiguous")
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    first = tensor.storage_offset() * dtype.itemsize
    need, have = first + math.prod(shape) * dtype.itemsize, records.get(start, -1)
    if first < 0 or need > have:
        raise ArtifactError(f"{where} needs {need} bytes of its record, which has {have}")
    return shape, dtype, start + first
