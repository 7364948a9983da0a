"""What may go wrong under a block store: files that are missing or cannot be written, half writes, cancelled calls."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest
from store_bench import BLOCK, Bench, bench_in, mounted, versions
from store_writer import block_of, key_of, version_of

from asyncxfer._fast.blockindex import NEXT, BlockIndex, note, pack
from asyncxfer.store import StoreError, StoreFullError
from asyncxfer.store._format import JOURNAL, Identity, journal_name, salt_of, slab_name, snapshot_name, write_head
from asyncxfer.store._recovery import Follower, read_identity
from asyncxfer.store._report import Report


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with bench_in(tmp_path / "store") as made:
        yield made


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    yield from mounted(tmp_path / "disk", "8m")


# ---- calls that fail, or are given up -------------------------------------------------------------------------------


async def test_puts_at_the_same_time_into_a_store_that_was_removed(bench: Bench) -> None:
    """They wait for one and the same slab, whose failure is each one's."""
    async with bench.open() as store:
        shutil.rmtree(bench.path)
        puts = (store.put([key_of(number)], bench.region[number]) for number in range(4))
        outcomes = await asyncio.gather(*puts, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [StoreError] * 4
        assert "slab-00000000 cannot be made: No such file" in str(outcomes[3])
        assert await bench.get(store, [0, 1]) == {}


async def test_a_journal_that_cannot_be_written_leaves_nobody_waiting(bench: Bench) -> None:
    async with bench.open(budget=4 * BLOCK) as store:
        await bench.put(store, versions(0, 1))
        await bench.get(store, [0])
    store = await bench.open(budget=4 * BLOCK)
    make_unwritable(bench.path / journal_name(2))
    puts = [bench.put(store, versions(*range(first, first + 4))) for first in (10, 20, 30)]
    others = [store.delete([key_of(1)]), store.compact(), *puts]
    outcomes = await asyncio.gather(*others, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {StoreError}
    assert any("cannot be written" in str(outcome) for outcome in outcomes)
    with pytest.raises(StoreError, match="open the store again"):
        await bench.put(store, versions(40))
    assert await bench.get(store, [10, 40]) == {}
    with pytest.raises(StoreError):
        await store.aclose()
    async with bench.open(budget=4 * BLOCK) as again:
        assert await bench.get(again, [0, 1, 10]) == versions(0, 1)
        await bench.put(again, versions(10))


def make_unwritable(path: Path) -> None:
    """Have this process's open file under that path be one that can only be read."""
    (fd,) = (int(fd) for fd in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{fd}") == str(path))
    readable = os.open(path, os.O_RDONLY)
    os.dup2(readable, fd, inheritable=False)
    os.close(readable)


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8, 13, 40])
async def test_opening_can_be_cancelled_while_it_heals(bench: Bench, turns: int) -> None:
    async with bench.open() as store:
        await bench.put(store, versions(1, 2, 3))
        copy = bench.path.with_name("copy")
        shutil.copytree(bench.path, copy)
    with (copy / journal_name(1)).open("r+b") as journal:
        journal.seek(64 + 64 + 10)  # the first put
        journal.write(b"damage")

    async def use() -> None:
        async with bench.open(path=copy) as store:
            assert store.report.damaged_records == 1

    using = asyncio.ensure_future(use())
    for _ in range(turns):
        await asyncio.sleep(0.0005)
    using.cancel()
    await asyncio.wait([using])
    async with bench.open(path=copy) as store:
        assert await bench.get(store, [1, 2, 3]) == versions(2, 3)


async def test_closing_can_be_cancelled_and_is_done_first(bench: Bench) -> None:
    store = await bench.open()
    await bench.put(store, versions(1, 2, 3))
    closing = asyncio.ensure_future(store.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    async with bench.open() as store:
        assert await bench.get(store, [1, 2, 3]) == versions(1, 2, 3)


async def test_calls_that_run_out_of_time_leave_no_block_behind(bench: Bench) -> None:
    """Whatever they were at: afterwards the whole budget can be put again, and all of it is got."""
    async with bench.open(budget=32 * BLOCK, slab_bytes=5 * BLOCK, durability="data") as store:

        async def use(task: int) -> int:
            dice = random.Random(task)
            ended = 0
            async with bench.agent.allocate((8, BLOCK), np.uint8) as rows:
                for _ in range(30):
                    keys = [key_of(number) for number in dice.sample(range(60), 8)]
                    calls = (
                        store.put(keys, rows[:], prefix=b"%d" % task),
                        store.put(keys, rows[:], replace=False),
                        store.get(keys, rows[:]),
                        store.delete(keys),
                        store.compact(),
                    )
                    chosen = dice.randrange(len(calls))
                    for number, call in enumerate(calls):
                        if number != chosen:
                            call.close()
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(calls[chosen], 0.008 * dice.random())
                        ended += 1
            return ended

        assert sum(await asyncio.gather(*(use(task) for task in range(4)))) < 4 * 30
        await bench.put(store, versions(*range(100, 132)))
        assert await bench.get(store, list(range(100, 132))) == versions(*range(100, 132))
        assert store.stats()["damaged"] == 0


async def test_blocks_deleted_and_replaced_while_they_are_read(bench: Bench) -> None:
    """A block that a get holds is not given out anew before it ends, whatever becomes of its key."""
    dice = random.Random(8)
    async with bench.open(budget=24 * BLOCK, direct=True) as store, bench.agent.allocate((12, BLOCK), np.uint8) as rows:
        served = 0
        for version in range(60):
            await bench.put(store, versions(*range(12), version=version))
            getting = asyncio.ensure_future(store.get([key_of(number) for number in range(12)], rows[:]))
            for _ in range(dice.randrange(3)):
                await asyncio.sleep(0)
            await asyncio.gather(
                store.delete([key_of(number) for number in dice.sample(range(12), 6)]),
                bench.put(store, versions(*dice.sample(range(12), 6), version=1000 + version)),
            )
            for number, hit in enumerate(await getting):
                if hit:
                    assert version_of(number, rows.array[number]) in (version, 1000 + version)
                    served += 1
        assert served > 100
        assert store.stats()["damaged"] == 0


@pytest.mark.parametrize("block_bytes", [1000, 4097, 12288])
@pytest.mark.parametrize("direct", [False, True])
async def test_blocks_of_any_size(bench: Bench, block_bytes: int, direct: bool) -> None:
    options = {"block_bytes": block_bytes, "slab_bytes": 5 * block_bytes + 1, "direct": direct}
    keys = [key_of(number) for number in range(12)]
    async with bench.agent.allocate((12, block_bytes), np.uint8) as rows:
        async with bench.open(**options) as store:
            for number in range(12):
                rows.array[number] = block_of(number, 1, block_bytes)
            await store.put(keys, rows[:])
            rows.array[:] = 0
        async with bench.open(**options) as store:
            assert (await store.get(keys[::-1], rows[::-1])).all()
            assert [version_of(number, rows.array[number]) for number in range(12)] == [1] * 12


async def test_a_full_journal_costs_no_more_than_it_has_to(small_disk: Path) -> None:
    """Where not even giving up blocks can be recorded, each put fails, and none of them evicts yet more."""
    count = 20_000
    keys = [b"%d" % number for number in range(count)]
    async with bench_in(small_disk / "store") as bench, bench.agent.allocate((count, 16), np.uint8) as rows:
        async with bench.open(block_bytes=16, slab_bytes=count * 16, budget=count * 16) as store:
            await store.put(keys, rows[:])
            with (small_disk / "other").open("wb", buffering=0) as other:
                while os.statvfs(small_disk).f_bavail > 0:
                    other.write(bytes(4096))
            async with bench.open(mode="r") as reader:
                left = []
                for _ in range(12):
                    try:
                        await store.put([b"new " + key for key in keys[:4096]], rows[:4096])
                    except StoreFullError:
                        left.append(len(store))
                assert len(left) > 4
                assert left[-1] == left[1]
                (small_disk / "other").unlink()
                await store.put([b"new " + key for key in keys[:4096]], rows[:4096])
                assert (await reader.contains([b"new " + key for key in keys[:4096]])).all()
                assert (await reader.contains(keys)).tolist() == (await store.contains(keys)).tolist()
        async with bench.open(block_bytes=16) as again:
            assert (await again.contains([b"new " + key for key in keys[:4096]])).all()


async def test_a_compaction_on_a_full_disk(small_disk: Path) -> None:
    async with bench_in(small_disk / "store") as bench:
        async with bench.open() as store:
            await bench.put(store, versions(*range(32)))
            with (small_disk / "other").open("wb", buffering=0) as other:
                while os.statvfs(small_disk).f_bavail > 0:
                    other.write(bytes(4096))
            with pytest.raises(StoreFullError, match="No space left"):
                await store.compact()
            assert store.stats()["generation"] == 1
            assert list(bench.path.glob("*.new")) == []
            assert await bench.get(store, list(range(32))) == versions(*range(32))
            (small_disk / "other").unlink()
            await bench.put(store, versions(40))
            await store.compact()
            assert store.stats()["generation"] == 2
        async with bench.open() as again:
            assert not again.report.healed
            assert await bench.get(again, [0, 31, 40]) == versions(0, 31, 40)


# ---- files that are missing -----------------------------------------------------------------------------------------


async def copy_of(bench: Bench, *, compacted: bool) -> tuple[Path, Identity]:
    """A copy of a store of three blocks, as a kill leaves it, with generation 1 or 2."""
    copy = bench.path.with_name("copy")
    async with bench.open() as store:
        await bench.put(store, versions(1, 2))
        if compacted:
            await store.compact()
        await bench.put(store, versions(3))
        shutil.copytree(bench.path, copy)
    identity = await asyncio.to_thread(read_identity, copy)
    assert identity is not None
    return copy, identity


async def test_a_journal_whose_successor_was_lost(bench: Bench) -> None:
    """The machine went down in a compaction, and of the new journal there is nothing. Readers wait for the writer."""
    copy, identity = await copy_of(bench, compacted=False)
    journal = copy / journal_name(1)
    data = journal.read_bytes().rstrip(b"\0")
    data = data.ljust(-(-len(data) // 64) * 64, b"\0") + note(NEXT, 1000, salt_of(JOURNAL, identity, 1), b"")
    journal.write_bytes(data)
    async with bench.open(path=copy, mode="r") as reader:
        assert await bench.get(reader, [1, 2, 3]) == versions(1, 2, 3)
        async with bench.open(path=copy) as store:
            assert store.report.damaged_files == [journal_name(2)]
            assert "missing: journal-0000000000000002" in str(store.report)
            await bench.put(store, versions(4))
            assert await bench.get(reader, [1, 2, 3, 4]) == versions(1, 2, 3, 4)
    async with bench.open(path=copy) as store:
        assert not store.report.healed
        assert await bench.get(store, [1, 2, 3, 4]) == versions(1, 2, 3, 4)


@pytest.mark.parametrize("lost", ["journal", "snapshot"])
async def test_a_lost_file_costs_what_only_it_knew(bench: Bench, lost: str) -> None:
    copy, _ = await copy_of(bench, compacted=True)
    name, kept = (journal_name(2), [1, 2]) if lost == "journal" else (snapshot_name(2), [3])
    (copy / name).unlink()
    if lost == "journal":
        with pytest.raises(StoreError, match="its journal could not be found"):
            await bench.open(path=copy, mode="r")
    else:
        async with bench.open(path=copy, mode="r") as reader:
            assert await bench.get(reader, [1, 2, 3]) == versions(*kept)
    async with bench.open(path=copy) as store:
        assert store.report.damaged_files == [name]
        assert store.report.healed
        assert await bench.get(store, [1, 2, 3]) == versions(*kept)
        async with bench.open(path=copy, mode="r") as reader:
            await bench.put(store, versions(5))
            assert await bench.get(reader, [1, 2, 3, 5]) == versions(*kept, 5)
    async with bench.open(path=copy) as store:
        assert not store.report.healed


async def test_the_last_slab_lost(bench: Bench) -> None:
    async with bench.open(slab_bytes=2 * BLOCK) as store:
        await bench.put(store, versions(*range(5)))
    (bench.path / slab_name(2)).unlink()
    async with bench.open() as store:
        assert store.report.healed
        assert await bench.get(store, list(range(5))) == versions(*range(4))
        await bench.put(store, versions(7))
        assert await bench.get(store, [4, 7]) == versions(7)
    async with bench.open() as store:
        assert await bench.get(store, [4, 7]) == versions(7)
        assert not store.report.healed


async def test_files_of_others_are_left_alone(bench: Bench) -> None:
    async with bench.open() as store:
        await bench.put(store, versions(1))
    (bench.path / "notes.new").write_text("mine")
    async with bench.open() as store:
        assert store.report.leftovers == []
    assert (bench.path / "notes.new").read_text() == "mine"


# ---- what a reader finds in a journal -------------------------------------------------------------------------------


class Written:
    """A journal written by hand, and a reader of it."""

    def __init__(self, directory: Path) -> None:
        self.identity = Identity(bytes(range(16)), 16, 100_000)
        self.path = directory / journal_name(1)
        self.salt = salt_of(JOURNAL, self.identity, 1)
        self.path.write_bytes(write_head(JOURNAL, self.identity, 1).ljust(2_000_000, b"\0"))
        (directory / slab_name(0)).touch()
        self.reader = Follower(directory, self.identity)

    def write(self, at: int, keys: list[bytes]) -> None:
        """Write records from number `at` on: of each key, in the block of that number."""
        numbers = np.arange(at, at + len(keys))
        index = BlockIndex(1_000_000)
        records = index.records_of_sets(pack(keys), numbers, np.zeros(len(keys), np.uint32), 100 + at, self.salt)
        with self.path.open("r+b") as file:
            file.seek(64 + 64 * at)
            file.write(records)

    def follow(self) -> None:
        """Read what has come, as a store does."""
        more = self.reader.glance()
        while more is not False:
            more = self.reader.read_some()

    def has(self, *keys: bytes) -> list[bool]:
        found: list[bool] = self.reader.index.contains(pack(keys)).tolist()
        return found


@pytest.fixture
def written(tmp_path: Path) -> Iterator[Written]:
    made = Written(tmp_path)
    made.write(0, [b"first", b"second"])
    made.reader.open(Report())
    yield made
    made.reader.close()
    vars(made).clear()  # pytest keeps the value of a fixture, and with it the index


def test_a_reader_sees_what_is_written_where_something_was_taken_back(written: Written) -> None:
    written.write(2, [b"not acknowledged"] * 3)
    written.follow()
    with written.path.open("r+b") as file:  # the disk is full: it is taken back, and later something else goes there
        file.seek(64 * 3)
        file.write(bytes(64 * 3))
    written.write(2, [b"third", b"fourth"])
    written.follow()
    assert written.has(b"first", b"second", b"third", b"fourth", b"not acknowledged") == [True] * 4 + [False]


def test_a_reader_passes_a_record_of_zeros(written: Written) -> None:
    written.write(3, [b"%d" % number for number in range(5000)])  # number 2 is damaged, or was never written
    written.follow()
    assert written.has(b"first", b"0", b"4999") == [True] * 3
    assert written.reader.damaged == 1


@pytest.mark.parametrize("count", [1, 61, 62, 63, 64, 125, 126, 127, 4096])
def test_a_reader_reads_all_there_is_however_much_it_is(written: Written, count: int) -> None:
    keys = [b"%d" % number for number in range(count)]
    written.write(2, keys)
    written.follow()
    assert written.has(*keys) == [True] * count
    written.write(2 + count, [b"one more"])
    written.follow()
    assert written.has(b"one more") == [True]
