"""An answer of HTTP/1.1 as it comes in. It knows no sockets.

Heads, lines and what is gathered are bounded; lengths are compared with what there is room for before anything is
written. Memory of the caller is written in order, and never past its end.

References
----------
RFC 9110, HTTP Semantics; RFC 9112, HTTP/1.1.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from ._http_codec import Head, Malformed
from ._http_pieces import Pieces

__all__ = ["ERROR_BYTES", "Answer", "Incoming", "Misfit"]

#: How much of the body of an answer that is no success is kept.
ERROR_BYTES = 1 << 20
_HEAD_BYTES = 64 << 10
_LINE_BYTES = 4 << 10  # of a chunk's size, with its extensions
_ASK_LINES = 4 << 10  # bytes to ask for where lines are expected: what belongs to a body behind them is copied
_ASK_BODY = 64 << 10  # and where a body is gathered
_STEPS = 64  # lines and pieces that are looked at before others have a turn
_INTERIM = 8  # answers that announce another

_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\0]*)?")


class Misfit(Exception):  # noqa: N818 - whoever knows whose answer it is makes an error of it
    """A body has another length than there is room for."""

    def __init__(self, expected: int, found: int, *, least: bool = False) -> None:
        super().__init__(f"expected {expected} bytes, found {'at least ' if least else ''}{found}")
        self.expected = expected
        self.found = found


class Answer(NamedTuple):
    """What a server answered.

    Attributes
    ----------
    status : int
    headers : dict of bytes to bytes
        By their names in lower case; what came more than once is joined by commas.
    body : bytes
        What was not received into the caller's memory. Of an answer that is no success, the first `ERROR_BYTES`.
    received : int
        Bytes that were received into the caller's memory.
    repeated : bool
        The request was sent twice, since the first connection was found closed.
    """

    status: int
    headers: dict[bytes, bytes]
    body: bytes
    received: int
    repeated: bool = False


class Incoming:
    """One answer as it comes in.

    Bytes are handed to `feed`; where `direct` is not 0, so many may be received into `targets` instead and be counted
    by `received`; the end of the connection is told to `end`. The first of these raises Malformed and Misfit.

    Parameters
    ----------
    asked_for_head : bool
        The request was HEAD: there is no body, whatever the headers say.
    into : Pieces or None
        For the body of a success.
    most : int, bytes
        How long the body of a success may be that is gathered.

    Attributes
    ----------
    done : bool
        The answer is complete.
    begun : bool
        A byte of it has come.
    head : Head or None
        That of the answer itself, not of one that announces it.
    keep : bool
        Whether the connection can be used for another request, once it is done.
    """

    __slots__ = (
        "_asked_for_head", "_at", "_cut", "_gathered", "_interim", "_into", "_left", "_most", "_next",
        "_place", "_searched", "_trailers", "_unread", "begun", "done", "head", "keep",
    )  # fmt: skip

    def __init__(self, *, asked_for_head: bool, into: Pieces | None, most: int) -> None:
        self._asked_for_head = asked_for_head
        self._into = into
        self._most = most
        self._unread = b""
        self._at = 0
        self._searched = 0
        self._interim = 0
        self._trailers = 0
        self._left = 0  # bytes of the body, or of the chunk; -1: until the connection ends
        self._place: Pieces | None = None
        self._gathered = bytearray()
        self._cut = False  # what is too long to be gathered is left out
        self._next: Callable[[Incoming], bool] = Incoming._read_head
        self.begun = False
        self.done = False
        self.keep = False
        self.head: Head | None = None

    # -- what the connection calls

    @property
    def passed(self) -> int:
        """Bytes of the body that have come."""
        return len(self._gathered) if self._place is None else self._place.passed

    @property
    def direct(self) -> int:
        """Bytes that can be received where they belong."""
        if (
            self._place is None
            or self._next is not Incoming._read_body
            or self._at < len(self._unread)
            or self._left < 0
        ):
            return 0
        return self._left

    @property
    def ask(self) -> int:
        """Bytes to ask for, where none can."""
        return _ASK_BODY if self._next is Incoming._read_body else _ASK_LINES

    def targets(self, most: int, pieces: int) -> list[memoryview]:
        """Give where the next bytes belong."""
        assert self._place is not None
        return self._place.upcoming(min(most, self._left), pieces)

    def received(self, n: int) -> None:
        """Count bytes that were received there."""
        assert self._place is not None
        self._place.advance(n)
        self._left -= n
        if not self._left:
            self._end_of_piece()

    def feed(self, data: bytes) -> bool:
        """Take bytes, none to go on with those that are here; whether there are some that could be gone on with."""
        if data:
            self.begun = True
            self._unread = self._unread[self._at :] + data if self._at < len(self._unread) else data
            self._at = 0
        steps = _STEPS
        while steps and not self.done and self._next(self):
            steps -= 1
        return not steps

    def end(self) -> bool:
        """Take the end of the connection; whether that is the end of the answer."""
        if self.head is not None and self._left < 0:
            self._finish()
        return self.done

    def answer(self) -> Answer:
        """Give the answer.

        Raises
        ------
        Misfit
            It is a success that left room in the caller's memory.
        """
        assert self.head is not None
        if self._into is None or self._place is not self._into:
            return Answer(self.head.status, self.head.headers, bytes(self._gathered), 0)
        if self._into.left:
            raise Misfit(self._into.size, self._into.passed)
        return Answer(self.head.status, self.head.headers, b"", self._into.passed)

    # -- steps: each says whether another can be made

    def _line(self, most: int, what: str) -> bytes | None:
        end = self._unread.find(b"\r\n", self._at)
        if (len(self._unread) if end < 0 else end) - self._at > most:
            raise Malformed(f"{what} is longer than {most} bytes")
        if end < 0:
            return None
        line = self._unread[self._at : end]
        self._at = end + 2
        return line

    def _read_head(self) -> bool:
        start = max(self._at, self._searched - 3)
        end = self._unread.find(b"\r\n\r\n", start)
        if (len(self._unread) if end < 0 else end) - self._at > _HEAD_BYTES:
            raise Malformed(f"the head of the answer is longer than {_HEAD_BYTES} bytes")
        if end < 0:
            if self._unread[self._at : self._at + 5] != b"HTTP/"[: len(self._unread) - self._at]:
                raise Malformed(f"expected a status line, found {self._unread[self._at : self._at + 80]!r}")
            self._searched = len(self._unread) - self._at
            return False
        head = Head.parse(self._unread[self._at : end], asked_for_head=self._asked_for_head)
        self._at, self._searched = end + 4, 0
        if head.status < 200:
            self._interim += 1
            if head.status == 101 or self._interim > _INTERIM:
                raise Malformed(f"an answer with status {head.status} that nobody asked for")
            return True
        self.head = head
        self.keep = head.keep
        self._begin_body(head)
        return not self.done

    def _begin_body(self, head: Head) -> None:
        success = 200 <= head.status < 300
        if self._asked_for_head:
            self._finish()
            return
        if success:
            self._place = self._into
        else:
            self._most, self._cut = ERROR_BYTES, True
        if head.length is not None:
            self._expect(head.length)
            if self._place is None and head.length <= self._most:
                self._gathered = bytearray(head.length)
                self._place = Pieces((memoryview(self._gathered),))
        if head.chunked:
            self._next = Incoming._read_size
            return
        self._left = -1 if head.length is None else head.length
        self._next = Incoming._read_body
        if not self._left:
            self._finish()

    def _expect(self, more: int, *, least: bool = False) -> None:
        """Refuse what there is no room for, before a byte of it is taken; of an error, the rest is left out."""
        if self._place is not None:
            if more > self._place.left:
                raise Misfit(self._place.size, self._place.passed + more, least=least)
        elif more > self._most - len(self._gathered) and not self._cut:
            raise Misfit(self._most, len(self._gathered) + more, least=least)

    def _read_body(self) -> bool:
        have = len(self._unread) - self._at
        if not have:
            return False
        n = have if self._left < 0 else min(have, self._left)
        data = memoryview(self._unread)[self._at : self._at + n]
        self._at += n
        if self._left < 0:
            self._expect(n, least=True)
        if self._place is not None:
            self._place.fill(data)
        else:
            self._gathered += data[: self._most - len(self._gathered)]
            if self._cut and len(self._gathered) == self._most and n != self._left:
                self.keep = False  # the rest is not waited for
                self._finish()
                return False
        if self._left > 0:
            self._left -= n
            if not self._left:
                self._end_of_piece()
        return not self.done

    def _end_of_piece(self) -> None:
        assert self.head is not None
        if self.head.chunked:
            self._next = Incoming._read_gap
        else:
            self._finish()

    def _read_gap(self) -> bool:
        if len(self._unread) - self._at < 2:
            return False
        if self._unread[self._at : self._at + 2] != b"\r\n":
            raise Malformed("a chunk is longer than its size says")
        self._at += 2
        self._next = Incoming._read_size
        return True

    def _read_size(self) -> bool:
        line = self._line(_LINE_BYTES, "the size of a chunk")
        if line is None:
            return False
        size = _CHUNK.fullmatch(line)
        if size is None:
            raise Malformed(f"expected the size of a chunk, found {line[:80]!r}")
        self._left = int(size[1], 16)
        if self._left:
            self._expect(self._left, least=True)
            self._next = Incoming._read_body
        else:
            self._next = Incoming._read_trailer
        return True

    def _read_trailer(self) -> bool:
        line = self._line(_HEAD_BYTES, "a trailer")
        if line is None:
            return False
        self._trailers += len(line) + 2
        if self._trailers > _HEAD_BYTES:
            raise Malformed(f"the trailers are longer than {_HEAD_BYTES} bytes")
        if not line:
            self._finish()
        return True

    def _finish(self) -> None:
        self.done = True
        if self._at < len(self._unread):
            self.keep = False  # more than an answer: whose is it?
