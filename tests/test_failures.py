"""What goes wrong between two processes, and how it ends: in time, in success or the right error, with nothing left.

Killed and stopped peers, regions and files that go away under a transfer, forks, threads, early ends. The second
process is real; `peers.py` starts and drives it. Every wait for an outcome has two seconds, as users are promised.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import peers
import pytest
import uvloop
from conftest import LOOPS
from peers import Bytes, Kind, Process, Server, make_region, moving, pattern

from asyncxfer import (
    Agent,
    ClosedError,
    DescriptorError,
    Done,
    Peer,
    PeerLostError,
    PeerState,
    Region,
    RegistrationError,
    TransferError,
    TransferTimeout,
)

Op = Literal["put", "get"]

SHAPE = (16, 1 << 20)
ROWS = list(range(16))
LONG = ROWS * 128  # 2 GiB through 16 MiB of memory: long enough to act in the middle of it

both_ops = pytest.mark.parametrize("op", ["put", "get"])
both_kinds = pytest.mark.parametrize("kind", ["mapped", "ordinary"])


def within() -> asyncio.Timeout:
    return asyncio.timeout(2)


# ---- the cast -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
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

    def spawn(self) -> Process:
        """Start another process, on the same kind of loop."""
        name = "uvloop" if isinstance(asyncio.get_running_loop(), uvloop.Loop) else "asyncio"
        self._spawned.append(Process(self._server, name))
        return self._spawned[-1]

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


@pytest.fixture
async def cast(server: Server) -> AsyncIterator[Cast]:
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

    def post(self, op: Op, rows: list[int] = LONG, **options: Any) -> Any:
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
        if pair.peer.state is PeerState.JOINED:
            async for event in events:
                if event.state is PeerState.LOST:
                    return


# ---- the target is killed -----------------------------------------------------------------------------------------


@both_kinds
@both_ops
@pytest.mark.parametrize("rows", [[3], ROWS, LONG], ids=["1", "16", "2048"])
async def test_killed_before_a_transfer_and_not_yet_noticed(cast: Cast, kind: Kind, op: Op, rows: list[int]) -> None:
    pair = await to_far(cast, kind)
    far = pair.far() if kind == "mapped" else None
    pair.other.kill()
    pair.other.wait_dead()
    transfer = pair.post(op, rows)
    async with within():
        if op == "get" and far is not None:  # the data can still move
            done = await transfer
            assert done.nbytes == len(rows) * SHAPE[1]
            assert (pair.array[rows[:16]] == far[rows[:16]]).all()
        else:
            with pytest.raises(PeerLostError, match=r"there|far"):
                await transfer
    await until_lost(pair)


@both_kinds
@both_ops
async def test_killed_before_a_transfer_and_noticed(cast: Cast, kind: Kind, op: Op) -> None:
    pair = await to_far(cast, kind)
    plan = cast.here.prepare(op, pair.region[ROWS], pair.peer["far"][ROWS])
    remote = pair.peer["far"]
    pair.other.kill()
    await until_lost(pair)
    with pytest.raises(PeerLostError, match="there"):
        plan()
    with pytest.raises(PeerLostError, match="there"):
        cast.here.prepare(op, pair.region[ROWS], remote[ROWS])
    with pytest.raises(PeerLostError, match="there"):
        pair.peer.notify(b"anyone?")
    async with within():
        with pytest.raises(PeerLostError, match="there"):
            await pair.peer.region("more")


@both_kinds
@both_ops
async def test_killed_during_a_transfer(cast: Cast, kind: Kind, op: Op) -> None:
    pair = await to_far(cast, kind)
    transfer = pair.post(op)
    await moving(transfer)
    pair.other.kill()
    async with within():
        if op == "get" and kind == "mapped":
            assert (await transfer).nbytes == len(LONG) * SHAPE[1]
            await pair.expect("get")
        else:
            with pytest.raises(PeerLostError) as caught:
                await transfer
            assert 0 < caught.value.nbytes < len(LONG) * SHAPE[1]
            assert caught.value.backend == "shm"
    await until_lost(pair)


@both_kinds
@both_ops
async def test_killed_with_many_transfers_queued(cast: Cast, kind: Kind, op: Op) -> None:
    pair = await to_far(cast, kind)
    transfers = [pair.post(op, ROWS * 4) for _ in range(100)]
    async with within():
        await transfers[0]
    pair.other.kill()
    async with within():
        outcomes = await asyncio.gather(*transfers, return_exceptions=True)
    assert isinstance(outcomes[0], Done)
    assert {type(outcome) for outcome in outcomes} <= {Done, PeerLostError}
    if not (op == "get" and kind == "mapped"):
        assert PeerLostError in {type(outcome) for outcome in outcomes}
    await until_lost(pair)


@both_kinds
@both_ops
async def test_killed_after_a_transfer(cast: Cast, kind: Kind, op: Op) -> None:
    pair = await to_far(cast, kind)
    far = pair.far() if kind == "mapped" else None
    async with within():
        await pair.post(op, ROWS)
    pair.other.kill()
    await until_lost(pair)
    if op == "get":
        await pair.expect("get")
    elif far is not None:
        assert (far == pattern(1, SHAPE)).all()


async def test_others_do_not_notice_a_kill(cast: Cast) -> None:
    doomed, spared = await to_far(cast, "mapped"), cast.spawn()
    metadata = await spared.call("start", "spared")
    await spared.call("region", "far", "mapped", SHAPE, seed=3)
    peer = await cast.here.connect(metadata)
    transfer = cast.here.put(doomed.region[LONG], peer["far"][LONG], notify=b"all of it")
    lost = doomed.post("put")
    await moving(lost)
    doomed.other.kill()
    with pytest.raises(PeerLostError):
        await lost
    assert (await transfer).nbytes == len(LONG) * SHAPE[1]
    assert (await spared.call("expect", b"all of it", timeout=2)).peer == "here"
    assert await spared.call("matches", "far", 1)


# ---- the target is stopped ----------------------------------------------------------------------------------------


@both_kinds
@both_ops
@pytest.mark.parametrize("rows", [[3], ROWS], ids=["1", "16"])
async def test_stopped_before_a_transfer(cast: Cast, kind: Kind, op: Op, rows: list[int]) -> None:
    pair = await to_far(cast, kind)
    pair.other.stop()
    async with within():
        await pair.post(op, rows, notify=b"moved")
    noted = pair.other.post("expect", b"moved")
    pair.other.resume()
    async with within():
        assert (await noted).tag == b"moved"
    if rows == ROWS:
        await pair.expect(op)


@both_kinds
@both_ops
async def test_stopped_during_a_transfer(cast: Cast, kind: Kind, op: Op) -> None:
    pair = await to_far(cast, kind)
    transfer = pair.post(op, notify=b"moved")
    await moving(transfer)
    pair.other.stop()
    async with within():
        await transfer
    pair.other.resume()
    assert (await pair.other.call("expect", b"moved", timeout=2)).tag == b"moved"
    await pair.expect(op)


@both_kinds
@both_ops
async def test_stopped_after_a_transfer_whose_notification_it_has_not_read(cast: Cast, kind: Kind, op: Op) -> None:
    pair = await to_far(cast, kind)
    async with within():
        await pair.post(op, ROWS, notify=b"moved")
    pair.other.stop()
    pair.other.resume()
    assert (await pair.other.call("expect", b"moved", timeout=2)).tag == b"moved"
    await pair.expect(op)


async def fill_socket(pair: Pair) -> list[bytes]:
    """Notify a stopped peer until its socket is full; the tags that went in, and one that waits outside."""
    tags = []
    for number in range(10_000):
        tags.append(b"note %d" % number)
        notice = pair.peer.notify(tags[-1])
        if not notice.done():
            return tags
    raise AssertionError("the socket never filled")


@both_kinds
async def test_a_full_notification_socket_delivers_everything_once_the_peer_goes_on(cast: Cast, kind: Kind) -> None:
    pair = await to_far(cast, kind)
    pair.other.stop()
    tags = await fill_socket(pair)
    transfer = pair.post("put", ROWS, notify=b"moved")
    pair.other.resume()
    async with within():
        await transfer
    for tag in [*tags, b"moved"]:
        assert (await pair.other.call("expect", tag, timeout=2)).tag == tag
    await pair.expect("put")


@both_kinds
@both_ops
async def test_a_full_notification_socket_ends_with_the_timeout(cast: Cast, kind: Kind, op: Op) -> None:
    pair = await to_far(cast, kind)
    pair.other.stop()
    await fill_socket(pair)
    async with within():
        with pytest.raises(TransferTimeout, match=op):
            await pair.post(op, ROWS, notify=b"late", timeout=0.2)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await pair.post(op, ROWS, notify=b"later")
    expected = pair.other.post("expect", b"late", timeout=1)
    pair.other.resume()
    with pytest.raises(TransferError, match=r"late.*failed"):
        await expected


@both_kinds
@both_ops
async def test_a_full_notification_socket_ends_with_the_peer(cast: Cast, kind: Kind, op: Op) -> None:
    pair = await to_far(cast, kind)
    pair.other.stop()
    await fill_socket(pair)
    transfers = [pair.post(op, ROWS, notify=b"late"), pair.peer.notify(b"later")]
    pair.other.kill()
    async with within():
        for transfer in transfers:
            with pytest.raises(PeerLostError):
                await transfer
    await until_lost(pair)


async def test_an_agent_that_waits_for_a_stopped_peer_closes_in_time(cast: Cast) -> None:
    pair = await to_far(cast, "mapped")
    pair.other.stop()
    await fill_socket(pair)
    transfer = pair.post("put", ROWS, notify=b"late")
    async with within():
        await cast.here.aclose()
    pair.other.resume()
    with pytest.raises(asyncio.CancelledError):
        await transfer


async def test_connecting_to_a_stopped_process_times_out(cast: Cast) -> None:
    other = cast.spawn()
    metadata = await other.call("start", "there")
    other.stop()
    async with within():
        with pytest.raises(TransferTimeout, match="did not answer"):
            await cast.here.connect(metadata)
    other.resume()
    async with within():
        assert (await cast.here.connect(metadata)).state is PeerState.JOINED


# ---- the initiator is killed --------------------------------------------------------------------------------------


@both_kinds
@both_ops
async def test_the_initiator_is_killed_while_its_notification_is_expected(cast: Cast, kind: Kind, op: Op) -> None:
    other, _, _ = await from_far(cast, kind)
    expected = asyncio.ensure_future(cast.here.expect(b"never"))
    await begin(other, op, wait=True, notify=b"never")
    other.kill()
    async with within():
        with pytest.raises(PeerLostError, match="there"):
            await expected


async def test_the_only_sender_is_killed_before_it_sends_anything(cast: Cast) -> None:
    other, _, _ = await from_far(cast, "mapped")
    expected = asyncio.ensure_future(cast.here.expect(b"never"))
    await asyncio.sleep(0)
    other.kill()
    async with within():
        with pytest.raises(PeerLostError, match="there"):
            await expected


async def test_one_of_two_senders_is_killed(cast: Cast) -> None:
    doomed, _, _ = await from_far(cast, "mapped")
    spared = cast.spawn()
    await spared.call("start", "spared")
    await spared.call("connect", cast.here.metadata())
    announced = asyncio.ensure_future(cast.here.expect(b"announced"))
    by_name = asyncio.ensure_future(cast.here.expect(b"by name", peer="there"))
    from_anyone = asyncio.ensure_future(cast.here.expect(b"from anyone"))
    await begin(doomed, "put", wait=True, notify=b"announced")
    doomed.kill()
    async with within():
        for expected in (announced, by_name):
            with pytest.raises(PeerLostError, match="there"):
                await expected
    assert not from_anyone.done()
    await spared.call("notify", b"from anyone", "here")
    async with within():
        assert (await from_anyone).peer == "spared"


async def test_a_sender_that_was_killed_is_reported_to_those_who_ask_later(cast: Cast) -> None:
    other, _, _ = await from_far(cast, "mapped")
    await begin(other, "put", wait=True, notify=b"promised")
    other.kill()
    async with within():
        async with contextlib.aclosing(cast.here.events()) as events:  # type: ignore[type-var]
            async for event in events:
                if event.state is PeerState.LOST:
                    break
        with pytest.raises(PeerLostError, match="there"):
            await cast.here.expect(b"promised")


async def test_a_notification_sent_just_before_the_kill_arrives(cast: Cast) -> None:
    other, _, array = await from_far(cast, "mapped", config={"inline_bytes": 4 << 20})
    await other.call("begin", "warm", "put", "far", [0], "near", [0], peer="here")
    await other.call("outcome", "warm")
    with other.in_step("put_unnoticed", "far", "near", b"last words", peer="here") as gate:
        gate.recv(1)
        await cast.here.register(np.zeros(8), name="news that the other never reads")
        gate.send(b"!")
        assert gate.recv(1) == b"y"
        other.kill()
        other.wait_dead()
    async with within():
        assert (await cast.here.expect(b"last words")).peer == "there"
    assert (array[0] == pattern(2, SHAPE)[0]).all()


@both_kinds
@both_ops
async def test_a_region_closes_although_its_user_was_killed_inside_it(cast: Cast, kind: Kind, op: Op) -> None:
    other, region, array = await from_far(cast, kind)
    await begin(other, op, wait=True)
    other.kill()
    async with within():
        await region.aclose()
    after = array.copy()
    other.wait_dead()
    assert (array == after).all()


# ---- the region is taken back -------------------------------------------------------------------------------------


@both_kinds
@both_ops
async def test_the_peer_deregisters_under_a_transfer(cast: Cast, kind: Kind, op: Op) -> None:
    pair = await to_far(cast, kind)
    transfer = pair.post(op, notify=b"never")
    remote = pair.peer["far"]
    await moving(transfer)
    closing = pair.other.post("close", "far")
    async with within():
        with pytest.raises(TransferError, match="deregistered") as caught:
            await transfer
        checksum = await closing
    assert not isinstance(caught.value, PeerLostError)
    assert 0 < caught.value.nbytes < len(LONG) * SHAPE[1]
    assert await pair.other.call("checksum", "far") == checksum
    with pytest.raises(TransferError, match="never"):
        await pair.other.call("expect", b"never", timeout=2)
    with pytest.raises(ClosedError, match="far"):
        cast.here.put(pair.region[ROWS], remote[ROWS])
    assert pair.peer.state is PeerState.JOINED


@both_kinds
@both_ops
async def test_deregistering_waits_until_nobody_is_inside(cast: Cast, kind: Kind, op: Op) -> None:
    other, region, array = await from_far(cast, kind)
    await begin(other, op, wait=True)
    async with within():
        await region.aclose()
    array[:] = 7  # from here on it is ours alone
    with pytest.raises(TransferError, match="deregistered"):
        await other.call("outcome", "t")
    assert (array == 7).all()
    if op == "get":
        assert not await other.call("matches", "far", 7)


@both_ops
async def test_deregistering_the_local_region_waits_for_its_transfers(cast: Cast, op: Op) -> None:
    pair = await to_far(cast, "mapped")
    transfer = pair.post(op)
    await moving(transfer)
    async with within():
        await pair.region.aclose()
    assert transfer.done()
    async with within():
        await transfer
    with pytest.raises(ClosedError, match="near"):
        pair.post(op)


@both_kinds
async def test_deregistering_while_a_user_is_stopped_inside(cast: Cast, kind: Kind) -> None:
    # One chunk for all of it: between its first and its last byte the other process is inside.
    other, region, array = await from_far(cast, kind, config={"chunk_bytes": 1 << 30, "chunk_rows": 1 << 20})
    alive = weakref.ref(array.base if kind == "mapped" else array)
    for _ in range(20):
        array[:] = 0
        await begin(other, "put", [15, *ROWS * 32, 0])
        while not array[15, 0]:
            await asyncio.sleep(0)
        other.stop()
        async with within():
            try:
                await region.aclose()
            except RegistrationError as error:
                assert "there" in str(error)  # noqa: PT017 - it was not stopped inside every time
                break
        region, array = await make_region(cast.here, "near", kind, SHAPE)
    else:
        raise AssertionError("it was never stopped inside")
    del array
    gc.collect()
    assert alive() is not None
    other.kill()
    async with within():
        while alive() is not None:
            await asyncio.sleep(0)
            gc.collect()
