"""Byte-pair encodings. Their canonical form is Hugging Face's `tokenizer.json`, a spec.

A GGUF file's tokenizer is translated into a spec to be loaded and to be exported. Llama 3's ranks
are loaded by tiktoken, as Meta loads them, and translated into a spec to be exported.

A codec never looks for control tokens in text: a control token is encoded only where the caller
puts its id among the pieces. So `<|eot_id|>` typed by a user is plain text for every codec.
"""

import functools
import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import tokenizers

from utils.errors import ArtifactError

# Input of a codec: plain text, or the id of a control token.
Piece = str | int


class Codec(Protocol):
    """Text to ids and ids to bytes.

    Attributes:
        vocab_size: the largest id plus one.
        strips_first_space: whether encoding puts a space before a text that decoding takes away.
    """

    vocab_size: int
    strips_first_space: bool

    def encode(self, pieces: Sequence[Piece], continues: bool = False) -> list[int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...


class Vocabulary(NamedTuple):
    """The contents of a tokenizer's files.

    Attributes:
        codec: text to ids and back.
        special_tokens: control tokens, name to id. A user's text never becomes one of them.
        hidden: ids that no text shows: of tokens that the file marks as special.
        config: the entries of `tokenizer_config.json` for roles, BOS and chat templates, and
            `eos_token_id` (all of them) and `pad_token_id` of `generation_config.json`.
        patterns: regular expressions of names that are not found everywhere in a text.
    """

    codec: Codec
    special_tokens: dict[str, int]
    hidden: frozenset[int]
    config: Mapping[str, Any]
    patterns: Mapping[str, str] = {}


class AddedToken(NamedTuple):
    """A token that is matched whole, before any splitting; a control token only by its id.

    Attributes:
        id, content: its number and its name.
        special: whether the file marks it as special, or gives it a role: it is not shown.
        control: whether it is special, a tag, or structure of a chat template.
        flags: `lstrip`, `rstrip`, `single_word`, `normalized`.
    """

    id: int
    content: str
    special: bool
    control: bool
    flags: dict[str, bool]


class BPECodec:
    """A `tokenizer.json` in the tokenizers library.

    The library finds added tokens in any text. So each control token gets a secret name here: it
    is renamed in the vocabulary, merges that would build it are dropped, and only the secret name
    is matched. Everything else (space stripping, prefix rules, splitting) stays the library's.
    The library's own `encode_special_tokens` is not enough: merges still build control tokens,
    and each piece of a text would have to be encoded by itself, with Llama 2's first space.

    Attributes:
        spaced: control tokens that the library finds only behind a space, which they take in, or
            where the normalizer puts one: Llama 2's older files put it before names of tokens too.
    """

    def __init__(self, spec: Mapping[str, Any], added: Sequence[AddedToken]):
        """Raises ArtifactError, without a file name, if the spec is inconsistent."""
        self._byte_level, self.strips_first_space = _spelling(spec.get("decoder"))
        self._names = _names_by_id(spec["model"]["vocab"], added)
        self._literal = {t.id for t in added}
        self.vocab_size = max(self._names, default=-1) + 1
        nonce = secrets.token_hex(8)
        self._secret = {t.id: f"\ufdd0{nonce}:{t.id}\ufdd1" for t in added if t.control}
        self._steps = {key: spec.get(key) for key in ("normalizer", "pre_tokenizer")}
        self._added = added
        shell = _pipeline(self._steps)
        spaced = shell.normalizer is not None and shell.normalizer.normalize_str("x") == "▁x"
        self.spaced = {t.id for t in added if t.control and t.flags["normalized"] and spaced}
        # There a text continues this token: what is normalized with it gets no space of its own.
        self._before = f"\ufdd0{nonce}:\ufdd1" if spaced else ""
        try:
            self._tokenizer = self._built(shell, self._model(spec["model"]))
        except ArtifactError:
            raise
        except Exception as e:  # the library raises plain Exception for a merge of unknown tokens
            raise ArtifactError(f"the vocabulary is inconsistent: {e!s:.300}") from e
        for i in self._literal:
            shown, secret = self._tokenizer.id_to_token(i), self._secret.get(i, "")
            self._names[i] = shown.replace(secret, self._names[i]) if secret else shown

    def _built(
        self, shell: tokenizers.Tokenizer, model: tokenizers.models.BPE
    ) -> tokenizers.Tokenizer:
        shell.model, tokens = model, []
        for t in self._added:
            always = {"single_word": False, "normalized": t.id in self.spaced} if t.control else {}
            name = self._secret.get(t.id, t.content)
            tokens.append(tokenizers.AddedToken(name, special=t.control, **t.flags | always))
        if self._before:
            tokens.append(tokenizers.AddedToken(self._before, normalized=True))
        shell.add_tokens(tokens)
        return shell

    @functools.cached_property
    def _continuing(self) -> tokenizers.Tokenizer:
        """The tokenizer of what follows a text: no step puts a space before it."""
        return self._built(_pipeline(_without_prefix(self._steps)), self._tokenizer.model)

    def _model(self, model: Mapping[str, Any]) -> tokenizers.models.BPE:
        """The model of the spec, with secret names for control tokens."""
        hidden = {self._names[i]: secret for i, secret in self._secret.items()}
        vocab = {token: i for i, token in (self._names | self._secret).items()}
        merges = merge_pairs(model["merges"])
        if built := hidden.keys() & model["vocab"].keys():
            merges = [(a, b) for a, b in merges if built.isdisjoint((a, b, a + b))]
        names = ("unk_token", "fuse_unk", "byte_fallback", "ignore_merges")
        options = {k: model[k] for k in names if model.get(k) is not None}
        unknown = options.get("unk_token")
        if unknown in hidden:
            # In a byte-level model an unknown byte is dropped, as llama.cpp does: text must not
            # become a control token, and the unknown token is often the end of text.
            options["unk_token"] = None if self._byte_level else hidden[unknown]
        elif unknown is not None and unknown not in vocab:
            raise ArtifactError(f"unk_token {unknown!r:.80} is not in it")
        return tokenizers.models.BPE(vocab=vocab, merges=merges, **options)

    def encode(self, pieces: Sequence[Piece], continues: bool = False) -> list[int]:
        text, starts = self._before * continues, not continues
        for piece in pieces:
            if piece in self.spaced and not (starts or text.endswith((" ", "▁"))):
                text += " "
            text += piece if isinstance(piece, str) else self._secret[piece]
            starts = piece in self._secret and piece not in self.spaced
        tokenizer = self._continuing if continues and not self._before else self._tokenizer
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        return ids[1:] if continues and self._before else ids

    def token_bytes(self, token_id: int) -> bytes:
        # An id that no token has can be sampled where the vocabulary has holes.
        name = self._names.get(token_id, "\N{REPLACEMENT CHARACTER}")
        if not self._byte_level:
            return piece_bytes(name)
        if token_id not in self._literal and all(c in BYTE_OF for c in name):
            return bytes(BYTE_OF[c] for c in name)
        return name.encode()


def piece_bytes(piece: str) -> bytes:
    """The bytes of a token in sentencepiece's spelling: `▁the` is ` the`, `<0x0A>` a newline."""
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where printable, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


BYTE_OF = _byte_alphabet()


def typed(value: Any, kind: type, what: str) -> Any:
    """A value of JSON, empty in place of null. Raises ArtifactError if it is of another type."""
    if value is not None and not isinstance(value, kind):
        raise ArtifactError(f"{what} is {value!r:.80}, expected {kind.__name__}")
    return kind() if value is None else value


def _names_by_id(vocab: Mapping[str, Any], added: Iterable[AddedToken]) -> dict[int, str]:
    """Tokens by id. Raises ArtifactError unless each token has one id and each id one token."""
    largest = (1 << 31) - 1
    if not {type(i) for i in vocab.values()} <= {int}:
        raise ArtifactError("model.vocab: an id is not an integer")
    pairs = [*vocab.items(), *((t.content, t.id) for t in added)]
    ids, names = dict(pairs), {i: name for name, i in pairs}
    for name, i in pairs:
        if ids[name] != i:
            raise ArtifactError(f"token {name!r:.80} has the ids {i} and {ids[name]}")
        if names[i] != name:
            raise ArtifactError(f"tokens {name!r:.80} and {names[i]!r:.80} have the same id {i}")
    if names and not 0 <= min(names) <= max(names) <= largest:
        raise ArtifactError(
            f"token ids run from {min(names)} to {max(names)}, expected 0 to {largest}"
        )
    return names


def merge_pairs(merges: list) -> list[tuple[str, str]]:
    """Merges as pairs. Older files write a merge as two tokens with a space between."""
    pairs = [m.split(" ") if isinstance(m, str) else m for m in merges]
    for index, pair in enumerate(pairs):
        if type(pair) is not list or len(pair) != 2 or not type(pair[0]) is type(pair[1]) is str:
            raise ArtifactError(f"merge {index} is {merges[index]!r:.80}, expected two tokens")
    return [(a, b) for a, b in pairs]


def _pipeline(steps: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The normalizer and the pre-tokenizer alone.

    Truncation and padding of a saved training run must not touch prompts, and BOS is added by us.
    """
    shell = {**steps, "model": {"type": "BPE", "vocab": {}, "merges": []}}
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(shell))
    except Exception as e:  # the library raises plain Exception
        raise ArtifactError(f"unknown normalizer or pre_tokenizer: {e!s:.200}") from e


def _without_prefix(steps: Any) -> Any:
    """Pre-tokenizers that put no space before a text."""
    if isinstance(steps, list):
        return [_without_prefix(step) for step in steps]
    if not isinstance(steps, dict):
        return steps
    never = {"prepend_scheme": "never", "add_prefix_space": False}
    return {key: never.get(key, _without_prefix(value)) for key, value in steps.items()}


def parts_of(component: Any, key: str) -> list[dict]:
    """The steps of a decoder or post-processor, which may be a sequence."""
    parts = [typed(component, dict, key)]
    if parts[0].get("type") == "Sequence":
        parts = typed(parts[0].get(key), list, key)
    return [p for p in parts if isinstance(p, dict) and isinstance(p.get("type"), str)]


def _spelling(decoder: Any) -> tuple[bool, bool]:
    """Whether tokens are in the byte alphabet, and whether decoding strips a first space."""
    parts = {p["type"]: p for p in parts_of(decoder, "decoders")}
    if list(parts) == ["ByteLevel"]:
        return True, False
    if parts and parts.keys() <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        metaspace = parts.get("Metaspace", {"prepend_scheme": "never"})
        return False, "Strip" in parts or metaspace.get("prepend_scheme") != "never"
    raise ArtifactError(f"decoder {list(parts)!r:.120}; expected ByteLevel, or Llama 2's")
