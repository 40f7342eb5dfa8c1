"""Hugging Face's format, in and out: config.json beside the safetensors. No JAX here."""

import dataclasses
import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from models.llama.config import ModelConfig, RopeScaling, divide, llama3_scaling, require
from models.llama.formats.int8 import SUFFIX, Int8Tensors
from models.llama.formats.safetensors import INDEX, SINGLE, SafetensorsFolder
from models.llama.layout import FAMILIES, TensorSource, same_tensor
from utils.errors import ArtifactError, ConfigError, is_int
from utils.files import read_json

# (ours, config.json's, what transformers takes where the key is absent) of each setting that both
# have as it is.
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
    name = _family(config)
    config = {**FAMILIES[name].absent, **config, **FAMILIES[name].fixed}
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
    fields |= dict(activation=activation, rope_theta=theta, rope_scaling=scaling, family=name)
    model = ModelConfig(**fields)
    _check_sees_all(config, model)
    return model


def _check_sees_all(config: Mapping[str, Any], model: ModelConfig) -> None:
    """Refuses layers whose attention sees a window smaller than the context."""
    window, types = config.get("sliding_window"), config.get("layer_types")
    if types is not None:
        sees_all = types == ["full_attention"] * model.n_layers
    else:
        first = config.get("max_window_layers")  # layers before it have no window
        sees_all = not config.get("use_sliding_window") or window is None
        sees_all = sees_all or (is_int(window) and window >= model.max_seq_len)
        sees_all = sees_all or (is_int(first) and first >= model.n_layers)
    if not sees_all:
        raise ConfigError(
            f"config.json sliding_window={window!r:.40}: attention within a window is not supported; "
            "set max_position_embeddings to the window, if so short a context will do"
        )


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
    family = FAMILIES[config.family]
    settings = {theirs: getattr(config, ours) for ours, theirs, _ in _SETTINGS}
    return {
        "architectures": [f"{config.family.capitalize()}ForCausalLM"],
        "model_type": config.family,
        **{key: value for key, value in settings.items() if key not in family.fixed},
        **dict.fromkeys(family.absent.keys() & {"sliding_window"}),
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


def _family(config: Mapping[str, Any]) -> str:
    """The name of a config.json's family, without what marks eight bits."""
    code = [key for key in ("auto_map", "trust_remote_code", "custom_pipelines") if config.get(key)]
    if code:
        message = f"config.json names code ({', '.join(code)}): ignored, the built-in model is used"
        warnings.warn(message, stacklevel=3)
    kind = config.get("model_type")
    expected, name = [f"{kind}ForCausalLM".replace("_", "")], str(kind).removesuffix(SUFFIX)
    archs = config.get("architectures") or expected
    # Files from before transformers had the model say LLaMAForCausalLM.
    if name not in FAMILIES or str(archs).lower() != str(expected).lower():
        raise ConfigError(
            f"config.json says model_type={kind!r:.80}, architectures={archs!r:.80}; expected "
            f"{', '.join(FAMILIES)}, and its ...ForCausalLM"
        )
    method = config.get("quantization_config") or config.get("compression_config")
    if method is not None:
        method = method.get("quant_method") if isinstance(method, Mapping) else method
        raise ConfigError(
            f"unsupported quantization {method!r:.80} in config.json; "
            "use the unquantized checkpoint, or a GGUF file"
        )
    return name


def open_hf(path: Path, tie: bool | None) -> tuple[ModelConfig, TensorSource]:
    """Config and tensors of a folder; `tie` as for `models.llama.checkpoint.open_checkpoint`."""
    settings = read_json(path / "config.json")
    config, int8 = to_config(settings), settings["model_type"].endswith(SUFFIX)
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
        write_tensors(folder / SINGLE, shards[0])
        return
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_tensors(path: Path, shard: dict[str, np.ndarray]) -> None:
    """Writes a file of tensors; contiguous ones, as the package does not look at strides."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in shard.items()}
    path.touch()
    mode = path.stat().st_mode
    # transformers refuses a file that does not say this.
    save_file(contiguous, path, metadata={"format": "pt"})
    path.chmod(mode)  # the package leaves it to its owner alone


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes an object as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
