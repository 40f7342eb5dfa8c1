"""Is this card right, and how fast is it? For whoever has a GPU or a TPU:

    python benchmarks/accelerator.py [--parts oracles,decode] [--minutes 8] [--json_file FILE] [--tiny]

First the oracles: each has a bound, and passes or not. Then speed, on random weights of the shapes of
Llama 3.2 1B and 3.1 8B, as a share of what the card does in the same run: memory bandwidth (a copy) or
the multipliers' peak (a matrix product); next to transformers on torch where torch sees the card.
A row that dies has its error in the table, and the rest goes on. Rows that would start after
`--minutes` are left out and say so. Exits with 1 if an oracle did not pass. `--tiny` runs all of it on
a CPU with tiny shapes, where the speeds mean nothing.
"""

import argparse
import importlib.util
import json
import os
import re
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import rich.console  # noqa: E402
import rich.table  # noqa: E402

from benchmarks.accelerator_rows import PARTS, Row, rows  # noqa: E402
from benchmarks.workers import Worker  # noqa: E402

# Of the time, where torch comes after us.
OUR_SHARE = 0.75


class Program:
    """A program under measurement, started again where a row ended its process.

    Args:
        script: of benchmarks/, see `Worker`.
        tiny: see the module.
        end: by `time.monotonic`; then the process is killed.
    """

    def __init__(self, script: str, tiny: bool, end: float):
        self._script, self._tiny, self._end = script, tiny, end
        self._worker: Worker | None = None

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_) -> None:
        self._close()

    def ask(self, method: str, *args: Row | list[Row]) -> Row | list[Row] | None:
        """The program's answer, or an error."""
        left = self._end - time.monotonic()
        if left <= 0:
            return {"error": "not started: the time is over, see --minutes"}
        if self._worker is None:
            self._worker = Worker(self._script, tiny=self._tiny)
        timer = threading.Timer(left, self._worker.kill)
        timer.start()
        try:
            return self._worker.ask(method, *args)
        except (RuntimeError, OSError):  # an empty answer, or a closed pipe
            self._close()
            late = time.monotonic() >= self._end
            why = "the time was over, see --minutes" if late else "see its messages above"
            return {"error": f"the process ended: {why}"}
        finally:
            timer.cancel()

    def _close(self) -> None:
        if self._worker is not None:
            self._worker.kill()
        self._worker = None


def measure(chosen: list[Row], tiny: bool, minutes: float) -> dict:
    """What is known of the card, and the rows with what each program found."""
    start = time.monotonic()
    if tiny:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        # Compiles in half the time.
        os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    asked = os.environ.get("JAX_PLATFORMS") or "cpu"
    if "cpu" not in asked:  # what the oracles compare with
        os.environ["JAX_PLATFORMS"] = f"{asked},cpu"
    oracles = [row for row in chosen if row["part"] == "oracles"]
    speeds = [row for row in chosen if row["part"] != "oracles"]
    peer = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    end = start + 60 * minutes * (OUR_SHARE if peer and speeds else 1)
    with Program("accelerator_ours.py", tiny, end) as program:
        about = program.ask("about")
        if about.get("platform") == "cpu" and not tiny:
            raise SystemExit("JAX sees no GPU or TPU; --tiny runs all of it on a CPU")
        judged = program.ask("together", oracles) if oracles else []
        if isinstance(judged, dict):
            judged = [judged] * len(oracles)
        for row, found in zip(oracles, judged):
            row["altiplano"] = say(row, found)
        for row in speeds:
            row["altiplano"] = say(row, program.ask("run", row))
    if peer and speeds and about.get("platform") in ("gpu", "cpu" if tiny else ""):
        with Program("accelerator_torch.py", tiny, start + 60 * minutes) as program:
            known = program.ask("about")
            about["torch"] = known.get("torch", known.get("error"))
            for row in speeds if "torch" in known else ():
                row["torch"] = say(row, program.ask("run", row))
    for row in speeds:
        add_shares(row["altiplano"], about)
    return {
        "about": about,
        "tiny": tiny,
        "minutes": (time.monotonic() - start) / 60,
        "rows": chosen,
    }


