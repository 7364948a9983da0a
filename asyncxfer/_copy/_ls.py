"""``asyncxfer ls``: files and objects with size and time, all below a place or one level of it."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, aclosing
from typing import NamedTuple

from asyncxfer import ObjectInfo, Region

from ._agent import Buckets, agent_for, below, head
from ._names import Wanted, shown
from ._place import Place
from ._report import human
from ._walk import Found, Refused, file_at, walk

__all__ = ["Form", "Line", "lines", "told"]

_MANY = 1000  # objects of one directory that are read over before the list is begun anew behind it
_LAST = "\U0010ffff"  # nothing comes behind it in the order of keys


class Line(NamedTuple):
    """One that is listed.

    Attributes
    ----------
    name : str
        Below what was asked for; a directory's ends in a slash.
    nbytes : int or None, bytes
    modified : float or None, seconds
        Since the epoch.
    etag, checksum : str or None
    why : str
        It cannot be looked at.
    """

    name: str
    nbytes: int | None = None
    modified: float | None = None
    etag: str | None = None
    checksum: str | None = None
    why: str = ""


class Form(NamedTuple):
    """How lines are printed."""

    long: bool
    human: bool
    json: bool


def told(line: Line, form: Form) -> str:
    """Give a line as it is printed."""
    if form.json:
        return json.dumps({name: value for name, value in line._asdict().items() if name != "why"})
    size = "-" if line.nbytes is None else human(line.nbytes) if form.human else str(line.nbytes)
    when = "-" if line.modified is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(line.modified))
    more = f"  {line.etag or '-'}  {line.checksum or '-'}" if form.long else ""
    return f"{size:>14}  {when:>19}{more}  {shown(line.name)}"


async def lines(
    place: Place, options: Mapping[str, object], wanted: Wanted, *, recursive: bool
) -> AsyncGenerator[Line, None]:
    """Yield what is at a place.

    Raises
    ------
    XferError, OSError
        There is nothing, or it cannot be reached.
    """
    local = place.local
    listed = _files(place, recursive=recursive) if local else _objects(place, options, recursive=recursive)
    async with aclosing(listed) as found:
        async for line in found:
            if line.name.rstrip("/") in wanted:
                yield line


# ---- the file system ----------------------------------------------------------------------------------------------


async def _files(place: Place, *, recursive: bool) -> AsyncGenerator[Line, None]:
    if not await asyncio.to_thread(os.path.isdir, place.path):
        yield _file(await asyncio.to_thread(file_at, place.path, place.name))
    elif recursive:
        async with aclosing(walk(place.path)) as found:
            async for item in found:
                yield _file(item)
    else:
        for line in await asyncio.to_thread(_level, place.path):
            yield line


def _file(found: Found | Refused) -> Line:
    if isinstance(found, Refused):
        return Line(found.name, why=found.why)
    return Line(found.name, found.nbytes, found.modified)


def _level(folder: str) -> list[Line]:
    found = []
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        try:
            found.append(Line(f"{name}/") if os.path.isdir(path) else _file(file_at(path, name)))
        except OSError as error:
            found.append(Line(name, why=error.strerror or str(error)))
    return found


# ---- stores -------------------------------------------------------------------------------------------------------


async def _objects(place: Place, options: Mapping[str, object], *, recursive: bool) -> AsyncGenerator[Line, None]:
    async with AsyncExitStack() as stack:
        agent = await stack.enter_async_context(agent_for([place]))
        bucket = await Buckets(agent, stack).read(place, options)
        info = None if place.folder else await head(bucket, place.path)
        if info is not None:
            yield _object(info, place.name)
            return
        prefix = place.path if place.folder else f"{place.path}/"
        nothing = True
        listed = _below(bucket, prefix) if recursive else _one_level(bucket, prefix)
        async with aclosing(listed) as found:
            async for line in found:
                nothing = False
                if line.name:
                    yield line
        if nothing and prefix:
            raise FileNotFoundError(2, f"there is no such object, and nothing below {place.at(prefix)}", place.url)


def _object(info: ObjectInfo, name: str) -> Line:
    return Line(name, info.nbytes, info.modified, info.etag, info.checksum)


async def _below(bucket: Region, prefix: str) -> AsyncGenerator[Line, None]:
    async with aclosing(below(bucket, prefix)) as infos:
        async for info in infos:
            yield _object(info, info.key.removeprefix(prefix))


async def _one_level(bucket: Region, prefix: str) -> AsyncGenerator[Line, None]:
    """Objects, and of those further down the directories, each once."""
    after, more = "", True
    while more:
        more, folder, passed = False, "", 0
        async with aclosing(below(bucket, prefix, after=after)) as infos:
            async for info in infos:
                name, slash, _ = info.key.removeprefix(prefix).partition("/")
                if not slash:
                    yield _object(info, name)
                elif name != folder or not passed:
                    folder, passed = name, 1
                    yield Line(f"{name}/")
                else:
                    passed += 1
                    if passed > _MANY:
                        after, more = f"{prefix}{folder}/{_LAST}", True
                        break
