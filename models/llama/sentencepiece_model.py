"""The few fields of a sentencepiece model file that we read and write.

A model is a protobuf `ModelProto`; sentencepiece itself has no way to ask for a piece's type, to
change it, or to build a model from a list of pieces (as GGUF files hold it). Field numbers are
those of sentencepiece_model.proto.
"""

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from utils.errors import ArtifactError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Piece(NamedTuple):
    """One token: its spelling, its score, and its type (NORMAL ... BYTE)."""

    text: str
    score: float
    type: int


class SentencePieceModel(NamedTuple):
    """A model: its pieces in the order of their ids, and the rest of the file as it was.

    Attributes:
        pieces: the pieces.
        adds_space: whether a space is put before each text.
        rest: the other fields, encoded.
    """

    pieces: Sequence[Piece]
    adds_space: bool
    rest: bytes


def parse_model(data: bytes) -> SentencePieceModel:
    """Reads a model file. Raises ArtifactError, without a file name, if it is no such file."""
    pieces, rest, adds_space, seen = [], bytearray(), True, set()
    for number, value, start, end in _fields(data):
        if number == 1 and isinstance(value, bytes):
            pieces.append(_parse_piece(value, len(pieces)))
            continue
        rest += data[start:end]
        seen.add(number)
        if number == 3 and isinstance(value, bytes):  # NormalizerSpec.add_dummy_prefix
            adds_space = next((bool(v) for n, v, _, _ in _fields(value) if n == 3), True)
    # They follow the pieces: a file cut between two pieces lacks them.
    if not pieces or not seen >= {2, 3}:
        raise ArtifactError(
            f"not a sentencepiece model, or truncated: {len(pieces)} pieces, "
            "and no TrainerSpec or no NormalizerSpec"
        )
    return SentencePieceModel(pieces, adds_space, bytes(rest))


def serialize_model(model: SentencePieceModel) -> bytes:
    """The bytes of a model, for `SentencePieceProcessor.LoadFromSerializedProto`."""
    out = bytearray()
    for piece in model.pieces:
        text = piece.text.encode()
        body = _bytes_field(1, text) + b"\x15" + struct.pack("<f", piece.score)
        out += _bytes_field(1, body + _varint_field(3, piece.type))
    return bytes(out) + model.rest


def bpe_model(pieces: Sequence[Piece], adds_space: bool) -> SentencePieceModel:
    """A byte-pair model with byte fallback and no normalisation: Llama 2's settings.

    Args:
        pieces: one of them must be UNKNOWN.
        adds_space: whether a space is put before each text.
    """
    unk_id = next((i for i, p in enumerate(pieces) if p.type == UNKNOWN), None)
    if unk_id is None:
        raise ArtifactError("no token is of the type UNKNOWN (2), which sentencepiece needs")
    # TrainerSpec: model_type BPE, byte_fallback, unk_id; bos, eos and pad are the caller's matter.
    trainer = _varint_field(3, 2) + _varint_field(35, int(any(p.type == BYTE for p in pieces)))
    trainer += _varint_field(40, unk_id)
    trainer += b"".join(_varint_field(n, (1 << 64) - 1) for n in (41, 42, 43))
    # NormalizerSpec: add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces.
    normalizer = _bytes_field(1, b"identity") + _varint_field(3, int(adds_space))
    normalizer += _varint_field(4, 0) + _varint_field(5, 1)
    rest = _bytes_field(2, trainer) + _bytes_field(3, normalizer)
    return SentencePieceModel(pieces, adds_space, rest)


def _parse_piece(data: bytes, index: int) -> Piece:
    text, score, kind = None, 0.0, NORMAL
    for number, value, _, _ in _fields(data):
        if number == 1 and isinstance(value, bytes):
            text = value
        elif number == 2 and isinstance(value, float):
            score = value
        elif number == 3 and isinstance(value, int):
            kind = value
    try:
        if text and NORMAL <= kind <= BYTE:
            return Piece(text.decode(), score, kind)
    except UnicodeDecodeError:
        pass
    raise ArtifactError(f"not a sentencepiece model: piece {index} is broken")


def _fields(data: bytes) -> Iterator[tuple[int, int | float | bytes, int, int]]:
    """Yields number, value, and where the field starts and ends, of each field of a message."""
    at = 0
    while at < len(data):
        start = at
        key, at = _varint(data, at)
        wire = key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
        elif wire == _BYTES:
            size, begin = _varint(data, at)
            at = begin + size
            value = data[begin:at]
        elif wire in (_FIXED32, _FIXED64):
            begin, at = at, at + (4 if wire == _FIXED32 else 8)
            raw = data[begin:at]
            value = struct.unpack("<f", raw)[0] if len(raw) == 4 == at - begin else raw
        else:
            raise ArtifactError(f"not a sentencepiece model: field type {wire} at byte {start}")
        if at > len(data) or key >> 3 == 0:
            raise ArtifactError(
                f"not a sentencepiece model, or truncated: the field at byte {start} needs "
                f"{at} bytes, has {len(data)}"
            )
        yield key >> 3, value, start, at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
    raise ArtifactError(f"not a sentencepiece model, or truncated: bad number before byte {at}")


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _varint_field(number: int, value: int) -> bytes:
    return _encode_varint(number << 3 | _VARINT) + _encode_varint(value)


def _bytes_field(number: int, value: bytes) -> bytes:
    return _encode_varint(number << 3 | _BYTES) + _encode_varint(len(value)) + value
