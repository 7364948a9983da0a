"""One transfer between memory and objects in flight: its spans, several at a time, and the parts of large ones.

Lives in the I/O thread; `stop` is called from any. It ends its completion once nothing of it touches memory any more.
How a single request survives is not known here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from ..._errors import ChecksumError, ObjectError, TransferError
from ..._fast.crc64 import combine
from ...abc import Completion, Exists
from ._store import ObjectStore, Part
from ._sums import as_header, combine_crc32c
from ._work import Span, Work

if TYPE_CHECKING:
    from ..._config import Config
    from ._thread import IoThread

__all__ = ["Flight"]

_ABORT = 10.0  # seconds for giving up an upload


class Flight:
    """A transfer in flight.

    Parameters
    ----------
    work : Work
    store : callable
        Gives the store of a way.
    exists : {"replace", "keep", "error"}
        What becomes of an object that is there.
    completion : Completion
    config : Config
    thread : IoThread
    left : callable
        Takes what goes on when the transfer has ended: uploads that are given up.
    backend : str
    """

    def __init__(
        self, work: Work, store: Callable[[str], Awaitable[ObjectStore]], exists: Exists, completion: Completion,
        config: Config, thread: IoThread, left: Callable[[Awaitable[None]], None], backend: str,
    ) -> None:  # fmt: skip
        self._work = work
        self._find = store
        self._store: ObjectStore
        self._exists: Exists = exists
        self._completion = completion
        self._config = config
        self._thread = thread
        self._left = left
        self._backend = backend
        self._begun: asyncio.Task[None] | None = None
        self._until = float("inf")

    def stop(self) -> None:
        """End it early, from any thread."""
        self._thread.call(self._cancel)

    def _cancel(self) -> None:
        if self._begun is not None:  # a task that is cancelled before it begins would never end the transfer
            self._begun.cancel()

    def start(self) -> None:
        """Begin, in the I/O thread."""
        self._thread.loop.create_task(self._run(), name="axf-object")

    async def _run(self) -> None:
        completion = self._completion
        self._begun = asyncio.current_task()
        try:
            if not completion.stopping:
                await self._move()
        except asyncio.CancelledError:
            completion.succeed()  # which counts as stopped
        except TransferError as error:
            error.nbytes, error.backend = completion.moved, self._backend
            completion.fail(error)
        except Exception as error:  # noqa: BLE001 - whoever awaits the transfer gets it
            completion.fail(error)
        else:
            completion.succeed()
        finally:
            self._begun = None  # which would keep this, and this it

    async def _move(self) -> None:
        remaining = self._completion.remaining
        if remaining is not None:
            self._until = self._thread.loop.time() + remaining
        self._store = await self._find(self._work.via)
        spans = self._work.spans
        if len(spans) == 1:
            await self._carry(spans[0])
            return
        todo = iter(spans)
        async with _unwrapped(), asyncio.TaskGroup() as group:
            for _ in range(min(len(spans), self._config.object_concurrency)):
                group.create_task(self._carry_all(todo))

    async def _carry_all(self, todo: Iterator[Span]) -> None:
        for span in todo:
            await self._carry(span)

    async def _carry(self, span: Span) -> None:
        large = span.nbytes > self._config.object_multipart_bytes
        if self._work.write:
            await (self._upload if large else self._write)(span)
        else:
            await (self._download if large else self._read)(span)
        for chunk in self._work.numbers(span):
            self._completion.advance(0, chunk)

    @property
    def _deadline(self) -> float:
        return min(self._until, self._thread.loop.time() + self._config.object_timeout)

    # -- in one request

    async def _write(self, span: Span) -> None:
        body = self._work.buffers(span, 0, span.nbytes)
        await self._store.write(span.key, body, exists=self._exists, deadline=self._deadline)
        self._completion.advance(span.nbytes)

    async def _read(self, span: Span) -> None:
        work = self._work
        into = work.buffers(span, 0, span.nbytes)
        await self._store.read(
            span.key, span.offset, into, whole=work.whole, verify=work.verify, etag=None, deadline=self._deadline
        )
        self._completion.advance(span.nbytes)

    # -- in parts

    def _part_bytes(self, span: Span) -> int:
        store, wanted = self._store, self._config.object_part_bytes
        return max(wanted, store.smallest_part, -(-span.nbytes // store.most_parts))

    async def _upload(self, span: Span) -> None:
        store, size = self._store, self._part_bytes(span)
        upload = await store.begin(span.key, deadline=self._deadline)
        parts: list[Part] = []
        try:

            async def send(number: int, start: int, nbytes: int) -> None:
                body = self._work.buffers(span, start, nbytes)
                parts.append(await store.part(span.key, upload, number + 1, body, deadline=self._deadline))
                self._completion.advance(nbytes)

            await self._in_parts(span.nbytes, size, send)
            parts.sort(key=lambda part: part.number)
            await store.complete(span.key, upload, parts, exists=self._exists, deadline=self._deadline)
        except BaseException:
            self._left(store.abort(span.key, upload, deadline=self._thread.loop.time() + _ABORT))
            raise

    async def _download(self, span: Span) -> None:
        """Read one version of an object in parts, and prove the whole by the store's checksum."""
        store, work = self._store, self._work
        info = await store.head(span.key, deadline=self._deadline)
        if span.offset + span.nbytes > info.nbytes or (work.whole and span.nbytes != info.nbytes):
            raise self._misfit(span, info.nbytes)
        kind, _, expected = (info.checksum or "").partition(":")
        proved = work.whole and kind == store.algorithm
        sums: dict[int, tuple[int | None, int]] = {}

        async def receive(number: int, start: int, nbytes: int) -> None:
            into = work.buffers(span, start, nbytes)
            read = await store.read(
                span.key, span.offset + start, into, whole=False, verify=work.verify and not proved, etag=info.etag,
                deadline=self._deadline, crc=proved,
            )  # fmt: skip
            if number not in sums:
                self._completion.advance(nbytes)
            sums[number] = read.crc, nbytes

        for _ in range(2 if proved else 1):
            await self._in_parts(span.nbytes, self._part_bytes(span), receive)
            if not proved or _agrees(kind, [sums[number] for number in sorted(sums)], expected):
                return
        raise ChecksumError(f"{store.url}/{span.key} arrived damaged, twice: its parts together are not what is stored")

    def _misfit(self, span: Span, nbytes: int) -> ObjectError:
        url = f"{self._store.url}/{span.key}"
        asked = f"all of {span.nbytes:,}" if self._work.whole else f"{span.nbytes:,} at offset {span.offset:,}"
        return ObjectError(
            f"get of {url}: the object has {nbytes:,} bytes, {asked} were asked for; name a range that it has, or as "
            "much memory as it is long", url=url,
        )  # fmt: skip

    async def _in_parts(self, nbytes: int, size: int, do: Callable[[int, int, int], Awaitable[None]]) -> None:
        """Do something with each part of so many bytes, several at a time."""
        todo = iter(range(0, nbytes, size))

        async def some() -> None:
            for start in todo:
                await do(start // size, start, min(size, nbytes - start))

        async with _unwrapped(), asyncio.TaskGroup() as group:
            for _ in range(min(-(-nbytes // size), self._config.object_concurrency)):
                group.create_task(some())


@asynccontextmanager
async def _unwrapped() -> AsyncIterator[None]:
    """The first error of a group by itself."""
    try:
        yield
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


def _agrees(algorithm: str, sums: list[tuple[int | None, int]], expected: str) -> bool:
    """Whether parts have, one behind the other, a checksum that a store states in base64."""
    whole = 0
    for crc, nbytes in sums:
        if crc is None:
            return True  # it has been proved by other means
        whole = (combine if algorithm == "crc64nvme" else combine_crc32c)(whole, crc, nbytes)
    return as_header(whole, 8 if algorithm == "crc64nvme" else 4).decode() == expected
