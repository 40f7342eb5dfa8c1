"""GGUF files: the header against the gguf package's reader, blocks against ggml's formulas, whole
models against their Hugging Face twins."""

import concurrent.futures
import dataclasses
import struct

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from transformers import LlamaConfig

from models.llama.formats.gguf import open_gguf
from models.llama.load import load_checkpoint
from models.llama.model import LLaMa
from tests.oracles import tokenizer_files
from tests.tiny import hf_model, random_model
from tests.tiny_gguf import STRING, build, info, pair, random_blocks, small_file, write_gguf
from utils.errors import ArtifactError
from models.llama.config import inv_frequencies

QUANTISED = (Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K)


def assert_same_as_package(path) -> None:
    """Every key, shape and value that gguf.GGUFReader finds, and no others."""
    ours, theirs = open_gguf(path), gguf.GGUFReader(path)
    fields = {key: f.contents() for key, f in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.metadata == fields
    assert [type(v) for v in ours.metadata.values()] == [type(v) for v in fields.values()]
    assert list(ours.shapes) == [t.name for t in theirs.tensors]
    for tensor in theirs.tensors:
        value = ours.read(tensor.name)
        assert value.shape == ours.shapes[tensor.name] == tuple(tensor.shape.tolist()[::-1])
        assert value.dtype == ours.dtypes[tensor.name]
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(value.astype(np.float32), expected)


@pytest.mark.slow
def test_default_model_equals_the_packages_reader(default_model_path):
    assert_same_as_package(default_model_path)
    file = open_gguf(default_model_path)
    assert file.metadata["general.architecture"] == "llama"
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 49152
    assert file.shapes["blk.0.ffn_down.weight"] == (576, 1536)
    assert file.description == str(default_model_path)


@pytest.mark.parametrize("version", [2, 3])
def test_small_file_equals_the_packages_reader(tmp_path, version):
    path = tmp_path / "small.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", version) + small_file()[8:])
    assert_same_as_package(path)
    kinds = {name: dtype for name, dtype in open_gguf(path).dtypes.items()}
    floats = dict(norm=np.float32, half=np.float16, bf=ml_dtypes.bfloat16)
    assert kinds == floats | dict(q8=np.float32, q4=np.float32)


def test_other_alignment_order_gaps_and_trailing_bytes(tmp_path):
    """What a valid file may do beyond what writers usually do."""
    path = tmp_path / "odd.gguf"
    pairs = [pair("general.alignment", 4, 64)]
    infos = [info("late", (4,), Kind.F32, 192), info("early", (2, 2), Kind.F32, 0)]
    data = np.zeros(64, "<f4")
    data[:4], data[48:52] = (1, 2, 3, 4), (5, 6, 7, 8)
    path.write_bytes(build(pairs, infos, data.tobytes(), alignment=64))
    file = open_gguf(path)
    assert file.read("early").tolist() == [[1, 2], [3, 4]]
    assert file.read("late").tolist() == [5, 6, 7, 8]


def test_header_of_many_megabytes(tmp_path):
    path = tmp_path / "long.gguf"
    text = "é" * (5 << 20)
    pairs = [pair("a", STRING, "x"), pair("long", STRING, text), pair("b", STRING, "y")]
    path.write_bytes(build(pairs, [info("t", (2,), Kind.F32, 0)], struct.pack("<2f", 1, 2)))
    file = open_gguf(path)
    assert file.metadata == {"a": "x", "long": text, "b": "y"}
    assert file.read("t").tolist() == [1, 2]
    path.write_bytes(build([pair("long", STRING, "x" * (33 << 20))]))
    with pytest.raises(ArtifactError, match="header is longer than 33,554,432 bytes"):
        open_gguf(path)


# --- Dequantisation, against the formulas of ggml-quants.c written one value at a time -----------


def half(block: bytes, at: int) -> float:
    return struct.unpack_from("<e", block, at)[0]


def legacy_block(block: bytes, kind: Kind) -> list[float]:
    d = half(block, 0)
    if kind == Kind.Q8_0:
        return [d * q for q in struct.unpack_from("<32b", block, 2)]
    m = half(block, 2) if kind == Kind.Q4_1 else -8 * d
    quants = block[4:] if kind == Kind.Q4_1 else block[2:]
    return [d * (q & 15) + m for q in quants] + [d * (q >> 4) + m for q in quants]


