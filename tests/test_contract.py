"""The contract suite, over the backends that ship and over one that knows nothing but asyncxfer.abc."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
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


@pytest.mark.skipif(importlib.util.find_spec("ucxx") is None, reason="ucxx is not installed: asyncxfer[ucx-cu12]")
class TestUcxCma(BetweenProcesses):
    """UCX, puts and gets by cross-memory attach."""

    route = "ucx"
    config: ClassVar[dict[str, Any]] = {"ucx_transports": "tcp,cma,posix"}
    process_options: ClassVar[dict[str, Any]] = {"config": config}
    options: ClassVar[dict[str, Any]] = {"config": config}


class TestUcxTcp(TestUcxCma):
    """UCX over its own tcp, which emulates puts and gets."""

    config: ClassVar[dict[str, Any]] = {"ucx_transports": "tcp"}
    process_options: ClassVar[dict[str, Any]] = {"config": config}
    options: ClassVar[dict[str, Any]] = {"config": config}


class TestUcxSysvThreads(TestUcxCma):
    """UCX with two workers, each driven by a thread."""

    config: ClassVar[dict[str, Any]] = {"ucx_transports": "tcp,sysv", "ucx_progress": "thread", "ucx_workers": 2}
    process_options: ClassVar[dict[str, Any]] = {"config": config}
    options: ClassVar[dict[str, Any]] = {"config": config}


class TestUcxBetweenHosts(TestUcxCma):
    """UCX, with agents that know each other over TCP, so that no gate is shared."""

    skips: ClassVar[dict[str, str]] = {"count": "nobody at the target sees what is put by RDMA"}

    config: ClassVar[dict[str, Any]] = {"ucx_transports": "tcp,cma", "unix_socket": False, "ucx_workers": 2}
    process_options: ClassVar[dict[str, Any]] = {"listen": "tcp://127.0.0.1:0", "config": config}
    options: ClassVar[dict[str, Any]] = {"config": config}


class TestThirdParty(BackendContract):
    """A backend in pure Python that imports only asyncxfer.abc."""

    route = "thread"

    def backends(self) -> Iterable[type[Backend]]:
        return [ThreadBackend]
