"""Meta's format, in and out: params.json, and consolidated.*.pth. No JAX here.

torch unpickles with `weights_only=True`, under fake tensors: they hold no data, and record where in the
file it is. The bytes are then read from there, so that nothing is mapped into memory or held twice. The
shards of several model-parallel ranks are merged.
"""

import dataclasses
import math
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from models.llama.config import ModelConfig, divide, llama3_scaling, require
from models.llama.formats.hf import write_json
from models.llama.layout import DTYPES, rows_of, same_bits, same_tensor
from utils.errors import ArtifactError, ConfigError, is_int, is_number
from utils.files import InputFile, list_folder, read_json

_SHARD_NAME = re.compile(r"consolidated\.(\d{2})\.pth")

# Settings that both have as they are.
_SAME = ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "norm_eps", "rope_theta")
_KEYS = {*_SAME, "head_dim", "multiple_of", "ffn_dim_multiplier", "use_scaled_rope"}
_KEYS |= {"rope_scaling_factor", "rope_high_freq_factor", "max_seq_len", "max_batch_size"}


def to_config(
    params: Mapping[str, Any],
    *,
    vocab_size: int | None = None,
    tie_embeddings: bool = False,
    max_seq_len: int | None = None,
) -> ModelConfig:
    """The ModelConfig of a `params.json`.

    It does not say how long the context is, so each generation's own is taken: 4096 tokens (Llama 2),
    8192 (Llama 3), 131072 (`use_scaled_rope`, Llama 3.1 and later).

    Args:
        params: the parsed file.
        vocab_size: rows of `tok_embeddings.weight`, for files that say -1.
        tie_embeddings: true where the checkpoint has no `output.weight`.
        max_seq_len: overrides the generation's own context length.
    """
    require(params, ("dim", "n_layers", "n_heads", "norm_eps", "multiple_of"), "params.json")
    # Vision, experts, quantisation and LoRA each bring keys of their own.
    if unknown := sorted(key for key in params if key not in _KEYS and params[key]):
        raise ConfigError(
            f"params.json has {', '.join(unknown):.200}: only dense text Llama is supported"
        )
    fields = {"vocab_size": -1, "rope_theta": 10000.0} | {
        k: params[k] for k in _SAME if k in params
    }
    if fields["vocab_size"] == -1 and vocab_size is not None:
        fields["vocab_size"] = vocab_size
    if fields.get("n_kv_heads") is None:
        fields["n_kv_heads"] = fields["n_heads"]
    dim, heads = fields["dim"], fields["n_heads"]
    scaled = params.get("use_scaled_rope", False)
    if not isinstance(scaled, bool):
        raise ConfigError(f"params.json use_scaled_rope={scaled!r:.80}, expected true or false")
    context = 131072 if scaled else 8192 if fields["rope_theta"] == 500000.0 else 4096
    scaling = None
    if scaled:
        is_3_2 = (dim, params["n_layers"]) in ((2048, 16), (3072, 28))
        factor = params.get("rope_scaling_factor", 32.0 if is_3_2 else 8.0)
        scaling = llama3_scaling(factor, high=params.get("rope_high_freq_factor", 4.0))
    return ModelConfig(
        **fields,
        head_dim=params.get("head_dim") or divide(dim, heads, "dim", "n_heads"),
        ffn_dim=_ffn_dim(params),
        rope_scaling=scaling,
        max_seq_len=max_seq_len or params.get("max_seq_len") or context,
        tie_embeddings=tie_embeddings,
        activation="silu",
        attention_bias=False,
        mlp_bias=False,
    )


