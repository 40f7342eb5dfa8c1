"""A GGUF file's tokenizer, as a `tokenizer.json` or as a sentencepiece model."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from models.llama.tokenizers.bpe import Vocabulary
from models.llama.tokenizers.model import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from models.llama.tokenizers.model import Entry, SentencePieceModel, message
from models.llama.tokenizers.model import read_sentencepiece
from models.llama.tokenizers.spec import LLAMA3_PATTERN, byte_level_spec, read_tokenizer_json
from utils.errors import ArtifactError, is_int

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
# Names of Llama 3's pattern, and Mistral's, with which a word of the vocabulary is taken whole, and BOS
# comes first.
_LLAMA3 = "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano".split()
_WHOLE_WORDS = [*_LLAMA3, "tekken"]
# Mistral's, as llama.cpp writes it: capitals then small letters, and letters without case in both.
_CAPITALS, _SMALL = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}*{_SMALL}+|[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}+{_SMALL}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The patterns by which llama.cpp splits a text, one after the other, by the name in the file.
GGUF_PATTERNS = {
    "default": _DEFAULT,
    **dict.fromkeys(
        "smollm starcoder refact command-r codeshell exaone minerva-7b".split(), (r"\p{N}", _GPT2)
    ),
    **dict.fromkeys(
        "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert "
        "jina-v1-en jina-v2-code roberta-bpe exaone4 mpt olmo jais trillion".split(),
        (_GPT2,),
    ),
    **dict.fromkeys([*_LLAMA3, "smaug-bpe", "dbrx"], (LLAMA3_PATTERN,)),
    "tekken": (_TEKKEN,),
    # Llama 3's, a digit at a time.
    **dict.fromkeys(
        "qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 megrez hunyuan solar-open".split(),
        (LLAMA3_PATTERN.replace("{1,3}", ""),),
    ),
}
# Tokens at which llama.cpp stops, whatever the metadata says: ends of turns and texts, and of files.
TURN_ENDS = (
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> "
    "<|endoftext|> </s> <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> "
    "<eos> <turn|> <|tool_response> <｜end▁of▁sentence｜> [e~["
).split()
_FILE_ENDS = (
    "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO> "
    "<reponame> <|file_sep|>"
).split()
# Roles in the metadata at whose tokens llama.cpp stops.
_STOPPING = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")


def read_gguf(metadata: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary in a GGUF file's metadata: a byte-level BPE, or a sentencepiece model."""
    form, config = gguf_form(metadata)
    read = read_tokenizer_json if isinstance(form, dict) else read_sentencepiece
    return read(form, {"chat_template": config["chat_template"]})._replace(config=config)


