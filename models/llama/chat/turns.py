"""Several conversations side by side, each on its own row of one KV cache, turn by turn.

The ids of a turn are those that were sampled; only what others say is read, and text is never
tokenized again. A row's numbers do not depend on when it reads, or on who reads with it: all rows
read in pieces of two shapes, and decode in steps of one.
Dimension key: R rows, r rows that read together, W tokens that each of them reads, S cache slots.
"""

import functools
import os
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from models.llama.chat.messages import Message, Tools
from models.llama.chat_format import ChatFormat
from models.llama.decoding import LENGTH, NOT_FINITE, RUNNING
from models.llama.decoding import DecodeState, Rules, everywhere, sample
from models.llama.generation import Generation
from models.llama.model import LLaMa, Params
from utils import sharding
from utils.errors import DataError

Array = jax.Array

# Tokens that a row reads at once: the larger number as long as there are that many. A row's pieces
# depend on what it reads alone.
WIDTHS = (64, 16)
# Rows that read together.
ROWS = 8

# Texts that stand for an answer.
_PAIRS = (("a", "b"), ("1", "2"))

# What `read` changes of a row.
_CHANGED = ("cache", "tokens_RS", "logprobs_RS", "counts_R", "limits_R", "reason_R")


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def read(
    model: LLaMa,
    params: Params,
    rules: Rules,
    state: DecodeState,
    rows_r: Array | None,
    batch: tuple[Array, Array, Array],
) -> DecodeState:
    """Adds tokens to some rows of the cache; samples the next token of those that have read all.

    Args:
        model: static.
        params: with unstacked layers.
        rules: see Rules.
        state: with room for W more tokens in every row; none of the rows that read is running.
        rows_r: numbers of these rows, R for none; None: all rows in order, as a mesh needs it.
        batch: tokens [r, W] int32 padded on the right, their lengths [r], and limits [r]: how many
            tokens a row may sample now, or 0 if it has more to read.
    """
    tokens_rW, lengths_r, limits_r = batch
    part = state if rows_r is None else _take(state, rows_r)
    held_r, ready_r = part.cache.lengths, limits_r > 0
    last_r1 = jnp.maximum(lengths_r - 1, 0)[:, None]
    logits_r1V, cache = model.apply(
        {"params": params}, tokens_rW, cache=part.cache, logits_at_BM=last_r1
    )
    # `sample` serves the rows that are running: here those that have read all, and no others.
    asked = part.replace(
        cache=cache.replace(lengths=held_r + lengths_r),
        limits_R=jnp.where(ready_r, part.counts_R + limits_r, part.limits_R),
        reason_R=jnp.where(ready_r, RUNNING, LENGTH),
    )
    done = sample(asked, logits_r1V[:, 0], rules)
    bad_r = ~ready_r & (lengths_r > 0) & ~jnp.isfinite(jnp.max(logits_r1V[:, 0], axis=-1))
    reason_r = jnp.where(ready_r, done.reason_R, jnp.where(bad_r, NOT_FINITE, part.reason_R))
    done = done.replace(reason_R=reason_r)
    return everywhere(done) if rows_r is None else _put(state, done, rows_r)


def _take(state: DecodeState, rows_r: Array) -> DecodeState:
    """Some rows of a state; a number of no row gives any."""
    R = len(state.counts_R)

    def take(x):
        by_row = x.reshape(R, -1, *x.shape[1:])
        return by_row.at[rows_r].get(mode="clip").reshape(-1, *x.shape[1:])

    return jax.tree.map(take, state)


def _put(state: DecodeState, part: DecodeState, rows_r: Array) -> DecodeState:
    """The state with its rows replaced by those of `part`."""
    R, r = len(state.counts_R), len(part.counts_R)

    def put(x, new):
        by_row = x.reshape(R, -1, *x.shape[1:])
        return by_row.at[rows_r].set(new.reshape(r, -1, *x.shape[1:]), mode="drop").reshape(x.shape)

    pairs = ((getattr(state, name), getattr(part, name)) for name in _CHANGED)
    return state.replace(**{n: jax.tree.map(put, *pair) for n, pair in zip(_CHANGED, pairs)})


