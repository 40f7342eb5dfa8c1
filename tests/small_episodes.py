"""Environments and a model so small that an episode takes milliseconds, for tests."""

import functools
from pathlib import Path

import jax

from examples import guess
from examples.arithmetic import MODEL
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


def task(make, size: int = 6, timeout: float = 20, system: str | None = None, **args) -> Task:
    """Examples of an environment's class."""
    server = EnvironmentServer(EnvironmentSpec(name="m:E", make=make, args=args), timeout)
    return load_episodes(server, PromptEncoder(tokenizer(), system=system), size=size, seed=0)


def player(make, max_turns: int = 4, max_turn_len: int | None = 3, on_failure="unscorable", **args):
    """(a task, its Player, to be closed)."""
    asked = task(make, **args)
    limits = EpisodeConfig(max_turns=max_turns, max_turn_len=max_turn_len)
    return asked, Player(asked, limits, on_failure)
