"""Reads the tokenizer in a GGUF file's metadata, splitting text as llama.cpp does."""

import warnings
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import Regex, pre_tokenizers

from models.llama.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    USER_DEFINED,
    Piece,
    bpe_model,
    serialize_model,
)
from models.llama.tokenizer_codecs import AddedToken, BPECodec, BPEParts, SentencePieceCodec
from models.llama.tokenizer_files import LLAMA3_PATTERN, Vocabulary, looks_like_markup
from models.llama.tokenizer_json import chat_templates_of, merge_pairs
from utils.errors import ArtifactError, is_int

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The patterns by which llama.cpp splits a text, one after the other, by the name in the file.
GGUF_PATTERNS = {
    "smollm": (r"\p{N}", _GPT2),
    "gpt-2": (_GPT2,),
    "llama-bpe": (LLAMA3_PATTERN,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}


def read_gguf(metadata: Mapping[str, Any]) -> Vocabulary:
    """The tokenizer in a GGUF file's metadata: GPT-2's kind of BPE, or sentencepiece's."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ArtifactError(f"tokenizer.ggml.model is {kind!r:.80}; expected 'gpt2' or 'llama'")
    tokens = _gguf_array(metadata, "tokens", str)
    types = _gguf_array(metadata, "token_type", int, [NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise ArtifactError(
            f"tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens"
        )
    ids = {}
    for name in ("bos", "eos", "eot", "eom", "padding"):
        i = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if i is not None and not (is_int(i) and 0 <= i < len(tokens)):
            raise ArtifactError(
                f"tokenizer.ggml.{name}_token_id is {i!r:.80} of {len(tokens)} tokens"
            )
        ids[name] = i
    stop_ids = frozenset(ids[k] for k in ("eos", "eot", "eom") if ids[k] is not None)
    control = {
        token: i
        for i, (token, kind_of) in enumerate(zip(tokens, types))
        if kind_of == CONTROL
        or (kind_of == USER_DEFINED and looks_like_markup(token))
        or i in stop_ids
        or i == ids["bos"]
    }
    read = _bpe_codec if kind == "gpt2" else _sentencepiece_codec
    implied_bos = kind == "llama" or metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    return Vocabulary(
        codec=read(metadata, tokens, types, control),
        special_tokens=control,
        bos_id=ids["bos"],
        eos_id=ids["eos"],
        pad_id=ids["padding"],
        stop_ids=stop_ids,
        adds_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", implied_bos)),
        chat_templates=chat_templates_of(metadata.get("tokenizer.chat_template")),
    )


def _gguf_array(metadata: Mapping, name: str, kind: type, default: list | None = None) -> list:
    values = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(values, list) or not values or {type(v) for v in values} != {kind}:
        raise ArtifactError(
            f"tokenizer.ggml.{name} is missing or no array of {kind.__name__}; "
            "pass --tokenizer_path with the tokenizer of the original model"
        )
    return values


def _bpe_codec(
    metadata: Mapping, tokens: list[str], types: list[int], control: Mapping[str, int]
) -> BPECodec:
    pre = metadata.get("tokenizer.ggml.pre")
    if pre is None:
        warnings.warn("the GGUF file names no tokenizer.ggml.pre: using 'default', as llama.cpp")
        pre = "default"
    if not isinstance(pre, str) or pre not in GGUF_PATTERNS:
        raise ArtifactError(
            f"tokenizer.ggml.pre is {pre!r:.80}; known: {', '.join(sorted(GGUF_PATTERNS))}; "
            "pass --tokenizer_path with the tokenizer of the original model"
        )
    vocab = {t: i for i, t in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ArtifactError("tokenizer.ggml.tokens: a token appears twice")
    plain = {t: i for t, i in vocab.items() if types[i] == USER_DEFINED and t not in control}
    added = [AddedToken(i, t, True) for t, i in control.items()]
    pipeline = tokenizers.Tokenizer(tokenizers.models.BPE())
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(p), "isolated") for p in GGUF_PATTERNS[pre]]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return BPECodec(
        BPEParts(
            pipeline=pipeline,
            vocab=vocab,
            merges=merge_pairs(_gguf_array(metadata, "merges", str)),
            added=added + [AddedToken(i, t, False) for t, i in plain.items()],
            options={"ignore_merges": pre == "llama-bpe"},
            byte_level=True,
            strips_first_space=False,
        )
    )


def _sentencepiece_codec(
    metadata: Mapping, tokens: list[str], types: list[int], control: Mapping[str, int]
) -> SentencePieceCodec:
    scores = _gguf_array(metadata, "scores", float)
    if len(scores) != len(tokens):
        raise ArtifactError(
            f"tokenizer.ggml.scores has {len(scores)} entries for {len(tokens)} tokens"
        )
    if not all(NORMAL <= kind <= BYTE for kind in types):
        raise ArtifactError("tokenizer.ggml.token_type: expected types 1 to 6")
    pieces = [
        Piece(t, score, CONTROL if t in control else kind)
        for t, score, kind in zip(tokens, scores, types)
    ]
    adds_space = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    model = serialize_model(bpe_model(pieces, adds_space))
    return SentencePieceCodec(model, control, adds_space)
