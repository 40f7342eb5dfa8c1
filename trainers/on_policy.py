"""On-policy data for `fit`: prompts in an order that resumes, sampled from the policy and scored.

Dimension key: B prompts, G completions of each (group_size), R = B · G rows, C completion tokens, F
reward functions.
"""

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import grain
import jax
import jax.numpy as jnp
import numpy as np

import sampling
from models.llama.decoding import Detokenizer, GenerationConfig
from models.llama.generation import generate
from models.llama.model import Params, for_decoding
from trainers.grpo_trainer import GRPOTrainer
from trainers.loop import Batches, Phases
from trainers.rollout import Layout, Prompt, Rollout, RolloutConfig, check_context, parts
from trainers.trainer import Batch, TrainState
from utils import sharding
from utils.int8 import Int8, cast

_SMALLEST_WIDTH = 8


class Scorer(Protocol):
    """Scores completions; `trainers.rewards.pool.RewardPool` does.

    Attributes:
        names: names of the F functions.
    """

    names: tuple[str, ...]

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: list[str],
        completion_ids: list[list[int]],
        group_size: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """([R, F] scores, NaN where a function gave none; [R] rewards, NaN where unscorable)."""

    def report(self) -> dict[str, Any]:
        """`failures` since the last report, if any: dicts whose `first` says what failed."""


