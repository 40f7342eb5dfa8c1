"""Rewards that crash, hang and misbehave, in real processes: what is lost, and what is not."""

import contextlib
import errno
import functools
import json
import os
import queue
import re
import signal
import subprocess
import sys
import time
import types
import warnings
from multiprocessing import connection
from pathlib import Path

import numpy as np
import pytest

from tests import reward_faults
from tests.reward_faults import FAULTS, HARMLESS, OnBad, lengths, whoami
from trainers.rewards import worker
from trainers.rewards.functions import Reward
from trainers.rewards.pool import RewardPool, RewardProcess
from utils.errors import TrainError

ROOT = Path(__file__).parents[1]
# Three prompts of two rows; the one in the middle has the row that hurts.
TEXTS = ["a", "bb", "bad", "dddd", "eeeee", "ffffff"]
GOOD = [float(len(text)) for text in TEXTS]


def pool_of(*functions, timeout=20.0, **options):
    rewards = [Reward(name=f"f{i}", function=f) for i, f in enumerate(functions)]
    return RewardPool(rewards, timeout=timeout, **options)


def ask(pool, texts=TEXTS, group_size=2):
    prompts = [f"question {i // group_size}" for i in range(len(texts))]
    return pool(prompts, list(texts), [[1]] * len(texts), {}, group_size)


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # nobody may be there to fetch an orphan


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def after_faults():
    """(scores, messages by fault, scores of a good batch afterwards), all faults side by side."""
    rewards = [Reward(name=name, function=OnBad(action)) for name, (action, _) in FAULTS.items()]
    with RewardPool(rewards, timeout=3.0) as pool:
        scores = ask(pool)
        messages = list(pool.failures)
        yield scores, messages, ask(pool, ["good"] * 6), list(pool.failures)


@pytest.mark.covers("D11")
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_costs_its_prompt_and_no_other(after_faults, name):
    scores, messages, _, _ = after_faults
    f = list(FAULTS).index(name)
    np.testing.assert_array_equal(scores.failed[f], [False, False, True, True, False, False])
    np.testing.assert_array_equal(scores.values[f], [1, 2, np.nan, np.nan, 5, 6])
    [message] = [m for m in messages if m.startswith(f"reward {name!r} on ")]
    text = f"reward {name!r} on prompt 1 ('question 1'): "
    assert message.startswith(text)
    assert re.fullmatch(FAULTS[name][1], message.removeprefix(text)), message


@pytest.mark.covers("D11")
def test_a_process_that_closes_its_connection_may_end_by_itself():
    code = "import os, time; os.close(0); time.sleep(0.3); os._exit(5)"
    process = RewardProcess("f", lengths, 20.0)
    process.connection, theirs = connection.Pipe()
    with theirs:
        process._process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=theirs.fileno(), start_new_session=True
        )
    connection.wait([process.connection], 10)
    assert process.answer()["failed"] == "its process ended (exit code 5)"


@pytest.mark.covers("D11")
@pytest.mark.parametrize(
    "error, killed", [(EOFError(), 1), (ConnectionResetError(), 1), (OSError(errno.EBADF, ""), 0)]
)
def test_a_worker_ends_with_its_parent_but_not_for_a_closed_descriptor(error, killed, monkeypatch):
    def raise_error():
        raise error

    calls = []
    monkeypatch.setattr(os, "killpg", lambda *args: calls.append(args))
    worker.receive(types.SimpleNamespace(recv_bytes=raise_error), queue.SimpleQueue())
    assert calls == [(os.getpid(), signal.SIGKILL)] * killed


@pytest.mark.covers("D11")
def test_the_pool_recovers(after_faults):
    _, _, scores, messages = after_faults
    assert (scores.values == 4).all() and not scores.failed.any() and messages == []


@pytest.mark.covers("D11")
def test_bad_manners_cost_nothing(capfd):
    with pool_of(*map(OnBad, HARMLESS)) as pool:
        for _ in range(3):  # an answer too many would be taken for the next
            for texts in (TEXTS, TEXTS[::-1]):
                scores = ask(pool, texts)
                assert pool.failures == []
                assert (scores.values == [len(text) for text in texts]).all()
    out, err = capfd.readouterr()
    lines = set(err.splitlines())
    assert out == "" and len(lines) == 1 and len(lines.pop()) == 1_000_000, err[:1000]


