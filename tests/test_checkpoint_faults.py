"""A save that is killed, or refused, at any of its system calls; and the order of those calls.

strace attaches to a child in the middle of a run and kills it, or fails a call, at the n-th call
of a kind: of the thread that saves, or of any thread (Orbax's). ALTIPLANO_EVERY_SYSCALL=1 takes
every n, for every kind, without a stride.
"""

import errno
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.save_script import state
from trainers.runs.checkpoint import CheckpointReader

ROOT = Path(__file__).parents[1]
CALLS = """mkdir openat flock write writev pwrite64 fsync fdatasync rename renameat renameat2 unlink
unlinkat rmdir ftruncate""".split()
EVERYTHING = "ALTIPLANO_EVERY_SYSCALL" in os.environ
# From a call on, as on a full disk; or at one call alone, as of a bad sector.
LASTING, ONCE = ("ENOSPC", "EDQUOT", "EROFS"), ("EIO", "EFBIG")
# What is refused: the calls of that thread or of any, and which of them.
REFUSED = [
    # The first mkdir is of the folder, which is there.
    ("writer", "mkdir", (2,)),
    ("writer", "openat", (2, 30)),
    ("writer", "write", (1, 2)),
    ("writer", "fsync", (1, 9)),
    ("writer", "rename", (1, 2)),
    ("process", "mkdir", (2,)),
    ("process", "writev", (1,)),
    ("process", "rename", (1,)),
]


class Saver:
    """Makes one save after the other into one folder, each under its own strace."""

    def __init__(self, folder: Path):
        self.folder, self.log = folder / "run", folder / "log"
        self.reader = CheckpointReader(self.folder)
        self._err = open(folder / "stderr", "w+")
        run = [sys.executable, "-W", "ignore", "-m", "tests.save_script"]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        env = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
        self._run = subprocess.Popen(run, cwd=ROOT, env=env, stderr=self._err, **pipes)

    def save(self, what: str, *inject: str) -> int:
        """The exit code of one more save. what: "writer", that thread alone, or "process"."""
        self._err.truncate(0)
        self._run.stdin.write(f"{what} {self.folder}\n")
        self._run.stdin.flush()
        traced = int(self._run.stdout.readline())
        options = ["-qq", "-y", "-o", str(self.log), "-e", f"trace={','.join(CALLS)}", *inject]
        options += ["-f"] if what == "process" else []
        with subprocess.Popen(["strace", "-p", str(traced), *options]) as tracer:
            code = int(self._run.stdout.readline())
            tracer.wait()
        return code

    def message(self) -> str:
        """What the last save wrote to stderr."""
        return Path(self._err.name).read_text()

    def check(self) -> int:
        """The newest step, which is whole, as are all that can be seen."""
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = self.reader.restore(state(0))
        assert got.meta == {"step": got.step}
        assert (got.state["w"] == got.step).all()
        assert len(self.reader.steps) == len([n for n in os.listdir(self.folder) if n[0] == "s"])
        return got.step

    def close(self) -> None:
        self._run.stdin.close()
        self._run.wait()
        self._err.close()


@pytest.fixture(scope="module")
def saver(tmp_path_factory) -> Iterator[Saver]:
    """A saver whose folder holds a step, and whose code is warm."""
    saver = Saver(tmp_path_factory.mktemp("saver"))
    try:
        assert [saver.save("process"), saver.save("process")] == [0, 0]
        assert saver.check() == 2
        yield saver
    finally:
        saver.close()


def calls(log: Path) -> list[tuple[str, str]]:
    """(call, its arguments) in the order in which they were begun."""
    lines = (re.match(r"(?:\d+ +)?(\w+)\((.*)", line) for line in log.read_text().splitlines())
    return [(m[1], m[2]) for m in lines if m]


def test_strace_sees_the_writer_alone(saver):
    assert saver.save("writer") == 0
    names = [name for name, _ in calls(saver.log)]
    assert names.count("rename") == 2 and "writev" not in names


