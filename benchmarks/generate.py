"""How fast is generation, next to transformers and llama.cpp on the same machine, in the same run?

    python benchmarks/generate.py [--repeats 3] [--json_file FILE]

Each number is the best of some rounds; the programs take turns in a round, so that a slow moment of
the machine hits them alike. llama.cpp takes part where `xllamacpp` is installed. The last column is
what reading the weights once at the machine's measured memory bandwidth would allow.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fire
import jax
import numpy as np
import rich.console
import rich.table
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.peers import LlamaCpp, Transformers, xllamacpp  # noqa: E402
from models.llama.decoding import GenerationConfig  # noqa: E402
from models.llama.generation import Generation  # noqa: E402
from models.llama.hub import DEFAULT_MODEL, resolve  # noqa: E402
from models.llama.load import load_checkpoint, save_checkpoint  # noqa: E402
from models.llama.model import LLaMa, for_decoding  # noqa: E402
from sampling import Greedy  # noqa: E402
from utils import memory  # noqa: E402

NEW = 32
DTYPES = ("float32", "bfloat16", "int8")  # int8: of the weights, beside llama.cpp's Q8_0


class Altiplano:
    """This project, timed like its peers."""

    def __init__(self, path: Path, dtype: str):
        narrow, dtype = dtype == "int8", "float32" if dtype == "int8" else dtype
        config, params = load_checkpoint(path, dtype=dtype, quantize=narrow)
        self._model, self._params = LLaMa(config, dtype), for_decoding(params, donate=True)
        self.bytes = memory.tree_bytes(self._params)

    def run(self, prompts: list[list[int]], new: int) -> tuple[float, float]:
        """(prefill seconds, decode seconds of new - 1 steps)."""
        config = GenerationConfig(max_new_tokens=new)
        run = Generation(self._model, self._params, Greedy(), config)
        started = time.perf_counter()
        run.start(prompts)
        prefill = time.perf_counter() - started
        started = time.perf_counter()
        run.advance()
        return prefill, time.perf_counter() - started


def bandwidth() -> float:
    """Bytes a second at which two threads of torch read an array far larger than the caches."""
    array = torch.ones(100_000_000)
    seconds = []
    for _ in range(8):
        started = time.perf_counter()
        array.sum()
        seconds.append(time.perf_counter() - started)
    return array.nbytes / min(seconds)


def prompts(rows: int, length: int) -> list[list[int]]:
    """Random token ids."""
    return np.random.default_rng(0).integers(100, 40000, (rows, length)).tolist()


def rounds(programs: dict, batch: list[list[int]], new: int, repeats: int) -> dict:
    """The best (prefill, decode) seconds of each program, after one round to warm up."""
    best = {name: [float("inf")] * 2 for name in programs}
    for i in range(repeats + 1):
        for name, program in programs.items():
            seconds = program.run(batch, new)
            if i:
                best[name] = [min(a, b) for a, b in zip(best[name], seconds)]
    return best


def measure(dtype: str, path: Path, folder: Path, repeats: int) -> list[dict]:
    """All tokens/s of one dtype: rows {what, dtype, program: tokens/s, limit}."""
    ours = Altiplano(path, dtype)
    programs = {"altiplano": ours}
    if dtype != "int8":
        save_checkpoint(folder / dtype, *load_checkpoint(path, dtype=dtype))
        programs["transformers"] = Transformers(folder / dtype, dtype)
    if xllamacpp is not None:
        programs["llama.cpp"] = LlamaCpp(path, dtype, folder)
    two = {name: program for name, program in programs.items() if name != "llama.cpp"}
    limit = bandwidth() / ours.bytes
    out = []

    def add(what: str, best: dict, phase: int, tokens: float, limit: float | None = None) -> None:
        rates = {name: tokens / seconds[phase] for name, seconds in best.items()}
        out.append({"what": what, "dtype": dtype, **rates, "limit": limit})
        print(out[-1], file=sys.stderr, flush=True)  # it takes minutes: show that it goes on

    one = rounds(programs, prompts(1, 32), NEW, repeats)
    add("decode, 1 row", one, 1, NEW - 1, limit)
    add(
        "decode, 16 rows",
        rounds(two, prompts(16, 32), NEW, max(2, repeats // 2)),
        1,
        16 * (NEW - 1),
    )
    add("prefill of 512", rounds(programs, prompts(1, 512), 1, repeats), 0, 512)
    add("decode after 2,000", rounds(two, prompts(1, 2000), NEW, 1), 1, NEW - 1)
    return out


def start() -> dict:
    """Seconds from the second start of generate.py to its first character, and its peak memory."""
    command = [sys.executable, str(ROOT / "generate.py"), "--prompt", "The capital of France is"]
    best, peak = float("inf"), 0
    for i in range(4):
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
        )
        process.stdout.read(1)
        seconds = time.perf_counter() - started
        process.stdout.read()
        _, _, usage = os.wait4(process.pid, 0)
        if i:
            best, peak = min(best, seconds), usage.ru_maxrss * 1024
    return {"seconds to the first text": best, "peak memory": memory.human(peak)}


def main(repeats: int = 3, json_file: str | None = None) -> None:
    """Prints the table; see the module."""
    path = resolve(DEFAULT_MODEL)
    started = start()
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for dtype in DTYPES for row in measure(dtype, path, Path(folder), repeats)]
    names = ["altiplano", "transformers", "llama.cpp"]
    table = rich.table.Table(title=f"tokens/s, {DEFAULT_MODEL}, jax {jax.__version__}")
    for column in ("what", "dtype", *names, "÷ transformers", "÷ llama.cpp", "memory limit"):
        table.add_column(column, justify="left" if column in ("what", "dtype") else "right")
    for row in rows:
        cells = [f"{row[name]:.1f}" if name in row else "" for name in names]
        cells += [f"{row['altiplano'] / row[n]:.2f}" if n in row else "" for n in names[1:]]
        cells.append(f"{row['limit']:.1f}" if row["limit"] else "")
        table.add_row(row["what"], row["dtype"], *cells)
    rich.console.Console(width=120).print(table)
    print(started)
    if json_file:
        Path(json_file).write_text(json.dumps({"rows": rows, **started}, indent=1))


if __name__ == "__main__":
    fire.Fire(main)
