"""The HTML of a run's report. Text from files goes through `text`, and the page allows no scripts."""

import base64
import bisect
import html
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from trainers.report.charts import Drawn
from utils.errors import DataError, is_number

# What is shown of a step's rollout: with more, a page would be tens of megabytes.
_PROMPTS, _COMPLETIONS, _TOKENS, _CHARS, _VALUE_CHARS = 3, 4, 300, 2000, 200

# Bounds between the classes s0, s1, … of a token's surprise, −log-prob in nats.
_SURPRISE = (0.1, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0)

# A number beyond it counts as none: it is far above float32, and sums of such are still finite.
_LARGEST = 1e100

_KINDS = {str: "a string", list: "a list", dict: "an object"}

_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\ufffd")


def text(value: Any, limit: int | None = None) -> str:
    """Any value as escaped text; what is no text (controls, half surrogates) is replaced."""
    shown = str(value)
    if limit is not None and len(shown) > limit:
        shown = f"{shown[:limit]}…"
    return html.escape(shown.translate(_CONTROLS).encode(errors="replace").decode())


def number(value: Any) -> float:
    """A float, NaN for what is no number or out of bounds."""
    return float(value) if is_number(value) and abs(value) < _LARGEST else math.nan


def plain(value: Any) -> str:
    """A text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def table(rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> str:
    """Rows of texts, the first of each being its heading; empty if there are none."""
    if not rows:
        return ""
    cells = lambda row: "".join(f"<td>{text(cell, _VALUE_CHARS)}</td>" for cell in row)
    lines = [f"<tr><th>{text(row[0], _VALUE_CHARS)}</th>{cells(row[1:])}</tr>" for row in rows]
    top = "".join(f"<th>{text(cell)}</th>" for cell in head)
    return f"<table>{f'<tr>{top}</tr>' if top else ''}{''.join(lines)}</table>"


def figure(chart: Drawn) -> str:
    """A chart with its caption, in the page itself."""
    data = base64.b64encode(chart.svg).decode()
    return (
        f"<figure><figcaption><b>{chart.title}.</b> {chart.caption}</figcaption><img "
        f'id="{chart.name}" alt="{chart.title}" src="data:image/svg+xml;base64,{data}"></figure>'
    )


# Completions ------------------------------------------------------------------------------------


def completions(rollouts: list[tuple[str, dict]]) -> Iterator[str]:
    """A few prompts of each rollout with a few completions each, in either of two colourings.

    Args:
        rollouts: (`file:line`, line of rollouts.jsonl).

    Raises:
        DataError: a field has a type or a length that it cannot have.
    """
    if not rollouts:
        return
    bounds = [math.exp(-bound) for bound in _SURPRISE]
    swatches = [f"above {bounds[0]:.0%}"] + [f"to {b:.2g}" for b in bounds[1:]] + ["less"]
    legend = " ".join(f'<span class="s{i}">&nbsp;{t}&nbsp;</span>' for i, t in enumerate(swatches))
    yield "<h2>Completions</h2>"
    yield '<input type="radio" name="by" id="by-advantage" checked>'
    yield '<label for="by-advantage">colour by advantage</label>'
    yield '<input type="radio" name="by" id="by-logprob">'
    yield '<label for="by-logprob">colour by log-prob</label>'
    yield '<p class="legend advantage"><span class="up">&nbsp;made likelier&nbsp;</span>'
    yield '<span class="down">&nbsp;made less likely&nbsp;</span>: the more, the stronger</p>'
    yield f'<p class="legend logprob">probability when sampled: {legend}</p>'
    yield '<div class="rollouts">'
    for where, rollout in rollouts:
        yield f"<h3>Step {text(rollout.get('step'))}</h3>"
        prompts = _get(rollout, "prompts", list, where)
        for prompt in prompts[:_PROMPTS]:
            yield from _prompt(prompt, where)
        if len(prompts) > _PROMPTS:
            yield f'<p class="note">{_PROMPTS} of {len(prompts)} prompts</p>'
    yield "</div>"


def _prompt(prompt: Any, where: str) -> Iterator[str]:
    """A prompt, and of its completions those with the highest and the lowest advantages."""
    yield f'<pre>{text(_get(prompt, "text", str, where), _CHARS)}</pre>'
    columns = _get(prompt, "columns", dict, where)
    if columns:
        told = (f"{text(k, 40)} = {text(plain(v), _VALUE_CHARS)}" for k, v in columns.items())
        yield f'<p class="note">{" · ".join(told)}</p>'
    group = _get(prompt, "completions", list, where)
    group = sorted(group, key=lambda c: _advantage(c, where), reverse=True)
    largest = max((abs(_advantage(c, where)) for c in group), default=0) or 1.0
    half = _COMPLETIONS // 2
    shown = group if len(group) <= _COMPLETIONS else group[:half] + group[-half:]
    for completion in shown:
        yield _completion(completion, _advantage(completion, where) / largest, where)
    if len(group) > len(shown):
        yield f'<p class="note">the {half} best and the {half} worst of {len(group)}</p>'


def _advantage(completion: Any, where: str) -> float:
    _get(completion, "text", str, where)
    advantage = number(completion.get("advantage"))
    return 0.0 if math.isnan(advantage) else advantage


def _completion(completion: dict, strength: float, where: str) -> str:
    """What it earned, and its tokens; `strength` in [-1, 1] colours them by advantage."""
    by_name = _get(completion, "rewards", dict, where).items()
    parts = ", ".join(f"{text(name, 40)} {_score(value)}" for name, value in by_name)
    about = f"reward <b>{_score(completion.get('reward'))}</b>{f' ({parts})' if parts else ''}"
    about += f" · advantage <b>{_score(completion.get('advantage'), '+')}</b>"
    about += f" · ended by {text(completion.get('finish'), 40)}"
    side = "up" if strength > 0 else "down" if strength < 0 else "even"
    tokens = _tokens(completion, where)
    return (
        f'<p class="note">{about}</p>'
        f'<p class="tokens {side}" style="--a:{abs(strength) * 0.6:.2f}">{tokens}</p>'
    )


def _score(value: Any, sign: str = "") -> str:
    score = number(value)
    return "none" if math.isnan(score) else f"{score:{sign}.4g}"


def _tokens(completion: dict, where: str) -> str:
    """A span a token: coloured by its class, with id, text and log-prob for whoever points at it."""
    names = ("tokens", "ids", "logprobs", "mask")
    tokens, *others = (_get(completion, name, list, where) for name in names)
    if not tokens:
        return f"<span>{text(completion.get('text') or '', _CHARS)}</span>"
    for name, values in zip(names[1:], others):
        if values and len(values) != len(tokens):
            raise DataError(
                f"{where}: a completion has {len(tokens)} tokens and {len(values)} {name}"
            )
    ids, logprobs, mask = (values or [None] * len(tokens) for values in others)
    spans = [_token(*row) for row in itertools.islice(zip(tokens, ids, logprobs, mask), _TOKENS)]
    more = f" … {len(tokens) - _TOKENS} more tokens" if len(tokens) > _TOKENS else ""
    return "".join(spans) + more


def _token(token: Any, token_id: Any, logprob: Any, mask: Any) -> str:
    logprob = number(logprob)
    told = [f"id {text(token_id, 40)}", text(json.dumps(token, ensure_ascii=False), _VALUE_CHARS)]
    kind = "none"
    if not math.isnan(logprob):
        kind = f"s{bisect.bisect(_SURPRISE, -logprob)}"
        told.append(f"log-prob {logprob:.3g}")
    if mask == 0:
        kind, told = "masked", [*told, "masked"]
    shown = text(token, _VALUE_CHARS).replace("\n", "↵\n")
    return f'<span class="{kind}" title="{" · ".join(told)}">{shown}</span>'


def _get(fields: Any, name: str, kind: type, where: str) -> Any:
    """A field's value, or an empty one where it is absent or null."""
    if not isinstance(fields, dict):
        raise DataError(f"{where}: got {fields!r:.60}, expected an object with {name!r}")
    value = fields.get(name)
    if value is not None and not isinstance(value, kind):
        raise DataError(f"{where}: {name} is {value!r:.60}, expected {_KINDS[kind]}")
    return kind() if value is None else value


