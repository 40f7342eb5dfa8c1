"""A conversation with a model, on the KV cache of what it has read already."""

from collections.abc import Iterator

import jax

import sampling
from models.llama.chat_format import ChatFormat
from models.llama.decoding import GenerationConfig
from models.llama.generation import Generation, stream_text
from models.llama.loading import Model
from utils.errors import DataError, SamplingError
from utils.kvcache import KVCache

# Of a new conversation's cache. Each decode step reads all slots, so it starts small.
MIN_SLOTS = 1024


class Conversation:
    """Messages, and the KV cache of those that the model has read.

    Attributes:
        messages: the system message, if any, then user and assistant in turn.
        context: tokens of messages and answer together, at most.
        sampler: may be replaced between answers.
        max_gen_len: tokens an answer, at most.
        dropped: messages that the last answer had to leave out, the oldest ones, for lack of room.
        answer_tokens: of the last answer.
    """

    def __init__(self, model: Model, format: ChatFormat, context: int, key: jax.Array):
        self._model, self._format, self._key = model, format, key
        self._cache: KVCache | None = None
        self._cached: list[int] = []  # the tokens whose keys and values the cache holds
        self._answers = 0
        self.messages: list[dict[str, str]] = []
        self.context = context
        self.sampler = sampling.TopP(0.6, 0.9)
        self.max_gen_len = min(512, context // 2)
        self.dropped = self.answer_tokens = 0

    @property
    def tokens(self) -> int:
        """Tokens in the cache."""
        return len(self._cached)

    def reset(self) -> None:
        """Forgets all messages but the system's."""
        self.messages = [m for m in self.messages if m["role"] == "system"]

    def set_system(self, text: str) -> None:
        """Sets the system message; an empty one leaves it to the template."""
        others = [m for m in self.messages if m["role"] != "system"]
        self.messages = [{"role": "system", "content": text}] * bool(text) + others

    def answer(self, text: str) -> Iterator[str]:
        """Yields the answer to a user's message as it comes.

        If the caller stops early, message and answer so far stay in the conversation. An error
        leaves the conversation as it was.
        """
        return self._answer([*self.messages, {"role": "user", "content": text}])

    def regenerate(self) -> Iterator[str]:
        """Answers the last user message again; see `answer`."""
        users = [i for i, m in enumerate(self.messages) if m["role"] == "user"]
        if not users:
            raise DataError("there is no message to answer again")
        return self._answer(self.messages[: users[-1] + 1])

    def _answer(self, messages: list[dict[str, str]]) -> Iterator[str]:
        messages, ids = self._fit(messages)
        said = ""
        try:
            for piece in self._generate(ids):
                said += piece
                yield piece
        except GeneratorExit:
            self.messages = [*messages, {"role": "assistant", "content": said}]
            raise
        self.messages = [*messages, {"role": "assistant", "content": said}]

    def _fit(self, messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[int]]:
        """(messages, their tokens) without the oldest turns, as many as an answer needs the room of."""
        self.dropped = 0
        while True:
            ids = self._format.encode_chat(messages)
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
        kept = _common_prefix(ids[:-1], self._cached)  # one token at least has to be read
        # The cache is donated, and after an error nobody knows what is in it.
        cache, self._cache, self._cached = self._cache, None, []
        if cache is not None:
            cache = cache.replace(lengths=cache.lengths * 0 + kept)
        tokenizer = self._model.tokenizer
        config = GenerationConfig(
            max_new_tokens=self.max_gen_len,
            max_seq_len=self.context,
            stop_ids=tokenizer.stop_ids,
            vocab_limit=self._model.vocab_limit,
        )
        run = Generation(self._model.llama, self._model.params, self.sampler, config)
        key = jax.random.fold_in(self._key, self._answers)
        self._answers += 1
        # A larger cache is another compilation: it doubles, and seldom.
        room = max(MIN_SLOTS, 1 << (len(ids) + self.max_gen_len - 1).bit_length())
        run.start([ids[kept:]], key=key, cache=cache, room=min(room, self.context))
        try:
            yield from stream_text(run, tokenizer)
        except GeneratorExit:
            self._keep(run, ids)
            raise
        self._keep(run, ids)

    def _keep(self, run: Generation, ids: list[int]) -> None:
        """Notes the cache of a run, for the next answer to start on."""
        completion = run.completions().row(0)
        self.answer_tokens = len(completion)
        self._cache = run.state.cache
        self._cached = (ids + completion)[: int(self._cache.lengths[0])]


def _common_prefix(a: list[int], b: list[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return min(len(a), len(b))
