"""Checkpoints in and out: Hugging Face safetensors, Meta's consolidated.*.pth, GGUF (in only)."""

import collections
import dataclasses
import logging
import math
import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.llama.config import ModelConfig
from models.llama.formats import gguf, hf, meta
from models.llama.hub import DEFAULT_MODEL, resolve, weights_digest
from models.llama.layout import DTYPES, Leaf, TensorSource, check_params, file_tensors, leaves
from models.llama.model import LLaMa, Params
from models.llama.stream import Progress, read_params
from models.llama.tokenizer import Tokenizer, check_against_model, load_tokenizer
from models.llama.tokenizers.save import token_ids, write_tokenizer
from utils.errors import ArtifactError, CheckpointError, ConfigError, listed
from utils.fields import Config, field, one_of
from utils.files import atomic_directory, list_folder
from utils.sharding import default_mesh, make_mesh

# Tensors that a file may hold beside the parameters: RoPE's frequencies follow from the config.
_IGNORED = {
    "hf": re.compile(r"(model\.layers\.\d+\.self_attn\.|model\.)?rotary_emb\.inv_freq"),
    "meta": re.compile(r"rope\.freqs"),
    "gguf": re.compile(r"rope_freqs\.weight"),
}

_log = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """An opened checkpoint: its headers are read, its weights are not.

    Attributes:
        path: the folder or the .gguf file.
        format: "hf", "meta" or "gguf".
        config: the model.
        source: reads its tensors.
    """

    path: Path
    format: str
    config: ModelConfig
    source: TensorSource

    @property
    def dtype(self) -> np.dtype:
        """The dtype of most numbers: GGUF keeps norms in float32, matrices in half precision."""
        sizes: collections.Counter[np.dtype] = collections.Counter()
        for leaf in leaves(self.config, self.format):
            for name in leaf.names:
                sizes[self.source.dtypes[name]] += math.prod(leaf.shape)
        return sizes.most_common(1)[0][0]

    def digest(self) -> str:
        """sha256 of the weights' files: see `weights_digest`."""
        return weights_digest(self.source.files)

    def params(
        self,
        dtype: Any = None,
        *,
        allow_extra: bool = False,
        check_finite: bool = False,
        decoding: bool = False,
        progress: Progress | None = None,
    ) -> Params:
        """Reads the parameters: a nested dict of jax arrays, layers stacked on the first axis.

        On a context mesh (utils/sharding.py) each process reads the parts of its own devices.

        Args:
            dtype: float32, bfloat16 or float16 for all parameters, or "auto" (float32 on a CPU,
                bfloat16 elsewhere). None: the type of most of the file's weights; float32 for
                quantised ones.
            allow_extra: tensors that the model does not have are ignored with a warning.
            check_finite: NaN or infinity in a weight is an error instead of a warning.
            decoding: lay the params out as `for_decoding` does, without a second copy.
            progress: called with (what, bytes done, bytes in all).

        Raises:
            ArtifactError: weights are missing, unexpected, misshapen, broken or unsupported.
            ConfigError: `dtype` is none of the three.
        """
        target = None if dtype is None else _dtype(dtype, *DTYPES)
        # Large ones first: while one thread reads the embedding, others have work beside it.
        parts = sorted(leaves(self.config, self.format), key=lambda leaf: -math.prod(leaf.shape))
        # From here on every parameter has its bytes in the file: no config can make us allocate more.
        _check_names(self.config, self.source, parts, _IGNORED[self.format], allow_extra)
        target = target or self.dtype
        params, broken = read_params(
            self.source, parts, target, decoding=decoding, progress=progress
        )
        if broken:
            shown = ", ".join(f"{name!r} ({n})" for name, n in list(broken.items())[:10])
            message = f"{self.path}: NaN or infinity in {len(broken)} tensors: {shown}"
            if check_finite:
                raise ArtifactError(message)
            warnings.warn(message, stacklevel=3)
        return params


def open_checkpoint(
    path_or_name: str | Path, *, tie: bool | None = None, progress: Progress | None = None
) -> Checkpoint:
    """Finds or fetches a checkpoint, and reads its config and the headers of its weights.

    A folder with several formats is read as the first of: model.safetensors, an index with shards,
    Meta's files, GGUF.

    Args:
        path_or_name: a folder, a .gguf file, the name of the default model or a hub id.
        tie: whether the output head is the embedding. None: as the config says, and the file must
            agree. True leaves out a head that the file has, False takes it against the config.
        progress: called with (what, bytes done, bytes in all).

    Raises:
        ArtifactError: there is no such checkpoint, or its weights are broken or unsupported.
        ConfigError: its config is missing, broken or unsupported.
    """
    path = resolve(path_or_name, progress)
    return Checkpoint(path, *_open(path, tie))


