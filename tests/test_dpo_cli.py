"""train.py dpo as a program: a run with all that runs have, gone on with, exported, and what it refuses."""

import json
import random

import jax.numpy as jnp
import numpy as np
import pytest

from models.llama.load import load_checkpoint
from tests import cli
from tests.programs import check_error
from tests.small_runs import curve

SMALL = dict(batch_size=4, micro_batch_size=2, seq_len=96, max_steps=6, lr=0.01, eval_every=3)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Pairs of which the shorter answer is chosen."""
    folder, rng = tmp_path_factory.mktemp("pairs"), random.Random(0)
    say = lambda role, n: {"role": role, "content": "".join(rng.choices("abcdefgh", k=n))}
    for name, count in (("train", 12), ("eval", 6)):
        prompts = [say("user", rng.randint(2, 9)) for _ in range(count)]
        sides = lambda asked: {
            k: [asked, say("assistant", n)] for k, n in (("chosen", 3), ("rejected", 9))
        }
        rows = [json.dumps(sides(asked)) for asked in prompts]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.mark.slow
def test_a_run_learns_goes_on_and_is_exported(programs, files, tmp_path):
    """A base in eight bits under adapters, whose log-probs are computed once."""
    options = dict(lora_rank=4, quantize="int8", precompute_reference=True)
    run, known = tmp_path / "run", dict(data=files / "train.jsonl", eval_data=files / "eval.jsonl")
    known |= SMALL | dict(out_dir=run, ckpt_dir=cli.checkpoint(), save_every=2) | options
    done = programs.run("train.py", "dpo", **known)
    assert done.code == 0, done.stderr
    assert "12 examples" in done.stderr and "margin" in done.stderr
    lines = curve(run)
    assert lines[-1]["accuracy"] > 0.8 and lines[-1]["eval_accuracy"] > 0.8
    assert lines[-1]["loss"] < lines[0]["loss"] and np.isfinite(lines[-1]["eval_margin"])
    config, params = load_checkpoint(run / "export", dtype=jnp.float32)
    assert params["embed"].shape[0] == config.vocab_size
    # From the middle it comes to the same end.
    again = programs.run("train.py", "dpo", **known | dict(resume_step=4))
    assert again.code == 0 and curve(run) == lines, again.stderr
    done = programs.run("train.py", "export", run=run, out=tmp_path / "out")
    assert done.code == 0, done.stderr
    ours, theirs = (path / "model.safetensors" for path in (tmp_path / "out", run / "export"))
    assert ours.read_bytes() == theirs.read_bytes()
    # Trained on, the reference is the adapter too: nothing is preferred before the first step.
    del known["lora_rank"]
    for options in (dict(precompute_reference=False), dict(loss="ipo")):
        folder = tmp_path / f"more{len(options)}{options.get('loss', '')}"
        more = dict(out_dir=folder, adapter=run / "adapter", max_steps=1, export=False, **options)
        done = programs.run("train.py", "dpo", **known | more)
        assert done.code == 0 and "LoRA rank 4" in done.stderr, done.stderr
        first, last = curve(folder)[0], curve(folder)[-1]
        assert first["accuracy"] == 0.5 and abs(first["margin"]) < 1e-5 and first["kl"] < 1e-8
        assert last["logp_chosen"] > lines[0]["logp_chosen"]
    known |= dict(lora_rank=4)
    wrong = dict(resume_step=4, beta=0.7, seq_len=95)
    check_error(programs.run("train.py", "dpo", **known | wrong), 2, "--beta", "--seq_len 96 → 95")
