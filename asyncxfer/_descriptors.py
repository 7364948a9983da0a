"""Descriptor lists: which bytes of a region a transfer reads or writes, as packed rows, and how users write them.

A list belongs to one region and is checked against its layout once, when it is made; it never changes after
that, so whoever is given one may follow it to memory. ``Indexable`` is what a region, here or at a peer, has to
inherit to be indexed. There is no Python object a row anywhere: rows live in arrays, and the work on them is done
by ``_fast.descriptors``.

Knows the layout of a region and nothing else of it: neither its memory nor where it is.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from asyncxfer._errors import DescriptorError
from asyncxfer._fast import descriptors as fast
from asyncxfer._fast.descriptors import Runs, Uint64s
from asyncxfer._lattice import Index
from asyncxfer._layout import Layout

__all__ = ["DescriptorList", "Index", "Indexable", "Layout", "MemoryKind", "Rows", "column"]

Rows: TypeAlias = "DescriptorList | npt.NDArray[np.integer[Any]] | Sequence[Sequence[int]]"
"""What ``region.rows`` takes: an (n, 2) or (n, 3) array, a sequence of tuples, or a list made earlier."""

_ITERATION_ROWS = 1024


class MemoryKind(enum.StrEnum):
    """The kinds of place that bytes can be in."""

    DRAM = "dram"
    VRAM = "vram"
    FILE = "file"
    OBJECT = "object"

    @property
    def stored(self) -> bool:
        """Whether it is in storage: opened, not registered, and this agent's alone."""
        return self in (MemoryKind.FILE, MemoryKind.OBJECT)


class HasLayout(Protocol):
    """All that a descriptor list knows of its region."""

    @property
    def layout(self) -> Layout: ...


