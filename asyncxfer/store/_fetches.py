"""Blocks on their way from objects: one fetch for all who want the same block at the same time.

A fetch lives in a slot of staging memory for as long as somebody uses it, and goes on when those who wanted it first
have been cancelled. It does not know what becomes of blocks.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

from ._objects import ObjectStore

__all__ = ["Fetch", "Fetches"]


class Fetch:
    """One block on its way.

    Attributes
    ----------
    ident : bytes
    slot : int
        Where it is; -1 before.
    stale : bool
        It was deleted meanwhile: it is to be put nowhere.
    """

    __slots__ = ("ident", "slot", "stale", "task", "users")

    task: asyncio.Task[bool]

    def __init__(self, ident: bytes) -> None:
        self.ident = ident
        self.slot = -1
        self.stale = False
        self.users = 1  # itself, while it is fetched


class Fetches:
    """The fetches of one store.

    Parameters
    ----------
    objects : ObjectStore
    arrived : callable
        Called with a block that has been fetched, before those who wait for it.
    """

    def __init__(self, objects: ObjectStore, arrived: Callable[[Fetch], None]) -> None:
        self._objects = objects
        self._arrived = arrived
        self._going: dict[bytes, Fetch] = {}
        self._tasks: set[asyncio.Task[bool]] = set()
        self.shared = 0

    @asynccontextmanager
    async def block(self, ident: bytes) -> AsyncIterator[int]:
        """The slot of a block, for as long as this block lasts; -1 where there is none."""
        fetch = self._going.get(ident)
        if fetch is None:
            fetch = self._going[ident] = Fetch(ident)
            fetch.task = asyncio.ensure_future(self._run(fetch))
            self._tasks.add(fetch.task)
            fetch.task.add_done_callback(self._done)
        else:
            self.shared += 1
        self.use(fetch)
        try:
            yield fetch.slot if await asyncio.shield(fetch.task) else -1
        finally:
            self.leave(fetch)

    def use(self, fetch: Fetch) -> None:
        """Keep a block's slot until `leave`."""
        fetch.users += 1

    def leave(self, fetch: Fetch) -> None:
        """Let go of it."""
        fetch.users -= 1
        if fetch.users:
            return
        if self._going.get(fetch.ident) is fetch:
            del self._going[fetch.ident]
        if fetch.slot >= 0:
            self._objects.staging.give(fetch.slot)

    def forget(self, idents: Iterable[bytes]) -> None:
        """Let blocks that are on their way be nobody's any more, but for those who wait already."""
        for ident in idents:
            fetch = self._going.pop(ident, None)
            if fetch is not None:
                fetch.stale = True

    async def _run(self, fetch: Fetch) -> bool:
        try:
            fetch.slot = await self._objects.staging.take()
            found = await self._objects.receive(fetch.ident, fetch.slot)
            if found:
                self._arrived(fetch)
            return found
        finally:
            self.leave(fetch)

    def _done(self, task: asyncio.Task[bool]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # those who wait have been told

    async def ended(self) -> None:
        """Wait until none is under way."""
        while self._tasks:
            await asyncio.wait(list(self._tasks))
