"""GGUF, in: the header parsed once and bounded by the file's size, tensors read one at a time.

The layout is that of ggml's docs/gguf.md. The `gguf` package supplies the sizes of quantised blocks
and their dequantizers; its reader is not used, because it loops as often as a hostile length says.
"""

import functools
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from models.llama.config import ModelConfig, RopeScaling, divide
from models.llama.config import llama3_factors, llama3_scaling, require
from models.llama.layout import DTYPES, GGUF_FAMILIES
from utils.errors import ArtifactError, ConfigError, is_int, is_number
from utils.files import InputFile

_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
_UINT32, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9
_U64 = struct.Struct("<Q")
_FREQS = "rope_freqs.weight"

# Many times what any Llama has (the largest header known takes 8 MB, 540,000 array elements and
# 1,200 tensors), so that a hostile header of a big file cannot fill the memory with Python objects.
_HEADER_SIZES = (8 << 20, 32 << 20)
_MAX_ELEMENTS = 1 << 21
_MAX_ENTRIES = 1 << 16
_MAX_NAME = 256
# Smallest entries: key length, one byte of key, type, one byte of value; and
# name length, one byte of name, rank, one extent, type, offset.
_MIN_PAIR, _MIN_TENSOR = 8 + 1 + 4 + 1, 8 + 1 + 4 + 8 + 4 + 8

# Values dequantised at once: 256 KB of float32 stay in the second-level cache, and numpy releases the
# interpreter, so that threads which read different tensors run side by side.
_CHUNK = 1 << 16


def to_config(source: "GGUFFile", tie: bool | None = None) -> ModelConfig:
    """The ModelConfig of an opened file; a tied model's head is left out of the file's tensors.

    Args:
        source: the file.
        tie: as for `models.llama.checkpoint.open_checkpoint`.
    """
    metadata = source.metadata
    tied = "output.weight" not in source.shapes if tie is None else tie
    if tied:
        source.shapes.pop("output.weight", None)
    arch = metadata.get("general.architecture")
    if arch not in GGUF_FAMILIES:
        known = f"expected {', '.join(GGUF_FAMILIES)}"
        raise ConfigError(f"GGUF general.architecture is {arch!r:.80}, {known}")
    if metadata.get(f"{arch}.expert_count", 0):
        raise ConfigError(f"GGUF {arch}.expert_count is not 0: only dense models are supported")
    keys = dict(
        dim="embedding_length",
        n_layers="block_count",
        n_heads="attention.head_count",
        ffn_dim="feed_forward_length",
        norm_eps="attention.layer_norm_rms_epsilon",
        max_seq_len="context_length",
    )
    keys = {ours: f"{arch}.{theirs}" for ours, theirs in keys.items()}
    require(metadata, tuple(keys.values()), "GGUF metadata")
    fields = {ours: metadata[theirs] for ours, theirs in keys.items()}
    heads = fields["n_heads"]
    head_dim = metadata.get(f"{arch}.attention.key_length")
    if head_dim is None:
        head_dim = divide(fields["dim"], heads, keys["dim"], keys["n_heads"])
    for key in (f"{arch}.rope.dimension_count", f"{arch}.attention.value_length"):
        if metadata.get(key, head_dim) != head_dim:
            raise ConfigError(f"GGUF {key}={metadata[key]!r:.80}, expected head_dim={head_dim}")
    vocab = metadata.get(f"{arch}.vocab_size")
    if vocab is None:
        tokens = metadata.get("tokenizer.ggml.tokens")
        vocab = len(tokens) if isinstance(tokens, list) else None
    fields["norm_eps"] = _shortest(fields["norm_eps"])
    return ModelConfig(
        **fields,
        vocab_size=vocab,
        n_kv_heads=metadata.get(f"{arch}.attention.head_count_kv", heads),
        head_dim=head_dim,
        rope_theta=_shortest(metadata.get(f"{arch}.rope.freq_base", 10000.0)),
        rope_scaling=_rope(source, f"{arch}.rope", head_dim),
        tie_embeddings=tied,
        activation="silu",
        # No key says it.
        attention_bias="blk.0.attn_output.bias" in source.shapes,
        mlp_bias="blk.0.ffn_gate.bias" in source.shapes,
        family=arch,
    )


def _shortest(x: Any) -> Any:
    """GGUF stores float32: the shortest decimal is the number that was meant."""
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinity, and is refused
        return float(str(np.float32(x))) if isinstance(x, float) else x


