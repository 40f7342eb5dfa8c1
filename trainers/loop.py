"""The loop around a Trainer's steps: data, metrics, evaluation, checkpoints, the end."""

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from models.llama.model import Params
from trainers.checkpoint import Checkpointer
from trainers.data import Dataset
from trainers.metrics import (
    Compilations,
    MetricsLog,
    PhaseClock,
    matmul_peak,
    peak_memory_bytes,
    train_flops_per_token,
)
from trainers.trainer import Batch, Trainer, TrainState
from utils import processes
from utils.errors import TrainError
from utils.replicas import check_replicas
from utils.sharding import current_mesh, place_batch


class Data(Protocol):
    """What `fit` trains on; `trainers.data.Dataset` is one."""

    def batches(self) -> Any:
        """An iterator without end, with `get_state() -> dict` and `set_state(dict)`."""

    def preflight_batches(self) -> Iterable[Batch]:
        """A batch of the largest shape that there is, first; others that shall be compiled at once."""


class OnPolicyBatches(abc.ABC):
    """Batches that are sampled from the policy; what `Data.batches` of such data returns.

    A rollout may serve several updates. Checkpoints are made between rollouts: a resumed run samples
    again from the state that it was sampled from.
    """

    @abc.abstractmethod
    def sample(self, state: TrainState, frozen: Params, clock: PhaseClock) -> None:
        """Makes a rollout if no batch of the last one is left; called before each `next`."""

    @property
    @abc.abstractmethod
    def between_rollouts(self) -> bool:
        """Whether no batch of the last rollout is left."""

    @abc.abstractmethod
    def report(self) -> dict[str, Any]:
        """What a record says of the last rollout."""

    @abc.abstractmethod
    def __next__(self) -> Batch:
        """The next batch."""

    @abc.abstractmethod
    def get_state(self) -> dict:
        """The position behind the last rollout, for JSON."""

    @abc.abstractmethod
    def set_state(self, state: dict) -> None:
        """Goes on from a position."""


class Evaluation(abc.ABC):
    """What measures a model while it is trained, where that is not the loss of a Dataset."""

    @abc.abstractmethod
    def evaluate(self, state: TrainState, frozen: Params) -> dict[str, float]:
        """Numbers by name; `score`, lower is better, decides which checkpoint is the best."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands beside its TrainState, and what a checkpoint's meta says of it.

    Attributes:
        position: the data's position behind the last batch that was used; None: its start.
        skipped: updates that were skipped so far.
        tokens: targets that were trained on so far.
    """

    position: dict | None = None
    skipped: int = 0
    tokens: int = 0


def fit(
    trainer: Trainer,
    state: TrainState,
    frozen: Params,
    data: Data,
    *,
    eval_data: Dataset | Evaluation | None = None,
    log: MetricsLog | None = None,
    checkpointer: Checkpointer | None = None,
    meta: dict[str, Any] | None = None,
    progress: Progress = Progress(),
    should_stop: Callable[[], bool] = lambda: False,
    check_every: int = 0,
) -> tuple[TrainState, Progress]:
    """Trains until `max_steps`, or until `should_stop` says so between two steps.

    The largest batch goes first, with nothing to learn in it: where memory does not suffice, that is
    seen at once. The last state is always saved, be it that of step 0.

    Args:
        state, frozen: from `Trainer.init`, or a checkpoint's; `state` is donated.
        data: see Data.
        eval_data: evaluated as the config says and at the end; the lowest loss or score makes a
            checkpoint the best one.
        log: gets a record a step, and one a skipped update, with the step that it would have been.
        checkpointer: gets the state as the config says and at the end.
        meta: goes into each checkpoint, with `progress`.
        progress: of the checkpoint that is gone on from.
        should_stop: asked before each step; of several processes, one that says so stops all.
        check_every: steps from one comparison of the parameters' copies on a mesh to the next; 0: none.

    Raises:
        TrainError: more than `max_skipped` updates in a row were not finite, or had no target; or
            copies of a parameter differ.
        CheckpointError: a checkpoint could not be written.
    """
    with contextlib.ExitStack() as stack:
        run = _Run(trainer, frozen, data, eval_data, log, checkpointer, meta or {}, progress)
        stack.callback(run.compilations.close)
        run.check_every = check_every
        return run.fit(state, should_stop)


