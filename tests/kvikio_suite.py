"""The tests of the backend `kvikio` over a stub of the CUDA driver, for a process of their own.

`test_kvikio.py` runs them: the stub would mislead whatever else looks for a GPU. `LIBCUDA_STUB` names the library that
was built from `stubs/libcuda.c`; memory that it is told of counts as a GPU's.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import resource
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest

from asyncxfer import Agent, DescriptorList, Done, Region, Transfer, TransferError, TransferTimeout
from asyncxfer.testing import FileContract

Bytes: TypeAlias = npt.NDArray[np.uint8]
Kind: TypeAlias = Literal["dram", "vram"]
Op: TypeAlias = Literal["put", "get"]

_stub = ctypes.CDLL(os.environ["LIBCUDA_STUB"])
_stub.stub_device_memory.argtypes = (ctypes.c_uint64, ctypes.c_uint64)

MIB = 1 << 20
BOTH = ["dram", "vram"]
both_kinds = pytest.mark.parametrize("kind", BOTH)


class OnGpu:
    """An array as the GPU's: what CuPy's arrays say of themselves."""

    def __init__(self, array: Bytes) -> None:
        self.array = array
        where = array.__array_interface__["data"]
        self.__cuda_array_interface__ = {"shape": array.shape, "typestr": "|u1", "data": where, "version": 3}


@contextlib.contextmanager
def gpu_memory(nbytes: int) -> Iterator[OnGpu]:
    """Memory that counts as the GPU's."""
    array = np.zeros(nbytes, np.uint8)
    _stub.stub_device_memory(array.ctypes.data, nbytes)
    yield OnGpu(array)
    _stub.stub_device_memory(0, 0)


def copies() -> int:
    """How often something was copied to or from the GPU."""
    return int(_stub.stub_copies())


