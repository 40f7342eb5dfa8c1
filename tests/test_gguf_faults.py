"""Broken and hostile GGUF files: one typed error on one line, at once, in little memory."""

import os
import socket
import struct
import time
import tracemalloc
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf.quants import _type_traits

from models.llama.formats.gguf import open_gguf
from models.llama.load import load_checkpoint
from tests.tiny import hf_model
from tests.tiny_gguf import (
    ARRAY,
    BOOL,
    F32,
    I32,
    STRING,
    U8,
    U16,
    U32,
    U64,
    array,
    build,
    info,
    pair,
    small_file,
    string,
    write_gguf,
)
from utils.errors import ArtifactError, ConfigError

HUGE = (2**64 - 1, 2**63, 2**63 - 1, 2**32, 10**9)
GOOD = small_file()
ONE = struct.pack("<8f", *range(8))


@pytest.fixture
def refuse(tmp_path):
    """Asserts that bytes as a file are refused, in the way that every fault must be."""

    def check(data: bytes, match: str) -> None:
        path = tmp_path / "bad.gguf"
        path.write_bytes(data)
        tracemalloc.start()
        began = time.monotonic()
        with pytest.raises(ArtifactError, match=match) as caught:
            open_gguf(path)
        assert time.monotonic() - began < 2
        assert tracemalloc.get_traced_memory()[1] < 1.2 * len(data) + 50e6
        tracemalloc.stop()
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600 + len(str(path))

    return check


# --- The header -------------------------------------------------------------------------------


@pytest.mark.covers("A26")
@pytest.mark.parametrize("start", [b"", b"G", b"GGML", b"FUGG", b"PK\3\4", b"\0\0\0\0"])
def test_bad_magic(refuse, start):
    refuse(start + GOOD[4:] if len(start) == 4 else start, "magic|not a GGUF file")


@pytest.mark.covers("A26")
def test_bad_version(refuse):
    for version in (0, 1, 4, 2**16 + 3, 2**32 - 1):
        refuse(GOOD[:4] + struct.pack("<I", version) + GOOD[8:], f"version {version} is not supp")
    refuse(GOOD[:4] + b"\0\0\0\3" + GOOD[8:], "big-endian")


@pytest.mark.covers("A27")
@pytest.mark.parametrize("count", [*HUGE, 65537, 1000, 40])
def test_counts_beyond_the_file(refuse, count):
    refuse(build([], [], bytes(60), n_pairs=count), "number of keys is")
    refuse(build([], [], bytes(60), n_tensors=count), "number of tensors is")


@pytest.mark.covers("A27")
def test_counts_beyond_reason(refuse):
    """A file large enough for them does not make them reasonable."""
    refuse(build([], [], bytes(3_000_000), n_pairs=70_000), "is 70000, expected at most 65536")
    refuse(build([], [], bytes(3_000_000), n_tensors=70_000), "is 70000, expected at most 65536")


@pytest.mark.covers("A28")
@pytest.mark.parametrize("length", [*HUGE, 200])
def test_lengths_beyond_the_file(refuse, length):
    wrong = struct.pack("<Q", length)
    rest = bytes(60)
    refuse(build([wrong + rest]), "a string of key 0 takes")
    refuse(build([string("k") + struct.pack("<I", STRING) + wrong + rest]), "string of 'k' takes")
    for kind in (U8, U32, BOOL, F32, U64, STRING):
        refuse(build([pair("k", ARRAY, struct.pack("<IQ", kind, length) + rest)]), "length of 'k'")
    refuse(build([pair("k", ARRAY, array(STRING, wrong + rest, 1))]), "a string of 'k' takes")
    refuse(build([], [wrong + rest], bytes(60)), "string of the name of tensor 0 takes")


@pytest.mark.covers("A28")
def test_arrays_beyond_reason(refuse):
    """A list of Python objects takes many times the bytes of the file."""
    refuse(
        build([pair("k", ARRAY, array(U8, bytes(3 << 20), 3 << 20))]), "expected at most 2097152"
    )
    half = pair("a", ARRAY, array(U8, bytes(2 << 20), 2 << 20))
    refuse(build([half, pair("b", ARRAY, array(U8, b"\0", 1))]), "up to 'b' hold more than 2097152")


@pytest.mark.covers("A28")
def test_the_widest_header_that_is_read(tmp_path):
    """One wide character makes a string of Python take four bytes for each of its letters."""
    path = tmp_path / "wide.gguf"
    path.write_bytes(build([pair("k", STRING, "x" * (31 << 20) + "\U0001f999")]))
    tracemalloc.start()
    assert len(open_gguf(path).metadata["k"]) == (31 << 20) + 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.2 * path.stat().st_size + 200e6


