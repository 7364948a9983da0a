"""Which blocks a put is given: side by side, next to those of the same prefix, and room made by eviction.

A prefix that is still growing keeps a few blocks behind its last one, as long as there is plenty of room; they are the
first to be given back. It evicts no more than is needed, except in large stores, where it goes a little ahead, so that
not every put has to wait for an eviction to be recorded. It does not know data, only numbers.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict

import numpy as np

from asyncxfer._fast.blockindex import BlockIndex, Int64s

from ._commits import Commits
from ._errors import StoreFullError

__all__ = ["Space"]

_PREFIXES = 1024  # remembered
_SPARE_BYTES = 4 * 1024 * 1024
_MOST_SPARE = 64
_AHEAD = 1024


class Space:
    """The room of one store.

    Parameters
    ----------
    index : BlockIndex
    commits : Commits
    block_bytes : int
    """

    def __init__(self, index: BlockIndex, commits: Commits, block_bytes: int) -> None:
        self._index = index
        self._commits = commits
        self._spare = min(_SPARE_BYTES // block_bytes, _MOST_SPARE)
        self._prefixes: OrderedDict[bytes, tuple[int, Int64s]] = OrderedDict()  # last block, and those kept behind it
        self._lock = asyncio.Lock()
        self._news = asyncio.Event()
        self.evicted = 0

    def changed(self) -> None:
        """Say that blocks may have become free."""
        self._news.set()

    def give(self, blocks: Int64s) -> None:
        """Give back blocks that were taken and hold nothing."""
        self._index.give(blocks)
        self.changed()

    async def take(self, n: int, prefix: bytes | None) -> Int64s:
        """Take blocks.

        Parameters
        ----------
        n : int
        prefix : bytes or None
            Next to the blocks that were taken for it last.

        Raises
        ------
        StoreFullError
            There are not that many that are neither pinned nor in use.
        """
        limit = self._index.limit
        if n > limit:
            raise StoreFullError(f"{n:,} blocks at once do not fit the budget of {limit:,}; put fewer")
        async with self._lock:
            while self._free() < n:
                await self._make_room(n)
            return self._pick(n, prefix)

    def _free(self) -> int:
        return self._index.free + self._index.limit - self._index.top

    async def _make_room(self, n: int) -> None:
        index = self._index
        self._commits.check()
        self._news.clear()
        if self._prefixes:
            self._give_spares()
            return
        if self._commits.owing:  # before more is evicted that could not be given out either
            await self._commits.flush()
            return
        missing = n - self._free()
        evicted = index.evict(missing + min(index.limit // 64, _AHEAD))
        if len(evicted):
            self.evicted += len(evicted)
            await self._commits.clear(evicted)
        elif index.count + self._free() < index.limit:
            await self._news.wait()  # for blocks that are being written or read
        else:
            raise StoreFullError(
                f"{n:,} blocks do not fit: of {index.limit:,}, {index.pinned:,} are pinned; unpin some, or open the "
                "store with a larger budget"
            )

    def _give_spares(self) -> None:
        prefixes, self._prefixes = self._prefixes, OrderedDict()
        for _, spare in prefixes.values():
            self._index.give(spare)

    def _pick(self, n: int, prefix: bytes | None) -> Int64s:
        if prefix is None:
            return self._index.allocate(n)
        last, spare = self._prefixes.pop(prefix, (-2, np.empty(0, np.int64)))
        blocks, spare = spare[:n], spare[n:]
        if len(blocks) < n:
            hint = int(blocks[-1]) if len(blocks) else last
            blocks = np.concatenate((blocks, self._index.allocate(n - len(blocks), hint + 1)))
        if not len(spare) and self._free() > 8 * self._spare:
            spare = self._behind(int(blocks[-1]))
        self._prefixes[prefix] = int(blocks[-1]), spare
        if len(self._prefixes) > _PREFIXES:
            _, (_, unused) = self._prefixes.popitem(last=False)
            self._index.give(unused)
        return blocks

    def _behind(self, block: int) -> Int64s:
        """Keep the free blocks behind one."""
        taken = self._index.allocate(self._spare, block + 1)
        kept = taken == block + 1 + np.arange(len(taken))
        self._index.give(taken[~kept])
        behind: Int64s = taken[kept]
        return behind
