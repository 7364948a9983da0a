"""The contract suite, over the backends that ship and over one that knows nothing but asyncxfer.abc."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any, ClassVar

import pytest
from thread_backend import ThreadBackend

from asyncxfer import PreSharedKey
from asyncxfer.abc import Backend
from asyncxfer.testing import BackendContract, PeerProcess, Target

SECRET = "a secret that only the tests know"


class TestLocal(BackendContract):
    """Two agents of one process."""

    route = "local"


class BetweenProcesses(BackendContract):
    """One second process for all tests, and in it a new agent for each."""

    process: PeerProcess
    process_options: ClassVar[dict[str, Any]] = {}

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _second_process(cls) -> Iterator[None]:
        with asyncio.Runner() as runner:
            cls.process = runner.run(PeerProcess(**cls.process_options).__aenter__())
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


class TestTcp(BetweenProcesses):
    """Over loopback, as between hosts."""

    route = "tcp"
    process_options: ClassVar[dict[str, Any]] = {"listen": "tcp://127.0.0.1:0", "config": {"unix_socket": False}}
    options: ClassVar[dict[str, Any]] = {"config": {"unix_socket": False}}


class TestTcpChecked(TestTcp):
    """With checksums."""

    checksum = True


class TestTcpEncrypted(TestTcp):
    """Control and data under TLS."""

    process_options: ClassVar[dict[str, Any]] = {**TestTcp.process_options, "secret": SECRET}
    options: ClassVar[dict[str, Any]] = {**TestTcp.options, "credentials": PreSharedKey(SECRET)}


class TestThirdParty(BackendContract):
    """A backend in pure Python that imports only asyncxfer.abc."""

    route = "thread"

    def backends(self) -> Iterable[type[Backend]]:
        return [ThreadBackend]
