"""Text from a checkpoint: the command line, and `generate` and `stream` for `from generate import …`."""

import gc
import signal

if __name__ == "__main__":
    # Ctrl-C during the imports ends the program without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.disable()  # until cli.run: imports make much that stays, and looking at it takes time

import dataclasses
import json as jsonlib
from collections.abc import Iterator, Sequence

import numpy as np

import sampling
from models.llama.chat_format import chat_format_for
from models.llama.decoding import Completions, GenerationConfig
from models.llama.generation import (
    Generation,
    context_length,
    finish,
    generate,
    random_key,
    stream,
    stream_text,
)
from models.llama.hub import DEFAULT_MODEL
from models.llama.loading import Model, load_model
from models.llama.tokenizer import Tokenizer
from prompts import read_prompts
from utils import cli, memory
from utils.errors import ConfigError

__all__ = ["Completions", "GenerationConfig", "generate", "stream"]


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
    clock, interrupts = cli.Clock(), cli.Signals(raises=True, leave_at=2)
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
    interrupts.set()
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
