"""Metrics: what reaches disk, what does not stop a run, and the numbers that speed is judged by."""

import contextlib
import functools
import json
import re
import resource
import tempfile
import time
import warnings
from pathlib import Path

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.interpreters.partial_eval import dce_jaxpr

from models.llama.formats.hf import to_config
from models.llama.model import LLaMa, init_params
from tests import tiny
from trainers.runs import metrics
from trainers.runs.metrics import MetricsLog
from utils.memory import peak_memory_bytes


def read(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps(folder):
    return [record["step"] for record in read(folder)]


def test_a_record_is_on_disk_when_write_returns_and_has_only_json_in_it(tmp_path):
    seen = []
    record = {"step": np.int64(1), "loss": jnp.float32(1.5), "half": jnp.bfloat16(0.5)}
    record |= {"seconds": {"data": np.float32(0.25)}, "compilations": [("step", 2.0)]}
    record |= {"nan": float("nan"), "inf": jnp.float32(-jnp.inf), "done": np.bool_(True)}
    record |= {"text": "ü", "none": None}
    expected = {"step": 1, "loss": 1.5, "half": 0.5, "seconds": {"data": 0.25}}
    expected |= {"compilations": [["step", 2.0]], "nan": None, "inf": None, "done": True}
    expected |= {"text": "ü", "none": None}
    with MetricsLog(tmp_path / "new" / "run", sinks=[seen.append]) as log:
        log.write(record)
        assert read(tmp_path / "new" / "run") == [expected] == seen
        log.write({"step": 2})
        assert steps(tmp_path / "new" / "run") == [1, 2]


@hypothesis.given(st.data())
@hypothesis.settings(derandomize=True, deadline=None, max_examples=60)
def test_a_resumed_run_leaves_every_step_once_wherever_the_kill_fell(data):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        with MetricsLog(folder) as log:
            for step in range(8):
                log.write({"step": step, "loss": 1 / (1 + step), "text": '}\n{"step": 3}'})
        whole = (folder / "metrics.jsonl").read_bytes()
        cut = data.draw(st.integers(0, len(whole)))
        (folder / "metrics.jsonl").write_bytes(whole[:cut])
        last = whole[:cut].count(b"\n")  # whole lines: a checkpoint is never of a later step
        start = data.draw(st.integers(0, last))
        with MetricsLog(folder, start_step=start) as log:
            for step in range(start, 8):
                log.write({"step": step, "loss": 1 / (1 + step), "text": '}\n{"step": 3}'})
        assert (folder / "metrics.jsonl").read_bytes() == whole
        assert [f.name for f in folder.iterdir()] == ["metrics.jsonl"]


def test_lines_that_are_no_records_are_dropped_on_resume(tmp_path):
    lines = [b'{"step": 0}', b"[1]", b"\xff\x00", b'{"loss": 1}', b'{"step": "0"}', b'{"step": 1}']
    (tmp_path / "metrics.jsonl").write_bytes(
        b"\n".join([*lines, b'{"step": 2}'])
    )  # cut: no newline
    with MetricsLog(tmp_path, start_step=5) as log:
        assert steps(tmp_path) == [0, 1]
        log.write({"step": 5})
        assert steps(tmp_path) == [0, 1, 5]


@contextlib.contextmanager
def one_warning(*words):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert len(caught) == 1, [str(w.message) for w in caught]
    assert all(word in str(caught[0].message) for word in (*words, "training continues"))
    assert Path(caught[0].filename).parent == Path(__file__).parent


@contextlib.contextmanager
def file_size_limit(size):
    """The kernel then writes what fits of a line, as on a disk that gets full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.covers("D29")
def test_a_sink_that_raises_costs_one_warning_and_the_others_nothing(tmp_path):
    seen = []

    def broken(record):
        raise RuntimeError("no terminal")

    with one_warning("RuntimeError", "no terminal"):
        with MetricsLog(tmp_path, sinks=[broken, seen.append, broken]) as log:
            for step in range(3):
                log.write({"step": step})
    assert steps(tmp_path) == [r["step"] for r in seen] == [0, 1, 2]


@pytest.mark.covers("D29")
def test_a_device_without_space_costs_one_warning(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    seen = []
    with one_warning("No space left"):
        with MetricsLog(tmp_path, sinks=[seen.append]) as log:
            for step in range(3):
                log.write({"step": step})
    assert len(seen) == 3


@pytest.mark.covers("D29")
@pytest.mark.parametrize("size", [0, 1, 13, 40])
def test_a_disk_that_is_full_for_a_while_leaves_whole_lines(tmp_path, size):
    with one_warning(), MetricsLog(tmp_path) as log:
        log.write({"step": 0})
        with file_size_limit(len('{"step": 0}\n') + size):
            for step in range(1, 6):
                log.write({"step": step})
        log.write({"step": 9})
    fitted = size // len('{"step": 0}\n')
    assert steps(tmp_path) == [0, *range(1, 1 + fitted), 9]


@pytest.mark.covers("D29")
def test_a_full_disk_does_not_block_tensorboard(tmp_path):
    with one_warning(), MetricsLog(tmp_path, track=("tensorboard",)) as log:
        with file_size_limit(4000):
            for step in range(100):
                log.write({"step": step, "loss": 1.0})


@pytest.mark.covers("D29")
def test_a_closed_log_and_a_folder_that_cannot_be_made_cost_one_warning(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write({"step": 0})
    with one_warning("closed"):
        log.write({"step": 1})
        log.write({"step": 2})
    assert steps(tmp_path) == [0]
    with one_warning("metrics.jsonl"):
        with MetricsLog(tmp_path / "metrics.jsonl") as log:
            log.write({"step": 1})


@pytest.mark.covers("D29")
def test_a_resume_that_cannot_drop_the_old_lines_writes_no_step_twice(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in range(4):
            log.write({"step": step})
    with one_warning():
        with file_size_limit(10), MetricsLog(tmp_path, start_step=2) as log:
            log.write({"step": 2})
        log.write({"step": 3})
    assert steps(tmp_path) == [0, 1, 2, 3]


def test_an_error_of_the_computation_is_not_taken_for_one_of_a_sink(tmp_path):
    gone = jnp.ones(())
    gone.delete()
    with MetricsLog(tmp_path) as log, pytest.raises(RuntimeError, match="deleted"):
        log.write({"step": 0, "loss": gone})


def dot_flops(jaxpr):
    """2 · m · n · k of every dot_general, a scan's as often as it runs."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            lhs = eqn.invars[0].aval.shape
            total += 2 * eqn.outvars[0].aval.size * int(np.prod([lhs[i] for i in contract]))
        inner = [jaxprs for p in eqn.params.values() if (jaxprs := getattr(p, "jaxpr", p)) and p]
        for sub in (p for p in inner if hasattr(p, "eqns")):
            total += dot_flops(sub) * eqn.params.get("length", 1)
    return total


@pytest.mark.parametrize("name", ["gqa", "tied", "head_dim"])
def test_flops_are_those_of_the_products_in_the_gradients_program(name):
    _, hf = tiny.hf_model(name)
    config, T = to_config(hf.config.to_dict()), 96
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    tokens = jnp.zeros((2, T), jnp.int32)

    def loss(trained, frozen):
        return LLaMa(config).apply({"params": frozen | trained}, tokens)[0].sum()

    def count(trained):
        jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(trained, params).jaxpr
        used, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))  # as XLA drops what nobody uses
        return dot_flops(used)

    # One block of queries computes the keys of the future too: twice of what is needed.
    counted = functools.partial(metrics.train_flops_per_token, config, 2 * T)
    assert count(params) == 2 * T * counted()
    if not config.tie_embeddings:
        # As with LoRA, gradients flow through every matrix and to none of them.
        assert count({"embed": params["embed"]}) == 2 * T * counted(lora=True)


def test_the_matmul_peak_is_measured_once_and_near_what_numpy_reaches():
    x = np.ones((1024, 1024), np.float32)
    numpy_seconds = []
    for _ in range(8):
        start = time.perf_counter()
        x @ x
        numpy_seconds.append(time.perf_counter() - start)
    peak = metrics.matmul_peak("float32", seconds=0.2)
    assert 1 / 8 < peak / (2 * 1024**3 / min(numpy_seconds)) < 8
    assert metrics.matmul_peak("float32", seconds=0.2) == peak


def test_the_peak_of_memory_is_at_least_what_is_held_now():
    status = Path("/proc/self/status").read_text()
    now = int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024
    peak = peak_memory_bytes()
    assert now <= peak <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + 2**20
