"""A run's folder as one HTML page: curves, and completions token by token, without server or network.

A run's files may be hostile, since a completion is what a model wrote: page.html.jinja escapes all of it.
"""

import base64
import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from models.llama.config import ModelConfig
from trainers.runs.metrics import whole_lines
from trainers.report.completions import (
    best_and_worst,
    number,
    plain,
    shown,
    shown_rollout,
    swatches,
)
from trainers.report.charts import Columns, draw_charts, is_hidden, moving_ends
from utils.errors import ConfigError, DataError, is_int, is_number
from utils.files import atomic_file, flatten, parse_json, read_json


def write_report(
    folders: str | Path | Sequence[str | Path], out: str | Path | None = None, *, pngs: bool = False
) -> Path:
    """Writes the report of a run that has ended, or is still under way; of several, side by side.

    Args:
        folders: each holds metrics.jsonl and, where they were written, run.json and rollouts.jsonl. The
            half line that a killed run may leave at the end of a file is ignored.
        out: the HTML file; default: in the first folder, `report.html`, of several runs
            `comparison.html`. Its folder is made if need be.
        pngs: also write each chart as `report-<chart>.png` beside it.

    Returns:
        The HTML file's path.

    Raises:
        DataError: a file is missing or broken (with `file:line`), or there is no step in it yet.
        ConfigError: matplotlib is not installed.
    """
    folders = [Path(f) for f in ([folders] if isinstance(folders, (str, Path)) else folders)]
    several = len(folders) > 1
    default = folders[0] / ("comparison.html" if several else "report.html")
    out = Path(out) if out is not None else default
    names = [folder.resolve().name for folder in folders]
    names = names if len({*names}) == len(names) else [str(folder) for folder in folders]
    runs = [_read_run(name, folder, several) for name, folder in zip(names, folders)]
    groups = draw_charts({run["name"]: run["columns"] for run in runs}, pngs=pngs)
    charts = [chart for group in groups.values() for chart in group]
    page = _template().render(
        runs=runs,
        title=" against ".join(names) if several else runs[0]["title"],
        hero=next((chart for chart in charts if chart.wide), None),
        groups=groups,
        swatches=swatches(),
        settings=_compared([run["settings"] for run in runs]),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    for chart in charts:
        if chart.png is not None:
            with atomic_file(out.parent / f"report-{chart.name}.png") as file:
                file.write(chart.png)
    with atomic_file(out) as file:
        file.write(page.encode())
    return out


def _read_run(name: str, folder: Path, several: bool) -> dict[str, Any]:
    """A run as the template shows it."""
    columns = read_metrics(folder / "metrics.jsonl")
    settings = {}
    if (folder / "run.json").exists():  # a notebook's run may have none
        settings = flatten(read_json(folder / "run.json", error=DataError))
    n, rollouts = _read_some(folder / "rollouts.jsonl", last=several)
    rollouts = [shown_rollout(*line) for line in rollouts]
    written = (folder / "metrics.jsonl").stat().st_mtime
    return {
        "name": name,
        "columns": columns,
        "settings": settings,
        "title": _title(settings) or name,
        "about": [*_about(settings), time.strftime("%-d %B %Y", time.gmtime(written))],
        "numbers": _numbers(columns),
        "evaluations": _evaluations(columns),
        "rollouts": rollouts,
        "n_rollouts": n,
        "shown": best_and_worst(rollouts),
    }


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shown": shown, "base64": lambda data: base64.b64encode(data).decode()}
    return environment.get_template("page.html.jinja")


# Files ------------------------------------------------------------------------------------------


def read_metrics(path: Path) -> Columns:
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


def _read_some(path: Path, *, last: bool) -> tuple[int, list[tuple[str, dict]]]:
    """(lines in a file, (`file:line`, record) of the first, middle and last of them, or the last).

    The others are not parsed, as a long run's file may be larger than memory.
    """
    if not path.exists():
        return 0, []
    n = sum(1 for _ in whole_lines(path))
    shown = (n - 1,) if last else (0, (n - 1) // 2, n - 1)
    found = [line for i, line in enumerate(whole_lines(path)) if i in shown]
    return n, [(where, parse_json(line, where, DataError)) for where, line in found]


# Facts ------------------------------------------------------------------------------------------


def _title(settings: dict) -> str:
    """The run's data and model, by the names in run.json."""
    known = {key.split("/")[-1]: value for key, value in reversed(settings.items())}
    task, model = known.get("task") or known.get("data"), known.get("ckpt_dir")
    parts = [Path(task).stem if "/" in task else task] if isinstance(task, str) else []
    if isinstance(model, str):
        path = Path(model)
        hub = [part for part in path.parts if part.startswith("models--")]
        parts.append(
            hub[0].split("--")[-1] if hub else path.stem if path.suffix == ".gguf" else path.name
        )
    return " · ".join(parts)


def _about(settings: dict) -> list[str]:
    """The model's size, and what of it is trained."""
    about = []
    model = {k.removeprefix("model/"): v for k, v in settings.items() if k.startswith("model/")}
    names = {f.name for f in dataclasses.fields(ModelConfig)}
    try:
        known = {name: value for name, value in model.items() if name in names}
        config = ModelConfig(**known | {"rope_scaling": None})
        about.append(f"{config.n_params / 1e6:,.1f} million parameters")
    except (TypeError, OverflowError, ConfigError):  # of another program, or of a later version
        pass
    if rank := settings.get("lora/rank"):
        about.append(f"LoRA of rank {rank}")
    return about


def _numbers(columns: Columns) -> list[tuple[str, str, str]]:
    """(name, value, note) of what a reader asks first: how well, how far, how long, how fast."""
    found = []
    for name, title in (("reward", "reward"), ("loss", "loss")):
        if held_out := _first_and_last(columns, f"eval_{name}"):
            (first, before, _), (last, after, interval) = held_out[0], held_out[-1]
            note = _at(last) if first == last else f"{_at(first)} → {_at(last)}"
            note += f" · 95 % {interval}" if interval else ""
            found.append(
                (f"held-out {title}", before if first == last else f"{before} → {after}", note)
            )
        if any(math.isfinite(value) for _, value in columns.get(name, [])):
            ends, over = moving_ends(columns[name])
            note = f"first and last {over} steps" if over > 1 else "first and last step"
            found.append((title, " → ".join(f"{x:.3g}" for x in ends), note))
        if found:
            break
    skipped = sum(value == 0 for _, value in columns.get("updated", []))
    found.append(("steps", f"{columns['step'][-1][0]:,}", f"{skipped} skipped" if skipped else ""))
    seconds = sum(_total(columns, name) for name in columns if name.startswith("seconds/"))
    if seconds:
        compiling = f"{_total(columns, 'compilations/seconds'):,.0f} s of it compiling"
        found.append(("minutes", f"{seconds / 60:,.1f}", compiling))
    speeds = [value for _, value in columns.get("tokens_per_s", []) if math.isfinite(value)]
    if speeds:
        found.append(("tokens/s", f"{sorted(speeds)[len(speeds) // 2]:,.0f}", "training, median"))
    return found


def _total(columns: Columns, name: str) -> float:
    """The sum of a column's finite numbers."""
    return sum(value for _, value in columns.get(name, []) if math.isfinite(value))


def _at(step: int) -> str:
    return f"step {step:,}" if step else "before training"


def _first_and_last(columns: Columns, name: str) -> list[tuple[int, str, str]]:
    """(step, value, 95 % interval or "") of a number's first and last finite value."""
    values = [(step, value) for step, value in columns.get(name, []) if math.isfinite(value)]
    low, high = (dict(columns.get(f"{name}_{end}", [])) for end in ("low", "high"))
    some = [*dict.fromkeys((values[0], values[-1]))] if values else []
    interval = {s: f"{low[s]:.3g} to {high[s]:.3g}" for s, _ in some if s in low and s in high}
    return [(step, f"{value:.3g}", interval.get(step, "")) for step, value in some]


def _evaluations(columns: Columns) -> list[tuple[str, ...]]:
    """The first evaluation next to the last, one row per number, each with its step."""
    rows = []
    for name in columns:
        if name.startswith("eval_") and not is_hidden(name, columns):
            both = _first_and_last(columns, name)
            cells = [f"{x}{f' ({within})' if within else ''}, {_at(s)}" for s, x, within in both]
            if len(cells) > 1:
                rows.append((name.removeprefix("eval_"), *cells))
    return rows


def _compared(settings: list[dict]) -> list[tuple[str, ...]]:
    """All settings of a run; of several runs those that differ, a column each."""
    names = dict.fromkeys(name for one in settings for name in one)
    rows = [
        (name, *(plain(one[name]) if name in one else "" for one in settings)) for name in names
    ]
    return rows if len(settings) == 1 else [row for row in rows if len({*row[1:]}) > 1]
