"""What benchmarks/accelerator.py measures: its rows, and the shapes of their models. Without JAX."""

import dataclasses
import traceback
from collections.abc import Callable
from typing import Any

from models.llama.config import ModelConfig
from models.llama.presets import PRESETS

PARTS = ("oracles", "decode", "prefill", "sft", "lora", "grpo")
Row = dict[str, Any]  # "part", "what" and "dtype" as shown, "settings" of the program's method


def configs(tiny: bool) -> dict[str, ModelConfig]:
    """The shapes of Llama 3.2 1B (a tied head) and 3.1 8B; tiny ones of the same kinds."""
    found = {"1B": PRESETS["llama-3.2-1b"], "8B": PRESETS["llama-3.1-8b"]}
    if tiny:
        sizes = dict(vocab_size=512, dim=64, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=128)
        found = {k: dataclasses.replace(c, **sizes, head_dim=64) for k, c in found.items()}
    return found


def rows(tiny: bool) -> list[Row]:
    """All rows in their order."""

    def row(part: str, what: str, dtype: str, **settings: Any) -> Row:
        return {"part": part, "what": what, "dtype": dtype, "settings": settings}

    out = []
    # A CPU in float32 is what the oracles compare with.
    dtypes = ("bfloat16",) if tiny else ("float32", "bfloat16")
    for kind in ("plain", "packed", "hidden"):
        for dtype in dtypes:
            what = f"logits, gradients: {kind}"
            out.append(row("oracles", what, dtype, oracle="model", kind=kind))
    for oracle, what in ORACLES.items():
        for dtype in ("float32",) if oracle == "sampling" else dtypes:
            out.append(row("oracles", what, dtype, oracle=oracle))
    counts = {"1B": (4,), "8B": (1,)} if tiny else {"1B": (1, 16, 128), "8B": (1, 128)}
    for size, n in ((size, n) for size, ns in counts.items() for n in ns):
        what = f"decode {size}, {n} row" + "s" * (n > 1)
        for dtype in ("bfloat16", "int8"):
            out.append(row("decode", what, dtype, size=size, rows=n))
    length = 192 if tiny else 4096
    for size in ("8B",) if tiny else ("1B", "8B"):
        what = f"prefill {size}, {length:,}"
        out.append(row("prefill", what, "bfloat16", size=size, length=length))
    shape = dict(rows=2, length=192) if tiny else dict(rows=8, length=2048)
    what = f"SFT step 1B, {shape['rows']} × {shape['length']:,}"
    out.append(row("sft", what, "bfloat16", size="1B", **shape))
    out.append(row("sft", what + ", packed", "bfloat16", size="1B", **shape, packed=True))
    shape = dict(rows=2, length=192) if tiny else dict(rows=4, length=2048)
    what = f"LoRA step 8B, {shape['rows']} × {shape['length']:,}"
    for dtype in ("bfloat16", "int8"):  # of the frozen model
        out.append(row("lora", what, dtype, size="8B", **shape, rank=16))
    shape = dict(prompts=2, group=2, length=16) if tiny else dict(prompts=32, group=8, length=256)
    what = "GRPO step 1B, " + " × ".join(str(n) for n in shape.values())
    out.append(row("grpo", what, "bfloat16", size="1B", **shape))
    return out


ORACLES = {
    "cache": "cached = uncached",
    "sampling": "draws = distribution",
    "grpo": "GRPO step, branches",
}


def attempt(function: Callable[..., Row | None], *args: Any, **settings: Any) -> Row | None:
    """What a function returns, or the error that it died of."""
    try:
        return function(*args, **settings)
    except Exception as error:  # a card's own errors are of many classes
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