class DescriptorList:
    """Rows of bytes in one region, in the order in which a transfer moves them.

    Made by indexing a region; two lists whose totals agree can be transferred, whatever their row counts.

    Attributes
    ----------
    region : object
        The region, here or at a peer.
    runs : (m,) RUN
        The rows, packed, read-only. A run stands for one row or for many at a constant stride.
    """

    __slots__ = ("_measured", "region", "runs")

    region: HasLayout
    runs: Runs

    def __init__(self, region: HasLayout, runs: Runs) -> None:
        # Takes over `runs`, which has to lie inside the region already: `build` is the way in for anything else.
        runs.setflags(write=False)
        self.region = region
        self.runs = runs
        self._measured: tuple[int, int] | None = None

    @classmethod
    def build(cls, region: HasLayout, runs: Runs) -> DescriptorList:
        """A list of rows from anywhere, taken over and checked against the region.

        Parameters
        ----------
        region : object with a `layout`
        runs : (m,) RUN

        Raises
        ------
        DescriptorError
            A row is not inside its segment; says which.
        """
        row = fast.check(runs, region.layout.sizes)
        if row >= 0:
            raise DescriptorError(_outside(runs, row, region.layout))
        return cls(region, runs)

    def _measure(self) -> tuple[int, int]:
        if self._measured is None:
            self._measured = fast.measure(self.runs)
        return self._measured

    def __len__(self) -> int:
        return self._measure()[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all rows together."""
        return self._measure()[1]

    def rows(self) -> Uint64s:
        """Every row spelled out.

        Returns
        -------
        (n, 3) uint64
            Offset in bytes, length in bytes, segment.
        """
        return fast.to_rows(self.runs)

    def _like(self, runs: Runs) -> DescriptorList:
        """A list of some of the same bytes, in rows that lie inside the region already."""
        return DescriptorList(self.region, runs)

    def sorted(self) -> DescriptorList:
        """The same rows in the order of their segment and offset."""
        return self._like(fast.sort(self.runs))

    def merged(self) -> DescriptorList:
        """The same bytes in the same order, with rows that follow one another in list and memory made one."""
        return self._like(fast.merge(self.runs))

    def folded(self) -> DescriptorList:
        """The same rows in the same order, with regular patterns held as one run."""
        return self._like(fast.fold(self.runs))

    def split(self, size: int) -> DescriptorList:
        """The same bytes in the same order, in rows of at most `size` bytes.

        Parameters
        ----------
        size : int, bytes

        Raises
        ------
        DescriptorError
            `size` is less than 1.
        """
        if size < 1:
            raise DescriptorError(f"rows cannot be split into pieces of {size} bytes; give a size of at least 1")
        return self._like(fast.split(self.runs, min(size, 2**63)))

    def select(self, indices: npt.ArrayLike) -> DescriptorList:
        """Some of the rows, in any order, as often as they are named.

        Parameters
        ----------
        indices : (k,) int
            Negative ones count from the end.

        Raises
        ------
        DescriptorError
            There is no such row.
        """
        array = np.asarray(indices)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise DescriptorError(
                f"rows are selected by a flat array of integers, got {array.dtype} of shape {array.shape}"
            )
        try:
            return self._like(fast.select(self.runs, np.ascontiguousarray(array, dtype=np.int64)))
        except IndexError as error:
            raise DescriptorError(str(error)) from error

    def __add__(self, other: DescriptorList) -> DescriptorList:
        if not isinstance(other, DescriptorList):
            return NotImplemented
        if other.region is not self.region:
            raise DescriptorError("only lists of the same region can be added; a transfer has one region a side")
        return self._joined(other)

    def _joined(self, other: DescriptorList) -> DescriptorList:
        return DescriptorList(self.region, np.concatenate((self.runs, other.runs)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DescriptorList):
            return NotImplemented
        if other.region is not self.region or self._measure() != other._measure():
            return False
        return bool(np.array_equal(self.runs, other.runs) or np.array_equal(self.rows(), other.rows()))

    __hash__ = None  # type: ignore[assignment]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for start in range(0, len(self.runs), _ITERATION_ROWS):
            for offset, length, stride, count, _ in self.runs[start : start + _ITERATION_ROWS].tolist():
                for k in range(count):
                    yield offset + k * stride, length

    def __repr__(self) -> str:
        return f"<DescriptorList of {len(self)} rows, {self.nbytes} bytes>"


class Indexable:
    """What a region inherits so that indexing it gives descriptor lists; needs only its layout."""

    __slots__ = ()

    layout: Layout

    def __getitem__(self, key: Index) -> DescriptorList:
        """The rows that a numpy index over the region's shape selects, in numpy's order.

        Raises
        ------
        DescriptorError
            The index does not fit the shape.
        """
        return DescriptorList(self, self.layout.index(key))

    @property
    def bytes(self) -> ByteRanges:
        """Byte ranges by slice: ``region.bytes[offset:offset + n]``."""
        return ByteRanges(self)

    def descriptors(
        self, offsets: npt.ArrayLike, lengths: npt.ArrayLike, *, segments: npt.ArrayLike | None = None,
        keys: str | Sequence[str] | None = None,
    ) -> DescriptorList:  # fmt: skip
        """Rows from columns.

        Parameters
        ----------
        offsets : (n,) int, bytes
            From the start of the row's segment.
        lengths : (n,) int or int, bytes
            One length for all, or one a row.
        segments : (n,) int or int, optional
            For a region that is a list of arrays: which of them. The first by default.
        keys : sequence of str, or str, optional
            For a region of objects, which needs it: one a row, or one for all.

        Raises
        ------
        DescriptorError
            A row is not inside the region, or the columns are not integers of one length.
        """
        if keys is not None:
            raise DescriptorError("keys= is for a region of objects; this one is indexed by offsets")
        starts = column(offsets, "offsets", None)
        columns = [starts, column(lengths, "lengths", len(starts))]
        if segments is not None:
            columns.append(column(segments, "segments", len(starts)))
        return DescriptorList.build(self, fast.from_arrays(*columns))

    def rows(self, rows: Rows) -> DescriptorList:
        """Rows from an array or a sequence of (offset, length) or (offset, length, segment).

        Parameters
        ----------
        rows : (n, 2) or (n, 3) int, or DescriptorList
            Bytes from the start of the segment, bytes, number of the segment (0 by default). A list of this region
            is given back as it is.

        Raises
        ------
        DescriptorError
            A row is not inside the region, or this is not a table of integers.
        """
        if isinstance(rows, DescriptorList):
            if rows.region is not self:
                raise DescriptorError(
                    "this descriptor list belongs to another region; make one by indexing this region"
                )
            return rows
        array = _integers(rows, "rows")
        if array.size == 0:
            array = array.reshape(0, 2)
        if array.ndim != 2 or array.shape[1] not in (2, 3):
            raise DescriptorError(f"rows are an (n, 2) or (n, 3) table, got shape {array.shape}")
        return DescriptorList.build(self, fast.from_rows(array))


class ByteRanges:
    """The bytes of a region, to be sliced."""

    __slots__ = ("_region",)

    def __init__(self, region: HasLayout) -> None:
        self._region = region

    def __getitem__(self, key: slice) -> DescriptorList:
        """The rows of one byte range.

        Raises
        ------
        DescriptorError
            The range is not inside the region, or the region is not contiguous.
        """
        return DescriptorList(self._region, self._region.layout.bytes(key))


def _integers(values: object, what: str) -> Uint64s:
    """Any integers as contiguous uint64; negative ones wrap to what no region holds, so that the check names them."""
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise DescriptorError(f"{what} have to be a regular table of integers: {error}") from error
    if array.size and array.dtype.kind not in "iu":
        raise DescriptorError(f"{what} have to be integers, got {array.dtype}")
    if array.dtype != np.uint64:
        array = array.astype(np.int64).view(np.uint64)
    return np.asarray(array, order="C")


def column(values: npt.ArrayLike, what: str, size: int | None) -> Uint64s:
    """Integers as a column of a table of rows: (size,) uint64; one number stands for all where the size is known."""
    array = _integers(values, what)
    if array.ndim == 0 and size is not None:
        return np.full(size, array)
    if array.ndim != 1 or (size is not None and len(array) != size):
        raise DescriptorError(f"{what} have shape {array.shape}, expected ({'n' if size is None else size},)")
    return array


def _outside(runs: Runs, row: int, layout: Layout) -> str:
    bad = fast.select(runs, np.array([row], dtype=np.int64))[0]
    offset, length = (operator.index(bad[name].view(np.int64)) for name in ("offset", "length"))
    segment = int(bad["segment"])
    if segment >= len(layout.segment_sizes):
        return f"row {row} names segment {segment}, but the region has {len(layout.segment_sizes)}"
    place = "the region" if len(layout.segment_sizes) == 1 else f"segment {segment}"
    return (
        f"row {row} (offset {offset}, length {length}) is not inside {place} of {layout.segment_sizes[segment]} bytes"
    )
