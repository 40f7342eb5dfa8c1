"""The parameters of a model: one table, from which everything that knows them is derived. No JAX here.

A row of the table states a parameter's path, its shape in fields of ModelConfig, its name in each file
format, and whether a bias goes with it. Shapes, counts, logical axes for sharding, the matrices that
LoRA adapts and the tensors of a checkpoint follow from the rows.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from utils.errors import ConfigError
from utils.files import flatten

# Types that weights may have, in files and in memory.
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
DTYPES |= {"float16": np.dtype(np.float16)}

Axes = tuple[str | None, ...]


class Family(NamedTuple):
    """A relative of Llama, by its `model_type`: what its files leave unsaid.

    Attributes:
        absent: config.json's values where a key is absent, if they are not those of `formats.hf`.
        fixed: config.json's values whatever it says, since transformers' class does not read them.
        gguf: how GGUF files have the rows of wq and wk: in neighbour "pairs" as Meta's, or in
            "halves"; "": it is not an architecture of theirs.
    """

    absent: Mapping[str, Any] = {}
    fixed: Mapping[str, Any] = {}
    gguf: str = ""


_NO_BIASES = {"attention_bias": False, "mlp_bias": False}  # or not by a setting
_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768}
_QWEN |= {"sliding_window": 4096, "max_window_layers": 28}
_MISTRAL = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}
_ALL_WINDOWS = {"use_sliding_window": True, "max_window_layers": 0, "layer_types": None}
FAMILIES = {
    "llama": Family(fixed={"use_sliding_window": False, "layer_types": None}, gguf="pairs"),
    "mistral": Family(_MISTRAL, _NO_BIASES | _ALL_WINDOWS),
    "qwen2": Family(_QWEN, _NO_BIASES, gguf="halves"),
    "qwen3": Family(_QWEN | {"head_dim": 128}, {"mlp_bias": False}, gguf="halves"),
}
GGUF_FAMILIES = tuple(name for name, family in FAMILIES.items() if family.gguf)

# Sizes as products of config fields, named by the house's dimension key; and the logical axis over
# which a matrix is sharded along each (utils/sharding.py). Vectors of size D are not sharded.
_V, _D, _F, _H, _NH, _KH = (
    "vocab_size dim ffn_dim head_dim n_heads*head_dim n_kv_heads*head_dim".split()
)
_AXES = {_V: "vocab", _D: "embed", _F: "ffn", _NH: "heads", _KH: "kv_heads"}


class Sizes(Protocol):
    """The fields of a ModelConfig that the table's sizes name, and these."""

    family: str
    n_layers: int
    tie_embeddings: bool


class Row(NamedTuple):
    """One parameter, or one that each layer has.

    Attributes:
        path: its keys in the nested dict, "layers/attn/wq".
        size: of each axis but that of the layers, as a product of config fields; matrices are [out,
            in] in every format.
        hf, meta, gguf: the tensor's name in each format; {} is the layer.
        bias: `only` of the bias [out] that goes with it, "b" for "w" in its name.
        unless: the config field that says that a model lacks it.
        only: which models have it: a config field that says so, and families.
    """

    path: str
    size: tuple[str, ...]
    hf: str
    meta: str
    gguf: str
    bias: str = ""
    unless: str = ""
    only: str = ""

    @property
    def stacked(self) -> bool:
        """Whether it has a leading layer axis."""
        return self.path.startswith("layers/")

    @property
    def axes(self) -> Axes:
        """Logical axes, that of the layers included."""
        matrix = len(self.size) == 2
        axes = tuple(_AXES.get(n) if matrix or n != _D else None for n in self.size)
        return (None, *axes) if self.stacked else axes

    def shape(self, config: Sizes) -> tuple[int, ...]:
        """The shape in numbers, without the layer axis."""
        return tuple(math.prod(getattr(config, f) for f in n.split("*")) for n in self.size)


