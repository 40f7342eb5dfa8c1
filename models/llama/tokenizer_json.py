"""Reads the tokenizer of a Hugging Face `tokenizer.json`."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import tokenizers

from models.llama.tokenizer_codecs import AddedToken, BPECodec, BPEParts
from models.llama.tokenizer_files import Vocabulary, looks_like_markup
from utils.errors import ArtifactError, is_int


def read_tokenizer_json(spec: dict, config: dict, templates: Iterable[str] = ()) -> Vocabulary:
    """A Hugging Face `tokenizer.json` that holds a byte-pair encoding.

    Args:
        spec: the file.
        config: `tokenizer_config.json`, or an empty dict.
        templates: the checkpoint's chat templates: what they write are control tokens.
    """
    model = spec.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else model
        raise ArtifactError(f"model type {kind!r:.80}; expected 'BPE'")
    if any(model.get(k) for k in ("continuing_subword_prefix", "end_of_word_suffix")):
        raise ArtifactError("subword prefixes and word suffixes are not supported")
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        raise ArtifactError("model.vocab must be an object and model.merges a list")
    names = {k: token_name(config, k) for k in ("bos_token", "eos_token", "pad_token", "unk_token")}
    added = _added_tokens(spec, config, set(names.values()), "\0".join(templates))
    check_ids(vocab, added)
    byte_level, strips = _spelling(spec.get("decoder"))
    options = ("unk_token", "fuse_unk", "byte_fallback", "ignore_merges")
    codec = BPECodec(
        BPEParts(
            pipeline=_pipeline(spec),
            vocab=vocab,
            merges=merge_pairs(merges),
            added=added,
            options={k: model[k] for k in options if model.get(k) is not None},
            byte_level=byte_level,
            strips_first_space=strips,
        )
    )
    special = {t.content: t.id for t in added if t.control}
    known = vocab | special
    ids = {}
    for key, name in names.items():
        if name is not None and name not in known:
            raise ArtifactError(f"{key} {name!r:.80} is not in the vocabulary")
        ids[key] = known.get(name)
    first = _first_special(spec.get("post_processor"))
    explicit = config.get("add_bos_token")
    return Vocabulary(
        codec=codec,
        special_tokens=special,
        bos_id=ids["bos_token"] if ids["bos_token"] is not None else known.get(first),
        eos_id=ids["eos_token"],
        pad_id=ids["pad_token"],
        stop_ids=frozenset({ids["eos_token"]} - {None}),
        adds_bos=explicit if isinstance(explicit, bool) else first is not None,
    )


def token_name(config: dict, key: str) -> str | None:
    """A special token of `tokenizer_config.json`: a string, or an object with its content."""
    value = config.get(key)
    value = value.get("content") if isinstance(value, dict) else value
    if value is not None and not isinstance(value, str):
        raise ArtifactError(f"{key} is {value!r:.80}, expected a string")
    return value


def chat_templates_of(value: Any) -> dict[str, str]:
    """Templates by name, from a `chat_template` entry: a string, or a list of named ones."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(isinstance(t, dict) for t in value):
        named = [(t.get("name"), t.get("template")) for t in value]
        if all(isinstance(x, str) for pair in named for x in pair):
            return dict(named)
    raise ArtifactError("chat_template is neither a string nor a list of named templates")


def _added_tokens(spec: dict, config: dict, named: set, templates: str) -> list[AddedToken]:
    """The added tokens of both files, and which of them are control tokens.

    Those marked special are, and those with a role. Of the others, tags are and what a chat
    template writes: not a run of spaces, which is text.
    """
    listed = list(_typed(spec.get("added_tokens"), list, "added_tokens"))
    for token_id, entry in _typed(config.get("added_tokens_decoder"), dict, "added tokens").items():
        if isinstance(entry, dict) and re.fullmatch("[0-9]{1,10}", token_id):
            listed.append(entry | {"id": int(token_id)})
    vocab = spec["model"]["vocab"]
    listed += [{"id": vocab[name], "content": name} for name in sorted(named & vocab.keys())]
    added: dict[str, AddedToken] = {}
    for entry in listed:
        content = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(content, str) or not content or not is_int(entry.get("id")):
            raise ArtifactError(f"added token {entry!r:.120} has no id or no content")
        control = entry.get("special") is True or content in named or looks_like_markup(content)
        control = control or (not content.isspace() and content in templates)
        flags = {f: entry.get(f) is True for f in ("lstrip", "rstrip", "single_word", "normalized")}
        token = AddedToken(entry["id"], content, control, **flags)
        if added.setdefault(content, token).id != token.id:
            raise ArtifactError(
                f"added token {content!r:.80} has the ids {added[content].id} and {token.id}"
            )
    return list(added.values())


