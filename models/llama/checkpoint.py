"""Opening a checkpoint of any format: its headers at once, its weights when they are asked for."""

import collections
import logging
import math
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.llama.config import ModelConfig
from models.llama.formats import gguf, hf, meta, peft
from models.llama.formats.safetensors import INDEX, SINGLE
from models.llama.hub import resolve, weights_digest
from models.llama.layout import DTYPES, Leaf, TensorSource, leaves
from models.llama.lora import LoRAConfig, adapter_axes, attach
from models.llama.model import Params, for_decoding
from models.llama.stream import Progress, read_params
from utils import sharding
from utils.errors import ArtifactError, ConfigError, listed
from utils.files import list_folder

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
        quantize: whether `params` holds each matrix in eight bits, an `Int8` (utils/int8.py): a quarter
            of the memory. One that is kept so in the file stays so.
        adapter: is part of what `params` reads: added to the matrices, or beside those in eight bits.
    """

    path: Path
    format: str
    config: ModelConfig
    source: TensorSource
    quantize: bool = False
    adapter: peft.Adapter | None = None

    @property
    def base(self) -> "Checkpoint":
        """The same model without its adapter."""
        return self._replace(adapter=None)

    @property
    def lora(self) -> LoRAConfig | None:
        """The adapter's settings."""
        return self.adapter and LoRAConfig(**self.adapter.lora)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of most numbers: GGUF keeps norms in float32, matrices in half precision."""
        sizes: collections.Counter[np.dtype] = collections.Counter()
        for leaf in leaves(self.config, self.format):
            for name in leaf.names:
                sizes[self.source.dtypes[name]] += math.prod(leaf.shape)
        return sizes.most_common(1)[0][0]

    def digest(self) -> str:
        """sha256 of the files of the weights, and of the adapter: see `weights_digest`."""
        return weights_digest([*self.source.files, *(self.adapter.files if self.adapter else ())])

    def adapter_params(self, dtype: Any) -> Params:
        """Reads the adapter's tree (models/llama/lora.py), on the context mesh if there is one."""
        tree = jax.tree.map(lambda x: jnp.asarray(x, dtype), self.adapter.tree())
        specs = sharding.param_specs(tree, adapter_axes(self.lora), sharding.TRAINING)
        return sharding.place(tree, specs)

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
        target = None if dtype is None else dtype_of(dtype, *DTYPES)
        # Large ones first: while one thread reads the embedding, others have work beside it.
        parts = sorted(leaves(self.config, self.format), key=lambda leaf: -math.prod(leaf.shape))
        # From here on every parameter has its bytes in the file: no config can make us allocate more.
        _check_names(self.config, self.source, parts, _IGNORED[self.format], allow_extra)
        target, source = target or self.dtype, self.source
        # What an adapter adds would be lost where eight bits round.
        beside = self.adapter is not None and self.quantize
        if self.adapter is not None and not beside:
            source = self.adapter.added_to(source, parts)
        params, broken = read_params(
            source,
            parts,
            target,
            quantize=self.quantize,
            decoding=decoding and not beside,
            progress=progress,
        )
        if broken:
            shown = ", ".join(f"{name!r} ({n})" for name, n in list(broken.items())[:10])
            message = f"{self.path}: NaN or infinity in {len(broken)} tensors: {shown}"
            if check_finite:
                raise ArtifactError(message)
            warnings.warn(message, stacklevel=3)
        if beside:
            params = attach(params, self.adapter_params(target), self.lora)
            return for_decoding(params, donate=True) if decoding else params
        return params


def open_checkpoint(
    path_or_name: str | Path,
    *,
    tie: bool | None = None,
    quantize: bool = False,
    adapter: str | Path | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Finds or fetches a checkpoint, and reads its config and the headers of its weights.

    A folder with several formats is read as the first of: model.safetensors, an index with shards,
    Meta's files, GGUF.

    Args:
        path_or_name: a folder, a .gguf file, the name of the default model or a hub id.
        tie: whether the output head is the embedding. None: as the config says, and the file must
            agree. True leaves out a head that the file has, False takes it against the config.
        quantize: see `Checkpoint`.
        adapter: a folder with a LoRA adapter in PEFT's format, see `models.llama.formats.peft`.
        progress: called with (what, bytes done, bytes in all).

    Raises:
        ArtifactError: there is no such checkpoint or adapter, or it is broken or unsupported, or one
            does not fit the other.
        ConfigError: its config is missing, broken or unsupported.
    """
    path = resolve(path_or_name, progress)
    format, config, source = _open(path, tie)
    narrow = quantize or hasattr(source, "read_int8")
    opened = None if adapter is None else peft.open_adapter(adapter, config)
    return Checkpoint(path, format, config, source, narrow, opened)


def compute_dtype(dtype: str) -> np.dtype:
    """The dtype that a `--dtype` flag names: float32, bfloat16, or auto."""
    return dtype_of(dtype, "float32", "bfloat16")


def dtype_of(dtype: Any, *names: str) -> np.dtype:
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
    if SINGLE in names or INDEX in names:
        return "hf", *hf.open_hf(path, tie)
    if any(name.startswith("consolidated.") and name.endswith(".pth") for name in names):
        return "meta", *meta.open_meta(path, tie)
    ggufs = [name for name in names if name.lower().endswith(".gguf")]
    if len(ggufs) == 1:
        return "gguf", *gguf.load_gguf(path / ggufs[0], tie)
    if ggufs:
        raise ArtifactError(f"{path} has {len(ggufs)} .gguf files; pass the path of one")
    if peft.CONFIG in names:
        raise ArtifactError(f"{path} holds an adapter: pass it as --adapter beside --ckpt_dir")
    pickled = any(name.endswith(".bin") for name in names)
    hint = "; convert .bin weights with transformers' save_pretrained" if pickled else ""
    raise ArtifactError(
        f"{path} holds no checkpoint: expected {SINGLE} or {INDEX}, consolidated.00.pth, or a "
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