_MODEL = (
    Row("embed", (_V, _D), "model.embed_tokens", "tok_embeddings", "token_embd"),
    Row("final_norm", (_D,), "model.norm", "norm", "output_norm"),
    Row("lm_head", (_V, _D), "lm_head", "output", "output", unless="tie_embeddings"),
)
_ATTN, _QKV, _MLP = "attention_bias", "attention_bias qwen2", "mlp_bias"
_LAYER = (
    Row("attn_norm", (_D,), "input_layernorm", "attention_norm", "attn_norm"),
    Row("attn/wq", (_NH, _D), "self_attn.q_proj", "attention.wq", "attn_q", _QKV),
    Row("attn/wk", (_KH, _D), "self_attn.k_proj", "attention.wk", "attn_k", _QKV),
    Row("attn/wv", (_KH, _D), "self_attn.v_proj", "attention.wv", "attn_v", _QKV),
    Row("attn/q_norm", (_H,), "self_attn.q_norm", "", "attn_q_norm", only="qwen3"),
    Row("attn/k_norm", (_H,), "self_attn.k_norm", "", "attn_k_norm", only="qwen3"),
    Row("attn/wo", (_D, _NH), "self_attn.o_proj", "attention.wo", "attn_output", _ATTN),
    Row("ffn_norm", (_D,), "post_attention_layernorm", "ffn_norm", "ffn_norm"),
    Row("mlp/w_gate", (_F, _D), "mlp.gate_proj", "feed_forward.w1", "ffn_gate", _MLP),
    Row("mlp/w_up", (_F, _D), "mlp.up_proj", "feed_forward.w3", "ffn_up", _MLP),
    Row("mlp/w_down", (_D, _F), "mlp.down_proj", "feed_forward.w2", "ffn_down", _MLP),
)
# What a layer's tensors have before their names; {} is the layer's number.
_PREFIXES = {"hf": "model.layers.{}.", "meta": "layers.{}.", "gguf": "blk.{}."}

# Rows of the q and k projections come in another order in Meta's and GGUF's files: how many heads.
_ROTATED = dict.fromkeys(("layers/attn/wq", "layers/attn/bq"), "n_heads")
_ROTATED |= dict.fromkeys(("layers/attn/wk", "layers/attn/bk"), "n_kv_heads")

# Matrices with the same input, which decoding multiplies as one: see `models.llama.model.for_decoding`.
FUSED = {"attn": {"qkv": ("q", "k", "v")}, "mlp": {"_gate_up": ("_gate", "_up")}}


def _table() -> tuple[Row, ...]:
    """All parameters, biases included, with whole paths and names."""
    rows = []
    for row in (*_MODEL, *_LAYER):
        prefixes = _PREFIXES if row in _LAYER else dict.fromkeys(_PREFIXES, "")
        names = {format: prefix + getattr(row, format) for format, prefix in prefixes.items()}
        path = f"layers/{row.path}" if row in _LAYER else row.path
        rows.append(row._replace(path=path, **{f: f"{name}.weight" for f, name in names.items()}))
        if row.bias:
            parent, _, name = path.rpartition("/")
            biases = {f: f"{name}.bias" for f, name in names.items()}
            rows.append(Row(f"{parent}/b{name[1:]}", row.size[:1], **biases, only=row.bias))
    return tuple(rows)


TABLE = _table()

# Logical axes of every parameter, by its path (utils/sharding.py). The layer axis is not sharded.
PARAM_AXES: dict[str, Axes] = {row.path: row.axes for row in TABLE}

# The part of a layer ("attn" or "mlp") that has a matrix, by the matrix's name.
MATRICES: dict[str, str] = {
    name: part
    for part, name in (row.path.split("/")[1:] for row in TABLE if row.path.count("/") == 2)
    if name.startswith("w")
}


def rows_of(config: Sizes) -> list[Row]:
    """The parameters that a model has."""
    return [
        row
        for row in TABLE
        if not (row.unless and getattr(config, row.unless))
        and (not row.only or any(_says(config, word) for word in row.only.split()))
    ]


def _says(config: Sizes, word: str) -> bool:
    return word == config.family or getattr(config, word, False)


def param_axes(config: Sizes) -> dict[str, Axes]:
    """The rows of PARAM_AXES that a model has parameters for."""
    return {row.path: row.axes for row in rows_of(config)}


def decoding_axes(table: Mapping[str, Axes]) -> dict[str, Axes]:
    """The same rows for `models.llama.model.for_decoding` on a mesh, one array per layer; paths are
    regular expressions.
    """
    return {
        path.replace("layers/", r"layers/\d+/"): axes[1:] if path.startswith("layers/") else axes
        for path, axes in table.items()
    }


def matrix_shapes(config: Sizes) -> dict[str, tuple[int, int]]:
    """(out, in) of each matrix of a layer, by its name."""
    shapes = {row.path: row.shape(config) for row in TABLE}
    return {name: shapes[f"layers/{part}/{name}"] for name, part in MATRICES.items()}


