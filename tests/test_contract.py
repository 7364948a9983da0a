"""The contract suite, over the backends that ship and over one that knows nothing but asyncxfer.abc."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator

import pytest
from thread_backend import ThreadBackend

from asyncxfer.abc import Backend
from asyncxfer.testing import BackendContract, PeerProcess, Target


class TestLocal(BackendContract):
    """Two agents of one process."""

    route = "local"


class BetweenProcesses(BackendContract):
    """One second process for all tests, and in it a new agent for each."""

    process: PeerProcess

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _second_process(cls) -> Iterator[None]:
        with asyncio.Runner() as runner:
            cls.process = runner.run(PeerProcess().__aenter__())
            yield
            runner.run(cls.process.__aexit__(None, None, None))

    @contextlib.asynccontextmanager
    async def target(self) -> AsyncIterator[Target]:
        await self.process.renew()
        yield self.process


class TestShmMapped(BetweenProcesses):
    """The peer's memory mapped."""

    route = "shm:mapped"
    shared = True


class TestShmAttach(BetweenProcesses):
    """Ordinary memory."""

    route = "shm:attach"


class TestThirdParty(BackendContract):
    """A backend in pure Python that imports only asyncxfer.abc."""

    route = "thread"

    def backends(self) -> Iterable[type[Backend]]:
        return [ThreadBackend]
