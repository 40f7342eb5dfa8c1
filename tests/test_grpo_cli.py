"""train.py grpo, replay and report as programs: flags, kills, signals, and going on to the same bits."""

import json
import re

import jax
import pytest

from models.llama.model import LLaMa
from tests import cli, small_grpo
from tests.programs import assert_same_run, check_error
from trainers.grpo_trainer import GRPOConfig
from trainers.runs.recipes import GRPORecipe
from trainers.rollout import RolloutConfig
from utils.errors import ConfigError
from utils.sharding import MESH_AXES

STEPS = 4


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"prompt": "x" * (1 + i % 4), "answer": i} for i in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def training(prompts, out_dir, **options):
    known = dict(data=prompts, reward="tests.grpo_rewards:ones", out_dir=out_dir, chat=False)
    known |= dict(ckpt_dir=cli.checkpoint(), max_steps=STEPS, prompts_per_step=3, group_size=4)
    known |= dict(max_completion_len=8, lr=0.01, beta=0.05, save_every=1, export=False)
    return known | options


def rollouts(folder):
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(programs, prompts, tmp_path_factory):
    """The folder of a run that nothing disturbed. Read, never written."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = programs.run("train.py", "grpo", **training(prompts, folder))
    assert done.code == 0, done.stderr
    assert "9 prompts, the longest of" in done.stderr and "the first, as the model" in done.stderr
    assert [line["step"] for line in rollouts(folder)] == [1, 2, 3, 4]
    return folder


def go_on(programs, prompts, folder, whole, saved=True):
    done = programs.run("train.py", "grpo", **training(prompts, folder), resume=saved)
    assert done.code == 0, done.stderr
    assert_same_run(folder, whole, STEPS)
    assert rollouts(folder) == rollouts(whole)


def test_all_wrong_flags_are_named_at_once(programs, prompts, tmp_path):
    wrong = dict(group_size=1, loss="ppo", kl="k9", temperature=0, refills=-1, remat="all")
    done = programs.run("train.py", "grpo", **training(prompts, tmp_path) | wrong)
    check_error(done, 2, *(f"{name}" for name in wrong), "one completion has no group")
    assert not (tmp_path / "run.json").exists()
    options = training(prompts, tmp_path, task="reasoning_gym:chain_sum")
    check_error(programs.run("train.py", "grpo", **options), 2, "pass either --task or --data")


@pytest.mark.slow
@pytest.mark.covers("R26")
def test_a_context_beyond_the_files_number_is_taken_with_one_warning(programs, prompts, tmp_path):
    options = training(prompts, tmp_path, max_completion_len=260, max_steps=1, export=True)
    asked = {name: options[name] for name in ("ckpt_dir", "data", "reward", "chat")}
    asked |= dict(max_completion_len=260, temperature=0, json=True)
    for command, flags in (("train.py grpo", options), ("evaluate.py task", asked)):
        refused = programs.run(*command.split(), **flags)
        check_error(refused, 2, "the model's context of 256; lower it .* or set --max_seq_len")
        done = programs.run(*command.split(), **flags, max_seq_len=300)
        assert done.code == 0, done.stderr
        (warning,) = re.findall("warning: max_seq_len.*", done.stderr)
        assert "max_seq_len=300 exceeds the model's context of 256 tokens" in warning
    assert json.loads(done.stdout)["mean_length"] == 260
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["max_position_embeddings"] == 300
    done = programs.run("train.py", "grpo", **options, resume=True, max_seq_len=270)
    assert done.code == 0 and "changed: --max_seq_len 300 → 270" in done.stderr, done.stderr


@pytest.mark.parametrize(
    "sizes, micro, found",
    [
        (dict(prompts_per_step=4, group_size=4, branches=2), None, None),
        (dict(prompts_per_step=4, group_size=4, branches=1, mini_batches=2), 8, 8),
        (dict(prompts_per_step=8, group_size=4), 16, 16),
        (dict(prompts_per_step=8, group_size=4), 2, 8),  # a row a device at least
        (dict(prompts_per_step=4, group_size=4), None, "step x group_size / mini_batches / 4 .*=4"),
        (dict(prompts_per_step=4, group_size=4, branches=2, mini_batches=2), None, "/ 2 .*row=4 "),
    ],
)
def test_the_rows_of_a_step_are_prompts_with_some_of_their_completions(sizes, micro, found):
    """On 8 devices that share rows; of which each row is one of `branches` completions."""
    recipe = GRPORecipe(
        config=GRPOConfig(micro_batch_size=micro, max_completion_len=8),
        rollout=RolloutConfig(**sizes),
        task=small_grpo.task(),
        evaluated=None,
        eval_samples=1,
        tokenizer=small_grpo.tokenizer(),
        lora=None,
        reward_timeout=1.0,
        reward_failure="stop",
        rollouts=False,
    )
    automatic = (jax.sharding.AxisType.Auto,) * 4  # newer JAX makes explicit ones unless told
    mesh = jax.sharding.AbstractMesh((2, 4, 1, 1), MESH_AXES, axis_types=automatic)
    with jax.sharding.use_abstract_mesh(mesh):
        if not isinstance(found, str):
            assert recipe.trainer(LLaMa(small_grpo.MODEL)).config.micro_batch_size == found
            return
        with pytest.raises(ConfigError) as refused:
            recipe.trainer(LLaMa(small_grpo.MODEL))
    assert re.search(found, str(refused.value))
    assert str(refused.value).endswith("by data=2 x fsdp=4 devices; use a multiple of 8")


@pytest.mark.slow
@pytest.mark.covers("D16")
@pytest.mark.parametrize(
    "place",
    [
        "trainers.rewards.pool.RewardPool, '__call__', 3",
        "trainers.runs.checkpoint, 'write_arrays', 3",
    ],
)
def test_killed_anywhere_and_gone_on_with(programs, prompts, whole, tmp_path, place):
    patch = "import os, signal, trainers.on_policy, trainers.loop, trainers.runs.checkpoint\n"
    patch += f"at({place}, lambda: os.kill(os.getpid(), signal.SIGKILL))\n"
    done = programs.run("train.py", "grpo", patch=patch, **training(prompts, tmp_path))
    assert done.code == -9, done.stderr
    go_on(programs, prompts, tmp_path, whole)


@pytest.mark.slow
@pytest.mark.covers("D19")
def test_a_signal_in_a_rollout_ends_the_run_behind_its_step(programs, prompts, whole, tmp_path):
    patch = "import signal, trainers.on_policy\n"
    patch += "at(trainers.on_policy, 'generate', 2, lambda: send(signal.SIGTERM))\n"
    done = programs.run("train.py", "grpo", patch=patch, **training(prompts, tmp_path))
    assert done.code == 75, done.stderr
    assert "stopped; step 2 is saved" in done.stderr
    go_on(programs, prompts, tmp_path, whole)


@pytest.mark.slow
def test_replay_finds_what_was_logged_and_report_is_written(programs, whole):
    done = programs.run("train.py", "replay", run=whole, step=3, beta=0.5, kl="k2", json=True)
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["run"]["loss"] == pytest.approx(found["logged"]["loss"], rel=1e-4, abs=1e-7)
    assert found["run"]["grad_norm"] == pytest.approx(found["logged"]["grad_norm"], rel=1e-4)
    assert found["agrees"] and len(found["logged"]) == 21
    assert 0 < found["changed"]["difference"] and found["changed"]["cosine"] < 1.0001
    check_error(programs.run("train.py", "replay", run=whole, step=9), 2, "no rollout for step 9")
    done = programs.run("train.py", "report", run=whole, out=whole.parent / "page.html")
    assert done.code == 0 and (whole.parent / "page.html").read_text().startswith("<!")
