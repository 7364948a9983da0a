"""Files as regions: how they are opened, sized, indexed and closed, and what happens when one goes wrong."""

from __future__ import annotations

import asyncio
import os
import re
import resource
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from file_backend import FileBackend

from asyncxfer import (
    AccessError,
    Agent,
    ClosedError,
    ConfigError,
    DescriptorError,
    Done,
    MemoryKind,
    NoRouteError,
    Region,
    RegistrationError,
    TransferError,
)
from asyncxfer._files import File, open_file

MIB = 1 << 20
PIECES: dict[str, Any] = {"backends": ["local", FileBackend]}
either = pytest.mark.parametrize("backends", [["uring"], [FileBackend]], ids=["uring", "pieces"])


def pattern(nbytes: int, seed: int = 1) -> bytes:
    return np.random.default_rng(seed).bytes(nbytes)


def file_of(region: Region) -> File:
    assert isinstance(region.memory.owner, File)
    return region.memory.owner


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


# ---- opening --------------------------------------------------------------------------------------------------------


async def test_a_file_is_read_as_bytes_where_nothing_else_is_said(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(pattern(1000))
    memory = np.zeros(300, np.uint8)
    async with Agent("a", **PIECES) as agent, agent.open(path) as file, agent.register(memory) as region:
        assert (file.shape, file.dtype, file.nbytes, file.kind) == ((1000,), "uint8", 1000, MemoryKind.FILE)
        assert (file.readonly, file.access) == (True, "r")
        assert repr(file) == "<Region 'region-1': uint8 (1000,), file, 'r'>"
        done = await agent.get(region.bytes[:], file.bytes[200:500])
        assert (done.nbytes, done.descriptors, done.backend) == (300, 1, "pieces")
        assert memory.tobytes() == pattern(1000)[200:500]
        with pytest.raises(AccessError, match="was opened in mode 'r'"):
            agent.put(region[:], file[:300])


@pytest.mark.parametrize("url", ["file://{}", "file://localhost{}", "{}", "relative"])
async def test_a_path_and_a_url_name_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    path = tmp_path / "with a space"
    path.write_bytes(b"x" * 8)
    monkeypatch.chdir(tmp_path)
    quoted = str(path).replace(" ", "%20") if url.startswith("file") else str(path)
    name = path.name if url == "relative" else url.format(quoted)
    async with Agent("a", **PIECES) as agent, agent.open(name) as file:
        assert file_of(file).path == str(path)
        assert file.nbytes == 8


async def test_writing_makes_a_file_of_the_size_that_was_asked_for_and_keeps_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "new"
    memory = np.frombuffer(bytearray(pattern(4096)), np.uint8)
    async with Agent("a", **PIECES) as agent, agent.register(memory) as region:
        async with agent.open(path, "w", size=1 << 40) as file:
            assert path.stat().st_size == file.nbytes == 1 << 40
            assert path.stat().st_blocks == 0  # it takes no room yet
            await agent.put(region[:], file.bytes[:4096])
        async with agent.open(path, "w", size=8192) as file:
            assert path.stat().st_size == 8192
            assert path.read_bytes() == pattern(4096) + bytes(4096)
        async with agent.open(path, "r+", size=1000) as file:  # a part of it
            assert (file.nbytes, path.stat().st_size) == (1000, 8192)
            with pytest.raises(DescriptorError, match="not inside"):
                file.bytes[999:1001]


@pytest.mark.parametrize(
    ("dtype", "name", "itemsize"),
    [
        ("float16", "float16", 2),
        (np.int32, "int32", 4),
        (np.dtype(">i8"), ">i8", 8),
        ("bfloat16", "bfloat16", 2),
        ("float8_e4m3fn", "float8_e4m3fn", 1),
        ("torch.bfloat16", "bfloat16", 2),
    ],
)
async def test_a_file_is_indexed_like_an_array(tmp_path: Path, dtype: Any, name: str, itemsize: int) -> None:
    path, shape = tmp_path / "kv", (4, 6, 8)
    memory = np.zeros((5, 8, itemsize), np.uint8)
    async with (
        Agent("a", **PIECES) as agent,
        agent.open(path, "w", name="kv", shape=shape, dtype=dtype) as file,
        agent.register(memory) as region,
    ):
        assert (file.name, file.shape, file.dtype, file.nbytes) == ("kv", shape, name, 192 * itemsize)
        content = np.frombuffer(pattern(192 * itemsize), np.uint8).reshape(*shape, itemsize)
        path.write_bytes(content.tobytes())
        await agent.get(region[:], file[2, [5, 0, 3, 3, 1]])
        assert np.array_equal(memory, content[2, [5, 0, 3, 3, 1]])
        await agent.put(region[0, ::2], file[0, 0, 4:])
        assert path.read_bytes()[4 * itemsize : 8 * itemsize] == memory[0, ::2].tobytes()
    async with Agent("b", **PIECES) as agent, agent.open(path, dtype=dtype) as file:
        assert file.shape == (192,)


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"url": "nothing://bucket/key"}, RegistrationError, r"no backend .* nothing://"),
    ({"url": "nothing://bucket/key", "shape": 3}, ConfigError, r"shape= is not for objects"),
    ({"options": {"endpoint_url": "here"}}, ConfigError, r"options= is not for files"),
    ({"url": "file://another-host/data"}, ConfigError, "no file of this host"),
    ({"url": "file:///data?x=1"}, ConfigError, "no file of this host"),
    ({"url": ""}, ConfigError, "names no file"),
    ({"url": "a\0b"}, ConfigError, "names no file"),
    ({"url": 7}, ConfigError, "names no file"),
    ({"mode": "a"}, ConfigError, r"mode is 'a'; expected one of 'r', 'r\+', 'w'"),
    ({"durability": "some"}, ConfigError, "durability is 'some'; expected one of 'none', 'data', 'full'"),
    ({"url": "missing"}, RegistrationError, "missing cannot be opened in mode 'r': No such file"),
    ({"url": "missing/new", "mode": "w", "size": 1}, RegistrationError, "cannot be opened in mode 'w': No such file"),
    ({"url": "folder"}, RegistrationError, "neither a file nor a block device"),
    ({"url": "folder", "mode": "w", "size": 1}, RegistrationError, "Is a directory"),
    ({"url": "pipe"}, RegistrationError, "neither a file nor a block device"),
    ({"size": 101}, RegistrationError, "has 100 bytes, 101 were asked for; mode 'w' makes a file longer"),
    ({"shape": (50, 3)}, RegistrationError, "has 100 bytes, 150 were asked for"),
    ({"shape": (5, 5), "size": 24}, RegistrationError, "size 24 was asked for, but the shape .* takes 25"),
    ({"dtype": "float64"}, RegistrationError, "100 bytes are not a multiple of float64's 8"),
    ({"mode": "w", "dtype": "float64", "size": 12}, RegistrationError, "12 bytes are not a multiple of float64's 8"),
    ({"dtype": "no such"}, RegistrationError, "is no data type"),
    ({"dtype": object}, RegistrationError, "Python objects"),
    ({"shape": (2.5,)}, RegistrationError, "no tuple of integers"),
    ({"shape": (-1,)}, RegistrationError, "negative"),
    ({"size": -1}, RegistrationError, "a size of -1 bytes"),
    ({"size": "much"}, RegistrationError, "size 'much' is no integer"),
    ({"mode": "w"}, RegistrationError, "needs size= or shape="),
    ({"url": "huge", "mode": "w", "size": 2**63 - 1}, RegistrationError, "File too large|Invalid argument"),
]


