"""train.py and evaluate.py as programs: flags, files, exit codes, signals, kills, and going on."""

import contextlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import generate
import train
from tests import cli
from tests import programs as shared
from tests.programs import CODES, INT, TERM, check_error, flags, wait_for_lines
from tests.small_runs import curve
from trainers.runs.checkpoint import Checkpointer, CheckpointReader
from trainers.sft_trainer import SFTConfig
from utils.console.flags import parse_flags, read_flags
from utils.errors import CheckpointError, ConfigError
from utils.fields import build

STEPS = 5
SMALL = dict(batch_size=4, micro_batch_size=2, seq_len=64, max_steps=STEPS, lr=0.01)
SMALL |= dict(save_every=1, eval_every=2)


def assert_same_run(folder: Path, whole: Path) -> None:
    """Both runs ended with the same bits and the same curve."""
    shared.assert_same_run(folder, whole, STEPS)


def rows(seed: int, count: int = 14) -> str:
    rng = random.Random(seed)
    words = lambda: "".join(rng.choices("abcdefgh ", k=rng.randint(1, 14)))
    chat = lambda: [dict(role=role, content=words()) for role in ("user", "assistant")]
    return "".join(json.dumps({"messages": chat()}) + "\n" for _ in range(count))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with data sets, good and bad ones, and checkpoints that lack something."""
    folder = tmp_path_factory.mktemp("files") / "snapshots" / "c0ffee"  # as in the hub's cache
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text(rows(0))
    (folder / "eval.jsonl").write_text(rows(1, 6))
    (folder / "few.jsonl").write_text(rows(2, 3))
    (folder / "empty.jsonl").write_text("")
    (folder / "binary.jsonl").write_bytes(bytes(range(256)) * 9)
    (folder / "broken.jsonl").write_text(rows(3) + '{"messages": [}\n')
    question = json.dumps({"messages": [dict(role="user", content="?")]}) + "\n"
    (folder / "untaught.jsonl").write_text(question * 9)
    shutil.copytree(cli.checkpoint(), folder / "nan")
    weights = safetensors.numpy.load_file(folder / "nan" / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * np.float32("nan")
    safetensors.numpy.save_file(
        weights, folder / "nan" / "model.safetensors", metadata={"format": "pt"}
    )
    return folder


def training(files: Path, out_dir: Path, **options: object) -> dict[str, object]:
    """Options of a small run."""
    known = dict(data=files / "train.jsonl", eval_data=files / "eval.jsonl", out_dir=out_dir)
    return known | dict(ckpt_dir=cli.checkpoint(), export=False) | SMALL | options


@pytest.fixture(scope="module")
def whole(programs, files, tmp_path_factory):
    """The folder of a run that nothing disturbed. Copied, never written."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = programs.run("train.py", "sft", **training(files, folder))
    assert done.code == 0, done.stderr
    assert [line["step"] for line in curve(folder)] == list(range(1, STEPS + 1))
    return folder


# What is wrong is said at once ------------------------------------------------------------------


@pytest.mark.covers("D10")
def test_all_wrong_flags_are_named_before_anything_is_loaded(programs, files, tmp_path):
    wrong = dict(lr="nan", seq_len=0, lora_rank=-1, keep=0, dtype="float8", remat="all")
    wrong |= dict(resume_step="new", optimizer="sgd", mask="some", micro_batch_size=0)
    nothing = dict(ckpt_dir=tmp_path / "none", data=tmp_path / "none.jsonl")
    done = programs.run("train.py", "sft", **training(files, tmp_path / "run", **wrong, **nothing))
    patterns = [f"--{name} must be .*, got {value!r}" for name, value in wrong.items()]
    check_error(done, 2, *patterns)
    assert not (tmp_path / "run").exists()
    for wrong, pattern in (
        (dict(seed=-1), "seed"),
        (dict(seed=2**32), "seed"),
        (dict(skip_bad=-1), "skip_bad"),
        (dict(steps=3), "--steps"),
        (dict(packing="yes"), "packing must be true or false, got 'yes'; --nopacking turns it off"),
    ):
        options = training(files, tmp_path / "run", **wrong)
        check_error(programs.run("train.py", "sft", **options), 2, pattern)


