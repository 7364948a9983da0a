"""A store in three tiers: memory over disk over objects, behind the API of each.

It owns the order: where a block is looked for, when a put is acknowledged, and what goes from one tier to another
behind the calls. The tiers themselves do not know each other.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from asyncxfer import Agent, ClosedError, DescriptorList, XferError
from asyncxfer._fast.blockindex import Bools, Int64s, Packed

from ._api import Store, check_rows
from ._counters import Tier, TierCounters
from ._disk_tier import DiskTier
from ._errors import StoreError, StoreFullError
from ._fetches import Fetch, Fetches
from ._journal import Durability
from ._memory_tier import MemoryTier
from ._objects import ObjectStore, idents_of
from ._opening import Mode
from ._operations import Operations
from ._promotions import Promotions, packed_of
from ._slabs import chosen_rows
from ._spread import spread
from ._store import DiskStore, to_the_end
from ._turns import next_turn
from ._uploads import Uploads

__all__ = ["Acknowledge", "TieredStore", "Tiers"]

Acknowledge: TypeAlias = Literal["memory", "disk", "objects"]
Sources: TypeAlias = npt.NDArray[np.uint8]

_PIECE = 128  # keys that are handled at once
_ATTEMPTS = 4  # at keeping a block on a disk where others crowd it out at once


@dataclass(frozen=True, slots=True)
class Tiers:
    """What a tiered store is made of.

    Attributes
    ----------
    owned : tuple of Store
        To be closed with it.
    """

    memory: MemoryTier
    disk: DiskStore
    objects: ObjectStore
    owned: tuple[Store, ...]
    acknowledge: Acknowledge
    backlog: int
    uploads: int
    batch: int


class TieredStore(Store):
    """Blocks of one size under keys, in memory, on disk and as objects: `tiered` makes one.

    Keys are names of content: whoever puts a block under a key puts the same bytes.

    Attributes
    ----------
    url : str
    block_bytes : int, bytes
    mode : str
        "w".
    durability : {"none", "data", "full"}
        That of the store on disk.
    report : Report
        What opening the store on disk found.
    disk : DiskStore
    objects : ObjectStore
    counters : dict of Tier to TierCounters
        What each tier has served.
    """

    def __init__(self, agent: Agent, tiers: Tiers) -> None:
        self.disk, self.objects = tiers.disk, tiers.objects
        self.url = f"{self.disk.url} over {self.objects.url}"
        self.block_bytes = self.disk.block_bytes
        self.mode: Mode = "w"
        self.durability: Durability = self.disk.durability
        self.report = self.disk.report
        self.counters = {tier: TierCounters() for tier in (Tier.MEMORY, Tier.DISK, Tier.OBJECTS)}
        self._agent = agent
        self._tiers = tiers
        self._memory = tiers.memory
        self._disk = DiskTier(self.disk, self.objects.url)
        self._promotions = Promotions(agent, self._memory, self._disk, self.objects)
        self._fetches = Fetches(self.objects, self._arrived)
        self._uploads = Uploads(
            self._upload, self._disk.write_note, limit=tiers.backlog, width=tiers.uploads, batch=tiers.batch,
            where=self.objects.url,
        )  # fmt: skip
        self._settling: set[asyncio.Task[None]] = set()
        self._unsettled: XferError | None = None
        self._operations = Operations()
        self._closed = False
        self._ending: asyncio.Task[None] | None = None
        self._lost = 0
        self._puts = 0

    # ---- life ----------------------------------------------------------------------------------------------------

    @classmethod
    async def open(cls, agent: Agent, tiers: Tiers) -> TieredStore:
        """Go on where the last one that used these tiers has stopped."""
        store = cls(agent, tiers)
        try:
            async for packed in store._disk.begin():
                store._uploads.add(_split(packed))
            store._uploads.start()
        except BaseException:
            await store.aclose()
            raise
        return store

    async def flush(self) -> None:
        """Wait until all blocks that were put before are objects.

        Raises
        ------
        StoreError
            A block could not be written to the disk, or made an object. What is on disk is tried again, as long as the
            store is open and when it is opened again.
        ClosedError
            The store is closed.
        """
        self._check_open()
        async with self._operations:
            if self._settling:
                await asyncio.wait(list(self._settling))
            error, self._unsettled = self._unsettled, None
            if error is not None:
                raise StoreError(
                    f"blocks that were put into memory could not be written to the disk: {error}"
                ) from error
            await self._uploads.flush()

    async def aclose(self) -> None:
        """Let what is in flight end, and close it. Again does nothing.

        Blocks that are no objects yet stay on disk, and become objects when it is opened again.
        """
        if self._ending is None:
            self._closed = True
            self._ending = asyncio.ensure_future(self._end())
        await to_the_end(self._ending)

    async def _end(self) -> None:
        await self._operations.ended()
        while self._settling:
            await asyncio.wait(list(self._settling))
        await self._fetches.ended()
        await self._promotions.ended()
        await self._uploads.aclose()
        try:
            await self._disk.aclose()
        finally:
            await close_all(self._memory, *self._tiers.owned)

    def __repr__(self) -> str:
        return f"<TieredStore {self.url!r}, {'closed' if self._closed else 'open'}>"

    def __len__(self) -> int:
        """How many blocks are on disk."""
        return len(self.disk)

    # ---- blocks --------------------------------------------------------------------------------------------------

    async def put(
        self, keys: Sequence[bytes], rows: DescriptorList, *, prefix: bytes | None = None, pin: bool = False,
        replace: bool = False,
    ) -> None:  # fmt: skip
        """Store blocks; returns once the tier that was chosen to acknowledge has all of them.

        They become objects behind that. Where as many blocks as may wait for it already, the put waits too. The rows
        must not be written to meanwhile. If it fails or is cancelled, some of the blocks may have been stored, whole.

        Parameters
        ----------
        keys : sequence of bytes
        rows : DescriptorList
            One block a key.
        prefix : bytes or None
            Which sequence they belong to: on disk they are laid side by side.
        pin : bool
            Pin them too, on disk.
        replace : bool
            Refused: what is there under a key is what is put.

        Raises
        ------
        StoreFullError
            There is no room on disk, or no room to wait in while the objects cannot be written to. Nothing that was
            acknowledged is lost by it.
        StoreError
            It could not be made lasting, or blocks were to be replaced.
        DescriptorError
            The rows are not one block a key, or a key is wrong.
        ClosedError
            The store is closed.
        TransferError
            The blocks could not be written to the disk.
        """
        if replace:
            raise StoreError("keys of a tiered store are names of content; delete a block before it is put anew")
        self._check_open()
        check_rows(keys, rows, self.block_bytes)
        async with self._operations:
            for piece, which in _pieces(keys, min(_PIECE, self._tiers.backlog)):
                await self._put(piece, which, rows, prefix, pin=pin)
                await next_turn()

    async def get(self, keys: Sequence[bytes], rows: DescriptorList) -> Bools:
        """Read blocks, each from the uppermost tier that has it.

        Parameters
        ----------
        keys : sequence of bytes
        rows : DescriptorList
            One block a key, to be written to.

        Returns
        -------
        (n,) bool
            Which keys were here. The rows of those that were not are left as they are, but for blocks that proved
            damaged on disk and were nowhere else.

        Raises
        ------
        DescriptorError
            The rows are not one block a key, or a key is wrong.
        AccessError
            The rows must not be written to.
        ClosedError
            The store is closed.
        TransferError
            The blocks could not be read: as an ObjectError where the object store refused or did not answer.
        """
        hits: Bools = await self.fetch(keys, rows) != Tier.NOWHERE
        return hits

    async def fetch(self, keys: Sequence[bytes], rows: DescriptorList) -> Sources:
        """Do what `get` does, and tell where each block was.

        Parameters
        ----------
        keys : sequence of bytes
        rows : DescriptorList
            One block a key, to be written to.

        Returns
        -------
        (n,) uint8
            Each a `Tier`.

        Raises
        ------
        DescriptorError, AccessError, ClosedError, TransferError
            As in `get`.
        """
        self._check_open()
        check_rows(keys, rows, self.block_bytes)
        sources = np.zeros(len(keys), np.uint8)
        async with self._operations:
            for piece, which in _pieces(keys, _PIECE):
                await self._get(piece, which, rows, sources)
                await next_turn()
        return sources

    async def contains(self, keys: Sequence[bytes]) -> Bools:
        """Tell of each key whether it is in a tier; those that are only objects cost a request each.

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
            The object store refused or did not answer.
        """
        self._check_open()
        async with self._operations:
            found = await self.disk.contains(keys)
            for idents, which in _pieces(keys, _PIECE):
                found[which] |= np.fromiter((ident in self._memory for ident in idents), np.bool_, len(idents))
                await next_turn()
            rest = np.flatnonzero(~found)
            found[rest] = await self.objects.contains([keys[number] for number in rest.tolist()])
        return found

    async def delete(self, keys: Sequence[bytes]) -> Bools:
        """Give up blocks in all tiers; returns once they are gone.

        A block that is put at the same time may be deleted too, or not.

        Parameters
        ----------
        keys : sequence of bytes

        Returns
        -------
        (n,) bool
            Which keys were in a tier.

        Raises
        ------
        StoreFullError, StoreError
            It could not be recorded on disk.
        DescriptorError
            A key is wrong.
        ClosedError
            The store is closed.
        TransferError
            The object store refused or did not answer: the blocks may still be there.
        """
        self._check_open()
        found = np.zeros(len(keys), np.bool_)
        async with self._operations:
            if self._settling:
                await asyncio.wait(list(self._settling))
            for first in range(0, len(keys), _PIECE):
                found[first : first + _PIECE] = await self._delete(keys[first : first + _PIECE], first)
        return found

    async def _delete(self, keys: Sequence[bytes], first: int) -> Bools:
        idents = idents_of(keys, first)
        await self._uploads.forget(dict.fromkeys(idents))
        found = np.array([ident in self._memory for ident in idents], np.bool_)
        self._memory.drop(idents)
        found |= await self.disk.delete(keys)  # first, since what is noted on disk has to be an object
        found |= await self.objects.delete(keys)
        await self._sweep([ident for ident in idents if ident not in self._uploads])
        return found

    async def _sweep(self, idents: list[bytes]) -> None:
        """Give up what gets have brought up again while it was deleted."""
        self._fetches.forget(idents)
        await self._promotions.settled()
        self._memory.drop(idents)
        if idents:
            await self.disk.delete_packed(packed_of(idents))

    async def pin(self, keys: Sequence[bytes]) -> Bools:
        """Keep blocks from being evicted from the disk until they are unpinned as often, or the store is closed.

        Parameters
        ----------
        keys : sequence of bytes

        Returns
        -------
        (n,) bool
            Which keys are on disk, and so are pinned now.

        Raises
        ------
        DescriptorError
            A key is wrong.
        ClosedError
            The store is closed.
        """
        return await self.disk.pin(keys)

    async def unpin(self, keys: Sequence[bytes]) -> Bools:
        """Take back one `pin` of each key.

        Parameters
        ----------
        keys : sequence of bytes

        Returns
        -------
        (n,) bool
            Which keys were pinned: also those that wait to become objects, which must not be unpinned.

        Raises
        ------
        DescriptorError
            A key is wrong.
        ClosedError
            The store is closed.
        """
        return await self.disk.unpin(keys)

    async def compact(self) -> None:
        """Write the index of the store on disk anew.

        Raises
        ------
        StoreFullError, StoreError
            It could not be written.
        ClosedError
            The store is closed.
        """
        await self.disk.compact()

    def stats(self) -> dict[str, int]:
        """Counters since it was opened, and what there is; `counters` tells what each tier has served.

        Returns
        -------
        dict
            ``"puts"``, ``"hits"``, ``"misses"``, ``"memory_blocks"``, ``"memory_bytes"`` (of all of its slots),
            ``"disk_blocks"``, ``"disk_bytes"``, ``"pending"`` (blocks that wait to become objects), ``"uploaded"``,
            ``"upload_failures"`` (attempts), ``"promoted"``, ``"passed_over"`` (blocks that were not, as too much was
            going on), ``"shared"`` (gets that waited for the fetch of another), ``"damaged"`` (on disk, and objects),
            ``"lost"`` (blocks that proved damaged on disk before they were objects).
        """
        disk = self.disk.stats()
        return {
            "puts": self._puts,
            "hits": sum(counters.hits for counters in self.counters.values()),
            "misses": self.counters[Tier.OBJECTS].misses,
            "memory_blocks": len(self._memory),
            "memory_bytes": self._memory.limit * self.block_bytes,
            "disk_blocks": disk["blocks"],
            "disk_bytes": disk["bytes"],
            "pending": len(self._uploads),
            "uploaded": self._uploads.uploaded,
            "upload_failures": self._uploads.failures,
            "promoted": self._promotions.promoted,
            "passed_over": self._promotions.passed_over,
            "shared": self._fetches.shared,
            "damaged": disk["damaged"] + self.objects.stats()["damaged"],
            "lost": self._lost,
        }

    # ---- putting -------------------------------------------------------------------------------------------------

    async def _put(
        self, idents: list[bytes], which: Int64s, rows: DescriptorList, prefix: bytes | None, *, pin: bool
    ) -> None:
        """Have blocks in memory, and on disk, and in the line to become objects."""
        await next_turn()
        slots = self._memory.take(len(idents))
        count = len(slots)
        in_memory = idents[:count]
        installed = False
        try:
            if slots:
                await self._agent.get(self._memory.rows(slots), chosen_rows(rows, which[:count], self.block_bytes))
                await next_turn()
                self._memory.install(in_memory, slots)
                installed = True
                if self._tiers.acknowledge == "memory" and not pin:
                    self._settle(in_memory, slots, prefix)
                    slots = []  # held until they are on disk
                else:
                    await self._to_disk(in_memory, np.arange(count), self._memory.rows(slots), prefix, pin=pin)
            if count < len(idents):
                await self._to_disk(idents[count:], which[count:], rows, prefix, pin=pin)
        finally:
            (self._memory.release if installed else self._memory.give)(slots)
        self._puts += len(idents)
        if self._tiers.acknowledge == "objects":
            await self._uploads.wait(idents)

    def _settle(self, idents: list[bytes], slots: list[int], prefix: bytes | None) -> None:
        """Have blocks of memory go to the disk behind the put."""
        task = asyncio.ensure_future(self._settled(idents, slots, prefix))
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)

    async def _settled(self, idents: list[bytes], slots: list[int], prefix: bytes | None) -> None:
        try:
            await self._to_disk(idents, np.arange(len(slots)), self._memory.rows(slots), prefix, pin=False)
        except XferError as error:
            self._unsettled = error
        finally:
            self._memory.release(slots)

    async def _to_disk(
        self, idents: list[bytes], which: Int64s, rows: DescriptorList, prefix: bytes | None, *, pin: bool
    ) -> None:
        async with self._uploads.room(len(idents)):
            for _ in range(_ATTEMPTS):
                packed = packed_of(idents)
                await self._disk.put(packed, which, rows, prefix)
                gone = self._line_up(idents, packed)
                if pin:
                    self.disk.pin_packed(packed[~gone], 1)
                if not gone.any():
                    return
                idents, which = [ident for ident, lost in zip(idents, gone, strict=True) if lost], which[gone]
        raise StoreFullError(f"{self.disk.url} has no room for {len(idents):,} blocks: others crowd them out at once")

    def _line_up(self, idents: list[bytes], packed: Packed) -> Bools:
        """Have blocks become objects that are none yet; which are no longer on disk."""
        gone = np.zeros(len(idents), np.bool_)
        fresh = np.array([ident not in self._uploads for ident in idents], np.bool_)
        pinned, gone[fresh] = self._disk.claim(packed[fresh])
        numbers = np.flatnonzero(fresh)[pinned]
        self._uploads.add([idents[number] for number in numbers])
        return gone

    async def _upload(self, idents: list[bytes]) -> None:
        """Make objects of blocks that are on disk."""
        await next_turn()
        packed = packed_of(idents)
        sequences, there = self._disk.sequences_of(packed), np.zeros(len(idents), np.bool_)
        first = 0
        while first < len(idents):
            async with self.objects.staging.slots(len(idents) - first) as slots:
                last = first + len(slots)
                there[first:last] = await self._send(idents[first:last], packed[first:last], slots)
            first = last
        await next_turn()
        self._disk.are_objects(packed[there], sequences[there])
        self.disk.pin_packed(packed, -1)
        for number in np.flatnonzero(~there).tolist():
            self._lose(idents[number])

    async def _send(self, idents: list[bytes], packed: Packed, slots: list[int]) -> Bools:
        """Make objects of as many blocks as there are slots; which of them could be read."""
        hits = await self._disk.get(packed, np.arange(len(slots)), self.objects.staging.blocks(slots))
        await next_turn()  # what comes now and what has been keep the loop for a part of a millisecond each
        for number in np.flatnonzero(~hits).tolist():
            hits[number] = await self._from_memory(idents[number], slots[number])
        there = np.flatnonzero(hits).tolist()
        if there:
            await self.objects.send([idents[number] for number in there], [slots[number] for number in there])
        return hits

    def _lose(self, ident: bytes) -> None:
        self._lost += 1
        asyncio.get_running_loop().call_exception_handler(
            {"message": f"a block of {self.disk.url} proved damaged before it was an object; its key is {ident.hex()}"}
        )

    async def _from_memory(self, ident: bytes, slot: int) -> bool:
        _, slots = self._memory.hold([ident])
        try:
            if slots:
                await self._agent.put(self._memory.rows(slots), self.objects.staging.blocks([slot]))
        finally:
            self._memory.release(slots)
        return bool(slots)

    # ---- getting -------------------------------------------------------------------------------------------------

    async def _get(self, idents: list[bytes], which: Int64s, rows: DescriptorList, sources: Sources) -> None:
        """Get blocks of which no two have the same key."""
        started = time.perf_counter()
        found, slots = self._memory.hold(idents)
        if found:
            try:
                target = chosen_rows(rows, which[found], self.block_bytes)
                await self._agent.put(self._memory.rows(slots), target)
            finally:
                self._memory.release(slots)
            sources[which[found]] = Tier.MEMORY
        left = np.ones(len(idents), np.bool_)
        left[found] = False
        rest = np.flatnonzero(left)
        started = self._count(Tier.MEMORY, len(found), len(rest), started)
        if not len(rest):
            return
        hits = await self._disk.get(packed_of([idents[number] for number in rest]), which[rest], rows)
        sources[which[rest[hits]]] = Tier.DISK
        self._promotions.from_disk([idents[number] for number in rest[hits]])
        rest = rest[~hits]
        started = self._count(Tier.DISK, int(hits.sum()), len(rest), started)
        if len(rest):
            await self._get_objects(idents, which, rest, rows, sources)
            hit = int((sources[which[rest]] == Tier.OBJECTS).sum())
            self._count(Tier.OBJECTS, hit, len(rest) - hit, started)

    async def _get_objects(
        self, idents: list[bytes], which: Int64s, rest: Int64s, rows: DescriptorList, sources: Sources
    ) -> None:
        async def one(number: int) -> None:
            async with self._fetches.block(idents[number]) as slot:
                if slot >= 0:
                    target = chosen_rows(rows, which[number : number + 1], self.block_bytes)
                    await self._agent.put(self.objects.staging.blocks([slot]), target)
                    sources[which[number]] = Tier.OBJECTS

        await spread(rest.tolist(), one, len(self.objects.staging))

    def _count(self, tier: Tier, hits: int, misses: int, started: float) -> float:
        now = time.perf_counter()
        self.counters[tier].add(hits, misses, hits * self.block_bytes, now - started)
        return now

    def _arrived(self, fetch: Fetch) -> None:
        self._promotions.from_objects(self._fetches, fetch)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the store {self.url} was closed")


def _pieces(keys: Sequence[bytes], most: int) -> Iterator[tuple[list[bytes], Int64s]]:
    """Give keys as the tiers take them, and their numbers, so many at once and none of them twice in a piece."""
    for first in range(0, len(keys), most):
        numbers: dict[bytes, int] = {}
        for number, ident in enumerate(idents_of(keys[first : first + most], first), start=first):
            if ident in numbers:
                yield list(numbers), np.fromiter(numbers.values(), np.int64, len(numbers))
                numbers = {}
            numbers[ident] = number
        yield list(numbers), np.fromiter(numbers.values(), np.int64, len(numbers))


def _split(packed: Packed) -> list[bytes]:
    return [row.tobytes() for row in packed]


async def close_all(*closing: MemoryTier | Store) -> None:
    """Close them all, and then raise the first error."""
    for error in await asyncio.gather(*(one.aclose() for one in closing), return_exceptions=True):
        if isinstance(error, BaseException):
            raise error
