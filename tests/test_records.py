"""Rows of JSON Lines: all shapes, hostile files, and datasets of the hub with a mocked client."""

import datetime
import decimal
import gzip
import hashlib
import json
import re
import tracemalloc
import types

import httpx2
import pyarrow.parquet
import pytest
from huggingface_hub import errors
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers import records
from trainers.records import KINDS, MAX_LINE_BYTES, read_records
from utils.errors import ConfigError, DataError

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
GOOD = [
    {"messages": [USER, ANSWER]},
    {"prompt": "2 + 2 =", "completion": " 4", "level": 1},
    {"prompt": [USER], "completion": [ANSWER], "tags": ["a", None]},
    {"text": "Once upon a time é 漢\u2028字"},
]
LINES = [json.dumps(row, ensure_ascii=n % 2 == 0).encode() for n, row in enumerate(GOOD)]


@pytest.fixture
def write(tmp_path):
    def write(data, name="data.jsonl"):
        path = tmp_path / name
        path.write_bytes(b"\n".join(data) if isinstance(data, list) else data)
        return path

    return write


def test_all_shapes_plain_and_zipped(write):
    data = b"\r\n".join(LINES)  # no end of line after the last row
    plain = read_records(write(data))
    assert [row.fields for row in plain.rows] == GOOD
    assert [row.kind for row in plain.rows] == ["messages", "completion", "completion", "text"]
    assert [row.where.rsplit(":")[-1] for row in plain.rows] == ["1", "2", "3", "4"]
    assert (plain.read, plain.bad.count) == (4, 0)
    assert plain.digest == hashlib.sha256(data).hexdigest()
    members = gzip.compress(data[:100]) + gzip.compress(data[100:])
    for name, zipped in (("d.jsonl.gz", gzip.compress(data)), ("d.jsonl", members)):
        read = read_records(write(zipped, name))
        assert [r.fields for r in read.rows] == GOOD and read.digest == plain.digest


def test_kinds_and_columns(write):
    row = {"prompt": "What is 2 + 2?", "answer": 4, "completion": "4"}
    path = write([json.dumps(row).encode()])
    (record,) = read_records(path, kinds=("prompt",)).rows
    assert (record.kind, record.fields) == ("prompt", row)
    (record,) = read_records(path).rows
    assert record.kind == "completion"
    path = write([json.dumps({"prompt": [ANSWER]}).encode()])
    with pytest.raises(DataError, match=":1: message 0 is the assistant's and the last"):
        read_records(path, kinds=("prompt",))
    nulls = {"text": None, "messages": [USER, ANSWER], "prompt": "a column", "completion": None}
    (record,) = read_records(write([json.dumps(nulls).encode()])).rows
    assert record.kind == "messages"
    assert set(KINDS) == {*records.SUPERVISED, "prompt", "preference", "example"}