@pytest.mark.parametrize("program, command", [("train.py", "sft"), ("evaluate.py", "ppl")])
def test_a_command_is_needed_and_help_lists_it(programs, program, command):
    check_error(programs.run(program, "tune"), 2, f"expected a command: {command}")
    nothing, asked = programs.run(program), programs.run(program, "--help")
    assert (nothing.code, asked.code) == (2, 0) and nothing.stderr == asked.stdout
    assert re.match(rf"usage: .*{command}.*\n +{command} +\w", asked.stdout)
    assert "--data TEXT" in programs.run(program, command, "--help").stdout


@pytest.mark.covers("N3", "N14")
@pytest.mark.parametrize("program, command", [("train.py", "grpo"), ("evaluate.py", "task")])
def test_commands_are_listed_without_importing_jax(program, command):
    without = "import runpy, sys; sys.modules['jax'] = None; sys.argv = sys.argv[1:]; "
    without += "runpy.run_path(sys.argv[0], run_name='__main__')"
    for args, code, shown in (
        ([], 2, rf"usage: .*{command}.*\n +\w+ +\w"),
        (["--help"], 0, rf"\n  {command} +\w"),
        (["--task", "x"], 2, r"'--task': expected a command"),
        ([command + "s"], 2, f"did you mean {command}"),
        (["--version"], 0, r"^altiplano \d"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", without, program, *args],
            cwd=cli.ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == code and re.search(shown, done.stdout + done.stderr), done


# A patch: weights that are asked for are a failure.
NOT_LOADED = """
from models.llama.checkpoint import Checkpoint
def params(*args, **options):
    raise AssertionError("loaded")
Checkpoint.params = params
"""

BAD_DATA = {
    "none.jsonl": "none.jsonl",
    "empty.jsonl": "empty.jsonl: no row",
    "binary.jsonl": "binary.jsonl:1 is not",
    "broken.jsonl": "broken.jsonl:15 is not",
    "untaught.jsonl": "no row is left.*dropped_no_target 9",
    "few.jsonl": "3 rows, fewer than batch_size=4",
}


@pytest.mark.covers("D3")
@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_an_error_before_the_weights_are_looked_at(programs, files, tmp_path, name):
    options = training(files, tmp_path / "run", data=files / name, patch=NOT_LOADED)
    check_error(programs.run("train.py", "sft", **options), 4, BAD_DATA[name])
    assert not (tmp_path / "run").exists()
    if name != "few.jsonl":
        options = training(files, tmp_path, eval_data=files / name, patch=NOT_LOADED)
        check_error(programs.run("train.py", "sft", **options), 4, BAD_DATA[name])
        only = dict(ckpt_dir=cli.checkpoint(), data=files / name, patch=NOT_LOADED)
        check_error(programs.run("evaluate.py", "ppl", **only), 4, BAD_DATA[name])


@pytest.mark.covers("D28")
def test_a_folder_that_cannot_be_used_is_an_error_before_the_weights(programs, files, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / ("n" * 300)):
        done = programs.run("train.py", "sft", **training(files, folder), patch=NOT_LOADED)
        check_error(done, 6, "cannot write into")
    # The state is 3 float32 a parameter, and there are over 40,000.
    full = "import shutil; shutil.disk_usage = lambda _: type('', (), dict(free=500_000))"
    options = training(files, tmp_path / "full")
    done = programs.run("train.py", "sft", patch=NOT_LOADED + full, **options)
    check_error(done, 6, "500000 bytes free, a checkpoint needs")


@pytest.mark.covers("D21")
def test_there_must_be_something_to_go_on_from_and_nothing_to_overwrite(
    programs, files, whole, tmp_path
):
    options = training(files, tmp_path / "run", resume=True)
    check_error(
        programs.run("train.py", "sft", **options),
        6,
        "has no checkpoint to resume from; start without --resume",
    )
    run = Path(shutil.copytree(whole, tmp_path / "old"))
    options = training(files, run)
    check_error(programs.run("train.py", "sft", **options), 6, "got to step 5; pass --resume")
    check_error(
        programs.run("train.py", "sft", resume_step=1, **options), 6, "cannot use step 1.*are"
    )
    for manifest in run.glob("checkpoints/step-*/manifest.json"):
        manifest.unlink()
    for resume in (True, False):
        done = programs.run("train.py", "sft", **options, resume=resume)
        check_error(done, 6, "no complete checkpoint")
    assert curve(run) == curve(whole)


def started(files, out_dir, *words):
    """The config of a run as flags of `train.py sft` make it."""
    flags = ["--data", "x", "--out_dir", str(out_dir), *words]
    return build(train.sft, parse_flags(train.sft, flags))["run"]


@pytest.mark.covers("R34")
def test_resume_auto_starts_where_there_is_nothing(files, whole, tmp_path):
    assert started(files, tmp_path, "--resume").resumes
    assert (
        not started(files, tmp_path).resumes and not started(files, tmp_path, "--noresume").resumes
    )
    assert not started(files, tmp_path / "new", "--resume", "auto").resumes
    assert not started(files, tmp_path, "--resume=auto").resumes
    assert started(files, whole, "--resume", "auto").resumes
    with pytest.raises(ConfigError, match="--resume must be true, false or auto, got 'maybe'"):
        started(files, tmp_path, "--resume", "maybe")
    # A save that was killed left no checkpoint, and a broken checkpoint is one.
    (tmp_path / "checkpoints" / ".step-00000005.tmp-0123abcd").mkdir(parents=True)
    assert not started(files, tmp_path, "--resume", "auto").resumes
    with Checkpointer(tmp_path / "checkpoints") as writer:
        writer.start_anew()
        assert writer.steps == []
    (tmp_path / "checkpoints" / "step-00000003").mkdir()
    assert started(files, tmp_path, "--resume", "auto").resumes
    with Checkpointer(tmp_path / "checkpoints") as writer:
        writer.start_anew()
        with pytest.raises(CheckpointError, match="no complete checkpoint"):
            writer.steps


@pytest.mark.slow
@pytest.mark.covers("R16", "R34", "N14")
def test_the_same_command_trains_longer_and_a_finished_run_says_so(programs, files, tmp_path):
    options = training(files, tmp_path / "my run", max_steps=40, save_every=40, resume="auto")
    options |= dict(eval_data=None, export=True, micro_batch_size=4)
    done = programs.run("train.py", "sft", **options)
    assert done.code == 0 and "resuming" not in done.stderr, done.stderr
    assert f"--ckpt_dir '{tmp_path}/my run/export' --chat" in done.stderr
    saved = CheckpointReader(tmp_path / "my run" / "checkpoints").read_meta()
    assert saved["train"]["warmup_steps"] == 1  # 3 %
    done = programs.run("train.py", "sft", **options)
    assert done.code == 0 and "already finished: step 40 of 40" in done.stderr
    options |= dict(max_steps=81, save_every=81)
    done = programs.run("train.py", "sft", **options)
    assert done.code == 0 and "resuming from step 40 of 81" in done.stderr, done.stderr
    assert "changed: --max_steps 40 → 81" in done.stderr and "--warmup" not in done.stderr
    saved = CheckpointReader(tmp_path / "my run" / "checkpoints").read_meta()
    assert saved["train"]["warmup_steps"] == 1 and saved["train"]["max_steps"] == 81
    done = programs.run("train.py", "sft", **options, warmup_steps=5)
    check_error(done, 2, r"--warmup_steps 1 → 5 \(change back, or pass --allow_config_change")


@pytest.mark.slow
@pytest.mark.covers("R39", "N14")
def test_any_checkpoint_becomes_a_model(programs, files, whole, tmp_path):
    """The best and the newest, as the run's own export would be; a wrong choice is one line."""
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    reader = CheckpointReader(run / "checkpoints")
    scores = {line["step"]: line["eval_loss"] for line in curve(run) if "eval_loss" in line}
    assert reader.best == min(scores, key=scores.get)
    done = programs.run("train.py", "sft", **training(files, run, export=True), resume=True)
    assert done.code == 0, done.stderr
    own = (run / "export" / "model.safetensors").read_bytes()
    assert len({path.stat().st_mode for path in (run / "export").iterdir()}) == 1
    for more, same in (
        (dict(), True),
        (dict(best=True), reader.best == STEPS),
        (dict(step=4, dtype="float16"), False),
    ):
        out = tmp_path / "of" / str(len(more)) / "-".join(more)
        done = programs.run("train.py", "export", run=run, out=out, **more)
        assert done.code == 0, done.stderr
        assert ((out / "model.safetensors").read_bytes() == own) == same
        found = safetensors.numpy.load_file(out / "model.safetensors")
        assert {str(x.dtype) for x in found.values()} == {more.get("dtype", "float32")}
        assert f"step {more.get('step', STEPS)} of" in done.stderr or "best" in more
    for more, code, pattern in (
        (dict(best=True, step=4), 2, "pass either --step=N or --best"),
        (dict(step=77), 6, r"cannot use step 77.*there are \["),
        (dict(run=tmp_path), 4, "run.json"),
    ):
        check_error(programs.run("train.py", "export", **dict(run=run) | more), code, pattern)


@pytest.mark.covers("N14", "R46")
def test_run_json_repeats_the_run(files, whole, tmp_path):
    settings = json.loads((whole / "run.json").read_text())
    how, source = settings["run"], settings["source"]
    assert source["data_commit"] == source["eval_commit"] == "c0ffee" != source["commit"]
    assert how["command"].startswith("python train.py sft --data") and how["host"]
    assert how["folder"] and how["started"] and how["versions"].keys() >= {"altiplano", "jax"}
    assert how["commit"] is None or re.match("[0-9a-f]{40}", how["commit"])
    given = read_flags(train.sft, str(whole / "run.json"))
    assert Path(given["data"]) == files / "train.jsonl"
    asked = training(files, whole, packing=True)
    built = build(train.sft, given | {"packing": True})
    assert built == build(train.sft, parse_flags(train.sft, flags(asked)))
    (tmp_path / "flags.json").write_text(json.dumps({"lr": 1, "batchsize": 4}))
    with pytest.raises(ConfigError, match="unknown flag --batchsize; did you mean --batch_size"):
        read_flags(train.sft, str(tmp_path / "flags.json"))


@pytest.mark.covers("N14")
@pytest.mark.parametrize(
    "command, names",
    [
        (
            train.sft,
            "save_steps=save_every max_seq_length=seq_len learning_rate=lr warmup=warmup_steps",
        ),
        (train.sft, "model=ckpt_dir output_dir=out_dir rank=lora_rank dataset=data task= stream="),
        (train.grpo, "num_generations=group_size max_new_tokens=max_completion_len rewards=reward"),
        (
            generate.main,
            "max_new_tokens=max_gen_len temp=temperature checkpoint=ckpt_dir precision=",
        ),
        (generate.main, "max_tokens=max_gen_len num_return_sequences=n stream= topp=top_p"),
    ],
)
def test_a_flag_of_another_name_is_told_its_own_and_no_other(command, names):
    for asked, meant in (pair.split("=") for pair in names.split()):
        hint = f"did you mean --{meant}\\?$" if meant else "--help lists them$"
        with pytest.raises(ConfigError, match=f"unknown flag --{asked}; {hint}"):
            parse_flags(command, [f"--{asked}", "1"])


@pytest.mark.covers("N14")
@pytest.mark.parametrize("words", [["--task", "list"], ["--lora_rank", "8", "--task=list"]])
def test_the_tasks_are_listed_without_another_flag(programs, words):
    own = "import runpy\nrunpy.run_path('train.py', run_name='__main__')\nraise SystemExit"
    done = programs.run("train.py", "grpo", *words, patch=own)
    assert (done.code, done.stderr) == (0, "") and "reasoning_gym:chain_sum\n" in done.stdout


@pytest.mark.covers("N14")
def test_the_length_in_epochs():
    assert train.SFTFlags().config(3.5).max_steps == 100
    assert train.SFTFlags(max_steps=7, warmup_steps=7).config(3.5).max_steps == 7
    assert train.SFTFlags(epochs=3, warmup_steps=11).config(3.5).max_steps == 11
    assert type(train.SFTFlags(epochs=0.1).config(3.5)) is SFTConfig
    with pytest.raises(ConfigError, match="pass either max_steps=N or epochs=N"):
        train.SFTFlags(epochs=1, max_steps=5)


@pytest.mark.slow
@pytest.mark.covers("D20")
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(programs, files, whole, tmp_path):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    damaged = run / "checkpoints" / f"step-{STEPS:08d}" / "meta.json"
    damaged.write_bytes(damaged.read_bytes().replace(b"1", b"2", 1))
    options = training(files, run)
    done = programs.run("train.py", "sft", **options, resume_step=STEPS)
    check_error(done, 6, "meta.json is damaged")
    done = programs.run("train.py", "sft", **options, resume=True)
    assert done.code == 0 and "step-00000005 is broken, an older one is tried" in done.stderr
    assert_same_run(run, whole)


@pytest.mark.slow
@pytest.mark.covers("D7")
def test_other_data_is_refused_unless_it_is_allowed(programs, files, whole, tmp_path):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    text = (files / "train.jsonl").read_text()
    lines = text.splitlines(keepends=True)
    data = tmp_path / "train.jsonl"
    options = training(files, run, data=data, max_steps=STEPS + 1, warmup_steps=0)
    options |= dict(lr=SMALL["lr"], resume=True)
    other_word = re.sub('"assistant", "content": "', r"\g<0>x", text, count=1)
    for changed in ("".join(lines[1:] + lines[:1]), text + lines[0], other_word):
        data.write_text(changed)
        done = programs.run("train.py", "sft", **options)
        check_error(
            done, 2, r"data.digest \"\w+\" → \"\w+\" \(change back, or pass --allow_data_change"
        )
    done = programs.run("train.py", "sft", **options, allow_data_change=True)
    assert done.code == 0, done.stderr
    assert "changed: data.digest" in done.stderr and "resuming from step 5 of 6" in done.stderr
    assert [line["step"] for line in curve(run)] == list(range(1, STEPS + 2))
    # The new data is gone through from its start.
    assert CheckpointReader(run / "checkpoints").read_meta()["progress"]["position"] == {"rows": 4}


@pytest.mark.covers("D22", "R13")
def test_every_difference_to_the_old_run_is_named_at_once(programs, files, whole, tmp_path):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    options = training(files, run, lr=0.02, batch_size=5, optimizer="lion", state_dtype="bfloat16")
    options |= dict(seq_len=60, seed=3, schedule="linear", clip_norm=0.5, dtype="bfloat16")
    options["ckpt_dir"] = files / "nan"  # the same model with other weights
    done = programs.run("train.py", "sft", **options, resume=True)
    config = r"--batch_size 4 → 5, --clip_norm 1.0 → 0.5, --lr 0.01 → 0.02, "
    config += r'--schedule "cosine" → "linear", --seed 0 → 3, --seq_len 64 → 60'
    never = r'base_weights "\w+" → "\w+", --dtype "float32" → "bfloat16", --optimizer "adamw" → "lion", '
    never += r'--state_dtype "float32" → "bfloat16"'
    check_error(
        done,
        2,
        rf"{config} \(change back, or pass --allow_config_change\)",
        rf"{never} \(never allowed",
        r"data.digest [^,]* \(change back, or pass --allow_data_change\)",
    )
    assert curve(run) == curve(whole)


@pytest.mark.slow
@pytest.mark.covers("R38")
@pytest.mark.parametrize("lora, dtypes", [({}, [None, "float32"]), (dict(lora_rank=2), [None])])
def test_an_export_has_the_dtype_of_the_files_it_came_from(programs, files, tmp_path, lora, dtypes):
    source = Path(shutil.copytree(cli.checkpoint(), tmp_path / "bf16"))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(source)
    options = dict(ckpt_dir=source, export=True, max_steps=1, save_every=0) | lora
    for asked in dtypes:
        dtype = asked or "bfloat16"
        out = tmp_path / dtype
        wanted = {} if asked is None else dict(export_dtype=asked)
        done = programs.run("train.py", "sft", **training(files, out, **options, **wanted))
        assert done.code == 0, done.stderr
        config = json.loads((out / "export" / "config.json").read_text())
        assert config["dtype"] == config["torch_dtype"] == dtype
        weights = safetensors.torch.load_file(out / "export" / "model.safetensors")
        assert {str(x.dtype) for x in weights.values()} == {f"torch.{dtype}"}


# What goes wrong on the way ---------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.covers("D1")
def test_a_run_that_diverges_ends_with_the_batches_numbers(programs, files, tmp_path):
    options = training(files, tmp_path, ckpt_dir=files / "nan", max_steps=9)
    done = programs.run("train.py", "sft", **options)
    check_error(done, 5, r"6 updates in a row.*loss nan.*{'rows': 24}\]")
    lines = curve(tmp_path)
    assert [(line["step"], line["updated"]) for line in lines] == [(1, False)] * 6
    assert [line["skipped"] for line in lines] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.covers("D29")
def test_metrics_that_cannot_be_written_cost_one_warning(programs, files, whole, tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    done = programs.run("train.py", "sft", **training(files, tmp_path))
    assert done.code == 0, done.stderr
    assert done.stderr.count("warning: ") == 1 and "No space left" in done.stderr
    assert shared.arrays(tmp_path, STEPS)[0] == shared.arrays(whole, STEPS)[0]


@pytest.mark.slow
@pytest.mark.covers("D30")
def test_an_export_that_fails_costs_no_training(programs, files, whole, tmp_path):
    full = """
import trainers.runs.export as training
def save_checkpoint(*args, **options):
    raise OSError(28, "No space left on device", str(args[0]))
training.save_checkpoint = save_checkpoint
"""
    options = training(files, tmp_path, export=True)
    done = programs.run("train.py", "sft", patch=full, **options)
    check_error(done, 1, "No space left on device")
    assert not (tmp_path / "export").exists()
    assert_same_run(tmp_path, whole)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    exporting = """
import trainers.runs.export as training
training.save_checkpoint = lambda folder, *args, **options: folder.mkdir()
"""
    done = programs.run("train.py", "sft", patch=exporting, **options, resume=True)
    assert done.code == 0 and "exported to" in done.stderr
    assert (tmp_path / "export").is_dir()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert_same_run(tmp_path, whole)


# Signals ----------------------------------------------------------------------------------------

# Where a signal comes: what is wrapped, and which call of it. Of the five steps two and four are
# evaluated behind, all are saved behind.
PLACES = {
    "preflight and its compilation": ("trainers.loop._Run, '_preflight', 1", 0),
    "stepping": ("trainers.loop._Run, '_account', 2", 2),
    "in evaluation": ("trainers.loop._Run, '_evaluate', 1", 2),
    "saving": ("trainers.runs.checkpoint, 'write_arrays', 3", None),
    "the last step": ("trainers.loop._Run, '_account', 5", 5),
}


def signals_at(place: str, *signals: str) -> str:
    """A patch."""
    where = PLACES[place][0] if place in PLACES else place
    sent = ", ".join(signals)
    return (
        "import signal, trainers.runs.export, trainers.loop, trainers.runs.checkpoint\n"
        "from models.llama.checkpoint import Checkpoint\n"
        f"at({where}, lambda: send({sent}))\n"
    )


@pytest.mark.slow
@pytest.mark.covers("D19")
@pytest.mark.parametrize("place, number", [*zip(PLACES, itertools.cycle([TERM, INT]))])
def test_a_signal_ends_the_run_behind_its_step(programs, files, whole, tmp_path, place, number):
    # With an export to come, even the last step is not the end.
    options = training(files, tmp_path, export=True)
    done = programs.run("train.py", "sft", patch=signals_at(place, number), **options)
    assert done.code == CODES[number], done.stderr
    (told,) = re.findall(r"stopped; step (\d+) is saved, continue with --resume", done.stderr)
    assert CheckpointReader(tmp_path / "checkpoints").steps[-1] == int(told)
    assert PLACES[place][1] in (None, int(told)) and "Traceback" not in done.stderr
    assert not (tmp_path / "export").exists()
    done = programs.run("train.py", "sft", **options | dict(export=False), resume=True)
    assert done.code == 0, done.stderr
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_an_export_on_several_devices_is_that_of_one(programs, files, tmp_path, lora_rank):
    run = training(files, tmp_path / "run", lora_rank=lora_rank, max_steps=2)
    assert programs.run("train.py", "sft", **run).code == 0
    devices = (
        "import os, jax\nos.environ['XLA_FLAGS'] += ' --xla_force_host_platform_device_count=4'\n"
    )
    devices += "assert jax.device_count() == 4\n"
    for out, patch in (("one", ""), ("four", devices)):
        folders = dict(run=tmp_path / "run", out=tmp_path / out)
        done = programs.run("train.py", "export", patch=patch, **folders)
        assert done.code == 0, done.stderr
    one, four = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("one", "four"))
    assert one == four


@pytest.mark.slow
@pytest.mark.covers("R4")
def test_a_run_that_resumes_on_another_day_is_the_same_run(programs, files, tmp_path):
    """Its template writes today's date: rows, bits and curve are those of the day it began."""
    model = Path(shutil.copytree(cli.checkpoint(), tmp_path / "model"))
    names = json.loads((model / "tokenizer_config.json").read_text())
    names["chat_template"] = "{{ strftime_now('%d %b %Y') }}" + cli.TEMPLATE
    (model / "tokenizer_config.json").write_text(json.dumps(names))

    def on(day: int, folder: str, patch: str = "", **more: object) -> Path:
        clock = (
            f"from utils import clock\nclock.moment = lambda: clock.datetime(2030, 1, {day}, 9)\n"
        )
        options = training(files, tmp_path / folder, ckpt_dir=model, **more)
        done = programs.run("train.py", "sft", patch=clock + patch, **options)
        assert done.code == (75 if patch else 0), done.stderr
        return tmp_path / folder

    on(1, "whole"), on(1, "resumed", signals_at("stepping", TERM)), on(2, "other")
    assert CheckpointReader(tmp_path / "resumed" / "checkpoints").steps[-1] == 2
    shutil.copytree(tmp_path / "resumed", tmp_path / "auto")
    assert_same_run(on(2, "resumed", resume=True), tmp_path / "whole")
    assert_same_run(on(2, "auto", resume="auto"), tmp_path / "whole")
    losses = [[line["loss"] for line in curve(tmp_path / name)] for name in ("whole", "other")]
    assert all(a != b for a, b in zip(*losses, strict=True))  # the date is read


@pytest.mark.slow
@pytest.mark.covers("D19")
@pytest.mark.parametrize("place", ["preflight and its compilation", "stepping", "saving"])
def test_a_second_signal_leaves_at_once(programs, files, whole, tmp_path, place):
    patch = signals_at(place, TERM, INT)
    # The action does not return: what it interrupts is not finished.
    done = programs.run("train.py", "sft", patch=patch, **training(files, tmp_path))
    assert done.code == 130 and "stopped; step" not in done.stderr
    resume = place != "preflight and its compilation"
    assert resume == bool(CheckpointReader(tmp_path / "checkpoints").steps)
    done = programs.run("train.py", "sft", **training(files, tmp_path), resume=resume)
    assert done.code == 0, done.stderr
    assert_same_run(tmp_path, whole)


@pytest.mark.covers("D19")
def test_where_there_is_nothing_to_finish_the_first_signal_leaves_at_once(
    programs, files, whole, tmp_path
):
    for number, code in CODES.items():
        patch = signals_at("Checkpoint, 'params', 1", number)
        done = programs.run("train.py", "sft", patch=patch, **training(files, tmp_path / "a"))
        assert done.code == code and "stopp" not in done.stderr
        assert not list((tmp_path / "a" / "checkpoints").glob("step-*"))
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    options = training(files, run, export=True, resume=True)
    patch = signals_at("trainers.runs.export, 'save_checkpoint', 1", TERM)
    assert programs.run("train.py", "sft", patch=patch, **options).code == 75
    assert not (run / "export").exists()
    assert_same_run(run, whole)


# Kills ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.covers("D16", "D24")
@pytest.mark.parametrize("step", [0, 1, 3, STEPS])
def test_killed_at_a_step_and_gone_on_with(programs, files, whole, tmp_path, step):
    options = training(files, tmp_path)
    # A step takes a millisecond: without a pause the run would be over before it is killed.
    slow = "import time, trainers.loop\nfor n in range(1, 9):\n"
    slow += "    at(trainers.loop._Run, '_save', n, lambda: time.sleep(0.2))\n"
    pid, wait = programs.start("train.py", "sft", patch=slow, **options)
    wait_for_lines(tmp_path, step, pid)
    time.sleep(0.05 * step)
    os.kill(pid, signal.SIGKILL)
    assert wait().code == -signal.SIGKILL
    saved = list((tmp_path / "checkpoints").glob("step-*"))
    assert len(saved) > 0 or step < 3
    if not saved and list((tmp_path / "checkpoints").glob(".step-*")):
        # Killed in the very first save: nothing is there, and that is not passed over in silence.
        check_error(programs.run("train.py", "sft", **options), 6, "no complete checkpoint, only")
        shutil.rmtree(tmp_path / "checkpoints")
    done = programs.run("train.py", "sft", **options, resume=bool(saved))
    assert done.code == 0, done.stderr
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.covers("D16")
def test_killed_at_random_times_again_and_again(programs, files, whole, tmp_path):
    options, rng, kills = training(files, tmp_path), random.Random(0), 0
    while kills < 4:
        saved = bool(list((tmp_path / "checkpoints").glob("step-*")))
        before = len(curve(tmp_path)) if (tmp_path / "metrics.jsonl").exists() else 0
        pid, wait = programs.start("train.py", "sft", **options, resume=saved)
        wait_for_lines(tmp_path, before + 1, pid)
        time.sleep(rng.expovariate(50))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        if wait().code == 0:
            break
        kills += 1
        if not list((tmp_path / "checkpoints").glob("step-*")):
            shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
    saved = bool(list((tmp_path / "checkpoints").glob("step-*")))
    done = programs.run("train.py", "sft", **options, resume=saved)
    assert kills and done.code == 0, done.stderr
    assert_same_run(tmp_path, whole)


# evaluate.py ------------------------------------------------------------------------------------


def perplexity(data: Path) -> tuple[float, int]:
    """(perplexity, targets) of the answers of a conversation's file, by transformers' own model."""
    model = AutoModelForCausalLM.from_pretrained(cli.checkpoint(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(cli.checkpoint())
    total, count = 0.0, 0
    for line in data.read_text().splitlines():
        question, answer = (m["content"] for m in json.loads(line)["messages"])
        head = f"<s><|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        head, tail = (
            tokenizer(text, add_special_tokens=False).input_ids
            for text in (head, answer + "<|im_end|>")
        )
        with torch.no_grad():
            logits = model(torch.tensor([head + tail])).logits[0, len(head) - 1 : -1]
        chosen = logits.double().log_softmax(-1)[range(len(tail)), tail]
        total, count = total - chosen.sum().item(), count + len(tail)
    return math.exp(total / count), count


@pytest.mark.slow
@pytest.mark.covers("R33")
def test_the_perplexity_is_that_of_transformers_however_it_is_batched(programs, files):
    expected, count = perplexity(files / "train.jsonl")
    options = dict(data=files / "train.jsonl", ckpt_dir=cli.checkpoint(), json=True)
    for more in (
        dict(batch_size=5, seq_len=100),
        dict(packing=True, seq_len=130, batch_size=3),
    ):
        done = programs.run("evaluate.py", "ppl", **options, **more)
        assert done.code == 0 and done.stderr == "", done.stderr
        found = json.loads(done.stdout)
        assert found["targets"] == found["counts"]["targets"] == count
        assert abs(found["perplexity"] / expected - 1) < 1e-4, more
        assert abs(found["loss"] - math.log(expected)) < 1e-4, more
    # Each token is scored once, in windows too, unless a flag cuts the rows.
    for more, text in (
        (dict(), r"in windows\)"),
        (dict(overlong="truncate"), r"; (\d+) tokens of "),
    ):
        done = programs.run("evaluate.py", "ppl", **options | dict(json=False, seq_len=40) | more)
        assert done.code == 0, done.stderr
        tokens = int(re.search(r"over (\d+) tokens of \d+ examples", done.stdout)[1])
        left_out = re.search(text, done.stdout)
        assert tokens + int((left_out.groups() or (0,))[0]) == count
    done = programs.run("evaluate.py", "ppl", **options | dict(json=False))
    said = re.fullmatch(
        r"perplexity ([\d.]+), loss ([\d.]+) nats, accuracy [\d.]+%, over (\d+) tokens of 14 examples\n",
        done.stdout,
    )
    np.testing.assert_allclose(
        [float(x) for x in said.groups()], [expected, math.log(expected), count], 1e-4
    )


@pytest.mark.covers("C5", "A34")
def test_what_is_wrong_with_an_evaluation_is_one_line(programs, files, tmp_path):
    options = dict(data=files / "train.jsonl", ckpt_dir=cli.checkpoint())
    for more, code, pattern in (
        (
            dict(seq_len=1, batch_size=0, mask="some"),
            2,
            "--seq_len .*got 1; --batch_size .*got 0; --mask .*got 'some'",
        ),
        (dict(dtype="int8"), 2, "int8"),
        (dict(chat_format="alpaca"), 2, "alpaca"),
        (dict(ckpt_dir=tmp_path / "none"), 3, "none"),
        (dict(ckpt_dir=tmp_path), 3, "checkpoint"),
        (dict(tokenizer_path=tmp_path / "none"), 3, "none"),
    ):
        done = programs.run("evaluate.py", "ppl", **options | more)
        check_error(done, code, pattern)
        assert done.stdout == ""


@pytest.mark.covers("C12")
def test_an_evaluation_whose_reader_is_gone_or_whose_disk_is_full(programs, files):
    options = dict(data=files / "train.jsonl", ckpt_dir=cli.checkpoint())
    reader, writer = os.pipe()
    os.close(reader)
    args = flags(options)
    done = cli.run("evaluate.py", "ppl", *args, stdout=writer, timeout=600)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
    done = programs.run("evaluate.py", "ppl", **options, stdout="/dev/full")
    check_error(done, 1, "No space left on device")


@pytest.mark.covers("C11")
def test_ctrl_c_ends_an_evaluation_at_once(programs, files):
    patch = "import signal, evaluate\nat(evaluate, '_reported', 1, lambda: send(signal.SIGINT))\n"
    options = dict(data=files / "train.jsonl", ckpt_dir=cli.checkpoint())
    done = programs.run("evaluate.py", "ppl", patch=patch, **options)
    assert (done.code, done.stdout, done.stderr) == (130, "", "")
