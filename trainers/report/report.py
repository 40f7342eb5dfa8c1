"""A run's folder as one HTML page: curves, and completions token by token, without server or network.

A run's files may be hostile, since a completion is what a model wrote: page.html.jinja escapes all of it.
"""

import base64
import bisect
import itertools
import json
import math
from pathlib import Path
from typing import Any

import jinja2

from models.llama.config import ModelConfig
from trainers.runs.metrics import whole_lines
from trainers.report.charts import Columns, draw_charts
from utils.errors import ConfigError, DataError, is_int, is_number, printable
from utils.files import atomic_file, flatten, parse_json, read_json

# Settings of run.json that stand at the top, by their last name; the others are at the bottom.
_KEY_SETTINGS = (
    "task task_args data reward loss aggregation scale kl beta group_size prompts_per_step "
    "max_completion_len temperature batch_size seq_len optimizer learning_rate lr max_steps dtype seed"
)

# Limits of what is shown of a step's rollout: beyond them a page would have tens of megabytes.
_PROMPTS, _COMPLETIONS, _TOKENS = 3, 4, 300

# Bounds between the classes s0, s1, … of a token's surprise, −log-prob in nats.
_SURPRISE = (0.1, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0)

# A number beyond it counts as none: it is far above float32, and sums of such numbers are finite.
_LARGEST = 1e100