def _ffn_dim(params: Mapping[str, Any]) -> int:
    """The width that Meta's FeedForward computes: 2/3 of 4 · dim, scaled, rounded up."""
    dim, multiple = params["dim"], params["multiple_of"]
    for key, value in dict(dim=dim, multiple_of=multiple).items():
        if not is_int(value) or not 1 <= value <= 2**20:
            raise ConfigError(f"params.json {key}={value!r:.80}, expected a positive integer")
    ffn = int(2 * (4 * dim) / 3)
    multiplier = params.get("ffn_dim_multiplier")
    if multiplier is not None:
        if not is_number(multiplier) or not 0 < multiplier < 1e3:
            raise ConfigError(f"params.json ffn_dim_multiplier={multiplier!r:.80}, expected > 0")
        ffn = int(multiplier * ffn)
    return multiple * ((ffn + multiple - 1) // multiple)


def from_config(config: ModelConfig) -> dict[str, Any]:
    """The `params.json` of this config. Raises ConfigError where Meta's layout cannot say it."""
    if any(row.only for row in rows_of(config)) or config.activation != "silu":
        raise ConfigError(
            "Meta's layout has only SiLU, no biases, no norms of q and k; export with format='hf'"
        )
    # ffn_dim = multiple_of·⌈…⌉ with multiple_of = ffn_dim gives back ffn_dim exactly.
    base = int(2 * (4 * config.dim) / 3)
    out = {name: getattr(config, name) for name in _SAME} | {"multiple_of": config.ffn_dim}
    if base > config.ffn_dim:
        # Half a unit more, so that truncation gives ffn_dim and not one less.
        out["ffn_dim_multiplier"] = (config.ffn_dim + 0.5) / base
    if config.head_dim * config.n_heads != config.dim:
        raise ConfigError("Meta's layout has head_dim = dim / n_heads; export with format='hf'")
    if config.rope_scaling is not None:
        s = config.rope_scaling
        if dataclasses.replace(s, factor=8.0, high_freq_factor=4.0) != llama3_scaling(8.0):
            raise ConfigError(
                f"Meta's layout has only llama3 RoPE scaling, this model has {s.kind}; "
                "export with format='hf'"
            )
        out |= {"use_scaled_rope": True, "rope_scaling_factor": s.factor}
        out |= {"rope_high_freq_factor": s.high_freq_factor}
    if to_config(out, tie_embeddings=config.tie_embeddings).ffn_dim != config.ffn_dim:
        raise ConfigError(f"Meta's layout cannot say ffn_dim={config.ffn_dim}; use format='hf'")
    return out


class MetaFolder:
    """The tensors of a folder of consolidated.NN.pth, merged: a TensorSource.

    Attributes:
        description: the folder.
        shapes: by Meta's tensor names, of the whole model.
        dtypes: by tensor name.
    """

    def __init__(self, folder: str | Path, dim: Any):
        """Reads what every shard has.

        Args:
            folder: has consolidated.00.pth and so on.
            dim: of params.json: by it one sees on which axis the embedding is split.

        Raises:
            ArtifactError: a shard is missing, broken, or unlike the others.
        """
        self.description = str(folder)
        names = [name for name in list_folder(folder) if _SHARD_NAME.fullmatch(name)]
        expected = [f"consolidated.{rank:02d}.pth" for rank in range(len(names))]
        if names != expected or not names:
            lacking = sorted(set(expected or ["consolidated.00.pth"]) - set(names))
            raise ArtifactError(f"{folder} has a gap in its shards: no {', '.join(lacking)}")
        self._shards = [_Shard(Path(folder, name)) for name in names]
        self.files = [shard.path for shard in self._shards]
        first = self._shards[0].tensors
        for shard in self._shards[1:]:
            if differing := sorted(first.keys() ^ shard.tensors.keys()):
                raise ArtifactError(f"{shard.path} and shard 00 differ: {differing[0]!r:.200}")
            for name, tensor in shard.tensors.items():
                if tensor[:2] != first[name][:2]:
                    raise ArtifactError(
                        f"{shard.path}: {name!r:.200} is {list(tensor[0])} {tensor[1]}, in shard "
                        f"00 {list(first[name][0])} {first[name][1]}; shards must be alike"
                    )
        self._axes = {name: _axis(name, shape, dim) for name, (shape, *_) in first.items()}
        self.shapes = {name: self._merged(name, shape) for name, (shape, *_) in first.items()}
        self.dtypes = {name: dtype for name, (_, dtype, _) in first.items()}

    def _merged(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        axis = self._axes[name]
        return tuple(n * len(self._shards) if i == axis else n for i, n in enumerate(shape))

    def read(self, name: str) -> np.ndarray:
        """The merged tensor, in an array of its own.

        Raises ArtifactError if a file changed, or the shards' copies of a replicated tensor differ.
        """
        axis, out = self._axes[name], np.empty(self.shapes[name], self.dtypes[name])
        if axis is not None:
            for shard, place in zip(self._shards, np.split(out, len(self._shards), axis)):
                shard.read_into(name, place)
            return out
        self._shards[0].read_into(name, out)
        part = np.empty_like(out)
        for shard in self._shards[1:]:
            shard.read_into(name, part)
            if not same_bits(out, part):
                raise ArtifactError(f"{shard.path}: {name!r:.200} differs from shard 00's copy")
        return out


def _axis(name: str, shape: tuple[int, ...], dim: Any) -> int | None:
    """The axis that model-parallel ranks split a tensor on; None where each has all of it.

    Source: ColumnParallelLinear, RowParallelLinear and the embeddings of Meta's llama code.
    """
    if len(shape) != 2:
        return None
    if name.endswith((".wo.weight", ".w2.weight")):
        return 1
    # Llama 1 and 2 split the embedding by features, Llama 3 by words.
    return 1 if name == "tok_embeddings.weight" and shape[1] != dim else 0


class _Shard:
    """One .pth file: tensors by name as (shape, dtype, offset in the file)."""

    def __init__(self, path: Path):
        self.path, self._file = path, InputFile(path)
        ends = [*_record_starts(path), self._file.size]
        self.tensors = {
            name: _locate(f"{path}: tensor {name!r:.200}", x, ends)
            for name, x in _unpickle(path).items()
        }

    def read_into(self, name: str, out: np.ndarray) -> None:
        """Fills `out`, which may be any view of the tensor's shape and dtype."""
        whole = out if out.flags.c_contiguous else np.empty(out.shape, out.dtype)
        raw = memoryview(whole.reshape(-1).view(np.uint8))
        self._file.read_into(self.tensors[name][2], raw)
        if whole is not out:
            out[...] = whole


def _record_starts(path: Path) -> list[int]:
    """The offsets of the zip file's records, sorted.

    Refuses files whose bytes are not the numbers, which torch would not notice.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            packed = [e.filename for e in entries if e.compress_type != zipfile.ZIP_STORED]
            orders = [e for e in entries if e.filename.endswith("/byteorder")]
            swapped = any(archive.read(e) != b"little" for e in orders if e.file_size < 16)
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, EOFError) as e:
        raise ArtifactError(
            f"{path} is not a zip file of torch ({str(e):.200}): truncated, or in its format of before "
            "1.6; load it with torch and save it again"
        ) from e
    if packed:
        raise ArtifactError(f"{path}: record {packed[0]!r:.200} is compressed")
    if swapped:
        raise ArtifactError(f"{path} has big-endian numbers; save it again on this machine")
    return sorted(entry.header_offset for entry in entries)


def _unpickle(path: Path) -> dict[str, Any]:
    """The file's fake tensors by name."""
    torch, fake_mode = import_torch()
    try:
        # torch tells about deprecations of its own while it loads.
        with warnings.catch_warnings(action="ignore"), fake_mode():
            out = torch.load(path, map_location="cpu", weights_only=True)
    # A broken pickle makes torch raise nearly anything.
    except Exception as e:
        reason = " ".join(str(e).split())
        raise ArtifactError(f"torch cannot read {path}: {type(e).__name__} {reason:.200}") from e
    if not isinstance(out, dict) or not out:
        raise ArtifactError(f"{path} does not hold a dict of tensors")
    for name, tensor in out.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ArtifactError(f"{path} holds {name!r:.200}, which is not a tensor")
    return out


def import_torch():
    """(torch, its FakeTensorMode). Raises ConfigError where torch is not installed."""
    try:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
    except ImportError as e:
        raise ConfigError(
            "Meta's .pth files need torch: pip install 'altiplano[torch]', or use the safetensors"
        ) from e
    return torch, FakeTensorMode


def _locate(where: str, tensor, ends: list[int]) -> tuple[tuple[int, ...], np.dtype, int]:
    """(shape, dtype, offset in the file) of a fake tensor, which may not reach beyond its record.

    Torch does not compare fake tensors with their records. `ends` are the offsets where records end.
    """
    dtype = DTYPES.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None:
        raise ArtifactError(f"{where} is {tensor.dtype}, expected {', '.join(DTYPES)}")
    if not tensor.is_contiguous():
        raise ArtifactError(f"{where} has strides {tuple(tensor.stride())}, expected contiguous")
    shape, start = tuple(tensor.shape), getattr(
        tensor.untyped_storage(), "_checkpoint_offset", None
    )
    if start is None:
        raise ArtifactError(f"{where} has no numbers in the file")
    end = next((end for end in ends if end > start), 0)
    start += tensor.storage_offset() * dtype.itemsize
    if start + math.prod(shape) * dtype.itemsize > end:
        raise ArtifactError(f"{where} of shape {list(shape)} reaches beyond its record")
    return shape, dtype, start


def open_meta(path: Path, tie: bool | None) -> tuple[ModelConfig, MetaFolder]:
    """Config and tensors of a folder; `tie` as for `models.llama.checkpoint.open_checkpoint`."""
    params = read_json(path / "params.json")
    source = MetaFolder(path, params.get("dim"))
    embed, head = "tok_embeddings.weight", "output.weight"
    if tie is None:
        # Meta's files of tied models hold the embedding a second time, as the head.
        tie = head not in source.shapes or same_tensor(source, embed, head)
    if tie:
        source.shapes.pop(head, None)
    vocab_size = (*source.shapes.get(embed, ()), None)[0]
    return to_config(params, vocab_size=vocab_size, tie_embeddings=tie), source


def write_meta(
    folder: Path, settings: Mapping[str, Any], tensors: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Writes params.json, and the tensors to consolidated.00.pth."""
    write_json(folder / "params.json", settings)
    torch, _ = import_torch()
    state = {}
    with warnings.catch_warnings():
        # JAX's memory is read-only; torch.save only reads.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        for name, array in tensors:
            # torch does not know numpy's bfloat16.
            bits = torch.from_numpy(np.ascontiguousarray(array).view(f"i{array.itemsize}"))
            state[name] = bits.view(getattr(torch, array.dtype.name))
    # Meta's code always loads a head; its own files of tied models hold the embedding twice.
    state.setdefault("output.weight", state["tok_embeddings.weight"])
    torch.save(state, folder / "consolidated.00.pth")
