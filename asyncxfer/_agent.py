"""The agent: the one object that sees the whole flow, from a call to descriptors, a route, a backend and an end.

It owns lifetimes: its regions, its peers, its backends, the transfers in flight, and the order in which all of them
end. What each of them does is in the module of its name.
"""

from __future__ import annotations

import asyncio
import math
import operator
import os
import time
import uuid
import warnings
import weakref
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import numpy as np
import numpy.typing as npt

from . import _channel, _chooser, _loops, _metadata, _plugins
from ._channel import Channel
from ._chooser import Explanation
from ._config import Config
from ._control import Acceptor, Incoming, Outgoing
from ._descriptors import DescriptorList
from ._errors import (
    AccessError,
    BackendError,
    ClosedError,
    ConfigError,
    DescriptorError,
    PeerLostError,
    RegistrationError,
    TransferTimeout,
)
from ._fast import completion, engine, outbox
from ._fast.link import PAGE_BYTES, SLOTS, Link
from ._fast.memory import Mapping as MemoryMapping
from ._inbox import Inbox, Notification
from ._memory import Access, Memory, describe
from ._metadata import AgentMetadata, NoteKind, RegionInfo
from ._peer import Peer, PeerEvent, PeerState
from ._region import Opening, Region, RemoteRegion
from ._sharing import Allocation, Backings, Place, allocate, backings_of
from ._plan import Notice, Plan, match
from ._transfer import Flights, Transfer
from .abc import Backend, Endpoint, Offer, Op, PeerInfo, Reach, Registration, RemoteRegistration, Request, Segment
from .directory import Directory, forget_agents, open_directory

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

__all__ = ["Agent"]

T = TypeVar("T")

_agents: weakref.WeakSet[Agent] = weakref.WeakSet()
_process = os.urandom(16)
_last_generation = 0


