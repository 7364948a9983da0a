"""What every backend for objects is, but for the dialect of its store: memory to and from the objects of one scheme.

Its transfers run in the I/O thread; stores are opened and closed there, by whoever opens and closes a region. GPU
memory goes by way of pinned host memory.
"""

from __future__ import annotations

import abc
import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from ...abc import (
    Backend,
    BackendError,
    Capabilities,
    Completion,
    Cost,
    Endpoint,
    Memory,
    MemoryKind,
    ObjectInfo,
    ObjectRegistration,
    Objects,
    ObjectUpload,
    Offer,
    Op,
    PeerInfo,
    Reach,
    Registration,
    RegistrationError,
    RemoteRegistration,
    Request,
)
from .. import _cuda
from . import _thread
from ._flight import Flight
from ._staging import Staging
from ._store import ObjectStore, Part
from ._work import GpuMemory, Work

if TYPE_CHECKING:
    from ..._config import Config

__all__ = ["ObjectBackend", "Reached"]

_T = TypeVar("_T")
_MEMORY = (MemoryKind.DRAM, MemoryKind.VRAM)
_PAGE = 1000  # objects of a list that are fetched at a time
_LISTING = 86400.0  # seconds: whoever reads a list takes their time; each page is bounded by its attempts


@dataclass(frozen=True, slots=True)
class Reached:
    """A bucket that was reached.

    Attributes
    ----------
    ways : mapping of str to callable
        By the name of a way, what makes a store of it when it is first gone; what moves no bytes goes the first.
    refused : mapping of str to str
        Why the other ways cannot be gone.
    aclose : callable or None
        Awaited when all stores have been closed.
    """

    ways: Mapping[str, Callable[[], Awaitable[ObjectStore]]]
    refused: Mapping[str, str] = field(default_factory=dict)
    aclose: Callable[[], Awaitable[None]] | None = None