@pytest.mark.parametrize(("wrong", "kind", "text"), REFUSED, ids=[str(wrong) for wrong, *_ in REFUSED])
async def test_what_cannot_be_opened_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any], kind: type[Exception], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").write_bytes(bytes(100))
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    async with Agent("a", **PIECES) as agent:
        with pytest.raises(kind, match=text):
            await agent.open(**({"url": "data"} | wrong))
        assert agent.stats()["regions"] == 0
    assert sorted(os.listdir(tmp_path)) == ["data", "folder", "pipe"]
    assert (tmp_path / "data").stat().st_size == 100


async def test_without_a_backend_for_files_the_reasons_are_told(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(100))
    async with Agent("a", backends=["local"]) as agent:
        with pytest.raises(RegistrationError, match=r"no backend can use this file memory \(local: does not move file"):
            await agent.open(tmp_path / "data", "w", size=1)
    assert (tmp_path / "data").stat().st_size == 100


async def test_names_are_unique_among_files_and_memory(tmp_path: Path) -> None:
    async with Agent("a", **PIECES) as agent, agent.register(bytearray(1), name="kv"):
        with pytest.raises(RegistrationError, match="has a region 'kv' already"):
            await agent.open(tmp_path / "data", "w", name="kv", size=1)
        assert not (tmp_path / "data").exists()
        async with agent.open(tmp_path / "data", "w", size=0) as file:  # an empty one is a file like any other
            assert (file.shape, agent.stats()["regions"]) == ((0,), 2)


