"""One GRPO step, from top to bottom: sample, score, compare within the group, update.

    python examples/grpo_step.py

`train.py grpo` does the same with real prompts, rewards in processes of their own, checkpoints and
a log. Left out here: the KL penalty, several updates per rollout, and recovery after a crash.

Dimension key: B prompts, G completions of each (group_size), C completion tokens.
"""

import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from anywhere

from examples.arithmetic import MODEL, make_tokenizer
from generate import GenerationConfig, generate
from models.llama.model import LLaMa, for_decoding, init_params
from sampling import TopP
from trainers.grpo_trainer import GRPOConfig, GRPOTrainer, group_advantages
from trainers.rollout import Layout, Prompt, Rollout

GROUP_SIZE, MAX_COMPLETION_LEN, PROMPT_WIDTH = 8, 4, 16


def reward(text: str) -> float:
    """The share of even digits: random weights learn it within a few steps."""
    return sum(character in "02468" for character in text) / MAX_COMPLETION_LEN


def step(trainer: GRPOTrainer, state, tokenizer, texts: list[str]) -> tuple:
    """One update: (the new state, the mean reward of the completions it learned from, metrics)."""
    # 1. Sample a group of completions of each prompt. The prompt is computed once for its group.
    prompts = [Prompt(text=text, ids=tuple(tokenizer.encode(text)), columns={}) for text in texts]
    done = generate(
        trainer.model,
        for_decoding(state.params),
        [prompt.ids for prompt in prompts],
        TopP(temperature=trainer.config.temperature),
        GenerationConfig(
            max_new_tokens=MAX_COMPLETION_LEN,
            n=GROUP_SIZE,
            stop_ids=tokenizer.stop_ids,
            vocab_limit=tokenizer.vocab_size,
        ),
        key=jax.random.fold_in(state.key, 1),  # each step splits state.key: a new one per rollout
    )
    B, G, C = len(prompts), GROUP_SIZE, MAX_COMPLETION_LEN
    widen = ((0, 0), (0, C - done.tokens.shape[1]))
    tokens_BGC = np.pad(done.tokens, widen).reshape(B, G, C)
    logprobs_BGC = np.pad(done.logprobs, widen).reshape(B, G, C)

    # 2. Score every completion. A reward is any Python function of the text.
    sampled = [done.text(i, tokenizer) for i in range(B * G)]
    rewards_BG = np.array([reward(text) for text in sampled]).reshape(B, G)

    # 3. How much better than its group is each completion?
    everywhere_BG = np.ones((B, G), bool)  # all were scored
    advantages_BG = group_advantages(rewards_BG.astype(np.float32), everywhere_BG, "group")

    # 4. Token in, token out: the ids that were sampled are the ids that are trained on.
    rollout = Rollout(
        prompts=prompts,
        texts=[sampled[i : i + G] for i in range(0, B * G, G)],
        functions=("reward",),
        tokens=tokens_BGC,
        lengths=done.lengths.reshape(B, G),
        stopped=np.array([reason == "stop" for reason in done.finish_reason]).reshape(B, G),
        logprobs=logprobs_BGC,
        scores=rewards_BG[..., None],
        rewards=rewards_BG,
        advantages=np.asarray(advantages_BG),
    )
    batch = rollout.batch(Layout(prompt_width=PROMPT_WIDTH, width=C, branches=G))

    # 5. One clipped policy-gradient step: `GRPOTrainer.loss` in trainers/grpo_trainer.py.
    state, metrics = trainer.train_step(state, {}, batch)
    return state, rewards_BG.mean(), metrics


def run(steps: int = 30) -> list[float]:
    """The mean reward of each step, starting from random weights."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokenizer(Path(folder))
    config = GRPOConfig(
        learning_rate=3e-3, max_steps=steps, max_completion_len=MAX_COMPLETION_LEN, clip_norm=1.0
    )
    trainer = GRPOTrainer(LLaMa(MODEL), config, vocab_limit=tokenizer.vocab_size)
    state, _ = trainer.init(init_params(MODEL, jax.random.key(0)), jax.random.key(1))
    rewards = []
    for _ in range(steps):
        state, mean, metrics = step(trainer, state, tokenizer, ["1+1=", "20+30=", "4+5="] * 4)
        rewards.append(float(mean))
        gap = float(metrics["gap_max"])
        print(f"step {int(state.step):2}  reward {mean:.3f}  sampler-trainer gap {gap:.1e}")
    return rewards


if __name__ == "__main__":
    run()
