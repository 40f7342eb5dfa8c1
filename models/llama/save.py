"""Parameters to files that transformers, or Meta's own code, reads back to the bit."""

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from models.llama.config import ModelConfig
from models.llama.formats.hf import INDEX, SINGLE
from models.llama.formats.meta import import_torch
from models.llama.layout import Leaf, leaves, to_neighbour_pairs
from models.llama.tokenizer import check_against_model
from models.llama.tokenizer_save import token_ids, write_tokenizer
from utils.errors import CheckpointError, ConfigError
from utils.files import atomic_directory
from utils.trees import flatten

_DTYPES = ("float32", "bfloat16", "float16")


def save_checkpoint(
    path: str | Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    format: str = "hf",
    max_shard_bytes: int = 5_000_000_000,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint folder that appears whole or not at all.

    Args:
        path: the folder; absent or empty, unless `overwrite`.
        config: the model.
        params: its parameters, as load_checkpoint returns them; they keep their dtypes.
        format: "hf" (config.json and safetensors) or "meta" (params.json and consolidated.00.pth;
            one file of any size, since Meta's files are one a model-parallel rank).
        max_shard_bytes: safetensors are split into files of about this size at most, with an index.
        tokenizer: what load_tokenizer takes: a tokenizer file, a GGUF file or a checkpoint folder.
            Its files are written too, and generation_config.json with all ids that end an answer.
            Without it, the folder holds weights alone.
        overwrite: replace the folder if there is one.

    Raises:
        ConfigError: config and params disagree, or the format cannot express the model.
        ArtifactError: the tokenizer is broken, or does not belong to the model.
        CheckpointError: the folder is there already, or cannot be written.
    """
    if format not in ("hf", "meta"):
        raise ConfigError(f"format={format!r}, expected 'hf' or 'meta'")
    if max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes={max_shard_bytes}, expected a positive number of bytes")
    described = config.to_hf() if format == "hf" else config.to_meta()
    parts = leaves(config, format)
    arrays = _check_params(params, parts)
    path, ids = Path(path), {}
    try:
        if path.exists() and not path.is_dir():
            raise CheckpointError(f"{path} is a file, expected a folder or a new name")
        if path.is_dir() and os.listdir(path) and not overwrite:
            raise CheckpointError(f"{path} exists already; pass overwrite=True to replace it")
        with atomic_directory(path, overwrite=overwrite) as folder:
            if tokenizer is not None:
                # First, because what is wrong with it shows before gigabytes are written.
                read = write_tokenizer(tokenizer, folder)
                check_against_model(read, config.vocab_size)
                # transformers takes ids that config.json does not name for Llama 2's.
                ids = token_ids(read)
            if format == "hf":
                # transformers 4 reads torch_dtype, 5 reads dtype.
                dtype = arrays["embed"].dtype.name
                described |= {"dtype": dtype, "torch_dtype": dtype} | ids
                _write_json(folder / "config.json", described)
                _write_safetensors(folder, parts, arrays, max_shard_bytes)
            else:
                _write_json(folder / "params.json", described)
                _write_meta(folder, parts, arrays)
    except OSError as e:
        if isinstance(e, CheckpointError):
            raise
        raise CheckpointError(f"cannot write {path}: {e.strerror or e}") from e


def _check_params(params: Mapping[str, Any], parts: list[Leaf]) -> dict[str, Any]:
    """The arrays by path. Raises one ConfigError about all that do not fit the config."""
    arrays = flatten(params)
    expected = {
        leaf.path: ((len(leaf.names),) if leaf.stacked else ()) + leaf.shape for leaf in parts
    }
    bad = [f"{path} is missing" for path in expected if path not in arrays]
    for path, array in arrays.items():
        if path not in expected:
            bad.append(f"{path} is not a parameter of this config")
        elif tuple(array.shape) != expected[path]:
            bad.append(f"{path} is {list(array.shape)}, expected {list(expected[path])}")
        elif array.dtype.name not in _DTYPES:
            bad.append(f"{path} has dtype {array.dtype.name}, expected {', '.join(_DTYPES)}")
    if bad:
        more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise ConfigError(f"params do not fit the config: {'; '.join(bad[:10])}{more}")
    return arrays


def _tensors(parts: list[Leaf], arrays: Mapping) -> Iterator[tuple[str, np.ndarray]]:
    """(name in the file, layer's array) of every parameter; on CPU views, not copies."""
    for leaf in parts:
        array = np.asarray(arrays[leaf.path])
        for name, layer in zip(leaf.names, array if leaf.stacked else (array,)):
            if leaf.heads:
                layer = to_neighbour_pairs(layer, leaf.heads).reshape(layer.shape)
            yield name, layer


def _write_safetensors(
    folder: Path, parts: list[Leaf], arrays: Mapping, max_shard_bytes: int
) -> None:
    shards: list[dict[str, np.ndarray]] = [{}]
    size = total = 0
    for name, array in _tensors(parts, arrays):
        if shards[-1] and size + array.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = array
        size, total = size + array.nbytes, total + array.nbytes
    if len(shards) == 1:
        _write_shard(folder / SINGLE, shards[0])
        return
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_shard(path: Path, shard: dict[str, np.ndarray]) -> None:
    # The package writes from the arrays' memory as it lies, whatever their strides.
    contiguous = {name: np.ascontiguousarray(array) for name, array in shard.items()}
    # transformers refuses a file that does not say this.
    save_file(contiguous, path, metadata={"format": "pt"})


def _write_meta(folder: Path, parts: list[Leaf], arrays: Mapping) -> None:
    torch, _ = import_torch()
    state = {}
    with warnings.catch_warnings():
        # JAX's memory is read-only; torch.save only reads.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        for name, array in _tensors(parts, arrays):
            # torch knows no bfloat16 of numpy's.
            bits = torch.from_numpy(np.ascontiguousarray(array).view(f"i{array.itemsize}"))
            state[name] = bits.view(getattr(torch, array.dtype.name))
    # Meta's code always loads a head; its own files of tied models hold the embedding twice.
    state.setdefault("output.weight", state["tok_embeddings.weight"])
    torch.save(state, folder / "consolidated.00.pth")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
