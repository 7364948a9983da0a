"""The block store as its users see it: what is put is got, what has no room goes, and damage is told, not served."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import subprocess
import sys
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_bench import BLOCK, COUNT, Bench, bench_in, mounted, versions
from store_writer import block_of, key_of, version_of

import asyncxfer
from asyncxfer import AccessError, ClosedError, ConfigError, DescriptorError, XferError
from asyncxfer import store as stores
from asyncxfer._fast.blockindex import OPENED, BlockIndex, note, pack
from asyncxfer._fast.crc32c import crc32c
from asyncxfer.store import Store, StoreError, StoreFormatError, StoreFullError, StoreLockedError
from asyncxfer.store._format import JOURNAL, salt_of, write_head
from asyncxfer.store._recovery import Opened, read_identity

Open = Callable[..., AbstractAsyncContextManager[Store]]


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with bench_in(tmp_path / "store") as made:
        yield made


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    yield from mounted(tmp_path / "disk", "4m")


# ---- putting and getting --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("durability", ["none", "data", "full"])
@pytest.mark.parametrize("slab_blocks", [3, 1000])
async def test_what_is_put_is_got_here_and_after_reopening(bench: Bench, durability: str, slab_blocks: int) -> None:
    options = {"durability": durability, "slab_bytes": slab_blocks * BLOCK}
    async with bench.open(**options) as store:
        assert store.report.created
        await bench.put(store, versions(*range(20)))
        assert await bench.get(store, [5, 99, 19, 0]) == versions(5, 19, 0)
        assert len(store) == 20
    async with bench.open(**options) as store:
        assert (store.report.clean, store.report.blocks, store.report.healed) == (True, 20, False)
        assert await bench.get(store, list(range(30))) == versions(*range(20))
        assert store.stats()["hits"] == 20
        assert store.stats()["misses"] == 10
    slabs = list(bench.path.glob("slab-*"))
    assert len(slabs) == (7 if slab_blocks == 3 else 1)


async def test_rows_may_be_any_paged_memory(bench: Bench) -> None:
    """Keys and values of a block lie apart in every layer; the rows name them block by block, and nothing is copied."""
    kv = np.random.default_rng(1).integers(0, 256, (4, 10, 2, BLOCK // 8), np.uint8)  # layer, block, k/v, bytes
    async with (
        bench.agent.register(kv.transpose(1, 0, 2, 3)) as cache,
        bench.agent.allocate((3, BLOCK), np.uint8) as flat,
        bench.open() as store,
    ):
        await store.put([b"a", b"b", b"c"], cache[[7, 2, 4]])
        hits = await store.get([b"a", b"b", b"c"], flat[:])
        assert hits.tolist() == [True] * 3
        assert (flat.array == kv[:, [7, 2, 4]].swapaxes(0, 1).reshape(3, BLOCK)).all()
        before = kv.copy()
        kv[:, [1, 3, 5]] = 0
        hits = await store.get([b"c", b"nothing", b"a"], cache[[1, 3, 5]])
        assert hits.tolist() == [True, False, True]
        assert (kv[:, 1] == before[:, 4]).all()
        assert (kv[:, 3] == 0).all()
        assert (kv[:, 5] == before[:, 7]).all()


async def test_direct_stores_take_memory_of_any_alignment(bench: Bench) -> None:
    odd = np.random.default_rng(2).integers(0, 256, 5 * BLOCK + 1, np.uint8)
    async with bench.agent.register(odd) as region, bench.open(direct=True) as store:
        keys = [b"%d" % n for n in range(5)]
        await store.put(keys, region.bytes[1 : 1 + 5 * BLOCK])
        before = odd.copy()
        odd[:] = 0
        assert (await store.get(keys, region.bytes[1 : 1 + 5 * BLOCK])).all()
        assert (odd[1:] == before[1:]).all()


async def test_a_key_holds_what_was_put_last(bench: Bench) -> None:
    async with bench.open(budget=10 * BLOCK) as store:
        for version in range(1, 9):
            await bench.put(store, versions(1, 2, version=version))
            assert await bench.get(store, [1, 2]) == versions(1, 2, version=version)
        await bench.put(store, versions(1, version=99), replace=False)
        assert await bench.get(store, [1]) == versions(1, version=8)
        await bench.put(store, versions(1, 3, version=100), replace=False)
        assert await bench.get(store, [1, 3]) == {1: 8, 3: 100}
        bench.memory[0], bench.memory[1] = block_of(5, 1, BLOCK), block_of(5, 2, BLOCK)
        await store.put([key_of(5), key_of(5)], bench.region[:2])
        assert await bench.get(store, [5]) == {5: 2}
        assert len(store) == 4


async def test_deleted_blocks_are_gone_for_good(bench: Bench) -> None:
    async with bench.open() as store:
        await bench.put(store, versions(1, 2, 3), pin=True)
        assert (await store.delete([key_of(2), key_of(9), key_of(2)])).tolist() == [True, False, False]
        assert (await store.contains([key_of(1), key_of(2)])).tolist() == [True, False]
    async with bench.open() as store:
        assert await bench.get(store, [1, 2, 3]) == versions(1, 3)


async def test_large_batches_are_done_in_pieces(bench: Bench) -> None:
    keys = [b"%d" % n for n in range(10_000)]
    data = np.random.default_rng(3).integers(0, 256, (10_000, 16), np.uint8)
    back = np.zeros_like(data)
    async with (
        bench.agent.register(data) as source,
        bench.agent.register(back) as target,
        bench.open(block_bytes=16, slab_bytes=16 * 3000) as store,
    ):
        await store.put(keys, source[:])
        hits = await store.get(keys[::-1], target[:])
        assert hits.all()
        assert (back[::-1] == data).all()
        assert (await store.contains([*keys, b"x"])).tolist() == [True] * 10_000 + [False]
        with pytest.raises(DescriptorError, match=r"key 1 is int; .*counted from key 8192"):
            await store.contains([*keys[:8193], 7])  # type: ignore[list-item]


async def test_many_at_once(bench: Bench) -> None:
    async with bench.open(budget=40 * BLOCK, durability="data") as store:

        async def use(task: int) -> None:
            dice = random.Random(task)
            async with bench.agent.allocate((4, BLOCK), np.uint8) as region:
                for version in range(12):
                    numbers = dice.sample(range(task * 8, task * 8 + 8), 4)
                    for row, number in enumerate(numbers):
                        region.array[row] = block_of(number, version, BLOCK)
                    await store.put([key_of(number) for number in numbers], region[:])
                    hits = await store.get([key_of(number) for number in numbers], region[:])
                    for row, number in enumerate(numbers):
                        assert not hits[row] or version_of(number, region.array[row]) == version

        await asyncio.gather(*(use(task) for task in range(8)))
        assert len(store) <= 40
        assert store.stats()["evicted"] > 0


async def test_a_cancelled_put_leaves_nothing_half_done(bench: Bench) -> None:
    async with bench.open(budget=COUNT * BLOCK, durability="full") as store:
        for turn in range(12):
            numbers = list(range(turn * 5, turn * 5 + 5))
            for row, number in enumerate(numbers):
                bench.memory[row] = block_of(number, turn, BLOCK)
            putting = asyncio.ensure_future(store.put([key_of(n) for n in numbers], bench.region[:5]))
            for _ in range(turn):
                await asyncio.sleep(0)
            putting.cancel()
            await asyncio.wait([putting])
            found = await bench.get(store, numbers)
            assert set(found.values()) <= {turn}
        stats = store.stats()
    async with bench.open() as store:  # all that was taken and not used was given back
        await bench.put(store, versions(*range(100, 100 + COUNT // 2)))
        assert await bench.get(store, list(range(100, 100 + COUNT // 2))) == versions(*range(100, 100 + COUNT // 2))
    assert stats["damaged"] == 0


async def test_closing_waits_for_what_is_in_flight(bench: Bench) -> None:
    store = await bench.open(durability="data")
    bench.memory[0] = block_of(1, 1, BLOCK)
    putting = asyncio.ensure_future(store.put([key_of(1)], bench.region[0]))
    await asyncio.sleep(0)
    await store.aclose()
    assert putting.done()
    await putting
    await store.aclose()
    for call in (store.put, store.get):
        with pytest.raises(ClosedError, match="was closed"):
            await call([b"x"], bench.region[0])
    for other in (store.contains, store.delete, store.pin, store.unpin):
        with pytest.raises(ClosedError, match="was closed"):
            await other([b"x"])
    async with bench.open() as again:
        assert await bench.get(again, [1]) == versions(1)


# ---- room -----------------------------------------------------------------------------------------------------------


async def test_what_was_used_longest_ago_goes_first(bench: Bench) -> None:
    async with bench.open(budget=5 * BLOCK + 7) as store:
        assert store.stats()["limit"] == 5
        for number in range(5):
            await bench.put(store, versions(number))
        await bench.get(store, [0])
        await store.contains([key_of(1)])  # that is no use of it
        await bench.put(store, versions(10))
        assert await bench.get(store, [0, 1, 2, 3, 4, 10]) == versions(0, 2, 3, 4, 10)
        # Used together: of a sequence the end goes first.
        await bench.get(store, [3, 4, 10, 0, 2])
        await bench.put(store, versions(11, 12))
        assert await bench.get(store, [0, 2, 3, 4, 10, 11, 12]) == versions(3, 4, 10, 11, 12)
    async with bench.open(budget=5 * BLOCK) as store:  # and so it stays: what was used when is written down
        await bench.put(store, versions(20, 21, 22))
        assert set(await bench.get(store, [3, 4, 10, 11, 12, 20, 21, 22])) == {3, 4, 20, 21, 22}


async def test_pinned_blocks_stay(bench: Bench) -> None:
    async with bench.open(budget=4 * BLOCK) as store:
        await bench.put(store, versions(0, 1), pin=True)
        assert (await store.pin([key_of(0), key_of(7)])).tolist() == [True, False]
        for number in range(10, 20):
            await bench.put(store, versions(number))
        assert await bench.get(store, [0, 1]) == versions(0, 1)
        with pytest.raises(StoreFullError, match=r"of 4, 2 are pinned"):
            await bench.put(store, versions(30, 31, 32))
        assert (await store.unpin([key_of(0), key_of(1), key_of(1)])).tolist() == [True, True, False]
        await bench.put(store, versions(40, 41, 42))
        assert await bench.get(store, [0, 1, 40, 41, 42]) == versions(0, 40, 41, 42)  # pinned twice, unpinned once
        with pytest.raises(StoreFullError, match="do not fit the budget of 4"):
            await bench.put(store, versions(*range(5)))
    async with bench.open(budget=4 * BLOCK) as store:
        assert store.stats()["pinned"] == 0


async def test_blocks_of_one_prefix_lie_together(bench: Bench) -> None:
    async with bench.open(budget=1000 * BLOCK, slab_bytes=1000 * BLOCK) as store:
        for turn in range(10):
            for prefix in range(4):
                await bench.put(
                    store, versions(100 * prefix + 2 * turn, 100 * prefix + 2 * turn + 1), prefix=b"%d" % prefix
                )
    data = (bench.path / "slab-00000000").read_bytes()
    for prefix in range(4):
        places = [data.index(block_of(100 * prefix + n, 1, BLOCK).tobytes()) // BLOCK for n in range(20)]
        assert places == list(range(places[0], places[0] + 20))


async def test_a_smaller_budget_drops_what_has_no_room(bench: Bench) -> None:
    async with bench.open(slab_bytes=4 * BLOCK) as store:
        await bench.put(store, versions(*range(16)))
    async with bench.open(budget=6 * BLOCK) as store:
        assert (store.report.over_budget, store.report.blocks) == (10, 6)
        assert len(await bench.get(store, list(range(16)))) == 6
        await bench.put(store, versions(20))
        assert len(store) == 6
    assert sum(file.stat().st_size for file in bench.path.glob("slab-*")) == 8 * BLOCK
    async with bench.open(budget=16 * BLOCK) as store:
        await bench.put(store, versions(*range(30, 46)))
        assert await bench.get(store, list(range(30, 46))) == versions(*range(30, 46))


# ---- what is refused ------------------------------------------------------------------------------------------------


async def test_what_the_call_can_know_is_wrong(bench: Bench) -> None:
    async with bench.open() as store:
        for keys, rows in (([b"a"], bench.region[:2]), ([b"a", b"b"], bench.region[0])):
            for call in (store.put, store.get):
                with pytest.raises(DescriptorError, match="need rows of"):
                    await call(keys, rows)
        with pytest.raises(DescriptorError, match="key 0 has 0 bytes"):
            await store.put([b""], bench.region[0])
        with pytest.raises(DescriptorError, match="key 0 has 1025 bytes"):
            await store.get([b"x" * (stores.MAX_KEY_BYTES + 1)], bench.region[0])
        with pytest.raises(DescriptorError, match="expected descriptors"):
            await store.get([b"x"], bench.memory[0])
        frozen = np.zeros(BLOCK, np.uint8)
        frozen.setflags(write=False)
        async with bench.agent.register(frozen) as region:
            await store.put([b"zeros"], region[:])
            with pytest.raises(AccessError, match="read-only"):
                await store.get([b"zeros"], region[:])
        assert (await store.contains([b"zeros"])).all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"mode": "a"}, "mode is 'a'"),
        ({"durability": "some"}, "durability is 'some'"),
        ({"block_bytes": 0}, "block_bytes is 0"),
        ({"budget": -1}, "budget is -1"),
        ({"slab_bytes": 0}, "slab_bytes is 0"),
        ({"budget": 100}, "no room for a single block"),
        ({"path": "file://elsewhere/prefix"}, "no directory of this host"),
        ({"path": "s3://bucket/prefix"}, "slab_bytes= and direct= are for files"),
        ({"options": {"a": 1}}, "options= are for objects"),
        ({"path": ""}, "no path"),
    ],
)
async def test_wrong_options(bench: Bench, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        bench.open(**options)


async def test_what_is_no_store(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no store"):
        await bench.open(mode="r")
    with pytest.raises(StoreError, match="block_bytes= is needed"):
        await bench.open(block_bytes=None)
    file = tmp_path / "file"
    file.write_bytes(b"x")
    with pytest.raises(StoreError, match="cannot be opened"):
        await bench.open(path=file)
    async with bench.open(path=bench.path.as_uri()) as store:
        await bench.put(store, versions(1))
    with pytest.raises(StoreFormatError, match="holds blocks of 4,096 bytes, not of 8,192"):
        await bench.open(block_bytes=2 * BLOCK)
    with pytest.raises(StoreError, match="no room for a single block"):
        await bench.open(block_bytes=None, budget=100)
    head = bench.path / "store"
    kept = head.read_bytes()
    for damage, match in (
        (kept[:10], "not the head of a store"),
        (b"x" * 64, "not the head of a store"),
        (kept[:8] + b"\2" + kept[9:], "of version 2 of the format"),
        (kept[:20] + b"?" + kept[21:], "is damaged"),
    ):
        head.write_bytes(damage)
        with pytest.raises(StoreFormatError, match=match):
            await bench.open(mode="r")
    head.unlink()
    with pytest.raises(StoreFormatError, match="has files of a store"):
        await bench.open()
    head.write_bytes(kept)
    async with bench.open(block_bytes=None) as store:
        assert await bench.get(store, [1]) == versions(1)


async def test_a_store_has_one_writer(bench: Bench, loop_name: str) -> None:
    async with bench.open():
        with pytest.raises(StoreLockedError, match=f"in process {os.getpid()}"):
            await bench.open()
        environment = {**os.environ, "PYTHONPATH": str(Path(asyncxfer.__file__).parent.parent)}
        command = [sys.executable, str(Path(__file__).with_name("store_writer.py")), str(bench.path), "none"]
        command += ["1" if loop_name == "asyncio" else "2", str(BLOCK * 10)]
        ran = await asyncio.to_thread(subprocess.run, command, env=environment, capture_output=True, text=True)
        assert ran.returncode == 1
        assert f"StoreLockedError: {bench.path} is open for writing in process {os.getpid()}" in ran.stderr
    async with bench.open():
        pass


async def test_a_reader_cannot_write(bench: Bench) -> None:
    async with bench.open() as store:
        await bench.put(store, versions(1))
        async with bench.open(mode="r") as reader:
            for call in (reader.delete, reader.pin, reader.unpin):
                with pytest.raises(AccessError, match="mode 'w'"):
                    await call([key_of(1)])
            with pytest.raises(AccessError, match="mode 'w'"):
                await reader.put([key_of(1)], bench.region[0])
            with pytest.raises(AccessError, match="mode 'w'"):
                await reader.compact()


# ---- readers --------------------------------------------------------------------------------------------------------


async def test_readers_see_what_was_acknowledged(bench: Bench) -> None:
    async with bench.open(slab_bytes=4 * BLOCK, budget=50 * BLOCK) as store, bench.open(mode="r") as early:
        assert await bench.get(early, [1]) == {}
        for turn in range(40):
            await bench.put(store, versions(turn, turn + 1, version=turn))
            assert await bench.get(early, [turn, turn + 1]) == versions(turn, turn + 1, version=turn)
            if turn % 7 == 3:
                await store.compact()
            if turn % 10 == 9:
                async with bench.open(mode="r") as late:
                    assert len(late) == len(early) == len(store)
        await store.delete([key_of(5)])
        assert (await early.contains([key_of(5), key_of(6)])).tolist() == [False, True]
    async with bench.open(budget=50 * BLOCK) as store:
        await bench.put(store, versions(77))
        assert store.stats()["generation"] > 5


async def test_a_reader_is_never_given_a_block_that_was_overwritten(bench: Bench) -> None:
    """The writer gives blocks out again as fast as it can, under the reader's eyes."""
    dice = random.Random(4)
    async with bench.open(budget=8 * BLOCK, slab_bytes=3 * BLOCK) as store, bench.open(mode="r") as reader:
        writing = True

        async def write() -> None:
            nonlocal writing
            for turn in range(150):
                await bench.put(store, versions(*dice.sample(range(16), 4), version=turn))
                if turn % 40 == 39:
                    await store.compact()
            writing = False

        async def read() -> int:
            served = 0
            async with bench.agent.allocate((8, BLOCK), np.uint8) as region:
                while writing:
                    numbers = random.Random(served).sample(range(16), 8)
                    hits = await reader.get([key_of(number) for number in numbers], region[:])
                    for row, number in enumerate(numbers):
                        if hits[row]:
                            assert version_of(number, region.array[row]) is not None
                            served += 1
            return served

        _, *served = await asyncio.gather(write(), read(), read())
        assert min(served) > 0
        assert reader.stats()["damaged"] == 0


