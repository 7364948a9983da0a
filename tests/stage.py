"""The stage for tests between two processes: this one's agent "here" with a region "near", another's with "far".

`conftest.py` makes its two fixtures, `server` and `cast`, known to all tests.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal

import numpy as np
import pytest
import uvloop
from hosts import Host
from peers import Bytes, Kind, Process, Server, make_region, pattern

from asyncxfer import Agent, Peer, PeerState, Region, Transfer

__all__ = [
    "LONG", "ROWS", "SHAPE", "Cast", "Op", "Pair", "begin", "both_kinds", "both_ops", "cast_fixture", "from_far",
    "server_fixture", "to_far", "until_lost", "within",
]  # fmt: skip

Op = Literal["put", "get"]

SHAPE = (16, 1 << 18)
ROWS = list(range(16))
# Everything ends within two seconds; the rest is for a machine that is busy with something else.
LIMIT = 8.0
LONG = ROWS * 512  # 2 GiB through 4 MiB of memory: long enough to act in the middle of it

both_ops = pytest.mark.parametrize("op", ["put", "get"])
both_kinds = pytest.mark.parametrize("kind", ["mapped", "ordinary"])


def within() -> asyncio.Timeout:
    return asyncio.timeout(LIMIT)


@pytest.fixture(name="server", scope="module")
def server_fixture() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


class Cast:
    """Who plays in a test: an agent of this process, and other processes.

    Attributes
    ----------
    here : Agent
    """

    def __init__(self, server: Server, here: Agent) -> None:
        self.here = here
        self._server = server
        self._spawned: list[Process] = []

    def spawn(self, host: Host | None = None) -> Process:
        """Start another process, on the same kind of loop, on this host or on another."""
        name = "uvloop" if isinstance(asyncio.get_running_loop(), uvloop.Loop) else "asyncio"
        self._spawned.append(Process(self._server, name, host))
        return self._spawned[-1]

    async def part(self, process: Process) -> None:
        """Let go of a process, dead or alive, before the end."""
        self._spawned.remove(process)
        await process.release()

    async def leave(self) -> None:
        """Close agents everywhere; processes that still live must leave nothing behind."""
        spawned, self._spawned = self._spawned, []
        try:
            async with within():
                await self.here.aclose()
            assert [await process.end() for process in spawned] == [[] for _ in spawned]
        finally:
            for process in spawned:
                await process.release()
            del self.here  # pytest holds on to this object for longer than the leak check waits


@pytest.fixture(name="cast")
async def cast_fixture(server: Server) -> AsyncIterator[Cast]:
    cast = Cast(server, await Agent("here").start())
    yield cast
    await cast.leave()


class Pair:
    """This process's agent and region, another's, and the connection from here to there."""

    def __init__(self, agent: Agent, other: Process, peer: Peer, region: Region, array: Bytes) -> None:
        self.agent = agent
        self.other = other
        self.peer = peer
        self.region = region
        self.array = array

    def post(self, op: Op, rows: list[int] = LONG, **options: Any) -> Transfer:
        """Move rows of "near" to or from the same rows of "far"."""
        call = self.agent.put if op == "put" else self.agent.get
        return call(self.region[rows], self.peer["far"][rows], **options)

    def far(self) -> Bytes:
        """The peer's mapped memory, as this process sees it, also when the peer has died."""
        (mapping,) = self.peer["far"].attachments["shm"].mappings  # type: ignore[attr-defined]
        return np.frombuffer(mapping.buffer, np.uint8).reshape(SHAPE)

    async def expect(self, op: Op) -> None:
        """The bytes are where a successful transfer brings them."""
        if op == "get":
            assert (self.array == pattern(2, SHAPE)).all()
        else:
            assert await self.other.call("matches", "far", 1)


async def to_far(cast: Cast, kind: Kind, *, path: str | None = None, config: dict[str, Any] | None = None) -> Pair:
    """Bring up another process with a region "far" of some kind, and connect to it."""
    agent, other = cast.here, cast.spawn()
    metadata = await other.call("start", "there", config)
    await other.call("region", "far", kind, SHAPE, seed=2, path=path)
    peer = await agent.connect(metadata)
    array = pattern(1, SHAPE)
    return Pair(agent, other, peer, await agent.register(array, name="near"), array)


async def from_far(cast: Cast, kind: Kind, *, config: dict[str, Any] | None = None) -> tuple[Process, Region, Bytes]:
    """Make a region "near" of some kind here, and bring up another process that is connected to it."""
    region, array = await make_region(cast.here, "near", kind, SHAPE)
    array[:] = pattern(1, SHAPE)
    other = cast.spawn()
    await other.call("start", "there", config)
    await other.call("region", "far", "ordinary", SHAPE, seed=2)
    await other.call("connect", cast.here.metadata())
    return other, region, array


async def begin(other: Process, op: Op, rows: list[int] = LONG, *, key: str = "t", **options: Any) -> None:
    """Have the other process post a transfer between its "far" and our "near"."""
    await other.call("begin", key, op, "far", rows, "near", rows, peer="here", **options)


async def until_lost(pair: Pair) -> None:
    """Wait until the agent knows that its peer is gone."""
    async with within(), contextlib.aclosing(pair.agent.events()) as events:  # type: ignore[type-var]
        if pair.peer.state in (PeerState.JOINED, PeerState.SUSPECT):
            async for event in events:
                if event.state is PeerState.LOST:
                    return
