"""The agent that does the work, the buckets that it has opened, and what is below a prefix of them."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import cast

from asyncxfer import Agent, BackendError, ObjectInfo, ObjectMissingError, Region
from asyncxfer.abc import Exists

from ._place import Place

__all__ = ["Buckets", "agent_for", "below", "head"]

#: Backends by the scheme of what they open; one of another scheme is looked for among all that load.
_BACKENDS = {"": (), "s3": ("s3",), "az": ("azure",), "gs": ("gcs",)}
_FILES = ("local", "uring")
_LIST_SECONDS = 20.0  # less than a store's list may take; whoever takes its time reads on from where it was


@asynccontextmanager
async def agent_for(places: Iterable[Place], config: Mapping[str, object] | None = None) -> AsyncIterator[Agent]:
    """Start an agent that opens these places."""
    schemes = {place.scheme for place in places}
    name = f"asyncxfer-{os.getpid()}"
    async with AsyncExitStack() as stack:
        agent: Agent | None = None
        if schemes <= set(_BACKENDS):
            named = [*_FILES, *(backend for scheme in schemes for backend in _BACKENDS[scheme])]
            with contextlib.suppress(BackendError):  # the agent without it says what to install
                agent = await stack.enter_async_context(Agent(name, backends=named, config=config))
        if agent is None:
            agent = await stack.enter_async_context(Agent(name, config=config))
        yield agent


class Buckets:
    """Buckets that are open, each once for reading and once for writing.

    Parameters
    ----------
    agent : Agent
    stack : AsyncExitStack
        Closes them.
    """

    def __init__(self, agent: Agent, stack: AsyncExitStack) -> None:
        self._agent = agent
        self._stack = stack

    async def read(self, place: Place, options: Mapping[str, object]) -> Region:
        """Open the bucket of a place for reading; keys are whole keys."""
        return await self._open(self._agent.open(f"{place.scheme}://{place.bucket}", options=options))

    async def write(self, place: Place, options: Mapping[str, object], exists: Exists) -> Region:
        """Open the bucket of a place for writing; keys are whole keys."""
        opening = self._agent.open(f"{place.scheme}://{place.bucket}", "w", exists=exists, options=options)
        return await self._open(opening)

    async def _open(self, opening: contextlib.AbstractAsyncContextManager[Region]) -> Region:
        return await self._stack.enter_async_context(opening)


async def head(bucket: Region, key: str) -> ObjectInfo | None:
    """What a store knows of an object; None: there is none."""
    try:
        return await bucket.objects.head(key)
    except ObjectMissingError:
        return None


async def below(bucket: Region, prefix: str, *, after: str = "") -> AsyncGenerator[ObjectInfo, None]:
    """Yield objects whose keys begin with `prefix`, in order; whoever asks may take as long as he likes."""
    more = True
    while more:
        more, until = False, time.monotonic() + _LIST_SECONDS
        listed = bucket.objects.list(prefix, after=after)
        async with contextlib.aclosing(cast(AsyncGenerator[ObjectInfo, None], listed)) as found:
            async for info in found:
                yield info
                after = info.key
                if time.monotonic() > until:
                    more = True
                    break
