"""A student learns all that its fine-tuned copy knows, from given rows or from its own samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sampling
from examples.arithmetic import MODEL
from generate import generate
from models.llama.decoding import GenerationConfig
from models.llama.model import LLaMa, for_decoding, init_params
from tests import small_grpo
from trainers.distill_trainer import DistillConfig, DistillTrainer, SamplesConfig, SoftTrainer
from trainers.loop import fit
from trainers.on_policy import RolloutData
from trainers.rewards.pool import RewardPool
from trainers.rollout import Prompt
from trainers.sft_trainer import SFTConfig, SFTTrainer

KNOWN = dict(learning_rate=1e-2, schedule="cosine", micro_batch_size=None)
LLAMA = LLaMa(MODEL)


class Sums:
    """21 sums of two digits, without carries: prompts, whole rows, and who is right on them."""

    def __init__(self):
        of = self.tokenizer = small_grpo.tokenizer()
        sums = [a for a in range(10000) if a // 100 % 10 + a % 10 < 10 > a // 1000 + a // 10 % 10]
        texts = (f"{a // 100:02}+{a % 100:02}={a // 100 + a % 100:02}" for a in sums[::150])
        self.rows = np.array([[*of.encode(text, bos=True), of.eos_id] for text in texts], np.int32)
        self.batch = {"tokens": self.rows, "target_mask": np.tile(np.arange(10) >= 7, (21, 1))}
        ids = (tuple(row[:7].tolist()) for row in self.rows)
        self.prompts = [Prompt(text="", ids=prompt, columns={}) for prompt in ids]

    def accuracy(self, params):
        """The share of greedy completions that are right."""
        of = self.tokenizer
        limits = dict(stop_ids=of.stop_ids, vocab_limit=of.vocab_size)
        config = GenerationConfig(max_new_tokens=3, **limits)
        ids = [prompt.ids for prompt in self.prompts]
        done = generate(LLAMA, for_decoding(params), ids, sampling.Greedy(), config)
        return np.mean([done.row(i) == row[7:].tolist() for i, row in enumerate(self.rows)])


@pytest.mark.slow
def test_a_student_learns_from_its_fine_tuned_copy():
    sums, base = Sums(), init_params(MODEL, jax.random.key(0))
    tuned = SFTTrainer(LLAMA, SFTConfig(max_steps=80, warmup_steps=5, **KNOWN))
    state, _ = tuned.init(base, jax.random.key(0))
    for step in range(80):
        if step == 15:
            student = jax.tree.map(jnp.copy, state.params)
        state, _ = tuned.train_step(state, {}, sums.batch)
    teacher, limit = state.params, sums.tokenizer.vocab_size
    assert sums.accuracy(base) < 0.1 and sums.accuracy(teacher) == 1

    config = SFTConfig(max_steps=60, warmup_steps=5, **KNOWN)
    given = SoftTrainer(LLAMA, config, None, limit, LLAMA)
    state, frozen = given.init(base, jax.random.key(1))
    for _ in range(60):
        state, _ = given.train_step(state, {**frozen, "teacher": teacher}, sums.batch)
    assert sums.accuracy(state.params) == 1

    assert sums.accuracy(student) < 0.5
    config = KNOWN | dict(learning_rate=3e-3, temperature=2.0, max_completion_len=3)
    config = DistillConfig(max_steps=100, warmup_steps=5, **config)
    own = DistillTrainer(LLAMA, config, None, limit, LLAMA)
    samples = SamplesConfig(prompts_per_step=21, group_size=8)
    state, frozen = own.init(student, jax.random.key(1))
    with RewardPool(()) as pool:
        data = RolloutData(own, samples, sums.prompts, sums.tokenizer, pool)
        state, _ = fit(own, state, {**frozen, "teacher": teacher}, data)
    assert sums.accuracy(state.params) == 1
