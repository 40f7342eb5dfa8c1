"""This project's training, measured by benchmarks/train.py."""

import dataclasses
import time

from utils.console import pages

if __name__ == "__main__":  # as train.py does
    pages.use_huge_pages()

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.workers import serve
from models.llama.load import load_checkpoint
from models.llama.lora import LoRAConfig
from models.llama.model import LLaMa, init_params
from trainers.runs import metrics
from trainers.sft_trainer import SFTConfig, SFTTrainer


class Altiplano:
    """SFTTrainer on one device, as its peers: AdamW, all tokens are targets, gradients clipped at 1.

    Args:
        folder: a Hugging Face checkpoint.
        dtype: of activations and products.
        params_dtype: of parameters and optimizer state.
        lora_rank: 0: all parameters are trained.
        remat: see `LLaMa`.
    """

    def __init__(
        self, folder: str, dtype: str, params_dtype: str, lora_rank: int = 0, remat: str = "dots"
    ):
        self._config, params = load_checkpoint(folder, dtype=params_dtype)
        self._dtype = jnp.dtype(dtype)
        self._sft = SFTConfig(
            learning_rate=1e-5,
            schedule="constant",
            weight_decay=0.01,
            param_dtype=params_dtype,
            state_dtype=params_dtype,
            micro_batch_size=None,
            warmup_steps=0,
        )
        self._trainer = SFTTrainer(
            model=LLaMa(self._config, dtype=self._dtype, remat=remat),
            config=self._sft,
            lora=LoRAConfig(rank=lora_rank) if lora_rank else None,
        )
        self._state, self._frozen = self._trainer.init(params, jax.random.key(0), donate=True)

    def step(
        self, tokens: list, segment_ids: list | None = None, lengths: list | None = None
    ) -> tuple[float, float]:
        """(seconds, loss) of one optimizer step; rows are packed, or padded behind their lengths."""
        batch = _batch(tokens, segment_ids)
        if lengths is not None:
            batch["target_mask"] &= np.arange(len(tokens[0])) < np.array(lengths)[:, None]
        start = time.perf_counter()
        self._state, values = self._trainer.train_step(self._state, self._frozen, batch)
        loss = float(jax.block_until_ready((self._state, values))[1]["loss"])
        return time.perf_counter() - start, loss

    def matmul_peak(self) -> float:
        """FLOP/s of the best of a few products."""
        return metrics.matmul_peak(self._dtype, seconds=2.0)

    def flops_per_token(self, context: float) -> float:
        """Model FLOPs of a step per token."""
        lora = self._trainer.lora is not None
        return metrics.train_flops_per_token(self._config, context, lora=lora)

    def temporary_bytes(self, vocab_size: int, rows: int, length: int) -> int:
        """What the compiled step of a small model with a vocabulary holds beside its arguments."""
        small = dict(dim=64, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=32, ffn_dim=128)
        config = dataclasses.replace(self._config, vocab_size=vocab_size, **small)
        trainer = SFTTrainer(model=LLaMa(config, dtype=self._dtype), config=self._sft)
        params = init_params(config, jax.random.key(0))
        state, frozen = trainer.init(params, jax.random.key(0))
        batch = _batch(np.zeros((rows, length)), None)
        compiled = SFTTrainer.train_step.lower(trainer, state, frozen, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes


def _batch(tokens: list, segment_ids: list | None) -> dict[str, np.ndarray]:
    """A batch as `trainers.data` makes them; padding has the segment 0, and no targets."""
    tokens = np.array(tokens, np.int32)
    segments = np.array(segment_ids if segment_ids is not None else np.ones_like(tokens), np.int32)
    first = np.diff(segments, axis=1, prepend=0) != 0
    batch = {"tokens": tokens, "target_mask": (segments != 0) & ~first}
    if segment_ids is not None:
        index = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        starts = np.maximum.accumulate(np.where(first, index, 0), axis=1)
        batch |= {"segment_ids": segments, "positions": (index - starts).astype(np.int32)}
    return batch


if __name__ == "__main__":
    serve(Altiplano)
