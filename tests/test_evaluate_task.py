"""`evaluate.py task` as a program: its flags, its table, its JSON, its errors, and a real model."""

import json
import math
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest

from tests import cli
from tests.programs import check_error, flags
from trainers.rewards.accuracy import mean_interval, pass_at_k

SUM = "reasoning_gym:chain_sum"
ONE_DIGIT = '{"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}'

# A module of rewards as a user writes one.
MODULE = '''
import os


def vowels(prompts, completions, completion_ids, answer, **_):
    """Some rows cannot be scored; the answer of the second prompt ends the process."""
    if "die" in answer:
        os._exit(3)
    return [None if "a" in text else float("e" in text) for text in completions]


def infinite(completions, **_):
    return [float("inf")] * len(completions)
'''


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with prompts and with the module `mine`."""
    folder = tmp_path_factory.mktemp("files")
    rows = [{"prompt": "one", "answer": "1"}, {"prompt": "two", "answer": "die"}]
    rows += [{"prompt": "three", "answer": "3"}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.py").write_text(MODULE)
    return folder


def options(**more: object) -> dict[str, object]:
    """Of a small evaluation."""
    known = dict(ckpt_dir=cli.checkpoint(), samples=3, max_completion_len=12, batch_size=2)
    return known | more


def gym(**more: object) -> dict[str, object]:
    return options(task=SUM, task_args=ONE_DIGIT, size=5) | more


def own(files: Path, **more: object) -> dict[str, object]:
    """With a reward of the user's own; `patch` puts its folder on the path, as PYTHONPATH does."""
    patch = f"import sys\nsys.path.insert(0, {str(files)!r})\n"
    return options(data=files / "prompts.jsonl", reward="mine:vowels", patch=patch) | more


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_the_numbers_are_those_of_the_completions_in_the_file(programs, tmp_path):
    out = tmp_path / "completions.jsonl"
    done = programs.run("evaluate.py", "task", **gym(json=True, out=out, k="1,2,3"))
    assert (done.code, done.stderr) == (0, "")
    found, rows = json.loads(done.stdout), lines(out)
    assert (found["task"], found["prompts"], found["samples"], len(rows)) == (SUM, 5, 3, 15)
    assert found["seed"] == 1 and found["failures"] == []
    assert found["mean_length"] == np.mean([len(row["ids"]) for row in rows])
    for name in ("strict", "lenient"):
        scores = np.asarray([row["scores"][name] for row in rows]).reshape(5, 3)
        measures = found["rewards"][name]
        assert measures["mean"]["value"] == pytest.approx(scores.mean())
        low, high = mean_interval(scores.mean(axis=1))
        assert [measures["mean"][n] for n in ("low", "high")] == pytest.approx([low, high])
        for k in (1, 2, 3):
            rates = [pass_at_k(3, int((group == 1).sum()), k) for group in scores]
            assert measures[f"pass@{k}"]["value"] == pytest.approx(np.mean(rates))
    assert all(re.match("State the final answer .* [0-9] [+-] [0-9] =$", r["prompt"]) for r in rows)
    # The same again, a seed later others.
    again = tmp_path / "again.jsonl"
    programs.run("evaluate.py", "task", **gym(json=True, out=again, batch_size=3))
    assert lines(again) == rows


def test_the_table_shows_each_reward_with_intervals(programs):
    done = programs.run("evaluate.py", "task", **gym(samples=None))
    assert (done.code, done.stderr) == (0, "")
    cell = r"\s+\d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\] "
    for name in ("strict", "lenient"):
        assert re.search(f"│ {name} +│{cell}│{cell}│{cell}│ +0 │", done.stdout), done.stdout
    assert re.search(r"reward +┃ +mean ┃ +pass@1 ┃ +pass@8 ┃ unscorable", done.stdout)
    assert re.search(f"│ weighted sum │{cell}│ +│ +│ +0 │", done.stdout)
    assert f"{SUM}: 5 prompts, 95 % intervals" in done.stdout
    said = r"\n8 completions per prompt at temperature 1, [\d.]+ tokens on average, [\d.]+% truncated; "
    assert re.search(said + r"\d+ tok/s\n$", done.stdout)


@pytest.mark.slow
def test_greedy_takes_one_sample(programs, files):
    asked = own(files, reward="number", samples=None, temperature=0, json=True)
    done = programs.run("evaluate.py", "task", **asked)
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["samples"], found["temperature"]) == (1, 0)
    assert list(found["rewards"]["number"]) == ["mean", "pass@1", "unscorable"]


