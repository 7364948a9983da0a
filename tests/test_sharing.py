"""Memory that a peer can map: which has a file behind it, where, and how long what lives."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import mmap
import multiprocessing as mp
import os
import time
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asyncxfer import _sharing
from asyncxfer._errors import RegistrationError
from asyncxfer._fast import memory as fast
from asyncxfer._fast.memory import Mapping
from asyncxfer._memory import Segment, describe
from asyncxfer._sharing import Backings, MapsSnapshot, Place, allocate, backings_of

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = mmap.PAGESIZE


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4 * PAGE)
    yield fd
    with contextlib.suppress(OSError):  # a test may have closed it
        os.close(fd)


def through_the_file(found: Backings, index: int, nbytes: int) -> bytes:
    """Read what lies at a segment's place by its descriptor, as a peer would."""
    place = found.places[index]
    assert place is not None
    return bytes(Mapping(found.files[place.file].fd, place.offset, nbytes, writable=False).buffer)


def assert_shared(obj: Any) -> None:
    array = np.asarray(obj).reshape(-1).view(np.uint8)
    array[:] = np.random.default_rng(7).integers(0, 256, array.size, dtype=np.uint8)
    part = array[5:-3]
    with backings_of([*describe(array).segments, *describe(part).segments]) as found:
        assert len(found.files) == 1
        assert not os.get_inheritable(found.files[0].fd)
        assert found.files[0].writable
        assert through_the_file(found, 0, array.nbytes) == array.tobytes()
        assert through_the_file(found, 1, part.nbytes) == part.tobytes()
        fd = found.files[0].fd
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


# ---- what has a file behind it ---------------------------------------------------------------------------------------


def test_allocated_memory() -> None:
    allocation = allocate(3 * PAGE + 100)
    assert_shared(np.frombuffer(allocation.buffer, np.uint8))
    allocation.close()


def test_multiprocessing_shared_memory() -> None:
    shared = SharedMemory(create=True, size=10_000)
    assert shared.buf is not None
    try:
        assert_shared(np.frombuffer(shared.buf, np.uint8))
    finally:
        gc.collect()
        shared.close()
        shared.unlink()


@pytest.mark.parametrize("unlinked", [False, True])
def test_a_file_in_dev_shm(unlinked: bool) -> None:
    path = f"/dev/shm/asyncxfer test {os.getpid()}"
    with open(path, "w+b") as file:
        try:
            file.truncate(3 * PAGE)
            pages = mmap.mmap(file.fileno(), 2 * PAGE, offset=PAGE)
            if unlinked:
                os.unlink(path)
            assert_shared(np.frombuffer(pages, np.uint8))
        finally:
            if not unlinked:
                os.unlink(path)


def test_an_impostor_at_the_path_is_not_believed() -> None:
    path = f"/dev/shm/asyncxfer-{os.getpid()}"
    file = open(path, "w+b")  # noqa: SIM115 - closed half way
    file.truncate(PAGE)
    pages = np.frombuffer(mmap.mmap(file.fileno(), PAGE), np.uint8)
    file.close()
    os.unlink(path)
    with open(path, "w+b") as other:
        other.truncate(PAGE)
        with backings_of(describe(pages).segments) as found:
            for backing in found.files:  # only by privilege, and then it is the right one
                assert os.fstat(backing.fd).st_ino != os.fstat(other.fileno()).st_ino
        os.unlink(path)


def test_ordinary_memory_has_none(tmp_path: Path, memfd: int) -> None:
    private = mmap.mmap(memfd, PAGE, flags=mmap.MAP_PRIVATE)
    objects = [np.zeros(100), bytearray(100), np.zeros(1 << 22, np.uint8), np.frombuffer(private, np.uint8)]
    with backings_of(describe(obj).segments[0] for obj in objects) as found:
        assert found == Backings((), (None,) * len(objects))


def test_a_file_on_a_disk_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pages"
    with open(path, "wb") as file:
        file.truncate(PAGE)
        if fast.filesystem(file.fileno()) == fast.TMPFS:
            monkeypatch.setattr(_sharing, "filesystem", lambda fd: 0xEF53)  # ext4
    pages = np.memmap(path, dtype=np.uint8, mode="r+")
    with backings_of(describe(pages).segments) as found:
        assert found == Backings((), (None,))


