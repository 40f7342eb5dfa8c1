"""Generation on the host: prompts are checked and packed, rows decoded to their end, text watched.

Dimension key: B prompts, R = B · n rows, T prompt tokens, S cache slots.
"""

import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import sampling
from models.llama.config import ModelConfig
from models.llama.decoding import NOT_FINITE, REASONS, RUNNING, STOP, Completions, DecodeState
from models.llama.decoding import Detokenizer, GenerationConfig, Rules, cache_dtype
from models.llama.decoding import decode, prefill
from models.llama.model import LLaMa, Params, cache_shape, for_decoding
from utils import memory, sharding
from utils.errors import SamplingError, is_int
from utils.kvcache import KVCache, bucket, check_capacity

Array = jax.Array

# Decode steps between two searches of the text for stop strings, and between two reports of progress.
STRIDE = 8


def plan_buffers(
    config: GenerationConfig, held_B, lengths_B, limits_B, room: int
) -> tuple[int, int]:
    """(width of padded prompts, capacity of the cache), bucketed, so that similar calls compile once.

    Args:
        config: its prompt_width and max_new_tokens say what later calls may need.
        held_B, lengths_B, limits_B: tokens in the cache, tokens of prompts, tokens to sample.
        room: minimum capacity.
    """
    asked = config.prompt_width or 0
    width = bucket(max(asked, lengths_B.max()), 16)
    later = asked + (config.max_new_tokens or 0) if asked else 0
    needed = max((held_B + lengths_B + limits_B).max(), held_B.max() + width)
    return width, bucket(max(room, later, needed), 64)


def pack(prompts, limits_B: np.ndarray, keys_B: Array, width: int) -> tuple[Array, ...]:
    """The arrays of `prefill`: tokens [B, width], lengths, limits and keys.

    The parts of a mesh need equally many rows: rows that end at once fill them up.
    """
    missing = -len(prompts) % sharding.axis_size(sharding.DECODING.batch)
    rows = [*prompts, *[prompts[0]] * missing]
    tokens_BT = np.zeros((len(rows), width), np.int32)
    for row, prompt in zip(tokens_BT, rows):
        row[: len(prompt)] = prompt
    lengths_B = jnp.asarray([len(prompt) for prompt in rows], jnp.int32)
    if missing:
        keys_B = jnp.concatenate([keys_B, *[keys_B[:1]] * missing])
    return jnp.asarray(tokens_BT), lengths_B, jnp.asarray(np.pad(limits_B, (0, missing))), keys_B


