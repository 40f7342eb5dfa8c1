"""Distillation as a user runs it: what a teacher may be, and resuming to the bit."""

import json
import types

import pytest

from tests import cli
from tests.programs import assert_same_run, check_error
from tests.test_grpo_cli import STEPS, prompts, training
from trainers.distill_trainer import SoftTeacherFlags, Teacher, check_tokenizers
from train import GRPOTaskFlags, PromptFlags
from utils.errors import ConfigError


def tokens(*texts, **special):
    """As much of a tokenizer as is compared."""
    return types.SimpleNamespace(
        vocab_size=len(texts), token_bytes=lambda i: texts[i], special_tokens=special
    )


@pytest.mark.covers("T1")
@pytest.mark.parametrize(
    "teacher, found",
    [
        (tokens(b"a", b"b", end=1), "number of tokens 2, the model's 3"),
        (tokens(b"a", b"c", b"x", end=2), "token 1 b'c', the model's b'b'"),
        (
            tokens(b"a", b"b", b"x", end=2, start=0),
            r"control token \('start', 0\), the .* \('end', 2",
        ),
        (tokens(b"a", b"b", b"x"), r"control token \('none is left', None\), the .* \('end', 2"),
    ],
)
def test_a_teacher_that_reads_other_ids_is_refused(teacher, found):
    student = tokens(b"a", b"b", b"x", end=2)
    check_tokenizers(student, tokens(b"a", b"b", b"x", end=2), "big")
    with pytest.raises(ConfigError, match=f"the teacher big has another tokenizer: {found}"):
        check_tokenizers(student, teacher, "big")


@pytest.mark.covers("T2")
@pytest.mark.parametrize("rows, limit", [(10, None), (8, 8), (12, 10)])
def test_only_ids_that_both_have_rows_for_have_a_probability(rows, limit):
    config = types.SimpleNamespace(vocab_size=rows)
    teacher = types.SimpleNamespace(checkpoint=types.SimpleNamespace(config=config))
    assert Teacher.vocab_limit(teacher, 10) == limit


@pytest.mark.covers("T4")
def test_eight_bits_without_a_teacher_are_refused():
    with pytest.raises(ConfigError, match="teacher_quantize needs a teacher"):
        SoftTeacherFlags(teacher_quantize="int8")


@pytest.mark.covers("T6")
def test_prompts_of_a_file_need_a_reward_only_where_something_is_scored():
    assert PromptFlags(data="prompts.jsonl").rewards == []
    for flags, problem in (
        (dict(data="x", eval_data="y"), "--eval_data needs --reward"),
        (dict(task="reasoning_gym:chain_sum", reward="number"), "--data needs --reward"),
    ):
        with pytest.raises(ConfigError, match=problem):
            PromptFlags(**flags)
    with pytest.raises(ConfigError, match="--data needs --reward"):
        GRPOTaskFlags(data="prompts.jsonl")


# --- Programs ---


def distilling(prompts, out_dir, **options):
    known = training(prompts, out_dir, **dict(teacher=cli.checkpoint(layers=2)) | options)
    del known["beta"], known["reward"]
    return known


@pytest.mark.slow
@pytest.mark.covers("T3", "T5")
def test_a_run_goes_on_to_the_same_bits_with_its_own_teacher_alone(programs, prompts, tmp_path):
    run = lambda folder, **flags: programs.run(
        "train.py", "distill", **distilling(prompts, tmp_path / folder, **flags)
    )
    assert (done := run("whole")).code == 0, done.stderr
    assert "teacher 5" in done.stderr  # 534 kB: its bytes are planned
    record = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"kl", "truncated"} <= record.keys() and not [k for k in record if "reward" in k]
    assert (done := run("parts", max_steps=2)).code == 0, done.stderr
    again = dict(max_steps=STEPS, resume=True)
    check_error(
        run("parts", **again | dict(teacher=cli.checkpoint())), 2, "--teacher .* start anew"
    )
    check_error(run("parts", **again, teacher_quantize="int8"), 2, "--teacher_quantize null → ")
    assert (done := run("parts", **again)).code == 0, done.stderr
    assert_same_run(tmp_path / "parts", tmp_path / "whole", STEPS)
    replayed = programs.run("train.py", "replay", run=tmp_path / "whole", step=2)
    check_error(replayed, 2, "is not a run of `train.py grpo`")
    long = run("long", max_completion_len=300)
    check_error(long, 2, "exceed the model's context of 256")
