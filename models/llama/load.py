"""Checkpoints in and out: Hugging Face safetensors, Meta's consolidated.*.pth, GGUF (in only)."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from models.llama.checkpoint import Checkpoint, dtype_of, open_checkpoint
from models.llama.config import ModelConfig
from models.llama.formats import hf, meta, peft
from models.llama.formats.int8 import SCALE, SUFFIX
from models.llama.hub import DEFAULT_MODEL
from models.llama.layout import DTYPES, Leaf, check_params, file_tensors, leaves
from models.llama.lora import LoRAConfig
from models.llama.model import LLaMa, Params
from models.llama.stream import Progress
from models.llama.tokenizer import Tokenizer, check_against_model, load_tokenizer
from models.llama.tokenizers.save import token_ids, write_tokenizer
from utils.errors import CheckpointError, ConfigError
from utils.fields import Config, field, one_of
from utils.files import atomic_directory
from utils.int8 import Int8
from utils.sharding import default_mesh, make_mesh


def load_checkpoint(
    path_or_name: str | Path,
    *,
    dtype: Any = None,
    tie: bool | None = None,
    quantize: bool = False,
    adapter: str | Path | None = None,
    progress: Progress | None = None,
    **options: bool,
) -> tuple[ModelConfig, Params]:
    """Loads a model: `open_checkpoint` and `Checkpoint.params`, which say what each argument means.

    Args:
        path_or_name, tie, quantize, adapter, progress: see `open_checkpoint`.
        dtype, options: see `Checkpoint.params`.

    Returns:
        (config, params): params a nested dict of jax arrays, layers stacked on the first axis.
    """
    checkpoint = open_checkpoint(
        path_or_name, tie=tie, quantize=quantize, adapter=adapter, progress=progress
    )
    return checkpoint.config, checkpoint.params(dtype, progress=progress, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFlags(Config):
    """A checkpoint, and how devices hold it."""

    ckpt_dir: str = field(
        DEFAULT_MODEL,
        "a checkpoint folder, a .gguf file, a Hugging Face id, or the default model's name",
    )
    tokenizer_path: str | None = field(
        None, "a tokenizer file or folder; default: the checkpoint's own"
    )
    adapter: str | None = field(
        None,
        "a folder with a LoRA adapter of the model, in PEFT's format; train.py goes on training it",
    )
    dtype: str = field(
        "auto",
        "dtype of activations; auto: float32 on a CPU, bfloat16 elsewhere",
        one_of("auto", "float32", "bfloat16"),
    )
    quantize: str | None = field(
        None, "int8: hold the model's matrices in eight bits, a scale per row", one_of("int8")
    )
    mesh: str | None = field(
        None,
        'how devices share the model, as "data=2,fsdp=4"; default: over all devices, as it fits',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingModelFlags(ModelFlags):
    """The same for programs that only generate, with how strictly the weights are read."""

    dtype: str = field(
        "auto",
        "dtype of the weights; auto: float32 on a CPU, bfloat16 elsewhere",
        one_of("auto", *DTYPES),
    )
    allow_extra: bool = field(
        False, "ignore tensors of the checkpoint that the model does not have"
    )
    check_finite: bool = field(False, "refuse weights with NaN or infinity, instead of a warning")
    tie: bool | None = field(
        None,
        "use the embedding as output head, whatever the file says; --notie: the file's own head",
    )


class Model(NamedTuple):
    """A model with its tokenizer, ready for generation: `params` has the layout for decoding."""

    llama: LLaMa
    params: Params
    tokenizer: Tokenizer

    @property
    def vocab_limit(self) -> int:
        """The first id that is only a padding row of the embedding: no token has it."""
        return min(self.tokenizer.vocab_size, self.llama.config.vocab_size)


def open_model(
    flags: ModelFlags,
    *,
    tie: bool | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> tuple[Checkpoint, Tokenizer]:
    """Opens a model's checkpoint, loads its tokenizer and sets the mesh that its devices share it on.

    Args:
        flags: which model.
        tie, progress: see `open_checkpoint`.
        say: called with a line about the mesh, if there is one.
    """
    checkpoint = open_checkpoint(
        flags.ckpt_dir,
        tie=tie,
        quantize=flags.quantize is not None,
        adapter=flags.adapter,
        progress=progress,
    )
    tokenizer = load_tokenizer(flags.tokenizer_path or checkpoint.path)
    check_against_model(tokenizer, checkpoint.config.vocab_size)
    if flags.mesh is not None or jax.device_count() > 1:
        mesh = make_mesh(flags.mesh or default_mesh(checkpoint.config, jax.device_count()))
        if say is not None:
            say(f"mesh: {', '.join(f'{axis}={size}' for axis, size in mesh.shape.items())}")
        jax.set_mesh(mesh)
    return checkpoint, tokenizer


def load_model(
    flags: DecodingModelFlags = DecodingModelFlags(),
    *,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Model:
    """Loads a model for generation: weights and tokenizer, on the mesh that the flags ask for.

    Args:
        flags: which model, and how.
        progress, say: see `open_model`.
    """
    checkpoint, tokenizer = open_model(flags, tie=flags.tie, progress=progress, say=say)
    dtype = dtype_of(flags.dtype, *DTYPES)
    params = checkpoint.params(
        dtype,
        allow_extra=flags.allow_extra,
        check_finite=flags.check_finite,
        decoding=True,
        progress=progress,
    )
    return Model(LLaMa(checkpoint.config, dtype), params, tokenizer)


def save_checkpoint(
    path: str | Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    format: str = "hf",
    max_shard_bytes: int = 5_000_000_000,
    tokenizer: str | Path | None = None,
    template: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint folder that appears whole or not at all.

    Args:
        path: the folder; absent or empty, unless `overwrite`.
        config: the model.
        params: its parameters, as load_checkpoint returns them; they keep their dtypes. An Int8 is kept
            in eight bits too, which no other program reads, and takes a quarter of the disk.
        format: "hf" (config.json and safetensors) or "meta" (params.json and one .pth file).
        max_shard_bytes: safetensors are split into files of about this size at most, with an index.
        tokenizer: what load_tokenizer takes: a tokenizer file, a GGUF file or a checkpoint folder.
            Its files are written too, and generation_config.json with all ids that end an answer.
            Without it, the folder holds weights alone.
        template: the chat template to write with them; None: the tokenizer's own, if any.
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
    described = hf.from_config(config) if format == "hf" else meta.from_config(config)
    parts = leaves(config, format)
    arrays = check_params(params, parts)
    int8 = any(isinstance(array, Int8) for array in arrays.values())
    if int8 and format == "meta":
        raise ConfigError("Meta's format has no eight-bit matrices; use format='hf'")
    ids = {}
    with _new_folder(Path(path), overwrite) as folder:
        if tokenizer is not None:
            # First, because what is wrong with it shows before gigabytes are written.
            read = write_tokenizer(tokenizer, folder, template)
            check_against_model(read, config.vocab_size)
            # transformers takes ids that config.json does not name for Llama 2's.
            ids = token_ids(read)
        if format == "hf":
            # transformers 4 reads torch_dtype, 5 reads dtype.
            dtype = arrays["embed"].dtype.name
            described |= {"dtype": dtype, "torch_dtype": dtype} | ids
            if int8:
                described["model_type"] += SUFFIX
                described["architectures"] = [f"{config.family.capitalize()}Int8ForCausalLM"]
            hf.write_hf(folder, described, _tensors(parts, arrays), max_shard_bytes)
        else:
            meta.write_meta(folder, described, file_tensors(parts, arrays))


def save_adapter(
    path: str | Path,
    config: ModelConfig,
    tree: Params,
    lora: LoRAConfig,
    *,
    base: str,
    overwrite: bool = False,
) -> None:
    """Writes adapters in PEFT's format, to a folder that appears whole or not at all.

    Args:
        path, overwrite: see `save_checkpoint`.
        config: the model.
        tree, lora: its adapters, see `models.llama.lora`.
        base: the model's name, for adapter_config.json.

    Raises:
        CheckpointError: the folder is there already, or cannot be written.
    """
    with _new_folder(Path(path), overwrite) as folder:
        peft.write_adapter(folder, config, tree, lora.rank, lora.scale * lora.rank, base)


@contextlib.contextmanager
def _new_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to fill that appears whole. Raises CheckpointError for whatever hinders that."""
    try:
        if path.exists() and not path.is_dir():
            raise CheckpointError(f"{path} is a file, expected a folder or a new name")
        if path.is_dir() and os.listdir(path) and not overwrite:
            raise CheckpointError(f"{path} exists already; pass overwrite=True to replace it")
        with atomic_directory(path, overwrite=overwrite) as folder:
            yield folder
    except OSError as e:
        if isinstance(e, CheckpointError):
            raise
        raise CheckpointError(f"cannot write {path}: {e.strerror or e}") from e


def _tensors(parts: list[Leaf], arrays: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """`file_tensors`, with the values and the scales of an Int8."""
    for leaf in parts:
        array = arrays[leaf.path]
        both = {"": array.values, SCALE: array.scales} if isinstance(array, Int8) else {"": array}
        for suffix, part in both.items():
            for name, tensor in file_tensors([leaf], {leaf.path: part}):
                yield name + suffix, tensor
