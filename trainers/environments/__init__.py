"""Environments: what a model talks to for several turns, and what it is rewarded for.

This module imports nothing heavy: environments run in processes of their own.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
Example = Mapping[str, Any]
Answer = tuple[Sequence[Message], float | None, bool]


class Environment:
    """One episode of a task: answers an assistant's messages until it is done.

    A subclass is made once per run, with `--env_args` as keyword arguments. Each episode then gets
    a copy of that instance, in a process of its own, so it may keep its state in attributes.
    Python's and numpy's random numbers are seeded per episode; threads belong into `reset`.

    Attributes:
        tools: functions that the model may call, with type hints and docstrings, and methods too.
            An assistant's message that calls some is answered by their results, and `step` is not
            asked about it.
        answers_calls: `step` gets the messages with `tool_calls` too, and answers them itself;
            `tools` may then be JSON schemas of functions.
    """

    tools: Sequence[Callable[..., Any] | Mapping[str, Any]] = ()
    answers_calls: bool = False

    def examples(self, size: int, seed: int) -> Sequence[Example]:
        """The tasks of a run that has no `--data`: `size` JSON objects, the same for the same seed."""
        raise NotImplementedError("has no examples of its own; pass --data FILE")

    def reset(self, example: Example) -> Sequence[Message]:
        """Starts an episode: its first messages, of which the last one is not the assistant's.

        They depend on the example alone: the episodes of a group share them. It may be called again.

        Args:
            example: one of `examples`, or a row of `--data`.
        """
        raise NotImplementedError

    def step(self, message: Message) -> Answer:
        """Answers the assistant's message.

        Args:
            message: {"role": "assistant", "content": its text}; cut at a limit, it is the last one.

        Returns:
            (messages that follow, none if done; a reward for this turn, or None; whether the episode
            is done). The episode's reward is the sum over its turns.
        """
        raise NotImplementedError
