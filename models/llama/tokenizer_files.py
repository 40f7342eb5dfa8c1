"""What a reader of a tokenizer file gives, and the readers of the two kinds of `tokenizer.model`."""

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from models.llama.sentencepiece_model import (
    CONTROL,
    USER_DEFINED,
    Piece,
    parse_model,
    serialize_model,
)
from models.llama.tokenizer_codecs import Codec, SentencePieceCodec, TiktokenCodec
from utils.errors import ArtifactError


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What a tokenizer file alone says.

    Attributes:
        codec: text to ids and back.
        special_tokens: control tokens: name to id. Text never becomes one of them.
        bos_id, eos_id, pad_id: None where the file has no such token.
        stop_ids: ids that end an answer.
        adds_bos: whether a prompt starts with BOS.
        chat_templates: jinja sources by name; the usual one is `default`.
    """

    codec: Codec
    special_tokens: Mapping[str, int]
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    stop_ids: frozenset[int] = frozenset()
    adds_bos: bool = False
    chat_templates: Mapping[str, str] = field(default_factory=dict)


# Llama 3, tiktoken ---------------------------------------------------------------------------

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_BASE_TOKENS = 128_000
LLAMA3_STOPS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
LLAMA3_PAD = "<|finetune_right_pad_id|>"
_LLAMA3_NAMED = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
)
LLAMA3_SPECIAL = _LLAMA3_NAMED + tuple(
    f"<|reserved_special_token_{2 + i}|>" for i in range(256 - len(_LLAMA3_NAMED))
)


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
        except (ValueError, binascii.Error) as e:
            raise ArtifactError(f"line {number}: {e}; got {line[:80]!r}") from e
        if not key or key in ranks:
            raise ArtifactError(f"line {number}: token {key!r:.80} is empty or appears twice")
        ranks[key] = int(rank)
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ArtifactError(f"ranks are not 0 to {len(ranks) - 1}, each once")
    if missing := [b for b in range(256) if bytes([b]) not in ranks]:
        raise ArtifactError(f"no token for {len(missing)} of the 256 bytes, first {missing[0]:#x}")
    return ranks


def read_tiktoken(data: bytes) -> Vocabulary:
    """Llama 3's `tokenizer.model`, with the special tokens of Meta's reference."""
    ranks = parse_ranks(data)
    if len(ranks) != LLAMA3_BASE_TOKENS:
        raise ArtifactError(
            f"a tiktoken file with {len(ranks)} tokens; expected Llama 3's {LLAMA3_BASE_TOKENS}: "
            "the file does not hold the special tokens of other models"
        )
    special = {name: LLAMA3_BASE_TOKENS + i for i, name in enumerate(LLAMA3_SPECIAL)}
    return Vocabulary(
        codec=TiktokenCodec(ranks, LLAMA3_PATTERN, special),
        special_tokens=special,
        bos_id=special["<|begin_of_text|>"],
        eos_id=special["<|end_of_text|>"],
        pad_id=special["<|finetune_right_pad_id|>"],
        stop_ids=frozenset(special[name] for name in LLAMA3_STOPS),
        adds_bos=True,
    )


# Llama 1 and 2, sentencepiece ----------------------------------------------------------------


def read_sentencepiece(data: bytes) -> Vocabulary:
    """Llama 1's and 2's `tokenizer.model`."""
    model = parse_model(data)
    pieces = [_control_if_markup(p) for p in model.pieces]
    special = {p.text: i for i, p in enumerate(pieces) if p.type == CONTROL}
    model = model._replace(pieces=pieces)
    codec = SentencePieceCodec(serialize_model(model), special, model.adds_space)
    bos_id, eos_id = special.get("<s>"), special.get("</s>")
    if bos_id is None or eos_id is None:
        raise ArtifactError(f"no control token <s> or </s>; control tokens: {list(special)[:8]}")
    return Vocabulary(
        codec=codec,
        special_tokens=special,
        bos_id=bos_id,
        eos_id=eos_id,
        pad_id=special.get("<pad>"),
        stop_ids=frozenset({eos_id}),
        adds_bos=True,
    )


def _control_if_markup(piece: Piece) -> Piece:
    # sentencepiece finds user-defined pieces in any text, and control pieces in none.
    markup = piece.type == USER_DEFINED and looks_like_markup(piece.text)
    return piece._replace(type=CONTROL) if markup else piece


def looks_like_markup(content: str) -> bool:
    """Whether an added token is a tag, such as `<think>` or `[INST]`, and no piece of text."""
    return re.fullmatch(r"<\S+>|\[\S+\]|▁<\S+>", content) is not None
