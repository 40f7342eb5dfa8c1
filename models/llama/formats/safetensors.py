"""safetensors, in: the tensors of one file, or of a folder's shards. No JAX here.

The header is parsed here and not by the `safetensors` package, which is quiet about duplicate
keys and maps the file into memory: a file that shrinks then would kill the process.
Source: the format's README, https://github.com/huggingface/safetensors#format
"""

import math
import re
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from models.llama.layout import DTYPES
from utils.errors import ArtifactError, is_int, listed
from utils.files import InputFile, list_folder, named_in, parse_json, read_json

_DTYPES = {"F32": DTYPES["float32"], "F16": DTYPES["float16"], "BF16": DTYPES["bfloat16"]}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# Llama 3.1 405B has 1,138 tensors, 170 kB of header in one file. The bound keeps a hostile header
# from taking more memory and time than the file itself.
_MAX_HEADER = 8 << 20
_SHARD_NAME = re.compile(r".*-\d{5}-of-\d{5}\.safetensors")


class SafetensorsFile:
    """The tensors of one file: a TensorSource.

    Attributes:
        description: the file's path.
        shapes: by tensor name.
        dtypes: by tensor name; float32, float16 or bfloat16, or int8.
    """

    def __init__(self, path: str | Path, *, int8: bool = False):
        """Reads and checks the header. Raises ArtifactError; for int8 tensors too, unless `int8`."""
        self._file = InputFile(path)
        self.description = str(path)
        (header_len,) = struct.unpack("<Q", self._file.read(0, 8))
        if header_len > _MAX_HEADER:
            raise ArtifactError(
                f"{path}: header of {header_len} bytes, expected at most {_MAX_HEADER}; "
                "this is not a safetensors file, or a broken one"
            )
        self._data_start = 8 + header_len
        header = bytes(self._file.read(8, header_len))
        if not header.startswith(b"{"):
            raise ArtifactError(f"{path}: header starts with {header[:8]!r}, expected '{{'")
        entries = parse_json(header, f"{path} header", ArtifactError)
        _check_metadata(path, entries.pop("__metadata__", {}))
        self.shapes, self.dtypes, self._spans = {}, {}, {}
        dtypes = _DTYPES | {"I8": np.dtype(np.int8)} if int8 else _DTYPES
        for name, entry in entries.items():
            shape, dtype, span = _parse_entry(f"{path}: tensor {name!r:.200}", entry, dtypes)
            self.shapes[name], self.dtypes[name], self._spans[name] = shape, dtype, span
        self._check_layout(self._file.size - self._data_start)

    def read(self, name: str) -> np.ndarray:
        """The tensor, in an array of its own. Raises ArtifactError if the file changed."""
        out = np.empty(self.shapes[name], self.dtypes[name])
        start, _ = self._spans[name]
        raw = out.reshape(-1).view(np.uint8)
        self._file.read_into(self._data_start + start, memoryview(raw))
        return out

    def read_part(self, name: str, part: tuple[slice, ...]) -> np.ndarray:
        """`read(name)[part]`; of the file, only that is read."""
        rows, columns = part[0], part[1:]
        row_shape = self.shapes[name][1:]
        out = np.empty(
            (rows.stop - rows.start, *(c.stop - c.start for c in columns)), self.dtypes[name]
        )
        row_bytes = math.prod(row_shape) * out.itemsize
        start = self._data_start + self._spans[name][0] + rows.start * row_bytes
        raw = memoryview(out.reshape(-1).view(np.uint8))
        if out.shape[1:] == row_shape:
            self._file.read_into(start, raw)
            return out
        [column] = columns
        start, size = start + column.start * out.itemsize, out.shape[1] * out.itemsize
        self._file.read_each(
            (start + i * row_bytes, raw[i * size : (i + 1) * size]) for i in range(len(out))
        )
        return out

    def _check_layout(self, data_size: int) -> None:
        """The spans must cover the data exactly: no gap, no overlap, nothing behind."""
        expected = 0
        for name, (start, end) in sorted(self._spans.items(), key=lambda item: item[1]):
            if start != expected:
                raise ArtifactError(
                    f"{self.description}: tensor {name!r:.200} starts at byte {start} of the data, "
                    f"expected {expected}: a gap or an overlap"
                )
            expected = end
        if expected != data_size:
            what = "is truncated" if expected > data_size else "has trailing bytes"
            raise ArtifactError(
                f"{self.description} {what}: needs {self._data_start + expected} bytes, "
                f"has {self._data_start + data_size}"
            )


