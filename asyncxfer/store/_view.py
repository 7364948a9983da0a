"""What a store knows of its blocks: a writer's own index, or what a reader has followed in the writer's journal.

It decides nothing about blocks. A reader's index is replaced by a new one where so much has happened that reading
everything again is the only way on, so nobody keeps it across a wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np

from asyncxfer._fast.blockindex import BlockIndex, Bools, Int64s, Uint64s

from ._errors import StoreError
from ._recovery import Follower

__all__ = ["View"]


class View:
    """The index of one store, as of now.

    Parameters
    ----------
    path : Path
    own : BlockIndex or Follower
        The writer's index, or a reader's follower.
    trusted : int
        Of the writer: blocks without a checksum of an earlier sequence cannot be believed.
    in_thread : callable
        Runs what may block.
    """

    def __init__(
        self, path: Path, own: BlockIndex | Follower, trusted: int, in_thread: Callable[..., Awaitable[Any]]
    ) -> None:
        self._path = path
        self._own = own if isinstance(own, BlockIndex) else None
        self._follower = own if isinstance(own, Follower) else None
        self._trusted = trusted
        self._in_thread = in_thread
        self._following = asyncio.Lock()

    @property
    def index(self) -> BlockIndex:
        """The index as it is now."""
        if self._own is not None:
            return self._own
        assert self._follower is not None
        return self._follower.index

    @property
    def trusted(self) -> int:
        """From which sequence on blocks without a checksum can be believed."""
        return self._follower.trusted if self._follower is not None else self._trusted

    async def follow(self) -> None:
        """Take note of what the writer has acknowledged by now.

        Raises
        ------
        StoreError
            The journal cannot be read.
        """
        follower = self._follower
        if follower is None:
            return
        async with self._following:
            more = follower.glance()
            while more is not False:
                try:
                    more = await self._in_thread(follower.read_some) or False
                except OSError as error:
                    raise StoreError(f"the journal of {self._path} cannot be read: {error.strerror}") from error

    async def still(self, blocks: Int64s, sequences: Uint64s) -> Bools:
        """Tell of each block whether it holds what it held before it was read.

        Raises
        ------
        StoreError
            The journal cannot be read.
        """
        if self._follower is None:
            return np.ones(len(blocks), np.bool_)  # held blocks are not given out anew
        await self.follow()
        return self.index.unchanged(blocks, sequences)

    async def aclose(self) -> None:
        """Let go of the journal."""
        if self._follower is not None:
            await self._in_thread(self._follower.close)
