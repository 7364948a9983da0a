"""Requests replayed against a store: each loads the prefix that is there, and stores the rest of its prompt.

The model is left out: what a store has not is made up at once, and what it has is compared with that, byte by byte. A
request waits for room in the buffer that blocks are loaded into. It knows requests, a store and a buffer; not how they
were chosen.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from asyncxfer import Region
from asyncxfer.store import Store, Tier, TieredStore

from ._requests import Request

__all__ = ["Replay", "Served"]

_STEP = np.uint64(0x9E3779B97F4A7C15)  # multiples of it never repeat
_TURN = 0xD1342543DE82EF95  # another odd constant, so that blocks differ in every word


@dataclass(frozen=True, slots=True)
class Served:
    """What became of one request.

    Attributes
    ----------
    blocks, hits : int
        Of its prompt, and those of them that the store had, from the beginning on.
    hit_tokens : int
    loading : float, seconds
        In the store, for those that were there: the part of the time to the first token that goes to loading KV.
    waited : float, seconds
        From when it came until it had room in the buffer.
    storing : float, seconds
        In the store, for those that were not there.
    """

    blocks: int
    hits: int
    hit_tokens: int
    loading: float
    waited: float
    storing: float


@dataclass
class Replay:
    """A store that requests go to.

    Parameters
    ----------
    store : Store
    region : Region
        The buffer: (rooms, window, block_bytes) uint8.
    block_tokens : int
    """

    store: Store
    region: Region
    block_tokens: int
    tiers: collections.Counter[Tier] = field(default_factory=collections.Counter)
    wrong: int = 0

    def __post_init__(self) -> None:
        rooms, self._window, block_bytes = self.region.array.shape
        self._rooms: asyncio.Queue[int] = asyncio.Queue()
        for room in range(rooms):
            self._rooms.put_nowait(room)
        self._words = np.arange(block_bytes // 8, dtype=np.uint64) * _STEP

    async def run(self, requests: Sequence[Request], *, speed: float, progress: Callable[[int], None]) -> list[Served]:
        """Let requests come as they came, `speed` times as fast; what became of each, in their order."""
        loop = asyncio.get_running_loop()
        begin, first = loop.time(), requests[0].timestamp
        tasks = []
        async with asyncio.TaskGroup() as group:
            for number, request in enumerate(requests):
                due = begin + (request.timestamp - first) / 1e3 / speed
                await asyncio.sleep(due - loop.time())
                tasks.append(group.create_task(self._serve(request, due)))
                progress(number + 1)
        return [task.result() for task in tasks]

    async def _serve(self, request: Request, due: float) -> Served:
        loop = asyncio.get_running_loop()
        room = await self._rooms.get()
        try:
            waited = loop.time() - due
            ids = list(dict.fromkeys(request.hash_ids))
            begin = loop.time()
            known = (await self.store.contains([_key(number) for number in ids])).tolist()
            loading = loop.time() - begin
            prefix = known.index(False) if False in known else len(known)
            hits, seconds = await self._load(room, ids[:prefix])
            storing = await self._store(room, ids[hits:])
        finally:
            self._rooms.put_nowait(room)
        tokens = min(request.input_length, hits * self.block_tokens)
        return Served(len(ids), hits, tokens, loading + seconds if hits else 0.0, waited, storing)

    async def _load(self, room: int, ids: Sequence[int]) -> tuple[int, float]:
        """Load blocks up to the first that is gone by now; how many, and seconds in the store."""
        loop, hits, seconds = asyncio.get_running_loop(), 0, 0.0
        for start in range(0, len(ids), self._window):
            part = ids[start : start + self._window]
            begin = loop.time()
            found = await self._get(part, room)
            seconds += loop.time() - begin
            there = (found != Tier.NOWHERE).tolist()
            good = there.index(False) if False in there else len(there)
            self.tiers.update(Tier(tier) for tier in found[:good].tolist())
            self.wrong += await asyncio.to_thread(self._compare, room, part[:good])
            hits += good
            if good < len(part):
                break
        return hits, seconds

    async def _get(self, ids: Sequence[int], room: int) -> NDArray[np.uint8]:
        keys, rows = [_key(number) for number in ids], self.region[room, : len(ids)]
        if isinstance(self.store, TieredStore):
            return await self.store.fetch(keys, rows)
        there = await self.store.get(keys, rows)
        return np.where(there, np.uint8(Tier.DISK), np.uint8(Tier.NOWHERE))

    async def _store(self, room: int, ids: Sequence[int]) -> float:
        """Make up blocks and store them; seconds in the store."""
        loop, seconds = asyncio.get_running_loop(), 0.0
        for start in range(0, len(ids), self._window):
            part = ids[start : start + self._window]
            await asyncio.to_thread(self._fill, room, part)
            begin = loop.time()
            await self.store.put([_key(number) for number in part], self.region[room, : len(part)], replace=False)
            seconds += loop.time() - begin
        return seconds

    def _fill(self, room: int, ids: Sequence[int]) -> None:
        for place, number in enumerate(ids):
            self._block(room, place)[:] = self._content(number)

    def _compare(self, room: int, ids: Sequence[int]) -> int:
        """Blocks that are not what they must be."""
        return sum(
            not np.array_equal(self._block(room, place), self._content(number)) for place, number in enumerate(ids)
        )

    def _content(self, number: int) -> NDArray[np.uint64]:
        return self._words + np.uint64(number * _TURN % 2**64)

    def _block(self, room: int, place: int) -> NDArray[np.uint64]:
        block: NDArray[np.uint64] = self.region.array[room, place].view(np.uint64)
        return block


def _key(number: int) -> bytes:
    return number.to_bytes(8, "little")
