"""GRPO on sums with a model so small that a step takes milliseconds, for tests of what is around it."""

import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax

from examples.arithmetic import MODEL, make_tokenizer
from models.llama.model import LLaMa, init_params
from tests import tiny
from tests.grpo_rewards import even, ones
from trainers.grpo_trainer import GRPOConfig, GRPOTrainer
from trainers.on_policy import RolloutData
from trainers.rewards.functions import Reward
from trainers.rewards.pool import RewardPool
from trainers.rewards.tasks import Task
from trainers.rollout import Prompt, RolloutConfig

LENGTH = 8


REWARDS = (Reward(name="ones", function=ones), Reward(name="even", function=even, weight=0.5))


@functools.cache
def tokenizer():
    """That of the sums."""
    folder = tiny.cache_dir() / "sums"
    folder.mkdir()
    return make_tokenizer(folder)


def task(count: int = 10, rewards=REWARDS) -> Task:
    """Prompts of several lengths; answer i of prompt i."""
    draw = random.Random(0)
    texts = ["".join(draw.choices("0123456789", k=1 + i % 5)) + "=" for i in range(count)]
    ids = [tuple(tokenizer().encode(text, bos=True)) for text in texts]
    prompts = [Prompt(text=text, ids=ids[i], columns={"answer": i}) for i, text in enumerate(texts)]
    return Task(name="sums", prompts=tuple(prompts), rewards=tuple(rewards))


def trainer(lora=None, dtype=None, **config) -> GRPOTrainer:
    """A trainer; equal ones share their compiled programs, so change little."""
    known = dict(learning_rate=0.01, schedule="constant", max_steps=4, max_completion_len=LENGTH)
    limit = tokenizer().vocab_size
    return GRPOTrainer(LLaMa(MODEL, dtype), GRPOConfig(**known | config), lora, limit)


@functools.cache
def _params():
    return init_params(MODEL, jax.random.key(0))


def start(of: GRPOTrainer):
    """(state, frozen), always the same."""
    return of.init(_params(), jax.random.key(1))


@contextmanager
def sampler(
    of: GRPOTrainer, asked: Task | None = None, write: Callable | None = None, **config
) -> Iterator[RolloutData]:
    """RolloutData with its pool of rewards."""
    asked = asked or task()
    known = dict(prompts_per_step=4, group_size=4)
    with RewardPool(asked.rewards, timeout=20) as pool:
        settings = RolloutConfig(**known | config)
        yield RolloutData(of, settings, asked.prompts, tokenizer(), pool, write)
