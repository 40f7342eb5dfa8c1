"""The charts of a run's report, drawn by matplotlib (extra `report`) without its global state."""

import fnmatch
import io
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from utils.errors import ConfigError

# By name, (step, value) in the order written; a value is NaN where it was not finite.
Columns = dict[str, list[tuple[int, float]]]


class Chart(NamedTuple):
    """A row of CHARTS.

    Attributes:
        name: of its file, `report-<name>.png`.
        keys: patterns of the names of numbers in metrics.jsonl, with blanks between, each with the
            word that the legend has for it after a colon; nested names are joined by a slash. A
            chart without any of them is left out. Not a wildcard's: what another chart names, the
            bounds of an interval, and _INTERNAL.
        unit: label of the y axis.
        title, caption: shown above the chart.
        kind: "lines"; "mean", a noisy line with its moving mean; or "stack".
        log: a logarithmic y axis, if there is anything above 0.
        scale: factor from the numbers to the unit.
    """

    name: str
    keys: str
    unit: str
    title: str
    caption: str
    kind: str = "lines"
    log: bool = False
    scale: float = 1.0


class Drawn(NamedTuple):
    """A chart on the page.

    Attributes:
        name, title, caption: the row's.
        ends: each line's first and last value, in words.
        svg: follows the reader's light or dark scheme; empty where nothing changes: `ends` says all.
        wide: twice as wide, of the first chart alone.
        png: None unless asked for.
    """

    name: str
    title: str
    caption: str
    ends: str
    svg: bytes = b""
    wide: bytes = b""
    png: bytes | None = None


class Line(NamedTuple):
    """One number of one run: what to draw at which steps, and the band around it (NaN: none)."""

    label: str
    run: int
    steps: np.ndarray
    values: np.ndarray
    low: np.ndarray
    high: np.ndarray


_MEAN = "Mean over a step's completions, with its moving mean; the band is one standard deviation."
_HOVERS = " It hovers around 0 by construction; watch the reward instead."
_HELD_OUT = "On prompts that are not trained on; the band is a 95 % interval."
_SURE = "Near 0 the model is sure of every token."
_LOST = "Share cut off at the longest length allowed, and share that no reward could score."
_NO_SIGNAL = "Share of prompts whose completions all have the same reward."
_RATIO = "Largest new/old probability ratio of a token; exactly 1 when on-policy."
_GAP = "Difference of the log-probs of the same tokens; 0 is not drawn."
_SPEED = "Tokens trained on and tokens sampled, each by its own time."
_MFU = "Model FLOPs of training next to the best matrix product measured."
_TIME = "Seconds per step. The first step, which compiles, may reach beyond the axis."
_NATS, _BOTH = "nats per token", "{0}:training eval_{0}:held-out"
_RIGHT = "Targets guessed right, or pairs of which the chosen answer has the higher reward."
_MARGINS = "margin eval_margin:held-out reward_chosen:chosen reward_rejected:rejected"
_LENGTHS = "length_mean:mean length_max:longest eval_length_mean:held-out_mean"
_SPEEDS = "tokens_per_s:training rollout_tokens_per_s:sampling"

CHARTS = {
    "Learning": (
        Chart("reward", "reward", "reward", "Reward", _MEAN, kind="mean"),
        Chart("loss", _BOTH.format("loss"), _NATS, "Loss", "Of a step's batch."),
        Chart("evaluation", "eval_*", "share, or reward", "Held-out reward", _HELD_OUT),
        Chart("accuracy", _BOTH.format("accuracy"), "share", "Accuracy", _RIGHT),
        Chart("margin", _MARGINS, "reward", "Preference", "Rewards of answers, see docs/dpo.md."),
        Chart(
            "rewards", "rewards/*", "reward", "Reward by function", "Means before their weights."
        ),
        Chart("kl", "kl", "nats", "KL divergence", "Distance of the policy from the reference."),
        Chart("entropy", _BOTH.format("entropy"), _NATS, "Entropy", _SURE),
        Chart("grad_norm", "grad_norm", "L2 norm", "Gradient norm", "Before clipping.", log=True),
        Chart("lr", "lr", "per step", "Learning rate", "As scheduled."),
    ),
    "Completions": (
        Chart("lengths", _LENGTHS, "tokens", "Completion length", "Per step."),
        Chart("truncated", "truncated:cut_off unscorable:no_score", "share", "Lost", _LOST),
        Chart("zero_std", "zero_std", "share", "Groups without a signal", _NO_SIGNAL),
        Chart("advantage", "advantage", "advantage", "Advantage", "Mean of its size."),
        Chart("clip", "clip_low:below clip_high:above", "share", "Clipped", "Share of tokens."),
        Chart("ratio", "ratio_max", "ratio", "Largest ratio", _RATIO, log=True),
        Chart(
            "gap", "gap_mean:mean gap_max:largest", "nats", "Sampler and trainer", _GAP, log=True
        ),
    ),
    "Machine": (
        Chart("seconds", "seconds/*", "seconds per step", "Time by phase", _TIME, kind="stack"),
        Chart("speed", _SPEEDS, "tokens per second", "Speed", _SPEED),
        Chart("mfu", "mfu", "share of peak", "Use of the machine", _MFU),
        Chart("memory", "memory", "GB", "Peak memory", "The most held so far.", scale=1e-9),
    ),
}

