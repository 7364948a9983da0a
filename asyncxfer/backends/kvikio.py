"""Backend ``kvikio``: between GPU memory and files, by GPUDirect Storage where it is, else by way of host memory.

KvikIO's futures have no callback, keep nothing alive and cannot be cancelled, and asking for one takes long enough to
be felt on an event loop. So one thread does all of that: it cuts transfers into pieces, has a bounded number of them
under way, waits for the oldest, and ends each transfer when its last piece has come back. A piece is never larger than
what KvikIO does in one task: of a read that it cuts itself, other parts may still write when the first error is told.

What KvikIO is, and whether it works here, stands in `_kvikio_library`. Host memory can go this way too.
"""

from __future__ import annotations

import asyncio
import ctypes
import enum
import errno
import heapq
import itertools
import os
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from .._fast.ucxport import keep_forever
from ..abc import (
    Backend,
    BackendError,
    Capabilities,
    Completion,
    Cost,
    Endpoint,
    File,
    Memory,
    MemoryKind,
    Offer,
    Op,
    PeerInfo,
    Reach,
    Registration,
    RegistrationError,
    RemoteRegistration,
    Request,
)
from . import _kvikio_library

if TYPE_CHECKING:
    from .._config import Config

__all__ = ["KvikioBackend"]

_KINDS = (MemoryKind.DRAM, MemoryKind.VRAM)
_WINDOW = 32  # pieces under way
_PAGE = 4096  # what the file system and the GPU like offsets to be multiples of
_BATCH = 64  # pairs that become Python's numbers at a time
_ERRNO = {os.strerror(number): number for number in errno.errorcode}


class _Word(enum.Enum):
    """What the thread is told besides transfers."""

    STOPPED = enum.auto()  # one of them is to end early
    END = enum.auto()


class _Piece(NamedTuple):
    """Part of a row: which bytes of which segment, and where in the file."""

    segment: int
    at: int
    offset: int
    nbytes: int


class _Span:
    """Bytes of a GPU, as KvikIO takes them."""

    __slots__ = ("__cuda_array_interface__",)

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {"data": (address, False), "shape": (nbytes,), "typestr": "|u1", "version": 3}


@dataclass(slots=True, eq=False)
class _MemorySide(Registration):
    """Host or GPU memory; of host memory the buffers that are sliced for KvikIO."""

    views: tuple[memoryview, ...]

    def buffer(self, piece: _Piece) -> memoryview | _Span:
        """The bytes of a piece."""
        if self.views:
            return self.views[piece.segment][piece.at : piece.at + piece.nbytes]
        return _Span(self.memory.segments[piece.segment].address + piece.at, piece.nbytes)


@dataclass(slots=True, eq=False)
class _FileSide(Registration):
    """A file; KvikIO opens it when the first transfer comes, so that those which it never moves cost nothing."""

    handle: Any = None

    @property
    def file(self) -> File:
        """What core has opened."""
        file = self.memory.owner
        assert isinstance(file, File)
        return file

    def open(self) -> Any:
        """KvikIO's own descriptors of the same file, whatever its path leads to by now."""
        if self.handle is None:
            mode = "r" if self.file.readonly else "r+"
            self.handle = _kvikio_library.cufile()(f"/proc/self/fd/{self.file.fd}", mode)
        return self.handle

    def close(self) -> None:
        """Close them."""
        if self.handle is not None:
            self.handle.close()
            self.handle = None


@dataclass(frozen=True, slots=True)
class _Work:
    """A request, and which of its sides is the file."""

    request: Request
    file: _FileSide
    memory: _MemorySide
    file_is_local: bool
    piece_bytes: int

    @property
    def reads(self) -> bool:
        """Whether the file is read."""
        return self.file_is_local == (self.request.op == "put")

    def pieces(self) -> Iterator[_Piece]:
        """The rows, cut into pieces that each KvikIO does in one task."""
        pairs = self.request.pairs
        for begin in range(0, len(pairs), _BATCH):
            for pair in pairs[begin : begin + _BATCH].tolist():
                local, remote, length, local_stride, remote_stride, count, local_segment, remote_segment, _ = pair
                if self.file_is_local:
                    segment, at, step, offset, stride = remote_segment, remote, remote_stride, local, local_stride
                else:
                    segment, at, step, offset, stride = local_segment, local, local_stride, remote, remote_stride
                for row in range(count):
                    yield from self._cut(segment, at + row * step, offset + row * stride, length)

    def _cut(self, segment: int, at: int, offset: int, length: int) -> Iterator[_Piece]:
        """One row; all pieces but the first begin where a page of the file does."""
        while length:
            nbytes = min(self.piece_bytes - offset % _PAGE, length)
            yield _Piece(segment, at, offset, nbytes)
            at, offset, length = at + nbytes, offset + nbytes, length - nbytes