class Generation:
    """A batch of rows being generated: `start` prefills, `advance` decodes, `completions` reads.

    The cache of its `state` may start another one: chat continues with the cache of the last turn.

    Attributes:
        rows: number of prompts times samples.
        after: per row, the last token of its prompt.
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
            prompts: B lists of token ids, without those that `cache` already holds.
            key: see `generate`.
            cache: B rows already filled; it is donated. None: an empty cache.
            room: minimum capacity per row, so that later turns fit without a larger cache.
        """
        held_B = np.zeros(len(prompts), np.int32)
        if cache is not None:
            held_B = np.asarray(cache.lengths)[: len(prompts)]
        limits_B = self.limits(prompts, held_B)
        if cache is not None and self.config.n > 1:
            raise SamplingError(f"n={self.config.n} with a filled cache, expected n=1")
        lengths_B = np.asarray([len(p) for p in prompts], np.int32)
        width, capacity = plan_buffers(self.config, held_B, lengths_B, limits_B, room)
        self.rows = len(prompts) * self.config.n
        self.after = [int(p[-1]) for p in prompts for _ in range(self.config.n)]
        if cache is None or cache.capacity < capacity:
            shape = cache_shape(self.model.config, self.rows, capacity)
            size = memory.cache_bytes(shape, self.model.config.n_layers, cache_dtype(self.params))
            memory.check_fits({f"the KV cache of {self.rows} rows of {capacity} tokens": size})
            cache = cache and cache.resized(capacity)
        check_capacity(held_B, width, capacity if cache is None else cache.capacity)
        keys_B = prompt_keys(jax.random.key(0) if key is None else key, prompts)
        batch, sizes = pack(prompts, limits_B, keys_B, width), (self.config.n, capacity)
        self.state = prefill(self.model, sizes, self.params, self.rules, cache, batch)
        self._raise_if_not_finite()

    def advance(self, steps: int | None = None) -> None:
        """Decodes until every row has ended, or for a number of steps."""
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
        """Ends rows from outside: how many tokens each row keeps, and why it ended (or RUNNING)."""
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
        """The tokens sampled so far."""
        state, lengths = self.state, np.asarray(self.state.counts_R)[: self.rows]
        width = int(lengths.max(initial=0))
        inside = np.arange(width) < lengths[:, None]
        return Completions(
            tokens=np.where(inside, np.asarray(state.tokens_RS)[: self.rows, :width], 0),
            lengths=lengths,
            logprobs=np.asarray(state.logprobs_RS)[: self.rows, :width],
            finish_reason=[REASONS[r] for r in np.asarray(state.reason_R)[: self.rows].tolist()],
            stop_text=stop_text or [None] * self.rows,
            after=self.after,
        )

    def limits(self, prompts, held_B: np.ndarray) -> np.ndarray:
        """[B] int32, tokens that each row may sample. Raises SamplingError for an impossible prompt."""
        c, vocab = self.config, self.model.config.vocab_size
        context = context_length(self.model.config, c.max_seq_len)
        most = context if c.max_new_tokens is None else c.max_new_tokens
        if not len(prompts):
            raise SamplingError("no prompts; pass at least one list of token ids")

        def or_longer(n: int) -> str:
            fits = n <= self.model.config.max_seq_len
            return f" or pass --max_seq_len {n} or more" if fits else ""

        limits = []
        for row, (prompt, held) in enumerate(zip(prompts, held_B.tolist(), strict=True)):
            where = f"prompt {row}" if len(prompts) > 1 else "prompt"
            if not len(prompt):
                raise SamplingError(f"{where} is empty: it has no token to start from")
            if wrong := [t for t in prompt if not 0 <= t < vocab]:
                raise SamplingError(f"{where} has token id {wrong[0]}, expected 0..{vocab - 1}")
            used = held + len(prompt)
            if used >= context and most > 0:
                raise SamplingError(
                    f"{where} has {used} tokens: no room for a completion in max_seq_len={context}; "
                    f"shorten it{or_longer(used + 1)}"
                )
            if most <= context and c.max_new_tokens is not None and used + most > context:
                raise SamplingError(
                    f"{where} has {used} tokens and max_gen_len={most}: {used + most} exceed "
                    f"max_seq_len={context}; shorten either{or_longer(used + most)}"
                )
            limits.append(min(most, context - used))
        return np.asarray(limits, np.int32)

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
    """Longest row, in tokens. Warns, once, if max_seq_len exceeds what the model's files say."""
    model = config.max_seq_len
    if (max_seq_len or model) > model:
        message = f"max_seq_len={max_seq_len} exceeds the model's context of {model} tokens"
        warnings.warn(f"{message}: text gets worse there, unless its RoPE is scaled for more")
    return max_seq_len or model


def prompt_keys(key: Array, prompts: Sequence[Sequence[int]]) -> Array:
    """[B] keys: the given ones, or one key folded with a checksum of each prompt."""
    if key.ndim:
        return key
    sums = [zlib.crc32(np.asarray(p, np.int32).tobytes()) for p in prompts]
    return jax.vmap(lambda s: jax.random.fold_in(key, s))(jnp.asarray(sums, jnp.uint32))


def random_key(seed: int) -> Array:
    """A PRNG key. Raises SamplingError unless the seed is from 0 to 2^32 - 1."""
    if not is_int(seed) or not 0 <= seed < 2**32:
        raise SamplingError(f"seed={seed!r}, expected an integer from 0 to {2**32 - 1}")
    return jax.random.key(seed)


def generate(
    model: LLaMa,
    params: Params,
    prompts: Sequence[Sequence[int]],
    sampler: sampling.Sampler = sampling.Greedy(),
    config: GenerationConfig = GenerationConfig(),
    *,
    key: Array | None = None,
    tokenizer: Detokenizer | None = None,
) -> Completions:
    """Completions of a batch of prompts of any lengths.

    >>> import dataclasses
    >>> from models.llama.presets import PRESETS
    >>> from models.llama.model import init_params
    >>> small = dict(vocab_size=64, dim=32, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=32)
    >>> model = LLaMa(dataclasses.replace(PRESETS["smollm2-135m"], **small))
    >>> params = init_params(model.config, jax.random.key(0))
    >>> done = generate(model, params, [[1, 2, 3], [4]], config=GenerationConfig(max_new_tokens=5))
    >>> done.tokens.shape, done.lengths.tolist(), done.finish_reason
    ((2, 5), [5, 5], ['length', 'length'])

    A row's tokens depend on its prompt, its number among the prompt's samples and `key`, and not on
    its batch mates or its place. Prompts of other lengths reuse a compiled step: buffers come in
    bucketed sizes.

    Args:
        model: its config holds the context length.
        params: as loaded, or `for_decoding(params)`, which saves a copy of the weights per call.
        prompts: B lists of token ids.
        sampler: Greedy or TopP.
        config: lengths, stops, samples per prompt.
        key: one PRNG key, or [B] keys, one per prompt; default: key 0. A single key is folded with a
            checksum of each prompt's ids.
        tokenizer: only for stop strings.

    Returns:
        Completions of B · n rows.

    Raises:
        SamplingError: an empty or too long prompt, an id outside the vocabulary, a bad number, or
            logits that are not finite (named by step and row).
    """
    run = Generation(model, params, sampler, config)
    run.start(prompts, key=key)
    return finish(run, tokenizer)