class _Run:
    """One call of `fit`."""

    def __init__(self, trainer, frozen, data, eval_data, log, checkpointer, meta, progress):
        self.trainer, self.config, self.frozen = trainer, trainer.config, frozen
        self.data, self.eval_data, self.log = data, eval_data, log
        self.checkpointer, self.meta, self.progress = checkpointer, meta, progress
        # Measured before compilations are counted: it compiles too.
        devices = 1 if current_mesh() is None else current_mesh().size
        self.peak = devices * matmul_peak(trainer.model.dtype or self.config.param_dtype)
        self.clock, self.compilations, self.compiled = PhaseClock(), Compilations(), []
        self.skipped_in_a_row: list[Any] = []
        self.save_due, self.check_every = False, 0
        self.failure: Exception | None = None

    def fit(self, state: TrainState, should_stop) -> tuple[TrainState, Progress]:
        batches = self.data.batches()
        on_policy = isinstance(batches, OnPolicyBatches)
        if self.progress.position is not None:
            batches.set_state(self.progress.position)
        step, saved, batch = int(state.step), None, None
        if step < self.config.max_steps:
            state = self._preflight(state)
            if step == 0 and self.progress.position is None:
                self._evaluate_before(state)
        # A run stops behind an update, never between one and the skipped ones that follow it: what is
        # redone after a resume is then exactly what the checkpoint does not hold.
        whole = True
        if step < self.config.max_steps and not on_policy:
            batch = self._next(batches)
        while step < self.config.max_steps:
            may_stop = whole and not self.skipped_in_a_row
            if processes.agree(may_stop and should_stop(), self.failure):
                break
            if on_policy:
                batches.sample(state, self.frozen, self.clock)
                batch = self._next(batches)
            position = batches.get_state()
            self._note_compilations()  # of sampling, if any
            self.compilations.expect(f"tokens {list(batch['tokens'].shape)}")
            with self.clock("step"):
                state, metrics = self.trainer.train_step(state, self.frozen, place_batch(batch))
            # While the device computes, unless it is the new policy that makes the next one.
            done, batch = batch, None if on_policy else self._next(batches)
            with self.clock("step"):
                metrics = {name: value.item() for name, value in metrics.items()}
            compiling = self._note_compilations()
            attempted, step = step + 1, step + metrics["updated"]
            self._account(metrics, position, int(done["target_mask"].sum()))
            last = step == self.config.max_steps
            whole = not on_policy or batches.between_rollouts
            evaluation = {}
            if metrics["updated"] and self._due(step, self.config.eval_every, last):
                evaluation = self._evaluate(state)
            # Before the checkpoint: a run that is killed in between writes the line again, while one
            # that went on from the checkpoint would never write it.
            known = evaluation | (batches.report() if on_policy else {})
            self._record(attempted, metrics, known, done, compiling)
            self._check_skipped(metrics)
            if self.check_every and step % self.check_every == 0:
                check_replicas(state.params, self.trainer.specs(state.params))
            self.save_due |= metrics["updated"] and self._due(step, self.config.save_every, last)
            if self.save_due and whole and metrics["updated"]:
                self._save(step, state, evaluation.get("eval_score", evaluation.get("eval_loss")))
                saved, self.save_due = step, False
        if saved != step:  # the checkpointer leaves alone what was restored and did not change
            self._save(step, state, None)
        if self.checkpointer is not None:
            self.checkpointer.wait()
        return state, self.progress

    def _next(self, batches) -> Batch | None:
        """The next batch; what fails is raised before the next step, on all processes at once."""
        with self.clock("data"):
            try:
                return next(batches)
            except Exception as e:
                self.failure = e
                return None

    def _preflight(self, state: TrainState) -> TrainState:
        """A step in which nothing weighs, on the largest batch: it changes nothing."""
        for batch in self.data.preflight_batches():
            batch = jax.tree.map(np.zeros_like, batch)
            self.compilations.expect(f"tokens {list(batch['tokens'].shape)} (preflight)")
            key = jax.random.wrap_key_data(jnp.copy(jax.random.key_data(state.key)))
            with self.clock("preflight"):
                state, _ = self.trainer.train_step(state, self.frozen, place_batch(batch))
                state = jax.block_until_ready(state.replace(key=key))
        self._note_compilations()
        return state

    def _note_compilations(self) -> float:
        """Seconds that XLA has compiled since the last call; what it was is kept for the record."""
        new = self.compilations.take()
        self.compiled += new
        return sum(seconds for _, seconds in new)

    @staticmethod
    def _due(step: int, every: int, last: bool) -> bool:
        return last or (every > 0 and step % every == 0)

    def _account(self, metrics: dict[str, Any], position: dict, n_targets: int) -> None:
        """Moves on in the data, and counts."""
        self.progress = dataclasses.replace(
            self.progress,
            position=position,
            skipped=self.progress.skipped + (not metrics["updated"]),
            tokens=self.progress.tokens + n_targets * metrics["updated"],
        )
        if metrics["updated"]:
            self.skipped_in_a_row = []
        else:
            self.skipped_in_a_row.append(position.get("next_index", position))

    def _check_skipped(self, metrics: dict[str, Any]) -> None:
        if len(self.skipped_in_a_row) > self.config.max_skipped:
            raise TrainError(
                f"{len(self.skipped_in_a_row)} updates in a row were skipped, not finite or without a "
                f"target (loss {metrics['loss']}, gradient norm {metrics['grad_norm']}, weight "
                f"{metrics['weight']}), those of the batches {self.skipped_in_a_row}; what was saved is from before: lower the learning rate, "
                "or look at that data"
            )

    def _evaluate(self, state: TrainState) -> dict[str, float]:
        if self.eval_data is None:
            return {}
        with self.clock("eval"):
            if isinstance(self.eval_data, Evaluation):
                self.compilations.expect("(eval)")
                values = self.eval_data.evaluate(state, self.frozen)
                return {f"eval_{name}": value for name, value in values.items()}
            means = self.trainer.evaluate(state.params, self.frozen, self._eval_batches())
        return {f"eval_{name}": value for name, value in self.trainer.derive(means).items()}

    def _evaluate_before(self, state: TrainState) -> None:
        """A record of step 0: what a policy's rewards are compared with."""
        if self.log is not None and isinstance(self.eval_data, Evaluation):
            self.log.write({"step": 0, **self._evaluate(state)})

    def _eval_batches(self) -> Iterator[Batch]:
        for batch in self.eval_data.epoch_batches():
            self.compilations.expect(f"tokens {list(batch['tokens'].shape)} (eval)")
            yield batch

    def _save(self, step: int, state: TrainState, score: float | None) -> None:
        if self.checkpointer is None:
            return
        with self.clock("save"):
            meta = self.meta | {"progress": dataclasses.asdict(self.progress)}
            self.checkpointer.save(step, state, meta, score=score)

    def _record(self, step, metrics, known, batch: Batch, compiling: float) -> None:
        """Writes one line of metrics; a skipped update has the step that it would have been."""
        self._note_compilations()
        seconds, compiled, self.compiled = self.clock.take(), self.compiled, []
        if self.log is None:
            return
        n_tokens, mean_context = self.trainer.work(batch)
        # Compilation is no slowness of the step; it has its own entry.
        busy = max(seconds["step"] - compiling, 1e-9)
        flops = n_tokens * train_flops_per_token(
            self.trainer.model.config, mean_context, lora=self.trainer.lora is not None
        )
        means = {k: v for k, v in metrics.items() if k not in ("updated", "finite", "weight")}
        self.log.write(
            {
                "step": step,
                **self.trainer.derive(means),
                "targets": int(batch["target_mask"].sum()),
                "tokens": int(n_tokens),
                "tokens_per_s": n_tokens / busy,
                "model_flops_per_s": flops / busy,
                "mfu": flops / busy / self.peak,
                "memory": peak_memory_bytes(),
                "updated": metrics["updated"],
                "skipped": self.progress.skipped,
                **known,
                "seconds": seconds,
                "compilations": compiled,
            }
        )
