"""The contract suite, over the backends that ship and over one that knows nothing but asyncxfer.abc."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any, ClassVar

import pytest
from file_backend import FileBackend
from thread_backend import ThreadBackend

from asyncxfer import PreSharedKey
from asyncxfer.abc import Backend
from asyncxfer.testing import BackendContract, FileContract, PeerProcess, Target

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


needs_ucx = pytest.mark.skipif(
    importlib.util.find_spec("ucxx") is None, reason="ucxx is not installed: pip install 'asyncxfer[ucx-cu12]'"
)
in_matrix = pytest.mark.skipif("UCX_MATRIX" not in os.environ, reason="one of the combinations of `make test-ucx`")


class OverUcx(BetweenProcesses):
    """UCX, between agents of one host, who share a page of gates."""

    route = "ucx"
    ucx: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.process_options = {"config": cls.ucx}
        cls.options = {"config": cls.ucx}


@needs_ucx
class TestUcxCma(OverUcx):
    """Data by cross-memory attach, driven by the loop."""

    ucx: ClassVar[dict[str, Any]] = {"ucx_transports": "tcp,cma,posix"}


@needs_ucx
@in_matrix
class TestUcxCmaThreads(OverUcx):
    """The same with two workers, each driven by a thread."""

    ucx: ClassVar[dict[str, Any]] = {"ucx_transports": "tcp,cma,posix", "ucx_progress": "thread", "ucx_workers": 2}


@needs_ucx
@in_matrix
class TestUcxTcp(OverUcx):
    """UCX's tcp, where rows go packed."""

    ucx: ClassVar[dict[str, Any]] = {"ucx_transports": "tcp"}


@needs_ucx
@in_matrix
class TestUcxSysv(OverUcx):
    """With sysv, which carries nothing in the error mode that notices the end of a peer, and two workers."""

    ucx: ClassVar[dict[str, Any]] = {"ucx_transports": "tcp,sysv", "ucx_workers": 2}


@needs_ucx
@in_matrix
class TestUcxSysvThread(OverUcx):
    """The same, driven by a thread."""

    ucx: ClassVar[dict[str, Any]] = {"ucx_transports": "tcp,sysv", "ucx_progress": "thread"}


class BetweenHosts(OverUcx):
    """UCX, with agents that know each other over TCP, so that they share no gates."""

    skips: ClassVar[dict[str, str]] = {"count": "nobody at the target sees what is put by RDMA"}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        config = {**cls.ucx, "unix_socket": False}
        cls.process_options = {"listen": "tcp://127.0.0.1:0", "config": config}
        cls.options = {"config": config}


@needs_ucx
@in_matrix
class TestUcxBetweenHosts(BetweenHosts):
    """Data by cross-memory attach, which stands in for RDMA: nobody at the target sees it."""

    ucx: ClassVar[dict[str, Any]] = {"ucx_transports": "tcp,cma", "ucx_workers": 2}


@needs_ucx
class TestUcxBetweenHostsThreads(BetweenHosts):
    """Rows that go packed, and two workers, each driven by a thread."""

    ucx: ClassVar[dict[str, Any]] = {"ucx_transports": "tcp", "ucx_progress": "thread", "ucx_workers": 2}


class TestThirdParty(BackendContract):
    """A backend in pure Python that imports only asyncxfer.abc."""

    route = "thread"

    def backends(self) -> Iterable[type[Backend]]:
        return [ThreadBackend]


class TestThirdPartyFiles(FileContract):
    """The same for files: past the page cache what is aligned, and through it the rest."""

    route = "pieces"
    shared = True
    direct = True
    durability = "data"

    def backends(self) -> Iterable[type[Backend]]:
        return [FileBackend]