@pytest.mark.covers("D11")
def test_all_prompts_time_out_in_bounded_time():
    with pool_of(lambda **_: time.sleep(1000), timeout=0.3) as pool:
        start = time.monotonic()
        scores = ask(pool, ["text"] * 200, 2)
        assert time.monotonic() - start < 10
        assert scores.failed.all() and np.isnan(scores.values).all()
        assert [m[:21] for m in pool.failures[:3]] == [
            f"reward 'f0' on prompt {i}"[:21] for i in range(3)
        ]
        [last] = pool.failures[3:]
        assert last == "reward 'f0' from prompt 3 on: not asked, 3 prompts in a row timed out"


def test_timeouts_count_only_in_a_row():
    class Silent:
        title = "reward 'f'"

        def ask(self, batch, start, stop):
            asked.append(start)
            return self

    asked = []
    values, failed = np.full(8, np.nan), np.zeros(8, bool)
    late, good = {"failed": "timed out", "timeout": True}, {"values": [1.0], "timeout": False}
    bad = {"failed": "ValueError", "timeout": False}
    with pool_of(lengths) as pool:
        task = pool._score(Silent(), values, failed, {"prompts": ["p"] * 8}, 1)
        next(task)
        for answer in (late, late, late, bad, late, late, good, late, good):
            with contextlib.suppress(StopIteration):
                task.send(answer)
    assert asked == [0, 0, 1, 2, 3, 4, 5, 6, 7]
    assert failed.tolist() == [True] * 5 + [False, True, False]


@pytest.mark.covers("D11")
def test_a_single_prompt_is_asked_once(tmp_path):
    def count_and_raise(completions, **_):
        with open(tmp_path / "calls", "a") as file:
            file.write("x")
        raise ValueError

    with pool_of(count_and_raise) as pool:
        scores = ask(pool, ["a", "b"], 2)
    assert scores.failed.all() and (tmp_path / "calls").read_text() == "x"
    assert len(pool.failures) == 1


@pytest.mark.covers("D11")
def test_stop_names_reward_prompt_and_reason():
    with pool_of(lengths, OnBad(reward_faults.raise_error), on_failure="stop") as pool:
        with pytest.raises(TrainError, match=r"'f1' on prompt 1 \('question 1'\): ValueError: two"):
            ask(pool)
        assert (ask(pool, ["good"] * 4).values == 4).all()


def test_a_failure_of_the_whole_batch_alone_is_told():
    def at_most_two(completions, **_):
        assert len(completions) <= 2
        return lengths(completions)

    with pool_of(at_most_two, on_failure="stop") as pool:
        assert (ask(pool).values == GOOD).all()
    [message] = pool.failures
    assert message.startswith("reward 'f0' on the batch, and on no prompt alone: AssertionError")


@pytest.mark.covers("N1")
def test_the_first_failure_of_each_kind_is_warned_of_and_all_are_counted():
    def picky(completions, **_):
        for text in completions:
            if "b" in text:
                raise KeyError(text)
            if len(text) == 4:
                json.loads(text)  # raises in a file of its own
        return lengths(completions)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pool_of(lengths, picky) as pool:
            ask(pool)
            # A prompt with "bb", then one with "bad" and "dddd", which fails on the first of the two.
            kinds = list(pool.failed.kinds.values())
            (report,) = pool.report().values()
            assert pool.report() == {}
            ask(pool, ["bbb", "bbb", "cc", "cc", "xxxx", "yyyy"])
            assert [kind["completions"] for kind in pool.report()["failures"]] == [2, 2]
    line = picky.__code__.co_firstlineno
    key = rf"reward 'f1' on prompt 0 \('question 0'\): KeyError: 'bb' \(\S+:{line + 3}\)"
    decode = rf"reward 'f1' on prompt 2 .*: JSONDecodeError: Exp.* \(\S+:{line + 5}\)"
    assert report == kinds and re.fullmatch(key, report[0]["first"])
    assert report[0]["completions"] == 4
    texts = [str(warning.message) for warning in said]
    assert re.fullmatch(key + "; 4 of 6 completions unscorable", texts[0])
    assert re.fullmatch(decode + "; 2 of 6 completions unscorable", texts[1])
    kind = rf"reward 'f1': KeyError \(\S+:{line + 3}\)"
    assert re.fullmatch(kind + ": 6 completions unscorable in all", texts[2]) and len(texts) == 3


