"""The slabs: files of blocks and nothing else, opened as regions of the agent when they are first needed.

A slab has its full length from the start, and is a sparse file. One that is no longer needed is cut to nothing and
kept: a reader that has it open shall not go on reading what has another name by now. Checksums are worked out beside
the moves. It does not know keys.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from asyncxfer import Agent, DescriptorList, MemoryKind, Region
from asyncxfer._fast.blockindex import Int64s, Uint32s
from asyncxfer._fast.blockrows import checksums, pick, slots

from ._errors import StoreError
from ._format import Identity, slab_name, sync_directory
from ._journal import Durability, sync_file

__all__ = ["Slabs", "in_host_memory"]

_INLINE_BYTES = 64 * 1024  # checksums of so much are worked out at once


class Slabs:
    """The slabs of one store, as one agent reaches them.

    Parameters
    ----------
    agent : Agent
    directory : Path
    identity : Identity
    writable : bool
    durability : {"none", "data", "full"}
    direct : bool
        Go past the page cache where rows are aligned.
    in_thread : callable
        Runs what may block.
    """

    def __init__(
        self, agent: Agent, directory: Path, identity: Identity, *, writable: bool, durability: Durability,
        direct: bool, in_thread: Callable[..., Awaitable[Any]],
    ) -> None:  # fmt: skip
        self._agent = agent
        self._directory = directory
        self._identity = identity
        self._writable = writable
        self._durability = durability
        self._direct = direct
        self._in_thread = in_thread
        self._opening: dict[int, asyncio.Task[Region]] = {}
        self._fds: dict[int, int] = {}  # for syncs: they see the errors of what was written since they were opened

    def __len__(self) -> int:
        return len(self._opening)

    async def region(self, number: int) -> Region:
        """Give a slab, opening it if need be.

        Raises
        ------
        StoreError, RegistrationError
            It cannot be made, or opened.
        """
        opening = self._opening.get(number)
        if opening is not None and opening.done() and not opening.cancelled() and opening.exception() is None:
            return opening.result()
        if opening is None:
            opening = self._opening[number] = asyncio.ensure_future(self._open(number))
        try:
            return await asyncio.shield(opening)
        except BaseException:
            if opening.done() and (opening.cancelled() or opening.exception()) and self._opening.get(number) is opening:
                del self._opening[number]  # the next one tries again
            raise

    async def _open(self, number: int) -> Region:
        path = self._directory / slab_name(number)
        if self._writable:
            try:
                await self._in_thread(self._make, number, path)
            except OSError as error:
                raise StoreError(f"{path} cannot be made: {error.strerror}") from error
        mode = "r+" if self._writable else "r"
        return await self._agent.open(path, mode, size=self._identity.slab_bytes, direct=self._direct)  # type: ignore[arg-type]

    def _make(self, number: int, path: Path) -> None:
        if number in self._fds:
            return
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if os.fstat(fd).st_size < self._identity.slab_bytes:
                os.ftruncate(fd, self._identity.slab_bytes)
                if self._durability != "none":
                    os.fsync(fd)
                    sync_directory(self._directory)
        except BaseException:
            os.close(fd)
            raise
        self._fds[number] = fd

    def sync(self, numbers: Iterable[int]) -> None:
        """Have what was written to slabs reach the device. Blocks.

        Raises
        ------
        OSError
        """
        for number in sorted(numbers):
            sync_file(self._fds[number], self._durability)

    async def put(self, rows: DescriptorList, which: Int64s, blocks: Int64s) -> Uint32s | None:
        """Write blocks, and give their checksums; None where the processor cannot read the rows.

        Parameters
        ----------
        rows : DescriptorList
            Memory, a block after the other.
        which : (n,) int64
            Which blocks of `rows`.
        blocks : (n,) int64
            Where they go in the slabs.

        Raises
        ------
        TransferError
            And whatever else `Agent.put` and `Agent.get` raise. Nothing is in flight any more by then.
        """
        chosen = chosen_rows(rows, which, self._identity.block_bytes)
        if not in_host_memory(rows):
            await self._move("put", chosen, blocks)
            return None
        if chosen.nbytes <= _INLINE_BYTES:
            await self._move("put", chosen, blocks)
            return await self._checksums(chosen)
        checking = asyncio.ensure_future(self._checksums(chosen))
        try:
            await self._move("put", chosen, blocks)
        finally:
            while not checking.done():
                await asyncio.wait([checking])
        return checking.result()

    async def get(self, rows: DescriptorList, which: Int64s, blocks: Int64s) -> Uint32s | None:
        """Read blocks, and give the checksums of what was read; else as `put`."""
        chosen = chosen_rows(rows, which, self._identity.block_bytes)
        await self._move("get", chosen, blocks)
        return await self._checksums(chosen) if in_host_memory(rows) else None

    async def _checksums(self, rows: DescriptorList) -> Uint32s:
        assert isinstance(rows.region, Region)
        memory = rows.region.memory  # kept until they are worked out
        addresses = np.array([segment.address for segment in memory.segments], np.uint64)
        if rows.nbytes <= _INLINE_BYTES:
            return checksums(rows.runs, addresses, self._identity.block_bytes)
        found: Uint32s = await self._in_thread(checksums, rows.runs, addresses, self._identity.block_bytes)
        return found

    async def _move(self, op: Literal["put", "get"], rows: DescriptorList, blocks: Int64s) -> None:
        size, each = self._identity.block_bytes, self._identity.slab_blocks
        call = self._agent.put if op == "put" else self._agent.get
        places = slots(blocks, size, each)
        first = int(blocks[0]) // each
        if len(blocks) == 1 or (blocks // each == first).all():
            await call(rows, DescriptorList.build(await self.region(first), places))
            return
        slabs = blocks // each
        cuts = [0, *(np.flatnonzero(np.diff(slabs)) + 1).tolist(), len(blocks)]
        regions = [await self.region(number) for number in slabs[cuts[:-1]].tolist()]
        transfers = []
        try:
            for region, start, stop in zip(regions, cuts, cuts[1:], strict=False):
                part = chosen_rows(rows, np.arange(start, stop), size)
                transfers.append(call(part, DescriptorList.build(region, places[start:stop])))
        finally:
            # All of them have ended before anybody may touch the blocks or the rows again.
            ended = await asyncio.gather(*transfers, return_exceptions=True)
        for outcome in ended:
            if isinstance(outcome, BaseException):
                raise outcome

    async def aclose(self) -> None:
        """Close all of them."""
        openings, self._opening = self._opening, {}
        ended = await asyncio.gather(*openings.values(), return_exceptions=True)
        closings = [opened.aclose() for opened in ended if isinstance(opened, Region)]
        outcomes = await asyncio.gather(*closings, return_exceptions=True)
        fds, self._fds = self._fds, {}
        await self._in_thread(_close_all, list(fds.values()))
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome


def chosen_rows(rows: DescriptorList, which: Int64s, block_bytes: int) -> DescriptorList:
    """Give the rows of some blocks; the list itself where that is all of them."""
    if len(which) * block_bytes == rows.nbytes and (len(which) == 1 or (which == np.arange(len(which))).all()):
        return rows
    return DescriptorList.build(rows.region, pick(rows.runs, block_bytes, which))


def in_host_memory(rows: DescriptorList) -> bool:
    """Whether the processor can read the rows."""
    return isinstance(rows.region, Region) and rows.region.kind is MemoryKind.DRAM


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
