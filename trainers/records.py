"""Rows of JSON Lines or Parquet, from a file or from a dataset on Hugging Face; they may be broken or hostile."""

import glob
import gzip
import hashlib
import io
import json
import os
import re
import urllib.parse
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, errors, snapshot_download
from huggingface_hub.utils import tqdm

from models.llama.chat.messages import read_messages, read_tools, strings
from models.llama.hub import HUB_ID, REPOSITORY, TIMEOUT, commit_of, hub_errors
from models.llama.tokenizer import check_text
from utils.errors import ConfigError, DataError, is_int
from utils.files import InputFile, parse_json

MAX_LINE_BYTES = 16 << 20
# Text is compressed by less than 50; 10 MB of gzip can stand for 10 GB of tiny rows.
_MAX_GZIP_RATIO = 200
_ANY_GZIP_MAY_GIVE = 16 << 20

# The fields by which a row is recognised; its other fields are columns, for rewards.
KINDS = {
    "messages": ("messages",),
    "completion": ("prompt", "completion"),
    "text": ("text",),
    "prompt": ("prompt",),
    "preference": ("chosen", "rejected"),
    "example": (),  # of an environment, which says itself what it needs
}
SUPERVISED = ("messages", "completion", "text")

# Rows of other programs, by their fields, and what makes messages of them.
_FOREIGN = {
    ("conversations",): '{messages: [.conversations[] | {role: ({human: "user", gpt: "assistant"}'
    "[.from] // .from), content: .value}]}",
    ("instruction", "output"): '{messages: [{role: "user", content: ([.instruction, .input // ""] '
    '| map(select(. != "")) | join("\\n\\n"))}, {role: "assistant", content: .output}]}',
}

_DATA_FILE = re.compile(r".*\.((jsonl|json)(\.gz)?|parquet)", re.IGNORECASE)
# (repository, revision, file): a slash ends a revision, but for the hub's own references.
_HUB_FILE = re.compile(
    rf"hf://datasets/{REPOSITORY}(?:@(refs/(?:pr/\d+|convert/\w+)|[^/]+))?(?:/(.+))?"
)


class Record(NamedTuple):
    """One row.

    Attributes:
        where: `file:line`, for messages.
        kind: one of KINDS.
        fields: the JSON object, checked as its kind demands.
    """

    where: str
    kind: str
    fields: dict[str, Any]


class BadRows:
    """Counts bad rows. Up to `allowed` of them are skipped; with 0 the first one is raised."""

    def __init__(self, allowed: int):
        if not is_int(allowed) or allowed < 0:
            raise ConfigError(f"skip_bad is {allowed!r:.40}, expected a number of rows, 0 or more")
        self.allowed = allowed
        self.count = 0
        self._first: DataError | None = None

    def add(self, error: DataError) -> None:
        """Counts a row, or raises its error if none is to be skipped."""
        if not self.allowed:
            raise error
        self.count += 1
        self._first = self._first or error

    def check(self, path: str | os.PathLike) -> None:
        """Raises DataError, with the number of all bad rows, if there are too many."""
        if self.count > self.allowed:
            raise DataError(
                f"{path} has {self.count} bad rows, and skip_bad={self.allowed}; the first: "
                f"{self._first}"
            )


@dataclass(frozen=True, kw_only=True)
class Records:
    """The rows of a dataset, in order.

    Attributes:
        path: what the user named.
        rows: the good rows.
        read: lines read, good or bad.
        bad: the count of bad ones.
        digest: sha256 of the files' bytes, uncompressed, in order.
        commit: of a dataset on the hub, else None.
    """

    path: str
    rows: list[Record]
    read: int
    bad: BadRows
    digest: str
    commit: str | None

    @property
    def ignored(self) -> list[str]:
        """Names of the columns that their rows' kinds do not have, which only rewards would read."""
        read = {kind: {*names, "tools"} for kind, names in KINDS.items()}
        read["preference"].add("prompt")
        columns = [(row, *column) for row in self.rows for column in row.fields.items()]
        unread = {k for row, k, v in columns if v is not None and k not in read[row.kind]}
        return sorted(unread)


