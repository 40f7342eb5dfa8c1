"""Text from a checkpoint: the command line, and `generate`, the function everything samples with.

Dimension key: B prompts, R = B · n rows, T prompt tokens, S cache slots, V vocab.
"""

import gc
import signal

if __name__ == "__main__":
    # Ctrl-C during the imports ends the program without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.disable()  # until cli.run: imports make much that stays, and looking at it takes time

import dataclasses
import json as jsonlib
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

import sampling
from models.llama.chat_format import chat_format_for
from models.llama.decoding import STOP, Completions, Generation, GenerationConfig, context_length
from models.llama.hub import DEFAULT_MODEL
from models.llama.loading import Model, load_model
from models.llama.model import LLaMa, Params
from models.llama.tokenizer import Tokenizer
from prompts import read_prompts
from utils import cli, memory
from utils.errors import ConfigError, SamplingError, is_int

Array = jax.Array

# Decode steps between two looks at the text for stop strings, and two reports of progress.
STRIDE = 8


def generate(
    model: LLaMa,
    params: Params,
    prompts: Sequence[Sequence[int]],
    sampler: sampling.Sampler = sampling.Greedy(),
    config: GenerationConfig = GenerationConfig(),
    *,
    key: Array | None = None,
    tokenizer=None,
) -> Completions:
    """Completions of a batch of prompts of any lengths.

    A row's tokens depend on its prompt, its number among the prompt's samples and `key`, and not on
    its batch mates or its place. Prompts of other lengths reuse a compiled step: buffers come in
    bucketed sizes.

    Args:
        model: its config says the context length.
        params: as loaded, or `for_decoding(params)`, which spares a copy of the weights a call.
        prompts: B lists of token ids.
        sampler: Greedy or TopP.
        config: lengths, stops, samples a prompt.
        key: one PRNG key, or [B] keys, one a prompt; default: key 0. A single key is folded with a
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
        text: so far; up to the stop string once there is one.
        stopped: whether there is one.
        tokens: how many were pushed.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]):
        self._decoder, self._stops = tokenizer.stream(skip_special=True), stops
        self.text, self.stopped, self.tokens = "", False, 0

    def push(self, token: int) -> None:
        """Adds the next token."""
        self.tokens += 1
        self._add(self._decoder.push(token))

    def finish(self) -> None:
        """Adds what the decoder held back: the row has ended."""
        self._add(self._decoder.finish())

    def _add(self, piece: str) -> None:
        self.text += piece
        found = [i for i in map(self.text.find, self._stops) if i >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    @property
    def certain(self) -> int:
        """Characters that no later token can turn into the start of a stop string."""
        if self.stopped:
            return len(self.text)
        longest = max(map(len, self._stops), default=1) - 1
        for held in range(min(longest, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-held:]) for stop in self._stops):
                return len(self.text) - held
        return len(self.text)


def stream_text(run: Generation, tokenizer: Tokenizer) -> Iterator[str]:
    """Yields the text of a started Generation of one row, as it comes; stops at stop strings."""
    row, shown = RowText(tokenizer, run.config.stop_strings), 0
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
    tokenizer: Tokenizer | None = None,
    report: Callable[[int], None] | None = None,
) -> Completions:
    """Decodes a started Generation to its end.

    Args:
        run: started.
        tokenizer: only for stop strings; they are looked for every few steps.
        report: called now and then with the number of tokens so far.

    Raises:
        SamplingError: stop strings without a tokenizer, or logits that are not finite.
    """
    stops = run.config.stop_strings
    if not stops and report is None:
        run.advance()
        return run.completions()
    if stops and tokenizer is None:
        raise SamplingError("stop strings need a tokenizer; pass tokenizer=")
    rows = [RowText(tokenizer, stops) for _ in range(run.rows if stops else 0)]
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


def main(
    ckpt_dir: str = DEFAULT_MODEL,
    tokenizer_path: str | None = None,
    prompt: str | None = None,
    prompts_file: str | None = None,
    chat: bool = False,
    system: str | None = None,
    chat_format: str | None = None,
    max_gen_len: int | None = None,
    max_seq_len: int | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float | None = None,
    seed: int = 0,
    n: int = 1,
    stop: str | None = None,
    dtype: str = "auto",
    allow_extra: bool = False,
    check_finite: bool = False,
    tie: bool | None = None,
    mesh: str | None = None,
    logprobs: bool = False,
    json: bool = False,
    distributed: str | None = None,
    debug: bool = False,
) -> None:
    """Completes prompts. stdout carries the text and nothing else.

    Args:
        ckpt_dir: a checkpoint folder, a .gguf file, a Hugging Face id, or the default model's name.
        tokenizer_path: a tokenizer file or folder; default: the checkpoint's own.
        prompt: the text to complete; default: stdin, or a question if there is none.
        prompts_file: one prompt a line; or .jsonl with objects {"prompt": …}.
        chat: the prompt is a user's message, written in the checkpoint's chat template.
        system: the system message, with --chat.
        chat_format: llama2, llama3 or the name of one of the checkpoint's templates, with --chat.
        max_gen_len: new tokens at most; default: 256, or what the context holds.
        max_seq_len: prompt and completion together; default: the model's context.
        temperature: divides the logits; 0 takes the most probable token each time.
        top_p: nucleus sampling, in (0, 1]; 1 is off.
        top_k: only the k most probable tokens; 0 is off.
        min_p: only tokens of at least min_p times the largest probability; 0 is off.
        repetition_penalty: above 1 makes tokens that were there less likely.
        seed: the same seed gives the same text.
        n: completions a prompt.
        stop: a text, or a JSON list of texts, that ends a completion and is left out of it.
        dtype: float32, bfloat16, float16, or auto: float32 on a CPU, bfloat16 elsewhere.
        allow_extra: ignore tensors of the checkpoint that the model does not have.
        check_finite: refuse weights with NaN or infinity, instead of a warning.
        tie: use the embedding as output head, whatever the file says; --notie: the file's own head.
        mesh: how devices share the model, "data=2,tensor=4"; default: all devices, as fits it.
        logprobs: each token's log-probability, in the JSON.
        json: one JSON object a completion.
        distributed: this process is one of several, see train.py; the first writes.
        debug: show the traceback of an error.
    """
    clock, interrupts = cli.Clock(), cli.Interrupts()
    cli.keep_compilations()
    # All flags before the model is fetched and loaded: a wrong one should not cost that time.
    if logprobs and not json:
        raise ConfigError("--logprobs shows log-probabilities in the JSON: add --json")
    sampler = sampling.TopP(temperature, top_p, top_k, min_p, repetition_penalty)
    sampling.check_sampler(sampler)
    key = random_key(seed)
    config = GenerationConfig(
        max_new_tokens=max_gen_len, max_seq_len=max_seq_len, n=n, stop_strings=_stop_strings(stop)
    )
    prompts, chat = read_prompts(prompt, prompts_file, chat)
    if not chat and (system is not None or chat_format is not None):
        raise ConfigError("--system and --chat_format need --chat")
    options = {"allow_extra": allow_extra, "check_finite": check_finite, "tie": tie}
    model = load_model(ckpt_dir, tokenizer_path, dtype, mesh, **options)
    ids = _encode(model.tokenizer, prompts, chat, system, chat_format)
    interrupts.set(raises=False, leave_at=1)
    run = Generation(model.llama, model.params, sampler, _complete(config, model, ids))
    clock.lap()
    with cli.busy("reading the prompt"):
        run.start(ids, key=key)
    prefill_seconds = clock.lap()
    if run.rows == 1 and not json:
        for piece in stream_text(run, model.tokenizer):
            cli.write(piece)
        cli.write("\n")
    else:
        done = _finish_with_progress(run, model.tokenizer)
        texts = _texts(done, model.tokenizer)
        for row in _json_rows(prompts, ids, done, texts, logprobs) if json else texts:
            cli.write(row + "\n")
    n_prompt, n_tokens = sum(map(len, ids)), int(run.completions().lengths.sum())
    cli.stderr.print(
        f"{n_prompt} prompt tokens, {n_prompt / prefill_seconds:.0f} tok/s; "
        # A row's first token comes from the prompt's pass.
        f"{n_tokens} tokens, {max(n_tokens - run.rows, 0) / clock.lap():.1f} tok/s; "
        f"weights {memory.human(memory.tree_bytes(model.params))}, "
        f"KV cache {memory.human(memory.tree_bytes(run.state.cache))}; "
        f"compiled in {clock.compile_seconds:.1f} s"
    )


def _complete(config: GenerationConfig, model: Model, ids: list[list[int]]):
    """The config with what the model knows: its stop ids, and the default of --max_gen_len."""
    most = config.max_new_tokens
    if most is None:
        context = context_length(model.llama.config, config.max_seq_len)
        most = max(1, min(256, context - max(map(len, ids))))
    return dataclasses.replace(
        config,
        max_new_tokens=most,
        stop_ids=model.tokenizer.stop_ids,
        vocab_limit=model.vocab_limit,
    )


def _finish_with_progress(run: Generation, tokenizer: Tokenizer) -> Completions:
    total = int(np.asarray(run.state.limits_R).sum())
    with cli.progress() as report:
        return finish(run, tokenizer, lambda tokens: report("tokens", tokens, total))


def random_key(seed: int) -> Array:
    """A PRNG key. Raises SamplingError unless the seed is in 0 .. 2^32 - 1."""
    if not is_int(seed) or not 0 <= seed < 2**32:
        raise SamplingError(f"seed={seed!r}, expected an integer from 0 to {2**32 - 1}")
    return jax.random.key(seed)


def _stop_strings(stop: str | None) -> tuple[str, ...]:
    """`--stop`: a text, or a JSON list of texts."""
    if stop is None or not stop.startswith("["):
        return () if stop is None else (stop,)
    try:
        return tuple(jsonlib.loads(stop))
    except ValueError as e:
        raise ConfigError(
            f"--stop {stop!r:.80} is no JSON list of texts ({e}); a text that starts with [ is "
            f"written as {jsonlib.dumps([stop])!r:.80}"
        ) from e


def _encode(
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    chat: bool,
    system: str | None,
    chat_format: str | None,
) -> list[list[int]]:
    """The token ids of each prompt, or of the conversation that it starts."""
    if not chat:
        return [tokenizer.encode(text, bos=tokenizer.adds_bos) for text in prompts]
    form = chat_format_for(tokenizer, chat_format)
    before = [] if system is None else [{"role": "system", "content": system}]
    return [form.encode_chat([*before, {"role": "user", "content": text}]) for text in prompts]


def _texts(done: Completions, tokenizer: Tokenizer) -> list[str]:
    """The text of each row, without control tokens and up to a stop string."""
    decoded = (tokenizer.decode(done.row(i), skip_special=True) for i in range(len(done.lengths)))
    return [text if stop is None else stop for text, stop in zip(decoded, done.stop_text)]


def _json_rows(prompts, ids, done: Completions, texts: list[str], logprobs: bool) -> Iterator[str]:
    """One JSON object a completion."""
    n = len(texts) // len(prompts)
    for i, text in enumerate(texts):
        row = {
            "prompt": prompts[i // n],
            "text": text,
            "prompt_tokens": ids[i // n],
            "tokens": done.row(i),
            "finish_reason": done.finish_reason[i],
        }
        if logprobs:
            row["logprobs"] = done.logprobs[i, : done.lengths[i]].tolist()
        yield jsonlib.dumps(row, ensure_ascii=False)


if __name__ == "__main__":
    cli.run(main)
