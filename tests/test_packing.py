"""Packing: the plan for any lengths, and that packed batches hold every example whole and apart."""

import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.data import DataConfig, Dataset
from trainers.data import Examples
from trainers.packing import pack

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(lengths=LENGTHS)
def test_every_example_once_no_row_too_long_and_best_fit(lengths):
    capacity = 40
    members, offsets = pack(lengths, capacity)
    assert sorted(members) == list(range(len(lengths))) and offsets[-1] == len(lengths)
    rows = [members[a:b].tolist() for a, b in zip(offsets, offsets[1:])]
    assert all(rows)
    sums = [sum(lengths[e] for e in row) for row in rows]
    assert max(sums) <= capacity
    # The plain algorithm, that looks at every row, fills as many rows to the same sums.
    room = []
    for length in sorted(lengths, reverse=True):
        best = min((r for r in room if r >= length), default=capacity)
        if best in room:
            room.remove(best)
        room.append(best - length)
    assert sorted(capacity - r for r in room) == sorted(sums)


def test_packing_is_a_function_of_the_lengths():
    lengths = [random.Random(3).randint(1, 99) for _ in range(500)]
    first, again = pack(lengths, 100), pack(np.array(lengths), 100)
    assert all((a == b).all() for a, b in zip(first, again))
    assert pack([5, 3, 2, 4, 1], 5)[0].tolist() == [0, 3, 4, 1, 2]
    assert pack([5, 3, 2, 4, 1], 5)[1].tolist() == [0, 1, 3, 5]


def test_packing_of_100_000_examples_is_quick_and_tight():
    lengths = np.random.default_rng(0).integers(1, 513, size=100_000)
    start = time.process_time()
    _, offsets = pack(lengths, 512)
    assert time.process_time() - start < 5
    assert lengths.sum() / ((len(offsets) - 1) * 512) > 0.99


@pytest.mark.covers("D8")
@settings(max_examples=100, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(2, 16), min_size=1, max_size=40), seed=st.integers(0, 9))
def test_packed_rows_hold_every_document_whole_and_apart(lengths, seed):
    """Every token has a value of its own here, so that a row tells which document it is from."""
    rng, examples, expected, at = random.Random(seed), Examples(16, "truncate"), {}, 1
    for length in lengths:
        ids = list(range(at, at + length))
        mask = [rng.random() < 0.5 for _ in ids[:-1]] + [True]
        examples.add(ids, mask, is_text=False)
        expected[at] = ids, [False] + mask[1:]
        at += length
    config = DataConfig(seq_len=16, batch_size=3, packing=True)
    data, found = Dataset("data", config, examples, "digest"), {}
    for batch in data.epoch_batches():
        assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
            "tokens": ((3, 16), "int32"),
            "target_mask": ((3, 16), "bool"),
            "segment_ids": ((3, 16), "int32"),
            "positions": ((3, 16), "int32"),
        }
        for tokens, mask, segments, positions in zip(*batch.values()):
            n_segments = segments.max()
            filled = int((segments > 0).sum())
            assert (segments[filled:] == 0).all() and not mask[filled:].any()
            assert (np.diff(segments[:filled]) >= 0).all()
            for segment in range(1, n_segments + 1):
                own = segments == segment
                ids = tokens[own].tolist()
                assert ids[0] not in found
                found[ids[0]] = ids, mask[own].tolist()
                assert positions[own].tolist() == list(range(len(ids)))
    assert found == expected
    assert data.counts["rows"] == len(data) <= len(lengths)
    assert data.counts["targets"] == sum(sum(mask) for _, mask in expected.values())
    assert data.counts["tokens"] == sum(lengths)