def _rope(source: "GGUFFile", rope: str, head_dim: Any) -> RopeScaling | None:
    """The scaling of a GGUF file, from its keys, which begin with `rope`, or its tensor of factors."""
    metadata = source.metadata
    # llama.cpp: without a type, a factor is linear scaling; 0 means none.
    kind = metadata.get(f"{rope}.scaling.type", "linear")
    factor = metadata.get(f"{rope}.scaling.factor", metadata.get(f"{rope}.scale_linear", 1.0))
    if kind not in ("none", "linear"):
        raise ConfigError(f"GGUF {rope}.scaling.type {kind!r:.80} is not supported (none, linear)")
    linear = kind == "linear" and factor not in (0.0, 1.0)
    if _FREQS not in source.shapes:
        return RopeScaling(kind="linear", factor=_shortest(factor)) if linear else None
    if linear:
        raise ConfigError("GGUF has both rope_freqs.weight and linear RoPE scaling")
    shape = source.shapes[_FREQS]
    if not is_int(head_dim) or shape != (head_dim // 2,):
        raise ConfigError(f"GGUF {_FREQS} is {list(shape)}, head_dim={head_dim!r:.80}")
    factors = source.read(_FREQS)
    if not np.isfinite(factors).all():
        raise ConfigError(f"GGUF {_FREQS} has NaN or infinity")
    if np.all(factors == 1):
        return None
    # llama.cpp's converter writes the factors and drops the rule; Llama 3.1 and 3.2 have this one.
    theta = metadata.get(f"{rope}.freq_base", 10000.0)
    if np.max(factors) > 0 and is_number(theta) and theta > 0:
        guess = llama3_scaling(float(np.max(factors)))
        if np.allclose(llama3_factors(head_dim, theta, guess), factors, rtol=1e-5):
            return guess
    return RopeScaling(kind="factors", factors=tuple(float(f) for f in factors))


@functools.cache
def _dtype(kind: GGMLQuantizationType) -> np.dtype | None:
    """The dtype of the array that a tensor of this type becomes; None: it cannot be dequantised."""
    if kind.name in _FLOATS:
        return DTYPES[_FLOATS[kind.name]]
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return None
    return DTYPES["float32"]


class _Tensor(NamedTuple):
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int  # bytes from the start of the file
    size: int  # bytes


class GGUFFile:
    """An opened GGUF file; safe to read from several threads.

    Attributes:
        metadata: the key-value part as plain Python values, arrays as lists.
        shapes: by tensor name, in numpy's order (the reverse of the file's).
        dtypes: by tensor name, of the array that `read` returns: quantised tensors come as float32.
        description: the path, for messages.
    """

    def __init__(self, file: InputFile, metadata: dict, tensors: dict[str, _Tensor]):
        self.metadata: dict[str, Any] = metadata
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.dtypes = {name: _dtype(tensor.kind) for name, tensor in tensors.items()}
        self.description, self.files = str(file.path), [file.path]
        self._file, self._tensors = file, tensors

    def read(self, name: str) -> np.ndarray:
        """One tensor as a new array of `shapes[name]` and `dtypes[name]`.

        Raises:
            ArtifactError: the file was changed since it was opened, or cannot be read.
            KeyError: no such tensor.
        """
        tensor = self._tensors[name]
        raw = np.empty(tensor.size, np.uint8)
        self._file.read_into(tensor.offset, memoryview(raw))
        if tensor.kind.name in _FLOATS:
            return raw.view(self.dtypes[name]).reshape(tensor.shape)
        values_in_block, bytes_in_block = GGML_QUANT_SIZES[tensor.kind]
        blocks = raw.reshape(-1, bytes_in_block)
        out = np.empty((len(blocks), values_in_block), np.float32)
        step = _CHUNK // values_in_block
        with np.errstate(all="ignore"):  # the check for finite weights reports infinite scales
            for i in range(0, len(blocks), step):
                rows = blocks[i : i + step].reshape(1, -1)
                out[i : i + step] = dequantize(rows, tensor.kind).reshape(-1, values_in_block)
        return out.reshape(tensor.shape)


def open_gguf(path: str | Path) -> GGUFFile:
    """Reads and checks the header of a little-endian GGUF file of version 2 or 3.

    Raises ArtifactError where anything is inconsistent, or gguf cannot dequantise a tensor's type.
    """
    file = InputFile(path)
    for size in _HEADER_SIZES:
        data = file.read(0, min(size, file.size))
        try:
            metadata, tensors = _parse(_Cursor(data, file.size, str(path)))
        except _HeaderIsLonger:
            continue
        return GGUFFile(file, metadata, tensors)
    raise ArtifactError(f"{path}: the header is longer than {_HEADER_SIZES[-1]:,} bytes")


class _HeaderIsLonger(Exception):
    """The header is longer than the bytes that were read, and inside the file."""


class _Cursor:
    """A bounds-checked walk over the first bytes of a file."""

    def __init__(self, data: bytearray, file_size: int, path: str):
        self.data, self.file_size, self.path = data, file_size, path
        self.pos, self.elements = 0, 0

    def fail(self, message: str):
        raise ArtifactError(f"{self.path}: {message}")

    def need(self, size: int, what: str) -> None:
        """The next `size` bytes are there."""
        left = self.file_size - self.pos
        if size > left:
            self.fail(f"{what} takes {size} bytes at byte {self.pos}, but {left} are left")
        if size > len(self.data) - self.pos:
            raise _HeaderIsLonger

    def count(self, what: str, smallest: int, most: int) -> int:
        """A number of entries that take at least `smallest` bytes each."""
        count = self.scalar("Q", what)
        if count > most:
            self.fail(f"{what} is {count}, expected at most {most}")
        if count * smallest > self.file_size - self.pos:
            left = self.file_size - self.pos
            self.fail(f"{what} is {count}, of {smallest} bytes or more each, but {left} are left")
        return count

    def scalar(self, code: str, what: str) -> Any:
        return self.scalars(1, code, what)[0]

    def scalars(self, count: int, code: str, what: str) -> tuple:
        size = count * struct.calcsize("<" + code)
        self.need(size, what)
        values = struct.unpack_from(f"<{count}{code}", self.data, self.pos)
        self.pos += size
        return values

    def strings(self, count: int, what: str) -> list[str]:
        """`count` strings, each a length and UTF-8. The loop is open-coded: it runs 100,000 times."""
        data, pos, end, out = self.data, self.pos, len(self.data), []
        try:
            for _ in range(count):
                start = pos + 8
                stop = start + (_U64.unpack_from(data, pos)[0] if start <= end else 0)
                if stop > end or start > end:
                    self.pos = pos
                    self.need(stop - pos, f"a string of {what}")
                out.append(data[start:stop].decode())
                pos = stop
        except UnicodeDecodeError:
            self.fail(f"a string of {what} at byte {pos} is not UTF-8")
        self.pos = pos
        return out

    def name(self, what: str, taken: dict[str, Any]) -> str:
        """A key or a tensor's name: not empty, not endless, new."""
        (name,) = self.strings(1, what)
        if not 1 <= len(name) <= _MAX_NAME:
            self.fail(f"{what} has {len(name)} characters, expected 1 to {_MAX_NAME}")
        if name in taken:
            self.fail(f"{what} is {name!r} for the second time")
        return name

    def value(self, key: str) -> Any:
        """The type and the value of a key."""
        kind = self.scalar("I", f"the type of {key!r}")
        if key == "general.alignment" and kind != _UINT32:
            self.fail(f"general.alignment has the value type {kind}, expected {_UINT32} (uint32)")
        if kind != _ARRAY:
            return self.values(1, kind, key)[0]
        kind = self.scalar("I", f"the element type of {key!r}")
        if kind == _ARRAY:
            self.fail(f"{key!r} is an array of arrays, which no Llama has")
        smallest = 8 if kind == _STRING else struct.calcsize(_SCALARS.get(kind, "b"))
        count = self.count(f"the length of {key!r}", smallest, _MAX_ELEMENTS)
        self.elements += count
        if self.elements > _MAX_ELEMENTS:
            self.fail(f"arrays up to {key!r} hold more than {_MAX_ELEMENTS} elements")
        return self.values(count, kind, key)

    def values(self, count: int, kind: int, key: str) -> list:
        if kind == _STRING:
            return self.strings(count, repr(key))
        if kind == _BOOL:
            flags = self.scalars(count, "B", repr(key))
            if any(flag > 1 for flag in flags):
                self.fail(f"{key!r} is {max(flags)}, expected a bool (0 or 1)")
            return [flag == 1 for flag in flags]
        if kind not in _SCALARS:
            self.fail(f"{key!r} has the unknown value type {kind}")
        return list(self.scalars(count, _SCALARS[kind], repr(key)))


def _parse(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, _Tensor]]:
    """(metadata, tensors) of a whole header."""
    cursor.need(4, "the magic number")
    if cursor.data[:4] != b"GGUF":
        cursor.fail(f"starts with {bytes(cursor.data[:4])}, expected b'GGUF': not a GGUF file")
    cursor.pos = 4
    version = cursor.scalar("I", "the version")
    if version and version & 0xFFFF == 0:
        cursor.fail("the GGUF file is big-endian; convert it without --bigendian")
    if version not in (2, 3):
        cursor.fail(
            f"GGUF version {version} is not supported, expected 2 or 3; convert the model again"
        )
    n_tensors = cursor.count("the number of tensors", _MIN_TENSOR, _MAX_ENTRIES)
    n_pairs = cursor.count("the number of keys", _MIN_PAIR, _MAX_ENTRIES)
    metadata: dict[str, Any] = {}
    for i in range(n_pairs):
        key = cursor.name(f"key {i}", metadata)
        metadata[key] = cursor.value(key)
    _check_metadata(cursor, metadata)
    tensors: dict[str, _Tensor] = {}
    for i in range(n_tensors):
        name = cursor.name(f"the name of tensor {i}", tensors)
        tensors[name] = _tensor(cursor, name)
    return metadata, _place(cursor, tensors, metadata.get("general.alignment", 32))


