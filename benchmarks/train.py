"""How fast is training, next to transformers and torch on the same machine, in the same run?

    python benchmarks/train.py [--repeats 3] [--json_file FILE]

One optimizer step of the default model on 4 rows of 256 tokens: AdamW, all tokens are targets. Each
program is a process of its own, and they take turns step by step. A number is the best of some steps.
"Share" is the model's FLOPs over the best of a few plain matrix products, measured in the same run.
"""

import contextlib
import json
import sys
import tempfile
from pathlib import Path

import fire
import jax
import numpy as np
import rich.console
import rich.table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.workers import Worker  # noqa: E402
from models.llama.hub import DEFAULT_MODEL, resolve  # noqa: E402
from models.llama.load import load_checkpoint, save_checkpoint  # noqa: E402
from trainers.runs.metrics import MATMUL_SHAPES  # noqa: E402
from trainers.packing import pack  # noqa: E402
from utils import memory  # noqa: E402

ROWS, LENGTH = 4, 256
RANK = 16
CHAT_LENGTH, BUCKETS = 512, (64, 128, 256, 512)
OURS = {
    "altiplano": {},  # remat as train.py has it by default
    "altiplano, remat none": dict(remat="none"),
    "altiplano, remat block": dict(remat="block"),
    f"altiplano, LoRA {RANK}": dict(lora_rank=RANK),
}


def programs(dtype: str, folder: Path) -> dict[str, Worker]:
    """The peer, and what is divided by it. In bfloat16 the peer keeps its weights in bfloat16 too."""
    settings = dict(folder=str(folder), dtype=dtype, params_dtype=dtype)
    ours = {name: settings | change for name, change in OURS.items()}
    if dtype != "float32":
        ours["altiplano, float32 weights"] = settings | dict(params_dtype="float32")
    peer = dict(folder=str(folder), dtype=dtype, matmul_shapes=MATMUL_SHAPES["cpu"])
    workers = {"transformers": Worker("train_peers.py", **peer)}
    return workers | {name: Worker("train_ours.py", **changed) for name, changed in ours.items()}


def random_tokens(rows: int, length: int) -> list[list[int]]:
    """Random token ids."""
    return np.random.default_rng(0).integers(100, 40000, (rows, length)).tolist()


def say(row: dict) -> dict:
    """Shows on stderr that it goes on: it takes minutes."""
    print(row, file=sys.stderr, flush=True)
    return row


def compare(dtype: str, folder: Path, repeats: int) -> list[dict]:
    """One row a program: its best step, peak of memory and share of the matmul peak."""
    tokens = random_tokens(ROWS, LENGTH)
    with contextlib.ExitStack() as stack:
        workers = programs(dtype, folder)
        for worker in workers.values():
            stack.enter_context(worker)
        best = dict.fromkeys(workers, float("inf"))
        losses = {name: [] for name in workers}
        for i in range(repeats + 1):
            for name, worker in workers.items():
                seconds, loss = worker.ask("step", tokens)
                losses[name].append(loss)
                best[name] = min(best[name], seconds) if i else best[name]
        held = {name: worker.peak_bytes() for name, worker in workers.items()}
        peaks = {n: workers[n].ask("matmul_peak") for n in ("transformers", "altiplano")}
        flops = {n: w.ask("flops_per_token", LENGTH) for n, w in workers.items() if n[0] == "a"}
        flops["transformers"] = flops["altiplano"]
        rows = []
        for name in workers:
            rate = ROWS * LENGTH / best[name]
            row = {"dtype": dtype, "program": name, "tokens_per_s": rate}
            row["times"] = rate * best["transformers"] / (ROWS * LENGTH)
            row["memory"] = held[name]
            row["memory_times"] = row["memory"] / held["transformers"]
            row |= {"flops_per_s": rate * flops[name], "losses": losses[name]}
            row |= {f"share_{peer}_peak": row["flops_per_s"] / p for peer, p in peaks.items()}
            rows.append(say(row | {f"{peer}_peak": p for peer, p in peaks.items()}))
        return rows


def chat_lengths(count: int) -> np.ndarray:
    """Tokens of conversations: log-normal about a median of 120, clipped to 16..512."""
    lengths = np.exp(np.random.default_rng(0).normal(np.log(120), 0.8, count))
    return np.clip(lengths, 16, CHAT_LENGTH).astype(int)


def packed_rows(lengths: np.ndarray) -> np.ndarray:
    """[R, 512] segment ids of conversations packed into rows, 0 at padding."""
    members, offsets = pack(lengths, CHAT_LENGTH)
    out = np.zeros((len(offsets) - 1, CHAT_LENGTH), int)
    for row, (start, stop) in zip(out, zip(offsets, offsets[1:])):
        ids = np.repeat(np.arange(1, stop - start + 1), lengths[members[start:stop]])
        row[: len(ids)] = ids
    return out


