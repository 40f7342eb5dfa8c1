"""Your own loss on `Trainer`, and your own loop around it.

    python examples/custom_loss.py

A loss returns sums and a weight; micro-batches and devices add up alone. This one is cross-entropy with
a z-loss, which keeps the logarithm of the softmax's denominator near 0 (PaLM, 2204.02311, section 5).
`fit`, LoRA, checkpoints and meshes work with it unchanged.

The loop is `fit` without data, records and checkpoints. `train_step` is one call for `gradients` and
`apply`, which leave room for something in between.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from anywhere

from examples.arithmetic import MODEL
from models.llama.model import LLaMa, init_params
from trainers.sft_trainer import SFTConfig, SFTTrainer, next_tokens
from trainers.trainer import Loss


class ZLossTrainer(SFTTrainer):
    """Cross-entropy + 1e-2 · log² Z, per target."""

    def loss(self, params, batch, key) -> Loss:
        """Sums over the targets of a micro-batch; `log_z` becomes a metric."""
        targets_BT, weights_BT = next_tokens(batch)
        logits_BTV, _ = self.model.apply({"params": params}, batch["tokens"])
        log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
        chosen_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
        values_BT = log_z_BT - chosen_BT + 1e-2 * log_z_BT**2
        return Loss(
            total=jnp.sum(values_BT * weights_BT),
            weight=jnp.sum(weights_BT),
            sums={"log_z": jnp.sum(log_z_BT * weights_BT)},
        )


def run(steps: int = 20) -> list[float]:
    """The loss of each step, on one batch of rows that count upwards."""
    tokens = (np.arange(16)[:, None] + np.arange(12)) % MODEL.vocab_size
    batch = {"tokens": tokens.astype(np.int32), "target_mask": np.ones(tokens.shape, bool)}
    trainer = ZLossTrainer(LLaMa(MODEL), SFTConfig(learning_rate=1e-2, max_steps=steps))
    state, frozen = trainer.init(init_params(MODEL, jax.random.key(0)), jax.random.key(1))
    losses = []
    gradients = jax.jit(trainer.gradients)
    for step in range(steps):
        grads, loss = gradients(state.params, frozen, batch, jax.random.key(step))
        # Here: look at the gradients, change them, or add those of another batch.
        state, metrics = trainer.apply(state, grads, loss)
        losses.append(float(metrics["loss"]))
        print(f"step {int(state.step):2}  loss {losses[-1]:.3f}  log Z {metrics['log_z']:+.3f}")
    return losses


if __name__ == "__main__":
    run()
