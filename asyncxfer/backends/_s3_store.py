"""`S3Store`: one bucket of S3, or of what speaks like it, over HTTP of our own.

Owns which requests an operation takes and what is right about their answers. Where the bucket is and who asks is the
account's (`S3Account`), what refusals mean the dialect's, what is tried again `Attempts`'.

Bodies carry their CRC64NVME, so that what reaches the store is what was sent; parts of a multipart upload theirs, and
the upload that of the whole object, which is put together from them. Answers in XML come without a checksum; one that
cannot be read is asked for again.

References
----------
Amazon S3 API Reference; "Checking object integrity in Amazon S3".
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypeAlias
from urllib.parse import quote, unquote
from xml.sax.saxutils import escape

from .._errors import ChecksumError, ObjectExistsError, TransferError
from .._fast.crc64 import combine
from .._http import Answer
from ..abc import Exists, ObjectInfo
from ._object._attempts import Act, Ask, Attempts, Header, Verdict
from ._object._reading import Claim, Tongue, read
from ._object._store import Part, Read
from ._object._sums import as_header, crc64_of, from_header
from ._object._times import http_time, iso_time
from ._object._xml import Node, Unreadable, parse
from ._s3_dialect import Credentials, S3Account, S3Dialect, content_md5, quoted

if TYPE_CHECKING:
    from .._config import Config

__all__ = ["Credentials", "S3Account", "S3Store"]

_ENABLED: _Headers = [(b"x-amz-checksum-mode", b"ENABLED")]
_IF_NONE: Header = (b"if-none-match", b"*")
_XMLNS = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
_CHECKSUMS = ("crc64nvme", "crc32c", "crc32", "sha256", "sha1")
_PAGE = 1000  # keys a request, of those that are listed or deleted
_COPIES = 8  # parts of a copy under way
_FAREWELL = 5.0  # seconds that there are for cleaning up, at least
_SLACK = 2.0  # seconds by which the store's time of an upload may differ
_ABORTS = 5  # times that an upload is asked whether it is gone
_UNPRINTABLE = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # what XML cannot say


_Headers: TypeAlias = list[Header]
_Row: TypeAlias = tuple[int, str, int | None]  # of a part: its number, its etag, its checksum if that is kept
_Rows: TypeAlias = list[_Row]


class _Span(NamedTuple):
    """When a request to begin an upload was made, by this host's clock."""

    since: float
    until: float


class _Upload(NamedTuple):
    """A multipart upload that was begun here."""

    begun: _Span
    summed: bool  # the store keeps checksums of parts


# ---- requests -----------------------------------------------------------------------------------------------------


class _Write(Ask):
    """A PUT of bytes with their checksum."""

    __slots__ = ("crc", "etag", "exists", "there")

    def __init__(self, key: str, query: bytes, body: Sequence[memoryview], size: int, crc: int, exists: Exists) -> None:
        headers: _Headers = [(b"x-amz-checksum-crc64nvme", as_header(crc))]
        if exists != "replace":
            headers.append(_IF_NONE)
        super().__init__("put", key, b"PUT", quoted(key), query, headers=headers, body=body, size=size)
        self.crc = crc
        self.exists = exists
        self.etag = ""
        self.there: Verdict | None = None

    async def accept(self, answer: Answer) -> Verdict | None:
        """Compare the checksum that the store has."""
        self.etag = answer.headers.get(b"etag", b"").decode("latin-1")
        told = from_header(answer.headers.get(b"x-amz-checksum-crc64nvme", b""))
        if told is not None and told != self.crc:
            return Verdict(Act.AGAIN, f"the store has other bytes: their CRC64NVME is {told:#x}, not {self.crc:#x}")
        return None

    def refused(self, verdict: Verdict, answer: Answer) -> Verdict | None:
        """See that an object is there."""
        if verdict.status == 412 and self.exists != "replace":
            self.there = verdict
            return None
        return verdict