def n_params(config: Sizes) -> int:
    """Number of parameters; a tied head is counted once."""
    copies = {True: config.n_layers, False: 1}
    return sum(math.prod(row.shape(config)) * copies[row.stacked] for row in rows_of(config))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """One array of the parameters, and the tensors of a file that it is made of.

    Attributes:
        path: its keys in the nested dict, "layers/attn/wq".
        fields: its layer's shape in fields of ModelConfig, for error messages.
        shape: the same in numbers, without the layer axis.
        names: tensor names, one per layer, or a single one.
        stacked: whether it has a leading layer axis.
        heads: the number of heads whose rows must be reordered: those of wq, wk, bq and bk in Meta's
            and GGUF's RoPE layout. Otherwise 0.
    """

    path: str
    fields: tuple[str, ...]
    shape: tuple[int, ...]
    names: tuple[str, ...]
    stacked: bool
    heads: int


def leaves(config: Sizes, format: str) -> list[Leaf]:
    """The parameters of a model.

    Args:
        config: the model.
        format: "hf", "meta" or "gguf", which decides the names.
    """
    order = {"hf": "halves", "meta": "pairs", "gguf": FAMILIES[config.family].gguf}[format]
    out = []
    for row in rows_of(config):
        heads = _ROTATED.get(row.path) if order == "pairs" else None
        layers = range(config.n_layers if row.stacked else 1)
        out.append(
            Leaf(
                path=row.path,
                fields=row.size,
                shape=row.shape(config),
                names=tuple(getattr(row, format).format(i) for i in layers),
                stacked=row.stacked,
                heads=getattr(config, heads) if heads else 0,
            )
        )
    return out


def decoding_groups(parts: list[Leaf]) -> list[list[Leaf]]:
    """Parameters that decoding multiplies as one, in the order of FUSED; the others alone."""
    groups: dict[str, list[Leaf]] = {}
    for leaf in parts:
        groups.setdefault(fused_path(leaf.path), []).append(leaf)
    return list(groups.values())


def fused_path(path: str) -> str:
    """A parameter's path in the layout for decoding: layers/attn/wq is part of layers/attn/wqkv."""
    parent, _, name = path.rpartition("/")
    for fused, names in FUSED.get(parent.removeprefix("layers/"), {}).items():
        if name[1:] in names:
            return f"{parent}/{name[0]}{fused}"
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


def check_params(params: Mapping[str, Any], parts: list[Leaf]) -> dict[str, Any]:
    """The arrays of a model by path. Raises one ConfigError that lists all that do not fit it."""
    arrays = flatten(params)
    expected = {
        leaf.path: ((len(leaf.names),) if leaf.stacked else ()) + leaf.shape for leaf in parts
    }
    bad = [f"{path} is missing" for path in expected if path not in arrays]
    for path, array in arrays.items():
        if path not in expected:
            bad.append(f"{path} is not a parameter of this config")
        elif tuple(array.shape) != expected[path]:
            bad.append(f"{path} is {list(array.shape)}, expected {list(expected[path])}")
        elif array.dtype.name not in DTYPES:
            bad.append(f"{path} has dtype {array.dtype.name}, expected {', '.join(DTYPES)}")
    if bad:
        more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise ConfigError(f"params do not fit the config: {'; '.join(bad[:10])}{more}")
    return arrays


def file_tensors(parts: list[Leaf], arrays: Mapping) -> Iterator[tuple[str, np.ndarray]]:
    """(tensor's name, its array) of every parameter, as a file has them; on CPU views, not copies."""
    for leaf in parts:
        array = np.asarray(arrays[leaf.path])
        for name, layer in zip(leaf.names, array if leaf.stacked else (array,)):
            if leaf.heads:
                layer = to_neighbour_pairs(layer, leaf.heads).reshape(layer.shape)
            yield name, layer


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two contiguous arrays are equal to the bit (NaN too, and -0 is not 0)."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    bits = f"u{a.itemsize}"
    return np.array_equal(a.reshape(-1).view(bits), b.reshape(-1).view(bits))


class TensorSource(Protocol):
    """The tensors of a file, as the reader of its format gives them. Threads may call it at once.

    A source that can read a part of a tensor alone also has `read_part(name, slices)`.

    Attributes:
        description: the file or folder, for messages.
        shapes: by tensor name, as numpy has them.
        dtypes: by tensor name: what `read` returns (float32 for quantised tensors).
        files: the files that hold them, in order.
    """

    description: str
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, np.dtype]
    files: list[Path]

    def read(self, name: str) -> np.ndarray:
        """The tensor in a new array, dequantised where needed."""


def same_tensor(source: TensorSource, a: str, b: str) -> bool:
    """Whether a file has two tensors that are equal to the bit."""
    if not {a, b} <= source.shapes.keys():
        return False
    alike = (source.shapes[a], source.dtypes[a]) == (source.shapes[b], source.dtypes[b])
    return alike and same_bits(source.read(a), source.read(b))