def test_ones_own_data_and_rewards_and_what_cannot_be_scored(programs, files, tmp_path):
    out = tmp_path / "out.jsonl"
    reward = "mine:vowels=0.5, exact_match"
    done = programs.run("evaluate.py", "task", **own(files, reward=reward, json=True, out=out))
    assert done.code == 0, done.stderr
    found, rows = json.loads(done.stdout), lines(out)
    assert [row["prompt"] for row in rows] == ["one"] * 3 + ["two"] * 3 + ["three"] * 3
    # The second prompt takes the process along, and only itself.
    for row in rows:
        unscorable = row["prompt"] == "two" or "a" in row["completion"]
        expected = None if unscorable else float("e" in row["completion"])
        assert row["scores"] == {"mine.vowels": expected, "exact_match": 0.0}
    lost = sum(row["scores"]["mine.vowels"] is None for row in rows)
    assert found["rewards"]["mine.vowels"]["unscorable"] == lost >= 3
    assert found["rewards"]["exact_match"]["mean"]["prompts"] == 3
    assert found["total"]["mean"]["prompts"] == 2 and found["total"]["unscorable"] == 3
    (failure,) = found["failures"]
    assert "'mine.vowels' on prompt 1 ('two')" in failure
    assert done.stderr == f"warning: {failure}; 3 of 6 completions unscorable\n"


@pytest.mark.slow
@pytest.mark.covers("N1")
def test_many_failures_of_a_kind_are_counted(programs, files, tmp_path):
    data = tmp_path / "bad.jsonl"
    data.write_text('{"prompt": "?", "answer": "die"}\n' * 7)
    done = programs.run("evaluate.py", "task", **own(files, data=data, samples=1, batch_size=7))
    assert done.code == 0 and "│ mine.vowels │ – │ " in re.sub(" +", " ", done.stdout)
    first = "warning: reward 'mine.vowels' on prompt 0 ('?'): its process ended (exit code 3)"
    assert done.stderr == f"{first}; 7 of 7 completions unscorable\n"


@pytest.mark.covers("A34", "C4", "C9")
def test_what_is_wrong_is_one_line(programs, files, tmp_path):
    data = files / "prompts.jsonl"
    nothing = dict(task=None, task_args=None)
    (tmp_path / "file").write_text("")
    for more, code, pattern in (
        (nothing, 2, "pass either --task or --data"),
        (dict(data=data, reward="number"), 2, "pass either --task or --data"),
        (dict(reward="number"), 2, "a --task brings its own rewards"),
        (nothing | dict(data=data), 2, "--data needs --reward"),
        (nothing | dict(data=data, reward="numbers"), 2, "'numbers': expected module:function"),
        (
            nothing | dict(data=data, reward="number", task_args="{}"),
            2,
            "--task_args needs a --task",
        ),
        (
            nothing | dict(data=data, reward="number", max_completion_len=250),
            2,
            "exceed the model's",
        ),
        (nothing | dict(data=tmp_path / "none", reward="number"), 4, "none"),
        (nothing | dict(data=tmp_path / "file", reward="number"), 4, "has no prompts"),
        (dict(task="reasoning_gym:chain_sums"), 2, "did you mean chain_sum"),
        (dict(task_args="{min_terms: 2}"), 2, "--task_args"),
        (dict(task_args='{"terms": 2}'), 2, "chain_sum has no argument .terms.; it has min_terms"),
        (dict(size=0), 2, "--size must be an integer from 1 to 1048576, got 0"),
        (
            dict(seed=-1, samples=0, batch_size=0, temperature="hot", dtype="int8"),
            2,
            "--samples .*--temperature .*'hot'; --batch_size .*--seed .*got -1; --dtype .*int8",
        ),
        (dict(k="1,x"), 2, "--k: '1,x', expected integers"),
        (dict(k=4), 2, "--k=4, expected 1 to samples .3."),
        (dict(temperature=0), 2, "--samples=3 at temperature 0"),
        (dict(chat=False, system="Be brief."), 2, "chat is off"),
        (dict(chat_format="alpaca"), 2, "alpaca"),
        (dict(reward_timeout=0), 2, "--reward_timeout must be a number above 0, got 0"),
        (dict(out=tmp_path / "none" / "out.jsonl"), 2, "--out .*none.out.jsonl: cannot write"),
        (dict(ckpt_dir=tmp_path / "none"), 3, "none"),
        (dict(tokenizer_path=tmp_path / "none"), 3, "none"),
    ):
        done = programs.run("evaluate.py", "task", **gym(**more))
        check_error(done, code, pattern)
        assert done.stdout == "", more


