"""The other process is killed or stopped, before, during and after a transfer, at either end of it.

It ends in time, in success where the data can still move and in the right error where not, with nothing left behind.
The other process is real; `peers.py` starts and drives it. Every outcome has two seconds, as users are promised.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

import numpy as np
import pytest
from peers import Kind, Server, moving, pattern
from stage import (
    LONG,
    ROWS,
    SHAPE,
    Cast,
    Op,
    Pair,
    begin,
    both_kinds,
    both_ops,
    from_far,
    to_far,
    until_lost,
    within,
)

from asyncxfer import Agent, Done, PeerLostError, PeerState, TransferError, TransferTimeout

# ---- the target is killed -----------------------------------------------------------------------------------------


@both_kinds
@both_ops
@pytest.mark.parametrize("rows", [[3], ROWS, LONG], ids=["1", "16", "8192"])
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
    transfers = [pair.post(op, ROWS * 8) for _ in range(100)]
    await moving(transfers[0])  # they share the copy threads in turns, and end together
    pair.other.kill()
    async with within():
        outcomes = await asyncio.gather(*transfers, return_exceptions=True)
    # What was read from mapped memory is good, and a put that ended while the kernel was still at the kill had a peer.
    assert {type(outcome) for outcome in outcomes} <= {Done, PeerLostError}
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
    assert (await spared.call("expect", b"all of it", timeout=8)).peer == "here"
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
    assert (await pair.other.call("expect", b"moved", timeout=8)).tag == b"moved"
    await pair.expect(op)


@both_kinds
@both_ops
async def test_stopped_after_a_transfer_whose_notification_it_has_not_read(cast: Cast, kind: Kind, op: Op) -> None:
    pair = await to_far(cast, kind)
    async with within():
        await pair.post(op, ROWS, notify=b"moved")
    pair.other.stop()
    pair.other.resume()
    assert (await pair.other.call("expect", b"moved", timeout=8)).tag == b"moved"
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
        assert (await pair.other.call("expect", tag, timeout=8)).tag == tag
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
    with pytest.raises(TransferError, match="closed"):
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


async def test_a_stopped_process_is_suspect_until_it_goes_on(server: Server) -> None:
    cast = Cast(server, await Agent("here", config={"suspect_after": 0.4}).start())
    events = cast.here.events()
    pair = await to_far(cast, "mapped")  # its own patience is the usual one
    await pair.other.call("connect", cast.here.metadata())  # two connections, one peer
    assert (await anext(events)).state is PeerState.JOINED

    async def changes_to(state: PeerState) -> None:
        assert (await anext(events))[::2] == ("there", state)
        assert pair.peer.state is state

    async with within():
        await pair.post("put", ROWS)
        pair.other.stop()
        await changes_to(PeerState.SUSPECT)
        await pair.post("get", ROWS)  # what can still move does
        pair.other.resume()
        await changes_to(PeerState.JOINED)
        pair.other.stop()
        assert (await anext(events)).state is PeerState.SUSPECT
        pair.other.kill()
        assert (await anext(events)).state is PeerState.LOST
    await cast.leave()


async def test_each_side_feels_that_the_other_is_alive_without_a_frame() -> None:
    async with Agent("a") as a, Agent("b") as b:
        await a.connect("b")
        (line,) = a._live.peers._lines.values()  # type: ignore[union-attr]
        (incoming,) = b._live.peers.acceptor.incoming  # type: ignore[union-attr]
        ends = (line.outgoing.channel, incoming.channel)
        for near, far in (ends, ends[::-1]):
            near.feel()
            near.heard = 0.0
            near.feel()
            assert near.heard == 0.0, "nothing has come from the other side"
            far.feel()
            near.feel()
            assert near.heard > 0.0


@pytest.mark.parametrize("theirs", [0.4, 30.0], ids=["both show themselves", "it has to be asked"])
async def test_nobody_is_suspect_who_only_does_nothing(server: Server, theirs: float) -> None:
    """What agents of one host show each other counts, and a peer that shows itself seldom is asked."""
    cast = Cast(server, await Agent("here", config={"suspect_after": 0.4}).start())
    events = cast.here.events()
    await to_far(cast, "mapped", config={"suspect_after": theirs})
    assert (await anext(events)).state is PeerState.JOINED
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(events), 1.5)
    await cast.leave()


async def test_nobody_is_suspect_because_this_loop_was_held_up(server: Server) -> None:
    cast = Cast(server, await Agent("here", config={"suspect_after": 0.4}).start())
    events = cast.here.events()
    await to_far(cast, "mapped")
    assert (await anext(events)).state is PeerState.JOINED
    time.sleep(1.0)  # noqa: ASYNC251 - that is the test
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(events), 1.0)
    await cast.leave()


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


async def test_a_sender_is_killed_that_had_said_more_than_is_taken(server: Server) -> None:
    cast = Cast(server, await Agent("here", config={"backlog_bytes": 1 << 16}).start())
    other, _, _ = await from_far(cast, "mapped")
    expected = asyncio.ensure_future(cast.here.expect(b"never"))
    await other.call("flood", bytes(4000), 400, peer="here")
    other.kill()
    async with within():
        with pytest.raises(PeerLostError, match="there"):
            await expected
    await cast.leave()


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
