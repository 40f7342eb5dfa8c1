"""Starts the command lines as a user does, on a tiny checkpoint whose tokenizer knows every byte."""

import functools
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import LlamaConfig

from tests import compiling, tiny
from utils.console import cli as console

ROOT = Path(__file__).parents[1]

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<s>", "<|im_end|>", "<|im_start|>"]


@functools.cache
def checkpoint(context: int = 256, layers: int = 1) -> Path:
    """A folder with a random model of `context` tokens, a byte-level tokenizer and a chat template.

    Token ids are 0, 1, 2 for SPECIAL, then 94 visible characters of ASCII, then the other bytes.
    The logits of all but the visible ones are 0, so that greedy text is readable and does not end.
    Do not change the folder: copy it first.
    """
    path = tiny.cache_dir() / f"cli-{context}-{layers}"
    sizes = dict(vocab_size=272, max_position_embeddings=context, num_hidden_layers=layers)
    ids = dict(bos_token_id=0, eos_token_id=1)
    model = tiny.random_model(LlamaConfig(**(tiny.BASE | sizes | ids)))
    model.lm_head.weight[:3] = model.lm_head.weight[97:] = 0
    model.save_pretrained(path)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({c: i for i, c in enumerate(SPECIAL + alphabet)}, [])
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(path / "tokenizer.json"))
    names = dict(bos_token="<s>", eos_token="<|im_end|>", chat_template=TEMPLATE)
    names |= dict(add_bos_token=True)
    (path / "tokenizer_config.json").write_text(json.dumps(names))
    return path


def environment(optimized: bool = False) -> dict[str, str]:
    """The caller's, with a folder of the tests' own for compiled programs and chat's history.

    Args:
        optimized: whether XLA shall optimise: it costs a tiny model more time than it saves.
    """
    folders = {f"XDG_{kind}_HOME": str(tiny.cache_dir() / "xdg") for kind in ("CACHE", "STATE")}
    return os.environ | compiling.environment(optimized) | folders


def share_default_model(path: Path) -> None:
    """Lets the programs find the default model's file, so that they need not fetch it again."""
    models = tiny.cache_dir() / "xdg" / "altiplano" / "models"
    models.parent.mkdir(parents=True, exist_ok=True)
    if not models.exists():
        models.symlink_to(path.parents[1])


def command(program: str, *args: str) -> list[str]:
    """What a shell would start."""
    return [sys.executable, str(ROOT / program), *args]


def run(program: str, *args: str, **options: Any) -> subprocess.CompletedProcess:
    """Runs a program to its end, with an empty stdin unless `input` or `stdin` is given."""
    if "input" not in options:
        options.setdefault("stdin", subprocess.DEVNULL)
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120) | options
    options.setdefault("text", True)
    options.setdefault("env", environment())
    return subprocess.run(command(program, *args), **options)


def inside(program: str, *args: str, input: str | bytes = b"") -> subprocess.CompletedProcess:
    """The same as `run`, in this process: nothing is imported or compiled a second time.

    For what a program makes of its arguments and its input. What a process makes of pipes, signals
    and its end needs `run`.
    """
    data = input if isinstance(input, bytes) else input.encode()
    out, err = (io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True) for _ in range(2))
    err.reconfigure(encoding="utf-8")
    code, on_interrupt = 0, signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program, *args])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        patch.setattr(warnings, "showwarning", warnings.showwarning)
        # These two change the process for good.
        patch.setattr(console, "keep_compilations", lambda: None)
        idle = types.SimpleNamespace(count=0, set=lambda **_: None)
        patch.setattr(console, "Signals", lambda **_: idle)
        try:
            console.run(importlib.import_module(program.removesuffix(".py")).main)
        except SystemExit as e:
            code = e.code
        finally:
            signal.signal(signal.SIGINT, on_interrupt)
    stdout, stderr = (stream.buffer.getvalue().decode() for stream in (out, err))
    return subprocess.CompletedProcess([program, *args], code, stdout, stderr)
