"""Notifications that ride with data over TCP, while connections break: each comes once, after its data, or not at all.

The relay cuts every connection after a number of bytes that was drawn for it, in its handshake or in mid transfer, and
so the one that replaces it, from the first put to the last.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import numpy.typing as npt
import pytest
from network import FAR, LOCAL, far
from peers import Server
from relay import Direction, Relay, relaying
from stage import LONG, SHAPE, Cast, Op, within

from asyncxfer import Agent, Peer, PeerLostError, PreSharedKey, Region, TransferError
from asyncxfer._region import RemoteRegion

Words = npt.NDArray[np.uint64]
PUTS, GETS = 2000, 400
WORKERS = 8
LEAST, MOST = 4 << 10, 1 << 20  # bytes of a transfer
CONNECTIONS = 1500  # that cuts are drawn for; more than come
CONFIG = {"tcp_streams": 2, "suspect_after": 1.0}
SECRET = "what only these two agents know"

both_seals = pytest.mark.parametrize("sealed", [False, True], ids=["plain", "encrypted"])


class Pair:
    """Agents "a" and "b", with a row of memory for each worker on both sides."""

    def __init__(self, a: Agent, b: Agent, peer: Peer) -> None:
        self.a = a
        self.b = b
        self.peer = peer
        self.here, self.there = (np.zeros((WORKERS, MOST // 8), np.uint64) for _ in range(2))
        self.near: Region
        self.far: RemoteRegion


def aim(relay: Relay, agent: Agent) -> None:
    """Point the relay at an agent's listener, whose own port is in no metadata."""
    (listener,) = agent._live.peers.acceptor._listeners  # type: ignore[union-attr]
    relay.target = listener._sock.getsockname()[1]


def cut_all(relay: Relay, op: Op, draw: random.Random) -> None:
    """Have every connection cut, those to come included: in its first bytes, or by what goes either way later."""
    relay.cut_at(relay.carried(0, "there") + 300, connection=0, direction="there")
    ways: tuple[Direction, Direction] = ("there", "back") if op == "put" else ("back", "there")
    for number in range(1, CONNECTIONS):
        loaded, other = ways
        passed = {way: relay.carried(number, way) if number < 3 else 0 for way in ways}
        what = draw.random()
        if what < 0.15 and number > 2:
            relay.cut_at(draw.randrange(1, 200), connection=number, direction=draw.choice(ways))
        elif what < 0.5:
            relay.cut_at(passed[other] + draw.randrange(64, 4000), connection=number, direction=other)
        else:
            relay.cut_at(passed[loaded] + draw.randrange(1 << 15, 4 << 20), connection=number, direction=loaded)


async def worker(
    pair: Pair, op: Op, row: int, count: int, news: dict[int, asyncio.Future[None]], draw: random.Random
) -> None:
    """Make transfers one after the other in one row; the next when this one's notification has come, too."""
    loop = asyncio.get_running_loop()
    call = pair.a.put if op == "put" else pair.a.get
    for number in range(row * count, (row + 1) * count):
        words = int(math.exp(draw.uniform(math.log(LEAST), math.log(MOST)))) // 8
        source, target = (pair.here, pair.there) if op == "put" else (pair.there, pair.here)
        source[row, :words] = number
        news[number] = loop.create_future()
        tag = b"%d %d" % (number, words)
        await call(pair.near[row, :words], pair.far[row, :words], notify=tag, checksum=draw.random() < 0.2)
        if op == "get":
            assert (target[row, :words] == number).all()
        await news[number]


async def read(pair: Pair, op: Op, count: int, news: dict[int, asyncio.Future[None]]) -> Counter[int]:
    """Take notifications, and look whether what they tell of is there, until "last" comes; how often each came."""
    came: Counter[int] = Counter()
    async for note in pair.b.notifications():
        if note.tag == b"last":
            return came
        number, words = map(int, note.tag.split())
        row = number // count
        came[number] += 1
        if op == "put":
            assert (pair.there[row, :words] == number).all(), "told before the data was there"
        else:
            pair.there[row, :words] = 0xDEAD  # the memory is free again
        if not news[number].done():
            news[number].set_result(None)
    raise AssertionError("the agent was closed")


