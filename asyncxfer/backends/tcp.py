"""Backend ``tcp``: between any two hosts, over a few TCP connections for each peer.

The connections are made by core, which has both sides prove who they are; the bytes are moved by threads without the
GIL, at the target too, straight from and to the rows (see `_fast.initiator` and `_fast.target`). What is left for
Python is here: to make connections again when they are lost, and to hand on the notifications that came with data.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from .._errors import PeerLostError, TransferTimeout
from .._fast import engine, initiator, poller
from .._fast.initiator import Group, NetWork
from .._fast.poller import Mailbox
from .._fast.target import Session
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
    Service,
    Stream,
)

if TYPE_CHECKING:
    from .._config import Config
    from .._fast.link import GatePage

__all__ = ["TcpBackend"]

_MAX_ROWS = 1024  # of a request, as the wire has it
_MAX_CHUNK = 16 << 20
_MAX_STREAMS = 16  # to one peer, as `Config.tcp_streams` has it
_BURST = 32  # messages a turn of the loop
_FIRST_DELAY, _LONGEST_DELAY = 0.01, 1.0  # seconds between attempts to replace a connection


class _Endpoint(Endpoint):
    """A peer, and the connections to it; one that is lost is made again while the peer is there."""

    def __init__(self, backend: TcpBackend, info: PeerInfo, dial: Callable[[int], Awaitable[Stream]]) -> None:
        self._backend = backend
        self._info = info
        self._dial = dial
        self._number = backend.enter(self._on_message)
        self._tasks: set[asyncio.Task[None]] = set()
        self._answers: dict[int, int] = {}  # when a connection was made
        self._delays: dict[int, float] = {}
        self.streams = backend.streams
        self.group = Group(backend.mailbox, self._number, info.link, self.streams)

    async def open(self) -> None:
        """Make all connections."""
        async with asyncio.TaskGroup() as tasks:
            for index in range(self.streams):
                tasks.create_task(self._attach(index))

    async def _attach(self, index: int) -> None:
        stream = await self._dial(index)
        try:
            self.group.attach(index, stream.fd, stream.tls)
        except BaseException:
            os.close(stream.fd)
            raise
        self._answers[index] = self.group.answers(index)

    def _on_message(self, kind: int, text: bytes) -> None:
        if kind == initiator.LOST and self._info.link.alive:
            task = asyncio.ensure_future(self._replace(int.from_bytes(text, "little")))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _replace(self, index: int) -> None:
        # At once, unless nothing was answered over it: who takes connections to drop them is asked rarely.
        served = self.group.answers(index) > self._answers[index]
        delay = 0.0 if served else self._delays.get(index, 0.0)
        while self._info.link.alive:
            if delay:
                await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311 - so that not all come at once
            delay = min(max(2 * delay, _FIRST_DELAY), _LONGEST_DELAY)
            self._delays[index] = delay
            try:
                await self._attach(index)
            except (PeerLostError, BackendError, TransferTimeout):
                continue
            else:
                return

    def lost(self) -> None:
        """End what is in flight."""
        self.group.fail()

    def close(self) -> None:
        """End the connections."""
        for task in self._tasks:
            task.cancel()
        self._backend.leave(self._number)
        self.group.close()


class _Service(Service):
    """An initiator, served by native threads."""

    def __init__(self, backend: TcpBackend, page: GatePage, tell: Callable[[int, bytes], None]) -> None:
        self._backend = backend
        self._number = backend.enter(tell)
        self._keep: dict[int, Registration] = {}
        self.session = Session(backend.mailbox, self._number, page)
        backend.sessions.add(self.session)

    def open(self, slot: int, epoch: int, registration: Registration, access: str) -> None:
        """Serve a region from now on."""
        sizes = [segment.nbytes for segment in registration.memory.segments]
        self._keep[slot] = registration
        self.session.open(slot, epoch, registration.bases, sizes, readable="r" in access, writable="w" in access)

    def shut(self, slot: int) -> None:
        """Forget a region."""
        self.session.shut(slot)
        self._keep.pop(slot, None)

    def adopt(self, stream: Stream) -> None:
        """Serve a connection.

        Raises
        ------
        BackendError
            There are no more than 16, and this is another.
        """
        if stream.index >= _MAX_STREAMS:
            raise BackendError(f"connection {stream.index}; an initiator makes {_MAX_STREAMS} at most")
        self.session.adopt(stream.index, stream.fd, stream.tls)

    def pause(self) -> None:
        """Read no further request for now."""
        self.session.hold()

    def resume(self) -> None:
        """Read again."""
        self.session.go_on()

    def close(self) -> None:
        """End the connections."""
        self._backend.leave(self._number)
        self._backend.sessions.discard(self.session)
        self.session.close()
        self._keep.clear()


class TcpBackend(Backend):
    """Moves host memory to and from other hosts."""

    name: ClassVar[str] = "tcp"
    capabilities: ClassVar[Capabilities] = Capabilities(Reach.NETWORK, frozenset({(MemoryKind.DRAM, MemoryKind.DRAM)}))
    carries_notes: ClassVar[bool] = True
    checksums: ClassVar[bool] = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        engine.guard()
        poller.acquire(config.network_threads or _default_threads())
        self.streams = config.tcp_streams or _default_streams()
        self.sessions: set[Session] = set()
        self._mailbox: Mailbox | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._readers: dict[int, Callable[[int, bytes], None]] = {}
        self._numbers = 0
        self._waiting: deque[tuple[int, int, bytes]] = deque()

    # -- messages of the threads

    @property
    def mailbox(self) -> Mailbox:
        """Where the threads leave messages; made, and watched by the running loop, on first need."""
        if self._mailbox is None:
            self._mailbox = Mailbox()
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._mailbox.fileno(), self._take)
        return self._mailbox

    def enter(self, reader: Callable[[int, bytes], None]) -> int:
        """Give a number to who wants messages."""
        self._numbers += 1
        self._readers[self._numbers] = reader
        return self._numbers

    def leave(self, number: int) -> None:
        """Want none any more."""
        self._readers.pop(number, None)

    def _take(self) -> None:
        self._waiting.extend(self.mailbox.take(_BURST))
        for session in self.sessions:
            if session.waits:
                session.read_on()
        while self._waiting:
            owner, kind, text = self._waiting.popleft()
            reader = self._readers.get(owner)
            if reader is not None:
                reader(kind, text)

    # -- what core asks for

    def register(self, memory: Memory) -> Registration:
        """Take host memory as it is.

        Raises
        ------
        RegistrationError
            It is not host memory.
        """
        if memory.kind is not MemoryKind.DRAM:
            raise RegistrationError(f"moves host memory only, not {memory.kind}")
        return Registration(memory)

    def deregister(self, registration: Registration) -> None:
        """There is nothing to undo."""

    async def connect(self, peer: PeerInfo) -> Endpoint:
        """Make the connections to a peer.

        Raises
        ------
        BackendError
            It does not listen on TCP, or refuses.
        """
        if peer.dial is None:
            raise BackendError(f"{peer.name!r} has no TCP address (Agent(listen='tcp://...'))")
        endpoint = _Endpoint(self, peer, peer.dial)
        try:
            await endpoint.open()
        except* (PeerLostError, TransferTimeout, BackendError) as errors:
            endpoint.close()
            raise BackendError(f"no data connection to {peer.name!r}: {errors.exceptions[0]}") from errors
        except* BaseException:
            endpoint.close()
            raise
        return endpoint

    def serve(
        self, page: GatePage, tell: Callable[[int, bytes], None], key: bytes, *, remote: bool
    ) -> Service | None:  # fmt: skip
        """Serve an initiator."""
        return _Service(self, page, tell)

    def offers(
        self, op: Op, local: Registration, remote: RemoteRegistration | Registration, endpoint: Endpoint | None
    ) -> Sequence[Offer]:
        """Offer to go over the network."""
        if endpoint is None:
            return (Offer(reason="both sides belong to this agent"),)
        return (Offer(cost=Cost(setup=40e-6, row=60e-9, byte=1 / 2.5e9)),)

    def prepare(self, request: Request) -> NetWork:
        """Cut into requests of at most 1,024 rows."""
        endpoint, remote, config = request.endpoint, request.remote, self.config
        assert isinstance(endpoint, _Endpoint)
        assert isinstance(remote, RemoteRegistration)
        return NetWork(
            endpoint.group,
            request.pairs,
            request.local.bases,
            np.zeros(len(remote.segments), np.uint64),  # the peer's own business
            checked=request.checksum,
            put=request.op == "put",
            link=request.link,
            slot=request.slot,
            epoch=request.epoch,
            chunk_bytes=min(config.chunk_bytes, _MAX_CHUNK),
            chunk_rows=min(config.chunk_rows, _MAX_ROWS),
            keep=(request.local, remote, request.keep),
        )

    def submit(self, prepared: NetWork, completion: Completion, priority: int = 0) -> None:
        """Start a transfer."""
        initiator.submit(prepared, completion, priority)

    async def aclose(self) -> None:
        """End the threads, if no other agent uses them."""
        if self._mailbox is not None:
            assert self._loop is not None
            self._loop.remove_reader(self._mailbox.fileno())
            self._mailbox.close()
        self._waiting.clear()
        poller.release()


# One thread fills some 30 Gbit/s, and as many connections as threads keep them busy; see docs/performance.md.
def _default_threads() -> int:
    return max(1, min(4, len(os.sched_getaffinity(0)) // 2))


def _default_streams() -> int:
    return max(2, min(4, _default_threads()))
