"""Environments that crash, hang and misbehave, in real processes: what is lost, and what is not."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import connection, reduction
from pathlib import Path

import pytest

from tests.environment_faults import NONSENSE, Faulty, Unmade
from tests.reward_faults import FAULTS, HARMLESS
from tests.test_reward_worker import ROOT, is_running, wait_for
from trainers.environments import Environment, worker
from trainers.environments.process import EnvironmentServer, EnvironmentSpec, load_environment
from utils.errors import ConfigError, DataError, TrainError

EXAMPLE = {"text": "?"}


def server_of(make=Faulty, timeout=30.0, **args):
    return EnvironmentServer(EnvironmentSpec(name="m:E", make=make, args=args), timeout)


def say(text, **more):
    return {"role": "assistant", "content": text} | more


def call(name, **arguments):
    function = {"name": name, "arguments": arguments}
    return {"id": name[:9], "type": "function", "function": function}


def start(server, example=EXAMPLE, seed=0):
    """An episode that has answered with its first messages."""
    episode = server.start(example, seed)
    assert episode.wait()["messages"]
    return episode


def talk(episode, text):
    episode.ask(say(text))
    return episode.wait()


@pytest.fixture(scope="module")
def server():
    with server_of() as server:
        yield server


def test_an_episode_keeps_its_state_and_no_other_sees_it(server, capfd):
    one, two = server.start(EXAMPLE, 0), server.start({"text": "!"}, 0)
    nothing = {"reward": None, "done": False, "calls": 0, "errors": 0, "timeout": False}
    for episode, text in ((one, "?"), (two, "!")):
        answer = episode.wait()
        assert answer == nothing | {"messages": [{"role": "user", "content": f"question {text}"}]}
    for turn in (1, 2):
        answer = talk(one, "2")
        message = {"role": "user", "content": f"turn {turn}"}
        assert answer == nothing | {"messages": [message] * 2, "reward": 1.0}
    assert talk(two, "1")["messages"][0]["content"] == "turn 1"
    assert talk(two, "numpy") == nothing | {"messages": [], "reward": 0.5, "done": True}
    assert talk(two, "nan") == nothing | {"messages": [], "done": True}
    one.ask(say("", tool_calls=[call("double", x=4), call("halve"), call("double", y=1)]))
    answer = one.wait()
    assert (answer["calls"], answer["errors"], answer["done"]) == (3, 2, False)
    good, *bad = answer["messages"]
    assert good == {"role": "tool", "name": "double", "tool_call_id": "double", "content": "8"}
    assert all(message["content"].startswith("Error: ") for message in bad)
    assert talk(one, "1")["messages"][0]["content"] == "turn 13"
    one.close(), two.close()
    out, err = capfd.readouterr()
    assert out == "" and err == "printed\n"


def test_examples_openings_and_the_schemas_of_tools(server):
    examples = server.examples(3, 7)
    assert examples == [{"text": f"7 {i}"} for i in range(3)]
    openings, [schema] = server.openings(examples)
    assert [m["content"] for [m] in openings] == [f"question 7 {i}" for i in range(3)]
    assert schema["function"]["name"] == "double"
    assert server.openings([]) == ([], [schema])


def test_random_numbers_depend_on_the_seed_alone(server):
    episodes = [start(server, seed=seed) for seed in (5, 2**40, 5)]
    answers = [talk(episode, "random")["messages"][0]["content"] for episode in episodes]
    (one, two, again), (numpys, others, same) = zip(*(answer.split() for answer in answers))
    assert one == again != two and numpys == same != others


def test_an_environment_may_answer_calls_itself():
    class Own(Environment):
        answers_calls = True

        def reset(self, example):
            return [{"role": "user", "content": "?"}]

        def step(self, message):
            return [], len(message["tool_calls"]), True

    with server_of(Own) as server:
        episode = start(server)
        episode.ask(say("", tool_calls=[call("f")] * 2))
        answer = episode.wait()
        assert (answer["reward"], answer["done"], answer["calls"]) == (2.0, True, 2)
        with pytest.raises(ConfigError, match="^environment 'm:E' has no examples .* --data FILE$"):
            server.examples(1, 0)


HANGS = ("hang", "hang in C", "stop", "spin", "leave")


@pytest.fixture(scope="module")
def answers(server):
    """Answers by fault, of episodes that are there at the same time; "2" is the last one's."""
    episodes = {name: start(server) for name in [*FAULTS, "spin", "leave", "2"]}
    for name, episode in episodes.items():
        episode.ask(say(name))
        if name in HANGS:
            episode.deadline = time.monotonic() + 0.5
    return {name: episode.wait() for name, episode in episodes.items()}


