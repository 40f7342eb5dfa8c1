"""From a JSON Lines file to a default model that answers as trained, by the commands of the README."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.sft_json import conversations

ROOT = Path(__file__).parents[1]


def run(*command: str) -> str:
    """stdout of a program of the repository that must succeed."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def answers(prompts: Path, *flags: str) -> list[str]:
    out = run("generate.py", "--chat", "--prompts_file", str(prompts), *flags, "--json")
    return [json.loads(line)["text"] for line in out.splitlines()]


@pytest.mark.slow
@pytest.mark.covers("D31")
def test_the_export_answers_as_trained(tmp_path):
    rows, held_out = conversations(160, 8)
    data, prompts, out = tmp_path / "data.jsonl", tmp_path / "prompts.txt", tmp_path / "run"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts.write_text("".join(row["messages"][0]["content"] + "\n" for row in held_out))
    wanted = [row["messages"][1]["content"] for row in held_out]
    greedy = ("--temperature", "0", "--max_gen_len", "40")
    exact = lambda texts: sum(a == b for a, b in zip(texts, wanted, strict=True)) / len(wanted)
    assert exact(answers(prompts, *greedy)) < 0.1

    settings = "--lora_rank 16 --lr 1e-3 --warmup_steps 2 --max_steps 14 --save_every 5"
    flags = f"--data {data} --out_dir {out} --seq_len 80 {settings}".split()
    run("train.py", "sft", *flags)
    export = str(out / "export")
    ours = answers(prompts, *greedy, "--ckpt_dir", export)
    assert exact(ours) > 0.9
    losses = [json.loads(x)["loss"] for x in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 14 and losses[-1] < 0.1 * losses[0]

    tokenizer = AutoTokenizer.from_pretrained(export)
    model = AutoModelForCausalLM.from_pretrained(export)
    ids = tokenizer.apply_chat_template(
        held_out[0]["messages"][:1], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    theirs = model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(theirs, skip_special_tokens=True) == ours[0]
