"""A run that was interrupted and gone on with equals one that was not, to the bit."""

import jax
import numpy as np
import pytest

from models.llama.lora import LoRAConfig
from tests.small_runs import curve, dataset, digest, start, trainer
from trainers.runs.checkpoint import Checkpointer
from trainers.loop import Progress, Session, fit
from trainers.runs.metrics import MetricsLog

STEPS = 7
LENGTHS = (5, 9, 30, 12, 70, 8, 21, 100, 33)

# Nine rows by twos: from the fifth step on each epoch starts within a batch. Rows 3 and 6 are skipped.
CASES = {
    "two buckets, skipped updates": (dict(), dict(lengths=LENGTHS, poisoned=(3, 6))),
    "lora, accumulated": (
        dict(lora=LoRAConfig(rank=2), micro_batch_size=1),
        dict(lengths=(12, 30, 9) * 3),
    ),
    "packed, adafactor": (
        dict(optimizer="adafactor", micro_batch_size=1),
        dict(lengths=LENGTHS * 2, packing=True),
    ),
}


def go_on(of, data, folder, stop_at=STEPS):
    """Starts or resumes as train.py does; stops behind the step `stop_at`.

    Returns: digest of the last state, and the position in the data with the counts.
    """
    state, frozen = start(of)
    progress, at = Progress(), 0
    with Checkpointer(folder / "checkpoints") as checkpointer:
        if checkpointer.steps:
            like = jax.eval_shape(lambda: state)
            restored = checkpointer.restore(like)
            state, at = restored.state, restored.step
            progress = Progress(**restored.meta["progress"])
        steps = [at]
        with MetricsLog(
            folder, start_step=at + 1, sinks=[lambda r: steps.append(r["step"])]
        ) as log:
            state, progress = fit(
                of,
                state,
                frozen,
                data,
                eval_data=dataset(lengths=(12, 40), seed=1, packing=data.config.packing),
                log=log,
                checkpointer=checkpointer,
                session=Session(progress=progress, should_stop=lambda: steps[-1] >= stop_at),
            )
    return digest(state), progress


@pytest.mark.covers("D24")
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_interrupted_at_every_step(tmp_path, name):
    config, rows = CASES[name]
    of, data = trainer(**config), dataset(**rows)
    whole = go_on(of, data, tmp_path / "whole")
    lines = curve(tmp_path / "whole")
    assert [line["step"] for line in lines if line["updated"]] == list(range(1, STEPS + 1))
    assert (whole[1].skipped > 0) == ("poisoned" in rows)
    position = whole[1].position["rows"]
    assert position > len(data), "the run is longer than an epoch"
    for k in range(STEPS + 1):  # at each step in turn
        last = go_on(of, data, tmp_path / "each", stop_at=k)
    assert last == whole and curve(tmp_path / "each") == lines
    for k in (0, 3, 5) if "poisoned" in rows else ():
        folder = tmp_path / str(k)
        go_on(of, data, folder, stop_at=k)
        assert go_on(of, data, folder) == whole, f"interrupted behind step {k}"
        assert curve(folder) == lines, f"interrupted behind step {k}"


@pytest.mark.slow
@pytest.mark.covers("D24")
def test_an_older_checkpoint_gives_the_same_end_and_the_same_curve(tmp_path):
    """As after a kill: the lines and checkpoints behind the one that is gone on from are redone."""
    of, data = trainer(), dataset(lengths=LENGTHS, poisoned=(3, 6))
    whole = go_on(of, data, tmp_path)
    lines = curve(tmp_path)
    newest = tmp_path / "checkpoints" / f"step-{STEPS:08d}" / "manifest.json"
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="an older one is tried|removes the newer"):
        assert go_on(of, data, tmp_path) == whole
    assert curve(tmp_path) == lines


def test_a_finished_run_is_gone_on_with_no_step(tmp_path):
    of, data = trainer(), dataset(lengths=LENGTHS, poisoned=(3, 6))
    whole, lines = go_on(of, data, tmp_path), curve(tmp_path)
    assert go_on(of, data, tmp_path) == whole and curve(tmp_path) == lines


def test_the_digest_sees_a_bit_a_name_and_a_type():
    """The oracle of this file is one."""
    state, _ = start(trainer())
    seen = {digest(state), digest(state.replace(key=jax.random.key(2)))}
    norm = np.array(state.params["final_norm"])
    norm.view(np.uint32)[0] ^= 1
    seen.add(digest(state.replace(params=state.params | {"final_norm": norm})))
    seen.add(digest(state.replace(step=state.step.astype("int16"))))
    renamed = {f"{name}_": x for name, x in state.params.items()}
    seen.add(digest(state.replace(params=renamed)))
    assert len(seen) == 5
