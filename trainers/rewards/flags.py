"""Flags that name a task, for the command lines."""

import dataclasses
import functools
from datetime import datetime
from typing import Any, ClassVar

from models.llama.chat_format import TemplateFlags
from models.llama.tokenizer import Tokenizer
from trainers.rewards.functions import Reward, load_reward
from trainers.rewards.tasks import PromptEncoder, Task, load_prompts, load_task
from utils.errors import ConfigError
from utils.fields import Config, again, field, integer, number
from utils.files import parse_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskFlags(Config):
    """Flags that name a task: one of reasoning_gym, or a file of prompts with rewards."""

    needs_reward: ClassVar[bool] = True
    task: str | None = field(
        None, "reasoning_gym:NAME, for example reasoning_gym:chain_sum; `list`: only names them all"
    )
    task_args: str | None = field(None, "JSON object with the task's own arguments")
    data: str | None = field(
        None,
        'instead of a task: a .jsonl, .jsonl.gz or .parquet file of {"prompt": …}; its other fields are '
        "columns for the rewards",
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
    reward_timeout: float = field(60.0, "seconds that a reward may take per batch", number(above=0))

    def problems(self) -> list[str]:
        out = super().problems()
        if (self.task is None) == (self.data is None):
            out.append("pass either --task or --data")
        elif (self.data is None) != (self.reward is None) and (self.reward or self.needs_reward):
            out.append("--data needs --reward (a --task brings its own rewards)")
        if self.task is None and self.task_args is not None:
            out.append("--task_args needs a --task")
        for name in ("args", "rewards"):
            try:
                getattr(self, name)
            except ConfigError as e:
                out.append(str(e))
        return out

    @functools.cached_property
    def args(self) -> dict[str, Any] | None:
        """The JSON object of `task_args`."""
        return parse_json(self.task_args.encode(), "--task_args") if self.task_args else None

    @functools.cached_property
    def rewards(self) -> list[Reward]:
        """Rewards named by the flag `reward`."""
        return [load_reward(one.strip()) for one in self.reward.split(",")] if self.reward else []

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
        """The task's prompts as `load_task` and `load_prompts` make them; `data` is another file."""
        template = dict(template_args=self.template_args, moment=moment)
        encode = PromptEncoder(tokenizer, self.chat, self.system, self.chat_format, **template)
        if self.task is None:
            path = data or self.data
            task = load_prompts(path, encode, self.rewards, skip_bad=skip_bad)
        else:
            sizes = dict(size=size, seed=seed, exclude=exclude)
            task = load_task(self.task, encode, args=self.args, **sizes)
        return task if self.max_prompt_len is None else task.within(self.max_prompt_len)
