"""Descriptor lists as packed rows; the docstrings that the compiled module leaves to its stub.

``Runs`` and ``Pairs`` are contiguous one-dimensional arrays of ``RUN`` and ``PAIR``.
"""

from collections.abc import Sequence
from typing import TypeAlias, final

import numpy as np
import numpy.typing as npt

Runs: TypeAlias = npt.NDArray[np.void]
Pairs: TypeAlias = npt.NDArray[np.void]
Int64s: TypeAlias = npt.NDArray[np.int64]
Uint64s: TypeAlias = npt.NDArray[np.uint64]
Dim: TypeAlias = tuple[int, int] | Int64s | tuple[Int64s, Int64s]

RUN: np.dtype[np.void]
PAIR: np.dtype[np.void]

@final
class RunView:
    """Rows lent to other Cython modules, which cimport it; of no use to Python."""

    def __new__(cls, array: Runs) -> RunView: ...

@final
class PairView:
    """The same for pairs."""

    def __new__(cls, array: Pairs) -> PairView: ...

def expand(length: int, dims: Sequence[Dim], *, base: int = 0, segment: int = 0) -> Runs:
    """The rows of a lattice.

    Parameters
    ----------
    length : int, bytes
        Of every row.
    dims : sequence, outermost first
        Each affine, (count, stride in bytes); or a table of byte offsets, (n,) int64; or such a table and one of
        segments, (offsets, segments). The innermost, if affine, stays one run.
    base : int, bytes
        Added to every offset; negative where every table makes up for it.
    segment : int
        Of all rows that no table of segments places elsewhere.
    """

def table(indices: Int64s, *, size: int, stride: int) -> Int64s:
    """Byte offsets of indices along an axis, negative ones counted from its end.

    Raises
    ------
    IndexError
        With the first index that is out of range as its only argument.
    """

def from_arrays(offsets: Uint64s, lengths: Uint64s, segments: Uint64s | None = None) -> Runs:
    """Lone rows from columns. Segment numbers that do not fit 32 bits become the largest that does."""

def from_rows(rows: Uint64s) -> Runs:
    """Lone rows from an (n, 2) table of offset and length, or an (n, 3) one that adds the segment."""

def measure(runs: Runs) -> tuple[int, int]:
    """Rows and bytes.

    Raises
    ------
    ValueError
        The bytes do not fit 64 bits.
    """

def check(runs: Runs, segment_sizes: Uint64s) -> int:
    """The index of the first row that is not inside its segment, or -1. Nothing in `runs` can make it overflow."""

def to_rows(runs: Runs) -> Uint64s:
    """Every row as (offset, length, segment): (n, 3) uint64."""

def row_ends(runs: Runs) -> Uint64s:
    """For each row, how many bytes of the stream are done when it is: (n,) uint64."""

def unfold(runs: Runs) -> Runs:
    """The same rows as lone rows."""

def fold(runs: Runs) -> Runs:
    """The same rows in the same order, three or more at a constant stride as one run."""

def merge(runs: Runs) -> Runs:
    """The same bytes in the same order; rows that follow one another in list and memory become one, empty ones go."""

def sort(runs: Runs) -> Runs:
    """The same rows by segment and offset; those of equal place keep their order."""

def split(runs: Runs, size: int) -> Runs:
    """The same bytes in the same order, no row longer than `size` bytes."""

def select(runs: Runs, indices: Int64s) -> Runs:
    """The rows of these indices in this order; negative ones count from the end.

    Raises
    ------
    IndexError
        There is no such row.
    """

def pair(local: Runs, remote: Runs, merge: bool = True) -> Pairs:
    """Matches two lists of the same total, byte by byte in stream order, whatever their rows.

    Regular rows stay one pair where both sides are regular; with `merge`, rows contiguous on both sides become one.

    Raises
    ------
    ValueError
        The totals differ; names both.
    """
