"""Memory that a peer on this host can map: finding the file behind it, and allocating such memory.

Owns everything that is asked of ``/proc/self``, memfds and seals. Only files that live in memory count (memfd,
``/dev/shm`` and other tmpfs, hugetlbfs): a file on a disk can be truncated or stall, and is a storage region's
business. It does not know how descriptors travel to a peer, or what is in the memory.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Self

from ._errors import RegistrationError
from ._fast.memory import HUGETLBFS, TMPFS, Mapping, filesystem

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import TracebackType

    from ._memory import Segment

__all__ = ["MAX_FILES", "Allocation", "Backings", "MapsSnapshot", "Place", "SharedFile", "allocate", "backings_of"]

MAX_FILES = 253
"""Descriptors that one message on a Unix socket carries (SCM_MAX_FD, unix(7))."""

_F_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h; the fcntl module has it from Python 3.13 on


class SharedFile:
    """An open file in memory, owned: closed by `close`, or when the last reference goes.

    Attributes
    ----------
    fd : int
        Closes on exec; -1 once closed.
    writable : bool
        Whoever receives `fd` may map it writable.
    """

    __slots__ = ("fd", "writable")

    def __init__(self, fd: int, *, writable: bool) -> None:
        self.fd = fd
        self.writable = writable

    @property
    def sealed(self) -> bool:
        """Whether the file can never shrink, so that a mapping of it can never fault."""
        try:
            return bool(fcntl.fcntl(self.fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
        except OSError:  # a file system without seals
            return False

    def seal(self) -> bool:
        """Forbid the file to shrink, for ever and for everyone; returns whether that holds now."""
        with contextlib.suppress(OSError):  # not a memfd, or one made without the right to seal
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        return self.sealed

    def close(self) -> None:
        """Close the descriptor; again does nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<SharedFile {self.fd}, {'writable' if self.writable else 'read-only'}>"


class Place(NamedTuple):
    """Where a segment lies in a file.

    Attributes
    ----------
    file : int
        Index into `Backings.files`.
    offset : int, bytes
        Of the segment's first byte.
    """

    file: int
    offset: int


@dataclass(frozen=True, slots=True)
class Backings:
    """The files behind several segments; each file is open once. Closes its files as a context manager.

    Attributes
    ----------
    files : tuple of SharedFile
    places : tuple of (Place or None)
        For each segment, where it lies; None where no peer could map it.
    """

    files: tuple[SharedFile, ...]
    places: tuple[Place | None, ...]

    def close(self) -> None:
        """Close all files; again does nothing."""
        for file in self.files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def backings_of(
    segments: Iterable[Segment],
    *,
    writable: bool = True,
    limit: int = MAX_FILES,
    snapshot: MapsSnapshot | None = None,
) -> Backings:
    """Find the files in memory that `segments` are shared mappings of.

    Parameters
    ----------
    segments : iterable of Segment
    writable : bool
        Open the files for writing too, where that is allowed. False opens them for reading only.
    limit : int, files
        Open no more than these; segments in further files have no place.
    snapshot : MapsSnapshot or None
        The address space as it was a moment ago; None looks now.

    Returns
    -------
    Backings
        With an owned descriptor for every file; the caller closes them.
    """
    wanted = list(segments)
    if not wanted:
        return Backings((), ())
    maps = MapsSnapshot() if snapshot is None else snapshot
    numbers: dict[tuple[int, int], int | None] = {}
    files: list[SharedFile] = []
    places: list[Place | None] = []
    for segment in wanted:
        found = maps.find(segment)
        if found is None:
            places.append(None)
            continue
        if found.identity not in numbers:
            file = maps.open(found, writable=writable) if len(files) < limit else None
            numbers[found.identity] = None if file is None else len(files)
            files.extend([] if file is None else [file])
        number = numbers[found.identity]
        offset = found.offset + segment.address - found.start
        places.append(None if number is None else Place(number, offset))
    return Backings(tuple(files), tuple(places))