async def test_too_many_open_files_is_an_error(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with Agent("a", **PIECES) as agent:
        await agent.open(tmp_path / "first", "w", size=1)  # the agent's threads have started
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 3, hard))
        try:
            with pytest.raises(RegistrationError, match="Too many open files"):
                await asyncio.gather(*(agent.open(tmp_path / str(n), "w", size=1) for n in range(10)))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await agent.open(tmp_path / "later", "w", size=1)


# ---- what a file is to the others -----------------------------------------------------------------------------------


async def test_peers_are_not_shown_files(tmp_path: Path) -> None:
    async with (
        Agent("a", **PIECES) as a,
        Agent("b", **PIECES) as b,
        b.open(tmp_path / "before", "w", name="before", size=10),
        b.register(bytearray(10), name="memory"),
    ):
        peer = await a.connect("b")
        async with b.open(tmp_path / "after", "w", name="after", size=10) as file:
            await peer.region("memory", timeout=30)
            assert list(peer.regions) == ["memory"]
            with pytest.raises(RegistrationError, match="'after' is file storage, which peers do not reach"):
                file.grant("a", "r")
            await file.revoke("a")  # it has nothing


async def test_a_file_is_no_array(tmp_path: Path) -> None:
    async with Agent("a", **PIECES) as agent, agent.open(tmp_path / "data", "w", size=10) as file:
        with pytest.raises(RegistrationError, match=r"was made by open\(\)"):
            file.array  # noqa: B018
        with pytest.raises(DescriptorError, match="are not inside region"):
            file.of(bytearray(1))


async def test_only_files_are_synced(tmp_path: Path) -> None:
    async with Agent("a", **PIECES) as agent, agent.register(bytearray(1)) as memory:
        with pytest.raises(RegistrationError, match="is dram memory; only a file can be synced"):
            await memory.sync()
        file = await agent.open(tmp_path / "data", "w", size=10)
        assert file_of(file).new
        await file.sync()
        assert not file_of(file).new
        await file.aclose()
        with pytest.raises(ClosedError, match=file.name):
            await file.sync()


async def test_every_route_says_why_it_cannot_take_a_file(tmp_path: Path) -> None:
    async with (
        Agent("a", **PIECES) as agent,
        agent.open(tmp_path / "data", "w", name="file", size=10) as file,
        agent.register(bytearray(10), name="memory") as memory,
    ):
        reasons = {candidate.route: candidate.reason for candidate in agent.explain("put", memory[:], file[:])}
        assert reasons == {"pieces": "least predicted time", "local": "region 'file': does not move file"}
        reasons = {candidate.route: candidate.reason for candidate in agent.explain("get", file[:], memory[:])}
        assert reasons["local"] == "region 'file': does not move file"
        with pytest.raises(NoRouteError, match="does not move file to or from file"):
            agent.put(file[:5], file[5:])


# ---- closing --------------------------------------------------------------------------------------------------------


async def test_a_closed_file_is_closed(tmp_path: Path) -> None:
    async with Agent("a", **PIECES) as agent, agent.register(bytearray(10)) as memory:
        region = await agent.open(tmp_path / "data", "w", size=10, direct=True)
        file = file_of(region)
        open_fds = [fd for fd in (file.fd, file.direct_fd) if fd >= 0]
        await region.aclose()
        await region.aclose()  # again does nothing
        for fd in open_fds:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)
        with pytest.raises(ClosedError, match="was closed"):
            agent.put(memory[:], region[:])
        assert agent.stats()["regions"] == 1


async def test_the_agent_closes_its_files(tmp_path: Path) -> None:
    async with Agent("a", **PIECES) as agent:
        file = file_of(await agent.open(tmp_path / "data", "w", size=10))
    assert file.fd == -1


async def test_an_opening_that_is_cancelled_leaves_nothing(tmp_path: Path) -> None:
    async with Agent("a", **PIECES) as agent:
        for turns in range(4):
            opening = asyncio.ensure_future(_await(agent.open(tmp_path / "data", "w", name="kv", size=10)))
            for _ in range(turns):
                await asyncio.sleep(0)
            cancelled = opening.cancel()
            await asyncio.wait([opening])
            assert cancelled or turns
            if not opening.cancelled():
                await opening.result().aclose()  # it was quicker
        async with agent.open(tmp_path / "data", name="kv"):
            assert agent.stats()["regions"] == 1


