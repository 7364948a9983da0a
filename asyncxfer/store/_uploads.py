"""Write-back: blocks that are on disk become objects, behind the puts, until all of them are.

Blocks wait in a line of bounded length; when it is full, puts wait for room. What fails is tried again for as long as
the store is open, at growing intervals. How a block is brought from one place to the other is not known here.
"""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager

from ._errors import StoreError, StoreFullError

__all__ = ["Uploads"]

_FIRST_DELAY, _LAST_DELAY = 0.1, 30.0  # seconds between attempts, when they fail


class _Upload:
    """A block that is to become an object."""

    __slots__ = ("number", "running", "waiter")

    def __init__(self, number: int) -> None:
        self.number = number
        self.running = False
        self.waiter: asyncio.Future[None] | None = None

    def wait(self) -> asyncio.Future[None]:
        """What ends when it has become one, or an attempt has failed."""
        if self.waiter is None:
            self.waiter = asyncio.get_running_loop().create_future()
        return self.waiter

    def tell(self, error: BaseException | None = None) -> None:
        """End the waiting."""
        waiter, self.waiter = self.waiter, None
        if waiter is None or waiter.done():
            return
        if error is None:
            waiter.set_result(None)
        else:
            waiter.set_exception(error)
            waiter.exception()


class Uploads:
    """The line of one store, and the tasks that work it off.

    Parameters
    ----------
    upload : callable
        Makes objects of up to so many blocks as `batch` says; raises where that fails, if only with one of them.
    idle : callable
        Called when the line is empty.
    limit : int
        Blocks that wait at most; those found when the store was opened may be more.
    width, batch : int
        How many times so many blocks at a time.
    where : str
        The objects, for messages.
    """

    def __init__(
        self, upload: Callable[[list[bytes]], Awaitable[None]], idle: Callable[[], None], *, limit: int, width: int,
        batch: int, where: str,
    ) -> None:  # fmt: skip
        self._upload = upload
        self._idle = idle
        self.limit = limit
        self._where = where
        self._pending: OrderedDict[bytes, _Upload] = OrderedDict()
        self._queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._number = 0
        self._reserved = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._news = asyncio.Event()  # something has ended, one way or the other
        self._stopping = asyncio.Event()
        self._delay = _FIRST_DELAY
        self._failure: Exception | None = None
        self.uploaded = 0
        self.failures = 0
        self._width, self._batch = width, batch
        self._workers: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to work the line off."""
        self._workers = [asyncio.ensure_future(self._work()) for _ in range(self._width)]

    def __len__(self) -> int:
        return len(self._pending)

    def __contains__(self, ident: bytes) -> bool:
        return ident in self._pending

    # ---- room in the line --------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def room(self, count: int) -> AsyncIterator[None]:
        """Have room for so many blocks more, once there is.

        Raises
        ------
        StoreFullError
            The line is full, and the objects cannot be written to.
        """
        count = min(count, self.limit)
        if self._waiting or not self._fits(count):
            await self._wait_for_room(count)
        else:
            self._reserved += count
        try:
            yield
        finally:
            self._reserved -= count
            self._admit()

    def _fits(self, count: int) -> bool:
        return len(self._pending) + self._reserved + count <= self.limit or not (self._pending or self._reserved)

    async def _wait_for_room(self, count: int) -> None:
        if self._failure is not None:
            raise self._full(self._failure)
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((count, waiter))
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._reserved -= count  # it had been let in
            self._admit()
            raise

    def _admit(self) -> None:
        while self._waiting:
            count, waiter = self._waiting[0]
            if not waiter.done():
                if not self._fits(count):
                    return
                self._reserved += count
                waiter.set_result(None)
            self._waiting.popleft()

    def _full(self, error: Exception) -> StoreFullError:
        full = StoreFullError(
            f"{len(self._pending):,} blocks wait to become objects of {self._where}, as many as may, and the last "
            f"attempt has failed: {error}"
        )
        full.__cause__ = error
        return full

    # ---- the line ----------------------------------------------------------------------------------------------------

    def add(self, idents: Iterable[bytes]) -> None:
        """Have blocks become objects."""
        for ident in idents:
            self._number += 1
            self._pending[ident] = _Upload(self._number)
            self._queue.put_nowait(ident)

    async def forget(self, idents: Iterable[bytes]) -> list[bytes]:
        """Take blocks out of the line, once none of them is on its way; those that were in it."""
        forgotten = []
        for ident in idents:
            while (entry := self._pending.get(ident)) is not None and entry.running:
                self._news.clear()
                await self._news.wait()
            if entry is not None:
                del self._pending[ident]
                entry.tell()
                forgotten.append(ident)
        self._admit()
        self._tell_news()
        return forgotten

    async def wait(self, idents: Iterable[bytes]) -> None:
        """Wait until these are objects.

        Raises
        ------
        StoreError
            One could not be made; it is tried again.
        """
        for ident in idents:
            if (entry := self._pending.get(ident)) is not None:
                try:
                    await asyncio.shield(entry.wait())
                except Exception as error:
                    raise self._late(error) from error

    async def flush(self) -> None:
        """Wait until all that are in the line now are objects.

        Raises
        ------
        StoreError
            One could not be made since; it is tried again.
        """
        last, failures = self._number, self.failures
        while self._pending and next(iter(self._pending.values())).number <= last:
            self._news.clear()
            await self._news.wait()
            if self.failures > failures and self._failure is not None:
                raise self._late(self._failure) from self._failure

    def _late(self, error: Exception) -> StoreError:
        return StoreError(
            f"{len(self._pending):,} blocks are on disk and not yet objects of {self._where}; they are tried again as "
            f"long as the store is open, and when it is opened again ({error})"
        )

    # ---- working it off ----------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        while (first := await self._queue.get()) is not None and not self._stopping.is_set():
            chosen = self._choose(first)
            if not chosen:
                continue
            try:
                await self._upload(list(chosen))
            except Exception as error:  # noqa: BLE001 - whatever it is, it is tried again, and told
                self._failed(chosen, error)
                await self._back_off()
            else:
                self._ended(chosen)

    def _choose(self, first: bytes) -> dict[bytes, _Upload]:
        """Take the next ones out of the queue."""
        chosen: dict[bytes, _Upload] = {}
        ident: bytes | None = first
        while ident is not None:
            entry = self._pending.get(ident)
            if entry is not None and not entry.running:
                entry.running = True
                chosen[ident] = entry
            if len(chosen) == self._batch or self._queue.empty():
                return chosen
            ident = self._queue.get_nowait()
        self._queue.put_nowait(None)  # another's sign to end
        return chosen

    def _ended(self, chosen: dict[bytes, _Upload]) -> None:
        self._failure, self._delay = None, _FIRST_DELAY
        self.uploaded += len(chosen)
        for ident, entry in chosen.items():
            entry.running = False
            if self._pending.get(ident) is entry:
                del self._pending[ident]
            entry.tell()
        self._admit()
        if not self._pending:
            self._idle()
        self._tell_news()

    def _failed(self, chosen: dict[bytes, _Upload], error: Exception) -> None:
        self.failures += 1
        self._failure = error
        for ident, entry in chosen.items():
            entry.running = False
            self._queue.put_nowait(ident)
            entry.tell(error)
        while self._waiting:
            _, waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_exception(self._full(error))
        self._tell_news()

    def _tell_news(self) -> None:
        self._news.set()

    async def _back_off(self) -> None:
        delay = random.uniform(self._delay / 2, self._delay)  # noqa: S311 - it keeps no secret
        self._delay = min(2 * self._delay, _LAST_DELAY)
        try:
            async with asyncio.timeout(delay):
                await self._stopping.wait()
        except TimeoutError:
            pass

    async def aclose(self) -> None:
        """Let what is on its way end; the rest stays where it is."""
        self._stopping.set()
        for _ in self._workers:
            self._queue.put_nowait(None)
        if self._failure is not None:  # what is tried again has hardly a chance
            for worker in self._workers:
                worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        for entry in self._pending.values():
            entry.tell(StoreError(f"the store was closed before all blocks were objects of {self._where}"))
