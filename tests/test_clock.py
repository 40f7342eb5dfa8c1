"""Seconds by phase, and what XLA compiled in them."""

import time

import jax
import numpy as np
import pytest

from utils.clock import PhaseClock


def test_phases_add_up_until_they_are_taken():
    clock = PhaseClock()
    with clock("data"):
        time.sleep(0.02)
    with clock("step"):
        pass
    with pytest.raises(KeyError), clock("data"):
        time.sleep(0.03)
        raise KeyError
    taken = clock.take().seconds
    assert 0.05 <= taken["data"] < 5 and 0 <= taken["step"] < taken["data"]
    assert clock.take() == ({}, {}, [])


def test_each_compilation_is_counted_once_with_the_shape_that_was_named():
    @jax.jit
    def double(x):
        return x * 2

    arrays = [np.ones(n, np.float32) for n in (3, 5)]
    clock = PhaseClock()
    for x in arrays + arrays:
        with clock("step", f"float32[{len(x)}]"):
            double(x)
    taken = clock.take()
    assert [what for what, _ in taken.compilations] == ["double float32[3]", "double float32[5]"]
    assert all(0 < seconds < 60 for _, seconds in taken.compilations)
    assert taken.compiling == {"step": sum(seconds for _, seconds in taken.compilations)}
    assert 0 < taken.compiling["step"] < taken.seconds["step"]
    assert clock.take() == ({}, {}, [])
    double(np.ones(6, np.float32))  # outside of a phase
    assert [what for what, _ in clock.take().compilations] == ["double"]
    clock.close()
    double(np.ones(7, np.float32))
    assert clock.take() == ({}, {}, [])


def test_a_busy_phase_is_its_seconds_without_compiling_and_without_tracing_if_asked():
    @jax.jit
    def triple(x):
        time.sleep(0.05)  # traced once
        return x * 3

    for tracing in (False, True):
        clock = PhaseClock(tracing=tracing)
        with clock("step"):
            triple(np.ones(3 + tracing, np.float32)).block_until_ready()
            time.sleep(0.02)
        lap = clock.take()
        clock.close()
        assert lap.busy("step") == lap.seconds["step"] - lap.compiling["step"]
        traced = lap.compiling["step"] - sum(seconds for _, seconds in lap.compilations)
        assert (traced > 0.05) == tracing and lap.busy("step") > 0.02
        assert [what for what, _ in lap.compilations] == ["triple"]