class Agent:
    """A place that moves bytes to and from others: its regions, its peers and its transfers.

    Parameters
    ----------
    name : str
        By which other agents find it; unique in its directory.
    directory : str, Directory or None
        Where agents find each other; None: in this process.
    backends : iterable of str or Backend, or None
        Which ways to use; None for all that load here.
    listen : None
        This host only.
    config : Config, mapping or None
        Tunables; see `Config`.

    Raises
    ------
    ConfigError
        A key of `config`, or a value, that does not exist.

    Examples
    --------
    >>> async def example():
    ...     async with Agent("a") as a, Agent("b") as b:
    ...         async with a.allocate((4, 8), "uint8") as source, b.allocate((4, 8), "uint8", name="kv") as target:
    ...             peer = await a.connect("b")
    ...             return await a.put(source[[1, 3]], peer["kv"][:2], notify=b"done")
    """

    def __init__(
        self,
        name: str,
        *,
        directory: str | Directory | None = None,
        backends: Iterable[_plugins.BackendSpec] | None = None,
        listen: None = None,
        config: Config | Mapping[str, Any] | None = None,
    ) -> None:
        if not name or len(name) > 255 or not name.isprintable():
            raise ConfigError(f"agent name {name!r}: expected 1 to 255 printable characters")
        if listen is not None:
            raise ConfigError(f"listen={listen!r}: this version talks to agents of this host only; expected None")
        self.name = name
        self.config = Config.load(config)
        self._directory = open_directory(directory)
        self._wanted = None if backends is None else list(backends)
        self._backends: dict[str, Backend] = {}
        self._refused: dict[str, str] = {}
        self._regions: dict[str, Region] = {}
        self._peers: dict[str, Peer] = {}
        self._outgoing: dict[Peer, Outgoing] = {}
        self._dialling: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._present: dict[tuple[str, int], int] = {}
        self._generations: dict[str, int] = {}
        self._listeners: weakref.WeakSet[asyncio.Queue[PeerEvent | None]] = weakref.WeakSet()
        self._cleanups: set[asyncio.Task[None]] = set()
        self._free_slots: list[int] = []
        self._slots = 0
        self._count = 0
        self._flights: Flights | None = None
        self._acceptor: Acceptor
        self._inbox: Inbox
        self._metadata: AgentMetadata
        self._executor: ThreadPoolExecutor | None = None
        self._closed: str | None = None
        self._probe = np.frombuffer(os.urandom(16), np.uint8).copy()

    # ---- life ----------------------------------------------------------------------------------------------------

    async def start(self) -> Self:
        """Load backends, listen, and become known in the directory.

        Raises
        ------
        BackendError
            A backend that was asked for does not load.
        ConfigError
            The name is taken.
        """
        if self._flights is not None:
            raise ConfigError(f"agent {self.name!r} was started before; an agent lives once")
        loop = asyncio.get_running_loop()
        self._backends, self._refused = _plugins.load(self._wanted, self.config)
        flights = Flights(loop, _loops.acquire(loop), self.config.notification_bytes)
        probe = (self._probe.ctypes.data, self._probe.tobytes())
        self._acceptor = Acceptor(self, probe, self.config.handshake_timeout)
        self._inbox = Inbox(self.config.backlog_bytes, self._acceptor.resume)
        self._metadata = AgentMetadata(
            name=self.name, generation=_next_generation(), process=_process, host=_host_id(),
            addresses=[self._acceptor.address],
        )  # fmt: skip
        self._flights = flights
        _agents.add(self)
        self._acceptor.start(self._metadata)
        try:
            await self._directory.publish(self.name, self.metadata())
        except BaseException:
            await self._end("the agent could not be published")
            raise
        return self

    async def aclose(self) -> None:
        """Let what is in flight end, leave all peers, close all regions and backends. Again does nothing."""
        if self._flights is None or self._closed is not None:
            return
        await self._directory.withdraw(self.name, self.metadata())
        await self._end(f"agent {self.name!r} was closed")

    async def _end(self, why: str) -> None:
        flights = self._started()
        self._closed = flights.closed = why
        await flights.settle(flights.all(), within=self.config.close_timeout)
        for peer in list(self._outgoing):
            await self._leave(peer)
        stragglers: list[RegistrationError] = []
        for region in list(self._regions.values()):
            try:
                await self._close_region(region)
            except RegistrationError as error:
                stragglers.append(error)
        while self._cleanups:
            await asyncio.wait(self._cleanups)
        self._inbox.close(why)
        for listener in list(self._listeners):
            listener.put_nowait(None)
        self._acceptor.close()
        for backend in self._backends.values():
            await backend.aclose()
        _agents.discard(self)
        _loops.release(flights.loop)
        if not _agents:
            outbox.shutdown()
        if self._executor is not None:
            self._executor.shutdown()
        if stragglers:
            raise stragglers[0]

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if self.__dict__.get("_flights") is not None and self._closed is None:
            warnings.warn(f"{self!r} was not closed; use `async with`", ResourceWarning, stacklevel=2, source=self)

    def __repr__(self) -> str:
        state = "new" if self._flights is None else "closed" if self._closed else "open"
        return f"<Agent {self.name!r}, {state}, {len(self._regions)} regions, {len(self._peers)} peers>"

    def _started(self) -> Flights:
        if self._flights is None:
            raise ClosedError(f"agent {self.name!r} has not been started; use `async with Agent(...)` or await start()")
        return self._flights

    def _check_open(self) -> Flights:
        flights = self._started()
        flights.check_open()
        return flights

    async def _in_thread(self, call: Any, *args: object) -> Any:
        """Run what would hold up the loop in a thread of the agent's own."""
        from concurrent.futures import ThreadPoolExecutor

        if self._executor is None:
            self._executor = ThreadPoolExecutor(4, thread_name_prefix="axf-aux")
        return await asyncio.get_running_loop().run_in_executor(self._executor, call, *args)

    def _forked(self) -> None:
        """In a forked child: nothing here is ours; the parent's connections go on untouched."""
        self._closed = f"agent {self.name!r} belongs to the parent of this forked process; make a new one here"
        if self._flights is not None:
            self._flights.closed = self._closed
            self._acceptor.drop()
        for outgoing in self._outgoing.values():
            outgoing.channel.drop()

    # ---- regions -------------------------------------------------------------------------------------------------

    def register(self, obj: object, *, name: str | None = None, access: Access = "rw") -> Opening:
        """Make memory reachable for peers, and usable in transfers.

        Parameters
        ----------
        obj : array, tensor, buffer, or list or tuple of them
            Anything with the buffer protocol, DLPack or ``__cuda_array_interface__``, or a torch tensor.
        name : str or None
            By which peers find it; None gives it a number.
        access : {"r", "w", "rw"}
            What peers may do: get from it, put to it. Read-only memory is only ever read.

        Returns
        -------
        Opening
            ``await`` it for a `Region`, or ``async with`` it.

        Raises
        ------
        RegistrationError
            By the await: the memory cannot be described or used, or the name is taken.
        """
        return Opening(lambda: self._register(obj, name, access))

    def allocate(
        self,
        shape: int | Sequence[int],
        dtype: npt.DTypeLike,
        *,
        kind: str = "dram",
        name: str | None = None,
        access: Access = "rw",
        huge_pages: bool = False,
    ) -> Opening:
        """Make a region of new, zeroed memory that processes of this host can map.

        Parameters
        ----------
        shape : int or tuple of int
        dtype : data type
        kind : {"dram"}
            Kind of memory.
        name, access
            As in `register`.
        huge_pages : bool
            Take huge pages where the system has free ones.

        Returns
        -------
        Opening
            ``await`` it for a `Region`, whose `array` is the memory, or ``async with`` it.

        Raises
        ------
        RegistrationError
            By the await: there is not that much memory, or no such kind here.
        """
        return Opening(lambda: self._allocate(shape, dtype, kind, name, access, huge_pages=huge_pages))

    async def _allocate(
        self, shape: int | Sequence[int], dtype: npt.DTypeLike, kind: str, name: str | None, access: Access, *,
        huge_pages: bool,
    ) -> Region:  # fmt: skip
        self._check_open()
        if kind != "dram":
            raise RegistrationError(f"kind {kind!r} cannot be allocated: no backend for it is loaded; expected 'dram'")
        dims, element = _dimensions(shape, dtype)
        allocation = allocate(math.prod(dims) * element.itemsize, huge_pages=huge_pages)
        array = np.frombuffer(allocation.buffer, element).reshape(dims)
        return await self._register(array, name, access, allocation)

    async def _register(
        self, obj: object, name: str | None, access: Access, allocation: Allocation | None = None
    ) -> Region:
        self._check_open()
        memory = describe(obj, access=access)
        if allocation is not None:
            backings = Backings((allocation.file,), (Place(0, 0),))
        else:
            backings = await self._in_thread(_backings, memory, "w" in access and not memory.readonly)
            self._check_open()
        try:
            region = self._enter(memory, name, access)
        except BaseException:
            backings.close()
            raise
        region.backings = backings
        if allocation is not None:
            region.array = obj  # type: ignore[assignment]
        self._acceptor.open(region)
        return region

    def _enter(self, memory: Memory, name: str | None, access: Access) -> Region:
        """Give memory a number, a name and a slot, and show it to every backend."""
        number = self._count + 1
        name = f"region-{number}" if name is None else name
        if name in self._regions:
            raise RegistrationError(f"agent {self.name!r} has a region {name!r} already; names are unique")
        if not self._free_slots and self._slots >= SLOTS:
            raise RegistrationError(f"agent {self.name!r} has {SLOTS:,} regions, the most there can be; register lists")
        registrations: dict[str, Registration] = {}
        refused: dict[str, str] = {}
        for backend in self._backends.values():
            try:
                registrations[backend.name] = backend.register(memory)
            except RegistrationError as error:
                refused[backend.name] = str(error)
        if not registrations:
            reasons = "; ".join(f"{k}: {v}" for k, v in (self._refused | refused).items())
            raise RegistrationError(f"no backend can use this {memory.kind} memory ({reasons})")
        if not self._free_slots:  # a slot whose last initiator is stopped inside it never becomes free again
            self._free_slots.append(self._slots)
            self._slots += 1
        slot = self._free_slots.pop()
        self._count = number
        region = Region(name, memory, id=number, slot=slot, epoch=number, access=access, close=self._close_region)
        region.registrations = registrations
        self._regions[name] = region
        return region

    async def _close_region(self, region: Region) -> None:
        if region.closed is not None:
            return
        region.closed = f"region {region.name!r} of agent {self.name!r} was closed"
        flights = self._started()
        inside = self._acceptor.shut(region)
        await flights.settle(flights.using(region), within=self.config.close_timeout)
        late = [i for i in inside if not await self._drained(i, region.slot)]
        for backend, registration in region.registrations.items():
            self._backends[backend].deregister(registration)
        region.registrations.clear()
        if region.backings is not None:
            region.backings.close()
        del self._regions[region.name]
        memory, region.memory = region.memory, replace(region.memory, owner=None)
        region.array = None
        if late:
            for incoming in late:
                incoming.kept.append(memory)
            raise RegistrationError(
                f"{region.closed}, but {', '.join(repr(i.name) for i in late)} was stopped inside a transfer with it; "
                "its memory is kept alive until that process goes on or ends, do not reuse it for something else"
            )
        self._free_slots.append(region.slot)

    async def _drained(self, incoming: Incoming, slot: int) -> bool:
        """Wait until an initiator has left a slot that was shut, for a second at most."""
        incoming.draining.add(slot)
        empty = await self._in_thread(incoming.page.wait, slot, self.config.close_timeout)
        incoming.draining.discard(slot)
        return bool(empty) or incoming.gone

    # ---- peers ---------------------------------------------------------------------------------------------------

    def metadata(self) -> bytes:
        """What `connect` of another agent needs, for a channel of your own: at most 64 KiB, safe to decode."""
        self._started()
        return _metadata.encode(self._metadata)

    async def connect(self, target: str | bytes, *, timeout: float | None = None) -> Peer:
        """Reach another agent; the one that is connected already, if it is the same.

        Parameters
        ----------
        target : str or bytes
            A name in the directory, waited for until it appears, or the bytes of the other's `metadata`.
        timeout : float or None, seconds
            None: configuration key connect_timeout.

        Raises
        ------
        PeerLostError
            It has ended, or has been replaced by a later generation.
        TransferTimeout
            The name did not appear, or the peer did not answer.
        MetadataError
            The bytes are no metadata.
        """
        self._check_open()
        limit = self.config.connect_timeout if timeout is None else timeout
        try:
            async with asyncio.timeout(limit):
                data = await self._directory.lookup(target) if isinstance(target, str) else bytes(target)
                metadata = _metadata.decode(data)
                async with self._dialling[metadata.name]:
                    known = self._peers.get(metadata.name)
                    if known is not None and known.lost is None and known.generation == metadata.generation:
                        return known
                    return await self._dial(metadata)
        except TimeoutError as error:
            if isinstance(error, TransferTimeout):
                raise
            raise TransferTimeout(f"agent {target!r} did not appear or answer within {limit} s") from error

    async def _dial(self, metadata: AgentMetadata) -> Peer:
        what = f"agent {metadata.name!r}, generation {metadata.generation},"
        if metadata.host != self._metadata.host:
            raise PeerLostError(f"{what} is on another host; this version reaches agents of this host only")
        if not metadata.addresses:
            raise PeerLostError(f"{what} has no address")
        try:
            sock = await _channel.connect(metadata.addresses[0])
        except PeerLostError as error:
            raise PeerLostError(f"{what} has ended or restarted since its metadata was made: {error}") from error
        outgoing = Outgoing(sock)
        try:
            welcome = await outgoing.greet(self._metadata, self.config.handshake_timeout)
            self._check_open()
            if (welcome.name, welcome.generation) != (metadata.name, metadata.generation):
                raise PeerLostError(f"{what} is gone: {welcome.name!r}, {welcome.generation}, answers in its place")
            link = _make_link(outgoing)
            reach = Reach.PROCESS if welcome.process == _process else Reach.HOST
            info = PeerInfo(
                metadata.name, metadata.generation, reach, link.pid, (welcome.probe_address, welcome.probe_value), link
            )
            peer = Peer(metadata, info, notify=self._notify, leave=self._leave)
            await self._reach(peer)
        except BaseException:
            outgoing.discard()
            outgoing.channel.release()
            raise
        self._outgoing[peer] = outgoing
        self._peers[peer.name] = peer
        self._joined(peer.name, peer.generation)
        outgoing.follow(
            lambda region, fds: self._on_region(peer, region, fds),
            lambda id: self._on_removed(peer, id),
            lambda why, on_purpose: self._on_peer_end(peer, why, on_purpose=on_purpose),
        )
        return peer

    async def _reach(self, peer: Peer) -> None:
        for backend in self._backends.values():
            if peer.info.reach > backend.capabilities.reach:
                peer.refusals[backend.name] = f"reaches no farther than {backend.capabilities.reach.name.lower()}"
                continue
            try:
                peer.endpoints[backend.name] = await backend.connect(peer.info)
            except BackendError as error:
                peer.refusals[backend.name] = str(error)

    def _on_region(self, peer: Peer, info: RegionInfo, fds: list[int]) -> None:
        region = RemoteRegion(peer, info)
        segments = tuple(Segment(s.address, s.nbytes) for s in info.segments)
        backings = [None if s.backing < 0 else (fds[s.backing], s.backing_offset) for s in info.segments]
        for name, endpoint in peer.endpoints.items():
            try:
                region.attachments[name] = endpoint.attach(info.kind, segments, backings, b"")
            except BackendError as error:
                region.refusals[name] = str(error)
        while fds:
            os.close(fds.pop())
        peer.add(region)

    def _on_removed(self, peer: Peer, id: int) -> None:
        region = peer.remove(id)
        if region is not None:
            _detach(peer, region)

    def _on_peer_end(self, peer: Peer, why: str, *, on_purpose: bool) -> None:
        if peer.lost is not None:
            return
        state = PeerState.LEFT if on_purpose else PeerState.LOST
        peer.end(state, f"peer {peer.name!r}, generation {peer.generation}, is gone: {why}")
        peer.link.close()
        task = asyncio.ensure_future(self._forget(peer))
        self._cleanups.add(task)
        task.add_done_callback(self._cleanups.discard)

    async def _leave(self, peer: Peer) -> None:
        outgoing = self._outgoing.get(peer)
        if outgoing is None:
            return
        if peer.lost is None:
            flights = self._started()
            peer.end(PeerState.LEFT, f"agent {self.name!r} has left peer {peer.name!r}")
            await flights.settle(flights.to(peer.link), within=self.config.close_timeout)
            outgoing.leave()
            peer.link.close()
        await self._forget(peer)

    async def _forget(self, peer: Peer) -> None:
        """Let go of a peer that is gone, once no native code uses the connection."""
        outgoing = self._outgoing.pop(peer, None)
        if outgoing is None:
            return
        flights = self._started()
        outbox.forget(peer.link)
        gone = completion.STATUS_PEER_GONE
        await flights.settle(flights.to(peer.link), within=self.config.close_timeout, status=gone)
        outbox.forget(peer.link)
        outgoing.discard()
        outgoing.channel.release()
        for region in peer.regions.values():
            _detach(peer, region)
        for endpoint in peer.endpoints.values():
            endpoint.close()
        if self._peers.get(peer.name) is peer:
            del self._peers[peer.name]
        self._departed(peer.name, peer.generation, peer.state)

    # -- what the acceptor tells

    def on_joined(self, incoming: Incoming) -> None:
        """An initiator has said hello."""
        self._inbox.joined(incoming.name)
        self._joined(incoming.name, incoming.generation)

    def on_note(self, incoming: Incoming, kind: NoteKind, tag: bytes) -> None:
        """A notification has arrived."""
        if kind is NoteKind.DELIVERED:
            self._inbox.arrived(incoming.name, tag)
            if self._inbox.full:
                self._acceptor.pause()
        elif kind is NoteKind.ANNOUNCED:
            self._inbox.announced(incoming.name, tag)
        else:
            self._inbox.failed(incoming.name, tag)

    def on_left(self, incoming: Incoming, why: str, *, on_purpose: bool) -> None:
        """An initiator is gone."""
        self._inbox.lost(incoming.name, f"peer {incoming.name!r}, generation {incoming.generation}, is gone: {why}")
        state = PeerState.LEFT if on_purpose else PeerState.LOST
        self._departed(incoming.name, incoming.generation, state)

    # -- events

    def _joined(self, name: str, generation: int) -> None:
        known = self._generations.get(name)
        self._generations[name] = generation
        self._present[name, generation] = self._present.get((name, generation), 0) + 1
        if self._present[name, generation] == 1:
            restarted = known is not None and known != generation
            self._tell(PeerEvent(name, generation, PeerState.RESTARTED if restarted else PeerState.JOINED))

    def _departed(self, name: str, generation: int, state: PeerState) -> None:
        self._present[name, generation] -= 1
        if not self._present[name, generation]:
            del self._present[name, generation]
            self._tell(PeerEvent(name, generation, state))

    def _tell(self, event: PeerEvent) -> None:
        for listener in list(self._listeners):
            listener.put_nowait(event)

    def events(self) -> AsyncIterator[PeerEvent]:
        """Yield changes of peers' states from now on: joined, suspect, lost, restarted, left.

        Peers are those that this agent connected to and those that connected to it.
        """
        self._check_open()
        queue: asyncio.Queue[PeerEvent | None] = asyncio.Queue()
        self._listeners.add(queue)
        return _events(queue)

    # ---- notifications -------------------------------------------------------------------------------------------

    def notifications(self) -> AsyncIterator[Notification]:
        """Yield notifications that arrive and that nobody expects by their tag."""
        self._check_open()
        return self._inbox.read()

    async def expect(self, tag: bytes, *, peer: str | Peer | None = None, timeout: float | None = None) -> Notification:
        """Wait for one notification; one that came before is kept until it is asked for.

        Parameters
        ----------
        tag : bytes
        peer : str, Peer or None
            The sender; None: any.
        timeout : float or None, seconds

        Raises
        ------
        PeerLostError
            The sender is gone: `peer`, or the one that had announced this tag, or the last that was connected.
        TransferError
            The transfer that was to send it has failed.
        TransferTimeout
            It did not come in time.
        """
        self._check_open()
        if not isinstance(tag, bytes):
            raise DescriptorError(f"a notification is bytes, not {type(tag).__name__}")
        return await self._inbox.expect(tag, peer.name if isinstance(peer, Peer) else peer, timeout)

    def _notify(self, peer: Peer, tag: bytes) -> Transfer:
        """Post a bare notification."""
        return Notice(self._check_open(), peer.name, peer.link).send(tag)

    # ---- transfers -----------------------------------------------------------------------------------------------

    def put(
        self,
        local: DescriptorList,
        remote: DescriptorList,
        *,
        notify: bytes | None = None,
        timeout: float | None = None,
        backend: str | None = None,
        priority: int = 0,
        checksum: bool = False,
    ) -> Transfer:
        """Move bytes from local to remote. Posts at once; await the result.

        Parameters
        ----------
        local, remote : DescriptorList
            Of regions of this agent and of a peer; equal byte totals, in any number of rows.
        notify : bytes or None
            Tag that the peer receives once the data is visible there.
        timeout : float or None, seconds
        backend : str or None
            Insist on one, or on one of its ways (``"shm:attach"``).
        priority : int
            Above 0 before, below 0 after what is in flight with 0.
        checksum : bool
            Verify at the destination.

        Returns
        -------
        Transfer

        Raises
        ------
        DescriptorError, AccessError, NoRouteError, ClosedError, PeerLostError
            What the call can know is wrong.
        """
        plan = self.prepare("put", local, remote, backend=backend, checksum=checksum)
        return plan(notify=notify, timeout=timeout, priority=priority)

    def get(
        self,
        local: DescriptorList,
        remote: DescriptorList,
        *,
        notify: bytes | None = None,
        timeout: float | None = None,
        backend: str | None = None,
        priority: int = 0,
        checksum: bool = False,
    ) -> Transfer:
        """Move bytes from remote to local; parameters, result and errors as in `put`."""
        plan = self.prepare("get", local, remote, backend=backend, checksum=checksum)
        return plan(notify=notify, timeout=timeout, priority=priority)

    def prepare(
        self,
        op: Op,
        local: DescriptorList,
        remote: DescriptorList,
        *,
        backend: str | None = None,
        checksum: bool = False,
    ) -> Plan:
        """Check, match, merge and route once; ``await plan()`` many times.

        Parameters
        ----------
        op : {"put", "get"}
        local, remote, backend, checksum
            As in `put`.

        Raises
        ------
        DescriptorError, AccessError, NoRouteError, ClosedError, PeerLostError
            What the call can know is wrong.
        """
        flights = self._check_open()
        here, there = self._sides(op, local, remote)
        pairs = match(local, remote)
        rows = int(pairs["count"].sum())
        offers = self._offers(op, here, there)
        if checksum:
            offers = [(n, Offer(o.via, reason="does not compute checksums")) for n, o in offers]
        taken = _chooser.choose(_chooser.weigh(op, rows, local.nbytes, offers, backend))
        remote_registration: Registration | RemoteRegistration
        peer, link, slot, epoch, endpoint = self.name, None, 0, 0, None
        if isinstance(there, RemoteRegion):
            remote_registration = there.attachments[taken.backend]
            peer, link, endpoint = there.peer.name, there.peer.link, there.peer.endpoints[taken.backend]
            slot, epoch = there.info.slot, there.info.epoch
        else:
            remote_registration = there.registrations[taken.backend]
        request = Request(
            op, taken.via, here.registrations[taken.backend], remote_registration, pairs, local.nbytes, rows,
            endpoint=endpoint, link=link, slot=slot, epoch=epoch, keep=(here, there),
        )  # fmt: skip
        return Plan(
            self._backends[taken.backend], request, route=taken, local=local, remote=remote, flights=flights, peer=peer
        )

    def explain(self, op: Op, local: DescriptorList, remote: DescriptorList) -> Explanation:
        """Every route that this transfer could take, with its predicted time and why it is or is not taken."""
        self._check_open()
        here, there = self._sides(op, local, remote)
        rows = int(match(local, remote)["count"].sum())
        return _chooser.weigh(op, rows, local.nbytes, self._offers(op, here, there))

    def _sides(self, op: Op, local: DescriptorList, remote: DescriptorList) -> tuple[Region, Region | RemoteRegion]:
        """Check what a transfer names: its regions, whose they are, and what they allow."""
        if op not in ("put", "get"):
            raise DescriptorError(f"op is {op!r}; expected 'put' or 'get'")
        for what, rows in (("local", local), ("remote", remote)):
            if not isinstance(rows, DescriptorList):
                raise DescriptorError(
                    f"{what} is {type(rows).__name__}; expected a DescriptorList, such as region[...] or region.bytes[:]"
                )
        here, there = local.region, remote.region
        if isinstance(here, Region):
            here.check_open()
        if not isinstance(here, Region) or self._regions.get(here.name) is not here:
            raise DescriptorError(f"local must be descriptors of a region of agent {self.name!r}, not of {here!r}")
        if isinstance(there, (Region, RemoteRegion)):
            there.check_open()
        remote_known = isinstance(there, RemoteRegion) and there.peer in self._outgoing
        own = isinstance(there, Region) and self._regions.get(there.name) is there
        if not remote_known and not own:
            raise DescriptorError(
                f"remote must be descriptors of a region of agent {self.name!r} or of a peer that it has connected to, "
                f"not of {there!r}"
            )
        assert isinstance(there, (Region, RemoteRegion))
        need: Literal["r", "w"] = "w" if op == "put" else "r"
        if isinstance(there, RemoteRegion) and need not in there.access:
            raise AccessError(f"{op} needs access {need!r}; {there!r} grants {there.access!r}")
        written: Region | RemoteRegion = there if op == "put" else here
        if isinstance(written, Region) and written.readonly:
            raise AccessError(f"{op} would write {written!r}, whose memory is read-only")
        return here, there

    def _offers(self, op: Op, here: Region, there: Region | RemoteRegion) -> list[tuple[str, Offer]]:
        offers: list[tuple[str, Offer]] = [(name, Offer(reason=why)) for name, why in self._refused.items()]
        for name, backend in self._backends.items():
            local = here.registrations.get(name)
            remote: Registration | RemoteRegistration | None
            endpoint: Endpoint | None = None
            if isinstance(there, RemoteRegion):
                remote, endpoint = there.attachments.get(name), there.peer.endpoints.get(name)
                refusals = there.refusals | there.peer.refusals
                missing = refusals.get(name, "does not know the peer's region")
            else:
                remote, missing = there.registrations.get(name), "did not register the other region"
            if local is None:
                offers.append((name, Offer(reason=f"did not register region {here.name!r}")))
            elif remote is None:
                offers.append((name, Offer(reason=missing)))
            elif (here.kind, there.kind) not in backend.capabilities.kinds:
                offers.append((name, Offer(reason=f"does not move {here.kind} to or from {there.kind}")))
            else:
                offers.extend((name, offer) for offer in backend.offers(op, local, remote, endpoint))
        return offers

    # ---- figures -------------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Counters since the start.

        Returns
        -------
        dict
            ``"sent"``: by peer, backend and direction what this agent moved (transfers, nbytes, failed, seconds);
            ``"served"``: by peer what connected initiators moved to and from this agent's regions; ``"in_flight"``,
            ``"regions"``, ``"peers"``, ``"backends"``, ``"threads"``.
        """
        flights = self._started()
        sent: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
        for (peer, backend, op), counter in flights.counters.items():
            sent.setdefault(peer, {}).setdefault(backend, {})[op] = asdict(counter)
        served: dict[str, dict[str, int]] = {}
        for incoming in self._acceptor.incoming:
            if incoming.joined:
                total = served.setdefault(incoming.name, {})
                for key, value in incoming.page.counts().items():
                    total[key] = total.get(key, 0) + value
        return {
            "sent": sent,
            "served": served,
            "in_flight": len(flights.all()),
            "regions": len(self._regions),
            "peers": len(self._peers),
            "backends": list(self._backends),
            "threads": engine.threads(),
        }


def _dimensions(shape: int | Sequence[int], dtype: npt.DTypeLike) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """The dimensions and element type of an array to be allocated."""
    try:
        dims = tuple(operator.index(size) for size in (shape if isinstance(shape, Iterable) else (shape,)))
        element = np.dtype(dtype)
    except TypeError as error:
        raise RegistrationError(f"shape {shape!r} of {dtype!r} cannot be allocated: {error}") from error
    if any(size < 0 for size in dims) or element.hasobject or not element.itemsize:
        raise RegistrationError(
            f"shape {dims} of {element} cannot be allocated; expected sizes of 0 or more and elements that are plain bytes"
        )
    return dims, element


async def _events(queue: asyncio.Queue[PeerEvent | None]) -> AsyncIterator[PeerEvent]:
    # The queue is subscribed as long as this lives.
    while (event := await queue.get()) is not None:
        yield event


def _backings(memory: Memory, writable: bool) -> Backings:  # noqa: FBT001 - called through run_in_executor
    return backings_of(memory.segments, writable=writable)


def _make_link(outgoing: Outgoing) -> Link:
    """The native side of a connection, over the page that the target sent."""
    channel: Channel = outgoing.channel
    fd = outgoing.take_page()
    try:
        page = MemoryMapping(fd, 0, PAGE_BYTES, writable=True)
        return Link(channel.sock.fileno(), channel.pidfd, channel.credentials.pid, page)
    except (OSError, ValueError) as error:
        raise PeerLostError(f"process {channel.credentials.pid} sent no usable link page: {error}") from error
    finally:
        os.close(fd)


def _detach(peer: Peer, region: RemoteRegion) -> None:
    for name, attachment in region.attachments.items():
        peer.endpoints[name].detach(attachment)
    region.attachments.clear()


def _next_generation() -> int:
    """Larger than any before: the clock, or one more where it stood still."""
    global _last_generation
    _last_generation = max(time.time_ns(), _last_generation + 1)
    return _last_generation


def _host_id() -> bytes:
    """The same for all processes of one booted kernel."""
    return uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text().strip()).bytes


def _after_fork() -> None:
    global _process
    _process = os.urandom(16)
    engine.after_fork()
    outbox.after_fork()
    for agent in list(_agents):
        agent._forked()
    _agents.clear()
    _loops.forget_all()
    forget_agents()


os.register_at_fork(after_in_child=_after_fork)
