"""Decoding on the device: the prefill, and the one decode step that everything samples with.

The batch, the stream and the RL rollout all run `decode`'s body, so they cannot diverge.
Dimension key: B prompts, R = B · n rows, T prompt tokens, S cache slots, V vocab.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

import sampling
from models.llama.model import LLaMa, Params, init_cache
from utils import sharding
from utils.errors import SamplingError
from utils.fields import Config, Range, field, integer, texts
from utils.kvcache import KVCache

Array = jax.Array

RUNNING, STOP, LENGTH, NOT_FINITE = range(4)
REASONS = {RUNNING: "running", STOP: "stop", LENGTH: "length"}


_TEXTS = Range(
    "one or several texts, none of them empty",
    lambda x: isinstance(x, (tuple, list)) and all(isinstance(text, str) and text for text in x),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig(Config):
    """How far to generate; none of these numbers recompiles but n.

    Attributes:
        max_new_tokens: tokens per row at most; None: as many as the context holds. A larger number is
            cut to what the context holds.
        max_seq_len: prompt and completion together; None: the model's context.
        n: samples per prompt, from one prefill.
        stop_ids: any of these ends a row; it is the completion's last token.
        stop_strings: any of these in the text ends a row (needs a tokenizer's `stream`).
        vocab_limit: ids from here on are never emitted, for models whose embedding has more rows than
            the tokenizer has tokens; None: all rows are tokens.
        prompt_width: buffers are made for prompts of at least this many tokens, so that all calls with
            shorter ones share one compilation; None: for the longest of a call.
    """

    error = SamplingError

    max_new_tokens: int | None = field(
        256,
        "new tokens at most; default: 256, or what the context holds",
        integer(0),
        flag="max_gen_len",
    )
    max_seq_len: int | None = field(
        None,
        "prompt and completion together; default: the context of the model's files, which it may exceed",
        integer(1, 2**31 - 1),
    )
    n: int = field(1, "completions per prompt", integer(1))
    stop_strings: tuple[str, ...] = field(
        (),
        "a text, or a JSON list of texts, that ends a completion and is left out of it",
        _TEXTS,
        flag="stop",
        parse=texts,
    )
    stop_ids: frozenset[int] = frozenset()
    vocab_limit: int | None = field(None, allowed=integer(1), flag="")
    prompt_width: int | None = field(None, allowed=integer(1), flag="")


class Detokenizer(Protocol):
    """A tokenizer that turns ids into text (`models.llama.tokenizer.Tokenizer`).

    Attributes:
        stop_ids: ids that end a row.
    """

    stop_ids: frozenset[int]

    def decode(self, ids: Iterable[int], skip_special: bool, after: int | None) -> str:
        """The text of whole rows that follow the token `after`, without hidden ones."""

    def stream(self, skip_special: bool, after: int | None):
        """Decoder of a new row, whose `push(token)` and `finish()` return the new text."""

    def stop_id(self, stop: str) -> int | None:
        """The hidden token that a stop string names."""


@dataclasses.dataclass(frozen=True)
class Completions:
    """Sampled rows: row i · n + j is sample j of prompt i.

    Attributes:
        tokens: [R, W] int32, zeros after a row's length.
        lengths: [R] int32, tokens up to and including the stop id.
        logprobs: [R, W] float32, under the sampler's distribution before truncation.
        finish_reason: "stop" or "length" per row.
        stop_text: text up to the stop string of a row that one ended; otherwise None.
        after: the last token of the prompt per row: a row's text continues that of its prompt.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    logprobs: np.ndarray
    finish_reason: list[str]
    stop_text: list[str | None]
    after: list[int]

    def row(self, i: int) -> list[int]:
        """The tokens of row i, without padding."""
        return self.tokens[i, : self.lengths[i]].tolist()

    def text(self, i: int, tokenizer: Detokenizer) -> str:
        """The text of row i as it is shown, rewarded and evaluated.

        The stop token is cut by its place, since it may be an ordinary token; control tokens are left
        out, and so is a stop string with all that follows.
        """
        if self.stop_text[i] is not None:
            return self.stop_text[i]
        ids = self.row(i)[: self.lengths[i] - (self.finish_reason[i] == "stop")]
        return tokenizer.decode(ids, skip_special=True, after=self.after[i])


def cache_dtype(params: Params) -> jnp.dtype:
    """The dtype of a KV cache: the norms' dtype, but always float32 on a CPU.

    XLA for CPU has no bfloat16 attention: it would convert the whole cache in every step.
    """
    return jnp.dtype("float32") if jax.default_backend() == "cpu" else params["final_norm"].dtype


@flax.struct.dataclass
class DecodeState:
    """Everything that a decode step reads and writes; donated from step to step.

    Attributes:
        cache: R rows; the last sampled token of each row is not in it yet.
        keys_R: one PRNG key per row, folded with the row's count for each draw.
        tokens_RS, logprobs_RS: tokens sampled so far, and their log-probs.
        counts_R: number of tokens sampled.
        limits_R: number of tokens at which a row stops.
        reason_R: RUNNING, or why the row ended.
        seen_RV: [R, V] bool, tokens of the context so far, for a repetition penalty; otherwise None.
    """

    cache: KVCache
    keys_R: Array
    tokens_RS: Array
    logprobs_RS: Array
    counts_R: Array
    limits_R: Array
    reason_R: Array
    seen_RV: Array | None


@flax.struct.dataclass
class Rules:
    """Constants of all steps: the sampler, the stop ids (padded with -1), the vocabulary's limit."""

    sampler: sampling.Sampler
    stop_ids: Array
    vocab_limit: Array


@functools.partial(jax.jit, static_argnames=("model", "sizes"), donate_argnames="cache")
def prefill(
    model: LLaMa,
    sizes: tuple[int, int],
    params: Params,
    rules: Rules,
    cache: KVCache | None,
    batch: tuple[Array, Array, Array, Array],
) -> DecodeState:
    """Runs the prompts through the model, copies each row n times, samples the first tokens.

    Args:
        model: static.
        sizes: static, (n, the capacity of a new cache).
        params: with unstacked layers.
        rules: see Rules.
        cache: B rows to continue (donated), or None for a new cache.
        batch: tokens [B, T] int32 padded on the right, their lengths [B], limits [B] and keys [B].
    """
    n, capacity = sizes
    tokens_BT, lengths_B, limits_B, keys_B = batch
    if cache is None:
        cache = init_cache(model.config, len(tokens_BT), capacity, cache_dtype(params))
    held_B = cache.lengths
    last_B1 = (lengths_B - 1)[:, None]
    logits_B1V, cache = model.apply(
        {"params": params}, tokens_BT, cache=cache, logits_at_BM=last_B1
    )
    # Slots after a row's true length hold its padding: later tokens overwrite them unseen.
    cache = cache.replace(lengths=held_B + lengths_B)
    rows = functools.partial(jnp.repeat, repeats=n, axis=0)
    keys_R = jax.vmap(jax.random.fold_in)(rows(keys_B), jnp.tile(jnp.arange(n), len(lengths_B)))
    R, S, V = len(lengths_B) * n, cache.capacity, logits_B1V.shape[-1]
    seen_RV = None
    if rules.sampler.repetition_penalty is not None:
        # An id of V is out of bounds, and a scatter drops it.
        ids_BS = jnp.where(jnp.arange(S) < cache.lengths[:, None], cache.tokens_BS, V)
        seen_RV = rows(jax.vmap(lambda ids: jnp.zeros(V, bool).at[ids].set(True))(ids_BS))
    state = DecodeState(
        cache=cache.repeated(n, model.config.n_kv_heads) if n > 1 else cache,
        keys_R=keys_R,
        tokens_RS=jnp.zeros((R, S), jnp.int32),
        logprobs_RS=jnp.zeros((R, S), jnp.float32),
        counts_R=jnp.zeros((R,), jnp.int32),
        limits_R=rows(limits_B),
        reason_R=jnp.where(rows(limits_B) > 0, RUNNING, LENGTH).astype(jnp.int32),
        seen_RV=seen_RV,
    )
    return sample(state, rows(logits_B1V[:, 0]), rules)


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames="state")
def decode(model: LLaMa, params, rules: Rules, state: DecodeState, steps: Array) -> DecodeState:
    """Decodes up to `steps` tokens per row, and stops as soon as all rows have ended."""

    def going(carry):
        step, state = carry
        return (step < steps) & jnp.any(state.reason_R == RUNNING)

    def body(carry):
        step, state = carry
        last_R1 = jnp.take_along_axis(state.tokens_RS, state.counts_R[:, None] - 1, axis=1)
        logits_R1V, cache = model.apply({"params": params}, last_R1, cache=state.cache)
        running_R = state.reason_R == RUNNING
        lengths_R = jnp.where(running_R, cache.lengths, state.cache.lengths)
        state = state.replace(cache=cache.replace(lengths=lengths_R))
        return step + 1, sample(state, logits_R1V[:, 0], rules)

    # XLA may shard a loop's result differently from its steps.
    return everywhere(jax.lax.while_loop(going, body, (jnp.int32(0), state))[1])


