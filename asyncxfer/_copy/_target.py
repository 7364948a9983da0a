"""Where a copy goes, piece by piece: a file that gets its name at the end, or an object that is there at once.

A target is left whole, or as if nothing had happened, but for what a later copy to a file goes on with.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Protocol

from asyncxfer import Agent, Region, Upload
from asyncxfer.abc import Exists

from ._agent import head
from ._part_file import PartFile
from ._source import CopyError
from ._staging import Lent
from ._sums import encoded, stated

__all__ = ["FileTarget", "ObjectTarget", "Target", "open_file_target", "open_object_target"]


class Target(Protocol):
    """Something that is written in pieces, several at a time."""

    async def has(self, number: int, staged: Lent, offset: int) -> int | None:
        """The CRC64NVME of a piece that is there already, from a copy that was cut off; None: it is not."""

    async def write(self, number: int, staged: Lent, offset: int, crc: int) -> None:
        """Write a piece and prove that it is there."""

    async def finish(self, crc: int) -> bool:
        """Let it be there, all pieces having been written; False where there was one that is kept."""


class FileTarget:
    """A file on its way."""

    def __init__(self, agent: Agent, file: Region, part: PartFile, done: dict[int, int], exists: Exists) -> None:
        self._agent = agent
        self._file = file
        self._part = part
        self._done = done
        self._exists = exists

    async def has(self, number: int, staged: Lent, offset: int) -> int | None:
        """Read a piece that the journal has, and compare it."""
        crc = self._done.get(number)
        if crc is None:
            return None
        await self._agent.get(staged.rows, self._file.bytes[offset : offset + staged.nbytes])
        return crc if staged.crc() == crc else None

    async def write(self, number: int, staged: Lent, offset: int, crc: int) -> None:
        """Write a piece, and read it again.

        Raises
        ------
        CopyError
            What is there is not what was written.
        """
        if not staged.nbytes:
            return
        there = self._file.bytes[offset : offset + staged.nbytes]
        await self._agent.put(staged.rows, there)
        await self._agent.get(staged.rows, there)
        if staged.crc() != crc:
            raise CopyError(f"{staged.nbytes:,} bytes at {offset:,} are not in the file as they were written")
        self._part.note(number, crc)

    async def finish(self, crc: int) -> bool:
        """Give it its name."""
        return await asyncio.to_thread(self._part.finish, self._exists)


@asynccontextmanager
async def open_file_target(
    agent: Agent, path: str, nbytes: int, *, of: Mapping[str, object], several: bool, resume: bool, exists: Exists,
    mode: int,
) -> AsyncIterator[Target]:  # fmt: skip
    """Open a file beside `path`, which gets its name when it is finished."""
    await asyncio.to_thread(os.makedirs, os.path.dirname(path), exist_ok=True)
    part = await asyncio.to_thread(PartFile, path, mode=mode)
    keep = False
    try:
        done = await asyncio.to_thread(part.begin, of, resume=resume, journal=several)
        async with agent.open(part.data, "w", size=nbytes) as file:
            keep = several
            yield FileTarget(agent, file, part, done, exists)
    except CopyError:
        keep = False  # there is nothing in it to go on with
        raise
    finally:
        part.leave(keep=keep)


class ObjectTarget:
    """An object on its way: at once, or in parts."""

    def __init__(
        self, agent: Agent, bucket: Region, key: str, nbytes: int, upload: Upload | None, exists: Exists
    ) -> None:
        self._agent = agent
        self._bucket = bucket
        self._key = key
        self._nbytes = nbytes
        self._upload = upload
        self._exists = exists

    async def has(self, number: int, staged: Lent, offset: int) -> int | None:
        """Know of none."""
        return None

    async def write(self, number: int, staged: Lent, offset: int, crc: int) -> None:
        """Write a part, or the object, with a checksum that the store compares."""
        if self._upload is not None:
            await self._upload.put(number + 1, staged.rows)
        else:
            await self._agent.put(staged.rows, self._bucket[self._key])

    async def finish(self, crc: int) -> bool:
        """Put parts together, and compare what the store says of the object.

        Raises
        ------
        CopyError
            It is not what was written.
        """
        if self._upload is not None:
            await self._upload.complete()
        info = await head(self._bucket, self._key)
        if info is not None and info.nbytes == self._nbytes and stated(info) in (None, encoded(crc)):
            return True
        if info is not None and self._exists == "keep":
            return False  # it was there first
        says = "is not there" if info is None else f"has {info.nbytes:,} bytes, {info.checksum or 'no checksum'}"
        raise CopyError(f"{self._nbytes:,} bytes with {encoded(crc)} were written, and the object {says}")


@asynccontextmanager
async def open_object_target(
    agent: Agent, bucket: Region, key: str, nbytes: int, *, several: bool, exists: Exists
) -> AsyncIterator[Target]:
    """Open an object that is there when it is finished, and not before."""
    if not several:
        yield ObjectTarget(agent, bucket, key, nbytes, None, exists)
        return
    async with bucket.objects.upload(key) as upload:
        yield ObjectTarget(agent, bucket, key, nbytes, upload, exists)
