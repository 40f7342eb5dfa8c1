"""The loop around a Trainer: order of things, skipped updates, records, compilations, the best one."""

import dataclasses
import itertools
import json

import jax
import pytest

from tests.small_runs import POISON, SFTTrainer, curve, dataset, digest, start, trainer
from trainers.runs import checkpoint
from trainers.runs.checkpoint import Checkpointer, CheckpointReader
from trainers.loop import Batches, Evaluation, Progress, Session, fit
from trainers.runs.metrics import MetricsLog
from trainers.sft_trainer import document_lengths
from utils.errors import CheckpointError, TrainError

# Ten rows of two batches each... five batches an epoch, in the file's order.
IN_ORDER = dict(shuffle=False, lengths=(20,) * 10)


class Under:
    """A trainer's compiled programs under other settings of the loop around them."""

    def __init__(self, of, **config):
        self._of, self.config = of, dataclasses.replace(of.config, **config)

    def __getattr__(self, name):
        return getattr(self._of, name)


def run(of, data, **options):
    """(final state, progress, records)."""
    records = []
    with MetricsLog(options.pop("folder"), sinks=[records.append]) as log:
        state, progress = fit(of, *start(of), data, log=log, **options)
    return state, progress, records


def test_the_preflight_is_the_largest_batch_and_changes_nothing(tmp_path):
    of, data = trainer(), dataset()
    shapes = []

    class Data:
        def batches(self):
            return data.batches()

        def preflight_batches(self):
            batch = data.largest_batch()
            shapes.append(batch["tokens"].shape)
            return [batch]

    before = digest(start(of)[0])
    with Checkpointer(tmp_path) as checkpointer:
        state, progress = fit(
            of,
            *start(of),
            Data(),
            checkpointer=checkpointer,
            session=Session(should_stop=lambda: True),
        )
    assert shapes == [(2, 128)]
    assert digest(state) == before and progress == Progress()
    # A run that is stopped before its first step can be gone on from.
    restored = CheckpointReader(tmp_path).restore(jax.eval_shape(lambda: state))
    assert restored.step == 0 and digest(restored.state) == before
    assert Progress(**restored.meta["progress"]) == Progress()


@pytest.mark.covers("D1")
def test_a_skipped_update_leaves_all_but_the_key_and_is_counted(tmp_path):
    of, data = trainer(), dataset(poisoned=(5,), **IN_ORDER)
    with Checkpointer(tmp_path / "c") as checkpointer:
        state, progress, records = run(of, data, folder=tmp_path, checkpointer=checkpointer)
    batches = list(itertools.islice(data.batches(), 9))
    poisoned = [number for number, b in enumerate(batches, 1) if (b["tokens"] == POISON).any()]
    assert poisoned == [3, 8]
    expected, frozen = start(of)
    for number, batch in enumerate(batches, 1):
        if number in poisoned:
            expected = expected.replace(key=jax.random.split(expected.key)[0])
        else:
            expected, _ = of.train_step(expected, frozen, batch)
    assert digest(state) == digest(expected)
    # 2 rows, of 20 tokens, of which the first is no target.
    assert progress == Progress(position={"rows": 18}, skipped=2, tokens=7 * 2 * 19)
    assert [r["step"] for r in records] == [1, 2, 3, 3, 4, 5, 6, 7, 7]
    assert [n for n, r in enumerate(records, 1) if not r["updated"]] == poisoned
    assert [r["skipped"] for r in records] == [0, 0, 1, 1, 1, 1, 1, 2, 2]
    assert records[2]["loss"] is None and None not in records[3].values()
    meta = CheckpointReader(tmp_path / "c").read_meta()
    assert Progress(**meta["progress"]) == progress


@pytest.mark.covers("D4")
def test_batches_without_a_target_end_the_run_too():
    of, data = trainer(max_skipped=2), dataset(**IN_ORDER)
    data._targets[:] = False
    with pytest.raises(TrainError, match=r"3 updates in a row.*weight 0"):
        fit(of, *start(of), data)


