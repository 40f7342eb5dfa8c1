"""Generation under way: a batch of rows, prefilled once and decoded step by step.

The batch, the stream and the RL rollout all run `decode`'s body, so they cannot diverge.
Dimension key: B prompts, R = B · n rows, T prompt tokens, S cache slots, V vocab.
"""

import functools
import zlib
from collections.abc import Iterator, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

import sampling
from models.llama.completions import Completions, GenerationConfig
from models.llama.config import ModelConfig
from models.llama.model import LLaMa, Params, cache_shape, for_decoding, init_cache
from utils import memory, sharding
from utils.errors import SamplingError
from utils.kvcache import KVCache, bucket, check_capacity

Array = jax.Array

RUNNING, STOP, LENGTH, NOT_FINITE = range(4)
REASONS = {RUNNING: "running", STOP: "stop", LENGTH: "length"}


class Generation:
    """A batch of rows under way: `start` prefills, `advance` decodes, `completions` reads.

    `cache` may be handed on: chat starts the next turn on the cache of the last one.

    Attributes:
        rows: of the batch, prompts times samples.
    """

    def __init__(self, model, params, sampler, config: GenerationConfig):
        sampling.check_sampler(sampler)
        self.model, self.params, self.config = model, for_decoding(params), config
        vocab = model.config.vocab_size
        stop_ids = sorted(config.stop_ids)
        padded = stop_ids + [-1] * (-len(stop_ids) % 8 or 8 * (not stop_ids))
        limit = vocab if config.vocab_limit is None else min(vocab, config.vocab_limit)
        self.rules = Rules(
            sampling.traced(sampler), jnp.asarray(padded, jnp.int32), jnp.asarray(limit, jnp.int32)
        )
        self.state: DecodeState | None = None
        self.rows = 0

    def start(
        self, prompts, *, key: Array | None = None, cache: KVCache | None = None, room: int = 1
    ) -> None:
        """Prefills the prompts and samples the first token of each row.

        Args:
            prompts: B lists of token ids, the ones that `cache` does not hold yet.
            key: see `generate`.
            cache: B rows already filled; it is donated. None: an empty one.
            room: slots a row that the cache shall have at least, for what comes after these rows.
        """
        n_prompts = len(prompts)
        held = np.zeros(n_prompts, np.int32)
        if cache is not None:
            held = np.asarray(cache.lengths)[:n_prompts]
        limits = self._check(prompts, held)
        lengths = np.asarray([len(p) for p in prompts], np.int32)
        width = self.config.prompt_width or 1
        if self.config.prompt_width:
            room = max(room, width + (self.config.max_new_tokens or 0))
        width = bucket(max(width, lengths.max()), 16)
        capacity = bucket(max(room, (held + lengths + limits).max(), held.max() + width), 64)
        tokens = np.zeros((n_prompts, width), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        if cache is not None and self.config.n > 1:
            raise SamplingError("a filled cache takes one sample a prompt: n=1")
        if cache is None or cache.capacity < capacity:
            self._check_memory(n_prompts * self.config.n, capacity)
            cache = cache and cache.resized(capacity)
        check_capacity(held, width, capacity if cache is None else cache.capacity)
        keys = _prompt_keys(jax.random.key(0) if key is None else key, prompts)
        batch = (jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray(limits), keys)
        # The parts of a mesh have as many rows each: some that end at once fill it up.
        missing = -n_prompts % sharding.axis_size(sharding.DECODING.batch)
        if missing:
            fills = (tokens[:1], lengths[:1], np.zeros(1, np.int32), keys[:1])
            fill = lambda x, row: jnp.concatenate([x, *[row] * missing])
            batch = tuple(map(fill, batch, fills))
        self.rows = n_prompts * self.config.n
        sizes = (self.config.n, capacity)
        self.state = prefill(self.model, sizes, self.params, self.rules, cache, batch)
        self._raise_if_not_finite()

    def advance(self, steps: int | None = None) -> None:
        """Decodes until every row has ended, or for so many steps."""
        most = np.iinfo(np.int32).max if steps is None else steps
        self.state = decode(self.model, self.params, self.rules, self.state, jnp.int32(most))
        self._raise_if_not_finite()

    def stream(self) -> Iterator[tuple[int, float]]:
        """Yields (token, log-prob) of a single row, one decode step at a time."""
        index = 0
        while True:
            if np.asarray(self.state.counts_R)[0] > index:
                token = np.asarray(self.state.tokens_RS)[0, index]
                yield int(token), float(np.asarray(self.state.logprobs_RS)[0, index])
                index += 1
            if not self.running:
                return
            self.advance(1)

    def end(self, counts_R: np.ndarray, reason_R: np.ndarray) -> None:
        """Ends rows from outside: how many tokens each keeps, and why it ended (or RUNNING)."""
        counts_R, reason_R = (
            np.concatenate([new, np.asarray(old)[self.rows :]]).astype(np.int32)
            for new, old in ((counts_R, self.state.counts_R), (reason_R, self.state.reason_R))
        )
        self.state = self.state.replace(
            counts_R=jnp.asarray(counts_R), reason_R=jnp.asarray(reason_R)
        )

    @property
    def running(self) -> bool:
        """Whether any row has not ended."""
        return bool((np.asarray(self.state.reason_R) == RUNNING).any())

    def completions(self, stop_text: list[str | None] | None = None) -> Completions:
        """What was sampled so far."""
        state, lengths = self.state, np.asarray(self.state.counts_R)[: self.rows]
        width = int(lengths.max(initial=0))
        inside = np.arange(width) < lengths[:, None]
        return Completions(
            tokens=np.where(inside, np.asarray(state.tokens_RS)[: self.rows, :width], 0),
            lengths=lengths,
            logprobs=np.asarray(state.logprobs_RS)[: self.rows, :width],
            finish_reason=[REASONS[r] for r in np.asarray(state.reason_R)[: self.rows].tolist()],
            stop_text=stop_text or [None] * self.rows,
        )

    def _check(self, prompts, held: np.ndarray) -> np.ndarray:
        """Raises SamplingError for a prompt that cannot be; returns the token limit of each."""
        c, vocab = self.config, self.model.config.vocab_size
        context = context_length(self.model.config, c.max_seq_len)
        more = lambda n: f" or pass --max_seq_len {n} or more" * (
            n <= self.model.config.max_seq_len
        )
        most = context if c.max_new_tokens is None else c.max_new_tokens
        if not len(prompts):
            raise SamplingError("no prompts; pass at least one list of token ids")
        limits = []
        for row, (prompt, before) in enumerate(zip(prompts, held.tolist(), strict=True)):
            where = f"prompt {row}" if len(prompts) > 1 else "prompt"
            if not len(prompt):
                raise SamplingError(f"{where} is empty: it has no token to start from")
            if wrong := [t for t in prompt if not 0 <= t < vocab]:
                raise SamplingError(f"{where} has token id {wrong[0]}, expected 0..{vocab - 1}")
            used = before + len(prompt)
            if used >= context and most > 0:
                raise SamplingError(
                    f"{where} has {used} tokens: no room for a completion in max_seq_len={context}; "
                    f"shorten it{more(used + 1)}"
                )
            if most <= context and c.max_new_tokens is not None and used + most > context:
                raise SamplingError(
                    f"{where} has {used} tokens and max_gen_len={most}: {used + most} exceed "
                    f"max_seq_len={context}; shorten either{more(used + most)}"
                )
            limits.append(min(most, context - used))
        return np.asarray(limits, np.int32)

    def _check_memory(self, rows: int, capacity: int) -> None:
        config, dtype = self.model.config, cache_dtype(self.params)
        size = memory.cache_bytes(cache_shape(config, rows, capacity), config.n_layers, dtype)
        memory.check_fits({f"the KV cache of {rows} rows of {capacity} tokens": size})

    def _raise_if_not_finite(self) -> None:
        bad = np.flatnonzero(np.asarray(self.state.reason_R) == NOT_FINITE)
        if len(bad):
            step = int(self.state.counts_R[bad[0]])
            error = SamplingError(
                f"logits of row {bad[0]} at step {step} are not finite: the weights hold NaN or "
                "infinity, or the dtype overflows; try --dtype float32 or check the checkpoint"
            )
            error.exit_code = 5
            raise error


def context_length(config: ModelConfig, max_seq_len: int | None) -> int:
    """Tokens of a row at most. Raises SamplingError if more than the model's context are asked for."""
    model = config.max_seq_len
    if (max_seq_len or model) > model:
        raise SamplingError(
            f"max_seq_len={max_seq_len} exceeds the model's context of {model} tokens"
        )
    return max_seq_len or model


def cache_dtype(params: Params) -> jnp.dtype:
    """The dtype of a KV cache: that of the parameters, but on a CPU always float32.

    XLA's CPU back end has no bfloat16 attention: it would convert the whole cache in every step.
    """
    return jnp.dtype("float32") if jax.default_backend() == "cpu" else params["embed"].dtype


def _prompt_keys(key: Array, prompts: Sequence[Sequence[int]]) -> Array:
    """[B] keys: those given, or one key folded with a checksum of each prompt."""
    if key.ndim:
        return key
    sums = [zlib.crc32(np.asarray(p, np.int32).tobytes()) for p in prompts]
    return jax.vmap(lambda s: jax.random.fold_in(key, s))(jnp.asarray(sums, jnp.uint32))


@flax.struct.dataclass
class DecodeState:
    """All that a decode step reads and writes; donated from step to step.

    Attributes:
        cache: R rows; the last sampled token of each is not in it yet.
        keys_R: one PRNG key a row, folded with the row's count for each draw.
        tokens_RS, logprobs_RS: what was sampled so far.
        counts_R: how many of them.
        limits_R: at how many a row stops.
        reason_R: RUNNING, or why the row ended.
        seen_RV: tokens of prompt and completion, for a repetition penalty; else None.
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
    """What is the same for all steps: the sampler, the stop ids (padded with -1), the vocabulary."""

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
        cache: B rows to go on from (donated), or None for a new one.
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
    # Slots behind a row's true length hold its padding: later tokens overwrite them unseen.
    cache = cache.replace(lengths=held_B + lengths_B)
    rows = lambda x: jnp.repeat(x, n, axis=0)
    keys_R = jax.vmap(jax.random.fold_in)(rows(keys_B), jnp.tile(jnp.arange(n), len(lengths_B)))
    R, S, V = len(lengths_B) * n, cache.capacity, logits_B1V.shape[-1]
    seen_RV = None
    if rules.sampler.repetition_penalty is not None:
        inside_BT = jnp.arange(tokens_BT.shape[1]) < lengths_B[:, None]
        # An id of V is out of bounds, and a scatter drops it.
        ids_BT = jnp.where(inside_BT, tokens_BT, V)
        seen_RV = rows(jax.vmap(lambda ids: jnp.zeros(V, bool).at[ids].set(True))(ids_BT))
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
    """Decodes up to `steps` tokens a row, and stops as soon as all rows have ended."""

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

    # XLA may lay out a loop's result otherwise than each of its steps does.
    return _everywhere(jax.lax.while_loop(going, body, (jnp.int32(0), state))[1])


def sample(state: DecodeState, logits_RV: Array, rules: Rules) -> DecodeState:
    """Draws the next token of every running row and records it; rows that ended stay as they are."""
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
    return _everywhere(state)


def _everywhere(state: DecodeState) -> DecodeState:
    """The state, which every device of a mesh has whole, but for the cache: they share that."""
    buffers = {"k": state.cache.k, "v": state.cache.v}
    state = sharding.replicate(state.replace(cache=state.cache.replace(k=(), v=())))
    return state.replace(cache=state.cache.replace(**buffers))
