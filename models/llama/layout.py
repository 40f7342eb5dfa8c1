"""The parameters of a model, their shapes, and what each file format calls them. No JAX here."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from models.llama.config import ModelConfig

# One row a parameter: shape of one layer's array in fields of ModelConfig, then the names in Hugging
# Face, Meta and GGUF files ({} is the layer). Matrices are [out, in] everywhere. Large ones first:
# the embedding is one tensor for one thread, and others have work beside it meanwhile.
_TABLE = {
    "embed": (("vocab_size", "dim"), "model.embed_tokens", "tok_embeddings", "token_embd"),
    "lm_head": (("vocab_size", "dim"), "lm_head", "output", "output"),
    "layers/mlp/w_gate": (
        ("ffn_dim", "dim"),
        "model.layers.{}.mlp.gate_proj",
        "layers.{}.feed_forward.w1",
        "blk.{}.ffn_gate",
    ),
    "layers/mlp/w_up": (
        ("ffn_dim", "dim"),
        "model.layers.{}.mlp.up_proj",
        "layers.{}.feed_forward.w3",
        "blk.{}.ffn_up",
    ),
    "layers/mlp/w_down": (
        ("dim", "ffn_dim"),
        "model.layers.{}.mlp.down_proj",
        "layers.{}.feed_forward.w2",
        "blk.{}.ffn_down",
    ),
    "layers/attn/wq": (
        ("n_heads*head_dim", "dim"),
        "model.layers.{}.self_attn.q_proj",
        "layers.{}.attention.wq",
        "blk.{}.attn_q",
    ),
    "layers/attn/wk": (
        ("n_kv_heads*head_dim", "dim"),
        "model.layers.{}.self_attn.k_proj",
        "layers.{}.attention.wk",
        "blk.{}.attn_k",
    ),
    "layers/attn/wv": (
        ("n_kv_heads*head_dim", "dim"),
        "model.layers.{}.self_attn.v_proj",
        "layers.{}.attention.wv",
        "blk.{}.attn_v",
    ),
    "layers/attn/wo": (
        ("dim", "n_heads*head_dim"),
        "model.layers.{}.self_attn.o_proj",
        "layers.{}.attention.wo",
        "blk.{}.attn_output",
    ),
    "layers/attn_norm": (
        ("dim",),
        "model.layers.{}.input_layernorm",
        "layers.{}.attention_norm",
        "blk.{}.attn_norm",
    ),
    "layers/ffn_norm": (
        ("dim",),
        "model.layers.{}.post_attention_layernorm",
        "layers.{}.ffn_norm",
        "blk.{}.ffn_norm",
    ),
    "final_norm": (("dim",), "model.norm", "norm", "output_norm"),
}
_FORMATS = {"hf": 1, "meta": 2, "gguf": 3}

# Matrices with the same input, which decoding multiplies as one: see `models.llama.model.for_decoding`.
FUSED = {"attn": {"qkv": ("q", "k", "v")}, "mlp": {"_gate_up": ("_gate", "_up")}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """One array of the parameters, and the tensors of a file that it is made of.

    Attributes:
        path: where it is in the nested dict.
        fields: its layer's shape in fields of ModelConfig, for error messages.
        shape: the same in numbers, without the layer axis.
        names: tensor names, one a layer, or one alone.
        stacked: it has a leading layer axis.
        heads: of wq, wk, bq and bk in Meta's and GGUF's RoPE layout: the number of heads whose rows
            must be reordered. Else 0.
    """

    path: tuple[str, ...]
    fields: tuple[str, ...]
    shape: tuple[int, ...]
    names: tuple[str, ...]
    stacked: bool
    heads: int


def leaves(config: ModelConfig, format: str) -> list[Leaf]:
    """The parameters of a model.

    Args:
        config: the model.
        format: "hf", "meta" or "gguf", which decides the names.
    """
    out = []
    for path, row in _TABLE.items():
        if path == "lm_head" and config.tie_embeddings:
            continue
        name = row[_FORMATS[format]]
        out.append(_leaf(config, path, row[0], f"{name}.weight", format))
        parent, key = path.rpartition("/")[::2]
        has_bias = {"layers/attn": config.attention_bias, "layers/mlp": config.mlp_bias}
        if has_bias.get(parent, False):
            # wq -> bq, w_gate -> b_gate
            out.append(_leaf(config, f"{parent}/b{key[1:]}", row[0][:1], f"{name}.bias", format))
    return out


def _leaf(config: ModelConfig, path: str, fields: tuple[str, ...], name: str, format: str) -> Leaf:
    stacked = path.startswith("layers/")
    key = path.rpartition("/")[2]
    heads = {"wq": config.n_heads, "bq": config.n_heads}
    heads |= {"wk": config.n_kv_heads, "bk": config.n_kv_heads}
    return Leaf(
        path=tuple(path.split("/")),
        fields=fields,
        shape=tuple(math.prod(getattr(config, f) for f in field.split("*")) for field in fields),
        names=tuple(name.format(i) for i in range(config.n_layers)) if stacked else (name,),
        stacked=stacked,
        heads=0 if format == "hf" else heads.get(key, 0),
    )


def decoding_groups(parts: list[Leaf]) -> list[list[Leaf]]:
    """Parameters that decoding multiplies as one, in the order of FUSED; the others alone."""
    groups: dict[tuple[str, ...], list[Leaf]] = {}
    for leaf in parts:
        groups.setdefault(fused_path(leaf.path), []).append(leaf)
    return list(groups.values())


def fused_path(path: tuple[str, ...]) -> tuple[str, ...]:
    """Where a parameter is in the layout for decoding: layers/attn/wq is part of wqkv."""
    *parent, name = path
    for fused, names in FUSED.get(parent[-1] if parent else "", {}).items():
        if name[1:] in names:
            return (*parent, name[0] + fused)
    return path


def to_half_split(x: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection from neighbour pairs (Meta, GGUF) to the half-split RoPE layout.

    Row 2i + j of a head goes to row j · head_dim / 2 + i.

    Args:
        x: [heads * head_dim, ...].
        heads: how many heads the rows are.

    Returns:
        [heads, 2, head_dim / 2, ...], a view.
    """
    return x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2)


def to_neighbour_pairs(x: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `to_half_split`: [heads, head_dim / 2, 2, ...], a view."""
    return x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2)


def flatten(params: Mapping) -> dict[tuple[str, ...], object]:
    """The arrays of a nested dict by path."""
    out = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            out |= {(key, *path): leaf for path, leaf in flatten(value).items()}
        else:
            out[(key,)] = value
    return out


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two contiguous arrays are equal to the bit (NaN too, and -0 is not 0)."""
    raw = lambda x: x.reshape(-1).view(f"u{x.itemsize}")
    return (a.shape, a.dtype) == (b.shape, b.dtype) and np.array_equal(raw(a), raw(b))