_KINDS = {str: "a string", list: "a list", dict: "an object"}


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
    rollouts = [_rollout(*line) for line in _read_rollouts(folder / "rollouts.jsonl")]
    charts = draw_charts(columns, pngs=pngs)
    page = _template().render(
        name=folder.resolve().name,
        facts=_facts(settings, columns),
        evaluations=_evaluations(columns),
        charts=charts,
        swatches=_swatches(),
        rollouts=rollouts,
        half=_COMPLETIONS // 2,
        settings=[(key, json.dumps(value)) for key, value in flatten(settings).items()],
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    for chart in charts if pngs else []:
        with atomic_file(out.parent / f"report-{chart.name}.png") as file:
            file.write(chart.png)
    with atomic_file(out) as file:
        file.write(page.encode())
    return out


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shown": _shown, "base64": lambda data: base64.b64encode(data).decode()}
    return environment.get_template("page.html.jinja")


def _shown(value: Any, limit: int | None = None) -> str:
    """Any value as text of at most `limit` characters, without controls and half surrogates."""
    text = str(value)
    if limit is not None and len(text) > limit:
        text = f"{text[:limit]}…"
    return printable(text).encode(errors="replace").decode()


def _number(value: Any) -> float:
    """A float; NaN for anything else, and beyond the largest."""
    return float(value) if is_number(value) and abs(value) < _LARGEST else math.nan


def _plain(value: Any) -> str:
    """A text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


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
                columns.setdefault(name, []).append((step, _number(value)))
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
    """Rows about the run's settings and how far it got."""
    rows = [("model", _model(settings.get("model")))]
    flat = flatten(settings)
    if "lora" in settings:
        rank = flat.get("lora/rank")
        rows.append(("trained", f"LoRA of rank {rank}" if rank else "all parameters"))
    for key in _KEY_SETTINGS.split():
        found = [v for k, v in flat.items() if k.split("/")[-1] == key and v is not None]
        rows += [(key.replace("_", " "), _plain(found[0]))] if found else []
    seconds = sum(_total(columns, name) for name in columns if name.startswith("seconds/"))
    rows.append(("last step", f"{columns['step'][-1][0]:,}"))
    rows.append(("time", f"{seconds / 60:,.1f} minutes"))
    rows.append(("of which compiling", f"{_total(columns, 'compilations/seconds'):,.0f} s"))
    skipped = sum(value == 0 for _, value in columns.get("updated", []))
    rows.append(("updates skipped", str(skipped)))
    return [(name, value) for name, value in rows if value]


def _total(columns: Columns, name: str) -> float:
    """The sum of a column's finite numbers."""
    return sum(value for _, value in columns.get(name, []) if math.isfinite(value))


def _model(fields: Any) -> str:
    try:
        config = ModelConfig(**fields | {"rope_scaling": None})
    except (TypeError, OverflowError, ConfigError):  # of another program, or of a later version
        return ""
    shape = f"{config.n_layers} layers of {config.dim}, vocabulary {config.vocab_size:,}"
    return f"{config.n_params / 1e6:,.1f} million parameters: {shape}"


def _evaluations(columns: Columns) -> list[tuple[str, ...]]:
    """The first evaluation next to the last, one row per number."""
    rows = []
    for name, column in columns.items():
        values = [(step, value) for step, value in column if math.isfinite(value)]
        if name.startswith("eval_") and len(values) > 1:
            (first, before), (last, after) = values[0], values[-1]
            told = f"{before:.4g}", f"{after:.4g}", f"{after - before:+.4g}"
            rows.append((name.removeprefix("eval_"), *told, f"{first:,} → {last:,}"))
    return rows


# Completions ------------------------------------------------------------------------------------


def _swatches() -> list[str]:
    """The legend of the classes s0, s1, … of a token's probability."""
    bounds = [math.exp(-bound) for bound in _SURPRISE]
    return [f"above {bounds[0]:.0%}", *(f"to {bound:.2g}" for bound in bounds[1:]), "less"]


def _rollout(where: str, rollout: dict) -> dict[str, Any]:
    """A few prompts of a line of rollouts.jsonl, as the template shows them.

    Raises DataError if a field has a type or a length that it cannot have.
    """
    prompts = _get(rollout, "prompts", list, where)
    shown = [_prompt(prompt, where) for prompt in prompts[:_PROMPTS]]
    return {"step": rollout.get("step"), "prompts": shown, "n": len(prompts)}


def _prompt(prompt: Any, where: str) -> dict[str, Any]:
    """A prompt, with its completions of the highest and the lowest advantages."""
    text = _get(prompt, "text", str, where)
    columns = [(k, _plain(v)) for k, v in _get(prompt, "columns", dict, where).items()]
    group = [(_advantage(c, where), c) for c in _get(prompt, "completions", list, where)]
    group.sort(key=lambda pair: pair[0], reverse=True)
    largest = max((abs(advantage) for advantage, _ in group), default=0) or 1.0
    half = _COMPLETIONS // 2
    some = group if len(group) <= _COMPLETIONS else group[:half] + group[-half:]
    shown = [_completion(c, advantage / largest, where) for advantage, c in some]
    return {"text": text, "columns": columns, "completions": shown, "n": len(group)}


def _advantage(completion: Any, where: str) -> float:
    _get(completion, "text", str, where)
    advantage = _number(completion.get("advantage"))
    return 0.0 if math.isnan(advantage) else advantage


def _completion(completion: dict, strength: float, where: str) -> dict[str, Any]:
    """Rewards and tokens of a completion; `strength` in [-1, 1] colours them by advantage."""
    tokens = _tokens(completion, where)
    rewards = _get(completion, "rewards", dict, where).items()
    return {
        "text": completion.get("text") or "",
        "reward": _score(completion.get("reward")),
        "rewards": [(name, _score(value)) for name, value in rewards],
        "advantage": _score(completion.get("advantage"), "+"),
        "finish": completion.get("finish"),
        "side": "up" if strength > 0 else "down" if strength < 0 else "even",
        "strength": f"{abs(strength) * 0.6:.2f}",
        "tokens": [_token(*row) for row in itertools.islice(tokens, _TOKENS)],
        "more": max(len(tokens) - _TOKENS, 0),
    }


def _score(value: Any, sign: str = "") -> str:
    score = _number(value)
    return "none" if math.isnan(score) else f"{score:{sign}.4g}"


def _tokens(completion: dict, where: str) -> list[tuple]:
    """(text, id, log-prob, mask) of each token, None where a list is empty."""
    names = ("tokens", "ids", "logprobs", "mask")
    tokens, *others = (_get(completion, name, list, where) for name in names)
    for name, values in zip(names[1:], others):
        if tokens and values and len(values) != len(tokens):
            raise DataError(
                f"{where}: a completion has {len(tokens)} tokens and {len(values)} {name}"
            )
    return list(zip(tokens, *(values or [None] * len(tokens) for values in others)))


def _token(token: Any, token_id: Any, logprob: Any, mask: Any) -> dict[str, str]:
    """A token's class, and its id, text and log-prob for whoever points at it."""
    logprob = _number(logprob)
    told = [f"id {_shown(token_id, 40)}", _shown(json.dumps(token, ensure_ascii=False), 200)]
    kind = "none"
    if not math.isnan(logprob):
        kind = f"s{bisect.bisect(_SURPRISE, -logprob)}"
        told.append(f"log-prob {logprob:.3g}")
    if mask == 0:
        kind, told = "masked", [*told, "masked"]
    return {
        "kind": kind,
        "title": " · ".join(told),
        "text": _shown(token, 200).replace("\n", "↵\n"),
    }


def _get(fields: Any, name: str, kind: type, where: str) -> Any:
    """A field's value, or an empty one where it is absent or null."""
    if not isinstance(fields, dict):
        raise DataError(f"{where}: got {fields!r:.60}, expected an object with {name!r}")
    value = fields.get(name)
    if value is not None and not isinstance(value, kind):
        raise DataError(f"{where}: {name} is {value!r:.60}, expected {_KINDS[kind]}")
    return kind() if value is None else value
