"""Which rows of a transfer have completed: arithmetic on where rows and chunks end in one stream of bytes.

Nothing is kept for each row until somebody iterates. It knows no transfer, only what it has to ask one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ._fast.completion import STATUS_OK

__all__ = ["Progress"]


class _Stream(Protocol):
    def row_ends(self) -> npt.NDArray[np.uint64]: ...
    def chunk_ends(self) -> npt.NDArray[np.uint64]: ...


class Followed(Protocol):
    """What is asked of a transfer."""

    @property
    def plan(self) -> _Stream:
        """Where rows and chunks end."""

    @property
    def status(self) -> int:
        """How it ended."""

    def done(self) -> bool:
        """Whether it has ended."""

    def marks(self) -> bytes:
        """One byte a chunk, 1 where it has been moved."""


class Progress:
    """Which rows of the local list have completed: chunks of the stream, as they are marked, turned into rows."""

    def __init__(self, transfer: Followed) -> None:
        self._transfer = transfer
        self._chunk_ends = transfer.plan.chunk_ends()
        self._row_ends = transfer.plan.row_ends()
        self._missing = np.diff(self._row_ends, prepend=np.uint64(0))
        self._seen = np.zeros(len(self._chunk_ends), np.bool_)
        self._told = 0

    def _marks(self) -> npt.NDArray[np.bool_]:
        return np.frombuffer(self._transfer.marks(), np.bool_)

    def has_news(self) -> bool:
        """Whether a chunk was marked since the last `fresh`."""
        return int(self._marks().sum()) > int(self._seen.sum())

    def fresh(self) -> Sequence[int]:
        """Rows that have completed since the last call."""
        marks = self._marks()
        if not len(marks):  # moved at once, or by a backend that does not say how far it is
            done = self._transfer.done() and self._transfer.status == STATUS_OK
            rows = range(self._told, len(self._row_ends) if done else self._told)
            self._told = rows.stop
            return rows
        found: list[int] = []
        for chunk in np.flatnonzero(marks & ~self._seen):
            begin = int(self._chunk_ends[chunk - 1]) if chunk else 0
            found.extend(self._rows_in(begin, int(self._chunk_ends[chunk])))
        self._seen |= marks
        return found

    def _rows_in(self, begin: int, end: int) -> Sequence[int]:
        """Take the bytes [begin, end) of the stream off what is missing; the rows that this completes."""
        first = int(np.searchsorted(self._row_ends, begin, side="right"))
        last = int(np.searchsorted(self._row_ends, end, side="left")) + 1
        ends = np.minimum(self._row_ends[first:last], np.uint64(end))
        starts = np.maximum(np.concatenate([self._row_ends[first - 1 : first] if first else [0], ends[:-1]]), begin)
        self._missing[first:last] -= ends - starts.astype(np.uint64)
        return (np.flatnonzero(self._missing[first:last] == 0) + first).tolist()
