"""`tokenizer.json`, read with the entries of `tokenizer_config.json`, and written."""

import json
import re
import warnings
from collections.abc import Container, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, pre_tokenizers, processors

from models.llama.chat.template import structural_words
from models.llama.tokenizers.bpe import AddedToken, BPECodec, Vocabulary, parts_of, typed
from utils.errors import ArtifactError, is_int


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
    if names["pad_token"] not in {None, *special}:
        warnings.warn(f"the pad token {names['pad_token']!r:.40} is not in the vocabulary: unused")
        names["pad_token"] = None
    for role, name in names.items():
        if name is not None and name not in special:
            raise ArtifactError(f"{role} {name!r:.80} is not in the vocabulary")
    if not isinstance(config.get("add_bos_token"), bool):
        names["add_bos_token"] = first is not None
    return Vocabulary(codec, special, hidden, {**config, **names}, _patterns(added, codec.spaced))


def _patterns(added: Sequence[AddedToken], spaced: Container[int]) -> dict[str, str]:
    """Regular expressions of names that the library does not find everywhere in a text."""
    splits = [re.escape(t.content) for t in added if not t.flags["normalized"]]
    found = {}
    for t in added:
        name = re.escape(t.content)
        before, after = (r"(?<!\w)", r"(?!\w)") if t.flags["single_word"] else ("", "")
        if t.id in spaced:  # behind a space, or at the start of what is normalized by itself
            behind = "|".join(f"(?<={b}{name})" for b in [f"{before}[ ▁]", *splits])
            found[t.content] = rf"(?:\A{name}|{name}(?:{behind})){after}"
        elif before:
            found[t.content] = f"{before}{name}{after}"
    return found


def token_name(config: Mapping[str, Any], key: str) -> str | None:
    """A special token of `tokenizer_config.json`: a string, or an object with its content."""
    value = config.get(key)
    value = value.get("content") if isinstance(value, dict) else value
    if value is not None and not isinstance(value, str):
        raise ArtifactError(f"{key} is {value!r:.80}, expected a string")
    return value or None


def is_pad(name: str) -> bool:
    """Whether a token's name is a pad token's: `<pad>`, `[PAD]`, `<|pad|>`."""
    return re.fullmatch(r"[<\[|]*_*pad_*[|>\]]*", name.strip(), re.IGNORECASE) is not None


def looks_like_markup(content: str) -> bool:
    """Whether an added token is a tag, such as `<think>` or `[INST]`, and not a piece of text."""
    return re.fullmatch(r"<\S+>|\[\S+\]|▁<\S+>", content) is not None


def _added_tokens(spec: Mapping, config: Mapping, named: set) -> list[AddedToken]:
    """The added tokens of both files, joined as by transformers.

    A token is special if one of the files says so, or if it has a role; its other settings are
    those of tokenizer_config.json, where it is there. Control tokens are those and tags.
    """
    listed = list(typed(spec.get("added_tokens"), list, "added_tokens"))
    for token_id, entry in typed(config.get("added_tokens_decoder"), dict, "added tokens").items():
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


def _first_special(post_processor: Any) -> str | None:
    """The special token that the file's template puts before a text."""
    for part in parts_of(post_processor, "processors"):
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
