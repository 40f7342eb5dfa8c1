"""Flags that name a task, for the command lines."""

import dataclasses
import functools
from datetime import datetime
from typing import Any, ClassVar

from models.llama.chat_format import TemplateFlags
from models.llama.tokenizer import Tokenizer
from trainers.environments.episodes import EpisodeConfig
from trainers.environments.process import EnvironmentServer, load_environment
from trainers.rewards.functions import Reward, load_reward
from trainers.rewards.tasks import PromptEncoder, Task, load_episodes, load_prompts, load_task
from utils.errors import ConfigError
from utils.fields import Config, again, field, integer, number
from utils.files import parse_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskFlags(Config):
    """Flags that name a task: one of reasoning_gym, a file of prompts with rewards, or an environment."""

    needs_reward: ClassVar[bool] = True
    task: str | None = field(
        None, "reasoning_gym:NAME, for example reasoning_gym:chain_sum; `list`: only names them all"
    )
    task_args: str | None = field(None, "JSON object with the task's own arguments")
    env: str | None = field(
        None,
        "instead of a task: what the model talks to for several turns: module:Class, or a ready-made one "
        "(calculator, guess, search, verifiers)",
    )
    env_args: str | None = field(None, "JSON object with the environment's own arguments")
    max_turns: int = again(EpisodeConfig, "max_turns", 8)
    max_turn_len: int | None = again(EpisodeConfig, "max_turn_len", None)
    data: str | None = field(
        None,
        'instead of a task: a .jsonl, .jsonl.gz or .parquet file of {"prompt": …}; its other fields are '
        "columns for the rewards; of an environment, any objects: its examples",
    )
    reward: str | None = field(
        None,
        "for data: module:function, or a ready-made reward by name, with =0.5 for a weight; several "
        "with commas between",
    )
    chat: bool | None = field(
        None, "prompts are a user's messages; default: if the model has a chat template"
    )
    system: str | None = field(None, "system message")
    chat_format: str | None = again(TemplateFlags, "chat_format", None)
    template_args: str | None = again(TemplateFlags, "template_args", None)
    max_prompt_len: int | None = field(
        None, "leave out prompts of more tokens than this", integer(1)
    )
    max_seq_len: int | None = field(
        None, "the context, prompt and completion; default: the model's", integer(1, 2**31 - 1)
    )
    reward_timeout: float = field(
        60.0,
        "seconds that a reward may take per batch, or an environment per turn",
        number(above=0),
    )

    def problems(self) -> list[str]:
        out = super().problems()
        if (self.task is None) == (self.data is None and self.env is None):
            out.append("pass either --task or --data, or an --env")
        elif self.env is not None:
            out += ["--env rewards by itself: leave out --reward"] * (self.reward is not None)
        elif (self.data is None) != (self.reward is None) and (self.reward or self.needs_reward):
            out.append("--data needs --reward (a --task brings its own rewards)")
        for name in ("task", "env"):
            if getattr(self, name) is None and getattr(self, f"{name}_args") is not None:
                out.append(f"--{name}_args needs a --{name}")
        for name in ("args", "rewards", "server"):
            try:
                getattr(self, name)
            except ConfigError as e:
                out.append(str(e))
        return out

    @property
    def episodes(self) -> EpisodeConfig:
        """The limits of its episodes, if it has an environment."""
        return EpisodeConfig(max_turns=self.max_turns, max_turn_len=self.max_turn_len)

    @functools.cached_property
    def args(self) -> dict[str, Any] | None:
        """The JSON object of `task_args`."""
        return parse_json(self.task_args.encode(), "--task_args") if self.task_args else None

    @functools.cached_property
    def rewards(self) -> list[Reward]:
        """Rewards named by the flag `reward`."""
        return [load_reward(one.strip()) for one in self.reward.split(",")] if self.reward else []

    @functools.cached_property
    def server(self) -> EnvironmentServer | None:
        """The processes of `env`."""
        if self.env is None:
            return None
        args = parse_json(self.env_args.encode(), "--env_args") if self.env_args else {}
        return EnvironmentServer(load_environment(self.env, args), self.reward_timeout)

    def load(
        self,
        tokenizer: Tokenizer,
        *,
        size: int,
        seed: int,
        exclude: Task | None = None,
        skip_bad: int = 0,
        data: str | None = None,
        moment: datetime | None = None,
    ) -> Task:
        """The task as `load_task`, `load_prompts` or `load_episodes` makes it; `data`: another file."""
        template = dict(template_args=self.template_args, moment=moment)
        encode = PromptEncoder(tokenizer, self.chat, self.system, self.chat_format, **template)
        path, sizes = data or self.data, dict(size=size, seed=seed, exclude=exclude)
        if self.server is not None:
            task = load_episodes(self.server, encode, path=path, skip_bad=skip_bad, **sizes)
        elif self.task is None:
            task = load_prompts(path, encode, self.rewards, skip_bad=skip_bad)
        else:
            task = load_task(self.task, encode, args=self.args, **sizes)
        return task if self.max_prompt_len is None else task.within(self.max_prompt_len)