# Numbers that say nothing to a reader, or nothing that another number does not.
_INTERNAL = {"eval_score", "eval_weight", "eval_perplexity", "eval_kl"}
_INTERNAL |= {f"eval_{x}_{side}" for x in ("logp", "reward") for side in ("chosen", "rejected")}
_KEYS = [key for charts in CHARTS.values() for chart in charts for key in chart.keys.split()]
_NAMED = {key.partition(":")[0] for key in _KEYS}

# Okabe and Ito's palette for the colour-blind.
_COLORS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")
_DASHES = ("-", "--", ":")

# In an SVG this colour gives way to the scheme's own, so nothing else may have it.
_INK = "#23272d"
_SCHEME = (
    f"<style>svg{{color:{_INK}}}"
    "@media screen and (prefers-color-scheme:dark){svg{color:#dfe3e8}}</style>"
)

_RC = {
    "svg.fonttype": "none",  # text stays text: small, and sharp
    "svg.hashsalt": "altiplano",  # the same run gives the same bytes
    "text.parse_math": False,  # a name may have dollar signs
    "path.simplify_threshold": 1.0,  # pixels
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    "figure.facecolor": "white",
}
_RC |= dict.fromkeys(
    "text.color axes.labelcolor axes.edgecolor xtick.color ytick.color grid.color".split(), _INK
)

_WIDTH = 331  # of a chart, in points

# Time is averaged over as many bars as one can still tell apart.
_BARS = 100


def draw_charts(runs: Mapping[str, Columns], *, pngs: bool = False) -> dict[str, list[Drawn]]:
    """Draws those of CHARTS for which there are numbers, of one run or of several over each other.

    Raises ConfigError if matplotlib is not installed.
    """
    plotting = _import_matplotlib()
    drawn: dict[str, list[Drawn]] = {group: [] for group in CHARTS}
    is_rl = any("reward" in columns for columns in runs.values())
    with plotting.style.context(["default", _RC]):  # whatever the user's own matplotlibrc says
        for group, charts in CHARTS.items():
            for chart in charts:
                if lines := _lines(chart, runs):
                    first = not any(one.svg for found in drawn.values() for one in found)
                    one = _draw(plotting, chart, lines, pngs=pngs, first=first, is_rl=is_rl)
                    drawn[group].append(one)
    return drawn


def _draw(
    plotting: Any, chart: Chart, lines: list[Line], *, pngs: bool, first: bool, is_rl: bool
) -> Drawn:
    caption = chart.caption + _HOVERS * (chart.name == "loss" and is_rl)
    known = chart.name, chart.title, caption, _ends(chart, lines)
    if all(np.ptp(line.values[np.isfinite(line.values)]) == 0 for line in lines):
        return Drawn(*known)
    figure = _figure(plotting, chart, lines)
    wide = _svg(_figure(plotting, chart, lines, 2 * _WIDTH)) if first else b""
    return Drawn(*known, _svg(figure), wide, _png(figure) if pngs else None)


def _import_matplotlib() -> Any:
    try:
        import matplotlib.figure
        import matplotlib.style
        import matplotlib.ticker
    except ImportError as e:
        raise ConfigError(
            "the report needs matplotlib, which is not installed; pip install 'altiplano[report]'"
        ) from e
    return matplotlib


