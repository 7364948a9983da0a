"""Backend ``ucx``: RDMA, NVLink and whatever else UCX carries, over an endpoint of UCXX to each worker of a peer.

UCXX owns the context, the workers and the endpoints; puts, gets, flushes and messages are posted by native code (see
`_fast.ucxport`, `_fast.ucxlane`, `_fast.ucxserve`). What is left for Python is here: memory and its keys, making
endpoints and making them again, and handing on the notifications that came with data. Which UCX there is, and what it
may use, stands in `_ucx_library`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import struct
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from .._fast import engine, ucp, ucxlane
from .._fast.consolidation import consolidate
from .._fast.poller import Mailbox
from .._fast.ucp import Memory as UcpMemory
from .._fast.ucxlane import Group, Keys, UcxWork
from .._fast.ucxport import Lock, Port, keep_forever
from .._fast.ucxserve import UcxSession
from ..abc import (
    Backend,
    BackendError,
    Capabilities,
    Completion,
    Cost,
    Endpoint,
    Memory,
    MemoryKind,
    Offer,
    Op,
    PeerInfo,
    Reach,
    Registration,
    RegistrationError,
    RemoteRegistration,
    Request,
    Segment,
    Service,
)
from . import _ucx_library
from ._ranges import HOST, Range, RangeCache

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .._config import Config
    from .._fast.link import GatePage

__all__ = ["UcxBackend"]

_log = logging.getLogger("asyncxfer")

_MEMORY = (MemoryKind.DRAM, MemoryKind.VRAM)
_MAX_WORKERS = 16
_MAX_ADDRESS = 16 << 10  # bytes of one worker's
_MAX_KEY = 16 << 10
_DRAINED_WITHIN = 10.0  # seconds after an endpoint was closed by force
_BURST = 32  # messages a turn of the loop
_FIRST_DELAY, _LONGEST_DELAY = 0.01, 1.0  # seconds between attempts to make an endpoint again
_COUNT = struct.Struct(">H")
_LENGTH = struct.Struct(">I")
_SEGMENT = struct.Struct(">QQH")  # address, bytes, which key
_NUMBER = struct.Struct(">Q")

# Transports that put and get without the other side's software. Over the others UCX sends messages, and so do we: what
# it has sent for a put the target writes whenever it comes to it, region or no region, and UCX's tcp (1.21, 1.22) uses
# a connection after it was freed when its endpoint was closed by force in the middle of a put.
_DIRECT = ("cma", "knem", "xpmem", "rc_", "dc_", "srd", "gga_", "cuda_ipc")
_PACKED_CHUNK_BYTES = 256 << 10


@dataclass(slots=True, eq=False)
class _Registration(Registration):
    """Memory that is registered with UCX: a range for each segment, and a number that peers know it by."""

    number: int
    ranges: tuple[Range[UcpMemory], ...]


@dataclass(slots=True, eq=False)
class _Remote(RemoteRegistration):
    """A peer's region: where its segments lie, and the keys to them."""

    number: int
    bases: npt.NDArray[np.uint64]
    keys: Keys
    packed: bool = True  # until the keys have been unpacked for the first time
    refused: str = ""


def _pack(parts: Iterable[bytes]) -> bytes:
    parts = list(parts)
    return _COUNT.pack(len(parts)) + b"".join(_LENGTH.pack(len(part)) + part for part in parts)


def _unpack(data: bytes, *, most: int, longest: int) -> tuple[list[bytes], bytes]:
    """Give the parts, and what follows them; ValueError or struct.error when the bytes make no sense."""
    (count,) = _COUNT.unpack_from(data)
    if count > most:
        raise ValueError(f"{count} parts; at most {most}")
    at, parts = _COUNT.size, []
    for _ in range(count):
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        if length > longest or at + length > len(data):
            raise ValueError(f"a part of {length} bytes")
        parts.append(data[at : at + length])
        at += length
    return parts, data[at:]


def _unpack_keys(remote: _Remote, index: int) -> None:
    """With the port's lock held."""
    try:
        remote.keys.unpack(index)
    except BackendError as error:  # nothing goes with them
        remote.refused = str(error)
        remote.keys.revoke()