def _check_metadata(cursor: _Cursor, metadata: dict[str, Any]) -> None:
    alignment = metadata.get("general.alignment", 32)
    if not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
        cursor.fail(f"general.alignment is {alignment}, expected a power of two from 8 to 65536")
    if metadata.get("split.count", 0) not in (0, 1):
        cursor.fail("is one part of a split model; join them with `llama-gguf-split --merge`")
    lengths = {}
    for key in (f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type")):
        if not isinstance(metadata.get(key, []), list):
            cursor.fail(f"{key} is a {type(metadata[key]).__name__}, expected an array")
        if key in metadata:
            lengths[key] = len(metadata[key])
    if len(set(lengths.values())) > 1:
        sizes = ", ".join(f"{key} has {length}" for key, length in lengths.items())
        cursor.fail(f"arrays that must be equally long are not: {sizes} elements")


def _tensor(cursor: _Cursor, name: str) -> _Tensor:
    """One entry of the tensor list; its offset still counts from the start of the data."""
    rank = cursor.scalar("I", f"the rank of {name!r}")
    if not 1 <= rank <= 4:
        cursor.fail(f"tensor {name!r} has {rank} dimensions, expected 1 to 4")
    extents = cursor.scalars(rank, "Q", f"the shape of {name!r}")
    shape = extents[::-1]
    number = cursor.scalar("I", f"the type of {name!r}")
    offset = cursor.scalar("Q", f"the offset of {name!r}")
    kind = next((known for known in GGMLQuantizationType if known == number), None)
    if kind is None or _dtype(kind) is None:
        what = kind.name if kind else f"number {number}"
        names = ", ".join(known.name for known in GGMLQuantizationType if _dtype(known))
        cursor.fail(f"tensor {name!r} has the unsupported type {what}, expected one of {names}")
    values, size = GGML_QUANT_SIZES[kind]
    for extent in extents:
        if not extent:
            cursor.fail(f"tensor {name!r} has the shape {shape}: an extent of 0")
        size *= extent
    if extents[0] % values:
        cursor.fail(
            f"tensor {name!r}: rows of {extents[0]} are not a multiple of {kind.name}'s {values}"
        )
    return _Tensor(shape, kind, offset, size // values)


def _place(cursor: _Cursor, tensors: dict[str, _Tensor], alignment: int) -> dict[str, _Tensor]:
    """The tensors with offsets from the start of the file, all inside it and apart."""
    start = -(-cursor.pos // alignment) * alignment
    end, before = start, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset % alignment:
            cursor.fail(f"tensor {name!r} is at {tensor.offset}, not a multiple of {alignment}")
        tensor = tensors[name] = tensor._replace(offset=start + tensor.offset)
        if tensor.offset < end:
            cursor.fail(f"tensor {name!r} at byte {tensor.offset} overlaps {before!r}, up to {end}")
        end, before = tensor.offset + tensor.size, name
        if end > cursor.file_size:
            cursor.fail(
                f"tensor {name!r} of shape {tensor.shape} ends at byte {end}, "
                f"but the file has {cursor.file_size}: an unfinished download?"
            )
    return tensors


def load_gguf(path: Path, tie: bool | None) -> tuple[ModelConfig, GGUFFile]:
    """Config and tensors of a file; `tie` as for `models.llama.checkpoint.open_checkpoint`."""
    source = open_gguf(path)
    return to_config(source, tie), source
