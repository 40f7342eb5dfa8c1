"""The charts of a run's report, drawn by matplotlib (extra `report`) without its global state."""

import fnmatch
import io
import math
from typing import Any, NamedTuple

import numpy as np

from utils.errors import ConfigError

# By name, (step, value) in the order written; a value is NaN where it was not finite.
Columns = dict[str, list[tuple[int, float]]]


class Chart(NamedTuple):
    """A row of CHARTS.

    Attributes:
        name: of its file, `report-<name>.png`.
        keys: patterns of the names of numbers in metrics.jsonl, with blanks between; nested names
            are joined by a slash. A chart without any of them is left out.
        unit: label of the y axis.
        title, caption: shown above the chart.
        kind: "lines"; "mean", one noisy line with its moving mean; or "stack".
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
    """A chart's pictures: `svg` follows the reader's light or dark scheme; `png` may be None."""

    name: str
    title: str
    caption: str
    svg: bytes
    png: bytes | None


_MEAN = "Mean over a step's completions, with its moving mean; the band is one standard deviation."
_LOSS = (
    "Loss of a step's batch. In GRPO it hovers around 0 by construction; watch the reward instead."
)
_LOST = "Share cut off at the longest length allowed, and share that no reward could score."
_NO_SIGNAL = "Share of prompts whose completions all have the same reward."
_RATIO = "Largest new/old probability ratio of a token; exactly 1 when on-policy."
_GAP = "Difference of the log-probs of the same tokens; 0 is not drawn."
_SPEED = "Tokens trained on and tokens sampled, each by its own time."
_MFU = "Model FLOPs of training next to the best matrix product measured."
_TIME = "Seconds per step. The first step, which compiles, may reach beyond the axis."
_NATS, _EVALUATED = "nats per token", "accuracy eval_accuracy* eval_reward* eval_pass*"

CHARTS = (
    Chart("reward", "reward", "reward", "Reward", _MEAN, kind="mean"),
    Chart("rewards", "rewards/*", "reward", "Reward by function", "Means before their weights."),
    Chart("evaluation", _EVALUATED, "share, or reward", "Evaluation", "Held-out data."),
    Chart("loss", "loss eval_loss", _NATS, "Loss", _LOSS),
    Chart("kl", "kl", _NATS, "KL divergence", "Distance of the policy from the reference."),
    Chart("entropy", "entropy", _NATS, "Entropy", "Near 0 the policy explores no more."),
    Chart("lengths", "length_mean length_max", "tokens", "Completion length", "Per step."),
    Chart("truncated", "truncated unscorable", "share", "Lost completions", _LOST),
    Chart("zero_std", "zero_std", "share", "Groups without a signal", _NO_SIGNAL),
    Chart("advantage", "advantage", "advantage", "Advantage", "Mean of |advantage|."),
    Chart("clip", "clip_low clip_high", "share of tokens", "Clipped", "Tokens the loss clips."),
    Chart("ratio", "ratio_max", "ratio", "Largest ratio", _RATIO, log=True),
    Chart("gap", "gap_mean gap_max", "nats", "Sampler against trainer", _GAP, log=True),
    Chart("grad_norm", "grad_norm", "L2 norm", "Gradient norm", "Before clipping.", log=True),
    Chart("lr", "lr", "per step", "Learning rate", "As scheduled."),
    Chart("seconds", "seconds/*", "seconds per step", "Time by phase", _TIME, kind="stack"),
    Chart("speed", "tokens_per_s rollout_tokens_per_s", "tokens per second", "Speed", _SPEED),
    Chart("mfu", "mfu", "share of peak", "Use of the machine", _MFU),
    Chart("memory", "memory", "GB", "Peak memory", "The most held so far.", scale=1e-9),
)

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
    "axes.formatter.limits": (-3, 5),  # powers of ten outside of which it is written once, on top
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


def draw_charts(columns: Columns, *, pngs: bool = False) -> list[Drawn]:
    """Draws those of CHARTS for which there are numbers.

    Raises ConfigError if matplotlib is not installed.
    """
    plotting = _import_matplotlib()
    drawn = []
    with plotting.style.context(["default", _RC]):  # whatever the user's own matplotlibrc says
        for chart in CHARTS:
            lines = _lines(chart, columns)
            if lines:
                stds = dict(columns.get(f"{chart.name}_std", []))
                figure = _figure(plotting, chart, lines, stds)
                svg, png = _svg(figure), _png(figure) if pngs else None
                drawn.append(Drawn(chart.name, chart.title, chart.caption, svg, png))
    return drawn


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


def _lines(chart: Chart, columns: Columns) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(steps, values) by label, of the numbers that this chart shows."""
    names = dict.fromkeys(
        name for key in chart.keys.split() for name in columns if fnmatch.fnmatchcase(name, key)
    )
    lines = {}
    for name in names:
        steps, values = np.array(columns[name], np.float64).T
        if np.isfinite(values).any():
            lines[_label(name)] = steps, values * chart.scale
    return lines


