"""The loop around a Trainer's steps: data, records, evaluations, checkpoints, the end.

What it drives comes in by the protocols below. `trainers.data`, `trainers.on_policy`, `trainers.runs.metrics`
and `trainers.runs.checkpoint` have one of each.
"""

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from models.llama.model import Params
from trainers.trainer import Batch, Trainer, TrainState, Work
from utils.errors import TrainError
from utils.memory import return_freed_memory
from utils.sharding import place_batch

# Times a block, `with phase("step", "tokens [8, 512]"): …`; the second text, which may be left out,
# names what XLA compiles within. `utils.clock.PhaseClock` is one.
Phases = Callable[..., contextlib.AbstractContextManager]


class Data(Protocol):
    """Data that `fit` trains on; `trainers.data.Dataset` and `trainers.on_policy.RolloutData` are."""

    def batches(self) -> Any:
        """`Batches`, or a plain iterator without end that has `get_state` and `set_state`."""

    def preflight_batches(self) -> Iterable[Batch]:
        """A batch of each shape to compile before the first step, the largest first."""


class EvalData(Protocol):
    """Data that a loss is evaluated on; `trainers.data.Dataset` is."""

    def epoch_batches(self) -> Iterable[Batch]:
        """Every row once."""


class Batches(abc.ABC):
    """An iterator of batches, without end, that may sample them from the policy.

    A rollout may serve several updates. Evaluations, checkpoints and stops come between rollouts: a
    resumed run samples again from the state that it was sampled from.

    Attributes:
        between_rollouts: whether no batch of the last rollout is left.
        failure: what went wrong in reading ahead, raised before the next step.
    """

    between_rollouts: bool = True
    failure: Exception | None = None

    def sample(self, state: TrainState, frozen: Params, phase: Phases) -> None:
        """Makes a rollout if no batch of the last one is left; called before each `next`."""

    def read_ahead(self) -> None:
        """Prepares the next batch while the device computes, unless it needs the new policy."""

    def report(self) -> dict[str, Any]:
        """Numbers of the last rollout, for the step's record."""
        return {}

    def explain(self) -> str:
        """Why there was nothing to learn from the last batch, if that is known."""
        return ""

    @abc.abstractmethod
    def __next__(self) -> Batch:
        """The next batch."""

    @abc.abstractmethod
    def get_state(self) -> dict:
        """The position behind the last batch, or rollout, for JSON."""

    @abc.abstractmethod
    def set_state(self, state: dict) -> None:
        """Continues from a position."""


class _ReadAhead(Batches):
    """A dataset's batches; the next one is read during a step."""

    def __init__(self, source: Any):
        self._source, self._position = source, source.get_state()
        self._batch: Batch | None = None

    def read_ahead(self) -> None:
        try:
            self._batch = next(self._source)
        except Exception as e:  # raised on all processes at once, whatever it is
            self.failure = e

    def __next__(self) -> Batch:
        self._position = self._source.get_state()
        return self._batch

    def get_state(self) -> dict:
        return self._position

    def set_state(self, state: dict) -> None:
        self._source.set_state(state)


class Evaluation(abc.ABC):
    """Measures a model while it is trained, by something other than its loss on a dataset."""

    @abc.abstractmethod
    def evaluate(self, state: TrainState, frozen: Params) -> dict[str, float]:
        """Numbers by name; `score`, lower is better, decides which checkpoint is the best."""


class Recorder(Protocol):
    """Times a run and writes its records."""

    phase: Phases

    def write(self, record: dict[str, Any]) -> None:
        """Writes a record that is not of a step."""

    def write_step(self, record: dict[str, Any], work: Work) -> None:
        """Writes a step's record, with speed, memory, seconds by phase and compilations."""


class Log(Protocol):
    """Where records go; `trainers.runs.metrics.MetricsLog` is one."""

    def recorder(self, trainer: Trainer) -> contextlib.AbstractContextManager[Recorder]:
        """Measures one run until the context ends."""


class Checkpointer(Protocol):
    """Where states are saved; `trainers.runs.checkpoint.Checkpointer` is one."""

    def save(
        self, step: int, state: Any, meta: dict[str, Any], *, score: float | None = None
    ) -> None:
        """Starts to save a state; the lowest score marks the best one."""

    def wait(self) -> None:
        """Returns once all is saved."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run has come, besides its TrainState; part of each checkpoint's meta.

    Attributes:
        position: the data's position behind the last batch that was used; None: its start.
        skipped: updates that were skipped so far.
        tokens: targets that were trained on so far.
    """

    position: dict | None = None
    skipped: int = 0
    tokens: int = 0