BAD = {
    "no JSON": (b'{"text": "a"', "is not valid JSON"),
    "trailing comma": (b'{"text": "a",}', "is not valid JSON"),
    "two objects": (b'{"text": "a"} {"text": "b"}', "is not valid JSON: Extra data"),
    "blank": (b"", "a blank line"),
    "white": (b" \t\r", "a blank line"),
    "mark": (b'\xef\xbb\xbf{"text": "a"}', "byte order mark"),
    "array": (b'[{"text": "a"}]', "a JSON array"),
    "string": (b'"text"', "expected a JSON object, got str"),
    "null": (b"null", "expected a JSON object, got NoneType"),
    "nan": (b'{"text": "a", "x": NaN}', "NaN is not JSON"),
    "infinity": (b'{"text": "a", "x": -Infinity}', "-Infinity is not JSON"),
    "duplicate": (b'{"text": "a", "text": "b"}', "duplicate key 'text'"),
    "deep duplicate": (b'{"text": "a", "x": [{"y": 1, "y": 1}]}', "duplicate key 'y'"),
    "utf-8": (b'{"text": "\xff"}', "is not UTF-8: bad byte at 10"),
    "utf-16": ('{"text": "a"}'.encode("utf-16"), "is not UTF-8: bad byte at 0"),
    "nul": (b'{"text": "a\x00"}', "is not valid JSON: Invalid control character"),
    "deep": (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "digits": (b'{"text": "a", "x": ' + b"1" * 5000 + b"}", "is not valid JSON"),
    "surrogate": (b'{"text": "a\\ud800"}', "lone surrogate U\\+D800"),
    "surrogate in a message": (
        json.dumps({"messages": [USER, ANSWER | {"content": "\ud800"}]}).encode(),
        "message 1: lone surrogate",
    ),
    "empty": (b"{}", "the row has no fields; expected"),
    "missing": (b'{"prompt": "a", "answer": "b"}', "the row has answer, prompt; expected"),
    "null text": (b'{"text": null}', "the row has no fields"),
    "two shapes": (b'{"text": "a", "messages": []}', "the row has messages, text; expected"),
    "three": (b'{"text": "a", "prompt": "b", "completion": "c"}', "exactly one of"),
    "typed text": (b'{"text": 1}', "got text int, expected a string"),
    "text list": (b'{"text": ["a"]}', "got text list, expected a string"),
    "typed messages": (b'{"messages": "a"}', "got messages str, expected a list"),
    "no messages": (b'{"messages": []}', "got messages list, expected a list of messages"),
    "mixed": (b'{"prompt": "a", "completion": [1]}', "got prompt str, completion list, expected"),
    "typed completion": (b'{"prompt": "a", "completion": false}', "completion bool, expected"),
    "no prompt": (b'{"prompt": [], "completion": [1]}', "at least one message"),
    "message": (b'{"messages": [1]}', "message 0: expected the keys role and content, got 1"),
    "role": (b'{"messages": [{"role": "bot", "content": ""}]}', "message 0: role 'bot'"),
    "extra": (b'{"messages": [{"role": "user", "content": "", "x": 1}]}', "message 0: expected"),
    "content": (b'{"messages": [{"role": "user", "content": null}]}', "message 0: content is None"),
    "system": (
        json.dumps({"prompt": [USER], "completion": [{"role": "system", "content": ""}]}).encode(),
        "message 1: a system message can only",
    ),
}


@pytest.mark.covers("D6")
@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_named(write, case):
    line, message = BAD[case]
    for at in range(3):
        path = write([*LINES[:at], line, *LINES[at:], b""])
        with pytest.raises(DataError, match=re.escape(f"{path}:{at + 1}") + ".*" + message) as e:
            read_records(path)
        assert "\n" not in str(e.value) and len(str(e.value)) < 1000
        assert e.value.exit_code == 4
        skipped = read_records(path, skip_bad=1)
        assert [r.fields for r in skipped.rows] == GOOD
        assert (skipped.read, skipped.bad.count) == (5, 1)
        numbers = [n for n in range(1, 6) if n != at + 1]
        assert [r.where for r in skipped.rows] == [f"{path}:{n}" for n in numbers]


@pytest.mark.covers("D6")
def test_skip_bad_has_a_limit_and_the_error_the_total(write):
    bad = [line for line, _ in BAD.values()]
    path = write([LINES[0], *bad, LINES[1], b"x"])
    total = len(bad) + 1
    assert read_records(path, skip_bad=total).bad.count == total
    match = f"has {total} bad rows, and skip_bad={total - 1}; the first: .*{path.name}:2 is not"
    with pytest.raises(DataError, match=match):
        read_records(path, skip_bad=total - 1)
    for wrong in (-1, True, 1.0, "1", None):
        with pytest.raises(ConfigError, match="skip_bad is"):
            read_records(path, skip_bad=wrong)


@pytest.mark.covers("D6")
def test_endless_line_takes_no_memory(write):
    path = write([LINES[0], b"x" * 100_000_000, LINES[1]])
    tracemalloc.start()
    read = read_records(path, skip_bad=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [r.fields for r in read.rows] == GOOD[:2] and read.bad.count == 1
    assert read.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert peak < 4 * MAX_LINE_BYTES
    with pytest.raises(DataError, match=f"{path.name}:2: the line is longer than {MAX_LINE_BYTES}"):
        read_records(path)


@pytest.mark.covers("D6")
def test_line_of_just_the_longest_length(write, monkeypatch):
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 64)
    fit = lambda size: b'{"text": "' + b"a" * (size - 13) + b'"}\n'
    assert len(read_records(write(fit(64) + fit(20))).rows) == 2
    for size in (65, 66, 128, 129, 200):
        path = write(fit(64) + fit(size) + fit(20))
        with pytest.raises(DataError, match=":2: the line is longer"):
            read_records(path)
        assert len(read_records(path, skip_bad=1).rows) == 2
        assert (
            read_records(path, skip_bad=1).digest == hashlib.sha256(path.read_bytes()).hexdigest()
        )


@pytest.mark.covers("D6")
def test_gzip_cut_or_flipped_anywhere(write):
    lines = [json.dumps({"text": hashlib.sha256(bytes([n])).hexdigest()}) for n in range(9)]
    whole = gzip.compress("\n".join(lines).encode() + b"\n", mtime=0)
    intact = read_records(write(whole, "d.jsonl.gz"))
    for n in range(1, len(whole)):
        with pytest.raises(DataError, match=r"d\.jsonl\.gz:\d+"):
            read_records(write(whole[:n], "d.jsonl.gz"), skip_bad=5)
    for n in range(len(whole)):
        flipped = whole[:n] + bytes([whole[n] ^ 0x10]) + whole[n + 1 :]
        try:  # a few bits of the header mean nothing
            read = read_records(write(flipped, "d.jsonl.gz"))
            assert read.digest == intact.digest and n < 10
        except DataError as e:
            assert re.search(r"d\.jsonl\.gz:\d+", str(e))
    with pytest.raises(DataError, match=":10: broken gzip"):
        read_records(write(whole + b"trailing", "d.jsonl.gz"))


@pytest.mark.covers("D6")
def test_gzip_bomb(write, monkeypatch):
    line = write(gzip.compress(b" " * 40_000_000), "bomb.jsonl.gz")
    with pytest.raises(DataError, match=r"bomb\.jsonl\.gz:1: \d+ bytes of gzip give over 16777216"):
        read_records(line, skip_bad=1)
    monkeypatch.setattr(records, "_ANY_GZIP_MAY_GIVE", 1 << 16)
    rows = write(gzip.compress(b'{"text": "a"}\n' * 100_000), "bomb.jsonl.gz")
    assert rows.stat().st_size * 200 < 14 * 100_000
    with pytest.raises(DataError, match=r"bomb\.jsonl\.gz:\d+: \d+ bytes of gzip give over \d+;"):
        read_records(rows)


@pytest.mark.covers("D6")
@settings(max_examples=400, deadline=None, derandomize=True)
@given(data=st.data())
def test_mutated_files_give_rows_or_one_typed_error(tmp_path_factory, data):
    raw = bytearray(b"\n".join(LINES[:2] + LINES[3:] + [LINES[0]]) + b"\n")
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        cut = data.draw(st.integers(0, 3))
        pieces = [b"", b"\n", b'"', b"{", b"}", b"[", b",", b":", b"\\", b"\xff", b"\xed\xa0\x80"]
        pieces += [b"\\ud800", b"NaN", b"null", b"1e999", b"\xef\xbb\xbf", b"\x00", b"\r", b"text"]
        raw[at : at + cut] = data.draw(st.sampled_from(pieces) | st.binary(max_size=3))
    path = tmp_path_factory.getbasetemp() / "mutated.jsonl"
    path.write_bytes(raw)
    lines = raw.count(b"\n") + (not raw.endswith(b"\n"))
    everything = read_records(path, skip_bad=1000)
    assert everything.read == lines == len(everything.rows) + everything.bad.count
    for row in everything.rows:
        number = int(row.where.rpartition(":")[2])
        assert json.loads(raw.split(b"\n")[number - 1]) == row.fields
    try:
        assert read_records(path).rows == everything.rows and not everything.bad.count
    except DataError as e:
        good = {row.where for row in everything.rows}
        first = next(n for n in range(1, lines + 1) if f"{path}:{n}" not in good)
        assert re.match(re.escape(f"{path}:{first}") + r"[: ]", str(e)) and "\n" not in str(e)


@pytest.mark.covers("D6")
def test_what_is_no_file(tmp_path, write):
    with pytest.raises(DataError, match="is a directory"):
        read_records(tmp_path)
    for missing in (str(tmp_path / "none.jsonl"), "data/train.jsonl", "train.jsonl", "a/b/c", ""):
        with pytest.raises(DataError, match="cannot read|directory"):
            read_records(missing)
    assert read_records(write(b"")).rows == []


def test_digest_is_of_content_and_order(write):
    digests = {read_records(write(d)).digest for d in (LINES, LINES[::-1], LINES[:3])}
    assert len(digests) == 3


# The hub ----------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of one dataset: `hub.files` are its names, `hub.fail` is what it raises."""

    class Hub:
        files, fail, asked = [], None, []

        def dataset_info(self, repo, *, revision, timeout):
            self.revisions.add(revision)
            files = [types.SimpleNamespace(rfilename=name) for name in self.files]
            return self.answer(repo, types.SimpleNamespace(siblings=files))

        def download(self, repo, *, repo_type, revision, allow_patterns, tqdm_class, **options):
            self.revisions.add(revision)
            assert options == ({"local_files_only": True} if self.fail else {})
            assert repo_type == "dataset" and tqdm_class(total=3).disable
            folder = tmp_path / "snapshots" / "c0ffee"
            for name in allow_patterns:
                self.asked.append(name)
                data = json.dumps({"text": name}).encode()
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
            return self.answer(repo, str(folder))

        def answer(self, repo, what):
            assert repo == "org/set"
            if self.fail:
                raise self.fail
            return what

    hub = Hub()
    hub.asked, hub.revisions = [], set()
    monkeypatch.setattr(records, "HfApi", lambda: hub)
    monkeypatch.setattr(records, "snapshot_download", hub.download)
    return hub


@pytest.mark.parametrize(
    "files, taken",
    [
        (["README.md", "all.jsonl", "dataset_infos.json"], ["all.jsonl"]),
        (["data/train-1.json", "data/train-0.jsonl.gz", "data/test.jsonl", "dataset_infos.json"],)
        + (["data/train-0.jsonl.gz", "data/train-1.json"],),
        (["train.parquet", "train.jsonl"], ["train.jsonl"]),
        (["main/train/a.jsonl", "main/test/a.jsonl", "training.jsonl"], ["main/train/a.jsonl"]),
    ],
)
def test_hub_files_of_the_train_split(hub, files, taken):
    hub.files = files
    read = read_records("org/set")
    assert [row.fields["text"] for row in read.rows] == hub.asked == taken
    assert [row.where for row in read.rows] == [f"hf://datasets/org/set/{n}:1" for n in taken]


def test_hub_file_by_name(hub):
    hub.files = ["data/x.jsonl"]
    with pytest.raises(DataError, match="the dataset org/set has no file 'x.jsonl'; see"):
        read_records("hf://datasets/org/set/x.jsonl")
    read = read_records("hf://datasets/org/set/data/x.jsonl")
    assert hub.asked == ["data/x.jsonl"]
    assert read.rows[0].where == "hf://datasets/org/set/data/x.jsonl:1"


@pytest.mark.covers("R46")
@pytest.mark.parametrize(
    "path, revision",
    [
        ("org/set@v1.0", "v1.0"),
        ("org/set@refs/pr/1", "refs/pr/1"),
        ("org/set@feature/x.y", "feature/x.y"),
        ("hf://datasets/org/set@v1.0/data/train.jsonl", "v1.0"),
        ("hf://datasets/org/set@refs/pr/1/data/train.jsonl", "refs/pr/1"),
        ("hf://datasets/org/set@refs/convert/parquet", "refs/convert/parquet"),
        ("hf://datasets/org/set@feature%2Fx/data/train.jsonl", "feature/x"),
    ],
)
def test_hub_revision(hub, path, revision):
    hub.files = ["data/train.jsonl"]
    read = read_records(path)
    assert hub.revisions == {revision} and read.commit == "c0ffee"
    assert read.rows[0].where == f"hf://datasets/org/set@{revision}/data/train.jsonl:1"


# Parquet ----------------------------------------------------------------------------------------

CHAT = [dict(role="user", content="né"), dict(role="assistant", content="b")]
TABLES = {
    "messages": [dict(messages=CHAT * n, source="x", score=n / 2) for n in (1, 2, 3)],
    "completion": [dict(prompt="a", completion="b"), dict(prompt="日本", completion="\n")],
    "chats": [dict(prompt=CHAT[:1], completion=CHAT[1:])],
    "text": [dict(text=str(n), n=n, flag=True, tags=["a", None]) for n in range(600)],
}


@pytest.mark.covers("R45")
@pytest.mark.parametrize("name", TABLES)
def test_rows_of_parquet_are_those_of_json_lines(write, tmp_path, name):
    table, rows = tmp_path / f"{name}.parquet", TABLES[name]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table, row_group_size=100)
    lines = write([json.dumps(row).encode() for row in rows], f"{name}.jsonl")
    ours, theirs = read_records(table), read_records(lines)
    assert [r.fields for r in ours.rows] == [r.fields for r in theirs.rows]
    assert [r.kind for r in ours.rows] == [r.kind for r in theirs.rows]
    assert ours.read == len(rows) and ours.rows[-1].where == f"{table}:{len(rows)}"
    again = tmp_path / "again"  # told by its content, not by its name
    again.write_bytes(table.read_bytes())
    assert read_records(again).digest == ours.digest != theirs.digest


