"""Checkpoints in and out: Hugging Face safetensors, Meta's consolidated.*.pth, GGUF.

One array of the parameters at a time is read, cast, checked and handed to JAX, so that memory stays
near that of the parameters themselves (models/llama/stream.py).
"""

import collections
import dataclasses
import logging
import math
import re
import warnings
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from models.llama.config import ModelConfig
from models.llama.formats.gguf import open_gguf
from models.llama.formats.hf import INDEX, SINGLE, SafetensorsFolder
from models.llama.formats.meta import MetaFolder
from models.llama.hub import resolve
from models.llama.layout import Leaf, leaves, same_bits
from models.llama.save import save_checkpoint
from models.llama.stream import Params, Progress, TensorSource, read_params
from models.llama.stream_sharded import read_sharded
from utils import sharding
from utils.errors import ArtifactError, ConfigError
from utils.files import list_folder, member_path, read_json

__all__ = ["load_checkpoint", "save_checkpoint"]

# What a file may hold beside the parameters. RoPE's frequencies follow from the config.
_IGNORED = {
    "hf": re.compile(r"(model\.layers\.\d+\.self_attn\.|model\.)?rotary_emb\.inv_freq"),
    "meta": re.compile(r"rope\.freqs"),
    "gguf": re.compile(r"rope_freqs\.weight"),
}
_DTYPES = ("float32", "bfloat16", "float16")

_log = logging.getLogger(__name__)


def load_checkpoint(
    path_or_name: str | Path,
    *,
    dtype: Any = None,
    allow_extra: bool = False,
    check_finite: bool = False,
    tie: bool | None = None,
    decoding: bool = False,
    progress: Progress | None = None,
) -> tuple[ModelConfig, Params]:
    """Loads a model.

    A folder with several formats is read as the first of: model.safetensors, an index with shards,
    Meta's files, GGUF.

    Args:
        path_or_name: a folder, a .gguf file, the name of the default model or a hub id.
        dtype: float32, bfloat16 or float16 for all parameters. None: the type of most of the file's
            weights; float32 for quantised ones.
        allow_extra: tensors that the model does not have are ignored with a warning.
        check_finite: NaN or infinity in a weight is an error, not a warning.
        tie: whether the output head is the embedding. None: as the config says, and the file must
            agree. True leaves out a head that the file has, False takes it against the config.
        decoding: whether the params shall be as `for_decoding` lays them out: no second copy.
            On a context mesh (utils/sharding.py) each process reads its own parts.
        progress: called with (what, bytes done, bytes in all).

    Returns:
        (config, params): params a nested dict of jax arrays, layers stacked on the first axis.

    Raises:
        ArtifactError: weights missing, unexpected, misshapen, broken or unsupported.
        ConfigError: the config is missing, broken or unsupported, or `dtype` is.
    """
    target = None if dtype is None else _target_dtype(dtype)
    config, source, format = _open(resolve(path_or_name, progress), tie)
    # Large ones first: the embedding is one tensor for one thread, and others have work meanwhile.
    parts = sorted(leaves(config, format), key=lambda leaf: -math.prod(leaf.shape))
    # From here on every parameter has its bytes in the file: no config can make us allocate more.
    _check_names(config, source, parts, _IGNORED[format], allow_extra)
    target = target or _common_dtype(source, parts)
    read = read_params if sharding.current_mesh() is None else read_sharded
    params, broken = read(source, parts, target, decoding=decoding, progress=progress)
    if broken:
        shown = ", ".join(f"{name!r} ({n})" for name, n in list(broken.items())[:10])
        message = f"{source.description}: NaN or infinity in {len(broken)} tensors: {shown}"
        if check_finite:
            raise ArtifactError(message)
        warnings.warn(message, stacklevel=2)
    return config, params


def load_config(path_or_name: str | Path, *, tie: bool | None = None) -> ModelConfig:
    """The config of a checkpoint alone, without its weights. Arguments and errors as load_checkpoint."""
    return _open(resolve(path_or_name), tie)[0]


def _target_dtype(dtype: Any) -> np.dtype:
    try:
        target = jnp.dtype(dtype)
    except TypeError as e:
        raise ConfigError(f"dtype={dtype!r}, expected {', '.join(_DTYPES)}") from e
    if target.name not in _DTYPES:
        raise ConfigError(f"dtype={target.name!r}, expected {', '.join(_DTYPES)}")
    return target


def _common_dtype(source: TensorSource, parts: list[Leaf]) -> np.dtype:
    """The dtype of most numbers: GGUF keeps float32 norms beside half-precision matrices."""
    sizes: dict[np.dtype, int] = collections.Counter()
    for leaf in parts:
        for name in leaf.names:
            sizes[source.dtypes[name]] += math.prod(leaf.shape)
    return max(sizes, key=lambda dtype: sizes[dtype])


