"""Text from a checkpoint: the command line, and `generate` and `stream` for `from generate import …`."""

import gc
import signal

if __name__ == "__main__":
    # Ctrl-C during the imports ends the program without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.disable()  # until cli.run: imports make much that stays, and looking at it takes time

import dataclasses
import json as jsonlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

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
from models.llama.load import DecodingModelFlags, Model, load_model
from models.llama.tokenizer import Tokenizer, decode_utf8, plain_prompt
from sampling import TopP
from utils import memory
from utils.console import cli
from utils.clock import PhaseClock
from utils.errors import ConfigError, DataError
from utils.fields import Config, field, integer
from utils.files import InputFile, parse_json

__all__ = ["Completions", "GenerationConfig", "generate", "stream"]

DEFAULT_QUESTION = "What is the capital of France?"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptFlags(Config):
    """The prompts, and how they become token ids."""

    prompt: str | None = field(
        None, "the text to complete; default: stdin, or a question if stdin is empty"
    )
    prompts_file: str | None = field(
        None, 'a file with one prompt per line; or .jsonl with objects {"prompt": …}'
    )
    chat: bool = field(
        False, "the prompt is a user's message, written in the checkpoint's chat template"
    )
    system: str | None = field(None, "the system message, with --chat")
    chat_format: str | None = field(
        None, "llama2, llama3 or the name of one of the checkpoint's templates, with --chat"
    )
    markup: bool = field(
        False, "names of control tokens in the prompt are those tokens: for text that you trust"
    )
    seed: int = field(0, "the same seed gives the same text", integer(0, 2**32 - 1))

    def problems(self) -> list[str]:
        both = self.prompt is not None and self.prompts_file is not None
        return super().problems() + ["pass --prompt or --prompts_file, not both"] * both

    def read(self) -> tuple[list[str], bool]:
        """(the prompts, whether they are messages of a chat), from the flags, a file or stdin."""
        texts, chat = [self.prompt], self.chat
        if self.prompts_file is not None:
            texts = _read_prompts_file(self.prompts_file)
        elif self.prompt is None:
            texts = [_read_stdin().removesuffix("\n")]
            if not texts[0].strip():
                cli.say(f"no --prompt: asking {DEFAULT_QUESTION!r} (--chat)", "")
                texts, chat = [DEFAULT_QUESTION], True
        if not chat and (self.system is not None or self.chat_format is not None):
            raise ConfigError("--system and --chat_format need --chat")
        return texts, chat

    def encode(self, texts: Sequence[str], chat: bool, tokenizer: Tokenizer) -> list[list[int]]:
        """The token ids of each prompt, or of the conversation that it starts."""
        if not chat:
            return [plain_prompt(text, tokenizer, self.markup) for text in texts]
        form = chat_format_for(tokenizer, self.chat_format)
        before = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [form.encode_chat([*before, {"role": "user", "content": text}]) for text in texts]


def _read_prompts_file(path: str) -> list[str]:
    file = InputFile(path, DataError)
    text = decode_utf8(bytes(file.read(0, file.size)), path)
    # Not splitlines(): a line may hold U+2028 and the like, JSON's strings too.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise DataError(f"{path} has no prompts: expected one per line")
    if Path(path).suffix != ".jsonl":
        return [line for _, line in numbered]
    return [_prompt_of(line, f"{path}:{number}") for number, line in numbered]


def _prompt_of(line: str, where: str) -> str:
    value = parse_json(line.encode(), where, DataError).get("prompt")
    if not isinstance(value, str):
        raise DataError(f'{where}: expected {{"prompt": "…"}}, got prompt={value!r:.80}')
    return value


def _read_stdin() -> str:
    """All of a piped stdin; nothing from a terminal. Raises DataError if it is not text, or huge."""
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    data = sys.stdin.buffer.read(cli.MAX_STDIN_BYTES + 1)
    if len(data) > cli.MAX_STDIN_BYTES:
        limit = memory.human(cli.MAX_STDIN_BYTES)
        raise DataError(f"stdin holds over {limit}, too much for a prompt; pass --prompts_file")
    return decode_utf8(data, "stdin")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputFlags(Config):
    """How completions are written."""

    json: bool = field(False, "one JSON object per completion")
    logprobs: bool = field(False, "each token's log-probability, in the JSON")

    def problems(self) -> list[str]:
        alone = self.logprobs and not self.json
        message = "--logprobs shows log-probabilities in the JSON: add --json"
        return super().problems() + [message] * alone


def main(
    *,
    prompts: PromptFlags,
    generation: GenerationConfig = GenerationConfig(max_new_tokens=None),
    sampler: TopP = TopP(temperature=0.6, top_p=0.9),
    model: DecodingModelFlags,
    output: OutputFlags,
    processes: cli.ProcessFlags,
) -> None:
    """Completes prompts; stdout carries the text and nothing else.

    Example: python generate.py --prompt "Once upon a time" --max_gen_len 50
    """
    clock, signals = PhaseClock(tracing=True), cli.Signals(raises=True, leave_at=2)
    cli.keep_compilations()
    texts, chat = prompts.read()
    with cli.progress() as report:
        loaded = load_model(model, progress=report, say=cli.note)
    ids = prompts.encode(texts, chat, loaded.tokenizer)
    if chat:
        loaded = dataclasses.replace(loaded, tokenizer=loaded.tokenizer.answers)
    signals.set()
    run = Generation(loaded.llama, loaded.params, sampler, _complete(generation, loaded, ids))
    with clock("prompt"), cli.busy("reading the prompt"):
        run.start(ids, key=random_key(prompts.seed))
    with clock("completion"):
        if run.rows == 1 and not output.json:
            for piece in stream_text(run, loaded.tokenizer):
                cli.write(piece)
            cli.write("\n")
        else:
            done = _finish_with_progress(run, loaded.tokenizer)
            said = [done.text(i, loaded.tokenizer) for i in range(run.rows)]
            rows = _json_rows(texts, ids, done, said, output.logprobs) if output.json else said
            for row in rows:
                cli.write(row + "\n")
    lap = clock.take()
    n_prompt, n_tokens = sum(map(len, ids)), int(run.completions().lengths.sum())
    cli.stderr.print(
        f"{n_prompt} prompt tokens, {n_prompt / lap.busy('prompt'):.0f} tok/s; "
        # A row's first token comes from the prompt's pass.
        f"{n_tokens} tokens, {max(n_tokens - run.rows, 0) / lap.busy('completion'):.1f} tok/s; "
        f"weights {memory.human(memory.tree_bytes(loaded.params))}, "
        f"KV cache {memory.human(memory.tree_bytes(run.state.cache))}; "
        f"compiled in {sum(lap.compiling.values()):.1f} s"
    )


def _complete(
    config: GenerationConfig, model: Model, ids: Sequence[Sequence[int]]
) -> GenerationConfig:
    """The config with what the model knows: its stop ids, and the default of --max_gen_len."""
    for stop in config.stop_strings:
        model.tokenizer.stop_id(stop)  # raises before the prompts are read
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


def _json_rows(prompts, ids, done: Completions, texts: list[str], logprobs: bool) -> Iterator[str]:
    """One JSON object per completion."""
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
