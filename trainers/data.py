"""Datasets for supervised training: from rows of JSON Lines to batches of token ids.

The order of the batches is a function of the seed and of the position, by grain, so that a resumed
run sees what an uninterrupted one would have seen, to the token.
"""

import hashlib
import json
import warnings
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import grain
import numpy as np

from models.llama.chat_format import ChatFormat, TemplateFlags, chat_format_for
from models.llama.tokenizer import Tokenizer
from trainers.packing import pack
from trainers.plain_rows import encode_plain, holds_control_names, is_plain, warn_of_control_names
from trainers.records import KINDS, Record, read_records
from utils.errors import ConfigError, DataError, plural
from utils.fields import CONFIG, DATA, Config, again, field, integer, one_of

Batch = dict[str, np.ndarray]

_SMALLEST_BUCKET = 64

MASKS = ("auto", "assistant", "last", "completion", "all")
OVERLONG = ("truncate", "drop", "split")
# For evaluations: rows of all kinds are split, so that each target counts once.
WINDOWS = "windows"

# Which masks fit a row: of a plain text, of two plain texts, of messages, of two lists of messages.
_FITTING = {
    ("text", True): ("auto", "all"),
    ("completion", True): ("auto", "completion", "all"),
    ("messages", False): ("auto", "assistant", "last", "all"),
    ("completion", False): MASKS,
}


@dataclass(frozen=True, kw_only=True)
class DataFlags(Config):
    """A file of rows."""

    data: str = field(
        help='a .jsonl, .jsonl.gz or .parquet file, or a data set on the hub, of {"messages": […]}, '
        '{"prompt": …, "completion": …} or {"text": …}'
    )
    skip_bad: int = field(0, "skip up to this many malformed rows", integer(0))


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """How rows become batches.

    The loss covers (`mask`) all answers of a conversation (`assistant`), its last one (`last`), what
    follows the prompt (`completion`) or every token (`all`); `auto` is `assistant` for messages,
    `completion` for prompt and completion, `all` for text. With `packing`, attention and positions
    keep the examples of a row apart. Settings that resume by DATA are part of `Dataset.digest`.
    """

    seq_len: int = field(512, "longest row, in tokens", integer(2, 1 << 24), resume=CONFIG)
    batch_size: int = field(8, "rows per optimizer step", integer(1, 1 << 24), resume=CONFIG)
    packing: bool = field(False, "let several examples share a row", resume=CONFIG)
    mask: str = field("auto", "tokens that the loss covers", one_of(*MASKS), resume=DATA)
    overlong: str = field(
        "truncate",
        "examples longer than a row: keep the start, drop them, or split texts into parts",
        one_of(*OVERLONG),
        resume=DATA,
    )
    shuffle: bool = field(
        True, "a new order each epoch; else the order of the file", flag="", resume=DATA
    )
    seed: int = field(
        0, "seed of the data's order and of adapters", integer(0, 2**32 - 1), resume=CONFIG
    )
    chat_format: str | None = again(TemplateFlags, "chat_format", None)
    template_args: str | None = again(TemplateFlags, "template_args", None)
    markup: bool = field(
        False,
        "names of control tokens in rows of plain text are those tokens, in a file that you trust",
        resume=DATA,
    )


def encode_record(
    record: Record, tokenizer: Tokenizer, chat: ChatFormat | None, mask: str, markup: bool = False
) -> tuple[list[int], list[bool]]:
    """A row's token ids, and which of them are targets.

    Args:
        record: a row of a kind in records.SUPERVISED.
        tokenizer: the model's.
        chat: its chat format; may be None for a row that is_plain.
        mask, markup: see DataConfig.

    Raises:
        DataError: the mask does not fit the row, or the chat format refuses it.
    """
    fields, plain, is_text = record.fields, is_plain(record), record.kind == "text"
    fitting = _FITTING[record.kind, plain]
    if mask not in fitting:
        kind = f"{record.kind} of {'plain text' if plain else 'messages'}"
        raise DataError(f"mask={mask!r} does not fit a row of {kind}; use one of {fitting}")
    if plain:
        asked, said = ("", fields["text"]) if is_text else (fields[k] for k in KINDS["completion"])
        prompt, said = encode_plain(asked, said, tokenizer, markup)
        return prompt + said, [is_text or mask == "all"] * len(prompt) + [True] * len(said)
    messages, first, tools = fields.get("messages"), 0, fields.get("tools")
    if record.kind == "completion":
        messages = fields["prompt"] + fields["completion"]
        first = len(fields["prompt"]) if mask in ("auto", "completion") else 0
    if mask == "all":
        ids = chat.encode_chat(messages, False, tools)
        return ids, [True] * len(ids)
    if mask == "last":
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        first = answers[-1] if answers else len(messages)
    return chat.encode_training(messages, first, tools)