@pytest.mark.covers("A28")
def test_bad_keys_and_values(refuse):
    good = pair("a", U32, 1)
    refuse(build([good, pair("a", U32, 1)]), "key 1 is 'a' for the second time")
    refuse(build([pair("", U32, 1)]), "key 0 has 0 characters, expected 1 to 256")
    refuse(build([pair("k" * 257, U32, 1)]), "key 0 has 257 characters")
    refuse(build([pair(b"\xff", U32, 1)]), "not UTF-8")
    refuse(build([pair("k", STRING, string(b"a\xc3"))]), "string of 'k' at byte .* is not UTF-8")
    refuse(build([pair("k", BOOL, b"\2")]), "'k' is 2, expected a bool")
    refuse(build([pair("k", 13, bytes(8))]), "'k' has the unknown value type 13")
    refuse(
        build([pair("k", ARRAY, array(2**32 - 1, bytes(8), 1))]), "unknown value type 4294967295"
    )
    nested = array(ARRAY, array(ARRAY, bytes(60), 2**63), 1)
    refuse(build([pair("k", ARRAY, nested)]), "'k' is an array of arrays")


@pytest.mark.covers("A29")
def test_bad_alignment(refuse):
    infos = [info("t", (8,), Kind.F32, 0)]
    for alignment in (0, 1, 13, 24, 2**17, 2**31):
        pairs = [pair("general.alignment", U32, alignment)]
        refuse(
            build(pairs, infos, ONE), f"general.alignment is {alignment}, expected a power of two"
        )
    for kind, value in (
        (U64, 32),
        (I32, 32),
        (STRING, "32"),
        (ARRAY, array(U32, b"\x20\0\0\0", 1)),
    ):
        refuse(build([pair("general.alignment", kind, value)], infos, ONE), "has the value type")


# --- The tensor list --------------------------------------------------------------------------


@pytest.mark.covers("A30")
def test_bad_shapes(refuse):
    for extents in ((), (2, 2, 2, 1, 1), (1,) * 255):
        wanted = f"'t' has {len(extents)} dimensions, expected 1 to 4"
        refuse(build([], [info("t", extents, Kind.F32, 0)], ONE), wanted)
    refuse(build([], [info("t", (8, 0), Kind.F32, 0)], ONE), "an extent of 0")
    # Products that wrap to 0, or to the tensor's true size, in 64 bits.
    for extents in ((2**32, 2**32), (2**63, 2), (2**62 + 2, 4), (2**16,) * 4, (2**64 - 1,)):
        refuse(
            build([], [info("t", extents, Kind.F32, 0)], ONE), "ends at byte .* but the file has"
        )
    refuse(build([], [info("t", (33, 1), Kind.Q8_0, 0)], bytes(64)), "rows of 33 .* Q8_0's 32")
    refuse(build([], [info("t", (128, 2), Kind.Q4_K, 0)], bytes(144)), "rows of 128 .* Q4_K's 256")


@pytest.mark.covers("A30")
@pytest.mark.parametrize("kind", [4, 5, 31, 36, 99, 2**32 - 1, *sorted(set(Kind))])
def test_types_are_read_or_refused_by_name(refuse, tmp_path, kind):
    data = build([], [info("t", (256,), kind, 0)], bytes(4096))
    supported = {"F32", "F16", *(known.name for known in _type_traits)}
    name = Kind(kind).name if kind in set(Kind) else f"number {kind}"
    if name in supported:
        (tmp_path / "good.gguf").write_bytes(data)
        assert not open_gguf(tmp_path / "good.gguf").read("t").any()
    else:
        refuse(data, f"'t' has the unsupported type {name}, expected one of F32, F16, Q4_0")


@pytest.mark.covers("A30")
def test_bad_offsets_and_names(refuse):
    def two(offset: int, name: str = "u") -> bytes:
        return build(
            [], [info("t", (8,), Kind.F32, 0), info(name, (8,), Kind.F32, offset)], ONE * 2
        )

    refuse(two(33), "'u' is at 33, not a multiple of 32")
    refuse(two(0), "'u' at byte .* overlaps 't'")
    refuse(two(64), "'u' of shape .* but the file has")
    for offset in (2**64 - 32, 2**63, 2**40):
        refuse(two(offset), "'u' of shape .* but the file has")
    refuse(two(32, "t"), "the name of tensor 1 is 't' for the second time")
    refuse(two(32, ""), "the name of tensor 1 has 0 characters")
    refuse(two(32, "u" * 257), "the name of tensor 1 has 257 characters")
    longer = [info("t", (16,), Kind.F32, 0), info("u", (8,), Kind.F32, 32)]
    refuse(build([], longer, ONE * 2), "'u' at byte .* overlaps 't'")


# --- Weights ----------------------------------------------------------------------------------


