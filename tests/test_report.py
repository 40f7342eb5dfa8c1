"""The report of a run: what is on the page, that it stands alone, and that nothing in a file breaks it."""

import base64
import dataclasses
import html.parser
import io
import json
import math
import os
import random
import re
import sys
import warnings
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib
import matplotlib.figure
import numpy as np
import PIL.Image
import pytest

import train
from tests import small_runs
from trainers.runs.metrics import MetricsLog
from trainers.report import charts
from trainers.report.charts import CHARTS
from trainers.report.report import read_metrics, write_report
from utils.console import cli as console
from utils.errors import ConfigError, DataError

SETTINGS = {
    "model": dataclasses.asdict(small_runs.MODEL),
    "data": {"task": "reasoning_gym:chain_sum"},
    "source": {"ckpt_dir": "/models/smollm"},
    "train": {"loss": "dapo", "group_size": 8, "seed": 17, "learning_rate": 2e-5},
    "lora": {"rank": 4, "alpha": None},
}

# Closes any tag and attribute it may be put into.
HOSTILE = "</title></style></pre>\"'><script>alert(1)</script><img src=x onerror=y>&amp;"


# Lines of metrics.jsonl that make one chart only, as each takes 0.1 s.
LINE = {"step": 1, "kl": 0.5}
LINES = [LINE, {"step": 2, "kl": 0.25}]
ALL = [chart for charts in CHARTS.values() for chart in charts]


def metrics(step: int, **changes) -> dict:
    """A line of a GRPO run's metrics.jsonl."""
    rng = random.Random(step)
    names = (
        "loss reward reward_std advantage zero_std kl entropy clip_low clip_high gap_mean gap_max"
    )
    names += " length_mean length_max truncated unscorable grad_norm lr tokens_per_s mfu ratio_max"
    record = {"step": step, **{name: rng.random() for name in names.split()}}
    record |= dict(accuracy=rng.random(), margin=rng.random())
    record |= dict(rewards={"exact": rng.random(), "format": rng.random()}, memory=2 * 10**9 + step)
    record |= dict(rollout_tokens_per_s=400.0, updated=True, skipped=0)
    record |= dict(seconds={"rollout": 3.0, "step": 1 + rng.random()}, compilations=[["f", 0.5]])
    return record | changes


def completion(advantage: float = 1.0, n: int = 3, **changes) -> dict:
    """A completion of `n` tokens, which says its advantage."""
    tokens = [f" {advantage:g}", *["x"] * (n - 1)]
    made = dict(text="".join(tokens), tokens=tokens, ids=list(range(n)), mask=[1] * n)
    made |= dict(logprobs=[-0.05] * n, rewards={"exact": 1.0}, reward=1.0, finish="stop")
    return made | dict(advantage=advantage) | changes


def rollout(step: int, completions=None, prompts: int = 1) -> dict:
    """A line of rollouts.jsonl."""
    group = [completion()] if completions is None else completions
    one = dict(
        text=f"prompt of {step}",
        ids=[1],
        columns={"answer": "7", "entry": {"question": "?"}},
        completions=group,
    )
    return dict(step=step, temperature=1.0, prompts=[one] * prompts)


def write(folder: Path, records, rollouts=(), settings=SETTINGS, tail: str = "") -> Path:
    """A run's folder; `tail` is what a killed run left at the end of its files."""
    folder.mkdir(parents=True, exist_ok=True)
    if settings is not None:
        (folder / "run.json").write_text(json.dumps(settings))
    for name, rows in (("metrics", records), ("rollouts", rollouts)):
        if rows:
            lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
            text = "".join(line + "\n" for line in lines)
            (folder / f"{name}.jsonl").write_text(text + tail)
    return folder


def report(folder: Path, **options) -> "Page":
    """Writes and parses a report; a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = write_report(folder, **options)
    return Page(path.read_text())


class Page(html.parser.HTMLParser):
    """A page's tags, with their attributes, and its text; tags have to be balanced."""

    def __init__(self, source: str):
        super().__init__()
        self.source, self.tags, self.text, self._open = source, [], "", []
        self.feed(source)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "img", "source"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def of(self, name: str) -> list[dict]:
        """The attributes of all tags of a name."""
        return [attrs for tag, attrs in self.tags if tag == name]

    def charts(self) -> dict[str, ET.Element]:
        """The pictures by name, decoded."""
        start = "data:image/svg+xml;base64,"
        assert all(attrs["src"].startswith(start) for attrs in self.of("img"))
        decode = lambda src: ET.fromstring(base64.b64decode(src.removeprefix(start), validate=True))
        return {attrs["id"]: decode(attrs["src"]) for attrs in self.of("img")}

    def tokens(self) -> list[dict]:
        """The spans of tokens."""
        return [attrs for attrs in self.of("span") if "title" in attrs]


