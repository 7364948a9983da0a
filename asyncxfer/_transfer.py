"""Transfers: from a completion to something that can be awaited, cancelled and iterated over.

A transfer ends in one of the ways of the table `_ENDINGS`, and never before its buffers are quiescent. Everything but
the awaiting works in any thread and without an event loop. What it moves stands in its plan (`_plan`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ._done import Done
from ._errors import (
    ChecksumError,
    ClosedError,
    ConfigError,
    DescriptorError,
    PeerLostError,
    TransferError,
    TransferTimeout,
)
from ._fast import completion as _native
from ._fast.completion import CompletionQueue
from ._fast.posting import Counter, Posting, Roster
from ._progress import Progress
from .abc import Op

if TYPE_CHECKING:
    from ._fast.link import Link

__all__ = ["Flights", "Transfer"]

# A transfer that ends while it is posted never lets the loop turn; its share of the loop's time is counted with this
# much for what Python adds to it.
_PYTHON_NS = 2_000


class Flights(Roster):
    """The transfers of one agent that are in flight, and what they need from it.

    Parameters
    ----------
    loop : asyncio.AbstractEventLoop
        The agent's own; transfers that are posted outside any loop are settled there.
    notification_bytes : int, bytes
        Largest tag.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, queue: CompletionQueue, notification_bytes: int) -> None:
        super().__init__(queue, Transfer)
        self.loop = loop
        self.notification_bytes = notification_bytes
        self.counters: dict[tuple[str, str, Op], Counter] = {}

    def counter(self, peer: str, backend: str, op: Op) -> Counter:
        """The counter of one peer, backend and direction."""
        return self.counters.setdefault((peer, backend, op), Counter())

    def check_open(self) -> None:
        """Raise ClosedError when the agent has been closed."""
        if self.closed is not None:
            raise ClosedError(self.closed)

    def check_note(self, notify: bytes | None, timeout: float | None) -> None:
        """Raise when a tag or a time limit is unusable."""
        if notify is not None:
            if not isinstance(notify, bytes):
                raise DescriptorError(f"a notification is bytes, not {type(notify).__name__}")
            if len(notify) > self.notification_bytes:
                raise DescriptorError(
                    f"a notification of {len(notify)} bytes; at most {self.notification_bytes} can be sent "
                    "(configuration key notification_bytes)"
                )
        if timeout is not None and not timeout >= 0:
            raise ConfigError(f"timeout is {timeout!r}; expected seconds, 0 or more, or None")

    def using(self, side: object) -> list[Transfer]:
        """Transfers in flight that read or write a region."""
        return [t for t in self.all() if side in t.plan.sides]

    def to(self, link: Link) -> list[Transfer]:
        """Transfers in flight over a connection."""
        return [t for t in self.all() if t.plan.link is link]

    def drop(self, why: str) -> None:
        """In a forked child: what is in flight is the parent's."""
        self.closed = why
        self.clear()

    async def settle(
        self, transfers: Sequence[Transfer], *, within: float | None, status: int = _native.STATUS_REVOKED
    ) -> None:
        """Wait until transfers have ended; those that have not after `within` seconds are stopped, for `status`."""
        waiting = [asyncio.ensure_future(t.ended()) for t in transfers]
        if not waiting:
            return
        _, late = await asyncio.wait(waiting, timeout=within)
        if late:
            for transfer in transfers:
                transfer.stop(status)
            await asyncio.wait(late)


class Transfer(Posting):
    """One transfer: awaitable, cancellable, and an asynchronous iterator over its descriptors as they complete.

    ``await transfer`` gives `Done` or raises. A transfer that is dropped goes on: the agent holds it until it has
    ended, and if it then fails and nobody has asked, the loop's exception handler is told.
    """

    __slots__ = ()

    # -- outcome

    def cancel(self) -> bool:
        """Ask for an early end; False when it has ended or was asked before.

        Awaiting it then raises CancelledError once the buffers are quiescent, or gives the result if it was quicker.
        """
        return self.stop(_native.STATUS_CANCELLED)

    def result(self) -> Done:
        """Return what it did, or raise; only once `done`.

        Raises
        ------
        TransferError
            And its kinds: how it failed.
        asyncio.CancelledError
            It was cancelled.
        asyncio.InvalidStateError
            It is still in flight.
        """
        error = self.exception()
        if error is not None:
            raise error
        return self.did()

    def exception(self) -> BaseException | None:
        """Return how it failed, None where it did not; only once `done`."""
        status = self.status
        if status == _native.STATUS_OK:
            return None
        if status < 0:
            raise asyncio.InvalidStateError("the transfer is still in flight")
        self.asked = True
        return _failure(self, status)

    @property
    def progress(self) -> float:
        """Share of the bytes that have been moved, from 0.0 to 1.0."""
        return self.moved / self.plan.nbytes if self.plan.nbytes else float(self.done())

    def __repr__(self) -> str:
        state = "in flight" if not self.done() else "done" if self.status == 0 else "failed"
        return f"<Transfer: {self.plan}, {state}>"

    def abandon(self, error: BaseException) -> None:
        """End it, as failed, for a caller who is told at once."""
        self.asked = True
        self.fail(error)

    # -- awaiting

    def __await__(self) -> Generator[Any, None, Done]:
        """Wait until it has ended.

        Raises
        ------
        TransferError
            And its kinds: how it failed.
        """
        done = self.swift()
        if done is not None:
            return done
        if self.done():
            if not (self.over or self.inlined) and asyncio.get_running_loop() is self.flights.loop:
                self.queue.drain()  # it was quicker than the loop: settle now, or those that have ended pile up
            if self.queue.overdue(self.elapsed + _PYTHON_NS):
                yield  # many transfers that end at once would otherwise never let the loop turn
            return self.result()
        cancelled: asyncio.CancelledError | None = None
        while not self.done():
            try:
                yield from self._waiter()
            except asyncio.CancelledError as error:
                cancelled = error
                self.cancel()
        if cancelled is not None:
            self.asked = True
            raise cancelled
        return self.result()

    def _waiter(self) -> asyncio.Future[None]:
        """A future of the running loop that ends with the next news of this transfer."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiters.append(waiter)
        if self.over:
            _resolve(waiter)
        return waiter

    def _wake(self) -> None:
        here, waiters = self.flights.loop, self.waiters
        while waiters:  # one by one: another loop's thread may be adding to the same list
            waiter = waiters.pop()
            loop = waiter.get_loop()
            if loop is here:
                _resolve(waiter)
            else:
                with contextlib.suppress(RuntimeError):  # that loop has been closed: nobody waits there any more
                    loop.call_soon_threadsafe(_resolve, waiter)

    def post(self, stopper: Callable[[], object] | None = None, chunks: int = 0) -> None:
        """Say that it is in flight by a backend that does not watch time limits: from now on the agent's loop does."""
        super().post(stopper, chunks)
        if self.remaining is not None:
            self.flights.loop.call_soon_threadsafe(self._watch_time)

    def _watch_time(self) -> None:
        if self.remaining is not None and not self.over:
            self.timer = self.flights.loop.call_later(self.remaining, self.stop, _native.STATUS_TIMED_OUT)

    def _post_note(self, told: Callable[[bool], None]) -> None:
        """Have the control channel deliver the note; an early end ends the wait for that."""
        loop = self.flights.loop
        self.post(lambda: loop.call_soon_threadsafe(told, False))
        super()._post_note(told)

    def _settled(self) -> None:
        self.over = True
        if self.timer is not None:
            self.timer.cancel()
        self.account()
        self._wake()

    def _settled_inline(self) -> None:
        """It ended within the call that posted it, in whatever thread that was; the queue hears nothing of it."""
        self.over = True
        self.account()
        if self.waiters:  # another thread has seen it in the middle of that call, and waits
            self.flights.loop.call_soon_threadsafe(self._wake)

    def _progressed(self) -> None:
        self._wake()

    async def ended(self) -> None:
        """Wait until it has ended, however it ends."""
        while not self.done():
            await self._waiter()

    def _unheard(self) -> None:
        loop = self.flights.loop
        if not loop.is_closed():
            loop.call_exception_handler(
                {"message": f"{self.plan} failed and nobody awaited it", "exception": self.exception()}
            )

    # -- iterating

    async def __aiter__(self) -> AsyncIterator[int]:
        """Yield the numbers of the local list's rows as they complete; raises at the end if the transfer failed."""
        progress = Progress(self)
        self.watch(True)
        try:
            while True:
                ended = self.done()
                for row in progress.fresh():
                    yield row
                if ended:
                    break
                if not self.done() and not progress.has_news():
                    await self._news()
        finally:
            self.watch(False)
        self.result()

    async def _news(self) -> None:
        """Wait for the next chunk, or the end; cancelled, end the transfer first, as awaiting it does."""
        try:
            await self._waiter()
        except asyncio.CancelledError:
            self.cancel()
            with contextlib.suppress(TransferError, asyncio.CancelledError):
                await self
            raise


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


# ---- how transfers fail ---------------------------------------------------------------------------------------------


def _failure(transfer: Transfer, status: int) -> BaseException:
    """The exception for a status of native code."""
    if status == _native.STATUS_CANCELLED:
        return asyncio.CancelledError(f"{transfer.plan} was cancelled")
    kind, text = _ENDINGS[status]
    if status == _native.STATUS_MISMATCH:
        text = f"{text}: {_rows_of_chunk(transfer)}"
    cause = transfer.error
    if isinstance(cause, TransferError):
        return cause
    if status == _native.STATUS_PEER_GONE and cause is None:
        cause = _what_is_known(transfer)
    why = text if cause is None else f"{text}: {cause}"
    error = kind(f"{transfer.plan} {why}", nbytes=transfer.moved, backend=transfer.plan.backend)
    error.__cause__ = cause
    return error


def _what_is_known(transfer: Transfer) -> PeerLostError | None:
    """What became of the peer, in the words of its region; None where nothing is known yet."""
    for side in transfer.plan.sides:
        try:
            side.check_open()
        except PeerLostError as error:
            return error
        except ClosedError:
            continue
    return None


def _rows_of_chunk(transfer: Transfer) -> str:
    """The rows of the local list that lie in the chunk which came wrong."""
    ends, rows, chunk = transfer.plan.chunk_ends(), transfer.plan.row_ends(), transfer.detail
    begin = int(ends[chunk - 1]) if chunk else 0
    first, last = np.searchsorted(rows, begin, side="right"), np.searchsorted(rows, int(ends[chunk]), side="left")
    return f"row {first} of the local list" if first == last else f"rows {first} to {last} of the local list"


_ENDINGS: dict[int, tuple[type[TransferError], str]] = {
    _native.STATUS_TIMED_OUT: (TransferTimeout, "did not end within its timeout"),
    _native.STATUS_PEER_GONE: (PeerLostError, "lost its peer"),
    _native.STATUS_REVOKED: (TransferError, "stopped: a region of it was deregistered, or its agent closed"),
    _native.STATUS_FAULT: (TransferError, "stopped: memory went away under it (unmapped, or its file truncated)"),
    _native.STATUS_DENIED: (
        TransferError,
        "was refused by the peer: its region grants no such access, or has no such rows",
    ),
    _native.STATUS_NOT_PERMITTED: (
        TransferError,
        "was refused by the kernel (process_vm_readv/writev: EPERM; see `asyncxfer doctor`)",
    ),
    _native.STATUS_FAILED: (TransferError, "failed"),
    _native.STATUS_MISMATCH: (ChecksumError, "arrived damaged, twice"),
}
