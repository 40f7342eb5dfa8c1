"""Broken and hostile consolidated.*.pth: refused with one typed error, and no code of theirs runs."""

import builtins
import collections
import contextlib
import io
import os
import pickle
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.llama.formats.meta import MetaFolder
from models.llama.load import load_checkpoint
from tests import tiny
from utils.errors import ArtifactError, ConfigError

NAME = "consolidated.00.pth"


@pytest.fixture
def shards(tmp_path) -> Path:
    """Four sound shards."""
    return tiny.write_meta(tmp_path / "meta", tiny.hf_model("mha")[1], shards=4)


def change_shard(folder: Path, rank: int, change) -> Path:
    file = folder / f"consolidated.{rank:02d}.pth"
    torch.save(change(torch.load(file, weights_only=True)), file)
    return folder


@pytest.mark.covers("A21")
@pytest.mark.parametrize(
    ("gone", "named"),
    [
        ("00", "no consolidated.00.pth"),
        ("01", "no consolidated.01.pth"),
        ("03", r"'tok_embeddings.weight' is \[120, 64\], expected \[160, 64\]"),
    ],
)
def test_shard_is_gone(shards, gone, named):
    os.remove(shards / f"consolidated.{gone}.pth")
    with pytest.raises(ArtifactError, match=named):
        load_checkpoint(shards)


@pytest.mark.covers("A21")
def test_numbers_of_shards_have_a_gap(shards):
    os.rename(shards / "consolidated.03.pth", shards / "consolidated.04.pth")
    with pytest.raises(ArtifactError, match="no consolidated.03.pth"):
        load_checkpoint(shards)


@pytest.mark.covers("A21")
def test_shards_are_unlike(shards):
    change_shard(shards, 2, lambda t: t | {"layers.1.attention.wq.weight": torch.zeros(15, 64)})
    with pytest.raises(ArtifactError, match=r"02.pth: 'layers.1.attention.wq.*\[15, 64\].*\[16, "):
        load_checkpoint(shards)
    change_shard(shards, 2, lambda t: {n: x for n, x in t.items() if n != "norm.weight"})
    with pytest.raises(ArtifactError, match="02.pth and shard 00 differ: 'norm.weight'"):
        load_checkpoint(shards)


@pytest.mark.covers("A21")
def test_shards_disagree_about_a_norm(shards):
    change_shard(shards, 3, lambda t: t | {"layers.2.ffn_norm.weight": torch.ones(64)})
    with pytest.raises(ArtifactError, match="03.pth: 'layers.2.ffn_norm.weight' differs"):
        load_checkpoint(shards)


def test_without_torch(shards, monkeypatch):
    real = builtins.__import__

    def no_torch(name, *args, **kwargs):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_torch)
    with pytest.raises(ConfigError, match=r"pip install 'altiplano\[torch\]'"):
        load_checkpoint(shards)


# Pickles that are programs


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def payloads(canary: Path) -> dict[str, object]:
    touch = f"open({str(canary)!r}, 'w').close()"
    return {
        "os.system": Call(os.system, f"touch '{canary}'"),
        "eval": Call(eval, touch),
        "exec": Call(exec, touch),
        "open": Call(open, str(canary), "w"),
        "by another name": Call(os.posix_spawn, "/usr/bin/touch", ["touch", str(canary)], {}),
        "nested": Call(dict, Call(list, [Call(eval, touch)])),
        "in a state": Call(collections.OrderedDict, [("w", Call(eval, touch))]),
        "torch.hub": Call(torch.hub.load, str(canary), "x"),
        "torch.load": Call(torch.load, str(canary)),
        "numpy": np.arange(3),
        "numpy objects": np.array([Call(eval, touch)], dtype=object),
    }


