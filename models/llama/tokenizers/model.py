"""`tokenizer.model`: Llama 1's and 2's is for sentencepiece, Llama 3's for tiktoken.

A sentencepiece model, which GGUF files copy, is a protobuf `ModelProto`. sentencepiece cannot give
or change a token's type, nor build a model from a list of tokens, and importing protobuf takes
longer than importing sentencepiece and tokenizers together. So the few fields that matter are read
and written by hand. Field numbers are from sentencepiece_model.proto.
"""

import base64
import functools
import re
import struct
import warnings
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import sentencepiece
import tiktoken

from models.llama.chat.template import structural_words
from models.llama.tokenizers.bpe import BYTE_OF, Piece, Vocabulary, piece_bytes
from models.llama.tokenizers.spec import LLAMA3_PATTERN, byte_level_spec, is_pad
from models.llama.tokenizers.spec import looks_like_markup, token_name
from utils.errors import ArtifactError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_VARINT, _BYTES, _FIXED32 = 0, 2, 5


class Entry(NamedTuple):
    """One token of a model: its spelling, its score, and its type (NORMAL ... BYTE)."""

    text: str
    score: float
    type: int


class SentencePieceModel(NamedTuple):
    """A sentencepiece model file.

    Attributes:
        entries: the tokens, in the order of their ids.
        adds_space: whether a space is put before each text.
        rest: the other fields of the file, number and value.
    """

    entries: Sequence[Entry]
    adds_space: bool
    rest: Sequence[tuple[int, int | float | bytes]]


class SentencePieceCodec:
    """A sentencepiece model. Each piece of text is encoded by itself, as Meta's reference does."""

    def __init__(self, model: SentencePieceModel, closed: Container[int] = ()):
        """Raises ArtifactError, without a file name, if sentencepiece refuses the model.

        sentencepiece finds user-defined tokens in any text; `closed` are ids of those that it must
        find in none, as control tokens.
        """
        self._model, self._closed = model, closed
        self._processor = self._processor_of(model.rest)
        self.vocab_size = len(model.entries)
        self.strips_first_space = model.adds_space

    def _processor_of(self, rest: Sequence[tuple]) -> sentencepiece.SentencePieceProcessor:
        entries = [
            e._replace(type=CONTROL) if i in self._closed else e
            for i, e in enumerate(self._model.entries)
        ]
        processor = sentencepiece.SentencePieceProcessor()
        try:
            model = self._model._replace(entries=entries, rest=rest)
            processor.LoadFromSerializedProto(serialize_model(model))
        except RuntimeError as e:
            raise ArtifactError(f"sentencepiece refuses the model: {e!s:.200}") from e
        return processor

    @functools.cached_property
    def _continuing(self) -> sentencepiece.SentencePieceProcessor:
        """The processor of what follows a text: without add_dummy_prefix."""
        normalizer = dict(_fields(dict(self._model.rest)[3])) | {3: 0}
        rest = [(n, value) for n, value in self._model.rest if n != 3]
        return self._processor_of([*rest, (3, message(normalizer.items()))])

    def encode(self, pieces: Sequence[Piece], continues: bool = False) -> list[int]:
        ids: list[int] = []
        for piece in pieces:
            if isinstance(piece, str):
                ids += (self._continuing if continues else self._processor).encode(piece)
                continues = True
                continue
            is_text = piece in self._closed  # to sentencepiece
            if is_text and not continues and self.strips_first_space:
                ids += self._continuing.encode(" ")
            ids.append(piece)
            continues = is_text
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        entry = self._model.entries[token_id]
        if entry.type == UNKNOWN:
            return self._processor.decode([token_id]).encode()
        return entry.text.encode() if entry.type == CONTROL else piece_bytes(entry.text)


