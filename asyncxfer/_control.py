"""The target's side of the control protocol: who may come in, what initiators are told, and when they are gone.

A connection has two roles. The initiator dials, says hello, and afterwards puts, gets and notifies (`_outgoing`). The
target answers with a session and, on one host, a page of gates (see `_fast.link`), then tells of every region that it
has, gains or takes back. Two agents that move data both ways hold two connections. A connection over a network may
break and be resumed: what belongs to the session stays for a while. Waiting, routing and memory are the agent's
business.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from . import _channel, _proof, _sockets
from ._address import Listening
from ._channel import Channel
from ._config import Config
from ._data import Asked, Sealing, Wire, accept, answer
from ._errors import BackendError, MetadataError, PeerLostError
from ._fast.link import SLOTS, GatePage
from ._letters import Received
from ._listener import Listener, bind
from ._memory import Access
from ._metadata import (
    AgentMetadata,
    Beat,
    Bye,
    Hello,
    Letter,
    LetterAck,
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
from ._preface import PREFACE_BYTES, Kind, Preface, Status
from ._services import Services
from ._stream import AnyChannel, StreamChannel, Tls
from .abc import Backend, Service, Stream

if TYPE_CHECKING:
    from ._credentials import Credentials
    from ._region import Region

__all__ = ["Acceptor", "Incoming", "TargetEvents", "announcement", "answer_beat"]

_FRAME = ord("M")
_HERE = encode_frame(Beat(asks=False))


def announcement(region: Region, access: Access, *, remote: bool = False) -> tuple[bytes, list[int]]:
    """The frame that tells a peer of a region, and the descriptors that go with it, which do not go far."""
    backings = None if remote else region.backings
    places = backings.places if backings else (None,) * len(region.memory.segments)
    segments = [
        SegmentInfo(0 if remote else s.address, s.nbytes)  # where it lies is nobody's business elsewhere
        if place is None or backings is None
        else SegmentInfo(s.address, s.nbytes, place.file, place.offset, backings.files[place.file].sealed)
        for s, place in zip(region.memory.segments, places, strict=True)
    ]
    info = RegionInfo.of(
        region.layout, segments, id=region.id, slot=region.slot, epoch=region.epoch, name=region.name,
        kind=region.kind, device=region.memory.device, access=access, dtype=region.dtype,
        exports=region.exports,
    )  # fmt: skip
    return encode_frame(RegionAdded(info)), [] if backings is None else [f.fd for f in backings.files]


def answer_beat(beat: Beat, channel: AnyChannel) -> None:
    """Say that this side is alive, if that was asked."""
    if beat.asks:
        channel.beat(_HERE)


class TargetEvents(Protocol):
    """What an acceptor tells its agent."""

    def on_joined(self, incoming: Incoming) -> None:
        """An initiator has said hello."""

    def on_note(self, incoming: Incoming, kind: NoteKind, tag: bytes) -> None:
        """A notification has arrived."""

    def on_connection(self) -> None:
        """The connection of an initiator broke, or it has a new one."""

    def on_left(self, incoming: Incoming, why: str, *, on_purpose: bool) -> None:
        """An initiator that had joined is gone."""


class Incoming:
    """One initiator that has said hello to this agent.

    Attributes
    ----------
    name, generation
        What it calls itself.
    remote : bool
        It came over a network.
    session, secret : bytes
        By which its further connections are known.
    page : GatePage
    services : Services
        What backends serve it over connections of their own.
    kept : dict of int to object
        By slot, memory that it may still write to: it was stopped inside a region that has been closed.
    """

    def __init__(self, acceptor: Acceptor, channel: AnyChannel, hello: Hello, *, remote: bool) -> None:
        self.name, self.generation = hello.name, hello.generation
        self.remote = remote
        self.session, self.secret = _proof.session()
        self.page = GatePage()
        self.services = Services(acceptor.backends, self.page, self._told, self.secret, remote=remote)
        self.kept: dict[int, object] = {}
        self.gone = False
        self.draining: set[int] = set()
        self._acceptor = acceptor
        self._received = Received()
        self._attempt = 0
        self._leaving: str | None = None
        self._patience: asyncio.Handle | None = None
        self._watch: asyncio.Handle | None = None
        self._attach(channel)
        if remote:
            self.page.close_fd()  # nobody else maps it

    def _attach(self, channel: AnyChannel) -> None:
        self.channel = channel
        if isinstance(channel, Channel):
            channel.pulse = self.page.pulse
        channel.follow(self._on_frame, self._on_end)

    def resume(self, channel: AnyChannel, hello: Hello) -> bool:
        """Go on over a new connection, if the hello proves that it is the same initiator's."""
        proof = _proof.resume(self.secret, self.session, hello.attempt)
        same = (hello.name, hello.generation) == (self.name, self.generation)
        if not (self.remote and same and hello.attempt > self._attempt and _proof.matches(hello.proof, proof)):
            return False
        self._attempt = hello.attempt
        self.channel.release()
        if self._patience is not None:
            self._patience.cancel()
        self._attach(channel)
        return True

    def _on_frame(self, frame: bytes, fds: list[int]) -> None:
        for fd in fds:
            os.close(fd)  # initiators have none to send
        if frame[0] != _FRAME and not self.remote:
            note = decode_note(frame)
            self._acceptor.events.on_note(self, note.kind, note.tag)
            return
        message = decode_frame(frame)
        if isinstance(message, Letter) and self.remote:
            note = message.note
            if note.kind is NoteKind.ANNOUNCED:
                raise MetadataError("a letter that announces another; what is announced here has no bound")
            if self._received.take(message):
                self._acceptor.events.on_note(self, note.kind, note.tag)
            self.channel.send(encode_frame(LetterAck(message.seq)))
        elif isinstance(message, Bye):
            self._leaving = message.reason or "it left"
        elif isinstance(message, Beat):
            answer_beat(message, self.channel)
        else:
            raise MetadataError(f"an initiator may not send {type(message).__name__} now")

    def _told(self, kind: int, tag: bytes) -> None:
        """A notification came with data."""
        if not self.gone:
            self._acceptor.events.on_note(self, NoteKind(kind), tag)

    def keep(self, slot: int, memory: object) -> None:
        """Keep memory alive until the initiator has come out of a slot that was shut, or is gone."""
        if not self.gone:
            self.kept[slot] = memory
            self._look_again()

    def _look_again(self) -> None:
        # A stopped process tells nobody when it goes on, and while it is stopped nobody is in a hurry.
        for slot in [slot for slot in self.kept if self.page.shut(slot)]:
            self.services.shut(slot)
            del self.kept[slot]
        if self._watch is not None:
            self._watch.cancel()
        if self.kept:
            self._watch = asyncio.get_running_loop().call_later(1.0, self._look_again)

    def _on_end(self, why: str) -> None:
        if not self.remote or self._leaving is not None or self.channel.offended:
            self._over(self._leaving or why)
            return
        loop, config = asyncio.get_running_loop(), self._acceptor.config
        # An initiator that lives comes back at once where the connection was ended; where it timed out the network is
        # to blame, and may take longer.
        ended = isinstance(self.channel, StreamChannel) and self.channel.hung_up
        patience = min(config.suspect_after, config.lost_after) if ended else config.lost_after
        until = max(self.channel.heard + patience, loop.time() + config.handshake_timeout)
        key = "suspect_after" if ended else "lost_after"
        why = f"{why}, and it did not come back within {patience:g} s (configuration key {key})"
        self._patience = loop.call_at(until, self._over, why)
        self.channel.release()
        self._acceptor.events.on_connection()

    def replaced(self, generation: int) -> None:
        """Give up waiting for a connection: the initiator has started again."""
        if self.channel.ended:
            self._over(f"its connection broke, and generation {generation} has taken its place")

    def _over(self, why: str) -> None:
        self.let_go()
        for slot in self.draining:
            self.page.wake(slot)
        self.kept.clear()
        self._acceptor.forget(self, why, on_purpose=self._leaving is not None)

    def let_go(self) -> None:
        """End the connection and the services without a word to anybody."""
        for timer in (self._patience, self._watch):
            if timer is not None:
                timer.cancel()
        self.services.close()
        self.gone = True
        self.channel.release()
        self.page.close_fd()

    def close(self) -> None:
        """Say goodbye, and end the connection without a word to the agent."""
        self.channel.send(encode_frame(Bye("it was closed")))
        self.let_go()

    def drop(self) -> None:
        """In a forked child: let go of the descriptors."""
        self.channel.drop()
        self.page.close_fd()


