"""Writes a tokenizer as the files that transformers, and `load_tokenizer`, read in a folder."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from models.llama.formats.gguf import open_gguf
from models.llama.hub import COMPANIONS
from models.llama.tokenizer import (
    CONFIG,
    GENERATION,
    Tokenizer,
    load_tokenizer,
    locate,
)
from models.llama.tokenizers.gguf import gguf_form
from models.llama.tokenizers.model import (
    UNKNOWN,
    SentencePieceModel,
    parse_model,
    parse_ranks,
    ranks_spec,
    serialize_model,
)
from utils.errors import ArtifactError
from utils.files import InputFile, read_json

# All but the pad token: a GGUF file may give that role to a token of text, and to name it in
# tokenizer_config.json would make a control token of it. Nothing depends on it.
_KEPT = ("vocab_size", "special_tokens", "hidden_ids", "bos_id", "eos_id", "stop_ids", "adds_bos")
_KEPT += ("chat_templates", "strips_first_space")


def write_tokenizer(
    source: str | Path, folder: str | Path, template: str | None = None
) -> Tokenizer:
    """Writes a tokenizer as the files that transformers, and `load_tokenizer`, read in a folder.

    Hugging Face's and Meta's files are copied. A GGUF file's tokenizer is written anew, and so
    are the files that transformers misses beside Meta's bare `tokenizer.model`.

    Args:
        source: the argument of load_tokenizer.
        folder: an existing folder that holds no tokenizer yet.
        template: the chat template, instead of those of `source`.

    Returns:
        The tokenizer of `source`; the one that load_tokenizer finds in `folder` encodes, decodes
        and stops as it does.

    Raises:
        ArtifactError: as load_tokenizer; or these files cannot say what `source` says.
        OSError: the folder cannot be written.
    """
    tokenizer, folder = load_tokenizer(source), Path(folder)
    file, home = locate(source)
    opened, generation = InputFile(file), None
    if opened.read(0, min(opened.size, 4)) == b"GGUF":
        form, config = gguf_form(open_gguf(file).metadata)
        files = _written(tokenizer, form, config["chat_template"])
    else:
        # Beside tokenizer.json, tokenizer.model is the original, for other programs.
        names = COMPANIONS + ("tokenizer.model",) * Path(source).is_dir()
        files = {n: _whole(home / n) for n in names if os.path.lexists(home / n)}
        data = bytes(opened.read(0, opened.size))
        kind = "tokenizer.json" if data.lstrip().startswith(b"{") else "tokenizer.model"
        files[kind] = data
        if "tokenizer.json" not in files and CONFIG not in files:
            model = parse_model(data) if data.startswith(b"\n") else ranks_spec(parse_ranks(data))
            files = _written(tokenizer, model) | files
        generation = home / GENERATION if (home / GENERATION).exists() else None
    files[GENERATION] = _generation_config(tokenizer, generation)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    again = load_tokenizer(folder)
    if differ := [name for name in _KEPT if getattr(again, name) != getattr(tokenizer, name)]:
        raise ArtifactError(
            f"{file}: Hugging Face's files cannot say this tokenizer's {', '.join(differ)}; "
            "pass the tokenizer of the original model"
        )
    if template not in (None, tokenizer.chat_template):
        _replace_template(folder, template)
    return tokenizer


def _replace_template(folder: Path, template: str) -> None:
    """Leaves one chat template, in the file that all versions of transformers read."""
    for name in ("chat_template.jinja", "chat_template.json"):
        (folder / name).unlink(missing_ok=True)
    path = folder / CONFIG
    config = read_json(path, error=ArtifactError) if path.exists() else {}
    path.write_bytes(_json(config | {"chat_template": template}))


def token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """The entries of config.json and generation_config.json about a tokenizer's ids."""
    ids = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
    return {key: i for key, i in ids.items() if i is not None} | {
        "eos_token_id": sorted(tokenizer.stop_ids)
    }


def _whole(path: Path) -> bytes:
    file = InputFile(path)
    return bytes(file.read(0, file.size))


def _generation_config(tokenizer: Tokenizer, path: Path | None) -> bytes:
    """A generation_config.json that stops transformers where this model stops."""
    found = {} if path is None else read_json(path, error=ArtifactError)
    listed = found.get("eos_token_id")
    listed = listed if isinstance(listed, list) else [listed]
    if set(listed) == tokenizer.stop_ids:
        return _whole(path)
    ids = token_ids(tokenizer)
    return _json(ids | found | {"eos_token_id": ids["eos_token_id"]})


def _written(
    tokenizer: Tokenizer, form: dict | SentencePieceModel, template: Any = None
) -> dict[str, bytes]:
    """Hugging Face's files of a `tokenizer.json` or a sentencepiece model."""
    if isinstance(form, dict):
        spec = tokenizers.Tokenizer.from_str(json.dumps(form)).to_str(pretty=True)
        files = {"tokenizer.json": spec.encode()}
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    else:
        # Meta's models need `legacy`: a space is put before a text only, and not behind each
        # control token. transformers reads in the model which tokens are control tokens.
        unknown = next(e.text for e in form.entries if e.type == UNKNOWN)
        files = {"tokenizer.model": serialize_model(form)}
        config = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "unk_token": unknown}
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    roles = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    roles["pad_token"] = tokenizer.pad_id
    config |= {role: names[i] for role, i in roles.items() if i in names}
    config |= {"add_bos_token": tokenizer.adds_bos, "add_eos_token": False}
    # transformers 4 would otherwise take the space before a full stop away in decoding.
    config["clean_up_tokenization_spaces"] = False
    config |= {} if template is None else {"chat_template": template}
    return files | {CONFIG: _json(config)}


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
