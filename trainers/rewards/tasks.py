"""Tasks: prompts with their rewards, for GRPO to train on and `evaluate.py task` to measure."""

import dataclasses
import difflib
import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from models.llama.chat_format import ChatFormat, chat_format_for
from models.llama.chat.messages import Message, read_messages
from models.llama.chat.tools import fitting
from models.llama.tokenizer import Tokenizer, plain_prompt
from trainers.environments.process import EnvironmentServer
from trainers.records import read_records
from trainers.rewards.functions import ReasoningGym, Reward, ThinkFormat
from trainers.rewards.functions import import_reasoning_gym
from trainers.rollout import Prompt
from utils.errors import ConfigError, DataError, raise_all
from utils.fields import integer

# Arguments of a reward besides the columns.
RESERVED = ("prompts", "completions", "completion_ids")

# In reasoning_gym, item i of seed s is item i - 1 of seed s + 1. Seeds this far apart share no item,
# and still fit numpy's 32 bits.
_SEED_STRIDE = 1 << 20
# Items looked at per prompt wanted, where some are left out.
_TRIES = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Prompts, and the rewards of their completions.

    Attributes:
        name: stands in messages and in the digest.
        prompts: at least one; all have the same columns.
        rewards: their names differ; none: completions are not scored.
        environment: starts what the model talks to for several turns, and is rewarded by; or None.
        tools: schemas of functions that the model may call in it.
        chat: the chat format that wrote the prompts; None if they are texts, which completions
            continue.
        dropped: number of prompts that `within` has left out.
        commit: of a dataset on the hub, else None.
    """

    name: str
    prompts: tuple[Prompt, ...]
    rewards: tuple[Reward, ...]
    environment: EnvironmentServer | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    chat: ChatFormat | None = None
    dropped: int = 0
    commit: str | None = None

    def __post_init__(self) -> None:
        if not self.prompts:
            raise DataError(f"{self.name} has no prompts, expected at least one")
        names = [reward.name for reward in self.rewards]
        if len(set(names)) < len(names):
            raise ConfigError(f"{self.name}: rewards {names}, expected each with another name")

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over the prompts' ids and columns and the names of the task and its rewards."""
        kind = [self.name, [r.name for r in self.rewards], *filter(None, [self.tools])]
        found = hashlib.sha256(repr(tuple(kind)).encode())
        for prompt in self.prompts:
            found.update(repr((list(prompt.ids), sorted(prompt.columns.items()))).encode())
        return found.hexdigest()

    def reader(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer that decodes the completions."""
        return tokenizer.answers if self.chat else tokenizer

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(prompt.ids) for prompt in self.prompts)

    def within(self, limit: int) -> "Task":
        """The task without prompts of more than `limit` tokens. Raises DataError if none is left."""
        kept = tuple(prompt for prompt in self.prompts if len(prompt.ids) <= limit)
        if not kept:
            shortest = min(len(prompt.ids) for prompt in self.prompts)
            raise DataError(
                f"{self.name}: all {len(self.prompts)} prompts have more than {limit} tokens, the "
                f"shortest {shortest}; raise --max_prompt_len"
            )
        return dataclasses.replace(self, prompts=kept, dropped=len(self.prompts) - len(kept))

    @property
    def counted(self) -> str:
        """Numbers of prompts and tokens, to be said."""
        text = f"{len(self.prompts):,} prompts, the longest of {self.longest} tokens"
        return text + f"; {self.dropped:,} longer ones left out" * bool(self.dropped)


@dataclasses.dataclass(frozen=True)
class PromptEncoder:
    """Encodes prompts, each a text or a list of messages.

    Attributes:
        tokenizer: the model's.
        chat: whether a text is a user's message; None: if the model has a chat template. A list of
            messages is always a conversation.
        system: the system message of conversations that have none.
        chat_format: llama2, llama3 or the name of one of the checkpoint's templates.
        template_args: JSON object with variables of the template.
        moment: the time that a template writes as today's; None: now.

    Raises:
        ConfigError: a system message or a chat format without a chat.
    """

    tokenizer: Tokenizer
    chat: bool | None = None
    system: str | None = None
    chat_format: str | None = None
    template_args: str | None = None
    moment: datetime | None = None

    def __post_init__(self) -> None:
        if self.chat is False and self._asked:
            raise ConfigError("system and chat_format need a chat, and chat is off")

    @property
    def _asked(self) -> bool:
        return any(x is not None for x in (self.system, self.chat_format, self.template_args))

    @functools.cached_property
    def _format(self) -> ChatFormat:
        return chat_format_for(self.tokenizer, self.chat_format, self.template_args, self.moment)

    @property
    def used(self) -> ChatFormat | None:
        """The chat format, once a prompt has needed it."""
        return self.__dict__.get("_format")

    @property
    def _is_chat(self) -> bool:
        if self.chat is not None:
            return self.chat
        return self._asked or self.tokenizer.chat_template is not None

    def __call__(
        self,
        prompt: str | Sequence[Message],
        columns: dict[str, Any],
        schemas: Sequence[Mapping[str, Any]] | None = None,
    ) -> Prompt:
        """The prompt's ids; of an episode's, with the schemas of its tools, the messages too.

        Raises DataError for a prompt that has no tokens or that the chat format refuses.
        """
        text, ids, messages = prompt, None, ()
        if isinstance(prompt, str) and not self._is_chat:
            ids = plain_prompt(prompt, self.tokenizer)
        else:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            messages = read_messages(messages, add_generation_prompt=True)
            users = [m["content"] for m in messages if m["role"] == "user"]
            text = users[-1] if users else messages[-1]["content"]
            if self.system is not None and messages[0]["role"] != "system":
                messages = [{"role": "system", "content": self.system}, *messages]
            seen, tools = messages, columns.get("tools")
            if schemas:
                seen, tools = fitting(self._format, messages, schemas)
            ids = self._format.encode_chat(seen, tools=tools)
        if not ids:
            raise DataError("the prompt is empty: it has no token to start from")
        kept = () if schemas is None else tuple(messages)
        return Prompt(text=text, ids=tuple(ids), columns=columns, messages=kept)


def load_task(
    spec: str,
    encode: PromptEncoder,
    *,
    args: dict[str, Any] | None = None,
    size: int = 1000,
    seed: int = 0,
    exclude: Task | None = None,
    weights: Mapping[str, float] | None = None,
) -> Task:
    """A task of reasoning_gym, with its columns `answer` and `entry`.

    Prompts of two seeds are drawn independently, so some may be equal: there are only 200 sums and
    differences of two digits. Load the held-out task first, and pass it as `exclude` when loading the
    training task: both are then the same each time, and have no prompt in common.

    Args:
        spec: `reasoning_gym:NAME`, for example `reasoning_gym:chain_sum`.
        encode: makes the prompts' ids.
        args: the task's arguments in reasoning_gym, for example {"max_terms": 2}.
        size: number of prompts.
        seed: the prompts' seed.
        exclude: a task whose prompts are left out.
        weights: weights of the rewards "strict" (the completion is the answer and nothing else) and
            "lenient" (the answer is taken from it); default: 0.5 each.

    Raises:
        ConfigError: the task is unknown, its arguments are wrong, too few prompts are left, or
            reasoning_gym is not installed.
    """
    weights = {"strict": 0.5, "lenient": 0.5} if weights is None else weights
    _check(size, seed, args, weights)
    args = args or {}
    seen = {prompt.ids for prompt in exclude.prompts} if exclude else set()
    tries = min(_TRIES * size, _SEED_STRIDE) if exclude else size
    prompts: list[Prompt] = []
    for entry in _entries(spec, args, tries, seed * _SEED_STRIDE):
        prompt = encode(entry["question"], {"answer": entry["answer"], "entry": entry})
        if prompt.ids not in seen:
            prompts.append(prompt)
        if len(prompts) == size:
            break
    if len(prompts) < size:
        raise ConfigError(
            f"{spec}: only {len(prompts)} of {tries} items are not among the prompts of "
            f"{exclude.name}, and {size} are asked for; ask for fewer, hold out fewer, or make the "
            "task larger with its arguments"
        )
    name = spec.partition(":")[2]
    rewards = [
        Reward(
            name=kind,
            function=ReasoningGym(task=name, args=args, strict=kind == "strict"),
            weight=weight,
        )
        for kind, weight in weights.items()
    ]
    return Task(name=spec, prompts=tuple(prompts), rewards=tuple(rewards), chat=encode.used)


def load_episodes(
    server: EnvironmentServer,
    encode: PromptEncoder,
    *,
    size: int = 1000,
    seed: int = 0,
    exclude: Task | None = None,
    path: str | os.PathLike | None = None,
    skip_bad: int = 0,
) -> Task:
    """A task of episodes: examples of an environment, or rows of a file, with their first messages.

    Args:
        server: of the environment.
        encode: makes the prompts' ids.
        size, seed: of the environment's own examples, of which there may be fewer.
        exclude: a task whose examples are left out, if there are others.
        path, skip_bad: rows of a file instead, as for `load_prompts`; each is an example.

    Raises:
        ConfigError: the environment has no examples.
        DataError: its first messages are wrong, or a row is.
    """
    if path is None:
        held_out = [dict(prompt.columns) for prompt in exclude.prompts] if exclude else []
        examples = server.examples(size + len(held_out), seed)
        others = [example for example in examples if example not in held_out]
        examples, known = (others or examples)[:size], {"name": server.name}
    else:
        records = read_records(path, kinds=("example",), skip_bad=skip_bad)
        examples = [record.fields for record in records.rows]
        known = {"name": f"{server.name} on {records.path}", "commit": records.commit}
    openings, schemas = server.openings(examples)
    prompts = [encode(*opening, schemas) for opening in zip(openings, examples)]
    known |= {"environment": server, "tools": tuple(schemas)}
    return Task(prompts=tuple(prompts), rewards=(), chat=encode.used, **known)


def task_names() -> list[str]:
    """Every task's name, as `load_task` takes it. Raises ConfigError without reasoning_gym."""
    return [f"reasoning_gym:{name}" for name in sorted(import_reasoning_gym().factory.DATASETS)]


def load_prompts(
    path: str | os.PathLike,
    encode: PromptEncoder,
    rewards: Sequence[Reward],
    *,
    skip_bad: int = 0,
) -> Task:
    """Reads rows of {"prompt": …}, a text or a list of messages; their other fields are columns.

    Args:
        path: as for `read_records`.
        encode: makes the prompts' ids.
        rewards: score the completions.
        skip_bad: number of broken rows, or rows that the chat format refuses, that may be left out.

    Raises:
        DataError: see `read_records`; or a column has the name of another argument of rewards, a
            prompt has no tokens, or there are no rows.
        ArtifactError: the model has no chat format, and needs it.
    """
    records = read_records(path, kinds=("prompt",), skip_bad=skip_bad)
    names = {name for record in records.rows for name in record.fields} - {"prompt"}
    if clash := names.intersection(RESERVED):
        first = next(r for r in records.rows if clash.intersection(r.fields))
        raise DataError(
            f"{first.where}: the field {sorted(clash)[0]!r} has the name of something else that "
            f"rewards are given ({', '.join(RESERVED)}); rename it"
        )
    prompts = []
    for record in records.rows:
        columns = {name: record.fields.get(name) for name in sorted(names)}
        try:
            prompts.append(encode(record.fields["prompt"], columns))
        except DataError as e:
            records.bad.add(DataError(f"{record.where}: {e}"))
    records.bad.check(path)
    rewards = [_as_prompted(reward, prompts[:1], encode.tokenizer) for reward in rewards]
    given = dict(prompts=tuple(prompts), rewards=tuple(rewards), commit=records.commit)
    return Task(name=records.path, chat=encode.used, **given)


def _as_prompted(reward: Reward, first: Sequence[Prompt], tokenizer: Tokenizer) -> Reward:
    """The reward; `think_format` is told whether the chat template opens the thoughts itself."""
    ends = [tokenizer.decode(prompt.ids).rstrip().endswith("<think>") for prompt in first]
    if not isinstance(reward.function, ThinkFormat) or not any(ends):
        return reward
    return dataclasses.replace(reward, function=ThinkFormat(opened=True))


def _check(size: Any, seed: Any, args: Any, weights: Mapping[str, float]) -> None:
    """Raises ConfigError that lists everything wrong with the arguments of load_task."""
    ranges = (("size", size, integer(1, _SEED_STRIDE)), ("seed", seed, integer(0, 2**32 - 1)))
    problems = [
        f"{name} is {value!r:.40}, expected {allowed.expected}"
        for name, value, allowed in ranges
        if not allowed.fits(value)
    ]
    if args is not None and not isinstance(args, dict):
        problems.append(f"task_args is {args!r:.80}, expected an object of names and values")
    if not weights or not set(weights) <= {"strict", "lenient"}:
        problems.append(f"weights of {list(weights)!r:.80}, expected of strict, lenient or both")
    raise_all("task", problems)


def _entries(spec: str, args: dict[str, Any], size: int, seed: int):
    """Yields the items of a task of reasoning_gym, each as its dict. Raises ConfigError."""
    source, _, name = spec.partition(":")
    if source != "reasoning_gym" or not name:
        raise ConfigError(
            f"unknown task {spec!r:.80}; tasks are reasoning_gym:NAME, for example "
            "reasoning_gym:chain_sum"
        )
    gym = import_reasoning_gym()
    if name not in gym.factory.DATASETS:
        close = difflib.get_close_matches(name, gym.factory.DATASETS)
        close = f"did you mean {' or '.join(close)}?" if close else "--task list names them"
        raise ConfigError(f"reasoning_gym has no task {name!r:.80}; {close}")
    if taken := {"name", "size", "seed"}.intersection(args):
        raise ConfigError(f"{sorted(taken)[0]} has a flag of its own; take it out of the task_args")
    known = [f.name for f in dataclasses.fields(gym.factory.DATASETS[name][1])]
    if unknown := [key for key in args if key not in known]:
        listed = ", ".join(key for key in known if key not in ("seed", "size"))
        raise ConfigError(f"{name} has no argument {unknown[0]!r:.80}; it has {listed}")
    try:
        dataset = gym.create_dataset(name, size=size, seed=seed, **args)
        for index in range(size):
            yield dataset[index]
    except Exception as e:  # its configs raise AssertionError, TypeError, ValueError and others
        raise ConfigError(
            f"reasoning_gym cannot make {name} with the arguments {args}: {type(e).__name__}: "
            f"{' '.join(str(e).split())[:300]}"
        ) from e