def test_a_segment_beyond_its_mapping_has_none(memfd: int) -> None:
    pages = Mapping(memfd, PAGE, 2 * PAGE)
    start = pages.address
    with backings_of([Segment(start, 2 * PAGE), Segment(start, 2 * PAGE + 1), Segment(start + PAGE, 0)]) as found:
        assert found.places == (Place(0, PAGE), None, None)


def test_a_mapping_in_several_pieces_is_one(memfd: int) -> None:
    pages = mmap.mmap(memfd, 4 * PAGE)
    pages.madvise(mmap.MADV_DONTFORK, PAGE, PAGE)  # the kernel splits it in three
    segments = describe(pages).segments
    with backings_of(segments) as found:
        assert found.places == (Place(0, 0),)


def test_two_files_are_told_apart(memfd: int) -> None:
    one, two = allocate(PAGE), allocate(PAGE)
    segments = [Segment(two.address, 1), Segment(one.address + 7, 1), Segment(two.address + 9, 1)]
    with backings_of(segments) as found:
        assert found.places == (Place(0, 0), Place(1, 7), Place(0, 9))
        assert os.path.sameopenfile(found.files[1].fd, one.fd)


def test_no_more_files_than_one_message_carries() -> None:
    allocations = [allocate(1) for _ in range(3)]
    with backings_of([Segment(a.address, 1) for a in (*allocations, allocations[0])], limit=2) as found:
        assert found.places == (Place(0, 0), Place(1, 0), None, Place(0, 0))


def test_memory_whose_descriptor_is_closed(memfd: int) -> None:
    pages = Mapping(memfd, 0, PAGE)
    os.close(memfd)
    with backings_of([Segment(pages.address, PAGE)]) as found:
        # only a privileged process reaches the file by /proc/self/map_files
        assert found.places in ((None,), (Place(0, 0),))
        assert len(found.files) == (found.places[0] is not None)


def test_nothing_to_find() -> None:
    assert backings_of([]) == Backings((), ())


