"""This project's GRPO, measured by benchmarks/grpo.py."""

import collections
import contextlib
import copy
import statistics
import sys
import time
import warnings
from pathlib import Path

# Before this folder, whose `generate` is another one.
sys.path.insert(0, str(Path(__file__).parents[1]))

from utils.console import pages  # noqa: E402

if __name__ == "__main__":  # as train.py does
    pages.use_huge_pages()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.grpo_products import Products  # noqa: E402
from benchmarks.grpo_reward import distinct_ids  # noqa: E402
from benchmarks.workers import serve  # noqa: E402
from models.llama.decoding import GenerationConfig  # noqa: E402
from models.llama.generation import Generation  # noqa: E402
from models.llama.load import load_checkpoint  # noqa: E402
from models.llama.model import LLaMa  # noqa: E402
from models.llama.tokenizer import load_tokenizer  # noqa: E402
from sampling import TopP  # noqa: E402
from trainers.grpo_trainer import GRPOConfig, GRPOTrainer  # noqa: E402
from trainers.on_policy import RolloutBatches, RolloutData, decoding_params  # noqa: E402
from trainers.rewards.functions import Reward  # noqa: E402
from trainers.rewards.pool import RewardPool  # noqa: E402
from trainers.rollout import Prompt, RolloutConfig  # noqa: E402
from utils.clock import PhaseClock  # noqa: E402


class Altiplano:
    """GRPOTrainer and its rollouts, driven as `fit` drives them.

    Args:
        folder: a Hugging Face checkpoint with a tokenizer.
        prompts: their ids; all of them make a rollout.
        group_size: completions of each.
        length: tokens of each.
        dtype: of activations and products.
        params_dtype: of parameters and AdamW's first moments.
        prompts_at_once: of which gradients are computed at once, with their groups.
    """

    def __init__(
        self,
        folder: str,
        prompts: list[list[int]],
        group_size: int,
        length: int,
        dtype: str,
        params_dtype: str,
        prompts_at_once: int,
    ):
        config, params = load_checkpoint(folder, dtype=params_dtype)
        grpo = GRPOConfig(
            learning_rate=1e-6,
            schedule="constant",
            param_dtype=params_dtype,
            state_dtype=params_dtype,
            micro_batch_size=prompts_at_once,
            max_completion_len=length,
        )
        llama = LLaMa(config, dtype=jnp.dtype(dtype), remat="dots")
        self._trainer = GRPOTrainer(llama, grpo)
        self._state, self._frozen = self._trainer.init(params, jax.random.key(0), donate=True)
        self._prompts, self._group_size, self._length = prompts, group_size, length
        self._asked = [Prompt(text="", ids=tuple(ids), columns={}) for ids in prompts]
        rewards = (Reward(name="distinct_ids", function=distinct_ids),)
        self._pool, self._tokenizer = RewardPool(rewards), load_tokenizer(folder)
        # That no completion ended is what is wanted here.
        warnings.filterwarnings("ignore", message="all .* completions were cut")
        self._batches, self._clock = self._data(frozenset()).batches(), PhaseClock()
        for batch in self._data(frozenset()).preflight_batches():
            self._update(batch)

    def step(self) -> dict:
        """Of one rollout and one optimizer step: "seconds", those by "phases", and "lengths"."""
        return self._step(self._batches)

    def decode_steps(self, repeats: int) -> list[float]:
        """Seconds of a decode step with the group as it is, and with one twice as large."""
        policy = decoding_params(self._trainer, self._state, self._frozen)
        runs = []
        for times in (1, 2):
            config = GenerationConfig(max_new_tokens=self._length, n=times * self._group_size)
            runs.append(Generation(self._trainer.model, policy, TopP(), config))
        seconds = [[], []]
        for i in range(repeats + 1):
            for run, found in zip(runs, seconds):
                run.start(self._prompts, key=jax.random.key(i))
                start = time.perf_counter()
                run.advance()
                found.append((time.perf_counter() - start) / (self._length - 1))
        return [statistics.median(found[1:]) for found in seconds]

    def products(self, repeats: int) -> dict[str, float]:
        """Seconds by phase of the products with the model's matrices alone."""
        products = Products(self._trainer.model.config, self._trainer.model.dtype)
        rows, at_once = len(self._prompts), self._trainer.config.micro_batch_size
        width, n = self._data(frozenset()).prompt_width, self._group_size
        # A rollout's first tokens come from the prefill, and an update has no use for the last ones.
        steps = self._length - 1
        rollout = products.rollout(rows, width, rows * n, steps, repeats)
        wanted = at_once * n * self._length
        part = products.update(at_once, width + n * steps, wanted, repeats)
        return {"rollout": rollout, "reward": 0.0, "update": part * -(-rows // at_once)}

    def compilations(self) -> dict:
        """What XLA compiles in steps whose completions end early; all of "lengths" are steps'."""
        tokens = np.asarray(self._last["tokens"]).reshape(-1)
        often = [int(token) for token, _ in collections.Counter(tokens.tolist()).most_common(8)]
        endings = self._tokenizer.stop_ids, frozenset(often), frozenset(often[2:4]), frozenset()
        with contextlib.closing(PhaseClock()) as found:
            lengths = [self._step(self._data(ids).batches())["lengths"] for ids in endings]
            return {"lengths": lengths, "compiled": found.take().compilations}

    def _data(self, stop_ids: frozenset[int]) -> RolloutData:
        tokenizer = copy.copy(self._tokenizer)
        tokenizer.stop_ids = stop_ids
        config = RolloutConfig(prompts_per_step=len(self._prompts), group_size=self._group_size)
        return RolloutData(self._trainer, config, self._asked, tokenizer, self._pool)

    def _step(self, batches: RolloutBatches) -> dict:
        start = time.perf_counter()
        batches.sample(self._state, self._frozen, self._clock)
        self._last = next(batches)
        with self._clock("update"):
            self._update(self._last)
        seconds, report = time.perf_counter() - start, batches.report()
        lengths = [report["length_mean"], report["length_max"]]
        return {"seconds": seconds, "phases": self._clock.take().seconds, "lengths": lengths}

    def _update(self, batch: dict[str, np.ndarray]) -> None:
        done = self._trainer.train_step(self._state, self._frozen, batch)
        self._state, _ = jax.block_until_ready(done)


if __name__ == "__main__":
    serve(Altiplano)
