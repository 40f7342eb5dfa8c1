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
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import tokenizers
from tokenizers import Regex, decoders, pre_tokenizers, processors

from models.llama.chat.template import structural_words
from utils.errors import ArtifactError, is_int

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
        words: names that are found only where no letter, digit or `_` is beside them.
    """

    codec: Codec
    special_tokens: dict[str, int]
    hidden: frozenset[int]
    config: Mapping[str, Any]
    words: frozenset[str] = frozenset()


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
        try:
            self._tokenizer = self._built(_pipeline(self._steps), self._model(spec["model"]))
        except ArtifactError:
            raise
        except Exception as e:  # the library raises plain Exception for a merge of unknown tokens
            raise ArtifactError(f"the vocabulary is inconsistent: {e!s:.300}") from e

    def _built(
        self, shell: tokenizers.Tokenizer, model: tokenizers.models.BPE
    ) -> tokenizers.Tokenizer:
        shell.model, tokens = model, []
        for t in self._added:
            always = {"single_word": False, "normalized": False} if t.control else {}
            name = self._secret.get(t.id, t.content)
            tokens.append(tokenizers.AddedToken(name, special=t.control, **t.flags | always))
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
        text = "".join(p if isinstance(p, str) else self._secret[p] for p in pieces)
        tokenizer = self._continuing if continues else self._tokenizer
        return tokenizer.encode(text, add_special_tokens=False).ids

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


# tokenizer.json ------------------------------------------------------------------------------


def read_tokenizer_json(spec: Mapping[str, Any], config: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of a `tokenizer.json` that holds a byte-pair encoding.

    Args:
        spec: the file.
        config: see Vocabulary. Words that its chat templates write around messages are control
            tokens.
    """
    model = spec.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    if kind != "BPE":
        raise ArtifactError(f"model type {kind!r:.80}, expected 'BPE'")
    if any(model.get(k) for k in ("continuing_subword_prefix", "end_of_word_suffix")):
        raise ArtifactError("subword prefixes and word suffixes are not supported")
    if not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list):
        raise ArtifactError("model.vocab must be an object and model.merges a list")
    roles = ("bos_token", "eos_token", "pad_token", "unk_token")
    names = {role: token_name(config, role) for role in roles}
    first = _first_special(spec.get("post_processor"))
    names["bos_token"] = first if names["bos_token"] is None else names["bos_token"]
    added = _added_tokens(spec, config, set(names.values()))
    words = (t.content for t in added if not t.control)
    written = structural_words(config, words)
    added = [t._replace(control=t.control or t.content in written) for t in added]
    codec = BPECodec(spec, added)
    special = {t.content: t.id for t in added if t.control}
    hidden = frozenset(t.id for t in added if t.special)
    alone = frozenset(t.content for t in added if t.flags["single_word"])
    if names["pad_token"] not in {None, *special}:
        warnings.warn(f"the pad token {names['pad_token']!r:.40} is not in the vocabulary: unused")
        names["pad_token"] = None
    for role, name in names.items():
        if name is not None and name not in special:
            raise ArtifactError(f"{role} {name!r:.80} is not in the vocabulary")
    if not isinstance(config.get("add_bos_token"), bool):
        names["add_bos_token"] = first is not None
    return Vocabulary(codec, special, hidden, {**config, **names}, alone)


def token_name(config: Mapping[str, Any], key: str) -> str | None:
    """A special token of `tokenizer_config.json`: a string, or an object with its content."""
    value = config.get(key)
    value = value.get("content") if isinstance(value, dict) else value
    if value is not None and not isinstance(value, str):
        raise ArtifactError(f"{key} is {value!r:.80}, expected a string")
    return value or None


def is_pad(name: str) -> bool:
    """Whether a token's name is a pad token's: `<pad>`, `[PAD]`, `<|pad|>`."""
    return re.fullmatch(r"[<\[|]*_*pad_*[|>\]]*", name, re.IGNORECASE) is not None


def looks_like_markup(content: str) -> bool:
    """Whether an added token is a tag, such as `<think>` or `[INST]`, and not a piece of text."""
    return re.fullmatch(r"<\S+>|\[\S+\]|▁<\S+>", content) is not None


