"""A run's folder as one HTML file: curves, and completions token by token. Needs no server and no net.

A run's files may be hostile, as a completion is what a model wrote: report_page.py escapes all of it.
"""

import json
import math
from pathlib import Path
from typing import Any

from models.llama.config import ModelConfig
from trainers.metrics import whole_lines
from trainers.report.charts import Columns, draw_charts
from trainers.report.page import completions, figure, number, page, plain, table, text
from utils.errors import ConfigError, DataError, is_int, is_number
from utils.files import atomic_file, parse_json, read_json
from utils.trees import flatten

# Settings of run.json that stand at the top, by their last name; the others are at the bottom.
_KEY_SETTINGS = (
    "task task_args data reward loss aggregation scale kl beta group_size prompts_per_step"
)
_KEY_SETTINGS += " max_completion_len temperature batch_size seq_len optimizer learning_rate lr"
_KEY_SETTINGS += " max_steps dtype seed"


def write_report(folder: str | Path, out: str | Path | None = None, *, pngs: bool = False) -> Path:
    """Writes the report of a run that has ended, or is still under way.

    Args:
        folder: holds metrics.jsonl and, where they were written, run.json and rollouts.jsonl. The
            half line that a killed run may leave at the end of a file is ignored.
        out: the HTML file; default: `report.html` in `folder`. Its folder is made if need be.
        pngs: also write each chart as `report-<chart>.png` beside it.

    Returns:
        The HTML file's path.

    Raises:
        DataError: a file is missing or broken (with `file:line`), or there is no step in it yet.
        ConfigError: matplotlib is not installed.
    """
    folder = Path(folder)
    out = Path(out) if out is not None else folder / "report.html"
    columns = _read_metrics(folder / "metrics.jsonl")
    settings = {}
    if (folder / "run.json").exists():  # a notebook's run may have none
        settings = read_json(folder / "run.json", error=DataError)
    shown = list(completions(_read_rollouts(folder / "rollouts.jsonl")))
    charts = draw_charts(columns, pngs=pngs)
    name = folder.resolve().name
    body = [
        f"<h1>{text(name)}</h1>",
        table(_facts(settings, columns)),
        _evaluations(columns),
        '<div class="charts">',
        *map(figure, charts),
        "</div>",
        *shown,
        "<details><summary>All settings</summary>",
        table([(k, json.dumps(v)) for k, v in flatten(settings).items()]),
        "</details>",
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    for chart in charts if pngs else []:
        with atomic_file(out.parent / f"report-{chart.name}.png") as file:
            file.write(chart.png)
    with atomic_file(out) as file:
        file.write(page(name, "\n".join(body)).encode())
    return out


# Files ------------------------------------------------------------------------------------------


def _read_metrics(path: Path) -> Columns:
    """Each number's (step, value) in the order written, NaN for null."""
    columns: Columns = {}
    for where, line in whole_lines(path):
        record = parse_json(line, where, DataError)
        step = record.pop("step", None)
        if not is_int(step) or not 0 <= step < 1 << 53:
            raise DataError(f"{where}: step is {step!r:.40}, expected an integer from 0")
        columns.setdefault("step", []).append((step, step))
        record["compilations"] = {"seconds": _compile_seconds(record.get("compilations"), where)}
        for name, value in flatten(record).items():
            value = int(value) if isinstance(value, bool) else value
            if value is None or is_number(value):
                columns.setdefault(name, []).append((step, number(value)))
    if not columns:
        raise DataError(f"{path} holds no step; wait until the run's first is done")
    return columns


def _compile_seconds(compilations: Any, where: str) -> float:
    try:
        return float(sum(seconds for _, seconds in compilations or []))
    except (TypeError, ValueError, OverflowError) as e:
        raise DataError(
            f"{where}: compilations is {compilations!r:.60}, expected [[what, seconds], …]"
        ) from e


def _read_rollouts(path: Path) -> list[tuple[str, dict]]:
    """(`file:line`, rollout): the first, the middle and the last of those in the file.

    The others are not parsed, as a long run's file may be larger than memory.
    """
    if not path.exists():
        return []
    n = sum(1 for _ in whole_lines(path))
    shown = (0, (n - 1) // 2, n - 1)
    found = [line for i, line in enumerate(whole_lines(path)) if i in shown]
    return [(where, parse_json(line, where, DataError)) for where, line in found]


# Facts ------------------------------------------------------------------------------------------


def _facts(settings: dict, columns: Columns) -> list[tuple[str, str]]:
    """What was run and how far it got."""
    total = lambda names: sum(
        value for name in names for _, value in columns.get(name, []) if math.isfinite(value)
    )
    rows = [("model", _model(settings.get("model")))]
    flat = flatten(settings)
    if "lora" in settings:
        rank = flat.get("lora/rank")
        rows.append(("trained", f"LoRA of rank {rank}" if rank else "all parameters"))
    for key in _KEY_SETTINGS.split():
        found = [v for k, v in flat.items() if k.split("/")[-1] == key and v is not None]
        rows += [(key.replace("_", " "), plain(found[0]))] if found else []
    seconds = total(name for name in columns if name.startswith("seconds/"))
    rows.append(("last step", f"{columns['step'][-1][0]:,}"))
    rows.append(("time", f"{seconds / 60:,.1f} minutes"))
    rows.append(("of it compilation", f"{total(['compilations/seconds']):,.0f} s"))
    skipped = sum(value == 0 for _, value in columns.get("updated", []))
    rows.append(("updates skipped", str(skipped)))
    return [(name, value) for name, value in rows if value]


def _model(fields: Any) -> str:
    try:
        config = ModelConfig(**fields | {"rope_scaling": None})
    except (TypeError, OverflowError, ConfigError):  # of another program, or of a later version
        return ""
    shape = f"{config.n_layers} layers of {config.dim}, vocabulary {config.vocab_size:,}"
    return f"{config.n_params / 1e6:,.1f} million parameters: {shape}"


def _evaluations(columns: Columns) -> str:
    """The first evaluation next to the last."""
    rows = []
    for name, column in columns.items():
        values = [(step, value) for step, value in column if math.isfinite(value)]
        if name.startswith("eval_") and len(values) > 1:
            (first, before), (last, after) = values[0], values[-1]
            told = f"{before:.4g}", f"{after:.4g}", f"{after - before:+.4g}"
            rows.append((name.removeprefix("eval_"), *told, f"{first:,} → {last:,}"))
    head = ("evaluation", "before", "after", "change", "steps")
    return f"<h2>Before and after</h2>{table(rows, head)}" if rows else ""
