"""An object store in this process below the shared object backend (`ram://`): what is asked of it can be held back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import ClassVar

from asyncxfer import ObjectError, ObjectMissingError
from asyncxfer._fast.crc64 import crc64nvme
from asyncxfer.abc import Cost, Exists, ObjectInfo, Objects
from asyncxfer.backends._object._backend import ObjectBackend, Reached
from asyncxfer.backends._object._store import ObjectStore, Part, Read

__all__ = ["RAM", "RamBackend"]


class Ram:
    """What is stored, by key; what tests say and ask. Requests are counted while they have memory of a transfer."""

    def __init__(self) -> None:
        self.stored: dict[str, bytes] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.failing: set[str] = set()
        self.under_way = self.most = self.begun = 0
        self._loop: asyncio.AbstractEventLoop
        self._gate: asyncio.Event | None = None

    def hold(self) -> None:
        """Hold back all requests that move bytes."""
        self._gate = asyncio.Event()

    def go_on(self) -> None:
        """Let them go on."""
        gate, self._gate = self._gate, None
        assert gate is not None
        self._loop.call_soon_threadsafe(gate.set)

    async def pass_(self, key: str) -> None:
        """A request that has got its memory."""
        self._loop = asyncio.get_running_loop()
        self.under_way += 1
        self.begun += 1
        self.most = max(self.most, self.under_way)
        try:
            await asyncio.sleep(0)
            if self._gate is not None:
                await self._gate.wait()
            if key in self.failing:
                raise ObjectError(f"request for ram://{key} failed, as it was to", url=f"ram://{key}", status=500)
        finally:
            self.under_way -= 1


RAM = Ram()


class RamStore(ObjectStore):
    """All of it, as the interface of stores has it."""

    url = "ram://bucket"
    algorithm: ClassVar[str] = "crc64nvme"
    smallest_part: ClassVar[int] = 5 << 20
    most_parts: ClassVar[int] = 4
    largest_write: ClassVar[int] = 1 << 30

    async def read(
        self, key: str, offset: int, into: Sequence[memoryview], *, whole: bool, verify: bool, etag: str | None,
        deadline: float, crc: bool = False,
    ) -> Read:  # fmt: skip
        data = await self._data(key)
        await RAM.pass_(key)
        size = sum(view.nbytes for view in into)
        if offset + size > len(data) or (whole and size != len(data)):
            raise ObjectError(f"ram://{key} has {len(data)} bytes, not {size} from {offset}", url=f"ram://{key}")
        at = offset
        for view in into:
            view[:] = data[at : at + view.nbytes]
            at += view.nbytes
        return Read(str(hash(data)), len(data), crc64nvme(data[offset:at]) if crc else None)

    async def write(self, key: str, body: Sequence[memoryview], *, exists: Exists, deadline: float) -> str:
        await RAM.pass_(key)
        RAM.stored[key] = b"".join(body)
        return "etag"

    async def begin(self, key: str, *, deadline: float) -> str:
        RAM.uploads[key] = {}
        return key

    async def part(self, key: str, upload: str, number: int, body: Sequence[memoryview], *, deadline: float) -> Part:
        await RAM.pass_(key)
        data = RAM.uploads[upload][number] = b"".join(body)
        return Part(number, len(data), "etag", 0)

    async def complete(self, key: str, upload: str, parts: Sequence[Part], *, exists: Exists, deadline: float) -> str:
        had = RAM.uploads.pop(upload)
        RAM.stored[key] = b"".join(had[part.number] for part in parts)
        return "etag"

    async def abort(self, key: str, upload: str, *, deadline: float) -> None:
        del RAM.uploads[upload]

    async def head(self, key: str, *, deadline: float) -> ObjectInfo:
        data = await self._data(key)
        return ObjectInfo(key, len(data), str(hash(data)), 0.0)

    async def list(self, prefix: str, *, deadline: float, after: str = "") -> AsyncIterator[ObjectInfo]:
        for key in sorted(RAM.stored):
            if key.startswith(prefix) and key > after:
                yield await self.head(key, deadline=deadline)

    async def delete(self, keys: Sequence[str], *, deadline: float) -> None:
        for key in keys:
            RAM.stored.pop(key, None)

    async def copy(self, source: str, target: str, *, deadline: float) -> None:
        RAM.stored[target] = await self._data(source)

    async def aclose(self) -> None:
        """Have nothing."""

    @staticmethod
    async def _data(key: str) -> bytes:
        if key not in RAM.stored:
            raise ObjectMissingError(f"ram://{key} is not there", url=f"ram://{key}", status=404)
        return RAM.stored[key]


class RamBackend(ObjectBackend):
    """Moves memory to and from objects of ``ram://``."""

    name: ClassVar[str] = "ram"
    scheme: ClassVar[str] = "ram"
    ways: ClassVar[Mapping[str, Cost]] = {"": Cost(1e-4, 1e-6, 1e-9)}

    async def reach(self, objects: Objects) -> Reached:
        async def made() -> ObjectStore:
            return RamStore()

        ways: dict[str, Callable[[], Awaitable[ObjectStore]]] = {"": made}
        return Reached(ways)