def getattr_chain(canary: Path) -> bytes:
    """A pickle of getattr(__import__("os"), "system")("touch …"), which no Python object gives."""
    text = lambda s: b"X" + len(s).to_bytes(4, "little") + s.encode()
    os_module = b"c__builtin__\n__import__\n" + text("os") + b"\x85R"
    system = b"c__builtin__\ngetattr\n" + os_module + text("system") + b"\x86R"
    return b"\x80\x02}" + text("w") + system + text(f"touch '{canary}'") + b"\x85Rs."


def test_the_payloads_are_live(tmp_path):
    """They do run where a pickle is simply loaded: else the next tests would prove nothing."""
    for name in ("os.system", "eval", "exec", "open", "nested", "in a state"):
        canary = tmp_path / name
        with contextlib.suppress(TypeError):  # of the outer call, when the inner one has run
            pickle.loads(pickle.dumps(payloads(canary)[name]))
        assert canary.exists(), name
    canary = tmp_path / "getattr"
    pickle.loads(getattr_chain(canary))
    assert canary.exists()


@pytest.mark.covers("A18")
def test_getattr_chain_never_runs(tmp_path):
    write_pth(tmp_path / NAME, getattr_chain(tmp_path / "canary"))
    with pytest.raises(ArtifactError, match="torch cannot read"):
        MetaFolder(tmp_path, 2)
    assert not (tmp_path / "canary").exists()


@pytest.mark.covers("A18")
@pytest.mark.parametrize("name", payloads(Path()))
def test_payloads_never_run(tmp_path, monkeypatch, name):
    canary, loads = tmp_path / "canary", []
    payload = payloads(canary)[name]
    real = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: loads.append(k) or real(*a, **k))
    torch.save({"tok_embeddings.weight": torch.ones(2, 2), "evil": payload}, tmp_path / NAME)
    with pytest.raises(ArtifactError, match="torch cannot read|not a tensor"):
        MetaFolder(tmp_path, 2)
    assert not canary.exists()
    assert [kwargs["weights_only"] for kwargs in loads] == [True]


# Pickles that are broken