def svg_text(chart: ET.Element) -> list[str]:
    """The texts in a picture."""
    return [e.text for e in chart.iter("{http://www.w3.org/2000/svg}text")]


def line(chart: ET.Element, color: str = "#0072b2") -> str:
    """The path of the only line of a color in a picture."""
    (path,) = (
        e.get("d")
        for e in chart.iter("{http://www.w3.org/2000/svg}path")
        if f"stroke: {color}" in e.get("style", "") and "clip-path" in e.attrib
    )
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, Page]:
    """A folder with 300 steps, every number and 300 rollouts; and its page, which is only read."""
    records = [metrics(step) for step in range(1, 301)]
    for step, accuracy in ((1, 0.25), (150, 0.4), (300, 0.875)):
        of = dict(
            eval_reward=accuracy, eval_reward_low=accuracy / 2, eval_reward_high=accuracy + 0.1
        )
        records[step - 1] |= of | dict(eval_score=-accuracy, eval_exact=accuracy, eval_weight=3.0)
    group = [completion(a, n=64) for a in (1.5, -2.0, 0.25, 0.0, -0.125, 1.0)]
    rollouts = [rollout(step, group, prompts=4) for step in range(1, 301)]
    folder = write(tmp_path_factory.mktemp("report") / "my run", records, rollouts)
    return folder, report(folder, pngs=True)


# The page ---------------------------------------------------------------------------------------


def test_the_page_stands_alone(whole):
    folder, page = whole
    assert (folder / "report.html").stat().st_size < 2 << 20
    assert not page.of("script") and not page.of("link")
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert {a["href"].removeprefix("#") for a in page.of("a")} <= {*ids} and len(ids) == len({*ids})
    assert not re.search(r"@import|url\(|https?://", page.source)
    (policy,) = (a["content"] for a in page.of("meta") if "http-equiv" in a)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert all(not name.startswith("on") for _, attrs in page.tags for name in attrs)


@pytest.mark.covers("N13")
def test_the_first_screen_says_what_ran_and_how_it_went(whole):
    _, page = whole
    top = page.text[: page.text.index("LearningCompletionsMachineSettings")]
    assert page.text.count("reasoning_gym:chain_sum · smollm") == 2  # title and heading
    n_params = small_runs.MODEL.n_params / 1e6
    assert f"{n_params:.1f} million parameters · LoRA of rank 4 · " in top
    assert re.search(r"held-out reward0\.25 → 0\.875step 1 → step 300 · 95 % 0\.438 to 0\.975", top)
    rewards = [metrics(step)["reward"] for step in range(1, 301)]
    first, last = np.mean(rewards[:11]), np.mean(rewards[-11:])  # of a window of 21 at either end
    assert f"reward{first:.3g} → {last:.3g}first and last 11 steps" in top
    minutes = sum(sum(metrics(step)["seconds"].values()) for step in range(1, 301)) / 60
    assert f"steps300" in top and f"minutes{minutes:.1f}150 s of it compiling" in top
    rest = page.text[len(top) :]
    assert rest.split("Settings", 1)[1].lstrip().startswith("Reward. Mean over")
    assert rest.index("best of 6, reward 1") < rest.index("worst of 6") < rest.index("Loss.")
    assert "train/learning_rate2e-05" in page.text[page.text.index("All settings") :]


@pytest.mark.covers("N13")
def test_evaluations_say_when_and_hide_what_is_internal(whole):
    _, page = whole
    assert "exact0.25, step 10.875, step 300" in page.text
    assert "reward0.25 (0.125 to 0.35), step 10.875 (0.438 to 0.975), step 300" in page.text
    for name in ("score", "weight", "reward_low"):
        assert f"<th>{name}</th>" not in page.source
    assert svg_text(page.charts()["evaluation"])[-2:] == ["reward", "exact"]