class _Endpoint(Endpoint):
    """A peer, and an endpoint for each worker; one that breaks is made again while the peer is there."""

    def __init__(self, backend: UcxBackend, info: PeerInfo, addresses: Sequence[bytes]) -> None:
        self._backend = backend
        self._info = info
        self._addresses = [addresses[n % len(addresses)] for n in range(len(backend.ports))]
        self._number = backend.enter(self._on_message)
        self.group = Group(backend.ports, backend.mailbox, self._number, info.link, info.key)
        self._endpoints: dict[int, Any] = {}
        self._remotes: dict[int, _Remote] = {}
        self._released: list[_Remote] = []
        self._refreshing: asyncio.Task[None] | None = None
        self._waits: defaultdict[tuple[int, int], set[asyncio.Future[None]]] = defaultdict(set)
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._making: dict[int, asyncio.Task[None]] = {}  # goes on in its thread when who waits is cancelled
        self.direct = False

    # -- endpoints

    async def open(self) -> None:
        """Make all endpoints."""
        async with asyncio.TaskGroup() as tasks:
            for index in range(self.group.lanes):
                tasks.create_task(self._raise(index))
        lanes = ucp.transports(self._endpoints[0].handle)
        self.direct = any(transport.startswith(_DIRECT) for transport, _ in lanes)
        self.transports = lanes

    async def _raise(self, index: int) -> None:
        """Make an endpoint, and wait until the peer has answered over it."""
        welcomed = self._wait(ucxlane.WELCOMED, index)
        try:
            self._making[index] = asyncio.ensure_future(asyncio.to_thread(self._make, index))
            await asyncio.shield(self._making[index])
            self._backend.ports[index].rouse()
            await asyncio.wait_for(welcomed, self._backend.config.handshake_timeout)
        except TimeoutError:
            raise BackendError(
                f"{self._info.name!r} did not answer over UCX within {self._backend.config.handshake_timeout:g} s"
            ) from None
        finally:
            self._waits[ucxlane.WELCOMED, index].discard(welcomed)
        await asyncio.to_thread(self._go_on, index)

    def _make(self, index: int) -> None:
        """In a thread: it takes UCX milliseconds to choose transports."""
        native = _ucx_library.native()
        try:
            with self._backend.ports[index]:
                address = native.UCXAddress.create_from_buffer(self._addresses[index])
                endpoint = self._backend.workers[index].create_endpoint_from_worker_address(address, True)
                self._endpoints[index] = endpoint
                self.group.attach(index, endpoint.handle)
        except native.UCXError as error:
            raise BackendError(f"UCX does not reach {self._info.name!r}: {error}") from error

    def _go_on(self, index: int) -> None:
        with self._backend.ports[index]:
            for remote in list(self._remotes.values()):
                _unpack_keys(remote, index)
            self.group.go_on(index)

    async def _take_down(self, index: int) -> None:
        """Close an endpoint by force, and wait until UCX holds on to nothing of it."""
        drained = self._wait(ucxlane.DRAINED, index)
        try:
            await asyncio.to_thread(self._unmake, index)
            if self.group.holds(index):
                await asyncio.wait_for(drained, _DRAINED_WITHIN)
        except TimeoutError:
            keep_forever(self)  # UCX may still write to what belongs to it
            _log.error("UCX does not let go of transfers to %r; their memory is kept", self._info.name)
        finally:
            self._waits[ucxlane.DRAINED, index].discard(drained)

    def _unmake(self, index: int) -> None:
        """In a thread: UCX says farewell before it lets go."""
        endpoint = self._endpoints.pop(index, None)
        port = self._backend.ports[index]
        with port:
            self.group.detach(index)
            if endpoint is not None and endpoint.alive:
                endpoint.close_blocking()
            elif endpoint is not None:  # UCXX has heard of its error, and leaves it to whoever looks
                port.close_endpoint(endpoint.handle)
            for remote in list(self._remotes.values()):
                remote.keys.drop(index)
        port.rouse()

    def _wait(self, kind: int, index: int) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waits[kind, index].add(future)
        return future

    def _on_message(self, kind: int, text: bytes) -> None:
        number = int.from_bytes(text, "little")
        if kind == ucxlane.UNUSED:
            self._release(number)
        elif kind == ucxlane.LOST:
            if number not in self._tasks:
                task = self._tasks[number] = asyncio.ensure_future(self._replace(number))
                task.add_done_callback(lambda _: self._tasks.pop(number, None))
        else:
            for future in self._waits.pop((kind, number), ()):
                if not future.done():
                    future.set_result(None)

    async def _replace(self, index: int) -> None:
        """Close an endpoint that broke, and make another while the peer is there."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self._backend.config.lost_after
        delay = 0.0
        while True:
            await self._take_down(index)
            if not self._info.link.alive:
                return
            if delay:
                await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311 - so that not all come at once
            delay = min(max(2 * delay, _FIRST_DELAY), _LONGEST_DELAY)
            try:
                await self._raise(index)
            except BackendError:
                if loop.time() > until:
                    self.group.give_up()  # nothing waits any longer, until it works again
            else:
                self.group.take_up()
                return

    # -- regions

    def attach(
        self, kind: MemoryKind, segments: tuple[Segment, ...], backings: Sequence[tuple[int, int] | None], export: bytes
    ) -> RemoteRegistration:
        """Take the keys of a region.

        Raises
        ------
        BackendError
            The peer gives none, or they make no sense here.
        """
        if not export:
            raise BackendError("the peer has not registered it with UCX")
        try:
            packed, rest = _unpack(export, most=len(segments), longest=_MAX_KEY)
            places = list(_SEGMENT.iter_unpack(rest[_NUMBER.size :]))
            (number,) = _NUMBER.unpack_from(rest)
            if [nbytes for _, nbytes, _ in places] != [segment.nbytes for segment in segments]:
                raise ValueError("other segments than the region has")
            each = [packed[key] for _, _, key in places]
        except (struct.error, ValueError, IndexError) as error:
            raise BackendError(f"the peer's keys of this region make no sense: {error}") from error
        bases = np.array([address for address, _, _ in places], dtype=np.uint64)
        remote = _Remote(kind, segments, number, bases, Keys(self.group, each, number))
        self._remotes[number] = remote
        self._refresh()
        return remote

    def detach(self, remote: RemoteRegistration) -> None:
        """Forget a region; the peer is told once nothing here touches it any more."""
        assert isinstance(remote, _Remote)
        if remote.keys.revoke():
            self._release(remote.number)

    def _release(self, number: int) -> None:
        remote = self._remotes.pop(number, None)
        if remote is not None:
            self._released.append(remote)
            self._refresh()

    def _refresh(self) -> None:
        """Have keys unpacked that came, and dropped that went, soon."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.ensure_future(self._refreshed())

    async def _refreshed(self) -> None:
        # In a thread: it may have to wait while an endpoint is made. Until then transfers with new keys wait, too.
        while self._released or any(remote.packed for remote in self._remotes.values()):
            await asyncio.to_thread(self._sort_keys)

    def _sort_keys(self) -> None:
        new = [remote for remote in list(self._remotes.values()) if remote.packed]
        old, self._released = self._released, []
        for index in range(self.group.lanes):
            with self._backend.ports[index]:
                for remote in new:
                    if self.group.up(index):
                        _unpack_keys(remote, index)
                for remote in old:
                    remote.keys.drop(index)
        for remote in new:
            remote.packed = False
        for remote in old:
            self.group.release(remote.number)
        self.group.rouse()

    # -- the end

    def lost(self) -> None:
        """End what is in flight: what UCX holds of it comes back as its endpoint is closed."""
        self.group.fail()
        for index in range(self.group.lanes):
            if self.group.holds(index):
                self._on_message(ucxlane.LOST, index.to_bytes(4, "little"))

    def close(self) -> None:
        """Close all endpoints; what UCX still holds of them is waited for by the backend's `aclose`."""
        for task in self._tasks.values():
            task.cancel()
        self._backend.bury(self._bury())

    async def _bury(self) -> None:
        refreshing = [] if self._refreshing is None else [self._refreshing]
        await asyncio.gather(*self._tasks.values(), *self._making.values(), *refreshing, return_exceptions=True)
        for index in range(self.group.lanes):
            await self._take_down(index)
        self._backend.leave(self._number)
        self.group.close()


