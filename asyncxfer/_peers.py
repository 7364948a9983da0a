"""Who one agent is connected to, both ways: those it has dialled, and those that have dialled it.

It reaches peers, notes the regions they tell of, and lets go of those that are gone once nothing in flight uses the
connection. The protocol stands in `_control` and `_outgoing`, how a peer is reached in `_line`, what one is in `_peer`.
"""

from __future__ import annotations

import asyncio
import os
import weakref
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from . import _identity, _proof
from ._address import Listening
from ._channel import Channel
from ._config import Config
from ._control import Acceptor, Incoming
from ._data import Sealing
from ._dial import Dialler
from ._errors import BackendError, PeerLostError
from ._fast import completion, outbox
from ._fast.link import PAGE_BYTES, Link
from ._fast.memory import Mapping as MemoryMapping
from ._inbox import Inbox
from ._line import Line
from ._liveness import Liveness, Who
from ._metadata import AgentMetadata, NoteKind, RegionInfo, Welcome
from ._outgoing import Outgoing
from ._peer import Peer, PeerEvent, PeerState
from ._plan import Notice
from ._region import RemoteRegion
from ._stream import AnyChannel
from ._transfer import Flights, Transfer
from .abc import Backend, PeerInfo, Reach, Segment

if TYPE_CHECKING:
    from ._credentials import Credentials

__all__ = ["Peers"]

_NAMES_KEPT = 16_384  # whose restart is told from a first start


