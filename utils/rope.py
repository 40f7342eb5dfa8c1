"""RoPE frequencies and their scalings, in numpy, for the model, its loaders and the planner."""

import dataclasses
import math

import numpy as np

from utils.errors import is_int, is_number, raise_all


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