# ---- damage ---------------------------------------------------------------------------------------------------------


async def test_a_damaged_block_is_a_miss_and_then_gone(bench: Bench) -> None:
    async with bench.open() as store:
        await bench.put(store, versions(1, 2, 3))
        slab = bench.path / "slab-00000000"
        place = slab.read_bytes().index(block_of(2, 1, BLOCK).tobytes())
        with slab.open("r+b") as file:
            file.seek(place + 1000)
            file.write(b"damage")
        async with bench.open(mode="r") as reader:
            hits = await reader.get([key_of(2), key_of(3)], bench.region[:2])
            assert hits.tolist() == [False, True]
        hits = await store.get([key_of(1), key_of(2)], bench.region[:2])
        assert hits.tolist() == [True, False]
        assert store.stats()["damaged"] == 1
        assert (await store.contains([key_of(2)])).tolist() == [False]
        await bench.put(store, versions(2, version=5))
        assert await bench.get(store, [1, 2, 3]) == {1: 1, 2: 5, 3: 1}


async def test_a_lost_or_short_slab_costs_its_blocks(bench: Bench) -> None:
    async with bench.open(slab_bytes=4 * BLOCK) as store:
        await bench.put(store, versions(*range(12)))
    (bench.path / "slab-00000000").unlink()
    os.truncate(bench.path / "slab-00000002", BLOCK + 100)
    async with bench.open() as store:
        assert (store.report.lost_blocks, store.report.blocks) == (7, 5)
        assert "7 blocks lost with their slab" in str(store.report)
        assert await bench.get(store, list(range(12))) == versions(4, 5, 6, 7, 8)
        await bench.put(store, versions(*range(20, 30)))
        assert await bench.get(store, list(range(20, 30))) == versions(*range(20, 30))
    async with bench.open() as store:
        assert not store.report.healed


