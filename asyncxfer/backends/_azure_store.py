"""`AzureStore`: one container of Azure Blob Storage over HTTP of our own.

Owns which requests an operation takes and what is right about their answers. Where the container is and who asks is the
account's, what refusals mean the dialect's, what is tried again `Attempts`'.

Bodies carry their CRC64, which is CRC64NVME with its bytes in reverse; where that is not known, as to Azurite, their
MD5. Azure compares it, and keeps it for no blob, so that of the whole blob is kept in its metadata: a write replaces
bytes and metadata together, and a reader has what to compare with. Blobs of other writers have an MD5 at best, which is
compared where a read is to be verified.

An upload in parts is blocks whose names begin alike, and a list that makes a blob of them. Blocks of an upload that was
given up cannot be seen or deleted; Azure forgets them when the blob is written, or after a week.

References
----------
Azure Storage REST API Reference, "Operations on blobs", "Put Block List", "Understanding block blobs".
"""

from __future__ import annotations

import asyncio
import os
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar
from urllib.parse import quote, unquote

from .._errors import ObjectError, ObjectExistsError
from .._fast.crc64 import combine
from .._http import Answer
from ..abc import Exists, ObjectInfo
from ._azure_dialect import UNKNOWN, Account, AzureDialect, quoted
from ._object._attempts import Act, Ask, Attempts, Header, Verdict
from ._object._reading import Claim, Tongue, read
from ._object._store import Part, Read
from ._object._sums import as_header, crc64_of, from_header, md5_of
from ._object._times import http_time
from ._object._xml import Node, Unreadable, parse

if TYPE_CHECKING:
    from .._config import Config

__all__ = ["AzureStore"]

_SUM = b"x-ms-meta-crc64nvme"
_BLOCK: list[Header] = [(b"x-ms-blob-type", b"BlockBlob")]
_IF_NONE: Header = (b"if-none-match", b"*")
_THERE = frozenset({"BlobAlreadyExists", "ConditionNotMet", "TargetConditionNotMet"})
_PAGE = 5000  # blobs a request that lists
_DELETIONS = 16  # under way
_COPYING = 0.5  # seconds between questions after a copy that takes its time


def _on_the_wire(crc: int) -> bytes:
    """Give a checksum as Azure has it: its bytes in reverse."""
    return b64encode(crc.to_bytes(8, "little"))


def _from_the_wire(text: bytes) -> int | None:
    try:
        return int.from_bytes(b64decode(text, validate=True), "little") if text else None
    except Base64Error:
        return None


class _Write(Ask):
    """A PUT of bytes, or of what makes a blob of blocks; `sent` is the CRC64 of the body, `crc` that of the blob."""

    __slots__ = ("crc", "etag", "exists", "sent", "there")

    def __init__(
        self, key: str, query: bytes, headers: list[Header], body: Sequence[memoryview | bytes], *,
        size: int, sent: int, crc: int, exists: Exists,
    ) -> None:  # fmt: skip
        if exists != "replace":
            headers = [*headers, _IF_NONE]
        super().__init__("put", key, b"PUT", quoted(key), query, headers=headers, body=body, size=size)
        self.sent = sent
        self.crc = crc
        self.exists = exists
        self.etag = ""
        self.there: Verdict | None = None

    async def accept(self, answer: Answer) -> Verdict | None:
        """Compare the checksum of what has come there."""
        self.etag = answer.headers.get(b"etag", b"").decode("latin-1")
        told = _from_the_wire(answer.headers.get(b"x-ms-content-crc64", b""))
        if told is not None and told != self.sent:
            return Verdict(Act.AGAIN, f"the store has other bytes: their CRC64 is {told:#x}, not {self.sent:#x}")
        return None

    def refused(self, verdict: Verdict, answer: Answer) -> Verdict | None:
        """See that a blob is there."""
        if verdict.status in (409, 412) and verdict.code in _THERE and self.exists != "replace":
            self.there = verdict
            return None
        return verdict


class _Head(Ask):
    """A HEAD, and what the answer says."""

    __slots__ = ("found",)

    def __init__(self, op: str, key: str) -> None:
        super().__init__(op, key, b"HEAD", quoted(key))
        self.found: Mapping[bytes, bytes] = {}

    async def accept(self, answer: Answer) -> Verdict | None:
        """Keep the headers."""
        self.found = answer.headers
        if not answer.headers.get(b"content-length", b"").isdigit():
            return Verdict(Act.END, "the answer does not tell how long the object is", status=answer.status)
        return None

    @property
    def info(self) -> ObjectInfo:
        """What the blob is."""
        found = self.found
        checksum = None
        if from_header(found.get(_SUM, b"")) is not None:
            checksum = f"crc64nvme:{found[_SUM].decode('latin-1')}"
        elif b"content-md5" in found:
            checksum = f"md5:{found[b'content-md5'].decode('latin-1')}"
        return ObjectInfo(
            self.key,
            int(found[b"content-length"]),
            found.get(b"etag", b"").decode("latin-1"),
            http_time(found.get(b"last-modified", b"")),
            checksum,
        )