class _Mapped(NamedTuple):
    """A run of neighbouring shared mappings that continue one another in one file."""

    start: int
    end: int
    offset: int
    identity: tuple[int, int]  # st_dev, st_ino
    path: str
    first: str  # name of the first mapping in /proc/self/map_files


class MapsSnapshot:
    """The shared file mappings of this process at one moment: read once, asked for many segments."""

    def __init__(self) -> None:
        with open("/proc/self/maps", "rb") as maps:
            self._mapped = list(_parse(maps))
        self._starts = [mapped.start for mapped in self._mapped]
        self._open: dict[tuple[int, int], list[int]] | None = None

    def find(self, segment: Segment) -> _Mapped | None:
        """Return the mapping that covers the whole of `segment`, if it is one shared file."""
        if segment.nbytes == 0:
            return None
        index = bisect_right(self._starts, segment.address) - 1
        if index < 0:
            return None
        mapped = self._mapped[index]
        return mapped if segment.address + segment.nbytes <= mapped.end else None

    def open(self, mapped: _Mapped, *, writable: bool) -> SharedFile | None:
        """Open the file behind `mapped`; None when it is not a file in memory, or cannot be reached."""
        for path in self._ways(mapped):
            for mode in (os.O_RDWR, os.O_RDONLY) if writable else (os.O_RDONLY,):
                file = _open_same(path, mapped.identity, mode)
                if file is not None:
                    return file
        return None

    def _ways(self, mapped: _Mapped) -> Iterator[str]:
        """Yield paths that may lead to the file; each is checked before it is believed."""
        if not mapped.path.startswith("/memfd:"):
            yield mapped.path
        for fd in self._descriptors().get(mapped.identity, ()):
            yield f"/proc/self/fd/{fd}"
        yield f"/proc/self/map_files/{mapped.first}"  # asks for CAP_CHECKPOINT_RESTORE

    def _descriptors(self) -> dict[tuple[int, int], list[int]]:
        """Return this process's open descriptors by the file that they stand for."""
        if self._open is None:
            self._open = {}
            for name in os.listdir("/proc/self/fd"):
                with contextlib.suppress(OSError):  # the listing's own descriptor, or one closed since
                    status = os.fstat(int(name))
                    self._open.setdefault((status.st_dev, status.st_ino), []).append(int(name))
        return self._open


def _parse(lines: Iterable[bytes]) -> Iterator[_Mapped]:
    """Read the shared file mappings out of ``/proc/self/maps`` (proc_pid_maps(5)), neighbours joined.

    One mapping shows as several once madvise or mprotect has treated a part of it differently.
    """
    last: _Mapped | None = None
    for line in lines:
        fields = line.split(None, 5)
        if len(fields) < 6 or fields[1][3:4] != b"s":
            continue
        start, end = (int(text, 16) for text in fields[0].split(b"-"))
        major, minor = (int(text, 16) for text in fields[3].split(b":"))
        offset, identity = int(fields[2], 16), (os.makedev(major, minor), int(fields[4]))
        if last and last.identity == identity and (last.end, last.offset + last.end - last.start) == (start, offset):
            last = last._replace(end=end)
            continue
        if last:
            yield last
        path = os.fsdecode(fields[5].rstrip(b"\n").replace(b"\\012", b"\n"))
        last = _Mapped(start, end, offset, identity, path, fields[0].decode())
    if last:
        yield last


def _open_same(path: str, identity: tuple[int, int], mode: int) -> SharedFile | None:
    """Open `path` if it is that very file, and a file in memory."""
    try:
        status = os.stat(path)  # before opening: to open a FIFO or a device would have effects
        if (status.st_dev, status.st_ino) != identity:
            return None
        fd = os.open(path, mode | os.O_CLOEXEC)
    except OSError:
        return None
    file = SharedFile(fd, writable=mode == os.O_RDWR)  # which closes it again where we do not return it
    status = os.fstat(fd)
    if (status.st_dev, status.st_ino) != identity or filesystem(fd) not in (TMPFS, HUGETLBFS):
        return None
    if file.writable and _write_sealed(fd):
        return None
    return file