def write_pth(path: Path, data: bytes, records=None) -> Path:
    """A zip file as torch.save lays it out, around any pickle."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", "little")
        for key, record in (records or {"0": bytes(16)}).items():
            archive.writestr(f"archive/data/{key}", record)
        archive.writestr("archive/version", "3\n")
    return path


class _Storage:
    def __init__(self, kind=torch.FloatStorage, key="0", numel=4):
        self.id = ("storage", kind, key, "cpu", numel)


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        return obj.id if isinstance(obj, _Storage) else None


def tensor_pickle(storage=None, offset=0, size=(2, 2), stride=(2, 1), name="w") -> bytes:
    """A pickle of one tensor, with whatever numbers."""
    args = (storage or _Storage(), offset, size, stride, False, collections.OrderedDict())
    out = io.BytesIO()
    _Pickler(out, protocol=2).dump({name: Call(torch._utils._rebuild_tensor_v2, *args)})
    return out.getvalue()


def test_the_sound_pickle_loads(tmp_path):
    numbers = np.arange(4, dtype=np.float32)
    write_pth(tmp_path / NAME, tensor_pickle(), {"0": numbers.tobytes()})
    assert np.array_equal(MetaFolder(tmp_path, 2).read("w"), numbers.reshape(2, 2))
    write_pth(tmp_path / NAME, tensor_pickle(offset=2, size=(2,), stride=(1,)), {"0": numbers})
    assert np.array_equal(MetaFolder(tmp_path, 2).read("w"), numbers[2:])


BAD_TENSORS = {
    "numel beyond the record": dict(storage=_Storage(numel=5), size=(5,), stride=(1,)),
    "numel huge": dict(storage=_Storage(numel=2**61), size=(2**61,), stride=(1,)),
    "numel 2^64": dict(storage=_Storage(numel=2**64)),
    "numel no number": dict(storage=_Storage(numel="4")),
    "record absent": dict(storage=_Storage(key="7")),
    "offset outside": dict(offset=1),
    "offset huge": dict(offset=2**62),
    "offset negative": dict(offset=-1),
    "size outside": dict(size=(3, 2)),
    "size huge": dict(size=(2**40, 2**40)),
    "size overflows": dict(size=(2**62, 4), stride=(0, 0)),
    "size negative": dict(size=(-2, 2)),
    "stride outside": dict(stride=(100, 1)),
    "stride zero": dict(stride=(0, 0)),
    "transposed": dict(stride=(1, 2)),
    "ranks differ": dict(stride=(1,)),
    "float64": dict(storage=_Storage(kind=torch.DoubleStorage, numel=2), size=(2,), stride=(1,)),
    "int8": dict(storage=_Storage(kind=torch.CharStorage)),
    "name no text": dict(name=3),
}


@pytest.mark.covers("A19")
@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensor_outside_its_record(tmp_path, case):
    write_pth(tmp_path / NAME, tensor_pickle(**BAD_TENSORS[case]))
    with pytest.raises(ArtifactError, match=NAME) as e:
        MetaFolder(tmp_path, 2)
    assert "\n" not in str(e.value) and len(str(e.value)) < 900


@pytest.mark.covers("A19")
@pytest.mark.parametrize(
    "numbers", [dict(storage=_Storage(numel=-4)), dict(stride=(-2, 1))], ids=["numel", "stride"]
)
def test_negative_numbers_that_torch_ignores_read_the_record_alone(tmp_path, numbers):
    stored = np.arange(4, dtype=np.float32)
    write_pth(tmp_path / NAME, tensor_pickle(**numbers), {"0": stored.tobytes()})
    assert np.array_equal(MetaFolder(tmp_path, 2).read("w"), stored.reshape(2, 2))


_MEMO_BOMB = (
    b"\x80\x02]q\x00"
    + b"".join(
        b"](" + b"h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(60)
    )
    + b"."
)
BAD_PICKLES = {
    "empty": b"",
    "no STOP": b"\x80\x02}",
    "memo bomb": _MEMO_BOMB,
    "not in the memo": b"\x80\x02h\x05.",
    "huge LONG": b"\x80\x02\x8b\xff\xff\xff\x7f1.",
    "long LONG": b"\x80\x02L" + b"9" * 100_000 + b"L\n.",
    "huge BINUNICODE": b"\x80\x02X\xff\xff\xff\xffa.",
    "huge BINUNICODE8": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fa.",
    "bad UTF-8": b"\x80\x02X\x01\x00\x00\x00\xff.",
    "stack underflow": b"\x80\x02R.",
    "pop too far": b"\x80\x02000.",
    "mark missing": b"\x80\x02e.",
    "SETITEM on a list": b"\x80\x02]K\x01K\x02s.",
    "SETITEMS on a number": b"\x80\x02K\x01(K\x01K\x02u.",
    "BUILD on a number": b"\x80\x02K\x01}b.",
    "protocol 5": pickle.dumps({"w": bytearray(4)}, protocol=5),
    "out of band": b"\x80\x05\x97.",
    "protocol 9": b"\x80\x09}.",
    "INST": b"(S'true'\nios\nsystem\n.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    "extension": b"\x80\x02\x82\x01.",
    "unknown opcode": b"\x80\x02\xff.",
    "no dict": b"\x80\x02]q\x00.",
    "empty dict": b"\x80\x02}q\x00.",
    "deep": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "itself": b"\x80\x02}q\x00X\x01\x00\x00\x00wh\x00s.",
    "a number for a tensor": b"\x80\x02}X\x01\x00\x00\x00wK\x01s.",
    "many": b"\x80\x02" + b"N0" * (1 << 17) + b"}.",
}


@pytest.mark.covers("A19")
@pytest.mark.parametrize("case", BAD_PICKLES)
def test_broken_pickle(tmp_path, case):
    write_pth(tmp_path / NAME, BAD_PICKLES[case])
    start = time.process_time()
    with pytest.raises(ArtifactError, match=NAME) as e:
        MetaFolder(tmp_path, 2)
    assert time.process_time() - start < 2
    assert "\n" not in str(e.value) and len(str(e.value)) < 900


def refused_or_in_bounds(folder: Path) -> None:
    try:
        source = MetaFolder(folder, 2)
        for name in source.shapes:
            assert source.read(name).nbytes <= 16
    except ArtifactError as e:
        assert "\n" not in str(e) and len(str(e)) < 900


@pytest.mark.covers("A19")
def test_every_cut_and_a_flip_of_every_byte_of_a_pickle(tmp_path):
    good = tensor_pickle()
    for i in range(len(good)):
        for bad in (good[:i], good[:i] + bytes([good[i] ^ 1 << i % 8]) + good[i + 1 :]):
            write_pth(tmp_path / NAME, bad)
            refused_or_in_bounds(tmp_path)


@pytest.mark.covers("A19")
@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@settings(derandomize=True, max_examples=200, deadline=None)
@given(at=st.integers(0, 200), cut=st.integers(0, 8), put=st.binary(max_size=8))
def test_spliced_pickles(tmp_path_factory, at, cut, put):
    folder = tmp_path_factory.getbasetemp() / "spliced"
    folder.mkdir(exist_ok=True)
    good = tensor_pickle()
    write_pth(folder / NAME, good[:at] + put + good[at + cut :])
    refused_or_in_bounds(folder)


# Zip files


def rezip(path: Path, compression=zipfile.ZIP_STORED, **more: bytes) -> None:
    data = {"archive/data.pkl": tensor_pickle(), "archive/data/0": bytes(16)} | more
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, record in data.items():
            archive.writestr(name, record)


@pytest.mark.covers("A20")
def test_compressed_records_and_bombs(tmp_path):
    rezip(tmp_path / NAME, zipfile.ZIP_DEFLATED)
    with pytest.raises(ArtifactError, match="'archive/data.pkl' is compressed"):
        MetaFolder(tmp_path, 2)
    bomb = {"archive/data/1": bytes(1 << 26)}
    rezip(tmp_path / NAME, zipfile.ZIP_DEFLATED, **bomb)
    start = time.process_time()
    with pytest.raises(ArtifactError, match="compressed"):
        MetaFolder(tmp_path, 2)
    assert time.process_time() - start < 2


@pytest.mark.covers("A20")
def test_truncated_and_flipped_zip(tmp_path):
    rezip(tmp_path / NAME)
    good = (tmp_path / NAME).read_bytes()
    for n in range(len(good)):
        (tmp_path / NAME).write_bytes(good[:n])
        with pytest.raises(ArtifactError, match=NAME):
            MetaFolder(tmp_path, 2)
    start = good.index(b"PK\x01\x02")
    for i in [*range(30), *range(start, len(good))]:
        (tmp_path / NAME).write_bytes(good[:i] + bytes([good[i] ^ 1 << i % 8]) + good[i + 1 :])
        refused_or_in_bounds(tmp_path)


@pytest.mark.covers("A20")
def test_old_formats(tmp_path):
    state = {"w": torch.ones(2, 2)}
    torch.save(state, tmp_path / NAME, _use_new_zipfile_serialization=False)
    with pytest.raises(ArtifactError, match="not a zip file.*before 1.6"):
        MetaFolder(tmp_path, 2)
    (tmp_path / NAME).write_bytes(pickle.dumps(state))
    with pytest.raises(ArtifactError, match="not a zip file"):
        MetaFolder(tmp_path, 2)
    rezip(tmp_path / NAME)
    (tmp_path / NAME).write_bytes((tmp_path / NAME).read_bytes().replace(b"data.pkl", b"data.pk1"))
    with pytest.raises(ArtifactError, match="torch cannot read"):
        MetaFolder(tmp_path, 2)


@pytest.mark.covers("A20")
def test_big_endian_file(tmp_path):
    rezip(tmp_path / NAME, **{"archive/byteorder": b"big"})
    with pytest.raises(ArtifactError, match="big-endian"):
        MetaFolder(tmp_path, 2)
