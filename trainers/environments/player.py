"""Plays episodes: a model and environments, token in, token out.

Each episode has its own row of a batch, see `models.llama.chat.turns`, and an environment in its own
process. Rows wait for their environments while others decode; what a row samples does not depend on
how long that takes.
"""

import dataclasses
import math
import os
import time
import warnings
import zlib
from collections.abc import Sequence
from multiprocessing import connection
from typing import Any

import jax
import numpy as np

from models.llama.chat.messages import Message, Tools
from models.llama.chat.tools import fitting, parse_calls, with_tools
from models.llama.chat.turns import ROWS, Turns, following_ids
from models.llama.decoding import Completions, GenerationConfig
from models.llama.generation import STRIDE
from models.llama.model import LLaMa, Params
from sampling import Sampler
from trainers.environments.episodes import EpisodeConfig, Played, Turn
from trainers.environments.process import Episode
from trainers.rewards.failures import Failure, FailureLog
from trainers.rewards.pool import RewardPool
from trainers.rewards.tasks import Task
from trainers.rollout import Prompt
from utils import distributed
from utils.errors import DataError, TrainError

# Where nothing decodes, rows wait this many seconds for one another, to read together.
_GRACE = 0.02
# Answers to look at: whether the template would write what was said before otherwise.
_CHECKED = 64
_ASKED = ({"role": "user", "content": "?"},)


class Player:
    """Plays episodes of an environment.

    Attributes:
        names: of its rewards, as a Scorer's.
        failures: a line per episode of the last call whose environment failed.
        failed: tells, counts and reports them by kind.
        unchecked: answers that are still compared with what the template writes.
    """

    names = ("episode",)

    def __init__(self, task: Task, config: EpisodeConfig, on_failure: str = "unscorable"):
        """
        Args:
            task: with an environment and a chat format.
            config: limits of each episode.
            on_failure: of an environment: "unscorable": its episode; "stop" raises TrainError.
        """
        self.server, self.form, self.config = task.environment, task.chat, config
        self.tokenizer = self.form.tokenizer.answers
        self.tools = {schema["function"]["name"]: schema for schema in task.tools}
        _, self._taken = fitting(self.form, _ASKED, task.tools)
        self.failures: list[str] = []
        self.unchecked, self._compiled = _CHECKED, set()
        self.failed, self._stop = FailureLog(), on_failure == "stop"

    def __enter__(self) -> "Player":
        return self

    def __exit__(self, *_) -> None:
        self.server.close()
        self.failed.close()

    def report(self) -> dict[str, Any]:
        """The `failures` since the last report, see FailureLog."""
        return self.failed.report()

    def fit(self, messages: Sequence[Message]) -> tuple[list[Message], Tools | None]:
        """(messages, tools) as the chat template takes them; see `fitting`."""
        if self.tools and not self._taken:
            messages = with_tools(messages, [*self.tools.values()])
        return list(messages), self._taken

    def play(
        self,
        model: LLaMa,
        params: Params,
        prompts: Sequence[Prompt],
        sampler: Sampler,
        config: GenerationConfig,
        keys: jax.Array,
    ) -> list[Played]:
        """Plays `config.n` episodes of each prompt to their ends.

        Args:
            model, params, sampler: as for `generate`.
            prompts: B, with their messages.
            config: its `max_new_tokens` is that of all turns together.
            keys: [B] PRNG keys, of what is sampled and of the environments.

        Returns:
            Episode j of prompt i at i · n + j.

        Raises:
            TrainError: an environment returned what is not an answer, or failed with "stop".
            SamplingError: as for `generate`.
        """
        rows = [Played(prompt=prompt) for prompt in prompts for _ in range(config.n)]
        length = config.max_new_tokens
        turn = min(self.config.max_turn_len or length, length)
        run = Turns(model, params, sampler, dataclasses.replace(config, max_new_tokens=turn))
        longest = max(config.prompt_width or 0, *(len(prompt.ids) for prompt in prompts))
        with _Stage(self, run, rows, length) as stage:
            stage.open(np.asarray(jax.random.key_data(keys)))
            room = longest + length if self.config.max_turns > 1 else 0
            run.start([prompt.ids for prompt in prompts], key=keys, room=room)
            if room and len(rows) not in self._compiled:
                self._compiled.add(len(rows))
                run.compile()
            stage.play()
        failed = [
            Failure(self.server.title, f"on {row.prompt.text[:60]!r}", row.failed, 1)
            for row in rows
            if row.failed is not None
        ]
        self.failures = [failure.line for failure in failed]
        if failed and self._stop:
            raise TrainError(failed[0].line)
        self.failed.count(failed, len(rows))
        return rows


