"""Numpy indexing without data: from an index over some axes to the packed rows it selects.

An index is walked once and becomes a lattice: a first byte, and the dimensions along which it repeats, each
affine (count, stride) or a table of byte offsets. ``_fast.descriptors.expand`` turns that into rows. All of
numpy's rules are here, among them the odd one: index arrays side by side put their common dimension in their
place, index arrays with anything between them put it first, and an int beside an array counts as an array.

Knows axes, not layouts or regions, and touches no memory but the index arrays.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

from asyncxfer._errors import DescriptorError
from asyncxfer._fast.descriptors import Dim, Int64s, Runs, expand, table

__all__ = ["Axis", "Index", "PartAxis", "StridedAxis", "rows_at"]

Index: TypeAlias = Any
"""What numpy takes between brackets: an int, slice, ``...``, ``None``, array or list of int or bool, or a tuple."""

_Item: TypeAlias = int | slice | Int64s | None
_Bound: TypeAlias = tuple[int, _Item]
"""An item and the axis that it indexes; None is a new axis and indexes none (-1)."""


class Axis(Protocol):
    """One axis: what an int, a slice or an array of indices along it means in bytes and segments."""

    @property
    def size(self) -> int: ...
    def at(self, index: int) -> tuple[int, int]:
        """The byte offset and the segment of one index, both to be added to those of the other axes."""

    def along(self, start: int, step: int, count: int) -> tuple[int, Dim]:
        """The byte offset of the first index of a slice, and the dimension it spans."""

    def table(self, indices: Int64s) -> tuple[Int64s, Int64s | None]:
        """Byte offsets, and segments where the axis chooses them, of any indices; IndexError for a wrong one."""


class StridedAxis:
    """An axis of an array."""

    __slots__ = ("_stride", "size")

    def __init__(self, size: int, stride: int) -> None:
        self.size = size
        self._stride = stride

    def at(self, index: int) -> tuple[int, int]:
        return index * self._stride, 0

    def along(self, start: int, step: int, count: int) -> tuple[int, Dim]:
        return start * self._stride, (count, step * self._stride)

    def table(self, indices: Int64s) -> tuple[Int64s, Int64s | None]:
        return table(indices, size=self.size, stride=self._stride), None


class PartAxis:
    """The first axis of a stack of arrays: it chooses the part, which is a segment of its own."""

    __slots__ = ("_offsets", "size")

    def __init__(self, offsets: Sequence[int]) -> None:
        self.size = len(offsets)
        self._offsets = offsets

    def at(self, index: int) -> tuple[int, int]:
        return self._offsets[index], index

    def along(self, start: int, step: int, count: int) -> tuple[int, Dim]:
        segments = np.arange(count, dtype=np.int64) * step + start
        return 0, (np.array(self._offsets, dtype=np.int64)[segments], segments)

    def table(self, indices: Int64s) -> tuple[Int64s, Int64s | None]:
        segments = table(indices, size=self.size, stride=1)
        return np.array(self._offsets, dtype=np.int64)[segments], segments


def rows_at(axes: Sequence[Axis], key: tuple[Index, ...], *, base: int, itemsize: int) -> Runs:
    """The rows that an index selects, in the order of numpy's own result.

    Parameters
    ----------
    axes : sequence of Axis
    key : tuple
        The index, one entry an axis at most, but for ``...`` and ``None``.
    base : int, bytes
        Where the element of index 0 everywhere lies.
    itemsize : int, bytes

    Raises
    ------
    DescriptorError
        The index does not fit the axes.
    """
    items = _bind(key, [axis.size for axis in axes])
    fancy = any(isinstance(item, np.ndarray) for _, item in items)
    segment, place, last = 0, 0, -1
    dims: list[Dim] = []
    arrays: list[tuple[int, Int64s]] = []
    for position, (number, item) in enumerate(items):
        if item is None:
            continue
        if isinstance(item, slice):
            start, stop, step = _slice_indices(item, axes[number].size)
            offset, dim = axes[number].along(start, step, len(range(start, stop, step)))
            base += offset
            dims.append(dim)
            continue
        if fancy:
            place = len(dims) if last < 0 else place if last == position - 1 else 0
            last = position
        if isinstance(item, int):
            offset, chosen = axes[number].at(item)
            base += offset
            segment += chosen
        else:
            arrays.append((number, item))
    if arrays:
        dims.insert(place, _combine(axes, arrays))
    if any(_count(dim) == 0 for dim in dims):
        return expand(itemsize, [(0, 0)])
    length, dims = _lengthen(dims, itemsize)
    return expand(length, dims, base=base, segment=segment)


def _bind(key: tuple[Index, ...], sizes: Sequence[int]) -> list[_Bound]:
    """Gives every entry of the index its axis; spells out masks, the ellipsis and the axes left unsaid."""
    widths = [_width(entry) for entry in key]
    missing = len(sizes) - sum(widths)
    if missing < 0:
        raise DescriptorError(f"{sum(widths)} indices are too many for a region of {len(sizes)} axes")
    dots = [position for position, entry in enumerate(key) if entry is Ellipsis]
    if len(dots) > 1:
        raise DescriptorError("an index can hold '...' only once")
    items: list[_Bound] = []
    axis = 0
    for entry, width in zip(key, widths, strict=True):
        if entry is Ellipsis:
            # Even an ellipsis that stands for no axis keeps arrays on its two sides apart, as a new axis does.
            items += [(axis + extra, slice(None)) for extra in range(missing)] or [(-1, None)]
            axis += missing
        elif entry is None:
            items.append((-1, None))
        else:
            items += _resolve(entry, axis, sizes)
            axis += width
    items += [(rest, slice(None)) for rest in range(axis, len(sizes))]
    return items


def _width(entry: Index) -> int:
    """How many axes one entry of an index takes, the ellipsis aside."""
    if entry is None or entry is Ellipsis:
        return 0
    dtype = getattr(entry, "dtype", None)
    if isinstance(entry, list):
        dtype = np.asarray(entry).dtype
    return int(np.ndim(entry)) if dtype == np.bool_ else 1


def _resolve(entry: Index, axis: int, sizes: Sequence[int]) -> list[_Bound]:
    """One entry as ints in range, slices and int64 arrays."""
    if isinstance(entry, slice):
        return [(axis, entry)]
    if isinstance(entry, (bool, np.bool_)):
        raise DescriptorError(f"a single bool ({entry}) is no index for axis {axis}; use an int or a mask array")
    if hasattr(entry, "__index__") and np.ndim(entry) == 0:
        return [(axis, _checked(operator.index(entry), axis, sizes[axis]))]
    array = np.asarray(entry)
    if array.dtype == np.bool_:
        return _unmask(array, axis, sizes)
    if array.size == 0 and isinstance(entry, (list, tuple)):
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise DescriptorError(
            f"axis {axis} cannot be indexed by {type(entry).__name__} of {array.dtype}; "
            "use an int, a slice, or an array of integers or bools"
        )
    if array.dtype == np.uint64 and array.size and int(array.max()) >= sizes[axis]:
        raise DescriptorError(_outside(int(array.max()), axis, sizes[axis]))
    return [(axis, np.ascontiguousarray(array, dtype=np.int64))]


def _unmask(mask: np.ndarray[Any, np.dtype[np.bool_]], axis: int, sizes: Sequence[int]) -> list[_Bound]:
    expected = tuple(sizes[axis : axis + mask.ndim])
    if mask.shape != expected or mask.ndim == 0:
        raise DescriptorError(f"a mask of shape {mask.shape} cannot choose from axis {axis} on, of shape {expected}")
    return [(axis + extra, indices.astype(np.int64)) for extra, indices in enumerate(mask.nonzero())]


def _slice_indices(item: slice, size: int) -> tuple[int, int, int]:
    try:
        return item.indices(size)
    except (TypeError, ValueError) as error:
        raise DescriptorError(f"{item} cannot be an index: {error}") from error


def _checked(index: int, axis: int, size: int) -> int:
    if not -size <= index < size:
        raise DescriptorError(_outside(index, axis, size))
    return index % size


def _outside(index: int, axis: int, size: int) -> str:
    return f"index {index} is out of bounds for axis {axis}, which has size {size}"


def _combine(axes: Sequence[Axis], arrays: Sequence[tuple[int, Int64s]]) -> Dim:
    """All index arrays together as one table, in C order of their common shape."""
    shape = _common_shape([indices.shape for _, indices in arrays])
    total: Int64s | None = None
    segments: Int64s | None = None
    for number, indices in arrays:
        try:
            offsets, chosen = axes[number].table(indices.reshape(-1))
        except IndexError as error:
            raise DescriptorError(_outside(int(error.args[0]), number, axes[number].size)) from error
        offsets = offsets.reshape(indices.shape)
        total = offsets if total is None else total + offsets
        if chosen is not None:
            segments = np.broadcast_to(chosen.reshape(indices.shape), shape).ravel()
    assert total is not None
    flat = np.broadcast_to(total, shape).ravel()
    return flat if segments is None else (flat, segments)


def _common_shape(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    try:
        return np.broadcast_shapes(*shapes)
    except ValueError as error:
        raise DescriptorError(f"index arrays of shapes {', '.join(map(str, shapes))} do not fit together") from error


def _count(dim: Dim) -> int:
    if isinstance(dim, tuple):
        first = dim[0]
        return len(first) if isinstance(first, np.ndarray) else first
    return len(dim)


def _lengthen(dims: Sequence[Dim], length: int) -> tuple[int, list[Dim]]:
    """Lets contiguous inner dimensions join the row, and neighbours in step become one dimension."""
    kept: list[Dim] = []
    for dim in reversed(dims):
        if not isinstance(dim, tuple) or isinstance(dim[0], np.ndarray):
            kept.append(dim)
            continue
        count, stride = dim
        inner = kept[-1] if kept else None
        if count == 1:
            continue
        if inner is None and stride == length:
            length *= count
        elif isinstance(inner, tuple) and isinstance(inner[0], int) and stride == inner[0] * inner[1]:
            kept[-1] = (count * inner[0], inner[1])
        else:
            kept.append(dim)
    return length, kept[::-1]