def read_records(
    path: str | os.PathLike, *, kinds: Sequence[str] = SUPERVISED, skip_bad: int = 0
) -> Records:
    """Reads the rows of a dataset.

    A row is one line with a JSON object: `{"messages": [...]}`, `{"prompt", "completion"}` (both
    strings or both lists of messages) or `{"text"}`; rows of several kinds may be mixed. A pair is
    `{"prompt", "chosen", "rejected"}`, see `_check_pair`. An environment's example is any
    object. A field that is null counts as absent.

    Args:
        path: a `.jsonl` file, also gzipped, or a `.parquet` file; `hf://datasets/OWNER/NAME/FILE`;
            or `OWNER/NAME` on Hugging Face, for the files of its split "train". `OWNER/NAME@REVISION`
            is a branch, tag or commit; before a FILE, `%2F` stands for a slash in its name.
        kinds: of KINDS, those that are expected. A row is of exactly one of them.
        skip_bad: so many bad rows are left out and counted. A broken file is always an error.

    Raises:
        DataError: with `file:line`, for a bad row or a broken file; with the count of all, for
            more than `skip_bad` bad rows; or the dataset cannot be had.
    """
    bad, rows, digest, read = BadRows(skip_bad), [], hashlib.sha256(), 0
    found = _find(os.fspath(path))
    for name, file in found:
        opened = InputFile(file, DataError)
        is_table = bytes(opened.read(0, min(opened.size, 4))) == b"PAR1"
        for number, line in (_table_rows if is_table else _lines)(opened, name, digest):
            read += 1
            try:
                rows.append(_record(line, f"{name}:{number}", kinds))
            except DataError as e:
                bad.add(e)
    bad.check(path)
    end = dict(digest=digest.hexdigest(), commit=commit_of(found[0][1].absolute()))
    return Records(path=str(path), rows=rows, read=read, bad=bad, **end)


# Lines ------------------------------------------------------------------------------------------


class _Raw(io.RawIOBase):
    """An InputFile as a stream."""

    def __init__(self, file: InputFile):
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n = min(len(buffer), self._file.size - self._at)
        self._file.read_into(self._at, memoryview(buffer)[:n])
        self._at += n
        return n


