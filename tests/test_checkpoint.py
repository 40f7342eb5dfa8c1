"""Checkpoints: bit-equal back, broken ones found and named, one writer, retention."""

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from trainers.runs import checkpoint
from trainers.runs.checkpoint import Checkpointer, CheckpointReader
from trainers.runs.manifest import check_digests, read_manifest, write_manifest
from utils.errors import CheckpointError, ConfigError
from utils.files import FolderLock

ROOT = Path(__file__).parents[1]


class Moments(NamedTuple):
    count: jax.Array
    mu: dict


def make_state(seed: int = 0):
    """Every kind of leaf that a training state has, with bits that a cast would lose."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, (3, 5), np.uint32)
    odd = jnp.array([jnp.nan, -0.0, jnp.inf, 1e-45, 3.4e38], jnp.float32)
    params = {
        "layers": {"wq": jnp.asarray(rng.standard_normal((2, 3, 4), np.float32)), "odd": odd},
        "embed": jnp.asarray(bits.astype(np.uint16).view(ml_dtypes.bfloat16)),
    }
    moments = Moments(jnp.int32(seed), {"a": jnp.arange(3), "b": (jnp.float32(0.1), None)})
    keys = {"key": jax.random.key(seed), "keys": jax.random.split(jax.random.key(1), 3)}
    keys["rbg"] = jax.random.key(seed, impl="rbg")
    return {"params": params, "opt": (moments, [], {}), "mask": jnp.array([True, False])} | keys


def tiny(value: float = 1.0):
    return {"w": jnp.full((2, 3), value, jnp.float32), "step": jnp.int32(value)}


def assert_same(got, want) -> None:
    """Two trees are equal to the bit."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert isinstance(x, jax.Array) and (x.dtype, x.shape) == (y.dtype, y.shape)
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory):
    """A folder with the steps 1, 2 and 3, whose w is the step. Copied, never written."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    with Checkpointer(folder, keep=3) as writer:
        for step in (1, 2, 3):
            writer.save(step, tiny(step), {"position": step})
    return folder


@pytest.fixture
def saved(saved_once, tmp_path):
    return Path(shutil.copytree(saved_once, tmp_path / "run"))


@contextlib.contextmanager
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def files_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


# What was saved comes back.


def test_every_kind_of_leaf_comes_back_to_the_bit(tmp_path):
    state = make_state()
    meta = {"position": [1, {"shard": 3}], "name": "é", "lr": 1e-4, "none": None}
    with Checkpointer(tmp_path / "a" / "b") as writer:
        assert writer.steps == []
        writer.save(7, state, meta, score=2.5)
        writer.wait()
        assert writer.steps == [7]
        with no_warning():
            for like in (state, jax.eval_shape(lambda: state)):
                got = writer.restore(like)
                assert got.step == 7 and got.meta == meta
                assert_same(got.state, state)
    assert CheckpointReader(tmp_path / "a" / "b").read_meta() == meta
    draw = functools.partial(jax.random.normal, shape=(4,))
    for name in ("key", "rbg"):
        assert (draw(got.state[name]) == draw(state[name])).all()


def test_the_arrays_are_copied_before_save_returns(tmp_path, monkeypatch):
    go, submit = threading.Event(), ThreadPoolExecutor.submit

    def later(pool, function, *args):
        """Nothing that is left to another thread is done before `go`."""
        return submit(pool, lambda: (go.wait(30), function(*args))[1])

    monkeypatch.setattr(ThreadPoolExecutor, "submit", later)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = {"w": jnp.zeros((64, 64)), "n": jnp.int32(0)}
    with Checkpointer(tmp_path) as writer:
        writer.save(1, state, {})
        where = state["w"].unsafe_buffer_pointer()
        state = step(state)
        # The donation was real: the memory of what is being saved is written over.
        assert state["w"].unsafe_buffer_pointer() == where
        assert writer.steps == []
        go.set()
        writer.wait()
        got = writer.restore(jax.eval_shape(lambda: state)).state
    assert (got["w"] == 0).all() and got["n"] == 0


def test_restored_arrays_can_be_donated(saved):
    state = CheckpointReader(saved).restore(tiny()).state
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 2, s), donate_argnums=0)
    assert (step(step(state))["w"] == 12).all()
    assert (CheckpointReader(saved).restore(tiny()).state["w"] == 3).all()


def test_restored_onto_the_sharding_that_is_asked_for(saved):
    mesh = jax.make_mesh((1,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    like = {"w": jax.ShapeDtypeStruct((2, 3), jnp.float32, sharding=sharding)}
    like["step"] = jax.ShapeDtypeStruct((), jnp.int32)
    assert CheckpointReader(saved).restore(like).state["w"].sharding == sharding
    with pytest.raises(CheckpointError, match=r"step is int32\[\], expected key<fry>\[\]"):
        CheckpointReader(saved).restore(like | {"step": key})


def test_the_tree_does_not_depend_on_classes(saved, tmp_path):
    class State(NamedTuple):
        step: object
        w: object

    got = CheckpointReader(saved).restore(State(**jax.eval_shape(tiny))).state
    assert isinstance(got, State) and (got.w == 3).all()
    with Checkpointer(tmp_path / "dots") as writer:
        with pytest.raises(CheckpointError, match="one path"):
            writer.save(1, {"a.b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, {})


@pytest.mark.parametrize(
    "change,expected",
    [
        (dict(w=jnp.ones((3, 2))), r"w is float32\[2, 3\], expected float32\[3, 2\]"),
        (dict(w=jnp.ones((2, 3), jnp.bfloat16)), r"w is float32.*expected bfloat16"),
        (dict(v=jnp.ones(2)), "v is not in it"),
    ],
)
def test_other_arrays_are_an_error_and_no_older_step(saved, change, expected):
    with no_warning(), pytest.raises(CheckpointError, match=expected):
        CheckpointReader(saved).restore(tiny() | change)
    with pytest.raises(CheckpointError, match="step is not expected"):
        CheckpointReader(saved).restore({"w": jnp.ones((2, 3))})


def test_meta_that_is_no_json(tmp_path):
    with Checkpointer(tmp_path) as writer:
        for meta in ({"a": float("nan")}, {"a": jnp.ones(1)}, {"a": b"x"}):
            with pytest.raises(CheckpointError, match="meta is not JSON"):
                writer.save(1, tiny(), meta)
        assert writer.steps == []


# Broken ones.


def flip(path: Path, bit: int = 3):
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)


def unreadable(path: Path):
    path.unlink()
    path.mkdir()


def fifo(path: Path):
    path.unlink()
    os.mkfifo(path)


DAMAGE = {
    "truncated": lambda p: os.truncate(p, p.stat().st_size // 2),
    "empty": lambda p: os.truncate(p, 0),
    "one byte less": lambda p: os.truncate(p, p.stat().st_size - 1),
    "one byte more": lambda p: p.write_bytes(p.read_bytes() + b"\0"),
    "flipped bit": flip,
    "last bit": lambda p: flip(p, p.stat().st_size * 8 - 1),
    "missing": lambda p: p.unlink(),
    "unreadable": unreadable,
    "fifo": fifo,
    "extra file": lambda p: (p.parent / "extra").write_bytes(b"x"),
    "dangling link": lambda p: (p.unlink(), p.symlink_to("nowhere")),
    "swapped": lambda p: p.write_bytes(bytes(p.stat().st_size)),
}
KINDS = ("manifest.json", "meta.json", "state/_METADATA", "state/d/*", "state/ocdbt.process_0/d/*")


@pytest.mark.covers("D20")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_broken_latest_step(saved, damage, kind):
    path = sorted(step_folder(saved, 3).glob(kind))[0]
    DAMAGE[damage](path)
    reader = CheckpointReader(saved)
    name = "extra" if damage == "extra file" else path.name
    with pytest.warns(UserWarning, match=f"step-00000003 is broken.*{name}"):
        got = reader.restore(tiny())
    assert got.step == 2 and got.meta == {"position": 2} and (got.state["w"] == 2).all()
    with pytest.raises(CheckpointError, match=f"cannot use step 3.*{name}") as error:
        reader.restore(tiny(), step=3)
    assert error.value.exit_code == 6 and "\n" not in str(error.value)
    assert reader.restore(tiny(), step=1).step == 1
    if kind in ("manifest.json", "meta.json"):
        with pytest.warns(UserWarning, match="step-00000003 is broken"):
            assert reader.read_meta() == {"position": 2}
        with pytest.raises(CheckpointError):
            reader.read_meta(3)


@pytest.mark.covers("D20")
def test_two_broken_steps_are_both_named(saved):
    for step in (2, 3):
        flip(step_folder(saved, step) / "meta.json")
    with pytest.warns(UserWarning) as caught:
        assert CheckpointReader(saved).restore(tiny()).step == 1
    assert ["step-00000003 is" in str(w.message) for w in caught] == [True, False]
    assert ["step-00000002 is" in str(w.message) for w in caught] == [False, True]


@pytest.mark.covers("D20")
def test_a_step_under_another_number_is_broken(saved):
    os.rename(step_folder(saved, 3), step_folder(saved, 4))
    with pytest.warns(UserWarning, match="is of step 3, expected step 4"):
        assert CheckpointReader(saved).restore(tiny()).step == 2


def check_each_flip(folder: Path, bits_of_byte) -> int:
    """Flips single bits, one at a time; each has to be found. Returns how many there were."""
    for path in files_of(folder):
        original = path.read_bytes()
        for at in range(len(original)):
            for bit in bits_of_byte(at):
                with open(path, "r+b", buffering=0) as f:
                    os.pwrite(f.fileno(), bytes([original[at] ^ 1 << bit]), at)
                    with pytest.raises(CheckpointError):
                        check_digests(folder, read_manifest(folder, 1))
                    os.pwrite(f.fileno(), original[at : at + 1], at)
    check_digests(folder, read_manifest(folder, 1))
    return sum(len(bits_of_byte(at)) for p in files_of(folder) for at in range(p.stat().st_size))


def tiniest(tmp_path: Path) -> Path:
    with Checkpointer(tmp_path / "run") as writer:
        writer.save(1, {"w": jnp.ones(2)}, {})
    return step_folder(tmp_path / "run", 1)


@pytest.mark.covers("D20")
def test_a_flipped_bit_in_every_byte_is_caught(tmp_path):
    assert check_each_flip(tiniest(tmp_path), lambda at: [at % 8]) > 2000


@pytest.mark.slow
@pytest.mark.covers("D20")
def test_every_single_flipped_bit_is_caught(tmp_path):
    assert check_each_flip(tiniest(tmp_path), lambda at: range(8)) > 16000


@pytest.mark.covers("D20")
def test_truncations_are_caught(tmp_path):
    folder = tiniest(tmp_path)
    for path in files_of(folder):
        original = path.read_bytes()
        for size in {*range(0, len(original), 7), len(original) - 1}:
            os.truncate(path, size)
            with pytest.raises(CheckpointError):
                check_digests(folder, read_manifest(folder, 1))
            path.write_bytes(original)


# None that could be used.


def foreign(folder: Path):
    (folder / "notes.txt").write_text("hi")


def only_tmp(folder: Path):
    (folder / ".step-00000005.tmp-0123abcd").mkdir()


def dangling(folder: Path):
    (folder / "step-00000009").symlink_to("nowhere")


def latest(folder: Path):
    (folder / "latest").symlink_to("step-00000009")


def a_file(folder: Path):
    (folder / "step-00000003").write_text("x")


def no_manifest(folder: Path):
    (folder / "step-00000003" / "state").mkdir(parents=True)


@pytest.mark.covers("D21")
@pytest.mark.parametrize("make", [foreign, only_tmp, dangling, latest, a_file, no_manifest])
def test_nothing_complete_is_never_a_fresh_start(tmp_path, make):
    make(tmp_path)
    before = sorted(os.listdir(tmp_path))
    with Checkpointer(tmp_path) as writer:
        for use in (
            lambda: writer.steps,
            lambda: writer.restore(tiny()),
            writer.read_meta,
            lambda: CheckpointReader(tmp_path).steps,
        ):
            with pytest.raises(CheckpointError, match="holds no complete checkpoint") as error:
                use()
            assert error.value.exit_code == 6 and before[0] in str(error.value)
        with pytest.raises(CheckpointError, match="holds .*resume from there"):
            writer.save(1, tiny(), {})
    assert sorted(set(os.listdir(tmp_path)) - {".lock"}) == before


@pytest.mark.covers("D21")
def test_all_broken(saved):
    for step in (1, 2, 3):
        flip(step_folder(saved, step) / "meta.json")
    with pytest.warns(UserWarning), pytest.raises(CheckpointError) as error:
        CheckpointReader(saved).restore(tiny())
    assert str(error.value).count("is damaged") == 3
    for step in (1, 2, 3):
        (step_folder(saved, step) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        CheckpointReader(saved).steps


def test_an_empty_folder_has_no_steps(tmp_path):
    with Checkpointer(tmp_path / "new") as writer:
        assert writer.steps == [] == CheckpointReader(tmp_path / "new").steps
        with pytest.raises(CheckpointError, match="holds no complete checkpoint, only nothing"):
            writer.restore(tiny())
    with pytest.raises(CheckpointError, match="cannot read folder"):
        CheckpointReader(tmp_path / "absent").steps


# The run goes on.


def test_saved_steps_that_were_not_restored_are_not_written_over(saved):
    with Checkpointer(saved) as writer:
        with pytest.raises(CheckpointError, match="holds step-00000001.*resume from there"):
            writer.save(4, tiny(), {})
        writer.restore(tiny())
        writer.save(4, tiny(4), {})
        writer.save(4, tiny(5), {})
        with pytest.raises(CheckpointError, match="cannot save step 3 after step 4"):
            writer.save(3, tiny(), {})
        assert (writer.restore(tiny()).state["w"] == 4).all()


def test_going_back_drops_the_newer_steps_once_another_is_there(saved):
    with Checkpointer(saved) as writer:
        with pytest.warns(UserWarning, match=r"removes the newer steps \[2, 3\]"):
            writer.restore(tiny(), step=1)
        assert writer.steps == [1, 2, 3]
        writer.save(2, tiny(20), {})
        writer.wait()
        assert writer.steps == [1, 2]
        assert (writer.restore(tiny()).state["w"] == 20).all()


def test_a_broken_step_is_replaced(saved):
    flip(step_folder(saved, 3) / "meta.json")
    with Checkpointer(saved) as writer:
        with pytest.warns(UserWarning):
            assert writer.restore(tiny()).step == 2
        writer.save(3, tiny(30), {})
        assert (writer.restore(tiny()).state["w"] == 30).all()
        assert writer.steps == [2, 3]


def test_leftovers_of_a_killed_save_are_removed_and_foreign_things_stay(saved):
    for name in (".step-00000004.tmp-0123abcd", ".step-00000001.old-0123abcd"):
        (saved / name / "state").mkdir(parents=True)
    (saved / "notes").mkdir()
    (saved / ".hidden").write_text("x")
    with Checkpointer(saved) as writer:
        writer.restore(tiny())
        writer.save(4, tiny(4), {})
    names = {".hidden", ".lock", "notes", "step-00000003", "step-00000004"}
    assert set(os.listdir(saved)) == names


# Retention.


def run_scores(folder: Path, scores, **options) -> list[int]:
    with Checkpointer(folder, **options) as writer:
        for step, score in enumerate(scores, 1):
            writer.save(step, tiny(step), {}, score=score)
        writer.wait()
        return writer.steps


@pytest.mark.covers("D26")
@pytest.mark.parametrize(
    "scores,options,left",
    [
        ([None] * 4, {}, [3, 4]),
        ([None] * 4, dict(keep=1), [4]),
        ([1, 2, 3, 4], {}, [1, 3, 4]),
        ([1, 2, 3, 4], dict(keep=1), [1, 4]),
        ([1, 2, 3, 4], dict(keep=1, keep_best=False), [4]),
        ([4, 3, 2, 1], dict(keep=1), [4]),
        ([2, 1, 3, None], {}, [2, 3, 4]),
        ([float("nan"), 2, float("-inf"), 3, 4], dict(keep=1), [2, 5]),
        ([1, 1, 1], dict(keep=1), [1, 3]),
    ],
)
def test_what_stays(tmp_path, scores, options, left):
    assert run_scores(tmp_path, scores, **options) == left
    assert len([n for n in os.listdir(tmp_path) if n != ".lock"]) == len(left)


@pytest.mark.covers("D26")
def test_the_best_is_remembered_over_a_restart(tmp_path):
    run_scores(tmp_path, [1, 2], keep=1)
    with Checkpointer(tmp_path, keep=1) as writer:
        writer.restore(tiny())
        writer.save(3, tiny(3), {}, score=1.5)
        writer.wait()
        assert writer.steps == [1, 3]


def failing(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.covers("D26", "D27")
def test_a_failing_save_removes_nothing(tmp_path, monkeypatch):
    with Checkpointer(tmp_path, keep=1) as writer:
        writer.save(1, tiny(1), {})
        writer.wait()
        monkeypatch.setattr(checkpoint, "write_arrays", failing)
        writer.save(2, tiny(2), {})
        with pytest.raises(CheckpointError, match="cannot save step 2.*no space left") as error:
            writer.wait()
        assert error.value.exit_code == 6
        monkeypatch.undo()
        assert sorted(os.listdir(tmp_path)) == [".lock", "step-00000001"]
        writer.save(2, tiny(2), {})
        writer.wait()
        assert writer.steps == [2]


@pytest.mark.covers("D27")
@pytest.mark.parametrize("surfaces", ["save", "wait", "close", "exit", "restore"])
def test_an_error_of_the_background_comes_up_once(tmp_path, monkeypatch, surfaces):
    monkeypatch.setattr(checkpoint, "write_arrays", failing)
    writer = Checkpointer(tmp_path)
    writer.save(1, tiny(1), {})
    use = {
        "save": lambda: writer.save(2, tiny(2), {}),
        "wait": writer.wait,
        "close": writer.close,
        "exit": lambda: writer.__exit__(None, None, None),
        "restore": lambda: writer.restore(tiny()),
    }
    with pytest.raises(CheckpointError, match="cannot save step 1"):
        use[surfaces]()
    writer.wait()
    with no_warning():
        writer.close()
        writer.close()
    FolderLock(tmp_path / ".lock", 0.0).release()


@pytest.mark.covers("D27")
def test_an_error_of_the_background_does_not_hide_the_one_under_way(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "write_arrays", failing)
    with pytest.warns(UserWarning, match="cannot save step 1"), pytest.raises(KeyError):
        with Checkpointer(tmp_path) as writer:
            writer.save(1, tiny(1), {})
            raise KeyError


@pytest.mark.covers("D27")
def test_a_program_that_only_closes_exits_with_an_error(tmp_path):
    code = (
        "import sys; from trainers.runs import checkpoint as c; from tests.test_checkpoint import *\n"
        "c.write_arrays = failing\n"
        "try:\n with Checkpointer(sys.argv[1]) as w: w.save(1, tiny(1), {})\n"
        "except CheckpointError as e: print(e); sys.exit(e.exit_code)\n"
    )
    run = [sys.executable, "-c", code, str(tmp_path)]
    out = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 6 and out.stdout.count("\n") == 1, out.stderr


# Clocks.


@pytest.mark.covers("D25")
def test_only_numbers_order_steps(tmp_path, monkeypatch):
    now = iter([1e9, 1.1e9, 0.9e9, 1e9, 1e9, -5.0])
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    time.tzset()
    with Checkpointer(tmp_path, keep=3, clock=lambda: next(now)) as writer:
        for step in (9, 10, 11, 100):
            writer.save(step, tiny(step), {})
            writer.wait()
        monkeypatch.delenv("TZ")
        time.tzset()
        for i, step in enumerate((100, 11, 10)):
            # The oldest by number is the newest by time; two are the same.
            os.utime(step_folder(tmp_path, step), (1e9, 1e9 + max(i, 1)))
        assert writer.steps == [10, 11, 100]
        assert writer.restore(tiny()).step == 100
        writer.save(10**9, tiny(5), {})
        writer.wait()
        assert writer.steps == [11, 100, 10**9]


# One writer.


HOLD = """
import sys
from trainers.runs.checkpoint import Checkpointer
writer = Checkpointer(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.covers("D26")
def test_two_writers(tmp_path):
    run = [sys.executable, "-c", HOLD, str(tmp_path)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(run, cwd=ROOT, **pipes) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match="being written by another process") as error:
            Checkpointer(tmp_path)
        holder = json.loads((tmp_path / ".lock").read_text())
        assert holder["pid"] == other.pid and f'"pid": {other.pid}' in str(error.value)
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        assert holder["boot_id"] == boot_id and os.uname().nodename == holder["host"]
        assert abs(holder["time"] - time.time()) < 600
        assert CheckpointReader(tmp_path).steps == []
        other.kill()
    # Its lock is stale: it names a process that is gone.
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == other.pid
    with Checkpointer(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


@pytest.mark.covers("D26")
def test_a_forked_worker_does_not_keep_the_lock(tmp_path):
    code = (
        "import os, sys, signal; from utils.files import FolderLock\n"
        "lock = FolderLock(sys.argv[1], 0.0)\n"
        "if (pid := os.fork()) == 0: signal.pause()\n"
        "print(pid, flush=True); os.kill(os.getpid(), 9)\n"
    )
    run = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    with subprocess.Popen(run, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        worker = int(other.stdout.readline())
        other.wait()
    try:
        os.kill(worker, 0)
        # The writer may be dead before its worker has come back from fork.
        deadline = time.monotonic() + 30
        while True:
            try:
                FolderLock(tmp_path / ".lock", 0.0).release()
                break
            except CheckpointError:
                assert time.monotonic() < deadline
                time.sleep(0.01)
    finally:
        os.kill(worker, 9)


@pytest.mark.covers("D26")
def test_the_lock_ends_with_the_writer(tmp_path):
    for _ in range(2):
        with Checkpointer(tmp_path):
            with pytest.raises(CheckpointError, match="another process"):
                Checkpointer(tmp_path)
    with Checkpointer(tmp_path), pytest.raises(CheckpointError), Checkpointer(tmp_path):
        pass


@pytest.mark.slow
@pytest.mark.covers("D26")
def test_a_reader_beside_a_writer(tmp_path):
    stop, seen, errors = threading.Event(), set(), []

    def read():
        reader = CheckpointReader(tmp_path)
        try:
            while not stop.is_set():
                with no_warning():
                    got = reader.restore(tiny())
                assert (got.state["w"] == got.step).all() and got.meta == {"at": got.step}
                seen.add(got.step)
        except BaseException as e:
            errors.append(e)

    with Checkpointer(tmp_path, keep=1) as writer:
        writer.save(1, tiny(1), {"at": 1})
        writer.wait()
        thread = threading.Thread(target=read)
        thread.start()
        for step in range(2, 25):
            writer.save(step, tiny(step), {"at": step})
        writer.wait()
        while 24 not in seen and not errors:
            time.sleep(0.01)
        stop.set()
        thread.join()
    assert not errors and len(seen) > 3


@pytest.mark.covers("D26")
def test_a_step_that_vanishes_under_a_reader(saved, monkeypatch):
    def vanish(folder, manifest, names=None):
        # What a writer does meanwhile.
        if folder.name == "step-00000003":
            os.rename(folder, saved / ".step-00000003.old-0123abcd")
        check_digests(folder, manifest, names)

    monkeypatch.setattr(checkpoint, "check_digests", vanish)
    with no_warning():
        assert CheckpointReader(saved).restore(tiny()).step == 2


@pytest.mark.covers("D26")
def test_what_is_being_read_is_not_removed(tmp_path, monkeypatch):
    read = checkpoint.read_arrays

    def read_late(folder, *rest):
        for step in (2, 3):
            writer.save(step, tiny(step), {})
            writer.wait()
        assert writer.steps == [1, 3]
        return read(folder, *rest)

    with Checkpointer(tmp_path, keep=1) as writer:
        writer.save(1, tiny(1), {})
        writer.wait()
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "read_arrays", read_late)
            assert (CheckpointReader(tmp_path).restore(tiny()).state["w"] == 1).all()
        writer.save(4, tiny(4), {})
        writer.wait()
        assert writer.steps == [4]


# The folder is tried out at once.


@pytest.mark.covers("D28")
def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match="cannot write into"):
            Checkpointer(folder)
    with pytest.raises(CheckpointError, match="name too long|too long"):
        Checkpointer(tmp_path / ("n" * 300))
    with pytest.raises(CheckpointError, match="bytes free, a checkpoint needs"):
        Checkpointer(tmp_path / "full", need_bytes=1 << 60)
    with pytest.raises(ConfigError, match="keep=0.*need_bytes=-1"):
        Checkpointer(tmp_path / "keep", keep=0, need_bytes=-1)
    # A refused folder is nobody's.
    FolderLock(tmp_path / "full" / ".lock", 0.0).release()


@pytest.mark.covers("D28")
def test_a_folder_without_rights_or_room(tmp_path, monkeypatch):
    for number, text in ((13, "Permission denied"), (30, "Read-only file system")):

        def refuse(*_, number=number, text=text, **__):
            raise OSError(number, text)

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "FolderLock", refuse)
            with pytest.raises(CheckpointError, match=text.lower()):
                Checkpointer(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(CheckpointError, match="no space left"):
            Checkpointer(tmp_path)
    assert os.listdir(tmp_path) == [".lock"]
    with Checkpointer(tmp_path):
        assert os.listdir(tmp_path) == [".lock"]


def test_the_manifest_says_what_is_there(saved):
    folder = step_folder(saved, 2)
    manifest = read_manifest(folder, 2)
    assert manifest.arrays == {"step": [[], "int32"], "w": [[2, 3], "float32"]}
    names = {str(p.relative_to(folder)) for p in files_of(folder)}
    assert set(manifest.files) == names - {"manifest.json"}
    assert list(json.loads((folder / "manifest.json").read_text())["files"]) == sorted(
        manifest.files
    )
    write_manifest(folder, step=2, saved_at=0.0, score=1.5, arrays={})
    assert read_manifest(folder, 2).score == 1.5


@pytest.mark.slow
@pytest.mark.covers("N2")
def test_many_saves_hold_one_copy_of_the_state(tmp_path):
    code = """
import sys
import jax, jax.numpy as jnp
from trainers.runs.checkpoint import Checkpointer
def memory(name):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines[name].split()[0]) / 1024
state = {str(i): jax.random.normal(jax.random.key(i), (5120, 1024)) for i in range(10)}  # 200 MB
with Checkpointer(sys.argv[1], keep=1) as writer:
    writer.save(1, {"x": jnp.zeros(8)}, {})  # what the first save of all takes for itself
    writer.wait()
    before = memory("VmRSS")
    for step in range(2, 7):
        writer.save(step, state, {})
print(memory("VmHWM") - before)
"""
    env = dict(os.environ, JAX_PLATFORMS="cpu")
    words = [sys.executable, "-c", code, str(tmp_path / "c")]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 300  # with Orbax's own copies 700