@pytest.mark.covers("R45")
def test_columns_that_json_has_no_type_for_are_text(tmp_path):
    day = datetime.datetime(2024, 7, 26, 12)
    row = dict(prompt="a", day=day, price=decimal.Decimal("1.50"), raw=b"ab", none=None)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    (read,) = read_records(tmp_path / "a.parquet", kinds=("prompt",)).rows
    known = dict(day="2024-07-26T12:00:00", price="1.50", raw="ab", none=None)
    assert read.fields == dict(prompt="a") | known


@pytest.mark.covers("R45")
def test_bad_parquet(tmp_path):
    table = pyarrow.Table.from_pylist([dict(text="a"), dict(text=None), dict(text="c")])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet:2: the row has no fields"):
        read_records(tmp_path / "a.parquet")
    assert len(read_records(tmp_path / "a.parquet", skip_bad=1).rows) == 2
    whole = (tmp_path / "a.parquet").read_bytes()
    for n in range(4, len(whole), 7):
        (tmp_path / "cut.parquet").write_bytes(whole[:n])
        with pytest.raises(DataError, match="cut.parquet:1: broken Parquet"):
            read_records(tmp_path / "cut.parquet")
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([dict(text=b"\xff")]), tmp_path / "b.parquet"
    )
    with pytest.raises(DataError, match="b.parquet:1: .*can't decode byte 0xff"):
        read_records(tmp_path / "b.parquet")


