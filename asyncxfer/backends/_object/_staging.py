"""Pinned host memory of bounded size by way of which bytes go between GPU memory and objects, lent piece by piece.

A piece is one stretch of it and is lent to one request, in the order in which they ask; nobody holds one while waiting
for another. The memory is pinned when it is first asked for, and freed by `close`. How a GPU is asked is `_cuda`'s
matter; rows, requests and stores are not known here. Lives in the I/O thread.
"""

from __future__ import annotations

import asyncio
import bisect
import ctypes
from collections import deque
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ..._errors import TransferError
from .._cuda import Copier

__all__ = ["Staging"]

_T = TypeVar("_T")
_PAGE = 4096  # pieces are multiples of it


class Staging:
    """So much pinned memory, of which pieces are lent.

    Parameters
    ----------
    nbytes : int
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes // _PAGE * _PAGE
        self._free = [(0, self.nbytes)]  # begin and end, in order; no two of them touch
        self._waiting: deque[tuple[int, asyncio.Future[int]]] = deque()
        self._copier: Copier | None = None
        self._pinned: Future[memoryview] | None = None

    def check(self, nbytes: int) -> None:
        """Raise TransferError where so much will never be lent at once."""
        if nbytes > self.nbytes:
            raise TransferError(
                f"{nbytes:,} bytes in one request do not fit into {self.nbytes:,} bytes of pinned memory; set "
                "object_staging_bytes to more"
            )

    @asynccontextmanager
    async def lend(self, nbytes: int, device: int) -> AsyncIterator[memoryview]:
        """Lend a piece, once there is room for it.

        Raises
        ------
        TransferError
            There will never be, or the memory could not be pinned.
        """
        self.check(nbytes)
        size = -(-nbytes // _PAGE) * _PAGE
        begin = await self._take(size)
        try:
            memory = await self._memory(device)
            yield memory[begin : begin + nbytes]
        finally:
            self._put_back(begin, begin + size)
            self._serve()

    async def copy(self, device: int, rows: npt.NDArray[np.uint64], piece: memoryview, *, to_device: bool) -> None:
        """Copy between rows of GPU memory and a piece; ends when that has ended, also cancelled.

        Raises
        ------
        TransferError
            The GPU has not done it.
        """
        assert self._copier is not None
        await _to_the_end(self._copier.copy(device, rows, _address(piece), to_device=to_device))

    def close(self) -> None:
        """Free the memory and end the thread that copies; nothing is lent any more. Blocks."""
        if self._copier is not None:
            self._copier.close()
            self._copier = None

    async def _memory(self, device: int) -> memoryview:
        """All of it; what was tried in vain is tried anew."""
        if self._copier is None:
            self._copier = Copier()
        if self._pinned is None or (self._pinned.done() and self._pinned.exception() is not None):
            self._pinned = self._copier.pin(device, self.nbytes)
        try:
            return await _to_the_end(self._pinned)
        except TransferError as error:
            raise TransferError(
                f"{error}; set object_staging_bytes to less, or raise the limit on locked memory"
            ) from error

    # -- room

    async def _take(self, size: int) -> int:
        """Where a piece begins that has been taken; whoever asked before is served before."""
        turn: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        self._serve()
        try:
            return await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it came at the same moment
                self._put_back(turn.result(), turn.result() + size)
            self._serve()
            raise

    def _serve(self) -> None:
        while self._waiting:
            size, turn = self._waiting[0]
            if not turn.done():
                begin = self._find(size)
                if begin is None:
                    return
                turn.set_result(begin)
            self._waiting.popleft()

    def _find(self, size: int) -> int | None:
        """Take the first stretch that is long enough."""
        for place, (begin, end) in enumerate(self._free):
            if end - begin >= size:
                self._free[place : place + 1] = [(begin + size, end)] if end - begin > size else []
                return begin
        return None

    def _put_back(self, begin: int, end: int) -> None:
        place = bisect.bisect(self._free, (begin, end))
        if place < len(self._free) and self._free[place][0] == end:
            end = self._free.pop(place)[1]
        if place and self._free[place - 1][1] == begin:
            place -= 1
            begin = self._free.pop(place)[0]
        self._free.insert(place, (begin, end))


def _address(piece: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(piece))


async def _to_the_end(future: Future[_T]) -> _T:
    """Wait for what cannot be stopped, also when cancelled; a cancellation is told then."""
    waiting = asyncio.wrap_future(future)
    cancelled = False
    while not waiting.done():
        try:
            await asyncio.wait([waiting])
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        waiting.exception()  # which nobody asks for any more
        raise asyncio.CancelledError
    return waiting.result()
