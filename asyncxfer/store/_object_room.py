"""Which objects go where a store of them has a budget: those used longest ago, before others take their place.

It counts what it was told of; objects that other processes make below the same prefix are unknown to it.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager

__all__ = ["Room"]

_AHEAD = 256


class Room:
    """The room of one store.

    Parameters
    ----------
    limit : int
        Objects that there may be.
    names : iterable of str
        Of those that there are, in the order of their use.
    delete : callable
        Deletes objects.
    """

    def __init__(self, limit: int, names: Iterable[str], delete: Callable[[list[str]], Awaitable[None]]) -> None:
        self.limit = limit
        self.evicted = 0
        self._held: OrderedDict[str, None] = OrderedDict.fromkeys(names)
        self._coming: dict[str, int] = {}
        self._going = 0
        self._delete = delete
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._held) + len(self._coming) + self._going

    def use(self, name: str) -> None:
        """Take note of a use."""
        if name in self._held:
            self._held.move_to_end(name)

    def forget(self, names: Iterable[str]) -> None:
        """Take note of objects that are gone."""
        for name in names:
            self._held.pop(name, None)
        self._changed.set()

    async def shrink(self) -> None:
        """Delete what is there beyond the limit."""
        while len(self) > self.limit and self._held:
            await self._evict(len(self) - self.limit)

    @asynccontextmanager
    async def taken(self, name: str) -> AsyncIterator[None]:
        """Have room for an object while it is put; it counts from then on, whatever becomes of that."""
        if name in self._held:
            del self._held[name]
        elif name not in self._coming:
            while len(self) >= self.limit and name not in self._coming:
                if self._held:
                    await self._evict(1 + min(self.limit // 64, _AHEAD))
                else:
                    self._changed.clear()
                    await self._changed.wait()
        self._coming[name] = self._coming.get(name, 0) + 1
        try:
            yield
        finally:
            self._coming[name] -= 1
            if not self._coming[name]:
                del self._coming[name]
                self._held[name] = None
            self._changed.set()

    async def _evict(self, count: int) -> None:
        names = [self._held.popitem(last=False)[0] for _ in range(min(count, len(self._held)))]
        self._going += len(names)
        try:
            await self._delete(names)
            self.evicted += len(names)
        except BaseException:
            for name in reversed(names):
                self._held[name] = None
                self._held.move_to_end(name, last=False)
            raise
        finally:
            self._going -= len(names)
            self._changed.set()