class Turns(Generation):
    """A batch of conversations: a Generation whose rows that have ended may read, and go on."""

    def start(self, prompts, *, key: Array | None = None, room: int) -> None:
        """Prefills the first messages and samples the first token of each row.

        Args:
            prompts: B lists of ids.
            key: as for `generate`.
            room: tokens of the longest row, all turns together; 0: there is one turn.
        """
        # Only the last, narrow piece of a text is padded; on a mesh, rows that read nothing are too.
        padding = WIDTHS[0] if self._on_mesh else WIDTHS[-1] - 1
        super().start(prompts, key=key, room=room + padding if room else 1)

    def read(self, said: Mapping[int, Sequence[int]], limit: Mapping[int, int]) -> None:
        """Lets rows that have ended read what others said, and sample the first token of a turn.

        Args:
            said: ids by row, at least one each.
            limit: how many tokens each of these rows may sample in its turn, at least 1.

        Raises:
            SamplingError: logits that are not finite.
        """
        last, R = self.completions(), len(self.state.counts_R)
        # A row's last token is sampled but not in the cache yet.
        left = {row: [last.row(row)[-1], *ids] for row, ids in said.items()}
        on_mesh, r = self._places is None, self._places or R
        while left:
            # The longest first: few calls then have rows to spare.
            rows = sorted(left, key=lambda row: (-len(left[row]), row))[:r]
            width = _width(len(left[rows[0]]))
            rows = [row for row in rows if _width(len(left[row])) == width]
            tokens_rW, lengths_r = np.zeros((r, width), np.int32), np.zeros(r, np.int32)
            limits_r, rows_r = np.zeros(r, np.int32), np.full(r, R, np.int32)
            for place, row in enumerate(rows):
                place, rows_r[place] = row if on_mesh else place, row
                piece, left[row] = left[row][:width], left[row][width:]
                tokens_rW[place, : len(piece)], lengths_r[place] = piece, len(piece)
                if not left[row]:
                    limits_r[place] = limit[row]
                    del left[row]
            self._read(rows_r, tuple(map(jnp.asarray, (tokens_rW, lengths_r, limits_r))))
        self._raise_if_not_finite()

    def compile(self) -> None:
        """Compiles what any later turn needs, by reading nothing."""
        R = len(self.state.counts_R)
        r = self._places or R
        for width in WIDTHS:
            batch = jnp.zeros((r, width), jnp.int32), *jnp.zeros((2, r), jnp.int32)
            self._read(np.full(r, R, np.int32), batch)

    @property
    def _places(self) -> int | None:
        """Rows that read together; None: all of them, on a mesh."""
        return None if self._on_mesh else min(ROWS, len(self.state.counts_R))

    @property
    def _on_mesh(self) -> bool:
        return sharding.axis_size(sharding.DECODING.batch + sharding.DECODING.heads) > 1

    def _read(self, rows_r: np.ndarray, batch: tuple[Array, Array, Array]) -> None:
        rows = None if self._places is None else jnp.asarray(rows_r)
        self.state = read(self.model, self.params, self.rules, self.state, rows, batch)


def _width(n: int) -> int:
    """How many slots the next piece of n tokens takes."""
    return next((width for width in WIDTHS if n >= width), WIDTHS[-1])


def following_ids(
    form: ChatFormat, messages: Sequence[Message], more: Sequence[Message], tools: Tools | None
) -> list[int]:
    """The ids that follow an assistant's stop token, up to the start of its next answer.

    They are read off two renderings that differ in the answer alone, so they do not depend on how
    the template would write it or anything before it.

    Args:
        form: the model's chat format.
        messages: a conversation that ends with an assistant's message.
        more: what others said then.
        tools: as for `encode_chat`.

    Raises:
        DataError: the template does not take the messages, or writes no stop token after an answer.
    """
    for pair in _PAIRS:
        first, second = (
            form.encode_chat([*messages[:-1], _standing_in(messages[-1], text), *more], tools=tools)
            for text in pair
        )
        if first != second:  # a small vocabulary may have neither of the two
            break
    same = len(os.path.commonprefix([first[::-1], second[::-1]]))
    tail = first[len(first) - same :]
    stops = (i for i, token in enumerate(tail) if token in form.tokenizer.stop_ids)
    end = next(stops, None) if same < len(first) else None
    if end is None or end + 1 == len(tail):
        raise DataError(
            "the chat template writes no stop token between an assistant's message and the next one; "
            "choose another --chat_format"
        )
    return tail[end + 1 :]


def _standing_in(answer: Message, text: str) -> Message:
    """An answer of the same kind with another text."""
    found = {"role": "assistant", "content": text}
    if "tool_calls" in answer:
        found["tool_calls"] = [
            call | {"function": {**call["function"], "arguments": {"value": text}}}
            for call in answer["tool_calls"]
        ]
    return found
