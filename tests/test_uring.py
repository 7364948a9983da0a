"""Backend ``uring``: the ring and the threads, through the page cache and past it, and what can go wrong with them."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from asyncxfer import Agent, Config, NoRouteError, Region, TransferError, TransferTimeout
from asyncxfer._fast import fileio, uring
from asyncxfer._fast.descriptors import from_arrays, pair
from asyncxfer._fast.filework import FileWork, OpenFile
from asyncxfer._files import Durability
from asyncxfer.abc import File
from asyncxfer.backends.uring import UringBackend
from asyncxfer.testing import FileContract

ROUNDS = int(os.environ.get("FAULT_ROUNDS", "10"))
NBYTES = 4 << 20

needs_ring = pytest.mark.skipif(uring.refusal() is not None, reason=f"no ring: {uring.refusal()}")
both_ways = pytest.mark.parametrize("via", [pytest.param("ring", marks=needs_ring), "threads"])


@needs_ring
class TestTheRing(FileContract):
    """Past the page cache, and down to the device."""

    route = "uring:ring"
    direct = True
    durability = "data"


class TestThreads(FileContract):
    """Through the page cache."""

    route = "uring:threads"


def aligned(nbytes: int) -> npt.NDArray[np.uint8]:
    """Memory that begins with a page."""
    space = np.zeros(nbytes + 4096, np.uint8)
    start = -space.ctypes.data % 4096
    return space[start : start + nbytes]


# ---- what is made of rows -----------------------------------------------------------------------------------------


class Words:
    """Failures as tuples."""

    def too_short(self, offset: int, expected: int, found: int) -> BaseException:
        return EOFError((offset, expected, found))

    def failed(self, op: str, errno: int, *, offset: int = 0, nbytes: int = 0) -> BaseException:
        return OSError(errno, f"{op} {offset} {nbytes}")


def work(
    there: list[tuple[int, int]], here: list[int], *, write: bool = False, direct: bool = False, most: int = 1 << 20
) -> FileWork:
    """What rows (offset, length) of a file make with offsets in a memory that begins at 0."""
    with open(os.devnull, "rb") as file:
        opened = OpenFile(
            Words(), file.fileno(), 1 if direct else -1, alignment=512, memory_alignment=512, durability="none"
        )
    lengths = np.array([length for _, length in there], np.uint64)
    memory = from_arrays(np.array(here, np.uint64), lengths)
    rows = from_arrays(np.array([offset for offset, _ in there], np.uint64), lengths)
    pairs = pair(memory, rows, merge=True)
    return FileWork(pairs, np.zeros(1, np.uint64), opened, local=False, write=write, request_bytes=most)


@pytest.mark.parametrize("shuffled", [False, True])
def test_rows_that_follow_one_another_in_the_file_are_few_requests(shuffled: bool) -> None:
    order = np.random.default_rng(1)
    there = np.arange(16_384) * 16_384
    here = order.permutation(16_384) * 16_384
    if shuffled:
        there = order.permutation(there)
    made = work([(int(offset), 16_384) for offset in there], here.tolist())
    assert made.requests == (256, 0)
    assert made.nbytes == 256 << 20
    assert made.ends()[-1] == 256 << 20


def test_a_request_has_as_many_pieces_as_the_kernel_takes() -> None:
    made = work([(i * 16, 16) for i in range(5000)], [i * 32 for i in range(5000)])
    assert made.requests == (5, 0)


def test_what_is_aligned_goes_past_the_page_cache_and_its_ends_do_not() -> None:
    assert work([(0, 8192)], [0], direct=True).requests == (0, 1)
    assert work([(100, 8192)], [100], direct=True).requests == (2, 1)
    assert work([(100, 8192)], [612], direct=True).requests == (2, 1)
    assert work([(100, 8192)], [101], direct=True).requests == (1, 0)
    assert work([(0, 511)], [0], direct=True).requests == (1, 0)
    assert work([(512, 512)], [0], direct=True).requests == (0, 1)
    assert work([(512, 512)], [0], direct=True, write=True).requests == (1, 0)  # a part of a page is written through
    assert work([(0, 4 << 20)], [0], direct=True).requests == (0, 4)


def test_pieces_end_where_their_rows_do_in_the_stream() -> None:
    made = work([(9000, 3), (0, 5000), (5000, 4000)], [0, 10_000, 20_000], most=4096)
    ends = made.ends().tolist()
    assert ends[0] == 3
    assert {5003, 9003} <= set(ends)
    assert ends == sorted(ends)


# ---- any rows, any way --------------------------------------------------------------------------------------------


def some_rows(random: np.random.Generator, nbytes: int) -> npt.NDArray[np.int64]:
    """Rows (offset, length) that do not overlap, in any order."""
    unit = int(random.choice([1, 100, 512, 4096, 16_384]))
    bounds = np.unique(random.integers(0, nbytes // unit + 1, int(random.integers(2, 120)))) * unit
    rows = np.stack([bounds[:-1], np.diff(bounds)], axis=1)
    if random.random() < 0.5:
        rows = rows[::2]
    return random.permutation(rows) if random.random() < 0.6 else rows


async def one_of_any_kind(
    agent: Agent, via: str, model: bytearray, files: list[Region], random: np.random.Generator
) -> None:
    """Move some rows one way or the other, and keep book of what has to be where."""
    file = files[int(random.integers(len(files)))]
    there = some_rows(random, NBYTES)
    here = np.zeros_like(there)
    order = random.permutation(len(there))
    here[order] = np.stack([np.cumsum(there[order, 1]) - there[order, 1], there[order, 1]], axis=1)
    memory = aligned(NBYTES + 4096)
    memory[...] = random.integers(0, 256, len(memory), np.uint8)
    start = int(random.choice([0, 1, 512]))
    before = memory.copy()
    async with agent.register(memory[start : start + NBYTES]) as region:
        read, local = random.random() < 0.5, random.random() < 0.5
        sides = region.rows(here), file.rows(there)
        first, second = reversed(sides) if local else sides
        post = agent.get if read != local else agent.put
        await post(first, second, backend=f"uring:{via}")
    for (at, length), (offset, _) in zip(here + np.array([start, 0]), there, strict=True):
        if read:
            before[at : at + length] = np.frombuffer(model, np.uint8)[offset : offset + length]
        else:
            model[offset : offset + length] = before[at : at + length].tobytes()
    assert np.array_equal(memory, before)


@both_ways
async def test_any_rows_arrive(via: str, tmp_path: Path) -> None:
    random = np.random.default_rng(7)
    model = bytearray(NBYTES)
    path = tmp_path / "file"
    async with Agent("a", config={"chunk_bytes": 65_536}) as agent, contextlib.AsyncExitStack() as stack:
        files = [
            await stack.enter_async_context(agent.open(path, "w", size=NBYTES, direct=direct, durability=durability))
            for direct in (False, True)
            for durability in ("none", "data", "full")
        ]
        for _ in range(5 * ROUNDS):
            await one_of_any_kind(agent, via, model, files, random)
            assert await asyncio.to_thread(path.read_bytes) == model


@both_ways
async def test_an_alignment_that_is_not_enough(via: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    data = np.random.default_rng(2).integers(0, 256, NBYTES, np.uint8)
    memory = aligned(NBYTES)
    backend = UringBackend(Config())
    async with Agent("a", backends=[backend]) as agent, agent.open(path, "w", size=NBYTES, direct=True) as file:
        owner = file.memory.owner
        assert isinstance(owner, File)
        owner.alignment = owner.memory_alignment = 1  # as where a file system does not say
        file.registrations["uring"] = backend.register(file.memory)
        memory[...] = data
        async with agent.register(memory) as region:
            odd = [(at, 10_000) for at in range(5, NBYTES - 10_000, 10_000)]
            await agent.put(region.rows(odd), file.rows(odd), backend=f"uring:{via}")
            memory[...] = 0
            await agent.get(region.rows(odd[::-1]), file.rows(odd[::-1]), backend=f"uring:{via}")
        assert np.array_equal(memory[5 : odd[-1][0]], data[5 : odd[-1][0]])


@both_ways
async def test_many_small_writes_at_once(via: str, tmp_path: Path) -> None:
    data = np.random.default_rng(3).integers(0, 256, (2000, 1000), np.uint8)
    async with (
        Agent("a", config={"inline_bytes": 0}) as agent,
        agent.open(tmp_path / "file", "w", shape=data.shape) as file,
        agent.open(tmp_path / "other", "w", shape=data.shape, durability="data") as other,
        agent.register(data) as region,
    ):
        backend = f"uring:{via}"
        order = np.random.default_rng(4).permutation(len(data))
        posted = [agent.put(region[i], file[i], backend=backend, priority=int(i) % 3 - 1) for i in order]
        posted += [agent.put(region[i], other[i], backend=backend) for i in order[:50]]
        for transfer in posted:
            await transfer
        assert (tmp_path / "file").read_bytes() == data.tobytes()


# ---- by way of a stage --------------------------------------------------------------------------------------------

PIECE, PIECES = 16_384, 256


def scattered() -> npt.NDArray[np.int64]:
    """Rows of memory, in an order in which no two lie side by side."""
    order = np.random.default_rng(6).permutation(PIECES)
    return np.stack([order * 2 * PIECE, np.full(PIECES, PIECE)], axis=1)


def in_a_row(start: int = 0) -> npt.NDArray[np.int64]:
    """As many rows of a file, side by side."""
    return np.stack([start + np.arange(PIECES) * PIECE, np.full(PIECES, PIECE)], axis=1)


def gathered(memory: npt.NDArray[np.uint8]) -> bytes:
    """What the file holds once the scattered rows of a memory have been put there."""
    return b"".join(memory[at : at + length].tobytes() for at, length in scattered())


@both_ways
async def test_small_pieces_arrive_however_many(via: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    random = np.random.default_rng(8)
    async with (
        Agent("a") as agent,
        agent.allocate(2 * PIECE * PIECES, "uint8") as memory,
        agent.open(path, "w", size=16 * PIECE * PIECES, direct=True, durability="data") as file,
    ):
        expected = bytearray()
        posted = []
        memory.array[:] = random.integers(0, 256, memory.nbytes, np.uint8)
        for copy in range(16):  # more than there are stages
            there = in_a_row(copy * PIECE * PIECES)
            posted.append(agent.put(memory.rows(scattered()), file.rows(there), backend=f"uring:{via}"))
            expected += gathered(memory.array)
        for transfer in posted:
            await transfer
        assert await asyncio.to_thread(path.read_bytes) == expected
        memory.array[:] = 0
        for copy in (3, 7):
            there = in_a_row(copy * PIECE * PIECES)
            await agent.get(memory.rows(scattered()), file.rows(there), backend=f"uring:{via}")
            assert gathered(memory.array) == expected[: PIECE * PIECES]


def played(file: Region) -> None:
    """Have the backend take a file's device for one that a hypervisor plays."""
    owner = file.memory.owner
    assert isinstance(owner, File)
    registration: Any = file.registrations["uring"]
    registration.file = OpenFile(
        owner,
        owner.fd,
        owner.direct_fd,
        alignment=owner.alignment,
        memory_alignment=owner.memory_alignment,
        durability=owner.durability,
        emulated=True,
    )