def _lines(file: InputFile, name: str, digest: Any) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line), each cut after MAX_LINE_BYTES + 1; all bytes go into `digest`."""
    zipped = name.lower().endswith(".gz")
    zipped = zipped or bytes(file.read(0, min(file.size, 2))) == b"\x1f\x8b"
    stream: Any = io.BufferedReader(_Raw(file), 1 << 20)
    limit = file.size
    if zipped:
        stream, limit = gzip.GzipFile(fileobj=stream), file.size * _MAX_GZIP_RATIO
        limit = max(limit, _ANY_GZIP_MAY_GIVE)
    number = done = 0
    try:
        while part := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            line = part
            while True:
                digest.update(part)
                done += len(part)
                if done > limit:
                    raise DataError(
                        f"{name}:{number}: {file.size} bytes of gzip give over {limit}; unpack it "
                        "first if that is right"
                    )
                if part.endswith(b"\n") or not (part := stream.readline(1 << 20)):
                    break
            yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise DataError(f"{name}:{number + 1}: broken gzip: {e!s:.200}; fetch it again") from e


def _table_rows(file: InputFile, name: str, digest: Any) -> Iterator[tuple[int, bytes]]:
    """(number from 1, row as a line of JSON) of a Parquet file; its bytes go into `digest`."""
    import pyarrow.parquet  # here: it takes 0.2 s that JSON Lines need not pay

    for offset in range(0, file.size, 1 << 20):
        digest.update(file.read(offset, min(1 << 20, file.size - offset)))
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            for batch in table.iter_batches(batch_size=256, use_threads=False):
                for row in batch.to_pylist():
                    line = json.dumps(row, default=_as_json, ensure_ascii=False).encode()
                    number += 1
                    yield number, line
    except (pyarrow.ArrowException, OSError, UnicodeError) as e:
        reason = " ".join(str(e).split())
        raise DataError(
            f"{name}:{number + 1}: broken Parquet: {reason:.200}; fetch it again"
        ) from e


def _as_json(value: Any) -> str:
    """Text of what a table holds beside JSON's types: bytes that are text, dates, decimals."""
    if isinstance(value, bytes):
        return value.decode()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _record(line: bytes, where: str, kinds: Sequence[str]) -> Record:
    if len(line) > MAX_LINE_BYTES:
        raise DataError(f"{where}: the line is longer than {MAX_LINE_BYTES} bytes")
    if line.startswith(b"\xef\xbb\xbf"):
        raise DataError(f"{where}: starts with a byte order mark; save the file as plain UTF-8")
    if not line.strip():
        raise DataError(f"{where}: a blank line, expected a JSON object")
    if line.lstrip().startswith(b"["):
        raise DataError(
            f"{where}: a JSON array, expected an object a line; convert it with `jq -c '.[]'`"
        )
    fields = parse_json(line, where, DataError)
    present = {key for key, value in fields.items() if value is not None}
    found = [kind for kind in kinds if present.issuperset(KINDS[kind])]
    if len(found) != 1:
        shapes = " or ".join("{" + ", ".join(KINDS[kind]) + "}" for kind in kinds)
        jq = [jq for names, jq in _FOREIGN.items() if present.issuperset(names) and not found]
        convert = f"; convert the file with `jq -c '{jq[0]}'`" if jq else ""
        raise DataError(
            f"{where}: the row has {', '.join(sorted(present))[:200] or 'no fields'}; expected "
            f"the fields of exactly one of {shapes}{convert}"
        )
    try:
        _check(found[0], fields)
    except DataError as e:
        raise DataError(f"{where}: {e}") from e
    return Record(where, found[0], fields)


def _check(kind: str, fields: dict[str, Any]) -> None:
    """Checks a row's fields, and brings its messages and tools into one shape."""
    if kind == "preference":
        return _check_pair(fields)
    if kind == "example":
        for text in strings(fields):
            check_text(text, "the row")
        return None
    names = KINDS[kind]
    values = [fields[name] for name in names]
    if kind != "messages" and all(isinstance(value, str) for value in values):
        for name, value in zip(names, values):
            check_text(value, name)
        if kind != "prompt" and read_tools(fields.get("tools")):
            raise DataError("tools need messages, and the row is plain text")
    elif kind != "text" and all(isinstance(value, list) and value for value in values):
        messages = read_messages(sum(values, []), add_generation_prompt=kind == "prompt")
        at = len(values[0])
        fields |= {"tools": read_tools(fields.get("tools"))} if "tools" in fields else {}
        fields |= dict(zip(names, (messages[:at], messages[at:])))
    else:
        types = ", ".join(f"{k} {type(v).__name__}" for k, v in zip(names, values))
        wanted = {"messages": "a list of messages", "text": "a string"}
        raise DataError(
            f"got {types}, expected "
            f"{wanted.get(kind, 'strings, or lists of messages with at least one message')}"
        )


