"""What becomes of one file or object: whether it is copied at all, by which way, and what is said of it at the end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from asyncxfer import Agent, ObjectInfo, Region, XferError
from asyncxfer.abc import Exists

from ._destination import Destination
from ._move import move
from ._source import CopyError, open_source
from ._staging import SLOT, Staging
from ._sums import has_crc, same_as_file, same_files, same_objects
from ._walk import Found, Refused

__all__ = ["Copier", "Ended", "Outcome", "Rules"]

Ended = Literal["copied", "would copy", "kept", "same", "failed"]


@dataclass(frozen=True, slots=True)
class Rules:
    """What was asked for.

    Attributes
    ----------
    exists : {"replace", "keep", "error"}
        What becomes of what is at the destination.
    resume : bool
        What is there and the same is not copied, and files that were cut off go on.
    dry_run : bool
        Nothing is written.
    """

    exists: Exists
    resume: bool
    dry_run: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one file or object.

    Attributes
    ----------
    source, target : str
        URLs or paths; no target where it was not even known.
    nbytes : int, bytes
    ended : {"copied", "would copy", "kept", "same", "failed"}
    why : str
        It failed.
    """

    source: str
    target: str
    nbytes: int
    ended: Ended
    why: str = ""


@dataclass(frozen=True, slots=True)
class Copier:
    """Copies from one place to another, one file or object a call.

    Attributes
    ----------
    agent : Agent
    staging : Staging
    bucket : Region or None
        Of the source; None: files.
    destination : Destination
    within : Region or None
        The bucket in which both places are, if it is one: its store copies by itself.
    source_url, target_url : callable
        Give the URL of a path or key there.
    rules : Rules
    moved : callable
        Is told of bytes that were copied.
    """

    agent: Agent
    staging: Staging
    bucket: Region | None
    destination: Destination
    within: Region | None
    source_url: Callable[[str], str]
    target_url: Callable[[str], str]
    rules: Rules
    moved: Callable[[int], None]

    async def copy(self, found: Found | Refused) -> Outcome:
        """Copy it, or say why not."""
        source, target = self.source_url(found.path), ""
        if isinstance(found, Refused):
            return Outcome(source, target, 0, "failed", found.why)
        try:
            path = await self.destination.path(found)
            target = self.target_url(path)
            return Outcome(source, target, found.nbytes, await self._copy(found, path))
        except OSError as error:
            why = str(error) if isinstance(error, XferError) else error.strerror or str(error)
        except XferError as error:
            why = str(error)
        return Outcome(source, target, found.nbytes, "failed", why)

    async def _copy(self, found: Found, path: str) -> Ended:
        rules = self.rules
        looked = rules.resume or rules.dry_run or rules.exists != "replace" or self.within is not None
        there = await self.destination.existing(path) if looked or self.bucket is None else None
        self._refuse_itself(found, there, path)
        if there is not None:
            if rules.resume and await self._same(found, there):
                return "same"
            if rules.exists == "keep":
                return "kept"
            if rules.exists == "error":
                raise CopyError("there is one already")
        if rules.dry_run:
            return "would copy"
        if self.within is not None:
            return await self._copy_within(self.within, found, path)
        return "copied" if await self._move(found, path) else "kept"

    def _refuse_itself(self, found: Found, there: Found | None, path: str) -> None:
        if self.within is not None:
            itself = found.path == path
        else:
            itself = there is not None and there.info is None and found.info is None and there.mark == found.mark
        if itself:
            raise CopyError("source and destination are the same")

    async def _same(self, found: Found, there: Found) -> bool:
        if found.nbytes != there.nbytes:
            return False
        if found.info is None and there.info is None:
            return await same_files(found.path, there.path, self.agent, self.staging)
        if found.info is not None and there.info is not None:
            return same_objects(await self._known(found.path, found.info), there.info)
        file, stored = (found, there) if found.info is None else (there, found)
        info = stored.info
        assert info is not None
        if stored is found:
            info = await self._known(found.path, info)
        return await same_as_file(info, file.path, self.agent, self.staging)

    async def _known(self, key: str, listed: ObjectInfo) -> ObjectInfo:
        """What the store of the source knows of an object, which its list may not tell."""
        if has_crc(listed) or self.bucket is None:
            return listed
        return await self.bucket.objects.head(key)

    async def _copy_within(self, bucket: Region, found: Found, path: str) -> Ended:
        await bucket.objects.copy(found.path, path)
        one, other = await asyncio.gather(bucket.objects.head(found.path), bucket.objects.head(path))
        if other.nbytes != found.nbytes or (one.checksum and other.checksum and not same_objects(one, other)):
            raise CopyError("the copy that the store made is not what is copied")
        self.moved(found.nbytes)
        return "copied"

    async def _move(self, found: Found, path: str) -> bool:
        piece = self.destination.piece(found.nbytes)
        if piece > self.staging.slots * SLOT:
            raise CopyError(f"{found.nbytes:,} bytes go in parts of {piece:,}, which takes as much --memory")
        if self.bucket is not None and found.nbytes > piece and found.info is not None:
            info = await self._known(found.path, found.info)
            if (info.nbytes, info.etag) != (found.nbytes, found.mark):
                raise CopyError("it was changed since it was listed; copy it again")
            found = found._replace(info=info)
        of = {"source": self.source_url(found.path), "mark": found.mark, "nbytes": found.nbytes, "piece": piece}
        async with (
            open_source(self.agent, self.bucket, found) as source,
            self.destination.open(path, found, of=of, resume=self.rules.resume) as target,
        ):
            return await move(source, target, found.nbytes, piece, self.staging, self.moved)