class _Service(Service):
    """An initiator: its notifications, and what of its reach is up to this side."""

    def __init__(
        self, backend: UcxBackend, page: GatePage, tell: Callable[[int, bytes], None], key: bytes, *, remote: bool
    ) -> None:
        self._backend = backend
        self._number = backend.enter(tell)
        self._keep: dict[int, Registration] = {}
        self.session = UcxSession(backend.ports, backend.mailbox, self._number, page, key, remote=remote)

    def open(self, slot: int, epoch: int, registration: Registration, access: str) -> None:
        """Serve a region from now on."""
        assert isinstance(registration, _Registration)
        sizes = [segment.nbytes for segment in registration.memory.segments]
        self._keep[slot] = registration
        self.session.open(
            slot, epoch, registration.number, registration.bases, sizes, readable="r" in access, writable="w" in access
        )

    def shut(self, slot: int) -> None:
        """Forget a region."""
        self.session.shut(slot)
        self._keep.pop(slot, None)

    def pause(self) -> None:
        """Take no further notification for now."""
        self.session.hold()

    def resume(self) -> None:
        """Take them again."""
        self.session.go_on()

    def close(self) -> None:
        """Forget the initiator."""
        self._backend.leave(self._number)
        self.session.close()
        self._keep.clear()


class UcxBackend(Backend):
    """Moves host and GPU memory over UCX."""

    name: ClassVar[str] = "ucx"
    capabilities: ClassVar[Capabilities] = Capabilities(
        Reach.NETWORK, frozenset((here, there) for here in _MEMORY for there in _MEMORY)
    )
    carries_notes: ClassVar[bool] = True
    joins: ClassVar[bool] = True
    pins: ClassVar[frozenset[MemoryKind]] = frozenset(MemoryKind)

    @classmethod
    def examine(cls, config: Config) -> str:
        """Say which UCX there is and what it would use."""
        return _ucx_library.examine(config)

    @classmethod
    def details(cls, config: Config) -> Iterable[tuple[str, bool, str]]:
        """Say what this UCX could do, whatever is configured."""
        return _ucx_library.findings(config)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        engine.guard()
        library, self._context, self.workers = _ucx_library.take(config)
        ucp.bind(library.path)
        self.mailbox = Mailbox()
        lock = Lock()
        self.ports = [Port(worker.handle, n, lock, self.mailbox, worker) for n, worker in enumerate(self.workers)]
        self._loop: asyncio.AbstractEventLoop | None = None
        self._readers: dict[int, Callable[[int, bytes], None]] = {}
        self._count = 0
        self._registrations = 0
        self._ranges: RangeCache[UcpMemory] = RangeCache(self._map, UcpMemory.close)
        self._burials: set[asyncio.Task[None]] = set()
        _backends.add(self)

    # -- messages of native code

    def enter(self, reader: Callable[[int, bytes], None]) -> int:
        """Give a number to who wants messages."""
        self._start()
        self._count += 1
        self._readers[self._count] = reader
        return self._count

    def leave(self, number: int) -> None:
        """Want none any more."""
        self._readers.pop(number, None)

    def _start(self) -> None:
        """Be driven from now on: there is somebody to talk to."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self.mailbox.fileno(), self._take)
            for port in self.ports:
                port.start(self._loop, thread=self.config.ucx_progress == "thread")

    def _take(self) -> None:
        for owner, kind, text in self.mailbox.take(_BURST):
            reader = self._readers.get(owner)
            if reader is not None:
                reader(kind, text)

    # -- what core asks for

    def address(self) -> bytes:
        """Give the addresses of the workers."""
        return _pack(worker.address.tobytes() for worker in self.workers)

    def register(self, memory: Memory) -> Registration:
        """Register memory with UCX.

        Raises
        ------
        RegistrationError
            UCX cannot use it.
        """
        if memory.kind not in _MEMORY:
            raise RegistrationError(f"moves host and GPU memory, not {memory.kind}")
        if memory.kind is MemoryKind.VRAM and not self._context.cuda_support:
            raise RegistrationError("this UCX has no transport for CUDA memory (`asyncxfer doctor`)")
        self._registrations += 1
        kind = HOST if memory.kind is MemoryKind.DRAM else f"cuda:{memory.device}"
        ranges: list[Range[UcpMemory]] = []
        try:
            ranges.extend(
                self._ranges.acquire(segment.address, max(segment.nbytes, 1), kind) for segment in memory.segments
            )
        except RegistrationError:
            for held in ranges:
                self._ranges.release(held)
            raise
        return _Registration(memory, self._registrations, tuple(ranges))

    def _map(self, address: int, nbytes: int, kind: str) -> UcpMemory:
        return UcpMemory(self._context.handle, address, nbytes, cuda=kind != HOST, keep=self._context)

    def deregister(self, registration: Registration) -> None:
        """Take it back."""
        assert isinstance(registration, _Registration)
        for held in registration.ranges:
            self._ranges.release(held)

    def export(self, registration: Registration) -> bytes:
        """Give the keys of a region, and where its segments lie."""
        assert isinstance(registration, _Registration)
        handles = list(dict.fromkeys(held.handle for held in registration.ranges))
        places = [
            _SEGMENT.pack(segment.address, segment.nbytes, handles.index(held.handle))
            for segment, held in zip(registration.memory.segments, registration.ranges, strict=True)
        ]
        return _pack(handle.key() for handle in handles) + _NUMBER.pack(registration.number) + b"".join(places)

    async def connect(self, peer: PeerInfo) -> Endpoint:
        """Make endpoints to the workers of a peer.

        Raises
        ------
        BackendError
            It has no such backend, or UCX does not reach it.
        """
        if not peer.address:
            raise BackendError(f"{peer.name!r} does not use UCX")
        try:
            addresses, _ = _unpack(peer.address, most=_MAX_WORKERS, longest=_MAX_ADDRESS)
        except (struct.error, ValueError) as error:
            raise BackendError(f"the UCX address of {peer.name!r} makes no sense: {error}") from error
        if not addresses:
            raise BackendError(f"{peer.name!r} has no UCX worker")
        endpoint = _Endpoint(self, peer, addresses)
        try:
            await endpoint.open()
        except* BackendError as errors:
            endpoint.lost()
            endpoint.close()
            raise BackendError(str(errors.exceptions[0])) from errors
        except* BaseException:
            endpoint.lost()
            endpoint.close()
            raise
        return endpoint

    def serve(self, page: GatePage, tell: Callable[[int, bytes], None], key: bytes, *, remote: bool) -> Service | None:
        """Serve an initiator."""
        return _Service(self, page, tell, key, remote=remote)

    def offers(
        self, op: Op, local: Registration, remote: RemoteRegistration | Registration, endpoint: Endpoint | None
    ) -> Sequence[Offer]:
        """Offer to go over UCX."""
        if not isinstance(endpoint, _Endpoint) or not isinstance(remote, _Remote):
            return (Offer(reason="both sides belong to this agent"),)
        if remote.refused:
            return (Offer(reason=remote.refused),)
        if endpoint.direct:
            return (Offer(cost=Cost(setup=5e-6, row=0.5e-6, byte=1 / 10e9)),)
        return (Offer(cost=Cost(setup=80e-6, row=0.2e-6, byte=1 / 0.7e9)),)

    def prepare(self, request: Request) -> UcxWork:
        """Join rows, and decide whether they go one by one or packed."""
        endpoint, remote, local = request.endpoint, request.remote, request.local
        assert isinstance(endpoint, _Endpoint)
        assert isinstance(remote, _Remote)
        assert isinstance(local, _Registration)
        pairs = consolidate(request.pairs)
        on_hosts = remote.kind is MemoryKind.DRAM and local.memory.kind is MemoryKind.DRAM
        packed = not endpoint.direct and on_hosts
        config = self.config
        return UcxWork(
            endpoint.group,
            remote.keys,
            [held.handle for held in local.ranges],
            pairs,
            local.bases,
            np.zeros(len(remote.bases), np.uint64) if packed else remote.bases,
            packed=packed,
            put=request.op == "put",
            link=request.link,
            slot=request.slot,
            epoch=request.epoch,
            chunk_bytes=min(config.chunk_bytes, _PACKED_CHUNK_BYTES) if packed else config.chunk_bytes,
            chunk_rows=min(config.chunk_rows, 1024),
            small_bytes=config.inline_bytes,
            small_rows=config.inline_rows,
            keep=(local, remote, request.keep),
        )

    def submit(self, prepared: UcxWork, completion: Completion, priority: int = 0) -> None:
        """Start a transfer."""
        ucxlane.submit(prepared, completion, priority)

    # -- the end

    def bury(self, burial: Any) -> None:
        """See an endpoint to its end."""
        task = asyncio.ensure_future(burial)
        self._burials.add(task)
        task.add_done_callback(self._burials.discard)

    async def aclose(self) -> None:
        """Close everything."""
        while self._burials:
            await asyncio.wait(self._burials)
        if self._loop is not None:
            self._loop.remove_reader(self.mailbox.fileno())
        for port in self.ports:
            port.close()
        _backends.discard(self)
        await asyncio.to_thread(self._destroy)
        self.mailbox.close()

    def _destroy(self) -> None:
        """In a thread: UCX takes its time to let go of a device."""
        while self.workers:
            self.workers.pop()
        for port in self.ports:
            port.free()
        self._context = None


_backends: weakref.WeakSet[UcxBackend] = weakref.WeakSet()


def _after_fork() -> None:
    """In a child: the workers are the parent's, whose connections would be spoiled by destroying them."""
    for backend in _backends:
        for port in backend.ports:
            port.forget()
        keep_forever(backend)
    _backends.clear()


os.register_at_fork(after_in_child=_after_fork)