def test_read_only_backing(memfd: int) -> None:
    pages = Mapping(memfd, 0, PAGE)
    with backings_of([Segment(pages.address, PAGE)], writable=False) as found:
        assert not found.files[0].writable
        assert fcntl.fcntl(found.files[0].fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        with pytest.raises(PermissionError):
            Mapping(found.files[0].fd, 0, PAGE)


def test_a_file_sealed_against_writing_is_read_only(memfd: int) -> None:
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    pages = Mapping(memfd, 0, PAGE, writable=False)
    with backings_of([Segment(pages.address, PAGE)]) as found:
        assert not found.files[0].writable


def test_sealing(memfd: int) -> None:
    pages = Mapping(memfd, 0, PAGE)
    with backings_of([Segment(pages.address, PAGE)]) as found:
        file = found.files[0]
        assert [file.sealed, file.seal(), file.sealed] == [False, True, True]
    with pytest.raises(PermissionError):
        os.ftruncate(memfd, 0)
    with SharedMemoryFile() as shared, backings_of([Segment(shared.address, 1)]) as found:
        assert not found.files[0].seal()  # /dev/shm knows no seals


class SharedMemoryFile:
    """A mapped file in /dev/shm."""

    def __enter__(self) -> Mapping:
        self.path = f"/dev/shm/asyncxfer-{os.getpid()}-seal"
        with open(self.path, "w+b") as file:
            file.truncate(PAGE)
            return Mapping(file.fileno(), 0, PAGE)

    def __exit__(self, *_: object) -> None:
        os.unlink(self.path)


def test_many_segments_are_cheap() -> None:
    allocation = allocate(1 << 20)
    segments = [Segment(allocation.address + 64 * index, 64) for index in range(10_000)]
    start = time.perf_counter()
    with backings_of(segments) as found:
        elapsed = time.perf_counter() - start
        assert len(found.files) == 1
        assert found.places[9_999] == Place(0, 64 * 9_999)
    assert elapsed < 0.5  # about 20 ms; a scan for each would take minutes


def test_a_snapshot_serves_many_calls(memfd: int) -> None:
    pages = Mapping(memfd, 0, PAGE)
    snapshot = MapsSnapshot()
    later = Mapping(memfd, 0, PAGE)
    with backings_of([Segment(pages.address, 1)], snapshot=snapshot) as found:
        assert found.places == (Place(0, 0),)
    with backings_of([Segment(later.address, 1)]) as found:
        assert found.places == (Place(0, 0),)


# ---- allocation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [0, 1, PAGE, 5 * PAGE - 1])
@pytest.mark.parametrize("huge_pages", [False, True])
def test_allocation_is_zeroed_and_of_the_size(nbytes: int, huge_pages: bool) -> None:
    allocation = allocate(nbytes, huge_pages=huge_pages)
    assert allocation.nbytes == len(allocation.buffer) == nbytes
    assert bytes(allocation.buffer) == bytes(nbytes)
    assert allocation.file.sealed
    for size in (0, 100 * PAGE):
        if os.fstat(allocation.fd).st_size != size:
            with pytest.raises(PermissionError):
                os.ftruncate(allocation.fd, size)


def test_memory_outlives_the_descriptor_and_ends_with_the_last_array() -> None:
    before = fast.live()
    allocation = allocate(PAGE)
    fd = allocation.fd
    values = np.frombuffer(allocation.buffer, np.int64)
    allocation.close()
    allocation.close()
    assert allocation.fd == -1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    del allocation
    gc.collect()
    assert fast.live() == before + 1
    values[:] = 5
    assert values.sum() == 5 * 512
    last = values[3:4]
    del values
    gc.collect()
    assert fast.live() == before + 1
    del last
    gc.collect()
    assert fast.live() == before


def test_a_dropped_allocation_closes_its_descriptor() -> None:
    allocation = allocate(PAGE)
    fd = allocation.fd
    del allocation
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_impossible_sizes_say_what_is_free() -> None:
    with pytest.raises(RegistrationError, match="-1 bytes; expected 0 or more"):
        allocate(-1)
    with pytest.raises(RegistrationError, match=r"1,152,921,504,606,846,976 bytes: only [\d,]+ are free"):
        allocate(1 << 60)
    with pytest.raises(RegistrationError, match="are free"):
        allocate(1 << 70)


def test_refusals_of_the_kernel_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(24, "Too many open files")

    fds = len(os.listdir("/proc/self/fd"))
    for target, name in ((os, "memfd_create"), (_sharing, "Mapping")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, refuse)
            with pytest.raises(RegistrationError, match=r"4,096 bytes .*Too many open files.*ulimit -n"):
                allocate(4096)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == fds


def test_huge_pages_are_used_when_there_are_any() -> None:
    facts = _sharing._memory_facts()
    if facts.huge_free < facts.huge_size or not facts.huge_size:
        pytest.skip("the system has no free huge pages; see /proc/sys/vm/nr_hugepages")
    allocation = allocate(1000, huge_pages=True)
    assert allocation.huge
    assert os.fstat(allocation.fd).st_size == facts.huge_size
    np.frombuffer(allocation.buffer, np.uint8)[:] = 1
    with backings_of([Segment(allocation.address, 1000)]) as found:
        assert through_the_file(found, 0, 1000) == b"\1" * 1000


def test_a_stale_count_of_huge_pages_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = _sharing._memory_facts()
    monkeypatch.setattr(_sharing, "_memory_facts", lambda: facts._replace(huge_size=1 << 21, huge_free=1 << 50))
    allocation = allocate(facts.huge_free + (1 << 21), huge_pages=True)
    assert not allocation.huge


def test_large_memory_lies_in_huge_pages_where_the_kernel_can() -> None:
    allocation = allocate((5 << 21) + 1)
    assert allocation.address % (1 << 21) == 0
    maps = Path("/proc/self/smaps").read_text().split("\n")
    at = next(i for i, line in enumerate(maps) if line.startswith(f"{allocation.address:x}-"))
    told = dict(line.split(":", 1) for line in maps[at + 1 : at + 22])
    whole = int(told["ShmemPmdMapped"].split()[0]) << 10
    if whole == 0 and not allocation.mapping.gather():
        pytest.skip("this kernel puts no huge pages together")
    assert whole == 5 << 21
    assert not np.frombuffer(allocation.buffer, np.uint8).any()
    np.frombuffer(allocation.buffer, np.uint8)[5_000_000] = 7
    with backings_of([Segment(allocation.address + 5_000_000, 1)]) as found:
        assert through_the_file(found, 0, 1) == b"\7"


# ---- Mapping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1, PAGE - 1, PAGE, PAGE + 17])
@pytest.mark.parametrize("nbytes", [1, PAGE, PAGE + 3])
def test_mapping_starts_where_asked(memfd: int, offset: int, nbytes: int) -> None:
    content = np.random.default_rng(1).integers(0, 256, 4 * PAGE, dtype=np.uint8).tobytes()
    os.pwrite(memfd, content, 0)
    mapping = Mapping(memfd, offset, nbytes)
    assert bytes(mapping.buffer) == content[offset : offset + nbytes]
    assert np.frombuffer(mapping.buffer, np.uint8).ctypes.data == mapping.address
    assert mapping.nbytes == nbytes
    mapping.buffer[0:1] = b"!"
    assert os.pread(memfd, 1, offset) == b"!"


def test_mapping_survives_the_descriptor(memfd: int) -> None:
    mapping = Mapping(memfd, 0, PAGE)
    os.close(memfd)
    assert mapping.populate()
    assert bytes(mapping.buffer) == bytes(PAGE)


def test_read_only_mapping(memfd: int) -> None:
    mapping = Mapping(memfd, 0, PAGE, writable=False)
    assert mapping.readonly
    assert mapping.populate()
    assert not np.frombuffer(mapping.buffer, np.uint8).flags.writeable
    with pytest.raises(TypeError):
        mapping.buffer[0] = 1


@pytest.mark.parametrize(
    ("offset", "nbytes"), [(-1, 1), (0, -1), (0, 4 * PAGE + 1), (4 * PAGE, 1), (2**63 - 1, 2**63 - 1), (-(2**63), 1)]
)
def test_mapping_outside_its_file_is_refused(memfd: int, offset: int, nbytes: int) -> None:
    before = fast.live()
    with pytest.raises(ValueError, match=f"not inside the file, which has {4 * PAGE} bytes"):
        Mapping(memfd, offset, nbytes)
    assert fast.live() == before


def test_a_mapping_of_nothing(memfd: int) -> None:
    mapping = Mapping(memfd, 4 * PAGE, 0)
    assert (len(mapping), mapping.address, bytes(mapping.buffer)) == (0, 0, b"")
    assert mapping.populate()
    assert not mapping.gather()


def test_populate_makes_pages_present(memfd: int) -> None:
    assert os.fstat(memfd).st_blocks == 0
    assert Mapping(memfd, 0, 4 * PAGE).populate()
    assert os.fstat(memfd).st_blocks * 512 == 4 * PAGE


def test_populating_a_truncated_file_is_an_error_not_a_crash(memfd: int) -> None:
    mapping = Mapping(memfd, 0, 4 * PAGE)
    os.ftruncate(memfd, PAGE)
    with pytest.raises(OSError, match="populating 16384 bytes"):
        mapping.populate()


def test_mapping_something_that_is_no_file() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        Mapping(-1, 0, 1)
    first, second = os.pipe()
    with pytest.raises(ValueError, match="not inside the file"):
        Mapping(first, 0, 1)
    os.close(first)
    os.close(second)


def test_a_mapping_is_made_once(memfd: int) -> None:
    mapping = Mapping(memfd, 0, PAGE)
    with pytest.raises(TypeError):
        mapping.__init__(memfd, 0, PAGE)


def test_repr_says_size_place_and_mode(memfd: int) -> None:
    mapping = Mapping(memfd, 0, PAGE)
    assert repr(mapping) == f"<Mapping of {PAGE} bytes at {mapping.address:#x}, writable>"
    assert repr(allocate(5)).startswith("<Allocation of 5 bytes at 0x")


def _write(fd: int, offset: int) -> None:
    np.frombuffer(Mapping(fd, offset, 8).buffer, np.uint8)[:] = 9


def test_another_process_writes_into_it() -> None:
    allocation = allocate(2 * PAGE)
    values = np.frombuffer(allocation.buffer, np.uint8)
    child = mp.get_context("fork").Process(target=_write, args=(allocation.fd, PAGE - 4))
    child.start()
    child.join(10)
    assert child.exitcode == 0
    assert list(np.flatnonzero(values)) == list(range(PAGE - 4, PAGE + 4))