class Examples:
    """Token ids and targets of examples, one after the other, with the policy for long ones."""

    def __init__(self, seq_len: int, overlong: str):
        """Arguments as in DataConfig."""
        self._seq_len, self._overlong = seq_len, overlong
        self._tokens, self._targets, self._offsets = array("i"), bytearray(), array("q", [0])
        names = "dropped_no_target dropped_overlong truncated split targets_left_out".split()
        self.counts = dict.fromkeys(names, 0)

    def add(self, ids: Sequence[int], mask: Sequence[bool], *, is_text: bool) -> None:
        """Adds a row's tokens, cut, split or dropped as the config says, and counts that."""
        limit = self._seq_len
        overlong, windows = len(ids) > limit, self._overlong == WINDOWS
        if overlong and self._overlong == "drop":
            self.counts["dropped_overlong"] += 1
            self.counts["targets_left_out"] += sum(mask[1:])
        elif overlong and any(mask[1:]) and (windows or self._overlong == "split" and is_text):
            self.counts["split"] += 1
            # The parts share a token, so that each token but the text's first is a target once.
            for start in range(0, len(ids) - 1, limit - 1):
                end = min(start + limit, len(ids))
                first = max(end - limit, 0) if windows else start  # the last window reaches back
                part = [False] * (start + 1 - first) + list(mask[start + 1 : end])
                if any(part):
                    self._append(ids[first:end], part)
        elif any(mask[1:limit]):
            self.counts["truncated"] += overlong
            self.counts["targets_left_out"] += sum(mask[limit:])
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


