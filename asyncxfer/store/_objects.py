"""Blocks as objects of a store, one a block, named by its key, behind the API of the store on disk.

Blocks pass through slots of memory, where they get their trailer and are compared with it: an object is served when it
is whole and its own key's, whatever happened to it on the way or where it lies. How objects are reached is the agent's
business.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from asyncxfer import (
    AccessError,
    Agent,
    ChecksumError,
    ClosedError,
    DescriptorError,
    DescriptorList,
    ObjectMissingError,
    Region,
    TransferError,
)
from asyncxfer._fast.blockindex import Bools, pack

from ._api import Store, check_rows
from ._errors import StoreError, StoreFormatError
from ._journal import Durability
from ._object_format import HEAD_BYTES, HEAD_NAME, IDENT_BYTES, TRAILER_BYTES, decode_head, encode_head, name_of
from ._object_room import Room
from ._opening import Mode
from ._operations import Operations
from ._report import Report
from ._slabs import chosen_rows
from ._spread import spread
from ._staging import Staging
from ._store import to_the_end
from ._turns import next_turn

__all__ = ["BATCH", "ObjectStore", "Place", "idents_of"]

BATCH = 8  # blocks that are put by one transfer
_WIDTH = 64  # requests of one call that are under way
_PIECE = 512  # keys of a call that are looked at without letting the loop turn
_REMEMBERED = 65_536  # keys whose objects proved damaged


@dataclass(frozen=True, slots=True)
class Place:
    """What `open` was given."""

    url: str
    block_bytes: int | None
    budget: int | None
    mode: Mode
    options: Mapping[str, object]

    async def region(self, agent: Agent, exists: str) -> Region:
        """Open the objects."""
        mode = "r" if self.mode == "r" else "r+"
        return await agent.open(self.url, mode, exists=exists, options=self.options)  # type: ignore[arg-type]


class ObjectStore(Store):
    """Blocks of one size under keys, as objects: `open` makes one of a URL such as ``s3://bucket/prefix``.

    Keys are names of content: whoever puts a block under a key puts the same bytes. Any number of processes may write
    to a store that has no budget.

    Attributes
    ----------
    url : str
    block_bytes : int, bytes
    mode : {"w", "r"}
    durability : str
        "full": an object is as lasting as its store makes it.
    report : Report
        Whether the store was made; nothing else is found by opening it.
    """

    def __init__(self, agent: Agent, place: Place, region: Region, block_bytes: int, staging: Staging) -> None:
        self.url = region.objects.url
        self.block_bytes = block_bytes
        self.mode: Mode = place.mode
        self.durability: Durability = "full"
        self.report = Report()
        self.staging = staging
        self._agent = agent
        self._place = place
        self._region = region
        self._replacing: asyncio.Task[Region] | None = None
        self._room: Room | None = None
        self._damaged: OrderedDict[bytes, None] = OrderedDict()
        self._operations = Operations()
        self._closed = False
        self._ending: asyncio.Task[None] | None = None
        self._counters = dict.fromkeys(("puts", "hits", "misses", "deleted", "damaged"), 0)

    # ---- life ----------------------------------------------------------------------------------------------------

    @classmethod
    async def open(cls, agent: Agent, place: Place) -> ObjectStore:
        """Open what `place` names.

        Raises
        ------
        StoreError
            And its kinds: there is none, or one of other blocks.
        """
        region = await place.region(agent, "keep")
        try:
            block_bytes, created = await _head(agent, region, place)
            staging = await Staging.make(agent, block_bytes)
            store = cls(agent, place, region, block_bytes, staging)
        except BaseException:
            await region.aclose()
            raise
        try:
            store.report.created = created
            if place.budget is not None and place.mode == "w":
                await store._count(place.budget)
        except BaseException:
            await store.aclose()
            raise
        return store

    async def _count(self, budget: int) -> None:
        listed = self._region.objects.list()
        found = sorted([(info.modified, info.key) async for info in listed if info.key != HEAD_NAME])
        room = Room(budget // self._object_bytes, [name for _, name in found], self._delete_objects)
        self.report.over_budget = max(0, len(found) - room.limit)
        self.report.blocks = len(found) - self.report.over_budget
        await room.shrink()
        self._room = room

    async def aclose(self) -> None:
        """Let what is in flight end, and let go of connections and memory. Again does nothing."""
        if self._ending is None:
            self._closed = True
            self._ending = asyncio.ensure_future(self._end())
        await to_the_end(self._ending)

    async def _end(self) -> None:
        await self._operations.ended()
        try:
            if self._replacing is not None:
                await asyncio.wait([self._replacing])
                if not self._replacing.exception():
                    await self._replacing.result().aclose()
        finally:
            try:
                await self._region.aclose()
            finally:
                await self.staging.aclose()

    def __repr__(self) -> str:
        return f"<ObjectStore {self.url!r}, {self.mode!r}, {'closed' if self._closed else 'open'}>"

    def __len__(self) -> int:
        """How many blocks there are, with a budget.

        Raises
        ------
        StoreError
            Without one, nobody counts.
        """
        if self._room is None:
            raise StoreError(f"{self.url} has no budget, so its objects are not counted; list them with Agent.open")
        return len(self._room)

    # ---- blocks --------------------------------------------------------------------------------------------------

    async def put(
        self, keys: Sequence[bytes], rows: DescriptorList, *, prefix: bytes | None = None, pin: bool = False,
        replace: bool = False,
    ) -> None:  # fmt: skip
        """Store blocks; returns once all of them are objects.

        A get finds a block from then on. The rows must not be written to meanwhile. If it fails or is cancelled, some
        of the blocks may have been stored, whole.

        Parameters
        ----------
        keys : sequence of bytes
        rows : DescriptorList
            One block a key.
        prefix : bytes or None
            Is of no use here.
        pin : bool
            Refused: nothing but a budget takes blocks away, and that knows no pins.
        replace : bool
            False: an object that is there is left alone, unless it was found damaged. True: it is replaced.

        Raises
        ------
        StoreError
            Pins were asked for.
        DescriptorError
            The rows are not one block a key, or a key is wrong.
        AccessError
            The store was opened for reading.
        ClosedError
            The store is closed.
        TransferError
            The blocks could not be written: as an ObjectError where the store refused or did not answer.
        """
        if pin:
            raise StoreError(f"blocks of {self.url} cannot be pinned: open it without a budget, and all of them stay")
        self._check_writable("put")
        check_rows(keys, rows, self.block_bytes)
        async with self._operations:
            for idents, first in _pieces(keys):
                await self._put(idents, first, rows, replace=replace)

    async def _put(self, idents: list[bytes], first: int, rows: DescriptorList, *, replace: bool) -> None:
        todo = list(dict(zip(idents, range(len(idents)), strict=True)).values())[::-1]  # of equal keys, the last counts

        async def some(_: int) -> None:
            while todo:
                async with self.staging.slots(BATCH) as slots:
                    which = [todo.pop() for _ in slots[: len(todo)]]
                    if which:
                        taken = slots[: len(which)]
                        chosen = chosen_rows(rows, first + np.array(which), self.block_bytes)
                        await self._agent.put(chosen, self.staging.blocks(taken))
                        await self.send([idents[number] for number in which], taken, replace=replace)

        width = min(_WIDTH, -(-len(todo) // BATCH))
        await spread(range(width), some, width)

    async def get(self, keys: Sequence[bytes], rows: DescriptorList) -> Bools:
        """Read blocks.

        Parameters
        ----------
        keys : sequence of bytes
        rows : DescriptorList
            One block a key, to be written to.

        Returns
        -------
        (n,) bool
            Which keys were here. The rows of those that were not are left as they are. Also False where an object is
            no whole block of its key, twice: it is never served, and the next put replaces it.

        Raises
        ------
        DescriptorError
            The rows are not one block a key, or a key is wrong.
        AccessError
            The rows must not be written to.
        ClosedError
            The store is closed.
        TransferError
            The blocks could not be read: as an ObjectError where the store refused or did not answer.
        """
        self._check_open()
        check_rows(keys, rows, self.block_bytes)
        hits = np.zeros(len(keys), np.bool_)
        async with self._operations:
            for idents, first in _pieces(keys):
                await self._get(idents, first, rows, hits)
        return hits

    async def _get(self, idents: list[bytes], first: int, rows: DescriptorList, hits: Bools) -> None:
        async def one(number: int) -> None:
            async with self.staging.slots(1) as slots:
                if await self.receive(idents[number], slots[0]):
                    row = chosen_rows(rows, np.array([first + number]), self.block_bytes)
                    await self._agent.get(row, self.staging.blocks(slots))
                    hits[first + number] = True

        await spread(range(len(idents)), one, _WIDTH)

    async def contains(self, keys: Sequence[bytes]) -> Bools:
        """Tell of each key whether it has an object, by a request each; the object is not looked into.

        Parameters
        ----------
        keys : sequence of bytes

        Returns
        -------
        (n,) bool

        Raises
        ------
        DescriptorError
            A key is wrong.
        ClosedError
            The store is closed.
        TransferError
            The store refused or did not answer.
        """
        self._check_open()
        found = np.zeros(len(keys), np.bool_)
        async with self._operations:
            for idents, first in _pieces(keys):
                await self._look(idents, found[first : first + len(idents)])
        return found

    async def _look(self, idents: list[bytes], found: Bools) -> None:
        async def one(number: int) -> None:
            found[number] = await self._length(name_of(idents[number])) == self._object_bytes

        await spread(range(len(idents)), one, _WIDTH)

    async def delete(self, keys: Sequence[bytes]) -> Bools:
        """Delete the objects of keys; returns once they are gone.

        Parameters
        ----------
        keys : sequence of bytes

        Returns
        -------
        (n,) bool
            Which keys had one.

        Raises
        ------
        DescriptorError
            A key is wrong.
        AccessError
            The store was opened for reading.
        ClosedError
            The store is closed.
        TransferError
            The store refused or did not answer.
        """
        self._check_writable("delete")
        found = await self.contains(keys)
        async with self._operations:
            for idents, _ in _pieces(keys):
                names = [name_of(ident) for ident in dict.fromkeys(idents)]
                await self._delete_objects(names)
                if self._room is not None:
                    self._room.forget(names)
        self._counters["deleted"] += int(np.count_nonzero(found))
        return found

    async def pin(self, keys: Sequence[bytes]) -> Bools:
        """Refused, as in `put`.

        Raises
        ------
        StoreError
            Always.
        """
        raise StoreError(f"blocks of {self.url} cannot be pinned: open it without a budget, and all of them stay")

    async def unpin(self, keys: Sequence[bytes]) -> Bools:
        """Refused, as in `pin`.

        Raises
        ------
        StoreError
            Always.
        """
        return await self.pin(keys)

    async def compact(self) -> None:
        """Nothing needs to be done: there is no journal."""
        self._check_open()

    def stats(self) -> dict[str, int]:
        """Counters since it was opened.

        Returns
        -------
        dict
            ``"puts"``, ``"hits"``, ``"misses"``, ``"deleted"``, ``"damaged"`` (objects that proved to be); with a
            budget also ``"blocks"``, ``"bytes"`` (of objects, with their trailers), ``"limit"`` (objects that the
            budget allows), ``"evicted"``.
        """
        if (room := self._room) is None:
            return dict(self._counters)
        held = {"blocks": len(room), "bytes": len(room) * self._object_bytes, "limit": room.limit}
        return {**held, "evicted": room.evicted, **self._counters}

    # ---- single objects, for tiers -----------------------------------------------------------------------------------

    async def send(self, idents: Sequence[bytes], slots: Sequence[int], *, replace: bool = False) -> None:
        """Make objects of the blocks in slots. If it fails, it has made some of them, or none."""
        for ident, slot in zip(idents, slots, strict=True):
            await self.staging.seal(slot, ident)
        await next_turn()  # each of these steps keeps the loop for a part of a millisecond
        region = self._region
        if replace or any(ident in self._damaged for ident in idents):
            region = await self._replacing_region()
        names = [name_of(ident) for ident in idents]
        if self._room is None:
            await self._agent.put(self.staging.objects(slots), region[names])
        else:
            for name, slot in zip(names, slots, strict=True):  # each of them waits for its own room
                async with self._room.taken(name):
                    await self._agent.put(self.staging.objects([slot]), region[name])
        for ident in idents:
            self._damaged.pop(ident, None)
        self._counters["puts"] += len(idents)

    async def receive(self, ident: bytes, slot: int) -> bool:
        """Read the block of a key into a slot; False where there is none that is whole, and the slot holds anything."""
        name = name_of(ident)
        found = await self._read(ident, name, slot)
        self._counters["hits" if found else "misses"] += 1
        if found and self._room is not None:
            self._room.use(name)
        return found

    async def _read(self, ident: bytes, name: str, slot: int) -> bool:
        for _ in range(2):  # what was damaged on its way comes whole the second time
            try:
                await self._agent.get(self.staging.objects([slot]), self._region[name])
            except ObjectMissingError:
                return False
            except ChecksumError:  # the way has asked often enough
                break
            except TransferError:
                length = await self._length(name)
                if length == self._object_bytes:
                    raise
                if length is None:
                    return False
                break
            if await self.staging.is_sealed(slot, ident):
                return True
        self._counters["damaged"] += 1
        self._damaged[ident] = None
        if len(self._damaged) > _REMEMBERED:
            self._damaged.popitem(last=False)
        return False

    # ---- parts of it ---------------------------------------------------------------------------------------------

    @property
    def _object_bytes(self) -> int:
        return self.block_bytes + TRAILER_BYTES

    async def _length(self, name: str) -> int | None:
        try:
            return (await self._region.objects.head(name)).nbytes
        except ObjectMissingError:
            return None

    async def _delete_objects(self, names: list[str]) -> None:
        await self._region.objects.delete(names)

    async def _replacing_region(self) -> Region:
        """The same objects, where a put replaces what is there."""
        opening = self._replacing
        if opening is None or (opening.done() and (opening.cancelled() or opening.exception() is not None)):
            opening = self._replacing = asyncio.ensure_future(self._place.region(self._agent, "replace"))
        return await asyncio.shield(opening)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the store {self.url} was closed")

    def _check_writable(self, what: str) -> None:
        self._check_open()
        if self.mode == "r":
            raise AccessError(f"{what} needs a store opened with mode 'w'; {self.url} was opened with mode 'r'")


def idents_of(keys: Sequence[bytes], first: int = 0) -> list[bytes]:
    """Give keys the form in which the index takes them, each by itself; `first` is the number of the first one.

    Raises
    ------
    DescriptorError
        A key is wrong.
    """
    try:
        packed = pack(keys).tobytes()
    except (TypeError, ValueError) as error:
        raise DescriptorError(f"{error} (counted from key {first})" if first else str(error)) from error
    return [packed[start : start + IDENT_BYTES] for start in range(0, len(packed), IDENT_BYTES)]


def _pieces(keys: Sequence[bytes]) -> Iterator[tuple[list[bytes], int]]:
    """Give keys as many at once as the loop has time for, and the number of the first."""
    for first in range(0, len(keys), _PIECE):
        yield idents_of(keys[first : first + _PIECE], first), first


async def _head(agent: Agent, region: Region, place: Place) -> tuple[int, bool]:
    """Read what the store is, or make it: bytes of a block, and whether it was made."""
    url = region.objects.url
    created = False
    async with agent.allocate(HEAD_BYTES, np.uint8) as memory:
        try:
            length = (await region.objects.head(HEAD_NAME)).nbytes
        except ObjectMissingError:
            if place.block_bytes is None or place.mode == "r":
                what = "a writer has to make it" if place.mode == "r" else "block_bytes= is needed to make one"
                raise StoreError(f"there is no store in {url}; {what}") from None
            memory.array[:] = np.frombuffer(encode_head(place.block_bytes), np.uint8)
            await agent.put(memory[:], region[HEAD_NAME])  # or another process's, which is there already
            length, created = HEAD_BYTES, True
        if length != HEAD_BYTES:
            raise StoreFormatError(f"{url}{HEAD_NAME} has {length:,} bytes and is not the head of a store")
        await agent.get(memory[:], region[HEAD_NAME])
        block_bytes = decode_head(url, memory.array.tobytes())
    if place.block_bytes not in (None, block_bytes):
        raise StoreFormatError(f"{url} holds blocks of {block_bytes:,} bytes, not of {place.block_bytes:,}")
    if place.budget is not None and place.budget < block_bytes + TRAILER_BYTES:
        raise StoreError(
            f"a budget of {place.budget:,} bytes has no room for an object of {block_bytes + TRAILER_BYTES:,}"
        )
    return block_bytes, created
