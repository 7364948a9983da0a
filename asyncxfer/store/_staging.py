"""Slots of memory in which blocks are joined with their trailers on the way to objects and back.

It also works out checksums there. It knows neither keys nor stores.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import numpy as np
import numpy.typing as npt

from asyncxfer import Agent, DescriptorList, Region
from asyncxfer._fast.crc32c import crc32c

from ._object_format import TRAILER_BYTES, trailer

__all__ = ["Staging"]

_BYTES = 32 * 1024 * 1024  # of all slots together
_MOST = 64
_ALIGNMENT = 4096
_INLINE_BYTES = 64 * 1024  # checksums of so much are worked out at once


class Staging:
    """The slots of one store; `make` makes them.

    Parameters
    ----------
    region : Region
        A row a slot.
    block_bytes : int, bytes
    """

    def __init__(self, region: Region, block_bytes: int) -> None:
        self._region = region
        self._array: npt.NDArray[np.uint8] = region.array
        self._block_bytes = block_bytes
        count = len(self._array)
        self._free = list(range(count))
        self._left = asyncio.Semaphore(count)
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="axf-sums")

    @classmethod
    async def make(cls, agent: Agent, block_bytes: int) -> Staging:
        """Allocate memory for them."""
        stride = -(-(block_bytes + TRAILER_BYTES) // _ALIGNMENT) * _ALIGNMENT
        count = max(2, min(_MOST, _BYTES // stride))
        return cls(await agent.allocate((count, stride), np.uint8), block_bytes)

    def __len__(self) -> int:
        return len(self._array)

    def blocks(self, slots: Sequence[int]) -> DescriptorList:
        """The rows of the blocks in slots."""
        return self._region[slots, : self._block_bytes]

    def objects(self, slots: Sequence[int]) -> DescriptorList:
        """The same with their trailers."""
        return self._region[slots, : self._block_bytes + TRAILER_BYTES]

    async def take(self) -> int:
        """Take a slot, when there is one."""
        await self._left.acquire()
        return self._free.pop()

    async def take_some(self, most: int) -> list[int]:
        """Take a slot, when there is one, and more of those that are free, but not the last ones."""
        slots = [await self.take()]
        while len(slots) < most and len(self._free) > len(self) // 4 and not self._left.locked():
            slots.append(await self.take())
        return slots

    def give(self, *slots: int) -> None:
        """Give slots back."""
        for slot in slots:
            self._free.append(slot)
            self._left.release()

    @asynccontextmanager
    async def slots(self, most: int) -> AsyncIterator[list[int]]:
        """One slot or more, for as long as the block lasts."""
        slots = await self.take_some(most)
        try:
            yield slots
        finally:
            self.give(*slots)

    async def seal(self, slot: int, ident: bytes) -> None:
        """Put the trailer of a key's block behind it."""
        self._array[slot, self._block_bytes : self._block_bytes + TRAILER_BYTES] = np.frombuffer(
            trailer(ident, self._block_bytes, await self._checksum(slot)), np.uint8
        )

    async def is_sealed(self, slot: int, ident: bytes) -> bool:
        """Whether a slot has a whole block of that key."""
        found = self._array[slot, self._block_bytes : self._block_bytes + TRAILER_BYTES].tobytes()
        return found == trailer(ident, self._block_bytes, await self._checksum(slot))

    async def _checksum(self, slot: int) -> int:
        block = self._array[slot, : self._block_bytes].data
        if len(block) <= _INLINE_BYTES:
            return crc32c(block)
        return await asyncio.get_running_loop().run_in_executor(self._pool, crc32c, block)

    async def aclose(self) -> None:
        """Let go of the memory."""
        self._pool.shutdown(wait=False)
        await self._region.aclose()
