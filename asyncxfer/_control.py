"""The control protocol between two agents of one host: who says what to whom, and when.

A connection has two roles. The initiator dials, says hello, and afterwards puts, gets and notifies. The target
answers with a page of gates (see `_fast.link`), then tells of every region that it has, gains or takes back. Two
agents that move data both ways hold two connections. Waiting, routing and memory are the agent's business.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

from . import _channel
from ._channel import Channel
from ._errors import MetadataError, PeerLostError, TransferTimeout
from ._fast.link import SLOTS, GatePage
from ._metadata import (
    AgentMetadata,
    Beat,
    Bye,
    Hello,
    NoteKind,
    Ready,
    Refused,
    RegionAdded,
    RegionInfo,
    RegionRemoved,
    SegmentInfo,
    Welcome,
    decode_frame,
    decode_note,
    encode_frame,
)

if TYPE_CHECKING:
    from ._region import Region

__all__ = ["Acceptor", "Incoming", "Outgoing", "TargetEvents", "announcement"]

_FRAME = ord("M")


def announcement(region: Region) -> tuple[bytes, list[int]]:
    """The frame that tells peers of a region, and the descriptors that go with it."""
    backings = region.backings
    places = backings.places if backings else (None,) * len(region.memory.segments)
    segments = [
        SegmentInfo(s.address, s.nbytes)
        if place is None or backings is None
        else SegmentInfo(s.address, s.nbytes, place.file, place.offset, backings.files[place.file].sealed)
        for s, place in zip(region.memory.segments, places, strict=True)
    ]
    info = RegionInfo.of(
        region.layout, segments, id=region.id, slot=region.slot, epoch=region.epoch, name=region.name,
        kind=region.kind, device=region.memory.device, access=region.access, dtype=region.dtype,
        exports=region.exports,
    )  # fmt: skip
    return encode_frame(RegionAdded(info)), [] if backings is None else [f.fd for f in backings.files]


# ---- the target's side ----------------------------------------------------------------------------------------------


class TargetEvents(Protocol):
    """What an acceptor tells its agent."""

    def on_joined(self, incoming: Incoming) -> None:
        """An initiator has said hello."""

    def on_note(self, incoming: Incoming, kind: NoteKind, tag: bytes) -> None:
        """A notification has arrived."""

    def on_left(self, incoming: Incoming, why: str, *, on_purpose: bool) -> None:
        """An initiator that had joined is gone."""


class Incoming:
    """One initiator that has connected to this agent.

    Attributes
    ----------
    name, generation
        What it calls itself; empty and 0 before its hello.
    page : GatePage
    kept : dict of int to object
        By slot, memory that it may still write to: it was stopped inside a region that has been closed.
    """

    def __init__(self, sock: socket.socket, acceptor: Acceptor) -> None:
        self.name = ""
        self.generation = 0
        self.page = GatePage()
        self.kept: dict[int, object] = {}
        self.gone = False
        self.draining: set[int] = set()
        self._acceptor = acceptor
        self._leaving: str | None = None
        self.channel = Channel(sock, self._on_frame, self._on_end)
        loop = asyncio.get_running_loop()
        self._patience = loop.call_later(acceptor.patience, self._on_end, "it said no hello in time")
        self._watch: asyncio.Handle = self._patience

    @property
    def joined(self) -> bool:
        """Whether it has said hello."""
        return bool(self.name)

    def _on_frame(self, frame: bytes, fds: list[int]) -> None:
        for fd in fds:
            os.close(fd)  # initiators have none to send
        if frame[0] != _FRAME:
            if not self.joined:
                raise MetadataError("a notification before the hello")
            note = decode_note(frame)
            self._acceptor.events.on_note(self, note.kind, note.tag)
            return
        message = decode_frame(frame)
        if isinstance(message, Hello) and not self.joined:
            self._acceptor.welcome(self, message)
        elif isinstance(message, Bye) and self.joined:
            self._leaving = message.reason or "it left"
        elif isinstance(message, Beat) and self.joined:
            _answer(message, self.channel)
        else:
            raise MetadataError(f"an initiator may not send {type(message).__name__} now")

    def keep(self, slot: int, memory: object) -> None:
        """Keep memory alive until the initiator has come out of a slot that was shut, or is gone."""
        if not self.gone:
            self.kept[slot] = memory
            self._look_again()

    def _look_again(self) -> None:
        # A stopped process tells nobody when it goes on, and while it is stopped nobody is in a hurry.
        for slot in [slot for slot in self.kept if self.page.shut(slot)]:
            del self.kept[slot]
        self._watch.cancel()
        if self.kept:
            self._watch = asyncio.get_running_loop().call_later(1.0, self._look_again)

    def admit(self, hello: Hello) -> None:
        """Note who it is."""
        self._patience.cancel()
        self.name, self.generation = hello.name, hello.generation

    def _on_end(self, why: str) -> None:
        self._patience.cancel()
        self._watch.cancel()
        self.gone = True
        self.channel.release()
        self.page.close_fd()
        for slot in self.draining:
            self.page.wake(slot)
        self.kept.clear()
        self._acceptor.forget(self, self._leaving or why, on_purpose=self._leaving is not None)

    def close(self) -> None:
        """Say goodbye, and end the connection without a word to the agent."""
        self._patience.cancel()
        self._watch.cancel()
        self.gone = True
        if self.joined:
            self.channel.send(encode_frame(Bye("it was closed")))
        self.channel.release()
        self.page.close_fd()


class Acceptor:
    """The listener of an agent, and the initiators that have connected to it.

    Parameters
    ----------
    patience : float, seconds
        How long a connection may take to say hello.
    probe : (int, bytes)
        An address in this process and what stands there, for peers to try direct access on.
    addresses : dict of str to bytes
        What each backend wants its counterpart to know.
    """

    def __init__(
        self, events: TargetEvents, probe: tuple[int, bytes], addresses: dict[str, bytes], patience: float
    ) -> None:
        self.events = events
        self.patience = patience
        self.incoming: set[Incoming] = set()
        self._probe = probe
        self._addresses = addresses
        self._identity: AgentMetadata | None = None
        self._regions: dict[int, Region] = {}
        self._loop = asyncio.get_running_loop()
        self._listener, self.address = _channel.listen()

    def start(self, identity: AgentMetadata) -> None:
        """Answer from now on, as this agent."""
        self._identity = identity
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(16):
            try:
                sock, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # out of descriptors: pending connections stay, and are tried with the next one
                self._loop.call_exception_handler({"message": "a connection could not be accepted", "exception": error})
                return
            sock.setblocking(False)
            try:
                _channel.Credentials(sock).check()
            except PeerLostError:
                sock.close()
                continue
            self.incoming.add(Incoming(sock, self))

    def welcome(self, incoming: Incoming, hello: Hello) -> None:
        """Answer a hello: the page, every region, and that this was all."""
        me = self._identity
        assert me is not None
        if hello.version != me.version:
            reason = f"it speaks protocol {hello.version}, this agent {me.version}"
            incoming.channel.send(encode_frame(Refused(reason)))
            raise MetadataError(reason)
        incoming.admit(hello)
        answer = Welcome(
            name=me.name, generation=me.generation, process=me.process, host=me.host,
            probe_address=self._probe[0], probe_value=self._probe[1], slots=SLOTS,
            backends=self._addresses,
        )  # fmt: skip
        incoming.channel.send(encode_frame(answer), [incoming.page.fd])
        for region in self._regions.values():
            self._show(region, incoming)
        incoming.channel.send(encode_frame(Ready()))
        self.events.on_joined(incoming)

    def _show(self, region: Region, incoming: Incoming) -> None:
        incoming.page.open(region.slot, region.epoch)
        incoming.channel.send(*announcement(region))

    def open(self, region: Region) -> None:
        """Tell every initiator of a region, and those to come."""
        self._regions[region.id] = region
        for incoming in self.incoming:
            if incoming.joined:
                self._show(region, incoming)

    def shut(self, region: Region) -> list[Incoming]:
        """Take a region back from every initiator; those that are inside it now."""
        self._regions.pop(region.id, None)
        inside = []
        for incoming in self.incoming:
            if incoming.joined:
                incoming.channel.send(encode_frame(RegionRemoved(region.id)))
                if not incoming.page.shut(region.slot):
                    inside.append(incoming)
        return inside

    def forget(self, incoming: Incoming, why: str, *, on_purpose: bool) -> None:
        """Note that an initiator is gone."""
        self.incoming.discard(incoming)
        if incoming.joined:
            self.events.on_left(incoming, why, on_purpose=on_purpose)

    def pause(self) -> None:
        """Take nothing from the initiators' sockets for now."""
        for incoming in self.incoming:
            incoming.channel.pause()

    def resume(self) -> None:
        """Go on after `pause`."""
        for incoming in self.incoming:
            incoming.channel.resume()

    def close(self) -> None:
        """Stop listening and end all connections."""
        self._loop.remove_reader(self._listener)
        self._listener.close()
        for incoming in self.incoming:
            incoming.close()
        self.incoming.clear()

    def drop(self) -> None:
        """In a forked child: let go of the descriptors."""
        self._listener.close()
        for incoming in self.incoming:
            incoming.channel.drop()
            incoming.page.close_fd()
        self.incoming.clear()  # with the pages, which the parent and its peers go on using