class Peers:
    """The peers of one agent.

    Attributes
    ----------
    acceptor : Acceptor
        Where initiators connect.
    inbox : Inbox
        What they have sent.
    me : AgentMetadata
    """

    def __init__(
        self, name: str, probe: tuple[int, bytes], backends: Mapping[str, Backend], flights: Flights,
        credentials: Credentials | None, config: Config,
    ) -> None:  # fmt: skip
        self._backends = backends
        self._flights = flights
        self._config = config
        self._peers: dict[str, Peer] = {}
        self._lines: dict[Peer, Line] = {}
        self._dialling: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._present: dict[tuple[str, int], int] = {}
        self._generations: dict[str, int] = {}
        self._listeners: weakref.WeakSet[asyncio.Queue[PeerEvent | None]] = weakref.WeakSet()
        self._cleanups: set[asyncio.Task[None]] = set()
        sealing = None if credentials is None else Sealing(credentials)
        self._dialler = Dialler(credentials, sealing, config)
        self.acceptor = Acceptor(self, probe, backends, credentials, sealing, config)
        self._liveness = Liveness(config.suspect_after, self._channels, self._on_silence)
        self.inbox = Inbox(config.backlog_bytes, self.acceptor.resume)
        self.me = AgentMetadata(
            name=name, generation=_identity.next_generation(), process=_identity.process(), host=_identity.host(),
            addresses=[],
        )  # fmt: skip

    async def start(self, listen: Sequence[Listening]) -> None:
        """Listen, and answer initiators from now on.

        Raises
        ------
        ConfigError
            An address cannot be listened on, or may not.
        """
        self.me = msgspec.structs.replace(self.me, addresses=await self.acceptor.listen(listen))
        self.acceptor.start(self.me)

    def __len__(self) -> int:
        return len(self._peers)

    def __contains__(self, peer: object) -> bool:
        return peer in self._lines

    # ---- those that this agent dials -----------------------------------------------------------------------------

    async def connect(self, metadata: AgentMetadata) -> Peer:
        """Reach an agent, or give the peer that it is already."""
        async with self._dialling[metadata.name]:
            known = self._peers.get(metadata.name)
            if known is not None and known.lost is None and known.generation == metadata.generation:
                return known
            return await self._dial(metadata)

    async def _dial(self, metadata: AgentMetadata) -> Peer:
        line = Line(self.me, metadata, self._dialler, self._config)
        welcome = await line.connect()
        outgoing = line.outgoing
        try:
            self._flights.check_open()
            link = _make_link(outgoing)
            link.post = line.letters.post if outgoing.remote else None
            peer = Peer(metadata, _info(metadata, welcome, link), notify=self._notify, leave=self.leave)
            await self._reach(peer, line, welcome)
        except BaseException:
            await line.close("it was not followed")
            outgoing.abandon()
            raise
        self._lines[peer] = line
        self._peers[peer.name] = peer
        self._joined(peer.name, peer.generation)
        self._follow(peer, line)
        return peer

    def _follow(self, peer: Peer, line: Line) -> None:
        """Hear what the peer tells over its connection of now."""
        outgoing = line.outgoing
        for region in peer.regions.values():
            if region.info.id not in outgoing.told:
                self._on_removed(peer, region.info.id)
        outgoing.follow(
            partial(self._on_region, peer),
            partial(self._on_removed, peer),
            line.letters.acknowledged,
            lambda why, on_purpose: self._on_peer_end(peer, outgoing, why, on_purpose=on_purpose),
        )
        if outgoing.remote:
            line.letters.attach(outgoing.channel)

    async def _reach(self, peer: Peer, line: Line, welcome: Welcome) -> None:
        for backend in self._backends.values():
            if peer.info.reach > backend.capabilities.reach:
                peer.refusals[backend.name] = f"reaches no farther than {backend.capabilities.reach.name.lower()}"
                continue
            try:
                dial = partial(line.data, backend.name) if line.networked else None
                address, key = welcome.backends.get(backend.name, b""), _proof.key(welcome.secret, backend.name)
                info = replace(peer.info, address=address, dial=dial, key=key)
                peer.endpoints[backend.name] = await backend.connect(info)
            except BackendError as error:
                peer.refusals[backend.name] = str(error)

    def _on_region(self, peer: Peer, info: RegionInfo, fds: list[int]) -> None:
        known = peer.find(info.id)
        if known is not None:
            known.renew(info)
            return
        region = RemoteRegion(peer, info)
        segments = tuple(Segment(s.address, s.nbytes) for s in info.segments)
        backings = [None if s.backing < 0 else (fds[s.backing], s.backing_offset) for s in info.segments]
        for name, endpoint in peer.endpoints.items():
            try:
                region.attachments[name] = endpoint.attach(info.kind, segments, backings, info.exports.get(name, b""))
            except BackendError as error:
                region.refusals[name] = str(error)
        while fds:
            os.close(fds.pop())
        peer.add(region)

    def _on_removed(self, peer: Peer, id: int) -> None:
        region = peer.remove(id)
        if region is not None:
            _detach(peer, region)

    def _on_peer_end(self, peer: Peer, outgoing: Outgoing, why: str, *, on_purpose: bool) -> None:
        line = self._lines.get(peer)
        if peer.lost is not None or line is None or line.outgoing is not outgoing:
            return
        if outgoing.remote and not on_purpose and not outgoing.channel.offended:
            line.redialling = asyncio.ensure_future(self._redial(peer, line, why))
            self._liveness.look()
        else:
            self._end(peer, why, on_purpose=on_purpose)

    async def _redial(self, peer: Peer, line: Line, why: str) -> None:
        """Reach a peer again whose connection broke, or give it up."""
        try:
            await line.again(why)
        except PeerLostError as error:
            if peer.lost is None:
                self._end(peer, str(error), on_purpose=False)
            return
        if peer.lost is None:
            self._follow(peer, line)
            self._liveness.look()

    def _end(self, peer: Peer, why: str, *, on_purpose: bool) -> None:
        """Note that a peer is gone, and let go of it."""
        state = PeerState.LEFT if on_purpose else PeerState.LOST
        peer.end(state, f"peer {peer.name!r}, generation {peer.generation}, is gone: {why}")
        peer.link.close()
        for endpoint in peer.endpoints.values():
            endpoint.lost()
        self._lines[peer].end(peer.lost or why)
        task = asyncio.ensure_future(self._forget(peer))
        self._cleanups.add(task)
        task.add_done_callback(self._cleanups.discard)

    async def leave(self, peer: Peer) -> None:
        """Say goodbye to a peer, once what is in flight to it has ended."""
        line = self._lines.get(peer)
        if line is None:
            return
        if peer.lost is None:
            flights = self._flights
            why = f"agent {self.me.name!r} has left peer {peer.name!r}"
            peer.end(PeerState.LEFT, why)
            await flights.settle(flights.to(peer.link), within=self._config.close_timeout)
            await line.close(why)
            line.outgoing.leave()
            peer.link.close()
        await self._forget(peer)

    async def _forget(self, peer: Peer) -> None:
        """Let go of a peer that is gone, once no native code uses the connection."""
        line = self._lines.pop(peer, None)
        if line is None:
            return
        flights = self._flights
        outbox.forget(peer.link)
        gone = completion.STATUS_PEER_GONE
        await flights.settle(flights.to(peer.link), within=self._config.close_timeout, status=gone)
        outbox.forget(peer.link)
        line.outgoing.discard()
        line.outgoing.channel.release()
        for region in peer.regions.values():
            _detach(peer, region)
        for endpoint in peer.endpoints.values():
            endpoint.close()
        if self._peers.get(peer.name) is peer:
            del self._peers[peer.name]
        self._departed(peer.name, peer.generation, peer.state)

    def _notify(self, peer: Peer, tag: bytes) -> Transfer:
        """Post a bare notification."""
        self._flights.check_open()
        return Notice(self._flights, peer.name, peer.link).send(tag)

    async def leave_all(self) -> None:
        """Say goodbye to every peer that was dialled."""
        for peer in list(self._lines):
            await self.leave(peer)

    # ---- those that dial this agent ------------------------------------------------------------------------------

    def on_joined(self, incoming: Incoming) -> None:
        """An initiator has said hello."""
        self.inbox.joined(incoming.name)
        self._joined(incoming.name, incoming.generation)

    def on_note(self, incoming: Incoming, kind: NoteKind, tag: bytes) -> None:
        """A notification has arrived."""
        if kind is NoteKind.DELIVERED:
            self.inbox.arrived(incoming.name, tag)
            if self.inbox.full:
                self.acceptor.pause()
        elif kind is NoteKind.ANNOUNCED:
            self.inbox.announced(incoming.name, tag)
        else:
            self.inbox.failed(incoming.name, tag)

    def on_connection(self) -> None:
        """The connection of an initiator broke, or it has a new one."""
        self._liveness.look()

    def on_left(self, incoming: Incoming, why: str, *, on_purpose: bool) -> None:
        """An initiator is gone."""
        self.inbox.lost(
            incoming.name,
            f"peer {incoming.name!r}, generation {incoming.generation}, is gone: {why}",
            on_purpose=on_purpose,
        )
        state = PeerState.LEFT if on_purpose else PeerState.LOST
        self._departed(incoming.name, incoming.generation, state)

    # ---- events ---------------------------------------------------------------------------------------------------

    def _joined(self, name: str, generation: int) -> None:
        known = self._generations.pop(name, None)
        self._generations[name] = generation
        if len(self._generations) > _NAMES_KEPT:
            del self._generations[next(iter(self._generations))]
        self._present[name, generation] = self._present.get((name, generation), 0) + 1
        if self._present[name, generation] == 1:
            restarted = known is not None and known != generation
            self._tell(PeerEvent(name, generation, PeerState.RESTARTED if restarted else PeerState.JOINED))

    def _departed(self, name: str, generation: int, state: PeerState) -> None:
        self._present[name, generation] -= 1
        if not self._present[name, generation]:
            del self._present[name, generation]
            self._tell(PeerEvent(name, generation, state))

    def _channels(self) -> Iterator[tuple[Who, AnyChannel]]:
        """Every connection that is up, or may be again, both ways."""
        for peer, line in self._lines.items():
            if peer.lost is None:
                yield Who(peer.name, peer.generation), line.outgoing.channel
        for incoming in self.acceptor.incoming:
            yield Who(incoming.name, incoming.generation), incoming.channel

    def _on_silence(self, who: Who, silent: bool) -> None:
        """A peer has become silent, or is heard again."""
        state = PeerState.SUSPECT if silent else PeerState.JOINED
        peer = self._peers.get(who.name)
        if peer is not None and peer.generation == who.generation and peer.lost is None:
            peer.state = state
        self._tell(PeerEvent(who.name, who.generation, state))

    def _tell(self, event: PeerEvent) -> None:
        for listener in list(self._listeners):
            listener.put_nowait(event)

    def events(self) -> AsyncIterator[PeerEvent]:
        """Yield changes from now on."""
        queue: asyncio.Queue[PeerEvent | None] = asyncio.Queue()
        self._listeners.add(queue)
        return _events(queue)

    # ---- the end -------------------------------------------------------------------------------------------------

    async def close(self, why: str) -> None:
        """Stop answering, and end every wait. All peers have been left."""
        self._liveness.close()
        while self._cleanups:
            await asyncio.wait(self._cleanups)
        self.inbox.close(why)
        for listener in list(self._listeners):
            listener.put_nowait(None)
        await self.acceptor.aclose()

    def drop(self) -> None:
        """In a forked child: let go of the descriptors."""
        self.acceptor.drop()
        for line in self._lines.values():
            line.outgoing.channel.drop()
        self._lines.clear()


