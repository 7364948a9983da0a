"""Notifications that have arrived: who waits for which tag, and what nobody has asked for yet.

Belongs to one event loop. It is told what arrives, what was announced and who was lost; it knows no sockets.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

from ._errors import ClosedError, PeerLostError, TransferError, TransferTimeout

__all__ = ["Inbox", "Notification"]


_BROKEN_KEPT = 4096  # failures that nobody has asked for yet
_GONE_KEPT = 4096  # peers that were lost
_NOTE_BYTES = 64  # what keeping one costs beside its tag, roughly
_ANNOUNCED_BYTES = 64 << 20  # of announced tags; beyond, a wait for another does not end when its sender is lost


class Notification(NamedTuple):
    """A notification that has arrived.

    Attributes
    ----------
    peer : str
        The agent that sent it.
    tag : bytes
    """

    peer: str
    tag: bytes


class _Wait(NamedTuple):
    future: asyncio.Future[Notification]
    peer: str | None


class _Kept:
    """Notifications that nobody has asked for yet, oldest first, and found by their tag without a search."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._notes: OrderedDict[int, Notification] = OrderedDict()
        self._by_tag: dict[bytes, OrderedDict[int, None]] = {}
        self._count = 0

    def __bool__(self) -> bool:
        return bool(self._notes)

    def add(self, note: Notification, *, first: bool = False) -> None:
        """Keep one, behind the others or before them."""
        self._count += 1
        same = self._by_tag.setdefault(note.tag, OrderedDict())
        self._notes[self._count] = note
        same[self._count] = None
        if first:
            self._notes.move_to_end(self._count, last=False)
            same.move_to_end(self._count, last=False)
        self.nbytes += len(note.tag) + _NOTE_BYTES

    def take(self, tag: bytes | None, peer: str | None) -> Notification | None:
        """Give the oldest, of one tag and of one peer if these are given."""
        numbers = self._notes if tag is None else self._by_tag.get(tag, ())
        number = next((n for n in numbers if peer in (None, self._notes[n].peer)), None)
        if number is None:
            return None
        note = self._notes.pop(number)
        same = self._by_tag[note.tag]
        del same[number]
        if not same:
            del self._by_tag[note.tag]
        self.nbytes -= len(note.tag) + _NOTE_BYTES
        return note