def test_every_chart_is_there_and_shows_its_numbers(whole):
    folder, page = whole
    charts = page.charts()
    assert sorted(charts) == sorted(chart.name for chart in ALL)
    words = {"mean", "longest", "below", "above", "cut off", "no score", "training", "sampling"}
    shown = {text for chart in charts.values() for text in svg_text(chart)}
    assert words <= shown and not {t for t in shown if t and re.search("[a-z]_[a-z]|e-0", t)}
    assert page.source.count("<source ") == 1  # a wide picture, of the first chart alone
    assert {"exact", "format"} <= set(svg_text(charts["rewards"]))
    assert {"rollout", "step"} <= set(svg_text(charts["seconds"]))
    assert "seconds per step" in svg_text(charts["seconds"])
    with PIL.Image.open(folder / "report-kl.png") as image:
        assert image.format == "PNG" and np.asarray(image.convert("L")).std() > 5
    assert len(list(folder.glob("report-*.png"))) == len(charts)


def test_a_line_goes_through_its_values(tmp_path):
    values = np.array([0.1, 0.9, 0.3, 0.7, 0.2, 0.5])
    records = [{"step": 2 * i, "kl": v, "grad_norm": v} for i, v in enumerate(values)]
    charts = report(write(tmp_path, records)).charts()
    assert list(charts) == ["kl", "grad_norm"]
    for name, expected in (("kl", values), ("grad_norm", np.log(values))):
        x, y = np.array(re.findall(r"[ML] (\S+) (\S+)", line(charts[name])), float).T
        for drawn, wanted in ((x, np.arange(6)), (y, expected)):
            scale = lambda v: (v - v[0]) / (v[1] - v[0])
            np.testing.assert_allclose(scale(drawn), scale(wanted), atol=1e-4)
        assert y[1] < y[0]  # an SVG counts from the top


def test_null_leaves_a_gap_and_absence_does_not(tmp_path):
    records = [{"step": i, "kl": 0.1 * i, "loss": 0.1 * i} for i in range(6)]
    records[3]["kl"] = None
    del records[3]["loss"]
    charts = report(write(tmp_path, records)).charts()
    assert (line(charts["kl"]).count("M"), line(charts["loss"]).count("M")) == (2, 1)


@pytest.mark.parametrize("n", [1, 2, 7, 14, 45, 100])
def test_the_moving_mean_is_of_what_is_there_around(n):
    values = np.random.default_rng(n).normal(size=n)
    values[3::5] = math.nan
    reach = max(1, n // 15) // 2
    near = [values[max(0, i - reach) : i + reach + 1] for i in range(n)]
    wanted = [np.nanmean(v) if np.isfinite(v).any() else math.nan for v in near]
    np.testing.assert_allclose(charts._moving_mean(values), wanted)


@pytest.mark.parametrize("n", [1, 5, 100, 1234])
def test_the_bars_of_time_add_up(n):
    """All bars' areas are all the seconds, also those of a step whose first update was skipped."""
    rng = np.random.default_rng(n)
    steps = np.arange(10.0, 10.0 + n)
    columns = {f"seconds/{name}": [*zip(steps, rng.random(n))] for name in "abc"}
    columns["seconds/c"].append((steps[-1], 2.0))
    columns["seconds/a"][0] = (steps[0], math.nan)
    (chart,) = (chart for chart in ALL if chart.name == "seconds")
    lines = charts._lines(chart, {"run": columns})
    ax = matplotlib.figure.Figure().add_subplot()
    handles = charts._draw_stack(ax, lines)
    for values, patch in zip((line.values for line in lines), handles):
        top, edges, bottom = patch.get_data()
        assert len(top) == min(n, charts._BARS)
        assert (edges[0], edges[-1]) == (9.5, 9.5 + n)
        assert ((top - bottom) * np.diff(edges)).sum() == pytest.approx(np.nansum(values))


def test_the_same_run_gives_the_same_page_whatever_the_user_set(tmp_path):
    folder = write(tmp_path, [one | {"seconds": {"a": one["kl"], "b": 2.0}} for one in LINES])
    page = report(folder)
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"text.usetex": True, "svg.fonttype": "path", "lines.color": "red"}):
        assert report(folder).source == page.source
    assert dict(matplotlib.rcParams) == before


def test_charts_follow_the_readers_colours(tmp_path):
    page = report(write(tmp_path, LINES))
    picture = ET.tostring(page.charts()["kl"]).decode()
    assert "prefers-color-scheme:dark" in picture and picture.count("currentColor") > 5
    assert "fill: #ffffff" not in picture and picture.count(charts._INK) == 1