@pytest.mark.covers("D12")
def test_rewards_that_are_none_stop_the_evaluation(programs, files):
    done = programs.run("evaluate.py", "task", **own(files, reward="mine:infinite"))
    check_error(done, 5, "'mine.infinite', row 0: .*inf")
    done = programs.run("evaluate.py", "task", **own(files, reward="mine:nothing"))
    check_error(done, 2, "mine has no nothing")


def test_a_reward_that_cannot_take_the_columns_is_said_before_anything_is_sampled(programs, files):
    sampled = (
        "import trainers.rewards.accuracy as a, os\nat(a, 'generate', 1, lambda: os._exit(9))\n"
    )
    asked = own(files, reward="number")
    data = files / "unanswered.jsonl"
    data.write_text('{"prompt": "?"}\n')
    asked |= dict(data=data, patch=asked["patch"] + sampled)
    done = programs.run("evaluate.py", "task", **asked)
    check_error(done, 2, "'number' is called with prompts, completions, completion_ids: .*answer")


@pytest.mark.covers("C12")
def test_the_disk_is_full(programs, files):
    done = programs.run("evaluate.py", "task", **own(files), stdout="/dev/full")
    check_error(done, 1, "No space left")


@pytest.mark.covers("C11")
def test_ctrl_c_ends_it_at_once_with_the_processes_of_its_rewards(programs, files, tmp_path):
    out = tmp_path / "out.jsonl"
    pids = tmp_path / "pids"
    (files / "slow.py").write_text(
        "import os, time\n"
        "def slow(completions, **_):\n"
        f"    open({str(pids)!r}, 'w').write(str(os.getpid()))\n"
        "    time.sleep(100)\n"
    )
    asked = own(files, reward="slow:slow", out=out)
    asked["patch"] += (
        "import os, signal, threading, time\n"
        f"def stop():\n    while not os.path.exists({str(pids)!r}): time.sleep(0.05)\n"
        "    time.sleep(0.5)\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "threading.Thread(target=stop, daemon=True).start()\n"
    )
    done = programs.run("evaluate.py", "task", **asked)
    assert (done.code, done.stdout, done.stderr) == (130, "", "")
    assert list(tmp_path.iterdir()) == [pids]
    ends_soon(int(pids.read_text()))


def ends_soon(pid: int) -> None:
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        signal.sigtimedwait([], 0.05)
    pytest.fail(f"process {pid} lives on")


@pytest.mark.slow
def test_the_default_model_adds_up_now_and_then(default_model_path, tmp_path):
    cli.share_default_model(default_model_path)
    out = tmp_path / "out.jsonl"
    asked = dict(task=SUM, task_args=ONE_DIGIT, size=32, samples=4, k="1,4", json=True)
    done = cli.run(
        "evaluate.py",
        "task",
        *flags(asked | dict(out=out, batch_size=32)),
        timeout=900,
        env=cli.environment(optimized=True),
    )
    assert done.returncode == 0, done.stderr
    found, rows = json.loads(done.stdout), lines(out)
    measures = found["rewards"]["lenient"]
    # Measured on 256 samples: 18 % right, and 47 % with four tries.
    assert 0.08 < measures["pass@1"]["value"] < 0.25 and 0.3 < measures["pass@4"]["value"] < 0.65
    assert measures["pass@4"]["low"] > measures["pass@1"]["high"]
    # An oracle of its own for what is right: the last number in the text.
    right = 0
    for row in rows:
        left, sign, term = re.search(r"(\d+) ([+-]) (\d+) =$", row["prompt"]).groups()
        numbers = re.findall(r"(?:(?<!\w)-)?\d+(?:\.\d+)?", row["completion"].replace(",", ""))
        expected = int(left) + int(term) * (1 if sign == "+" else -1)
        right += bool(numbers) and math.isclose(float(numbers[-1]), expected)
    assert abs(right / len(rows) - measures["pass@1"]["value"]) < 0.03
