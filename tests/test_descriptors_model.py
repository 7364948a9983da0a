"""Descriptor lists against models too plain to be wrong.

Indexing is compared with numpy indexing an array that holds, for every element, its own address. The functions on
packed rows are compared with Python integers, row by row or byte by byte.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from asyncxfer._descriptors import DescriptorList, Indexable, Layout
from asyncxfer._errors import DescriptorError
from asyncxfer._fast import descriptors as fast
from asyncxfer._fast.descriptors import Pairs, Runs

SEGMENT = 1 << 40  # in the model, byte `offset` of segment `s` has the address `s * SEGMENT + offset`

Row = tuple[int, int, int]
"""Offset, length, segment."""


class Region(Indexable):
    def __init__(self, layout: Layout) -> None:
        self.layout = layout


# ---- models -------------------------------------------------------------------------------------------------------


def rows_of(runs: Runs) -> list[Row]:
    return [
        (offset + k * stride, length, segment)
        for offset, length, stride, count, segment in runs.tolist()
        for k in range(count)
    ]


def stream(rows: list[Row]) -> list[int]:
    return [segment * SEGMENT + offset + i for offset, length, segment in rows for i in range(length)]


def pair_streams(pairs: Pairs) -> tuple[list[int], list[int]]:
    local, remote = [], []
    for near, far, length, near_stride, far_stride, count, near_segment, far_segment, _ in pairs.tolist():
        for k in range(count):
            local.append((near + k * near_stride, length, near_segment))
            remote.append((far + k * far_stride, length, far_segment))
    return stream(local), stream(remote)


def addresses(layout: Layout) -> np.ndarray[Any, np.dtype[np.int64]]:
    """For every element its address, in the shape that the layout is indexed by."""
    parts = []
    for segment, (shape, strides, offset) in enumerate(zip(layout.shapes, layout.strides, layout.offsets, strict=True)):
        total = np.full(shape, segment * SEGMENT + offset, dtype=np.int64)
        for axis, places in enumerate(np.indices(shape)):
            total += places * strides[axis]
        parts.append(total)
    return np.stack(parts) if layout.stacked else parts[0]


# ---- strategies ---------------------------------------------------------------------------------------------------


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Arrays in C order, transposed, with gaps, or reversed along some axes; alone or stacked."""
    shape = tuple(draw(st.lists(st.integers(0, 5), min_size=0, max_size=4)))
    itemsize = draw(st.sampled_from([1, 2, 8]))
    order = draw(st.permutations(range(len(shape))))
    strides, step, reversed_bytes = [0] * len(shape), itemsize, 0
    for axis in order if draw(st.booleans()) else reversed(range(len(shape))):
        strides[axis] = step
        step *= max(shape[axis], 1) + draw(st.sampled_from([0, 0, 1]))
        if draw(st.integers(0, 4)) == 0:
            reversed_bytes += strides[axis] * max(shape[axis] - 1, 0)
            strides[axis] = -strides[axis]
    parts = draw(st.sampled_from([None, None, 1, 3]))
    n = parts or 1
    shifts = tuple(reversed_bytes + draw(st.integers(0, 9)) for _ in range(n))
    size = step + 99 + reversed_bytes
    return Layout((size,) * n, (shape,) * n, (tuple(strides),) * n, shifts, itemsize, parts is not None)


@st.composite
def keys(draw: st.DrawFn, shape: tuple[int, ...]) -> Any:
    """Any index numpy takes for the shape: ints, slices, arrays that broadcast, masks, ellipsis, new axes."""
    common = draw(st.sampled_from([(3,), (2, 3), (1,), (0,)]))
    key: list[Any] = []
    axis = 0
    while axis < len(shape) and draw(st.integers(0, 5)):
        size = shape[axis]
        kind = draw(st.sampled_from(["int", "slice", "slice", "array", "array", "list", "mask", "mask2"]))
        if kind == "mask2" and axis + 1 < len(shape) and not _has_arrays(key):
            plane = shape[axis : axis + 2]
            key.append(np.array(draw(_nested(st.booleans(), plane)), dtype=bool).reshape(plane))
            axis += 1
        elif kind == "mask" and not _has_arrays(key):
            key.append(np.array(draw(_nested(st.booleans(), (size,))), dtype=bool))
        elif kind in {"array", "list"} and size and not _has_masks(key):
            dims = draw(st.sampled_from([common, common[-1:], (1,), ()]))
            array = np.array(draw(_nested(st.integers(-size, size - 1), dims)), dtype=np.int32).reshape(dims)
            key.append(array.tolist() if kind == "list" and array.ndim and array.size else array)
        elif kind == "int" and size:
            key.append(draw(st.integers(-size, size - 1)))
        else:
            key.append(draw(st.slices(size)))
        axis += 1
    if draw(st.integers(0, 3)) == 0:
        key.insert(draw(st.integers(0, len(key))), None)
    if draw(st.booleans()):
        _insert_ellipsis(draw, key, shape)
    return key[0] if len(key) == 1 and draw(st.booleans()) else tuple(key)


