"""Blocks in memory: slots of one allocation, given to those used last. It moves no bytes and knows no other tier."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from asyncxfer import Agent, DescriptorList, Region

__all__ = ["MemoryTier"]


class MemoryTier:
    """The blocks in memory of one store.

    A slot that somebody holds is not given to another block before it was released as often.

    Parameters
    ----------
    region : Region or None
        A row a slot; None: there are none.
    """

    def __init__(self, region: Region | None) -> None:
        self._region = region
        self.limit = 0 if region is None else len(region.array)
        self._free = list(range(self.limit))
        self._slots: OrderedDict[bytes, int] = OrderedDict()  # the one used longest ago first
        self._holds = [0] * self.limit
        self._orphans: set[int] = set()  # held, and of no key any more
        self.evicted = 0

    @classmethod
    async def make(cls, agent: Agent, budget: int, block_bytes: int) -> MemoryTier:
        """Allocate as many slots as a budget in bytes has room for."""
        count = budget // block_bytes
        return cls(await agent.allocate((count, block_bytes), np.uint8) if count else None)

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, ident: bytes) -> bool:
        return ident in self._slots

    def rows(self, slots: Sequence[int]) -> DescriptorList:
        """The rows of slots."""
        assert self._region is not None
        return self._region[slots]

    def hold(self, idents: Sequence[bytes]) -> tuple[list[int], list[int]]:
        """Hold the slots of those keys that are here: which of the keys that are, and their slots. That is use."""
        found, slots = [], []
        for number in range(len(idents) - 1, -1, -1):  # of a prefix, the end goes first
            slot = self._slots.get(idents[number])
            if slot is not None:
                self._slots.move_to_end(idents[number])
                self._holds[slot] += 1
                found.append(number)
                slots.append(slot)
        return found[::-1], slots[::-1]

    def release(self, slots: Iterable[int]) -> None:
        """Let go of slots."""
        for slot in slots:
            self._holds[slot] -= 1
            if not self._holds[slot] and slot in self._orphans:
                self._orphans.discard(slot)
                self._free.append(slot)

    def take(self, count: int) -> list[int]:
        """Take and hold up to so many slots; blocks that nobody holds make room."""
        taken = [self._free.pop() for _ in range(min(count, len(self._free)))]
        if len(taken) < count:
            taken += self._evict(count - len(taken))
        for slot in taken:
            self._holds[slot] += 1
        return taken

    def _evict(self, count: int) -> list[int]:
        victims: list[bytes] = []
        for ident, slot in self._slots.items():
            if len(victims) == count:
                break
            if not self._holds[slot]:
                victims.append(ident)
        self.evicted += len(victims)
        return [self._slots.pop(ident) for ident in victims]

    def install(self, idents: Sequence[bytes], slots: Sequence[int]) -> None:
        """Have slots that were taken, and are held still, be those of keys. One that is here already stays."""
        for ident, slot in zip(reversed(idents), reversed(slots), strict=True):
            if ident in self._slots:
                self._orphans.add(slot)
            else:
                self._slots[ident] = slot

    def give(self, slots: Iterable[int]) -> None:
        """Give back slots that were taken and belong to no key."""
        for slot in slots:
            self._orphans.add(slot)
            self.release((slot,))

    def drop(self, idents: Iterable[bytes]) -> None:
        """Forget blocks."""
        for ident in idents:
            slot = self._slots.pop(ident, None)
            if slot is None:
                continue
            if self._holds[slot]:
                self._orphans.add(slot)
            else:
                self._free.append(slot)

    async def aclose(self) -> None:
        """Let go of the memory."""
        if self._region is not None:
            await self._region.aclose()