async def test_an_agent_that_closes_ends_openings(tmp_path: Path) -> None:
    agent = await Agent("a", **PIECES).start()
    openings = [asyncio.ensure_future(_await(agent.open(tmp_path / str(n), "w", size=10))) for n in range(8)]
    await asyncio.sleep(0)
    await agent.aclose()
    for outcome in await asyncio.gather(*openings, return_exceptions=True):
        assert isinstance(outcome, ClosedError) or (isinstance(outcome, Region) and outcome.closed)


async def _await(opening: Any) -> Region:
    region: Region = await opening
    return region


@either
@pytest.mark.parametrize("op", ["put", "get"])
async def test_a_descriptor_that_others_closed_is_an_error(tmp_path: Path, backends: list[Any], op: str) -> None:
    async with Agent("a", backends=backends) as agent, agent.register(bytearray(MIB)) as memory:
        region = await agent.open(tmp_path / "data", "w", size=MIB)
        move = agent.put if op == "put" else agent.get
        await move(memory[:], region[:])  # so that the backend has opened what it needs for itself
        os.close(file_of(region).fd)
        with pytest.raises(TransferError, match="Bad file descriptor") as caught:
            await move(memory[:], region[:])
        assert str(tmp_path / "data") in str(caught.value)
        with pytest.raises(RegistrationError, match="not in order: Bad file descriptor"):
            await region.aclose()
        assert agent.stats()["regions"] == 1


# ---- the file itself ------------------------------------------------------------------------------------------------


def test_a_file_for_direct_transfers_says_what_they_have_to_be_aligned_to(tmp_path: Path) -> None:
    memory = open_file(tmp_path / "data", "w", size=10, direct=True)
    file = memory.owner
    assert isinstance(file, File)
    assert file.direct_fd >= 0
    for alignment in (file.alignment, file.memory_alignment):
        assert alignment in (1 << n for n in range(17))
    file.close()


def test_a_descriptor_that_others_closed_and_opened_is_theirs(tmp_path: Path) -> None:
    file = open_file(tmp_path / "data", "w", size=10).owner
    assert isinstance(file, File)
    os.close(file.fd)
    theirs = os.open(os.devnull, os.O_RDONLY)  # the least number that is free
    assert theirs == file.fd
    with pytest.raises(OSError, match="Bad file descriptor"):
        file.close()
    os.close(theirs)


def test_a_file_that_nobody_closed_is_closed_with_its_last_reference(tmp_path: Path) -> None:
    memory = open_file(tmp_path / "data", "w", size=10)
    assert isinstance(memory.owner, File)
    fd = memory.owner.fd
    del memory
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@pytest.mark.parametrize("durability", ["data", "full"])
def test_a_new_file_is_found_after_a_loss_of_power(tmp_path: Path, durability: Any) -> None:
    file = open_file(tmp_path / "data", "w", size=10, durability=durability).owner
    assert isinstance(file, File)
    assert not file.new  # its name has been synced
    file.close()


# ---- many, much, and in the way of each other -----------------------------------------------------------------------


