"""Memory in pieces that is gone through once, in order: a body that is sent, or the place of one that is received."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Pieces"]


class Pieces:
    """A place in a sequence of memory.

    Parameters
    ----------
    views : sequence of memoryview
        Of bytes.

    Attributes
    ----------
    size, passed : int, bytes
        All of it; what is behind the place.
    """

    __slots__ = ("_at", "_index", "_views", "passed", "size")

    def __init__(self, views: Sequence[memoryview]) -> None:
        self._views = views
        self.size = sum([view.nbytes for view in views])
        self.rewind()

    @property
    def left(self) -> int:
        """Bytes before which the place is."""
        return self.size - self.passed

    def rewind(self) -> None:
        """Begin again."""
        self._index = self._at = self.passed = 0

    def upcoming(self, most: int, pieces: int) -> list[memoryview]:
        """Give what comes next, at most so many bytes in so many pieces."""
        found: list[memoryview] = []
        at = self._at
        for index in range(self._index, min(len(self._views), self._index + pieces)):
            view = self._views[index]
            if at or view.nbytes > most:
                view = view[at : at + most]
            found.append(view)
            most -= view.nbytes
            if not most:
                break
            at = 0
        return found

    def advance(self, n: int) -> None:
        """Move on by so many bytes, which are there."""
        self.passed += n
        self._at += n
        views = self._views
        while self._index < len(views) and self._at >= views[self._index].nbytes:
            self._at -= views[self._index].nbytes
            self._index += 1

    def fill(self, data: memoryview) -> None:
        """Copy bytes to what comes next, where there is room for them."""
        while data:
            (target,) = self.upcoming(len(data), 1)
            target[:] = data[: target.nbytes]
            data = data[target.nbytes :]
            self.advance(target.nbytes)