@pytest.mark.covers("A31", "R3")
@pytest.mark.parametrize("kind", [kind for kind in _type_traits if kind != Kind.BF16])
def test_random_blocks_never_crash_or_warn(tmp_path, kind):
    """Of every type that gguf dequantises, NaN and infinities among them."""
    values, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (1500, size), dtype=np.uint8)  # more than are dequantised at once
    if kind.name in ("Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K"):
        at = 208 if kind == Kind.Q6_K else 0
        raw[:2, at : at + 2] = np.array([[0x7C00], [0x7E00]], "<u2").view(np.uint8)
    path = tmp_path / "random.gguf"
    path.write_bytes(build([], [info("w", (values, len(raw)), kind, 0)], raw.tobytes()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value = open_gguf(path).read("w")
    assert value.shape == (len(raw), values) and value.dtype == np.float32
    if kind.name in ("Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K"):
        assert not np.isfinite(value[:2]).all(axis=1).any()
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(value, gguf.dequantize(raw, kind))


@pytest.mark.covers("A16", "A31")
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_weights_that_are_not_finite(tmp_path, kind):
    _, model = hf_model("gqa")
    path, name = tmp_path / "model.gguf", "blk.1.ffn_up.weight"
    write_gguf(path, model.config, model.state_dict(), kind)
    (tensor,) = (t for t in gguf.GGUFReader(path).tensors if t.name == name)
    broken = {"F32": (np.float32(np.nan), 1), "Q8_0": (np.float16(np.inf), 32)}[kind]
    with open(path, "r+b") as f:
        f.seek(tensor.data_offset)
        f.write(broken[0].tobytes())
    with pytest.warns(UserWarning, match=f"NaN or infinity in 1 tensors: '{name}' .{broken[1]}."):
        load_checkpoint(path)
    with pytest.raises(ArtifactError, match=f"NaN or infinity in 1 tensors: '{name}'"):
        load_checkpoint(path, check_finite=True)


# --- What the file says it is -----------------------------------------------------------------


@pytest.mark.covers("A32")
def test_other_architecture(tmp_path):
    path = tmp_path / "other.gguf"
    path.write_bytes(GOOD.replace(string("llama"), string("mamba")))
    with pytest.raises(ConfigError, match="architecture is 'mamba', expected llama"):
        load_checkpoint(path)
    path.write_bytes(GOOD.replace(string("general.architecture"), string("general.architectura")))
    with pytest.raises(ConfigError, match="architecture is None"):
        load_checkpoint(path)


@pytest.mark.covers("A32")
@pytest.mark.parametrize(
    "key",
    [
        "llama.block_count",
        "llama.context_length",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "llama.attention.layer_norm_rms_epsilon",
    ],
)
def test_missing_key_is_named(tmp_path, key):
    _, model = hf_model("gqa")
    write_gguf(
        tmp_path / "m.gguf", model.config, model.state_dict(), **{key.replace(".", "__"): None}
    )
    with pytest.raises(ConfigError, match=f"GGUF metadata lacks {key}"):
        load_checkpoint(tmp_path / "m.gguf")


@pytest.mark.covers("A32")
def test_token_arrays_of_unequal_length(refuse):
    def arrays(tokens: int, scores: int, types: int) -> bytes:
        key = "tokenizer.ggml."
        return build(
            [
                pair(key + "tokens", ARRAY, array(STRING, string("x") * tokens, tokens)),
                pair(key + "scores", ARRAY, array(F32, bytes(4 * scores), scores)),
                pair(key + "token_type", ARRAY, array(I32, bytes(4 * types), types)),
            ]
        )

    refuse(arrays(3, 2, 3), "tokens has 3, tokenizer.ggml.scores has 2")
    refuse(arrays(3, 3, 4), "tokenizer.ggml.token_type has 4")
    refuse(arrays(0, 1, 1), "tokens has 0")
    refuse(
        build([pair("tokenizer.ggml.tokens", STRING, "x")]), "tokens is a str, expected an array"
    )


def test_part_of_a_split_model(refuse):
    refuse(build([pair("split.count", U16, 3)]), "one part of a split model; join them")


# --- Files that change, and files that are none -------------------------------------------------


@pytest.mark.covers("A33")
@pytest.mark.parametrize("how", ["truncated", "rewritten", "replaced", "removed", "grown"])
def test_file_changed_after_opening(tmp_path, how):
    path = tmp_path / "small.gguf"
    path.write_bytes(GOOD)
    os.utime(path, ns=(0, 0))
    file = open_gguf(path)
    file.read("norm")
    if how == "removed":
        path.unlink()
    elif how == "replaced":
        (tmp_path / "new").write_bytes(GOOD)
        os.utime(tmp_path / "new", ns=(0, 0))
        os.replace(tmp_path / "new", path)
    else:
        path.write_bytes({"truncated": GOOD[:600], "rewritten": GOOD}.get(how, GOOD + b"x"))
    with pytest.raises(ArtifactError, match=f"{path}"):
        file.read("norm")


@pytest.mark.covers("A34")
def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "folder.gguf").mkdir()
    os.symlink("loop.gguf", tmp_path / "loop.gguf")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket.gguf"))
        names = ["pipe", "empty", "folder", "loop", "socket", "missing"]
        for path in [*(tmp_path / f"{name}.gguf" for name in names), Path("/dev/zero")]:
            began = time.monotonic()
            with pytest.raises(ArtifactError, match=str(path)):
                open_gguf(path)
            assert time.monotonic() - began < 1