def packing(folder: Path, repeats: int) -> dict:
    """Useful tokens/s on conversations: packed, padded to a bucket, padded to the longest allowed."""
    lengths, seconds = chat_lengths(4000), {}
    packed = packed_rows(lengths)
    batches = lengths[: len(lengths) // ROWS * ROWS].reshape(-1, ROWS)
    buckets = np.array(
        [next(b for b in BUCKETS if b >= longest) for longest in batches.max(axis=1)]
    )
    with Worker("train_ours.py", folder=str(folder), dtype="float32", params_dtype="float32") as w:
        for i in range(repeats + 1):
            rows = packed[ROWS * i : ROWS * (i + 1)].tolist()
            calls = {"packed": (random_tokens(ROWS, CHAT_LENGTH), rows)}
            calls["padded"] = random_tokens(ROWS, CHAT_LENGTH), None, batches[i].tolist()
            for bucket in set(buckets.tolist()):
                members = batches[buckets == bucket]
                some = members[i % len(members)].tolist()
                calls[bucket] = random_tokens(ROWS, bucket), None, some
            for name, args in calls.items():
                seconds.setdefault(name, []).append(w.ask("step", *args)[0])
    best = {name: min(values[1:]) for name, values in seconds.items()}  # the first compiles
    useful = lambda steps, seconds: float(lengths.sum() / (steps * seconds))
    out = {"packed": useful(len(packed) / ROWS, best["packed"])}
    out["bucketed"] = useful(len(batches), np.mean([best[b] for b in buckets.tolist()]))
    out["padded"] = useful(len(batches), best["padded"])
    out["filled"] = float((packed > 0).mean())
    out |= {f"times_{name}": out["packed"] / out[name] for name in ("bucketed", "padded")}
    return say(out)


def vocabulary(folder: Path) -> dict:
    """Temporary bytes of a small model's step by size of vocabulary, and what logits would add.

    The gradients of the embedding and of the head (64 numbers a token of the vocabulary) remain.
    """
    sizes = (49152, 4 * 49152)
    with Worker("train_ours.py", folder=str(folder), dtype="float32", params_dtype="float32") as w:
        held = [w.ask("temporary_bytes", size, ROWS, LENGTH) for size in sizes]
    out = {f"temporary_bytes_{size}": n for size, n in zip(sizes, held)}
    return say(out | {"logits_would_add": 4 * ROWS * LENGTH * (sizes[1] - sizes[0])})


def show(rows: list[dict]) -> None:
    """Prints the comparison."""
    table = rich.table.Table(
        title=f"{ROWS} × {LENGTH} tokens, {DEFAULT_MODEL}, jax {jax.__version__}"
    )
    names = ("dtype", "program", "tokens/s", "÷ transformers", "peak memory", "÷ transformers")
    for i, column in enumerate((*names, "GFLOP/s", "share of XLA's peak", "of torch's")):
        table.add_column(column, justify="right" if i > 1 else "left")
    for row in rows:
        cells = f"{row['tokens_per_s']:.0f}", f"{row['times']:.2f}", memory.human(row["memory"])
        cells += f"{row['memory_times']:.2f}", f"{row['flops_per_s'] / 1e9:.0f}"
        shares = row["share_altiplano_peak"], row["share_transformers_peak"]
        table.add_row(row["dtype"], row["program"], *cells, *(f"{100 * s:.0f} %" for s in shares))
    rich.console.Console(width=140).print(table)
    rates = {(row["dtype"], row["program"]): row["tokens_per_s"] for row in rows}
    for row in {row["dtype"]: row for row in rows}.values():
        lora, full = (rates[row["dtype"], n] for n in (f"altiplano, LoRA {RANK}", "altiplano"))
        print(f"LoRA ÷ full step, {row['dtype']}: {lora / full:.2f}")
        xla, torch = row["altiplano_peak"] / 1e9, row["transformers_peak"] / 1e9
        print(f"matmul peak, {row['dtype']}: {xla:.0f} GFLOP/s by XLA, {torch:.0f} by torch")


def main(repeats: int = 3, json_file: str | None = None) -> None:
    """Prints the tables; see the module."""
    path = resolve(DEFAULT_MODEL)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for dtype in ("float32", "bfloat16"):
            folder = Path(name) / dtype
            save_checkpoint(folder, *load_checkpoint(path, dtype=dtype))
            rows += compare(dtype, folder, repeats)
        found = {"rows": rows, "packing": packing(Path(name) / "float32", repeats)}
        found["vocabulary"] = vocabulary(Path(name) / "float32")
    show(rows)
    print("useful tokens/s on conversations:", found["packing"])
    print("memory by vocabulary:", found["vocabulary"])
    if json_file:
        Path(json_file).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    fire.Fire(main)