def _insert_ellipsis(draw: st.DrawFn, key: list[Any], shape: tuple[int, ...]) -> None:
    # Entries after it count axes from the end, where other sizes may stand: only where they all fit.
    used = sum(0 if entry is None else entry.ndim if _is_mask(entry) else 1 for entry in key)
    place = len(key) if used < len(shape) else draw(st.integers(0, len(key)))
    key.insert(place, Ellipsis)


def _nested(elements: st.SearchStrategy[Any], shape: tuple[int, ...]) -> st.SearchStrategy[list[Any]]:
    n = int(np.prod(shape, dtype=int))
    return st.lists(elements, min_size=n, max_size=n)


def _is_mask(entry: object) -> bool:
    return isinstance(entry, np.ndarray) and entry.dtype == np.bool_


def _has_masks(key: list[Any]) -> bool:
    return any(_is_mask(entry) for entry in key)


def _has_arrays(key: list[Any]) -> bool:
    return any(isinstance(entry, (list, np.ndarray)) for entry in key)


lengths = st.one_of(st.integers(0, 12), st.sampled_from([4, 8]))
runs = st.lists(
    st.tuples(
        st.integers(200, 400),
        lengths,
        st.one_of(st.integers(-30, 30), st.sampled_from([4, 8])),
        st.integers(0, 5),
        st.integers(0, 1),
    ),
    max_size=12,
).map(lambda rows: np.array(rows, dtype=fast.RUN))

# Rows that often touch or lie at equal distances, which is where merging and folding have work to do.
regular_runs = st.lists(
    st.tuples(
        st.integers(0, 12).map(lambda n: 4 * n),
        st.sampled_from([4, 4, 4, 8]),
        st.sampled_from([4, 8]),
        st.sampled_from([1, 1, 1, 2, 3]),
        st.just(0),
    ),
    max_size=16,
).map(lambda rows: np.array(rows, dtype=fast.RUN))
any_runs = st.one_of(runs, regular_runs)


# ---- indexing -----------------------------------------------------------------------------------------------------


@given(data=st.data(), layout=layouts())
def test_an_index_selects_the_bytes_that_numpy_would_in_its_order(data: st.DataObject, layout: Layout) -> None:
    model = addresses(layout)
    key = data.draw(keys(model.shape))
    expected = [int(start) + i for start in model[key].ravel() for i in range(layout.itemsize)]
    selected = Region(layout)[key]
    assert stream(rows_of(selected.runs)) == expected
    assert selected.nbytes == len(expected)
    assert fast.check(selected.runs, layout.sizes) == -1


between = st.sampled_from([0, slice(None), slice(None, None, -2), None, Ellipsis])


@given(st.lists(st.one_of(between, st.just([1, 0, 1]), st.just([[1], [0]])), min_size=2, max_size=6))
def test_arrays_side_by_side_stay_in_place_and_parted_ones_go_first(entries: list[Any]) -> None:
    key = tuple(entry for i, entry in enumerate(entries) if entry is not Ellipsis or Ellipsis not in entries[:i])
    assume(sum(entry is not None and entry is not Ellipsis for entry in key) <= 4)
    layout = Layout.of((2, 3, 2, 4), 1)
    assert stream(rows_of(layout.index(key))) == addresses(layout)[key].ravel().tolist()


@given(data=st.data(), shape=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple))
def test_an_index_is_refused_exactly_when_numpy_refuses_it(data: st.DataObject, shape: tuple[int, ...]) -> None:
    entry = st.one_of(
        st.integers(-6, 6),
        st.lists(st.integers(-6, 6), min_size=1, max_size=3),
        st.lists(st.booleans(), min_size=1, max_size=4),
        st.slices(4),
        st.just(Ellipsis),
        st.none(),
    )
    key = tuple(data.draw(st.lists(entry, max_size=4)))
    layout = Layout.of(shape, 1)
    try:
        expected = addresses(layout)[key].ravel().tolist()
    except IndexError:
        with pytest.raises(DescriptorError):
            layout.index(key)
        return
    # numpy lets a wrong index pass beside an array that is empty; here it is refused there too.
    with contextlib.suppress(DescriptorError) if not expected else contextlib.nullcontext():
        assert stream(rows_of(layout.index(key))) == expected