class _Flight:
    """A transfer: the pieces that are left, how many KvikIO has, and the first that went wrong."""

    __slots__ = ("completion", "error", "level", "pieces", "under_way", "waiting", "work")

    def __init__(self, work: _Work, completion: Completion, priority: int) -> None:
        self.work = work
        self.completion = completion
        self.level = (priority < 0) - (priority > 0)
        self.pieces = work.pieces()
        self.waiting = False  # to be asked for the next piece
        self.under_way = 0
        self.error: Exception | None = None

    def next(self) -> _Piece | None:
        """The next piece to ask for; None where there is none, or none is wanted any more."""
        if self.error is not None or self.completion.stopping:
            return None
        return next(self.pieces, None)

    def ask(self, piece: _Piece) -> Any:
        """Have KvikIO move a piece; gives its future."""
        work = self.work
        handle = work.file.open()
        move = handle.pread if work.reads else handle.pwrite
        return move(work.memory.buffer(piece), piece.nbytes, piece.offset, piece.nbytes)

    def wait(self, piece: _Piece, future: Any) -> None:
        """Wait until a piece has been moved, or not."""
        try:
            moved = future.get()
        except Exception as error:  # noqa: BLE001 - whatever C++ throws is how it ended
            self.fail(piece, str(error))
            return
        if moved == piece.nbytes:
            self.completion.advance(moved)
        else:
            self.fail(piece, f"{moved:,} bytes were moved")

    def fail(self, piece: _Piece, why: str) -> None:
        """Take note of what went wrong with a piece, in the words of its file."""
        if self.error is None:
            self.error = self._explain(piece, why)

    def _explain(self, piece: _Piece, why: str) -> Exception:
        file = self.work.file.file
        what: Literal["read", "write"] = "read" if self.work.reads else "write"
        number = _ERRNO.get(why.rpartition(": ")[2])  # KvikIO keeps no more of it than the words
        try:
            found = os.lseek(file.fd, 0, os.SEEK_END) - piece.offset  # of block devices, too
        except OSError as error:
            found, number = piece.nbytes, error.errno
        if what == "read" and found < piece.nbytes:
            return file.too_short(piece.offset, piece.nbytes, max(found, 0))
        if number is not None:
            return file.failed(what, number, offset=piece.offset, nbytes=piece.nbytes)
        return BackendError(f"{file.path}: {what} of {piece.nbytes:,} bytes at offset {piece.offset:,}: {why}")


class _Waiter:
    """The thread that asks KvikIO for pieces and waits for them, and one that syncs files meanwhile."""

    def __init__(self) -> None:
        self._inbox: SimpleQueue[_Flight | _Word] = SimpleQueue()
        self._ready: list[tuple[int, int, _Flight]] = []  # a heap: by level, those of one level in turn
        self._under_way: deque[tuple[_Flight, _Piece, Any]] = deque()
        self._turns = itertools.count()
        self._syncing = ThreadPoolExecutor(1, "asyncxfer-kvikio-sync")
        self._thread = Thread(target=self._run, name="asyncxfer-kvikio", daemon=True)
        self._thread.start()

    def put(self, work: _Work, completion: Completion, priority: int) -> None:
        """Take over a transfer, from any thread."""
        completion.post(self._look)
        self._inbox.put(_Flight(work, completion, priority))

    def _look(self) -> None:
        self._inbox.put(_Word.STOPPED)

    def close(self) -> None:
        """End the threads; all transfers have ended."""
        self._inbox.put(_Word.END)
        self._thread.join()
        self._syncing.shutdown()

    # -- in the thread

    def _run(self) -> None:
        while self._take():
            self._fill()
            self._reap()

    def _take(self) -> bool:
        """Take what has come in, and wait for it when there is nothing else to do; False: the end."""
        idle = not self._ready and not self._under_way
        try:
            while True:
                item = self._inbox.get(block=idle)
                if item is _Word.END:
                    return False
                idle = False
                if isinstance(item, _Flight):
                    self._line_up(item)
                else:
                    self._drop_stopped()
                del item  # or the last one would be kept until the next comes
        except Empty:
            return True

    def _line_up(self, flight: _Flight) -> None:
        flight.waiting = True
        heapq.heappush(self._ready, (flight.level, next(self._turns), flight))

    def _drop_stopped(self) -> None:
        """Let those go that wait and are to end early, whatever is ahead of them."""
        waiting, self._ready = self._ready, []
        for entry in waiting:
            if entry[2].completion.stopping:
                self._finish(entry[2])
            else:
                self._ready.append(entry)
        heapq.heapify(self._ready)

    def _fill(self) -> None:
        """Ask for pieces, one of each transfer in turn, until enough are under way."""
        while self._ready and len(self._under_way) < _WINDOW:
            _, _, flight = heapq.heappop(self._ready)
            piece = flight.next()
            if piece is None:
                self._finish(flight)
                continue
            try:
                future = flight.ask(piece)
            except Exception as error:  # noqa: BLE001 - as above
                flight.fail(piece, str(error))
            else:
                self._under_way.append((flight, piece, future))
                flight.under_way += 1
            self._line_up(flight)

    def _finish(self, flight: _Flight) -> None:
        """Ask for no more of a transfer."""
        flight.waiting = False
        if not flight.under_way:
            self._end(flight)

    def _reap(self) -> None:
        """Wait for the oldest piece, and end its transfer if it was the last."""
        if self._under_way:
            flight, piece, future = self._under_way.popleft()
            flight.wait(piece, future)
            flight.under_way -= 1
            if not flight.under_way and not flight.waiting:
                self._end(flight)

    def _end(self, flight: _Flight) -> None:
        """Nothing of it is under way, nor will be."""
        completion, file = flight.completion, flight.work.file.file
        if flight.error is not None:
            completion.fail(flight.error)
        elif flight.work.reads or file.durability == "none" or completion.stopping:
            completion.succeed()
        else:
            self._syncing.submit(_sync, file, completion)


