"""Preference data: pairs of answers to one prompt, as batches that compute the prompt once for both."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from models.llama.chat_format import ChatFormat, chat_format_for
from models.llama.model import Params
from models.llama.tokenizer import Tokenizer
from trainers.data import DataConfig, DataFlags, Dataset, Examples, encode_record, tokenizer_digest
from trainers.dpo_trainer import DPOTrainer
from trainers.loop import Batches, Phases
from trainers.plain_rows import holds_control_names, is_plain, warn_of_control_names
from trainers.records import Record, read_records
from trainers.trainer import Batch, TrainState
from utils import distributed, sharding
from utils.errors import CheckpointError, DataError
from utils.fields import Config, again, field
from utils.files import atomic_file, read_json

SIDES = ("chosen", "rejected")
_MAX_REFERENCE_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class PairFlags(DataFlags):
    """Files of pairs."""

    data: str = field(
        help='a .jsonl, .jsonl.gz or .parquet file, or a data set on the hub, of {"prompt": …, '
        '"chosen": …, "rejected": …}: texts or messages; the prompt may stand at the start of both'
    )
    eval_data: str | None = field(None, "as data; its loss decides which checkpoint is the best")


@dataclass(frozen=True, kw_only=True)
class PairConfig(Config):
    """How pairs become batches."""

    packing: ClassVar[bool] = False

    seq_len: int = again(
        DataConfig,
        "seq_len",
        1024,
        help="longest prompt with an answer, in tokens; a longer pair is left out",
    )
    batch_size: int = again(DataConfig, "batch_size", 8, help="pairs per optimizer step")
    shuffle: bool = again(DataConfig, "shuffle", True)
    seed: int = again(DataConfig, "seed", 0)
    chat_format: str | None = again(DataConfig, "chat_format", None)
    template_args: str | None = again(DataConfig, "template_args", None)
    markup: bool = again(DataConfig, "markup", False)


def as_supervised(record: Record) -> list[Record]:
    """Both answers of a pair as rows of supervised training, (chosen, rejected)."""
    fields, prompt = record.fields, record.fields["prompt"]
    sides, rest = [fields[side] for side in SIDES], {"tools": fields.get("tools")}
    if prompt is None:
        return [Record(record.where, "text", {"text": side}) for side in sides]
    rows = [{"prompt": prompt, "completion": side, **rest} for side in sides]
    return [Record(record.where, "completion", row) for row in rows]


def encode_pair(
    pair: Sequence[Record], tokenizer: Tokenizer, chat: ChatFormat | None, markup: bool = False
) -> tuple[int, list[list[int]], list[list[bool]]]:
    """A pair of `as_supervised` as (tokens of the prompt, ids of both sides, which are targets).

    Both sides are tokenised whole, as in supervised training, and end with their last target. The
    prompt is the tokens that they share before their first target; of two texts without a prompt,
    all that they share.

    Raises:
        DataError: nothing is shared; or as `encode_record`.
    """
    rows = [encode_record(row, tokenizer, chat, "auto", markup) for row in pair]
    ids, masks = [row[0] for row in rows], [row[1] for row in rows]
    same = [a == b for a, b in zip(*ids)]
    shared = same.index(False) if False in same else len(same)
    if pair[0].kind == "text":
        if shared <= len(tokenizer.encode("", bos=tokenizer.adds_bos)):
            raise DataError(
                "chosen and rejected do not begin alike, and there is no prompt; name the field that "
                "holds it `prompt`"
            )
    else:
        shared = min(shared, *(mask.index(True) if True in mask else shared for mask in masks))
    if not shared:
        raise DataError("the prompt is empty, and the model's texts have no BOS to begin with")
    masks = [[False] * shared + mask[shared:] for mask in masks]
    ends = [len(mask) - mask[::-1].index(True) if True in mask else shared for mask in masks]
    return shared, *([row[:end] for row, end in zip(rows, ends)] for rows in (ids, masks))


def _is_empty(answer: str | Sequence[Any]) -> bool:
    """Whether an answer says nothing and calls nothing."""
    if isinstance(answer, str):
        return not answer.strip()
    said = [m for m in answer if m["role"] == "assistant"]
    return not any((m.get("content") or "").strip() or m.get("tool_calls") for m in said)


class PairDataset(Dataset):
    """Tokenised pairs. Made by `load_pairs`; a batch is as DPOTrainer takes it.

    Attributes:
        counts: `read` rows, of which `bad`, `dropped_equal` (both answers the same tokens),
            `dropped_empty` and `dropped_overlong` are left out; ones whose text is `with_markup`;
            `examples`, the pairs, with `tokens` and `targets`; and the names of `ignored` columns.
        shapes: widths (P of prompts, C of answers) that batches may have, ascending; a batch takes
            the first that suffices, and each costs a compilation.
        buckets: their sums.
        reference: [pairs, 2] float32, the reference's log-probs of the answers; None: not known.
    """

    reference: np.ndarray | None = None

    def __init__(
        self,
        name: str,
        config: PairConfig,
        examples: Examples,
        prompts: Sequence[int],
        digest: str,
        chat: ChatFormat | None = None,
    ):
        """
        Args:
            name: for messages.
            config: see PairConfig.
            examples: the chosen and the rejected side of each pair, one after the other.
            prompts: tokens of each pair's prompt.
            digest, chat: see Dataset.

        Raises DataError if there is no pair.
        """
        if not prompts:
            listed = ", ".join(f"{key} {n}" for key, n in examples.counts.items() if n)
            raise DataError(
                f"{name}: no pair is left to train on ({listed or 'it has no rows'}); a prompt with "
                f"an answer may have {config.seq_len} tokens (--seq_len)"
            )
        super().__init__(name, config, examples, digest, chat)
        self._prompts = np.asarray(prompts)
        self._lengths = np.diff(self._offsets).reshape(-1, 2).max(axis=1)
        self._answers = self._lengths - self._prompts
        step = math.lcm(16, sharding.axis_size(sharding.TRAINING.tokens))
        longest = int(self._prompts.max()), int(self._answers.max())
        halves = [tuple(-(-n // (part * step)) * step for n in longest) for part in (4, 2, 1)]
        self.shapes = tuple(dict.fromkeys(halves))
        self.buckets = tuple(map(sum, self.shapes))
        n_pairs, tokens = len(prompts), len(self._tokens) - int(self._prompts.sum())
        self.counts |= {"examples": n_pairs, "rows": n_pairs, "tokens": tokens}

    def preflight_batches(self) -> list[Batch]:
        """A batch of the largest shape."""
        self.check_full_batch()
        rows = np.arange(self.config.batch_size)
        return [self.batch(rows, slice(None), self.shapes[-1])]

    def batch(
        self, rows: np.ndarray, share: slice, shape: tuple[int, int] | None = None
    ) -> dict[str, np.ndarray]:
        """The share of a global batch, in a shape or the smallest; rows that do not exist are empty."""
        real = rows[rows < len(self)]
        if shape is None:
            prompt, answer = self._prompts[real].max(), self._answers[real].max()
            shape = next((p, c) for p, c in self.shapes if p >= prompt and c >= answer)
        rows = rows[share]
        answers = len(rows), 2, shape[1]
        out = {
            "prompts": np.zeros((len(rows), shape[0]), np.int32),
            "prompt_lengths": np.zeros(len(rows), np.int32),
            "tokens": np.zeros(answers, np.int32),
            "target_mask": np.zeros(answers, bool),
        }
        if self.reference is not None:
            out["reference"] = np.zeros(answers[:2], np.float32)
        for b, row in enumerate(rows[rows < len(self)]):  # what does not exist comes last
            n = out["prompt_lengths"][b] = self._prompts[row]
            for side in range(2):
                start, end = self._offsets[2 * row + side :][:2]
                out["prompts"][b, :n] = self._tokens[start : start + n]
                out["tokens"][b, side, : end - start - n] = self._tokens[start + n : end]
                out["target_mask"][b, side, : end - start - n] = self._targets[start + n : end]
            if self.reference is not None:
                out["reference"][b] = self.reference[row]
        return out


def load_pairs(
    path: Any,
    tokenizer: Tokenizer,
    config: PairConfig,
    *,
    skip_bad: int = 0,
    moment: datetime | None = None,
) -> PairDataset:
    """Reads and tokenises pairs, each side as supervised training would (`load_dataset`).

    Pairs whose sides are equal, of which one says nothing, or which are too long are left out, and
    counted: cut short, an answer would be another one.

    Args and errors as for `load_dataset`.
    """
    records = read_records(path, kinds=("preference",), skip_bad=skip_bad)
    sides = [as_supervised(record) for record in records.rows]
    template = config.chat_format, config.template_args, moment
    is_chat = any(not is_plain(row) for pair in sides for row in pair)
    chat = chat_format_for(tokenizer, *template) if is_chat else None
    examples, prompts, marked = Examples(config.seq_len, "drop"), [], 0
    dropped = dict.fromkeys(("dropped_equal", "dropped_empty", "dropped_overlong"), 0)
    for record, pair in zip(records.rows, sides):
        if any(_is_empty(record.fields[side]) for side in SIDES):
            dropped["dropped_empty"] += 1
            continue
        try:
            shared, ids, masks = encode_pair(pair, tokenizer, chat, config.markup)
        except DataError as e:
            records.bad.add(DataError(f"{record.where}: {e}"))
            continue
        marked += any(holds_control_names(row, tokenizer, config.markup) for row in pair)
        lengths = [len(row) for row in ids]
        if ids[0] == ids[1]:
            dropped["dropped_equal"] += 1
        elif any(tokenizer.stop_ids.issuperset(row[shared:]) for row in ids):
            dropped["dropped_empty"] += 1
        elif max(lengths) > config.seq_len:
            dropped["dropped_overlong"] += 1
        else:
            prompts.append(shared)
            for row in zip(ids, masks):
                examples.add(*row, is_text=False)
    records.bad.check(path)
    warn_of_control_names(path, marked)
    examples.counts = {"read": records.read, "bad": records.bad.count} | dropped
    examples.counts |= {"with_markup": marked, "ignored": records.ignored}
    parts = [records.digest, tokenizer_digest(tokenizer), "pairs"]
    parts += [config.seq_len, config.chat_format, config.markup]
    parts += chat.template.settings if chat else []
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    dataset = PairDataset(records.path, config, examples, prompts, digest, chat)
    dataset.commit = records.commit
    return dataset


class ReferencedPairs:
    """Pairs whose reference's log-probs are computed before the first step, and kept in a file.

    The data that `fit` trains on with `precompute_reference`. The reference is the model that
    training starts from: later only the file knows it.
    """

    def __init__(
        self,
        trainer: DPOTrainer,
        train: PairDataset,
        evaluated: PairDataset | None,
        path: Path,
    ):
        """`path` is the file's."""
        self._trainer, self._path = trainer, path
        self._sets = [train] if evaluated is None else [train, evaluated]
        for pairs in self._sets:
            pairs.reference = np.zeros((len(pairs), 2), np.float32)

    def preflight_batches(self) -> list[Batch]:
        """A batch of the largest shape."""
        return self._sets[0].preflight_batches()

    def batches(self) -> "_ReferencedBatches":
        """Batches without end."""
        return _ReferencedBatches(self, self._sets[0].batches())

    def find_reference(self, state: TrainState, frozen: Params, phase: Phases) -> None:
        """Computes the reference's log-probs, or reads those of the run that is resumed.

        Raises:
            CheckpointError: the file is missing, broken or of other data, and the reference is gone.
        """
        of = [pairs.digest for pairs in self._sets]
        if int(state.step) == 0:
            model = self._trainer.model_params(state.params, frozen)
            with phase("reference"):
                sums = [self._sums(pairs, model) for pairs in self._sets]
            distributed.from_first(lambda: self._write(of, sums))
        else:
            sums = distributed.from_first(lambda: self._read(of))
        for pairs, known in zip(self._sets, sums):
            pairs.reference = np.asarray(known, np.float32)

    def _sums(self, pairs: PairDataset, model: Params) -> list[list[float]]:
        score = self._trainer.score
        rows = [
            np.asarray(score(model, sharding.place_batch(b)), float) for b in pairs.epoch_batches()
        ]
        return np.concatenate(rows)[: len(pairs)].tolist()

    def _write(self, of: list[str], sums: list[list[list[float]]]) -> None:
        found = {"of": of, "sha256": _digest(sums), "sums": sums}
        with atomic_file(self._path) as file:
            file.write(json.dumps(found).encode())

    def _read(self, of: list[str]) -> list[list[list[float]]]:
        found = read_json(self._path, max_bytes=_MAX_REFERENCE_BYTES, error=CheckpointError)
        wrong = "is of other data" if found.get("of") != of else ""
        if found.get("sha256") != _digest(found.get("sums")):
            wrong = "is broken: its numbers have another digest"
        if wrong:
            raise CheckpointError(
                f"{self._path} {wrong}, and the model that is trained is no longer the reference; "
                "put the file and its data back, or start anew in another --out_dir"
            )
        return found["sums"]


def _digest(sums: Any) -> str:
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


class _ReferencedBatches(Batches):
    """The batches of a PairDataset, once their reference is known."""

    def __init__(self, data: ReferencedPairs, batches: Any):
        self._data, self._batches, self._is_known = data, batches, False

    def sample(self, state: TrainState, frozen: Params, phase: Phases) -> None:
        if not self._is_known:
            self._data.find_reference(state, frozen, phase)
            self._is_known = True

    def __next__(self) -> Batch:
        return next(self._batches)

    def get_state(self) -> dict:
        return self._batches.get_state()

    def set_state(self, state: dict) -> None:
        self._batches.set_state(state)
