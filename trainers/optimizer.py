"""Optimizers and schedules from optax, by a small config."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from utils.errors import is_int, is_number, raise_all

OPTIMIZERS = ("adamw", "adafactor", "lion", "muon")
SCHEDULES = ("constant", "linear", "cosine", "wsd")
DTYPES = ("float32", "bfloat16")

_DECAY_SHARE = 0.2  # of the steps, at the end of a WSD schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """An optimizer and its schedule.

    Attributes:
        optimizer: adamw, adafactor, lion or muon (AdamW for what is no matrix of a layer).
        learning_rate: its peak.
        schedule: after the warm-up: constant; linear or cosine down to 0 at max_steps; wsd
            (warm-up, stable, linear decay over the last fifth; MiniCPM, 2404.06395).
        warmup_steps: linear from 0; step i of w has the rate (i + 1) / w.
        max_steps: optimizer steps of the whole run.
        weight_decay: decoupled; not on norms and biases.
        beta1, beta2, eps: of AdamW and Muon's AdamW; Lion takes the betas.
        clip_norm: gradients of a larger global norm are scaled down to it; None: never.
        state_dtype: of first moments. Second ones are float32: at beta2 = 0.999 what they lose in a
            step is less than bfloat16 can tell, so they would never fall.
    """

    optimizer: str = "adamw"
    learning_rate: float = 1e-5
    schedule: str = "cosine"
    warmup_steps: int = 0
    max_steps: int = 100
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    state_dtype: str = "float32"

    def __post_init__(self):
        raise_all(type(self).__name__, self.problems())

    def problems(self) -> list[str]:
        """All that is wrong, for one message."""
        out = []

        def need(name: str, ok: bool, expected: str) -> None:
            if not ok:
                out.append(f"{name}={getattr(self, name)!r}, expected {expected}")

        number = lambda x: is_number(x) and math.isfinite(x)
        for name, known in (
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("state_dtype", DTYPES),
        ):
            need(name, getattr(self, name) in known, f"one of {', '.join(known)}")
        lr = self.learning_rate
        need("learning_rate", number(lr) and 0 < lr <= 10, "a number above 0 and at most 10")
        need("max_steps", is_int(self.max_steps) and self.max_steps >= 1, "an integer from 1")
        warmup = self.warmup_steps
        room = self.max_steps if is_int(self.max_steps) else math.inf
        fits = is_int(warmup) and 0 <= warmup <= room
        need("warmup_steps", fits, f"an integer from 0 to max_steps ({self.max_steps!r})")
        decay = self.weight_decay
        need("weight_decay", number(decay) and 0 <= decay < 10, "a number from 0")
        for name in ("beta1", "beta2"):
            beta = getattr(self, name)
            need(name, number(beta) and 0 <= beta < 1, "a number in [0, 1)")
        need("eps", number(self.eps) and 0 < self.eps < 1, "a number in (0, 1)")
        clip = self.clip_norm
        need("clip_norm", clip is None or (number(clip) and clip > 0), "a number above 0, or None")
        return out


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """From the number of steps done to the learning rate."""
    peak, warmup, total = config.learning_rate, config.warmup_steps, config.max_steps
    rest = max(total - warmup, 1)
    if config.schedule == "constant":
        main = optax.constant_schedule(peak)
    elif config.schedule == "linear":
        main = optax.linear_schedule(peak, 0.0, rest)
    elif config.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, rest)
    else:
        decay = max(int(rest * _DECAY_SHARE), 1)
        main = optax.linear_schedule(peak, 0.0, decay, transition_begin=rest - decay)
    if not warmup:
        return main
    # Step 0 of the usual warm-up has the rate 0: a step that changes nothing.
    ramp = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([ramp, main], [warmup])


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The transformation from gradients (float32), clipped already, to updates."""
    rate, decay = learning_rate(config), config.weight_decay
    adam = {"b1": config.beta1, "b2": config.beta2, "mu_dtype": config.state_dtype}
    if config.optimizer == "adamw":
        chosen = optax.adamw(rate, eps=config.eps, weight_decay=decay, mask=decayed, **adam)
    elif config.optimizer == "lion":
        chosen = optax.lion(rate, weight_decay=decay, mask=decayed, **adam)
    elif config.optimizer == "adafactor":
        # optax.adafactor does not multiply the decay by the learning rate.
        chosen = optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(decay, decayed),
            optax.scale_by_learning_rate(rate),
        )
    else:
        muon = optax.contrib.muon(
            rate,
            weight_decay=decay,
            eps=config.eps,
            mu_dtype=config.state_dtype,
            muon_weight_dimension_numbers=_muon_matrices,
            consistent_rms=0.2,  # AdamW's learning rates fit (Moonlight, 2502.16982)
        )
        # Its own AdamW for the rest is Nesterov's, and decays norms and biases.
        adamw = optax.adamw(rate, eps=config.eps, weight_decay=decay, mask=decayed, **adam)
        chosen = optax.partition({"muon": muon, "adamw": adamw}, _muon_or_adamw)
    return chosen


def decayed(params: Any) -> Any:
    """True at matrices, False at norms and biases."""
    return jax.tree.map_with_path(lambda path, _: _is_matrix(path), params)


def _is_matrix(path) -> bool:
    name = path[-1].key
    return name.startswith("w") or name in ("embed", "lm_head")


def _muon_or_adamw(params: Any) -> Any:
    """Muon is for the matrices of layers."""
    label = lambda path, _: "muon" if path[-1].key.startswith("w") else "adamw"
    return jax.tree.map_with_path(label, params)


def _muon_matrices(params: Any) -> Any:
    """How Muon is to see them: [L, out, in]."""
    spec = optax.contrib.MuonDimensionNumbers(reduction_axis=2, output_axis=1)
    return jax.tree.map(lambda _: spec, params)


def cast_floats(tree: Any, dtype: Any) -> Any:
    """The tree with its floating-point leaves cast."""
    cast = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return jax.tree.map(cast, tree)
