"""The abstract Trainer: turns a loss into jitted, accumulated, guarded optimizer steps.

Parameters come in two trees: trained (`TrainState.params`) and frozen. With LoRA the adapters are trained
and the model is frozen. Without it all parameters are trained; a copy of them stays frozen where the
loss needs a reference model.
"""

import abc
import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from models.llama import lora as adapters
from models.llama.layout import param_axes
from models.llama.lora import LoRAConfig
from models.llama.model import LLaMa, Params
from trainers.optimizer import DTYPES, OptimizerConfig, cast_floats, learning_rate, make_optimizer
from utils import detours, sharding
from utils.errors import ConfigError
from utils.fields import ALWAYS, field, integer, one_of
from utils.int8 import Int8

Array = jax.Array
Batch = dict[str, Any]


@flax.struct.dataclass
class TrainState:
    """Everything that changes from step to step: the arrays of a checkpoint.

    Attributes:
        step: [] int32, updates done; skipped ones do not count.
        params: the trained parameters.
        opt_state: optax's.
        key: the PRNG key; each step splits a new one from it, a skipped step too.
    """

    step: Array
    params: Params
    opt_state: Any
    key: Array


@flax.struct.dataclass
class Loss:
    """A loss as sums, so that micro-batches and devices add up before the one division.

    >>> loss = Loss(total=jnp.float32(6), weight=jnp.float32(2))
    >>> print((loss + Loss(total=jnp.float32(0), weight=jnp.float32(1))).means()["loss"])
    2.0

    Attributes:
        total: [] float32, the sum that is differentiated.
        weight: [] float32; the total of all micro-batches is divided by theirs.
        sums: further sums by name, logged divided by the weight.
        maxima: by name, logged as their maximum.
    """

    total: Array
    weight: Array
    sums: dict[str, Array] = flax.struct.field(default_factory=dict)
    maxima: dict[str, Array] = flax.struct.field(default_factory=dict)

    def __add__(self, other: "Loss") -> "Loss":
        maxima = jax.tree.map(jnp.maximum, self.maxima, other.maxima)
        return Loss(
            total=self.total + other.total,
            weight=self.weight + other.weight,
            sums=jax.tree.map(jnp.add, self.sums, other.sums),
            maxima=maxima,
        )

    def means(self) -> dict[str, Array]:
        """The loss and the sums divided by the weight (0 where nothing weighs), and the maxima."""
        weight = jnp.where(self.weight > 0, self.weight, 1)
        means = {name: value / weight for name, value in self.sums.items()}
        return {"loss": self.total / weight, **means, **self.maxima}


