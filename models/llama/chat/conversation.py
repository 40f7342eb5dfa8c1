"""A conversation with a model: its messages, and the KV cache of what the model has read of them."""

import contextlib
import os
from collections.abc import Iterator

import jax

from models.llama.chat_format import ChatFormat
from models.llama.decoding import GenerationConfig
from models.llama.generation import Generation, prompt_keys, stream_text
from models.llama.load import Model
from models.llama.chat.messages import Message, Tools
from sampling import TopP
from utils.errors import DataError, SamplingError
from utils.kvcache import KVCache

SAMPLER = TopP(temperature=0.6, top_p=0.9)

# Slots of a new conversation's cache. Each decode step reads all of them, so it starts small.
MIN_SLOTS = 1024


class Conversation:
    """Messages, and the KV cache of those that the model has read.

    Attributes:
        format: the model's chat format, at the conversation's moment.
        messages: the system message, if any, then user and assistant in turn.
        tools: definitions of functions for the template, or None.
        context: tokens of messages and answer together, at most.
        sampler: may be replaced between answers.
        max_gen_len: tokens per answer, at most.
        dropped: messages, the oldest ones, that the last answer left out for lack of room.
        answer_tokens: tokens of the last answer.
    """

    def __init__(
        self,
        model: Model,
        format: ChatFormat,
        context: int,
        key: jax.Array,
        sampler: TopP = SAMPLER,
        max_gen_len: int | None = None,
    ):
        self._model, self.format, self._key = model, format, key
        self._cache: KVCache | None = None
        self._cached: list[int] = []  # the tokens whose keys and values the cache holds
        self._answers = 0
        self.messages: list[Message] = []
        self.tools: Tools | None = None
        self.context = context
        self.sampler = sampler
        self.max_gen_len = min(512, context // 2) if max_gen_len is None else max_gen_len
        self.dropped = self.answer_tokens = 0

    @property
    def tokens(self) -> int:
        """Tokens in the cache."""
        return len(self._cached)

    def reset(self) -> None:
        """Forgets all messages but the system's."""
        self.messages = [m for m in self.messages if m["role"] == "system"]

    def set_system(self, text: str | None) -> None:
        """Sets the system message, which may be empty; None leaves it to the template."""
        others = [m for m in self.messages if m["role"] != "system"]
        self.messages = [{"role": "system", "content": text}] * (text is not None) + others

    def undo(self) -> str:
        """Takes back the last user message, which it returns, with its answer."""
        last = self._last_message()
        text = self.messages[last]["content"]
        self.messages = self.messages[:last]
        return text

    def answer(self, text: str) -> Iterator[str]:
        """Yields the answer to a user's message as it comes.

        A caller that stops early keeps the message and the answer so far in the conversation; an
        error leaves it as it was.
        """
        return self._answer([*self.messages, {"role": "user", "content": text}])

    def regenerate(self) -> Iterator[str]:
        """Answers the last user message again; see `answer`."""
        return self._answer(self.messages[: self._last_message() + 1])

    def _last_message(self) -> int:
        users = [i for i, m in enumerate(self.messages) if m["role"] == "user"]
        if not users:
            raise DataError("there is no message yet")
        return users[-1]

    def _answer(self, messages: list[Message]) -> Iterator[str]:
        messages, ids = self._fit(messages)
        said = ""
        with contextlib.suppress(GeneratorExit):  # a caller that stops keeps what was said
            for piece in self._generate(ids):
                said += piece
                yield piece
        self.messages = [*messages, {"role": "assistant", "content": said}]

    def _fit(self, messages: list[Message]) -> tuple[list[Message], list[int]]:
        """(messages, their tokens), without the oldest turns if an answer needs their room."""
        self.dropped = 0
        while True:
            ids = self.format.encode_chat(messages, tools=self.tools)
            if len(ids) + self.max_gen_len <= self.context:
                return messages, ids
            start = int(messages[0]["role"] == "system")
            users = [i for i, m in enumerate(messages) if m["role"] == "user" and i > start]
            if not users:
                raise SamplingError(
                    f"the message takes {len(ids)} tokens and an answer {self.max_gen_len}: that "
                    f"exceeds the context of {self.context}; shorten it or /set max_gen_len"
                )
            self.dropped += users[0] - start
            messages = messages[:start] + messages[users[0] :]

    def _generate(self, ids: list[int]) -> Iterator[str]:
        # At least one token has to be read.
        kept = len(os.path.commonprefix([ids[:-1], self._cached]))
        # The cache is donated: after an error nobody knows what is in it.
        cache, self._cache, self._cached = self._cache, None, []
        if cache is not None:
            cache = cache.replace(lengths=cache.lengths * 0 + kept)
        tokenizer = self._model.tokenizer.answers
        config = GenerationConfig(
            max_new_tokens=self.max_gen_len,
            max_seq_len=self.context,
            stop_ids=tokenizer.stop_ids,
            vocab_limit=self._model.vocab_limit,
        )
        run = Generation(self._model.llama, self._model.params, self.sampler, config)
        # Of all ids: one of those that are read now would depend on what the cache holds.
        key = prompt_keys(jax.random.fold_in(self._key, self._answers), [ids])
        self._answers += 1
        # A larger cache compiles again, so it doubles.
        room = max(MIN_SLOTS, 1 << (len(ids) + self.max_gen_len - 1).bit_length())
        run.start([ids[kept:]], key=key, cache=cache, room=min(room, self.context))
        with contextlib.suppress(GeneratorExit):
            yield from stream_text(run, tokenizer)
        completion = run.completions().row(0)
        self.answer_tokens = len(completion)
        self._cache = run.state.cache
        self._cached = (ids + completion)[: int(self._cache.lengths[0])]
