"""Layouts: what the bytes of a region look like, and which of them a numpy index means.

A layout is plain numbers: segments of memory, and in each a part with a shape and strides. Several parts of one
shape (a KV cache kept as a list of layers) stack into one array whose first axis chooses the part. A layout
that exists has every element inside its segments, so that whatever its index selects needs no further check.

Knows no memory, no region and no peer: the same layout describes a buffer here and its counterpart at a peer.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field

import numpy as np

from asyncxfer._errors import DescriptorError
from asyncxfer._fast.descriptors import Runs, Uint64s, from_arrays
from asyncxfer._lattice import Axis, Index, PartAxis, StridedAxis, rows_at

__all__ = ["Layout"]

_MAX_BYTES = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the elements of a region lie in its segments.

    Part ``i`` lies in segment ``i``; the last four tuples have one entry a part.

    Attributes
    ----------
    segment_sizes : tuple of int, bytes
    shapes : tuple of tuple of int, elements
    strides : tuple of tuple of int, bytes
    offsets : tuple of int, bytes
        Where element 0 of each part begins in its segment.
    itemsize : int, bytes
    stacked : bool
        Whether the region is a list of parts, so that its first axis chooses among them.

    Raises
    ------
    DescriptorError
        A part reaches outside its segment, or the tuples do not match.
    """

    segment_sizes: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    itemsize: int
    stacked: bool
    sizes: Uint64s = field(init=False, repr=False, compare=False)
    """``segment_sizes`` as an array, for the bounds check of packed rows."""
    _uniform: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        parts = len(self.shapes)
        if not parts == len(self.strides) == len(self.offsets) == len(self.segment_sizes):
            raise DescriptorError(
                f"a layout needs one segment, shape, strides and offset a part, got {len(self.segment_sizes)}, "
                f"{parts}, {len(self.strides)} and {len(self.offsets)}"
            )
        if not self.stacked and parts != 1:
            raise DescriptorError(f"a layout that is not stacked has one part, got {parts}")
        if self.itemsize < 1:
            raise DescriptorError(f"the itemsize must be at least 1 byte, got {self.itemsize}")
        for part in range(parts):
            self._check_part(part)
        same = len(set(self.shapes)) <= 1 and len(set(self.strides)) <= 1
        object.__setattr__(self, "_uniform", same and parts > 0)
        object.__setattr__(self, "sizes", np.array(self.segment_sizes, dtype=np.uint64))

    def _check_part(self, part: int) -> None:
        shape, strides, size = self.shapes[part], self.strides[part], self.segment_sizes[part]
        if len(shape) != len(strides) or min(shape, default=0) < 0 or not 0 <= size <= _MAX_BYTES:
            raise DescriptorError(
                f"part {part} has shape {shape}, strides {strides} and a segment of {size} bytes: expected one "
                f"stride an axis, no negative size and at most {_MAX_BYTES} bytes"
            )
        if 0 in shape:
            return
        reaches = [(count - 1) * stride for count, stride in zip(shape, strides, strict=True)]
        first = self.offsets[part] + sum(reach for reach in reaches if reach < 0)
        end = self.offsets[part] + sum(reach for reach in reaches if reach > 0) + self.itemsize
        if first < 0 or end > size:
            raise DescriptorError(
                f"part {part} (shape {shape}, strides {strides}, offset {self.offsets[part]}) covers bytes "
                f"[{first}, {end}), outside its segment of {size} bytes"
            )

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        itemsize: int,
        *,
        strides: tuple[int, ...] | None = None,
        offset: int = 0,
        segment_size: int | None = None,
        parts: int | None = None,
    ) -> Layout:
        """A layout of one shape: of a single array or, with `parts`, of so many arrays stacked.

        Parameters
        ----------
        shape : tuple of int, elements
            Of one part.
        itemsize : int, bytes
        strides : tuple of int, bytes, optional
            C order by default.
        offset : int, bytes
        segment_size : int, bytes, optional
            By default just what the elements need.
        parts : int, optional

        Raises
        ------
        DescriptorError
            The elements do not fit the segment.
        """
        if strides is None:
            strides = _packed_strides(shape, itemsize)
        if segment_size is None:
            reach = sum((count - 1) * stride for count, stride in zip(shape, strides, strict=False) if stride > 0)
            segment_size = 0 if 0 in shape else offset + reach + itemsize
        n = 1 if parts is None else parts
        return cls((segment_size,) * n, (shape,) * n, (strides,) * n, (offset,) * n, itemsize, parts is not None)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape to index, or None when the parts differ in shape or strides and are indexed one at a time."""
        if not self.stacked:
            return self.shapes[0]
        return (len(self.shapes), *self.shapes[0]) if self._uniform else None

    @property
    def nbytes(self) -> int:
        """Bytes that the elements take, gaps not counted."""
        return self.itemsize * sum(math.prod(shape) for shape in self.shapes)

    @property
    def contiguous(self) -> bool:
        """Whether each part fills its segment in C order, so that bytes count straight through."""
        return all(
            offset == 0 and size == self.itemsize * math.prod(shape) and _is_packed(shape, strides, self.itemsize)
            for shape, strides, offset, size in zip(
                self.shapes, self.strides, self.offsets, self.segment_sizes, strict=True
            )
        )

    def bytes(self, key: slice) -> Runs:
        """The rows of a byte range; the parts of a stacked layout count as one sequence.

        Parameters
        ----------
        key : slice, bytes
            Of step 1. Unlike a slice of a list it may not reach past the end.

        Raises
        ------
        DescriptorError
            The layout has gaps, or the range is not inside it.
        """
        if not self.contiguous:
            raise DescriptorError(
                "bytes[...] needs a contiguous region; index this one by its shape, or give descriptors"
            )
        total = sum(self.segment_sizes)
        start, stop = _byte_range(key, total)
        offsets, lengths, segments = [], [], []
        begin = 0
        for segment, size in enumerate(self.segment_sizes):
            low, high = max(start, begin), min(stop, begin + size)
            if low < high:
                offsets.append(low - begin)
                lengths.append(high - low)
                segments.append(segment)
            begin += size
        return from_arrays(*(np.array(column, dtype=np.uint64) for column in (offsets, lengths, segments)))

    def index(self, key: Index) -> Runs:
        """The rows that a numpy index selects, in the order of numpy's own result.

        A row is as long as the bytes stay contiguous whatever the index: trailing axes taken whole or by a slice
        join it, and an axis indexed by an array never does. So the number of rows follows from the index alone.

        Parameters
        ----------
        key : int, slice, Ellipsis, None, array of int or bool, list, or a tuple of these

        Raises
        ------
        DescriptorError
            The index does not fit the shape; says which axis and value.
        """
        keys = key if isinstance(key, tuple) else (key,)
        if self.stacked and not self._uniform:
            return self._index_part(keys)
        axes: list[Axis] = [StridedAxis(*axis) for axis in zip(self.shapes[0], self.strides[0], strict=True)]
        if not self.stacked:
            return rows_at(axes, keys, base=self.offsets[0], itemsize=self.itemsize)
        return rows_at([PartAxis(self.offsets), *axes], keys, base=0, itemsize=self.itemsize)

    def _index_part(self, keys: tuple[Index, ...]) -> Runs:
        first: Index = keys[0] if keys else None
        parts = len(self.shapes)
        if isinstance(first, bool) or not hasattr(first, "__index__"):
            raise DescriptorError(
                f"the {parts} parts of this region differ in shape or strides, so the first index must be an int "
                f"that chooses one, got {first!r}"
            )
        part = operator.index(first)
        if not -parts <= part < parts:
            raise DescriptorError(f"index {part} is out of bounds for axis 0, which has size {parts}")
        part %= parts
        axes = [StridedAxis(*axis) for axis in zip(self.shapes[part], self.strides[part], strict=True)]
        runs = rows_at(axes, keys[1:], base=self.offsets[part], itemsize=self.itemsize)
        runs["segment"] = part
        return runs


def _packed_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides = [itemsize]
    for count in reversed(shape[1:]):
        strides.append(strides[-1] * count)
    return tuple(reversed(strides[: len(shape)]))


def _is_packed(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    # The stride of an axis of one element is never used, and libraries put anything there.
    packed = _packed_strides(shape, itemsize)
    return 0 in shape or all(
        count == 1 or stride == expected for count, stride, expected in zip(shape, strides, packed, strict=True)
    )


def _byte_range(key: object, total: int) -> tuple[int, int]:
    if not isinstance(key, slice) or key.step not in (None, 1):
        raise DescriptorError(f"bytes[...] takes a slice of step 1, got {key!r}")
    start = 0 if key.start is None else operator.index(key.start)
    stop = total if key.stop is None else operator.index(key.stop)
    start, stop = (end + total if end < 0 else end for end in (start, stop))
    if not 0 <= start <= stop <= total:
        raise DescriptorError(f"bytes [{start}, {stop}) are not inside the region of {total} bytes")
    return start, stop
