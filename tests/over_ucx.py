"""What tests over UCX share: the transports that stand in for RDMA on any machine, and agents that use nothing else.

ucxx is not imported here, nor by a test's own process before an agent of it starts; without ucxx the tests are skipped.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest
from peers import Bytes, Process, Server, make_region, pattern
from stage import Cast

from asyncxfer import Agent, DescriptorList, Peer, Region, RemoteRegion, Transfer

__all__ = [
    "BACKENDS",
    "NBYTES",
    "TRANSPORTS",
    "Far",
    "config",
    "every_transport",
    "far_fixture",
    "needs_ucx",
    "stage_of",
]

#: Bytes by messages that the target's software takes in; by system calls of the initiator; by shared memory.
TRANSPORTS = ("tcp", "tcp,cma,posix", "tcp,sysv")
BACKENDS = ["local", "ucx"]
NBYTES = 16 << 20

needs_ucx = pytest.mark.skipif(importlib.util.find_spec("ucxx") is None, reason="ucxx is not installed")
every_transport = pytest.mark.parametrize("transports", TRANSPORTS)


def config(transports: str, **more: Any) -> dict[str, Any]:
    """A configuration with these transports of UCX, on this host."""
    return {"ucx_transports": transports, **more}


class Far:
    """An agent "here" with the region "near", and "there" with "far" in another process that may be replaced."""

    def __init__(self, cast: Cast, configuration: dict[str, Any]) -> None:
        self.cast = cast
        self.config = configuration
        self.other: Process
        self.peer: Peer
        self.remote: RemoteRegion
        self.region: Region
        self.array: Bytes

    async def begin(self) -> None:
        """Make the region here, and bring up the other agent."""
        self.region, self.array = await make_region(self.cast.here, "near", "ordinary", (NBYTES,))
        self.array[:] = pattern(1, (NBYTES,))
        await self.start()

    async def start(self) -> None:
        """Bring up the other agent, and reach it."""
        self.other = self.cast.spawn()
        metadata = await self.other.call("start", "there", self.config, backends=BACKENDS)
        await self.other.call("region", "far", "ordinary", (NBYTES,), seed=2)
        self.peer = await self.cast.here.connect(metadata)
        self.remote = await self.peer.region("far", timeout=5)

    async def restart(self) -> None:
        """Put an agent of the same name in the place of one that was killed."""
        await self.cast.part(self.other)
        await self.start()

    def post(self, op: str, offsets: Any = (0,), length: int = NBYTES, **options: Any) -> Transfer:
        """Move the pieces of this length that lie at these offsets, to where they lie there."""
        offsets = np.asarray(offsets, np.uint64)
        lengths = np.full(len(offsets), length, np.uint64)
        here: DescriptorList = self.region.descriptors(offsets, lengths)
        call = self.cast.here.put if op == "put" else self.cast.here.get
        return call(here, self.remote.descriptors(offsets, lengths), **options)


async def stage_of(server: Server, configuration: dict[str, Any]) -> Far:
    """Set up both sides."""
    here = await Agent("here", backends=BACKENDS, config=configuration).start()
    made = Far(Cast(server, here), configuration)
    await made.begin()
    return made


@pytest.fixture(name="far")
async def far_fixture(ucx_server: Server, request: pytest.FixtureRequest) -> AsyncIterator[Far]:
    """Both sides, with a configuration from the test's parameters `transports` and those of `_KEYS`."""
    given = getattr(request.node, "callspec", None)
    params = {} if given is None else given.params
    more = {key: params[name] for name, key in _KEYS.items() if name in params}
    far = await stage_of(ucx_server, config(params.get("transports", "tcp"), **more))
    yield far
    await far.cast.leave()
    vars(far).clear()


_KEYS = {"progress": "ucx_progress", "workers": "ucx_workers", "backlog": "backlog_bytes", "lost": "lost_after"}


@pytest.fixture(name="ucx_server", scope="module")
def ucx_server_fixture() -> Iterator[Server]:
    """A server of processes that have UCX loaded; it is loaded here too."""
    asyncio.run(_use_once())
    server = Server("ucx_loaded")
    yield server
    server.close()


async def _use_once() -> None:
    """What UCX keeps for the life of a process is no leak of a test."""
    async with Agent("warm", backends=BACKENDS, config=config("tcp,cma,posix")):
        pass
