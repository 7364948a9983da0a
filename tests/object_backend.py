"""A backend for objects as somebody else would write it: what is stored lies in this process, and `asyncxfer.abc` is
all that it knows."""

from __future__ import annotations

import asyncio
import ctypes
import operator
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any, ClassVar

from asyncxfer import DescriptorError, ObjectMissingError, TransferError
from asyncxfer.abc import (
    Backend,
    BackendError,
    Capabilities,
    Completion,
    Cost,
    Memory,
    MemoryKind,
    ObjectInfo,
    ObjectRegistration,
    Objects,
    Offer,
    Reach,
    Registration,
    RegistrationError,
    Request,
)

DRAM, OBJECT = MemoryKind.DRAM, MemoryKind.OBJECT

#: What is stored: by bucket and key.
STORED: dict[tuple[str, str], bytes] = {}


class Opened(ObjectRegistration):
    """Objects of one bucket."""

    __slots__ = ("bucket",)

    def __init__(self, memory: Memory) -> None:
        super().__init__(memory)
        assert isinstance(memory.owner, Objects)
        self.bucket = memory.owner.bucket

    async def head(self, key: str) -> ObjectInfo:
        if (self.bucket, key) not in STORED:
            raise ObjectMissingError(f"mem://{self.bucket}/{key} is not there")
        data = STORED[self.bucket, key]
        return ObjectInfo(key, len(data), str(hash(data)), 0.0)

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        for bucket, key in sorted(STORED):
            if bucket == self.bucket and key.startswith(prefix) and key > after:
                yield await self.head(key)

    async def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            STORED.pop((self.bucket, key), None)

    async def copy(self, source: str, target: str) -> None:
        await self.head(source)
        STORED[self.bucket, target] = STORED[self.bucket, source]


class MemBackend(Backend):
    """Moves host memory to and from objects of ``mem://``, each transfer in a thread of its own."""

    name: ClassVar[str] = "mem"
    capabilities: ClassVar[Capabilities] = Capabilities(Reach.PROCESS, frozenset({(DRAM, OBJECT), (OBJECT, DRAM)}))
    pins: ClassVar[frozenset[MemoryKind]] = frozenset({OBJECT})

    def register(self, memory: Memory) -> Registration:
        if memory.kind is not OBJECT:
            return Registration(memory)
        assert isinstance(memory.owner, Objects)
        assert threading.current_thread() is not threading.main_thread()
        if memory.owner.scheme != "mem":
            raise RegistrationError(f"opens mem://, not {memory.owner.scheme}://")
        if memory.owner.options:
            raise RegistrationError(f"there is no option {next(iter(memory.owner.options))!r}")
        return Opened(memory)

    def deregister(self, registration: Registration) -> None:
        pass

    async def connect(self, peer: Any) -> Any:
        raise BackendError("reaches no peer")

    def offers(self, op: Any, local: Any, remote: Any, endpoint: Any) -> Sequence[Offer]:
        return (Offer(cost=Cost(1e-4, 1e-6, 1e-9)),)

    def prepare(self, request: Request) -> Request:
        if _writes(request):
            for key, rows in _rows(request).items():
                ends = [0, *(start + length for _, start, length in rows)]
                if [start for _, start, _ in rows] != ends[:-1]:
                    raise DescriptorError(f"a put makes whole objects, and not the rows of {key!r}")
        return request

    def submit(self, prepared: Request, completion: Completion, priority: int = 0) -> None:
        completion.post()
        threading.Thread(target=_carry, args=(prepared, completion)).start()

    async def aclose(self) -> None:
        await asyncio.sleep(0)


def _writes(request: Request) -> bool:
    return (request.op == "put") is not isinstance(request.local, Opened)


def _rows(request: Request) -> dict[str, list[tuple[int, int, int]]]:
    """By key, in the order of their place there: address, place, bytes."""
    memory, here, there = (
        (request.remote, "remote", "local") if isinstance(request.local, Opened) else (request.local, "local", "remote")
    )
    assert isinstance(memory, Registration)
    empty = request.keys if request.whole and not request.nbytes else ()
    found: dict[str, list[tuple[int, int, int]]] = {key: [] for key in empty}
    for pair in request.pairs:
        base = int(memory.bases[pair[f"{here}_segment"]])
        rows = found.setdefault(request.keys[pair[f"{there}_segment"]], [])
        for k in range(int(pair["count"])):
            address = base + int(pair[here]) + k * int(pair[f"{here}_stride"])
            rows.append((address, int(pair[there]) + k * int(pair[f"{there}_stride"]), int(pair["length"])))
    return {key: sorted(rows, key=operator.itemgetter(1)) for key, rows in found.items()}


def _carry(request: Request, completion: Completion) -> None:
    opened = request.local if isinstance(request.local, Opened) else request.remote
    assert isinstance(opened, Opened)
    try:
        for key, rows in _rows(request).items():
            place, name = (opened.bucket, key), f"mem://{opened.bucket}/{key}"
            if _writes(request):
                STORED[place] = b"".join(ctypes.string_at(address, length) for address, _, length in rows)
                continue
            if place not in STORED:
                raise ObjectMissingError(f"{name} is not there", status=404)
            there, end = len(STORED[place]), max((start + length for _, start, length in rows), default=0)
            if there < end or (request.whole and there != end):
                raise TransferError(f"{name} has {there} bytes, {end} were asked for, bytes", backend="mem")
            for address, start, length in rows:
                ctypes.memmove(address, STORED[place][start : start + length], length)
                completion.advance(length)
    except Exception as error:
        completion.fail(error)
    else:
        completion.succeed()