def load_checkpoint(
    path_or_name: str | Path,
    *,
    dtype: Any = None,
    tie: bool | None = None,
    progress: Progress | None = None,
    **options: bool,
) -> tuple[ModelConfig, Params]:
    """Loads a model: `open_checkpoint` and `Checkpoint.params`, which say what each argument means.

    Args:
        path_or_name, tie, progress: see `open_checkpoint`.
        dtype, options: see `Checkpoint.params`.

    Returns:
        (config, params): params a nested dict of jax arrays, layers stacked on the first axis.
    """
    checkpoint = open_checkpoint(path_or_name, tie=tie, progress=progress)
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
    dtype: str = field(
        "auto",
        "dtype of activations; auto: float32 on a CPU, bfloat16 elsewhere",
        one_of("auto", "float32", "bfloat16"),
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
    checkpoint = open_checkpoint(flags.ckpt_dir, tie=tie, progress=progress)
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
    params = checkpoint.params(
        flags.dtype,
        allow_extra=flags.allow_extra,
        check_finite=flags.check_finite,
        decoding=True,
        progress=progress,
    )
    return Model(LLaMa(checkpoint.config), params, tokenizer)


def compute_dtype(dtype: str) -> np.dtype:
    """The dtype that a `--dtype` flag names: float32, bfloat16, or auto."""
    return _dtype(dtype, "float32", "bfloat16")


def _dtype(dtype: Any, *names: str) -> np.dtype:
    """One of the named dtypes; "auto" is float32 on a CPU, bfloat16 elsewhere."""
    if isinstance(dtype, str) and dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in names:
        raise ConfigError(f"dtype={dtype!r:.40}, expected {', '.join(names)}")
    return found


def _open(path: Path, tie: bool | None) -> tuple[str, ModelConfig, TensorSource]:
    """(format, config, source) of a folder or a .gguf file."""
    if not path.is_dir():
        if path.suffix.lower() != ".gguf":
            raise ArtifactError(f"{path} is not a checkpoint: expected a folder or a .gguf file")
        return "gguf", *gguf.load_gguf(path, tie)
    names = list_folder(path)
    if hf.SINGLE in names or hf.INDEX in names:
        return "hf", *hf.open_hf(path, tie)
    if any(name.startswith("consolidated.") and name.endswith(".pth") for name in names):
        return "meta", *meta.open_meta(path, tie)
    ggufs = [name for name in names if name.lower().endswith(".gguf")]
    if len(ggufs) == 1:
        return "gguf", *gguf.load_gguf(path / ggufs[0], tie)
    if ggufs:
        raise ArtifactError(f"{path} has {len(ggufs)} .gguf files; pass the path of one")
    pickled = any(name.endswith(".bin") for name in names)
    hint = "; convert .bin weights with transformers' save_pretrained" if pickled else ""
    raise ArtifactError(
        f"{path} holds no checkpoint: expected {hf.SINGLE} or {hf.INDEX}, consolidated.00.pth, or a "
        f".gguf file{hint}"
    )


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
        _log.info("%s: ignored %s", source.description, listed(skipped))
    extra = sorted(set(extra) - set(skipped))
    wrong = [
        f"{name!r} is {list(source.shapes[name])}, expected {list(leaf.shape)} "
        f"({', '.join(leaf.fields)})"
        for name, leaf in expected.items()
        if name in source.shapes and source.shapes[name] != leaf.shape
    ]
    if extra and allow_extra:
        warnings.warn(f"{source.description}: ignored {listed(extra)}", stacklevel=3)
        extra = []
    problems = []
    for what, found in (("missing", missing), ("unexpected", extra)):
        if found:
            problems.append(f"{len(found)} {what}: {listed(found)}")
    if wrong:
        more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        problems.append(f"{len(wrong)} misshapen: {', '.join(wrong[:10])}{more}")
    if problems:
        held = sum(math.prod(shape) for shape in source.shapes.values())
        raise ArtifactError(
            f"{source.description} does not fit its config ({config.n_params:,} parameters, the "
            f"file has {held:,} numbers): {'; '.join(problems)}"
        )


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
        params: its parameters, as load_checkpoint returns them; they keep their dtypes.
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
    path, ids = Path(path), {}
    try:
        if path.exists() and not path.is_dir():
            raise CheckpointError(f"{path} is a file, expected a folder or a new name")
        if path.is_dir() and os.listdir(path) and not overwrite:
            raise CheckpointError(f"{path} exists already; pass overwrite=True to replace it")
        with atomic_directory(path, overwrite=overwrite) as folder:
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
                hf.write_hf(folder, described, file_tensors(parts, arrays), max_shard_bytes)
            else:
                meta.write_meta(folder, described, file_tensors(parts, arrays))
    except OSError as e:
        if isinstance(e, CheckpointError):
            raise
        raise CheckpointError(f"cannot write {path}: {e.strerror or e}") from e
