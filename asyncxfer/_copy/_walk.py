"""What is below a directory, or below a prefix of a bucket: each file and object by its name there, or why not.

Links to files count as what they lead to. Links to directories are followed, but for those that lead to where the walk
is already.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import NamedTuple, TypeAlias

from asyncxfer import ObjectInfo, Region

from ._agent import below
from ._names import PART

__all__ = ["Found", "Refused", "file_at", "found_object", "walk", "walk_objects"]


_Folder: TypeAlias = tuple[str, str, tuple[tuple[int, int], ...]]


class Found(NamedTuple):
    """A file or an object.

    Attributes
    ----------
    name : str
        Below what was walked; of one alone the last part of its name.
    path : str
        Or key.
    nbytes : int, bytes
    modified : float, seconds
        Since the epoch.
    mark : str
        By which a change of it is seen: an etag.
    mode : int
        Permissions of a file.
    info : ObjectInfo or None
        What the store said of an object.
    """

    name: str
    path: str
    nbytes: int
    modified: float
    mark: str
    mode: int = 0o666
    info: ObjectInfo | None = None


class Refused(NamedTuple):
    """What is there and cannot be taken."""

    name: str
    path: str
    why: str


def file_at(path: str, name: str) -> Found | Refused:
    """Look at a file. It may block.

    Raises
    ------
    OSError
        It is not there, or cannot be looked at.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISBLK(status.st_mode):
        return Refused(name, path, "it is neither a file nor a directory")
    nbytes = status.st_size
    if stat.S_ISBLK(status.st_mode):
        with open(path, "rb") as device:
            nbytes = device.seek(0, os.SEEK_END)
    mark = f"{status.st_dev}-{status.st_ino}-{status.st_size}-{status.st_mtime_ns}"
    return Found(name, path, nbytes, status.st_mtime, mark, stat.S_IMODE(status.st_mode) & 0o777)


def found_object(info: ObjectInfo, prefix: str) -> Found:
    """Take what a store says of an object below a prefix."""
    return Found(info.key.removeprefix(prefix), info.key, info.nbytes, info.modified, info.etag, info=info)


async def walk_objects(bucket: Region, prefix: str) -> AsyncGenerator[Found | Refused, None]:
    """Yield the objects below a prefix, but for the empty ones that some tools leave for a folder."""
    async with aclosing(below(bucket, prefix)) as infos:
        async for info in infos:
            if not info.key.endswith("/") or info.nbytes:
                yield found_object(info, prefix)


async def walk(folder: str) -> AsyncGenerator[Found | Refused, None]:
    """Yield the files below a directory, in the order of their names."""
    status = await asyncio.to_thread(os.stat, folder)
    todo: list[_Folder] = [("", folder, ((status.st_dev, status.st_ino),))]
    while todo:
        name, path, above = todo.pop()
        files, folders = await asyncio.to_thread(_entries, name, path, above)
        for file in files:
            yield file
        todo += reversed(folders)


def _entries(
    prefix: str, folder: str, above: tuple[tuple[int, int], ...]
) -> tuple[list[Found | Refused], list[_Folder]]:
    """What lies in one directory: files, and directories with all that they are in."""
    files: list[Found | Refused] = []
    folders: list[_Folder] = []
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        return [Refused(prefix.rstrip("/") or ".", folder, _reason(error))], []
    for entry in names:
        name, path = f"{prefix}{entry}", os.path.join(folder, entry)
        if entry.endswith((PART, f"{PART}.json")):
            continue  # of a copy that was cut off
        try:
            status = os.stat(path)
            place = status.st_dev, status.st_ino
            if not stat.S_ISDIR(status.st_mode):
                files.append(file_at(path, name))
            elif place in above:
                files.append(Refused(name, path, "it is a link to a directory that it is in"))
            else:
                folders.append((f"{name}/", path, (*above, place)))
        except OSError as error:
            files.append(Refused(name, path, _reason(error)))
    return files, folders


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
