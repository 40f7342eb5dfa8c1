"""Broken, hostile and mismatched checkpoints: one typed error each, nothing half-loaded."""

import json
import os
import shutil
import socket
import struct
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save as save_safetensors
from safetensors.torch import load_file, save_file

from models.llama.formats.safetensors import SafetensorsFile, SafetensorsFolder
from models.llama.formats.meta import MetaFolder
from models.llama.load import load_checkpoint
from tests import tiny, tiny_gguf
from utils.errors import ArtifactError, ConfigError
from utils.files import InputFile, list_folder

# Fixtures


def header_of(data: bytes) -> tuple[dict, bytes]:
    (n,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def with_header(header, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


SMALL = save_safetensors(
    {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(4, dtype=np.float16),
        "c": np.arange(3, dtype=np.float32),
    },
    {"format": "pt"},
)


def read_all(source) -> dict[str, np.ndarray]:
    return {name: source.read(name) for name in source.shapes}


def assert_refused_or_equal(path: Path, data: bytes, clean: dict[str, np.ndarray]) -> bool:
    """A typed error, or the clean file's names and shapes. Returns whether it was refused."""
    path.write_bytes(data)
    try:
        got = read_all(SafetensorsFile(path))
    except ArtifactError as e:
        assert "\n" not in str(e) and str(path) in str(e) and len(str(e)) < 900
        return True
    assert sum(x.nbytes for x in got.values()) == sum(x.nbytes for x in clean.values())
    return False


@pytest.fixture
def hf(tmp_path) -> Path:
    """A sound checkpoint folder to break."""
    return Path(shutil.copytree(tiny.hf_model("gqa")[0], tmp_path / "model"))


@pytest.fixture
def sharded(tmp_path) -> Path:
    return Path(shutil.copytree(tiny.hf_model("sharded")[0], tmp_path / "model"))


@pytest.fixture
def meta(tmp_path) -> Path:
    """Four shards of Meta's layout."""
    return tiny.write_meta(tmp_path / "meta", tiny.hf_model("mha")[1], shards=4)


def change_tensors(folder: Path, change) -> Path:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def change_index(folder: Path, change) -> Path:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    file.write_text(json.dumps(change(index)))
    return folder


# Safetensors


@pytest.mark.covers("A1")
def test_truncated_at_every_byte(tmp_path):
    path = tmp_path / "model.safetensors"
    for n in range(len(SMALL)):
        path.write_bytes(SMALL[:n])
        with pytest.raises(ArtifactError, match=rf"needs \d+ bytes.*has {n}|header"):
            SafetensorsFile(path)
    path.write_bytes(SMALL[:-1])
    with pytest.raises(ArtifactError, match=f"needs {len(SMALL)} bytes, has {len(SMALL) - 1}"):
        SafetensorsFile(path)


@pytest.mark.covers("A1", "A3", "A5", "A6")
def test_every_flipped_bit_is_refused_or_harmless(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(SMALL)
    clean = read_all(SafetensorsFile(path))
    (header_len,) = struct.unpack("<Q", SMALL[:8])
    for i in range(8 + header_len):
        for bit in range(8):
            data = SMALL[:i] + bytes([SMALL[i] ^ 1 << bit]) + SMALL[i + 1 :]
            assert_refused_or_equal(path, data, clean)


@pytest.mark.covers("A2")
@pytest.mark.parametrize("n", [2**63, 2**64 - 1, 10**8 + 1, len(SMALL) - 7, 8 << 20])
def test_header_length(tmp_path, n):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", n) + SMALL[8:])
    with pytest.raises(ArtifactError, match="header of|needs"):
        SafetensorsFile(path)


@pytest.mark.covers("A2")
def test_a_large_header_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", 10**8 + 1))
        f.truncate(2 * 10**8)  # sparse
    asked, read = [], InputFile.read
    monkeypatch.setattr(InputFile, "read", lambda *a: asked.append(a[2]) or read(*a))
    with pytest.raises(ArtifactError, match="header of 100000001 bytes"):
        SafetensorsFile(path)
    assert asked == [8]


BAD_HEADERS = {
    "not UTF-8": b'{"\xff": 1}',
    "not JSON": b"{a}",
    "array": b"[1, 2]",
    "a leading space": b" {}",
    "deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "NaN": b'{"a": NaN}',
    "an empty file": b"",
    "metadata no object": b'{"__metadata__": 3}',
    "metadata no strings": b'{"__metadata__": {"a": 3}}',
}


@pytest.mark.covers("A3")
@pytest.mark.parametrize("case", BAD_HEADERS)
def test_header_that_is_no_object(tmp_path, case):
    path = tmp_path / "model.safetensors"
    path.write_bytes(with_header(BAD_HEADERS[case], b""))
    start = time.process_time()
    with pytest.raises(ArtifactError, match="header|metadata"):
        SafetensorsFile(path)
    assert time.process_time() - start < 2


@pytest.mark.covers("A4")
def test_duplicate_tensor_name(tmp_path):
    entry = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    path = tmp_path / "model.safetensors"
    path.write_bytes(with_header(b'{"w":' + entry + b',"w":' + entry + b"}", bytes(4)))
    with pytest.raises(ArtifactError, match="duplicate key 'w'"):
        SafetensorsFile(path)


def entry(dtype="F32", shape=(2,), data_offsets=(0, 8)) -> dict:
    return dict(dtype=dtype, shape=shape, data_offsets=data_offsets)


BAD_LAYOUTS = {
    "overlap": ({"a": entry(), "b": entry(data_offsets=(4, 12))}, 12),
    "same place": ({"a": entry(), "b": entry()}, 8),
    "gap": ({"a": entry(), "b": entry(data_offsets=(12, 20))}, 20),
    "gap in front": ({"a": entry(data_offsets=(4, 12))}, 12),
    "reversed": ({"a": entry(data_offsets=(8, 0))}, 8),
    "negative": ({"a": entry(data_offsets=(-8, 0))}, 8),
    "float": ({"a": entry(data_offsets=(0.0, 8.0))}, 8),
    "bool": ({"a": entry(shape=(0,), data_offsets=(False, False))}, 0),
    "one offset": ({"a": entry(data_offsets=(8,))}, 8),
    "three offsets": ({"a": entry(data_offsets=(0, 8, 8))}, 8),
    "no list": ({"a": entry(data_offsets="08")}, 8),
    "huge": ({"a": entry(data_offsets=(0, 2**64 + 8))}, 8),
    "trailing bytes": ({"a": entry()}, 9),
    "past the end": ({"a": entry()}, 7),
    "no tensor at all": ({}, 8),
}


@pytest.mark.covers("A5")
@pytest.mark.parametrize("case", BAD_LAYOUTS)
def test_offsets(tmp_path, case):
    header, n_bytes = BAD_LAYOUTS[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(with_header(header, bytes(n_bytes)))
    with pytest.raises(ArtifactError, match=str(path)):
        SafetensorsFile(path)


BAD_SHAPES = [
    (2**32, 2**32),
    (2**62, 4, 2**62),
    (-2,),
    (-1, -2),
    (True, 2),
    (2.0,),
    ("2",),
    (3,),
    (1,),
    (),
    "2",
    2,
    None,
    {"0": 2},
    (1,) * 2000 + (2,),
]


@pytest.mark.covers("A6")
@pytest.mark.parametrize("shape", BAD_SHAPES, ids=lambda s: repr(s)[:30])
def test_shape(tmp_path, shape):
    path = tmp_path / "model.safetensors"
    path.write_bytes(with_header({"a": entry(shape=shape)}, bytes(8)))
    with pytest.raises(ArtifactError, match="tensor 'a'"):
        SafetensorsFile(path)


@pytest.mark.covers("A7", "A25")
@pytest.mark.parametrize(
    "dtype", ["F64", "I64", "I32", "U8", "I8", "F8_E4M3", "F4", "BOOL", "F33", "f32", 32, None, []]
)
def test_dtype(tmp_path, dtype):
    path = tmp_path / "model.safetensors"
    path.write_bytes(with_header({"layer.qweight": entry(dtype=dtype)}, bytes(8)))
    with pytest.raises(ArtifactError, match="'layer.qweight' has dtype .*unsupported quantization"):
        SafetensorsFile(path)


@pytest.mark.covers("A3")
@pytest.mark.parametrize("value", [None, [], 3, {}, entry() | {"more": 1}, {"dtype": "F32"}])
def test_entry_that_is_no_entry(tmp_path, value):
    path = tmp_path / "model.safetensors"
    path.write_bytes(with_header({"a": value}, bytes(8)))
    with pytest.raises(ArtifactError, match="tensor 'a'"):
        SafetensorsFile(path)


_numbers = st.integers(-2, 40) | st.sampled_from([2**31, 2**63, 2**64 + 8, True, 1.0, None, "8"])


@pytest.mark.covers("A3", "A5", "A6", "A7")
@settings(derandomize=True, max_examples=400, deadline=None)
@given(
    names=st.lists(st.sampled_from(["a", "b", "c", "__metadata__", "\ud800\n"]), max_size=4),
    field=st.sampled_from(["dtype", "shape", "data_offsets"]),
    value=st.lists(_numbers, max_size=3) | st.sampled_from(["F16", "BF16", "F64", ""]) | _numbers,
    extra=st.binary(max_size=3),
)
def test_mutated_headers(tmp_path_factory, names, field, value, extra):
    header, body = header_of(SMALL)
    for name in names:
        header[name] = {**header.get(name, {}), field: value}
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    clean = {"all": np.zeros(len(body), np.uint8)}
    refused = assert_refused_or_equal(path, with_header(header, body + extra), clean)
    assert refused or not extra


@pytest.mark.covers("A8")
@pytest.mark.parametrize("shape", [(), (0, 64), (64, 0), (160,), (1, 160, 64), (160, 64, 1)])
def test_rank_and_empty(hf, shape):
    change_tensors(hf, lambda t: t | {"lm_head.weight": torch.zeros(shape)})
    with pytest.raises(ArtifactError, match=r"'lm_head.weight' is .*expected \[160, 64\]"):
        load_checkpoint(hf)


@pytest.fixture
def nothing_placed(monkeypatch):
    """Fails the test if a parameter reaches JAX before the checkpoint is refused."""
    monkeypatch.setattr(jax, "device_put", lambda *a: pytest.fail("a parameter was placed"))


@pytest.mark.covers("A9")
def test_missing_tensors_are_named_together(hf, nothing_placed):
    change_tensors(hf, lambda t: {n: x for n, x in t.items() if "mlp" not in n and "k_p" not in n})
    with pytest.raises(ArtifactError) as e:
        load_checkpoint(hf)
    message = str(e.value)
    assert "12 missing" in message and "and 2 more" in message
    assert message.count("model.layers.") == 10 and "\n" not in message
    assert "'model.layers.0.self_attn.k_proj.weight'" in message


@pytest.mark.covers("A10")
def test_unexpected_tensors(hf, nothing_placed):
    more = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64), "value_head": torch.zeros(2)}
    change_tensors(hf, lambda t: t | more)
    with pytest.raises(ArtifactError, match="2 unexpected: 'model.layers.0.*bias', 'value_head'"):
        load_checkpoint(hf)


@pytest.mark.covers("A10")
def test_unexpected_tensors_may_be_allowed(hf):
    change_tensors(hf, lambda t: t | {"value_head": torch.zeros(2)})
    with pytest.warns(UserWarning, match="value_head"):
        load_checkpoint(hf, allow_extra=True)


@pytest.mark.covers("A10")
def test_ignored_tensors_are_logged(hf, caplog):
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    change_tensors(hf, lambda t: t | {name: torch.zeros(8)})
    with caplog.at_level("INFO"):
        load_checkpoint(hf)
    assert name in caplog.text


@pytest.mark.covers("A11")
def test_shapes_that_do_not_fit_the_config(hf, nothing_placed):
    change_tensors(
        hf,
        lambda t: t
        | {
            "model.embed_tokens.weight": torch.zeros(192, 64),
            "model.layers.1.mlp.up_proj.weight": torch.zeros(64, 192),
        },
    )
    with pytest.raises(ArtifactError) as e:
        load_checkpoint(hf)
    message = str(e.value)
    assert "is [192, 64], expected [160, 64] (vocab_size, dim)" in message
    assert "is [64, 192], expected [192, 64] (ffn_dim, dim)" in message


@pytest.mark.covers("A9", "A10", "A11")
def test_all_kinds_of_misfit_in_one_error(hf):
    def change(tensors):
        del tensors["model.norm.weight"]
        return tensors | {"lm_head.weight": torch.zeros(3, 4), "stray": torch.zeros(1)}

    with pytest.raises(ArtifactError) as e:
        load_checkpoint(change_tensors(hf, change))
    for part in ("1 missing: 'model.norm.weight'", "1 unexpected: 'stray'", "1 misshapen: 'lm_"):
        assert part in str(e.value)


@pytest.mark.covers("A23")
def test_config_larger_than_the_file_is_refused_before_allocation(hf, nothing_placed):
    config = json.loads((hf / "config.json").read_text())
    config |= dict(hidden_size=2**18, intermediate_size=2**20, num_hidden_layers=4096)
    (hf / "config.json").write_text(json.dumps(config | dict(vocab_size=2**24, head_dim=2**14)))
    start = time.process_time()
    with pytest.raises(ArtifactError, match=r"\(\d{1,3}(,\d{3}){4,} parameters, the file has"):
        load_checkpoint(hf)
    assert time.process_time() - start < 2


# Index and shards

OUTSIDE = ["../../x", "/etc/passwd", "C:\\x", "a\\b", "a/b", "x\0y", ".", "..", "", "\ud800", "x\n"]


@pytest.mark.covers("A12")
@pytest.mark.parametrize("name", [*OUTSIDE, 3, None, ["x"], {"x": 1}], ids=repr)
def test_index_names_a_file_elsewhere(sharded, name, monkeypatch):
    def change(index):
        index["weight_map"]["model.norm.weight"] = name
        return index

    change_index(sharded, change)
    opened = []
    monkeypatch.setattr(
        os, "open", lambda p, *a, real=os.open, **k: opened.append(Path(p)) or real(p, *a, **k)
    )
    with pytest.raises(ArtifactError, match="plain file name|expected a file name"):
        load_checkpoint(sharded)
    assert {path.parent for path in opened} == {sharded}
    assert not any(path.name.endswith(".safetensors") for path in opened)


@pytest.mark.covers("A12")
@pytest.mark.parametrize("kind", ["link", "link to a folder", "folder"])
def test_shard_that_leaves_the_folder(sharded, tmp_path, kind):
    shard = sharded / "model-00001-of-00007.safetensors"
    outside = tmp_path / "outside.safetensors"
    shutil.move(shard, outside)
    if kind == "folder":
        shard.mkdir()
    else:
        shard.symlink_to(outside if kind == "link" else tmp_path)
    with pytest.raises(ArtifactError, match="leaves the folder|a directory"):
        load_checkpoint(sharded)


@pytest.mark.covers("A12")
def test_links_of_the_hub_cache_are_followed_within_the_repository(tmp_path):
    repo = tmp_path / "models--a--b"
    snapshot, blobs = repo / "snapshots" / "0123", repo / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    names = sorted(file.name for file in tiny.hf_model("sharded")[0].iterdir())
    for name in names:
        shutil.copy(tiny.hf_model("sharded")[0] / name, blobs / f"blob-{name}")
        (snapshot / name).symlink_to(f"../../blobs/blob-{name}")
    load_checkpoint(snapshot)
    shard = next(name for name in names if name.endswith(".safetensors"))
    shutil.move(blobs / f"blob-{shard}", tmp_path / "other")
    (snapshot / shard).unlink()
    (snapshot / shard).symlink_to(tmp_path / "other")
    with pytest.raises(ArtifactError, match="leaves the folder"):
        load_checkpoint(snapshot)


@pytest.mark.covers("R36")
@pytest.mark.parametrize("kind", ["hf", "sharded", "meta", "gguf"])
def test_a_folder_of_links_is_the_folder_they_lead_to(tmp_path, kind):
    real, links = tmp_path / "disk" / "m", tmp_path / "links"
    if kind in ("hf", "sharded"):
        shutil.copytree(tiny.hf_model("gqa" if kind == "hf" else kind)[0], real)
    else:
        real.mkdir(parents=True)
        _, model = tiny.hf_model("gqa")
        if kind == "meta":
            tiny.write_meta(real, model)
        else:
            tiny_gguf.write_gguf(real / "a.gguf", model.config, model.state_dict())
    links.mkdir()
    for file in real.iterdir():
        (links / file.name).symlink_to(file)
    ours, theirs = load_checkpoint(links), load_checkpoint(real)
    assert ours[0] == theirs[0]
    jax.tree.map(np.testing.assert_array_equal, ours[1], theirs[1])


@pytest.mark.covers("R36")
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_links_of_fixed_names_lead_anywhere_but_not_nowhere(hf, tmp_path, name):
    # As git-annex and DVC keep files: each in a folder of its own, under another name.
    shutil.move(hf / name, tmp_path / f"object-{name}")
    (hf / name).symlink_to(tmp_path / f"object-{name}")
    load_checkpoint(hf)
    (tmp_path / f"object-{name}").unlink()
    with pytest.raises((ArtifactError, ConfigError), match=f"{name}: no such file"):
        load_checkpoint(hf)


@pytest.mark.covers("A13")
def test_shard_listed_but_absent(sharded):
    (sharded / "model-00003-of-00007.safetensors").unlink()
    with pytest.raises(ArtifactError, match="'model-00003-of-00007.safetensors'"):
        load_checkpoint(sharded)


@pytest.mark.covers("A13")
def test_shard_lacks_a_tensor_of_the_index(sharded):
    change_index(
        sharded,
        lambda i: i
        | {"weight_map": i["weight_map"] | {"more": "model-00002-of-00007.safetensors"}},
    )
    with pytest.raises(ArtifactError, match="model-00002-of-00007.safetensors lacks.*'more'"):
        load_checkpoint(sharded)


@pytest.mark.covers("A13")
def test_shard_not_in_the_index(sharded):
    (sharded / "model-00008-of-00008.safetensors").write_bytes(SMALL)
    with pytest.raises(ArtifactError, match="not list: 'model-00008-of-00008.safetensors'"):
        load_checkpoint(sharded)


@pytest.mark.covers("A13")
def test_tensor_of_a_shard_not_in_the_index(sharded):
    def change(index):
        del index["weight_map"]["model.norm.weight"]
        return index

    with pytest.raises(ArtifactError, match="not in the index: 'model.norm.weight'"):
        load_checkpoint(change_index(sharded, change))


@pytest.mark.covers("A13")
@pytest.mark.parametrize("value", [None, [], {}, 3, "x"])
def test_index_without_a_map(sharded, value):
    with pytest.raises(ArtifactError, match="weight_map"):
        load_checkpoint(change_index(sharded, lambda index: {"weight_map": value}))


@pytest.mark.covers("A14")
def test_tensor_in_two_shards(sharded):
    # Equal copies are refused too: which one is meant may differ the next time.
    first, second = (sharded / f"model-0000{n}-of-00007.safetensors" for n in (1, 2))
    tensors = load_file(first)
    name = next(iter(tensors))
    save_file(load_file(second) | {name: tensors[name]}, second, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=f"'{name}': both in .*00001-of.*00002-of"):
        load_checkpoint(sharded)


@pytest.mark.covers("A15")
def test_one_file_and_an_index(sharded):
    path, model = tiny.hf_model("mha")
    single, _ = tiny.hf_model("gqa")
    shutil.copy(single / "model.safetensors", sharded)
    (sharded / "model-00001-of-00007.safetensors").unlink()
    with pytest.warns(
        UserWarning, match="both model.safetensors and .*: model.safetensors is used"
    ):
        load_checkpoint(sharded)


# Folders and files that are none


@pytest.mark.covers("A34")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["fifo", "socket", "device", "folder"])
def test_no_regular_file(hf, name, kind):
    path = hf / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        # A socket's path is at most 107 bytes long, so it is bound from within the folder.
        with socket.socket(socket.AF_UNIX) as s:
            before = os.getcwd()
            os.chdir(hf)
            s.bind(name)
            os.chdir(before)
    elif kind == "device":
        try:
            os.mknod(path, 0o20666, os.makedev(1, 5))  # /dev/zero
        except PermissionError:  # not root
            path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises((ArtifactError, ConfigError), match="a directory|pipe"):
        load_checkpoint(hf)


@pytest.mark.covers("A1", "A2")
def test_a_read_beyond_the_end_allocates_nothing(hf):
    with pytest.raises(ArtifactError, match=f"needs {2**60} bytes, has"):
        InputFile(hf / "model.safetensors").read(0, 2**60)


@pytest.mark.covers("A34")
def test_a_fifo_that_takes_the_files_place_after_the_check(hf, monkeypatch):
    path = hf / "model.safetensors"
    file = InputFile(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ArtifactError, match="pipe"):
        file.read(0, 8)


@pytest.mark.covers("A34")
def test_unreadable(hf, tmp_path):
    """As a user who may not: root may read everything."""
    os.chmod(tmp_path, 0o700)
    if os.geteuid() == 0:
        os.seteuid(65534)
    else:
        os.chmod(hf, 0)
        os.chmod(tmp_path, 0o700)
    try:
        with pytest.raises(ArtifactError, match="permission denied"):
            list_folder(hf)
        with pytest.raises(ArtifactError, match="permission denied"):
            InputFile(hf / "config.json")
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        else:
            os.chmod(hf, 0o700)


@pytest.mark.covers("A34")
def test_empty_folder_and_file_for_a_folder(tmp_path):
    with pytest.raises(ArtifactError, match="is empty"):
        load_checkpoint(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ArtifactError, match="neither a folder nor a .gguf file"):
        load_checkpoint(tmp_path / "notes.txt")
    with pytest.raises(ArtifactError, match="holds no checkpoint: expected model.safetensors"):
        load_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="save_pretrained"):
        load_checkpoint(tmp_path)
    with pytest.raises(ArtifactError, match="is a file, expected a folder"):
        list_folder(tmp_path / "notes.txt")
    with pytest.raises(ArtifactError, match="no such file"):
        list_folder(tmp_path / "absent")