def test_hub_without_usable_files(hub):
    hub.files = ["a.jsonl", "b.jsonl"]
    with pytest.raises(
        DataError, match="2 .jsonl or .parquet files .* name one: hf://datasets/org/set/a.jsonl"
    ):
        read_records("org/set")
    hub.files = ["data/train-00000.csv"]
    with pytest.raises(DataError, match="0 .jsonl or .parquet files .* export it to .jsonl or"):
        read_records("org/set")


def response(status):
    return httpx2.Response(status, request=httpx2.Request("GET", "https://huggingface.co"))


@pytest.mark.parametrize(
    "failure, message",
    [
        (errors.GatedRepoError("x", response=response(403)), "is gated: accept its terms on "),
        (errors.RepositoryNotFoundError("x", response=response(401)), "nor a public dataset"),
        (errors.HFValidationError("x"), "nor a public dataset"),
        (
            errors.LocalEntryNotFoundError("no connection\nmore"),
            "cannot fetch .* no connection; try",
        ),
        (errors.HfHubHTTPError("500 Server", response=response(500)), "cannot fetch .*500 Server;"),
        (OSError("disk full"), "cannot fetch the dataset org/set from Hugging Face: disk full;"),
        (RuntimeError("CAS service"), "cannot fetch .* CAS service"),
    ],
)
def test_hub_failures_are_one_line_of_the_typed_family(hub, failure, message):
    hub.fail = failure
    with pytest.raises(DataError, match=message) as e:
        read_records("hf://datasets/org/set/x.jsonl")
    assert "\n" not in str(e.value)


def test_a_local_file_comes_before_the_hub(hub, tmp_path, monkeypatch):
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "set").write_bytes(LINES[0])
    monkeypatch.chdir(tmp_path)
    assert read_records("org/set").rows[0].kind == "messages" and not hub.asked
