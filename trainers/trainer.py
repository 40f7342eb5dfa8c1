"""The abstract Trainer: a loss becomes jitted, accumulated, guarded optimizer steps.

Parameters come in two trees: what is trained (`TrainState.params`) and what is frozen. Without LoRA all
is trained and nothing frozen; with it, the model is frozen and its adapters are trained.
"""

import abc
import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, ClassVar

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

Array = jax.Array
Batch = dict[str, Any]


@flax.struct.dataclass
class TrainState:
    """All that changes from step to step, and all that a checkpoint holds.

    Attributes:
        step: [] int32, updates done; a skipped one does not count.
        params: what is trained.
        opt_state: optax's.
        key: the PRNG key; each step takes a new one from it, a skipped one too.
    """

    step: Array
    params: Params
    opt_state: Any
    key: Array


@flax.struct.dataclass
class Loss:
    """A loss as sums, so that micro-batches and devices add up before the one division.

    Attributes:
        total: [] float32, the sum that is differentiated.
        weight: [] float32, what the total of all micro-batches is divided by.
        sums: further sums by name, logged divided by the weight.
        maxima: by name, logged as their maximum.
    """

    total: Array
    weight: Array
    sums: dict[str, Array] = flax.struct.field(default_factory=dict)
    maxima: dict[str, Array] = flax.struct.field(default_factory=dict)

    def __add__(self, other: "Loss") -> "Loss":
        add = lambda a, b: jax.tree.map(jnp.add, a, b)
        return Loss(
            total=self.total + other.total,
            weight=self.weight + other.weight,
            sums=add(self.sums, other.sums),
            maxima=jax.tree.map(jnp.maximum, self.maxima, other.maxima),
        )

    def means(self) -> dict[str, Array]:
        """The loss and the sums divided by the weight (0 where nothing weighs), and the maxima."""
        weight = jnp.where(self.weight > 0, self.weight, 1)
        means = {name: value / weight for name, value in self.sums.items()}
        return {"loss": self.total / weight, **means, **self.maxima}


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


