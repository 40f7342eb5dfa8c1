"""resolve() of a Hugging Face id: the real client against a small server of this process."""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
import types
import urllib.parse
from pathlib import Path

import huggingface_hub
import pytest

from models.llama import hub
from utils.errors import ArtifactError

ROOT = Path(hub.__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SMALL = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
REPOS = {
    "org/plain": [*SMALL, "special_tokens_map.json", "chat_template.jinja", "model.safetensors"]
    + ["README.md", "pytorch_model.bin", "consolidated.00.pth", "params.json", "model.onnx"]
    + [
        "onnx/model.safetensors",
        "models/a.safetensors",
        "original/consolidated.00.pth",
        "consolidated.safetensors",
    ],
    "org/sharded": [*SMALL, "model.safetensors.index.json"]
    + ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
    "org/meta": ["consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model"]
    + ["checklist.chk"],
    "org/rows": ["README.md", "data/train.jsonl", "data/test.jsonl"],
    "org/gguf": ["README.md", "a-Q4_0.gguf", "a-Q8_0.gguf"],
    "org/nothing": ["README.md", "config.json", "pytorch_model.bin"],
    "org/gated": [*SMALL, "model.safetensors"],
    "org/broken": ["config.json", "model.safetensors"],
}


class Hub(http.server.BaseHTTPRequestHandler):
    """The few requests that huggingface_hub makes to fetch a snapshot."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = urllib.parse.urlparse(self.path).path.strip("/").removeprefix("datasets/").split("/")
        path = [urllib.parse.unquote(part) for part in path]
        api = path[0] == "api"
        repo = "/".join(path[2:4] if api else path[:2])
        self.server.asked.append("" if api else "/".join(path[4:]))
        revision = path[5] if path[4:5] == ["revision"] else path[3] if path[2] == "resolve" else ""
        self.server.revisions.add(revision)
        if repo not in REPOS:
            self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "none"})
        elif revision == "no-such":
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "none"})
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
    return b'{"text": "a"}\n' if name.endswith(".jsonl") else name.encode() * 1000


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.asked, server.revisions = [], set()
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(repo: str, home: Path, endpoint: str, rows: bool = False, **env: str) -> dict:
    """resolve(repo) in a process of its own, because the client reads its settings once.

    Returns:
        what: the path or the error's message, a list for several repositories; told: the progress;
        stderr. With `rows`, `what` has
        for each of several data sets (the first row's place, the commit), or the error's message.
    """
    code = (
        "import json, sys; from models.llama import hub\n"
        "told = []\n"
        "def find(repo):\n"
        "    try: return str(hub.resolve(repo, lambda *r: told.append(r)))\n"
        "    except hub.ArtifactError as e: return str(e)\n"
        "what = [find(repo) for repo in sys.argv[1].split()]\n"
        "print(json.dumps(dict(what=what if what[1:] else what[0], told=told)))"
        if not rows
        else "import json, sys; from trainers import records\n"
        "def read(path):\n"
        "    try: found = records.read_records(path)\n"
        "    except records.DataError as e: return str(e)\n"
        "    return found.rows[0].where, found.commit\n"
        "print(json.dumps(dict(what=[read(path) for path in sys.argv[1].split()])))"
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
    assert sorted(os.listdir(folder)) == names
    assert all((folder / name).read_bytes() == content(name) for name in names)
    total = sum(len(content(name)) for name in names)
    assert got["told"][-1] == [f"fetching {repo}", total, total]
    assert got["stderr"] == ""
    assert {name for name in server.asked if name} == set(names)
    if repo != "org/plain":
        return
    # Later starts work without a network too.
    assert fetch(repo, HF_HUB_OFFLINE="1")["what"] == str(folder)
    assert fetch(repo, url="http://127.0.0.1:9")["what"] == str(folder)


REFUSED = {
    "org/gated": "org/gated is gated: accept its terms on https://huggingface.co/org/gated",
    "org/missing": "org/missing is neither a folder here nor a public repository",
    "org/a--b": "org/a--b is neither a folder here nor a public repository",
    "org/plain@no-such": "has no such revision; see https://huggingface.co/org/plain/c",
    "org/gguf": "no weights that .* `hf download org/gguf a-Q4_0.gguf`",
    "org/nothing": "has no model.*safetensors and no consolidated",
    "org/broken": "cannot fetch org/broken from Hugging Face, and it is not in the cache: .*403",
}


def test_repositories_that_cannot_be_loaded(fetch):
    for said, message in zip(fetch(" ".join(REFUSED))["what"], REFUSED.values(), strict=True):
        assert re.search(message, said) and "\n" not in said


@pytest.mark.covers("R46")
@pytest.mark.parametrize("revision", ["v1.0", "refs/pr/1"])
def test_a_revision_is_pinned_and_its_commit_known(fetch, server, revision):
    server.revisions.clear()
    folder = Path(fetch(f"org/plain@{revision}")["what"])
    assert revision in server.revisions and "main" not in server.revisions
    assert hub.commit_of(folder) == hub.commit_of(folder / "config.json") == COMMIT
    assert hub.commit_of(folder.parent) is None
    for name in (f"org/plain@{revision}", f"org/plain@{COMMIT}"):
        assert fetch(name, HF_HUB_OFFLINE="1")["what"] == str(folder)
    assert fetch("org/plain", HF_HUB_OFFLINE="1")["what"].startswith("cannot fetch org/plain")


@pytest.mark.covers("R46", "N9")
def test_data_sets_are_pinned_and_an_offline_machine_is_told_at_once(fetch, server):
    names = ["org/rows", "org/rows@feature/x", "hf://datasets/org/rows@refs/pr/1/data/test.jsonl"]
    names += ["org/rows@no-such", "hf://datasets/org/rows/none.jsonl"]
    server.revisions.clear()
    *found, no_revision, no_file = fetch(" ".join(names), rows=True)["what"]
    places = ["/data/train", "@feature/x/data/train", "@refs/pr/1/data/test"]
    assert found == [[f"hf://datasets/org/rows{p}.jsonl:1", COMMIT] for p in places]
    assert {"feature/x", "refs/pr/1"} < server.revisions
    assert "has no such revision" in no_revision and "has no file 'none.jsonl'" in no_file
    start = time.monotonic()
    *offline, kept, other = fetch(" ".join(names[:4]), rows=True, url="http://127.0.0.1:9")["what"]
    assert time.monotonic() - start < 20  # with the client's own retries it is 25 s for each
    assert kept == found[2]
    for message in (*offline, other):
        assert re.match("cannot fetch the dataset org/rows .*refused; try again with a n", message)


def test_no_network_and_nothing_in_the_cache(fetch):
    for settings in (dict(url="http://127.0.0.1:9"), dict(HF_HUB_OFFLINE="1")):
        got = fetch("org/plain", **settings)["what"]
        assert got.startswith("cannot fetch org/plain from Hugging Face") and "\n" not in got
        assert "--ckpt_dir" in got


def test_download_that_breaks_off(monkeypatch):
    """hf_xet, which fetches big files, reports its failures as RuntimeErrors."""

    def snapshot_download(repo, **_):
        raise RuntimeError("Data processing error: CAS service error\nmore")

    files = [types.SimpleNamespace(rfilename="model.safetensors", size=None)]
    info = lambda *_, **__: types.SimpleNamespace(siblings=files)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ArtifactError, match="cannot fetch org/name .* CAS service error; try"):
        hub.resolve("org/name")
