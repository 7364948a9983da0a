"""Regions: memory that this agent has registered, and regions of peers.

A region knows where its bytes are and who may reach them, and is indexed into descriptor lists. It does not move
bytes; what a backend keeps for it lies in `registrations` (own) or `attachments` (a peer's).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from ._descriptors import DescriptorList, Indexable, Layout, MemoryKind
from ._errors import ClosedError, DescriptorError, RegistrationError
from ._fast.posting import Usable
from ._grants import Grants
from ._memory import Access, Memory, describe
from ._metadata import RegionInfo
from ._object_rows import KeyIndexable
from ._objects import Objects
from ._stored import StoredObjects
from .abc import ObjectRegistration, Registration

if TYPE_CHECKING:
    import asyncio

    from ._peer import Peer
    from ._sharing import Allocation, Backings
    from .abc import RemoteRegistration

__all__ = ["ObjectRegion", "Opening", "Region", "RemoteRegion"]


class Keeper(Protocol):
    """What a region asks of who made it."""

    async def close(self, region: Region) -> None:
        """Take it back from everybody, and let go of its memory."""

    def grant(self, region: Region, peer: str, access: Access) -> None:
        """Let a peer use it."""

    async def revoke(self, region: Region, peer: str) -> None:
        """Take it back from a peer."""

    async def sync(self, region: Region) -> None:
        """Have what was written to its file reach the device."""


class Region(Indexable, Usable):
    """Memory that this agent has registered, or storage that it has opened. Closing it takes it back from all peers.

    Attributes
    ----------
    name : str
    layout : Layout
    dtype : str
    kind : MemoryKind
    access : "r", "w" or "rw"
        What peers may do where none is named: read it (get), write it (put).
    readonly : bool
        The memory or file itself must not be written.
    """

    def __init__(
        self, name: str, memory: Memory, *, id: int, slot: int, epoch: int, access: Access, grants: Grants,
        keeper: Keeper, array: npt.NDArray[Any] | None = None,
    ) -> None:  # fmt: skip
        self.name = name
        self.memory = memory
        self.layout: Layout = memory.layout
        self.dtype = memory.dtype
        self.kind: MemoryKind = memory.kind
        self.readonly = memory.readonly
        self.access: Access = "r" if memory.readonly else access
        self.id = id
        self.slot = slot
        self.epoch = epoch
        self.registrations: dict[str, Registration] = {}
        self.refusals: dict[str, str] = {}
        self.exports: dict[str, bytes] = {}
        self.backings: Backings | None = None
        self.allocation: Allocation | None = None
        self.closing: asyncio.Task[str] | None = None
        self.grants = grants
        self._keeper = keeper
        self._array = array

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape by which it is indexed; None for a list of unlike arrays."""
        return self.layout.shape

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.layout.nbytes

    @property
    def array(self) -> npt.NDArray[Any]:
        """The memory of a region from `Agent.allocate`, as an array.

        Raises
        ------
        ClosedError
            The region was closed; take a reference before, and it stays valid.
        RegistrationError
            The memory was registered by you; you have the object.
        """
        if self._array is None:
            self.check_open()
            made = "open" if self.kind.stored else "register"
            raise RegistrationError(f"region {self.name!r} was made by {made}(); only allocate() makes an array")
        return self._array

    @property
    def objects(self) -> StoredObjects:
        """What can be asked of a region of objects: to list, head, delete and copy them.

        Raises
        ------
        RegistrationError
            It is memory, or a file.
        """
        raise RegistrationError(f"region {self.name!r} is {self.kind} memory; only what was opened in a store has that")

    def of(self, objects: object) -> DescriptorList:
        """Descriptors of arrays or tensors that lie in this region, in their order.

        Parameters
        ----------
        objects : array, tensor, buffer, or list or tuple of them
            Views of the registered memory.

        Raises
        ------
        DescriptorError
            One lies outside the region.
        """
        memory = describe(objects, access="r")
        rows = []
        for part, segment in enumerate(memory.segments):
            runs = Layout(
                segment_sizes=(segment.nbytes,), shapes=(memory.layout.shapes[part],),
                strides=(memory.layout.strides[part],), offsets=(memory.layout.offsets[part],),
                itemsize=memory.layout.itemsize, stacked=False,
            ).index(())  # fmt: skip
            home = self._segment_of(segment.address, segment.nbytes, part)
            runs = runs.copy()
            runs["offset"] += np.uint64(segment.address - self.memory.segments[home].address)
            runs["segment"] = home
            rows.append(runs)
        return DescriptorList.build(self, np.concatenate(rows))

    def _segment_of(self, address: int, nbytes: int, item: int) -> int:
        for index, segment in enumerate(self.memory.segments):
            if segment.address <= address and address + nbytes <= segment.address + segment.nbytes:
                return index
        raise DescriptorError(
            f"item {item}: {nbytes} bytes at {address:#x} are not inside region {self.name!r}; register their memory"
        )

    def check_open(self) -> None:
        """Raise ClosedError when it has been closed."""
        if self.closed is not None:
            raise ClosedError(self.closed)

    async def aclose(self) -> None:
        """Take it back from all peers, wait for what is in flight, and let go of the memory. Again does nothing.

        A call that is cancelled does not stop it; another call waits for its end.

        Raises
        ------
        RegistrationError
            A peer was stopped inside a write to it; the memory is kept alive until that peer goes on or ends. Or it is
            a file, and its file system could not write what it had kept back.
        """
        await self._keeper.close(self)

    async def sync(self) -> None:
        """Have what the transfers that have ended wrote to the file reach its device, as fsync does.

        Raises
        ------
        ClosedError
            The region was closed.
        RegistrationError
            It is not a file.
        TransferError
            The device did not take it: a part of it may be lost.
        """
        self.check_open()
        await self._keeper.sync(self)

    def grant(self, peer: str | Peer, access: Access = "rw") -> None:
        """Let a peer do so much with it from now on, neither more nor less; the peer is told.

        Parameters
        ----------
        peer : str or Peer
            By its name, whether it is connected or not.
        access : {"r", "w", "rw"}
            What it may do: get from it, put to it. Read-only memory is only ever read.

        Raises
        ------
        ClosedError
            The region was closed.
        RegistrationError
            There is no such access, or that is no name.
        """
        self.check_open()
        self._keeper.grant(self, peer if isinstance(peer, str) else peer.name, access)

    async def revoke(self, peer: str | Peer) -> None:
        """Take it back from one peer, and wait until that peer is no longer inside it.

        Parameters
        ----------
        peer : str or Peer

        Raises
        ------
        ClosedError
            The region was closed.
        RegistrationError
            The peer was stopped inside a transfer with it, and may go on with that one.
        """
        self.check_open()
        await self._keeper.revoke(self, peer if isinstance(peer, str) else peer.name)

    def forget(self) -> Memory:
        """Let go of the memory; what it was."""
        memory, self.memory = self.memory, replace(self.memory, owner=None)
        self._array = None
        return memory

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        closed = ", closed" if self.closed else ""
        return f"<Region {self.name!r}: {self.dtype} {self.shape}, {self.kind}, {self.access!r}{closed}>"