def _write_sealed(fd: int) -> bool:
    try:
        seals: int = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return bool(seals & (fcntl.F_SEAL_WRITE | _F_SEAL_FUTURE_WRITE))


class Allocation:
    """New memory in a memfd of its own, zeroed, which peers on this host can map.

    The memory lives until the last buffer over it is gone; `close` only gives up the descriptor.

    Attributes
    ----------
    mapping : Mapping
        The memory, with what can be asked of the kernel about it.
    file : SharedFile
        The memfd, sealed against any change of its size.
    huge : bool
        It consists of huge pages from the system's reserve.
    """

    __slots__ = ("file", "huge", "mapping")

    def __init__(self, mapping: Mapping, file: SharedFile, *, huge: bool) -> None:
        self.mapping = mapping
        self.file = file
        self.huge = huge

    @property
    def buffer(self) -> memoryview:
        """The memory: ``np.frombuffer(allocation.buffer, dtype)``."""
        return self.mapping.buffer

    @property
    def fd(self) -> int:
        """The memfd's descriptor; -1 once closed."""
        return self.file.fd

    @property
    def address(self) -> int:
        """Where the memory lies in this process."""
        return self.mapping.address

    @property
    def nbytes(self) -> int:
        """Bytes of memory, as asked for."""
        return self.mapping.nbytes

    def close(self) -> None:
        """Close the descriptor; mappings stay. Again does nothing."""
        self.file.close()

    def __repr__(self) -> str:
        return f"<Allocation of {self.nbytes} bytes at {self.address:#x}{', huge pages' if self.huge else ''}>"


def allocate(nbytes: int, *, huge_pages: bool = False) -> Allocation:
    """Return new, zeroed memory that peers on this host can map.

    Parameters
    ----------
    nbytes : int, bytes
    huge_pages : bool
        Take huge pages from the system's reserve if enough are free. In any case the kernel is asked to put together
        huge pages from what is free otherwise.

    Raises
    ------
    RegistrationError
        There is less memory than that, or the kernel refused.
    """
    if nbytes < 0:
        raise RegistrationError(f"cannot allocate {nbytes} bytes; expected 0 or more")
    facts = _memory_facts()
    # a memfd takes its pages when they are touched: without this, too much would end in the OOM killer
    if nbytes > facts.available:
        raise RegistrationError(f"cannot allocate {nbytes:,} bytes: only {facts.available:,} are free; ask for less")
    if huge_pages and 0 < nbytes <= facts.huge_free:
        with contextlib.suppress(OSError):  # others may have taken them since
            return _allocate(nbytes, granule=facts.huge_size, flags=os.MFD_HUGETLB, huge=True)
    try:
        allocation = _allocate(nbytes, granule=mmap.PAGESIZE, flags=0, huge=False)
    except OSError as error:
        raise RegistrationError(
            f"cannot allocate {nbytes:,} bytes ({facts.available:,} are free): {error}; "
            "see the limits on open files (ulimit -n) and address space (ulimit -v)"
        ) from error
    allocation.mapping.gather()
    return allocation


def _allocate(nbytes: int, *, granule: int, flags: int, huge: bool) -> Allocation:
    fd = os.memfd_create("asyncxfer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    file = SharedFile(fd, writable=True)
    os.ftruncate(fd, -(-nbytes // granule) * granule)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return Allocation(Mapping(fd, 0, nbytes), file, huge=huge)


class _MemoryFacts(NamedTuple):
    available: int  # bytes that this process could still touch
    huge_size: int  # bytes of a huge page
    huge_free: int  # bytes in free huge pages that nobody has reserved


def _memory_facts() -> _MemoryFacts:
    with open("/proc/meminfo", encoding="ascii") as lines:
        info = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    available = (info["MemAvailable"] + info.get("SwapFree", 0)) * 1024
    with contextlib.suppress(OSError, ValueError), open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit:
        available = min(available, int(limit.read()))  # "max" is no number
    huge_size = info.get("Hugepagesize", 0) * 1024
    spare = info.get("HugePages_Free", 0) - info.get("HugePages_Rsvd", 0)
    return _MemoryFacts(available, huge_size, spare * huge_size)
