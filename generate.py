"""Text from a checkpoint: the command line, and `generate` and `stream` for `from generate import …`."""

import gc
import signal

if __name__ == "__main__":
    # Ctrl-C during the imports ends the program without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.disable()  # until cli.run: imports make much that stays, and looking at it takes time

import contextlib
import dataclasses
import json as jsonlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from models.llama.chat_format import TemplateFlags, chat_format_for
from models.llama.decoding import Completions, GenerationConfig, cache_dtype
from models.llama.generation import Generation, context_length, finish, generate, plan_buffers
from models.llama.generation import random_key, stream, stream_text
from models.llama.hub import local_models
from models.llama.load import DecodingModelFlags, Model, load_model
from models.llama.chat.messages import Message, Tools, read_prompt
from models.llama.model import cache_shape
from models.llama.tokenizer import Tokenizer, decode_utf8, plain_prompt
from sampling import TopP
from utils import distributed, memory
from utils.console import cli
from utils.clock import PhaseClock, moment
from utils.errors import ConfigError, DataError, SamplingError, plural
from utils.fields import Config, again, field, integer
from utils.files import InputFile, parse_json

__all__ = ["Completions", "GenerationConfig", "generate", "stream"]

DEFAULT_QUESTION = "What is the capital of France?"

# Rows of a batch at most: those of a file come out batch by batch.
MAX_ROWS = 64


class Prompt(NamedTuple):
    """A text or a conversation, and the place in a file where it stands; "" for the only one."""

    content: str | list[Message]
    where: str = ""
    tools: Tools | None = None

    @property
    def is_chat(self) -> bool:
        """Whether it is a conversation, a list of messages."""
        return not isinstance(self.content, str)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptFlags(Config):
    """The prompts, and how they become token ids."""

    prompt: str | None = field(
        None, "the text to complete; default: stdin, or a question if stdin is empty"
    )
    prompts_file: str | None = field(
        None,
        'a file with one prompt per line; or .jsonl with objects {"prompt": …} or '
        '{"messages": […]}; completed in batches that fit the memory',
    )
    chat: bool = field(
        False, "the prompt is a user's message, written in the checkpoint's chat template"
    )
    system: str | None = field(
        None, "the system message, empty as well, with --chat; default: the template's own"
    )
    chat_format: str | None = again(TemplateFlags, "chat_format", None)
    template_args: str | None = again(TemplateFlags, "template_args", None)
    markup: bool = field(
        False, "names of control tokens in the prompt are those tokens: for text that you trust"
    )
    seed: int = field(0, "the same seed gives the same text", integer(0, 2**32 - 1))

    def problems(self) -> list[str]:
        both = self.prompt is not None and self.prompts_file is not None
        return super().problems() + ["pass --prompt or --prompts_file, not both"] * both

    def read(self) -> tuple[list[Prompt], bool]:
        """(the prompts, whether they are messages of a chat), from the flags, a file or stdin."""
        if self.prompts_file is not None:
            prompts, chat = _read_prompts_file(self.prompts_file), self.chat
        else:
            text, chat = self.prompt, self.chat
            if text is None:
                text = _read_stdin().removesuffix("\n")
            if self.prompt is None and not text.strip():
                cli.say(f"no --prompt: asking {DEFAULT_QUESTION!r} (--chat)", "")
                text, chat = DEFAULT_QUESTION, True
            prompts = [Prompt(text)]
        chosen = self.system, self.chat_format, self.template_args
        if not (chat or any(p.is_chat for p in prompts)) and any(x is not None for x in chosen):
            raise ConfigError("--system, --chat_format and --template_args need --chat")
        return prompts, chat

    def encode(self, prompts: Sequence[Prompt], chat: bool, tokenizer: Tokenizer):
        """The token ids of each prompt, or of the conversation that it is or starts."""
        chats = chat or any(p.is_chat for p in prompts)
        template = self.chat_format, self.template_args, moment()
        form = chat_format_for(tokenizer, *template) if chats else None
        ids = []
        for content, where, tools in prompts:
            with _errors_at(where):
                if isinstance(content, str) and not chat:
                    ids.append(plain_prompt(content, tokenizer, self.markup))
                else:
                    ids.append(form.encode_chat(self._conversation(content), tools=tools))
        return ids

    def _conversation(self, content: str | list[Message]) -> list[Message]:
        """Messages, with --system before those that have no system message of their own."""
        said = [{"role": "user", "content": content}] if isinstance(content, str) else content
        if self.system is None or said[0]["role"] == "system":
            return said
        return [{"role": "system", "content": self.system}, *said]


def _read_prompts_file(path: str) -> list[Prompt]:
    file = InputFile(path, DataError)
    text = decode_utf8(bytes(file.read(0, file.size)), path)
    # Not splitlines(): a line may hold U+2028 and the like, JSON's strings too.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    prompts = [Prompt(line, f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise DataError(f"{path} has no prompts: expected one per line")
    if Path(path).suffix == ".jsonl":
        return [_row(*p) for p in prompts]
    return prompts


def _row(line: str, where: str, _: None) -> Prompt:
    row = parse_json(line.encode(), where, DataError)
    with _errors_at(where):
        content, tools = read_prompt(row)
    return Prompt(content, where, tools)