class ObjectRegion(KeyIndexable, Region):
    """Objects of a store, indexed by their keys."""

    @property
    def objects(self) -> StoredObjects:
        """What can be asked of them without moving bytes."""
        self.check_open()
        asked = next(r for r in self.registrations.values() if isinstance(r, ObjectRegistration))
        return StoredObjects(self, self._opened, asked)

    @property
    def _opened(self) -> Objects:
        assert isinstance(self.memory.owner, Objects)
        return self.memory.owner

    def whole_key(self, key: str) -> str:
        """The key in the bucket.

        Raises
        ------
        DescriptorError
            No store has such a key.
        ClosedError
            The region was closed.
        """
        self.check_open()
        return self._opened.whole_key(key)

    def of(self, objects: object) -> DescriptorList:
        """Refused: no array lies in an object.

        Raises
        ------
        DescriptorError
            Always.
        """
        raise DescriptorError("no array lies in an object; index the region by key")

    def __repr__(self) -> str:
        closed = ", closed" if self.closed else ""
        return f"<Region {self.name!r}: {self.name if self.closed else self._opened.url}, {self.kind}{closed}>"


class Opening(Awaitable[Region]):
    """A region that is being made or opened: ``await`` it, or ``async with`` it to have it closed at the end."""

    def __init__(self, make: Callable[[], Awaitable[Region]]) -> None:
        self._make = make
        self._region: Region | None = None

    def __await__(self) -> Generator[Any, None, Region]:
        return self._make().__await__()

    async def __aenter__(self) -> Region:
        self._region = await self._make()
        return self._region

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        region, self._region = self._region, None
        if region is not None:
            await region.aclose()


class RemoteRegion(Indexable, Usable):
    """A peer's region, indexed with the shape and dtype it was registered with.

    Attributes
    ----------
    name : str
    peer : Peer
    layout : Layout
    dtype : str
    kind : MemoryKind
    access : "r", "w" or "rw"
    """

    def __init__(self, peer: Peer, info: RegionInfo) -> None:
        self.peer = peer
        self.info = info
        self.name = info.name
        self.layout: Layout = info.layout()
        self.dtype = info.dtype
        self.kind: MemoryKind = info.kind
        self.access: Access = info.access
        self.attachments: dict[str, RemoteRegistration] = {}
        self.refusals: dict[str, str] = {}

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape by which it is indexed; None for a list of unlike arrays."""
        return self.layout.shape

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.layout.nbytes

    def renew(self, info: RegionInfo) -> None:
        """Take note of what the peer grants from now on."""
        self.info = info
        self.access = info.access

    def check_open(self) -> None:
        """Raise PeerLostError or ClosedError when it can no longer be reached."""
        self.peer.check_joined()
        if self.closed is not None:
            raise ClosedError(self.closed)

    def __repr__(self) -> str:
        return f"<RemoteRegion {self.name!r} of {self.peer.name!r}: {self.dtype} {self.shape}, {self.access!r}>"
