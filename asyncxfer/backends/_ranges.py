"""A cache of registrations: ranges of memory that are mapped for a device once, however many ask for them.

A range may be shared as long as somebody has held every byte of it from when it was mapped. What nobody holds may be
freed, and something else may stand at its address by the next wish, while the device still knows what stood there: so
a range with such bytes is given to nobody any more, and stays for those alone who have it. For the same reason what
lies between two wishes is never mapped.

It maps nothing itself and knows no device. It is used on one thread.
"""

from __future__ import annotations

import mmap
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from ..abc import RegistrationError

__all__ = ["HOST", "Range", "RangeCache"]

HOST = "host"  # the kind of memory that is mapped by whole pages

H = TypeVar("H")


@dataclass(slots=True, eq=False)
class Range(Generic[H]):
    """Mapped memory, as one of those who asked for it holds it.

    Attributes
    ----------
    handle : object
        What `map_` gave; others may hold the same.
    address : int
        Where it begins, at or below what was asked for.
    nbytes : int
        Of all that is mapped.
    kind : str
    """

    handle: H
    address: int
    nbytes: int
    kind: str
    mapped: _Mapped[H] = field(repr=False)
    wish: tuple[int, int] = field(repr=False)


class RangeCache(Generic[H]):
    """Gives out mapped ranges, and maps what none covers.

    Parameters
    ----------
    map_ : callable
        Maps memory, by address, size in bytes and kind, and gives a handle; or raises RegistrationError.
    unmap : callable
        Takes a handle back.
    """

    def __init__(self, map_: Callable[[int, int, str], H], unmap: Callable[[H], None]) -> None:
        self._map = map_
        self._unmap = unmap
        self._spaces: defaultdict[str, _Space[H]] = defaultdict(_Space)
        self._held: set[Range[H]] = set()

    def __len__(self) -> int:
        """How often ranges are held."""
        return len(self._held)

    def acquire(self, address: int, nbytes: int, kind: str) -> Range[H]:
        """Give a range that covers some memory. The memory has to stay where it is until `release`.

        Host memory is mapped by pages. What has to be mapped takes with it what it touches, unless that is larger: so
        neighbours that come one after the other are not all mapped again for each. Where both cannot be mapped as one
        it is mapped alone.

        Parameters
        ----------
        address : int
        nbytes : int
            At least 1.
        kind : str
            `HOST`, or the name of a device. Kinds have nothing to do with one another.

        Raises
        ------
        RegistrationError
            It cannot be mapped.
        """
        if nbytes < 1:
            raise ValueError(f"{nbytes} bytes at {address:#x} of {kind}; expected at least 1")
        page = mmap.PAGESIZE if kind == HOST else 1
        start, end = address // page * page, -(-(address + nbytes) // page) * page
        space = self._spaces[kind]
        mapped = space.find(start, end)
        if mapped is None:
            mapped = self._make(space, start, end, kind)
            space.add(mapped)
        mapped.holders += 1
        space.holders.enter(start, end)
        held = Range(mapped.handle, mapped.start, mapped.end - mapped.start, kind, mapped, (start, end))
        self._held.add(held)
        return held

    def _make(self, space: _Space[H], start: int, end: int, kind: str) -> _Mapped[H]:
        low, high = space.widened(start, end)
        if (low, high) != (start, end):
            try:
                return _Mapped(low, high, self._map(low, high - low, kind))
            except RegistrationError:
                pass  # neighbours may be of different makes: two files, two allocations of a GPU
        return _Mapped(start, end, self._map(start, end - start, kind))

    def release(self, held: Range[H]) -> None:
        """Give a range back; it is unmapped when nobody else holds it.

        Raises
        ------
        ValueError
            It is not held.
        """
        if held not in self._held:
            raise ValueError(f"{held} was released before, or comes from another cache")
        self._held.remove(held)
        space, mapped = self._spaces[held.kind], held.mapped
        for start, end in space.holders.leave(*held.wish):
            space.retire(start, end)
        mapped.holders -= 1
        if not mapped.holders:
            space.drop(mapped)
            self._unmap(mapped.handle)

    def close(self) -> None:
        """Assert that nothing is held, and so nothing mapped."""
        assert not self._held, f"{len(self._held)} ranges are still held, such as {next(iter(self._held))}"


@dataclass(slots=True, eq=False)
class _Mapped(Generic[H]):
    start: int
    end: int
    handle: H
    holders: int = 0


class _Space(Generic[H]):
    """What is mapped of one kind, and may be shared. None lies inside another, so all are in order by both ends."""

    def __init__(self) -> None:
        self.holders = _Holders()
        self._starts: list[int] = []
        self._shared: list[_Mapped[H]] = []

    def find(self, start: int, end: int) -> _Mapped[H] | None:
        index = bisect_right(self._starts, start) - 1
        return self._shared[index] if index >= 0 and self._shared[index].end >= end else None

    def _touching(self, start: int, end: int) -> slice:
        """Those that overlap with it or end where it begins, or the other way round."""
        return slice(bisect_left(self._shared, start, key=lambda m: m.end), bisect_right(self._starts, end))

    def widened(self, start: int, end: int) -> tuple[int, int]:
        """Add what it touches and what is no larger than itself."""
        low, high = start, end
        for mapped in self._shared[self._touching(start, end)]:
            if mapped.end - mapped.start <= end - start:
                low, high = min(low, mapped.start), max(high, mapped.end)
        return low, high

    def add(self, mapped: _Mapped[H]) -> None:
        """Share it, and in its place none that lies inside it."""
        first = bisect_left(self._starts, mapped.start)
        past = bisect_right(self._shared, mapped.end, key=lambda m: m.end)
        self._starts[first:past] = [mapped.start]
        self._shared[first:past] = [mapped]

    def retire(self, start: int, end: int) -> None:
        """Share none any more that has one of these bytes."""
        first = bisect_right(self._shared, start, key=lambda m: m.end)
        past = bisect_left(self._starts, end)
        del self._starts[first:past], self._shared[first:past]

    def drop(self, mapped: _Mapped[H]) -> None:
        """Share it no more, if it still is."""
        index = bisect_left(self._starts, mapped.start)
        if index < len(self._shared) and self._shared[index] is mapped:
            del self._starts[index], self._shared[index]


class _Holders:
    """How many hold each byte: from each bound to the next, the same number."""

    def __init__(self) -> None:
        self._bounds: list[int] = []
        self._counts: list[int] = []

    def enter(self, start: int, end: int) -> None:
        """One more for these."""
        self._add(start, end, 1)

    def leave(self, start: int, end: int) -> list[tuple[int, int]]:
        """One less; those that nobody holds any more."""
        return self._add(start, end, -1)

    def _add(self, start: int, end: int, change: int) -> list[tuple[int, int]]:
        first, past = self._bound(start), self._bound(end)
        for index in range(first, past):
            self._counts[index] += change
        free = [
            (self._bounds[index], self._bounds[index + 1]) for index in range(first, past) if not self._counts[index]
        ]
        for index in (past, first):
            if self._counts[index] == (self._counts[index - 1] if index else 0):
                del self._bounds[index], self._counts[index]
        return free

    def _bound(self, at: int) -> int:
        """Which bound is here; it is made if need be."""
        index = bisect_left(self._bounds, at)
        if index == len(self._bounds) or self._bounds[index] != at:
            self._bounds.insert(index, at)
            self._counts.insert(index, self._counts[index - 1] if index else 0)
        return index
