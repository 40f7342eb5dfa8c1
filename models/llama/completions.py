"""What is asked of a generation, and what it returns."""

import dataclasses

import numpy as np

from utils.errors import SamplingError, is_int


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How far to generate; none of these numbers recompiles but n.

    Attributes:
        max_new_tokens: tokens a row at most; None: as many as the context holds. A number above the
            context length is cut to what it holds.
        max_seq_len: prompt and completion together; None: the model's.
        n: samples a prompt, from one prefill.
        stop_ids: any of these ends a row; it is the completion's last token.
        stop_strings: any of these in the text ends a row (needs a tokenizer's `stream`).
        vocab_limit: ids from here on are never emitted, for models whose embedding has more rows than
            the tokenizer has tokens; None: all rows are tokens.
        prompt_width: buffers are made for prompts of at least so many tokens, so that all calls with
            no longer ones share one compilation; None: for the longest of a call.
    """

    max_new_tokens: int | None = 256
    max_seq_len: int | None = None
    n: int = 1
    stop_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    vocab_limit: int | None = None
    prompt_width: int | None = None

    def __post_init__(self):
        bad = []
        least_of = dict(max_new_tokens=0, max_seq_len=1, n=1, vocab_limit=1, prompt_width=1)
        for name, least in least_of.items():
            value = getattr(self, name)
            if value is not None and (not is_int(value) or value < least):
                flag = " (--max_gen_len)" if name == "max_new_tokens" else ""
                bad.append(f"{name}={value!r}{flag}, expected an integer of at least {least}")
        if self.n is None:
            bad.append("n=None, expected an integer of at least 1")
        if any(not isinstance(s, str) or not s for s in self.stop_strings):
            bad.append(f"stop={list(self.stop_strings)!r}: a stop string must not be empty")
        if bad:
            raise SamplingError("; ".join(bad))


@dataclasses.dataclass(frozen=True)
class Completions:
    """What `generate` returns: row i · n + j is sample j of prompt i.

    Attributes:
        tokens: [R, W] int32, zeros after a row's length.
        lengths: [R] int32, tokens up to and including the stop id.
        logprobs: [R, W] float32, under the sampler's distribution before truncation.
        finish_reason: "stop" or "length" a row.
        stop_text: for a row that a stop string ended, its text up to that string; else None.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    logprobs: np.ndarray
    finish_reason: list[str]
    stop_text: list[str | None]

    def row(self, i: int) -> list[int]:
        """The tokens of row i, without padding."""
        return self.tokens[i, : self.lengths[i]].tolist()