@asynccontextmanager
async def pair_behind(relay: Relay, *, sealed: bool) -> AsyncIterator[Pair]:
    credentials = PreSharedKey(SECRET) if sealed else None
    listen = f"{LOCAL}?advertise=127.0.0.1:{relay.port}"
    async with (
        far("a", credentials=credentials, backends=["local", "tcp"], config=CONFIG) as a,
        far("b", credentials=credentials, backends=["local", "tcp"], config=CONFIG, listen=listen) as b,
    ):
        aim(relay, b)
        pair = Pair(a, b, await a.connect("b"))
        await b.register(pair.there, name="far")
        pair.near = await a.register(pair.here)
        pair.far = await pair.peer.region("far")
        yield pair


async def play(pair: Pair, relay: Relay, op: Op, count: int, draw: random.Random) -> None:
    """Let all workers do their part, and count what came of it."""
    news: dict[int, asyncio.Future[None]] = {}
    cut_all(relay, op, draw)
    async with asyncio.TaskGroup() as tasks:
        reading = tasks.create_task(read(pair, op, count, news))
        async with asyncio.TaskGroup() as working:
            for row in range(WORKERS):
                working.create_task(worker(pair, op, row, count, news, random.Random(draw.random())))
        await pair.peer.notify(b"last")
    assert reading.result() == Counter(range(WORKERS * count))


@both_seals
@pytest.mark.stress
async def test_each_put_is_told_once_and_after_its_data(sealed: bool) -> None:
    async with asyncio.timeout(60), relaying() as relay, pair_behind(relay, sealed=sealed) as pair:
        await play(pair, relay, "put", PUTS // WORKERS, random.Random(17 + sealed))
        assert 100 < relay.count < CONNECTIONS
        assert pair.b.stats()["served"].keys() == {"a"}


@both_seals
async def test_each_get_is_told_once_and_when_the_memory_is_free_again(sealed: bool) -> None:
    async with asyncio.timeout(60), relaying() as relay, pair_behind(relay, sealed=sealed) as pair:
        await play(pair, relay, "get", GETS // WORKERS, random.Random(71 + sealed))
        assert 30 < relay.count < CONNECTIONS


# ---- senders that do not live to see it ---------------------------------------------------------------------------


SHORT = FAR | {"lost_after": 0.5, "handshake_timeout": 0.5}


@pytest.mark.parametrize("how", ["killed", "killed while cut off", "closed", "cancelled"])
async def test_who_expects_learns_that_the_sender_is_gone(server: Server, how: str) -> None:
    async with within(), relaying() as relay:
        listen = f"{LOCAL}?advertise=127.0.0.1:{relay.port}"
        here = far("here", backends=["local", "tcp"], config=SHORT, listen=listen)
        cast = Cast(server, await here.start())
        aim(relay, here)
        near = np.zeros(SHAPE, np.uint8)
        await here.register(near, name="near")
        sender = cast.spawn()
        await sender.call("start", "there", SHORT | {"close_timeout": 0.1})
        await sender.call("region", "far", "ordinary", SHAPE, seed=2)
        await sender.call("connect", here.metadata())
        waiting = []
        for op in ("put", "get"):
            tag = op.encode()
            await sender.call("begin", op, op, "far", LONG, "near", LONG, peer="here", notify=tag, wait=True)
            waiting += [asyncio.ensure_future(here.expect(tag, peer=peer)) for peer in ("there", None)]
        if how == "killed while cut off":
            relay.shut = True
            relay.cut()
        if how.startswith("killed"):
            sender.kill()
        elif how == "closed":
            await sender.call("aclose")
        else:
            for op in ("put", "get"):
                await sender.call("cancel", op)
            for second in waiting[1::2]:  # a failure is told to one of those who wait for the tag
                second.cancel()
            waiting = waiting[::2]
        for told in waiting:
            with pytest.raises(PeerLostError if how.startswith("killed") else TransferError, match="'there'"):
                await told
        near[:] = 7
        await asyncio.sleep(0.05)
        assert (near == 7).all(), "written to after the end"
        await cast.leave()