def test_a_point_alone_is_marked(tmp_path):
    records = [{"step": i, "kl": kl} for i, kl in enumerate([0.5, None, 0.25, None])]
    picture = report(write(tmp_path, records)).charts()["kl"]
    uses = picture.iter("{http://www.w3.org/2000/svg}use")
    assert sum("fill: #0072b2" in e.get("style", "") for e in uses) == 2


@pytest.mark.covers("N4")
def test_what_stays_the_same_is_a_line_of_text(tmp_path):
    """No axes for it, and none at all for what was not measured."""
    records = [dict(step=i, loss=0.1 * i, clip_low=0.0, clip_high=0.0, lr=1e-5) for i in range(3)]
    page = report(write(tmp_path, records))
    assert list(page.charts()) == ["loss"]
    assert "The same at every step: learning rate 1e-05" in page.text
    assert "The same at every step: clipped below 0, above 0" in page.text
    assert "KL" not in page.text and "0 → 0.2" in page.text


def test_an_interval_is_a_band_around_its_line(tmp_path):
    records = [dict(step=i, eval_reward=i / 10, eval_reward_low=0.0) for i in range(5)]
    records = [one | dict(eval_reward_high=one["eval_reward"] + 0.5) for one in records]
    columns = read_metrics(write(tmp_path, records) / "metrics.jsonl")
    (chart,) = (chart for chart in ALL if chart.name == "evaluation")
    (line,) = charts._lines(chart, {"run": columns})
    np.testing.assert_allclose(line.high - line.low, np.arange(5) / 10 + 0.5)
    picture = report(tmp_path).charts()["evaluation"]
    bands = [e for e in picture.iter() if "fill-opacity: 0.15" in (e.get("style") or "")]
    assert len(bands) == 1