def scorer_of(
    task: Task, episodes: EpisodeConfig, timeout: float, on_failure: str = "unscorable"
) -> RewardPool | Player:
    """Opens what scores a task's completions: a Player of its environment, or a pool of its rewards."""
    if task.environment is not None:
        return Player(task, episodes, on_failure)
    return RewardPool(task.rewards, timeout=timeout, on_failure=on_failure)


class _Stage:
    """One call of `Player.play`: who decodes, who waits for an environment, who is ready to read.

    Environments are in the first process, and all processes hear the same of them.
    """

    def __init__(self, player: Player, run: Turns, rows: Sequence[Played], length: int):
        self._player, self._run, self._rows, self._length = player, run, rows, length
        self._turn = run.config.max_new_tokens
        self._episodes: dict[int, Episode] = {}
        self._decoding, self._waiting = set(range(len(rows))), set(range(len(rows)))
        self._ready: dict[int, list[int]] = {}
        self._sampled = [0] * len(rows)

    def __enter__(self) -> "_Stage":
        return self

    def __exit__(self, *_) -> None:
        for row in list(self._episodes):
            self._close(row)

    def open(self, keys_B2: np.ndarray) -> None:
        """Starts an environment per row."""
        if not distributed.is_first():
            return
        n = len(self._rows) // len(keys_B2)
        for i, row in enumerate(self._rows):
            seed = zlib.crc32(keys_B2[i // n].tobytes(), i % n)
            self._episodes[i] = self._player.server.start(row.prompt.columns, seed)

    def play(self) -> None:
        """Goes on until every episode has ended."""
        self._hear(all_of_them=True)  # the answers to `reset`
        while self._decoding or self._waiting or self._ready:
            self._take_turns()
            self._hear()
            if self._ready and (not self._decoding or len(self._ready) >= ROWS):
                left = {i: self._length - len(self._rows[i].ids) for i in self._ready}
                self._run.read(self._ready, {i: min(n, self._turn) for i, n in left.items()})
                self._decoding.update(self._ready)
                self._ready = {}
            elif self._decoding:
                self._run.advance(STRIDE)

    def _take_turns(self) -> None:
        """Hands the turns that have ended to their environments."""
        done = self._run.completions()
        for i in sorted(self._decoding):
            if done.finish_reason[i] != "running":
                self._decoding.remove(i)
                self._take_turn(i, done)

    def _take_turn(self, i: int, done: Completions) -> None:
        row, start, end = self._rows[i], self._sampled[i], int(done.lengths[i])
        self._sampled[i], row.cut = end, done.finish_reason[i] != "stop"
        ids = done.tokens[i, start:end].tolist()
        message, wrong = self._said(ids[: len(ids) - (not row.cut)], row)
        row.turns.append(Turn(start=len(row.ids), end=len(row.ids) + len(ids), message=message))
        row.add(ids, done.logprobs[i, start:end].tolist())
        if row.failed is not None:
            return self._close(i)
        if wrong is not None:
            row.calls, row.errors = row.calls + 1, row.errors + 1
            return self._go_on(i, [{"role": "user", "content": wrong}])
        self._waiting.add(i)
        if distributed.is_first():
            self._episodes[i].ask(message)

    def _said(self, ids: list[int], row: Played) -> tuple[Message, str | None]:
        """(the message in a turn's tokens, what is wrong with its calls). A cut turn calls nothing."""
        decode, tools = self._player.tokenizer.decode, self._player.tools
        after = row.ids[-1] if row.ids else row.prompt.ids[-1]
        message = {"role": "assistant", "content": decode(ids, skip_special=True, after=after)}
        if not tools or row.cut:
            return message, None
        content, calls, wrong = parse_calls(decode(ids, skip_special=False, after=after), tools)
        return message | ({"content": content, "tool_calls": calls} if calls else {}), wrong

    def _hear(self, all_of_them: bool = False) -> None:
        """Takes the answers of environments; waits for one where nothing else is to be done."""
        if not self._waiting:
            return
        idle = not self._decoding and not self._ready
        heard = distributed.from_first(lambda: self._answers(idle, all_of_them))
        for i, answer in heard:
            self._waiting.remove(i)
            self._take_answer(i, answer)

    def _answers(self, idle: bool, all_of_them: bool) -> list[tuple[int, dict[str, Any]]]:
        """(row, answer) of each environment that has answered, failed or run out of time."""
        heard, left, until = [], set(self._waiting), math.inf
        while left:
            now = time.monotonic()
            end = min(until, *(self._episodes[i].deadline for i in left))
            wait = max(end - now, 0.0) if idle or all_of_them else 0.0
            ready = connection.wait([self._episodes[i].connection for i in left], wait)
            now = time.monotonic()
            new = [
                i
                for i in sorted(left)
                if self._episodes[i].connection in ready or now >= self._episodes[i].deadline
            ]
            heard += [(i, self._episodes[i].answer()) for i in new]
            left.difference_update(new)
            if not all_of_them and (now >= until or not idle):
                break
            if new and until == math.inf and not all_of_them:
                until = now + _GRACE
        return heard

    def _take_answer(self, i: int, answer: dict[str, Any]) -> None:
        row = self._rows[i]
        if "failed" in answer:
            row.failed = answer["failed"]
            return self._close(i) if row.turns else None  # while it decodes, its turn is waited for
        if not row.turns:
            return self._check_opening(row, answer["messages"])
        turn = row.turns[-1]
        turn.reward, row.done = answer["reward"], answer["done"]
        row.calls, row.errors = row.calls + answer["calls"], row.errors + answer["errors"]
        self._go_on(i, answer["messages"])

    def _check_opening(self, row: Played, messages: list[Message]) -> None:
        """Raises TrainError if an episode does not begin as its prompt does."""
        # A system message of the run's own may stand before them.
        if list(messages) != list(row.prompt.messages[-len(messages) :]):
            raise TrainError(
                f"{self._player.server.title}: reset gave other messages for the same example "
                f"({row.prompt.text!r:.80}), expected those of its group; put what varies into the "
                "example"
            )

    def _go_on(self, i: int, messages: list[Message]) -> None:
        """Lets a row read the answer to its turn, or ends its episode."""
        row = self._rows[i]
        row.turns[-1].answers = list(messages)
        if row.done or row.cut or len(row.turns) == self._player.config.max_turns:
            return self._close(i)
        ids = self._following(row)
        if len(row.ids) + len(ids) >= self._length:  # no room for a token of another turn
            return self._close(i)
        row.add(ids)
        self._ready[i] = ids

    def _following(self, row: Played) -> list[int]:
        """The ids of the last answers."""
        player = self._player
        messages, tools = player.fit(row.messages)
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant") + 1
        try:
            try:
                ids = following_ids(player.form, messages[:last], messages[last:], tools)
            except DataError:
                # Llama 3.1's template takes one call per message, and its models make several.
                messages = [_with_one_call(message) for message in messages]
                ids = following_ids(player.form, messages[:last], messages[last:], tools)
            if player.unchecked:
                player.unchecked -= 1
                self._check_history(player, [*row.prompt.ids, *row.ids, *ids], messages, tools)
        except DataError as e:
            raise TrainError(f"{player.server.title}: {e}") from e
        return ids

    def _check_history(self, player: Player, ids: list[int], messages, tools) -> None:
        """Warns if the template would write what has been said otherwise than it was."""
        said, written = (
            player.tokenizer.decode(x, skip_special=False, after=None)
            for x in (ids, player.form.encode_chat(messages, tools=tools))
        )
        if said != written:
            at = len(os.path.commonprefix([said, written]))
            warnings.warn(
                "the chat template would write earlier turns otherwise, "
                f"{written[at : at + 40]!r} for {said[at : at + 40]!r}: episodes keep the ids that "
                "were sampled",
                stacklevel=2,
            )
            player.unchecked = 0

    def _close(self, i: int) -> None:
        if (episode := self._episodes.pop(i, None)) is not None:
            episode.close()


def _with_one_call(message: Message) -> Message:
    """A message with its first call alone: what follows it is the same."""
    calls = message.get("tool_calls")
    return message | {"tool_calls": calls[:1]} if calls else message
