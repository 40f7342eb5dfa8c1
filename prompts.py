"""The prompts of a command line: from its flags, a file or stdin."""

import sys
from pathlib import Path

from models.llama.tokenizer import decode_utf8
from utils import cli, memory
from utils.errors import ConfigError, DataError
from utils.files import InputFile, parse_json


def read_prompts(prompt: str | None, path: str | None, chat: bool) -> tuple[list[str], bool]:
    """(the prompts, whether they are messages), from the flags, a file or stdin."""
    if prompt is not None and path is not None:
        raise ConfigError("pass --prompt or --prompts_file, not both")
    if prompt is not None:
        return [prompt], chat
    if path is not None:
        return _read_prompts_file(path), chat
    text = read_stdin().removesuffix("\n")
    if text.strip():
        return [text], chat
    cli.say(f"no --prompt: asking {cli.DEFAULT_QUESTION!r} (--chat)", "")
    return [cli.DEFAULT_QUESTION], True


def _read_prompts_file(path: str) -> list[str]:
    file = InputFile(path, DataError)
    text = decode_utf8(bytes(file.read(0, file.size)), path)
    # Not splitlines(): a line may hold U+2028 and the like, JSON's strings too.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise DataError(f"{path} has no prompts: expected one a line")
    if Path(path).suffix != ".jsonl":
        return [line for _, line in numbered]
    return [_prompt_of(line, f"{path}:{number}") for number, line in numbered]


def _prompt_of(line: str, where: str) -> str:
    value = parse_json(line.encode(), where, DataError).get("prompt")
    if not isinstance(value, str):
        raise DataError(f'{where}: expected {{"prompt": "…"}}, got prompt={value!r:.80}')
    return value


def read_stdin() -> str:
    """All of a piped stdin; nothing from a terminal. Raises DataError if it is no text or huge."""
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    data = sys.stdin.buffer.read(cli.MAX_STDIN_BYTES + 1)
    if len(data) > cli.MAX_STDIN_BYTES:
        raise DataError(f"stdin holds over {memory.human(cli.MAX_STDIN_BYTES)}: that is no prompt")
    return decode_utf8(data, "stdin")
