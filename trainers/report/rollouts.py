"""A rollout as a line of rollouts.jsonl, with all that a step needs to be computed again, and back."""

from collections.abc import Callable
from typing import Any

import numpy as np

from models.llama.tokenizer import Tokenizer
from trainers.environments.rollouts import EpisodeRollout
from trainers.rollout import Layout, Prompt, Rollout
from utils.errors import DataError

_BY_TOKEN = ("logprobs", "old_logprobs", "ref_logprobs")


def recorder(
    write: Callable[[dict[str, Any]], None],
    tokenizer: Tokenizer,
    failures: Callable[[], list[dict[str, Any]]] = list,
) -> Callable[[int, Rollout, Layout], None]:
    """The `write` of RolloutData that hands each rollout's line to `write`, a MetricsLog's for example.

    The line has the rollout's `failures` of rewards, if there are any.
    """

    def record(step: int, rollout: Rollout, layout: Layout) -> None:
        failed = failures()
        more = {"failures": failed} if failed else {}
        write(to_record(step, rollout, layout, tokenizer) | more)

    return record


def to_record(step: int, rollout: Rollout, layout: Layout, tokenizer: Tokenizer) -> dict[str, Any]:
    """A line of rollouts.jsonl, with all that a step needs to be computed again.

    `step` is the first update on the rollout.

    `prompts`, each with `text`, `ids`, `columns` and `completions`; each of these with `text`, `ids`,
    `tokens` (the text of each id), `mask`, `logprobs`, where there are `old_logprobs` and
    `ref_logprobs`, `rewards` by function, `reward` (null: unscorable), `advantage` and `finish`.
    Of several turns also `episode`, see `trainers.environments.episodes.Played.record`, and the prompt's
    `messages`; `mask` is 0 then at what the environment wrote.
    """

    def completion(b: int, g: int) -> dict[str, Any]:
        n = int(rollout.lengths[b, g])
        ids = rollout.tokens[b, g, :n].tolist()
        scores = dict(zip(rollout.functions, map(_number, rollout.scores[b, g])))
        arrays = {name: getattr(rollout, name) for name in _BY_TOKEN}
        mask = np.full(n, rollout.valid[b, g])
        if isinstance(rollout, EpisodeRollout):
            mask &= rollout.sampled[b, g, :n]
        return {
            "text": rollout.texts[b][g],
            "ids": ids,
            "tokens": [tokenizer.token_bytes(i).decode("utf-8", "replace") for i in ids],
            "mask": mask.astype(int).tolist(),
            **{k: _floats(x[b, g, :n]) for k, x in arrays.items() if x is not None},
            "rewards": scores,
            "reward": _number(rollout.rewards[b, g]),
            "advantage": _floats(rollout.advantages[b, g : g + 1])[0],
            "finish": "stop" if rollout.stopped[b, g] else "length",
            **({"episode": rollout.episodes[b][g]} if isinstance(rollout, EpisodeRollout) else {}),
        }

    prompts = [
        {
            "text": prompt.text,
            "ids": list(prompt.ids),
            "columns": dict(prompt.columns),
            **({"messages": list(prompt.messages)} if prompt.messages else {}),
            "completions": [completion(b, g) for g in range(rollout.lengths.shape[1])],
        }
        for b, prompt in enumerate(rollout.prompts)
    ]
    shape = {"prompt_width": layout.prompt_width, "width": layout.width}
    return {"step": step, **shape, "branches": layout.branches, "prompts": prompts}


def from_record(record: dict[str, Any], where: str) -> tuple[Rollout, Layout]:
    """The rollout of a `to_record`. Raises DataError, naming `where`, if something is missing."""
    try:
        layout = Layout(**{k: int(record[k]) for k in ("prompt_width", "width", "branches")})
        groups = [prompt["completions"] for prompt in record["prompts"]]
        lengths = np.asarray([[len(c["ids"]) for c in group] for group in groups], np.int64)

        def by_token(name: str, dtype: Any) -> np.ndarray | None:
            if name not in groups[0][0]:
                return None
            out = np.zeros((*lengths.shape, layout.width), dtype)
            for b, group in enumerate(groups):
                for g, one in enumerate(group):
                    out[b, g, : lengths[b, g]] = one[name]
            return out

        def each(name: str) -> list[list]:
            return [[one[name] for one in group] for group in groups]

        functions = tuple(groups[0][0]["rewards"])
        scores = [[[one["rewards"][f] for f in functions] for one in group] for group in groups]
        kind, more = Rollout, {}
        if "episode" in groups[0][0]:
            sampled = np.zeros((*lengths.shape, layout.width), bool)
            for b, g in np.ndindex(lengths.shape):
                for turn in groups[b][g]["episode"]["turns"]:
                    sampled[b, g, turn["start"] : turn["end"]] = True
            kind, more = EpisodeRollout, {"sampled": sampled, "episodes": each("episode")}
        rollout = kind(
            prompts=[
                Prompt(
                    text=p["text"],
                    ids=tuple(p["ids"]),
                    columns=p["columns"],
                    messages=tuple(p.get("messages", ())),
                )
                for p in record["prompts"]
            ],
            texts=each("text"),
            functions=functions,
            tokens=by_token("ids", np.int32),
            lengths=lengths,
            stopped=np.asarray([[f == "stop" for f in row] for row in each("finish")]),
            scores=np.asarray(scores, np.float64),
            rewards=np.asarray(each("reward"), np.float64),
            advantages=np.asarray(each("advantage"), np.float32),
            **{name: by_token(name, np.float32) for name in _BY_TOKEN},
            **more,
        )
    except (KeyError, TypeError, ValueError, IndexError) as e:
        text = f"{where}: not a rollout of this program ({type(e).__name__}: {e!s:.100})"
        raise DataError(f"{text}; it is written by `train.py grpo`") from e
    return rollout, layout


def _floats(values: np.ndarray) -> list[float]:
    """float32 numbers in the shortest form that reads back as the same float32."""
    return [float(str(value)) for value in values.astype(np.float32)]


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
