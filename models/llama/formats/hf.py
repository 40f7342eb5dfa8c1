"""Hugging Face's format, in and out: config.json, and safetensors in one file or in shards. No JAX here.

The header is parsed here and not by the `safetensors` package, which is quiet about duplicate
keys and maps the file into memory: a file that shrinks then would kill the process.
Source: the format's README, https://github.com/huggingface/safetensors#format
"""

import dataclasses
import json
import math
import re
import struct
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from models.llama.config import ModelConfig, RopeScaling, divide, llama3_scaling, require
from models.llama.formats.int8 import SETTINGS, Int8Tensors
from models.llama.layout import DTYPES, TensorSource, same_tensor
from utils.errors import ArtifactError, ConfigError, is_int, listed
from utils.files import InputFile, list_folder, named_in, parse_json, read_json

_DTYPES = {"F32": DTYPES["float32"], "F16": DTYPES["float16"], "BF16": DTYPES["bfloat16"]}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# Llama 3.1 405B has 1,138 tensors, 170 kB of header in one file. The bound keeps a hostile header
# from taking more memory and time than the file itself.
_MAX_HEADER = 8 << 20
_SHARD_NAME = re.compile(r".*-\d{5}-of-\d{5}\.safetensors")

# (ours, config.json's, what transformers' LlamaConfig takes where the key is absent) of each setting
# that both have as it is.
_SETTINGS = (
    ("vocab_size", "vocab_size", None),
    ("dim", "hidden_size", None),
    ("n_layers", "num_hidden_layers", None),
    ("n_heads", "num_attention_heads", None),
    ("n_kv_heads", "num_key_value_heads", None),
    ("head_dim", "head_dim", None),
    ("ffn_dim", "intermediate_size", None),
    ("norm_eps", "rms_norm_eps", 1e-6),
    ("max_seq_len", "max_position_embeddings", 2048),
    ("tie_embeddings", "tie_word_embeddings", False),
    ("attention_bias", "attention_bias", False),
    ("mlp_bias", "mlp_bias", False),
)
_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_ACTIVATIONS = {"swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "factor"}
_ROPE_KEYS |= {"low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}


def to_config(config: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of a `config.json`, in either dialect (`rope_theta` + `rope_scaling`, or
    transformers 5's `rope_parameters`).

    Raises ConfigError that lists every problem at once.
    """
    _check_is_llama(config)
    require(config, (*_REQUIRED, "intermediate_size"), "config.json")
    fields = {ours: config.get(theirs, default) for ours, theirs, default in _SETTINGS}
    if fields["head_dim"] is None:
        names = "hidden_size", "num_attention_heads"
        fields["head_dim"] = divide(fields["dim"], fields["n_heads"], *names)
    if fields["n_kv_heads"] is None:
        fields["n_kv_heads"] = fields["n_heads"]
    activation = config.get("hidden_act", "silu")
    if isinstance(activation, str):
        activation = _ACTIVATIONS.get(activation, activation)
    theta, scaling = _rope(config, fields["max_seq_len"])
    return ModelConfig(**fields, activation=activation, rope_theta=theta, rope_scaling=scaling)


def from_config(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` that transformers (4 and 5) reads back as this config."""
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "factors":
        raise ConfigError(
            "config.json cannot say this model's RoPE factors, which follow no rule; "
            "use the GGUF file itself"
        )
    rope = None if scaling is None else {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling is not None and scaling.kind == "llama3":
        rope |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_len,
        }
    activation = {"gelu_tanh": "gelu_pytorch_tanh"}.get(config.activation, config.activation)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: getattr(config, ours) for ours, theirs, _ in _SETTINGS},
        "hidden_act": activation,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
    }


def _rope(config: Mapping[str, Any], max_seq_len: Any) -> tuple[Any, RopeScaling | None]:
    """(theta, scaling) from either dialect; anything that would be ignored is refused by name."""
    dialects = [config.get(name) or {} for name in ("rope_scaling", "rope_parameters")]
    if not all(isinstance(dialect, Mapping) for dialect in dialects):
        raise ConfigError(
            f"config.json rope_scaling, rope_parameters: got {dialects!r:.80}, expected objects"
        )
    old, new = ({k: v for k, v in d.items() if v is not None} for d in dialects)
    rope = {**old, **new}
    if differ := sorted(key for key in old if rope[key] != old[key]):
        raise ConfigError(f"config.json rope_parameters and rope_scaling differ in {differ[0]}")
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise ConfigError("config.json partial_rotary_factor is not 1: partial RoPE is unsupported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise ConfigError(
            f"config.json RoPE scaling type {kind!r:.80} is not supported (default, linear, llama3)"
        )
    if unknown := sorted(rope.keys() - _ROPE_KEYS):
        raise ConfigError(f"config.json RoPE scaling has {unknown[0]!r:.80}, which is unsupported")
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    if kind == "default":
        return theta, None
    keys = ("factor", "low_freq_factor", "high_freq_factor")[: 1 if kind == "linear" else 3]
    require(rope, keys, "config.json RoPE scaling")
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=rope["factor"])
    # As transformers, where the file does not say it.
    original = rope.get("original_max_position_embeddings", max_seq_len)
    return theta, llama3_scaling(*(rope[key] for key in keys), original)


def _check_is_llama(config: Mapping[str, Any]) -> None:
    code = [key for key in ("auto_map", "trust_remote_code", "custom_pipelines") if config.get(key)]
    if code:
        message = f"config.json names code ({', '.join(code)}): ignored, the built-in Llama is used"
        warnings.warn(message, stacklevel=3)
    kind, archs = config.get("model_type"), config.get("architectures") or ["LlamaForCausalLM"]
    # Files from before transformers had the model say LLaMAForCausalLM.
    known = {"llama": "['llamaforcausallm']", SETTINGS["model_type"]: "['llamaint8forcausallm']"}
    if str(archs).lower() != known.get(str(kind)):
        raise ConfigError(
            f"config.json says model_type={kind!r:.80}, architectures={archs!r:.80}; "
            "expected 'llama' and ['LlamaForCausalLM']"
        )
    method = config.get("quantization_config") or config.get("compression_config")
    if method is not None:
        method = method.get("quant_method") if isinstance(method, Mapping) else method
        raise ConfigError(
            f"unsupported quantization {method!r:.80} in config.json; "
            "use the unquantized checkpoint, or a GGUF file"
        )


class SafetensorsFile:
    """The tensors of one file: a TensorSource.

    Attributes:
        description: the file's path.
        shapes: by tensor name.
        dtypes: by tensor name; float32, float16 or bfloat16, or int8.
    """

    def __init__(self, path: str | Path, *, int8: bool = False):
        """Reads and checks the header. Raises ArtifactError; for int8 tensors too, unless `int8`."""
        self._file = InputFile(path)
        self.description = str(path)
        (header_len,) = struct.unpack("<Q", self._file.read(0, 8))
        if header_len > _MAX_HEADER:
            raise ArtifactError(
                f"{path}: header of {header_len} bytes, expected at most {_MAX_HEADER}; "
                "this is not a safetensors file, or a broken one"
            )
        self._data_start = 8 + header_len
        header = bytes(self._file.read(8, header_len))
        if not header.startswith(b"{"):
            raise ArtifactError(f"{path}: header starts with {header[:8]!r}, expected '{{'")
        entries = parse_json(header, f"{path} header", ArtifactError)
        _check_metadata(path, entries.pop("__metadata__", {}))
        self.shapes, self.dtypes, self._spans = {}, {}, {}
        dtypes = _DTYPES | {"I8": np.dtype(np.int8)} if int8 else _DTYPES
        for name, entry in entries.items():
            shape, dtype, span = _parse_entry(f"{path}: tensor {name!r:.200}", entry, dtypes)
            self.shapes[name], self.dtypes[name], self._spans[name] = shape, dtype, span
        self._check_layout(self._file.size - self._data_start)

    def read(self, name: str) -> np.ndarray:
        """The tensor, in an array of its own. Raises ArtifactError if the file changed."""
        out = np.empty(self.shapes[name], self.dtypes[name])
        start, _ = self._spans[name]
        raw = out.reshape(-1).view(np.uint8)
        self._file.read_into(self._data_start + start, memoryview(raw))
        return out

    def read_part(self, name: str, part: tuple[slice, ...]) -> np.ndarray:
        """`read(name)[part]`; of the file, only that is read."""
        rows, columns = part[0], part[1:]
        row_shape = self.shapes[name][1:]
        out = np.empty(
            (rows.stop - rows.start, *(c.stop - c.start for c in columns)), self.dtypes[name]
        )
        row_bytes = math.prod(row_shape) * out.itemsize
        start = self._data_start + self._spans[name][0] + rows.start * row_bytes
        raw = memoryview(out.reshape(-1).view(np.uint8))
        if out.shape[1:] == row_shape:
            self._file.read_into(start, raw)
            return out
        [column] = columns
        start, size = start + column.start * out.itemsize, out.shape[1] * out.itemsize
        self._file.read_each(
            (start + i * row_bytes, raw[i * size : (i + 1) * size]) for i in range(len(out))
        )
        return out

    def _check_layout(self, data_size: int) -> None:
        """The spans must cover the data exactly: no gap, no overlap, nothing behind."""
        expected = 0
        for name, (start, end) in sorted(self._spans.items(), key=lambda item: item[1]):
            if start != expected:
                raise ArtifactError(
                    f"{self.description}: tensor {name!r:.200} starts at byte {start} of the data, "
                    f"expected {expected}: a gap or an overlap"
                )
            expected = end
        if expected != data_size:
            what = "is truncated" if expected > data_size else "has trailing bytes"
            raise ArtifactError(
                f"{self.description} {what}: needs {self._data_start + expected} bytes, "
                f"has {self._data_start + data_size}"
            )


def _check_metadata(path: str | Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ArtifactError(f"{path}: __metadata__ is not an object of strings")


def _parse_entry(where: str, entry: Any, dtypes: Mapping[str, np.dtype]) -> tuple:
    """(shape, dtype, (start, end)) of one header entry. Python's integers cannot overflow."""
    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or set(entry) != keys:
        raise ArtifactError(f"{where}: expected an object with exactly {', '.join(sorted(keys))}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise ArtifactError(
            f"{where} has dtype {dtype!r:.40}, expected {', '.join(dtypes)}; integers and 8-bit "
            "floats mean an unsupported quantization: use the unquantized checkpoint or a GGUF file"
        )
    for key, value in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(value, list) or not all(is_int(n) and n >= 0 for n in value):
            raise ArtifactError(f"{where}: {key}={value!r:.80}, expected a list of integers ≥ 0")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ArtifactError(f"{where}: data_offsets={offsets!r:.80}, expected [start, end]")
    stored = dtypes[dtype]
    need = math.prod(shape) * stored.itemsize if len(shape) <= 8 else -1
    if need != offsets[1] - offsets[0]:
        raise ArtifactError(
            f"{where}: shape {shape!r:.80} of {dtype} needs {need} bytes, "
            f"data_offsets give {offsets[1] - offsets[0]}"
        )
    return tuple(shape), stored, (offsets[0], offsets[1])


class SafetensorsFolder:
    """The tensors of a folder: `model.safetensors`, or the shards that an index lists.

    Where both are there the single file is taken, as transformers does, with a warning.
    Attributes as SafetensorsFile.
    """

    def __init__(self, folder: str | Path, *, int8: bool = False):
        """Reads and checks the index and every header. Raises ArtifactError; `int8` as for a file."""
        self.description = str(folder)
        names = list_folder(folder)
        if SINGLE in names:
            if INDEX in names:
                message = f"{folder} has both {SINGLE} and {INDEX}: {SINGLE} is used"
                warnings.warn(message, stacklevel=2)
            file = SafetensorsFile(Path(folder, SINGLE), int8=int8)
            self._files: dict[str, SafetensorsFile] = dict.fromkeys(file.shapes, file)
        else:
            self._files = _open_shards(Path(folder), names, int8)
        self.files = sorted({Path(file.description) for file in self._files.values()})
        self.shapes = {name: file.shapes[name] for name, file in self._files.items()}
        self.dtypes = {name: file.dtypes[name] for name, file in self._files.items()}

    def read(self, name: str) -> np.ndarray:
        """The tensor, in an array of its own."""
        return self._files[name].read(name)

    def read_part(self, name: str, part: tuple[slice, ...]) -> np.ndarray:
        """`read(name)[part]`; of the file, only that is read."""
        return self._files[name].read_part(name, part)


def _open_shards(folder: Path, present: list[str], int8: bool) -> dict[str, SafetensorsFile]:
    """The file of each tensor. Raises ArtifactError where index, shards and folder disagree."""
    weight_map = _read_index(folder)
    by_shard: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        by_shard.setdefault(shard, set()).add(tensor)
    paths = {shard: named_in(folder / INDEX, shard) for shard in by_shard}
    missing = sorted(shard for shard in by_shard if shard not in present)
    if missing:
        raise ArtifactError(f"{folder} lacks {len(missing)} shards of its index: {listed(missing)}")
    stray = [name for name in present if _SHARD_NAME.fullmatch(name) and name not in by_shard]
    if stray:
        raise ArtifactError(f"{folder} has shards that its index does not list: {listed(stray)}")
    files: dict[str, SafetensorsFile] = {}
    for shard, expected in sorted(by_shard.items()):
        file = SafetensorsFile(paths[shard], int8=int8)
        held = set(file.shapes)
        if twice := sorted(name for name in held if name in files):
            other = files[twice[0]].description
            raise ArtifactError(f"{listed(twice)}: both in {other} and in {paths[shard]}")
        if absent := sorted(expected - held):
            raise ArtifactError(f"{paths[shard]} lacks tensors of the index: {listed(absent)}")
        # A tensor listed for another shard is caught there, as held twice.
        if extra := sorted(name for name in held if name not in weight_map):
            raise ArtifactError(f"{paths[shard]} has tensors not in the index: {listed(extra)}")
        files |= dict.fromkeys(held, file)
    return files


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    weight_map = read_json(path, max_bytes=_MAX_HEADER, error=ArtifactError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ArtifactError(f"{path}: weight_map is not an object of tensor and file names")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            raise ArtifactError(
                f"{path}: {tensor!r:.200} is in {shard!r:.80}, expected a file name"
            )
    return weight_map


def open_hf(path: Path, tie: bool | None) -> tuple[ModelConfig, TensorSource]:
    """Config and tensors of a folder; `tie` as for `models.llama.checkpoint.open_checkpoint`."""
    settings = read_json(path / "config.json")
    config, int8 = to_config(settings), settings["model_type"] == SETTINGS["model_type"]
    source = SafetensorsFolder(path, int8=int8)
    source = Int8Tensors(source) if int8 else source
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    if tie is not None:
        config = dataclasses.replace(config, tie_embeddings=tie)
    elif config.tie_embeddings and head in source.shapes and not same_tensor(source, embed, head):
        raise ArtifactError(
            f"{path}: config.json says tie_word_embeddings, but {head} differs from {embed}; pass "
            "tie=True (--tie) to follow the config, tie=False (--notie) to keep the file's head"
        )
    if config.tie_embeddings:
        source.shapes.pop(head, None)
    return config, source


def write_hf(
    folder: Path,
    settings: Mapping[str, Any],
    tensors: Iterable[tuple[str, np.ndarray]],
    max_shard_bytes: int,
) -> None:
    """Writes config.json, and the tensors to one file or to shards with an index."""
    write_json(folder / "config.json", settings)
    shards: list[dict[str, np.ndarray]] = [{}]
    size = total = 0
    for name, array in tensors:
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
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_shard(path: Path, shard: dict[str, np.ndarray]) -> None:
    # The package writes from the arrays' memory as it lies, whatever their strides.
    contiguous = {name: np.ascontiguousarray(array) for name, array in shard.items()}
    path.touch()
    mode = path.stat().st_mode
    # transformers refuses a file that does not say this.
    save_file(contiguous, path, metadata={"format": "pt"})
    path.chmod(mode)  # the package leaves it to its owner alone


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes an object as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
