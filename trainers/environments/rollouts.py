"""Rollouts of episodes: what `fit` trains on where a model talks to environments."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from models.llama.model import Params
from trainers.loop import Phases
from trainers.on_policy import RolloutData
from trainers.rollout import Layout, Prompt, Rollout
from trainers.trainer import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpisodeRollout(Rollout):
    """A rollout whose completions have several turns, with what the environment said between them.

    Attributes:
        sampled: [B, G, C] bool, True at the model's own tokens; the others are not learnt.
        episodes: `Played.record` of each completion, B lists of G.
    """

    sampled: np.ndarray
    episodes: Sequence[Sequence[Mapping[str, Any]]]

    def batch(self, layout: Layout, *, mask_truncated: bool = False) -> Batch:
        """See Rollout; the mask leaves out what the environment said."""
        batch = super().batch(layout, mask_truncated=mask_truncated)
        sampled = self.sampled[..., : layout.width].reshape(batch["target_mask"].shape)
        return batch | {"target_mask": batch["target_mask"] & sampled}

    def metrics(self) -> dict[str, Any]:
        """See Rollout; also means per episode of turns, sampled tokens, and tool calls."""
        found = [episode for group in self.episodes for episode in group]
        means = {k: float(np.mean([x[k] for x in found])) for k in ("calls", "call_errors")}
        turns = float(np.mean([len(x["turns"]) for x in found]))
        sampled = float(self.sampled.sum() / len(found))
        return super().metrics() | {"turns": turns, "sampled_mean": sampled} | means


class EpisodeData(RolloutData):
    """RolloutData whose completions are episodes, and whose scorer is a Player."""

    def sample(
        self, policy: Params, prompts: Sequence[Prompt], keys: jax.Array, clock: Phases
    ) -> EpisodeRollout:
        """Plays a group of episodes per prompt; see RolloutData."""
        B, G, C = len(prompts), self.config.group_size, self._layouts[-1].width
        with clock("rollout"):
            how = self._sampler, self._generation, keys
            played = self.scorer.play(self.trainer.model, policy, prompts, *how)

        def by_token(values: Sequence[Sequence], dtype: type) -> np.ndarray:
            out = np.zeros((B * G, C), dtype)
            for row, found in zip(out, values):
                row[: len(found)] = found
            return out.reshape(B, G, C)

        def grouped(values: Sequence) -> list[list]:
            return [list(values[i : i + G]) for i in range(0, B * G, G)]

        rewards = np.asarray(grouped([one.reward for one in played]))
        rollout = EpisodeRollout(
            prompts=list(prompts),
            texts=grouped([one.text for one in played]),
            functions=self.scorer.names,
            tokens=by_token([one.ids for one in played], np.int32),
            lengths=np.asarray(grouped([len(one.ids) for one in played])),
            stopped=np.asarray(grouped([one.stopped for one in played])),
            logprobs=by_token([one.logprobs for one in played], np.float32),
            scores=rewards[..., None],
            rewards=rewards,
            advantages=np.zeros((B, G), np.float32),
            sampled=by_token([one.sampled for one in played], bool),
            episodes=grouped([one.record for one in played]),
        )
        return rollout.with_advantages(self.config.scale)