def test_two_runs_side_by_side(tmp_path):
    """Each chart has both, each setting that differs is named, and each run's last completions show."""
    runs = {}
    for name, seed in (("a", 17), ("b", 18)):
        records = [
            dict(step=i, kl=seed / 100 * i, seconds={"step": 1.0 * i, "eval": 2.0}) for i in (1, 2)
        ]
        settings = SETTINGS | {"train": SETTINGS["train"] | {"seed": seed}}
        rollouts = [rollout(step, prompts=1) for step in (1, 2)]
        runs[name] = write(tmp_path / name, records, rollouts, settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = write_report([*runs.values()])
    assert path == tmp_path / "a" / "comparison.html"
    page = Page(path.read_text())
    assert {"a", "b"} <= set(svg_text(page.charts()["kl"]))
    assert {"a", "b"} <= set(svg_text(page.charts()["seconds"]))
    assert "differsabtrain/seed1718" in page.text and "a against b" in page.text
    assert "a 0.17 → 0.34, b 0.18 → 0.36" in page.text and "a 3 → 4" in page.text
    assert "a: the last of 2 rollouts" in page.text and page.text.count("Step 2") == 2
    # Two folders of one name are told apart.
    other = write(tmp_path / "c" / "a", LINES)
    text = Page(write_report([runs["a"], other], tmp_path / "x.html").read_text()).text
    assert f"{runs['a']} against {other}" in text


def test_report_takes_several_runs():
    parsed = [
        console.parse_flags(train.report, words.split())["run"]
        for words in ("--run a --run=b --pngs", "--run a --pngs")
    ]
    assert parsed == ['["a", "b"]', "a"]


# Completions ------------------------------------------------------------------------------------


def test_first_middle_and_last_step_with_the_best_and_the_worst(whole):
    _, page = whole
    assert re.findall(r"Step (\d+)", page.text) == ["1", "150", "300"]
    assert page.text.count("prompt of 150") == 3 and page.text.count("3 of 4 prompts") == 3
    assert re.findall(r"advantage (\S+) · ", page.text)[:4] == ["+1.5", "-2", "+1", "-0.125"]
    assert page.text.count("4 of 6: best, worst, second best, second worst") == 9
    assert "the first, the middle and the last of 300 rollouts" in page.text
    assert len(page.tokens()) == 3 * 3 * 4 * 64
    shown = [a for a in page.of("p") if a.get("class", "").startswith("tokens ")]
    assert [(a["class"], a["style"]) for a in shown[:4]] == [
        ("tokens up", "--a:0.45"),
        ("tokens down", "--a:0.60"),
        ("tokens up", "--a:0.30"),
        ("tokens down", "--a:0.04"),
    ]


def test_tokens_tell_their_id_text_and_surprise(tmp_path):
    one = completion(n=5, logprobs=[0.0, -0.1, -2.5, -9.0, None], mask=[1, 1, 1, 1, 0])
    one |= dict(tokens=[" a", "\n", "é", '"<', "x"], finish="length", reward=None)
    one["rewards"] = {"exact": None, "format": 0.5}
    page = report(write(tmp_path, [LINE], [rollout(1, [one])]))
    assert [(a["class"], a["title"]) for a in page.tokens()] == [
        ("s0", 'id 0 · " a" · log-prob 0'),
        ("s1", 'id 1 · "\\n" · log-prob -0.1'),
        ("s4", 'id 2 · "é" · log-prob -2.5'),
        ("s7", 'id 3 · "\\"<" · log-prob -9'),
        ("masked", 'id 4 · "x" · masked'),
    ]
    assert ' a↵\né"<x' in page.text and "answer = 7" in page.text
    assert "entry" not in page.text  # it repeats the prompt
    assert "reward none (exact none, format 0.5) · advantage +1 · ended by length" in page.text


def test_both_colourings_are_a_matter_of_css(whole):
    _, page = whole
    radios = {a["id"]: a for a in page.of("input")}
    assert {a["for"] for a in page.of("label")} == set(radios) == {"by-advantage", "by-logprob"}
    assert {a["type"] for a in radios.values()} == {"radio"} and "checked" in radios["by-advantage"]
    shades = re.findall(
        r"#by-logprob:checked~\* \.s(\d)\{background:rgb\(0 114 178/(\S+)\)\}", page.source
    )
    assert [int(i) for i, _ in shades] == list(range(8))
    assert [float(a) for _, a in shades] == sorted(float(a) for _, a in shades)
    legend = [a.get("class", "ends") for a in page.of("span") if "title" not in a]
    legend = [kind for kind in legend if kind != "ends"]
    assert legend == ["up", "down", *(f"s{i}" for i in range(8))]


def test_long_completions_are_cut(tmp_path):
    page = report(write(tmp_path, [LINE], [rollout(1, [completion(n=1000)])]))
    assert len(page.tokens()) == 300 and "… 700 more tokens" in page.text


def test_completions_without_tokens_show_their_text(tmp_path):
    bare = {"text": "four & five"}
    page = report(write(tmp_path, [LINE], [rollout(1, [bare]), rollout(2, [])]))
    assert "four & five" in page.text and "reward none · advantage none" in page.text


# Hostile text -----------------------------------------------------------------------------------


def test_no_text_of_a_file_becomes_markup(tmp_path):
    h = HOSTILE
    bad = completion(n=2, tokens=[h, "\ud800\x00\u202e"], ids=[h, h], finish=h, reward=h)
    bad |= dict(rewards={h: 1.0}, mask=[h, h], logprobs=[h, h])
    row = rollout(1, [bad, completion(-1.0, text=h, tokens=None)])
    columns = {h: h, "answer": [h]}
    row["step"], row["prompts"][0] = h, row["prompts"][0] | dict(text=h, columns=columns)
    record = LINE | {
        h: 1.0,
        "rewards": {h: 1.0, "$\\frac{$": 2.0, "_x": 3.0, "\x00\ud800": 4.0},
    }
    record["seconds"] = {h: 1.0}
    settings = SETTINGS | {"data": {"task": h}, h: h}
    folder = tmp_path / HOSTILE.replace("/", "|")
    page = report(
        write(
            folder,
            [
                record,
                {"step": 2, "rewards": {name: 0 for name in record["rewards"]}, "eval_" + h: 1},
                {"step": 3, "eval_" + h: 2},
            ],
            [row],
            settings,
        )
    )
    assert not page.of("script")
    assert {tag for tag, _ in page.tags} <= set(
        "html head meta title style body h1 h2 h3 table tr th td div figure figcaption b img input"
        " label p span pre details summary nav a dl dt dd picture source".split()
    )
    allowed = set(
        "lang charset http-equiv content name class id alt src type checked for style title href"
        " media srcset".split()
    )
    assert {name for _, attrs in page.tags for name in attrs} <= allowed
    assert all(not attrs["src"].startswith("x") for attrs in page.of("img"))
    assert page.text.count(h) >= 8 and page.text.count("\x00") == 0
    labels = svg_text(page.charts()["rewards"])
    assert {h[:40], "$\\frac{$", "_x"} <= set(labels)
    for chart in page.charts().values():
        assert not list(chart.iter("{http://www.w3.org/2000/svg}script"))


# What may be missing ----------------------------------------------------------------------------


def test_a_run_of_fine_tuning(tmp_path):
    """As MetricsLog writes it, without rollouts."""
    with MetricsLog(tmp_path) as log:
        for step in range(1, 4):
            record = dict(step=step, loss=np.float32(2 / step), accuracy=0.5, lr=1e-4, memory=10**9)
            record |= dict(
                tokens_per_s=100.0, seconds={"step": 1.0, "data": 0.1}, updated=step != 2
            )
            log.write(record | dict(grad_norm=math.nan, perplexity=math.inf, compilations=[]))
    page = report(tmp_path)
    assert list(page.charts()) == ["loss"]
    told = "learning rate 0.0001", "peak memory 1", "time by phase step 91%, data 9%", "speed 100"
    assert all(text in page.text for text in told)
    assert "Completions" not in page.text and "held-out" not in page.text
    assert "hovers" not in page.text and "steps31 skipped" in page.text
    assert page.text.count("million parameters") == 0


@pytest.mark.covers("N13")
def test_fine_tuning_says_when_its_first_evaluation_was(tmp_path):
    records = [dict(step=i, loss=4.0 - i / 10) for i in range(1, 13)]
    for step in (4, 8, 12):
        records[step - 1] |= dict(eval_loss=4.0 - step / 10, eval_weight=118.0, eval_accuracy=0.1)
    page = report(write(tmp_path, records))
    assert "held-out loss3.6 → 2.8step 4 → step 12" in page.text and "before" not in page.text
    assert {"training", "held-out"} <= set(svg_text(page.charts()["loss"]))
    assert "<th>weight</th>" not in page.source


@pytest.mark.parametrize(
    "record", [metrics(0), {"step": 7}, {"step": 0, "seconds": {}, "rewards": None}]
)
def test_a_run_of_one_step(tmp_path, record):
    page = report(write(tmp_path, [record], [rollout(record["step"])]))
    assert f"steps{record['step']}" in page.text
    assert not page.charts() and ("kl divergence" in page.text) == ("kl" in record)
    assert page.text.count(f"Step {record['step']}") == 1


@pytest.mark.parametrize("value", [1e300, 10**400, "1e999", None, "text", [1], {}])
def test_numbers_that_cannot_be_drawn(tmp_path, value):
    value = json.loads(value) if value == "1e999" else value
    names = ("reward", "reward_std", "seconds", "gap_max")
    lines = [{name: metrics(step)[name] for name in ("step", *names)} for step in (1, 2, 3)]
    lines[1] |= dict.fromkeys(names, value)
    lines = [json.dumps(line).replace("Infinity", "1e999") for line in lines]
    charts = report(write(tmp_path, lines)).charts()
    assert list(charts) == ["reward", "gap", "seconds"]


def test_zeros_on_a_logarithmic_axis(tmp_path):
    records = [
        {"step": i, "gap_max": 0.0, "ratio_max": 1.0, "grad_norm": i - 1.0} for i in range(4)
    ]
    assert list(report(write(tmp_path, records)).charts()) == ["grad_norm"]


def test_settings_of_another_program(tmp_path):
    for settings in ({"model": "llama"}, {"model": {"dim": 3}}, {"model": None, "lora": {}}, {}):
        page = report(write(tmp_path, [LINE], settings=settings))
        assert "million parameters" not in page.text


def test_half_a_last_line_is_no_line(tmp_path):
    records, rollouts = [LINE, LINE | {"step": 2}], [rollout(1), rollout(2)]
    page = report(write(tmp_path / "run", records, rollouts))
    for tail in ('{"step": 3, "rew', '{"step": 3, "kl": 5.0}', "\x00\x00"):
        assert report(write(tmp_path / "run", records, rollouts, tail=tail)).source == page.source


def test_where_it_is_written(tmp_path):
    folder = write(tmp_path / "run", LINES)
    assert write_report(str(folder)) == folder / "report.html"
    out = tmp_path / "new" / "page.html"
    assert write_report(folder, out, pngs=True) == out
    assert sorted(os.listdir(out.parent)) == ["page.html", "report-kl.png"]
    assert out.read_bytes() == (folder / "report.html").read_bytes()
    assert sorted(os.listdir(folder)) == ["metrics.jsonl", "report.html", "run.json"]


# Broken files -----------------------------------------------------------------------------------


def refused(folder: Path, error=DataError) -> str:
    """The message, of one line, with which a folder is refused; nothing is written then."""
    with pytest.raises(error) as caught:
        write_report(folder)
    assert not (folder / "report.html").exists()
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message) < 400
    return message