@pytest.mark.covers("D1")
def test_too_many_skipped_updates_in_a_row_end_the_run(tmp_path):
    # The third, fourth and fifth batch; two in a row are allowed.
    of, data = trainer(), dataset(poisoned=(4, 7, 8), **IN_ORDER)
    with Checkpointer(tmp_path / "c") as checkpointer:
        with pytest.raises(TrainError, match=r"3 updates in a row.*loss nan.*6.*8.*10") as e:
            run(of, data, folder=tmp_path, checkpointer=checkpointer)
    assert e.value.exit_code == 5
    reader = CheckpointReader(tmp_path / "c")
    assert reader.steps == [2]
    state, frozen = start(of)
    for batch in itertools.islice(data.batches(), 2):
        state, _ = of.train_step(state, frozen, batch)
    assert digest(reader.restore(jax.eval_shape(lambda: state)).state) == digest(state)


@pytest.mark.covers("D1")
def test_as_many_as_allowed_or_more_but_apart_do_not_end_it(tmp_path):
    # Of each five batches the third and fourth, or the first, third and fifth.
    for rows, skipped in (((4, 7), 4), ((0, 4, 8), 10)):
        data = dataset(poisoned=rows, **IN_ORDER)
        state, progress, _ = run(trainer(), data, folder=tmp_path / str(rows))
        assert int(state.step) == 7 and progress.skipped == skipped


def test_a_run_stops_behind_an_update(tmp_path):
    of, data = trainer(), dataset(poisoned=(4, 7), **IN_ORDER)
    records = []
    with MetricsLog(tmp_path, sinks=[records.append]) as log:
        session = Session(should_stop=lambda: len(records) >= 3)
        _, progress = fit(of, *start(of), data, log=log, session=session)
    # Asked to after the third batch, which is skipped as the fourth is.
    assert [r["updated"] for r in records] == [True, True, False, False, True]
    assert progress.position == {"rows": 10}


def test_the_line_of_a_step_is_there_before_its_checkpoint(tmp_path):
    of, seen = trainer(), []

    class Watched(Checkpointer):
        def save(self, step, *args, **options):
            assert curve(tmp_path)[-1]["step"] == step
            seen.append(step)
            super().save(step, *args, **options)

    with Watched(tmp_path / "c") as checkpointer:
        run(of, dataset(), folder=tmp_path, checkpointer=checkpointer)
    assert seen == [2, 4, 6, 7]


def test_saved_and_evaluated_as_the_config_says_and_at_the_end(tmp_path):
    of = trainer()
    with Checkpointer(tmp_path / "c", keep=9) as checkpointer:
        options = dict(folder=tmp_path, checkpointer=checkpointer, eval_data=dataset(seed=1))
        state, _, records = run(of, dataset(), **options)
    assert CheckpointReader(tmp_path / "c").steps == [2, 4, 6, 7]
    assert [r["step"] for r in records if "eval_loss" in r] == [4, 7]
    means = of.evaluate(state.params, {}, dataset(seed=1).epoch_batches())
    assert records[-1]["eval_loss"] == means["loss"]
    assert records[-1]["eval_weight"] == means["weight"] == dataset(seed=1).counts["targets"]


def test_the_checkpoint_with_the_lowest_loss_of_evaluation_stays(tmp_path):
    easy, hard = dataset(lengths=(2,) * 4), dataset(seed=1)  # every row ends in 0

    class Harder:
        def epoch_batches(self, sets=iter([easy, hard])):
            return next(sets).epoch_batches()

    options = dict(folder=tmp_path, eval_data=Harder())
    with Checkpointer(tmp_path / "c", keep=1) as checkpointer:
        _, _, records = run(trainer(), dataset(), checkpointer=checkpointer, **options)
    losses = {r["step"]: r["eval_loss"] for r in records if "eval_loss" in r}
    assert losses[4] < losses[7] and CheckpointReader(tmp_path / "c").steps == [4, 7]