@pytest.fixture(scope="session", autouse=True)
def _threads_of_kvikio(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Have KvikIO start the threads that live as long as the process."""
    kvikio = pytest.importorskip("kvikio")
    file = kvikio.CuFile(tmp_path_factory.mktemp("kvikio") / "first", "w+")
    for future in [file.pwrite(np.zeros(4096, np.uint8), 4096, 4096 * n) for n in range(64)]:
        future.get()
    file.close()


class Stage(NamedTuple):
    """A region of memory and one of a file, of one agent."""

    agent: Agent
    memory: Region
    array: Bytes
    file: Region
    path: Path

    def transfer(self, op: Op, here: DescriptorList, there: DescriptorList, **options: Any) -> Transfer:
        """Post by KvikIO."""
        call = self.agent.put if op == "put" else self.agent.get
        return call(here, there, backend="kvikio", **options)

    async def barrier(self) -> None:
        """All that KvikIO was asked for by now is over: it takes tasks in turn, and does more of them than threads."""
        async with self.agent.register(np.zeros(4 * MIB, np.uint8)) as other, self.agent.open(self.path) as file:
            first = min(file.nbytes, 4 * MIB)
            for _ in range(16):
                await self.transfer("get", other.bytes[:first], file.bytes[:first])


@contextlib.asynccontextmanager
async def set_up(
    tmp_path: Path, nbytes: int, kind: Kind = "dram", *, file_bytes: int | None = None, **options: Any
) -> AsyncIterator[Stage]:
    """Memory and file with different random bytes."""
    path = tmp_path / "file"
    random = np.random.default_rng(nbytes)
    path.write_bytes(random.bytes(nbytes if file_bytes is None else file_bytes))
    with contextlib.ExitStack() as stack:
        if kind == "vram":
            lent: Any = stack.enter_context(gpu_memory(nbytes))
            array = lent.array
        else:
            lent = array = np.zeros(nbytes, np.uint8)
        array[:] = np.frombuffer(random.bytes(nbytes), np.uint8)
        async with (
            Agent("kvikio-tests") as agent,
            agent.register(lent) as memory,
            agent.open(path, "r+", **options) as file,
        ):
            yield Stage(agent, memory, array, file, path)


def content(path: Path) -> Bytes:
    return np.fromfile(path, np.uint8)


def descriptors_of(path: Path) -> list[int]:
    """Those that this process has of a file."""
    return [int(fd) for fd in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{fd}") == str(path)]


class TestContract(FileContract):
    """Host memory and files, by KvikIO."""

    route = "kvikio"


@pytest.mark.skipif("KVIKIO_MATRIX" not in os.environ, reason="one of the combinations of `make test-kvikio`")
class TestContractOfDurableFiles(FileContract):
    """Files that were opened past the page cache, whose puts end when they are on the device."""

    route = "kvikio"
    shared = True
    direct = True
    durability = "full"


# ---- moving --------------------------------------------------------------------------------------------------------


def _rows(random: np.random.Generator, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Offsets for rows of these lengths in random order, with gaps of any size between them."""
    order = random.permutation(len(lengths))
    gaps = random.integers(0, 5000, len(lengths))
    ends = np.cumsum(lengths[order] + gaps)
    offsets = np.empty(len(lengths), np.int64)
    offsets[order] = ends - lengths[order]
    return offsets


@both_kinds
@pytest.mark.parametrize("op", ["put", "get"])
@pytest.mark.parametrize("local", ["memory", "file"])
async def test_rows_of_any_size_at_any_offset(tmp_path: Path, kind: Kind, op: Op, local: str) -> None:
    random = np.random.default_rng(7)
    # Of a byte, below and above what KvikIO leaves to the GPU, and one that has to be cut in three.
    lengths = np.concatenate([random.integers(1, 60_000, 200), [1, 4096, 16_384, 9 * MIB]])
    in_memory, in_file = _rows(random, lengths), _rows(random, lengths)
    async with set_up(tmp_path, 20 * MIB, kind) as stage:
        memory = stage.memory.descriptors(in_memory, lengths)
        file = stage.file.descriptors(in_file, lengths)
        model, copied = (stage.array.copy(), content(stage.path)), copies()
        here, there = (memory, file) if local == "memory" else (file, memory)
        done = await stage.transfer(op, here, there)
        reads = (op == "get") == (local == "memory")
        for at, offset, length in zip(in_memory, in_file, lengths, strict=True):
            bytes_in_memory, bytes_in_file = model[0][at : at + length], model[1][offset : offset + length]
            if reads:
                bytes_in_memory[:] = bytes_in_file
            else:
                bytes_in_file[:] = bytes_in_memory
        assert (done.nbytes, done.descriptors, done.backend) == (lengths.sum(), len(lengths), "kvikio")
        assert np.array_equal(stage.array, model[0])
        assert np.array_equal(content(stage.path), model[1])
        assert (copies() > copied) == (kind == "vram")


async def test_gpu_memory_goes_this_way_and_host_memory_another(tmp_path: Path) -> None:
    async with set_up(tmp_path, MIB, "vram") as stage, stage.agent.register(np.zeros(MIB, np.uint8)) as host:
        assert (await stage.agent.get(stage.memory[:], stage.file[:])).backend == "kvikio"
        assert np.array_equal(stage.array, content(stage.path))
        for rows in (1, 256):
            here, there = host.bytes[:].split(MIB // rows), stage.file.bytes[:].split(MIB // rows)
            found = {each.backend: each for each in stage.agent.explain("get", here, there)}
            assert found["kvikio"].seconds is not None
            assert not found["kvikio"].taken


async def test_many_transfers_at_once(tmp_path: Path) -> None:
    async with set_up(tmp_path, 8 * MIB, "vram") as stage:
        memory, file = stage.array.reshape(512, -1).copy(), content(stage.path).reshape(512, -1).copy()
        step = memory.shape[1]
        posted = []
        for row, other in enumerate(np.random.default_rng(3).permutation(512)):
            here = stage.memory.bytes[row * step : (row + 1) * step]
            there = stage.file.bytes[other * step : (other + 1) * step]
            posted.append(stage.transfer("put" if row % 2 else "get", here, there))
            if row % 2:
                file[other] = memory[row]
            else:
                memory[row] = file[other]
        assert sum(done.nbytes for done in await asyncio.gather(*posted)) == 8 * MIB
        assert np.array_equal(stage.array, memory.ravel())
        assert np.array_equal(content(stage.path), file.ravel())


async def test_arrays_that_are_empty_or_read_only(tmp_path: Path) -> None:
    data = bytes(range(200))
    async with (
        set_up(tmp_path, 1000) as stage,
        stage.agent.register([np.zeros(0, np.uint8), np.frombuffer(data, np.uint8)]) as memory,
    ):
        await stage.transfer("put", memory[1], stage.file.bytes[100:300])
        assert content(stage.path)[100:300].tobytes() == data


async def test_two_agents_and_one_file(tmp_path: Path) -> None:
    array = np.zeros(MIB, np.uint8)
    async with (
        set_up(tmp_path, MIB) as stage,
        Agent("another") as another,
        another.open(stage.path) as file,
        another.register(array) as memory,
    ):
        await stage.transfer("put", stage.memory[:], stage.file[:])
        await another.get(memory[:], file[:], backend="kvikio")
        assert np.array_equal(array, stage.array)


async def test_the_file_is_the_one_that_was_opened(tmp_path: Path) -> None:
    async with set_up(tmp_path, MIB) as stage:
        moved = stage.path.rename(tmp_path / "moved")
        stage.path.write_bytes(b"another file")
        await stage.transfer("put", stage.memory[:], stage.file[:])
        assert np.array_equal(content(moved), stage.array)
        assert stage.path.read_bytes() == b"another file"


async def test_a_file_is_opened_for_kvikio_when_it_is_used(tmp_path: Path) -> None:
    async with set_up(tmp_path, MIB) as stage:
        before = descriptors_of(stage.path)
        await stage.transfer("get", stage.memory[:], stage.file[:])
        assert len(descriptors_of(stage.path)) > len(before)
        await stage.file.aclose()
        assert descriptors_of(stage.path) == []


@pytest.mark.parametrize("durability", ["none", "data", "full"])
async def test_a_put_ends_when_it_is_as_durable_as_was_asked(
    tmp_path: Path, durability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, bytes]] = []

    def note(name: str) -> None:
        call = getattr(os, name)

        def noted(fd: int) -> None:
            synced.append((name, os.pread(fd, 3, 0)))
            call(fd)

        monkeypatch.setattr(os, name, noted)

    note("fsync")
    note("fdatasync")
    async with set_up(tmp_path, 2 * MIB, durability=durability) as stage:
        stage.array[:3] = (1, 2, 3)
        await stage.transfer("get", stage.memory.bytes[9:100], stage.file.bytes[9:100])
        assert synced == []
        await stage.transfer("put", stage.memory[:], stage.file[:])
        names = {"none": [], "data": ["fdatasync"], "full": ["fsync"]}[durability]
        assert synced == [(name, bytes((1, 2, 3))) for name in names], "before the bytes were written, or not at all"


# ---- ends ----------------------------------------------------------------------------------------------------------


@both_kinds
async def test_a_short_file_is_an_error(tmp_path: Path, kind: Kind) -> None:
    async with set_up(tmp_path, 32 * MIB, kind) as stage:
        os.truncate(stage.path, 6 * MIB + 100)
        with pytest.raises(TransferError) as caught:
            await stage.transfer("get", stage.memory[:], stage.file[:])
        told = re.search(r"(\S+): ([\d,]+) bytes expected at offset ([\d,]+), ([\d,]+) found", str(caught.value))
        assert told is not None, str(caught.value)
        expected, offset, found = (int(number.replace(",", "")) for number in told.groups()[1:])
        assert told[1] == str(stage.path)
        assert offset <= 6 * MIB + 100 < offset + expected
        assert found == 6 * MIB + 100 - offset
        assert (caught.value.backend, caught.value.nbytes) == ("kvikio", offset)
        assert np.array_equal(stage.array[:offset], content(stage.path)[:offset])
        os.truncate(stage.path, 32 * MIB)
        assert (await stage.transfer("get", stage.memory[:], stage.file[:])).nbytes == 32 * MIB


@both_kinds
async def test_nothing_moves_after_the_first_row_has_failed(tmp_path: Path, kind: Kind) -> None:
    async with set_up(tmp_path, 64 * MIB, kind) as stage:
        os.truncate(stage.path, 60 * MIB)
        offsets, lengths = [60 * MIB, *range(0, 60 * MIB, 4 * MIB)], [4 * MIB] * 16
        with pytest.raises(TransferError, match="62,914,560, 0 found"):
            await stage.transfer(
                "get",
                stage.memory.descriptors(range(0, 64 * MIB, 4 * MIB), lengths),
                stage.file.descriptors(offsets, lengths),
            )
        stage.array[:] = 0
        await stage.barrier()
        assert not stage.array.any(), "something was read after the transfer had failed"


async def test_what_the_system_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    async with set_up(tmp_path, 16 * MIB, "vram", size=16 * MIB) as stage:
        os.truncate(stage.path, 8 * MIB)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10 * MIB, limits[1]))
        try:
            with pytest.raises(TransferError, match="File too large") as caught:
                await stage.transfer("put", stage.memory[:], stage.file[:])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        told = re.search(r"write of ([\d,]+) bytes at offset ([\d,]+)", str(caught.value))
        assert told is not None, str(caught.value)
        length, offset = (int(number.replace(",", "")) for number in told.groups())
        assert offset + length > 10 * MIB
        assert str(stage.path) in str(caught.value)
        assert isinstance(caught.value.__cause__, OSError)
        written = content(stage.path)
        stage.array[:] = 0
        await stage.barrier()
        assert np.array_equal(content(stage.path), written), "something was written after the transfer had failed"


