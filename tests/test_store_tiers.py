"""Memory over disk over objects, as their user sees it: found wherever it is, written back, within budgets."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from object_backend import STORED, MemBackend
from servers import S3Server
from store_bench import BLOCK, COUNT, Bench, versions
from store_writer import block_of, key_of, version_of
from test_store_objects import s3_options

from asyncxfer import Agent, ClosedError, ConfigError, ObjectError
from asyncxfer import store as stores
from asyncxfer.abc import Completion, Request
from asyncxfer.store import DiskStore, StoreError, StoreFullError, Tier, TieredStore
from asyncxfer.store._object_format import TRAILER_BYTES, name_of
from asyncxfer.store._objects import idents_of

URL = "mem://bucket/tiers"
MEMORY, DISK, OBJECTS = Tier.MEMORY, Tier.DISK, Tier.OBJECTS


class Gated(MemBackend):
    """Objects that can be out of reach, or slow to answer, and that tell how often they were asked."""

    name = "mem"
    failing: ClassVar[bool] = False
    open: ClassVar[threading.Event] = threading.Event()
    gets: ClassVar[int] = 0

    def submit(self, prepared: Request, completion: Completion, priority: int = 0) -> None:
        completion.post()
        if prepared.op == "get":
            type(self).gets += 1
        threading.Thread(target=self._carry_when_open, args=(prepared, completion)).start()

    def _carry_when_open(self, prepared: Request, completion: Completion) -> None:
        from object_backend import _carry

        assert self.open.wait(20)
        if self.failing:
            completion.fail(ObjectError("put of mem://bucket: out of reach", status=503))
        else:
            _carry(prepared, completion)


@pytest.fixture(autouse=True)
def gate() -> Iterator[type[Gated]]:
    """The objects, within reach at first."""
    Gated.failing, Gated.gets = False, 0
    Gated.open.set()
    yield Gated
    Gated.open.set()
    STORED.clear()


class TierBench(Bench):
    """An agent with memory, and a directory for the disk tier."""

    def tiered(self, **options: Any) -> stores.Opening[TieredStore]:
        given: dict[str, Any] = {"memory": 8 * BLOCK, "disk": self.path, "objects": URL, "block_bytes": BLOCK} | options
        return stores.tiered(agent=self.agent, **given)

    async def fetch(self, store: TieredStore, numbers: list[int]) -> list[Tier]:
        """Where numbered blocks are found; each that is found has to be right."""
        rows = np.arange(COUNT - len(numbers), COUNT)
        self.memory[rows] = 0xAB
        sources = await store.fetch([key_of(number) for number in numbers], self.region[rows])
        for row, source, number in zip(rows, sources, numbers, strict=True):
            if source:
                assert version_of(number, self.memory[row]) == 1
            else:
                assert (self.memory[row] == 0xAB).all()
        return [Tier(source) for source in sources.tolist()]


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[TierBench]:
    async with (
        Agent("bench", backends=["local", "uring", Gated]) as agent,
        agent.allocate((COUNT, BLOCK), np.uint8) as region,
    ):
        made = TierBench(agent, region, tmp_path / "store")
        yield made
        vars(made).clear()


def object_of(number: int) -> tuple[str, str]:
    return "bucket", "tiers/" + name_of(idents_of([key_of(number)])[0])


def objects_there() -> int:
    return len(STORED) - 1  # but for the head


async def until(true: Callable[[], bool]) -> None:
    """Wait for what goes on behind calls."""
    async with asyncio.timeout(20):
        while not true():  # noqa: ASYNC110 - promotion tells nobody
            await asyncio.sleep(0.001)


# ---- where blocks are found -----------------------------------------------------------------------------------------


async def test_blocks_go_down_and_are_found_where_they_are(bench: TierBench) -> None:
    async with bench.tiered() as store:
        await bench.put(store, versions(*range(20)))
        await store.flush()
        assert objects_there() == 20
        assert await bench.fetch(store, [0, 1, 7]) == [MEMORY] * 3  # of a call, the first are worth most
        assert await bench.fetch(store, [19, 99]) == [DISK, Tier.NOWHERE]
        hits = await store.get([key_of(18), key_of(77)], bench.region[:2])
        assert hits.tolist() == [True, False]
        assert (await store.contains([key_of(3), key_of(78), key_of(19)])).tolist() == [True, False, True]
        stats = store.stats()
        assert (stats["puts"], stats["uploaded"], stats["hits"], stats["misses"]) == (20, 20, 5, 2)
        assert (stats["pending"], stats["memory_blocks"], stats["disk_blocks"], len(store)) == (0, 8, 20, 20)
        assert store.counters[MEMORY].nbytes == 3 * BLOCK
        assert store.counters[DISK].seconds > 0
        assert "open" in repr(store)
    with pytest.raises(ClosedError):
        await store.flush()
    async with bench.tiered(memory=0) as store:
        assert store.report.clean
        assert await bench.fetch(store, [0, 19]) == [DISK, DISK]
    async with bench.tiered(disk=bench.path.with_name("other"), memory=0) as store:
        assert await bench.fetch(store, [0, 19, 20]) == [OBJECTS, OBJECTS, Tier.NOWHERE]


async def test_a_hit_is_promoted_behind_the_get(bench: TierBench) -> None:
    async with bench.tiered() as store:
        await bench.put(store, versions(*range(20)))
        await store.flush()
        assert await bench.fetch(store, [18, 19]) == [DISK, DISK]
        await until(lambda: store.stats()["promoted"] == 2)
        assert await bench.fetch(store, [18, 19]) == [MEMORY, MEMORY]
    async with bench.tiered(disk=bench.path.with_name("other")) as store:
        assert await bench.fetch(store, [5]) == [OBJECTS]
        await until(lambda: store.stats()["promoted"] == 1)
        assert await bench.fetch(store, [5]) == [MEMORY]
        assert (await store.disk.contains([key_of(5)])).all()
        assert store.stats()["pending"] == 0
    async with bench.tiered(disk=bench.path.with_name("other")) as store:  # which it is known to be an object by
        assert store.stats()["pending"] == 0


async def test_all_budgets_hold_whatever_goes_through(bench: TierBench) -> None:
    dice = random.Random(1)
    whole = BLOCK + TRAILER_BYTES
    async with bench.tiered(
        memory=4 * BLOCK, disk_budget=16 * BLOCK, objects_budget=40 * whole, backlog=6 * BLOCK
    ) as store:
        assert store.stats()["memory_bytes"] == 4 * BLOCK
        for start in range(0, 100, 10):
            await bench.put(store, versions(*range(start, start + 10)))
            await bench.fetch(store, dice.sample(range(start + 10), 8))
            stats = store.stats()
            assert stats["memory_blocks"] <= 4
            assert stats["disk_blocks"] <= 16
            assert stats["pending"] <= 6
            assert objects_there() <= 40
        await store.flush()
        assert objects_there() == 40
        found = await bench.fetch(store, list(range(90, 100)))
        assert all(found)


async def test_blocks_are_found_by_long_keys_and_twice_in_one_call(bench: TierBench) -> None:
    async with bench.tiered() as store:
        bench.memory[0], bench.memory[1] = block_of(0, 1, BLOCK), block_of(0, 1, BLOCK)
        await store.put([key_of(0), key_of(0)], bench.region[:2], prefix=b"p")
        await store.flush()
        assert await bench.fetch(store, [0, 0, 9, 0]) == [MEMORY, MEMORY, Tier.NOWHERE, MEMORY]
    async with bench.tiered(disk=bench.path.with_name("other"), memory=0) as store:
        assert await bench.fetch(store, [0, 0]) == [OBJECTS, OBJECTS]


async def test_many_who_want_a_block_share_one_fetch(bench: TierBench, gate: type[Gated]) -> None:
    async with bench.tiered() as store:
        await bench.put(store, versions(7))
        await store.flush()
    async with bench.tiered(disk=bench.path.with_name("other"), memory=0) as store:
        before = gate.gets
        gate.open.clear()
        gets = [asyncio.ensure_future(store.get([key_of(7)], bench.region[row])) for row in range(30)]
        await until(lambda: gate.gets > before)
        await asyncio.sleep(0.01)
        for get in gets[:10]:  # the one that began it, too
            get.cancel()
        gate.open.set()
        ended = await asyncio.gather(*gets, return_exceptions=True)
        assert all(isinstance(hits, asyncio.CancelledError) for hits in ended[:10])
        assert all(not isinstance(hits, BaseException) and hits.all() for hits in ended[10:])
        assert all(version_of(7, bench.memory[row]) == 1 for row in range(10, 30))
        assert gate.gets == before + 1
        assert store.stats()["shared"] == 29


# ---- write-back ----------------------------------------------------------------------------------------------------


async def test_write_back_goes_on_when_the_store_is_opened_again(bench: TierBench, gate: type[Gated]) -> None:
    async with bench.tiered() as store:
        await bench.put(store, versions(*range(5)))
        await store.flush()
        gate.failing = True
        await bench.put(store, versions(*range(5, 15)))
        with pytest.raises(StoreError, match=r"10 blocks are on disk and not yet objects of mem://.*out of reach"):
            await store.flush()
        assert store.stats()["pending"] == 10
        assert all(await bench.fetch(store, list(range(15))))
    assert objects_there() == 5
    gate.failing = False
    async with bench.tiered() as store:
        await store.flush()
        assert store.stats()["uploaded"] == 10
        assert objects_there() == 15
        assert store.disk.stats()["pinned"] == 0


@pytest.mark.parametrize("harm", ["gone", "empty", "torn", "flipped", "of other objects"])
async def test_without_its_note_all_of_the_disk_is_uploaded_again(bench: TierBench, harm: str) -> None:
    note = bench.path / "uploaded"
    async with bench.tiered() as store:
        await bench.put(store, versions(*range(12)))
        await store.flush()
    async with bench.tiered() as store:
        assert store.stats()["pending"] == 0
    data = bytearray(note.read_bytes())
    if harm == "gone":
        note.unlink()
    elif harm == "flipped":
        data[-1] ^= 1
    if harm != "gone":
        note.write_bytes({"empty": b"", "torn": bytes(data[:-3])}.get(harm, bytes(data)))
    url = "mem://bucket/elsewhere" if harm == "of other objects" else URL
    async with bench.tiered(objects=url) as store:
        assert store.stats()["pending"] == 12
        await store.flush()
        assert await bench.fetch(store, [0, 11]) == [DISK, DISK]
    async with bench.tiered(objects=url) as store:
        assert store.stats()["pending"] == 0


async def test_a_note_that_outlived_its_blocks_speaks_for_no_others(bench: TierBench, gate: type[Gated]) -> None:
    """As after the end of the machine, when the journal may have lost what the note has not."""
    async with bench.tiered() as store:
        await bench.put(store, versions(*range(6)))
        await store.flush()
    kept = (bench.path / "uploaded").read_bytes()
    for path in bench.path.iterdir():
        if path.name not in ("store", "uploaded"):
            path.unlink()
    STORED.clear()
    async with bench.tiered() as store:
        gate.open.clear()
        await bench.put(store, versions(*range(10, 16)))
        assert kept != (bench.path / "uploaded").read_bytes()
        gate.open.set()
        gate.failing = True
    gate.failing = False
    async with bench.tiered() as store:
        await store.flush()
        assert objects_there() == 6


async def test_the_line_is_bounded_and_puts_wait_in_it(bench: TierBench, gate: type[Gated]) -> None:
    async with bench.tiered(backlog=4 * BLOCK, uploads=2) as store:
        gate.open.clear()
        await bench.put(store, versions(0, 1, 2, 3))
        more = [asyncio.ensure_future(store.put([key_of(n)], bench.region[n])) for n in range(4, 9)]
        for number in range(4, 9):
            bench.memory[number] = block_of(number, 1, BLOCK)
        done, _ = await asyncio.wait(more, timeout=0.05)
        assert not done
        assert store.stats()["pending"] == 4
        more[1].cancel()
        gate.open.set()
        ended = await asyncio.gather(*more, return_exceptions=True)
        assert [error for error in ended if not isinstance(error, asyncio.CancelledError)] == [None] * 4
        await store.flush()
        assert objects_there() == 8


async def test_a_full_line_is_told_while_objects_are_out_of_reach(bench: TierBench, gate: type[Gated]) -> None:
    async with bench.tiered(backlog=4 * BLOCK) as store:
        gate.failing = True
        await bench.put(store, versions(0, 1, 2, 3))
        with pytest.raises(StoreFullError, match=r"4 blocks wait to become objects.*out of reach"):
            await bench.put(store, versions(4, 5))
        with pytest.raises(StoreFullError, match="out of reach"):
            await bench.put(store, versions(4, 5))
        assert await bench.fetch(store, [0, 3]) == [MEMORY, MEMORY]
        gate.failing = False
        await until(lambda: not store.stats()["pending"])
        await bench.put(store, versions(4, 5))
        await store.flush()
        assert objects_there() == 6


async def test_a_put_is_acknowledged_by_the_tier_that_was_chosen(bench: TierBench, gate: type[Gated]) -> None:
    async with bench.tiered(acknowledge="objects") as store:
        await bench.put(store, versions(*range(5)))
        assert objects_there() == 5
        gate.failing = True
        with pytest.raises(StoreError, match="not yet objects"):
            await bench.put(store, versions(5))
        gate.failing = False
        await until(lambda: not store.stats()["pending"])
        await bench.put(store, versions(5))
        assert objects_there() == 6
    async with bench.tiered(acknowledge="memory", disk=bench.path.with_name("m"), objects="mem://bucket/m") as store:
        await bench.put(store, versions(*range(12)))
        assert all(await bench.fetch(store, list(range(12))))
        await store.flush()
        assert store.stats()["disk_blocks"] == 12
    async with bench.tiered(disk=bench.path.with_name("m"), objects="mem://bucket/m") as store:
        assert await bench.fetch(store, list(range(12))) == [DISK] * 12


async def test_deleted_blocks_are_gone_from_all_tiers_for_good(bench: TierBench, gate: type[Gated]) -> None:
    async with bench.tiered() as store:
        await bench.put(store, versions(*range(6)))
        await store.flush()
        gate.open.clear()
        await bench.put(store, versions(*range(6, 12)))
        deleting = asyncio.ensure_future(store.delete([key_of(n) for n in (0, 5, 7, 11, 50)]))
        await asyncio.sleep(0.01)
        gate.open.set()
        assert (await deleting).tolist() == [True] * 4 + [False]
        await store.flush()
        there = [n for n in range(12) if n not in (0, 5, 7, 11)]
        assert objects_there() == len(there)
        assert [n for n, found in enumerate(await bench.fetch(store, list(range(12)))) if found] == there
        await bench.put(store, versions(0))
        gate.failing = True
        await bench.put(store, versions(7))
    gate.failing = False
    async with bench.tiered(memory=0) as store:
        await store.flush()
        found = await bench.fetch(store, list(range(12)))
        assert [n for n, source in enumerate(found) if source] == sorted([*there, 0, 7])
        assert object_of(0) in STORED
        assert object_of(7) in STORED
        assert store.disk.stats()["pinned"] == 0


async def test_pins_are_those_of_the_disk(bench: TierBench) -> None:
    async with bench.tiered(disk_budget=10 * BLOCK, memory=0) as store:
        await bench.put(store, versions(1, 2), pin=True)
        await store.flush()
        for start in range(10, 60, 5):
            await bench.put(store, versions(*range(start, start + 5)))
        assert await bench.fetch(store, [1, 2, 10]) == [DISK, DISK, OBJECTS]
        assert (await store.unpin([key_of(1), key_of(2)])).all()
        assert (await store.pin([key_of(1), key_of(99)])).tolist() == [True, False]
        await store.compact()


# ---- what goes wrong -----------------------------------------------------------------------------------------------


async def test_puts_and_gets_that_are_cancelled_leave_nothing_behind(bench: TierBench) -> None:
    dice = random.Random(3)
    numbers = list(range(COUNT // 2))
    for number in numbers:
        bench.memory[number] = block_of(number, 1, BLOCK)
    keys = [key_of(number) for number in numbers]
    async with bench.tiered(disk_budget=100 * BLOCK, backlog=20 * BLOCK) as store:
        for _ in range(30):
            putting = dice.random() < 0.5
            rows = bench.region[: COUNT // 2] if putting else bench.region[COUNT // 2 :]
            task = asyncio.ensure_future(store.put(keys, rows) if putting else store.get(keys, rows))
            await asyncio.sleep(dice.choice((0, 0.0002, 0.002)))
            task.cancel()
            await asyncio.wait([task])
        await store.put(keys, bench.region[numbers])
        await store.flush()
        assert objects_there() == len(numbers)
        assert store.disk.stats()["pinned"] == 0
        assert all(await bench.fetch(store, numbers))


async def test_a_block_damaged_on_disk_before_it_is_an_object_is_told(bench: TierBench, gate: type[Gated]) -> None:
    told: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["message"]))
    async with bench.tiered() as store:
        gate.failing = True
        await bench.put(store, versions(1))
        damage(bench.path)
        gate.failing = False
        await until(lambda: not store.stats()["pending"])
        assert store.stats()["lost"] == 0  # memory had it
        assert await bench.fetch(store, [1]) == [MEMORY]
        assert object_of(1) in STORED
    other: dict[str, Any] = {"memory": 0, "disk": bench.path.with_name("other"), "objects": "mem://bucket/other"}
    async with bench.tiered(**other) as store:
        gate.failing = True
        await bench.put(store, versions(2))
    gate.failing = False
    damage(other["disk"])
    async with bench.tiered(**other) as store:
        await store.flush()
        assert store.stats()["lost"] == 1
        assert await bench.fetch(store, [2]) == [Tier.NOWHERE]
    assert len(told) == 1
    assert "proved damaged before it was an object" in told[0]


def damage(path: Path) -> None:
    """Write to each of the first blocks of a slab."""
    with next(path.glob("slab-*")).open("r+b") as file:
        for block in range(8):
            file.seek(block * BLOCK + 100)
            file.write(b"damage")


async def test_a_damaged_object_is_a_miss_and_replaced_by_the_next_put(bench: TierBench) -> None:
    async with bench.tiered() as store:
        await bench.put(store, versions(1))
        await store.flush()
    good = STORED[object_of(1)]
    STORED[object_of(1)] = good[:50] + b"x" + good[51:]
    async with bench.tiered(disk=bench.path.with_name("other")) as store:
        assert await bench.fetch(store, [1]) == [Tier.NOWHERE]
        assert store.stats()["damaged"] == 1
        await bench.put(store, versions(1))
        await store.flush()
    assert STORED[object_of(1)] == good


async def test_an_object_store_out_of_reach_is_an_error_and_no_miss(bench: TierBench, gate: type[Gated]) -> None:
    async with bench.tiered() as store:
        await bench.put(store, versions(1))
        gate.failing = True
        assert await bench.fetch(store, [1]) == [MEMORY]
        STORED[object_of(9)] = bytes(BLOCK + TRAILER_BYTES)
        with pytest.raises(ObjectError, match="out of reach"):
            await bench.fetch(store, [1, 9])


async def test_a_full_disk_is_told(bench: TierBench) -> None:
    async with bench.tiered(disk_budget=8 * BLOCK, memory=0) as store:
        await bench.put(store, versions(*range(8)), pin=True)
        with pytest.raises(StoreFullError):
            await bench.put(store, versions(8))
        await store.flush()
        assert objects_there() == 8


async def test_stores_that_are_open_already_are_left_open(bench: TierBench) -> None:
    async with (
        stores.open(bench.path, agent=bench.agent, block_bytes=BLOCK) as disk,
        stores.open(URL, agent=bench.agent, block_bytes=BLOCK) as objects,
    ):
        async with bench.tiered(disk=disk, objects=objects) as store:
            await bench.put(store, versions(1))
            assert store.disk is disk
        assert (await disk.contains([key_of(1)])).all()
        assert isinstance(disk, DiskStore)
        await objects.contains([key_of(1)])
        async with stores.open(bench.path.with_name("r"), agent=bench.agent, block_bytes=512) as small:
            with pytest.raises(StoreError, match="holds blocks of 4,096 bytes, not of 512"):
                await bench.tiered(disk=small, objects=URL)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"acknowledge": "nobody"}, "expected one of 'memory', 'disk', 'objects'"),
        ({"memory": -1}, "memory is -1"),
        ({"uploads": 0}, "uploads is 0"),
        ({"backlog": 0}, "backlog is 0"),
        ({"disk": URL}, "disk is 'mem://bucket/tiers'"),
        ({"objects": "/tmp/somewhere"}, "objects is '/tmp/somewhere'"),
    ],
)
async def test_wrong_options(bench: TierBench, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        await bench.tiered(**options)


async def test_wrong_calls(bench: TierBench) -> None:
    async with bench.tiered() as store:
        with pytest.raises(StoreError, match="names of content"):
            await store.put([b"a"], bench.region[0], replace=True)
    with pytest.raises(StoreError, match="holds blocks of 4,096 bytes"):
        await bench.tiered(block_bytes=512, disk=bench.path.with_name("other"))


async def test_tiers_over_seaweedfs(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    async with (
        Agent("bench", backends=["local", "uring", "s3"]) as agent,
        agent.allocate((COUNT, BLOCK), np.uint8) as region,
    ):
        bench = TierBench(agent, region, tmp_path / "store")
        options = {"objects": f"s3://{bucket}/tiers", "options": s3_options(s3), "disk_budget": 20 * BLOCK}
        async with bench.tiered(**options) as store:
            for start in range(0, 60, 10):
                await bench.put(store, versions(*range(start, start + 10)))
            await store.flush()
            found = await bench.fetch(store, list(range(60)))
            assert set(found) == {MEMORY, DISK, OBJECTS}
            assert (await store.delete([key_of(0), key_of(70)])).tolist() == [True, False]
        async with bench.tiered(**options | {"disk": tmp_path / "other", "memory": 0}) as store:
            assert await bench.fetch(store, list(range(60))) == [Tier.NOWHERE] + [OBJECTS] * 59
        vars(bench).clear()