class _Said(Ask):
    """A request that is answered in XML with this root; `optional`: or by that there is no such upload."""

    __slots__ = ("dialect", "headers_of", "node", "optional", "root")

    def __init__(
        self,
        dialect: S3Dialect,
        op: str,
        key: str,
        method: bytes,
        path: bytes,
        query: bytes,
        *,
        root: str,
        headers: _Headers | None = None,
        body: bytes = b"",
        size: int = 0,
        optional: bool = False,
    ) -> None:
        super().__init__(op, key, method, path, query, headers=headers, body=(body,) if body else (), size=size)
        self.dialect = dialect
        self.root = root
        self.optional = optional
        self.node: Node | None = None
        self.headers_of: Mapping[bytes, bytes] = {}

    async def accept(self, answer: Answer) -> Verdict | None:
        """Read it; a success may turn out to be none while it is sent."""
        try:
            node = parse(answer.body)
        except Unreadable as error:
            return Verdict(Act.AGAIN, f"an answer that cannot be read: {error}", status=answer.status)
        if node.name == "Error":
            return self.refused(self.dialect.verdict(self, answer, node), answer)
        if node.name != self.root:
            return Verdict(Act.AGAIN, f"an answer of another kind: {node.name}, not {self.root}", status=answer.status)
        self.node = node
        self.headers_of = answer.headers
        return None

    def refused(self, verdict: Verdict, answer: Answer) -> Verdict | None:
        """See that there is no such upload."""
        return None if self.optional and verdict.code == "NoSuchUpload" else verdict

    def text(self, name: str) -> str:
        """Give the text of a child of the root."""
        assert self.node is not None
        return self.node.text(name)


class _Completion(_Said):
    """The end of a multipart upload of so many bytes."""

    __slots__ = ("crc", "exists", "gone", "there")

    def __init__(
        self,
        dialect: S3Dialect,
        key: str,
        upload: str,
        *,
        headers: _Headers,
        body: bytes,
        size: int,
        exists: Exists,
    ) -> None:
        super().__init__(
            dialect, "put", key, b"POST", quoted(key), b"uploadId=" + _escaped_bytes(upload),
            root="CompleteMultipartUploadResult", headers=headers, body=body, size=size,
        )  # fmt: skip
        self.exists = exists
        self.crc: int | None = None
        self.there: Verdict | None = None
        self.gone: Verdict | None = None

    async def accept(self, answer: Answer) -> Verdict | None:
        """Compare the checksum that the store has."""
        verdict = await super().accept(answer)
        if verdict is None and self.node is not None and self.crc is not None:
            told = from_header(self.node.text("ChecksumCRC64NVME").encode())
            if told is not None and told != self.crc:
                what = f"the store has other bytes: their CRC64NVME is {told:#x}, not {self.crc:#x}"
                return Verdict(Act.END, what, "write it again", status=answer.status, kind=ChecksumError)
        return verdict

    def refused(self, verdict: Verdict, answer: Answer) -> Verdict | None:
        """See that an object is there, or that the upload is not any more: an earlier attempt may have ended it."""
        if verdict.code == "PreconditionFailed" and self.exists != "replace":
            self.there = verdict
            return None
        if verdict.code == "NoSuchUpload" and self.unsure:
            self.gone = verdict
            return None
        return verdict


class _Deletion(_Said):
    """Many deletions, and those of them that failed."""

    __slots__ = ()

    async def accept(self, answer: Answer) -> Verdict | None:
        """Look for those that failed: all are asked for again, which does no harm."""
        verdict = await super().accept(answer)
        if verdict is not None or self.node is None:
            return verdict
        for node in self.node.all("Error"):
            if node.text("Code") != "NoSuchKey":
                self.key = node.text("Key")
                return self.dialect.verdict(self, answer, node)
        return None


class _Gone(Ask):
    """A DELETE; what is not there is deleted."""

    __slots__ = ("missing",)

    def __init__(self, op: str, key: str, query: bytes = b"") -> None:
        super().__init__(op, key, b"DELETE", quoted(key), query)
        self.missing = False

    def refused(self, verdict: Verdict, answer: Answer) -> Verdict | None:
        """See that it is not there."""
        if verdict.status == 404 and verdict.code in ("NoSuchKey", "NoSuchUpload", "NotFound"):
            self.missing = True
            return None
        return verdict