async def test_a_descriptor_that_others_have_closed(tmp_path: Path) -> None:
    async with set_up(tmp_path, MIB) as stage:
        (fd,) = descriptors_of(stage.path)
        kept = os.dup(fd)
        os.close(fd)
        try:
            with pytest.raises(TransferError, match=re.escape(str(stage.path))) as caught:
                await stage.transfer("get", stage.memory[:], stage.file[:])
        finally:
            os.dup2(kept, fd)
            os.close(kept)
        assert "Bad file descriptor" in str(caught.value)
        assert (await stage.transfer("get", stage.memory[:], stage.file[:])).nbytes == MIB


@both_kinds
@pytest.mark.parametrize("how", ["cancelled", "out of time"])
async def test_an_early_end_is_quiescent(tmp_path: Path, kind: Kind, how: str) -> None:
    async with set_up(tmp_path, 64 * MIB, kind) as stage:
        plan = stage.agent.prepare("get", stage.memory[:], stage.file[:], backend="kvikio")
        ahead = plan()
        transfer = plan(timeout=None if how == "cancelled" else 1e-6)
        if how == "cancelled":
            assert transfer.cancel()
            with pytest.raises(asyncio.CancelledError):
                await transfer
        else:
            with pytest.raises(TransferTimeout):
                await transfer
        assert (await ahead).nbytes == 64 * MIB
        stage.array[:] = 0
        await stage.barrier()
        assert not stage.array.any(), "something was read after the transfer had ended"


