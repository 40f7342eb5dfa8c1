"""Episodes: conversations of a model with an environment, and their limits."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

from models.llama.chat.messages import Message
from trainers.rollout import Prompt
from utils.fields import CONFIG, Config, field, integer


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpisodeConfig(Config):
    """Limits of an episode, next to those of its tokens: `max_completion_len` counts all turns."""

    max_turns: int = field(8, "answers of the model per episode", integer(1), resume=CONFIG)
    max_turn_len: int | None = field(
        None, "tokens per answer; default: max_completion_len", integer(1), resume=CONFIG
    )


@dataclasses.dataclass(kw_only=True)
class Turn:
    """An assistant's turn, and what the environment did with it.

    Attributes:
        start, end: its place among the episode's ids.
        message: what it says.
        reward: what the environment gave for it, or None.
        answers: the environment's messages.
    """

    start: int
    end: int
    message: Message
    reward: float | None = None
    answers: list[Message] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(kw_only=True)
class Played:
    """An episode so far.

    Attributes:
        prompt: its first messages, and their ids.
        ids: all ids after the prompt: what was sampled, and what the environment said between.
        sampled: whether each of them was.
        logprobs: the sampler's; 0 at the environment's.
        turns: in their order.
        done: whether the environment ended it.
        cut: whether its last turn has no stop token.
        failed: what the environment failed with, or None.
        calls, errors: tool calls, and those among them that were answered by an error.
    """

    prompt: Prompt
    ids: list[int] = dataclasses.field(default_factory=list)
    sampled: list[bool] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    turns: list[Turn] = dataclasses.field(default_factory=list)
    done: bool = False
    cut: bool = False
    failed: str | None = None
    calls: int = 0
    errors: int = 0

    @property
    def reward(self) -> float:
        """The sum of its turns' rewards; NaN if it is unscorable.

        Without any reward it is 0 where a limit ended it, and unscorable where the environment did.
        """
        given = [turn.reward for turn in self.turns if turn.reward is not None]
        if self.failed is not None or (self.done and not given):
            return math.nan
        return float(sum(given))

    @property
    def stopped(self) -> bool:
        """Whether it ended by itself, and not at a limit."""
        return self.done and not self.cut

    @property
    def messages(self) -> list[Message]:
        """The whole conversation."""
        after = (message for turn in self.turns for message in (turn.message, *turn.answers))
        return [*self.prompt.messages, *after]

    @property
    def text(self) -> str:
        """The conversation after the prompt, with the roles of others, for people."""
        said = self.messages[len(self.prompt.messages) :]
        return "\n".join(f"[{m['role']}] " * (m["role"] != "assistant") + _shown(m) for m in said)

    @property
    def record(self) -> dict[str, Any]:
        """The episode as rollouts.jsonl has it, beside its ids."""
        turns = [dataclasses.asdict(turn) for turn in self.turns]
        failed = {} if self.failed is None else {"failed": self.failed}
        return {"turns": turns, "calls": self.calls, "call_errors": self.errors} | failed

    def add(self, ids: Sequence[int], logprobs: Sequence[float] | None = None) -> None:
        """Appends ids; with their log-probs if they were sampled."""
        self.ids += ids
        self.sampled += [logprobs is not None] * len(ids)
        self.logprobs += [0.0] * len(ids) if logprobs is None else logprobs


def _shown(message: Message) -> str:
    calls = (call["function"] for call in message.get("tool_calls", ()))
    called = (f"{call['name']}({json.dumps(call['arguments'])})" for call in calls)
    return " ".join(filter(None, (message["content"], *called)))
