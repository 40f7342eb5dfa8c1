"""From a row of a dataset to token ids and targets, and what happens to rows that are too long."""

from array import array
from collections.abc import Sequence

import numpy as np

from models.llama.chat_format import ChatFormat
from models.llama.tokenizer import Tokenizer
from trainers.records import Record
from utils.errors import DataError

MASKS = ("auto", "assistant", "last", "completion", "all")
OVERLONG = ("truncate", "drop", "split")

# Which masks fit a row: of a plain text, of two plain texts, of messages, of two lists of messages.
_FITTING = {
    ("text", True): ("auto", "all"),
    ("completion", True): ("auto", "completion", "all"),
    ("messages", False): ("auto", "assistant", "last", "all"),
    ("completion", False): MASKS,
}


def is_plain(record: Record) -> bool:
    """Whether a row is plain text, which needs no chat format."""
    key = {"text": "text", "completion": "completion"}.get(record.kind)
    return isinstance(record.fields.get(key), str)


def encode_record(
    record: Record, tokenizer: Tokenizer, chat: ChatFormat | None, mask: str
) -> tuple[list[int], list[bool]]:
    """A row's token ids, and which of them are targets.

    Args:
        record: a row of a kind in records.SUPERVISED.
        tokenizer: the model's.
        chat: its chat format; may be None for a row that is_plain.
        mask: one of MASKS, see DataConfig.

    Raises:
        DataError: the mask does not fit the row, or the chat format refuses it.
    """
    fields, plain = record.fields, is_plain(record)
    fitting = _FITTING[record.kind, plain]
    if mask not in fitting:
        kind = f"{record.kind} of {'plain text' if plain else 'messages'}"
        raise DataError(f"mask={mask!r} does not fit a row of {kind}; use one of {fitting}")
    if record.kind == "text":
        ids = tokenizer.encode(fields["text"], bos=tokenizer.adds_bos, eos=True)
        return ids, [True] * len(ids)
    if plain:
        prompt = tokenizer.encode(fields["prompt"], bos=tokenizer.adds_bos)
        completion = tokenizer.encode(fields["completion"], eos=True)
        return prompt + completion, [mask == "all"] * len(prompt) + [True] * len(completion)
    messages, first = fields.get("messages"), 0
    if record.kind == "completion":
        messages = fields["prompt"] + fields["completion"]
        first = len(fields["prompt"]) if mask in ("auto", "completion") else 0
    if mask == "all":
        ids = chat.encode_chat(messages, add_generation_prompt=False)
        return ids, [True] * len(ids)
    if mask == "last":
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        first = answers[-1] if answers else len(messages)
    return chat.encode_training(messages, first)


class Examples:
    """Token ids and targets of examples, one after the other, with the policy for long ones."""

    def __init__(self, seq_len: int, overlong: str):
        """Arguments as in DataConfig."""
        self._seq_len, self._overlong = seq_len, overlong
        self._tokens, self._targets, self._offsets = array("i"), bytearray(), array("q", [0])
        names = ("dropped_no_target", "dropped_overlong", "truncated", "split")
        self.counts = dict.fromkeys(names, 0)

    def add(self, ids: Sequence[int], mask: Sequence[bool], *, is_text: bool) -> None:
        """Adds a row's tokens, cut, split or dropped as the config says, and counts that."""
        limit = self._seq_len
        overlong = len(ids) > limit
        if overlong and self._overlong == "drop":
            self.counts["dropped_overlong"] += 1
        elif overlong and self._overlong == "split" and is_text:
            self.counts["split"] += 1
            # The parts share a token, so that each token but the text's first is a target once.
            for start in range(0, len(ids) - 1, limit - 1):
                self._append(ids[start : start + limit], mask[start : start + limit])
        elif any(mask[1:limit]):
            self.counts["truncated"] += overlong
            self._append(ids[:limit], mask[:limit])
        else:
            self.counts["dropped_no_target"] += 1

    def _append(self, ids: Sequence[int], mask: Sequence[bool]) -> None:
        self._tokens.extend(ids)
        self._targets.append(False)  # nothing is there to predict the first token from
        self._targets.extend(mask[1:])
        self._offsets.append(len(self._tokens))

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens int32, targets bool, offsets int64): example i is `offsets[i]:offsets[i + 1]`."""
        tokens = np.frombuffer(self._tokens, np.int32) if self._tokens else np.zeros(0, np.int32)
        targets = np.frombuffer(self._targets, bool) if self._targets else np.zeros(0, bool)
        return tokens, targets, np.frombuffer(self._offsets, np.int64)
