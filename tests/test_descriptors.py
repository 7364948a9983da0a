"""Descriptor lists as users write and read them: what an index gives, what is refused, and how it says so."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from asyncxfer._descriptors import DescriptorList, Indexable, Layout, MemoryKind
from asyncxfer._errors import DescriptorError
from asyncxfer._fast import descriptors as fast

LAYER, BLOCK = 8 * 4096, 4096


class Region(Indexable):
    def __init__(self, layout: Layout) -> None:
        self.layout = layout


@pytest.fixture
def cache() -> Region:
    """A KV cache of 4 layers and 8 blocks of 4 KiB."""
    return Region(Layout.of((4, 8, 2, 16, 64), 2))


@pytest.fixture
def layers() -> Region:
    """The same cache as a list of 4 arrays."""
    return Region(Layout.of((8, 2, 16, 64), 2, parts=4))


def rows(selected: DescriptorList) -> list[tuple[int, ...]]:
    return [tuple(row) for row in selected.rows().tolist()]


# ---- what an index gives ------------------------------------------------------------------------------------------


def test_blocks_of_every_layer_are_a_row_each_in_the_order_of_numpy(cache: Region) -> None:
    selected = cache[:, [3, 7, 1]]
    assert rows(selected) == [(layer * LAYER + block * BLOCK, BLOCK, 0) for layer in range(4) for block in (3, 7, 1)]
    assert len(selected) == 12
    assert selected.nbytes == 12 * BLOCK


def test_neighbouring_blocks_named_one_by_one_stay_rows_of_their_own(cache: Region) -> None:
    assert len(cache[0, [2, 3, 4]]) == 3
    assert rows(cache[0, 2:5]) == [(2 * BLOCK, 3 * BLOCK, 0)]
    assert rows(cache[0, [2, 3, 4]].merged()) == [(2 * BLOCK, 3 * BLOCK, 0)]


def test_a_slice_with_a_step_is_one_run_however_many_rows(cache: Region) -> None:
    selected = cache[:, ::2]
    assert len(selected) == 16
    assert len(selected.runs) == 1


def test_a_whole_contiguous_region_is_one_row(cache: Region) -> None:
    assert rows(cache[...]) == rows(cache[:]) == rows(cache.bytes[:]) == [(0, 4 * LAYER, 0)]


def test_a_list_of_arrays_is_indexed_as_one_array_with_a_segment_a_part(layers: Region) -> None:
    assert layers.layout.shape == (4, 8, 2, 16, 64)
    assert rows(layers[1:3, [5, 0]]) == [(5 * BLOCK, BLOCK, 1), (0, BLOCK, 1), (5 * BLOCK, BLOCK, 2), (0, BLOCK, 2)]
    assert rows(layers[-1, 2]) == [(2 * BLOCK, BLOCK, 3)]
    assert rows(layers.bytes[LAYER - 8 : LAYER + 8]) == [(LAYER - 8, 8, 0), (0, 8, 1)]


def test_arrays_of_unequal_shape_are_indexed_one_at_a_time() -> None:
    region = Region(Layout((8, 12), ((4,), (6,)), ((2,), (2,)), (0, 0), 2, True))
    assert region.layout.shape is None
    assert rows(region[1, [5, 0]]) == [(10, 2, 1), (0, 2, 1)]
    assert rows(region[0]) == [(0, 8, 0)]
    with pytest.raises(DescriptorError, match="first index must be an int"):
        region[:]
    with pytest.raises(DescriptorError, match="index 2 is out of bounds for axis 0, which has size 2"):
        region[2]


@pytest.mark.parametrize("key", [np.s_[0:0], np.s_[:, []], np.s_[:, np.zeros(8, dtype=bool)]])
def test_a_selection_may_be_empty(cache: Region, key: Any) -> None:
    assert len(cache[key]) == 0
    assert cache[key].nbytes == 0


def test_numpy_scalars_and_every_integer_type_are_indices(cache: Region) -> None:
    expected = rows(cache[1, [3]])
    for dtype in (np.int8, np.uint16, np.int64, np.uint64):
        assert rows(cache[dtype(1), np.array([3], dtype=dtype)]) == expected


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (np.s_[:, 8], "index 8 is out of bounds for axis 1, which has size 8"),
        (np.s_[:, [0, -9]], "index -9 is out of bounds for axis 1, which has size 8"),
        (np.s_[:, np.array([2**64 - 1], dtype=np.uint64)], "index 18446744073709551615 is out of bounds for axis 1"),
        (np.s_[0, 0, 0, 0, 0, 0], "6 indices are too many for a region of 5 axes"),
        (np.s_[..., 0, ...], "only once"),
        (np.s_[:, np.ones(7, dtype=bool)], r"mask of shape \(7,\) cannot choose from axis 1 on, of shape \(8,\)"),
        (np.s_[[0, 1], [0, 1, 2]], r"shapes \(2,\), \(3,\) do not fit together"),
        (np.s_[:, 1.5], "axis 1 cannot be indexed by float of float64"),
        (np.s_[True], "a single bool"),
        (np.s_["a":], "cannot be an index"),
        (np.s_[::0], "cannot be an index"),
    ],
)
def test_a_wrong_index_is_refused_with_axis_value_and_size(cache: Region, key: Any, message: str) -> None:
    with pytest.raises(DescriptorError, match=message):
        cache[key]


# ---- rows from elsewhere ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "table",
    [
        [(0, 8), (100, 4)],
        np.array([[0, 8], [100, 4]], dtype=np.int64),
        np.array([[0, 8], [100, 4]], dtype=np.uint64),
        np.array([[0, 8], [100, 4]], dtype=np.int32),
        np.array([[0, 100], [8, 4]]).T,
        [(0, 8, 0), (100, 4, 0)],
    ],
)
def test_rows_come_from_any_table_of_integers(cache: Region, table: Any) -> None:
    assert rows(cache.rows(table)) == [(0, 8, 0), (100, 4, 0)]
    assert list(cache.rows(table)) == [(0, 8), (100, 4)]


def test_rows_take_a_list_of_the_same_region_as_it_is(cache: Region, layers: Region) -> None:
    selected = cache[:, [1]]
    assert cache.rows(selected) is selected
    with pytest.raises(DescriptorError, match="belongs to another region"):
        layers.rows(selected)


def test_rows_come_from_columns_and_one_length_serves_all(layers: Region) -> None:
    assert rows(layers.descriptors([0, 64], [4, 8])) == [(0, 4, 0), (64, 8, 0)]
    assert rows(layers.descriptors(np.array([0, 64]), 16, segments=[3, 1])) == [(0, 16, 3), (64, 16, 1)]
    assert len(layers.descriptors([], [])) == len(layers.rows([])) == 0


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([(0, 8), (LAYER - 7, 8)], rf"row 1 \(offset {LAYER - 7}, length 8\) is not inside segment 0 of {LAYER} bytes"),
        ([(-8, 8)], r"row 0 \(offset -8, length 8\)"),
        ([(0, 8), (8, -1)], r"row 1 \(offset 8, length -1\)"),
        ([(2**63, 2**63)], "row 0"),
        ([(0, 8, 4)], "row 0 names segment 4, but the region has 4"),
        ([(0, 8, -1)], "row 0 names segment"),
        ([(0, 8, 2**32)], "row 0 names segment"),
        ([(0.5, 8)], "have to be integers, got float64"),
        ([(0, 8), (1,)], "regular table"),
        ([0, 8], r"got shape \(2,\)"),
        ([(0, 8, 0, 0)], r"got shape \(1, 4\)"),
    ],
)
def test_a_wrong_row_is_refused_and_named(layers: Region, table: Any, message: str) -> None:
    with pytest.raises(DescriptorError, match=message):
        layers.rows(table)


def test_columns_of_unequal_length_are_refused(cache: Region) -> None:
    with pytest.raises(DescriptorError, match=r"lengths have shape \(2,\), expected \(3,\)"):
        cache.descriptors([0, 8, 16], [8, 8])


def test_bytes_may_not_reach_past_the_end_nor_into_gaps(cache: Region) -> None:
    for wrong in (slice(0, 4 * LAYER + 1), slice(8, 4), slice(0, 8, 2), slice(-4 * LAYER - 1, None)):
        with pytest.raises(DescriptorError, match=r"bytes"):
            cache.bytes[wrong]
    with pytest.raises(DescriptorError, match="contiguous"):
        Region(Layout.of((4, 4), 1, strides=(8, 1))).bytes[0:4]


# ---- lists --------------------------------------------------------------------------------------------------------


def test_a_list_never_changes(cache: Region) -> None:
    selected = cache[:, [1, 2]]
    with pytest.raises(ValueError, match="read-only"):
        selected.runs["offset"] = 0
    with pytest.raises(AttributeError):
        selected.extra = 1  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="unhashable"):
        hash(selected)


def test_lists_add_compare_sort_split_and_select(cache: Region, layers: Region) -> None:
    selected = cache[0, [5, 1]]
    assert rows(selected + cache[1, 0]) == [(5 * BLOCK, BLOCK, 0), (BLOCK, BLOCK, 0), (LAYER, BLOCK, 0)]
    assert selected.sorted() == cache[0, [1, 5]] != selected
    assert rows(selected.split(3000))[:2] == [(5 * BLOCK, 3000, 0), (5 * BLOCK + 3000, 1096, 0)]
    assert selected.select([-1, 0]) == cache[0, [1, 5]]
    assert repr(selected) == "<DescriptorList of 2 rows, 8192 bytes>"
    assert selected != "a list"
    with pytest.raises(DescriptorError, match="row 2 does not exist: the list has 2 rows"):
        selected.select([2])
    with pytest.raises(DescriptorError, match="flat array of integers"):
        selected.select([0.5])
    with pytest.raises(DescriptorError, match="pieces of 0 bytes"):
        selected.split(0)
    with pytest.raises(DescriptorError, match="same region"):
        selected + layers[0]
    with pytest.raises(TypeError):
        selected + 1  # type: ignore[operator]


def test_memory_kinds_are_their_names() -> None:
    assert [str(kind) for kind in MemoryKind] == ["dram", "vram", "file", "object"]


# ---- layouts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strides", "offset", "size"),
    [((8, 1), 0, 27), ((8, 1), 1, 28), ((-8, 1), 23, 99), ((2**62, 1), 0, 2**63 - 1), ((1,), 0, 99), ((8, 1), 0, -1)],
)
def test_a_layout_that_leaves_its_segment_cannot_exist(strides: tuple[int, ...], offset: int, size: int) -> None:
    with pytest.raises(DescriptorError):
        Layout.of((4, 4), 1, strides=strides, offset=offset, segment_size=size)


def test_a_layout_needs_one_of_everything_a_part() -> None:
    with pytest.raises(DescriptorError, match="one segment, shape, strides and offset a part"):
        Layout((8,), ((8,), (8,)), ((1,), (1,)), (0, 0), 1, True)
    with pytest.raises(DescriptorError, match="has one part, got 2"):
        Layout((8, 8), ((8,), (8,)), ((1,), (1,)), (0, 0), 1, False)
    with pytest.raises(DescriptorError, match="itemsize"):
        Layout.of((8,), 0)


def test_layouts_know_their_size_and_whether_bytes_count_through() -> None:
    gaps = Layout.of((4, 4), 2, strides=(16, 2))
    assert (gaps.nbytes, gaps.segment_sizes, gaps.contiguous) == (32, (56,), False)
    assert Layout.of((3, 4), 2, parts=5).nbytes == 120
    assert Layout.of((1, 4), 2, strides=(999, 2)).contiguous
    assert not Layout.of((4,), 2, segment_size=9).contiguous
    assert Layout.of((4, 0), 2).contiguous


# ---- packed rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("array", [np.zeros(3), np.zeros(3, dtype=fast.PAIR), [(0, 8)], None])
def test_only_arrays_of_runs_are_taken(array: Any) -> None:
    with pytest.raises(TypeError, match="expected a contiguous array of dtype"):
        fast.measure(array)
    with pytest.raises((ValueError, BufferError), match="contiguous"):
        fast.measure(np.zeros(4, dtype=fast.RUN)[::2])


def test_more_rows_in_a_line_than_a_run_can_count_become_several_runs() -> None:
    n = 2**33 + 5
    runs = fast.expand(1, [(n, 2)], base=7)
    assert fast.measure(runs) == (n, n)
    assert runs["offset"].tolist() == [7, 7 + 2 * (2**32 - 1), 7 + 4 * (2**32 - 1)]
    assert fast.measure(fast.split(np.array([(0, n, 0, 1, 0)], dtype=fast.RUN), 1)) == (n, n)
    assert fast.measure(fast.fold(runs)) == (n, n)


def test_strided_lists_pair_into_one_strided_pair() -> None:
    near = np.array([(0, 64, 128, 1_000_000, 0)], dtype=fast.RUN)
    far = np.array([(64, 64, 256, 1_000_000, 1)], dtype=fast.RUN)
    contiguous = np.array([(0, 64_000_000, 0, 1, 0)], dtype=fast.RUN)
    assert fast.pair(near, far).tolist() == [(0, 64, 64, 128, 256, 1_000_000, 0, 1, 0)]
    assert fast.pair(near, contiguous).tolist() == [(0, 0, 64, 128, 64, 1_000_000, 0, 0, 0)]


def test_a_short_list_costs_its_own_size_not_its_bound() -> None:
    merged = fast.merge(fast.expand(64, [np.arange(100_000, dtype=np.int64) * 64]))
    assert len(merged) == 1
    assert sys.getsizeof(merged) < 1000