def sample(state: DecodeState, logits_RV: Array, rules: Rules) -> DecodeState:
    """Draws the next token of every running row and records it; other rows stay as they are."""
    # A maximum is NaN where any logit is, and -inf only where all are.
    finite_R = jnp.isfinite(jnp.max(logits_RV, axis=-1))
    logits_RV = jnp.where(jnp.arange(logits_RV.shape[-1]) < rules.vocab_limit, logits_RV, -jnp.inf)
    keys_R = jax.vmap(jax.random.fold_in)(state.keys_R, state.counts_R)
    tokens_R, logprobs_R = rules.sampler(logits_RV, keys_R, state.seen_RV)
    running_R = (state.reason_R == RUNNING) & finite_R
    rows = jnp.arange(len(tokens_R))
    # A row that is not running writes out of bounds, which a scatter drops.
    at = rows, jnp.where(running_R, state.counts_R, state.tokens_RS.shape[1])
    counts_R = state.counts_R + running_R
    stopped_R = jnp.any(tokens_R[:, None] == rules.stop_ids, axis=-1)
    ended_R = jnp.where(counts_R >= state.limits_R, LENGTH, RUNNING)
    ended_R = jnp.where(finite_R, jnp.where(stopped_R, STOP, ended_R), NOT_FINITE)
    seen_RV = state.seen_RV
    if seen_RV is not None:
        seen_RV = seen_RV.at[rows, tokens_R].set(True)
    state = state.replace(
        tokens_RS=state.tokens_RS.at[at].set(tokens_R),
        logprobs_RS=state.logprobs_RS.at[at].set(logprobs_R),
        counts_R=counts_R,
        reason_R=jnp.where(state.reason_R == RUNNING, ended_R, state.reason_R),
        seen_RV=seen_RV,
    )
    return everywhere(state)


def everywhere(state: DecodeState) -> DecodeState:
    """Replicates the state on every device of a mesh, except for the cache, which they share."""
    buffers = {"k": state.cache.k, "v": state.cache.v}
    state = sharding.replicate(state.replace(cache=state.cache.replace(k=(), v=())))
    return state.replace(cache=state.cache.replace(**buffers))
