"""Writes a tokenizer as the files that transformers, and `load_tokenizer`, read in a folder.

Files of Hugging Face's and Meta's kind are copied. A GGUF file's tokenizer is written anew, and so
is what transformers misses beside Meta's bare `tokenizer.model`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, pre_tokenizers, processors

from models.llama.formats.gguf import open_gguf
from models.llama.sentencepiece_model import (
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    Piece,
    bpe_model,
    parse_model,
    serialize_model,
)
from models.llama.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from models.llama.tokenizer_codecs import BYTE_OF
from models.llama.tokenizer_files import LLAMA3_PATTERN, parse_ranks
from models.llama.tokenizer_gguf import GGUF_PATTERNS
from models.llama.tokenizer_json import merge_pairs
from utils.errors import ArtifactError
from utils.files import InputFile, member_path, read_json

_CONFIG = "tokenizer_config.json"
_GENERATION = "generation_config.json"
_COMPANIONS = (
    _CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
# All but the pad token: a GGUF file may give that role to a token of text, and to name it in
# tokenizer_config.json would make a control token of it. Nothing is ever decided by it.
_KEPT = ("vocab_size", "special_tokens", "bos_id", "eos_id", "stop_ids", "adds_bos")
_KEPT += ("chat_templates", "strips_first_space")
# transformers 4 would otherwise take the space before a full stop away in decoding.
_COMMON = {"add_eos_token": False, "clean_up_tokenization_spaces": False}


def write_tokenizer(source: str | Path, folder: str | Path) -> Tokenizer:
    """Writes the files of a tokenizer into a folder.

    Args:
        source: what load_tokenizer takes: a tokenizer file, a GGUF file or a checkpoint folder.
        folder: an existing folder that holds no tokenizer yet.

    Returns:
        The tokenizer of `source`; the one that load_tokenizer finds in `folder` encodes, decodes
        and stops as it does.

    Raises:
        ArtifactError: as load_tokenizer; or such files cannot say what `source` says.
        OSError: the folder cannot be written.
    """
    source, folder = Path(source), Path(folder)
    tokenizer = load_tokenizer(source)
    file = find_tokenizer(source) if source.is_dir() else source
    data = InputFile(file)
    if data.read(0, min(data.size, 4)) == b"GGUF":
        files = _from_gguf(tokenizer, open_gguf(file).metadata)
        generation = None
    else:
        files = _copies(source, file)
        files = _beside_metas_model(tokenizer, files) | files
        generation = _companion(source, _GENERATION)
    files[_GENERATION] = _generation_config(tokenizer, generation)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    again = load_tokenizer(folder)
    if differ := [name for name in _KEPT if getattr(again, name) != getattr(tokenizer, name)]:
        raise ArtifactError(
            f"{file}: Hugging Face's files cannot say this tokenizer's {', '.join(differ)}; "
            "pass the tokenizer of the original model"
        )
    return tokenizer


def _copies(source: Path, file: Path) -> dict[str, bytes]:
    """The files of a tokenizer as they are, under the names by which they are found in a folder."""
    data = _whole(file)
    copies = {"tokenizer.json" if data.lstrip().startswith(b"{") else "tokenizer.model": data}
    # Beside tokenizer.json, tokenizer.model is the original: for programs other than transformers.
    for name in _COMPANIONS + ("tokenizer.model",) * source.is_dir():
        if (path := _companion(source, name)) is not None:
            copies[name] = _whole(path)
    return copies


def _companion(source: Path, name: str) -> Path | None:
    folder = source if source.is_dir() else source.parent
    return member_path(folder, name) if (folder / name).exists() else None


def _whole(path: Path) -> bytes:
    file = InputFile(path)
    return bytes(file.read(0, file.size))


def _generation_config(tokenizer: Tokenizer, path: Path | None) -> bytes:
    """generation_config.json that stops transformers where this model stops."""
    found = {} if path is None else read_json(path, error=ArtifactError)
    listed = found.get("eos_token_id")
    listed = listed if isinstance(listed, list) else [listed]
    if set(listed) == tokenizer.stop_ids:
        return _whole(path)
    ids = token_ids(tokenizer)
    return _json(ids | found | {"eos_token_id": ids["eos_token_id"]})


def token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """The entries of config.json and generation_config.json about a tokenizer's ids."""
    ids = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
    return {key: i for key, i in ids.items() if i is not None} | {
        "eos_token_id": sorted(tokenizer.stop_ids)
    }


# Meta's tokenizer.model ------------------------------------------------------------------------


