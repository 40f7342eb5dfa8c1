"""RoPE's scaling as each file format writes it. No JAX here."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from utils.errors import ConfigError, is_int, is_number
from utils.rope import RopeScaling, llama3_factors

_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "factor"}
_ROPE_KEYS |= {"low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}


def require(mapping: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    """Raises one ConfigError that names every key that is absent or null."""
    missing = [key for key in keys if mapping.get(key) is None]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}")


def llama3_scaling(
    factor: Any, low: Any = 1.0, high: Any = 4.0, original: Any = 8192
) -> RopeScaling:
    """Llama 3.1's scaling; the defaults are what Meta's code fixes."""
    return RopeScaling(
        kind="llama3",
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_len=original,
    )


def rope_from_hf(config: Mapping[str, Any]) -> tuple[Any, RopeScaling | None]:
    """(theta, scaling) from either dialect; anything that would be ignored is refused by name."""
    parameters, old = config.get("rope_parameters"), config.get("rope_scaling")
    for name, value in (("rope_parameters", parameters), ("rope_scaling", old)):
        if value is not None and not isinstance(value, Mapping):
            raise ConfigError(f"config.json {name}={value!r:.80}, expected an object")
    old, parameters = old or {}, parameters or {}
    rope = {**old, **parameters}
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
    if kind == "linear":
        require(rope, ("factor",), "config.json RoPE scaling")
        return theta, RopeScaling(kind="linear", factor=rope["factor"])
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    require(rope, keys, "config.json RoPE scaling")
    return theta, llama3_scaling(*(rope[key] for key in keys))


def shortest(x: Any) -> Any:
    """GGUF stores float32: the shortest decimal is the number that was meant."""
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinity, and is refused
        return float(str(np.float32(x))) if isinstance(x, float) else x


def rope_from_gguf(
    metadata: Mapping[str, Any], rope_factors: np.ndarray | None, head_dim: Any
) -> RopeScaling | None:
    """The scaling of a GGUF file, from its keys or its tensor `rope_freqs.weight`."""
    # llama.cpp: without a type, a factor is linear scaling; 0 means none.
    kind = metadata.get("llama.rope.scaling.type", "linear")
    factor = metadata.get("llama.rope.scaling.factor", metadata.get("llama.rope.scale_linear", 1.0))
    if kind not in ("none", "linear"):
        raise ConfigError(
            f"GGUF llama.rope.scaling.type {kind!r:.80} is not supported (none, linear)"
        )
    linear = kind == "linear" and factor not in (0.0, 1.0)
    if rope_factors is None:
        return RopeScaling(kind="linear", factor=shortest(factor)) if linear else None
    if linear:
        raise ConfigError("GGUF has both rope_freqs.weight and linear RoPE scaling")
    if not is_int(head_dim) or rope_factors.shape != (head_dim // 2,):
        raise ConfigError(
            f"GGUF rope_freqs.weight is {list(rope_factors.shape)}, head_dim={head_dim!r:.80}"
        )
    if not np.isfinite(rope_factors).all():
        raise ConfigError("GGUF rope_freqs.weight has NaN or infinity")
    if np.all(rope_factors == 1):
        return None
    # llama.cpp's converter writes the factors and drops the rule; Llama 3.1 and 3.2 have this one.
    theta = metadata.get("llama.rope.freq_base", 10000.0)
    if np.max(rope_factors) > 0 and is_number(theta) and theta > 0:
        guess = llama3_scaling(float(np.max(rope_factors)))
        if np.allclose(llama3_factors(head_dim, theta, guess), rope_factors, rtol=1e-5):
            return guess
    return RopeScaling(kind="factors", factors=tuple(float(f) for f in rope_factors))