def _label(name: str) -> str:
    short = name.partition("/")[2] or name
    return "".join(c if c.isprintable() else "\ufffd" for c in short)[:40]


def _figure(plotting: Any, chart: Chart, lines: dict, stds: dict[int, float]) -> Any:
    figure = plotting.figure.Figure(figsize=(_WIDTH / 72, 2.8))
    ax = figure.add_subplot()
    if chart.kind == "stack":
        handles = _draw_stack(ax, lines)
    elif chart.kind == "mean":
        handles = _draw_mean(ax, lines, stds)
    else:
        handles = _draw_lines(ax, lines)
    if chart.log and any((values > 0).any() for _, values in lines.values()):
        ax.set_yscale("log", nonpositive="mask")
        low, high = ax.get_ylim()
        subs = (1, 2, 5) if high < 100 * low else (1,)
        ax.yaxis.set_major_locator(plotting.ticker.LogLocator(subs=subs))
        # The default labels are formulas, which are off.
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.yaxis.set_minor_formatter(plotting.ticker.NullFormatter())
    ax.xaxis.set_major_locator(plotting.ticker.MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    ax.set_xlabel("step")
    ax.set_ylabel(chart.unit)
    columns, rows = _legend_shape(list(lines))
    # The layout engines would double the time, and the axes of two charts would not be aligned.
    figure.subplots_adjust(left=0.18, right=0.97, bottom=0.16, top=0.93 - 0.065 * rows)
    if rows:
        figure.legend(handles, list(lines), loc="upper left", ncols=columns, fontsize=8)
    return figure


def _legend_shape(labels: list[str]) -> tuple[int, int]:
    """(columns, rows) that have room for the labels; no rows where there is one label only."""
    wide = 44 + 4.8 * max(map(len, labels))  # points: line and gaps, and a character of 8 points
    columns = max(1, int(_WIDTH / wide))
    return columns, math.ceil(len(labels) / columns) if len(labels) > 1 else 0


def _draw_lines(ax: Any, lines: dict) -> list[Any]:
    handles = []
    for i, (steps, values) in enumerate(lines.values()):
        look = {"color": _COLORS[i % len(_COLORS)], "linewidth": 1.3}
        look["linestyle"] = _DASHES[i // len(_COLORS) % len(_DASHES)]
        look["marker"] = _marker(steps)
        handles += ax.plot(steps, values, **look)
    return handles


def _marker(steps: np.ndarray) -> str:
    """A point alone makes no line."""
    return "." if len(steps) <= 60 else ""


def _draw_mean(ax: Any, lines: dict, stds: dict[int, float]) -> list[Any]:
    ((steps, values),) = lines.values()
    mean = _moving_mean(values)
    std = _moving_mean(np.array([stds.get(step, math.nan) for step in steps]))
    color = _COLORS[0]
    ax.fill_between(steps, mean - std, mean + std, color=color, alpha=0.15, linewidth=0)
    ax.plot(steps, values, color=color, alpha=0.45, linewidth=0.8, marker=_marker(steps))
    return ax.plot(steps, mean, color=color, linewidth=2)


def _moving_mean(values: np.ndarray) -> np.ndarray:
    """Over a fifteenth of the run around each step; what is not finite does not count."""
    window = np.ones(max(1, len(values) // 15) | 1)
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), window, "same")
    n = np.convolve(known, window, "same")
    return np.divide(total, n, out=np.full(len(values), math.nan), where=n > 0.5)


def _draw_stack(ax: Any, lines: dict) -> list[Any]:
    """Bars of the lines upon each other, each the mean of a few steps; the largest is at the bottom."""
    steps = np.unique(np.concatenate([steps for steps, _ in lines.values()]))
    heights = {name: np.zeros(len(steps)) for name in lines}
    for name, (at, values) in lines.items():  # a step whose update was skipped is there twice
        np.add.at(heights[name], np.searchsorted(steps, at), np.nan_to_num(values))
    bars = np.array_split(np.arange(len(steps)), min(_BARS, len(steps)))
    edges = np.array([steps[bar[0]] for bar in bars] + [steps[-1] + 1]) - 0.5
    bottom, patches = np.zeros(len(bars)), {}
    for i, name in enumerate(sorted(lines, key=lambda name: -heights[name].sum())):
        top = bottom + [heights[name][bar].mean() for bar in bars]
        look = dict(baseline=bottom, fill=True, color=_COLORS[i % len(_COLORS)], linewidth=0)
        look["alpha"] = 1 - 0.35 * (i // len(_COLORS) % 3)
        patches[name] = ax.stairs(top, edges, **look)
        bottom = top
    if len(bars) > 3 and bottom[1:].max() > 0:
        ax.set_ylim(0, 1.05 * bottom[1:].max())
    return [patches[name] for name in lines]


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
