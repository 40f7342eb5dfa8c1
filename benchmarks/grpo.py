"""How fast is GRPO, next to TRL on the same machine, in the same run?

    python benchmarks/grpo.py [--repeats 3] [--nopeers] [--dtypes float32] [--json_file FILE]

One step: 2 prompts, 8 completions of each, 64 tokens of each, no KL penalty, one AdamW update of all
parameters of the default model. The programs see the same token ids, no completion ends early, and all
are scored by the same function. Each program is a process of its own, and they take turns step by step.
A number is the median of some steps.
"Outside products" is the share of a phase in which nothing is multiplied with the model's matrices: the
same products alone are measured in the same run. Attention is outside.
"""

import contextlib
import json
import statistics
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import fire
import jax
import rich.console
import rich.table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.workers import Worker  # noqa: E402
from models.llama.chat_format import chat_format_for  # noqa: E402
from models.llama.hub import DEFAULT_MODEL, resolve  # noqa: E402
from models.llama.load import load_checkpoint, save_checkpoint  # noqa: E402
from models.llama.tokenizer import Tokenizer, load_tokenizer  # noqa: E402
from utils import memory  # noqa: E402

PROBLEM = "State the final answer to the following arithmetic problem: {} ="
SUMS = "27 + 45", "61 + 18"
GROUP_SIZE, LENGTH = 8, 64
# Completions of which each computes gradients at once: what was fastest of 4, 8 and 16.
AT_ONCE = {"TRL": 16, "altiplano": 8}
PHASES = ("rollout", "reward", "update")


def say(row: dict) -> dict:
    """Shows on stderr that it goes on: it takes minutes."""
    print(row, file=sys.stderr, flush=True)
    return row


def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """Two questions as the model's chat template has them."""
    encode = chat_format_for(tokenizer).encode_chat
    return [encode([{"role": "user", "content": PROBLEM.format(terms)}]) for terms in SUMS]


def programs(dtype: str, folder: Path, peers: bool) -> dict[str, Worker]:
    """In bfloat16 the peer keeps its weights in bfloat16 too; ours is measured both ways."""
    common = dict(folder=str(folder), dtype=dtype, group_size=GROUP_SIZE, length=LENGTH)
    common |= dict(prompts=prompts(load_tokenizer(folder)))
    at_once = AT_ONCE["altiplano"] // GROUP_SIZE
    ours = lambda params: Worker(
        "grpo_ours.py", **common, params_dtype=params, prompts_at_once=at_once
    )
    workers = {"TRL": Worker("grpo_peers.py", **common, at_once=AT_ONCE["TRL"])} if peers else {}
    workers["altiplano"] = ours(dtype)
    if dtype != "float32":
        workers["altiplano, float32 weights"] = ours("float32")
    return workers


def compare(dtype: str, folder: Path, repeats: int, peers: bool) -> list[dict]:
    """One row a program: seconds of a step, by phase, and what only ours is asked for."""
    with contextlib.ExitStack() as stack:
        workers = programs(dtype, folder, peers)
        for worker in workers.values():
            stack.enter_context(worker)
        steps = {name: [] for name in workers}
        for i in range(repeats + 1):
            for name, worker in workers.items():
                steps[name].append(worker.ask("step"))
                if steps[name][-1]["lengths"] != [LENGTH, LENGTH]:
                    raise RuntimeError(f"{name}: not {LENGTH} tokens, {steps[name][-1]}")
        rows = []
        for name, worker in workers.items():
            row = {"dtype": dtype, "program": name, "memory": worker.peak_bytes()}
            row |= summary(steps[name][1:])  # the first compiles
            rows.append(row)
            if peers:
                row["times"] = rows[0]["seconds"] / row["seconds"]
                row["memory_times"] = row["memory"] / rows[0]["memory"]
            if name == "altiplano":
                row |= details(worker, row["phases"], repeats)
            say(row)
        return rows


def summary(steps: list[dict]) -> dict:
    """Medians of steps."""
    median = lambda values: statistics.median(list(values))
    phases = {phase: median(step["phases"][phase] for step in steps) for phase in PHASES}
    return {"seconds": median(step["seconds"] for step in steps), "phases": phases}


def details(worker: Worker, phases: dict[str, float], repeats: int) -> dict:
    """Shares outside products, decode steps, and compilations where completions end early."""
    products = worker.ask("products", repeats)
    outside = {name: 1 - products[name] / phases[name] for name in PHASES}
    once, twice = worker.ask("decode_steps", repeats)
    out = {"products": products, "outside": outside}
    out |= {"decode_step": once, "decode_step_twice": twice, "decode_times": twice / once}
    return out | worker.ask("compilations")


def show(rows: list[dict]) -> None:
    """Prints the comparison, and what only ours was asked for."""
    shape = f"{len(SUMS)} × {GROUP_SIZE} × {LENGTH} tokens"
    at_once = ", ".join(f"{name} {n}" for name, n in AT_ONCE.items())
    title = f"a step of {shape}, {DEFAULT_MODEL}, jax {jax.__version__}; at once: {at_once}"
    table = rich.table.Table(title=title)
    names = ("dtype", "program", "s a step", "TRL ÷", *PHASES, "peak memory", "÷ TRL")
    for i, column in enumerate(names):
        table.add_column(column, justify="right" if i > 1 else "left")
    ratio = lambda row, name: f"{row[name]:.2f}" if name in row else ""
    for row in rows:
        phases = (f"{row['phases'][name]:.2f}" for name in PHASES)
        cells = f"{row['seconds']:.2f}", ratio(row, "times"), *phases, memory.human(row["memory"])
        table.add_row(row["dtype"], row["program"], *cells, ratio(row, "memory_times"))
    page = rich.console.Console(width=140)
    page.print(table)
    for row in (row for row in rows if "outside" in row):
        shares = ", ".join(f"{name} {100 * x:.0f} %" for name, x in row["outside"].items())
        n, dtype = len(SUMS) * GROUP_SIZE, row["dtype"]
        steps = f"{1e3 * row['decode_step']:.0f} ms with {n} rows"
        steps += f", {1e3 * row['decode_step_twice']:.0f} ms with {2 * n}"
        print(f"{dtype}: outside products: {shares}")
        print(f"{dtype}: a decode step: {steps}: {row['decode_times']:.2f} ×")
        longest = ", ".join(str(longest) for _, longest in row["lengths"])
        compiled = row["compiled"] or "none"
        print(f"{dtype}: compilations with completions of at most {longest} tokens: {compiled}")


def main(
    repeats: int = 3,
    peers: bool = True,
    dtypes: str | Iterable[str] = ("float32", "bfloat16"),
    ckpt_dir: str = DEFAULT_MODEL,
    json_file: str | None = None,
) -> None:
    """Prints the tables; see the module."""
    path, rows = resolve(ckpt_dir), []
    with tempfile.TemporaryDirectory() as name:
        for dtype in [dtypes] if isinstance(dtypes, str) else dtypes:
            folder = Path(name) / dtype
            save_checkpoint(folder, *load_checkpoint(path, dtype=dtype), tokenizer=path)
            rows += compare(dtype, folder, repeats, peers)
    show(rows)
    if json_file:
        Path(json_file).write_text(json.dumps({"rows": rows}, indent=1))


if __name__ == "__main__":
    fire.Fire(main)
