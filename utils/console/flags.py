"""Flags: from the words of a command line, or a file, to the values that configs are built from."""

import contextlib
import difflib
import inspect
import io
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fire

from utils import fields
from utils.errors import ConfigError
from utils.files import read_json

Command = Callable[..., int | None]

# Flags of transformers, TRL, vLLM and mlx-lm whose names here are spelled otherwise.
_ELSEWHERE = {
    "checkpoint": "ckpt_dir",
    "ckpt_dir": "model",
    "eval_steps": "eval_every",
    "gradient_checkpointing": "remat",
    "kl_coef": "beta",
    "max_gen_len": "max_completion_len",
    "max_new_tokens": "max_completion_len",
    "max_seq_length": "seq_len",
    "max_tokens": "max_gen_len",
    "model": "ckpt_dir",
    "num_generations": "group_size",
    "num_return_sequences": "n",
    "report_to": "track",
    "save_steps": "save_every",
}


def parse_flags(command: Command, words: Sequence[str]) -> dict[str, Any]:
    """The flags among a command line's words: texts as they are, numbers and switches as values.

    fire parses; a recording function stands for the command, so that nothing runs before all words
    are understood. Raises ConfigError for a word that no flag takes.
    """
    known = {flag.name: flag for flag in fields.flags_of(command)}
    words = [re.sub("^--no[-_]", "--no", word) for word in words]
    _check_names(words, known)
    words = fields.gathered(words, known.values())
    found, surplus, said = {}, [], io.StringIO()
    texts = {name: str for name, flag in known.items() if flag.is_text}

    @fire.decorators.SetParseFns(**texts)
    def record(*args: Any, **flags: Any) -> None:
        surplus.extend(args)
        found.update(flags)

    words_of = inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)
    by_name = (
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in known
    )
    record.__signature__ = inspect.Signature([words_of, *by_name])
    try:
        with contextlib.redirect_stderr(said):
            fire.Fire(record, command=words)
    except fire.core.FireExit as e:
        reason = said.getvalue().partition("\n")[0].removeprefix("ERROR: ")
        raise ConfigError(f"{reason}; see --help") from e
    if surplus:
        word, name = f"{surplus[0]!r:.60}", next(iter(known))
        if name == "prompt" and "ckpt_dir" in known and _names_a_model(str(surplus[0])):
            name = "ckpt_dir"
        raise ConfigError(f"unknown argument {word}; did you mean --{name} {word}? See --help")
    for name, value in found.items():  # fire says True where no value follows
        missing = str(value) == "True" and not any(word.endswith("True") for word in words)
        if missing and not known[name].is_switch:
            raise ConfigError(f'--{name} needs a value; one that starts with -- as --{name}="…"')
    return found


def _names_a_model(word: str) -> bool:
    return os.path.exists(word) or re.fullmatch(r"[\w.-]+/[\w.-]+(@.+)?", word) is not None


def read_flags(command: Command, path: str) -> dict[str, Any]:
    """The flags in a JSON file: an object of them, or a run.json that holds them."""
    flags = read_json(Path(path), error=ConfigError)
    if isinstance(flags.get("run"), dict):
        flags = flags["run"].get("flags", {})
    if flags.pop("tensorboard", False):  # of a run from before --track
        flags["track"] = ["tensorboard"]
    try:
        known = {flag.name: flag for flag in fields.flags_of(command)}
        _check_names([f"--{name}" for name in flags], known)
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from e
    lists = {name: tuple(value) for name, value in flags.items() if isinstance(value, list)}
    return {name: value for name, value in (flags | lists).items() if value is not None}


def _check_names(words: Sequence[str], known: dict[str, fields.Flag]) -> None:
    """Raises ConfigError for a flag that is not known; fire would invent some of one letter."""
    for word in words:
        flag = word.partition("=")[0]
        name = flag.lstrip("-").replace("-", "_")
        short = re.fullmatch("-[a-zA-Z]", flag)
        if short or word.startswith("--") and not {name, name.removeprefix("no")} & {*known}:
            near = _meant(name, known)
            hint = f"did you mean --{near}?" if near else "--help lists them"
            raise ConfigError(f"unknown flag {flag:.60}; {hint}")


def _meant(name: str, known: dict[str, fields.Flag]) -> str | None:
    """The flag that has another name here, begins or ends alike, or is spelled nearly so."""
    same = {flag.field.name: flag.name for flag in known.values()}
    if (other := same.get(name, _ELSEWHERE.get(name))) in known:
        return other
    ends = (str.startswith, str.endswith)
    alike = [
        one
        for one in known
        if min(len(one), len(name)) > 2 and any(at(one, name) or at(name, one) for at in ends)
    ]
    near = difflib.get_close_matches
    found = near(name, alike, 1, 0) or near(name, known, 1, 0.8)
    return found[0] if found else None