@pytest.mark.covers("D18")
def test_the_order_of_a_save(saver):
    old = saver.check()
    assert saver.save("process") == 0
    new = saver.check()
    log = calls(saver.log)
    folder, final = str(saver.folder), saver.folder / f"step-{new:08d}"
    renames = [
        (i, re.findall(r'"([^"]*)"', args)) for i, (c, args) in enumerate(log) if c == "rename"
    ]
    ((shown, (temporary, _)),) = [(i, paths) for i, paths in renames if paths[1] == str(final)]
    hidden = [i for i, paths in renames if paths[0].endswith(f"step-{old:08d}")]

    def synced(path: str) -> list[int]:
        return [i for i, (c, args) in enumerate(log) if c == "fsync" and f"<{path}>" in args]

    def changed(path: str) -> list[int]:
        writes = [i for i, (c, a) in enumerate(log) if "write" in c and f"<{path}>" in a]
        return writes + [i for i, paths in renames if path in paths and i != shown]

    def done(name: str) -> int:
        """When the file or folder was on disk, with all that was written, for the first time."""
        path = os.path.join(temporary, name).rstrip("/")
        return min(i for i in synced(path) if max(changed(path), default=-1) < i < shown)

    files = [str(p.relative_to(final)) for p in final.rglob("*") if p.is_file()]
    folders = [str(p.relative_to(final)) for p in final.rglob("*") if p.is_dir()]
    files.remove("manifest.json")
    first_word = min(changed(os.path.join(temporary, "manifest.json")))
    for name in [*folders, ""]:
        inside = [done(file) for file in files if file.startswith(name)]
        # A folder's names are on disk after the last of its files is, and before the manifest is.
        assert any(
            max(inside) < i < first_word for i in synced(os.path.join(temporary, name).rstrip("/"))
        ), name
    assert max(map(done, files)) < first_word < done("manifest.json")
    last = max(i for i in synced(temporary) if i < shown)
    parent = [i for i in synced(folder) if i > shown]
    removed = min(i for i, (c, _) in enumerate(log) if c == "unlinkat" and i > shown)
    assert done("manifest.json") < last < shown < parent[0] < hidden[0] < parent[1] < removed


def kill_at_each(saver: Saver, what: str, name: str, stride: int) -> int:
    """Kills saves at their 1st, (1 + stride)-th… call of a kind, until one is not reached."""
    for n in range(1, 1000, 1 if EVERYTHING else stride):
        before = saver.check()
        code = saver.save(what, "-e", f"inject={name}:signal=KILL:when={n}")
        after = saver.check()
        assert after in (before, before + 1), (name, n)
        if code == 0:
            assert after == before + 1
            return n
        assert code == -9, (name, n, saver.message())
        if len(saver.reader.steps) > 1:
            # Killed before it removed the older one. Were that repeated, the calls would never end.
            assert saver.save("process") == 0
    raise AssertionError("no end")


@pytest.mark.slow
@pytest.mark.covers("D16")
@pytest.mark.parametrize(
    "name,stride,least",
    [
        ("mkdir", 1, 2),
        ("write", 1, 2),
        ("fsync", 2, 30),
        ("rename", 1, 3),
        ("unlinkat", 1, 10),
        ("rmdir", 1, 2),
        ("flock", 1, 2),
        ("openat", 12, 80),
    ],
)
def test_killed_at_each_call_of_the_thread_that_saves(saver, name, stride, least):
    assert kill_at_each(saver, "writer", name, stride) >= least


@pytest.mark.slow
@pytest.mark.covers("D16")
@pytest.mark.parametrize("name", ["mkdir", "write", "writev", "rename", "unlink"])
def test_killed_at_each_call_of_orbax(saver, name):
    assert kill_at_each(saver, "process", name, 1) >= 2


@pytest.mark.slow
@pytest.mark.covers("D17")
@pytest.mark.parametrize("kinds", [LASTING, ONCE], ids=["lasting", "once"])
@pytest.mark.parametrize("i", range(len(REFUSED)), ids=[f"{who}-{c}" for who, c, _ in REFUSED])
def test_refused(saver, i, kinds):
    """Each call with a lasting error and with one that comes once, in turn of all of its kind."""
    (what, call, ns), error = REFUSED[i], kinds[i % len(kinds)]
    more = "+" if kinds == LASTING else ""
    for n in ns:
        before = saver.check()
        assert saver.save(what, "-e", f"inject={call}:error={error}:when={n}{more}") == 6, (n, more)
        after = saver.check()
        assert "cannot save step" in saver.message() and after in (before, before + 1)
        shown = [name for name in os.listdir(saver.folder) if name != ".lock"]
        if call == "openat":
            # A folder that cannot be opened cannot be removed; the next save does it.
            shown = [name for name in shown if ".tmp-" not in name]
        if after == before:
            assert shown == [f"step-{before:08d}"], (n, more)
        else:
            # Seen, but for the last fsync or the removal of the older one.
            assert not any(".tmp-" in name for name in shown), (n, more)
    assert saver.save("writer") == 0
    assert sorted(os.listdir(saver.folder)) == [".lock", f"step-{saver.check():08d}"]


@pytest.mark.covers("D17")
def test_refused_once(saver):
    before = saver.check()
    text = os.strerror(errno.ENOSPC).lower()
    for call in ("fsync", "rename"):
        assert saver.save("writer", "-e", f"inject={call}:error=ENOSPC:when=1+") == 6
        assert text in saver.message() and saver.check() == before
        assert sorted(os.listdir(saver.folder)) == [".lock", f"step-{before:08d}"]
    assert saver.save("writer") == 0 and saver.check() == before + 1