def scale_and_min(j: int, q: bytes) -> tuple[int, int]:
    """get_scale_min_k4."""
    if j < 4:
        return q[j] & 63, q[j + 4] & 63
    return (q[j + 4] & 15) | (q[j - 4] >> 6) << 4, (q[j + 4] >> 4) | (q[j] >> 6) << 4


def k4_or_k5_block(block: bytes, kind: Kind) -> list[float]:
    d, dmin, scales = half(block, 0), half(block, 2), block[4:16]
    high, quants = (block[16:48], block[48:]) if kind == Kind.Q5_K else (bytes(32), block[16:])
    out = []
    for j in range(8):
        scale, low = scale_and_min(j, scales)
        for i in range(32):
            q = quants[32 * (j // 2) + i] >> 4 * (j % 2) & 15
            q += 16 * (high[i] >> j & 1)
            out.append(d * scale * q - dmin * low)
    return out


def k6_block(block: bytes) -> list[float]:
    low, high, scales = block[:128], block[128:192], struct.unpack_from("<16b", block, 192)
    out = []
    for half_block in range(2):
        for quarter in range(4):
            for i in range(32):
                q = low[64 * half_block + 32 * (quarter % 2) + i] >> 4 * (quarter // 2) & 15
                q |= (high[32 * half_block + i] >> 2 * quarter & 3) << 4
                scale = scales[8 * half_block + 2 * quarter + i // 16]
                out.append(half(block, 208) * scale * (q - 32))
    return out


def dequantise(block: bytes, kind: Kind) -> list[float]:
    if kind == Kind.Q6_K:
        return k6_block(block)
    return (k4_or_k5_block if kind in (Kind.Q4_K, Kind.Q5_K) else legacy_block)(block, kind)


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)
def test_blocks_follow_ggmls_formulas(tmp_path, kind):
    """More values than are dequantised at once, so that the seams are seen too."""
    shape = (261, 256)
    raw = random_blocks(shape, kind, seed=1)
    path = tmp_path / "blocks.gguf"
    path.write_bytes(build([], [info("w", shape[::-1], kind, 0)], raw.tobytes()))
    value = open_gguf(path).read("w")
    assert value.dtype == np.float32 and value.shape == shape
    size = gguf.GGML_QUANT_SIZES[kind][1]
    for row in (0, 1, 254, 255, 256, 260):
        blocks = raw[row].reshape(-1, size)
        expected = [x for block in blocks for x in dequantise(block.tobytes(), kind)]
        np.testing.assert_allclose(value[row], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(value, gguf.dequantize(raw, kind))


def test_arrays_are_fresh_and_threads_may_read(tmp_path):
    path = tmp_path / "small.gguf"
    path.write_bytes(small_file())
    file = open_gguf(path)
    clean = {name: file.read(name) for name in file.shapes}
    for value in clean.values():
        value.copy()[...] = 0
        assert value.flags.owndata or value.base.flags.writeable
    file.read("q8")[...] = 0
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        names = list(clean) * 50
        for name, value in zip(names, pool.map(file.read, names)):
            np.testing.assert_array_equal(value, clean[name])


# --- Whole models ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant",
    ["mha", "gqa", "tied", "biases", "head_dim", "llama3_meta", "linear", "eps", "theta"]
    + ["qwen2", "qwen2_tied", "qwen3"],
)
def test_float32_model_equals_its_hugging_face_twin(tmp_path, variant):
    """Config and parameters to the bit, so that logits are those of the Hugging Face checkpoint."""
    folder, model = hf_model(variant)
    path = tmp_path / "model.gguf"
    write_gguf(path, model.config, model.state_dict())
    ours, theirs = load_checkpoint(path), load_checkpoint(folder)
    assert ours[0] == theirs[0]
    assert_same_params(ours[1], theirs[1])


@pytest.mark.parametrize("variant", ["llama3_8", "llama3_32"])
def test_rope_factors_that_follow_no_known_rule(tmp_path, variant):
    """Another original length than Llama 3's cannot be read off the file, the frequencies can."""
    folder, model = hf_model(variant)
    path = tmp_path / "model.gguf"
    write_gguf(path, model.config, model.state_dict())
    (ours, params), (theirs, expected) = load_checkpoint(path), load_checkpoint(folder)
    frequencies = [
        inv_frequencies(c.head_dim, c.rope_theta, c.rope_scaling) for c in (ours, theirs)
    ]
    np.testing.assert_allclose(*frequencies, rtol=1e-6)
    assert dataclasses.replace(ours, rope_scaling=theirs.rope_scaling) == theirs
    assert_same_params(params, expected)


def assert_same_params(a, b) -> None:
    assert a.keys() == b.keys()
    for key in a:
        if isinstance(a[key], dict):
            assert_same_params(a[key], b[key])
        else:
            assert a[key].dtype == b[key].dtype
            np.testing.assert_array_equal(np.asarray(a[key]), np.asarray(b[key]), err_msg=key)


@pytest.mark.parametrize(
    ("types", "dtype"),
    [
        ("F16", "float16"),
        ("BF16", "bfloat16"),
        ("F32", "float32"),
        ("Q8_0", "float32"),
        ({"*attn_*": "F32", "*": "BF16"}, "bfloat16"),  # most tensors are F32, most numbers BF16
        ({"*ffn_*": "F32", "*": "F16"}, "float32"),
    ],
    ids=str,
)
def test_without_a_dtype_a_model_has_that_of_most_of_its_numbers(tmp_path, types, dtype):
    """And not that of its norms, which a GGUF file always keeps in float32."""
    _, model = hf_model("gqa")
    write_gguf(tmp_path / "model.gguf", model.config, model.state_dict(), types)
    _, params = load_checkpoint(tmp_path / "model.gguf")
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {dtype}


def test_quantised_model_is_dequantised_and_reordered(tmp_path):
    """Types mixed in one file, as llama.cpp's quantizer leaves them."""
    _, model = hf_model("gqa")
    path = tmp_path / "model.gguf"
    types = {"token_embd*": "Q8_0", "*attn_q*": "Q4_1", "*attn_v*": "Q4_0", "*": "BF16"}
    expected = write_gguf(path, model.config, model.state_dict(), types)
    config, params = load_checkpoint(path, dtype="float32")
    np.testing.assert_array_equal(params["embed"], expected["token_embd.weight"])
    attn = params["layers"]["attn"]
    np.testing.assert_array_equal(attn["wv"][2], expected["blk.2.attn_v.weight"])
    pairs = expected["blk.1.attn_q.weight"].reshape(config.n_heads, -1, 2, config.dim)
    halves = pairs.swapaxes(1, 2).reshape(-1, config.dim)
    np.testing.assert_array_equal(attn["wq"][1], halves)


@pytest.mark.slow
@pytest.mark.covers("R3")
def test_text_is_that_of_llama_cpp_whatever_the_types(tmp_path):
    """Each type that llama.cpp's quantizer writes, as the feed-forward of a tiny model."""
    metadata = tokenizer_files.sentencepiece_metadata(tokenizer_files.sentencepiece_model())
    sizes = dict(vocab_size=len(metadata["tokenizer.ggml.tokens"]), hidden_size=256)
    sizes |= dict(intermediate_size=256, num_hidden_layers=1, num_attention_heads=4)
    model = random_model(LlamaConfig(**sizes, max_position_embeddings=256))
    quantised = "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS IQ2_XXS IQ2_XS"
    quantised += " IQ2_S IQ3_XXS IQ3_S IQ1_S TQ1_0 TQ2_0"
    prompt, differ = [1, 5, 9, 17], []
    for kind in quantised.split():
        path = tmp_path / f"{kind}.gguf"
        types = {"*ffn*": kind, "*": "F32"}
        write_gguf(path, model.config, model.state_dict(), types, **metadata)
        theirs = tokenizer_files.LlamaCpp(path).complete(prompt, 6)
        config, params = load_checkpoint(path)
        logits = LLaMa(config).apply({"params": params}, np.array([prompt + theirs]))[0]
        logits = np.asarray(logits[0, len(prompt) - 1 : -1])
        # llama.cpp rounds activations to 8 bits, so that of two tokens nearly as likely either comes.
        behind = logits.max(axis=-1) - logits[range(6), theirs]
        if (behind > 0.1 * logits.std()).any():
            differ.append((kind, behind, theirs))
    assert not differ