class _Page(Ask):
    """A page of a list."""

    __slots__ = ("node",)

    def __init__(self, prefix: str, query: bytes) -> None:
        super().__init__("list", prefix, b"GET", b"", query)
        self.node: Node

    async def accept(self, answer: Answer) -> Verdict | None:
        """Read it."""
        try:
            self.node = parse(answer.body)
        except Unreadable as error:
            return Verdict(Act.AGAIN, f"an answer that cannot be read: {error}", status=answer.status)
        if self.node.name != "EnumerationResults":
            return Verdict(Act.AGAIN, f"an answer of another kind: {self.node.name}", status=answer.status)
        return None


class _Deletion(Ask):
    """A DELETE; what is not there is deleted."""

    __slots__ = ()

    def refused(self, verdict: Verdict, answer: Answer) -> Verdict | None:
        """See that it is not there."""
        return None if issubclass(verdict.kind, FileNotFoundError) else verdict


class _Copy(Ask):
    """A copy that is begun, and perhaps done."""

    __slots__ = ("status",)

    async def accept(self, answer: Answer) -> Verdict | None:
        """Keep how far it is."""
        self.status = answer.headers.get(b"x-ms-copy-status", b"success").decode("latin-1")
        return None


def _claim(headers: Mapping[bytes, bytes]) -> Claim | None:
    """Give what an answer to GET says of the whole blob."""
    value = from_header(headers.get(_SUM, b""))
    return None if value is None else Claim("crc64nvme", value)


def _any_claim(headers: Mapping[bytes, bytes]) -> Claim | None:
    """Give what an answer says, though it takes long to compare."""
    value = from_header(headers.get(b"content-md5", b""))
    return _claim(headers) or (None if value is None else Claim("md5", value))


