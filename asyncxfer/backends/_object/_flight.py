"""One transfer between memory and objects in flight: its spans, several at a time, and the parts of large ones.

Lives in the I/O thread; `stop` is called from any. It ends its completion once nothing of it touches memory any more.
Requests are about host memory: where the memory is a GPU's, a piece of pinned memory stands in for it, and while one is
copied others are received or sent. How a single request survives is not known here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeVar

from ..._errors import ChecksumError, ObjectError, TransferError
from ..._fast.crc64 import combine
from ...abc import Completion, Exists
from ._pace import priority as priority_of_task
from ._store import ObjectStore, Part
from ._sums import as_header, combine_crc32c
from ._work import Span, Work

if TYPE_CHECKING:
    from ..._config import Config
    from ._staging import Staging
    from ._thread import IoThread

__all__ = ["Flight"]

_T = TypeVar("_T")

_UNBOUNDED = 1 << 63
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
    staging : Staging or None
        For GPU memory.
    priority : int
        Its requests go before those of less where not all may be under way.
    """

    def __init__(
        self, work: Work, store: Callable[[str], Awaitable[ObjectStore]], exists: Exists, completion: Completion,
        config: Config, thread: IoThread, left: Callable[[Awaitable[None]], None], backend: str,
        staging: Staging | None = None, priority: int = 0,
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
        self._staging = None if work.device is None else staging
        self._priority = priority
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
        priority_of_task.set(self._priority)
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
        large = span.nbytes > min(self._config.object_multipart_bytes, self._most)
        if self._work.write:
            await (self._upload if large else self._write)(span)
        else:
            await (self._download if large else self._read)(span)
        for chunk in self._work.numbers(span):
            self._completion.advance(0, chunk)

    @property
    def _deadline(self) -> float:
        return min(self._until, self._thread.loop.time() + self._config.object_timeout)

    # -- memory

    @property
    def _most(self) -> int:
        """Bytes that one request should be about at most: there is to be room for another meanwhile."""
        return _UNBOUNDED if self._staging is None else self._staging.nbytes // 2

    async def _lend(
        self, span: Span, start: int, nbytes: int, request: Callable[[list[memoryview]], Awaitable[_T]]
    ) -> _T:
        """Make a request with the memory of a part of a span, or with pinned memory in its place."""
        work, staging = self._work, self._staging
        if staging is None or work.device is None or not nbytes:
            return await request(work.buffers(span, start, nbytes))
        places = work.places(span, start, nbytes)
        async with staging.lend(nbytes, work.device) as piece:
            if work.write:
                await staging.copy(work.device, places, piece, to_device=False)
            done = await request([piece])
            if not work.write:
                await staging.copy(work.device, places, piece, to_device=True)
        return done

    # -- in one request

    async def _write(self, span: Span) -> None:
        await self._lend(
            span, 0, span.nbytes,
            lambda body: self._store.write(span.key, body, exists=self._exists, deadline=self._deadline),
        )  # fmt: skip
        self._completion.advance(span.nbytes)

    async def _read(self, span: Span) -> None:
        work = self._work
        await self._lend(
            span, 0, span.nbytes,
            lambda into: self._store.read(
                span.key, span.offset, into, whole=work.whole, verify=work.verify, etag=None, deadline=self._deadline
            ),
        )  # fmt: skip
        self._completion.advance(span.nbytes)

    # -- in parts

    def _part_bytes(self, span: Span) -> int:
        store, wanted = self._store, min(self._config.object_part_bytes, self._most)
        if self._staging is not None and not self._work.write:
            return wanted  # of ranges there may be as many as one likes
        return max(wanted, store.smallest_part, -(-span.nbytes // store.most_parts))

    async def _upload(self, span: Span) -> None:
        store, size = self._store, self._part_bytes(span)
        if self._staging is not None:
            self._staging.check(size)
        upload = await store.begin(span.key, deadline=self._deadline)
        parts: list[Part] = []
        try:

            async def send(number: int, start: int, nbytes: int) -> None:
                part = await self._lend(
                    span, start, nbytes,
                    lambda body: store.part(span.key, upload, number + 1, body, deadline=self._deadline),
                )  # fmt: skip
                parts.append(part)
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
            read = await self._lend(
                span, start, nbytes,
                lambda into: store.read(
                    span.key, span.offset + start, into, whole=False, verify=work.verify and not proved,
                    etag=info.etag, deadline=self._deadline, crc=proved,
                ),
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