@pytest.mark.covers("V1")
@pytest.mark.parametrize("name", [*FAULTS, "spin", "leave", "2"])
def test_a_fault_costs_its_episode_and_no_other(answers, name):
    if name == "2":
        assert len(answers[name]["messages"]) == 2
        return
    text = FAULTS["hang" if name in HANGS else name][1].replace("3 s", "30 s")
    pattern = text.replace("reward_faults", "environment_faults")
    assert re.fullmatch(pattern, answers[name]["failed"]), answers[name]
    assert answers[name]["timeout"] == (name in HANGS)


@pytest.mark.covers("V1")
@pytest.mark.parametrize("patience, code", [(10.0, 5), (0.0, -signal.SIGKILL)])
def test_a_process_that_closes_its_connection_may_end_by_itself(patience, code):
    process = subprocess.Popen(["sh", "-c", "sleep 0.2; exit 5"], process_group=0)
    assert worker._end(process.pid, patience) == code
    process.wait()


@pytest.mark.covers("V1")
def test_bad_manners_cost_nothing(server, capfd):
    for action in HARMLESS:
        episode = start(server, {"text": action.__name__})
        for _ in range(2):  # an answer too many would be taken for the next
            episode.ask(say("1"))
            assert episode.wait()["reward"] == 1, action
        time.sleep(0.3 * (action.__name__ == "fork_and_return"))  # the other one says nothing
        episode.close()
    out, err = capfd.readouterr()
    assert out == "" and len(err) < 1_100_000 and "Traceback" not in err


@pytest.mark.covers("V2")
@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_a_bug(server, name):
    episode = start(server)
    with pytest.raises(TrainError) as error:
        talk(episode, name)
    assert re.match(f"environment 'm:E': {NONSENSE[name][1]}", str(error.value))
    episode.close()


@pytest.mark.covers("V3")
@pytest.mark.parametrize(
    "make, args, message",
    [
        (len, {}, "environment 'e': <built-in function len> is not a class"),
        (Environment, {}, "'e': Environment has no reset; Environment has no step"),
        (Faulty, {"x": 1}, r"'e': with the arguments {'x': 1}: .*unexpected keyword argument 'x'"),
    ],
)
def test_a_class_that_is_no_environment(make, args, message):
    with pytest.raises(ConfigError, match=message):
        EnvironmentSpec(name="e", make=make, args=args)


@pytest.mark.covers("V3")
def test_load_environment():
    spec = load_environment("tests.environment_faults:Faulty", {"prefix": "?"})
    assert (spec.make, spec.args) == (Faulty, {"prefix": "?"})
    for name, message in {
        "gues": "environment 'gues': expected module:Class, or one of .*; did you mean 'guess'?",
        "nowhere:E": "environment 'nowhere:E': importing nowhere fails: ModuleNotFoundError",
        "json:E": "environment 'json:E': json has no E",
    }.items():
        with pytest.raises(ConfigError, match=message):
            load_environment(name, {})


@pytest.mark.covers("V3")
@pytest.mark.parametrize("fault", ["raise", "exit 3", "close all", "hang", "for people"])
def test_an_environment_that_cannot_be_made(fault):
    with server_of(Unmade, fault=fault) as server:
        if fault == "hang":
            server._worker._timeout = 1.0
        with pytest.raises(ConfigError) as error:
            server.start(EXAMPLE, 0)
    texts = {"raise": "ValueError: two lines", "hang": "timed out after 1 s"}
    texts["for people"] = "x is 0, expected 1"
    text = texts.get(fault, "its process ended (exit code ")
    assert str(error.value).startswith(f"environment 'm:E' cannot be made: {text}")


@pytest.mark.covers("V3")
def test_a_class_that_cannot_be_sent():
    lock = threading.Lock()

    class Locked(Faulty):
        held = lock

    with pytest.raises(ConfigError, match="environment 'm:E' cannot be sent to a process"):
        server_of(Locked)


@pytest.mark.covers("V4")
def test_an_example_that_reset_fails_on_is_named(server):
    for text, message in {
        "raise": "example 1: environment 'm:E': reset fails: ValueError: two lines",
        "exit 3": "example 1: environment 'm:E': reset fails: its process ended .exit code 3",
        "nothing": "example 1: environment 'm:E': reset returned wrong messages: .*non-empty",
    }.items():
        with pytest.raises(DataError, match=message):
            server.openings([EXAMPLE, {"text": text}])
    assert "two lines" in server.start({"text": "raise"}, 0).wait()["failed"]


@pytest.mark.covers("V4")
def test_wrong_examples_and_wrong_tools():
    def untyped(x):
        """Has no types."""

    class Wrong(Faulty):
        tools = property(lambda self: (untyped,), lambda self, _: None)

        def examples(self, size, seed):
            wrong = {1: [1], 2: [{}] * 3, 3: [{1}, {}, {}], 4: [{"x": float("nan")}] * 4}
            return wrong.get(size) or 1 / 0

    with server_of(Wrong) as server:
        for size, message in {
            1: "examples returned .1., 1 items; expected 1 to 1 JSON objects",
            2: "examples returned .{}, {}, {}., 3 items; expected 1 to 2 JSON objects",
            3: "examples returned what JSON cannot hold: .* set is not",
            4: "examples returned what JSON cannot hold: Out of range float",
            5: "examples fails: ZeroDivisionError",
        }.items():
            with pytest.raises(ConfigError, match=f"environment 'm:E': {message}"):
                server.examples(size, 0)
        with pytest.raises(ConfigError, match="'m:E': its tools: .*argument 'x' has no type hint"):
            server.openings([EXAMPLE])