class _Opened(ObjectRegistration):
    """Objects that were opened, with the stores that reach them, one a way; all but `reached` in the I/O thread."""

    __slots__ = ("_left", "_seconds", "_stores", "_thread", "objects", "reached")

    def __init__(
        self, memory: Memory, objects: Objects, reached: Reached, thread: _thread.IoThread, seconds: float
    ) -> None:
        super().__init__(memory)
        self.objects = objects
        self.reached = reached
        self._thread = thread
        self._seconds = seconds
        self._stores: dict[str, asyncio.Future[ObjectStore]] = {}
        self._left: set[asyncio.Future[None]] = set()

    def store(self, way: str) -> asyncio.Future[ObjectStore]:
        """The store of a way, which is made when it is first asked for."""
        store = self._stores.get(way)
        if store is None or (store.done() and (store.cancelled() or store.exception() is not None)):
            store = self._stores[way] = asyncio.ensure_future(self.reached.ways[way]())
        return asyncio.shield(store) if not store.done() else store

    @property
    def _first(self) -> asyncio.Future[ObjectStore]:
        return self.store(next(iter(self.reached.ways)))

    @property
    def deadline(self) -> float:
        """Of a call that begins now."""
        return self._thread.loop.time() + self._seconds

    async def _there(self, work: Coroutine[Any, Any, _T]) -> _T:
        return await asyncio.wrap_future(self._thread.run(work))

    async def head(self, key: str) -> ObjectInfo:
        """Ask the store."""

        async def ask() -> ObjectInfo:
            return await (await self._first).head(key, deadline=self.deadline)

        return await self._there(ask())

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        """Fetch pages of the store's list as they are asked for."""

        async def begin() -> AsyncIterator[ObjectInfo]:
            return (await self._first).list(prefix, after=after, deadline=self._thread.loop.time() + _LISTING)

        found = await self._there(begin())
        try:
            while page := await self._there(_page(found)):
                for info in page:
                    yield info
        finally:
            await self._there(_close(found))

    async def delete(self, keys: Sequence[str]) -> None:
        """Ask the store."""

        async def ask() -> None:
            await (await self._first).delete(keys, deadline=self.deadline)

        await self._there(ask())

    async def copy(self, source: str, target: str) -> None:
        """Ask the store."""

        async def ask() -> None:
            await (await self._first).copy(source, target, deadline=self.deadline)

        await self._there(ask())

    async def upload(self, key: str) -> ObjectUpload:
        """Ask the store."""

        async def begin() -> _Upload:
            store = await self._first
            return _Upload(self, store, key, await store.begin(key, deadline=self.deadline))

        return await self._there(begin())

    def leave(self, work: Awaitable[None]) -> None:
        """Have something go on behind a transfer's end; in the I/O thread."""
        task = asyncio.ensure_future(work)
        self._left.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Future[None]) -> None:
        self._left.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._thread.loop.call_exception_handler({"message": "an upload was not given up", "exception": error})

    async def settled(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Have something run in the I/O thread that uses the caller's memory: it ends when that has, also cancelled."""
        ended: Future[asyncio.Task[_T]] = Future()
        begun: list[asyncio.Task[_T]] = []

        def start() -> None:
            begun.append(self._thread.loop.create_task(work))
            begun[0].add_done_callback(ended.set_result)

        def stop() -> None:
            begun[0].cancel()

        self._thread.call(start)
        cancelled = False
        while not ended.done():
            try:
                await asyncio.shield(asyncio.wrap_future(ended))
            except asyncio.CancelledError:
                cancelled = True
                self._thread.call(stop)
        if cancelled:
            raise asyncio.CancelledError
        return ended.result().result()

    async def close(self) -> None:
        """Wait for what was left behind, and close the stores; in the I/O thread."""
        while self._left:
            await asyncio.wait(list(self._left))
        for made in self._stores.values():
            await asyncio.wait([made])
            # One that could not be made has been told to who asked for it.
            if not made.cancelled() and made.exception() is None:
                await made.result().aclose()
        if self.reached.aclose is not None:
            await self.reached.aclose()


class _Upload(ObjectUpload):
    """An object that is being written part by part, by the way that moves no bytes of transfers."""

    __slots__ = ("_id", "_key", "_opened", "_parts", "_store")

    def __init__(self, opened: _Opened, store: ObjectStore, key: str, id: str) -> None:
        self._opened = opened
        self._store = store
        self._key = key
        self._id = id
        self._parts: list[Part] = []

    async def part(self, number: int, body: Sequence[memoryview]) -> None:
        """Write one part."""

        async def write() -> None:
            part = await self._store.part(self._key, self._id, number, body, deadline=self._opened.deadline)
            self._parts.append(part)

        await self._opened.settled(write())

    async def complete(self) -> str:
        """Put them together."""

        async def put_together() -> str:
            parts = sorted(self._parts, key=lambda part: part.number)
            exists, deadline = self._opened.objects.exists, self._opened.deadline
            return await self._store.complete(self._key, self._id, parts, exists=exists, deadline=deadline)

        return await self._opened.settled(put_together())

    async def abort(self) -> None:
        """Let nothing be left."""
        await self._opened.settled(self._store.abort(self._key, self._id, deadline=self._opened.deadline))


async def _page(found: AsyncIterator[ObjectInfo]) -> list[ObjectInfo]:
    page = []
    async for info in found:
        page.append(info)
        if len(page) == _PAGE:
            break
    return page


async def _close(found: AsyncIterator[ObjectInfo]) -> None:
    if isinstance(found, AsyncGenerator):
        await found.aclose()


class ObjectBackend(Backend):
    """Moves memory to and from the objects of a store. A backend adds `reach`."""

    scheme: ClassVar[str]
    """Of the URLs that it opens."""
    ways: ClassVar[Mapping[str, Cost]]
    """Its ways of reaching a store, with what each costs."""
    capabilities: ClassVar[Capabilities] = Capabilities(
        Reach.PROCESS,
        frozenset(pair for kind in _MEMORY for pair in ((kind, MemoryKind.OBJECT), (MemoryKind.OBJECT, kind))),
    )
    checksums: ClassVar[bool] = True
    # A bucket is reached, and a GPU's driver may have to start.
    pins: ClassVar[frozenset[MemoryKind]] = frozenset({MemoryKind.OBJECT, MemoryKind.VRAM})

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._thread: _thread.IoThread | None = None
        self._staging: Staging | None = None

    @classmethod
    def details(cls, config: Config) -> Iterable[tuple[str, bool, str]]:
        """Say whether GPU memory goes to and from objects."""
        try:
            return [("GPU memory", True, f"through pinned host memory: {_cuda.examine()}")]
        except BackendError as error:
            return [("GPU memory", False, str(error))]

    @abc.abstractmethod
    async def reach(self, objects: Objects) -> Reached:
        """Find out how a bucket is reached, in the I/O thread; nothing needs to be asked of it.

        Raises
        ------
        RegistrationError
            The options are of no use, or there are no credentials.
        """

    def register(self, memory: Memory) -> Registration:
        """Take host memory as it is, and GPU memory that the driver knows; reach a bucket of this scheme.

        Raises
        ------
        RegistrationError
            It is something else, or the store cannot be reached with these options.
        """
        if memory.kind is MemoryKind.DRAM:
            return Registration(memory)
        if memory.kind is MemoryKind.VRAM:
            return self._register_gpu(memory)
        if memory.kind is not MemoryKind.OBJECT:
            raise RegistrationError(f"moves host and GPU memory to and from objects, not {memory.kind}")
        objects = memory.owner
        assert isinstance(objects, Objects)
        if objects.scheme != self.scheme:
            raise RegistrationError(f"opens {self.scheme}://, not {objects.scheme}://")
        if self._thread is None:
            self._thread = _thread.acquire()
        reached = self._thread.run(self.reach(objects)).result()
        return _Opened(memory, objects, reached, self._thread, self.config.object_timeout)

    def _register_gpu(self, memory: Memory) -> GpuMemory:
        """Find out whose it is: arrays do not always say."""
        try:
            _cuda.examine()
            devices = {_cuda.device_of(segment.address) for segment in memory.segments if segment.nbytes}
        except BackendError as error:
            raise RegistrationError(str(error)) from error
        if len(devices) > 1:
            raise RegistrationError(f"memory of GPUs {sorted(devices)} cannot be one region; register each on its own")
        if self._staging is None:
            self._staging = Staging(self.config.object_staging_bytes)
        return GpuMemory(memory, devices.pop() if devices else memory.device)

    def deregister(self, registration: Registration) -> None:
        """Wait for uploads that are given up, and close connections."""
        if isinstance(registration, _Opened):
            assert self._thread is not None
            self._thread.run(registration.close()).result()

    async def connect(self, peer: PeerInfo) -> Endpoint:
        """Refuse: objects are in a store.

        Raises
        ------
        BackendError
            Always.
        """
        raise BackendError("moves between memory of one agent and objects; there is no way to a peer")

    def offers(
        self, op: Op, local: Registration, remote: RemoteRegistration | Registration, endpoint: Endpoint | None
    ) -> Sequence[Offer]:
        """Offer the ways by which the bucket is reached."""
        opened = next((side for side in (local, remote) if isinstance(side, _Opened)), None)
        if opened is None:
            return (Offer(reason="neither side is objects"),)
        return tuple(
            Offer(via, cost) if via in opened.reached.ways else Offer(via, reason=opened.reached.refused[via])
            for via, cost in self.ways.items()
        )

    def prepare(self, request: Request) -> Work:
        """Find the stretches of objects."""
        return Work(request)

    def submit(self, prepared: Work, completion: Completion, priority: int = 0) -> None:
        """Hand a transfer to the I/O thread."""
        opened, thread = prepared.objects, self._thread
        assert isinstance(opened, _Opened)
        assert thread is not None
        flight = Flight(
            prepared, opened.store, opened.objects.exists, completion, self.config, thread, opened.leave, self.name,
            self._staging, priority,
        )  # fmt: skip
        completion.post(flight.stop, prepared.chunks)
        thread.call(flight.start)

    async def aclose(self) -> None:
        """Free what was pinned, and end the thread if nobody else uses it."""
        if self._staging is not None:
            await asyncio.to_thread(self._staging.close)
        if self._thread is not None:
            await asyncio.to_thread(_thread.release)
