"""Joining matched rows in any order, against a model that follows every byte."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncxfer._fast import descriptors
from asyncxfer._fast.consolidation import consolidate
from asyncxfer._fast.descriptors import PAIR, Pairs

Byte = tuple[int, int, int, int]
"""Local segment and offset, remote segment and offset."""


def ways(pairs: Pairs) -> Counter[Byte]:
    """Which byte goes where."""
    return Counter(
        (near_segment, near + k * near_stride + i, far_segment, far + k * far_stride + i)
        for near, far, length, near_stride, far_stride, count, near_segment, far_segment, _ in pairs.tolist()
        for k in range(count)
        for i in range(length)
    )


def lone(rows: list[tuple[int, int, int]]) -> Pairs:
    """Rows of one segment: local, remote, length."""
    return np.array([(near, far, length, 0, 0, 1, 0, 0, 0) for near, far, length in rows], PAIR)


def touching(pairs: Pairs) -> bool:
    """Whether any two lone rows, in whatever places, could be one."""
    rows = [row for row in pairs.tolist() if row[5] == 1]
    ends = {(near + length, far + length, *segments) for near, far, length, _, _, _, *segments in rows}
    return any((near, far, *segments) in ends for near, far, _, _, _, _, *segments in rows)


segments = st.sampled_from([0, 0, 0, 1])
offsets = st.one_of(st.integers(0, 20).map(lambda n: 4 * n), st.integers(100, 200))
rows = st.tuples(
    offsets,
    offsets,
    st.sampled_from([4, 4, 4, 8, 3]),
    st.just(0),
    st.just(0),
    st.just(1),
    segments,
    segments,
    st.just(0),
)
strides = st.sampled_from([4, 8, 12, -8])
strided = st.tuples(
    st.integers(200, 300), st.integers(200, 300), st.sampled_from([4, 8]), strides, strides, st.integers(2, 4),
    segments, segments, st.just(0),
)  # fmt: skip
any_pairs = st.lists(st.one_of(rows, rows, rows, strided), max_size=30).map(lambda given: np.array(given, PAIR))


@given(any_pairs)
def test_every_byte_goes_where_it_went(pairs: Pairs) -> None:
    before = pairs.copy()
    joined = consolidate(pairs)
    assert ways(joined) == ways(pairs)
    assert len(joined) <= len(pairs)
    assert (pairs == before).all()
    lone_rows = joined[joined["count"] == 1]
    assert not any(lone_rows["local_stride"]) and not any(lone_rows["remote_stride"])  # noqa: PT018 - one matter


@given(any_pairs)
def test_runs_stay_unless_they_are_dense(pairs: Pairs) -> None:
    runs = [row for row in pairs.tolist() if row[5] > 1 and not row[2] == row[3] == row[4]]
    assert [row for row in consolidate(pairs).tolist() if row[5] > 1] == runs


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 2), st.integers(0, 2)), max_size=40),
    st.integers(1, 3),
    st.randoms(use_true_random=False),
    st.booleans(),
)
def test_rows_that_do_not_overlap_are_joined_completely(
    pieces: list[tuple[int, int, int]], across: int, draw: random.Random, swapped: bool
) -> None:
    near, far, made = 0, 0, []
    for n, (length, near_gap, far_gap) in enumerate(pieces):
        near, far = near + near_gap, far + far_gap
        made.append((near, far, length, 0, 0, 1, n * across // 40, n * across // 50, 0))
        near, far = near + length, far + length
    draw.shuffle(made)
    pairs = np.array(made, PAIR)
    if swapped:
        pairs["local"], pairs["remote"] = pairs["remote"].copy(), pairs["local"].copy()
    joined = consolidate(pairs)
    assert ways(joined) == ways(pairs)
    assert not touching(joined)


@pytest.mark.parametrize("order", ["ascending", "descending", "shuffled"])
def test_blocks_in_any_order_that_are_contiguous_become_one(order: str) -> None:
    blocks = np.arange(20_000, dtype=np.uint64)
    if order == "descending":
        blocks = blocks[::-1].copy()
    if order == "shuffled":
        np.random.default_rng(1).shuffle(blocks)
    column = np.full(len(blocks), 4096, np.uint64)
    runs = descriptors.from_arrays(blocks * np.uint64(4096), column)
    pairs = descriptors.pair(runs, runs)
    assert consolidate(pairs).tolist() == [(0, 0, 20_000 * 4096, 0, 0, 1, 0, 0, 0)]


def test_what_cannot_be_joined_is_given_back_as_it_is() -> None:
    for given_ in (
        np.empty(0, PAIR),
        lone([(0, 0, 4)]),
        lone([(8, 0, 4), (4, 4, 4), (0, 8, 4)]),
        lone([(8, 4, 2), (4, 0, 2), (0, 8, 4)]),
        np.array([(0, 0, 4, 8, 4, 3, 0, 0, 0)], PAIR),
    ):
        assert consolidate(given_) is given_


def test_a_block_got_into_two_segments_is_joined_in_each() -> None:
    pairs = np.array([(4 * n, 4 * n, 4, 0, 0, 1, near, 0, 0) for n in (1, 0, 2) for near in (0, 1)], PAIR)
    assert consolidate(pairs).tolist() == [(0, 0, 12, 0, 0, 1, near, 0, 0) for near in (0, 1)]


def test_dense_runs_are_rows_like_others() -> None:
    pairs = np.array([(12, 12, 4, 4, 4, 3, 0, 0, 0), (0, 0, 12, 0, 0, 1, 0, 0, 0)], PAIR)
    assert consolidate(pairs).tolist() == [(0, 0, 24, 0, 0, 1, 0, 0, 0)]
    assert consolidate(pairs[:1].copy()).tolist() == [(12, 12, 12, 0, 0, 1, 0, 0, 0)]


@pytest.mark.parametrize("top", [0, 2**64 - 12])
def test_offsets_of_all_64_bits_are_sorted(top: int) -> None:
    made = [(top + 4, 2**64 - 8, 4), (8, 16, 4), (top, 2**64 - 12, 4), (16, 2**40, 4), (4, 12, 4)]
    pairs = lone(made)
    joined = consolidate(pairs)
    assert sorted(row[:3] for row in joined.tolist()) == sorted([(4, 12, 8), (16, 2**40, 4), (top, 2**64 - 12, 8)])


def test_other_arrays_are_refused() -> None:
    with pytest.raises(TypeError, match="dtype"):
        consolidate(np.zeros(3, np.uint64))