class Inbox:
    """Notifications on their way from peers to whoever waits for them.

    Parameters
    ----------
    limit : int, bytes
        What is kept for readers that are slow. `full` is true beyond it, and `on_room` is called when it ends.
    on_room : callable
    """

    def __init__(self, limit: int, on_room: Callable[[], None]) -> None:
        self._limit = limit
        self._on_room = on_room
        self._kept = _Kept()
        self._waits: dict[bytes, deque[_Wait]] = {}
        self._readers: deque[asyncio.Future[Notification | None]] = deque()
        self._announced: dict[tuple[str, bytes], int] = {}
        self._announced_bytes = 0
        self._senders: dict[str, int] = {}
        self._gone: OrderedDict[str, str] = OrderedDict()
        self._broken: OrderedDict[tuple[str, bytes], TransferError] = OrderedDict()
        self._closed: str | None = None

    @property
    def full(self) -> bool:
        """Whether no more should be taken from the peers' sockets."""
        return self._kept.nbytes >= self._limit

    # -- what happens

    def joined(self, peer: str) -> None:
        """Note that a peer has connected, and may send."""
        self._senders[peer] = self._senders.get(peer, 0) + 1
        self._gone.pop(peer, None)

    def announced(self, peer: str, tag: bytes) -> None:
        """Note that a peer has begun a transfer that will notify; not without bound, since it may never end them."""
        if (peer, tag) not in self._announced:
            if self._announced_bytes >= _ANNOUNCED_BYTES:
                return
            self._announced_bytes += len(tag) + _NOTE_BYTES
        self._announced[peer, tag] = self._announced.get((peer, tag), 0) + 1

    def arrived(self, peer: str, tag: bytes) -> None:
        """Hand a notification to whoever waits for it, or keep it."""
        self._unannounce(peer, tag)
        note = Notification(peer, tag)
        if not self._hand_over(note):
            self._kept.add(note)

    def _hand_over(self, note: Notification) -> bool:
        wait = self._take_wait(note.peer, note.tag)
        if wait is not None:
            wait.future.set_result(note)
            return True
        while self._readers:
            reader = self._readers.popleft()
            if not reader.done():
                reader.set_result(note)
                return True
        return False

    def failed(self, peer: str, tag: bytes) -> None:
        """Tell who waits for a tag, or will, that the transfer behind it has failed."""
        self._unannounce(peer, tag)
        self._break(peer, tag, TransferError(f"the transfer of {peer!r} that was to notify {tag!r} has failed"))

    def lost(self, peer: str, why: str, *, on_purpose: bool) -> None:
        """Fail what only this peer could have ended; what is asked for later, only where it did not say goodbye."""
        self._senders[peer] -= 1
        if self._senders[peer]:
            return
        del self._senders[peer]
        self._gone[peer] = why
        for sender, tag in [key for key in self._announced if key[0] == peer]:
            del self._announced[sender, tag]
            self._announced_bytes -= len(tag) + _NOTE_BYTES
            self._break(peer, tag, PeerLostError(f"{why}; it had announced {tag!r}"))
        for waits in list(self._waits.values()):
            for wait in waits:
                doom = self._doom(wait.peer)
                if doom is not None and not wait.future.done():
                    wait.future.set_exception(doom)
        if on_purpose or len(self._gone) > _GONE_KEPT:
            self._gone.pop(peer if on_purpose else next(iter(self._gone)))

    def _break(self, peer: str, tag: bytes, error: TransferError) -> None:
        """Hand an error to who waits for a tag, or keep it for who will ask."""
        wait = self._take_wait(peer, tag)
        if wait is not None:
            wait.future.set_exception(error)
            return
        self._broken[peer, tag] = error
        if len(self._broken) > _BROKEN_KEPT:
            self._broken.popitem(last=False)

    def _doom(self, peer: str | None) -> PeerLostError | None:
        """Why nothing can come from a peer, or from anyone: it was connected, and is gone."""
        if peer is not None:
            return PeerLostError(self._gone[peer]) if peer in self._gone else None
        if self._senders or not self._gone:
            return None
        return PeerLostError(f"{list(self._gone.values())[-1]}; no other peer is connected")

    def close(self, why: str) -> None:
        """End every wait."""
        self._closed = why
        for wait in [w for waits in self._waits.values() for w in waits]:
            if not wait.future.done():
                wait.future.set_exception(ClosedError(why))
        for reader in self._readers:
            if not reader.done():
                reader.set_result(None)

    # -- what users do

    async def expect(self, tag: bytes, peer: str | None, timeout: float | None) -> Notification:
        """Wait for a tag."""
        if self._closed is not None:
            raise ClosedError(self._closed)
        kept = self._take_kept(tag, peer)
        if kept is not None:
            return kept
        for sender, broken in self._broken:
            if broken == tag and peer in (None, sender):
                raise self._broken.pop((sender, broken))
        doom = self._doom(peer)
        if doom is not None:
            raise doom
        wait = _Wait(asyncio.get_running_loop().create_future(), peer)
        waits = self._waits.setdefault(tag, deque())
        waits.append(wait)
        taken = False
        try:
            async with asyncio.timeout(timeout):
                arrived = await wait.future
                taken = True
            return arrived
        except TimeoutError as error:
            if isinstance(error, TransferError):
                raise
            source = "" if peer is None else f" from {peer!r}"
            raise TransferTimeout(f"no notification {tag!r}{source} within {timeout} s") from error
        finally:
            if wait in waits:
                waits.remove(wait)
            if not waits and self._waits.get(tag) is waits:
                del self._waits[tag]
            if not taken:
                self._return_unread(wait.future)

    async def read(self) -> AsyncIterator[Notification]:
        """Yield what arrives and nobody expects, until the inbox is closed."""
        while self._closed is None:
            if self._kept:
                note = self._take_kept()
                assert note is not None
                yield note
                continue
            reader: asyncio.Future[Notification | None] = asyncio.get_running_loop().create_future()
            self._readers.append(reader)
            try:
                read = await reader
            except asyncio.CancelledError:
                self._return_unread(reader)
                raise
            finally:
                if reader in self._readers:
                    self._readers.remove(reader)
            if read is None:
                return
            yield read

    # -- inside

    def _take_wait(self, peer: str, tag: bytes) -> _Wait | None:
        for wait in self._waits.get(tag, ()):
            if wait.peer in (None, peer) and not wait.future.done():
                return wait
        return None

    def _unannounce(self, peer: str, tag: bytes) -> None:
        count = self._announced.get((peer, tag), 0)
        if count > 1:
            self._announced[peer, tag] = count - 1
        elif self._announced.pop((peer, tag), None) is not None:
            self._announced_bytes -= len(tag) + _NOTE_BYTES

    def _take_kept(self, tag: bytes | None = None, peer: str | None = None) -> Notification | None:
        was_full = self.full
        note = self._kept.take(tag, peer)
        if was_full and not self.full:
            self._on_room()
        return note

    def _return_unread(self, future: asyncio.Future[Notification] | asyncio.Future[Notification | None]) -> None:
        """Give to the next a notification whose reader was cancelled, or out of time, in the turn in which it came."""
        if future.done() and not future.cancelled() and future.exception() is None:
            note = future.result()
            if note is not None and not self._hand_over(note):
                self._kept.add(note, first=True)