def read_sentencepiece(
    model: SentencePieceModel, config: Mapping[str, Any], added: Mapping[str, Any] = {}
) -> Vocabulary:
    """The vocabulary of a sentencepiece model.

    Args:
        model: the file's content.
        config: see Vocabulary. Roles of tokens that are not control tokens are ignored.
        added: names of tokens that other files add, and ids. The model has to hold them all, and
            those of the config, but for a pad token, which nothing needs.
    """
    listed = config.get("added_tokens_decoder") or {}
    named = [(i, name) for name, i in added.items()]
    named += [(i, e.get("content") if isinstance(e, dict) else e) for i, e in listed.items()]
    missing = [n for i, n in named if str(i).isdecimal() and int(i) >= len(model.entries)]
    if missing and all(isinstance(name, str) and is_pad(name) for name in missing):
        warnings.warn(f"tokenizer.model does not hold the pad token {missing[0]!r:.40}: unused")
    elif missing:
        raise ArtifactError(
            "tokenizer_config.json or added_tokens.json adds tokens that tokenizer.model does "
            "not hold; save a tokenizer.json with transformers, beside it"
        )
    hidden = {e.text: i for i, e in enumerate(model.entries) if e.type == CONTROL}
    defined = {e.text: i for i, e in enumerate(model.entries) if e.type == USER_DEFINED}
    written = structural_words(config, defined)
    closed = {t: i for t, i in defined.items() if looks_like_markup(t) or t in written}
    special = hidden | closed
    roles: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    roles |= {role: name for role in roles if (name := token_name(config, role)) in special}
    if not isinstance(config.get("add_bos_token"), bool):
        roles["add_bos_token"] = True
    codec = SentencePieceCodec(model, frozenset(closed.values()))
    return Vocabulary(codec, special, frozenset(hidden.values()), {**config, **roles})


# Llama 3, tiktoken ---------------------------------------------------------------------------

_BASE_TOKENS = 128_000
_BOS = "<|begin_of_text|>"
LLAMA3_STOPS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
LLAMA3_PAD = "<|finetune_right_pad_id|>"
_NAMED = (
    "begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 "
    "finetune_right_pad_id step_id start_header_id end_header_id eom_id eot_id python_tag image"
).split()
_NAMED += [f"reserved_special_token_{2 + i}" for i in range(256 - len(_NAMED))]
LLAMA3_SPECIAL = {f"<|{name}|>": _BASE_TOKENS + i for i, name in enumerate(_NAMED)}


class TiktokenCodec:
    """Llama 3's ranks in tiktoken, cut as Meta's reference cuts a long text."""

    strips_first_space = False
    # tiktoken's regex engine overflows its stack on longer texts, and merging one run of letters
    # or spaces takes more than linear time: Meta's reference cuts there. tokenizer.json has no
    # cuts, so ids of a run of over 25,000 characters differ from it.
    MAX_TEXT = 400_000
    MAX_RUN = 25_000

    def __init__(self, ranks: dict[bytes, int], special: dict[str, int]):
        self._encoding = tiktoken.Encoding(
            "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=special
        )
        self.vocab_size = self._encoding.n_vocab

    def encode(self, pieces: Sequence[Piece], continues: bool = False) -> list[int]:
        ids: list[int] = []
        for piece in pieces:
            if isinstance(piece, int):
                ids.append(piece)
                continue
            for part in self._cut(piece):
                ids += self._encoding.encode_ordinary(part)
        return ids

    def _cut(self, text: str) -> Iterator[str]:
        for start in range(0, len(text), self.MAX_TEXT):
            chunk = text[start : start + self.MAX_TEXT]
            begin = 0
            if len(chunk) > self.MAX_RUN:
                for run in re.finditer(r"\s+|\S+", chunk):
                    for cut in range(run.start() + self.MAX_RUN, run.end(), self.MAX_RUN):
                        yield chunk[begin:cut]
                        begin = cut
            yield chunk[begin:]

    def token_bytes(self, token_id: int) -> bytes:
        return self._encoding.decode_single_token_bytes(token_id)


def parse_ranks(data: bytes) -> dict[bytes, int]:
    """The ranks of a tiktoken file: on each line a token in base64, a space, and its rank.

    Raises:
        ArtifactError: a bad line (its number is named), a duplicate or missing rank, a duplicate
            token, or no token for one of the 256 bytes.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), 1):
        token, _, rank = line.partition(b" ")
        try:
            # isdigit() takes ASCII digits only, and so no sign, space, CR or third field.
            if not token or not rank.isdigit() or len(rank) > 9:
                raise ValueError("expected a base64 token, a space and a rank")
            key = base64.b64decode(token, validate=True)
        except ValueError as e:
            raise ArtifactError(f"line {number}: {e}; got {line[:80]!r}") from e
        if not key or key in ranks:
            raise ArtifactError(f"line {number}: token {key!r:.80} is empty or appears twice")
        ranks[key] = int(rank)
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ArtifactError(f"ranks are not 0 to {len(ranks) - 1}, each once")
    if missing := [b for b in range(256) if bytes([b]) not in ranks]:
        raise ArtifactError(f"no token for {len(missing)} of the 256 bytes, first {missing[0]:#x}")
    return ranks


def read_tiktoken(data: bytes, config: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of Llama 3's `tokenizer.model`, whose roles are those of Meta's reference."""
    ranks = parse_ranks(data)
    if len(ranks) != _BASE_TOKENS:
        raise ArtifactError(
            f"a tiktoken file with {len(ranks)} tokens; expected Llama 3's {_BASE_TOKENS}: "
            "the file does not hold the special tokens of other models"
        )
    roles = {"bos_token": _BOS, "eos_token": "<|end_of_text|>", "add_bos_token": True}
    hidden = frozenset(LLAMA3_SPECIAL.values())
    codec = TiktokenCodec(ranks, LLAMA3_SPECIAL)
    return Vocabulary(codec, LLAMA3_SPECIAL, hidden, {**config, **roles})


