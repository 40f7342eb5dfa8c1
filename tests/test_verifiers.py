"""The adapter to verifiers, next to verifiers' own rollouts.

Nothing here imports verifiers before a slow test runs.
"""

import gc
import importlib
import json
import sys
from pathlib import Path

import pytest

from trainers.environments.process import EnvironmentServer, load_environment
from trainers.environments.verifiers import Verifiers
from utils.errors import ConfigError

EXAMPLES = Path(__file__).parent / "verifiers_examples"


@pytest.fixture(autouse=True)
def collected():
    """An environment that nobody has any more ends its loop now, and not within another one."""
    yield
    gc.collect()


@pytest.fixture
def examples(monkeypatch):
    """Verifiers' examples as installed packages, in this process and in its servers."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES))


def call(name, /, **arguments):
    return {"id": f"id{name}{len(arguments)}", "function": {"name": name, "arguments": arguments}}


def say(text, *calls):
    calls = {"tool_calls": [{"type": "function", **c} for c in calls]} if calls else {}
    return {"role": "assistant", "content": text, **calls}


def play(environment, example, turns):
    """(all messages, the reward or None) of an episode."""
    messages, reward, done = list(environment.reset(example)), None, False
    for turn in turns:
        assert not done and reward is None
        answers, reward, done = environment.step(turn)
        messages += [turn, *answers]
        assert bool(answers) != done
    return messages, reward if done else None


def as_told(message):
    """A message as verifiers' servers know it, without what is null."""
    out = {k: v for k, v in message.items() if v}
    if calls := out.get("tool_calls"):
        out["tool_calls"] = [
            [c["id"], c["function"]["name"], json.loads(c["function"]["arguments"])] for c in calls
        ]
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("env_id", "idx", "turns"),
    [
        ("echoes", 0, [say("red")]),
        ("echoes", 1, [say("<think>hm</think>\n\nred"), say("<think>red or\nnot</think>blue")]),
        ("echoes", 2, [say("red"), say(" green\n"), say("blue")]),  # a stop ends the third one
        ("echoes", 2, [say("red"), say("shut up")]),
        (
            "glossary",
            0,
            [
                say("Let me see.", call("facts_lookup", name="Ada Lovelace"), call("nothing")),
                say("", call("facts_lookup"), call("facts_lookup", name="é", more=1)),
                say("<answer>the first computer programmer</answer>"),
            ],
        ),
    ],
)
def test_an_episode_is_verifiers_own(examples, env_id, idx, turns):
    from tests.verifiers_rollout import roll_out

    environment = Verifiers(env_id)
    (example,) = [row for row in environment.examples(3, 0) if row["idx"] == idx]
    assert json.loads(json.dumps(example)) == example
    messages, reward = play(environment, example, turns)
    replies = []
    for turn in turns:
        thoughts, ended, content = turn["content"].rpartition("</think>")
        reply = {"content": content.strip() if ended else content}
        if ended:
            reply["reasoning_content"] = thoughts.removeprefix("<think>")
        for c in turn.get("tool_calls", []):
            arguments = json.dumps(c["function"]["arguments"])
            function = c["function"] | {"arguments": arguments}
            reply.setdefault("tool_calls", []).append(c | {"function": function})
        replies.append(reply)
    trace, told = roll_out(env_id, example, replies)
    assert reward == trace.reward and len(told) == len(turns)
    # The last request has all messages but the last answer; thoughts are not told again.
    heard = [as_told(message) for message in told[-1]["messages"]]
    ours = iter(replies)
    mine = [next(ours) if m["role"] == "assistant" else m for m in messages]
    mine = [as_told({k: v for k, v in m.items() if k != "reasoning_content"}) for m in mine]
    assert [{"role": "assistant"} | m for m in mine[:-1]] == [
        {k: v for k, v in m.items() if k != "reasoning_content"} for m in heard
    ]
    assert list(environment.tools) == [
        {"type": "function", "function": tool["function"]} for tool in told[-1].get("tools", [])
    ]