async def test_ten_thousand_files(tmp_path: Path) -> None:
    count = 10_000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count + 200:
        pytest.skip(f"this process may not open {count} files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count + 200), hard))
    rows = np.frombuffer(bytearray(pattern(count * 16)), np.uint8).reshape(count, 16)
    back = np.zeros_like(rows)
    try:
        async with Agent("a", backends=["uring"]) as agent, agent.register([rows, back]) as memory:
            files = []
            for start in range(0, count, 1000):
                batch = range(start, start + 1000)
                files += await asyncio.gather(*(_await(agent.open(tmp_path / str(n), "w", size=16)) for n in batch))
            assert len(os.listdir(tmp_path)) == count
            for start in range(0, count, 1000):
                batch = range(start, start + 1000)
                await asyncio.gather(*(agent.put(memory[0, n], files[n][:]) for n in batch))
                await asyncio.gather(*(agent.get(memory[1, n], files[n][:]) for n in batch))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert np.array_equal(rows, back)
    assert (tmp_path / "777").read_bytes() == rows[777].tobytes()


@either
@pytest.mark.parametrize("direct", [False, True])
async def test_a_file_that_is_truncated_under_transfers(tmp_path: Path, backends: list[Any], direct: bool) -> None:
    path, size = tmp_path / "data", 8 * MIB
    path.write_bytes(pattern(size))
    async with (
        Agent("a", backends=backends) as agent,
        agent.allocate((8, size), "uint8") as memory,
        agent.open(path, "r", direct=direct) as file,
    ):
        for cut in (size // 2 + 100, 4096, 0):
            posted = [agent.get(memory[n], file[:]) for n in range(8)]
            os.truncate(path, cut)
            for n, outcome in enumerate(await asyncio.gather(*posted, return_exceptions=True)):
                if isinstance(outcome, Done):
                    assert memory.array[n].tobytes() == pattern(size), "a tail that was cut off counts as read"
                else:
                    assert isinstance(outcome, TransferError)
                    assert re.search(rf"{path}: .* expected at offset .* found", str(outcome))
            path.write_bytes(pattern(size))


@either
async def test_signals_do_not_end_transfers(tmp_path: Path, backends: list[Any]) -> None:
    size = 16 * MIB
    came = 0

    def count() -> None:
        nonlocal came
        came += 1

    loop = asyncio.get_running_loop()
    async with (
        Agent("a", backends=backends) as agent,
        agent.allocate((2, size), "uint8") as memory,
        agent.open(tmp_path / "data", "w", size=size, durability="data") as file,
    ):
        memory.array[0] = np.frombuffer(pattern(size), np.uint8)
        loop.add_signal_handler(signal.SIGALRM, count)
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        try:
            for _ in range(4):
                await agent.put(memory[0], file[:])
                await agent.get(memory[1], file[:])
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            loop.remove_signal_handler(signal.SIGALRM)
        assert came
        assert np.array_equal(memory.array[0], memory.array[1])


# ---- devices that fail ----------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of a mebibyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    try:
        run("mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder))
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a file system cannot be mounted here: it needs root")
    yield folder
    run("umount", str(folder))


@either
async def test_a_full_disk_is_an_error_that_says_so(small: Path, backends: list[Any]) -> None:
    path = small / "data"
    async with (
        Agent("a", backends=backends) as agent,
        agent.allocate(4 * MIB, "uint8") as memory,
        agent.open(path, "w", size=4 * MIB) as file,  # sparse: it fits
    ):
        memory.array[:] = np.frombuffer(pattern(4 * MIB), np.uint8)
        with pytest.raises(TransferError, match="No space left on device") as caught:
            await agent.put(memory[:], file[:])
        assert re.search(r"write of \S+ bytes at offset ", str(caught.value))
        assert str(path) in str(caught.value)
        assert caught.value.nbytes < 4 * MIB
        os.truncate(path, 0)  # there is room again
        await agent.put(memory[: MIB // 2], file[: MIB // 2])
        assert path.read_bytes() == pattern(4 * MIB)[: MIB // 2]
        await file.sync()


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A block device of four mebibytes, and the file behind it."""
    image = tmp_path / "image"
    image.write_bytes(pattern(4 * MIB))
    try:
        device = run("losetup", "--find", "--show", str(image))
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("there are no loop devices here, or they need root")
    yield Path(device), image
    run("losetup", "--detach", device)


@either
@pytest.mark.parametrize("direct", [False, True])
async def test_a_block_device(loop_device: tuple[Path, Path], backends: list[Any], direct: bool) -> None:
    device, image = loop_device
    async with (
        Agent("a", backends=backends) as agent,
        agent.allocate((2, 4 * MIB), "uint8") as memory,
        agent.open(device, "r+", direct=direct, durability="data") as file,
    ):
        assert file.nbytes == 4 * MIB
        await agent.get(memory[0], file[:])
        assert memory.array[0].tobytes() == pattern(4 * MIB)
        memory.array[1, :8192] = 7
        await agent.put(memory[1, :8192], file[4096:12288])
        assert image.read_bytes() == pattern(4 * MIB)[:4096] + b"\7" * 8192 + pattern(4 * MIB)[12288:]
        # What lies behind the device goes away: a read that the page cache does not answer fails.
        os.truncate(image, MIB)
        os.posix_fadvise(file_of(file).fd, 0, 0, os.POSIX_FADV_DONTNEED)
        with pytest.raises(TransferError, match="Input/output error") as caught:
            await agent.get(memory[0], file[:])
        assert str(device) in str(caught.value)
        assert re.search(r"read of \S+ bytes at offset ", str(caught.value))
        await agent.get(memory[1, :4096], file[:4096])
        assert memory.array[1, :4096].tobytes() == pattern(4 * MIB)[:4096]


async def test_a_block_device_that_is_too_small(loop_device: tuple[Path, Path]) -> None:
    device, _ = loop_device
    async with Agent("a", **PIECES) as agent:
        with pytest.raises(RegistrationError, match=r"has 4,194,304 bytes, 4,194,305 were asked for$"):
            await agent.open(device, "w", size=4 * MIB + 1)
        async with agent.open(device, "w", size=4096) as file:
            assert file.nbytes == 4096