def _alone(stop: bool, error: Exception | None) -> bool:
    """`Session.agree` of a single process."""
    if error is not None:
        raise error
    return stop


@dataclasses.dataclass(frozen=True, kw_only=True)
class Session:
    """How a run is resumed, watched and stopped; the default runs to the end in one process.

    Attributes:
        progress: of the checkpoint that the run resumes from.
        meta: goes into each checkpoint, with the progress.
        should_stop: asked before each step; None: the run ends at `max_steps`.
        check: called with the state after each step; raises to end the run.
        agree: called before each step with this process's wish to stop and its error; returns whether
            any process wants to stop, or raises on all of them if one has an error.
    """

    progress: Progress = Progress()
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)
    should_stop: Callable[[], bool] | None = None
    check: Callable[[TrainState], None] | None = None
    agree: Callable[[bool, Exception | None], int] = _alone


def fit(
    trainer: Trainer,
    state: TrainState,
    frozen: Params,
    data: Data,
    *,
    eval_data: EvalData | Evaluation | None = None,
    log: Log | None = None,
    checkpointer: Checkpointer | None = None,
    session: Session = Session(),
) -> tuple[TrainState, Progress]:
    """Trains until `max_steps`, or until `session.should_stop` says so between two steps.

    The largest batch goes first, with nothing to learn in it, so that a lack of memory shows at once.
    The last state is always saved, even at step 0.

    Args:
        state, frozen: from `Trainer.init`, or a checkpoint's; `state` is donated.
        data: see Data.
        eval_data: evaluated as the config says and at the end; the lowest loss or score makes a
            checkpoint the best one.
        log: gets a record per step, and one per skipped update, with the step that it would have been.
        checkpointer: gets the state as the config says and at the end.
        session: see Session.

    Raises:
        TrainError: more than `max_skipped` updates in a row were not finite, or had no target.
        CheckpointError: a checkpoint could not be written.
    """
    with contextlib.nullcontext() if log is None else log.recorder(trainer) as recorder:
        return _Run(trainer, frozen, data, eval_data, recorder, checkpointer, session).fit(state)


def _untimed(*names: str) -> contextlib.AbstractContextManager:
    """The Phases of a run without a log."""
    return contextlib.nullcontext()


