"""What files and objects are copied into: a folder or a prefix, or one name. Says where each goes and what is there."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from asyncxfer import Agent, Region
from asyncxfer.abc import Exists

from ._agent import head
from ._names import unsafe
from ._source import CopyError
from ._staging import SLOT
from ._target import Target, open_file_target, open_object_target
from ._walk import Found, file_at, found_object

__all__ = ["Destination", "FileDestination", "ObjectDestination"]

_MOST_PARTS = 10_000  # of an upload, in every store that is known here


class Destination(Protocol):
    """A place that takes what was found elsewhere."""

    async def path(self, found: Found) -> str:
        """Where it goes: a path or a key. Raises CopyError where it cannot."""

    async def existing(self, path: str) -> Found | None:
        """What is there."""

    def piece(self, nbytes: int) -> int:
        """How long the pieces are in which something of that length is written: so many whole slots."""

    def open(
        self, path: str, found: Found, *, of: Mapping[str, object], resume: bool
    ) -> AbstractAsyncContextManager[Target]:
        """Open what is to be written."""


class FileDestination:
    """A directory, or one file.

    Parameters
    ----------
    agent : Agent
    root : str
        The directory, or what the file is called.
    exists : {"replace", "keep", "error"}
    single : bool
        It is one file.
    """

    def __init__(self, agent: Agent, root: str, exists: Exists, *, single: bool) -> None:
        self._agent = agent
        self._root = root
        self._exists = exists
        self._single = single

    async def path(self, found: Found) -> str:
        """Join the directory and a name that stays inside.

        Raises
        ------
        CopyError
            It does not.
        """
        if self._single:
            return self._root
        why = unsafe(found.name)
        if not why:
            path = os.path.join(self._root, found.name)
            if await asyncio.to_thread(self._inside, path):
                return path
            why = "a link in the destination leads out of it"
        raise CopyError(why)

    def _inside(self, path: str) -> bool:
        root = os.path.realpath(self._root)
        return os.path.commonpath((root, os.path.realpath(os.path.dirname(path)))) == root

    async def existing(self, path: str) -> Found | None:
        """Look for a file.

        Raises
        ------
        CopyError
            There is something else.
        """
        try:
            found = await asyncio.to_thread(file_at, path, os.path.basename(path))
        except FileNotFoundError:
            return None
        if not isinstance(found, Found):
            raise CopyError(f"{path} is there already, and no file")
        return found

    def piece(self, nbytes: int) -> int:
        """Give one slot."""
        return SLOT

    def open(
        self, path: str, found: Found, *, of: Mapping[str, object], resume: bool
    ) -> AbstractAsyncContextManager[Target]:
        """Open a file beside it."""
        return open_file_target(
            self._agent, path, found.nbytes, of=of, several=found.nbytes > SLOT, resume=resume, exists=self._exists,
            mode=found.mode,
        )  # fmt: skip


class ObjectDestination:
    """A prefix, or one key.

    Parameters
    ----------
    agent : Agent
    bucket : Region
    root : str
        What all keys begin with, or the key.
    exists : {"replace", "keep", "error"}
    single : bool
        It is one key.
    """

    def __init__(self, agent: Agent, bucket: Region, root: str, exists: Exists, *, single: bool) -> None:
        self._agent = agent
        self._bucket = bucket
        self._root = root
        self._exists = exists
        self._single = single

    async def path(self, found: Found) -> str:
        """Join prefix and name."""
        return self._root if self._single else f"{self._root}{found.name}"

    async def existing(self, path: str) -> Found | None:
        """Ask the store."""
        info = await head(self._bucket, path)
        return None if info is None else found_object(info, "")

    def piece(self, nbytes: int) -> int:
        """Give as many slots as leave no more parts than an upload may have."""
        return SLOT * max(1, -(-nbytes // (_MOST_PARTS * SLOT)))

    def open(
        self, path: str, found: Found, *, of: Mapping[str, object], resume: bool
    ) -> AbstractAsyncContextManager[Target]:
        """Open an object, which is written in parts where it is long."""
        several = found.nbytes > self.piece(found.nbytes)
        return open_object_target(self._agent, self._bucket, path, found.nbytes, several=several, exists=self._exists)