async def test_a_torn_journal_loses_only_what_was_torn(bench: Bench) -> None:
    async with bench.open() as store:
        await bench.put(store, versions(1, 2))
        (journal,) = bench.path.glob("journal-*")
        copy = bench.path.with_name("copy")
        shutil.copytree(bench.path, copy)  # as a kill at this moment leaves it
    for cut in (1, 63, 64, 65, 128, 190):
        torn = bench.path.with_name(f"torn-{cut}")
        shutil.copytree(copy, torn)
        data = journal_bytes(torn / journal.name)
        (torn / journal.name).write_bytes(data[:-cut])
        async with bench.open(path=torn) as store:
            kept = 2 - min(2, -(-cut // 64))
            assert (store.report.blocks, store.report.clean) == (kept, False)
            assert (0 < store.report.torn_bytes < 64) if cut % 64 else store.report.torn_bytes == 0
            assert await bench.get(store, [1, 2]) == versions(*(1, 2)[:kept])
            await bench.put(store, versions(3))
        async with bench.open(path=torn) as store:
            assert (store.report.blocks, store.report.healed) == (kept + 1, False)


@pytest.mark.parametrize(("durability", "dropped"), [(0, 1), (1, 0), (2, 0)])
async def test_what_nobody_can_check_does_not_outlive_a_power_loss(bench: Bench, durability: int, dropped: int) -> None:
    """A block from device memory has no checksum; where it was not synced and the machine went down, it goes."""
    async with bench.open() as store:
        await bench.put(store, versions(1, 2))
        copy = bench.path.with_name("copy")
        shutil.copytree(bench.path, copy)
    identity = await asyncio.to_thread(read_identity, copy)
    assert identity is not None
    salt, index, zero = salt_of(JOURNAL, identity, 1), BlockIndex(10), np.zeros(1, np.uint32)
    data = (copy / "slab-00000000").read_bytes()
    places = [np.array([data.index(block_of(number, 1, BLOCK).tobytes()) // BLOCK]) for number in (1, 2)]
    known = np.array([crc32c(block_of(1, 1, BLOCK).tobytes())], np.uint32)
    records = note(OPENED, 1, salt, Opened(b"another start of", 0, durability).encode())
    records += index.records_of_sets(pack([key_of(1)]), places[0], known, 2, salt)
    records += index.records_of_sets(pack([key_of(2)]), places[1], zero, 3, salt, unchecked=True)
    (copy / "journal-0000000000000001").write_bytes(write_head(JOURNAL, identity, 1) + records)
    async with bench.open(path=copy) as store:
        assert store.report.unverifiable_blocks == dropped
        assert await bench.get(store, [1, 2]) == versions(*(1, 2)[: 2 - dropped])
    async with bench.open(path=copy) as store:
        assert store.report.unverifiable_blocks == 0
        assert await bench.get(store, [1, 2]) == versions(*(1, 2)[: 2 - dropped])


def journal_bytes(path: Path) -> bytes:
    data = path.read_bytes().rstrip(b"\0")
    return data.ljust(-(-len(data) // 64) * 64, b"\0")


async def test_an_interrupted_compaction_is_cleared_up(bench: Bench) -> None:
    async with bench.open() as store:
        await bench.put(store, versions(1, 2))
        await store.compact()
        await bench.put(store, versions(3))
        shutil.copytree(bench.path, bench.path.with_name("copy"))
    copy = bench.path.with_name("copy")
    (generation,) = (int(path.name[-16:], 16) for path in copy.glob("journal-*"))
    (copy / f"snapshot-{generation + 1:016x}.new").write_bytes(b"half of it")
    (copy / f"journal-{generation + 1:016x}").write_bytes(b"")  # was about to be begun
    (copy / f"journal-{generation - 1:016x}").write_bytes(b"old")
    async with bench.open(path=copy) as store:
        assert store.report.blocks == 3
        assert len(store.report.leftovers) == 2
        assert "removed: " in str(store.report)
        await bench.put(store, versions(4))
        async with bench.open(path=copy, mode="r") as reader:
            assert await bench.get(reader, [1, 2, 3, 4]) == versions(1, 2, 3, 4)
    async with bench.open(path=copy) as store:
        assert await bench.get(store, [1, 2, 3, 4]) == versions(1, 2, 3, 4)


@pytest.mark.parametrize("mode", ["w", "r"])
async def test_no_damage_to_any_file_serves_a_wrong_block(bench: Bench, mode: stores.Mode) -> None:
    """Bytes flipped, cut, added, zeroed: opening ends with a store or a clear error, and what is served is right."""
    options = {"slab_bytes": 4 * BLOCK, "budget": 30 * BLOCK}
    async with bench.open(**options) as store:
        await bench.put(store, versions(*range(8)))
        await store.compact()
        await bench.put(store, versions(*range(4, 12), version=2))
        shutil.copytree(bench.path, bench.path.with_name("copy"))
    dice = random.Random(6)
    opened = 0
    refused: list[XferError] = []
    for _ in range(60):
        shutil.rmtree(bench.path)
        shutil.copytree(bench.path.with_name("copy"), bench.path)
        for _ in range(dice.choice((1, 1, 5))):
            damage(dice.choice(sorted(bench.path.iterdir())), dice)
        try:
            async with bench.open(mode=mode) as store:
                for number, version in (await bench.get(store, list(range(12)), damaged=True)).items():
                    assert version in ((1, 2) if number >= 4 else (1,))
                opened += 1
        except XferError as error:  # a reader finds a slab that has been cut when it reads it
            refused.append(error)
    assert opened > 20
    assert refused != []
    assert all(str(bench.path) in str(error) for error in refused)
    assert mode == "r" or all(isinstance(error, StoreError) for error in refused)


def damage(path: Path, dice: random.Random) -> None:
    data = bytearray(path.read_bytes())
    used = len(data.rstrip(b"\0")) or 1
    kind = dice.choice(("flip", "cut", "zero", "add", "shuffle"))
    at = dice.randrange(used)
    if kind == "flip":
        for _ in range(dice.choice((1, 8))):
            if data:
                data[dice.randrange(min(used, len(data)))] ^= dice.randrange(1, 256)
    elif kind == "cut":
        del data[at:]
    elif kind == "zero":
        data[at : at + 100] = bytes(len(data[at : at + 100]))
    elif kind == "add":
        data += dice.randbytes(dice.randrange(1, 300))
    else:
        data[at : at + 64], data[64:128] = data[64:128], data[at : at + 64]
    path.write_bytes(data)


# ---- a full disk ----------------------------------------------------------------------------------------------------


async def test_a_full_disk_loses_nothing_acknowledged(small_disk: Path, tmp_path: Path) -> None:
    async with bench_in(small_disk / "store") as bench:
        kept: dict[int, int] = {}
        async with bench.open(durability="data") as store:

            async def fill() -> None:
                for number in range(0, 4000, 16):
                    batch = versions(*range(number, number + 16))
                    await bench.put(store, batch)
                    kept.update(batch)

            with pytest.raises(StoreFullError, match=f"the disk under {bench.path} is full"):
                await fill()
            assert len(kept) > 300
            for start in range(0, len(kept), 32):
                numbers = list(kept)[start : start + 32]
                assert await bench.get(store, numbers) == versions(*numbers)
            gone = list(kept)[:64]
            assert (await store.delete([key_of(number) for number in gone])).all()
            await bench.put(store, versions(*range(9000, 9016)))  # where they were
            await bench.put(store, versions(*range(9016, 9032)))
        async with bench.open() as store:
            assert len(store) == len(kept) - 64 + 32
            assert await bench.get(store, list(range(9000, 9032))) == versions(*range(9000, 9032))
            for start in range(64, len(kept), 32):
                numbers = list(kept)[start : start + 32]
                assert await bench.get(store, numbers) == versions(*numbers)


async def test_a_disk_that_others_fill(small_disk: Path) -> None:
    async with bench_in(small_disk / "store") as bench:
        async with bench.open(budget=32 * BLOCK) as store:
            await bench.put(store, versions(*range(32)))
            with (small_disk / "other").open("wb", buffering=0) as other:
                while other.write(bytes(4096)) == 4096:
                    if os.statvfs(small_disk).f_bavail == 0:
                        break
            for version in range(2, 50):  # blocks are given out again without room of their own
                await bench.put(store, versions(*range(32), version=version))
            assert await bench.get(store, list(range(32))) == versions(*range(32), version=49)
        async with bench.open(budget=32 * BLOCK) as store:
            assert await bench.get(store, list(range(32))) == versions(*range(32), version=49)
        with pytest.raises(StoreFullError, match="No space"):
            await bench.open(path=small_disk / "another", budget=32 * BLOCK)


# ---- against a model ------------------------------------------------------------------------------------------------

numbers = st.lists(st.integers(0, 11), min_size=1, max_size=6, unique=True)
steps = st.one_of(
    st.tuples(st.just("put"), numbers),
    st.tuples(st.just("get"), numbers),
    st.tuples(st.just("delete"), numbers),
    st.tuples(st.just("contains"), numbers),
    st.tuples(st.just("reopen"), st.just([])),
    st.tuples(st.just("compact"), st.just([])),
)


class Model:
    """A dictionary with room for eight blocks, in the order of use."""

    def __init__(self) -> None:
        self.held: OrderedDict[int, int] = OrderedDict()

    def put(self, batch: dict[int, int]) -> None:
        # A put takes its blocks before it gives up what its keys held.
        while len(self.held) + len(batch) > 8:
            self.held.popitem(last=False)
        self.held.update(batch)
        self.use(list(batch))

    def use(self, used: list[int]) -> None:
        for number in reversed(used):
            if number in self.held:
                self.held.move_to_end(number)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(script=st.lists(steps, max_size=25))
async def test_it_is_a_dictionary_that_forgets(tmp_path_factory: pytest.TempPathFactory, script: list[Any]) -> None:
    model = Model()
    async with bench_in(tmp_path_factory.mktemp("model") / "store") as bench:
        options = {"budget": 8 * BLOCK, "slab_bytes": 3 * BLOCK}
        store = await bench.open(**options)
        reader = await bench.open(mode="r")
        for version, (what, named) in enumerate(script):
            if what == "put":
                batch = versions(*named, version=version)
                await bench.put(store, batch)
                model.put(batch)
            elif what == "get":
                expected = {number: model.held[number] for number in named if number in model.held}
                assert await bench.get(reader, named) == expected
                assert await bench.get(store, named) == expected
                model.use(named)
            elif what == "contains":
                expected_here = [number in model.held for number in named]
                assert (await store.contains([key_of(number) for number in named])).tolist() == expected_here
            elif what == "delete":
                expected_here = [number in model.held for number in named]
                assert (await store.delete([key_of(number) for number in named])).tolist() == expected_here
                for number in named:
                    model.held.pop(number, None)
            elif what == "compact":
                await store.compact()
            else:
                await store.aclose()
                store = await bench.open(**options)
                assert store.report.clean
            assert len(store) == len(model.held)
        await reader.aclose()
        await store.aclose()
