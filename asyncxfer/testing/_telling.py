"""Contract tests of what both sides are told: notifications, progress, routes, results and figures."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np
import pytest

from asyncxfer import NoRouteError, TransferTimeout

from ._moving import both_ways
from ._stage import Op

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from ._stage import Stage

__all__ = ["Telling"]


class Telling:
    """Both sides know what happened."""

    if TYPE_CHECKING:

        def stage(self) -> AbstractAsyncContextManager[Stage]:
            """Of `BackendContract`."""

        def need(self, capability: str) -> None:
            """Of `BackendContract`."""

    @pytest.mark.parametrize("nbytes", [1000, 3_000_000])
    async def test_data_is_visible_when_its_notification_arrives(self, nbytes: int) -> None:
        self.need("notify")
        async with self.stage() as stage:
            sides = await stage.open((nbytes,))
            plan = stage.prepare("put", sides.region[:], sides.remote[:])
            for number in range(40 if nbytes < 10_000 else 8):
                sides.here[:] = number + 1
                tag = b"round %d" % number
                expected = asyncio.create_task(
                    stage.target.expect(tag, then_read=sides.remote.name, timeout=30), name="expect"
                )
                await plan(notify=tag)
                seen = np.frombuffer(await expected, np.uint8)
                assert (seen == number + 1).all(), f"round {number}: the notification overtook its data"

    @both_ways
    async def test_each_notification_arrives_once(self, op: Op) -> None:
        self.need("notify")
        async with self.stage() as stage:
            sides = await stage.open((64, 512))
            posted = [stage.post(op, sides.region[row], sides.remote[row], notify=b"row %d" % row) for row in range(64)]
            for row in reversed(range(64)):
                await stage.target.expect(b"row %d" % row, timeout=30)
            await asyncio.gather(*posted)
            for row in (0, 31, 63):
                with pytest.raises(TransferTimeout):
                    await stage.target.expect(b"row %d" % row, timeout=0.01)

    async def test_a_bare_notification(self) -> None:
        self.need("notify")
        async with self.stage() as stage:
            await stage.peer.notify(b"hello")
            await stage.target.expect(b"hello", timeout=30)

    async def test_each_row_is_told_once_when_it_is_there(self) -> None:
        async with self.stage() as stage:
            sides = await stage.open((600, 20_000))
            order = np.random.default_rng(5).permutation(600)
            there = await sides.there()
            sides.here[...] = 0
            transfer = stage.post("get", sides.region[order], sides.remote[:])
            told = []
            async for row in transfer:
                told.append(row)
                assert np.array_equal(sides.here[order[row]], there[row]), f"row {row} was told too early"
            assert sorted(told) == list(range(600))
            assert transfer.done()
            assert transfer.progress == 1.0
            assert (await transfer).nbytes == sides.region.nbytes

    async def test_the_result_says_what_was_done(self) -> None:
        async with self.stage() as stage:
            sides = await stage.open((32, 1000))
            transfer = stage.post("put", sides.region[::2, :100], sides.remote[:2, :800])
            done = await transfer
            assert (done.nbytes, done.descriptors, done.backend) == (1600, 16, stage.route.partition(":")[0])
            assert done.seconds >= 0
            assert transfer.result() == done
            assert transfer.exception() is None
            assert not transfer.cancel()

    @both_ways
    async def test_the_route_that_was_asked_for_is_taken_and_explained(self, op: Op) -> None:
        async with self.stage() as stage:
            sides = await stage.open((32, 1000))
            local, remote = sides.region[:], sides.remote[:]
            explanation = stage.agent.explain(op, local, remote)
            routes = {candidate.route: candidate for candidate in explanation}
            ours = next(c for name, c in routes.items() if stage.route in (name, name.partition(":")[0]))
            assert ours.seconds is not None, f"{stage.route} cannot: {ours.reason}"
            assert ours.route in str(explanation)
            assert explanation.nbytes == 32_000
            assert sum(candidate.taken for candidate in explanation) == 1
            plan = stage.prepare(op, local, remote)
            assert plan.backend == stage.route.partition(":")[0]
            with pytest.raises(NoRouteError, match="no-such-backend") as caught:
                stage.agent.prepare(op, local, remote, backend="no-such-backend")
            assert set(caught.value.reasons) == set(routes)

    @both_ways
    async def test_both_sides_count(self, op: Op) -> None:
        self.need("count")
        async with self.stage() as stage:
            sides = await stage.open((32, 1000))
            before = (await stage.target.stats())["served"].get(stage.agent.name, {})
            for _ in range(3):
                await stage.post(op, sides.region[:], sides.remote[:])
            sent = stage.counted[op]
            assert (sent["transfers"], sent["nbytes"], sent["failed"]) == (3, 96_000, 0)
            served = (await stage.target.stats())["served"][stage.agent.name]
            assert served[f"{op}s"] - before.get(f"{op}s", 0) == 3
            assert served[f"{op}_bytes"] - before.get(f"{op}_bytes", 0) == 96_000
            assert stage.agent.stats()["in_flight"] == 0