def test_a_record_has_all_that_is_promised(tmp_path):
    _, _, records = run(trainer(), dataset(), folder=tmp_path)
    promised = "step loss lr grad_norm tokens tokens_per_s model_flops_per_s mfu memory seconds"
    promised += " compilations skipped updated targets accuracy entropy perplexity"
    assert set(records[0]) == set(promised.split())
    assert "eval_loss" not in records[3]  # there is nothing to evaluate
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [set(line) for line in lines] == [set(promised.split())] * 7
    assert set(lines[0]["seconds"]) == {"preflight", "data", "step"}
    assert all(0 < line["mfu"] < 1 for line in lines)
    for line, batch in zip(lines, dataset().batches()):
        used = batch["target_mask"].sum() + len(batch["tokens"])
        assert (line["tokens"], line["targets"]) == (used, used - len(batch["tokens"]))


class FreshTrainer(SFTTrainer):
    """Of which no other test has compiled anything."""


def test_each_shape_is_compiled_once_and_named(tmp_path):
    of, data = trainer(FreshTrainer), dataset()
    _, _, records = run(of, data, folder=tmp_path, eval_data=dataset(lengths=(9, 9)))
    assert data.buckets == (64, 128)
    steps = [(r["step"], what) for r in records for what, _ in r["compilations"] if "step" in what]
    small = next(i for i, b in enumerate(data.batches(), 1) if b["tokens"].shape == (2, 64))
    assert sorted(steps) == sorted(
        [
            (1, "train_step tokens [2, 128] (preflight)"),
            (small, "train_step tokens [2, 64]"),
            (4, "eval_step tokens [2, 64] (eval)"),
        ]
    )
    # Nothing is charged to a run that it did not cause.
    assert "lambda" not in json.dumps(records)
    assert all(0 < seconds < 60 for r in records for _, seconds in r["compilations"])


@pytest.mark.covers("D29")
def test_a_sink_that_fails_changes_nothing(tmp_path):
    def broken(record):
        raise OSError(28, "No space left on device")

    of = trainer()
    expected = run(of, dataset(), folder=tmp_path / "a")[0]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.warns(UserWarning, match="training continues.*No space left") as warned:
        with MetricsLog(tmp_path / "b", sinks=[broken]) as log:
            state, _ = fit(of, *start(of), dataset(), log=log)
    assert len(warned) == 1 and digest(state) == digest(expected)


