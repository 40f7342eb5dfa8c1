"""--env in train.py and evaluate.py as programs: kills within an episode, replay, report, flags."""

import json

import pytest

from tests import cli
from tests.programs import assert_same_run, check_error, flags
from tests.small_episodes import checkpoint, training
from tests.test_verifiers import EXAMPLES

STEPS = 4


def rollouts(folder):
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(programs, tmp_path_factory):
    """The folder of a run that nothing disturbed. Read, never written."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = programs.run("train.py", "grpo", **training(folder, eval_size=4))
    assert done.code == 0, done.stderr
    assert "20 prompts, the longest of" in done.stderr
    found = [c for line in rollouts(folder) for p in line["prompts"] for c in p["completions"]]
    turns = [len(c["episode"]["turns"]) for c in found]
    assert max(turns) == 3 and any(0 in c["mask"] for c in found)
    return folder


@pytest.mark.slow
@pytest.mark.covers("D16")
def test_killed_within_an_episode_and_gone_on_with(programs, whole, tmp_path):
    patch = "import os, signal, trainers.environments.player as player\n"
    patch += (
        "at(player._Stage, '_take_answer', 112, lambda: os.kill(os.getpid(), signal.SIGKILL))\n"
    )
    options = training(tmp_path, eval_size=4)
    done = programs.run("train.py", "grpo", patch=patch, **options)
    assert done.code == -9, done.stderr
    slow = options | {"env_args": '{"low": 2, "slow": 0.05}'}
    done = programs.run("train.py", "grpo", resume=True, allow_data_change=True, **slow)
    assert done.code == 0, done.stderr
    assert_same_run(tmp_path, whole, STEPS)
    assert rollouts(tmp_path) == rollouts(whole)


@pytest.mark.slow
def test_replay_and_report(programs, whole):
    done = programs.run("train.py", "replay", run=whole, step=3, json=True)
    assert done.code == 0 and json.loads(done.stdout)["agrees"], done.stderr
    page = whole.parent / "page.html"
    done = programs.run("train.py", "report", run=whole, out=page)
    assert done.code == 0, done.stderr
    text = page.read_text()
    assert "<summary>turn 2" in text and '<p class="answer"><b>user</b>' in text


@pytest.mark.slow
def test_a_student_is_taught_where_it_talks(programs, tmp_path):
    options = training(tmp_path, teacher=checkpoint(), max_steps=2)
    done = programs.run("train.py", "distill", **options)
    assert done.code == 0, done.stderr
    found = [c for line in rollouts(tmp_path) for p in line["prompts"] for c in p["completions"]]
    assert any(0 in c["mask"] for c in found)
    # The teacher is the student: it has nothing to say at first, whoever speaks.
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["loss"]) < 1e-6 and first["turns"] > 1


@pytest.mark.slow
def test_a_model_is_measured_in_an_environment(programs, tmp_path):
    out = tmp_path / "episodes.jsonl"
    options = dict(env="guess", env_args='{"high": 8, "turns": 3}', ckpt_dir=checkpoint(), size=5)
    options |= dict(max_completion_len=64, max_turn_len=8, samples=4, json=True)
    done = programs.run("evaluate.py", "task", out=out, **options)
    assert done.code == 0, done.stderr
    found, rows = json.loads(done.stdout), [json.loads(x) for x in out.read_text().splitlines()]
    assert found["rewards"]["episode"]["mean"]["prompts"] == 5 and len(rows) == 20
    assert all(row["episode"]["turns"] for row in rows)


@pytest.mark.covers("V3")
def test_flags_that_do_not_go_together(programs, tmp_path):
    for wrong, told in (
        (dict(task="reasoning_gym:chain_sum"), "pass either --task or --data, or an --env"),
        (dict(reward="exact_match"), "--env rewards by itself: leave out --reward"),
        (dict(env="gess"), "environment 'gess': expected module:Class, .*did you mean 'guess'"),
        (dict(env_args='{"depth": 3}'), "Chatter|'m:E'|unexpected keyword argument 'depth'"),
    ):
        done = programs.run("train.py", "grpo", **training(tmp_path) | wrong)
        check_error(done, 2, told)


@pytest.mark.slow
def test_an_example_of_verifiers_trains_two_steps(tmp_path):
    options = dict(env="verifiers", env_args='{"env_id": "glossary"}', task_size=4, max_steps=2)
    options |= dict(
        ckpt_dir=cli.checkpoint(2048, 1), prompts_per_step=2, group_size=2, export=False
    )
    options |= dict(max_completion_len=96, max_turn_len=16, max_turns=2, out_dir=tmp_path)
    environment = cli.environment() | {"PYTHONPATH": str(EXAMPLES)}
    done = cli.run("train.py", "grpo", *flags(options), env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [c for line in rollouts(tmp_path) for p in line["prompts"] for c in p["completions"]]
    assert len(found) == 8 and all(c["reward"] is not None for c in found)