def _check_metadata(path: str | Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ArtifactError(f"{path}: __metadata__ is not an object of strings")


def _parse_entry(where: str, entry: Any, dtypes: Mapping[str, np.dtype]) -> tuple:
    """(shape, dtype, (start, end)) of one header entry. Python's integers cannot overflow."""
    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or set(entry) != keys:
        raise ArtifactError(f"{where}: expected an object with exactly {', '.join(sorted(keys))}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise ArtifactError(
            f"{where} has dtype {dtype!r:.40}, expected {', '.join(dtypes)}; integers and 8-bit "
            "floats mean an unsupported quantization: use the unquantized checkpoint or a GGUF file"
        )
    for key, value in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(value, list) or not all(is_int(n) and n >= 0 for n in value):
            raise ArtifactError(f"{where}: {key}={value!r:.80}, expected a list of integers ≥ 0")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ArtifactError(f"{where}: data_offsets={offsets!r:.80}, expected [start, end]")
    stored = dtypes[dtype]
    need = math.prod(shape) * stored.itemsize if len(shape) <= 8 else -1
    if need != offsets[1] - offsets[0]:
        raise ArtifactError(
            f"{where}: shape {shape!r:.80} of {dtype} needs {need} bytes, "
            f"data_offsets give {offsets[1] - offsets[0]}"
        )
    return tuple(shape), stored, (offsets[0], offsets[1])


class SafetensorsFolder:
    """The tensors of a folder: `model.safetensors`, or the shards that an index lists.

    Where both are there the single file is taken, as transformers does, with a warning.
    Attributes as SafetensorsFile.
    """

    def __init__(self, folder: str | Path, *, int8: bool = False):
        """Reads and checks the index and every header. Raises ArtifactError; `int8` as for a file."""
        self.description = str(folder)
        names = list_folder(folder)
        if SINGLE in names:
            if INDEX in names:
                message = f"{folder} has both {SINGLE} and {INDEX}: {SINGLE} is used"
                warnings.warn(message, stacklevel=2)
            file = SafetensorsFile(Path(folder, SINGLE), int8=int8)
            self._files: dict[str, SafetensorsFile] = dict.fromkeys(file.shapes, file)
        else:
            self._files = _open_shards(Path(folder), names, int8)
        self.files = sorted({Path(file.description) for file in self._files.values()})
        self.shapes = {name: file.shapes[name] for name, file in self._files.items()}
        self.dtypes = {name: file.dtypes[name] for name, file in self._files.items()}

    def read(self, name: str) -> np.ndarray:
        """The tensor, in an array of its own."""
        return self._files[name].read(name)

    def read_part(self, name: str, part: tuple[slice, ...]) -> np.ndarray:
        """`read(name)[part]`; of the file, only that is read."""
        return self._files[name].read_part(name, part)


def _open_shards(folder: Path, present: list[str], int8: bool) -> dict[str, SafetensorsFile]:
    """The file of each tensor. Raises ArtifactError where index, shards and folder disagree."""
    weight_map = _read_index(folder)
    by_shard: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        by_shard.setdefault(shard, set()).add(tensor)
    paths = {shard: named_in(folder / INDEX, shard) for shard in by_shard}
    missing = sorted(shard for shard in by_shard if shard not in present)
    if missing:
        raise ArtifactError(f"{folder} lacks {len(missing)} shards of its index: {listed(missing)}")
    stray = [name for name in present if _SHARD_NAME.fullmatch(name) and name not in by_shard]
    if stray:
        raise ArtifactError(f"{folder} has shards that its index does not list: {listed(stray)}")
    files: dict[str, SafetensorsFile] = {}
    for shard, expected in sorted(by_shard.items()):
        file = SafetensorsFile(paths[shard], int8=int8)
        held = set(file.shapes)
        if twice := sorted(name for name in held if name in files):
            other = files[twice[0]].description
            raise ArtifactError(f"{listed(twice)}: both in {other} and in {paths[shard]}")
        if absent := sorted(expected - held):
            raise ArtifactError(f"{paths[shard]} lacks tensors of the index: {listed(absent)}")
        # A tensor listed for another shard is caught there, as held twice.
        if extra := sorted(name for name in held if name not in weight_map):
            raise ArtifactError(f"{paths[shard]} has tensors not in the index: {listed(extra)}")
        files |= dict.fromkeys(held, file)
    return files


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    weight_map = read_json(path, max_bytes=_MAX_HEADER, error=ArtifactError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ArtifactError(f"{path}: weight_map is not an object of tensor and file names")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            raise ArtifactError(
                f"{path}: {tensor!r:.200} is in {shard!r:.80}, expected a file name"
            )
    return weight_map
