"""A third party's backend, to show that asyncxfer.abc is enough: a thread that copies within the process."""

from __future__ import annotations

import asyncio
import ctypes
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from asyncxfer.abc import (
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
)

PIECE = 1 << 20
ADDRESS = b"copies by a thread"


@dataclass(frozen=True)
class Job:
    """A request as addresses; made once, done many times."""

    request: Request
    moves: list[tuple[int, int, int]]  # to, from, bytes


class ThreadEndpoint(Endpoint):
    """Checks that what the peer's backend exported has arrived."""

    def attach(
        self, kind: MemoryKind, segments: tuple[Segment, ...], backings: Sequence[tuple[int, int] | None], export: bytes
    ) -> RemoteRegistration:
        if export != b"%d segments" % len(segments):
            raise BackendError(f"the peer's backend exported {export!r} for {len(segments)} segments")
        return super().attach(kind, segments, backings, export)


class ThreadBackend(Backend):
    """Copies within the process, one transfer after the other, in a thread of its own."""

    name: ClassVar[str] = "thread"
    capabilities: ClassVar[Capabilities] = Capabilities(Reach.PROCESS, frozenset({(MemoryKind.DRAM, MemoryKind.DRAM)}))

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._jobs: queue.SimpleQueue[tuple[Job, Completion] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="copies", daemon=True)
        self._thread.start()

    def register(self, memory: Memory) -> Registration:
        if memory.kind is not MemoryKind.DRAM:
            raise RegistrationError("host memory only")
        return Registration(memory)

    def deregister(self, registration: Registration) -> None:
        pass

    async def connect(self, peer: PeerInfo) -> Endpoint:
        if peer.reach is not Reach.PROCESS:
            raise BackendError("another process")
        if peer.address != ADDRESS:
            raise BackendError(f"the peer's backend said {peer.address!r}, expected {ADDRESS!r}")
        return ThreadEndpoint()

    def address(self) -> bytes:
        return ADDRESS

    def export(self, registration: Registration) -> bytes:
        return b"%d segments" % len(registration.memory.segments)

    def offers(
        self, op: Op, local: Registration, remote: RemoteRegistration | Registration, endpoint: Endpoint | None
    ) -> Sequence[Offer]:
        return (Offer(cost=Cost(setup=50e-6, row=1e-6, byte=1e-10)),)

    def prepare(self, request: Request) -> Job:
        return Job(request, list(moves(request)))

    def submit(self, prepared: Job, completion: Completion, priority: int = 0) -> None:
        completion.post()
        self._jobs.put((prepared, completion))

    async def aclose(self) -> None:
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, completion = item
            try:
                self._carry_out(job, completion)
            except Exception as error:
                completion.fail(error)
            else:
                completion.succeed()
            del item, job, completion  # or the last one would be kept until the next comes

    def _carry_out(self, job: Job, completion: Completion) -> None:
        request = job.request
        for to, source, nbytes in job.moves:
            if completion.stopping:
                return
            if request.link is not None and not request.link.enter(request.slot, request.epoch):
                raise BackendError("the peer has taken the region back")
            ctypes.memmove(to, source, nbytes)
            if request.link is not None:
                request.link.leave(request.slot)
            completion.advance(nbytes)


def moves(request: Request) -> Iterator[tuple[int, int, int]]:
    """Take a request apart into copies of at most a piece each."""
    remote = request.remote
    segments = remote.memory.segments if isinstance(remote, Registration) else remote.segments
    for pair in request.pairs.tolist():
        local, there, length, local_stride, remote_stride, count, local_segment, remote_segment, _ = pair
        local += request.local.memory.segments[local_segment].address
        there += segments[remote_segment].address
        for row in range(count):
            here, far = local + row * local_stride, there + row * remote_stride
            to, source = (far, here) if request.op == "put" else (here, far)
            for begin in range(0, length, PIECE):
                yield to + begin, source + begin, min(PIECE, length - begin)
