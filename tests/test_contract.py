"""The contract suite, over the backends that ship and over one that knows nothing but asyncxfer.abc."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable

from thread_backend import ThreadBackend

from asyncxfer.abc import Backend
from asyncxfer.testing import BackendContract, PeerProcess, Target


class TestLocal(BackendContract):
    """Two agents of one process."""

    route = "local"


class TestShmMapped(BackendContract):
    """Two processes, the peer's memory mapped."""

    route = "shm:mapped"
    shared = True

    @contextlib.asynccontextmanager
    async def target(self) -> AsyncIterator[Target]:
        async with PeerProcess() as process:
            yield process


class TestShmAttach(BackendContract):
    """Two processes, ordinary memory."""

    route = "shm:attach"

    @contextlib.asynccontextmanager
    async def target(self) -> AsyncIterator[Target]:
        async with PeerProcess() as process:
            yield process


class TestThirdParty(BackendContract):
    """A backend in pure Python that imports only asyncxfer.abc."""

    route = "thread"

    def backends(self) -> Iterable[type[Backend]]:
        return [ThreadBackend]
