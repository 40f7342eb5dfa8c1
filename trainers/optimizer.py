"""Optimizers and schedules from optax, by a small config."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from utils.errors import is_int, is_number
from utils.fields import ALWAYS, CONFIG, Config, field, integer, number, one_of

OPTIMIZERS = ("adamw", "adafactor", "lion", "muon")
SCHEDULES = ("constant", "linear", "cosine", "wsd")
DTYPES = ("float32", "bfloat16")

_DECAY_SHARE = 0.2  # of the steps, at the end of a WSD schedule
_BETA = number(0, below=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Config):
    """An optimizer and its schedule.

    After the warm-up, in which step i of w has the rate (i + 1) / w, the schedule is constant, linear
    or cosine down to 0 at max_steps, or wsd: stable, then linear to 0 over the last fifth (MiniCPM,
    2404.06395). Second moments are float32 whatever `state_dtype`: at beta2 = 0.999 they lose less in
    a step than bfloat16 can tell, so they would never fall.
    """

    optimizer: str = field(
        "adamw",
        "update rule; muon takes AdamW for embeddings, norms and biases",
        one_of(*OPTIMIZERS),
    )
    learning_rate: float = field(
        1e-5, "peak learning rate", number(above=0, most=10), flag="lr", resume=CONFIG
    )
    schedule: str = field(
        "cosine", "learning rate after the warm-up", one_of(*SCHEDULES), resume=CONFIG
    )
    warmup_steps: int = field(0, "steps of linear warm-up from 0", integer(0), resume=CONFIG)
    max_steps: int = field(100, "optimizer steps of the whole run", integer(1), resume=ALWAYS)
    weight_decay: float = field(
        0.0, "weight decay (norms and biases are exempt)", number(0, below=10), resume=CONFIG
    )
    beta1: float = field(0.9, "decay of the first moment", _BETA, flag="", resume=CONFIG)
    beta2: float = field(0.999, "decay of the second moment", _BETA, flag="", resume=CONFIG)
    eps: float = field(
        1e-8, "added to AdamW's divisor", number(above=0, below=1), flag="", resume=CONFIG
    )
    clip_norm: float | None = field(
        1.0, "largest gradient norm; 0: no clipping", number(0), resume=CONFIG
    )
    state_dtype: str = field("float32", "dtype of the optimizer's first moments", one_of(*DTYPES))

    def __post_init__(self) -> None:
        if is_number(self.clip_norm) and self.clip_norm == 0:
            object.__setattr__(self, "clip_norm", None)
        super().__post_init__()

    def problems(self) -> list[str]:
        out = super().problems()
        warmup, room = self.warmup_steps, self.max_steps
        if is_int(warmup) and is_int(room) and warmup > max(room, 0):
            out.append(f"warmup_steps={warmup}, expected an integer from 0 to max_steps ({room})")
        return out


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """The learning rate by the number of steps done."""
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
    # The usual warm-up starts at rate 0, with a step that changes nothing.
    ramp = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([ramp, main], [warmup])


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The transformation of gradients (float32, already clipped) into updates."""
    rate, decay = learning_rate(config), config.weight_decay
    adam = {"b1": config.beta1, "b2": config.beta2, "mu_dtype": config.state_dtype}
    adamw = optax.adamw(rate, eps=config.eps, weight_decay=decay, mask=decayed, **adam)
    if config.optimizer == "adamw":
        return adamw
    if config.optimizer == "lion":
        return optax.lion(rate, weight_decay=decay, mask=decayed, **adam)
    if config.optimizer == "adafactor":
        # optax.adafactor does not multiply the decay by the learning rate.
        return optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(decay, decayed),
            optax.scale_by_learning_rate(rate),
        )
    muon = optax.contrib.muon(
        rate,
        weight_decay=decay,
        eps=config.eps,
        mu_dtype=config.state_dtype,
        muon_weight_dimension_numbers=_muon_matrices,
        consistent_rms=0.2,  # updates of AdamW's size, so that its rates fit (Moonlight, 2502.16982)
    )
    # optax's muon has an AdamW for the rest, but that is Nesterov's, and decays norms and biases.
    return optax.partition({"muon": muon, "adamw": adamw}, _muon_or_adamw)


def decayed(params: Any) -> Any:
    """True at matrices, False at norms and biases."""
    return jax.tree.map_with_path(
        lambda path, _: path[-1].key.startswith(("w", "embed", "lm_head")), params
    )


def _muon_or_adamw(params: Any) -> Any:
    """Labels the matrices of layers "muon", the rest "adamw"."""
    return jax.tree.map_with_path(
        lambda path, _: "muon" if path[-1].key.startswith("w") else "adamw", params
    )


def _muon_matrices(params: Any) -> Any:
    """Tells Muon the axes of matrices [L, out, in]."""
    spec = optax.contrib.MuonDimensionNumbers(reduction_axis=2, output_axis=1)
    return jax.tree.map(lambda _: spec, params)


def cast_floats(tree: Any, dtype: Any) -> Any:
    """The tree with its floating-point leaves cast."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )
