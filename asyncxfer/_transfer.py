"""Transfers and plans: from a route to bytes that moved, and from a completion to something that can be awaited.

A plan is a transfer that was checked, matched and routed; calling it posts one transfer. A transfer ends in one of the
ways of the table `_ENDINGS`, and never before its buffers are quiescent. Everything but the awaiting works in any
thread and without an event loop. How bytes move is the backend's business, which backend the chooser's.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ._chooser import Candidate
from ._descriptors import DescriptorList
from ._errors import ClosedError, ConfigError, DescriptorError, PeerLostError, TransferError, TransferTimeout
from ._fast import completion as _native
from ._fast import descriptors as _rows
from ._fast.completion import Completion, CompletionQueue
from .abc import Backend, Op, Request

if TYPE_CHECKING:
    from ._fast.link import Link

__all__ = ["Counter", "Done", "Flights", "Notice", "Plan", "Side", "Transfer", "match"]

# A transfer that ends while it is posted never lets the loop turn; its share of the loop's time is counted with this
# much for what Python adds to it.
_PYTHON_NS = 2_000


class Done(NamedTuple):
    """What a transfer did.

    Attributes
    ----------
    nbytes : int, bytes
    seconds : float, seconds
        From the post until the data, and the notification, had gone out.
    backend : str
    descriptors : int
        Rows of the local list.
    """

    nbytes: int
    seconds: float
    backend: str
    descriptors: int


class Side(Protocol):
    """A region, own or a peer's, as far as a transfer looks at it."""

    name: str

    def check_open(self) -> None:
        """Raise when it can no longer be used."""


@dataclass(slots=True)
class Counter:
    """What went over one backend to one peer in one direction."""

    transfers: int = 0
    nbytes: int = 0
    failed: int = 0
    seconds: float = 0.0


class Flights:
    """The transfers of one agent that are in flight, and what they need from it.

    Parameters
    ----------
    loop : asyncio.AbstractEventLoop
        The agent's own; transfers that are posted outside any loop are settled there.
    notification_bytes : int, bytes
        Largest tag.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, queue: CompletionQueue, notification_bytes: int) -> None:
        self.loop = loop
        self.queue = queue
        self.notification_bytes = notification_bytes
        self.closed: str | None = None
        self.counters: dict[tuple[str, str, Op], Counter] = {}
        self._flying: set[Transfer] = set()

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

    def add(self, transfer: Transfer) -> None:
        """Hold a transfer until it has ended."""
        self._flying.add(transfer)

    def discard(self, transfer: Transfer) -> None:
        """Let go of a transfer."""
        self._flying.discard(transfer)

    def using(self, side: object) -> list[Transfer]:
        """Transfers in flight that read or write a region."""
        return [t for t in tuple(self._flying) if side in t.plan.sides]

    def to(self, link: Link) -> list[Transfer]:
        """Transfers in flight over a connection."""
        return [t for t in tuple(self._flying) if t.plan.link is link]

    def all(self) -> list[Transfer]:
        """Every transfer in flight."""
        return list(self._flying)

    async def settle(
        self, transfers: Sequence[Transfer], *, within: float | None, status: int = _native.STATUS_CANCELLED
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


class Plan:
    """A transfer that was checked, matched and routed once, to be made many times: ``await plan()``.

    Attributes
    ----------
    op : "put" or "get"
    local, remote : DescriptorList
    nbytes : int, bytes
    descriptors : int
        Rows of the local list.
    backend : str
    """

    __slots__ = (
        "_backend", "_flights", "_local", "_prepared", "_remote", "_request", "counter", "descriptors", "link",
        "local", "nbytes", "op", "remote", "route",
    )  # fmt: skip

    def __init__(
        self, backend: Backend, request: Request, *, route: Candidate, local: DescriptorList, remote: DescriptorList,
        flights: Flights, peer: str,
    ) -> None:  # fmt: skip
        self.op = request.op
        self.local = local
        self.remote = remote
        self.nbytes = request.nbytes
        self.descriptors = len(local)
        self.route = route
        self.link = request.link
        self._local: Side = local.region
        self._remote: Side = remote.region
        self._backend = backend
        self._request = request
        self._prepared = backend.prepare(request)
        self._flights = flights
        self.counter = flights.counter(peer, backend.name, request.op)

    @property
    def backend(self) -> str:
        """The backend that carries it."""
        return self._backend.name

    @property
    def sides(self) -> tuple[Side, Side]:
        """The two regions."""
        return self._local, self._remote

    def row_ends(self) -> npt.NDArray[np.uint64]:
        """Where in the stream each row of the local list ends: (descriptors,) uint64, bytes."""
        return _rows.row_ends(self.local.runs)

    @property
    def _small(self) -> bool:
        """Whether it ends within the call that posts it."""
        return getattr(self._prepared, "small", False)

    def chunk_ends(self) -> npt.NDArray[np.uint64]:
        """Where in the stream each chunk of which progress is known ends: (chunks,) uint64, bytes."""
        ends: Callable[[], npt.NDArray[np.uint64]] | None = getattr(self._prepared, "ends", None)
        return _NO_ROWS if ends is None else ends()

    def __repr__(self) -> str:
        return f"<Plan: {self}>"

    def __str__(self) -> str:
        to = "to" if self.op == "put" else "from"
        return f"{self.op} of {self.nbytes:,} bytes {to} {self._remote.name!r} by {self.route.route}"

    def __call__(self, *, notify: bytes | None = None, timeout: float | None = None, priority: int = 0) -> Transfer:
        """Post one transfer.

        Parameters
        ----------
        notify : bytes or None
            Tag that the peer receives once the data is visible there.
        timeout : float or None, seconds
        priority : int
            Above 0 before, below 0 after what is in flight with 0.

        Returns
        -------
        Transfer

        Raises
        ------
        ClosedError
            The agent or a region has been closed.
        PeerLostError
            The peer is gone.
        """
        flights = self._flights
        if flights.closed is not None:
            flights.check_open()
        self._local.check_open()
        self._remote.check_open()
        if notify is not None or timeout is not None:
            flights.check_note(notify, timeout)
            if notify is not None and self.link is None:
                raise DescriptorError("notify= needs a peer; both sides of this transfer belong to this agent")
        transfer = Transfer(self, flights, notify, timeout)
        flights.add(transfer)
        if notify is not None and not self._small:
            transfer.announce()  # before the data can be there: the two must not overtake each other
        try:
            self._backend.submit(self._prepared, transfer, priority)
        except BaseException:
            flights.discard(transfer)
            raise
        if transfer.inlined:
            transfer._account()
        return transfer

    def select(self, local_rows: npt.ArrayLike, remote_rows: npt.ArrayLike) -> Plan:
        """Return a plan for some of the rows, by their numbers in the two lists, without routing again.

        Parameters
        ----------
        local_rows, remote_rows : (n,), (m,) int
            In the order in which they are to be matched; byte totals must agree.

        Raises
        ------
        DescriptorError
            A number is out of range, or the totals differ.
        """
        local, remote = self.local.select(np.asarray(local_rows)), self.remote.select(np.asarray(remote_rows))
        pairs = match(local, remote)
        rows = int(pairs["count"].sum())
        request = replace(self._request, pairs=pairs, nbytes=local.nbytes, rows=rows)
        plan = Plan.__new__(Plan)
        for name in ("op", "route", "link", "_local", "_remote", "_backend", "_flights", "counter"):
            setattr(plan, name, getattr(self, name))
        plan.local, plan.remote, plan.nbytes, plan.descriptors = local, remote, local.nbytes, len(local)
        plan._request, plan._prepared = request, self._backend.prepare(request)
        return plan


class Notice:
    """What stands for a plan where nothing moves: the connection by which bare notifications go to one peer."""

    op: Op = "put"
    nbytes = 0
    descriptors = 0
    backend = "control"
    sides: tuple[Side, ...] = ()

    def __init__(self, flights: Flights, peer: str, link: Link) -> None:
        self.link = link
        self.counter = flights.counter(peer, self.backend, self.op)
        self._flights = flights
        self._peer = peer

    def __str__(self) -> str:
        return f"notification to {self._peer!r}"

    def row_ends(self) -> npt.NDArray[np.uint64]:
        """Nothing."""
        return _NO_ROWS

    def chunk_ends(self) -> npt.NDArray[np.uint64]:
        """Nothing."""
        return _NO_ROWS

    def send(self, tag: bytes) -> Transfer:
        """Post one notification."""
        self._flights.check_open()
        self._flights.check_note(tag, None)
        transfer = Transfer(self, self._flights, tag, None)
        self._flights.add(transfer)
        transfer.end_now()
        if transfer.inlined:
            transfer._account()
        return transfer


_NO_ROWS: npt.NDArray[np.uint64] = np.zeros(0, np.uint64)


def match(local: DescriptorList, remote: DescriptorList) -> npt.NDArray[np.void]:
    """Match two lists row by row, merged where both sides are contiguous: (n,) PAIR.

    Raises
    ------
    DescriptorError
        Their byte totals differ.
    """
    if local.nbytes != remote.nbytes:
        raise DescriptorError(
            f"the local list has {local.nbytes:,} bytes in {len(local):,} rows, the remote list {remote.nbytes:,} bytes "
            f"in {len(remote):,} rows; the totals must agree"
        )
    return _rows.pair(local.runs, remote.runs, merge=True)


class Transfer(Completion):
    """One transfer: awaitable, cancellable, and an asynchronous iterator over its descriptors as they complete.

    ``await transfer`` gives `Done` or raises. A transfer that is dropped goes on: the agent holds it until it has
    ended, and if it then fails and nobody has asked, the loop's exception handler is told.
    """

    __slots__ = ("_asked", "_ended", "_flights", "_timer", "_waiters", "plan")

    def __init__(self, plan: Plan | Notice, flights: Flights, notify: bytes | None, timeout: float | None) -> None:
        super().__init__(flights.queue, plan.nbytes, plan.op == "put", plan.link, notify, timeout)
        self.plan = plan
        self._flights = flights
        self._waiters: list[asyncio.Future[None]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._asked = False
        self._ended = False

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
        plan = self.plan
        return Done(plan.nbytes, self.elapsed / 1e9, plan.backend, plan.descriptors)

    def exception(self) -> BaseException | None:
        """Return how it failed, None where it did not; only once `done`."""
        status = self.status
        if status == _native.STATUS_OK:
            return None
        if status < 0:
            raise asyncio.InvalidStateError("the transfer is still in flight")
        self._asked = True
        return _failure(self, status)

    @property
    def progress(self) -> float:
        """Share of the bytes that have been moved, from 0.0 to 1.0."""
        return self.moved / self.plan.nbytes if self.plan.nbytes else float(self.done())

    def __repr__(self) -> str:
        state = "in flight" if not self.done() else "done" if self.status == 0 else "failed"
        return f"<Transfer: {self.plan}, {state}>"

    # -- awaiting

    def __await__(self) -> Generator[Any, None, Done]:
        """Wait until it has ended.

        Raises
        ------
        TransferError
            And its kinds: how it failed.
        """
        if self.done():
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
            self._asked = True
            raise cancelled
        return self.result()

    def _waiter(self) -> asyncio.Future[None]:
        """A future of the running loop that ends with the next news of this transfer."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        if self._ended:
            _resolve(waiter)
        return waiter

    def _wake(self) -> None:
        here, waiters = self._flights.loop, self._waiters
        while waiters:  # one by one: another loop's thread may be adding to the same list
            waiter = waiters.pop()
            loop = waiter.get_loop()
            if loop is here:
                _resolve(waiter)
            else:
                loop.call_soon_threadsafe(_resolve, waiter)

    def post(self, stopper: Callable[[], object] | None = None) -> None:
        """Say that it is in flight by a backend that does not watch time limits: from now on the agent's loop does."""
        super().post(stopper)
        if self.remaining is not None:
            self._flights.loop.call_soon_threadsafe(self._watch_time)

    def _watch_time(self) -> None:
        if self.remaining is not None and not self._ended:
            self._timer = self._flights.loop.call_later(self.remaining, self.stop, _native.STATUS_TIMED_OUT)

    def _settled(self) -> None:
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()
        self._account()
        self._wake()

    def _progressed(self) -> None:
        self._wake()

    def _account(self) -> None:
        self._flights.discard(self)
        counter = self.plan.counter
        if self.status == _native.STATUS_OK:
            counter.transfers += 1
            counter.nbytes += self.plan.nbytes
            counter.seconds += self.elapsed / 1e9
        else:
            counter.failed += 1

    async def ended(self) -> None:
        """Wait until it has ended, however it ends."""
        while not self.done():
            await self._waiter()

    def __del__(self) -> None:
        if self._asked or self.status in (-1, _native.STATUS_OK, _native.STATUS_CANCELLED):
            return
        loop = self._flights.loop
        if not loop.is_closed():
            loop.call_exception_handler(
                {"message": f"{self.plan} failed and nobody awaited it", "exception": self.exception()}
            )

    # -- iterating

    async def __aiter__(self) -> AsyncIterator[int]:
        """Yield the numbers of the local list's rows as they complete; raises at the end if the transfer failed."""
        progress = _Progress(self)
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


