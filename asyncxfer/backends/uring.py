"""Backend ``uring``: between host memory and files of this agent.

How bytes get in and out is native code's business (see `_fast.fileio`); which memory and which file, is told it here.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar

from .._fast import fileio, uring
from .._fast.filework import FileWork, OpenFile
from ..abc import (
    Backend,
    BackendError,
    Capabilities,
    Completion,
    Cost,
    Endpoint,
    File,
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
)

if TYPE_CHECKING:
    from .._config import Config

__all__ = ["UringBackend"]

_BLOCKERS = 8  # threads that wait for a device, where there is no ring


class _FileRegistration(Registration):
    """A file, with what native code knows of it."""

    __slots__ = ("file",)

    def __init__(self, memory: Memory) -> None:
        super().__init__(memory)
        owner = memory.owner
        assert isinstance(owner, File)
        self.file = OpenFile(
            owner,
            owner.fd,
            owner.direct_fd,
            alignment=owner.alignment,
            memory_alignment=owner.memory_alignment,
            durability=owner.durability,
        )


class UringBackend(Backend):
    """Moves host memory to and from files."""

    name: ClassVar[str] = "uring"
    capabilities: ClassVar[Capabilities] = Capabilities(
        Reach.PROCESS,
        frozenset({(MemoryKind.DRAM, MemoryKind.FILE), (MemoryKind.FILE, MemoryKind.DRAM)}),
    )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._refusal = _refusal()
        fileio.acquire(_default_threads(), _BLOCKERS)

    @classmethod
    def examine(cls, config: Config) -> str:
        """Say by what it moves bytes here; it always can."""
        return "by io_uring and threads" if _refusal() is None else "by threads that block"

    @classmethod
    def details(cls, config: Config) -> Iterable[tuple[str, bool, str]]:
        """Say whether there is io_uring, or why not."""
        refusal = _refusal()
        return (("io_uring", refusal is None, refusal or "what has to wait for a device goes through one ring"),)

    def register(self, memory: Memory) -> Registration:
        """Take host memory and files as they are.

        Raises
        ------
        RegistrationError
            It is neither.
        """
        if memory.kind is MemoryKind.FILE:
            return _FileRegistration(memory)
        if memory.kind is not MemoryKind.DRAM:
            raise RegistrationError(f"moves host memory to and from files, not {memory.kind}")
        return Registration(memory)

    def deregister(self, registration: Registration) -> None:
        """Let go of a file; prepared transfers may still keep what stands for it."""
        if isinstance(registration, _FileRegistration):
            registration.file.close_view()

    async def connect(self, peer: PeerInfo) -> Endpoint:
        """Refuse: files are this agent's own.

        Raises
        ------
        BackendError
            Always.
        """
        raise BackendError("moves between memory and files of one agent; there is no way to a peer")

    def offers(
        self, op: Op, local: Registration, remote: RemoteRegistration | Registration, endpoint: Endpoint | None
    ) -> Sequence[Offer]:
        """Offer the ring, and threads."""
        if not isinstance(remote, Registration):
            return (Offer(reason="moves between memory and files of one agent"),)
        ring = Offer("ring", Cost(setup=10e-6, row=50e-9, byte=1 / 4e9))
        if self._refusal is not None:
            ring = Offer("ring", reason=self._refusal)
        return (ring, Offer("threads", Cost(setup=40e-6, row=0.3e-6, byte=1 / 2e9)))

    def prepare(self, request: Request) -> FileWork:
        """Merge rows that follow one another in the file."""
        local, remote, config = request.local, request.remote, self.config
        assert isinstance(remote, Registration)
        file, memory = (local, remote) if isinstance(local, _FileRegistration) else (remote, local)
        assert isinstance(file, _FileRegistration)
        return FileWork(
            request.pairs,
            memory.bases,
            file.file,
            local=file is local,
            write=(request.op == "put") is (file is remote),
            request_bytes=config.chunk_bytes,
            request_rows=config.chunk_rows,
            inline_bytes=config.inline_bytes,
            inline_rows=config.inline_rows,
            ring=request.via == "ring",
            keep=(local, remote, request.keep),
        )

    def submit(self, prepared: FileWork, completion: Completion, priority: int = 0) -> None:
        """Start a transfer; what is small and in the page cache is done when this returns."""
        fileio.submit(prepared, completion, priority)

    async def aclose(self) -> None:
        """End the threads, if no other agent uses them."""
        fileio.release()


@functools.cache
def _refusal() -> str | None:
    """Why there can be no ring in this process; asked once, in a thread, since it may take a while."""
    return uring.refusal()


def _default_threads() -> int:
    """As many as copy well at a time, and no core that an event loop would then wait for."""
    cores = len(os.sched_getaffinity(0))
    return max(min(2, cores), min(4, cores // 2))