def say(row: Row, found: Row | None) -> Row | None:
    """Shows on stderr that it goes on."""
    print(row["what"], row["dtype"], found, file=sys.stderr, flush=True)
    return found


def add_shares(found: Row, about: Row) -> None:
    """The share of what the card does in this run."""
    for name, limit in (("bytes_per_s", "bandwidth"), ("flops_per_s", "peak")):
        if name in found and limit in about:
            found["share"], found["of"] = found[name] / about[limit], limit


def show(found: dict) -> None:
    """Prints the tables."""
    about, page = found["about"], rich.console.Console(width=120)
    title = f"{about.get('device', 'no device')}, jax {about.get('jax', '?')}"
    title += f", torch {about['torch']}" if "torch" in about else ""
    oracles = [row for row in found["rows"] if row["part"] == "oracles"]
    if oracles:
        page.print(oracle_table(title, oracles))
    if len(oracles) < len(found["rows"]):
        if "peak" in about:
            title += f"\ncopy {about['bandwidth'] / 1e9:,.0f} GB/s"
            title += f", bfloat16 products {about['peak'] / 1e12:,.1f} TFLOP/s"
        page.print(speed_table(title, [row for row in found["rows"] if row not in oracles]))
    print(f"{found['minutes']:.1f} minutes", about.get("error", ""))


def oracle_table(title: str, chosen: list[Row]) -> rich.table.Table:
    """A line per oracle: what was found, and the bound of each number."""
    table = rich.table.Table("oracle", "dtype", "found (bound)", "", title=title)
    for row in chosen:
        ours = row["altiplano"]
        number = lambda x: "not finite" if x is None else f"{x:.1e}" if 0 < x < 0.1 else f"{x:.2g}"
        parts = (
            f"{name} {number(x)} ({ours['bounds'][name]:g})"
            for name, x in ours.get("found", {}).items()
        )
        cells = ", ".join(parts) or ours["error"]
        table.add_row(row["what"], row["dtype"], cells, "pass" if passed(row) else "FAIL")
    return table


def speed_table(title: str, chosen: list[Row]) -> rich.table.Table:
    """A line per row: tokens/s, the share of the card, and torch's tokens/s."""
    table = rich.table.Table(title=title)
    for name in ("what", "dtype", "tokens/s", "share of", "torch", "÷ torch", "note"):
        right = name in ("tokens/s", "share of", "torch", "÷ torch")
        table.add_column(name, justify="right" if right else "left")
    for row in chosen:
        ours, torch = row["altiplano"], row.get("torch") or {}
        speed, theirs = ours.get("tokens_per_s"), torch.get("tokens_per_s")
        share = f"{100 * ours['share']:.0f} % of {ours['of']}" if "share" in ours else ""
        notes = [ours.get("error", ours.get("note", ""))]
        notes += [f"torch: {torch[key]}" for key in ("error", "note") if key in torch]
        times = f"{speed / theirs:.2f}" if speed and theirs else ""
        speeds = (f"{x:,.0f}" if x else "" for x in (speed, theirs))
        ours_cell, torch_cell = speeds
        cells = ours_cell, share, torch_cell, times, "; ".join(filter(None, notes))
        table.add_row(row["what"], row["dtype"], *cells)
    return table


def passed(row: Row) -> bool:
    """Whether an oracle was within its bounds."""
    return row["altiplano"].get("passed", False)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=re.sub(r"\s+", " ", __doc__))
    parser.add_argument("--parts", default=",".join(PARTS), help="some of %(default)s")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all; default: 8")
    parser.add_argument("--json_file", type=Path, help="all numbers go there too")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on a CPU")
    args = parser.parse_args()
    parts = args.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts {', '.join(unknown)}, expected some of {', '.join(PARTS)}")
    chosen = [row for row in rows(args.tiny) if row["part"] in parts]
    found = measure(chosen, args.tiny, args.minutes)
    show(found)
    if args.json_file:
        args.json_file.write_text(json.dumps(found, indent=1))
    oracles = [row for row in chosen if row["part"] == "oracles"]
    sys.exit(int(not all(map(passed, oracles))))


if __name__ == "__main__":
    main()
