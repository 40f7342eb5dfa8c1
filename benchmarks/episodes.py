"""Turns next to one turn: what a rollout over several turns costs beyond its tokens.

    python benchmarks/episodes.py

The default model with random prompts: 64 rows of 3 turns, each of as many sampled tokens, with what
an environment says between them; next to the same tokens in one turn, where what the environment
said is a part of the prompt. No environment runs. Prints a ratio.
"""

import sys
import time
from pathlib import Path

import fire
import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from anywhere

from generate import GenerationConfig, generate
from models.llama.chat.turns import Turns, read
from models.llama.load import DecodingModelFlags, load_model
from sampling import TopP


def main(
    episodes: int = 64, turns: int = 3, turn_len: int = 32, said: int = 20, repeats: int = 3
) -> None:
    """Measures both, interleaved."""
    model = load_model(DecodingModelFlags())
    draw = np.random.default_rng(0)
    prompts = draw.integers(100, 40000, (episodes, 24)).tolist()
    words = draw.integers(100, 40000, (turns - 1, episodes, said)).tolist()
    key, sampler = jax.random.key(0), TopP(temperature=1.0)

    def in_turns() -> None:
        run = Turns(model.llama, model.params, sampler, GenerationConfig(max_new_tokens=turn_len))
        run.start(prompts, key=key, room=24 + turns * turn_len + (turns - 1) * said)
        run.advance()
        for more in words:
            run.read(dict(enumerate(more)), dict.fromkeys(range(episodes), turn_len))
            run.advance()
        assert run.completions().lengths.sum() == episodes * turns * turn_len

    def in_one() -> None:
        rows = [sum((more[i] for more in words), row) for i, row in enumerate(prompts)]
        config = GenerationConfig(max_new_tokens=turns * turn_len)
        generate(model.llama, model.params, rows, sampler, config, key=key)

    seconds = {in_turns: [], in_one: []}
    for repeat in range(repeats + 1):
        for run, found in seconds.items():
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
        if repeat == 1:
            compiled = read._cache_size()
    several, one = (min(found[1:]) for found in seconds.values())
    print(
        f"{episodes} rows, {turns} turns of {turn_len} tokens with {said} said between: {several:.2f} s, "
        f"in one turn {one:.2f} s: {several / one:.2f} x; compiled since the second: "
        f"{read._cache_size() - compiled}"
    )


if __name__ == "__main__":
    fire.Fire(main)
