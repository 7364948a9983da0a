"""Contract tests of moving bytes: whatever the rows, the right bytes arrive, and no others change."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pytest

from ._stage import Op, Selection

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from ._stage import Stage

__all__ = ["Moving"]

both_ways = pytest.mark.parametrize("op", ["put", "get"])


class Moving:
    """Bytes arrive."""

    many: ClassVar[int] = 4000
    """Rows of a transfer of many."""

    if TYPE_CHECKING:

        def stage(self) -> AbstractAsyncContextManager[Stage]:
            """Of `BackendContract`."""

        def need(self, capability: str) -> None:
            """Of `BackendContract`."""

    @both_ways
    async def test_one_row(self, op: Op) -> None:
        async with self.stage() as stage:
            sides = await stage.open((16, 4096))
            done = await stage.moves(sides, op, Selection.by_key(sides.region, 3), Selection.by_key(sides.remote, 9))
            assert (done.nbytes, done.descriptors) == (4096, 1)

    @both_ways
    async def test_many_scattered_rows(self, op: Op) -> None:
        async with self.stage() as stage:
            sides = await stage.open((self.many, 48))
            random, some = np.random.default_rng(1), self.many * 3 // 4
            here, there = random.permutation(self.many)[:some], random.permutation(self.many)[:some]
            local, remote = Selection.by_key(sides.region, here), Selection.by_key(sides.remote, there)
            assert (await stage.moves(sides, op, local, remote)).descriptors == some

    @both_ways
    async def test_strided_on_one_side_and_on_both(self, op: Op) -> None:
        async with self.stage() as stage:
            sides = await stage.open((64, 32, 100))
            for here, there in [
                (np.s_[::2], np.s_[:32]),
                (np.s_[:, ::4, 10:90], np.s_[:, 1::4, 20:]),
                (np.s_[::-1, 5], np.s_[:, 30]),
                (np.s_[:, [3, 1, 7]], np.s_[:, 4:7]),
            ]:
                local, remote = Selection.by_key(sides.region, here), Selection.by_key(sides.remote, there)
                await stage.moves(sides, op, local, remote)

    @both_ways
    async def test_rows_of_unequal_count_and_size(self, op: Op) -> None:
        async with self.stage() as stage:
            sides = await stage.open((100_000,), (90_000,))
            random = np.random.default_rng(2)
            cuts = [np.sort(random.choice(np.arange(1, 70_000), count, replace=False)) for count in (37, 411)]
            lengths = [np.diff(cut, prepend=0, append=70_000) for cut in cuts]
            # The same 70,000 bytes as 38 and as 412 rows, each list with gaps of its own between the rows.
            offsets = [np.cumsum(n) - n + np.arange(len(n)) * gap for n, gap in zip(lengths, (700, 45), strict=True)]
            local = Selection.by_ranges(sides.region, offsets[0].tolist(), lengths[0].tolist())
            remote = Selection.by_ranges(sides.remote, offsets[1].tolist(), lengths[1].tolist())
            assert (await stage.moves(sides, op, local, remote)).descriptors == 38

    @both_ways
    async def test_no_rows_at_all(self, op: Op) -> None:
        async with self.stage() as stage:
            sides = await stage.open((8, 64))
            local, remote = Selection.by_key(sides.region, np.s_[0:0]), Selection.by_key(sides.remote, np.s_[5:5])
            done = await stage.moves(sides, op, local, remote)
            assert (done.nbytes, done.descriptors) == (0, 0)

    @both_ways
    async def test_a_notification_without_rows(self, op: Op) -> None:
        self.need("notify")
        async with self.stage() as stage:
            sides = await stage.open((8, 64))
            await stage.post(op, sides.region[0:0], sides.remote[5:5], notify=b"nothing")
            await stage.target.expect(b"nothing", timeout=30)

    @both_ways
    async def test_odd_lengths_at_unaligned_offsets(self, op: Op) -> None:
        async with self.stage() as stage:
            sides = await stage.open((200_000,))
            random = np.random.default_rng(3)
            lengths = random.integers(1, 300, 500)
            room = np.cumsum(lengths + random.integers(0, 60, 500))
            here, there = room - lengths + 1, room - lengths + 7
            order = random.permutation(500)
            local = Selection.by_ranges(sides.region, here.tolist(), lengths.tolist())
            remote = Selection.by_ranges(sides.remote, there[order].tolist(), lengths[order].tolist())
            await stage.moves(sides, op, local, remote)

    @both_ways
    async def test_64_mebibytes_at_once(self, op: Op) -> None:
        nbytes = 64 << 20
        async with self.stage() as stage:
            sides = await stage.open((nbytes + 3,))
            # One byte off on one side: nothing may count on alignment where it is fastest.
            done = await stage.post(op, sides.region.bytes[2 : nbytes + 2], sides.remote.bytes[1 : nbytes + 1])
            assert done.nbytes == nbytes
            assert np.array_equal(sides.here[2 : nbytes + 2], (await sides.there())[1 : nbytes + 1])

    async def test_many_transfers_at_once_in_both_directions(self) -> None:
        async with self.stage() as stage:
            sides = await stage.open((400, 5000))
            here, there = sides.here.copy(), (await sides.there()).copy()
            order = np.random.default_rng(4).permutation(400).reshape(80, 5)
            posted = []
            for number, rows in enumerate(order):
                op: Op = "put" if number % 2 else "get"
                posted.append(stage.post(op, sides.region[rows], sides.remote[rows[::-1]]))
                if op == "put":
                    there[rows[::-1]] = here[rows]
                else:
                    here[rows] = there[rows[::-1]]
            done = await asyncio.gather(*posted)
            assert {d.nbytes for d in done} == {25_000}
            assert np.array_equal(sides.here, here)
            assert np.array_equal(await sides.there(), there)

    @both_ways
    async def test_a_plan_moves_what_is_there_now_each_time(self, op: Op) -> None:
        async with self.stage() as stage:
            sides = await stage.open((50, 1000))
            plan = stage.prepare(op, sides.region[::2], sides.remote[:25])
            for seed in range(3):
                await sides.fill(seed)
                await asyncio.gather(plan(), plan())
                assert np.array_equal(sides.here[::2], (await sides.there())[:25])

    @both_ways
    async def test_a_plan_of_some_rows_of_a_plan(self, op: Op) -> None:
        async with self.stage() as stage:
            sides = await stage.open((50, 1000))
            plan = stage.prepare(op, sides.region[:, :500], sides.remote[:, 500:])
            before = sides.here.copy(), (await sides.there()).copy()
            done = await plan.select([7, 3, 40], [0, 1, 49])()
            assert (done.nbytes, done.descriptors) == (1500, 3)
            assert done.backend == plan.backend
            source, written = (before[0][:, :500], before[1]) if op == "put" else (before[1][:, 500:], before[0])
            if op == "put":
                written[[0, 1, 49], 500:] = source[[7, 3, 40]]
            else:
                written[[7, 3, 40], :500] = source[[0, 1, 49]]
            assert np.array_equal(sides.here, before[0])
            assert np.array_equal(await sides.there(), before[1])