@dataclasses.dataclass(frozen=True)
class Trainer(abc.ABC):
    """Static things only, so that it can be jitted on; a subclass says what the loss is.

    Attributes:
        model: with its activations' dtype and its rematerialisation.
        config: optimizer and steps.
        lora: adapters are trained next to a frozen model; None: all parameters are.
    """

    model: LLaMa
    config: TrainConfig
    lora: LoRAConfig | None = None

    def __post_init__(self) -> None:
        if self.config.learning_rate is None:
            rate = self.config.base_rates[self.lora is not None]
            object.__setattr__(self, "config", dataclasses.replace(self.config, learning_rate=rate))

    @abc.abstractmethod
    def loss(self, params: Params, batch: Batch, key: Array) -> Loss:
        """The loss of a micro-batch, as sums.

        Args:
            params: as the model takes them, with adapters attached.
            batch: arrays with the rows first. A row of zeros must weigh nothing: batches are
                filled up with them.
            key: for what is random in the loss.
        """

    @property
    def keeps_frozen(self) -> bool:
        """Whether there are frozen parameters beside the state."""
        return self.lora is not None

    def work(self, batch: Batch) -> tuple[float, float]:
        """(tokens that the loss depends on, the mean over them of their row's tokens), for FLOPs."""
        lengths = document_lengths(batch)
        n_tokens = float(lengths.sum())
        return n_tokens, float((lengths**2).sum()) / max(n_tokens, 1)

    def derive(self, means: dict[str, float]) -> dict[str, float]:
        """What is logged, from the means of a step or of an evaluation."""
        return means

    def init(
        self, params: Params, key: Array, *, donate: bool = False
    ) -> tuple[TrainState, Params]:
        """(state, frozen) of a run that starts from a model.

        Args:
            params: as loaded; copied, since a step's state is donated to the next.
            key: decides adapters and everything random in the run.
            donate: take over `params` where no cast is needed, which then cannot be used any more.
        """
        params = sharding.place(params, self.model_specs(params))
        key, lora_key = jax.random.split(key)
        dtype = jnp.dtype(self.config.param_dtype)
        if self.lora is None:
            copy = (lambda x: x) if donate else jnp.copy
            frozen = {}
            trained = jax.tree.map(
                lambda x: x.astype(dtype) if x.dtype != dtype else copy(x), params
            )
        else:
            frozen = params
            trained = adapters.init_lora(self.model.config, self.lora, lora_key, dtype)
            trained = sharding.place(trained, self.specs(trained))
        return self._start(trained, key), frozen

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def _start(self, params: Params, key: Array) -> TrainState:
        moments = make_optimizer(self.config).init(cast_floats(params, jnp.float32))
        state = TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=moments, key=key)
        return sharding.constrain_tree(state, self.state_specs(state))

    def model_axes(self) -> dict[str, sharding.Axes]:
        """The logical axes of the model's parameters."""
        return param_axes(self.model.config)

    def trained_axes(self) -> dict[str, sharding.Axes]:
        """The logical axes of what is trained."""
        if self.lora is None:
            return self.model_axes()
        return adapters.adapter_axes(self.lora)

    def model_specs(self, params: Params) -> Params:
        """How the context mesh shares the model's parameters, see `utils.sharding`."""
        return sharding.specs(params, self.model_axes, sharding.TRAINING)

    def specs(self, params: Params) -> Params:
        """How the context mesh shares what is trained."""
        return sharding.specs(params, self.trained_axes, sharding.TRAINING)

    def state_specs(self, state: TrainState) -> TrainState:
        """How the context mesh shares the state: moments lie where their parameters do."""
        return sharding.state_specs(state, state.params, self.specs(state.params))

    def model_params(self, params: Params, frozen: Params) -> Params:
        """What the model takes; differentiable by `params`."""
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
        sums, loss = self._gradient_sums(state.params, frozen, batch, loss_key)
        # Of the sums: of their quotients, XLA would keep a copy for the norm alone.
        inverse = 1 / jnp.where(loss.weight > 0, loss.weight, 1)
        norm = optax.tree.norm(cast_floats(sums, jnp.float32)) * inverse
        finite = jnp.isfinite(norm) & jnp.isfinite(loss.total)
        updated = finite & (loss.weight > 0)
        params, moments = self._update(sums, norm, inverse, updated, state)
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
            key=key,
        )
        return sharding.constrain_tree(state, self.state_specs(state)), metrics

    def _update(self, sums: Params, norm: Array, scale: Array, updated: Array, state: TrainState):
        """(parameters, moments) after the update, where `updated`."""
        if self.config.clip_norm is not None:
            scale *= jnp.minimum(1, self.config.clip_norm / norm)
        optimizer = make_optimizer(self.config)

        def update(sums, scale, updated, params, moments):
            grads = jax.tree.map(lambda x: x.astype(jnp.float32) * scale, sums)
            updates, new = optimizer.update(grads, moments, params)
            params = _where(updated, optax.apply_updates(params, updates), params)
            return params, _where(updated, new, moments)

        return detours.update_in_place(update, sums, scale, updated, state.params, state.opt_state)

    def gradients(
        self, params: Params, frozen: Params, batch: Batch, key: Array
    ) -> tuple[Params, Loss]:
        """(float32 gradients of total / weight over the whole batch, the Loss of the whole batch)."""
        sums, loss = self._gradient_sums(params, frozen, batch, key)
        weight = jnp.where(loss.weight > 0, loss.weight, 1)
        return jax.tree.map(lambda x: x.astype(jnp.float32) / weight, sums), loss

    def _gradient_sums(
        self, params: Params, frozen: Params, batch: Batch, key: Array
    ) -> tuple[Params, Loss]:
        """(gradients of the total over the whole batch, its Loss).

        The gradients are float32 where micro-batches are added up, else of the parameters' dtype.
        """

        def of_rows(rows: Batch, key: Array) -> tuple[Params, Loss]:
            def total(params):
                loss = self.loss(self.model_params(params, frozen), rows, key)
                return loss.total, loss

            return jax.grad(total, has_aux=True)(params)

        n_rows = len(jax.tree.leaves(batch)[0])
        size = min(self.config.micro_batch_size or n_rows, n_rows)
        if size == n_rows:
            grads, loss = of_rows(batch, key)
        else:
            grads, loss = _accumulate(of_rows, split_rows(batch, size), key)
        return sharding.constrain_tree(grads, self.specs(params)), loss

    @functools.partial(jax.jit, static_argnums=0)
    def eval_step(self, params: Params, frozen: Params, batch: Batch) -> Loss:
        """The Loss of a batch, a micro-batch at a time."""
        params, key = self.model_params(params, frozen), jax.random.key(0)
        size = self.config.micro_batch_size
        if size is None or size >= len(jax.tree.leaves(batch)[0]):
            return self.loss(params, batch, key)
        losses = jax.lax.map(lambda rows: self.loss(params, rows, key), split_rows(batch, size))
        total = lambda tree: jax.tree.map(lambda x: jnp.sum(x, axis=0), tree)
        maxima = jax.tree.map(lambda x: jnp.max(x, axis=0), losses.maxima)
        return Loss(total(losses.total), total(losses.weight), total(losses.sums), maxima)

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


def _where(condition: Array, new: Any, old: Any) -> Any:
    """Each array of one tree or the other, of the old one's dtype."""
    return jax.tree.map(lambda n, o: jnp.where(condition, n.astype(o.dtype), o), new, old)


def split_rows(batch: Batch, size: int) -> Batch:
    """A batch's micro-batches: [rows, …] -> [n, size, …], filled up with rows of zeros."""

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


def document_lengths(batch: Batch) -> np.ndarray:
    """[documents] float64, how many tokens of each the loss depends on: those up to its last target."""
    mask = np.asarray(batch["target_mask"])
    if "segment_ids" not in batch:
        last = mask.shape[1] - np.argmax(mask[:, ::-1], axis=1)
        return np.where(mask.any(axis=1), last, 0).astype(np.float64)
    segments = np.asarray(batch["segment_ids"])
    counts = [np.bincount(row)[1:] for row in segments]
    return np.concatenate(counts).astype(np.float64)