class Work(NamedTuple):
    """The size of a step on a batch.

    Attributes:
        targets: tokens that the loss is summed over.
        tokens: tokens that the loss depends on.
        mean_context: mean over these of the tokens of their row or document, for FLOPs.
    """

    targets: int
    tokens: int
    mean_context: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(OptimizerConfig):
    """An optimizer and how it is driven; activations have the model's dtype.

    Where `learning_rate` is None, the Trainer takes the first of `base_rates`, or the second for
    adapters, which start at zero and want larger steps.
    """

    base_rates: ClassVar[tuple[float, float]] = (1e-5, 1e-4)

    micro_batch_size: int | None = field(
        None,
        "rows in memory at once (at least one per device; None: all); smaller saves memory and "
        "changes nothing else",
        integer(1),
        resume=ALWAYS,
    )
    param_dtype: str = field("float32", "dtype of the trained parameters", one_of(*DTYPES))
    max_skipped: int = field(
        5,
        "updates in a row that may be skipped, not finite or without a target; one more ends the run",
        integer(0),
        flag="",
        resume=ALWAYS,
    )
    save_every: int = field(
        50, "steps between checkpoints; 0: only after the last step", integer(0), resume=ALWAYS
    )
    eval_every: int = field(
        0, "steps between evaluations; 0: only at the end", integer(0), resume=ALWAYS
    )

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the model with the one that training started from."""
        return False


@dataclasses.dataclass(frozen=True)
class Trainer(abc.ABC):
    """Turns a loss into training steps; a subclass says what the loss is.

    Holds static things only, so that methods can be jitted with it as a static argument.

    Attributes:
        model: with its activations' dtype and its rematerialisation.
        config: the optimizer and how it is driven.
        lora: adapters are trained next to a frozen model; None: all parameters are.
        shaped_by: the array of a batch whose shape names what XLA compiles for the batch.
    """

    model: LLaMa
    config: TrainConfig
    lora: LoRAConfig | None = None
    shaped_by: ClassVar[str] = "tokens"

    def __post_init__(self) -> None:
        if self.config.learning_rate is None:
            rate = self.config.base_rates[self.lora is not None]
            object.__setattr__(self, "config", dataclasses.replace(self.config, learning_rate=rate))

    @abc.abstractmethod
    def loss(self, params: Params, batch: Batch, key: Array) -> Loss:
        """Sums the loss over a micro-batch.

        Args:
            params: as the model takes them, with adapters attached.
            batch: arrays with the rows first. A row of zeros must weigh nothing: batches are
                filled up with them.
            key: for what is random in the loss.
        """

    @abc.abstractmethod
    def work(self, batch: Batch) -> Work:
        """Counts a batch's tokens, on the host."""

    def derive(self, means: dict[str, float]) -> dict[str, float]:
        """Turns the means of a step, or of an evaluation, into the numbers that are logged."""
        return means

    @property
    def keeps_frozen(self) -> bool:
        """Whether there are frozen parameters besides the state."""
        return self.lora is not None or self.config.needs_reference

    def init(
        self, params: Params, key: Array, *, donate: bool = False
    ) -> tuple[TrainState, Params]:
        """Starts a run from a model: (state, frozen parameters).

        The frozen parameters are the base model with LoRA, else the reference if the loss needs one.

        Args:
            params: as loaded; copied, since a step's state is donated to the next.
            key: decides adapters and everything random in the run.
            donate: takes over `params` where no cast is needed: they cannot be used afterwards.
        """
        if self.lora is None and isinstance(params["embed"], Int8):
            raise ConfigError("parameters in eight bits cannot be trained; pass --lora_rank")
        params = sharding.place(params, model_specs(self.model, params))
        key, lora_key = jax.random.split(key)
        dtype = jnp.dtype(self.config.param_dtype)
        if self.lora is not None:
            trained = adapters.init_lora(self.model.config, self.lora, lora_key, dtype)
            trained = sharding.place(trained, model_specs(self.model, trained, self.lora))
            return _fresh_state(self, trained, key), params
        frozen = {}
        if self.config.needs_reference:  # a real copy: the trained parameters are donated
            frozen = jax.tree.map(lambda x: jnp.array(x, self.model.dtype or dtype), params)
        trained = jax.tree.map(lambda x: jnp.array(x, dtype, copy=not donate), params)
        return _fresh_state(self, trained, key), frozen

    def specs(self, state: TrainState) -> TrainState:
        """PartitionSpecs of a state on the context mesh: moments lie where their parameters do."""
        of_params = model_specs(self.model, state.params, self.lora)
        return sharding.state_specs(state, state.params, of_params)

    def model_params(self, params: Params, frozen: Params) -> Params:
        """The parameters that the model takes; differentiable by `params`."""
        return params if self.lora is None else adapters.attach(frozen, params, self.lora)

    def export_params(self, state: TrainState, frozen: Params) -> Params:
        """The trained model in its usual shape, adapters merged."""
        if self.lora is None:
            return state.params
        return adapters.merge(frozen, state.params, self.lora)

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def train_step(
        self, state: TrainState, frozen: Params, batch: Batch
    ) -> tuple[TrainState, dict[str, Array]]:
        """One optimizer step; `state` is donated.

        An update with a loss or a gradient that is not finite, or of a batch in which nothing
        weighs, is skipped: step, parameters and moments stay as they are.

        Returns:
            (state, metrics): scalars; `loss` and others by name, `weight`, `grad_norm` (before
            clipping), `lr`, and `updated`, whether the update was done.
        """
        key, loss_key = jax.random.split(state.key)
        sums, loss = _gradient_sums(self, state.params, frozen, batch, loss_key)
        scale = 1 / jnp.where(loss.weight > 0, loss.weight, 1)
        return self._updated(state.replace(key=key), sums, scale, loss)

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def apply(
        self, state: TrainState, gradients: Params, loss: Loss
    ) -> tuple[TrainState, dict[str, Array]]:
        """One optimizer step by what `gradients` gave, or a loop of one's own made of it.

        `state` is donated, and its key stays; the rest is as in `train_step`.
        """
        return self._updated(state, gradients, jnp.ones((), jnp.float32), loss)

    def _updated(
        self, state: TrainState, sums: Params, scale: Array, loss: Loss
    ) -> tuple[TrainState, dict[str, Array]]:
        specs = self.specs(state)
        sums = sharding.constrain_tree(sums, specs.params)
        # XLA would keep a copy of quotients for their norm; untied, its float32 copy of narrow sums.
        norm = optax.tree.norm(cast_floats(sums, jnp.float32)) * scale
        sums, norm = detours.tied(sums, norm)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss.total)
        updated = finite & (loss.weight > 0)
        if self.config.clip_norm is not None:
            scale *= jnp.minimum(1, self.config.clip_norm / norm)
        update = functools.partial(_update, self.config)
        params, moments = detours.update_in_place(
            update, sums, scale, updated, state.params, state.opt_state
        )
        metrics = loss.means() | {
            "weight": loss.weight,
            "grad_norm": norm,
            "lr": learning_rate(self.config)(state.step),
            "updated": updated,
            "finite": finite,
        }
        state = TrainState(
            step=state.step + updated.astype(jnp.int32),
            params=params,
            opt_state=moments,
            key=state.key,
        )
        return sharding.constrain_tree(state, specs), metrics

    def gradients(
        self, params: Params, frozen: Params, batch: Batch, key: Array
    ) -> tuple[Params, Loss]:
        """(float32 gradients of total / weight over the whole batch, the Loss of the whole batch)."""
        sums, loss = _gradient_sums(self, params, frozen, batch, key)
        sums = sharding.constrain_tree(sums, model_specs(self.model, params, self.lora))
        weight = jnp.where(loss.weight > 0, loss.weight, 1)
        return jax.tree.map(lambda x: x.astype(jnp.float32) / weight, sums), loss

    @functools.partial(jax.jit, static_argnums=0)
    def eval_step(self, params: Params, frozen: Params, batch: Batch) -> Loss:
        """The Loss of a batch, a micro-batch at a time."""
        params, key = self.model_params(params, frozen), jax.random.key(0)
        size = self.config.micro_batch_size
        if size is None or size >= len(jax.tree.leaves(batch)[0]):
            return self.loss(params, batch, key)
        losses = jax.lax.map(lambda rows: self.loss(params, rows, key), split_rows(batch, size))
        summed = jax.tree.map(lambda x: jnp.sum(x, axis=0), losses)
        return summed.replace(maxima=jax.tree.map(lambda x: jnp.max(x, axis=0), losses.maxima))

    def evaluate(
        self, params: Params, frozen: Params, batches: Iterable[Batch]
    ) -> dict[str, float]:
        """Means over all batches with one denominator, with `weight`."""
        total = None
        for batch in batches:
            loss = jax.tree.map(
                np.float64, self.eval_step(params, frozen, sharding.place_batch(batch))
            )
            total = loss if total is None else total + loss
        if total is None:
            raise ConfigError("there is nothing to evaluate: no batch was given")
        return {k: float(v) for k, v in (total.means() | {"weight": total.weight}).items()}