def held(server, parent):
    """Open files of this process and of the server's; its children, after another episode."""
    start(server).close()
    files = [len(os.listdir(f"/proc/{pid}/fd")) for pid in (os.getpid(), parent)]
    return *files, len(Path(f"/proc/{parent}/task/{parent}/children").read_text().split())


@pytest.mark.covers("V5")
@pytest.mark.parametrize("many", [8, pytest.param(300, marks=pytest.mark.slow)])
def test_nothing_stays_of_an_episode(server, many):
    episode = start(server)
    child, parent, group, session = map(int, talk(episode, "ids")["messages"][0]["content"].split())
    assert child == group != parent == session  # Ctrl-C does not reach it
    assert talk(episode, "inherited")["messages"][0]["content"] == "[]"
    episode.close()
    before = held(server, parent)
    for _ in range(many // 4):
        episodes = [start(server) for _ in range(4)]
        for episode, text in zip(episodes, ["exit 3", "fork_for_good", "raise", "1"]):
            talk(episode, text)
        for episode in episodes:
            episode.close()
    wait_for(lambda: all(now <= then for now, then in zip(held(server, parent), before)))


@pytest.mark.covers("V5")
def test_a_server_that_is_killed_is_started_again(server):
    episode = start(server)
    child, parent, *_ = map(int, talk(episode, "ids")["messages"][0]["content"].split())
    os.kill(parent, signal.SIGKILL)
    wait_for(lambda: not is_running(parent))
    again = start(server)
    assert talk(again, "1")["reward"] == 1
    assert is_running(child) and talk(episode, "1")["reward"] == 1
    episode.close(), again.close()
    wait_for(lambda: not is_running(child))


@pytest.mark.covers("V5")
def test_what_the_machine_has_no_more_of_is_told(server, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    (control, far), (ours, theirs) = connection.Pipe(), connection.Pipe()
    reduction.send_handle(control, theirs.fileno(), 0)
    control.close()
    with monkeypatch.context() as patch, ours, theirs, far:
        patch.setattr(os, "fork", refuse)
        assert worker._fork_children(far, json.dumps({"start": 0, "seed": 0}).encode()) is None
        failed = json.loads(ours.recv_bytes())["failed"]
        assert failed == "cannot start a process: Too many open files"
    monkeypatch.setattr(connection, "Pipe", refuse)
    text = "environment 'm:E': cannot open a socket for another episode: Too many open files; raise"
    with pytest.raises(ConfigError, match=text):
        server.start(EXAMPLE, 0)


@pytest.mark.covers("V5")
def test_after_ctrl_c_no_answer_is_taken_for_another(monkeypatch, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    (tmp_path / "queue.py").write_text("a file of the user's")
    monkeypatch.chdir(tmp_path)
    with server_of() as server:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(server._worker, "wait", interrupt)
            server.start(EXAMPLE, 0)
        one, two = start(server), start(server)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(server._worker.connection, "recv_bytes", interrupt)
            one.kill()
        assert talk(two, "exit 3")["failed"] == "its process ended (exit code 3)"
        hangs = start(server)
        child = int(talk(hangs, "ids")["messages"][0]["content"].split()[0])
        hangs.ask(say("hang in C"))
    wait_for(lambda: not is_running(child))


@pytest.mark.covers("V5")
def test_all_processes_end_with_a_run_that_is_killed(tmp_path):
    code = f"""if True:
        from tests.environment_faults import note_pids, spin
        from tests.reward_faults import hang_in_native_code
        from trainers.environments.process import EnvironmentServer, EnvironmentSpec
        class OfANotebook:
            def __init__(self, hangs):
                if hangs:
                    note_pids({str(tmp_path)!r}, spin)
            def reset(self, example):
                note_pids({str(tmp_path)!r}, hang_in_native_code)
            def step(self, message):
                pass
        def server(**args):
            spec = EnvironmentSpec(name="e", make=OfANotebook, args=args)
            return EnvironmentServer(spec, 100.0)
        ready = server(hangs=False)
        kept = ready.start({{}}, 0), ready.start({{}}, 1)
        server(hangs=True).start({{}}, 0)
    """
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    wait_for(lambda: len(list(tmp_path.glob("*.pids"))) == 3, 60.0)
    pids = {int(pid) for path in tmp_path.glob("*.pids") for pid in path.read_text().split()}
    pids.remove(parent.pid)
    assert len(pids) == 7 and all(map(is_running, pids))
    parent.kill()
    parent.wait()
    wait_for(lambda: not any(map(is_running, pids)))
