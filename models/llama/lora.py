"""LoRA: low-rank updates as a tree of their own, next to frozen parameters.

The tree has, for each adapted matrix `w` [L, out, in], `w_a` [L, rank, in] and `w_b` [L, out, rank];
the model adds b·a·x to w·x and never forms b·a (utils.ops.linear). Source: Hu et al., 2106.09685.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from models.llama.config import ModelConfig
from models.llama.layout import MATRICES, PARAM_AXES, Axes
from utils.fields import Config, Range, field, integer, number
from utils.int8 import dequantize

Array = jax.Array
Params = dict[str, Any]

TARGETS = tuple(MATRICES)
_SOME_TARGETS = Range(
    f"some of {', '.join(TARGETS)}",
    lambda x: isinstance(x, tuple) and len(x) > 0 and all(name in TARGETS for name in x),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig(Config):
    """Rank, scale (alpha / rank) and place of the adapters."""

    rank: int = field(16, "rank of the adapters", integer(1), flag="lora_rank")
    alpha: float | None = field(
        None,
        "adapters are scaled by alpha / rank; default: twice the rank",
        number(above=0, below=1e6),
        flag="lora_alpha",
    )
    targets: tuple[str, ...] = field(TARGETS, "adapted matrices of a layer", _SOME_TARGETS, flag="")

    def __post_init__(self) -> None:
        if isinstance(self.targets, list):  # from JSON; a tuple is hashable
            object.__setattr__(self, "targets", tuple(self.targets))
        super().__post_init__()

    @property
    def scale(self) -> float:
        """Factor of b·a."""
        return 2.0 if self.alpha is None else self.alpha / self.rank


def init_lora(config: ModelConfig, lora: LoRAConfig, key: Array, dtype=jnp.float32) -> Params:
    """A fresh tree: a uniform as in LoRA's own code (Kaiming, within 1/sqrt(in)), b zero."""
    layers: dict[str, dict[str, Array]] = {}
    for i, (name, (out_dim, in_dim)) in enumerate(config.matrix_shapes.items()):
        if name in lora.targets:
            shape = (config.n_layers, lora.rank, in_dim)
            bound = in_dim**-0.5
            a = jax.random.uniform(jax.random.fold_in(key, i), shape, dtype, -bound, bound)
            b = jnp.zeros((config.n_layers, out_dim, lora.rank), dtype)
            layers.setdefault(MATRICES[name], {}).update({f"{name}_a": a, f"{name}_b": b})
    return {"layers": layers}


def adapter_axes(lora: LoRAConfig) -> dict[str, Axes]:
    """Logical axes of the tree, from those of the matrices."""
    rows = {}
    for name, part in MATRICES.items():
        if name in lora.targets:
            path = f"layers/{part}/{name}"
            depth, out, inner = PARAM_AXES[path]
            rows |= {f"{path}_a": (depth, None, inner), f"{path}_b": (depth, out, None)}
    return rows


def attach(params: Params, tree: Params, lora: LoRAConfig) -> Params:
    """The parameters with LoRA's matrices added to the tree, as the model reads them; no copies."""
    layers = dict(params["layers"])
    for part, matrices in tree["layers"].items():
        scaled = {k: v * lora.scale if k.endswith("_b") else v for k, v in matrices.items()}
        layers[part] = {**layers[part], **scaled}
    return {**params, "layers": layers}


def merge(params: Params, tree: Params, lora: LoRAConfig) -> Params:
    """Parameters of the same shapes with the updates added (others that are attached left out).

    Computed in float32, a matrix at a time, and rounded once to the parameters' dtype (float32 for
    those in eight bits).
    """
    params = dequantize(params)
    layers = dict(params["layers"])
    for part, matrices in tree["layers"].items():
        layers[part] = {k: v for k, v in layers[part].items() if k[-2:] not in ("_a", "_b")}
        for name in TARGETS:
            if f"{name}_a" in matrices:
                a, b = matrices[f"{name}_a"], matrices[f"{name}_b"]
                layers[part][name] = _merged(layers[part][name], a, b, lora.scale)
    return {**params, "layers": layers}


@jax.jit
def _merged(w: Array, a: Array, b: Array, scale: float) -> Array:
    f32 = jnp.float32
    update = jnp.einsum("lor,lri->loi", b.astype(f32), a.astype(f32), precision="highest")
    return (w.astype(f32) + scale * update).astype(w.dtype)
