"""Recipe: from random weights to sums without a mistake, by fine-tuning and then GRPO, in minutes.

    python examples/arithmetic.py

A tiny Llama with a tokenizer of 14 tokens first learns the form of an answer from examples with
many wrong digits; it then answers as badly as they do. GRPO has only a reward, 1 for a right sum and
0 otherwise, and corrects it. The sums have two numbers of two digits and no carry; held-out sums
are in no training data. Prints the accuracy before and after GRPO.
"""

import json
import random
import sys
import tempfile
import time
from pathlib import Path

import jax
import tokenizers
from tokenizers import models as tokenizer_models
from tokenizers import pre_tokenizers

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from anywhere

from models.llama.config import ModelConfig
from models.llama.model import LLaMa, for_decoding, init_params
from models.llama.tokenizer import Tokenizer, load_tokenizer
from trainers.data import DataConfig, load_dataset
from trainers.grpo_trainer import GRPOConfig, GRPOTrainer
from trainers.loop import fit
from trainers.runs.metrics import MetricsLog
from trainers.on_policy import RolloutData
from trainers.report.rollouts import recorder
from trainers.rewards.accuracy import EvaluationConfig, evaluate_task
from trainers.rewards.functions import load_reward
from trainers.rewards.pool import RewardPool
from trainers.rewards.tasks import PromptEncoder, Task, load_prompts
from trainers.rollout import RolloutConfig
from trainers.sft_trainer import SFTConfig, SFTTrainer

RIGHT = 0.52  # share of right digits in the examples
MODEL = ModelConfig(
    dim=64,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    ffn_dim=192,
    vocab_size=16,
    norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    max_seq_len=32,
    tie_embeddings=True,
    activation="silu",
    attention_bias=False,
    mlp_bias=False,
)


def make_tokenizer(folder: Path) -> Tokenizer:
    """One token per character: digits, + and =, with a start and an end."""
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *"0123456789+="])}
    made = tokenizers.Tokenizer(tokenizer_models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(folder / "tokenizer.json"))
    names = dict(bos_token="<s>", eos_token="</s>", add_bos_token=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return load_tokenizer(folder)


def write_data(folder: Path, seed: int) -> None:
    """examples.jsonl with wrong digits, train.jsonl and held_out.jsonl with prompts and answers."""
    draw = random.Random(seed)
    sums = [
        (a, b) for a in range(100) for b in range(100) if a % 10 + b % 10 < 10 > a // 10 + b // 10
    ]
    draw.shuffle(sums)

    def digit(right: str) -> str:
        return right if draw.random() < RIGHT else draw.choice("0123456789")

    def example(a: int, b: int) -> dict[str, str]:
        completion = "".join(map(digit, f"{a + b:02}"))
        return {"prompt": f"{a:02}+{b:02}=", "completion": completion}

    def prompt(a: int, b: int) -> dict[str, str]:
        return {"prompt": f"{a:02}+{b:02}=", "answer": f"{a + b:02}"}

    held_out, rest = sums[:200], sums[200:]
    for name, rows in (
        ("examples", [example(*s) for s in rest for _ in range(4)]),
        ("train", [prompt(*s) for s in rest]),
        ("held_out", [prompt(*s) for s in held_out]),
    ):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)


def accuracy(llama: LLaMa, params, tokenizer: Tokenizer, task: Task, pool: RewardPool) -> float:
    """The share of right answers, sampled at temperature 1."""
    config = EvaluationConfig(samples=4, max_completion_len=4, batch_size=200)
    found = evaluate_task(llama, for_decoding(params), tokenizer, task, pool, config)
    return found["rewards"]["exact_match"]["mean"]["value"]


def run(
    folder: Path, *, seed: int = 0, sft_steps: int = 280, steps: int = 120
) -> tuple[float, float]:
    """Accuracy on held-out sums (after fine-tuning, after GRPO); the folder keeps both metrics."""
    tokenizer, llama = make_tokenizer(folder), LLaMa(MODEL)
    write_data(folder, seed)
    data = DataConfig(seq_len=16, batch_size=256, seed=seed)
    dataset = load_dataset(folder / "examples.jsonl", tokenizer, data)
    muon = dict(optimizer="muon", learning_rate=1e-2, beta2=0.99, warmup_steps=0)
    sft = SFTTrainer(llama, SFTConfig(micro_batch_size=None, max_steps=sft_steps, **muon))
    state, _ = sft.init(init_params(MODEL, jax.random.key(seed)), jax.random.key(seed))
    with MetricsLog(folder / "sft") as log:
        state, _ = fit(sft, state, {}, dataset, log=log)

    reward, encode = load_reward("exact_match"), PromptEncoder(tokenizer, chat=False)
    train, held_out = (
        load_prompts(folder / f"{name}.jsonl", encode, [reward]) for name in ("train", "held_out")
    )
    trainer = GRPOTrainer(
        llama,
        GRPOConfig(
            learning_rate=1e-3, max_steps=steps, max_completion_len=4, micro_batch_size=None
        ),
        vocab_limit=tokenizer.vocab_size,
    )
    with (
        RewardPool([reward]) as pool,
        MetricsLog(folder) as log,
        MetricsLog(folder, name="rollouts.jsonl") as rollouts,
    ):
        before = accuracy(llama, state.params, tokenizer, held_out, pool)
        config = RolloutConfig(prompts_per_step=64, group_size=8, seed=seed)
        write = recorder(rollouts.write, tokenizer)
        data = RolloutData(trainer, config, train.prompts, tokenizer, pool, write)
        state, frozen = trainer.init(state.params, jax.random.key(seed))
        state, _ = fit(trainer, state, frozen, data, log=log)
        after = accuracy(llama, state.params, tokenizer, held_out, pool)
    return before, after


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        start = time.monotonic()
        before, after = run(Path(temporary))
        print(f"right {before:.0%} before, {after:.0%} after, {time.monotonic() - start:.0f} s")
