"""Three codecs between text and ids, over tokenizers, tiktoken and sentencepiece, with one rule.

A codec never looks for control tokens in text: a control token is encoded only where the caller
puts its id among the pieces. So `<|eot_id|>` typed by a user is plain text for every codec.
"""

import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import sentencepiece
import tiktoken
import tokenizers

from utils.errors import ArtifactError

# What a codec encodes: plain text, or the id of a control token.
Piece = str | int

# The bytes of an id that no token has: it can be sampled where the vocabulary has holes.
NO_TOKEN = "\N{REPLACEMENT CHARACTER}".encode()
# How sentencepiece writes a space, and a byte for which it has no character piece.
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class Codec(Protocol):
    """Text to ids and ids to bytes.

    Attributes:
        vocab_size: the largest id plus one.
        strips_first_space: whether encoding puts a space before a text that decoding takes away.
    """

    vocab_size: int
    strips_first_space: bool

    def encode(self, pieces: Sequence[Piece]) -> list[int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...


class AddedToken(NamedTuple):
    """A token that is matched whole, before any splitting; a control token only by its id."""

    id: int
    content: str
    control: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


class BPEParts(NamedTuple):
    """What a `tokenizer.json` or a GGUF file says about a byte-pair encoding.

    Attributes:
        pipeline: normalizer and pre-tokenizer; its model is replaced.
        vocab: token to id, without the added tokens that the model does not have.
        merges: pairs of tokens, most urgent first.
        added: added tokens.
        options: further arguments of `tokenizers.models.BPE`.
        byte_level: tokens are in GPT-2's byte alphabet; else in sentencepiece's spelling.
        strips_first_space: see Codec.
    """

    pipeline: tokenizers.Tokenizer
    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    added: list[AddedToken]
    options: dict[str, Any]
    byte_level: bool
    strips_first_space: bool


class BPECodec:
    """A byte-pair encoding in the tokenizers library.

    The library finds added tokens in any text. So each control token gets a secret name here: it
    is renamed in the vocabulary, merges that would build it are dropped, and only the secret name
    is matched. Everything else (space stripping, prefix rules, splitting) stays the library's.
    """

    def __init__(self, parts: BPEParts):
        """Raises ArtifactError, without a file name, if the library refuses the parts."""
        nonce = secrets.token_hex(8)
        control = {t.content for t in parts.added if t.control}
        secret = {t.id: f"\ufdd0{nonce}:{t.id}\ufdd1" for t in parts.added if t.control}
        vocab = {secret.get(i, token): i for token, i in parts.vocab.items()}
        vocab |= {secret.get(t.id, t.content): t.id for t in parts.added}
        merges = parts.merges
        if built := control & parts.vocab.keys():
            merges = [(a, b) for a, b in merges if not (a in built or b in built or a + b in built)]
        options = dict(parts.options)
        if "unk_token" in options and options["unk_token"] not in parts.vocab.keys() | control:
            raise ArtifactError(f"unk_token {options['unk_token']!r:.80} is not in the vocabulary")
        if options.get("unk_token") in control:
            # In a byte-level model an unknown byte is dropped, as llama.cpp does: text must not
            # become a control token, and the unknown token is often the end of text.
            unk_id = next(t.id for t in parts.added if t.content == options["unk_token"])
            options["unk_token"] = None if parts.byte_level else secret[unk_id]
        added = [
            tokenizers.AddedToken(
                secret.get(t.id, t.content),
                lstrip=t.lstrip,
                rstrip=t.rstrip,
                single_word=t.single_word and not t.control,
                normalized=t.normalized and not t.control,
                special=t.control,
            )
            for t in parts.added
        ]
        self._tokenizer = parts.pipeline
        try:
            self._tokenizer.model = tokenizers.models.BPE(vocab=vocab, merges=merges, **options)
            self._tokenizer.add_tokens(added)
        except Exception as e:  # the library raises plain Exception for a merge of unknown tokens
            raise ArtifactError(f"the vocabulary is inconsistent: {e!s:.300}") from e
        self._secret = secret
        self._names = {i: token for token, i in parts.vocab.items()}
        self._names |= {t.id: t.content for t in parts.added}
        self._literal = {t.id for t in parts.added}
        self._byte_level = parts.byte_level
        self.vocab_size = max(self._names, default=-1) + 1
        self.strips_first_space = parts.strips_first_space

    def encode(self, pieces: Sequence[Piece]) -> list[int]:
        text = "".join(p if isinstance(p, str) else self._secret[p] for p in pieces)
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def token_bytes(self, token_id: int) -> bytes:
        name = self._names.get(token_id)
        if name is None:
            return NO_TOKEN
        if token_id in self._literal:
            return name.encode()
        if not self._byte_level:
            return piece_bytes(name)
        if all(c in BYTE_OF for c in name):
            return bytes(BYTE_OF[c] for c in name)
        return name.encode()


class TiktokenCodec:
    """Llama 3's ranks in tiktoken, cut as Meta's reference cuts a long text."""

    strips_first_space = False
    # tiktoken's regex engine overflows its stack beyond such a text, and merging one run of
    # letters or spaces takes time that grows faster than its length: Meta's reference cuts there.
    # tokenizer.json has no such cuts, so ids of a run of over 25,000 characters differ from it.
    MAX_TEXT = 400_000
    MAX_RUN = 25_000

    def __init__(self, ranks: Mapping[bytes, int], pattern: str, control: Mapping[str, int]):
        self._encoding = tiktoken.Encoding(
            "llama3", pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens=dict(control)
        )
        self.vocab_size = self._encoding.n_vocab

    def encode(self, pieces: Sequence[Piece]) -> list[int]:
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


class SentencePieceCodec:
    """A sentencepiece model. Each piece of text is encoded by itself, as Meta's reference does."""

    def __init__(self, model: bytes, control: Mapping[str, int], strips_first_space: bool):
        """Raises ArtifactError, without a file name, if sentencepiece refuses the model."""
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(model)
        except RuntimeError as e:
            raise ArtifactError(f"sentencepiece refuses the model: {e!s:.200}") from e
        self._names = {i: name for name, i in control.items()}
        self.vocab_size = self._model.vocab_size()
        self.strips_first_space = strips_first_space

    def encode(self, pieces: Sequence[Piece]) -> list[int]:
        ids: list[int] = []
        for piece in pieces:
            ids += [piece] if isinstance(piece, int) else self._model.encode(piece)
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self._names:
            return self._names[token_id].encode()
        if self._model.is_unknown(token_id):
            return self._model.decode([token_id]).encode()
        return piece_bytes(self._model.id_to_piece(token_id))


def piece_bytes(piece: str) -> bytes:
    """The bytes of a token in sentencepiece's spelling: `▁the` is ` the`, `<0x0A>` a newline."""
    byte = BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE, " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where printable, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


BYTE_OF = _byte_alphabet()