@given(layout=layouts(), start=st.integers(0, 40), size=st.integers(0, 40))
def test_a_byte_range_counts_straight_through_the_parts(layout: Layout, start: int, size: int) -> None:
    n = len(layout.shapes)
    packed = Layout.of(layout.shapes[0], layout.itemsize, parts=n if layout.stacked else None)
    everything = stream([(0, size, segment) for segment, size in enumerate(packed.segment_sizes)])
    assume(start + size <= len(everything))
    assert stream(rows_of(Region(packed).bytes[start : start + size].runs)) == everything[start : start + size]


# ---- rows ---------------------------------------------------------------------------------------------------------


@given(any_runs)
def test_reading_gives_every_row(runs: Runs) -> None:
    rows = rows_of(runs)
    assert fast.to_rows(runs).tolist() == [list(row) for row in rows]
    assert rows_of(fast.unfold(runs)) == rows
    assert set(fast.unfold(runs)["count"].tolist()) <= {1}
    assert fast.measure(runs) == (len(rows), sum(length for _, length, _ in rows))
    assert fast.row_ends(runs).tolist() == list(itertools.accumulate(length for _, length, _ in rows))


@given(any_runs)
def test_folding_keeps_every_row_and_never_grows(runs: Runs) -> None:
    folded = fast.fold(runs)
    assert rows_of(folded) == rows_of(runs)
    assert len(folded) <= len(runs)


@given(st.integers(3, 50), st.integers(-40, 40), st.integers(0, 2), st.integers(0, 2))
def test_folding_finds_a_pattern_between_other_rows(n: int, stride: int, before: int, after: int) -> None:
    pattern = [(2000 + k * stride, 8, 0, 1, 0) for k in range(n)]
    rows = [(5 * k * k, 3, 0, 1, 0) for k in range(before)] + pattern + [(7 * k * k, 5, 0, 1, 0) for k in range(after)]
    assert len(fast.fold(np.array(rows, dtype=fast.RUN))) == before + 1 + after


@given(any_runs)
def test_merging_keeps_the_stream_and_leaves_nothing_to_merge(runs: Runs) -> None:
    merged = fast.merge(runs)
    rows = rows_of(merged)
    assert stream(rows) == stream(rows_of(runs))
    assert all(length for _, length, _ in rows)
    assert not any(a[2] == b[2] and a[0] + a[1] == b[0] for a, b in itertools.pairwise(rows))
    assert len(merged) <= 2 * len(runs)


@given(any_runs)
def test_sorting_is_a_stable_sort_by_place(runs: Runs) -> None:
    assert rows_of(fast.sort(runs)) == sorted(rows_of(runs), key=lambda row: (row[2], row[0]))


@given(any_runs, st.integers(1, 15))
def test_splitting_cuts_each_row_on_its_own(runs: Runs, size: int) -> None:
    expected = [
        (offset + at, min(size, length - at), segment)
        for offset, length, segment in rows_of(runs)
        for at in (range(0, length, size) if length else [0])
    ]
    assert rows_of(fast.split(runs, size)) == expected


sparse_runs = st.lists(st.tuples(lengths, lengths, st.just(0), st.integers(0, 1), st.just(0)), max_size=6).map(
    lambda rows: np.array(rows, dtype=fast.RUN)
)


@given(st.one_of(any_runs, sparse_runs), st.data())
def test_selecting_is_indexing_the_rows(runs: Runs, data: st.DataObject) -> None:
    rows = rows_of(runs)
    n = len(rows)
    indices = data.draw(st.lists(st.integers(-n, n - 1), max_size=20)) if n else []
    assert rows_of(fast.select(runs, np.array(indices, dtype=np.int64))) == [rows[index] for index in indices]
    with pytest.raises(IndexError, match=f"row {n} does not exist"):
        fast.select(runs, np.array([n], dtype=np.int64))
    with pytest.raises(IndexError, match=f"row {-n - 1} does not exist"):
        fast.select(runs, np.array([-n - 1], dtype=np.int64))


edges = st.one_of(st.integers(0, 40), st.integers(0, 2**64 - 1), st.sampled_from([2**63, 2**64 - 1, 2**64 - 8]))
signed_edges = st.one_of(st.integers(-20, 20), st.integers(-(2**63), 2**63 - 1), st.just(-(2**63)))
extreme_run = st.tuples(edges, edges, signed_edges, st.integers(0, 6), st.integers(0, 3))