@pytest.mark.parametrize(
    "line, told",
    [
        ('{"step": 2, "rew', "not valid JSON"),
        ("", "not valid JSON"),
        ('{"step": 2, "kl": NaN}', "NaN is not JSON"),
        ('{"step": 2, "step": 3}', "duplicate key 'step'"),
        ("[2]", "expected a JSON object, got list"),
        ('{"kl": 1}', "step is None, expected an integer from 0"),
        ('{"step": true}', "step is True"),
        ('{"step": "2"}', "step is '2'"),
        ('{"step": -1}', "step is -1"),
        ('{"step": 1' + "0" * 400 + "}", "expected an integer from 0"),
        ('{"step": 2, "compilations": [3]}', "expected [[what, seconds], …]"),
        ('{"step": 2, "compilations": [["f", "x"]]}', "expected [[what, seconds], …]"),
        ('{"a":' * 100_000, "nested too deeply"),
    ],
)
def test_a_broken_line_of_metrics(tmp_path, line, told):
    folder = write(tmp_path, [metrics(1), line, metrics(3)])
    message = refused(folder)
    assert message.startswith(f"{folder}/metrics.jsonl:2") and told in message


@pytest.mark.parametrize(
    "change, told",
    [
        ('{"step"', "not valid JSON"),
        ({"prompts": 3}, "prompts is 3, expected a list"),
        ({"prompts": ["x"]}, "got 'x', expected an object with 'text'"),
        ({"prompts": [{"text": 5}]}, "text is 5, expected a string"),
        ({"prompts": [{"columns": []}]}, "columns is [], expected an object"),
        ({"prompts": [{"completions": {}}]}, "completions is {}, expected a list"),
        ([None], "got None, expected an object with 'text'"),
        ([completion(ids=[1])], "3 tokens and 1 ids"),
        ([completion(mask=[1] * 4)], "3 tokens and 4 mask"),
        ([completion(logprobs="abc")], "logprobs is 'abc', expected a list"),
        ([completion(rewards=[1.0])], "rewards is [1.0], expected an object"),
        ([completion(text=["x" * 10**6])], "expected a string"),
    ],
)
def test_a_broken_rollout(tmp_path, change, told):
    broken = rollout(2, change) if isinstance(change, list) else change
    folder = write(tmp_path, [metrics(1)], [rollout(1), broken, rollout(3)])
    message = refused(folder)
    assert message.startswith(f"{folder}/rollouts.jsonl:2") and told in message