def _lines(chart: Chart, runs: Mapping[str, Columns]) -> list[Line]:
    """The numbers that this chart shows, run by run."""
    lines = []
    for i, (run, columns) in enumerate(runs.items()):
        found = [
            _line(chart, columns, name, word.replace("_", " ") or _label(name), i)
            for key, _, word in (pattern.partition(":") for pattern in chart.keys.split())
            for name in fnmatch.filter(columns, key)
            if "*" not in key or not (name in _NAMED or is_hidden(name, columns))
        ]
        found = [line for line in found if np.isfinite(line.values).any()]
        if len(runs) > 1 and found:
            if chart.kind == "stack":
                found = [_summed(found)]
            name = [_label(run)]
            words = [name + [line.label] * (len(found) > 1) for line in found]
            found = [line._replace(label=" ".join(w)) for line, w in zip(found, words)]
        lines += found
    return lines


def is_hidden(name: str, columns: Columns) -> bool:
    """Whether a number is no reader's: an internal one, or the bound of an interval."""
    base, _, end = name.rpartition("_")
    return name in _INTERNAL or end in ("low", "high") and base in columns


def _line(chart: Chart, columns: Columns, name: str, label: str, run: int) -> Line:
    steps, values = np.array(columns[name], np.float64).T

    def beside(other: str) -> np.ndarray:
        known = dict(columns.get(other, []))
        return np.array([known.get(step, math.nan) for step in steps])

    low, high = beside(f"{name}_low"), beside(f"{name}_high")
    if chart.kind == "mean":
        std = beside(f"{name}_std")
        low, high = values - std, values + std
    return Line(label, run, steps, *(x * chart.scale for x in (values, low, high)))


def _summed(lines: list[Line]) -> Line:
    """The sum of the lines at each step."""
    steps = np.unique(np.concatenate([line.steps for line in lines]))
    total = np.zeros(len(steps))
    for line in lines:
        np.add.at(total, np.searchsorted(steps, line.steps), np.nan_to_num(line.values))
    none = np.full(len(steps), math.nan)
    return Line("", lines[0].run, steps, total, none, none)


def _label(name: str) -> str:
    short = name.partition("/")[2] or name.removeprefix("eval_")
    return "".join(c if c.isprintable() else "\ufffd" for c in short)[:40]


def _ends(chart: Chart, lines: list[Line]) -> str:
    """Each line's first and last value; of a stack, the shares."""
    if chart.kind == "stack" and len({line.run for line in lines}) == 1:
        sums = {line.label: np.nansum(line.values) for line in lines}
        total = sum(sums.values()) or 1.0
        shares = sorted(sums.items(), key=lambda pair: -pair[1])
        return ", ".join(f"{label} {value / total:.0%}" for label, value in shares)
    texts = []
    for line in lines:
        values = _moving_mean(line.values) if chart.kind == "mean" else line.values
        values = values[np.isfinite(values)]
        span = [values[0], values[-1]] if np.ptp(values) else values[:1]
        label = line.label if len(lines) > 1 else ""
        texts.append(f"{label} {' → '.join(f'{x:.3g}' for x in span)}".strip())
    return ", ".join(texts)


