"""Environments and a model so small that an episode takes milliseconds, for tests."""

import dataclasses
import functools
from pathlib import Path

import jax

from examples import guess
from examples.arithmetic import MODEL
from models.llama.load import save_checkpoint
from models.llama.model import LLaMa, for_decoding, init_params
from tests import tiny
from trainers.environments.episodes import EpisodeConfig
from trainers.environments.player import Player
from trainers.environments.process import EnvironmentServer, EnvironmentSpec
from trainers.rewards.tasks import PromptEncoder, Task, load_episodes


@functools.cache
def tokenizer():
    """The guessing game's."""
    return guess.make_tokenizer(folder())


def folder() -> Path:
    """Where its files are."""
    path = tiny.cache_dir() / "games"
    path.mkdir(exist_ok=True)
    return path


@functools.cache
def model():
    """(the model, its parameters, those for decoding)."""
    params = init_params(MODEL, jax.random.key(0))
    return LLaMa(MODEL), params, for_decoding(params)


@functools.cache
def checkpoint() -> Path:
    """The model and its tokenizer as a checkpoint; random weights say a stop token once in a while."""
    path = tiny.cache_dir() / "talker"
    config = dataclasses.replace(MODEL, max_seq_len=128)
    save_checkpoint(path, config, model()[1], tokenizer=tokenizer() and folder())
    return path


def training(out_dir: Path, **options: object) -> dict[str, object]:
    """Flags of a short run of `train.py grpo` on a chat of three turns."""
    known = dict(env="tests.talkers:Chatter", env_args='{"low": 2}', out_dir=out_dir, export=False)
    known |= dict(ckpt_dir=checkpoint(), max_steps=4, prompts_per_step=3, group_size=4)
    known |= dict(max_completion_len=64, max_turn_len=8, max_turns=3, save_every=1)
    return known | dict(lr=0.01, task_size=20) | options


def task(make, size: int = 6, timeout: float = 20, system: str | None = None, **args) -> Task:
    """Examples of an environment's class."""
    server = EnvironmentServer(EnvironmentSpec(name="m:E", make=make, args=args), timeout)
    return load_episodes(server, PromptEncoder(tokenizer(), system=system), size=size, seed=0)


def player(make, max_turns: int = 4, max_turn_len: int | None = 3, on_failure="unscorable", **args):
    """(a task, its Player, to be closed)."""
    asked = task(make, **args)
    limits = EpisodeConfig(max_turns=max_turns, max_turn_len=max_turn_len)
    return asked, Player(asked, limits, on_failure)
