"""Completions as the page of a run shows them: token by token, with rewards; files may be hostile."""

import bisect
import itertools
import json
import math
from typing import Any

from utils.errors import DataError, is_int, is_number, printable

# Limits of what is shown of a step's rollout: beyond them a page would have tens of megabytes.
_PROMPTS, _COMPLETIONS, _TOKENS = 3, 4, 300

# Bounds between the classes s0, s1, … of a token's surprise, −log-prob in nats.
_SURPRISE = (0.1, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0)

# A number beyond it counts as none: it is far above float32, and sums of such numbers are finite.
_LARGEST = 1e100

_KINDS = {str: "a string", list: "a list", dict: "an object"}


def shown(value: Any, limit: int | None = None) -> str:
    """Any value as text of at most `limit` characters, without controls and half surrogates."""
    text = str(value)
    if limit is not None and len(text) > limit:
        text = f"{text[:limit]}…"
    return printable(text).encode(errors="replace").decode()


def number(value: Any) -> float:
    """A float; NaN for anything else, and beyond the largest."""
    return float(value) if is_number(value) and abs(value) < _LARGEST else math.nan


def plain(value: Any) -> str:
    """A text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def swatches() -> list[str]:
    """The legend of the classes s0, s1, … of a token's probability."""
    bounds = [math.exp(-bound) for bound in _SURPRISE]
    return [f"above {bounds[0]:.0%}", *(f"to {bound:.2g}" for bound in bounds[1:]), "less"]


def shown_rollout(where: str, rollout: dict) -> dict[str, Any]:
    """A few prompts of a line of rollouts.jsonl, as the template shows them.

    Raises DataError if a field has a type or a length that it cannot have.
    """
    prompts = _get(rollout, "prompts", list, where)
    some = [_prompt(prompt, where) for prompt in prompts[:_PROMPTS]]
    return {"step": rollout.get("step"), "prompts": some, "n": len(prompts)}


def _prompt(prompt: Any, where: str) -> dict[str, Any]:
    """A prompt, with its completions of the highest and lowest advantages: best, worst, second best …"""
    text = _get(prompt, "text", str, where)
    answer = _get(prompt, "columns", dict, where).get("answer")
    group = [(_advantage(c, where), c) for c in _get(prompt, "completions", list, where)]
    group.sort(key=lambda pair: pair[0], reverse=True)
    largest = max((abs(advantage) for advantage, _ in group), default=0) or 1.0
    from_both_ends = [group[i // 2 if i % 2 == 0 else -1 - i // 2] for i in range(len(group))]
    some = from_both_ends[:_COMPLETIONS]
    found = [_completion(c, advantage / largest, where) for advantage, c in some]
    answer = "" if answer is None else plain(answer)
    return {"text": text, "answer": answer, "completions": found, "n": len(group)}


def best_and_worst(rollouts: list[dict]) -> dict[str, Any] | None:
    """The last rollout's first prompt that has a better and a worse completion; None without one."""
    for prompt in rollouts[-1]["prompts"] if rollouts else []:
        if len({c["advantage"] for c in prompt["completions"][:2]}) > 1:
            return prompt | {"step": rollouts[-1]["step"], "completions": prompt["completions"][:2]}
    return None


def _advantage(completion: Any, where: str) -> float:
    _get(completion, "text", str, where)
    advantage = number(completion.get("advantage"))
    return 0.0 if math.isnan(advantage) else advantage


def _completion(completion: dict, strength: float, where: str) -> dict[str, Any]:
    """Rewards and tokens of a completion; `strength` in [-1, 1] colours them by advantage."""
    tokens = _tokens(completion, where)
    rewards = _get(completion, "rewards", dict, where).items()
    seen = [_token(*row) for row in itertools.islice(tokens, _TOKENS)]
    return {
        "text": completion.get("text") or "",
        "turns": _turns(completion, seen, where),
        "reward": _score(completion.get("reward")),
        "rewards": [(name, _score(value)) for name, value in rewards],
        "advantage": _score(completion.get("advantage"), "+"),
        "finish": completion.get("finish"),
        "side": "up" if strength > 0 else "down" if strength < 0 else "even",
        "strength": f"{abs(strength) * 0.6:.2f}",
        "tokens": seen,
        "more": max(len(tokens) - _TOKENS, 0),
    }


def _turns(completion: dict, tokens: list, where: str) -> list[dict[str, Any]]:
    """The turns of an episode: its tokens, what it calls, and what it is answered."""
    turns = []
    for turn in _get(_get(completion, "episode", dict, where), "turns", list, where):
        start, end = (
            turn.get(name) if isinstance(turn, dict) else None for name in ("start", "end")
        )
        if not is_int(start) or not is_int(end):
            raise DataError(f"{where}: got {turn!r:.60}, expected a turn with a start and an end")
        calls = _get(_get(turn, "message", dict, where), "tool_calls", list, where)
        answers = _get(turn, "answers", list, where)
        turns.append(
            {
                "tokens": tokens[max(start, 0) : max(end, 0)],
                "reward": _score(turn.get("reward")),
                "calls": [_call(call, where) for call in calls],
                "answers": [
                    (_get(one, "role", str, where), plain(one.get("content"))) for one in answers
                ],
            }
        )
    return turns


def _call(call: Any, where: str) -> str:
    """A tool call as Python would write it."""
    function = _get(call, "function", dict, where)
    arguments = function.get("arguments")
    if isinstance(arguments, dict):
        arguments = ", ".join(f"{name}={plain(value)}" for name, value in arguments.items())
    return f"{_get(function, 'name', str, where)}({arguments})"


def _score(value: Any, sign: str = "") -> str:
    score = number(value)
    return "none" if math.isnan(score) else f"{score:{sign if score else ''}.4g}"


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
    logprob = number(logprob)
    told = [f"id {shown(token_id, 40)}", shown(json.dumps(token, ensure_ascii=False), 200)]
    kind = "none"
    if not math.isnan(logprob):
        kind = f"s{bisect.bisect(_SURPRISE, -logprob)}"
        told.append(f"log-prob {logprob:.3g}")
    if mask == 0:
        kind, told = "masked", [*told, "masked"]
    return {
        "kind": kind,
        "title": " · ".join(told),
        "text": shown(token, 200).replace("\n", "↵\n"),
    }


def _get(fields: Any, name: str, kind: type, where: str) -> Any:
    """A field's value, or an empty one where it is absent or null."""
    if not isinstance(fields, dict):
        raise DataError(f"{where}: got {fields!r:.60}, expected an object with {name!r}")
    value = fields.get(name)
    if value is not None and not isinstance(value, kind):
        raise DataError(f"{where}: {name} is {value!r:.60}, expected {_KINDS[kind]}")
    return kind() if value is None else value