class _Progress:
    """Which rows of the local list have completed: chunks of the stream, as they are marked, turned into rows."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer
        self._chunk_ends = transfer.plan.chunk_ends()
        self._row_ends = transfer.plan.row_ends()
        self._missing = np.diff(self._row_ends, prepend=np.uint64(0))
        self._seen = np.zeros(len(self._chunk_ends), np.bool_)
        self._told = 0

    def _marks(self) -> npt.NDArray[np.bool_]:
        return np.frombuffer(self._transfer.marks(), np.bool_)

    def has_news(self) -> bool:
        """Whether a chunk was marked since the last `fresh`."""
        return int(self._marks().sum()) > int(self._seen.sum())

    def fresh(self) -> Sequence[int]:
        """Rows that have completed since the last call."""
        marks = self._marks()
        if not len(marks):  # moved at once, or by a backend that does not say how far it is
            done = self._transfer.done() and self._transfer.status == _native.STATUS_OK
            rows = range(self._told, len(self._row_ends) if done else self._told)
            self._told = rows.stop
            return rows
        found: list[int] = []
        for chunk in np.flatnonzero(marks & ~self._seen):
            begin = int(self._chunk_ends[chunk - 1]) if chunk else 0
            found.extend(self._rows_in(begin, int(self._chunk_ends[chunk])))
        self._seen |= marks
        return found

    def _rows_in(self, begin: int, end: int) -> Sequence[int]:
        """Take the bytes [begin, end) of the stream off what is missing; the rows that this completes."""
        first = int(np.searchsorted(self._row_ends, begin, side="right"))
        last = int(np.searchsorted(self._row_ends, end, side="left")) + 1
        ends = np.minimum(self._row_ends[first:last], np.uint64(end))
        starts = np.maximum(np.concatenate([self._row_ends[first - 1 : first] if first else [0], ends[:-1]]), begin)
        self._missing[first:last] -= ends - starts.astype(np.uint64)
        return (np.flatnonzero(self._missing[first:last] == 0) + first).tolist()


# ---- how transfers fail ------------------------------------------------------------------------------------------------


def _failure(transfer: Transfer, status: int) -> BaseException:
    """The exception for a status of native code."""
    if status == _native.STATUS_CANCELLED:
        return asyncio.CancelledError(f"{transfer.plan} was cancelled")
    kind, text = _ENDINGS[status]
    cause = transfer.error
    if isinstance(cause, TransferError):
        return cause
    why = text if cause is None else f"{text}: {cause}"
    error = kind(f"{transfer.plan} {why}", nbytes=transfer.moved, backend=transfer.plan.backend)
    error.__cause__ = cause
    return error


_ENDINGS: dict[int, tuple[type[TransferError], str]] = {
    _native.STATUS_TIMED_OUT: (TransferTimeout, "did not end within its timeout"),
    _native.STATUS_PEER_GONE: (PeerLostError, "lost its peer"),
    _native.STATUS_REVOKED: (TransferError, "stopped: the peer has deregistered the region"),
    _native.STATUS_FAULT: (TransferError, "stopped: memory went away under it (unmapped, or its file truncated)"),
    _native.STATUS_DENIED: (
        TransferError,
        "was refused by the kernel (process_vm_readv/writev: EPERM; see `asyncxfer doctor`)",
    ),
    _native.STATUS_FAILED: (TransferError, "failed"),
}