class _Run:
    """One call of `fit`.

    Attributes:
        step: updates done.
        score: of the present state; None: it was not evaluated.
        at_rest: whether the run may evaluate, save and stop here: between rollouts and behind an
            update. What is redone after a resume is then exactly what the checkpoint does not hold.
    """

    def __init__(self, trainer, frozen, data, eval_data, recorder, checkpointer, session):
        self.trainer, self.config, self.frozen = trainer, trainer.config, frozen
        self.data, self.eval_data, self.recorder = data, eval_data, recorder
        self.checkpointer, self.session, self.progress = checkpointer, session, session.progress
        self.phase: Phases = _untimed if recorder is None else recorder.phase
        batches = data.batches()
        self.batches = batches if isinstance(batches, Batches) else _ReadAhead(batches)
        self.step, self.saved, self.score = 0, None, None
        self.at_rest, self.eval_due, self.save_due = True, False, False
        self.skipped_in_a_row: list[Any] = []

    def fit(self, state: TrainState) -> tuple[TrainState, Progress]:
        state = self._begin(state)
        while self.step < self.config.max_steps and not self._stops():
            batch = self._next(state)
            state, metrics = self._update(state, batch)
            work = self.trainer.work(batch)
            self._account(metrics, work)
            evaluation = self._evaluate(state) if self.eval_due and self.at_rest else {}
            # Before the checkpoint: a run that is killed in between writes the line again, while one
            # that resumed from the checkpoint would never write it.
            self._record(metrics, work, evaluation)
            self._check(state, metrics)
            if self.save_due and self.at_rest:
                self._save(state)
        if self.saved != self.step:  # the checkpointer leaves a state alone that it has restored
            self._save(state)
        if self.checkpointer is not None:
            self.checkpointer.wait()
        return state, self.progress

    def _begin(self, state: TrainState) -> TrainState:
        """Finds the place in the data, compiles, and evaluates what training starts from."""
        self.step = int(state.step)
        if self.progress.position is not None:
            self.batches.set_state(self.progress.position)
        if self.step < self.config.max_steps:
            state = self._preflight(state)
            fresh = self.step == 0 and self.progress.position is None
            if fresh and self.recorder is not None and isinstance(self.eval_data, Evaluation):
                self.recorder.write({"step": 0, **self._evaluate(state)})
            with self.phase("data"):
                self.batches.read_ahead()
        return state

    def _preflight(self, state: TrainState) -> TrainState:
        """A step on the largest batch in which nothing weighs: it changes nothing."""
        for batch in self.data.preflight_batches():
            batch = jax.tree.map(np.zeros_like, batch)
            key = jax.random.wrap_key_data(jnp.copy(jax.random.key_data(state.key)))
            with self.phase("preflight", f"{self._shape(batch)} (preflight)"):
                state, _ = self.trainer.train_step(state, self.frozen, place_batch(batch))
                state = jax.block_until_ready(state.replace(key=key))
            return_freed_memory()  # what compiling left
        return state

    def _stops(self) -> bool:
        asked = self.at_rest and self.session.should_stop is not None
        stop = asked and self.session.should_stop()
        return bool(self.session.agree(stop, self.batches.failure))

    def _next(self, state: TrainState) -> Batch:
        """The next batch, of a new rollout if the last one is used up."""
        self.batches.sample(state, self.frozen, self.phase)
        with self.phase("data"):
            return next(self.batches)

    def _update(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        """(state, the step's metrics as Python numbers)."""
        with self.phase("step", self._shape(batch)):
            state, metrics = self.trainer.train_step(state, self.frozen, place_batch(batch))
        with self.phase("data"):  # while the device computes
            self.batches.read_ahead()
        with self.phase("step"):
            return state, {name: value.item() for name, value in metrics.items()}

    def _shape(self, batch: Batch) -> str:
        """Names what XLA compiles for a batch."""
        name = self.trainer.shaped_by
        return f"{name} {list(batch[name].shape)}"

    def _account(self, metrics: dict[str, Any], work: Work) -> None:
        """Moves on by a step, or by a skipped update."""
        updated, position = metrics["updated"], self.batches.get_state()
        self.progress = dataclasses.replace(
            self.progress,
            position=position,
            skipped=self.progress.skipped + (not updated),
            tokens=self.progress.tokens + work.targets * updated,
        )
        self.at_rest = False
        if not updated:
            self.skipped_in_a_row.append(position)
            return
        self.skipped_in_a_row, self.score = [], None
        self.step += 1
        last = self.step == self.config.max_steps
        self.at_rest = last or self.batches.between_rollouts
        self.eval_due |= last or self._is_multiple_of(self.config.eval_every)
        self.save_due |= last or self._is_multiple_of(self.config.save_every)

    def _is_multiple_of(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _evaluate(self, state: TrainState) -> dict[str, float]:
        """Numbers by name, with "eval_" before each; notes the score."""
        self.eval_due = False
        if self.eval_data is None:
            return {}
        if isinstance(self.eval_data, Evaluation):
            with self.phase("eval", "(eval)"):
                values = self.eval_data.evaluate(state, self.frozen)
        else:
            means = self.trainer.evaluate(state.params, self.frozen, self._eval_batches())
            values = self.trainer.derive(means)
        self.score = values.get("score", values.get("loss"))
        return {f"eval_{name}": value for name, value in values.items()}

    def _eval_batches(self) -> Iterator[Batch]:
        for batch in self.eval_data.epoch_batches():
            with self.phase("eval", f"{self._shape(batch)} (eval)"):
                yield batch

    def _record(self, metrics: dict[str, Any], work: Work, evaluation: dict[str, float]) -> None:
        """Writes one line of metrics; a skipped update has the step that it would have been."""
        if self.recorder is None:
            return
        means = {k: v for k, v in metrics.items() if k not in ("updated", "finite", "weight")}
        record = {
            "step": self.step + (not metrics["updated"]),
            **self.trainer.derive(means),
            "updated": metrics["updated"],
            "skipped": self.progress.skipped,
            **evaluation,
            **self.batches.report(),
        }
        self.recorder.write_step(record, work)

    def _check(self, state: TrainState, metrics: dict[str, Any]) -> None:
        """Ends a run that no longer learns."""
        skipped = self.skipped_in_a_row
        if len(skipped) > self.config.max_skipped:
            last = ", ".join(f"{name} {metrics[name]}" for name in ("loss", "grad_norm", "weight"))
            reason = f"not finite or without a target (the last: {last}; batches end at {skipped})"
            reason += "; lower the learning rate, or look at that data; what is saved is older"
            if not metrics["weight"]:
                reason = self.batches.explain() or reason
            raise TrainError(f"{len(skipped)} updates in a row were skipped: {reason}")
        if self.session.check is not None:
            self.session.check(state)

    def _save(self, state: TrainState) -> None:
        self.saved, self.save_due = self.step, False
        if self.checkpointer is None:
            return
        with self.phase("save"):
            meta = self.session.meta | {"progress": dataclasses.asdict(self.progress)}
            self.checkpointer.save(self.step, state, meta, score=self.score)
