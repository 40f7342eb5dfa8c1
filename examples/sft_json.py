"""Recipe: the default model learns to answer in a fixed JSON shape, with LoRA, in minutes on a CPU.

    python examples/sft_json.py [loss.png]

A sentence comes in, an object with four fields goes out. No training sentence combines the who,
what and where of a held-out sentence. Prints the share of exactly right answers before and after, and
draws the loss to the file that is named, if one is (matplotlib).
"""

import itertools
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from anywhere

from generate import generate
from models.llama.chat_format import chat_format_for
from models.llama.decoding import GenerationConfig
from models.llama.hub import resolve
from models.llama.load import load_checkpoint
from models.llama.lora import LoRAConfig
from models.llama.model import LLaMa, for_decoding
from models.llama.tokenizer import load_tokenizer
from trainers.data import DataConfig, load_dataset
from trainers.loop import fit
from trainers.runs.metrics import MetricsLog
from trainers.sft_trainer import SFTConfig, SFTTrainer
from utils.console.steps import StepTable

WORDS = (
    "Ada Ben Carla David Emma Felix Grace Henry Ines Jonas Karin Liam Mona Noah".split(),
    "apples boats candles drums eggs forks gloves hats jars keys lamps maps nails".split(),
    "Lima Oslo Cairo Paris Delhi Quito Rome Tokyo Berlin Accra Dublin Hanoi".split(),
)
SENTENCES = (
    "{who} bought {count} {what} in {where}.",
    "In {where}, {who} found {count} {what}.",
    "{count} {what} were sent to {who} in {where}.",
    "Yesterday {who} sold {count} {what} to a shop in {where}.",
)


def conversations(n_train: int, n_held_out: int) -> tuple[list[dict], list[dict]]:
    """Sentences with their answers: (for training, held out)."""
    draw = random.Random(0)
    triples = list(itertools.product(*WORDS))
    draw.shuffle(triples)
    rows = []
    for who, what, where in triples[: n_train + n_held_out]:
        facts = {"who": who, "count": draw.randint(2, 99), "what": what, "where": where}
        question = {"role": "user", "content": draw.choice(SENTENCES).format(**facts)}
        answer = {"role": "assistant", "content": json.dumps(facts)}
        rows.append({"messages": [question, answer]})
    return rows[:n_train], rows[n_train:]


def exact_match(llama, params, tokenizer, rows: list[dict]) -> float:
    """Share of rows that greedy decoding answers exactly."""
    form = chat_format_for(tokenizer)
    prompts = [form.encode_chat(row["messages"][:1]) for row in rows]
    config = GenerationConfig(max_new_tokens=40, stop_ids=tokenizer.stop_ids)
    done = generate(llama, for_decoding(params), prompts, config=config)
    answers = [done.text(i, tokenizer) for i in range(len(rows))]
    return sum(a == r["messages"][1]["content"] for a, r in zip(answers, rows)) / len(rows)


def run(
    folder: Path, *, n_train: int = 600, n_held_out: int = 50, seed: int = 0, **settings
) -> tuple[float, float]:
    """Exact match (before, after) training; the folder keeps metrics.jsonl.

    Args:
        n_train, n_held_out: sentences.
        settings: of SFTConfig, instead of those here.
    """
    path = resolve("smollm2-135m-instruct")
    model_config, params = load_checkpoint(path, dtype="float32")
    tokenizer, llama = load_tokenizer(path), LLaMa(model_config)
    rows, held_out = conversations(n_train, n_held_out)
    before = exact_match(llama, params, tokenizer, held_out)

    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = load_dataset(data, tokenizer, DataConfig(seq_len=80, batch_size=8, seed=seed))
    config = SFTConfig(**dict(learning_rate=5e-4, warmup_steps=4, max_steps=40) | settings)
    trainer = SFTTrainer(LLaMa(model_config, remat="dots"), config, LoRAConfig(rank=16))
    state, frozen = trainer.init(params, jax.random.key(seed))
    with (
        StepTable(config.max_steps) as table,
        MetricsLog(folder, sinks=[table], watch=table.watch) as log,
    ):
        state, _ = fit(trainer, state, frozen, dataset, log=log)
    after = exact_match(llama, trainer.export_params(state, frozen), tokenizer, held_out)
    return before, after


def draw(folder: Path, to: Path) -> None:
    """Draws the loss by step, from metrics.jsonl."""
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    plt.figure(figsize=(6, 3))
    plt.plot([line["step"] for line in lines], [line["loss"] for line in lines])
    plt.xlabel("step")
    plt.ylabel("loss, nats per token")
    plt.yscale("log")
    plt.tight_layout()
    plt.savefig(to, dpi=120)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        start = time.monotonic()
        before, after = run(Path(temporary))
        print(
            f"exact match {before:.0%} before, {after:.0%} after, {time.monotonic() - start:.0f} s"
        )
        if sys.argv[1:]:
            draw(Path(temporary), Path(sys.argv[1]))