@given(st.lists(extreme_run, max_size=6), st.lists(edges, max_size=3))
@example([(2**64 - 8, 8, 8, 2, 0)], [2**64 - 1])
@example([(0, 8, -(2**63), 3, 0)], [2**64 - 1])
def test_the_check_agrees_with_integers_that_cannot_overflow(rows: list[tuple[int, ...]], sizes: list[int]) -> None:
    runs = np.array(rows, dtype=fast.RUN)
    expected = next(
        (
            row
            for row, (offset, length, segment) in enumerate(rows_of(runs))
            if segment >= len(sizes) or offset < 0 or offset + length > sizes[segment]
        ),
        -1,
    )
    assert fast.check(runs, np.array(sizes, dtype=np.uint64)) == expected


@given(st.lists(extreme_run, max_size=6))
def test_measuring_agrees_with_integers_that_cannot_overflow(rows: list[tuple[int, ...]]) -> None:
    runs = np.array(rows, dtype=fast.RUN)
    nbytes = sum(length for _, length, _ in rows_of(runs))
    if nbytes < 2**64:
        assert fast.measure(runs) == (len(rows_of(runs)), nbytes)
    else:
        with pytest.raises(ValueError, match="more than 2"):
            fast.measure(runs)


# ---- pairs --------------------------------------------------------------------------------------------------------


def with_total(runs: Runs, total: int) -> Runs:
    """The runs and, if they are short of the total, one more row."""
    short = total - fast.measure(runs)[1]
    return np.concatenate((runs, np.array([(900, short, 0, 1, 1)], dtype=fast.RUN))) if short else runs


@given(any_runs, any_runs, st.booleans())
def test_pairing_matches_the_streams_byte_by_byte(local: Runs, remote: Runs, merge: bool) -> None:
    total = max(fast.measure(local)[1], fast.measure(remote)[1])
    local, remote = with_total(local, total), with_total(remote, total)
    pairs = fast.pair(local, remote, merge)
    assert pair_streams(pairs) == (stream(rows_of(local)), stream(rows_of(remote)))
    assert all(pairs["length"])
    assert all(pairs["count"])
    assert not any(pairs["reserved"])
    assert not any(pairs["local_stride"][pairs["count"] == 1])


@given(any_runs, any_runs)
def test_merging_while_pairing_leaves_nothing_to_merge(local: Runs, remote: Runs) -> None:
    total = max(fast.measure(local)[1], fast.measure(remote)[1])
    pairs = fast.pair(with_total(local, total), with_total(remote, total))
    rows = [
        (near + k * near_stride, far + k * far_stride, length, near_segment, far_segment)
        for near, far, length, near_stride, far_stride, count, near_segment, far_segment, _ in pairs.tolist()
        for k in range(count)
    ]
    for a, b in itertools.pairwise(rows):
        assert not (a[0] + a[2] == b[0] and a[1] + a[2] == b[1] and a[3:] == b[3:])


@given(any_runs, any_runs)
def test_unequal_totals_are_refused_with_both_named(local: Runs, remote: Runs) -> None:
    near, far = fast.measure(local)[1], fast.measure(remote)[1]
    assume(near != far)
    with pytest.raises(ValueError, match=f"local list holds {near} bytes and the remote list {far};"):
        fast.pair(local, remote)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 40), st.integers(0, 3))
def test_many_pieces_of_few_runs_fit(local_length: int, remote_length: int, scale: int, gap: int) -> None:
    # Two runs that interleave into far more pairs than there are runs: the output has to grow.
    def run(length: int, count: int) -> Runs:
        return np.array([(0, length, length + gap, count, 0)], dtype=fast.RUN)

    local, remote = run(local_length, remote_length * scale), run(remote_length, local_length * scale)
    assert pair_streams(fast.pair(local, remote)) == (stream(rows_of(local)), stream(rows_of(remote)))


# ---- lists --------------------------------------------------------------------------------------------------------


@given(any_runs)
def test_a_list_iterates_and_compares_as_its_rows(runs: Runs) -> None:
    region = Region(Layout((10_000,) * 2, ((10_000,),) * 2, ((1,),) * 2, (0, 0), 1, True))
    rows = DescriptorList.build(region, runs.copy())
    assert list(rows) == [(offset, length) for offset, length, _ in rows_of(runs)]
    assert rows == rows.folded() == region.rows(rows.rows())
    assert len(rows + rows) == 2 * len(rows)
    assert (rows + rows).nbytes == 2 * rows.nbytes
