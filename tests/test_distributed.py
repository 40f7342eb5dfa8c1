"""Two and four processes: the same curve as one, faults of one of them, and going on."""

import contextlib
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests import cli
from tests.processes import Group, arrays, before, gone_within, said
from tests.programs import check_error, flags, wait_for_lines
from tests.small_episodes import training as episodes
from tests.small_runs import curve
from tests.test_lm_eval import tasks
from tests.test_train_cli import rows

pytestmark = pytest.mark.slow

STEPS = 5

# Turns the sign of one weight in this process's copy, once the run has loaded the model.
ANOTHER_COPY = """
import jax, numpy as np, trainers.runs.run as training
fit = training.fit
def change_and_fit(trainer, state, *args, **options):
    mlp = state.params["layers"]["mlp"]
    [shard] = mlp["w_up"].addressable_shards
    part = np.array(shard.data)
    part.reshape(-1)[3] *= -1
    copies = [jax.device_put(part, shard.device)]
    mlp["w_up"] = jax.make_array_from_single_device_arrays(part.shape, mlp["w_up"].sharding, copies)
    return fit(trainer, state, *args, **options)
training.fit = change_and_fit
"""

# Saves the state that a run starts from once more.
COPY_OF_THE_START = """
import pathlib, trainers.runs.run as training
from jax.experimental import multihost_utils
from trainers.runs.checkpoint import Checkpointer
fit = training.fit
def save_and_fit(trainer, state, *args, **options):
    with Checkpointer(pathlib.Path({!r})) as copy:
        multihost_utils.sync_global_devices("all have opened it")
        copy.save(int(state.step), state, dict())
    return fit(trainer, state, *args, **options)
training.fit = save_and_fit
"""


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    with contextlib.closing(Group(tmp_path_factory.mktemp("group"), 4)) as started:
        yield started


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "train.jsonl").write_text(rows(0))
    (folder / "other.jsonl").write_text(rows(1))
    prompts = [{"prompt": "x" * (1 + i % 4), "answer": i} for i in range(9)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    return folder


def sft(files: Path, out_dir: Path, **options: object) -> dict[str, object]:
    known = dict(data=files / "train.jsonl", eval_data=files / "train.jsonl", out_dir=out_dir)
    known |= dict(ckpt_dir=cli.checkpoint(), batch_size=4, micro_batch_size=4, seq_len=64)
    known |= dict(max_steps=STEPS, lr=0.01, save_every=1, eval_every=3, export=False, keep=9)
    return known | options


def shared(files: Path, out_dir: Path, **options: object) -> dict[str, object]:
    """The same for two processes, each with a half of all parameters."""
    return sft(files, out_dir, mesh="fsdp=2", **options)


def grpo(files: Path, out_dir: Path, **options: object) -> dict[str, object]:
    known = dict(data=files / "prompts.jsonl", reward="tests.grpo_rewards:ones", out_dir=out_dir)
    known |= dict(ckpt_dir=cli.checkpoint(), chat=False, prompts_per_step=4, group_size=4, lr=0.01)
    known |= dict(max_completion_len=8, max_steps=2, save_every=1, export=False)
    return known | options


def losses(folder: Path, *names: str) -> list[list[float]]:
    return [[line[name] for name in names if name in line] for line in curve(folder)]


def codes(done) -> list[int]:
    return [one.code for one in done]


@pytest.fixture(scope="module")
def alone(programs, files, tmp_path_factory):
    """The folder of a run of one process on one device. Read, never written."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    done = programs.run("train.py", "sft", **sft(files, folder))
    assert done.code == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pair(group, files, tmp_path_factory):
    """The folder of a run of two processes. Read, never written."""
    folder = tmp_path_factory.mktemp("pair") / "run"
    done = group.run(2, "train.py", "sft", **shared(files, folder))
    assert codes(done) == [0, 0], done
    # Only the first one speaks.
    assert f"\n{STEPS:>7}  " in done[0].stderr and "done in" in done[0].stderr
    assert not done[0].stdout + done[1].stdout
    assert said(done[1]) == []
    return folder


def test_two_processes_train_as_one(alone, pair):
    names = "loss", "grad_norm", "eval_loss"
    for got, wanted in zip(losses(pair, *names), losses(alone, *names), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_four_processes_with_two_devices_each(group, files, alone, tmp_path):
    options = sft(files, tmp_path, mesh="fsdp=2,context=2,tensor=2")
    done = group.run(4, "train.py", "sft", devices=2, **options)
    assert codes(done) == [0] * 4, done
    for got, wanted in zip(losses(tmp_path, "loss"), losses(alone, "loss"), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5)


@pytest.mark.parametrize("in_turns", [False, True])
def test_a_policy_is_trained_by_two_as_by_one(group, programs, files, tmp_path, in_turns):
    """In turns, the first process alone has the environments, and the other hears what they say."""
    one, two = (
        (
            episodes(tmp_path / name, max_steps=2, prompts_per_step=4)
            if in_turns
            else grpo(files, tmp_path / name)
        )
        for name in ("one", "two")
    )
    assert programs.run("train.py", "grpo", **one).code == 0
    done = group.run(2, "train.py", "grpo", **two)
    assert codes(done) == [0, 0], done
    rollouts = lambda folder: [
        [one["ids"] for prompt in json.loads(line)["prompts"] for one in prompt["completions"]]
        for line in (folder / "rollouts.jsonl").read_text().splitlines()
    ]
    one, two = one["out_dir"], two["out_dir"]
    assert rollouts(one) == rollouts(two)
    for got, wanted in zip(losses(two, "loss", "reward"), losses(one, "loss", "reward")):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)
    assert len(curve(two)) == 2


@pytest.mark.covers("D23")
def test_a_run_goes_on_with_another_number_of_processes(
    group, programs, files, pair, alone, tmp_path
):
    """From step 3 on: with the bits of the whole state, and on the same curve."""
    for source, count in ((pair, 1), (alone, 2)):
        folder = shutil.copytree(source, tmp_path / str(count))
        patch = COPY_OF_THE_START.format(str(tmp_path / f"{count}-loaded" / "checkpoints"))
        if count == 1:
            options = sft(files, folder, resume_step=3)
            done = [programs.run("train.py", "sft", patch=patch, **options)]
        else:
            options = shared(files, folder, resume_step=3, patches={0: patch, 1: patch})
            done = group.run(2, "train.py", "sft", **options)
        assert {one.code for one in done} == {0}, done
        loaded, saved = arrays(tmp_path / f"{count}-loaded", 3), arrays(source, 3)
        assert {"step", "key", "params.embed"} < set(saved) and loaded == saved
        for got, wanted in zip(losses(folder, "loss"), losses(alone, "loss"), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5)


@pytest.mark.covers("E1")
@pytest.mark.parametrize(
    "victim, place",
    [
        (1, "trainers.loop._Run, '_account', 3"),
        (0, "trainers.runs.checkpoint, 'write_manifest', 3"),
        (1, "utils.distributed, 'start', 1"),
    ],
)
def test_one_is_killed_and_all_leave(group, files, pair, tmp_path, victim, place):
    patch = before(place, "os.kill(os.getpid(), signal.SIGKILL)")
    short = "coordinator=127.0.0.1:PORT,processes=2,process={},timeout=15"
    launch = {i: short.format(i) for i in range(2)} if "start" in place else {}
    options = shared(files, tmp_path)
    pids, wait = group.start(
        2, "train.py", "sft", patches={victim: patch}, launch=launch, **options
    )
    while Path(f"/proc/{pids[victim]}").exists():
        time.sleep(0.02)
    assert gone_within(pids, 20)
    done = wait()
    assert done[victim].code == -9 and done[1 - victim].code not in (0, -9), done
    saved = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    if "start" in place:  # nothing was done
        assert not saved
        return
    done = group.run(2, "train.py", "sft", resume=True, **options)
    assert codes(done) == [0, 0], done
    assert arrays(tmp_path, STEPS) == arrays(pair, STEPS)
    assert losses(tmp_path, "loss", "eval_loss") == losses(pair, "loss", "eval_loss")


@pytest.mark.covers("E2")
@pytest.mark.parametrize(
    "options, patch, fields",
    [
        (
            dict(seed=3),
            "",
            [r"0: settings\.seed is 3, and 0 there; train\.seed is 3, and 0 there; start"],
        ),
        (
            dict(lr=0.02, data="other.jsonl"),
            "import jax, models.llama.checkpoint as c\n"
            "jax.__version__, c.weights_digest = '0.1', lambda _: 'x'\n",
            [
                r"train\.learning_rate is 0\.02, and 0\.01 there",
                r"data\.digest is",
                "jax is '0.1', and '0",
                "base_weights is 'x'",
            ],
        ),
    ],
)
def test_another_start_is_refused_by_all(group, files, tmp_path, options, patch, fields):
    options = {k: files / v if k == "data" else v for k, v in options.items()}
    done = group.run(
        2, "train.py", "sft", options_of={1: options}, patches={1: patch}, **shared(files, tmp_path)
    )
    assert codes(done) == [2, 2], done
    check_error(done[0], 2, "process 1 is not like process 0", *fields)
    assert "error" not in done[1].stderr
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.covers("E3")
@pytest.mark.parametrize(
    "launch, message",
    [
        ({1: "coordinator=127.0.0.1:1,processes=2,process=1,timeout=6"}, "not all of 2 processes"),
        (
            {1: "coordinator=127.0.0.1:PORT,processes=2,process=2"},
            "process=2, expected one of 0..1",
        ),
        ({0: "coordinator=127.0.0.1:PORT,processes=3,process=0,timeout=6"}, "not all of 3"),
    ],
)
def test_processes_that_do_not_come_together(group, files, tmp_path, launch, message):
    known = "coordinator=127.0.0.1:PORT,processes=2,process={},timeout=6"
    launch = {i: known.format(i) for i in range(2)} | launch
    start = time.monotonic()
    pids, wait = group.start(2, "train.py", "sft", launch=launch, **shared(files, tmp_path))
    assert gone_within(pids, 20)
    done = wait()
    assert codes(done) == [2, 2], done
    assert time.monotonic() - start < 20
    assert any(re.search(message, one.stderr) for one in done), done


@pytest.mark.covers("E4")
def test_one_that_hangs_is_named_and_all_leave(group, files, tmp_path):
    options = shared(files, tmp_path, max_steps=2000, save_every=0, eval_every=0, check_every=0)
    pids, wait = group.start(2, "train.py", "sft", **options)
    wait_for_lines(tmp_path, 3, pids[0])
    os.kill(pids[1], signal.SIGSTOP)
    assert gone_within(pids[:1], 25)
    os.kill(pids[1], signal.SIGCONT)
    assert gone_within(pids[1:], 10)
    done = wait()
    assert 0 not in codes(done)
    assert "tasks are unhealthy (stopped sending heartbeats):\n1" in done[0].stderr


@pytest.mark.covers("E4")
def test_one_that_does_not_come_is_named(group, files, tmp_path):
    slow = before("trainers.loop._Run, '_account', 2", "time.sleep(9)")
    hasty = "import utils.distributed; utils.distributed.WAIT_SECONDS = 3"
    done = group.run(
        2, "train.py", "sft", patches={0: hasty, 1: slow}, **shared(files, tmp_path, save_every=0)
    )
    check_error(done[0], 5, "processes did not come together", "task.*1")
    assert done[1].code != 0


@pytest.mark.covers("E5")
def test_one_without_data_stops_all_at_one_step(group, files, tmp_path):
    patch = before("trainers.data.Dataset, 'batch', 4", "raise errors.DataError('no more of it')")
    done = group.run(
        2, "train.py", "sft", patches={1: patch}, **shared(files, tmp_path, eval_every=0)
    )
    assert codes(done) == [4, 4], done
    text = "".join(one.stderr for one in done)
    assert text.count("no more of it") == 2, text
    steps = [line["step"] for line in curve(tmp_path)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) < STEPS


@pytest.mark.covers("E5")
def test_a_reward_that_fails_stops_all(group, files, tmp_path):
    error = "errors.TrainError('a bad reward')"
    patch = before("trainers.rewards.pool.RewardPool, '_call', 2", f"raise {error}")
    done = group.run(2, "train.py", "grpo", patches={0: patch}, **grpo(files, tmp_path))
    assert codes(done) == [5, 5], done
    check_error(done[0], 5, "a bad reward")
    assert [line["step"] for line in curve(tmp_path)] == [1]


@pytest.mark.covers("E6")
def test_a_signal_to_one_saves_the_same_step_of_all(group, programs, files, pair, tmp_path):
    patch = before("trainers.loop._Run, '_account', 2", "send(signal.SIGTERM)")
    options = shared(files, tmp_path, save_every=0, eval_every=3)
    done = group.run(2, "train.py", "sft", patches={1: patch}, **options)
    assert codes(done) == [75, 75], done
    saved = [path.name for path in (tmp_path / "checkpoints").glob("step-*")]
    assert saved == [f"step-{len(curve(tmp_path)):08d}"] and len(curve(tmp_path)) < STEPS
    done = group.run(2, "train.py", "sft", resume=True, **options)
    assert codes(done) == [0, 0], done
    assert arrays(tmp_path, STEPS) == arrays(pair, STEPS)


@pytest.mark.covers("E7")
def test_a_part_that_cannot_be_written_is_no_checkpoint(group, files, tmp_path):
    error = "OSError(errno.ENOSPC, 'No space left on device', 'part')"
    patch = before("trainers.runs.checkpoint, 'write_arrays', 3", f"raise {error}")
    done = group.run(2, "train.py", "sft", patches={1: patch}, **shared(files, tmp_path))
    assert codes(done) == [6, 6], done
    check_error(done[0], 6, "process 1: cannot save step 3.*no space left on device")
    saved = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert saved == [".lock", "step-00000001", "step-00000002"]


@pytest.mark.covers("E8")
def test_a_copy_that_differs_ends_the_run_and_is_named(group, files, tmp_path):
    options = sft(files, tmp_path, mesh="data=2", check_every=2, eval_every=0)
    done = group.run(2, "train.py", "sft", patches={1: ANOTHER_COPY}, **options)
    assert codes(done) == [5, 5], done
    check_error(done[0], 5, r"layers/mlp/w_up is not the same .* of process 1 has another one")
    assert [line["step"] for line in curve(tmp_path)] == [1, 2]
    # What was saved at step 2 would hold one of the copies.
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000001"]


@pytest.mark.parametrize("mesh", ["fsdp=2", "data=2"])
def test_two_processes_write_the_text_of_one(group, tmp_path, mesh):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo and three\n4\n")
    options = dict(ckpt_dir=cli.checkpoint(), prompts_file=prompts, json=True)
    options |= dict(temperature=0, max_gen_len=24)
    alone = cli.inside("generate.py", *flags(options))
    first, second = group.run(2, "generate.py", mesh=mesh, **options)
    assert (alone.returncode, first.code, second.code) == (0, 0, 0), (alone, first, second)
    assert first.stdout == alone.stdout and len(first.stdout.splitlines()) == 3
    assert second.stdout == "" and said(second) == []


def evaluated(done, *measured: str) -> dict:
    """The JSON that evaluate.py writes, without what it measures of the machine."""
    found = json.loads(done.stdout)
    return {name: value for name, value in found.items() if name not in measured}


def test_two_processes_find_the_perplexity_of_one(group, programs, files):
    options = dict(data=files / "train.jsonl", ckpt_dir=cli.checkpoint(), json=True)
    alone = programs.run("evaluate.py", "ppl", **options)
    for mesh in ("data=2", "fsdp=2"):
        done = group.run(2, "evaluate.py", "ppl", mesh=mesh, **options)
        assert codes([alone, *done]) == [0, 0, 0], done
        got, wanted = evaluated(done[0]), evaluated(alone)
        assert got.pop("counts") == wanted.pop("counts")
        assert got == pytest.approx(wanted, rel=1e-5)
        assert done[1].stdout == "" and said(done[1]) == []


def test_two_processes_score_what_one_does(group, programs, files, tmp_path):
    options = dict(data=files / "prompts.jsonl", reward="tests.grpo_rewards:even", chat=False)
    options |= dict(ckpt_dir=cli.checkpoint(), temperature=0, max_completion_len=8, json=True)
    outs = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    alone = programs.run("evaluate.py", "task", out=outs[0], **options)
    # Only the first one writes: the other has no such folder.
    other = {1: dict(out=tmp_path / "none" / "two.jsonl")}
    options |= dict(mesh="fsdp=2", out=outs[1], options_of=other)
    done = group.run(2, "evaluate.py", "task", **options)
    assert codes([alone, *done]) == [0, 0, 0], done
    measured = "seconds", "tokens_per_s"
    assert evaluated(done[0], *measured) == evaluated(alone, *measured)
    assert outs[0].read_bytes() == outs[1].read_bytes() != b""
    assert done[1].stdout == "" and said(done[1]) == []


# lm-eval's own 14,000 files of tasks take seconds to read.
OWN_TASKS = """
import functools
from lm_eval.tasks import TaskManager as of
of.__init__ = functools.partialmethod(of.__init__, include_defaults=False)
"""


def test_two_processes_have_the_results_of_one_in_standard_evaluations(
    group, programs, tasks, tmp_path
):
    options = dict(tasks="sums,texts,answers", include_path=tasks, ckpt_dir=cli.checkpoint())
    options |= dict(limit=4, batch_size=8)
    outs = tmp_path / "one.json", tmp_path / "two.json"
    alone = programs.run("evaluate.py", "lm_eval", output=outs[0], patch=OWN_TASKS, **options)
    options |= dict(mesh="fsdp=2", output=outs[1], patches=dict.fromkeys(range(2), OWN_TASKS))
    done = group.run(2, "evaluate.py", "lm_eval", **options)
    assert codes([alone, *done]) == [0, 0, 0], [alone, *done]
    wanted, got = (json.loads(path.read_text())["results"] for path in outs)
    for name, measures in wanted.items():
        for measure, value in measures.items():
            near = value if isinstance(value, str) else pytest.approx(value, rel=1e-4)
            assert got[name][measure] == near
    assert "|sums" in done[0].stdout and done[1].stdout == ""


@pytest.mark.covers("E5")
@pytest.mark.parametrize("victim, when", [(0, "loading"), (1, "evaluating")])
def test_an_error_in_the_evaluation_data_of_one_ends_all(group, files, tmp_path, victim, when):
    places = dict(loading="train, 'load_dataset', 2")
    places["evaluating"] = "trainers.data.Dataset, 'epoch_batches', 1"
    patch = before(places[when], "raise errors.DataError('broken data')")
    options = shared(files, tmp_path, patches={victim: patch})
    pids, wait = group.start(2, "train.py", "sft", **options)
    while Path(f"/proc/{pids[victim]}").exists():
        time.sleep(0.02)
    assert gone_within(pids, 5)
    done = wait()
    assert codes(done) == [4, 4], done
    assert "".join(one.stderr for one in done).count("broken data") == 1, done
