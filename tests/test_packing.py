"""Rows that travel as bytes in a line: what one side packs the other unpacks, and nothing else is touched."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncxfer import DescriptorError
from asyncxfer._fast import engine, packing
from asyncxfer._fast.descriptors import PAIR

SIZES = (4096, 1000)  # of the receiver's segments
engine.guard()

runs = st.tuples(
    st.integers(0, 600),  # local, remote, bytes a row, gap between rows on both sides, rows, remote segment
    st.integers(0, 300),
    st.integers(1, 60),
    st.integers(0, 20),
    st.integers(0, 20),
    st.integers(1, 6),
    st.sampled_from([0, 1]),
)


class Sides:
    """Both sides' memory, and matched rows between them, which lie one after the other at the receiver's."""

    def __init__(self, drawn: list[tuple[int, ...]]) -> None:
        random = np.random.default_rng(len(drawn))
        self.here = random.integers(1, 255, 4096, np.uint8)
        self.there = [np.zeros(size, np.uint8) for size in SIZES]
        self.ways: list[tuple[int, int, int]] = []  # local byte, segment, remote byte
        rows = []
        for local, remote, length, near_gap, far_gap, count, segment in drawn:
            near, far = length + near_gap, length + far_gap
            rows.append((self.here.ctypes.data + local, remote, length, near, far, count, 0, segment, 0))
            self.ways += [
                (local + near * k + i, segment, remote + far * k + i) for k in range(count) for i in range(length)
            ]
        self.pairs = np.array(rows, PAIR)

    def carry(self, skip: int = 0, nbytes: int | None = None, sizes: tuple[int, ...] = SIZES) -> None:
        """Send some of the stream; it begins within the first row."""
        whole = len(self.ways)
        chunk = np.array([0, 0, skip, whole - skip if nbytes is None else nbytes], np.uint64)
        bases = np.array([segment.ctypes.data for segment in self.there], np.uint64)
        packing.carry(self.pairs, chunk, np.array(sizes, np.uint64), bases)


@given(st.lists(runs, min_size=1, max_size=6), st.data())
def test_every_byte_of_a_chunk_goes_where_it_should(drawn: list[tuple[int, ...]], data: st.DataObject) -> None:
    sides = Sides(drawn)
    skip = data.draw(st.integers(0, drawn[0][2] - 1))
    nbytes = data.draw(st.integers(1, len(sides.ways) - skip))
    model = [segment.copy() for segment in sides.there]
    for local, segment, remote in sides.ways[skip : skip + nbytes]:
        model[segment][remote] = sides.here[local]
    sides.carry(skip, nbytes)
    for got, expected in zip(sides.there, model, strict=True):
        assert np.array_equal(got, expected)


@pytest.mark.parametrize(
    ("row", "sizes"),
    [
        ((0, 990, 11, 0, 0, 1, 1), SIZES),  # beyond the end
        ((0, 1 << 40, 8, 0, 0, 1, 0), SIZES),
        ((0, 0, 8, 0, 0, 1, 1), SIZES[:1]),  # of a segment that is not there
        ((0, 2, 8, 0, 0, 1, 0), (4,)),
        ((0, (1 << 64) - 4, 8, 0, 0, 1, 0), SIZES),  # the sum of offset and length is a small number
    ],
)
def test_a_row_outside_is_refused_before_anything_is_touched(row: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    sides = Sides([(0, 0, 8, 0, 0, 1, 0)])
    local, remote, length, _, _, count, segment = row
    outside = np.array([(sides.here.ctypes.data + local, remote, length, 0, 0, count, 0, segment, 0)], PAIR)
    sides.pairs = np.concatenate([sides.pairs, outside])
    sides.ways += [(0, 0, 0)] * length
    with pytest.raises(DescriptorError, match="outside"):
        sides.carry(sizes=sizes)
    assert not any(segment.any() for segment in sides.there)
