"""Promotion: what was found in a lower tier is put in those above it, behind the get that has found it.

There is a bound on how much of it goes on; beyond that, blocks stay where they are until they are asked for again. An
error is nobody's: the block is still where it was found.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable

import numpy as np

from asyncxfer import Agent, XferError
from asyncxfer._fast.blockindex import Packed

from ._disk_tier import DiskTier
from ._fetches import Fetch, Fetches
from ._memory_tier import MemoryTier
from ._object_format import IDENT_BYTES
from ._objects import ObjectStore

__all__ = ["Promotions", "packed_of"]

_FROM_DISK = 2  # reads that go on at a time, of the blocks of one get each


class Promotions:
    """The promotions of one store.

    Parameters
    ----------
    agent : Agent
    memory : MemoryTier
    disk : DiskTier
    objects : ObjectStore
    """

    def __init__(self, agent: Agent, memory: MemoryTier, disk: DiskTier, objects: ObjectStore) -> None:
        self._agent = agent
        self._memory = memory
        self._disk = disk
        self._objects = objects
        self._from_disk: set[asyncio.Task[None]] = set()
        self._from_objects: set[asyncio.Task[None]] = set()
        self.promoted = 0
        self.passed_over = 0

    def from_disk(self, idents: list[bytes]) -> None:
        """Read blocks from the disk into memory, where that is not busy."""
        idents = [ident for ident in idents if ident not in self._memory]
        if not self._memory.limit or not idents:
            return
        if len(self._from_disk) >= _FROM_DISK:
            self.passed_over += len(idents)
            return
        self._begin(self._from_disk, self._read(idents))

    def from_objects(self, fetches: Fetches, fetch: Fetch) -> None:
        """Put a block that was fetched in memory and on disk, where that is not busy."""
        if len(self._from_objects) >= max(1, len(self._objects.staging) // 2 - 1):
            self.passed_over += 1
            return
        fetches.use(fetch)
        self._begin(self._from_objects, self._keep(fetches, fetch))

    def _begin(self, among: set[asyncio.Task[None]], work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        among.add(task)
        task.add_done_callback(among.discard)

    async def _read(self, idents: list[bytes]) -> None:
        slots = self._memory.take(len(idents))
        idents = idents[: len(slots)]
        unused = slots
        try:
            if slots:
                with contextlib.suppress(XferError):
                    hits = await self._disk.get(packed_of(idents), np.arange(len(slots)), self._memory.rows(slots))
                    # One that was deleted meanwhile is not there any more.
                    here = hits & self._disk.store.index.contains(packed_of(idents))
                    chosen = np.flatnonzero(here).tolist()
                    self._memory.install([idents[number] for number in chosen], [slots[number] for number in chosen])
                    unused = [slot for slot, held in zip(slots, here, strict=True) if not held]
                    self.promoted += len(chosen)
        finally:
            kept = set(unused)
            self._memory.release(slot for slot in slots if slot not in kept)
            self._memory.give(unused)

    async def _keep(self, fetches: Fetches, fetch: Fetch) -> None:
        rows = self._objects.staging.blocks([fetch.slot])
        packed = packed_of([fetch.ident])
        slots = self._memory.take(1)
        unused = slots
        try:
            with contextlib.suppress(XferError):
                if slots:
                    await self._agent.get(self._memory.rows(slots), rows)
                    if not fetch.stale:
                        self._memory.install([fetch.ident], slots)
                        unused = []
                if not fetch.stale:
                    await self._disk.put(packed, np.arange(1), rows, None)
                    self.promoted += 1
                    await self._settle(fetch, packed)
        finally:
            if unused:
                self._memory.give(unused)
            else:
                self._memory.release(slots)
            fetches.leave(fetch)

    async def _settle(self, fetch: Fetch, packed: Packed) -> None:
        if fetch.stale:  # it was deleted while it was written
            await self._disk.store.delete_packed(packed)
            self._memory.drop([fetch.ident])
        else:
            self._disk.are_objects(packed, self._disk.sequences_of(packed))

    async def settled(self) -> None:
        """Wait for those that are under way now."""
        if running := self._from_disk | self._from_objects:
            await asyncio.wait(running)

    async def ended(self) -> None:
        """Wait until none is under way."""
        while running := self._from_disk | self._from_objects:
            await asyncio.wait(running)


def packed_of(idents: list[bytes]) -> Packed:
    """Join keys in the form in which the index takes them."""
    return np.frombuffer(b"".join(idents), np.uint8).reshape(-1, IDENT_BYTES)