@pytest.mark.slow
def test_tools_share_the_state_of_their_episode_alone(examples):
    environment = Verifiers("scratchpad")
    first, second = environment.examples(2, seed=1)
    ask = say("", call("scratchpad_roundtrip", word=first["word"]))
    messages, reward = play(environment, first, [ask, say(first["word"])])
    assert (messages[2]["content"], reward) == (first["word"], 1.0)
    state = environment._seat.trace.state
    assert state.slot == first["word"]
    # An episode may be left: its stop ends this one after four turns, before the model answers.
    play(environment, second, [ask])
    messages, reward = play(environment, second, 4 * [ask])
    assert reward == 0 and environment._seat.trace.stop_condition == "done"
    assert state is not environment._seat.trace.state


@pytest.mark.slow
def test_episodes_run_in_processes(examples):
    spec = load_environment("verifiers", {"env_id": "glossary"})
    with EnvironmentServer(spec, timeout=60) as server:
        rows = server.examples(2, seed=0)
        openings, (schema,) = server.openings(rows)
        assert [m["content"] for (m,) in openings] == [row["prompt"] for row in rows]
        assert schema["function"]["name"] == "facts_lookup"
        episodes = [server.start(row, seed=0) for row in rows]
        for episode, row in zip(episodes, rows):
            assert episode.wait()["messages"] == [{"role": "user", "content": row["prompt"]}]
            episode.ask(say("", call("facts_lookup", name=row["name"])))
        for episode, row in zip(episodes, rows):
            answer = episode.wait()
            assert (answer["messages"][0]["content"], answer["calls"]) == (row["answer"], 1)
            episode.ask(say(rows[0]["answer"]))
        answers = [episode.wait() for episode in episodes]
        assert [(a["reward"], a["done"], a["calls"]) for a in answers] == [
            (1, True, 0),
            (0, True, 0),
        ]
        for episode in episodes:
            episode.close()


@pytest.mark.slow
def test_examples_are_dealt_like_those_of_other_environments(examples):
    rows = Verifiers("echoes").examples(7, seed=0)
    assert len(rows) == 7 and sorted(row["idx"] for row in rows[:3]) == [0, 1, 2]
    assert rows == Verifiers("echoes").examples(7, seed=0)


@pytest.mark.covers("G5")
def test_the_package_is_missing(monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "verifiers"] + ["verifiers"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"pip install 'altiplano\[verifiers\]'"):
        Verifiers("glossary")


@pytest.mark.slow
@pytest.mark.covers("G5")
@pytest.mark.parametrize(
    ("env_id", "config", "named"),
    [
        ("no_such_package", {}, "'no_such_package' cannot be loaded.*not found"),
        ("json", {}, "'json' cannot be loaded"),
        ("glossary", {"taskset": {"split": "x"}}, "'glossary' cannot be loaded.*split"),
        ("glossary", {"id": "user-sim"}, "the agents assistant, user, expected one"),
        (
            "glossary",
            {"taskset": {"task": {"tools": {"url": "http://localhost:1"}}}},
            "GlossaryToolset runs elsewhere",
        ),
    ],
)
def test_environments_that_cannot_be_loaded_or_are_not_supported(examples, env_id, config, named):
    with pytest.raises(ConfigError, match=named):
        Verifiers(env_id, config)


@pytest.mark.slow
@pytest.mark.covers("G5")
def test_tasks_that_are_not_supported(examples, monkeypatch):
    import verifiers.v1 as vf

    environment = Verifiers("echoes")
    example = environment.examples(1, 0)[0]

    async def paid(self, trace: vf.Trace, runtime: vf.Runtime) -> float:
        return 1.0

    def short(self, request: vf.Request) -> bool:
        return False

    def changed(self, response: vf.Response) -> None:
        pass

    task = importlib.import_module("echoes").EchoesTask
    for hook in (vf.reward(paid), vf.stop(short), vf.intercept(changed)):
        monkeypatch.setattr(task, hook.__name__, hook, raising=False)
    with pytest.raises(
        ConfigError, match="intercepts.*stop short reads.*paid runs programs.*container"
    ):
        environment.reset(example | {"image": "ubuntu"})
    monkeypatch.setattr(task, "NEEDS_CONTAINER", True)
    with pytest.raises(ConfigError, match="container"):
        Verifiers("echoes")
