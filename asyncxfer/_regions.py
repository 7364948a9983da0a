"""The regions of one agent: their names, numbers and slots, and the order in which one is closed.

It shows memory to the backends and to the peers, and takes it back from both before it lets go. What a region is
stands in `_region`, how memory is found and made in `_memory` and `_sharing`.
"""

from __future__ import annotations

import asyncio
import math
import operator
import os
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ._config import Config
from ._control import Acceptor, Incoming
from ._descriptors import MemoryKind
from ._errors import ConfigError, RegistrationError, TransferError
from ._fast.link import SLOTS
from ._files import File, FileMode, open_file
from ._grants import Granted, Grants
from ._memory import Access, Memory, describe
from ._objects import Objects, open_objects, scheme_of
from ._region import ObjectRegion, Region
from ._sharing import Allocation, Backings, Place, allocate, backings_of
from ._transfer import Flights
from .abc import Backend, Registration

__all__ = ["Regions"]

_OPTIONS = {
    MemoryKind.FILE: {"size", "shape", "dtype", "direct", "durability"},
    MemoryKind.OBJECT: {"exists", "options"},
}
_SMALL = 2 << 20  # bytes of memory that are made at once; more takes the kernel a while


class Regions:
    """The regions of one agent.

    Parameters
    ----------
    agent : str
        Its name, for messages.
    backends : mapping of str to Backend
    refused : mapping of str to str
        Why other backends did not load.
    acceptor : Acceptor
        By which peers hear of regions.
    in_thread : callable
        Runs what would hold up the loop.
    """

    def __init__(
        self, agent: str, backends: Mapping[str, Backend], refused: Mapping[str, str], acceptor: Acceptor,
        flights: Flights, config: Config, in_thread: Callable[..., Awaitable[Any]],
    ) -> None:  # fmt: skip
        self._agent = agent
        self._backends = backends
        self._refused = refused
        self._acceptor = acceptor
        self._flights = flights
        self._config = config
        self._in_thread = in_thread
        self._regions: dict[str, Region] = {}
        self._free_slots: list[int] = []
        self._slots = 0
        self._count = 0
        self._pinning = asyncio.Lock()  # held while a backend pins memory, or lets go of it

    def __len__(self) -> int:
        return len(self._regions)

    def __iter__(self) -> Iterator[Region]:
        return iter(list(self._regions.values()))

    def __contains__(self, region: object) -> bool:
        return isinstance(region, Region) and self._regions.get(region.name) is region

    async def allocate(
        self, shape: int | Sequence[int], dtype: npt.DTypeLike, kind: str, name: str | None, access: Access,
        granted: Granted, *, huge_pages: bool,
    ) -> Region:  # fmt: skip
        """Make a region of new memory, as `Agent.allocate` says."""
        self._flights.check_open()
        if kind != "dram":
            raise RegistrationError(f"kind {kind!r} cannot be allocated: no backend for it is loaded; expected 'dram'")
        dims, element = _dimensions(shape, dtype)
        nbytes = math.prod(dims) * element.itemsize
        if nbytes < _SMALL:
            allocation = allocate(nbytes, huge_pages=huge_pages)
        else:
            allocation = await self._in_thread(partial(allocate, nbytes, huge_pages=huge_pages))
        array = np.frombuffer(allocation.buffer, element).reshape(dims)
        return await self.register(array, name, access, granted, allocation)

    async def register(
        self, obj: object, name: str | None, access: Access, granted: Granted, allocation: Allocation | None = None
    ) -> Region:
        """Make a region of memory that exists, as `Agent.register` says."""
        self._flights.check_open()
        memory = describe(obj, access=access)
        grants = Grants(granted, "r" if memory.readonly else access, readonly=memory.readonly)
        array = obj if isinstance(obj, np.ndarray) and allocation is not None else None
        if allocation is not None:
            backings = Backings((allocation.file,), (Place(0, 0),))
        else:
            backings = await self._in_thread(_backings, memory, "w" in access and not memory.readonly)
            self._flights.check_open()
        try:
            region = await self._make(memory, name, access, grants, array)
        except BaseException:
            backings.close()
            raise
        region.backings = backings
        self._acceptor.open(region)
        return region

    async def open(
        self, url: str | os.PathLike[str], mode: FileMode, name: str | None, options: Mapping[str, Any]
    ) -> Region:
        """Make a region of a file or of objects, as `Agent.open` says. Peers are not shown it, and it takes no slot."""
        self._flights.check_open()
        kind = MemoryKind.FILE if scheme_of(url) in ("", "file") else MemoryKind.OBJECT
        given = {option: value for option, value in options.items() if value is not None}
        for option in sorted(set(given) - _OPTIONS[kind]):
            raise ConfigError(f"{os.fspath(url)!r}: {option}= is not for {kind}s")
        self._check_room(name, kind)  # before anything is done to the file
        refused = self._strangers(kind)
        what = f"objects such as {os.fspath(url)}" if kind is MemoryKind.OBJECT else f"this {kind} memory"
        if len(refused) == len(self._backends):
            raise self._useless(what, refused)
        memory: Memory
        if kind is MemoryKind.OBJECT:
            memory = open_objects(os.fsdecode(url), mode, **given)
        else:
            memory = await self._in_thread(partial(open_file, url, mode, **given))
        access: Access = "r" if memory.readonly else "rw"
        try:
            self._flights.check_open()
            return await self._make(memory, name, access, Grants({}, access, readonly=memory.readonly), None)
        except BaseException:
            if kind is MemoryKind.FILE:
                _file_of(memory).close()
            raise

    async def _make(
        self, memory: Memory, name: str | None, access: Access, grants: Grants, array: npt.NDArray[Any] | None
    ) -> Region:
        """Show memory to the backends, and make a region of it."""
        registrations: dict[str, Registration] = {}
        try:
            self._check_room(name, memory.kind)
            refused = await self._show(memory, registrations)
            self._flights.check_open()
            self._check_room(name, memory.kind)  # somebody else may have come meanwhile
            region = self._enter(memory, name, access, grants, array, registrations)
            region.refusals = refused
            return region
        except BaseException:
            await asyncio.shield(self._withdraw(registrations))
            raise

    def _check_room(self, name: str | None, kind: MemoryKind) -> None:
        name = self._name(name)
        if name in self._regions:
            raise RegistrationError(f"agent {self._agent!r} has a region {name!r} already; names are unique")
        if not kind.stored and not self._free_slots and self._slots >= SLOTS:
            raise RegistrationError(f"agent {self._agent!r} has {SLOTS:,} regions, the most there are; register lists")

    def _name(self, name: str | None) -> str:
        return f"region-{self._count + 1}" if name is None else name

    async def _show(self, memory: Memory, registrations: dict[str, Registration]) -> dict[str, str]:
        """Register memory with every backend that can use it, of which one is needed; why the others cannot."""
        refused = self._strangers(memory.kind)
        for backend in self._backends.values():
            if backend.name in refused:
                continue
            try:
                if memory.kind not in backend.pins:
                    registrations[backend.name] = backend.register(memory)
                    continue
                async with self._pinning:
                    await self._to_the_end(self._pin, backend, memory, registrations)
            except RegistrationError as error:
                refused[backend.name] = str(error)
        if not registrations:
            what = memory.owner.url if isinstance(memory.owner, Objects) else f"this {memory.kind} memory"
            raise self._useless(what, refused)
        return refused

    def _strangers(self, kind: MemoryKind) -> dict[str, str]:
        """The backends that do not move this kind of memory at all, with that for a reason."""
        able = {name for name, b in self._backends.items() if any(kind in pair for pair in b.capabilities.kinds)}
        return {name: f"does not move {kind}" for name in self._backends if name not in able}

    def _useless(self, what: str, refused: dict[str, str]) -> RegistrationError:
        reasons = "; ".join(f"{name}: {why}" for name, why in (dict(self._refused) | refused).items())
        return RegistrationError(f"no backend can use {what} ({reasons})")

    async def _withdraw(self, registrations: dict[str, Registration]) -> None:
        """Undo what `_show` did."""
        while registrations:
            name, registration = registrations.popitem()
            backend = self._backends[name]
            if registration.memory.kind not in backend.pins:
                backend.deregister(registration)
                continue
            async with self._pinning:
                await self._to_the_end(backend.deregister, registration)

    @staticmethod
    def _pin(backend: Backend, memory: Memory, registrations: dict[str, Registration]) -> None:
        registrations[backend.name] = backend.register(memory)

    async def _to_the_end(self, call: Callable[..., None], *args: object) -> None:
        """Run a call in a thread; whoever waits is cancelled no sooner than it has ended."""
        task = asyncio.ensure_future(self._in_thread(call, *args))
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.wait([task])
            raise

    def _enter(
        self, memory: Memory, name: str | None, access: Access, grants: Grants, array: npt.NDArray[Any] | None,
        registrations: dict[str, Registration],
    ) -> Region:  # fmt: skip
        """Give memory that has been shown to the backends a number, a name and a slot."""
        number, name = self._count + 1, self._name(name)
        slot = -1 if memory.kind.stored else self._take_slot()
        self._count = number
        kind = ObjectRegion if memory.kind is MemoryKind.OBJECT else Region
        region = kind(
            name, memory, id=number, slot=slot, epoch=number, access=access, grants=grants, keeper=self, array=array
        )
        region.registrations = registrations
        region.exports = {n: e for n, r in registrations.items() if (e := self._backends[n].export(r))}
        self._regions[name] = region
        return region

    def _take_slot(self) -> int:
        if not self._free_slots:  # a slot whose last initiator is stopped inside it never becomes free again
            self._free_slots.append(self._slots)
            self._slots += 1
        return self._free_slots.pop()

    async def close(self, region: Region) -> None:
        """Take a region back from the peers and the backends, and let go of its memory, as `Region.aclose` says."""
        if region.closing is None:
            if region.closed is not None:
                return
            region.closed = f"region {region.name!r} of agent {self._agent!r} was closed"
            region.closing = asyncio.ensure_future(self._take_back(region))
        elif region.closing.done():
            return
        stuck = await asyncio.shield(region.closing)
        if stuck:
            raise RegistrationError(
                f"{region.closed}, but {stuck} was stopped inside a transfer with it; its memory is kept alive until "
                "that process goes on or ends, do not reuse it for something else"
            )

    async def _take_back(self, region: Region) -> str:
        """Do so; gives the names of the peers that were stopped inside it."""
        flights = self._flights
        late, _ = await asyncio.gather(
            self._shut(region, self._acceptor.shut(region)),
            flights.settle(flights.using(region), within=self._config.close_timeout),
        )
        await self._withdraw(region.registrations)
        if region.backings is not None:
            region.backings.close()
        del self._regions[region.name]
        memory = region.forget()
        if late:
            for incoming in late:
                incoming.keep(region.slot, memory)
            return ", ".join(repr(incoming.name) for incoming in late)
        if region.kind is MemoryKind.FILE:
            await self._close_file(_file_of(memory))
        elif region.slot >= 0:
            self._free_slots.append(region.slot)
        return ""

    async def _close_file(self, file: File) -> None:
        try:
            await self._in_thread(file.close)
        except OSError as error:
            raise RegistrationError(f"{file.path} was closed, but not in order: {error.strerror}") from error

    async def sync(self, region: Region) -> None:
        """Have what was written to a file reach its device, as `Region.sync` says."""
        if region.kind is not MemoryKind.FILE:
            raise RegistrationError(f"region {region.name!r} is {region.kind} memory; only a file can be synced")
        file = _file_of(region.memory)
        try:
            await self._in_thread(file.sync)
        except OSError as error:
            raise TransferError(f"{file.path} could not be synced: {error.strerror}") from error

    async def _shut(self, region: Region, shown: list[Incoming]) -> list[Incoming]:
        """Wait until initiators are out of a region that was taken back from them; those that were stopped in it."""
        inside = [incoming for incoming in shown if not incoming.page.shut(region.slot)]
        drained = await asyncio.gather(*(self._drained(incoming, region.slot) for incoming in inside))
        late = [incoming for incoming, empty in zip(inside, drained, strict=True) if not empty]
        for incoming in shown:
            granted_anew = region.closed is None and region.grants.of(incoming.name) is not None
            if incoming not in late and not granted_anew:
                incoming.services.shut(region.slot)
        return late

    def grant(self, region: Region, peer: str, access: Access) -> None:
        """Let a peer use a region, as `Region.grant` says."""
        if region.kind.stored:
            raise RegistrationError(
                f"region {region.name!r} is {region.kind} storage, which peers do not reach; they open it themselves"
            )
        region.grants.grant(peer, access)
        self._acceptor.renew(region, peer)

    async def revoke(self, region: Region, peer: str) -> None:
        """Take a region back from a peer, as `Region.revoke` says."""
        if region.grants.of(peer) is None:
            return
        region.grants.revoke(peer)
        late = await self._shut(region, self._acceptor.shut_to(region, peer))
        if late:
            raise RegistrationError(
                f"region {region.name!r} was taken back from {peer!r}, which was stopped inside a transfer with it; "
                "that one may still move bytes when the process goes on"
            )

    def drop(self, why: str) -> None:
        """In a forked child: the regions are the parent's, and stay open to its peers."""
        for region in self:
            region.closed = why

    async def _drained(self, incoming: Incoming, slot: int) -> bool:
        """Wait until an initiator has left a slot that was shut, for a second at most."""
        incoming.draining.add(slot)
        empty = await self._in_thread(incoming.page.wait, slot, self._config.close_timeout)
        incoming.draining.discard(slot)
        return bool(empty) or incoming.gone


def _dimensions(shape: int | Sequence[int], dtype: npt.DTypeLike) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """The dimensions and element type of an array to be allocated."""
    try:
        dims = tuple(operator.index(size) for size in (shape if isinstance(shape, Iterable) else (shape,)))
        element = np.dtype(dtype)
    except TypeError as error:
        raise RegistrationError(f"shape {shape!r} of {dtype!r} cannot be allocated: {error}") from error
    if any(size < 0 for size in dims) or element.hasobject or not element.itemsize:
        raise RegistrationError(
            f"shape {dims} of {element} cannot be allocated; expected sizes of 0 or more and elements of plain bytes"
        )
    return dims, element


def _file_of(memory: Memory) -> File:
    assert isinstance(memory.owner, File)
    return memory.owner


def _backings(memory: Memory, writable: bool) -> Backings:
    return backings_of(memory.segments, writable=writable)
