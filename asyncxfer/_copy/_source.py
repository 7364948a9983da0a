"""What is copied, piece by piece: a file or an object, and whether it is still what it was."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

from asyncxfer import Agent, Region, TransferError

from ._agent import head
from ._staging import Lent
from ._sums import stated
from ._walk import Found, file_at

__all__ = ["CopyError", "FileSource", "ObjectSource", "Source", "open_source"]


class CopyError(TransferError):
    """What was written is not what was read, or what was read is not one thing."""


class Source(Protocol):
    """Something that is read in pieces, several at a time."""

    #: The CRC64NVME of all of it as a store states it; None where that is not known.
    checksum: str | None

    async def read(self, into: Lent, offset: int) -> None:
        """Read so many bytes from `offset` on."""

    async def check(self) -> None:
        """Raise CopyError where it is no longer what it was when it was found."""


class FileSource:
    """A file that is open."""

    checksum: str | None = None

    def __init__(self, agent: Agent, file: Region, found: Found) -> None:
        self._agent = agent
        self._file = file
        self._found = found

    async def read(self, into: Lent, offset: int) -> None:
        """Read a piece."""
        if into.nbytes:
            await self._agent.get(into.rows, self._file.bytes[offset : offset + into.nbytes])

    async def check(self) -> None:
        """Compare its size, time and place with what they were.

        Raises
        ------
        CopyError
            They are others.
        """
        now = await asyncio.to_thread(file_at, self._found.path, self._found.name)
        if not isinstance(now, Found) or now.mark != self._found.mark:
            raise CopyError("it was changed while it was copied; copy it again")


class ObjectSource:
    """An object; a piece that is not all of it is proved by the transfer, where the store's checksum does not."""

    def __init__(self, agent: Agent, bucket: Region, found: Found) -> None:
        self._agent = agent
        self._bucket = bucket
        self._found = found
        self.checksum = stated(found.info)
        self._at_once = False

    async def read(self, into: Lent, offset: int) -> None:
        """Read a piece, or the object."""
        key, nbytes = self._found.path, into.nbytes
        if not nbytes:
            return
        if nbytes == self._found.nbytes:
            self._at_once = True
            await self._agent.get(into.rows, self._bucket[key])
        else:
            part = self._bucket[key, offset : offset + nbytes]
            await self._agent.get(into.rows, part, checksum=self.checksum is None)

    async def check(self) -> None:
        """Compare its etag with what it was, unless it was read at once, which is one version of it.

        Raises
        ------
        CopyError
            It is another.
        """
        if self._at_once:
            return
        now = await head(self._bucket, self._found.path)
        if now is None or now.etag != self._found.mark:
            raise CopyError("it was changed while it was copied; copy it again")


@asynccontextmanager
async def open_source(agent: Agent, bucket: Region | None, found: Found) -> AsyncIterator[Source]:
    """Open what was found: in a bucket, or in the file system."""
    if bucket is not None:
        yield ObjectSource(agent, bucket, found)
        return
    async with agent.open(found.path, size=found.nbytes) as file:
        yield FileSource(agent, file, found)