async def test_what_waits_ends_at_once_when_it_is_cancelled(tmp_path: Path) -> None:
    async with set_up(tmp_path, 64 * MIB) as stage:
        plan = stage.agent.prepare("put", stage.memory[:], stage.file[:], backend="kvikio")
        ahead = [plan(priority=1) for _ in range(4)]
        last = plan(priority=-1)
        last.cancel()
        with pytest.raises(asyncio.CancelledError):
            await last
        assert not all(transfer.done() for transfer in ahead)
        await asyncio.gather(*ahead)


async def test_what_is_urgent_goes_first(tmp_path: Path) -> None:
    async with set_up(tmp_path, 64 * MIB) as stage:
        ended: list[str] = []

        async def follow(name: str, transfer: Transfer) -> None:
            await transfer
            ended.append(name)

        whole = stage.agent.prepare("put", stage.memory[:], stage.file[:], backend="kvikio")
        few = stage.agent.prepare("put", stage.memory.bytes[:9], stage.file.bytes[:9], backend="kvikio")
        posted = {f"long {n}": whole(priority=-1) for n in range(4)}
        posted |= {"late": few(priority=-1), "usual": whole(), "urgent": few(priority=1)}
        await asyncio.gather(*(follow(*item) for item in posted.items()))
        assert ended[0] == "urgent"
        assert ended.index("usual") < min(ended.index(name) for name in ended if name.startswith("long"))
        assert ended.index("late") < min(ended.index(name) for name in ended if name.startswith("long"))


async def test_a_file_that_closes_under_transfers_waits_for_them(tmp_path: Path) -> None:
    async with set_up(tmp_path, 32 * MIB, "vram") as stage:
        posted = [stage.transfer("put", stage.memory[:], stage.file[:]) for _ in range(4)]
        await stage.file.aclose()
        assert all(transfer.done() for transfer in posted)
        outcomes = await asyncio.gather(*posted, return_exceptions=True)
        written = content(stage.path)
        stage.array[:] = 0
        await stage.barrier()
        assert np.array_equal(content(stage.path), written)
        assert all(isinstance(outcome, Done | TransferError) for outcome in outcomes)
