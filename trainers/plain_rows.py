"""Rows of plain text as token ids, and the names of control tokens in a row's text."""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from models.llama.tokenizer import Tokenizer
from models.llama.tokenizers.bpe import Piece
from trainers.records import KINDS, Record


def encode_plain(
    prompt: str, text: str, tokenizer: Tokenizer, markup: bool
) -> tuple[list[int], list[int]]:
    """Ids of a prompt, with BOS where the model has one, and of the text that continues it, with EOS.

    Args:
        prompt: a user's, or empty.
        text: what the model is to write: its tags become tokens.
        tokenizer: the model's.
        markup: whether names of control tokens in both become those tokens. BOS and EOS are added
            where the text has none of its own.
    """
    before: list[Piece] = tokenizer.split_special(prompt) if markup else [prompt]
    after = (tokenizer.split_special if markup else tokenizer.split_tags)(text, prompt)
    start = tokenizer.encode("", bos=tokenizer.adds_bos)
    end = tokenizer.encode("", eos=True)
    written = [piece for piece in after if not isinstance(piece, str) or piece.strip()]
    has_bos = start and [*before, *after][:1] == start
    has_eos = written and written[-1] in tokenizer.stop_ids
    continues = bool(prompt) and isinstance(before[-1], str)
    ids = tokenizer.encode_pieces(after, continues) + ([] if has_eos else end)
    return ([] if has_bos else start) + tokenizer.encode_pieces(before), ids


def is_plain(record: Record) -> bool:
    """Whether a row is plain text, which needs no chat format."""
    key = {"text": "text", "completion": "completion"}.get(record.kind)
    return isinstance(record.fields.get(key), str)


def holds_control_names(record: Record, tokenizer: Tokenizer, markup: bool) -> bool:
    """Whether a row's text holds the name of a special token that it does not become."""
    if markup and is_plain(record):
        return False
    fields = [record.fields[name] for name in KINDS[record.kind]]
    return any(tokenizer.control_names(text) for text in _texts(fields))


def warn_of_control_names(path: Any, rows: int) -> None:
    """Warns of rows whose text holds names of control tokens."""
    if rows:
        warnings.warn(
            f"{path}: {rows:,} rows hold names of control tokens, which are learnt as plain text; "
            "if you trust the file, --markup makes tokens of them in rows of plain text",
            stacklevel=3,
        )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(part)