# The page ---------------------------------------------------------------------------------------


def page(title: str, body: str) -> str:
    """The whole document; `body` is HTML."""
    shades = (  # a rule for each class of surprise
        f"#by-logprob:checked~* .s{i}{{background:rgb(0 114 178/{0.1 * i:.1f})}}\n"
        for i in range(len(_SURPRISE) + 1)
    )
    return _PAGE.format(title=text(title), style=_STYLE + "".join(shades), body=body)


# Blue, and bluish green against vermillion, are of Okabe and Ito's palette for the colour-blind.
_STYLE = """
:root{color-scheme:light dark;--ink:#23272d;--paper:#fff;--line:#d5d9de}
@media screen and (prefers-color-scheme:dark){:root{--ink:#dfe3e8;--paper:#15181c;--line:#3a4048}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:78rem;
margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;margin:1rem 0}
th,td{text-align:left;vertical-align:top;padding:.15rem 1.2rem .15rem 0;border-bottom:1px solid var(--line);
overflow-wrap:anywhere}
th{font-weight:600;white-space:nowrap}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(22rem,1fr));gap:1.5rem}
figure{margin:0;break-inside:avoid}
img{width:100%;height:auto}
figcaption,.note{font-size:.87rem}
.note{margin:.7rem 0 .1rem}
pre,.tokens{font:13px/1.7 ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere;
unicode-bidi:isolate;margin:.1rem 0 .4rem;padding-left:.8rem;border-left:3px solid var(--line)}
pre{margin-top:1.5rem;border-color:var(--ink)}
span{print-color-adjust:exact;-webkit-print-color-adjust:exact}
.masked{opacity:.5}
label{margin-right:1rem}
.legend{display:none}
#by-advantage:checked~.advantage,#by-logprob:checked~.logprob{display:block}
.advantage .up,.advantage .down{--a:.5}
#by-advantage:checked~* .up span:not(.masked),.advantage .up{background:rgb(0 158 115/var(--a))}
#by-advantage:checked~* .down span:not(.masked),.advantage .down{background:rgb(213 94 0/var(--a))}
"""


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
