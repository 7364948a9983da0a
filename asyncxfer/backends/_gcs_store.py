"""`GcsStore`: one bucket of Google Cloud Storage over HTTP of our own.

Owns which requests an operation takes and what is right about their answers. Where the bucket is and who asks is the
account's, what refusals mean the dialect's, what is tried again `Attempts`'.

The store has the CRC32C of every object. A write says it beforehand, and is refused where other bytes arrive; a reader
has what to compare with. Versions are generations.

An upload in parts is objects of their own that are composed into one and deleted. So the condition that nothing is
there holds when the object appears, which the uploads in parts of the XML API cannot have. The parts lie below
``.asyncxfer-parts/`` in the bucket, which lists do not show.

References
----------
Cloud Storage JSON API v1, "Objects"; "Composite objects"; "Hashes and ETags".
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import quote

from .._errors import ChecksumError, ObjectExistsError, TransferError
from .._http import Answer
from ..abc import Exists, ObjectInfo
from ._gcs_dialect import Account, GcsDialect, parsed
from ._object._attempts import Act, Ask, Attempts, Header, Verdict
from ._object._reading import Claim, Tongue, read
from ._object._store import Part, Read
from ._object._sums import as_header, combine_crc32c, crc32c_of, from_header
from ._object._times import iso_time

if TYPE_CHECKING:
    from .._config import Config

__all__ = ["GcsStore"]

_PARTS = ".asyncxfer-parts/"
_FIELDS = "name,size,generation,updated,crc32c"
_PAGE = 1000  # objects a request that lists
_DELETIONS = 16  # under way
_FAREWELL = 5.0  # seconds, for parts that could not be deleted before
_JSON: Header = (b"content-type", b"application/json; charset=utf-8")
#: What is compressed comes as it is stored, else its length and checksum would be of something else.
_STORED: Header = (b"accept-encoding", b"gzip")
_CRC32C = re.compile(rb"(?:^|[,\s])crc32c=([A-Za-z0-9+/=]+)")
_DIGITS = re.compile(r"[0-9]{1,20}")


class _Said(Ask):
    """A request that is answered in JSON."""

    __slots__ = ("said",)

    def __init__(
        self, op: str, key: str, method: bytes, path: bytes, query: str, *, headers: list[Header] | None = None,
        body: Sequence[memoryview | bytes] = (), size: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(op, key, method, path, query.encode(), headers=headers, body=body, size=size)
        self.said: dict[str, Any] = {}

    async def accept(self, answer: Answer) -> Verdict | None:
        """Read it."""
        said = parsed(answer.body)
        if said is None:
            return Verdict(Act.AGAIN, "an answer that cannot be read: no object of JSON", status=answer.status)
        self.said = said
        return None


class _Object(_Said):
    """A request that is answered with what an object is."""

    __slots__ = ()

    async def accept(self, answer: Answer) -> Verdict | None:
        """Read it, and see that it says what is needed."""
        verdict = await super().accept(answer)
        if verdict is None and not _is_object(self.said):
            return Verdict(Act.AGAIN, "an answer that does not tell what the object is", status=answer.status)
        return verdict


class _Write(_Object):
    """What makes an object of so many bytes that have this CRC32C."""

    __slots__ = ("crc", "exists", "nbytes", "there")

    def __init__(
        self, key: str, path: bytes, query: str, headers: list[Header], body: Sequence[memoryview | bytes], *,
        nbytes: int, crc: int, exists: Exists,
    ) -> None:  # fmt: skip
        if exists != "replace":
            query += "&ifGenerationMatch=0"
        super().__init__("put", key, b"POST", path, query, headers=headers, body=body, size=nbytes)
        self.nbytes = nbytes
        self.crc = crc
        self.exists = exists
        self.there: Verdict | None = None

    async def accept(self, answer: Answer) -> Verdict | None:
        """Compare what the store has."""
        verdict = await super().accept(answer)
        if verdict is not None:
            return verdict
        told = from_header(str(self.said.get("crc32c", "")).encode())
        if int(self.said["size"]) == self.nbytes and told in (None, self.crc):
            return None
        what = f"the store has other bytes: {self.said['size']} with CRC32C {told}, not {self.nbytes} with {self.crc}"
        act = Act.AGAIN if self.exists == "replace" else Act.END
        return Verdict(act, what, "write it again", status=answer.status, kind=ChecksumError)

    def refused(self, verdict: Verdict, answer: Answer) -> Verdict | None:
        """See that an object is there."""
        if verdict.status == 412 and self.exists != "replace":
            self.there = verdict
            return None
        return verdict


class _Deletion(Ask):
    """A DELETE; what is not there is deleted."""

    __slots__ = ()

    def refused(self, verdict: Verdict, answer: Answer) -> Verdict | None:
        """See that it is not there."""
        return None if issubclass(verdict.kind, FileNotFoundError) else verdict


def _claim(headers: Mapping[bytes, bytes]) -> Claim | None:
    """Give what an answer to GET says of the whole object."""
    found = _CRC32C.search(headers.get(b"x-goog-hash", b""))
    value = None if found is None else from_header(found[1])
    return None if value is None else Claim("crc32c", value)


def _generation(headers: Mapping[bytes, bytes]) -> str:
    return headers.get(b"x-goog-generation", b"").decode("latin-1")


def _of_generation(version: str) -> tuple[list[Header], bytes]:
    return [], b"&ifGenerationMatch=" + quote(version, safe="").encode()


class GcsStore:
    """Implements `ObjectStore`. Made on the loop that uses it.

    Parameters
    ----------
    account : Account
    config : Config
        Its keys ``object_...``.

    Attributes
    ----------
    attempts : Attempts
    """

    algorithm: ClassVar[str] = "crc32c"
    smallest_part: ClassVar[int] = 1
    most_parts: ClassVar[int] = 32  # that are composed by one request
    largest_write: ClassVar[int] = 5 << 40

    def __init__(self, account: Account, config: Config) -> None:
        self._dialect = GcsDialect(account)
        self.attempts = Attempts(self._dialect, config)
        self.url = self._dialect.url
        self._parts: dict[str, set[str]] = {}  # by upload: the keys that may be there

    async def aclose(self) -> None:
        """Close all connections, when parts are gone that could not be deleted before."""
        deadline = asyncio.get_running_loop().time() + _FAREWELL
        for upload in list(self._parts):
            with contextlib.suppress(TransferError):  # nobody can do more about them from here
                await self._drop(upload, self._parts[upload], deadline)
        await self.attempts.aclose()

    # -- bytes

    async def read(
        self,
        key: str,
        offset: int,
        into: Sequence[memoryview],
        *,
        whole: bool,
        verify: bool,
        etag: str | None,
        deadline: float,
        crc: bool = False,
    ) -> Read:
        """Read bytes from `offset` on."""
        if not whole and not any(view.nbytes for view in into):
            info = await self.head(key, deadline=deadline)
            return Read(info.etag, info.nbytes, 0)

        async def length() -> int:
            return (await self.head(key, deadline=deadline)).nbytes

        tongue = Tongue(
            self._dialect.object(key), b"alt=media", [_STORED], b"x-guploader-uploadid", _claim, _generation,
            _of_generation, self.algorithm,
        )  # fmt: skip
        return await read(
            self.attempts, tongue, key, offset, into,
            whole=whole, verify=verify, etag=etag, crc=crc, deadline=deadline, length=length,
        )  # fmt: skip

    async def write(self, key: str, body: Sequence[memoryview], *, exists: Exists, deadline: float) -> str:
        """Write an object; its generation, or nothing where one was there and was kept."""
        size, crc = sum([view.nbytes for view in body]), await crc32c_of(body)
        about = json.dumps({"name": key, "crc32c": as_header(crc, 4).decode()}).encode()
        edge = b"axf-" + os.urandom(12).hex().encode()
        head = b"--%b\r\n%b: %b\r\n\r\n%b\r\n--%b\r\ncontent-type: application/octet-stream\r\n\r\n"
        ask = _Write(
            key, self._dialect.uploads, f"uploadType=multipart&fields={_FIELDS}",
            [(b"content-type", b"multipart/related; boundary=" + edge)],
            [head % (edge, *_JSON, about, edge), *body, b"\r\n--%b--\r\n" % edge],
            nbytes=size, crc=crc, exists=exists,
        )  # fmt: skip
        return await self._written(ask, deadline)

    async def _written(self, ask: _Write, deadline: float) -> str:
        try:
            await self.attempts.run(ask, deadline)
        except ChecksumError:
            if ask.exists != "replace" and ask.said:  # or it would be kept
                query = f"ifGenerationMatch={ask.said['generation']}".encode()
                gone = _Deletion("delete", ask.key, b"DELETE", self._dialect.object(ask.key), query)
                await self.attempts.run(gone, deadline)
            raise
        if ask.there is None or ask.exists == "keep":
            return str(ask.said["generation"]) if ask.there is None else ""
        if ask.unsure:  # an attempt whose answer was lost may have written it
            info = await self.head(ask.key, deadline=deadline)
            if (info.nbytes, info.checksum) == (ask.nbytes, f"crc32c:{as_header(ask.crc, 4).decode()}"):
                return info.etag
        what, advice = "there is an object of this key", "take another key, or exists='replace'"
        raise self.attempts.error(ask, replace(ask.there, what=what, advice=advice, kind=ObjectExistsError))

    # -- uploads in parts

    async def begin(self, key: str, *, deadline: float) -> str:
        """Give what the names of an upload's parts begin with."""
        return f"{_PARTS}{os.urandom(16).hex()}/"

    async def part(self, key: str, upload: str, number: int, body: Sequence[memoryview], *, deadline: float) -> Part:
        """Write one part."""
        name = _part(upload, number)
        self._parts.setdefault(upload, set()).add(name)
        etag = await self.write(name, body, exists="replace", deadline=deadline)
        return Part(number, sum([view.nbytes for view in body]), etag, await crc32c_of(body))

    async def complete(self, key: str, upload: str, parts: Sequence[Part], *, exists: Exists, deadline: float) -> str:
        """Make an object of the parts; its generation, or nothing where one was there and was kept."""
        size, crc, sources = 0, 0, []
        for part in parts:
            size, crc = size + part.nbytes, combine_crc32c(crc, part.crc, part.nbytes)
            pinned = {"ifGenerationMatch": part.etag}
            sources.append({"name": _part(upload, part.number), "objectPreconditions": pinned})
        body = json.dumps(
            {"sourceObjects": sources, "destination": {"contentType": "application/octet-stream"}}
        ).encode()
        path = self._dialect.object(key) + b"/compose"
        ask = _Write(key, path, f"fields={_FIELDS}", [_JSON], (body,), nbytes=size, crc=crc, exists=exists)
        etag = await self._written(ask, deadline)
        with contextlib.suppress(TransferError):  # the object is there and right
            await self.abort(key, upload, deadline=deadline)
        return etag

    async def abort(self, key: str, upload: str, *, deadline: float) -> None:
        """Delete the parts, as many of them as can be."""
        known = self._parts.get(upload)
        await self._drop(upload, known or {_part(upload, number) for number in range(1, self.most_parts + 1)}, deadline)

    async def _drop(self, upload: str, names: set[str], deadline: float) -> None:
        """Delete parts; those that are left are tried once more when the store is closed."""
        left = self._parts[upload] = set(names)
        todo, failed = iter(sorted(names)), list[TransferError]()

        async def some() -> None:
            for name in todo:
                try:
                    await self.attempts.run(_Deletion("delete", name, b"DELETE", self._dialect.object(name)), deadline)
                except TransferError as error:
                    failed.append(error)
                else:
                    left.discard(name)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(len(names), _DELETIONS)):
                group.create_task(some())
        if failed:
            raise failed[0]
        del self._parts[upload]

    # -- what is there

    async def head(self, key: str, *, deadline: float) -> ObjectInfo:
        """Ask what an object is."""
        ask = _Object("head", key, b"GET", self._dialect.object(key), f"fields={_FIELDS}")
        await self.attempts.run(ask, deadline)
        return _info(ask.said)

    async def list(self, prefix: str, *, deadline: float, after: str = "") -> AsyncIterator[ObjectInfo]:
        """Give what is there, page by page, without the parts of uploads that nobody has asked for."""
        token = ""
        while True:
            query = f"fields=items({_FIELDS}),nextPageToken&maxResults={_PAGE}&prefix={quote(prefix, safe='')}"
            if after:
                query += f"&startOffset={quote(after, safe='')}"
            if token:
                query += f"&pageToken={quote(token, safe='')}"
            page = _Said("list", prefix, b"GET", self._dialect.object(""), query)
            await self.attempts.run(page, deadline)
            for item in page.said.get("items") or ():
                if not _is_object(item):
                    verdict = Verdict(Act.END, "the list does not tell what its objects are", status=200)
                    raise self.attempts.error(page, verdict)
                info = _info(item)
                hidden = info.key.startswith(_PARTS) and not prefix.startswith(_PARTS)
                if info.key > after and not hidden:
                    yield info
            token = str(page.said.get("nextPageToken") or "")
            if not token:
                return

    async def delete(self, keys: Sequence[str], *, deadline: float) -> None:
        """Delete objects, several at a time."""
        todo = iter(keys)

        async def some() -> None:
            for key in todo:
                await self.attempts.run(_Deletion("delete", key, b"DELETE", self._dialect.object(key)), deadline)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(len(keys), _DELETIONS)):
                    group.create_task(some())
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None

    async def copy(self, source: str, target: str, *, deadline: float) -> None:
        """Copy an object within the bucket; the store says when it is not done yet."""
        path = self._dialect.object(source) + b"/rewriteTo" + self._dialect.object(target).removeprefix(b"/storage/v1")
        query = ""
        while True:
            ask = _Said("copy", source, b"POST", path, query, headers=[_JSON])
            await self.attempts.run(ask, deadline)
            if ask.said.get("done") is True:
                return
            query = f"rewriteToken={quote(str(ask.said.get('rewriteToken') or ''), safe='')}"


def _part(upload: str, number: int) -> str:
    return f"{upload}{number:02d}"


def _is_object(said: Any) -> bool:
    """Whether this tells the name, the length and the generation of an object."""
    return (
        isinstance(said, dict)
        and isinstance(said.get("name"), str)
        and all(_DIGITS.fullmatch(str(said.get(name, ""))) for name in ("size", "generation"))
    )


def _info(said: Mapping[str, Any]) -> ObjectInfo:
    crc = said.get("crc32c")
    return ObjectInfo(
        said["name"],
        int(said["size"]),
        str(said["generation"]),
        iso_time(str(said.get("updated", ""))),
        f"crc32c:{crc}" if crc else None,
    )