class Acceptor:
    """The listeners of an agent, and the initiators that have connected to it.

    Parameters
    ----------
    events : TargetEvents
    probe : (int, bytes)
        An address in this process and what stands there, for peers of this host to try direct access on.
    backends : mapping of str to Backend
    credentials : Credentials or None
    sealing : Sealing or None
        The same, for native TLS.
    config : Config
    """

    def __init__(
        self, events: TargetEvents, probe: tuple[int, bytes], backends: Mapping[str, Backend],
        credentials: Credentials | None, sealing: Sealing | None, config: Config,
    ) -> None:  # fmt: skip
        self.events = events
        self.config = config
        self.backends = backends
        self.incoming: set[Incoming] = set()
        self._sessions: dict[bytes, Incoming] = {}
        self._probe = probe
        self._credentials = credentials
        self._sealing = sealing
        self._identity: AgentMetadata | None = None
        self._regions: dict[int, Region] = {}
        self._listeners: list[Listener] = []
        self._paused = False

    async def listen(self, wanted: Sequence[Listening]) -> list[str]:
        """Open the listeners: their addresses, the one on this host first.

        Raises
        ------
        ConfigError
            One cannot be bound, or may not.
        """
        addresses = []
        patience = self.config.handshake_timeout
        if self.config.unix_socket:
            sock, address = _channel.listen()
            self._listeners.append(Listener(sock, self._greet_near, patience))
            addresses.append(address)
        beyond_host = self._credentials is not None or self.config.open_listener
        for listening in wanted:
            sock, address = await bind(listening, beyond_host=beyond_host)
            self._listeners.append(Listener(sock, self._greet_far, patience))
            addresses.append(address)
        return addresses

    def start(self, identity: AgentMetadata) -> None:
        """Answer from now on, as this agent."""
        self._identity = identity
        for listener in self._listeners:
            listener.start()

    # -- strangers

    async def _greet_near(self, sock: socket.socket) -> None:
        _channel.Credentials(sock).check()
        await self._let_in(Channel(sock, _ignore, _ignore), None, remote=False)

    async def _greet_far(self, sock: socket.socket) -> None:
        _sockets.prepare(sock, self.config.lost_after / 2)
        try:
            preface = Preface.decode(await _sockets.read_exactly(sock, PREFACE_BYTES))
        except asyncio.CancelledError:
            _say(sock, Status.CROWDED)
            raise
        status = self._judge(preface)
        await _sockets.write_all(sock, status.answer)
        if preface is None or status is not Status.GO_ON:
            raise PeerLostError(f"a connection was refused: {status.name}")
        if preface.kind is Kind.DATA:
            await self._take_data(sock, tls=preface.tls)
            return
        tls = None
        if preface.tls:
            assert self._credentials is not None
            tls = Tls(self._credentials.server(), server=True)
            await tls.handshake(sock)
        certificate = None if tls is None else tls.certificate
        await self._let_in(StreamChannel(sock, tls, _ignore, _ignore), certificate, remote=True)

    def _judge(self, preface: Preface | None) -> Status:
        if preface is None:
            return Status.VERSION
        if preface.tls:
            return Status.GO_ON if self._credentials is not None else Status.NO_CREDENTIALS
        if self._credentials is None:
            return Status.GO_ON
        if preface.kind is Kind.CONTROL:
            return Status.CREDENTIALS_NEEDED
        return Status.PLAIN_DATA if self.config.encrypt_data else Status.GO_ON

    async def _let_in(self, channel: AnyChannel, certificate: bytes | None, *, remote: bool) -> None:
        try:
            hello = decode_frame(await _first_frame(channel))
            if channel.ended:
                raise PeerLostError("it left before it was answered")
            if not isinstance(hello, Hello):
                raise MetadataError(f"a stranger may not send {type(hello).__name__}")
            self._welcome(channel, hello, certificate, remote=remote)
        except BaseException:
            channel.release()
            raise

    async def _take_data(self, sock: socket.socket, *, tls: bool) -> None:
        sealing = self._sealing if tls else None
        connection = None if sealing is None else await sealing.handshake(sock, server=True)

        def secret_of(asked: Asked) -> bytes:
            incoming = self._sessions.get(asked.session)
            if incoming is None or asked.backend not in self.backends:
                raise PeerLostError(f"a data connection for no session, or for no backend: {asked.backend!r}")
            if sealing is not None and connection is not None:
                sealing.check_name(connection, incoming.name)
            return incoming.secret

        try:
            wire = Wire(sock, connection)
            asked = await answer(wire, secret_of)
            service = self._service(asked)
            await accept(wire)
            if self._service(asked) is not service:
                raise PeerLostError("the session has ended")
        except BaseException:
            if connection is not None:
                connection.close()
            raise
        _sockets.be_patient(sock)
        try:
            service.adopt(Stream(sock.fileno(), asked.number, connection))
        except BaseException:
            if connection is not None:
                connection.close()
            raise
        sock.detach()

    def _service(self, asked: Asked) -> Service:
        incoming = self._sessions.get(asked.session)
        if incoming is None:
            raise PeerLostError("the session has ended")
        return incoming.services.of(asked.backend)

    # -- initiators

    def _welcome(self, channel: AnyChannel, hello: Hello, certificate: bytes | None, *, remote: bool) -> None:
        """Answer a hello: the session, every region, and that this was all."""
        me = self._identity
        assert me is not None
        if hello.version != me.version:
            _refuse(channel, f"it speaks protocol {hello.version}, this agent {me.version}")
        if certificate is not None and self._credentials is not None:
            try:
                self._credentials.check_name(certificate, hello.name)
            except PeerLostError as error:
                _refuse(channel, str(error))
        known = self._sessions.get(hello.resume) if hello.resume else None
        if hello.resume and (known is None or not known.resume(channel, hello)):
            _refuse(channel, f"it is {me.name!r}, generation {me.generation}, and knows of no such connection")
        for older in [other for other in self._named(hello.name) if other.generation < hello.generation]:
            older.replaced(hello.generation)
        incoming = known or self._join(channel, hello, remote=remote)
        self.incoming.add(incoming)
        self._sessions[incoming.session] = incoming
        address, value = (0, b"") if remote else self._probe
        welcome = Welcome(
            name=me.name, generation=me.generation, process=me.process, host=me.host, session=incoming.session,
            secret=incoming.secret, probe_address=address, probe_value=value, slots=SLOTS,
            backends={name: told for name, backend in self.backends.items() if (told := backend.address())},
        )  # fmt: skip
        channel.send(encode_frame(welcome), [] if remote else [incoming.page.fd])
        for region in self._regions.values():
            self._show(region, incoming)
        channel.send(encode_frame(Ready()))
        if not self._paused:
            channel.resume()
        if known is None:
            self.events.on_joined(incoming)
        else:
            self.events.on_connection()

    def _join(self, channel: AnyChannel, hello: Hello, *, remote: bool) -> Incoming:
        incoming = Incoming(self, channel, hello, remote=remote)
        if self._paused:
            incoming.services.pause()
        try:
            incoming.services.join()
        except BaseException as error:
            if isinstance(error, BackendError):
                channel.send(encode_frame(Refused(str(error)[:1000])))
            incoming.let_go()
            raise
        return incoming

    def _show(self, region: Region, incoming: Incoming) -> None:
        access = region.grants.of(incoming.name)
        if access is not None:
            incoming.page.open(region.slot, region.epoch)
            incoming.services.open(region, access)
            incoming.channel.send(*announcement(region, access, remote=incoming.remote))

    def open(self, region: Region) -> None:
        """Tell the initiators of a region that they may use, and those to come."""
        self._regions[region.id] = region
        for incoming in self.incoming:
            self._show(region, incoming)

    def renew(self, region: Region, peer: str) -> None:
        """Tell a peer what it may do with a region from now on: more or less than before, or something at all."""
        if region.id in self._regions:
            for incoming in self._named(peer):
                self._show(region, incoming)

    def shut(self, region: Region) -> list[Incoming]:
        """Take a region back from every initiator; those that had it. See `GatePage.wait`."""
        self._regions.pop(region.id, None)
        shown = [incoming for incoming in self.incoming if region.grants.of(incoming.name) is not None]
        for incoming in shown:
            _hide(region, incoming)
        return shown

    def shut_to(self, region: Region, peer: str) -> list[Incoming]:
        """Take a region back from one peer."""
        shown = list(self._named(peer)) if region.id in self._regions else []
        for incoming in shown:
            _hide(region, incoming)
        return shown

    def _named(self, peer: str) -> Iterator[Incoming]:
        return (incoming for incoming in self.incoming if incoming.name == peer)

    def forget(self, incoming: Incoming, why: str, *, on_purpose: bool) -> None:
        """Note that an initiator is gone."""
        self.incoming.discard(incoming)
        self._sessions.pop(incoming.session, None)
        self.events.on_left(incoming, why, on_purpose=on_purpose)

    def pause(self) -> None:
        """Take nothing from the initiators' sockets for now."""
        self._paused = True
        for incoming in self.incoming:
            incoming.channel.pause()
            incoming.services.pause()

    def resume(self) -> None:
        """Go on after `pause`."""
        self._paused = False
        for incoming in self.incoming:
            incoming.channel.resume()
            incoming.services.resume()

    async def aclose(self) -> None:
        """Stop listening and end all connections."""
        for listener in self._listeners:
            await listener.aclose()
        for incoming in self.incoming:
            incoming.close()
        self.incoming.clear()
        self._sessions.clear()

    def drop(self) -> None:
        """In a forked child: let go of the descriptors."""
        for listener in self._listeners:
            listener.drop()
        for incoming in self.incoming:
            incoming.drop()
        self.incoming.clear()  # with the pages, which the parent and its peers go on using
        self._sessions.clear()


async def _first_frame(channel: AnyChannel) -> bytes:
    """Wait for the first frame; others wait in the channel, which is paused then."""
    first: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def on_frame(frame: bytes, fds: list[int]) -> None:
        for fd in fds:
            os.close(fd)
        channel.pause()
        if not first.done():
            first.set_result(frame)

    def on_end(why: str) -> None:
        if not first.done():
            first.set_exception(PeerLostError(why))

    channel.follow(on_frame, on_end)
    return await first


def _hide(region: Region, incoming: Incoming) -> None:
    incoming.channel.send(encode_frame(RegionRemoved(region.id)))
    incoming.page.shut(region.slot)


def _refuse(channel: AnyChannel, reason: str) -> None:
    channel.send(encode_frame(Refused(reason[:1000])))
    raise MetadataError(reason)


def _say(sock: socket.socket, status: Status) -> None:
    try:
        sock.send(status.answer, socket.MSG_NOSIGNAL)
    except OSError:
        return  # it has gone, or does not read


def _ignore(*_: object) -> None:
    """Nobody follows a channel that has just been made."""
