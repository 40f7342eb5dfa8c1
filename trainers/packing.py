"""Packing: examples of different lengths into rows of one length."""

import bisect
from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit decreasing: the longest example first, each into the fullest row that has room.

    Rows are found by their room, of which there are at most `capacity` values: O(n log capacity).
    The result depends on the lengths alone.

    Args:
        lengths: [n], tokens of each example, from 1 to `capacity`.
        capacity: tokens of a row.

    Returns:
        (members, offsets): row r holds the examples `members[offsets[r]:offsets[r + 1]]`.

    Source: Johnson, "Near-optimal bin packing algorithms" (1973).
    """
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms: list[int] = []  # sorted; those that some row has
    lengths = np.asarray(lengths)
    for example in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[example])
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[at]
            row = by_room[room].pop()
            if not by_room[room]:
                del rooms[at]
        rows[row].append(example)
        left = room - length
        if not by_room[left]:
            bisect.insort(rooms, left)
        by_room[left].append(row)
    members = np.fromiter((e for row in rows for e in row), np.int64, len(lengths))
    offsets = np.cumsum([0] + [len(row) for row in rows], dtype=np.int64)
    return members, offsets