class _Head(Ask):
    """A HEAD, and what the answer says."""

    __slots__ = ("found",)

    def __init__(self, key: str) -> None:
        super().__init__("head", key, b"HEAD", quoted(key), headers=_ENABLED)
        self.found: Mapping[bytes, bytes] = {}

    async def accept(self, answer: Answer) -> Verdict | None:
        """Keep the headers."""
        self.found = answer.headers
        if not answer.headers.get(b"content-length", b"").isdigit():
            return Verdict(Act.END, "the answer does not tell how long the object is", status=answer.status)
        return None

    @property
    def info(self) -> ObjectInfo:
        """What the object is."""
        checksum = None
        for name in _CHECKSUMS:
            value = self.found.get(b"x-amz-checksum-" + name.encode())
            if value is not None and b"-" not in value:  # of the parts' checksums, where it ends in their number
                checksum = f"{name}:{value.decode('latin-1')}"
                break
        return ObjectInfo(
            self.key,
            int(self.found[b"content-length"]),
            self.found.get(b"etag", b"").decode("latin-1"),
            http_time(self.found.get(b"last-modified", b"")),
            checksum,
        )


def _claim(headers: Mapping[bytes, bytes]) -> Claim | None:
    """Give what an answer to GET says of the whole object."""
    for algorithm, name in (("crc64nvme", b"x-amz-checksum-crc64nvme"), ("crc32c", b"x-amz-checksum-crc32c")):
        value = from_header(headers.get(name, b""))
        if value is not None and headers.get(b"x-amz-checksum-type", b"FULL_OBJECT") == b"FULL_OBJECT":
            return Claim(algorithm, value)
    return None


# ---- the store ----------------------------------------------------------------------------------------------------