def _added_tokens(spec: Mapping, config: Mapping, named: set) -> list[AddedToken]:
    """The added tokens of both files, joined as by transformers.

    A token is special if one of the files says so, or if it has a role; its other settings are
    those of tokenizer_config.json, where it is there. Control tokens are those and tags.
    """
    listed = list(_typed(spec.get("added_tokens"), list, "added_tokens"))
    for token_id, entry in _typed(config.get("added_tokens_decoder"), dict, "added tokens").items():
        if isinstance(entry, dict) and re.fullmatch("[0-9]{1,10}", token_id):
            listed.append(entry | {"id": int(token_id)})
    vocab = spec["model"]["vocab"]
    known = {entry.get("content") for entry in listed if isinstance(entry, dict)}
    listed += [{"id": vocab[n], "content": n} for n in sorted(named & vocab.keys() - known)]
    added: dict[tuple[str, int], AddedToken] = {}
    for entry in listed:
        content = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(content, str) or not content or not is_int(entry.get("id")):
            raise ArtifactError(f"added token {entry!r:.120} has no id or no content")
        key = content, entry["id"]
        special = entry.get("special") is True or content in named
        special = special or (key in added and added[key].special)
        flags = {f: entry.get(f) is True for f in ("lstrip", "rstrip", "single_word", "normalized")}
        added[key] = AddedToken(*key[::-1], special, special or looks_like_markup(content), flags)
    return list(added.values())


def _typed(value: Any, kind: type, what: str) -> Any:
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
    """Normalizers and pre-tokenizers that put no space before a text."""
    if isinstance(steps, list):
        return [_without_prefix(step) for step in steps if step.get("type") != "Prepend"]
    if not isinstance(steps, dict):
        return steps
    if steps.get("type") == "Prepend":
        return None
    never = {"prepend_scheme": "never", "add_prefix_space": False}
    return {key: never.get(key, _without_prefix(value)) for key, value in steps.items()}


def _parts_of(component: Any, key: str) -> list[dict]:
    """The steps of a decoder or post-processor, which may be a sequence."""
    parts = [_typed(component, dict, key)]
    if parts[0].get("type") == "Sequence":
        parts = _typed(parts[0].get(key), list, key)
    return [p for p in parts if isinstance(p, dict) and isinstance(p.get("type"), str)]


def _spelling(decoder: Any) -> tuple[bool, bool]:
    """Whether tokens are in the byte alphabet, and whether decoding strips a first space."""
    parts = {p["type"]: p for p in _parts_of(decoder, "decoders")}
    if list(parts) == ["ByteLevel"]:
        return True, False
    if parts and parts.keys() <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        metaspace = parts.get("Metaspace", {"prepend_scheme": "never"})
        return False, "Strip" in parts or metaspace.get("prepend_scheme") != "never"
    raise ArtifactError(f"decoder {list(parts)!r:.120}; expected ByteLevel, or Llama 2's")


def _first_special(post_processor: Any) -> str | None:
    """The special token that the file's template puts before a text."""
    for part in _parts_of(post_processor, "processors"):
        single = part.get("single")
        if part["type"] == "TemplateProcessing" and isinstance(single, list) and single:
            first = single[0].get("SpecialToken") if isinstance(single[0], dict) else None
            if isinstance(first, dict) and isinstance(first.get("id"), str):
                return first["id"]
    return None


LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level_spec(
    vocab: Mapping[str, int],
    merges: Sequence[str | tuple[str, str]],
    patterns: Sequence[str],
    special: Mapping[str, int],
    plain: Mapping[str, int],
    bos: str | None,
    ignore_merges: bool,
) -> dict[str, Any]:
    """A `tokenizer.json` in GPT-2's byte alphabet.

    Args:
        vocab: token to id.
        merges: pairs of tokens, most urgent first.
        patterns: regular expressions by which a text is split, one after the other.
        special, plain: added tokens, name to id: control tokens, and those that are text.
        bos: the control token that transformers puts before a text.
        ignore_merges: whether a word of the vocabulary is taken whole.
    """
    shell = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=ignore_merges))
    shell.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(p), "isolated") for p in patterns]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    shell.decoder = decoders.ByteLevel()
    if bos is not None:
        shell.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"],
            pair=[bos, "$A", f"{bos}:1", "$B:1"],
            special_tokens=[(bos, special[bos])],
        )
    spec = json.loads(shell.to_str())
    spec["model"] |= {"vocab": vocab, "merges": merges}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec["added_tokens"] = [
        {"id": i, "content": token, "special": token in special} | flags
        for token, i in {**special, **plain}.items()
    ]
    return spec