def _sync(file: File, completion: Completion) -> None:
    """See to it that what was written is on the device."""
    try:
        if file.durability == "data":
            os.fdatasync(file.fd)
        else:
            file.sync()
    except OSError as error:
        completion.fail(file.failed("sync", error.errno or errno.EIO))
    else:
        completion.succeed()


class KvikioBackend(Backend):
    """Moves GPU and host memory to and from files, by KvikIO."""

    name: ClassVar[str] = "kvikio"
    capabilities: ClassVar[Capabilities] = Capabilities(
        Reach.PROCESS,
        frozenset(pair for kind in _KINDS for pair in ((kind, MemoryKind.FILE), (MemoryKind.FILE, kind))),
    )
    # Closing a file may take long, as may taking it from the GPU's driver.
    pins: ClassVar[frozenset[MemoryKind]] = frozenset(MemoryKind)

    @classmethod
    def examine(cls, config: Config) -> str:
        """Say which KvikIO there is, and whether it goes by GPUDirect Storage."""
        return _kvikio_library.examine()

    @classmethod
    def details(cls, config: Config) -> Iterable[tuple[str, bool, str]]:
        """Say what GPUDirect Storage is missing here."""
        return _kvikio_library.findings()

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._waiter: _Waiter | None = None
        self._files: set[_FileSide] = set()  # for a child, which must not close them
        self._piece_bytes = max(_kvikio_library.task_bytes() // _PAGE * _PAGE, _PAGE)
        _backends.add(self)

    def register(self, memory: Memory) -> Registration:
        """Take memory, or a file, as it is.

        Raises
        ------
        RegistrationError
            It is neither host memory, GPU memory nor a file.
        """
        if memory.kind is MemoryKind.FILE:
            if self._waiter is None:
                self._waiter = _Waiter()
            side = _FileSide(memory)
            self._files.add(side)
            return side
        if memory.kind not in _KINDS:
            raise RegistrationError(f"moves host memory, GPU memory and files, not {memory.kind}")
        return _MemorySide(memory, _views(memory) if memory.kind is MemoryKind.DRAM else ())

    def deregister(self, registration: Registration) -> None:
        """Let go of a file."""
        if isinstance(registration, _FileSide):
            registration.close()
            self._files.discard(registration)

    async def connect(self, peer: PeerInfo) -> Endpoint:
        """Reach no peer.

        Raises
        ------
        BackendError
            Always: files belong to the agent that has opened them.
        """
        raise BackendError("moves between memory and files of one agent")

    def offers(
        self, op: Op, local: Registration, remote: RemoteRegistration | Registration, endpoint: Endpoint | None
    ) -> Sequence[Offer]:
        """Offer to have KvikIO do it, at a cost above that of the ways that host memory has without a GPU's driver."""
        return (Offer(cost=Cost(setup=150e-6, row=25e-6, byte=1 / 0.4e9)),)

    def prepare(self, request: Request) -> _Work:
        """Find out which side is the file."""
        local, remote = request.local, request.remote
        if isinstance(local, _FileSide):
            assert isinstance(remote, _MemorySide)
            return _Work(request, local, remote, True, self._piece_bytes)
        assert isinstance(local, _MemorySide)
        assert isinstance(remote, _FileSide)
        return _Work(request, remote, local, False, self._piece_bytes)

    def submit(self, prepared: _Work, completion: Completion, priority: int = 0) -> None:
        """Hand a transfer to the thread."""
        assert self._waiter is not None
        self._waiter.put(prepared, completion, priority)

    async def aclose(self) -> None:
        """End the threads."""
        _backends.discard(self)
        if self._waiter is not None:
            await asyncio.to_thread(self._waiter.close)


def _views(memory: Memory) -> tuple[memoryview, ...]:
    """Host memory as buffers of bytes, one a segment; whoever has the registration has its owner, too."""
    return tuple(
        memoryview((ctypes.c_char * segment.nbytes).from_address(segment.address)) for segment in memory.segments
    )


_backends: weakref.WeakSet[KvikioBackend] = weakref.WeakSet()


def _after_fork() -> None:
    """In a child: libcufile is of no use there, so nothing that belongs to it is closed."""
    for backend in _backends:
        keep_forever(backend)
    _backends.clear()


os.register_at_fork(after_in_child=_after_fork)
