"""The memory through which everything goes: slots of one size, lent for as long as a piece is on its way."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import numpy.typing as npt

from asyncxfer import DescriptorList, Region
from asyncxfer._fast.crc64 import crc64nvme

__all__ = ["SLOT", "Lent", "Staging"]

#: Bytes of a slot, and of a part of what is moved in parts.
SLOT = 8 << 20


class Lent:
    """Slots that hold one piece.

    Parameters
    ----------
    region : Region
        Of all slots: (slots, SLOT) uint8.
    slots : list of int
    nbytes : int, bytes
        Of the piece.
    """

    def __init__(self, region: Region, slots: list[int], nbytes: int) -> None:
        self._array: npt.NDArray[np.uint8] = region.array
        self._slots = slots
        self._lengths = [min(SLOT, nbytes - start) for start in range(0, nbytes, SLOT)]
        offsets = [slot * SLOT for slot in slots[: len(self._lengths)]]
        self.nbytes = nbytes
        self.rows: DescriptorList = region.descriptors(offsets, self._lengths)

    def crc(self) -> int:
        """CRC64NVME of the piece."""
        crc = 0
        for view in self.views():
            crc = crc64nvme(view, crc)
        return crc

    def views(self) -> list[memoryview]:
        """Its bytes, in order."""
        return [self._array[slot, :length].data for slot, length in zip(self._slots, self._lengths, strict=False)]


class Staging:
    """All slots, and who waits for some. Those who came first are served first.

    Parameters
    ----------
    region : Region
    """

    def __init__(self, region: Region) -> None:
        assert region.shape is not None
        self._region = region
        self._free = list(range(region.shape[0]))
        self._waiting: deque[tuple[int, asyncio.Future[list[int]]]] = deque()
        self.slots = region.shape[0]

    @asynccontextmanager
    async def lend(self, nbytes: int) -> AsyncIterator[Lent]:
        """Lend memory for so many bytes, of which there are enough in all."""
        slots = await self._take(max(1, -(-nbytes // SLOT)))
        try:
            yield Lent(self._region, slots, nbytes)
        finally:
            self._give_back(slots)

    async def _take(self, count: int) -> list[int]:
        assert count <= self.slots
        turn: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        self._waiting.append((count, turn))
        self._serve()
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._give_back(turn.result())
            self._serve()
            raise

    def _give_back(self, slots: list[int]) -> None:
        self._free += slots
        self._serve()

    def _serve(self) -> None:
        while self._waiting and (self._waiting[0][1].done() or self._waiting[0][0] <= len(self._free)):
            count, turn = self._waiting.popleft()
            if not turn.done():
                taken, self._free = self._free[-count:], self._free[:-count]
                turn.set_result(taken)