class AzureStore:
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

    algorithm: ClassVar[str] = "crc64nvme"
    smallest_part: ClassVar[int] = 1
    most_parts: ClassVar[int] = 50_000
    largest_write: ClassVar[int] = 5000 << 20

    def __init__(self, account: Account, config: Config) -> None:
        self._dialect = AzureDialect(account)
        self.attempts = Attempts(self._dialect, config)
        self.url = self._dialect.url
        self._by_md5 = False  # bodies carry their MD5

    async def aclose(self) -> None:
        """Close all connections."""
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

        tongue = Tongue(quoted(key), b"", [], b"x-ms-request-id", _any_claim if verify else _claim)
        return await read(
            self.attempts, tongue, key, offset, into,
            whole=whole, verify=verify, etag=etag, crc=crc, deadline=deadline, length=length,
        )  # fmt: skip

    async def write(self, key: str, body: Sequence[memoryview], *, exists: Exists, deadline: float) -> str:
        """Write a blob; its etag, or nothing where one was there and was kept."""
        size, crc = sum([view.nbytes for view in body]), await crc64_of(body)
        headers = [*_BLOCK, (_SUM, as_header(crc))]
        ask = _Write(key, b"", headers, body, size=size, sent=crc, crc=crc, exists=exists)
        return await self._written(ask, size, deadline)

    async def _send(self, ask: _Write, deadline: float) -> None:
        """Send a body with its checksum, of the kind that the store knows."""
        headers = ask.headers
        if not self._by_md5:
            ask.headers = [*headers, (b"x-ms-content-crc64", _on_the_wire(ask.sent))]
            try:
                await self.attempts.run(ask, deadline)
            except ObjectError as error:
                if error.code != UNKNOWN:
                    raise
                ask.unsure = False
            else:
                return
        md5 = await md5_of([memoryview(piece) for piece in ask.body])
        ask.headers = [*headers, (b"content-md5", as_header(md5, 16))]
        await self.attempts.run(ask, deadline)
        self._by_md5 = True

    async def _written(self, ask: _Write, size: int, deadline: float) -> str:
        await self._send(ask, deadline)
        if ask.there is None or ask.exists == "keep":
            return ask.etag if ask.there is None else ""
        if ask.unsure:  # an attempt whose answer was lost may have written it
            info = await self.head(ask.key, deadline=deadline)
            if (info.nbytes, info.checksum) == (size, f"crc64nvme:{as_header(ask.crc).decode()}"):
                return info.etag
        what, advice = "there is an object of this key", "take another key, or exists='replace'"
        raise self.attempts.error(ask, replace(ask.there, what=what, advice=advice, kind=ObjectExistsError))

    # -- uploads in parts

    async def begin(self, key: str, *, deadline: float) -> str:
        """Give what the names of an upload's blocks begin with."""
        return os.urandom(12).hex()

    async def part(self, key: str, upload: str, number: int, body: Sequence[memoryview], *, deadline: float) -> Part:
        """Write one block."""
        size, crc = sum([view.nbytes for view in body]), await crc64_of(body)
        block = _block_id(upload, number)
        query = b"comp=block&blockid=" + quote(block, safe="").encode()
        ask = _Write(key, query, [], body, size=size, sent=crc, crc=crc, exists="replace")
        await self._send(ask, deadline)
        return Part(number, size, block, crc)

    async def complete(self, key: str, upload: str, parts: Sequence[Part], *, exists: Exists, deadline: float) -> str:
        """Make a blob of the blocks; its etag, or nothing where one was there and was kept."""
        size, crc = 0, 0
        for part in parts:
            size, crc = size + part.nbytes, combine(crc, part.crc, part.nbytes)
        # A list that comes twice finds its blocks in the blob already.
        named = "".join([f"<Latest>{_block_id(upload, part.number)}</Latest>" for part in parts])
        body = f'<?xml version="1.0" encoding="utf-8"?><BlockList>{named}</BlockList>'.encode()
        headers: list[Header] = [(_SUM, as_header(crc))]
        sent = await crc64_of((memoryview(body),))
        ask = _Write(key, b"comp=blocklist", headers, (body,), size=size, sent=sent, crc=crc, exists=exists)
        return await self._written(ask, size, deadline)

    async def abort(self, key: str, upload: str, *, deadline: float) -> None:
        """Leave the blocks to Azure: nobody sees them, and nothing deletes them but time or another write."""

    # -- what is there

    async def head(self, key: str, *, deadline: float) -> ObjectInfo:
        """Ask what a blob is."""
        ask = _Head("head", key)
        await self.attempts.run(ask, deadline)
        return ask.info

    async def list(self, prefix: str, *, deadline: float, after: str = "") -> AsyncIterator[ObjectInfo]:
        """Give what is there, page by page; those up to `after` are fetched, too, since Azure cannot begin there."""
        marker = ""
        while True:
            query = f"restype=container&comp=list&maxresults={_PAGE}&prefix={quote(prefix, safe='')}"
            if marker:
                query += f"&marker={quote(marker, safe='')}"
            page = _Page(prefix, query.encode())
            await self.attempts.run(page, deadline)
            for blobs in page.node.all("Blobs"):
                for node in blobs.all("Blob"):
                    if node.text("Properties", "ResourceType") == "directory":
                        continue
                    info = _listed(node)
                    if info.key > after:
                        yield info
            marker = page.node.text("NextMarker")
            if not marker:
                return

    async def delete(self, keys: Sequence[str], *, deadline: float) -> None:
        """Delete blobs, several at a time."""
        todo = iter(keys)

        async def some() -> None:
            for key in todo:
                await self.attempts.run(_Deletion("delete", key, b"DELETE", quoted(key)), deadline)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(len(keys), _DELETIONS)):
                    group.create_task(some())
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None

    async def copy(self, source: str, target: str, *, deadline: float) -> None:
        """Copy a blob within the account, and wait for that."""
        origin = _Head("copy", source)
        await self.attempts.run(origin, deadline)
        where = self._dialect.where(source)
        if self._dialect.sas:
            where += b"?" + self._dialect.sas
        headers: list[Header] = [
            (b"x-ms-copy-source", where), (b"x-ms-source-if-match", origin.info.etag.encode("latin-1"))
        ]  # fmt: skip
        ask = _Copy("copy", target, b"PUT", quoted(target), headers=headers, size=origin.info.nbytes)
        await self.attempts.run(ask, deadline)
        status = ask.status
        while status == "pending":
            await asyncio.sleep(_COPYING)
            head = _Head("copy", target)
            await self.attempts.run(head, deadline)
            status = head.found.get(b"x-ms-copy-status", b"").decode("latin-1")
        if status != "success":
            verdict = Verdict(Act.END, f"the copy of {source!r} ended as {status!r}", "try it again")
            raise self.attempts.error(ask, verdict)


def _block_id(upload: str, number: int) -> str:
    """Give the name of a block; all of a blob have to be equally long."""
    return b64encode(f"{upload}-{number:06d}".encode()).decode()


def _listed(node: Node) -> ObjectInfo:
    key = node.text("Name")
    if any(name.attribute("Encoded") == "true" for name in node.all("Name")):
        key = unquote(key)
    properties = node.all("Properties")[0]
    md5 = properties.text("Content-MD5")
    etag = properties.text("Etag")
    return ObjectInfo(
        key,
        int(properties.text("Content-Length")),
        etag if etag.startswith('"') else f'"{etag}"',
        http_time(properties.text("Last-Modified").encode()),
        f"md5:{md5}" if md5 else None,
    )