class Dataset:
    """Tokenised examples, in rows. Made by `load_dataset`.

    A batch is a dict of arrays, with the same keys for all batches: `tokens` [B, T] int32, padded
    on the right; `target_mask` [B, T] bool, true at a token that is to be predicted from those
    before it, and so never at the first of a document; and with packing `segment_ids` [B, T]
    int32, the number of the document in its row from 1 on, 0 at padding, and `positions` [B, T]
    int32, which start at 0 in each document. What is padding is never told by a token's value.

    Attributes:
        chat: the chat format that wrote its conversations; None if it has none.
        digest: of the file's content, the tokenizer, and what of the config shapes the examples.
        commit: of a dataset on the hub, else None.
        counts: `read` rows, of which `bad`, `dropped_no_target` and `dropped_overlong` are left
            out; `truncated` and `split` ones among the others, and ones whose text is `with_markup`;
            `targets_left_out` of rows too long; `examples` that they gave, in `rows`, with `tokens`
            and `targets`; and the names of `ignored` columns.
        buckets: the lengths T that batches may have, ascending.
    """

    def __init__(self, name: str, config: DataConfig, examples: Examples, digest: str, chat=None):
        """`name` is for messages. Raises DataError if there is no example."""
        self.config, self.digest, self.chat, self._name = config, digest, chat, name
        self.commit: str | None = None
        self._tokens, self._targets, self._offsets = examples.arrays()
        n_examples = len(self._offsets) - 1
        self.counts = examples.counts | {
            "examples": n_examples,
            "tokens": len(self._tokens),
            "targets": int(self._targets.sum()),
        }
        if not n_examples:
            listed = ", ".join(f"{key} {n}" for key, n in examples.counts.items())
            needed = f"a row needs a target in its first {config.seq_len} tokens (--seq_len)"
            raise DataError(f"{name}: no row is left to train on ({listed}); {needed}")
        lengths = np.diff(self._offsets)
        if config.packing:
            self._members, self._rows = pack(lengths, config.seq_len)
            self._lengths = np.add.reduceat(lengths[self._members], self._rows[:-1])
            self.buckets: tuple[int, ...] = (config.seq_len,)
        else:
            self._members, self._rows = np.arange(n_examples), np.arange(n_examples + 1)
            self._lengths = lengths
            self.buckets = _buckets(int(lengths.min()), int(lengths.max()), config.seq_len)
        self.counts["rows"] = len(self._lengths)

    def __len__(self) -> int:
        return len(self._lengths)

    def batches(self, *, process_index: int = 0, process_count: int = 1) -> "RowBatches":
        """Batches without end: B is batch_size / process_count, this process's share of the rows.

        All processes go through the same global batches, of the same T. Every batch is full: one
        at the edge of an epoch holds rows of both.

        Raises:
            DataError: there are fewer rows than in a batch.
            ConfigError: batch_size is not a multiple of process_count.
        """
        self.check_full_batch()
        share = self._share(process_index, process_count)
        rows = grain.MapDataset.range(len(self))
        if self.config.shuffle:
            rows = rows.shuffle(seed=self.config.seed)
        return RowBatches(self, rows.repeat(), share)

    def epoch_batches(self, *, process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
        """Every row once, in order, for evaluation; the last batch is filled with empty rows."""
        share = self._share(process_index, process_count)
        size = self.config.batch_size
        for start in range(0, len(self), size):
            yield self.batch(np.arange(start, start + size), share)

    def largest_batch(self, *, process_index: int = 0, process_count: int = 1) -> Batch:
        """The longest rows, in the largest bucket: a step on it shows whether memory suffices."""
        self.check_full_batch()
        longest = np.argsort(-self._lengths, kind="stable")[: self.config.batch_size]
        return self.batch(longest, self._share(process_index, process_count))

    def preflight_batches(self) -> list[Batch]:
        """The largest batch."""
        return [self.largest_batch()]

    def check_full_batch(self) -> None:
        """Raises DataError if there are fewer rows than in a batch."""
        if len(self) < self.config.batch_size:
            packed = f" packed to {self.config.seq_len} tokens" if self.config.packing else ""
            raise DataError(
                f"{self._name}: {plural(len(self), 'row')}{packed}, fewer than batch_size={self.config.batch_size};"
                " lower batch_size, or add data"
            )

    def check_context(self, max_seq_len: int) -> None:
        """Warns if an example is longer than the model's files say that its context is."""
        longest = int(np.diff(self._offsets).max())
        if longest > max_seq_len:
            warnings.warn(
                f"an example of {self._name} has {longest} tokens, the model's context {max_seq_len}; "
                f"--seq_len {max_seq_len} cuts it, unless RoPE is scaled for more"
            )

    def _share(self, process_index: int, process_count: int) -> slice:
        size = self.config.batch_size
        if size % process_count:
            raise ConfigError(
                f"batch_size={size} is not a multiple of the {process_count} processes"
            )
        size //= process_count
        return slice(process_index * size, (process_index + 1) * size)

    def batch(self, rows: np.ndarray, share: slice) -> Batch:
        """The share of a global batch; rows that do not exist are empty."""
        longest = self._lengths[rows[rows < len(self)]].max()
        width = next(bucket for bucket in self.buckets if bucket >= longest)
        rows = rows[share]
        keys = ("tokens", "target_mask") + ("segment_ids", "positions") * self.config.packing
        shape = len(rows), width
        out = {k: np.zeros(shape, bool if k == "target_mask" else np.int32) for k in keys}
        for b, row in enumerate(rows):
            at = 0
            members = self._members[slice(*self._rows[row : row + 2])] if row < len(self) else ()
            for segment, example in enumerate(members, start=1):
                start, end = self._offsets[example : example + 2]
                place = b, slice(at, at + end - start)
                out["tokens"][place] = self._tokens[start:end]
                out["target_mask"][place] = self._targets[start:end]
                if self.config.packing:
                    out["segment_ids"][place] = segment
                    out["positions"][place] = np.arange(end - start)
                at += end - start
        return out


class RowBatches:
    """Batches in an order of rows without end.

    The position is counted in rows: another batch size neither repeats a row nor leaves one out.
    """

    def __init__(self, dataset: Dataset, order: grain.MapDataset, share: slice):
        self._dataset, self._order, self._share, self._position = dataset, order, share, 0

    def __iter__(self) -> "RowBatches":
        return self

    def __next__(self) -> Batch:
        start = self._position
        self._position += self._dataset.config.batch_size
        rows = np.array([self._order[i] for i in range(start, self._position)])
        return self._dataset.batch(rows, self._share)

    def get_state(self) -> dict[str, int]:
        """The position behind the last batch, for JSON."""
        return {"rows": self._position}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues from a position."""
        self._position = state["rows"]


def _buckets(shortest: int, longest: int, seq_len: int) -> tuple[int, ...]:
    """Lengths, of which each batch takes the first that suffices: each costs a compilation."""
    buckets = [min(_SMALLEST_BUCKET, seq_len)]
    while buckets[-1] < longest:
        buckets.append(min(2 * buckets[-1], seq_len))
    return tuple(b for b in buckets if b >= shortest)


def load_dataset(
    path: Any,
    tokenizer: Tokenizer,
    config: DataConfig,
    *,
    skip_bad: int = 0,
    moment: datetime | None = None,
) -> Dataset:
    """Reads and tokenises a dataset.

    A text is BOS (where the model has one), its tokens, EOS. A prompt of plain text is tokenised
    by itself, and its completion as what continues it. Conversations are written in the model's
    chat format. A row without any target is left out, and counted.

    Args:
        path: as for `read_records`.
        tokenizer, config: the model's, and how.
        skip_bad: so many rows that are broken, or that the chat format refuses, are left out.
        moment: the time that a chat template writes as today's; None: now.

    Raises:
        DataError: as `read_records`; a row does not fit the mask or the chat format; no row is left.
        ArtifactError: the model has no chat format, or no EOS, and needs it.
    """
    records = read_records(path, skip_bad=skip_bad)
    is_chat = any(not is_plain(record) for record in records.rows)
    template = config.chat_format, config.template_args, moment
    chat = chat_format_for(tokenizer, *template) if is_chat else None
    examples, marked = Examples(config.seq_len, config.overlong), 0
    for record in records.rows:
        try:
            ids, mask = encode_record(record, tokenizer, chat, config.mask, config.markup)
        except DataError as e:
            records.bad.add(DataError(f"{record.where}: {e}"))
            continue
        examples.add(ids, mask, is_text=record.kind == "text")
        marked += holds_control_names(record, tokenizer, config.markup)
    records.bad.check(path)
    warn_of_control_names(path, marked)
    examples.counts = {"read": records.read, "bad": records.bad.count} | examples.counts
    examples.counts |= {"with_markup": marked, "ignored": records.ignored}
    shaping = ("seq_len", "packing", "mask", "overlong", "chat_format", "markup")
    parts = [records.digest, tokenizer_digest(tokenizer)] + [getattr(config, n) for n in shaping]
    parts += chat.template.settings if chat else []
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    dataset = Dataset(records.path, config, examples, digest, chat)
    dataset.commit = records.commit
    return dataset


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """sha256 of what a tokenizer's ids mean: each token's bytes, its special ids, its templates."""
    digest = hashlib.sha256()
    for i in range(tokenizer.vocab_size):
        token = tokenizer.token_bytes(i)
        digest.update(len(token).to_bytes(4, "big") + token)
    names = ("special_tokens", "bos_id", "eos_id", "pad_id", "adds_bos", "chat_templates")
    parts = [getattr(tokenizer, name) for name in names] + [sorted(tokenizer.stop_ids)]
    digest.update(json.dumps(parts, sort_keys=True).encode())
    return digest.hexdigest()
