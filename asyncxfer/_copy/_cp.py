"""``asyncxfer cp``: finds what is to be copied, and has it copied by several at a time through bounded memory."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass

from asyncxfer import Agent, Region

from ._agent import Buckets, agent_for, below, head
from ._copier import Copier, Outcome, Rules
from ._destination import Destination, FileDestination, ObjectDestination
from ._move import AT_ONCE
from ._names import Wanted
from ._place import Place, UsageError
from ._report import Report, Totals
from ._staging import SLOT, Staging
from ._walk import Found, Refused, file_at, found_object, walk, walk_objects

__all__ = ["Asked", "copy"]

_CONFIG = {"object_timeout": 300.0}  # a store takes its time to copy what is large by itself


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line asks for.

    Attributes
    ----------
    source, target : Place
    source_options, target_options : mapping of str to object
        For the clients of their stores.
    recursive : bool
    wanted : Wanted
    rules : Rules
    at_once : int
        Files and objects.
    memory : int, bytes
    """

    source: Place
    target: Place
    source_options: Mapping[str, object]
    target_options: Mapping[str, object]
    recursive: bool
    wanted: Wanted
    rules: Rules
    at_once: int
    memory: int


async def copy(asked: Asked, report: Report) -> Totals:
    """Copy all.

    Raises
    ------
    UsageError
        It makes no sense.
    XferError, OSError
        What is to be copied, or a store, cannot be reached.
    """
    totals = Totals()
    async with AsyncExitStack() as stack:
        agent = await stack.enter_async_context(agent_for((asked.source, asked.target), _CONFIG))
        buckets = Buckets(agent, stack)
        source, target = asked.source, asked.target
        _refuse_within(asked)
        into = None if target.local else await buckets.write(target, asked.target_options, asked.rules.exists)
        within = into if _one_bucket(asked) else None
        bucket = within if source.local or within is not None else await buckets.read(source, asked.source_options)
        one = await _one(asked, bucket)
        destination = _destination(asked, agent, into, one)
        slots = _slots(asked.memory // SLOT, destination, one)
        region = await stack.enter_async_context(agent.allocate((slots, SLOT), "uint8"))
        copier = Copier(
            agent=agent, staging=Staging(region), bucket=bucket, rules=asked.rules, moved=report.moved,
            destination=destination,
            within=within,
            source_url=source.at, target_url=target.at,
        )  # fmt: skip
        found = _alone(one, asked.wanted) if one is not None else _all(asked, bucket)
        await _copy_all(copier, found, asked.at_once, report, totals)
    return totals


def _one_bucket(asked: Asked) -> bool:
    source, target = asked.source, asked.target
    places = (source.scheme, source.bucket) == (target.scheme, target.bucket)
    return not source.local and places and asked.source_options == asked.target_options


# ---- what is to be copied -----------------------------------------------------------------------------------------


async def _one(asked: Asked, bucket: Region | None) -> Found | Refused | None:
    """The file or object that is asked for; None: it is a directory or a prefix."""
    source = asked.source
    if bucket is None:
        if not await asyncio.to_thread(os.path.isdir, source.path):
            return await asyncio.to_thread(file_at, source.path, source.name)
    elif not source.folder:
        info = await head(bucket, source.path)
        if info is not None:
            return found_object(info, "")._replace(name=source.name)
        await _refuse_nothing(bucket, f"{source.path}/", source)
    elif source.path:
        await _refuse_nothing(bucket, source.path, source)
    if not asked.recursive:
        what = "a directory" if bucket is None else "no object but a prefix"
        raise UsageError(f"{source.url} is {what}; add --recursive to copy all that is in it")
    return None


async def _refuse_nothing(bucket: Region, prefix: str, source: Place) -> None:
    async with aclosing(below(bucket, prefix)) as infos:
        async for _ in infos:
            return
    raise FileNotFoundError(2, f"there is no such object, and nothing below {source.at(prefix)}", source.url)


async def _alone(found: Found | Refused, wanted: Wanted) -> AsyncGenerator[Found | Refused, None]:
    if found.name in wanted:
        yield found


async def _all(asked: Asked, bucket: Region | None) -> AsyncGenerator[Found | Refused, None]:
    path = asked.source.path
    if bucket is not None and path and not path.endswith("/"):
        path += "/"
    walked = walk(path) if bucket is None else walk_objects(bucket, path)
    async with aclosing(walked) as items:
        async for found in items:
            if found.name in asked.wanted:
                yield found


# ---- where it goes ------------------------------------------------------------------------------------------------


def _destination(asked: Asked, agent: Agent, into: Region | None, one: Found | Refused | None) -> Destination:
    target, exists = asked.target, asked.rules.exists
    path, single = target.path, one is not None
    if into is None:
        folder = os.path.isdir(path)
        if one is None and os.path.lexists(path) and not folder:
            raise UsageError(f"{path} is no directory; what is copied from a directory or prefix goes into one")
        single = single and not folder and not target.folder
        return FileDestination(agent, path, exists, single=single)
    single = single and not target.folder
    if not single and path and not path.endswith("/"):
        path += "/"
    return ObjectDestination(agent, into, path, exists, single=single)


def _slots(most: int, destination: Destination, one: Found | Refused | None) -> int:
    """How much memory is of use: for one file or object only what is on its way at once."""
    if not isinstance(one, Found):
        return most
    piece = destination.piece(one.nbytes)
    pieces = min(AT_ONCE, max(1, -(-one.nbytes // piece)))
    return min(most, pieces * (piece // SLOT))


def _refuse_within(asked: Asked) -> None:
    """Refuse to copy a directory or prefix into itself: it would never end."""
    source, target = asked.source, asked.target
    if not asked.recursive or source.local is not target.local:
        return
    if source.local:
        above, under = (os.path.realpath(place.path).rstrip("/") + "/" for place in (source, target))
        inside = os.path.isdir(source.path) and under.startswith(above)
    else:
        above, under = (place.path.rstrip("/") + "/" if place.path else "" for place in (source, target))
        inside = _one_bucket(asked) and under.startswith(above)
    if inside:
        raise UsageError(f"{target.url} is in {source.url}; copy to somewhere else")


# ---- the copying --------------------------------------------------------------------------------------------------


async def _copy_all(
    copier: Copier, found: AsyncGenerator[Found | Refused, None], at_once: int, report: Report, totals: Totals
) -> None:
    """Have so many at a time take what is found next."""
    queue: asyncio.Queue[Found | Refused | None] = asyncio.Queue(4 * at_once)

    async def find() -> None:
        async with aclosing(found) as items:
            async for item in items:
                report.found(item.nbytes if isinstance(item, Found) else 0)
                await queue.put(item)
        for _ in range(at_once):
            await queue.put(None)

    async def take() -> None:
        while (item := await queue.get()) is not None:
            outcome: Outcome = await copier.copy(item)
            totals.add(outcome)
            report.ended(outcome)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(take())
            group.create_task(find())
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