def _open(path: Path, tie: bool | None) -> tuple[ModelConfig, TensorSource, str]:
    """(config, source, format) of a folder or a .gguf file."""
    if not path.is_dir():
        if path.suffix.lower() != ".gguf":
            raise ArtifactError(f"{path} is no checkpoint: expected a folder or a .gguf file")
        return (*_open_gguf(path, tie), "gguf")
    names = list_folder(path)
    if SINGLE in names or INDEX in names:
        return (*_open_hf(path, tie), "hf")
    if any(name.startswith("consolidated.") and name.endswith(".pth") for name in names):
        return (*_open_meta(path, tie), "meta")
    ggufs = [name for name in names if name.lower().endswith(".gguf")]
    if len(ggufs) == 1:
        return (*_open_gguf(member_path(path, ggufs[0]), tie), "gguf")
    if ggufs:
        raise ArtifactError(f"{path} has {len(ggufs)} .gguf files; pass the path of one")
    hint = ""
    if any(name.endswith(".bin") for name in names):
        hint = "; convert .bin weights with transformers' save_pretrained"
    raise ArtifactError(
        f"{path} holds no checkpoint: expected {SINGLE} or {INDEX}, consolidated.00.pth, or a "
        f".gguf file{hint}"
    )


def _open_hf(path: Path, tie: bool | None) -> tuple[ModelConfig, TensorSource]:
    config = ModelConfig.from_hf(read_json(member_path(path, "config.json")))
    source = SafetensorsFolder(path)
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    if tie is not None:
        config = dataclasses.replace(config, tie_embeddings=tie)
    elif config.tie_embeddings and head in source.shapes and not _same(source, embed, head):
        raise ArtifactError(
            f"{path}: config.json says tie_word_embeddings, but {head} differs from {embed}; "
            "pass tie=True (--tie) to follow the config, tie=False (--notie) to keep the file's head"
        )
    if config.tie_embeddings:
        source.shapes.pop(head, None)
    return config, source


def _open_meta(path: Path, tie: bool | None) -> tuple[ModelConfig, TensorSource]:
    params = read_json(member_path(path, "params.json"))
    source = MetaFolder(path, params.get("dim"))
    embed, head = "tok_embeddings.weight", "output.weight"
    # Meta's files of tied models hold the embedding a second time, as the head.
    if tie is None and head in source.shapes and _same(source, embed, head):
        tie = True
    tied = _tie(source, head, tie)
    vocab_size = (*source.shapes.get(embed, ()), None)[0]
    return ModelConfig.from_meta(params, vocab_size=vocab_size, tie_embeddings=tied), source


def _open_gguf(path: Path, tie: bool | None) -> tuple[ModelConfig, TensorSource]:
    source = open_gguf(path)
    freqs = "rope_freqs.weight"
    config = ModelConfig.from_gguf(
        source.metadata,
        tie_embeddings=_tie(source, "output.weight", tie),
        attention_bias="blk.0.attn_q.bias" in source.shapes,
        mlp_bias="blk.0.ffn_gate.bias" in source.shapes,
        rope_factors=source.read(freqs) if freqs in source.shapes else None,
    )
    return config, source


def _tie(source: TensorSource, head: str, tie: bool | None) -> bool:
    """Whether to tie where the file alone says it, by leaving the head out."""
    tied = head not in source.shapes if tie is None else tie
    if tied:
        source.shapes.pop(head, None)
    return tied


def _same(source: TensorSource, a: str, b: str) -> bool:
    """Whether two tensors are equal to the bit."""
    described = lambda name: (source.shapes.get(name), source.dtypes.get(name))
    if described(a) != described(b):
        return False
    return same_bits(source.read(a), source.read(b))


def _check_names(
    config: ModelConfig,
    source: TensorSource,
    parts: list[Leaf],
    ignored: re.Pattern,
    allow_extra: bool,
) -> None:
    """Compares the file with the model before anything is allocated, and reports all at once."""
    expected = {name: leaf for leaf in parts for name in leaf.names}
    missing = [name for name in expected if name not in source.shapes]
    extra = [name for name in source.shapes if name not in expected]
    if skipped := [name for name in extra if ignored.fullmatch(name)]:
        _log.info("%s: ignored %s", source.description, _some(skipped))
    extra = sorted(set(extra) - set(skipped))
    wrong = [
        f"{name!r} is {list(source.shapes[name])}, expected {list(leaf.shape)} "
        f"({', '.join(leaf.fields)})"
        for name, leaf in expected.items()
        if name in source.shapes and source.shapes[name] != leaf.shape
    ]
    if extra and allow_extra:
        warnings.warn(f"{source.description}: ignored {_some(extra)}", stacklevel=3)
        extra = []
    problems = []
    for what, found in (("missing", missing), ("unexpected", extra)):
        if found:
            problems.append(f"{len(found)} {what}: {_some(found)}")
    if wrong:
        more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        problems.append(f"{len(wrong)} misshapen: {', '.join(wrong[:10])}{more}")
    if problems:
        held = sum(math.prod(shape) for shape in source.shapes.values())
        raise ArtifactError(
            f"{source.description} does not fit its config ({config.n_params:,} parameters, the "
            f"file has {held:,} numbers): {'; '.join(problems)}"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(f"{name!r:.200}" for name in names[:10]) + more