def _typed(value: Any, kind: type, what: str) -> Any:
    if value is not None and not isinstance(value, kind):
        raise ArtifactError(f"{what} is {value!r:.80}, expected {kind.__name__}")
    return kind() if value is None else value


def check_ids(vocab: Mapping[str, Any], added: Iterable[AddedToken]) -> None:
    """Raises ArtifactError unless each token has one id and each id one token."""
    largest = (1 << 31) - 1
    if not {type(i) for i in vocab.values()} <= {int}:
        raise ArtifactError("model.vocab: an id is no integer")
    names = {i: name for name, i in vocab.items()}
    if len(names) < len(vocab):
        name = next(name for name, i in vocab.items() if names[i] != name)
        raise ArtifactError(f"tokens {name!r:.80} and {names[vocab[name]]!r:.80} have the same id")
    for token in added:
        if vocab.get(token.content, token.id) != token.id:
            raise ArtifactError(
                f"added token {token.content!r:.80} has the id {token.id}, but "
                f"{vocab[token.content]} in model.vocab"
            )
        if names.setdefault(token.id, token.content) != token.content:
            raise ArtifactError(
                f"added token {token.content!r:.80} has the id {token.id} of "
                f"{names[token.id]!r:.80}"
            )
    if names and not 0 <= min(names) <= max(names) <= largest:
        raise ArtifactError(f"token ids run from {min(names)} to {max(names)}, at most {largest}")


def merge_pairs(merges: list) -> list[tuple[str, str]]:
    """Merges as pairs. Older files write a merge as two tokens with a space between."""
    pairs = [m.split(" ") if isinstance(m, str) else m for m in merges]
    for index, pair in enumerate(pairs):
        if type(pair) is not list or len(pair) != 2 or not type(pair[0]) is type(pair[1]) is str:
            raise ArtifactError(f"merge {index} is {merges[index]!r:.80}, expected two tokens")
    return [(a, b) for a, b in pairs]


def _pipeline(spec: dict) -> tokenizers.Tokenizer:
    # Truncation and padding of a saved training run must not touch prompts; BOS is added by us.
    shell = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": spec.get("normalizer"),
        "pre_tokenizer": spec.get("pre_tokenizer"),
        "post_processor": None,
        "decoder": None,
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(shell))
    except Exception as e:  # the library raises plain Exception
        raise ArtifactError(f"unknown normalizer or pre_tokenizer: {e!s:.200}") from e


def _parts_of(component: Any, key: str) -> list[dict]:
    """The steps of a decoder or post-processor: of a sequence all, else itself."""
    component = _typed(component, dict, key)
    parts = (
        _typed(component.get(key), list, key)
        if "Sequence" == component.get("type")
        else [component]
    )
    return [p for p in parts if isinstance(p, dict) and isinstance(p.get("type"), str)]


def _spelling(decoder: Any) -> tuple[bool, bool]:
    """From the decoder: whether tokens are in the byte alphabet, whether a first space goes."""
    parts = {p["type"]: p for p in _parts_of(decoder, "decoders")}
    if list(parts) == ["ByteLevel"]:
        return True, False
    if parts and parts.keys() <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        metaspace = parts.get("Metaspace")
        strips = metaspace is not None and metaspace.get("prepend_scheme") != "never"
        return False, strips or "Strip" in parts
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