@pytest.mark.covers("D11")
def test_a_worker_is_reused_and_replaced_when_it_dies_idle():
    with pool_of(whoami, whoami) as pool:
        first = ask(pool).values[:, 0]
        assert first[0] != first[1] and os.getpid() not in first
        assert (ask(pool).values[:, 0] == first).all()
        os.kill(int(first[0]), signal.SIGKILL)
        wait_for(lambda: not is_running(int(first[0])))
        again = ask(pool)
        assert not again.failed.any() and len(pool.failures) == 1
        assert again.values[0, 0] != first[0] and again.values[1, 0] == first[1]


def test_rewards_run_at_the_same_time(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    meet = [functools.partial(reward_faults.meet, *pair) for pair in ((one, two), (two, one))]
    with pool_of(*meet) as pool:
        assert (ask(pool).values == GOOD).all() and pool.failures == []


@pytest.mark.covers("D11")
def test_close_ends_what_a_reward_has_forked_and_leaves_no_zombie(tmp_path):
    with pool_of(functools.partial(reward_faults.note_pids, tmp_path), timeout=1.0) as pool:
        assert ask(pool, ["a"], 1).failed.all()
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    wait_for(lambda: not any(map(is_running, pids)))
    assert not Path(f"/proc/{pids[0]}").exists()


@pytest.mark.covers("D11")
def test_workers_end_with_a_parent_that_is_killed_while_they_hang(tmp_path):
    code = """if True:
        import functools, sys
        from tests.reward_faults import note_pids
        from trainers.rewards.functions import Reward
        from trainers.rewards.pool import RewardPool
        reward = Reward(name="f", function=functools.partial(note_pids, sys.argv[1]))
        RewardPool([reward])(["p"], ["c"], [[1]], {}, 1)
    """
    parent = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT)
    wait_for((tmp_path / "pids").exists)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert all(map(is_running, pids)) and os.getsid(pids[0]) == pids[0]
    parent.kill()
    parent.wait()
    wait_for(lambda: not any(map(is_running, pids)))


@pytest.mark.covers("D11")
def test_after_ctrl_c_no_answer_is_taken_for_the_next():
    def interrupt(*_):
        raise KeyboardInterrupt

    def slow(completions, **_):
        time.sleep(0.6)
        return lengths(completions)

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pool_of(slow) as pool:
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(KeyboardInterrupt):
                ask(pool)
            assert (ask(pool, ["good"] * 4).values == 4).all()
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_worker_starts_light_and_has_the_path_of_its_parent(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)

    def modules(completions, **_):
        heavy = {"jax", "numpy", "torch", "trainers", "utils"} & sys.modules.keys()
        return [float(len(heavy)), float(sys.path == path)]

    path = list(sys.path)
    with pool_of(modules) as pool:
        start = time.monotonic()
        assert ask(pool, ["a", "b"]).values.tolist() == [[0.0, 1.0]]
        assert time.monotonic() - start < 3


def test_functions_of_a_notebook_can_be_sent():
    code = """if True:
        from trainers.rewards.functions import Reward
        from trainers.rewards.pool import RewardPool
        OFFSET = 2
        def helper(text):
            return len(text) + OFFSET
        def reward(completions, **_):
            return [helper(text) for text in completions]
        with RewardPool([Reward(name="f", function=reward)]) as pool:
            print(pool(["p"], ["abc"], [[1]], {}, 1).values.tolist())
    """
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (out.returncode, out.stdout, out.stderr) == (0, "[[5.0]]\n", "")