def test_rollouts_that_are_not_shown_are_not_parsed(tmp_path):
    rows = [rollout(1), "{", rollout(3), rollout(4), "{", rollout(6)]
    page = report(write(tmp_path, [LINE], rows))
    assert re.findall(r"Step (\d)", page.text) == ["1", "3", "6"]


def test_an_empty_run(tmp_path):
    told = "metrics.jsonl holds no step; wait until the run's first is done"
    (tmp_path / "metrics.jsonl").write_text("")
    assert refused(tmp_path) == f"{tmp_path}/{told}"
    (tmp_path / "metrics.jsonl").write_text('{"step": 1')
    assert refused(tmp_path) == f"{tmp_path}/{told}"


def test_what_is_no_run(tmp_path):
    assert "cannot read" in refused(tmp_path) and "no such file" in refused(tmp_path)
    assert "no such file" in refused(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "metrics.jsonl")
    assert "expected a regular file" in refused(tmp_path)
    folder = write(tmp_path / "run", [metrics(1)])
    (folder / "run.json").write_text("{'a': 1}")
    assert f"{folder}/run.json is not valid JSON" in refused(folder)
    (folder / "run.json").unlink()
    (folder / "rollouts.jsonl").mkdir()
    assert "rollouts.jsonl is a directory" in refused(folder)


def test_matplotlib_is_optional(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = refused(write(tmp_path, [metrics(1)]), ConfigError)
    assert message.endswith("which is not installed; pip install 'altiplano[report]'")
