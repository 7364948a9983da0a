"""Transfers that end before they are done: nothing reads the source or writes the destination once the await is over.

Cancelled, timed out, interrupted with their task, or closed with their agent, peer or region; one, or many at once.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
from peers import Kind, moving, pattern
from stage import (
    LONG,
    ROWS,
    SHAPE,
    Cast,
    Op,
    Pair,
    both_kinds,
    both_ops,
    to_far,
    within,
)

from asyncxfer import Agent, ClosedError, Done, PeerLostError, Transfer, TransferError, TransferTimeout, _metadata
from asyncxfer._fast import completion

Ending = Callable[[Pair, Transfer], Awaitable[None]]


# ---- ways to end --------------------------------------------------------------------------------------------------


async def by_cancel(pair: Pair, transfer: Transfer) -> None:
    assert transfer.cancel()
    assert not transfer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await transfer


async def by_task(pair: Pair, transfer: Transfer) -> None:
    async def wait() -> Done:
        return await transfer

    task = asyncio.ensure_future(wait())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


async def by_timeout_block(pair: Pair, transfer: Transfer) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.001):
            await transfer


async def by_group(pair: Pair, transfer: Transfer) -> None:
    async def wait() -> Done:
        return await transfer

    async def fail() -> None:
        raise KeyError("the other task")

    async def both() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(wait())
            group.create_task(fail())

    with pytest.raises(ExceptionGroup) as caught:
        await both()
    assert caught.group_contains(KeyError)


async def by_agent(pair: Pair, transfer: Transfer) -> None:
    # A transfer that is posted before it is closed may end well; with so much behind it, the last do not.
    behind = [pair.post(transfer.plan.op) for _ in range(40)]
    await pair.agent.aclose()
    assert all(t.done() for t in [transfer, *behind])
    outcomes = await asyncio.gather(transfer, *behind, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} <= {Done, TransferError}
    with pytest.raises(ClosedError):
        transfer.plan()


async def by_peer(pair: Pair, transfer: Transfer) -> None:
    behind = [pair.post(transfer.plan.op) for _ in range(40)]
    await pair.peer.aclose()
    assert all(t.done() for t in [transfer, *behind])
    outcomes = await asyncio.gather(transfer, *behind, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} <= {Done, TransferError, PeerLostError}
    with pytest.raises(PeerLostError):
        transfer.plan()


async def by_region(pair: Pair, transfer: Transfer) -> None:
    behind = [pair.post(transfer.plan.op) for _ in range(40)]
    await pair.region.aclose()
    assert all(t.done() for t in [transfer, *behind])
    outcomes = await asyncio.gather(transfer, *behind, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} <= {Done, TransferError}
    with pytest.raises(ClosedError):
        transfer.plan()


ENDINGS: list[Ending] = [by_cancel, by_task, by_timeout_block, by_group, by_agent, by_peer, by_region]


# ---- quiescence ---------------------------------------------------------------------------------------------------


async def quiescent(pair: Pair, op: Op) -> None:
    """Use the memory of a transfer that is over for something else, and see that nobody else does."""
    if op == "get":
        pair.array[:] = 7
        for _ in range(5):
            assert (pair.array == 7).all()
            await asyncio.sleep(0)
        return
    before = await pair.other.call("checksum", "far")
    pair.array[:] = pattern(9, SHAPE)
    for _ in range(5):
        assert await pair.other.call("checksum", "far") == before


@both_kinds
@both_ops
@pytest.mark.parametrize("ending", ENDINGS)
async def test_buffers_are_quiescent_after_an_early_end(cast: Cast, kind: Kind, op: Op, ending: Ending) -> None:
    pair = await to_far(cast, kind)
    transfer = pair.post(op)
    await moving(transfer)
    async with within():
        await ending(pair, transfer)
    await quiescent(pair, op)


@both_kinds
@both_ops
async def test_buffers_are_quiescent_after_a_timeout(cast: Cast, kind: Kind, op: Op) -> None:
    pair = await to_far(cast, kind)
    async with within():
        with pytest.raises(TransferTimeout, match="timeout") as caught:
            await pair.post(op, LONG, timeout=0.01, notify=b"never")
    await quiescent(pair, op)
    assert caught.value.nbytes < len(LONG) * SHAPE[1]
    assert isinstance(caught.value, TimeoutError)
    with pytest.raises(TransferError, match="never"):
        await pair.other.call("expect", b"never", timeout=8)


@both_kinds
@both_ops
async def test_a_hundred_queued_transfers_are_cancelled_at_once(cast: Cast, kind: Kind, op: Op) -> None:
    pair = await to_far(cast, kind)
    transfers = [pair.post(op) for _ in range(100)]
    await moving(transfers[0])
    async with within():
        everything = asyncio.gather(*transfers)
        await asyncio.sleep(0)
        everything.cancel()
        with pytest.raises(asyncio.CancelledError):
            await everything
        while not all(transfer.done() for transfer in transfers):
            await asyncio.wait([asyncio.ensure_future(t.ended()) for t in transfers])
    await quiescent(pair, op)
    async with within():
        await pair.post(op, ROWS)


@both_ops
async def test_no_time_at_all(cast: Cast, op: Op) -> None:
    pair = await to_far(cast, "mapped")
    async with within():
        for rows in ([3], ROWS):
            with pytest.raises(TransferTimeout):
                await pair.post(op, rows, timeout=0)
        small = pair.agent.put if op == "put" else pair.agent.get
        with pytest.raises(TransferTimeout):
            await small(pair.region.bytes[:8], pair.peer["far"].bytes[:8], timeout=0)
    assert (pair.array == pattern(1, SHAPE)).all()
    assert await pair.other.call("matches", "far", 2)


async def test_one_waiter_of_two_is_cancelled_and_both_learn(cast: Cast) -> None:
    pair = await to_far(cast, "mapped")
    transfer = pair.post("put")

    async def wait() -> Done:
        return await transfer

    waiters = [asyncio.ensure_future(wait()) for _ in range(2)]
    await moving(transfer)
    waiters[0].cancel()
    async with within():
        outcomes = await asyncio.gather(*waiters, return_exceptions=True)
    assert isinstance(outcomes[0], asyncio.CancelledError)
    assert isinstance(outcomes[1], asyncio.CancelledError if transfer.status else Done)  # it may have been quicker


async def test_a_cancel_that_comes_too_late_changes_nothing(cast: Cast) -> None:
    pair = await to_far(cast, "mapped")
    transfer = pair.post("put", ROWS)
    done = await transfer
    assert not transfer.cancel()
    assert await transfer == done == transfer.result()


# ---- many ---------------------------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of this process that are in memory, other processes' shares left out."""
    status = Path("/proc/self/status").read_text()
    return sum(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon:"))


@pytest.mark.stress
@pytest.mark.parametrize(("kind", "op"), [("mapped", "put"), ("ordinary", "get")])
async def test_ten_thousand_small_transfers_at_once(cast: Cast, kind: Kind, op: Op) -> None:
    pair = await to_far(cast, kind)
    near = pair.region.bytes
    far = pair.peer["far"].bytes
    call = pair.agent.put if op == "put" else pair.agent.get
    before = completion.live()

    async def round_() -> None:
        # Rows that do not merge, and too many of them to be moved by the caller's own thread.
        rows = [(number * 1024, 8) for number in range(40)]
        transfers = [
            call(pair.region.rows(np.add(rows, [offset, 0])), pair.peer["far"].rows(np.add(rows, [offset, 0])))
            for offset in range(0, 8 * 100, 8)
        ]
        transfers += [call(near[n : n + 64], far[n : n + 64]) for n in range(1 << 20, (1 << 20) + 64 * 4950, 64)]
        plan = pair.agent.prepare(op, near[: 1 << 16], far[: 1 << 16])
        transfers += [plan() for _ in range(4950)]
        assert pair.agent.stats()["in_flight"] > 1000
        async with asyncio.timeout(30):
            done = await asyncio.gather(*transfers)
            assert len(done) == 10_000
            while pair.agent.stats()["in_flight"]:  # noqa: ASYNC110 - awaited, and let go of in the next turns
                await asyncio.sleep(0)

    sizes: list[int] = []
    while not (len(sizes) > 3 and sizes[-1] - sizes[-4] < 1 << 20):  # until the allocator has what such a round needs
        assert len(sizes) < 20, f"it grows and grows: {sizes}"
        await round_()
        gc.collect()
        sizes.append(resident())
    assert completion.live() <= before
    assert pair.agent.stats()["in_flight"] == 0


@pytest.mark.stress
async def test_an_agent_closes_with_ten_thousand_transfers_in_flight(cast: Cast) -> None:
    pair = await to_far(cast, "mapped")
    agent = await Agent("second").start()
    region = await agent.register(pair.array, name="near")
    peer = await agent.connect(_metadata.encode(pair.peer.metadata))
    plan = agent.prepare("put", region[ROWS], peer["far"][ROWS])
    small = agent.prepare("put", region.bytes[: 1 << 16], peer["far"].bytes[: 1 << 16])
    transfers = [small() for _ in range(5_000)] + [plan() for _ in range(5_000)]
    async with asyncio.timeout(10):
        await agent.aclose()
    assert all(transfer.done() for transfer in transfers)
    kinds = {type(transfer.exception()) for transfer in transfers}
    assert kinds <= {type(None), TransferError}