class RolloutData:
    """Scored rollouts of a policy, all of a few shapes: the data that `fit` trains a GRPOTrainer on.

    Attributes:
        prompt_width: tokens of a prompt, padded.
    """

    def __init__(
        self,
        trainer: GRPOTrainer,
        config: RolloutConfig,
        prompts: Sequence[Prompt],
        tokenizer: Detokenizer,
        scorer: Scorer,
        write: Callable[[int, Rollout, Layout], None] | None = None,
    ):
        """
        Args:
            trainer, config: say how to sample.
            prompts: at least one.
            tokenizer: the model's.
            scorer: rewards completions.
            write: called with the number of a rollout's first update, the rollout and its layout;
                None: rollouts are not kept.

        Raises:
            ConfigError: prompts and completions do not fit the model's context.
        """
        self.trainer, self.config, self.prompts = trainer, config, prompts
        self.tokenizer, self.scorer, self.write = tokenizer, scorer, write
        longest, model = trainer.config.max_completion_len, trainer.model.config
        check_context(prompts, longest, model.max_seq_len)
        # max_completion_len, a half and a quarter of it
        widths = sorted({max(longest // n, min(longest, _SMALLEST_WIDTH), 2) for n in (4, 2, 1)})
        for width in widths:
            sharding.check_tokens(model.n_heads, max_completion_len=width)
        # Half of all batches have no prompt beyond the usual length: few long ones widen few steps.
        lengths = [len(prompt.ids) for prompt in prompts]
        usual = np.quantile(lengths, 0.5 ** (1 / config.prompts_per_step), method="higher")
        step = math.lcm(16, sharding.axis_size(sharding.TRAINING.tokens))
        usual, self.prompt_width = (-(-int(n) // step) * step for n in (usual, max(lengths)))
        # Each shape costs a compilation, made before the first step.
        shapes = dict.fromkeys([(usual, w) for w in widths] + [(self.prompt_width, longest)])
        branches = config.branches or config.group_size
        self._layouts = [Layout(prompt_width=p, width=w, branches=branches) for p, w in shapes]
        self._generation = GenerationConfig(
            max_new_tokens=longest,
            n=config.group_size,
            stop_ids=tokenizer.stop_ids,
            vocab_limit=trainer.vocab_limit,
            prompt_width=self.prompt_width,
        )
        self._sampler = sampling.TopP(
            temperature=trainer.config.temperature, top_p=config.top_p, top_k=config.top_k
        )

    def sample(
        self, policy: Params, prompts: Sequence[Prompt], keys: jax.Array, clock: Phases
    ) -> Rollout:
        """Samples a group per prompt and scores it.

        Args:
            policy: see `decoding_params`.
            prompts: B, the same number each time.
            keys: [B] PRNG keys.
            clock: told of "rollout" and "reward".

        Raises:
            TrainError: a reward function failed, and the scorer does not go on then.
        """
        B, G, C = len(prompts), self.config.group_size, self._layouts[-1].width
        with clock("rollout"):
            ids, model = [prompt.ids for prompt in prompts], self.trainer.model
            done = generate(model, policy, ids, self._sampler, self._generation, key=keys)
        with clock("reward"):
            texts = [done.text(i, self.tokenizer) for i in range(B * G)]
            rows = [done.row(i) for i in range(B * G)]
            scores, rewards = self.scorer.score(prompts, texts, rows, G)
        inside = np.arange(done.tokens.shape[1]) < done.lengths[:, None]

        def fill(x):  # [R, up to C] -> [B, G, C]
            return np.pad(x * inside, ((0, 0), (0, C - x.shape[1]))).reshape(B, G, C)

        rollout = Rollout(
            prompts=list(prompts),
            texts=[texts[i : i + G] for i in range(0, B * G, G)],
            functions=self.scorer.names,
            tokens=fill(done.tokens),
            lengths=done.lengths.reshape(B, G),
            stopped=np.asarray([x == "stop" for x in done.finish_reason]).reshape(B, G),
            logprobs=fill(done.logprobs),
            scores=scores.reshape(B, G, -1),
            rewards=rewards.reshape(B, G),
            advantages=np.zeros((B, G), np.float32),
        )
        return rollout.with_advantages(self.config.scale)

    def layout(self, rollout: Rollout) -> Layout:
        """The smallest shape that holds a rollout's prompts and completions."""
        prompt, completion = max(len(x.ids) for x in rollout.prompts), rollout.lengths.max()
        fits = (x for x in self._layouts if x.prompt_width >= prompt and x.width >= completion)
        return next(fits)

    def batches(self) -> "RolloutBatches":
        """An iterator without end."""
        return RolloutBatches(self)

    def preflight_batches(self) -> list[Batch]:
        """A batch of zeros for each possible shape, the largest first."""
        B, G, C = self.config.prompts_per_step, self.config.group_size, self._layouts[-1].width
        numbers, by_token = np.zeros((B, G)), np.zeros((B, G, C), np.float32)
        empty = Rollout(
            prompts=[Prompt(text="", ids=(), columns={})] * B,
            texts=[[""] * G] * B,
            functions=(),
            tokens=by_token.astype(np.int32),
            lengths=numbers.astype(np.int64),
            stopped=numbers.astype(bool),
            logprobs=by_token,
            scores=np.zeros((B, G, 0)),
            rewards=numbers,
            advantages=numbers.astype(np.float32),
            old_logprobs=by_token if self.config.updates > 1 else None,
            ref_logprobs=by_token if self.trainer.config.needs_reference else None,
        )
        batches = (empty.batch(layout) for layout in reversed(self._layouts))
        return [parts(batch, self.config.mini_batches)[0] for batch in batches]


def decoding_params(trainer: GRPOTrainer, state: TrainState, frozen: Params) -> Params:
    """The policy as `generate` takes it, in the dtype of the model's products: adapters are merged,
    except into matrices in eight bits.
    """
    if trainer.lora is not None and isinstance(frozen["embed"], Int8):
        params = trainer.model_params(state.params, frozen)
    else:
        params = trainer.export_params(state, frozen)
    dtype = trainer.model.dtype
    params = dict(params if dtype is None else cast(params, dtype))
    return for_decoding(params, donate=True)  # takes the layers out of this dict


class RolloutBatches(Batches):
    """Batches of rollouts without end; the position is the number of prompts taken."""

    def __init__(self, data: RolloutData):
        self._data = data
        self._batches: list[Batch] = []
        self._position, self._report = 0, {}
        order = grain.MapDataset.range(len(data.prompts))
        self._order = order.shuffle(seed=data.config.seed).repeat()

    def sample(self, state: TrainState, frozen: Params, clock: Phases) -> None:
        if self._batches:
            return
        data, config = self._data, self._data.config
        start = time.monotonic()
        with clock("rollout"):
            policy = jax.block_until_ready(decoding_params(data.trainer, state, frozen))
        # A step splits the state's key, so that no rollout has the key of another.
        key = jax.random.fold_in(state.key, 1)
        sampled = data.sample(policy, *self._take(key), clock)
        for _ in range(config.refills):
            if sampled.varied.sum() >= config.prompts_per_step:
                break
            sampled = sampled.joined(data.sample(policy, *self._take(key), clock))
        del policy
        speed = float(sampled.lengths.sum()) / (time.monotonic() - start)
        # Groups with something to learn first, then others, all in the order of their sampling.
        chosen = np.argsort(~sampled.varied, kind="stable")[: config.prompts_per_step]
        rollout = sampled.take(sorted(chosen)).with_advantages(config.scale)
        layout = data.layout(rollout)
        rollout = self._scored(rollout, layout, state, frozen, clock)
        if data.write is not None:
            data.write(int(state.step) + 1, rollout, layout)
        self._report = sampled.metrics() | data.scorer.report() | {"rollout_tokens_per_s": speed}
        self._warn_if_none_ended(sampled)
        batch = rollout.batch(layout, mask_truncated=data.trainer.config.mask_truncated)
        self._batches = parts(batch, config.mini_batches) * config.iterations

    def _take(self, key: jax.Array) -> tuple[list[Prompt], jax.Array]:
        """(the next prompts, a key for each: a prompt that comes again gets another one)."""
        start = self._position
        self._position += self._data.config.prompts_per_step
        prompts = self._data.prompts
        taken = [prompts[int(self._order[i])] for i in range(start, self._position)]
        numbers = jnp.arange(start, self._position, dtype=jnp.uint32)
        return taken, jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, numbers)

    def _scored(self, rollout: Rollout, layout: Layout, state, frozen, clock) -> Rollout:
        """The rollout with the log-probs that the loss needs besides the sampler's."""
        data, more = self._data, {}
        score = data.trainer.score
        G, C = rollout.tokens.shape[1:]

        def logprobs(reference: bool) -> np.ndarray:
            with clock("reference" if reference else "old"):
                rows = score(state.params, frozen, rollout.batch(layout), reference=reference)
                values = np.asarray(rows).reshape(-1, G, layout.width)
                return np.pad(values, ((0, 0), (0, 0), (0, C - layout.width)))

        if data.config.updates > 1:
            more["old_logprobs"] = logprobs(False)
        if data.trainer.config.needs_reference:
            more["ref_logprobs"] = logprobs(True)
        return dataclasses.replace(rollout, **more)

    def _warn_if_none_ended(self, rollout: Rollout) -> None:
        if not rollout.stopped.any():  # Python shows a warning once
            limit = self._data.trainer.config.max_completion_len
            warnings.warn(
                f"all {rollout.stopped.size} completions were cut at max_completion_len={limit}: is the "
                "prompt in the model's chat format, and is the limit long enough?",
                stacklevel=2,
            )

    @property
    def between_rollouts(self) -> bool:
        return not self._batches

    def report(self) -> dict[str, Any]:
        return self._report

    def explain(self) -> str:
        if self._report.get("unscorable", 0) < 1:
            return "all were cut, see mask_truncated" * (self._report["truncated"] == 1)
        failed = self._report.get("failures", [{"first": "the rewards gave no number"}])
        return f"no completion could be scored: {failed[0]['first']}"

    def __next__(self) -> Batch:
        return self._batches.pop(0)

    def get_state(self) -> dict:
        return {"prompts": self._position}

    def set_state(self, state: dict) -> None:
        self._position = state["prompts"]