@needs_ring
@pytest.mark.parametrize("advice", [mmap.MADV_HUGEPAGE, mmap.MADV_NOHUGEPAGE], ids=["huge", "small"])
async def test_large_rows_of_a_device_that_a_hypervisor_plays(advice: int, tmp_path: Path) -> None:
    path, nbytes = tmp_path / "file", 40 << 20  # more than there are stages
    space = mmap.mmap(-1, 2 * nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    space.madvise(advice)
    memory = np.frombuffer(space, np.uint8)
    memory[:nbytes] = np.random.default_rng(4).integers(0, 256, nbytes, np.uint8)
    async with (
        Agent("a") as agent,
        agent.register(memory) as region,
        agent.open(path, "w", size=nbytes, direct=True) as file,
    ):
        played(file)
        await agent.put(region[:nbytes], file[:], backend="uring:ring")
        assert await asyncio.to_thread(path.read_bytes) == memory[:nbytes].tobytes()
        await agent.get(region[nbytes:], file[:], backend="uring:ring")
        assert (memory[nbytes:] == memory[:nbytes]).all()
        os.truncate(path, nbytes - 36_864)
        with pytest.raises(TransferError, match=r"expected at offset .* found: the file is shorter") as caught:
            await agent.get(region[nbytes:], file[:], backend="uring:ring")
        assert str(path) in str(caught.value)


@needs_ring
@pytest.mark.parametrize("op", ["put", "get"])
async def test_large_rows_of_memory_that_goes_away(op: str, tmp_path: Path) -> None:
    path, mapped = tmp_path / "file", tmp_path / "mapped"
    path.write_bytes(b"\1" * NBYTES)
    mapped.write_bytes(b"\2" * NBYTES)
    memory = np.memmap(mapped, np.uint8, "r+")
    async with Agent("a") as agent, agent.register(memory) as region, agent.open(path, "r+", direct=True) as file:
        played(file)
        call = agent.put if op == "put" else agent.get
        os.truncate(mapped, NBYTES // 2)
        with pytest.raises(TransferError, match="went away"):
            await call(region[:], file[:], backend="uring:ring")
        await call(region[: NBYTES // 2], file[: NBYTES // 2], backend="uring:ring")
        assert mapped.read_bytes() == path.read_bytes()[: NBYTES // 2]


@contextlib.contextmanager
def files_end_at(nbytes: int) -> Iterator[None]:
    """For this process: what is written across it is written in part."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@both_ways
@pytest.mark.parametrize("limit", [80 * PIECE, 80 * PIECE + 100], ids=["aligned", "odd"])
async def test_a_short_write_goes_on_where_it_ended(via: str, limit: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    async with (
        Agent("a") as agent,
        agent.allocate(2 * PIECE * PIECES, "uint8") as memory,
        agent.open(path, "w", size=PIECE * PIECES, direct=True) as file,
    ):
        memory.array[:] = np.random.default_rng(9).integers(1, 256, memory.nbytes, np.uint8)
        rows = memory.rows(scattered()[:128]), file.rows(in_a_row()[:128])
        with files_end_at(limit), pytest.raises(TransferError, match="File too large") as caught:
            await agent.put(*rows, backend=f"uring:{via}")
        assert f"write of 16,384 bytes at offset 1,310,720): '{path}'" in str(caught.value)
        assert await asyncio.to_thread(path.read_bytes) == gathered(memory.array)[:limit].ljust(file.nbytes, b"\0")
        await agent.put(*rows, backend=f"uring:{via}")
        assert (await asyncio.to_thread(path.read_bytes))[: 128 * PIECE] == gathered(memory.array)[: 128 * PIECE]


@both_ways
@pytest.mark.parametrize("op", ["put", "get"])
async def test_memory_that_goes_away_under_a_stage(via: str, op: str, tmp_path: Path) -> None:
    path, mapped = tmp_path / "file", tmp_path / "mapped"
    path.write_bytes(b"\1" * PIECE * PIECES)
    mapped.write_bytes(b"\2" * 2 * PIECE * PIECES)
    memory = np.memmap(mapped, np.uint8, "r+")
    async with (
        Agent("a") as agent,
        agent.register(memory) as region,
        agent.open(path, "r+", direct=True) as file,
    ):
        call = agent.put if op == "put" else agent.get
        os.truncate(mapped, PIECE)
        for _ in range(10):  # so often that stages would run out if they were not given back
            with pytest.raises(TransferError, match="went away"):
                await call(region.rows(scattered()), file.rows(in_a_row()), backend=f"uring:{via}")
        os.truncate(mapped, 2 * PIECE * PIECES)
        memory[:] = np.random.default_rng(1).integers(0, 256, len(memory), np.uint8)
        await agent.put(region.rows(scattered()), file.rows(in_a_row()), backend=f"uring:{via}")
        assert path.read_bytes() == gathered(memory)


@both_ways
async def test_puts_of_small_pieces_that_end_early(via: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    async with (
        Agent("a") as agent,
        agent.allocate(2 * PIECE * PIECES, "uint8") as memory,
        agent.open(path, "w", size=PIECE * PIECES, direct=True, durability="data") as file,
    ):
        plan = agent.prepare("put", memory.rows(scattered()), file.rows(in_a_row()), backend=f"uring:{via}")
        for at in range(2 * ROUNDS):
            posted = [plan(timeout=0.001 if at % 2 else None) for _ in range(12)]
            if at % 4:
                await asyncio.sleep(0)
            for transfer in posted[at % 3 :]:
                transfer.cancel()
            for transfer in posted:
                with contextlib.suppress(TransferTimeout, asyncio.CancelledError):
                    await transfer
            memory.array[:] = np.random.default_rng(at).integers(0, 256, memory.nbytes, np.uint8)
            await plan()
            assert await asyncio.to_thread(path.read_bytes) == gathered(memory.array)


# ---- within the call that posts -----------------------------------------------------------------------------------


@pytest.fixture
def cached(tmp_path: Path) -> tuple[Path, bytes]:
    """A file of 1 MiB that is in the page cache and on the device, and what it has."""
    path, data = tmp_path / "cached", np.random.default_rng(5).integers(0, 256, 1 << 20, np.uint8).tobytes()
    path.write_bytes(data)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        file.read()
    return path, data


def forget(path: Path) -> None:
    """Have the page cache let go of a file, which may take it more than one asking."""
    with path.open("rb") as file, contextlib.suppress(BlockingIOError):
        while True:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            os.preadv(file.fileno(), [bytearray(1)], 500_000, os.RWF_NOWAIT)


async def test_a_small_read_from_the_page_cache_ends_in_the_call(cached: tuple[Path, bytes]) -> None:
    path, data = cached
    memory = np.zeros(16_384, np.uint8)
    async with Agent("a") as agent, agent.open(path) as file, agent.register(memory) as region:
        transfer = agent.get(region[:], file[16_384:32_768])
        assert transfer.inlined
        await transfer
        assert memory.tobytes() == data[16_384:32_768]


async def test_what_is_not_in_the_page_cache_is_not_waited_for(cached: tuple[Path, bytes]) -> None:
    path, data = cached
    memory = np.zeros(16_384, np.uint8)
    async with Agent("a") as agent, agent.open(path) as file, agent.register(memory) as region:
        forget(path)
        transfer = agent.get(region[:], file[500_000:516_384])
        assert not transfer.inlined
        await transfer
        assert memory.tobytes() == data[500_000:516_384]


async def test_many_small_reads_do_not_hold_up_the_loop(cached: tuple[Path, bytes]) -> None:
    path, data = cached
    memory = np.zeros(16_384, np.uint8)
    async with Agent("a") as agent, agent.open(path) as file, agent.register(memory) as region:
        plan = agent.prepare("get", region[:], file[:16_384])
        posted = [plan() for _ in range(5000)]
        assert posted[0].inlined
        assert not posted[-1].inlined  # some have taken so long together that the others were left to threads
        for transfer in posted:
            await transfer
        assert plan().inlined  # the loop has turned since
        assert memory.tobytes() == data[:16_384]


def seen(path: Path) -> int | None:
    """How much of a file this process has looked at through its view of it: bytes; None where it has none."""
    maps = Path("/proc/self/smaps").read_text().split("\n")
    at = next((i for i, line in enumerate(maps) if line.endswith(f" {path}")), None)
    if at is None:
        return None
    return next(int(line.split()[1]) * 1024 for line in maps[at:] if line.startswith("Rss:"))


async def test_what_the_page_cache_has_is_copied_from_a_view_of_the_file(tmp_path: Path) -> None:
    path, data = tmp_path / "file", np.random.default_rng(1).integers(0, 256, NBYTES, np.uint8)
    path.write_bytes(data.tobytes())
    memory, rows = np.zeros(NBYTES, np.uint8), np.random.default_rng(2).permutation(NBYTES // 16_384) * 16_384
    async with Agent("a") as agent, agent.register(memory) as region:
        async with agent.open(path) as file:
            assert seen(path) == 0
            await agent.get(region[:], file[:])
            assert seen(path) == NBYTES
            assert np.array_equal(memory, data)
            memory[...] = 0
            await agent.get(region.descriptors(rows, 16_384), file.descriptors(rows, 16_384))
            assert np.array_equal(memory, data)
            plan = agent.prepare("get", region[:], file[:])
        assert seen(path) is None, "a plan that is kept keeps the file in use"
        del plan


@needs_ring
async def test_what_the_page_cache_does_not_have_is_left_to_the_ring(tmp_path: Path) -> None:
    path, data = tmp_path / "file", np.random.default_rng(1).integers(0, 256, NBYTES, np.uint8)
    path.write_bytes(data.tobytes())
    with path.open("rb") as file:
        os.fsync(file.fileno())
    memory = np.zeros(1 << 20, np.uint8)  # one request: what is read ahead for it would be there for the next
    async with Agent("a") as agent, agent.open(path) as opened, agent.register(memory) as region:
        forget(path)
        await agent.get(region[:], opened[: memory.size], backend="uring:ring")
        assert seen(path) == 0
        assert np.array_equal(memory, data[: memory.size])


STRANGER = """
import asyncio, os, sys
import numpy as np
from asyncxfer import Agent

async def main(path):
    memory = np.zeros(os.path.getsize(path), np.uint8)
    async with Agent("a") as agent, agent.open(path) as file, agent.register(memory) as region:
        with open(path, "rb") as plain:
            expected = plain.read()
        await agent.get(region[:], file[:])
        assert memory.tobytes() == expected

asyncio.run(main(sys.argv[1]))  # what is imported only now may not be readable later
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
asyncio.run(main(sys.argv[1]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="to become somebody else needs root")
def test_a_file_of_which_the_page_cache_may_not_be_told(tmp_path: Path) -> None:
    path = Path(tempfile.mkdtemp(dir="/tmp")) / "file"  # tmp_path is its owner's alone
    try:
        path.parent.chmod(0o755)
        path.write_bytes(np.random.default_rng(1).bytes(NBYTES))
        path.chmod(0o644)
        done = subprocess.run(
            [sys.executable, "-c", STRANGER, str(path)], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
    finally:
        shutil.rmtree(path.parent)


# ---- what can go wrong --------------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("direct", [False, True])
async def test_truncation_under_a_transfer(via: str, direct: bool, tmp_path: Path) -> None:
    path = tmp_path / "file"
    data = np.random.default_rng(1).integers(1, 256, NBYTES, np.uint8)
    memory = aligned(NBYTES)
    ends: list[str] = []
    async with (
        Agent("a") as agent,
        agent.open(path, "w", size=NBYTES, direct=direct) as file,
        agent.register(memory) as region,
    ):
        for at in range(ROUNDS):
            path.write_bytes(data.tobytes())
            memory[...] = 0
            transfer = agent.get(region[:], file[:], backend=f"uring:{via}")
            await asyncio.to_thread(os.truncate, path, NBYTES * at // ROUNDS)
            try:
                await transfer
            except TransferError as error:
                ends.append(str(error))
            else:
                assert np.array_equal(memory, data)
        with pytest.raises(TransferError, match=f"{path}: .* bytes expected at offset .* found"):
            await agent.get(region[:], file[:], backend=f"uring:{via}")
    assert all(f"{path}: " in end for end in ends)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    if os.geteuid():
        pytest.skip("mounting a file system needs root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "small", tmp_path], check=True)
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@both_ways
async def test_a_full_disk(via: str, small: Path) -> None:
    path, memory = small / "file", np.ones(NBYTES, np.uint8)
    async with (
        Agent("a") as agent,
        agent.register(memory) as region,
        agent.open(path, "w", size=NBYTES) as file,
    ):
        with pytest.raises(TransferError, match=f"offset .*{path}") as caught:
            await agent.put(region[:], file[:], backend=f"uring:{via}")
        assert "No space left" in str(caught.value)
        await agent.put(region[: 1 << 18], file[: 1 << 18], backend=f"uring:{via}")


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A file system on a device, with room for about two mebibytes."""
    if os.geteuid():
        pytest.skip("mounting a file system needs root")
    image, folder = tmp_path / "image", tmp_path / "mounted"
    folder.mkdir()
    image.write_bytes(b"")
    os.truncate(image, 8 << 20)
    try:
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", "-N", "16", "-O", "^has_journal", image], check=True)
        subprocess.run(["mount", "-o", "loop", image, folder], check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("there are no loop devices here, or no ext4")
    with (folder / "filler").open("wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize - (2 << 20))
    yield folder
    subprocess.run(["umount", folder], check=True)


@both_ways
async def test_a_full_disk_past_the_page_cache(via: str, full: Path) -> None:
    path = full / "file"
    async with (
        Agent("a") as agent,
        agent.allocate(2 * PIECE * PIECES, "uint8") as memory,
        agent.open(path, "w", size=PIECE * PIECES, direct=True) as file,  # sparse: it fits
    ):
        memory.array[:] = np.random.default_rng(9).integers(1, 256, memory.nbytes, np.uint8)
        with pytest.raises(TransferError, match=f"write of 16,384 bytes at offset .*{path}") as caught:
            await agent.put(memory.rows(scattered()), file.rows(in_a_row()), backend=f"uring:{via}")
        assert "No space left" in str(caught.value)
        (full / "filler").unlink()
        await agent.put(memory.rows(scattered()), file.rows(in_a_row()), backend=f"uring:{via}")
        assert await asyncio.to_thread(path.read_bytes) == gathered(memory.array)


@pytest.fixture
def hollow(small: Path) -> Iterator[Path]:
    """A block device of four mebibytes, of which one can be written."""
    image = small / "image"
    image.write_bytes(b"")
    os.truncate(image, NBYTES)
    try:
        made = subprocess.run(["losetup", "--find", "--show", image], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("there are no loop devices here")
    device = made.stdout.strip()
    yield Path(device)
    subprocess.run(["losetup", "--detach", device], check=True)


@both_ways
@pytest.mark.parametrize("durability", ["data", "full"])
async def test_a_sync_that_fails(via: str, durability: Durability, hollow: Path) -> None:
    async with (
        Agent("a") as agent,
        agent.register(np.ones(NBYTES, np.uint8)) as region,
        agent.open(hollow, "r+", durability=durability) as file,
    ):
        with pytest.raises(TransferError, match=rf"(Input/output error|No space left on device) \(sync\): '{hollow}'"):
            await agent.put(region[:], file[:], backend=f"uring:{via}")


@both_ways
@pytest.mark.parametrize("direct", [False, True])
async def test_a_descriptor_that_was_closed(via: str, direct: bool, tmp_path: Path) -> None:
    path = tmp_path / "file"
    async with Agent("a") as agent, agent.register(aligned(NBYTES)) as region:
        file = await agent.open(path, "w", size=NBYTES, direct=direct)
        owner = file.memory.owner
        fds = [fd for fd in (owner.fd, owner.direct_fd) if fd >= 0]  # type: ignore[attr-defined]
        kept = [os.dup(fd) for fd in fds]
        useless = os.open(path, os.O_PATH)  # what it names cannot be read, and no other file gets the number
        for fd in fds:
            os.dup2(useless, fd)
        for post in (agent.get, agent.put):
            with pytest.raises(TransferError, match=f"{path}") as caught:
                await post(region[:], file[:], backend=f"uring:{via}")
            assert "Bad file descriptor" in str(caught.value)
        for fd, copy in zip(fds, kept, strict=True):
            os.dup2(copy, fd)
            os.close(copy)
        os.close(useless)
        await agent.put(region[:], file[:], backend=f"uring:{via}")
        await file.aclose()


@pytest.fixture
def interrupted() -> Iterator[None]:
    """A signal every half a millisecond."""
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@both_ways
@pytest.mark.usefixtures("interrupted")
async def test_signals_change_nothing(via: str, tmp_path: Path) -> None:
    data = aligned(16 << 20)
    data[...] = np.random.default_rng(1).integers(0, 256, len(data), np.uint8)
    back = aligned(len(data))
    async with (
        Agent("a") as agent,
        agent.open(tmp_path / "file", "w", size=len(data), direct=True, durability="data") as file,
        agent.register(data) as region,
        agent.register(back) as there,
    ):
        for _ in range(3):
            back[...] = 0
            await agent.put(region[:], file[:], backend=f"uring:{via}")
            await agent.get(there[:], file[:], backend=f"uring:{via}")
            assert np.array_equal(back, data)


@both_ways
async def test_no_buffer_is_touched_after_the_end(via: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\x01" * (32 << 20))
    memory = aligned(32 << 20)
    async with Agent("a") as agent, agent.open(path, direct=True) as file, agent.register(memory) as region:
        for at in range(ROUNDS):
            forget(path)
            transfer = agent.get(region[:], file[:], backend=f"uring:{via}", timeout=None if at % 2 else 0.002)
            if at % 2:
                await asyncio.sleep(0.0005 * at)
                transfer.cancel()
            with contextlib.suppress(TransferTimeout, asyncio.CancelledError):
                await transfer
            memory[...] = 2
            other = agent.get(region[:4096], file[:4096], backend=f"uring:{via}")  # so that the ring turns
            await other
            assert (memory[4096:] == 2).all()


# ---- where io_uring is forbidden, and forks -----------------------------------------------------------------------

# A filter by which io_uring_setup fails with EPERM: load its number, compare, refuse or allow. See seccomp(2).
FORBID = """
import ctypes, struct
program = b"".join(struct.pack("HBBI", *line) for line in (
    (0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)))
text = ctypes.create_string_buffer(program)
filter_ = ctypes.create_string_buffer(struct.pack("HxxxxxxP", 4, ctypes.addressof(text)))
libc = ctypes.CDLL(None, use_errno=True)
def forbid():
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, filter_, 0, 0) == 0, ctypes.get_errno()
"""

WITHOUT = """
import asyncio, sys
import numpy as np
from asyncxfer import Agent, Config, NoRouteError
from asyncxfer.backends.uring import UringBackend
from asyncxfer import Config

async def main(path, late):
    if not late:
        forbid()
        print(UringBackend.examine(Config()))
        print(*UringBackend.details(Config()))
    data = np.arange(1 << 20).astype(np.uint8)
    memory = data.copy()
    async with Agent("a") as agent, agent.register(memory) as region:
        async with agent.open(path, "w", size=1 << 20, direct=True, durability="data") as file:
            if late:
                forbid()
            await agent.put(region[:], file[:])
            memory[...] = 0
            await agent.get(region[:], file[:])
            assert (memory == data).all()
            print(agent.explain("put", region[:], file[:]))
            try:
                await agent.put(region[:], file[:], backend="uring:ring")
            except NoRouteError as error:
                print(error)

asyncio.run(main(sys.argv[1], sys.argv[2] == "late"))
"""


def without_the_ring(tmp_path: Path, when: str) -> str:
    """Run an agent where io_uring is forbidden from some time on; what it says."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORBID + WITHOUT), str(tmp_path / "file"), when],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_where_io_uring_is_forbidden_threads_do_it_and_say_why(tmp_path: Path) -> None:
    told = without_the_ring(tmp_path, "early")
    assert told.count("Operation not permitted (forbidden by") == 3
    assert "-> uring:threads" in told


@needs_ring
def test_a_ring_that_cannot_be_made_after_all_is_done_without(tmp_path: Path) -> None:
    assert "-> uring:ring" in without_the_ring(tmp_path, "late")


FORKED = """
import asyncio, os, sys, traceback
import numpy as np
from asyncxfer import Agent
from asyncxfer._fast import uring

def rings():
    paths = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return [path for path in paths if os.path.lexists(path) and "io_uring" in os.readlink(path)]

async def use(name, busy):
    data = np.random.default_rng(1).integers(0, 256, 4 << 20, np.uint8)
    memory = data.copy()
    async with Agent(name) as agent, agent.register(memory) as region:
        path = os.path.join(sys.argv[1], name)
        async with agent.open(path, "w", size=data.size, direct=True, durability="data") as file:
            await agent.put(region[:], file[:], backend="uring:ring")
            memory[...] = 0
            posted = [agent.get(region[:], file[:], backend="uring:ring") for _ in range(8)]
            status = busy()
            for transfer in posted:
                await transfer
            assert (memory == data).all()
            assert uring.running() and len(rings()) == 1
    return status

def fork():
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    try:
        assert not uring.running() and not rings()
        asyncio._set_running_loop(None)
        asyncio.run(use("child", int))
        os._exit(0)
    finally:
        traceback.print_exc()
        os._exit(1)

status = asyncio.run(use("parent", fork))
assert not uring.running()
print(status)
"""


@needs_ring
def test_a_fork_while_the_ring_is_busy(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


BROKEN = """
import asyncio, os, sys
import numpy as np
from asyncxfer import Agent, TransferError

def paths(folder, name):
    here = [f"/proc/self/{folder}/{each}" for each in os.listdir(f"/proc/self/{folder}")]
    return [path for path in here if os.path.lexists(path) and name(path)]

def rings():
    return paths("fd", lambda path: "io_uring" in os.readlink(path))

def sleeps():
    threads = paths("task", lambda path: open(path + "/comm").read() == "axf-ring\\n")
    return [open(path + "/stat").read().rsplit(")", 1)[1].split()[0] for path in threads] == ["S"]

async def main(folder, how, busy):
    data = np.random.default_rng(1).integers(0, 256, 16 << 20, np.uint8)
    async with Agent("a") as agent, agent.allocate(data.size, "uint8") as memory:
        memory.array[:] = data
        path, other = os.path.join(folder, "file"), os.path.join(folder, "other")
        async with (
            agent.open(path, "w", size=data.size, direct=True) as direct,
            agent.open(other, "w", size=data.size, durability="data") as synced,
        ):
            get = agent.prepare("get", memory[:], direct[:], backend="uring:ring")
            put = agent.prepare("put", memory[:], synced[:], backend="uring:ring")
            await agent.put(memory[:], direct[:], backend="uring:ring")
            (ring,) = rings()
            number = int(os.path.basename(ring))
            posted = [get() for _ in range(8)] if busy == "busy" else []
            if how == "closed":
                os.close(number)
            else:
                useless = os.open(os.devnull, os.O_RDONLY)
                os.dup2(useless, number)
            posted += [put(), get(), get(timeout=30)]
            failures = []
            for transfer in posted:
                try:
                    await transfer
                except TransferError as error:
                    failures.append(str(error))
            assert failures
            for failure in failures:
                assert ("Bad file descriptor" if how == "closed" else "Operation not supported") in failure
                assert f"'{path}'" in failure or f"(sync): '{other}'" in failure
            while not sleeps():
                await asyncio.sleep(0.01)
            memory.array[:] = 0
            await get()
            assert (memory.array == data).all()
            await put()
            assert open(other, "rb").read() == data.tobytes()
    assert not rings()
    async with Agent("a") as agent, agent.allocate(data.size, "uint8") as memory:
        async with agent.open(path, direct=True) as direct:
            await agent.get(memory[:], direct[:], backend="uring:ring")
            assert (memory.array == data).all()
            assert rings()
    if how != "closed":
        os.close(useless)
        os.fstat(number)  # not ours, and so not closed
    print("good")

asyncio.run(main(*sys.argv[1:]))
"""


@needs_ring
@pytest.mark.parametrize("busy", ["busy", "idle"])
@pytest.mark.parametrize("how", ["closed", "replaced"])
def test_a_ring_that_breaks_down(how: str, busy: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BROKEN, str(tmp_path), how, busy],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "good\n"), done.stderr


@both_ways
async def test_agents_come_and_go(via: str, tmp_path: Path) -> None:
    data = aligned(1 << 20)
    for at in range(2 * ROUNDS):
        async with (
            Agent(f"agent {at}") as agent,
            agent.register(data) as region,
            agent.open(tmp_path / "file", "w", size=len(data), direct=True, durability="data") as file,
        ):
            await agent.put(region[:], file[:], backend=f"uring:{via}")
    assert fileio.threads() == 0
    assert not uring.running()


async def test_from_file_to_file_is_refused_with_the_reason(tmp_path: Path) -> None:
    async with (
        Agent("a") as agent,
        agent.open(tmp_path / "one", "w", size=10) as one,
        agent.open(tmp_path / "other", "w", size=10) as other,
    ):
        with pytest.raises(NoRouteError, match="does not move file to or from file"):
            agent.put(one[:], other[:], backend="uring")
