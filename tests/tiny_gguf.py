"""Makes GGUF files for the tests: whole tiny models, and files broken in one chosen place.

The models are written by the gguf package; the broken files byte by byte, as no writer would.
"""

import fnmatch
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

_LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_NAMES = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
# The gguf package cannot quantise these: random blocks stand in, with a scale that is no extreme.
_SCALES = {Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,)}
_SCALES |= {Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.IQ4_NL: (0,), Kind.IQ4_XS: (0,)}
_SCALES |= {Kind.IQ2_XXS: (0,), Kind.IQ2_XS: (0,), Kind.IQ2_S: (0,)}
_SCALES |= {Kind.IQ3_XXS: (0,), Kind.IQ3_S: (0,), Kind.IQ1_S: (0,)}


def gguf_state(config: Any, state: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """A Hugging Face state dict in float32 under GGUF's names, q and k with RoPE's pairs side by
    side, as llama.cpp's converter does it."""
    out = {}
    for name, tensor in state.items():
        name, _, kind = name.removeprefix("model.").rpartition(".")
        value = tensor.float().numpy()
        if name.startswith("layers."):
            _, layer, name = name.split(".", 2)
            if name.endswith(("q_proj", "k_proj")) and architecture(config) == "llama":
                halves = value.reshape(-1, 2, head_dim(config) // 2, *value.shape[1:])
                value = halves.swapaxes(1, 2).reshape(value.shape)
            name = f"blk.{layer}.{_LAYER_NAMES[name]}"
        name = _NAMES.get(name, name)
        if not (name == "output" and config.tie_word_embeddings):
            out[f"{name}.{kind}"] = np.ascontiguousarray(value)
    return out


def write_gguf(
    path: Path,
    config: Any,
    state: Mapping[str, torch.Tensor],
    qtypes: Mapping[str, str] | str = "F32",
    **metadata: Any,
) -> dict[str, np.ndarray]:
    """Writes a model of transformers as a GGUF file.

    Args:
        config: its LlamaConfig.
        state: its state dict.
        qtypes: the type of the matrices: one for all, or the first match of name patterns. Norms and
            biases are always F32, as llama.cpp's converter leaves them.
        metadata: further keys, dots written as two underscores; None takes a key out.

    Returns:
        By name in the file, what a reader must find, in float32.
    """
    tensors, expected = {}, {}
    patterns = {"*": qtypes} if isinstance(qtypes, str) else qtypes
    rope = config.rope_parameters
    if rope["rope_type"] == "llama3":
        tensors["rope_freqs.weight"] = (_llama3_factors(config.head_dim, rope), Kind.F32)
    for name, value in gguf_state(config, state).items():
        kind = "F32"
        if value.ndim > 1:
            kind = next(kind for p, kind in patterns.items() if fnmatch.fnmatchcase(name, p))
        tensors[name] = quantise(value, Kind[kind])
    writer = gguf.GGUFWriter(path, architecture(config))
    keys = _keys(config) | {key.replace("__", "."): value for key, value in metadata.items()}
    for key, value in keys.items():
        if value is not None:
            _add(writer, key, value)
    for name, (data, kind) in tensors.items():
        expected[name] = gguf.dequantize(data, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def quantise(value: np.ndarray, kind: Kind) -> tuple[np.ndarray, Kind]:
    """(bytes or floats as GGUFWriter wants them, kind); for K-quants random blocks."""
    if kind in _SCALES:
        return random_blocks(value.shape, kind, seed=value.size), kind
    return gguf.quantize(value, kind), kind


def random_blocks(shape: tuple[int, ...], kind: Kind, seed: int) -> np.ndarray:
    """[..., bytes of a row] random quantised rows, every scale about 0.01."""
    values, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // values, size), dtype=np.uint8)
    scales = {Kind.Q4_0: (0,), Kind.Q4_1: (0, 2), Kind.Q8_0: (0,), **_SCALES}[kind]
    for at in scales:
        scale = rng.uniform(-0.01, 0.01, blocks.shape[:-1]).astype("<f2")
        blocks[..., at : at + 2] = scale[..., None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def architecture(config: Any) -> str:
    """llama.cpp's name for a config's family: its converter takes Mistral for a Llama."""
    return {"mistral": "llama"}.get(config.model_type, config.model_type)


def head_dim(config: Any) -> int:
    """A head's size, where Qwen2Config has it or not."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _keys(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    keys = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": head_dim(config),
        "llama.attention.value_length": head_dim(config),
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.dimension_count": head_dim(config),
        "llama.rope.freq_base": float(rope["rope_theta"]),
        "llama.vocab_size": config.vocab_size,
    }
    if rope["rope_type"] == "linear":
        keys |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": rope["factor"]}
    return {key.replace("llama", architecture(config)): value for key, value in keys.items()}


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    kinds |= {str: writer.add_string, list: writer.add_array}
    kinds[type(value)](key, value)


def _llama3_factors(head_dim: int, rope: Mapping[str, Any]) -> np.ndarray:
    """What each RoPE frequency is divided by, as llama.cpp's converter computes it."""
    freqs = 1.0 / rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    out = []
    for freq in freqs:
        length = 2 * np.pi / freq
        if length < original / high:
            out.append(1.0)
        elif length > original / low:
            out.append(rope["factor"])
        else:
            smooth = (original / length - low) / (high - low)
            out.append(1.0 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(out, np.float32)


# --- Files written byte by byte ---------------------------------------------------------------

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?"}
_CODES |= {U64: "Q", I64: "q", F64: "d"}


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def array(kind: int, payload: bytes, count: int) -> bytes:
    return struct.pack("<IQ", kind, count) + payload


def pair(key: str | bytes, kind: int, value: Any) -> bytes:
    """One key and its value; a value of bytes is taken as it is."""
    if not isinstance(value, bytes):
        value = string(value) if kind == STRING else struct.pack("<" + _CODES[kind], value)
    return string(key) + struct.pack("<I", kind) + value


def info(name: str | bytes, extents: tuple[int, ...], kind: int, offset: int) -> bytes:
    """One tensor's entry; the first extent is that of a row."""
    ranks = struct.pack(f"<I{len(extents)}Q", len(extents), *extents)
    return string(name) + ranks + struct.pack("<IQ", kind, offset)


def build(
    pairs: list[bytes] = (),
    infos: list[bytes] = (),
    data: bytes = b"",
    *,
    start: bytes = b"GGUF\x03\0\0\0",
    n_pairs: int | None = None,
    n_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A file; the counts in it may lie."""
    counts = [len(infos) if n_tensors is None else n_tensors]
    counts += [len(pairs) if n_pairs is None else n_pairs]
    head = start + struct.pack("<QQ", *counts) + b"".join(pairs) + b"".join(infos)
    return head + bytes(-len(head) % alignment if data else 0) + data


def small_file() -> bytes:
    """A valid file under 4 KB: every kind of value, and tensors of four types."""
    tokens = ["<s>", "</s>", "a", "é", "日本"]
    pairs = [
        pair("general.architecture", STRING, "llama"),
        pair("llama.vocab_size", U32, 5),
        pair("llama.embedding_length", U32, 32),
        pair("llama.block_count", U32, 1),
        pair("llama.context_length", U64, 64),
        pair("llama.feed_forward_length", U16, 32),
        pair("llama.attention.head_count", U8, 2),
        pair("llama.attention.layer_norm_rms_epsilon", F32, 1e-5),
        pair("llama.rope.freq_base", F64, 10000.0),
        pair("tokenizer.ggml.tokens", ARRAY, array(STRING, b"".join(map(string, tokens)), 5)),
        pair("tokenizer.ggml.scores", ARRAY, array(F32, struct.pack("<5f", *range(5)), 5)),
        pair("tokenizer.ggml.token_type", ARRAY, array(I32, struct.pack("<5i", *range(5)), 5)),
        pair("tokenizer.ggml.add_bos_token", BOOL, True),
        pair("x.flags", ARRAY, array(BOOL, b"\1\0", 2)),
        pair("x.i8", I8, -1),
        pair("x.i16", I16, -2),
        pair("x.i64", I64, -3),
        pair("x.empty", ARRAY, array(U32, b"", 0)),
    ]
    shapes = {"norm": ((32,), Kind.F32), "half": ((8, 2), Kind.F16), "bf": ((8, 2), Kind.BF16)}
    shapes |= {"q8": ((32, 3), Kind.Q8_0), "q4": ((64, 2), Kind.Q4_1)}
    infos, data = [], b""
    rng = np.random.default_rng(0)
    for name, (extents, kind) in shapes.items():
        value = rng.standard_normal(extents[::-1]).astype(np.float32)
        data += bytes(-len(data) % 32)
        infos.append(info(name, extents, kind, len(data)))
        data += gguf.quantize(value, kind).tobytes()
    return build(pairs, infos, data)