def model_specs(model: LLaMa, params: Params, lora: LoRAConfig | None = None) -> Params:
    """PartitionSpecs of a model's parameters, or of its adapters, on the context mesh."""
    axes = {}
    if sharding.current_mesh() is not None:  # else nothing is sharded, and `model` may be any
        axes = param_axes(model.config) if lora is None else adapters.adapter_axes(lora)
    return sharding.param_specs(params, axes, sharding.TRAINING)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _fresh_state(trainer: Trainer, params: Params, key: Array) -> TrainState:
    moments = make_optimizer(trainer.config).init(cast_floats(params, jnp.float32))
    state = TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=moments, key=key)
    return sharding.constrain_tree(state, trainer.specs(state))


def _update(
    config: TrainConfig, sums: Params, scale: Array, updated: Array, params: Params, moments: Any
) -> tuple[Params, Any]:
    """(parameters, moments) after the update by sums · scale; as they were if not `updated`."""
    grads = jax.tree.map(lambda x: x.astype(jnp.float32) * scale, sums)
    updates, new = make_optimizer(config).update(grads, moments, params)
    params = _where(updated, optax.apply_updates(params, updates), params)
    return params, _where(updated, new, moments)


def _where(condition: Array, new: Any, old: Any) -> Any:
    """The arrays of one tree or of the other, in the old one's dtypes."""
    return jax.tree.map(lambda n, o: jnp.where(condition, n.astype(o.dtype), o), new, old)


def _gradient_sums(
    trainer: Trainer, params: Params, frozen: Params, batch: Batch, key: Array
) -> tuple[Params, Loss]:
    """(gradients of the total over the whole batch, its Loss).

    The gradients are float32 where micro-batches are added up, else of the parameters' dtype.
    """

    def of_rows(rows: Batch, key: Array) -> tuple[Params, Loss]:
        def total(params):
            loss = trainer.loss(trainer.model_params(params, frozen), rows, key)
            return loss.total, loss

        return jax.grad(total, has_aux=True)(params)

    n_rows = len(jax.tree.leaves(batch)[0])
    size = min(trainer.config.micro_batch_size or n_rows, n_rows)
    if size == n_rows:
        return of_rows(batch, key)
    return _accumulate(of_rows, split_rows(batch, size), key)


def split_rows(batch: Batch, size: int) -> Batch:
    """Splits a batch into micro-batches: [rows, …] -> [n, size, …], filled up with rows of zeros."""

    def split(x):
        missing = -x.shape[0] % size
        x = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
        x = x.reshape(-1, size, *x.shape[1:])
        return sharding.constrain(x, sharding.TRAINING, None, "batch")

    return jax.tree.map(split, batch)


def _accumulate(of_rows, batches: Batch, key: Array) -> tuple[Params, Loss]:
    """Sums gradients (in float32) and losses of micro-batches."""
    keys = jax.random.split(key, len(jax.tree.leaves(batches)[0]))
    first = jax.tree.map(lambda x: x[0], batches)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(of_rows, first, key))
    zeros = cast_floats(zeros, jnp.float32)
    lowest = jax.tree.map(lambda x: jnp.full_like(x, -jnp.inf), zeros[1].maxima)
    start = zeros[0], zeros[1].replace(maxima=lowest)

    def add(carry, inputs):
        grads, loss = of_rows(*inputs)
        summed = jax.tree.map(lambda total, g: total + g.astype(total.dtype), carry[0], grads)
        return (summed, carry[1] + loss), None

    return jax.lax.scan(add, start, (batches, keys))[0]