def stream(
    model: LLaMa,
    params: Params,
    prompt: Sequence[int],
    sampler: sampling.Sampler = sampling.Greedy(),
    config: GenerationConfig = GenerationConfig(),
    *,
    key: Array | None = None,
) -> Iterator[tuple[int, float]]:
    """Yields (token, log-prob) of one prompt as they come: the same tokens as `generate`."""
    run = Generation(model, params, sampler, config)
    run.start([prompt], key=key)
    yield from run.stream()


class RowText:
    """The text of one row while it decodes, and whether a stop string is in it.

    Attributes:
        text: text so far; up to the stop string once there is one.
        stopped: whether a stop string appeared.
        tokens: number of tokens pushed.
    """

    def __init__(self, tokenizer: Detokenizer, config: GenerationConfig, after: int | None = None):
        self._decoder = tokenizer.stream(skip_special=True, after=after)
        self._stops, self._stop_ids = config.stop_strings, config.stop_ids
        self._named = {tokenizer.stop_id(stop) for stop in self._stops}
        self.text, self.stopped, self.tokens = "", False, 0

    def push(self, token: int) -> None:
        """Adds the next token; a stop id has no text, see `Completions.text`."""
        self.tokens, self.stopped = self.tokens + 1, token in self._named
        if not self.stopped and token not in self._stop_ids:
            self._add(self._decoder.push(token))

    def finish(self) -> None:
        """Adds the text that the decoder held back: the row has ended."""
        self._add(self._decoder.finish())

    def _add(self, piece: str) -> None:
        self.text += piece
        found = [i for i in map(self.text.find, self._stops) if i >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    @property
    def certain(self) -> int:
        """Characters that no later token can turn into the start of a stop string."""
        longest = 0 if self.stopped else max(map(len, self._stops), default=1) - 1
        for held in range(min(longest, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-held:]) for stop in self._stops):
                return len(self.text) - held
        return len(self.text)


def stream_text(run: Generation, tokenizer: Detokenizer) -> Iterator[str]:
    """Yields the text of a started Generation of one row, as it comes; stops at stop strings."""
    row, shown = RowText(tokenizer, run.config, run.after[0]), 0
    for token, _ in run.stream():
        row.push(token)
        yield row.text[shown : row.certain]
        shown = row.certain
        if row.stopped:
            run.end(np.asarray([row.tokens]), np.asarray([STOP]))
            return
    row.finish()
    yield row.text[shown:]


def finish(
    run: Generation,
    tokenizer: Detokenizer | None = None,
    report: Callable[[int], None] | None = None,
) -> Completions:
    """Decodes a started Generation to its end.

    Args:
        run: started.
        tokenizer: only for stop strings; the text is searched every few steps.
        report: called every few steps with the number of tokens so far.

    Raises:
        SamplingError: stop strings without a tokenizer, or logits that are not finite.
    """
    stops = run.config.stop_strings
    if not stops and report is None:
        run.advance()
        return run.completions()
    if stops and tokenizer is None:
        raise SamplingError("stop strings need a tokenizer; pass tokenizer=")
    rows = [RowText(tokenizer, run.config, last) for last in run.after if stops]
    while True:
        done = run.completions()
        if rows:
            _end_at_stop_strings(run, rows, done)
        if report is not None:
            report(int(done.lengths.sum()))
        if not run.running:
            return run.completions([row.text if row.stopped else None for row in rows])
        run.advance(STRIDE)


def _end_at_stop_strings(run: Generation, rows: list[RowText], done: Completions) -> None:
    """Gives each row's new tokens to its text, and ends the rows in which a stop string appeared."""
    counts, reasons = done.lengths.copy(), np.asarray(run.state.reason_R).copy()
    for i, row in enumerate(rows):
        while not row.stopped and row.tokens < counts[i]:
            row.push(int(done.tokens[i, row.tokens]))
        if row.stopped:
            counts[i], reasons[i] = row.tokens, STOP
    run.end(counts, reasons)
