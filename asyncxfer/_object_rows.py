"""Descriptor lists of objects: packed rows with a table of keys, and how users write them.

A row's segment is a place in the list's own table of keys. How long an object is, is not known here: rows of byte
ranges are taken as they are, and whole objects are as long as the other side of the transfer says.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import numpy.typing as npt

from ._descriptors import DescriptorList, Indexable, Layout, column
from ._errors import DescriptorError
from ._fast import descriptors as fast
from ._fast.descriptors import Runs, Uint64s

if TYPE_CHECKING:
    from ._descriptors import ByteRanges, Index, Rows

__all__ = ["KeyIndexable", "ObjectRows", "sized"]

_MAX_BYTES = 2**63 - 1


class HasKeys(Protocol):
    """All that a list of objects knows of its region."""

    layout: Layout

    def whole_key(self, key: str) -> str:
        """The key in the bucket; DescriptorError where there can be no such."""


class ObjectRows(DescriptorList):
    """Rows of bytes of objects, in the order in which a transfer moves them.

    Attributes
    ----------
    keys : tuple of str
        Whole keys, as the bucket has them; a row's segment says which.
    whole : bool
        Each row is a whole object.
    unsized : bool
        How long they are is not known yet.
    """

    __slots__ = ("keys", "unsized", "whole")

    keys: tuple[str, ...]
    whole: bool
    unsized: bool

    def __init__(
        self, region: HasKeys, runs: Runs, keys: tuple[str, ...], *, whole: bool = False, unsized: bool = False
    ) -> None:
        super().__init__(region, runs)
        self.keys = keys
        self.whole = whole
        self.unsized = unsized

    @property
    def nbytes(self) -> int:
        """Bytes of all rows together.

        Raises
        ------
        DescriptorError
            They are whole objects, as long as the other side of a transfer says.
        """
        if self.unsized:
            raise DescriptorError(
                "whole objects are as long as the other side of the transfer says; region.objects.head tells how long "
                "one is, and region[key, 0:n] names a range"
            )
        return super().nbytes

    def sized(self, nbytes: int) -> ObjectRows:
        """The same objects, of equal length and so many bytes together; itself where the lengths are known.

        Raises
        ------
        DescriptorError
            So many bytes cannot be shared out evenly.
        """
        if not self.unsized:
            return self
        share, rest = divmod(nbytes, len(self)) if len(self) else (0, nbytes)
        if rest:
            raise DescriptorError(
                f"{nbytes:,} bytes cannot be shared out evenly among {len(self):,} whole objects; transfer those of "
                "one length together"
            )
        runs = self.runs.copy()
        runs["length"] = share
        return ObjectRows(cast(HasKeys, self.region), runs, self.keys, whole=True)

    def split(self, size: int) -> DescriptorList:
        """The same bytes in the same order, in rows of at most `size` bytes.

        Raises
        ------
        DescriptorError
            `size` is less than 1, or these are whole objects.
        """
        if self.whole:
            raise DescriptorError("whole objects cannot be split")
        return super().split(size)

    def _like(self, runs: Runs) -> DescriptorList:
        return ObjectRows(cast(HasKeys, self.region), runs, self.keys, whole=self.whole, unsized=self.unsized)

    def _joined(self, other: DescriptorList) -> DescriptorList:
        assert isinstance(other, ObjectRows)
        if (self.whole, self.unsized) != (other.whole, other.unsized):
            raise DescriptorError("whole objects and byte ranges cannot be in one list; make two transfers")
        runs = np.concatenate((self.runs, other.runs))
        runs["segment"][len(self.runs) :] += np.uint32(len(self.keys))
        return ObjectRows(
            cast(HasKeys, self.region), runs, self.keys + other.keys, whole=self.whole, unsized=self.unsized
        )

    def merged(self) -> DescriptorList:
        """The same bytes in the same order, with rows that follow one another in list and object made one."""
        return self if self.whole else super().merged()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ObjectRows):
            return NotImplemented
        if self.region is not other.region or (self.whole, self.unsized) != (other.whole, other.unsized):
            return False
        mine, theirs = self.rows(), other.rows()
        return np.array_equal(mine[:, :2], theirs[:, :2]) and self._named(mine) == other._named(theirs)

    __hash__ = None

    def _named(self, rows: Uint64s) -> list[str]:
        return [self.keys[segment] for segment in rows[:, 2].tolist()]

    def __repr__(self) -> str:
        if self.whole:
            return f"<DescriptorList of {len(self)} whole objects>"
        return f"<DescriptorList of {len(self)} rows of {len(self.keys)} objects, {self.nbytes} bytes>"


def sized(local: DescriptorList, remote: DescriptorList) -> tuple[DescriptorList, DescriptorList]:
    """Both sides of a transfer, with whole objects as long as the other side says.

    Raises
    ------
    DescriptorError
        They cannot be; or neither side says.
    """
    if isinstance(local, ObjectRows) and local.unsized:
        return local.sized(remote.nbytes), remote
    if isinstance(remote, ObjectRows) and remote.unsized:
        return local, remote.sized(local.nbytes)
    return local, remote


class KeyIndexable(Indexable):
    """What a region of objects inherits to be indexed by keys."""

    __slots__ = ()

    if TYPE_CHECKING:

        def whole_key(self, key: str) -> str:
            """Of `HasKeys`."""

    def __getitem__(self, key: Index) -> DescriptorList:
        """Objects by their keys: ``region[key]``, ``region[keys]``, ``region[keys, a:b]``.

        Parameters
        ----------
        key : str or sequence of str, or (such, slice)
            Whole objects, or the same range of bytes of each, with both of its ends.

        Raises
        ------
        DescriptorError
            It is something else.
        """
        chosen, part = key if isinstance(key, tuple) and len(key) == 2 and isinstance(key[1], slice) else (key, None)
        keys = self._whole_keys(chosen)
        whole = part is None or part == slice(None)
        start, length = (0, 0) if part is None or whole else _range(part)
        runs = np.zeros(len(keys), fast.RUN)
        runs["offset"], runs["length"], runs["count"] = start, length, 1
        runs["segment"] = np.arange(len(keys), dtype=np.uint32)
        return ObjectRows(self, runs, keys, whole=whole, unsized=whole)

    @property
    def bytes(self) -> ByteRanges:
        """Refused.

        Raises
        ------
        DescriptorError
            Always: a region of objects has no bytes of its own.
        """
        raise DescriptorError("a region of objects is indexed by key first: region[key, a:b]")

    def descriptors(
        self, offsets: npt.ArrayLike, lengths: npt.ArrayLike, *, segments: npt.ArrayLike | None = None,
        keys: str | Sequence[str] | None = None,
    ) -> DescriptorList:  # fmt: skip
        """Rows from columns.

        Parameters
        ----------
        offsets : (n,) int, bytes
            From the start of the row's object.
        lengths : (n,) int or int, bytes
            One length for all, or one a row.
        segments : (n,) int or int, optional
            Which of `keys`, which is a table then.
        keys : sequence of str, or str
            Without `segments`, one a row, or one for all.

        Raises
        ------
        DescriptorError
            A row can be in no object, or the columns do not fit together.
        """
        if keys is None:
            raise DescriptorError("rows of objects need keys=")
        starts = column(offsets, "offsets", None)
        table, places = self._whole_keys(keys), segments
        if places is None:
            if len(table) == 1:
                places = 0
            else:
                table, places = _table(table)
        chosen = column(places, "keys" if segments is None else "segments", len(starts))
        runs = fast.from_arrays(starts, column(lengths, "lengths", len(starts)), chosen)
        return self._checked(runs, table)

    def rows(self, rows: Rows | Sequence[tuple[str, int, int]]) -> DescriptorList:
        """Rows from a sequence of (key, offset, length), or a list of this region as it is.

        Raises
        ------
        DescriptorError
            A row can be in no object, or this is no such sequence.
        """
        if isinstance(rows, DescriptorList):
            return super().rows(rows)
        try:
            keys, offsets, lengths = zip(*rows, strict=True) if len(rows) else ((), (), ())
        except (TypeError, ValueError) as error:
            raise DescriptorError(f"rows of objects are a sequence of (key, offset, length): {error}") from error
        return self.descriptors(offsets, lengths, keys=list(cast(tuple[str, ...], keys)))

    def _whole_keys(self, keys: object) -> tuple[str, ...]:
        if isinstance(keys, str):
            return (self.whole_key(keys),)
        if not isinstance(keys, Sequence | np.ndarray) or isinstance(keys, bytes):
            raise DescriptorError(f"a region of objects is indexed by a key, or keys, not by {keys!r}")
        for key in keys:
            if not isinstance(key, str):
                raise DescriptorError(f"a key is a str, not {key!r}")
        return tuple([self.whole_key(str(key)) for key in keys])

    def _checked(self, runs: Runs, table: tuple[str, ...]) -> DescriptorList:
        row = fast.check(runs, np.full(len(table), _MAX_BYTES, np.uint64))
        if row >= 0:
            bad = runs[row]
            raise DescriptorError(
                f"row {row} (offset {int(bad['offset'].view(np.int64))}, length {int(bad['length'].view(np.int64))}, "
                f"key {int(bad['segment'])} of {len(table)}) can be in no object"
            )
        return ObjectRows(self, runs, table)


def _range(part: slice) -> tuple[int, int]:
    try:
        start, stop = operator.index(part.start or 0), operator.index(part.stop)
    except TypeError as error:
        raise DescriptorError(f"{part} names no bytes; expected a:b, as how long an object is, is not known") from error
    if part.step not in (None, 1) or not 0 <= start <= stop <= _MAX_BYTES:
        raise DescriptorError(f"{part} names no bytes; expected a:b with 0 <= a <= b and no step")
    return start, stop - start


def _table(keys: tuple[str, ...]) -> tuple[tuple[str, ...], Uint64s]:
    """Every key once, and for each row its place among them."""
    places: dict[str, int] = {}
    rows = np.array([places.setdefault(key, len(places)) for key in keys], np.uint64)
    return tuple(places), rows
