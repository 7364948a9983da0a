"""Contract tests of ends: cancelled, out of time, taken back, left; buffers are quiescent after any of them."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pytest

from asyncxfer import (
    AccessError,
    ClosedError,
    Done,
    PeerLostError,
    PeerState,
    Transfer,
    TransferError,
    TransferTimeout,
)

from ._moving import both_ways
from ._stage import Op, Sides, Stage

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

__all__ = ["Ending"]


def _queue(stage: Stage, sides: Sides, op: Op, count: int = 24) -> list[Transfer]:
    """Post more than can have been done by the time that the last is posted."""
    plan = stage.prepare(op, sides.region[:], sides.remote[:])
    return [plan() for _ in range(count)]


async def _outcomes(transfers: Iterable[Transfer]) -> list[Done | BaseException]:
    async def outcome(transfer: Transfer) -> Done:
        return await transfer

    return await asyncio.gather(*(outcome(transfer) for transfer in transfers), return_exceptions=True)


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - nothing tells, or what tells is not under test here
            await asyncio.sleep(0.001)


def _transfers() -> int:
    """How many there are, in use or as garbage."""
    return sum(isinstance(each, Transfer) for each in gc.get_objects())


class Ending:
    """Transfers end, and nothing moves afterwards."""

    large: ClassVar[int] = 16 << 20
    """Bytes of a transfer that takes a while."""

    if TYPE_CHECKING:

        def stage(self) -> AbstractAsyncContextManager[Stage]:
            """Of `BackendContract`."""

        def need(self, capability: str) -> None:
            """Of `BackendContract`."""

    @both_ways
    async def test_a_cancelled_transfer_ends_quiescent(self, op: Op) -> None:
        self.need("cancel")
        async with self.stage() as stage:
            sides = await stage.open((self.large,))
            *others, last = _queue(stage, sides, op)
            assert last.cancel()
            assert not last.cancel()
            with pytest.raises(asyncio.CancelledError):
                await last
            assert last.done()
            assert all(isinstance(outcome, Done) for outcome in await _outcomes(others))
            # Had it not ended, it would read or write these now.
            sides.here[:] = 0
            there = await sides.there()
            if stage.connected is not None:
                await stage.peer.notify(b"a turn of both loops")
                await stage.target.expect(b"a turn of both loops", timeout=30)
            assert not sides.here.any()
            assert np.array_equal(await sides.there(), there)

    async def test_a_cancelled_task_ends_its_transfer_first(self) -> None:
        self.need("cancel")
        async with self.stage() as stage:
            sides = await stage.open((self.large,))
            *others, last = _queue(stage, sides, "put")
            task = asyncio.ensure_future(_outcomes([last]))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await _outcomes(others)
            await _until(last.done)

    async def test_asyncio_timeout_ends_a_transfer(self) -> None:
        self.need("cancel")
        async with self.stage() as stage:
            sides = await stage.open((self.large,))
            *others, last = _queue(stage, sides, "put")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0):
                    await last
            assert last.done()
            await _outcomes(others)

    @both_ways
    async def test_a_transfer_out_of_time_says_so(self, op: Op) -> None:
        self.need("timeout")
        async with self.stage() as stage:
            sides = await stage.open((self.large,))
            others = _queue(stage, sides, op)
            last = stage.post(op, sides.region[:], sides.remote[:], timeout=1e-6)
            with pytest.raises(TransferTimeout, match="timeout") as caught:
                await last
            assert caught.value.backend == stage.route.partition(":")[0]
            assert 0 <= caught.value.nbytes < self.large
            assert all(isinstance(outcome, Done) for outcome in await _outcomes(others))
            assert stage.counted[op]["failed"] == 1

    @both_ways
    async def test_a_transfer_in_time_is_done(self, op: Op) -> None:
        async with self.stage() as stage:
            sides = await stage.open((self.large,))
            done = await stage.post(op, sides.region[:], sides.remote[:], timeout=60)
            assert done.nbytes == self.large

    @both_ways
    async def test_what_has_ended_is_gone_without_the_collector(self, op: Op) -> None:
        async with self.stage() as stage:
            sides = await stage.open((16, 4096))
            plan = stage.prepare(op, sides.region[:], sides.remote[:])
            await plan()
            gc.collect()
            gc.disable()
            try:
                before = _transfers()
                for _ in range(20):
                    await plan()
                await _until(lambda: _transfers() <= before)
            finally:
                gc.enable()

    @both_ways
    async def test_what_the_peer_does_not_grant_is_refused(self, op: Op) -> None:
        self.need("grant")
        async with self.stage() as stage:
            granted, denied = ("w", "r") if op == "put" else ("r", "w")
            sides = await stage.open((100,), access=denied)  # type: ignore[arg-type]
            with pytest.raises(AccessError, match=f"{op} needs access '{granted}'"):
                stage.post(op, sides.region[:], sides.remote[:])
            sides = await stage.open((100,), access=granted)  # type: ignore[arg-type]
            assert (await stage.post(op, sides.region[:], sides.remote[:])).nbytes == 100

    async def test_read_only_memory_is_sent_and_never_written(self) -> None:
        async with self.stage() as stage:
            sides = await stage.open((100,))
            data = bytes(range(100))
            async with stage.agent.register(data) as source:
                with pytest.raises(AccessError, match="read-only"):
                    stage.post("get", source[:], sides.remote[:])
                await stage.post("put", source[:], sides.remote[:])
                assert (await sides.there()).tobytes() == data

    @both_ways
    async def test_a_region_closes_when_its_transfers_have_ended(self, op: Op) -> None:
        async with self.stage() as stage:
            sides = await stage.open((self.large,))
            posted = _queue(stage, sides, op)
            plan = posted[0].plan
            await sides.region.aclose()
            assert all(transfer.done() for transfer in posted)
            with pytest.raises(ClosedError, match=sides.region.name):
                stage.post(op, sides.region[:], sides.remote[:])
            with pytest.raises(ClosedError, match=sides.region.name):
                plan()
            await _outcomes(posted)

    @both_ways
    async def test_the_peer_closes_a_region_under_transfers(self, op: Op) -> None:
        self.need("revoke")
        async with self.stage() as stage:
            sides = await stage.open((self.large,))
            posted = _queue(stage, sides, op)
            await stage.target.close(sides.remote.name)
            there = await sides.there()
            for outcome in await _outcomes(posted):
                assert isinstance(outcome, (Done, TransferError)), outcome
            assert np.array_equal(await sides.there(), there), "something was written after the region was closed"
            await _until(lambda: sides.remote.name not in stage.peer.regions)
            with pytest.raises(ClosedError, match=sides.remote.name):
                stage.post(op, sides.region[:], sides.remote[:])

    async def test_leaving_the_peer_ends_what_is_in_flight(self) -> None:
        self.need("leave")
        async with self.stage() as stage:
            sides = await stage.open((self.large,))
            posted = _queue(stage, sides, "put")
            await stage.peer.aclose()
            assert all(transfer.done() for transfer in posted)
            await _outcomes(posted)
            assert stage.peer.state is PeerState.LEFT
            with pytest.raises(PeerLostError, match=stage.peer.name):
                stage.post("put", sides.region[:], sides.remote[:])
            with pytest.raises(PeerLostError, match=stage.peer.name):
                stage.peer.notify(b"too late")

    async def test_the_peer_leaves_under_transfers(self) -> None:
        self.need("revoke")
        async with self.stage() as stage:
            sides = await stage.open((self.large,))
            posted = _queue(stage, sides, "put")
            await stage.target.leave()
            for outcome in await _outcomes(posted):
                assert isinstance(outcome, (Done, TransferError)), outcome
            await _until(lambda: stage.peer.state is not PeerState.JOINED)
            assert stage.peer.state is PeerState.LEFT
            with pytest.raises(PeerLostError, match=stage.peer.name):
                stage.post("put", sides.region[:], sides.remote[:])

    async def test_closing_the_agent_ends_what_is_in_flight(self) -> None:
        async with self.stage() as stage:
            sides = await stage.open((self.large,))
            posted = _queue(stage, sides, "put")
            await stage.agent.aclose()
            assert all(transfer.done() for transfer in posted)
            await _outcomes(posted)
            with pytest.raises(ClosedError, match=stage.agent.name):
                stage.post("put", sides.region[:], sides.remote[:])