def _check_pair(fields: dict[str, Any]) -> None:
    """Checks a pair, and brings it into one shape: a prompt, and what both sides have behind it.

    The prompt of messages may be a field, or the messages at the start of both sides, or both. Of two
    texts without a prompt, it is None.
    """
    asked, sides = fields.get("prompt"), [fields["chosen"], fields["rejected"]]
    if all(isinstance(x, str) for x in ("" if asked is None else asked, *sides)):
        for name in ("prompt", "chosen", "rejected"):
            check_text(fields.get(name) or "", name)
        if read_tools(fields.get("tools")):
            raise DataError("tools need messages, and the row is plain text")
        fields["prompt"] = asked
        return
    if not all(isinstance(side, list) for side in sides) or not isinstance(
        asked, (str, list, type(None))
    ):
        given = [k for k in ("prompt", "chosen", "rejected") if fields.get(k) is not None]
        types = ", ".join(f"{k} {type(fields[k]).__name__}" for k in given)
        raise DataError(f"got {types}, expected strings, or lists of messages")
    asked = asked if isinstance(asked, list) else []
    whole = all(side[: len(asked)] == asked for side in sides)
    chosen, rejected = (read_messages(side if whole else asked + side) for side in sides)
    at = len(asked)
    if whole:
        last = min(len(chosen), len(rejected)) - 1
        at = next((i for i in range(last) if chosen[i] != rejected[i]), last)
    if not at:
        raise DataError(
            "chosen and rejected do not begin with the same message; expected the prompt as the first "
            "messages of both, or as a list of messages in the field prompt"
        )
    read_messages(chosen[:at], add_generation_prompt=True)
    fields |= {"tools": read_tools(fields.get("tools"))} if "tools" in fields else {}
    fields |= {"prompt": chosen[:at], "chosen": chosen[at:], "rejected": rejected[at:]}


# Files ------------------------------------------------------------------------------------------


class _Silent(tqdm):
    """The hub client's progress bar, which would draw on stderr."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options | {"disable": True})


def _find(path: str) -> list[tuple[str, Path]]:
    """(what messages name, file) of a dataset's files, fetched if they are on the hub."""
    local, is_url = os.path.expanduser(path), path.startswith("hf://")
    hub = _HUB_FILE.fullmatch(path) or re.fullmatch(HUB_ID, path)
    if os.path.exists(local) or not hub or (_DATA_FILE.fullmatch(path) and not is_url):
        return [(path, Path(local))]
    return _fetch(*hub.groups())


def _fetch(repo: str, revision: str | None, name: str | None = None) -> list[tuple[str, Path]]:
    what, page = f"the dataset {repo}", f"https://huggingface.co/datasets/{repo}"
    failed = (
        f"cannot fetch {what} from Hugging Face: {{}}; try again with a network, or name a local "
    )
    revision = revision and urllib.parse.unquote(revision)
    root = f"hf://datasets/{repo}@{revision}" if revision else f"hf://datasets/{repo}"
    place = dict(repo_type="dataset", revision=revision, tqdm_class=_Silent)
    with hub_errors(what, page, "file here nor a public dataset", failed + "file", DataError):
        try:
            # One request without a retry: without a network the cache answers at once.
            info = HfApi().dataset_info(repo, revision=revision, timeout=TIMEOUT)
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
            raise
        except (errors.HTTPError, OSError):
            if not name:  # which files there are is known to the hub alone
                raise
            place |= dict(allow_patterns=[glob.escape(name)], local_files_only=True)
            return [(f"{root}/{name}", Path(snapshot_download(repo, **place), name))]
        names = [file.rfilename for file in info.siblings or []]
        if name and name not in names:
            raise DataError(f"{what} has no file {name!r}; see {page}/tree/main")
        names = [name] if name else _train_files(repo, names)
        folder = snapshot_download(repo, allow_patterns=[*map(glob.escape, names)], **place)
    return [(f"{root}/{n}", Path(folder, n)) for n in names]


def _train_files(repo: str, names: Sequence[str]) -> list[str]:
    """The files of the split "train", or the only one; of two formats, JSON Lines."""
    files = sorted(n for n in names if _DATA_FILE.fullmatch(n) and n != "dataset_infos.json")
    files = [n for n in files if not n.lower().endswith(".parquet")] or files
    train = [n for n in files if re.search(r"(^|[/._-])train([/._-])", n, re.IGNORECASE)]
    if train or len(files) == 1:
        return train or files
    hint = (
        f"name one: hf://datasets/{repo}/{files[0]}"
        if files
        else "export it to .jsonl or .parquet first"
    )
    raise DataError(
        f"the dataset {repo} has {len(files)} .jsonl or .parquet files and none is named as of a split "
        f"'train'; {hint}"
    )