def _beside_metas_model(tokenizer: Tokenizer, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """What transformers needs beside a tokenizer.model that comes without Hugging Face's files."""
    if "tokenizer.json" in files or _CONFIG in files:
        return {}
    data = files["tokenizer.model"]
    if data.startswith(b"\n"):  # sentencepiece; see load_tokenizer
        pieces = parse_model(data).pieces
        return {_CONFIG: _sentencepiece_config(tokenizer, pieces, {})}
    ranks = parse_ranks(data)
    letter = {b: c for c, b in BYTE_OF.items()}
    spelling = {token: "".join(letter[b] for b in token) for token in ranks}
    # Llama 3's tokenizer.json has each way to build a token as a merge: tiktoken needs none.
    cuts = ((token[:n], token[n:]) for token in ranks for n in range(1, len(token)))
    merges = [(a, b) for a, b in cuts if a in ranks and b in ranks]
    merges.sort(key=lambda ab: (ranks[ab[0] + ab[1]], ranks[ab[0]], ranks[ab[1]]))
    bpe = tokenizers.models.BPE(
        {spelling[token]: rank for token, rank in ranks.items()},
        [(spelling[a], spelling[b]) for a, b in merges],
        ignore_merges=True,
    )
    spec = _byte_level_json(tokenizer, bpe, (LLAMA3_PATTERN,), plain=())
    return {"tokenizer.json": spec, _CONFIG: _fast_config(tokenizer, {})}


# GGUF ------------------------------------------------------------------------------------------


def _from_gguf(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """Files that say what load_tokenizer has read, and found right, in a GGUF file's metadata."""
    get = lambda name, default=None: metadata.get(f"tokenizer.ggml.{name}", default)
    tokens, types = get("tokens"), get("token_type", [])
    template = metadata.get("tokenizer.chat_template")
    chat = {} if template is None else {"chat_template": template}
    if get("model") == "llama":
        control = tokenizer.special_tokens
        pieces = [
            Piece(text, score, CONTROL if text in control else kind)
            for text, score, kind in zip(tokens, get("scores"), types)
        ]
        model = serialize_model(bpe_model(pieces, tokenizer.strips_first_space))
        config = _sentencepiece_config(tokenizer, pieces, chat)
        return {"tokenizer.model": model, _CONFIG: config}
    pre = get("pre", "default")
    plain = [text for text, kind in zip(tokens, types) if kind == USER_DEFINED]
    bpe = tokenizers.models.BPE(
        {text: i for i, text in enumerate(tokens)},
        merge_pairs(get("merges")),
        ignore_merges=pre == "llama-bpe",
    )
    spec = _byte_level_json(tokenizer, bpe, GGUF_PATTERNS[pre], plain)
    return {"tokenizer.json": spec, _CONFIG: _fast_config(tokenizer, chat)}


# The files -------------------------------------------------------------------------------------


def _byte_level_json(
    tokenizer: Tokenizer,
    bpe: tokenizers.models.BPE,
    patterns: Sequence[str],
    plain: Sequence[str],
) -> bytes:
    """tokenizer.json of a BPE in GPT-2's byte alphabet.

    Args:
        tokenizer: whose control tokens and BOS are written.
        bpe: the model.
        patterns: by which texts are split, one after the other.
        plain: added tokens; those that are no control tokens are text.
    """
    control = sorted(tokenizer.special_tokens, key=tokenizer.special_tokens.get)
    pipeline = tokenizers.Tokenizer(bpe)
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(p), "isolated") for p in patterns]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    pipeline.decoder = decoders.ByteLevel()
    pipeline.add_special_tokens([tokenizers.AddedToken(t, normalized=False) for t in control])
    pipeline.add_tokens(
        [
            tokenizers.AddedToken(t, normalized=False)
            for t in plain
            if t not in tokenizer.special_tokens
        ]
    )
    if tokenizer.adds_bos:
        bos = _names(tokenizer)[tokenizer.bos_id]
        pipeline.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"],
            pair=[bos, "$A", f"{bos}:1", "$B:1"],
            special_tokens=[(bos, tokenizer.bos_id)],
        )
    return pipeline.to_str(pretty=True).encode()


def _fast_config(tokenizer: Tokenizer, chat: Mapping[str, Any]) -> bytes:
    return _json({"tokenizer_class": "PreTrainedTokenizerFast"} | _roles(tokenizer) | chat)


def _sentencepiece_config(
    tokenizer: Tokenizer, pieces: Sequence[Piece], chat: Mapping[str, Any]
) -> bytes:
    # `legacy` is what Meta's models are made for: a space is put before a text only, and not
    # behind each control token. Which tokens are control tokens, transformers reads in the model.
    unknown = next(piece.text for piece in pieces if piece.type == UNKNOWN)
    names = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "unk_token": unknown}
    return _json(names | _roles(tokenizer) | chat)


def _roles(tokenizer: Tokenizer) -> dict[str, Any]:
    roles = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    roles["pad_token"] = tokenizer.pad_id
    names = _names(tokenizer)
    named = {role: names[i] for role, i in roles.items() if i in names}
    return named | {"add_bos_token": tokenizer.adds_bos} | _COMMON


def _names(tokenizer: Tokenizer) -> dict[int, str]:
    return {i: name for name, i in tokenizer.special_tokens.items()}


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
