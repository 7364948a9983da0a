"""Reading one object, or a range of it, by GET into memory: lengths, versions, what broke in the middle, checksums.

What the headers of a store say stands in a `Tongue`; that a request is made anew is `_attempts`' matter. A body that
breaks is gone on with where it broke, of the same version. What is read whole is compared with the store's checksum of
the whole, from the first answer, whatever pieces it came in.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from ..._errors import ChecksumError, ObjectError
from ..._http import Answer, HttpError, LengthError
from ._attempts import Act, Ask, Attempts, Header, Verdict, spread
from ._store import Read
from ._sums import AT_ONCE, crc64_of_small, sum_of

__all__ = ["Claim", "Tongue", "read"]

_RANGE = re.compile(rb"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_PIECE = 1 << 20  # bytes that are read a second time at once


class Claim(NamedTuple):
    """The checksum that a store has of an object: ``crc64nvme``, ``crc32c`` or ``md5``, and its value."""

    algorithm: str
    value: int


def _etag(headers: Mapping[bytes, bytes]) -> str:
    return headers.get(b"etag", b"").decode("latin-1")


def _if_match(version: str) -> tuple[list[Header], bytes]:
    return [(b"if-match", version.encode("latin-1"))], b""


class Tongue(NamedTuple):
    """How a store is asked for an object, and what it says of it.

    Attributes
    ----------
    path : bytes
        Of the object.
    headers : list of (bytes, bytes)
        With every read; those which ask for a checksum, with one of the whole.
    request_id : bytes
        The header that has it.
    claim : callable
        What it says of the checksum, by the headers of an answer.
    version : callable
        What it says of the version, by the same.
    pin : callable
        What asks for a version and no other: headers, and what is added to the query.
    algorithm : str
        Of `Read.crc`.
    """

    path: bytes
    query: bytes
    headers: list[Header]
    request_id: bytes
    claim: Callable[[Mapping[bytes, bytes]], Claim | None]
    version: Callable[[Mapping[bytes, bytes]], str] = _etag
    pin: Callable[[str], tuple[list[Header], bytes]] = _if_match
    algorithm: str = "crc64nvme"


class _Reading(Ask):
    """A read, and how far it came."""

    __slots__ = (
        "beyond",
        "claim",
        "crc",
        "etag",
        "got",
        "length",
        "misfit",
        "offset",
        "proved",
        "tongue",
        "views",
        "wanted",
        "whole",
    )

    def __init__(
        self,
        tongue: Tongue,
        key: str,
        offset: int,
        views: Sequence[memoryview],
        size: int,
        wanted: str | None,
        whole: bool,
    ) -> None:
        super().__init__("get", key, b"GET", tongue.path, tongue.query, into=views, size=size)
        self.tongue = tongue
        self.offset = offset
        self.views = views
        self.wanted = wanted  # the version that the caller wants
        self.whole = whole
        self.misfit = -1  # the length that did not fit
        self.beyond: Verdict | None = None  # there is no such range, and the store has not said what there is
        self.crc: int | None = None
        self.length = 0  # of the whole object
        self.proved = False
        self.restart()

    def restart(self) -> None:
        """Begin anew, with whatever version is there."""
        self.got = 0
        self.etag = self.wanted or ""
        self.claim: Claim | None = None
        self.into = self.views
        headers = self.tongue.headers.copy()
        if not self.whole:
            headers.append((b"range", b"bytes=%d-%d" % (self.offset, self.offset + self.size - 1)))
        self.headers, self.query = headers, self.tongue.query
        if self.wanted is not None:
            self._pin(self.wanted)

    def _pin(self, version: str) -> None:
        headers, query = self.tongue.pin(version)
        self.headers += headers
        self.query = self.tongue.query + query

    def _go_on(self) -> None:
        """Ask for the rest."""
        self.into = _between(self.views, self.got, self.size)
        self.headers = [(b"range", b"bytes=%d-%d" % (self.offset + self.got, self.offset + self.size - 1))]
        self._pin(self.etag)

    def _fits(self, status: int, headers: Mapping[bytes, bytes]) -> bool:
        """Learn what the first answer says; whether this one is of the bytes that were asked for."""
        etag = self.tongue.version(headers)
        if status == 206:
            said = _RANGE.fullmatch(headers.get(b"content-range", b""))
            if said is None:
                return False
            first, last, length = int(said[1]), int(said[2]), int(said[3])
            if first != self.offset + self.got or last != self.offset + self.size - 1:
                return False
        else:
            length = self.size
            if self.got or self.offset:
                return False
        if self.got:
            return etag == self.etag and length == self.length
        self.etag, self.length = etag, length
        self.claim = self.tongue.claim(headers) if status == 200 else None
        return True

    async def accept(self, answer: Answer) -> Verdict | None:
        """Compare what came with what was asked for, and with the store's checksum."""
        request_id = self._request_id(answer.headers)
        if not self._fits(answer.status, answer.headers):
            self.restart()
            what = "the answer is of other bytes than were asked for"
            return Verdict(Act.AGAIN, what, _DAMAGED, status=answer.status, request_id=request_id)
        if self.wanted is not None and self.etag != self.wanted:
            return _changed(self.wanted, answer.status, request_id)
        claim = self.claim
        if claim is None:
            return None
        if claim.algorithm == "crc64nvme" and self.size <= AT_ONCE:
            found = crc64_of_small(self.views)
        else:
            found = await sum_of(claim.algorithm, self.views)
        if claim.algorithm == self.tongue.algorithm:
            self.crc = found
        if found == claim.value:
            self.proved = True
            return None
        self.crc = None
        self.restart()
        what = f"damaged bytes: their {claim.algorithm} is {found:#x}, and the store's of the object {claim.value:#x}"
        return Verdict(Act.AGAIN, what, _DAMAGED, status=answer.status, request_id=request_id, kind=ChecksumError)

    def broke(self, error: HttpError) -> Verdict | None:
        """Keep what has come, or see that the object has another length."""
        head = error.head
        if isinstance(error, LengthError):
            return self._misfits(error, {} if head is None else head.headers)
        if head is None or head.status not in (200, 206) or not error.nbytes:
            return None
        if not self._fits(head.status, head.headers) or not self.etag:
            self.restart()
            return None
        self.got += error.nbytes
        if self.got == self.size:  # the connection broke behind the last byte
            self.restart()
            return None
        self._go_on()
        return Verdict(
            Act.AGAIN, str(error), "check the network between this host and the store", moved=True,
            cause=error.with_traceback(None),
        )  # fmt: skip

    def _misfits(self, error: LengthError, headers: Mapping[bytes, bytes]) -> Verdict:
        """Ask once more where only the length of the body says so: it may have been changed on its way."""
        said = _RANGE.fullmatch(headers.get(b"content-range", b""))
        length = error.found if said is None else int(said[3])
        certain = self.misfit == length if said is None else int(said[2]) + 1 == length < self.offset + self.size
        self.misfit = length
        self.restart()
        what = str(error) if said is not None and not certain else self._short(length)
        return Verdict(
            Act.END if certain else Act.AGAIN, what, _SHORT, status=0 if error.head is None else error.head.status,
            request_id=self._request_id(headers), cause=error.with_traceback(None),
        )  # fmt: skip

    def _request_id(self, headers: Mapping[bytes, bytes]) -> str:
        return headers.get(self.tongue.request_id, b"").decode("latin-1")

    def _short(self, length: int) -> str:
        if self.whole:
            return f"the object has {length} bytes, and {self.size} were expected"
        return f"the object has {length} bytes, and those from {self.offset} to {self.offset + self.size} were wanted"

    def refused(self, verdict: Verdict, answer: Answer) -> Verdict | None:
        """See that the object is shorter, or another by now."""
        if answer.status == 412:
            if self.wanted is not None:
                return _changed(self.wanted, verdict.status, verdict.request_id)
            self.restart()
            return Verdict(Act.AGAIN, "the object was replaced while it was read")
        if answer.status == 416:
            length = answer.headers.get(b"content-range", b"").rpartition(b"/")[2]
            if length.isdigit():
                return self.too_short(verdict, int(length))
            self.beyond = verdict
        return verdict

    def too_short(self, verdict: Verdict, length: int) -> Verdict:
        """Say what there is in the place of what was wanted."""
        return replace(verdict, act=Act.END, what=self._short(length), advice=_SHORT)