async def _events(queue: asyncio.Queue[PeerEvent | None]) -> AsyncIterator[PeerEvent]:
    # The queue is subscribed as long as this lives.
    while (event := await queue.get()) is not None:
        yield event


def _info(metadata: AgentMetadata, welcome: Welcome, link: Link) -> PeerInfo:
    """What backends are told of a peer."""
    near = Reach.PROCESS if welcome.process == _identity.process() else Reach.HOST
    reach = Reach.NETWORK if link.remote else near
    probe = (welcome.probe_address, welcome.probe_value)
    return PeerInfo(metadata.name, metadata.generation, reach, link.pid, probe, link)


def _make_link(outgoing: Outgoing) -> Link:
    """The native side of a connection: over the page that the target sent, if it is on this host."""
    channel = outgoing.channel
    if not isinstance(channel, Channel):
        return Link(-1, -1, 0, None)
    fd = outgoing.take_page()
    try:
        page = MemoryMapping(fd, 0, PAGE_BYTES, writable=True)
        link = Link(channel.sock.fileno(), channel.pidfd, channel.credentials.pid, page)
    except (OSError, ValueError) as error:
        raise PeerLostError(f"process {channel.credentials.pid} sent no usable link page: {error}") from error
    finally:
        os.close(fd)
    channel.pulse = link.pulse
    return link


def _detach(peer: Peer, region: RemoteRegion) -> None:
    for name, attachment in region.attachments.items():
        peer.endpoints[name].detach(attachment)
    region.attachments.clear()