def moving_ends(column: list[tuple[int, float]]) -> tuple[list[float], int]:
    """(the first and the last value of a noisy number's moving mean, the steps of each mean)."""
    values = np.array([value for _, value in column if math.isfinite(value)])
    mean, reach = _moving_mean(values), max(1, len(values) // 15) // 2
    return [mean[0], mean[-1]] if len(mean) > 1 else list(mean), reach + 1


def _figure(plotting: Any, chart: Chart, lines: list[Line], width: float = _WIDTH) -> Any:
    figure = plotting.figure.Figure(figsize=(width / 72, 2.8))
    ax = figure.add_subplot()
    several = len({line.run for line in lines}) > 1
    stacks = chart.kind == "stack" and not several
    handles = _draw_stack(ax, lines) if stacks else _draw_lines(ax, chart, lines, several)
    if chart.log and any((line.values > 0).any() for line in lines):
        ax.set_yscale("log", nonpositive="mask")
        low, high = ax.get_ylim()
        subs = (1, 2, 5) if high < 100 * low else (1,)
        ax.yaxis.set_major_locator(plotting.ticker.LogLocator(subs=subs))
        ax.yaxis.set_minor_formatter(plotting.ticker.NullFormatter())
    # The default labels are formulas, which are off, or have a power of ten above the axis.
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.6g}".replace("e-0", "e-"))
    ax.xaxis.set_major_locator(plotting.ticker.MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    ax.set_xlabel("step")
    ax.set_ylabel(chart.unit)
    labels = [line.label for line in lines]
    columns, rows = _legend_shape(labels, width)
    # The layout engines would double the time, and the axes of two charts would not be aligned.
    left, right = 0.18 * _WIDTH / width, 1 - 0.03 * _WIDTH / width
    figure.subplots_adjust(left=left, right=right, bottom=0.16, top=0.93 - 0.065 * rows)
    if rows:
        figure.legend(handles, labels, loc="upper left", ncols=columns, fontsize=8)
    return figure


def _legend_shape(labels: list[str], width: float) -> tuple[int, int]:
    """(columns, rows) that have room for the labels; no rows where there is one label only."""
    wide = 44 + 4.8 * max(map(len, labels))  # points: line and gaps, and a character of 8 points
    columns = max(1, int(width / wide))
    return columns, math.ceil(len(labels) / columns) if len(labels) > 1 else 0


def _draw_lines(ax: Any, chart: Chart, lines: list[Line], several: bool) -> list[Any]:
    """Lines with their bands; of several runs each run has a colour, else each number."""
    handles, numbers = [], Counter()
    for i, (_, run, steps, values, low, high) in enumerate(lines):
        hue, dash = (run, numbers[run]) if several else (i, i // len(_COLORS))
        numbers[run] += 1
        color = _COLORS[hue % len(_COLORS)]
        look = dict(color=color, linestyle=_DASHES[dash % len(_DASHES)], linewidth=1.3)
        if chart.kind == "mean":
            if not several:
                ax.plot(
                    steps, values, color=color, alpha=0.45, linewidth=0.8, marker=_marker(steps)
                )
            values, low, high = map(_moving_mean, (values, low, high))
            look["linewidth"] = 2
        else:
            look["marker"] = _marker(steps)
        if np.isfinite(high - low).any():
            ax.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
        handles += ax.plot(steps, values, **look)
    return handles


def _marker(steps: np.ndarray) -> str:
    """A point alone makes no line."""
    return "." if len(steps) <= 60 else ""


def _moving_mean(values: np.ndarray) -> np.ndarray:
    """Over a fifteenth of the run around each step; what is not finite does not count."""
    window = np.ones(max(1, len(values) // 15) | 1)
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), window, "same")
    n = np.convolve(known, window, "same")
    return np.divide(total, n, out=np.full(len(values), math.nan), where=n > 0.5)


def _draw_stack(ax: Any, lines: list[Line]) -> list[Any]:
    """Bars of the lines upon each other, each the mean of a few steps; the largest is at the bottom."""
    steps = _summed(lines).steps
    heights = {line.label: np.zeros(len(steps)) for line in lines}
    for line in lines:  # a step whose update was skipped is there twice
        at = np.searchsorted(steps, line.steps)
        np.add.at(heights[line.label], at, np.nan_to_num(line.values))
    bars = np.array_split(np.arange(len(steps)), min(_BARS, len(steps)))
    edges = np.array([steps[bar[0]] for bar in bars] + [steps[-1] + 1]) - 0.5
    bottom, patches = np.zeros(len(bars)), {}
    for i, name in enumerate(sorted(heights, key=lambda name: -heights[name].sum())):
        top = bottom + [heights[name][bar].mean() for bar in bars]
        look = dict(baseline=bottom, fill=True, color=_COLORS[i % len(_COLORS)], linewidth=0)
        look["alpha"] = 1 - 0.35 * (i // len(_COLORS) % 3)
        patches[name] = ax.stairs(top, edges, **look)
        bottom = top
    if len(bars) > 3 and bottom[1:].max() > 0:
        ax.set_ylim(0, 1.05 * bottom[1:].max())
    return [patches[line.label] for line in lines]


def _svg(figure: Any) -> bytes:
    """Transparent, its ink the colour of the reader's scheme, without what XML has around it."""
    unsaid = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata=unsaid)
    text = buffer.getvalue().decode()
    start = text.index("<svg")
    head = text.index(">", start) + 1
    drawing = text[head:].replace(_INK, "currentColor")
    return f"{text[start:head]}{_SCHEME}{drawing}".encode()


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