@contextlib.contextmanager
def _errors_at(where: str) -> Iterator[None]:
    """Errors of a prompt begin with its place."""
    try:
        yield
    except (DataError, SamplingError) as e:
        raise type(e)(f"{where}: {e}" if where else str(e)) from e


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
    list_models: bool = field(
        False, "list the models that are on this machine, with their sizes, and end", flag="list"
    )

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
    if output.list_models:
        return _list_models()
    clock, signals = PhaseClock(tracing=True), cli.Signals(raises=True, leave_at=2)
    cli.keep_compilations()
    asked, chat = prompts.read()
    with cli.progress() as report:
        loaded = load_model(model, progress=report, say=cli.note)
    ids = prompts.encode(asked, chat, loaded.tokenizer)
    plain, answers = loaded.tokenizer, loaded.tokenizer.answers
    tokenizers = [answers if chat or p.is_chat else plain for p in asked]
    signals.set()
    config, key = _complete(generation, loaded, ids), random_key(prompts.seed)
    run = Generation(loaded.llama, loaded.params, sampler, config)
    n_tokens = cache = 0
    for part in _batches(run, asked, ids):
        run.state = None  # one batch's cache goes before the next one's comes
        with clock("prompt"), cli.busy("reading the prompt; new lengths compile first"):
            run.start(ids[part], key=key)
        with clock("completion"):
            _write(run, tokenizers[part], asked[part], ids[part], output)
        n_tokens += int(run.completions().lengths.sum())
        cache = max(cache, memory.tree_bytes(run.state.cache))
    lap, n_prompt, n_rows = clock.take(), sum(map(len, ids)), len(ids) * config.n
    cli.stderr.print(
        f"{plural(n_prompt, 'prompt token')}, {n_prompt / lap.busy('prompt'):.0f} tok/s; "
        # A row's first token comes from the prompt's pass.
        f"{plural(n_tokens, 'token')}, {max(n_tokens - n_rows, 0) / lap.busy('completion'):.1f} tok/s; "
        f"weights {memory.human(memory.tree_bytes(loaded.params))}, "
        f"KV cache {memory.human(cache)}; compiled in {sum(lap.compiling.values()):.1f} s"
    )


def _list_models() -> None:
    for name, size, place in local_models():
        place = place or "fetched when it is first asked for"
        cli.write(f"{name:<40} {memory.human(size):>7}  {place}\n")


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


def _batches(
    run: Generation, asked: Sequence[Prompt], ids: Sequence[Sequence[int]]
) -> Iterator[slice]:
    """The prompts in order, as many at once as fit half of the free memory.

    Raises SamplingError, before anything is computed, for one that the model cannot complete.
    """
    limits = [_limit(run, *pair) for pair in zip(asked, ids)]
    room = distributed.from_first(memory.free_bytes)  # one number for all processes
    start = 0
    for end in range(1, len(ids) + 1):
        more = slice(start, end + 1)
        rows = (end + 1 - start) * run.config.n
        fits = room is None or _bytes(run, ids[more], limits[more]) <= room / 2
        if end == len(ids) or rows > MAX_ROWS or not fits:
            yield slice(start, end)
            start = end


def _limit(run: Generation, prompt: Prompt, ids: Sequence[int]) -> int:
    with _errors_at(prompt.where):
        return int(run.limits([ids], np.zeros(1, np.int32))[0])


def _bytes(run: Generation, ids: Sequence[Sequence[int]], limits: Sequence[int]) -> int:
    """Bytes that a batch needs: its cache, its logits, and a layer of its prompts' activations."""
    c, rows, held = run.model.config, len(ids) * run.config.n, np.zeros(len(ids), np.int32)
    lengths = np.asarray([len(row) for row in ids])
    width, capacity = plan_buffers(run.config, held, lengths, np.asarray(limits), 1)
    cache = memory.cache_bytes(cache_shape(c, rows, capacity), c.n_layers, cache_dtype(run.params))
    layer = len(ids) * width * (8 * c.dim + 3 * c.ffn_dim)
    return cache + 4 * (layer + 4 * rows * c.vocab_size)


def _write(
    run: Generation,
    tokenizers: Sequence[Tokenizer],
    asked: Sequence[Prompt],
    ids: Sequence[Sequence[int]],
    output: OutputFlags,
) -> None:
    """Decodes a started batch to its end, and writes its completions, each by its prompt's tokenizer."""
    if run.rows == 1 and not output.json:
        for piece in stream_text(run, tokenizers[0]):
            cli.write(piece)
        return cli.write("\n")
    total = int(np.asarray(run.state.limits_R).sum())
    with cli.progress() as report:
        done = finish(run, tokenizers[0], lambda tokens: report("tokens", tokens, total))
    rows = said = [done.text(i, tokenizers[i // run.config.n]) for i in range(run.rows)]
    if output.json:
        rows = _json_rows([p.content for p in asked], ids, done, said, output.logprobs)
    for i, row in enumerate(rows):
        if sys.stdout.isatty() and not output.json:  # where does a text end?
            sample = f"{i % run.config.n + 1} of {run.config.n}" * (run.config.n > 1)
            cli.note(f"── {asked[i // run.config.n].where} {sample}")
        cli.write(row + "\n")


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
