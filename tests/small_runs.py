"""Trainings of a model so small that a step takes a millisecond, for the tests of the loop around it."""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.llama.config import ModelConfig
from models.llama.model import LLaMa, init_params
from trainers.data import DataConfig, Dataset
from trainers.data import Examples
from trainers.sft_trainer import SFTConfig, SFTTrainer

MODEL = ModelConfig(
    dim=16,
    n_layers=1,
    n_heads=2,
    n_kv_heads=1,
    head_dim=8,
    ffn_dim=32,
    vocab_size=64,
    norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    max_seq_len=256,
    tie_embeddings=False,
    activation="silu",
    attention_bias=False,
    mlp_bias=False,
)

# A batch with this token has the loss NaN in a PoisonedTrainer.
POISON = 63

# What a record says of this machine, and not of the training.
_MEASURED = ("seconds", "tokens_per_s", "model_flops_per_s", "mfu", "memory", "compilations")
_MEASURED += ("rollout_tokens_per_s",)


@dataclasses.dataclass(frozen=True)
class PoisonedTrainer(SFTTrainer):
    """As SFTTrainer, but for the batches with POISON."""

    def loss(self, params, batch, key):
        """NaN where there is POISON."""
        loss = super().loss(params, batch, key)
        bad = jnp.any(batch["tokens"] == POISON)
        return loss.replace(total=loss.total * jnp.where(bad, jnp.nan, 1.0))


def trainer(cls=PoisonedTrainer, lora=None, **config: Any) -> SFTTrainer:
    """A trainer; equal ones share their compiled programs, so change little."""
    defaults = dict(learning_rate=0.03, max_steps=7, warmup_steps=1, max_skipped=2)
    defaults |= dict(save_every=2, eval_every=4)
    return cls(LLaMa(MODEL), SFTConfig(**defaults | config), lora)


@functools.cache
def _params():
    return init_params(MODEL, jax.random.key(0))


def start(of: SFTTrainer):
    """(state, frozen), always the same."""
    return of.init(_params(), jax.random.key(1))


def dataset(
    lengths=(5, 9, 30, 12, 70, 8, 21, 100, 33, 6), poisoned=(), seed: int = 0, **config: Any
) -> Dataset:
    """Rows of random tokens.

    Args:
        lengths: of the rows.
        poisoned: which rows have POISON.
        seed: of the tokens.
        config: of DataConfig.
    """
    rng = np.random.default_rng(seed)
    config = DataConfig(**dict(seq_len=128, batch_size=2) | config)
    examples = Examples(config.seq_len, "truncate")
    for i, length in enumerate(lengths):
        tokens = rng.integers(0, POISON, length)
        tokens[-1] = POISON if i in poisoned else 0
        examples.add(tokens.tolist(), [True] * length, is_text=True)
    return Dataset("rows", config, examples, "")


def digest(tree: Any) -> str:
    """SHA-256 of every array's bits, with its place, type and shape."""
    out = hashlib.sha256()
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        kind = str(x.dtype)
        x = np.asarray(jax.random.key_data(x) if kind.startswith("key") else x)
        out.update(f"{jax.tree_util.keystr(path)} {kind} {x.shape} ".encode() + x.tobytes())
    return out.hexdigest()


def curve(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what a machine measures of itself."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name not in _MEASURED}
        for line in lines
    ]
