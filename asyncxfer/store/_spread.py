"""The same for each of many things, several at a time: a bounded number of tasks take them one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence

__all__ = ["spread"]


async def spread(things: Sequence[int], do: Callable[[int], Awaitable[None]], width: int) -> None:
    """Await `do` for each; the first error ends it, once what is under way has been cancelled and has ended."""
    if len(things) == 1 or width == 1:
        for thing in things:
            await do(thing)
        return
    todo = iter(things)
    tasks = [asyncio.ensure_future(_work(todo, do)) for _ in range(min(width, len(things)))]
    try:
        if tasks:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        await _end(tasks)
    for task in tasks:
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error


async def _work(todo: Iterator[int], do: Callable[[int], Awaitable[None]]) -> None:
    for thing in todo:
        await do(thing)


async def _end(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel what has not ended, and wait for it, also when cancelled again meanwhile."""
    late = [task for task in tasks if not task.done()]
    for task in late:
        task.cancel()
    cancelled: asyncio.CancelledError | None = None
    while late:
        try:
            await asyncio.wait(late)
        except asyncio.CancelledError as error:
            cancelled = error
        late = [task for task in late if not task.done()]
    if cancelled is not None:
        raise cancelled