@pytest.mark.covers("A22")
def test_folder_without_a_config(hf, meta):
    (hf / "config.json").unlink()
    with pytest.raises(ConfigError, match="config.json: no such file"):
        load_checkpoint(hf)
    (meta / "params.json").write_text("{")
    with pytest.raises(ConfigError, match="params.json is not valid JSON"):
        load_checkpoint(meta)


# Files that change


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def rewrite(path: Path) -> None:
    data = path.read_bytes()
    with open(path, "r+b") as f:
        f.write(data)
    os.utime(path, ns=(0, 0))


def replace(path: Path) -> None:
    other = path.with_name("other")
    shutil.copy2(path, other)
    os.replace(other, path)


@pytest.mark.covers("A33")
@pytest.mark.parametrize("change", [truncate, rewrite, replace, os.remove])
@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_file_that_changes_between_reads(request, layout, change):
    folder = request.getfixturevalue(layout)
    if layout == "hf":
        source, file = SafetensorsFolder(folder), folder / "model.safetensors"
    else:
        source, file = MetaFolder(folder, 64), folder / "consolidated.01.pth"
    names = list(source.shapes)
    source.read(names[0])
    change(file)
    with pytest.raises(ArtifactError, match="changed while it was being read|no such file"):
        source.read(names[-1])


@pytest.mark.covers("A33")
def test_file_that_shrinks_while_it_loads(hf, monkeypatch):
    read = SafetensorsFile.read

    def shrink_then_read(self, name):
        if "layers.1.mlp" in name:
            truncate(hf / "model.safetensors")
        return read(self, name)

    monkeypatch.setattr(SafetensorsFile, "read", shrink_then_read)
    with pytest.raises(ArtifactError, match="changed while it was being read"):
        load_checkpoint(hf)
    assert not [t for t in threading.enumerate() if t.name.startswith("ThreadPool")]