# ---- the initiator's side -------------------------------------------------------------------------------------------


class Outgoing:
    """A connection that this agent has dialled.

    Regions that the target tells of are kept until `follow` is called, and handed on from then.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._welcome: Welcome | None = None
        self._ready: asyncio.Future[Welcome] = asyncio.get_running_loop().create_future()
        self._page_fd = -1
        self._early: list[tuple[RegionInfo, list[int]]] = []
        self._on_region: Callable[[RegionInfo, list[int]], None] | None = None
        self._on_removed: Callable[[int], None] | None = None
        self._on_end: Callable[[str, bool], None] | None = None
        self._leaving: str | None = None
        self._over: str | None = None
        self.channel = Channel(sock, self._frame, self._end)

    async def greet(self, me: AgentMetadata, patience: float) -> Welcome:
        """Say hello; the answer, once all regions of now have been told.

        Raises
        ------
        PeerLostError
            It ended or refused.
        TransferTimeout
            It did not answer.
        """
        hello = Hello(name=me.name, generation=me.generation, process=me.process, host=me.host)
        self.channel.send(encode_frame(hello))
        try:
            async with asyncio.timeout(patience):
                return await self._ready
        except TimeoutError as error:
            raise TransferTimeout(
                f"process {self.channel.credentials.pid} accepted the connection and did not answer in {patience} s "
                "(stopped, or its event loop is blocked; configuration key handshake_timeout)"
            ) from error

    def take_page(self) -> int:
        """The descriptor of the page with the gates, which is the caller's from now on."""
        fd, self._page_fd = self._page_fd, -1
        return fd

    def follow(
        self,
        on_region: Callable[[RegionInfo, list[int]], None],
        on_removed: Callable[[int], None],
        on_end: Callable[[str, bool], None],
    ) -> None:
        """Hand on what the target tells, beginning with what it has told so far."""
        self._on_region, self._on_removed, self._on_end = on_region, on_removed, on_end
        early, self._early = self._early, []
        for info, fds in early:
            on_region(info, fds)
        if self._over is not None:
            on_end(self._over, self._leaving is not None)

    def _frame(self, frame: bytes, fds: list[int]) -> None:
        try:
            message = decode_frame(frame)
            if isinstance(message, Welcome) and self._welcome is None and len(fds) == 1:
                self._welcome, self._page_fd = message, fds.pop()
            elif isinstance(message, RegionAdded) and self._welcome is not None:
                self._added(message.info, fds)
            elif isinstance(message, RegionRemoved) and self._welcome is not None:
                self._removed(message.id)
            elif isinstance(message, Ready) and self._welcome is not None and not self._ready.done():
                self._ready.set_result(self._welcome)
            elif isinstance(message, Bye):
                self._leaving = message.reason or "it left"
            elif isinstance(message, Beat):
                _answer(message, self.channel)
            elif isinstance(message, Refused):
                self._leaving = f"it refused the connection: {message.reason}"
            else:
                raise MetadataError(f"a target may not send {type(message).__name__} now")
        finally:
            for fd in fds:
                os.close(fd)

    def _added(self, info: RegionInfo, fds: list[int]) -> None:
        if any(s.backing >= len(fds) for s in info.segments):
            raise MetadataError(f"region {info.name!r} names a descriptor that did not come with it")
        if self._on_region is None:
            self._early.append((info, list(fds)))
            fds.clear()
        else:
            self._on_region(info, fds)

    def _removed(self, id: int) -> None:
        if self._on_removed is not None:
            self._on_removed(id)
            return
        for index, (info, fds) in enumerate(self._early):
            if info.id == id:
                _close_all(fds)
                del self._early[index]
                return

    def _end(self, why: str) -> None:
        self._over = self._leaving or why
        if not self._ready.done():
            self._ready.set_exception(PeerLostError(f"the peer ended while it was connected to: {self._over}"))
            self._ready.exception()  # whoever waits gets it; with nobody waiting it is no news
        if self._on_end is not None:
            self._on_end(self._over, self._leaving is not None)

    def leave(self, reason: str = "") -> None:
        """Say goodbye and close; `channel.release` lets go of the descriptors."""
        self.channel.send(encode_frame(Bye(reason)))
        self.discard()

    def discard(self) -> None:
        """Close without a goodbye, and let go of what was never followed."""
        self.channel.close()
        for _, fds in self._early:
            _close_all(fds)
        self._early.clear()
        if self._page_fd >= 0:
            os.close(self.take_page())


def _answer(beat: Beat, channel: Channel) -> None:
    if beat.asks:
        channel.beat(_HERE)


_HERE = encode_frame(Beat(asks=False))


def _close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
