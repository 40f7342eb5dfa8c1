"""`ModelConfig`: the settings that decide the maths of a model.

No JAX here: a config is plain data, so that loaders and planners can check it before anything else.
models/llama/formats/ maps each file format's own settings to it.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from models.llama import layout
from utils.errors import ConfigError, is_int, is_number, raise_all
from utils.fields import Config, Range, field, integer, number, one_of

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How RoPE frequencies are stretched for long contexts.

    kind "linear": every frequency / factor. kind "llama3": three bands by wavelength (Llama 3.1).
    kind "factors": frequency i / factors[i], for GGUF files whose tensor `rope_freqs.weight` does
    not follow the llama3 rule.
    """

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_len: int = 0
    factors: tuple[float, ...] = ()

    def __post_init__(self):
        bad = []
        if self.kind not in ("linear", "llama3", "factors"):
            bad.append(f"type {self.kind!r} is not supported (linear, llama3)")
        if not is_number(self.factor) or not 0 < self.factor < math.inf:
            bad.append(f"factor={self.factor!r}, expected a positive number")
        if self.kind == "llama3":
            low, high = self.low_freq_factor, self.high_freq_factor
            if not (is_number(low) and is_number(high) and 0 < low < high < math.inf):
                bad.append(
                    f"low_freq_factor={low!r}, high_freq_factor={high!r}, "
                    "expected 0 < low < high"
                )
            if not is_int(self.original_max_len) or self.original_max_len <= 0:
                bad.append(
                    f"original_max_position_embeddings={self.original_max_len!r}, "
                    "expected a positive integer"
                )
        if not all(is_number(f) and 0 < f < math.inf for f in self.factors):
            bad.append("factors must be positive finite numbers")
        raise_all("rope scaling", bad)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """Everything that decides the maths of a Llama or a relative, and nothing else.

    Hugging Face's names: dim hidden_size, n_layers num_hidden_layers, n_heads num_attention_heads,
    n_kv_heads num_key_value_heads, ffn_dim intermediate_size, norm_eps rms_norm_eps, max_seq_len
    max_position_embeddings, tie_embeddings tie_word_embeddings, activation hidden_act, family
    model_type.
    """

    # The largest Llama (405B) has 126 layers, dim 16384, ffn 53248. The limits are a generous multiple
    # of each, so that a corrupt file is refused before anything is allocated.
    vocab_size: int = field(allowed=integer(1, 2**24))
    dim: int = field(allowed=integer(1, 2**18))
    n_layers: int = field(allowed=integer(1, 4096))
    n_heads: int = field(allowed=integer(1, 2**14))
    n_kv_heads: int = field(allowed=integer(1, 2**14))
    head_dim: int = field(allowed=integer(1, 2**14))
    ffn_dim: int = field(allowed=integer(1, 2**20))
    norm_eps: float = field(allowed=number(above=0, most=1.0))
    rope_theta: float = field(allowed=number(above=0, most=1e12))
    rope_scaling: RopeScaling | None = field(
        allowed=Range("a RopeScaling", lambda x: isinstance(x, RopeScaling))
    )
    max_seq_len: int = field(allowed=integer(1, 2**31 - 1))
    tie_embeddings: bool
    activation: str = field(allowed=one_of(*ACTIVATIONS))
    attention_bias: bool
    mlp_bias: bool
    family: str = field("llama", allowed=one_of(*layout.FAMILIES))

    def problems(self) -> list[str]:
        """See Config; rules between fields are looked at once each field is right by itself."""
        if bad := super().problems():
            return bad
        for name, value in layout.FAMILIES[self.family].fixed.items():
            if getattr(self, name, value) != value:
                bad.append(f"a {self.family} model has {name}={value}")
        if self.n_heads % self.n_kv_heads:
            bad.append(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        if self.head_dim % 2:
            bad.append(f"head_dim={self.head_dim} is odd: RoPE rotates pairs")
        factors = self.rope_scaling.factors if self.rope_scaling else ()
        if factors and len(factors) != self.head_dim // 2:
            bad.append(f"{len(factors)} rope factors for head_dim={self.head_dim}")
        return bad

    @property
    def matrix_shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each matrix of a layer, by its name."""
        return layout.matrix_shapes(self)

    @property
    def n_params(self) -> int:
        """Number of parameters; a tied head is counted once."""
        return layout.n_params(self)


def llama3_scaling(
    factor: Any, low: Any = 1.0, high: Any = 4.0, original: Any = 8192
) -> RopeScaling:
    """Llama 3.1's RoPE scaling; the defaults are the values that Meta's code fixes."""
    return RopeScaling(
        kind="llama3",
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_len=original,
    )


def require(mapping: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    """Raises one ConfigError that names every key that a format's settings lack, or have as null."""
    missing = [key for key in keys if mapping.get(key) is None]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}")


def divide(total: Any, parts: Any, total_name: str, parts_name: str) -> int:
    """The head_dim of a format's settings that do not say it: width over heads."""
    if not is_int(total) or not is_int(parts) or parts <= 0 or total <= 0 or total % parts:
        raise ConfigError(
            f"{total_name}={total!r:.80} is not a multiple of {parts_name}={parts!r:.80}, "
            "and no head_dim is given"
        )
    return total // parts


def inv_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """RoPE's angle per position of each pair, [head_dim / 2] float32, scaled.

    Source: RoFormer (2104.09864) eq. 15: theta^(-2i / head_dim).
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inv_freq = 1 / np.power(np.float32(theta), exponents)
    if scaling is None:
        return inv_freq
    if scaling.kind == "linear":
        return inv_freq / np.float32(scaling.factor)
    if scaling.kind == "factors":
        return inv_freq / np.asarray(scaling.factors, np.float32)
    return inv_freq / llama3_factors(head_dim, theta, scaling)


def llama3_factors(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Divisors of RoPE's frequencies in llama3 scaling, [head_dim / 2] float32.

    Short wavelengths are kept, long ones divided by `factor`, with a smooth transition between.
    Source: Llama 3.1's reference code (`apply_scaling`), transformers'
    `_compute_llama3_parameters`.
    """
    wavelength = np.float32(2 * np.pi) / inv_frequencies(head_dim, theta, None)
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    original, factor = np.float32(scaling.original_max_len), np.float32(scaling.factor)
    smooth = np.clip((original / wavelength - low) / (high - low), np.float32(0), np.float32(1))
    return 1 / ((1 - smooth) / factor + smooth)