def ranks_spec(ranks: Mapping[bytes, int]) -> dict[str, Any]:
    """The `tokenizer.json` of Llama 3's ranks."""
    letter = {b: c for c, b in BYTE_OF.items()}
    spelling = {token: "".join(letter[b] for b in token) for token in ranks}
    # Llama 3's tokenizer.json has each way to build a token as a merge: tiktoken needs none.
    cuts = ((token[:n], token[n:]) for token in ranks for n in range(1, len(token)))
    merges = [(a, b) for a, b in cuts if a in ranks and b in ranks]
    merges.sort(key=lambda ab: (ranks[ab[0] + ab[1]], ranks[ab[0]], ranks[ab[1]]))
    vocab = {spelling[token]: rank for token, rank in ranks.items()}
    pairs = [(spelling[a], spelling[b]) for a, b in merges]
    return byte_level_spec(vocab, pairs, (LLAMA3_PATTERN,), LLAMA3_SPECIAL, {}, _BOS, True)


# sentencepiece's protobuf --------------------------------------------------------------------


def parse_model(data: bytes) -> SentencePieceModel:
    """Reads a sentencepiece model. Raises ArtifactError, without a file name, if it is not one."""
    entries, rest = [], []
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            entries.append(_parse_entry(value, len(entries)))
        else:
            rest.append((number, value))
    specs = {number: value for number, value in rest if isinstance(value, bytes)}
    # TrainerSpec and NormalizerSpec follow the tokens: a file cut between two tokens lacks them.
    if not entries or not specs.keys() >= {2, 3}:
        raise ArtifactError(
            f"not a sentencepiece model, or truncated: {len(entries)} tokens, "
            "and no TrainerSpec or no NormalizerSpec"
        )
    adds_space = bool(dict(_fields(specs[3])).get(3, True))  # add_dummy_prefix
    return SentencePieceModel(entries, adds_space, rest)


def serialize_model(model: SentencePieceModel) -> bytes:
    """The bytes of a model, for `SentencePieceProcessor.LoadFromSerializedProto`."""
    entries = [
        (1, message(((1, e.text.encode()), (2, e.score), (3, e.type)))) for e in model.entries
    ]
    return message([*entries, *model.rest])


def _parse_entry(data: bytes, index: int) -> Entry:
    fields = {1: b"", 2: 0.0, 3: NORMAL, **dict(_fields(data))}
    text, score, kind = fields[1], fields[2], fields[3]
    try:
        right = (type(text), type(score), type(kind)) == (bytes, float, int)
        if right and text and NORMAL <= kind <= BYTE:
            return Entry(text.decode(), score, kind)
    except UnicodeDecodeError:
        pass
    raise ArtifactError(f"not a sentencepiece model: token {index} is broken")


def _fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """Yields number and value of each field of a message: varint, fixed32 as float, or bytes."""
    at = 0
    while at < len(data):
        start = at
        key, at = _varint(data, at)
        wire = key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
        elif wire in (_BYTES, _FIXED32):
            size, begin = _varint(data, at) if wire == _BYTES else (4, at)
            at = begin + size
            value = data[begin:at]
        else:
            raise ArtifactError(f"not a sentencepiece model: field type {wire} at byte {start}")
        if at > len(data) or key >> 3 == 0:
            raise ArtifactError(
                f"not a sentencepiece model, or truncated: the field at byte {start} needs "
                f"{at} bytes, has {len(data)}"
            )
        yield key >> 3, struct.unpack("<f", value)[0] if wire == _FIXED32 else value


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


def message(fields: Iterable[tuple[int, int | float | bytes]]) -> bytes:
    """The message of fields as `_fields` yields them."""
    out = bytearray()
    for number, value in fields:
        if isinstance(value, bytes):
            out += _encode_varint(number << 3 | _BYTES) + _encode_varint(len(value)) + value
        elif isinstance(value, float):
            out += _encode_varint(number << 3 | _FIXED32) + struct.pack("<f", value)
        else:
            out += _encode_varint(number << 3 | _VARINT) + _encode_varint(value)
    return bytes(out)


def _encode_varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