@pytest.mark.covers("D27")
def test_a_failed_save_ends_the_run_at_the_next(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    records = []
    with (
        Checkpointer(tmp_path / "c") as checkpointer,
        MetricsLog(tmp_path, sinks=[records.append]) as log,
    ):
        write = checkpoint.write_arrays
        saves = iter([write, full, write])
        monkeypatch.setattr(checkpoint, "write_arrays", lambda *args: next(saves)(*args))
        of = trainer()
        with pytest.raises(CheckpointError, match="cannot save step 4.*no space left"):
            fit(of, *start(of), dataset(), log=log, checkpointer=checkpointer)
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert CheckpointReader(tmp_path / "c").steps == [2]


class Rollouts(Batches):
    """A dataset's batches, in rollouts of three."""

    def __init__(self, source):
        self._source, self._left = source, 0

    def sample(self, state, frozen, phase):
        self._left = self._left or 3

    @property
    def between_rollouts(self):
        return self._left == 0

    def __next__(self):
        self._left -= 1
        return next(self._source)

    def get_state(self):
        return self._source.get_state()

    def set_state(self, state):
        self._source.set_state(state)


class RolloutData:
    """What `fit` takes Rollouts from."""

    def __init__(self, data):
        self._data = data

    def batches(self):
        return Rollouts(self._data.batches())

    def preflight_batches(self):
        return self._data.preflight_batches()


class StepAsScore(Evaluation):
    def evaluate(self, state, frozen):
        return {"score": int(state.step)}


class Saves:
    """A Checkpointer that notes (step, score)."""

    def __init__(self):
        self.made = []

    def save(self, step, state, meta, *, score=None):
        assert int(state.step) == step
        self.made.append((step, score))

    def wait(self):
        pass


# Due at the steps 2, 4 and 6, and at the last one. Batch 3, of rows 4 and 5, ends a rollout.
@pytest.mark.parametrize("skipped, steps", [((), [3, 6, 7]), ((4, 5), [5, 7])])
def test_evaluations_and_saves_wait_for_a_rollouts_end_and_the_score_is_the_states(
    tmp_path, skipped, steps
):
    of = Under(trainer(), eval_every=2)
    data = dataset(poisoned=skipped, lengths=(20,) * 20, shuffle=False)
    saves = Saves()
    options = dict(folder=tmp_path, checkpointer=saves, eval_data=StepAsScore())
    _, _, records = run(of, RolloutData(data), **options)
    assert saves.made == [(step, step) for step in steps]
    assert [r["step"] for r in records if "eval_score" in r] == [0, *steps]


def test_a_state_that_was_evaluated_is_saved_with_its_score_wherever_the_run_stops(tmp_path):
    of, saves, records = Under(trainer(), save_every=0), Saves(), []
    session = Session(should_stop=lambda: len(records) >= 4)
    with MetricsLog(tmp_path, sinks=[records.append]) as log:
        options = dict(log=log, checkpointer=saves, eval_data=dataset(seed=1), session=session)
        fit(of, *start(of), dataset(), **options)
    assert saves.made == [(4, records[3]["eval_loss"])]
    fit(of, *start(of), dataset(), checkpointer=saves, session=Session(should_stop=lambda: True))
    assert saves.made[1] == (0, None)


def test_what_goes_wrong_in_reading_ahead_is_handed_to_all_processes_before_the_next_step():
    data, told = dataset(), []

    class Broken:
        def batches(self):
            batches = data.batches()
            self.first = next(batches)
            return self

        def preflight_batches(self):
            return []

        def __next__(self):
            if self.first is None:
                raise OSError("the disk is gone")
            batch, self.first = self.first, None
            return batch

        def get_state(self):
            return {}

    def agree(stop, error):
        told.append((stop, str(error)))
        if error is not None:
            raise TrainError("process 1: the disk is gone")
        return stop

    of = trainer()
    with pytest.raises(TrainError, match="process 1: the disk"):
        fit(of, *start(of), Broken(), session=Session(agree=agree))
    assert told == [(False, "None"), (False, "the disk is gone")]


def test_the_check_sees_every_state_and_may_end_the_run():
    of, seen = trainer(), []

    def check(state):
        seen.append(int(state.step))
        if len(seen) == 3:
            raise TrainError("copies differ")

    with pytest.raises(TrainError, match="copies differ"):
        fit(of, *start(of), dataset(), session=Session(check=check))
    assert seen == [1, 2, 3]


def test_documents_count_up_to_their_last_target():
    (batch,) = dataset(lengths=(5, 9), batch_size=2).epoch_batches()
    batch["target_mask"][1, 7:] = False
    assert list(document_lengths(batch)) == [5, 7]
    batch["target_mask"][0] = False  # as a row that fills a batch up
    assert list(document_lengths(batch)) == [0, 7]


def test_a_packed_run_counts_the_work_of_an_unpacked_one():
    found = []
    for packing in (False, True):
        rows = dict(lengths=(5, 9, 30), seq_len=64, packing=packing)
        data = dataset(batch_size=1 if packing else 3, **rows)
        data._targets[11:14] = False  # the second document's last ones
        data._targets[:2] = False  # a prompt counts: the loss depends on it
        (batch,) = data.epoch_batches()
        assert sorted(document_lengths(batch)) == [5, 6, 30]
        found.append(trainer().work(batch))
    assert found[0] == found[1]
    # A text's first token is no target.
    assert found[0] == (44 - 3 - 3 - 1, 41, pytest.approx((25 + 36 + 900) / 41))