_DAMAGED = "something between this host and the store changes bytes: use https, and look at the network"
_REPLACED = "PreconditionFailed"
_SHORT = "read what is there, or find who has written another length"


def _changed(wanted: str, status: int, request_id: str) -> Verdict:
    what = f"the object is not the version {wanted} any more"
    return Verdict(Act.END, what, "ask what it is now", status=status, code=_REPLACED, request_id=request_id)


def _between(views: Sequence[memoryview], start: int, stop: int) -> list[memoryview]:
    """Give the bytes from `start` to `stop`."""
    found = []
    for view in views:
        if start < view.nbytes and stop > 0:
            found.append(view[max(0, start) : stop])
        start -= view.nbytes
        stop -= view.nbytes
    return found


async def read(
    attempts: Attempts,
    tongue: Tongue,
    key: str,
    offset: int,
    into: Sequence[memoryview],
    *,
    whole: bool,
    verify: bool,
    etag: str | None,
    crc: bool,
    deadline: float,
    length: Callable[[], Awaitable[int]] | None = None,
) -> Read:
    """Do what `ObjectStore.read` says, for at least one byte where it is not `whole`.

    `length` asks how long the object is, for stores that do not say it where they have no such range.
    """
    size = sum([view.nbytes for view in into])
    replaced = 0
    while True:
        reading = _Reading(tongue, key, offset, into, size, etag, whole)
        try:
            await attempts.run(reading, deadline)
        except ObjectError as error:
            if reading.beyond is None or length is None:
                raise
            verdict = reading.too_short(reading.beyond, await length())
            raise attempts.error(reading, verdict) from error
        if not (crc or verify):
            break
        if verify and not (reading.proved or attempts.encrypted):
            try:
                await _prove(attempts, tongue, reading, deadline)
            except ObjectError as error:
                replaced += 1
                if etag is not None or error.code != _REPLACED or replaced == attempts.most:
                    raise
                continue
        if reading.crc is None:
            reading.crc = await sum_of(tongue.algorithm, into)
        break
    return Read(reading.etag, reading.length, reading.crc)


async def _prove(attempts: Attempts, tongue: Tongue, reading: _Reading, deadline: float) -> None:
    """Read it a second time; what differs is read until two readings in a row agree."""
    plain = tongue._replace(headers=[])
    scratch = memoryview(bytearray(min(_PIECE, reading.size)))
    at = 0
    while at < reading.size:
        mine = _between(reading.views, at, min(at + _PIECE, reading.size))
        size = sum([view.nbytes for view in mine])
        other = scratch[:size]
        for _ in range(attempts.most):
            again = _Reading(plain, reading.key, reading.offset + at, (other,), size, reading.etag or None, whole=False)
            await attempts.run(again, deadline)
            if crc64_of_small(mine) == crc64_of_small((other,)):
                break
            spread(other, mine)
        else:
            what = f"{attempts.most + 1} readings, and no two in a row were of the same bytes"
            raise attempts.error(reading, Verdict(Act.END, what, _DAMAGED, kind=ChecksumError))
        at += size
        reading.crc = None
