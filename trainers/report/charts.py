"""The charts of a run's report, drawn by matplotlib (extra `report`) without its global state."""

import fnmatch
import io
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from utils.errors import ConfigError

# By name, (step, value) in the order written; a value is NaN where it was not finite.
Columns = dict[str, list[tuple[int, float]]]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What is drawn of a run.

    Attributes:
        name: of its file, `report-<name>.png`.
        title, caption: what it shows.
        unit: at the y axis.
        keys: patterns of the names of numbers in metrics.jsonl; those of nested ones are joined by a
            slash. A chart without any of them is left out.
        kind: "lines"; "mean", one noisy line with its moving mean; or "stack".
        log: a logarithmic y axis, if there is anything above 0.
        scale: what the numbers are multiplied by.
    """

    name: str
    title: str
    caption: str
    unit: str
    keys: tuple[str, ...]
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


CHARTS = (
    Chart(
        name="reward",
        title="Reward",
        caption="Mean of a step's completions, and its moving mean; the band is ± one standard "
        "deviation of the completions.",
        unit="reward",
        keys=("reward",),
        kind="mean",
    ),
    Chart(
        name="rewards",
        title="Reward by function",
        caption="Mean of each function, before its weight.",
        unit="reward",
        keys=("rewards/*",),
    ),
    Chart(
        name="evaluation",
        title="Evaluation",
        caption="On held-out data.",
        unit="share, or reward",
        keys=("accuracy", "eval_accuracy*", "eval_reward*", "eval_pass*"),
    ),
    Chart(
        name="loss",
        title="Loss",
        caption="Of a step's batch. In GRPO it hovers around 0 by construction, and only its gradient "
        "tells.",
        unit="nats a token",
        keys=("loss", "eval_loss"),
    ),
    Chart(
        name="kl",
        title="KL divergence",
        caption="From the reference to the policy: how far it has moved.",
        unit="nats a token",
        keys=("kl",),
    ),
    Chart(
        name="entropy",
        title="Entropy",
        caption="Of the policy's next token: near 0 it explores no more.",
        unit="nats a token",
        keys=("entropy",),
    ),
    Chart(
        name="lengths",
        title="Completion length",
        caption="Mean and maximum of a step.",
        unit="tokens",
        keys=("length_mean", "length_max"),
    ),
    Chart(
        name="truncated",
        title="Lost completions",
        caption="Share cut off at the longest length allowed, and share that no reward could score.",
        unit="share",
        keys=("truncated", "unscorable"),
    ),
    Chart(
        name="zero_std",
        title="Groups without a signal",
        caption="Share of prompts whose completions all have the same reward.",
        unit="share",
        keys=("zero_std",),
    ),
    Chart(
        name="advantage",
        title="Advantage",
        caption="Mean of |advantage|.",
        unit="advantage",
        keys=("advantage",),
    ),
    Chart(
        name="clip",
        title="Clipped",
        caption="Share of tokens whose ratio the loss clips, below and above.",
        unit="share of tokens",
        keys=("clip_low", "clip_high"),
    ),
    Chart(
        name="ratio",
        title="Largest ratio",
        caption="Of new to old probability of a token; 1 on policy.",
        unit="ratio",
        keys=("ratio_max",),
        log=True,
    ),
    Chart(
        name="gap",
        title="Sampler against trainer",
        caption="Difference of the log-probs of the same tokens; 0 is not drawn.",
        unit="nats",
        keys=("gap_mean", "gap_max"),
        log=True,
    ),
    Chart(
        name="grad_norm",
        title="Gradient norm",
        caption="Before clipping.",
        unit="L2 norm",
        keys=("grad_norm",),
        log=True,
    ),
    Chart(
        name="lr", title="Learning rate", caption="Of the schedule.", unit="per step", keys=("lr",)
    ),
    Chart(
        name="seconds",
        title="Time by phase",
        caption="Of a step. The first one, which compiles, may reach beyond the axis.",
        unit="seconds a step",
        keys=("seconds/*",),
        kind="stack",
    ),
    Chart(
        name="speed",
        title="Speed",
        caption="Tokens trained on, and tokens sampled, each by its own time.",
        unit="tokens a second",
        keys=("tokens_per_s", "rollout_tokens_per_s"),
    ),
    Chart(
        name="mfu",
        title="Use of the machine",
        caption="Model FLOPs of training next to the best matrix product measured.",
        unit="share of peak",
        keys=("mfu",),
    ),
    Chart(
        name="memory",
        title="Peak memory",
        caption="The most held so far.",
        unit="GB",
        keys=("memory",),
        scale=1e-9,
    ),
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
        name for key in chart.keys for name in columns if fnmatch.fnmatchcase(name, key)
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