class S3Store:
    """Implements `ObjectStore`. Made on the loop that uses it.

    Parameters
    ----------
    bucket : str
    account : S3Account
    config : Config
        Its keys ``object_...``.

    Attributes
    ----------
    attempts : Attempts
    dialect : S3Dialect
    largest_copy, copied_part : int, bytes
        Copied by one request; copied as one part above that.
    """

    algorithm: ClassVar[str] = "crc64nvme"
    smallest_part: ClassVar[int] = 5 << 20
    most_parts: ClassVar[int] = 10_000
    largest_write: ClassVar[int] = 5 << 30
    largest_copy: ClassVar[int] = 5 << 30
    copied_part: ClassVar[int] = 512 << 20

    def __init__(self, bucket: str, account: S3Account, config: Config) -> None:
        self.dialect = S3Dialect(bucket, account)
        self.attempts = Attempts(self.dialect, config)
        self.url = self.dialect.url
        self._uploads: dict[str, _Upload] = {}
        self._beginning: Counter[str] = Counter()  # by key
        self._lost: dict[str, list[_Span]] = {}  # by key: begun perhaps, with an answer that did not come

    async def aclose(self) -> None:
        """Close all connections, when uploads are gone that may have been begun."""
        deadline = asyncio.get_running_loop().time() + _FAREWELL
        for key in list(self._lost):
            with contextlib.suppress(TransferError):  # the store's rule for unfinished uploads is left
                await self._sweep(key, deadline)
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
        tongue = Tongue(quoted(key), b"", _ENABLED if whole else [], b"x-amz-request-id", _claim)
        return await read(
            self.attempts, tongue, key, offset, into,
            whole=whole, verify=verify, etag=etag, crc=crc, deadline=deadline,
        )  # fmt: skip

    async def write(self, key: str, body: Sequence[memoryview], *, exists: Exists, deadline: float) -> str:
        """Write an object; its etag, or nothing where one was there and was kept."""
        size = sum([view.nbytes for view in body])
        ask = _Write(key, b"", body, size, await crc64_of(body), exists)
        await self.attempts.run(ask, deadline)
        if ask.there is not None and exists == "error":
            return await self._ours(ask, ask.there, size, ask.crc, deadline)
        return "" if ask.there is not None else ask.etag

    async def _ours(self, ask: Ask, verdict: Verdict, size: int, crc: int, deadline: float) -> str:
        """Give the etag of an object that is there, where an attempt whose answer was lost has written it."""
        if ask.unsure:
            info = await self.head(ask.key, deadline=deadline)
            if (info.nbytes, info.checksum) == (size, f"crc64nvme:{as_header(crc).decode()}"):
                return info.etag
        if verdict.status == 412:
            what, advice = "there is an object of this key", "take another key, or exists='replace'"
            verdict = replace(verdict, what=what, advice=advice, kind=ObjectExistsError)
        raise self.attempts.error(ask, verdict)

    # -- uploads in parts

    async def begin(self, key: str, *, deadline: float) -> str:
        """Begin a multipart upload; its id."""
        headers: _Headers = [(b"x-amz-checksum-algorithm", b"CRC64NVME"), (b"x-amz-checksum-type", b"FULL_OBJECT")]
        ask = self._said("put", key, b"POST", b"uploads=", root="InitiateMultipartUploadResult", headers=headers)
        try:
            span = await self._begun(ask, deadline)
        except TransferError:
            with contextlib.suppress(TransferError):  # tried again with the next upload of the key, and at the end
                await self._sweep(key, deadline)
            raise
        upload = ask.text("UploadId")
        self._uploads[upload] = _Upload(span, b"x-amz-checksum-algorithm" in ask.headers_of)
        return upload

    async def _begun(self, ask: Ask, deadline: float) -> _Span:
        """Make the request, and note where it may have been done unheard."""
        since = time.time()
        self._beginning[ask.key] += 1
        try:
            await self.attempts.run(ask, deadline)
        except asyncio.CancelledError:
            ask.unsure = True
            raise
        finally:
            span = _Span(since, time.time())
            self._beginning[ask.key] -= 1
            if not self._beginning[ask.key]:
                del self._beginning[ask.key]
            if ask.unsure:
                self._lost.setdefault(ask.key, []).append(span)
        return span

    async def part(self, key: str, upload: str, number: int, body: Sequence[memoryview], *, deadline: float) -> Part:
        """Write one part."""
        size = sum([view.nbytes for view in body])
        query = b"partNumber=%d&uploadId=%b" % (number, _escaped_bytes(upload))
        ask = _Write(key, query, body, size, await crc64_of(body), "replace")
        await self.attempts.run(ask, deadline)
        return Part(number, size, ask.etag, ask.crc)

    async def complete(self, key: str, upload: str, parts: Sequence[Part], *, exists: Exists, deadline: float) -> str:
        """Make an object of the parts; its etag, or nothing where one was there and was kept."""
        summed = upload in self._uploads and self._uploads[upload].summed
        size, crc = 0, 0
        for part in parts:
            size, crc = size + part.nbytes, combine(crc, part.crc, part.nbytes)
        headers: _Headers = [(b"x-amz-mp-object-size", b"%d" % size)]
        if summed:
            headers += [(b"x-amz-checksum-type", b"FULL_OBJECT"), (b"x-amz-checksum-crc64nvme", as_header(crc))]
        if exists != "replace":
            headers.append(_IF_NONE)
        rows = [(part.number, part.etag, part.crc if summed else None) for part in parts]
        body = _part_list(rows)
        ask = _Completion(self.dialect, key, upload, headers=headers, body=body, size=size, exists=exists)
        ask.crc = crc
        await self.attempts.run(ask, deadline)
        verdict = ask.there or ask.gone
        if verdict is not None:
            return await self._completed(ask, verdict, upload, size, deadline)
        self._uploads.pop(upload, None)
        with contextlib.suppress(TransferError):  # the object is there; it is tried again at the end
            await self._sweep(key, deadline)
        return ask.text("ETag")

    async def _completed(self, ask: _Completion, verdict: Verdict, upload: str, size: int, deadline: float) -> str:
        """Settle an upload where an object is there, or where it is gone itself: it may have been completed before."""
        if ask.there is not None and ask.exists == "keep":
            await self.abort(ask.key, upload, deadline=deadline)
            return ""
        etag = await self._ours(ask, verdict, size, ask.crc or 0, deadline)
        await self.abort(ask.key, upload, deadline=deadline)
        return etag

    async def abort(self, key: str, upload: str, *, deadline: float) -> None:
        """Let nothing of an upload be left: it is asked for until it is not known any more.

        However near the deadline is, there are some seconds for that: it is what is done when all else has failed.
        """
        deadline = max(deadline, asyncio.get_running_loop().time() + _FAREWELL)
        begun = self._uploads.pop(upload, None)
        query = b"uploadId=" + _escaped_bytes(upload)
        gone = _Gone("abort", key, query)
        for tried in range(_ABORTS):
            await self.attempts.run(gone, deadline)
            if gone.missing:
                if not tried and not gone.unsure and begun is not None:
                    self._lost.setdefault(key, []).append(begun.begun)  # its id may have been damaged on the way
                break
            if not await self._has(key, upload, deadline):
                break
        await self._sweep(key, deadline)

    async def _has(self, key: str, upload: str, deadline: float) -> int:
        """Ask for the parts of an upload: how many, -1 of none where it is known."""
        ask = self._said(
            "abort", key, b"GET", b"uploadId=" + _escaped_bytes(upload), root="ListPartsResult", optional=True
        )
        await self.attempts.run(ask, deadline)
        return 0 if ask.node is None else len(ask.node.all("Part")) or -1

    async def _sweep(self, key: str, deadline: float) -> None:
        """Abort what was begun for a key by requests whose answers were lost.

        That is what was begun in their time, is not one of those known here, and has no part: another's, of the same
        key, that was begun just then has one by now, or fails and is begun again.
        """
        lost = self._lost.get(key)
        if lost is None or self._beginning[key] > 0:  # one that is being begun cannot be told from one that is lost
            return
        ask = self._said(
            "abort",
            key,
            b"GET",
            b"prefix=%b&uploads=" % _escaped_bytes(key),
            root="ListMultipartUploadsResult",
            bucket=True,
        )
        await self.attempts.run(ask, deadline)
        if self._beginning[key] > 0:
            return
        ahead = self._ahead(ask)
        for node in ask.node.all("Upload") if ask.node is not None else ():
            upload, began = node.text("UploadId"), iso_time(node.text("Initiated")) - ahead
            if node.text("Key") != key or upload in self._uploads:
                continue
            meant = any(span.since - _SLACK <= began <= span.until + _SLACK for span in lost)
            if meant and await self._has(key, upload, deadline) < 0:
                await self.attempts.run(_Gone("abort", key, b"uploadId=" + _escaped_bytes(upload)), deadline)
        self._lost.pop(key, None)

    def _ahead(self, ask: _Said) -> float:
        """By how much the store's clock is ahead."""
        said = http_time(ask.headers_of.get(b"date", b""))
        return said - time.time() if said else 0.0

    # -- what is there

    async def head(self, key: str, *, deadline: float) -> ObjectInfo:
        """Ask what an object is."""
        ask = _Head(key)
        await self.attempts.run(ask, deadline)
        return ask.info

    async def list(self, prefix: str, *, deadline: float, after: str = "") -> AsyncIterator[ObjectInfo]:
        """Give what is there, page by page."""
        token, last = "", after
        while True:
            pairs = {"encoding-type": "url", "list-type": "2", "max-keys": str(_PAGE), "prefix": prefix}
            if token:
                pairs["continuation-token"] = token
            elif after:
                pairs["start-after"] = after
            query = "&".join([f"{name}={quote(value, safe='-_.~')}" for name, value in sorted(pairs.items())])
            ask = self._said("list", prefix, b"GET", query.encode(), root="ListBucketResult", bucket=True)
            await self.attempts.run(ask, deadline)
            assert ask.node is not None
            found = _listed(ask.node)
            for info in found:
                yield info
            if ask.node.text("IsTruncated") != "true":
                return
            token = ask.node.text("NextContinuationToken")
            if not token or not found or found[-1].key <= last:
                what = "a page of the list that does not lead to the next"
                raise self.attempts.error(ask, Verdict(Act.END, what, "ask who runs the store"))
            last = found[-1].key

    async def delete(self, keys: Sequence[str], *, deadline: float) -> None:
        """Delete objects, many at a time."""
        speakable = [key for key in keys if not _UNPRINTABLE.search(key)]
        single = [key for key in keys if _UNPRINTABLE.search(key)]
        if len(speakable) == 1:
            single += speakable
            speakable = []
        for key in single:
            await self.attempts.run(_Gone("delete", key), deadline)
        for at in range(0, len(speakable), _PAGE):
            await self._delete(speakable[at : at + _PAGE], deadline)

    async def _delete(self, keys: Sequence[str], deadline: float) -> None:
        rows = "".join([f"<Object><Key>{_escaped(key)}</Key></Object>" for key in keys])
        body = f"<Delete {_XMLNS}><Quiet>true</Quiet>{rows}</Delete>".encode()
        ask = _Deletion(
            self.dialect, "delete", keys[0], b"POST", b"/", b"delete=", root="DeleteResult", body=body,
            headers=[content_md5(body)], size=len(body),
        )  # fmt: skip
        await self.attempts.run(ask, deadline)

    async def copy(self, source: str, target: str, *, deadline: float) -> None:
        """Copy an object within the bucket, in parts where it is large."""
        info = await self.head(source, deadline=deadline)
        origin: _Headers = [(b"x-amz-copy-source", b"/" + self.dialect.bucket.encode() + quoted(source))]
        if info.etag:
            origin.append((b"x-amz-copy-source-if-match", info.etag.encode("latin-1")))
        if info.nbytes <= self.largest_copy:
            ask = self._said("copy", target, b"PUT", b"", root="CopyObjectResult", headers=origin, size=info.nbytes)
            await self.attempts.run(ask, deadline)
            return
        upload = await self.begin(target, deadline=deadline)
        try:
            rows = await self._copied(target, upload, origin, info.nbytes, deadline)
            ask = _Completion(
                self.dialect, target, upload, headers=[], body=_part_list(rows), size=info.nbytes, exists="replace"
            )
            await self.attempts.run(ask, deadline)
            self._uploads.pop(upload, None)
        except BaseException:
            await self.abort(target, upload, deadline=deadline)
            raise

    async def _copied(self, target: str, upload: str, origin: _Headers, nbytes: int, deadline: float) -> _Rows:
        """Copy the parts, several at a time."""
        size = max(self.copied_part, -(-nbytes // self.most_parts))
        turns = asyncio.Semaphore(_COPIES)

        async def one(number: int) -> _Row:
            first = (number - 1) * size
            last = min(first + size, nbytes) - 1
            query = b"partNumber=%d&uploadId=%b" % (number, _escaped_bytes(upload))
            headers = [*origin, (b"x-amz-copy-source-range", b"bytes=%d-%d" % (first, last))]
            ask = self._said(
                "copy", target, b"PUT", query, root="CopyPartResult", headers=headers, size=last + 1 - first
            )
            async with turns:
                await self.attempts.run(ask, deadline)
            return number, ask.text("ETag"), from_header(ask.text("ChecksumCRC64NVME").encode())

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(number)) for number in range(1, -(-nbytes // size) + 1)]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return [task.result() for task in tasks]

    # -- shared

    def _said(
        self,
        op: str,
        key: str,
        method: bytes,
        query: bytes,
        *,
        root: str,
        headers: _Headers | None = None,
        size: int = 0,
        bucket: bool = False,
        optional: bool = False,
    ) -> _Said:
        path = b"/" if bucket else quoted(key)
        return _Said(
            self.dialect, op, key, method, path, query, root=root, headers=headers, size=size, optional=optional
        )


# ---- words --------------------------------------------------------------------------------------------------------


def _escaped_bytes(text: str) -> bytes:
    """Give a value of a query."""
    return quote(text, safe="-_.~").encode()


def _escaped(text: str) -> str:
    """Give text for XML; what a reader would change is written by its number."""
    return escape(text, {"\r": "&#13;", "\n": "&#10;", "\t": "&#9;"})


def _part_list(rows: Iterable[_Row]) -> bytes:
    """Give what names the parts of an upload: numbers, etags, and checksums where they are kept."""
    found = []
    for number, etag, crc in rows:
        sum_ = "" if crc is None else f"<ChecksumCRC64NVME>{as_header(crc).decode()}</ChecksumCRC64NVME>"
        found.append(f"<Part><PartNumber>{number}</PartNumber><ETag>{_escaped(etag)}</ETag>{sum_}</Part>")
    return f"<CompleteMultipartUpload {_XMLNS}>{''.join(found)}</CompleteMultipartUpload>".encode()


def _listed(page: Node) -> list[ObjectInfo]:
    encoded = page.text("EncodingType") == "url"
    found = []
    for node in page.all("Contents"):
        key = node.text("Key")
        key = unquote(key.replace("+", " ")) if encoded else key
        found.append(
            ObjectInfo(key, int(node.text("Size")), node.text("ETag"), iso_time(node.text("LastModified")), None)
        )
    return found