def gguf_form(metadata: Mapping[str, Any]) -> tuple[dict | SentencePieceModel, dict[str, Any]]:
    """A GGUF file's tokenizer as a `tokenizer.json` or a sentencepiece model, and its config."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ArtifactError(f"tokenizer.ggml.model is {kind!r:.80}; expected 'gpt2' or 'llama'")
    tokens = gguf_array(metadata, "tokens", str)
    types = gguf_array(metadata, "token_type", int, [NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise ArtifactError(
            f"tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens"
        )
    ids = {}
    for name in ("bos", "padding", *_STOPPING):
        i = ids[name] = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if i is not None and not (is_int(i) and 0 <= i < len(tokens)):
            raise ArtifactError(
                f"tokenizer.ggml.{name}_token_id is {i!r:.80} of {len(tokens)} tokens"
            )
    bos, eos = (None if ids[role] is None else tokens[ids[role]] for role in ("bos", "eos"))
    stop_ids = {ids[name] for name in _STOPPING} - {None} | _ends(tokens)
    special, plain = {}, {}
    for i, (token, t) in enumerate(zip(tokens, types)):
        if i in stop_ids or i == ids["bos"] or t == CONTROL:
            special[token] = i
        elif t == USER_DEFINED:
            plain[token] = i
    implied = kind == "llama" or metadata.get("tokenizer.ggml.pre") in _WHOLE_WORDS
    adds_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", implied))
    config = {"bos_token": bos, "eos_token": eos, "add_bos_token": adds_bos}
    config |= {"eos_token_id": sorted(stop_ids), "pad_token_id": ids["padding"]}
    config["chat_template"] = metadata.get("tokenizer.chat_template")
    if kind == "llama":
        return gguf_model(metadata, types, special), config
    return gguf_spec(metadata, special, plain, bos if adds_bos else None), config


def _ends(tokens: Sequence[str]) -> set[int]:
    """Ids of tokens at which llama.cpp stops for their names."""
    found = {name: i for i, name in enumerate(tokens) if name in {*TURN_ENDS, *_FILE_ENDS}}
    if found.keys() & {"<|call|>", "<|calls|>"} and found.keys() & {"<|return|>", "<|flush|>"}:
        found.pop("<|end|>", None)  # there it ends a message within a turn
    return set(found.values())


def gguf_model(
    metadata: Mapping[str, Any], types: Sequence[int], special: Mapping[str, int]
) -> SentencePieceModel:
    """The sentencepiece model in a GGUF file: byte pairs, not normalized, as Llama 2's.

    Args:
        metadata: of the GGUF file.
        types: the type of each token.
        special: the control tokens, whatever their type.
    """
    tokens, scores = gguf_array(metadata, "tokens", str), gguf_array(metadata, "scores", float)
    if len(scores) != len(tokens):
        raise ArtifactError(
            f"tokenizer.ggml.scores has {len(scores)} entries for {len(tokens)} tokens"
        )
    if not all(NORMAL <= kind <= BYTE for kind in types):
        raise ArtifactError("tokenizer.ggml.token_type: expected types 1 to 6")
    entries = [
        Entry(text, score, CONTROL if text in special else kind)
        for text, score, kind in zip(tokens, scores, types)
    ]
    unk_id = next((i for i, e in enumerate(entries) if e.type == UNKNOWN), None)
    if unk_id is None:
        raise ArtifactError("no token is of the type UNKNOWN (2), which sentencepiece needs")
    adds_space = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    # model_type BPE, byte_fallback, unk_id; bos, eos and pad are the caller's matter.
    trainer = {3: 2, 35: int(any(e.type == BYTE for e in entries)), 40: unk_id}
    trainer |= dict.fromkeys((41, 42, 43), -1)
    # name, add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces.
    normalizer = {1: b"identity", 3: int(adds_space), 4: 0, 5: 1}
    rest = [(2, message(trainer.items())), (3, message(normalizer.items()))]
    return SentencePieceModel(entries, adds_space, rest)


def gguf_spec(
    metadata: Mapping[str, Any],
    special: Mapping[str, int],
    plain: Mapping[str, int],
    bos: str | None,
) -> dict[str, Any]:
    """The `tokenizer.json` of a GGUF file's byte-pair encoding; see byte_level_spec."""
    pre = metadata.get("tokenizer.ggml.pre")
    if pre is None:
        warnings.warn("the GGUF file names no tokenizer.ggml.pre: using 'default', as llama.cpp")
        pre = "default"
    if not isinstance(pre, str) or pre not in GGUF_PATTERNS:
        raise ArtifactError(
            f"tokenizer.ggml.pre is {pre!r:.80}; known: {', '.join(sorted(GGUF_PATTERNS))}; "
            "pass --tokenizer_path with the tokenizer of the original model"
        )
    tokens = gguf_array(metadata, "tokens", str)
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ArtifactError("tokenizer.ggml.tokens: a token appears twice")
    merges = gguf_array(metadata, "merges", str)
    whole_words = pre in _WHOLE_WORDS
    return byte_level_spec(vocab, merges, GGUF_PATTERNS[pre], special, plain, bos, whole_words)


def gguf_array(metadata: Mapping, name: str, kind: type, default: list | None = None) -> list:
    """An array of the tokenizer in a GGUF file. Raises ArtifactError for entries of other types."""
    values = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(values, list) or not values or {type(v) for v in values} != {kind}:
        raise ArtifactError(
            f"tokenizer.ggml.{name} is missing or not an array of {kind.__name__}; "
            "pass --tokenizer_path with the tokenizer of the original model"
        )
    return values
