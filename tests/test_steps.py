"""What a training run shows while it lasts: phases, lines of numbers, samples, a summary."""

import io
import re
import time

import pytest
import rich.console

from tests import small_runs
from trainers.loop import fit
from trainers.runs.metrics import MetricsLog
from utils.clock import PhaseClock
from utils.console.steps import StepTable


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when it is told to."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def table_of(total=40, terminal=False, **kwargs):
    out = io.StringIO()
    console = rich.console.Console(file=out, force_terminal=terminal, width=120, color_system=None)
    return StepTable(total, console=console, **kwargs), out


def record(step, **more):
    return {"step": step, "loss": 4 / step, "lr": 1e-4, "tokens_per_s": 1234.5, **more}


def test_the_lines_of_supervised_training(clock):
    table, out = table_of(100, evaluates=True)
    with table:
        for step in range(1, 17):
            table(record(step, **({"eval_loss": 3.5} if step == 8 else {})))
            clock[0] += 9
        table(record(17, updated=False, loss=None))
        table(record(100, eval_loss=2.25))
    assert out.getvalue().splitlines() == [
        "   step     loss     eval       lr    tok/s  elapsed     left",
        "      1   4.0000           1.0e-04    1,234     0:00",
        "      4   1.0000           1.0e-04    1,234     0:27    14:24",  # 20 s after the last one
        "      5   0.8000           1.0e-04    1,234     0:36    14:15",  # each twentieth of the run
        "      8   0.5000   3.5000  1.0e-04    1,234     1:03    13:48",
        "     10   0.4000           1.0e-04    1,234     1:21    13:30",
        "     13   0.3077           1.0e-04    1,234     1:48    13:03",
        "     15   0.2667           1.0e-04    1,234     2:06    12:45",
        "     17      nan           1.0e-04    1,234     2:24    12:27  skipped",
        "    100   0.0400   2.2500  1.0e-04    1,234     2:24",
    ]
    assert table.summary(1_700_000_000) == (
        "done in 2:24 · loss 4 → 0.04 · eval 3.5 → 2.25 (best: step 100) · peak memory 1.7 GB"
    )


def test_the_lines_of_grpo_and_a_sample(clock):
    table, out = table_of(4, evaluates=True)
    grpo = dict(reward=0.25, entropy=1.5, length_mean=30.25, truncated=0.6875)
    table({"step": 0, "eval_reward": 0.125, "eval_score": -0.125})
    assert table.wants_sample(1) and not StepTable(100).wants_sample(11)
    table.sample(1, "What is\n1 + 1?", [(0.0, "3\x1b"), (float("nan"), "-"), (1.0, "2 " * 200)])
    table(record(1, **grpo))
    table(record(2, **grpo | {"reward": None}, eval_reward=0.5))
    table(record(3, **grpo, eval_reward=0.25))
    *lines, best, worst, head, first, second, third = out.getvalue().splitlines()
    assert lines == ["before training: eval 0.1250", "  step 1, a prompt  What is 1 + 1?"]
    assert best == "    best +1.000  " + ("2 " * 200)[:240] + " …"
    assert worst == "   worst +0.000  3\ufffd"
    assert head.split() == "step reward eval entropy length truncated lr tok/s elapsed left".split()
    assert first.split()[:5] == ["1", "0.250", "1.500", "30.2", "69%"]
    assert second.split()[:3] == ["2", "nan", "0.5000"]
    assert " reward 0.25 → 0.25 · eval 0.125 → 0.25 (best: step 2)" in table.summary(1)
    table, out = table_of()
    table.sample(1, "1 + 1", [(float("nan"), "2"), (float("nan"), "3")])  # nothing scores them
    assert out.getvalue().splitlines()[1].split() == ["2"]
    with_kl, out = table_of()
    with_kl(record(1, **grpo, kl=0.125))
    assert out.getvalue().split()[:4] == ["step", "reward", "kl", "length"]


def test_a_resumed_run_sums_up_all_of_it(clock):
    table, out = table_of(9, evaluates=True)
    table.remember([record(1, eval_loss=0.5), {"step": 2, "eval_loss": None}])
    table(record(8, eval_loss=0.75))
    assert "loss 4 → 0.5 · eval 0.5 → 0.75 (best: step 1)" in table.summary(1)


def test_each_phase_is_named(clock):
    table, out = table_of()
    phases = PhaseClock(watch=table.watch)
    with table:
        for phase in ("data", "preflight", "rollout", "reward", "step", "eval", "save") * 2:
            with phases(phase, "tokens [8, 64] (preflight)" if phase == "preflight" else ""):
                pass
    phases.close()
    assert out.getvalue().splitlines() == [
        "compiling the step for tokens [8, 64] …",
        "sampling (the first time it compiles) …",
        "scoring …",
        "training …",
        "evaluating (the first time it compiles) …",
        "saving …",
    ]
    table, out = table_of(terminal=True)
    with table:
        table(record(10))
        table.watch("rollout")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "sampling" in shown and "━" in shown and "   0.4000" in shown


def test_a_run_names_its_phases_before_its_lines(tmp_path):
    table, out = table_of(3)
    trainer = small_runs.trainer(max_steps=3)
    state, frozen = small_runs.start(trainer)
    with table, MetricsLog(tmp_path, sinks=[table], watch=table.watch) as log:
        fit(trainer, state, frozen, small_runs.dataset(), log=log)
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("compiling the step for tokens [") and "training …" in lines
    assert [line.split()[0] for line in lines[-4:]] == ["step", "1", "2", "3"]
