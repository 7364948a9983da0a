"""From one source to one target in pieces, several on their way at a time, with a checksum of the whole.

What was read is summed as it lies in memory; the source's store, the target's store and the file that was written each
have to agree with that sum, as far as they can tell.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator

from asyncxfer._fast.crc64 import combine

from ._source import CopyError, Source
from ._staging import Staging
from ._sums import encoded
from ._target import Target

__all__ = ["AT_ONCE", "move"]

#: Pieces of one file or object that are on their way.
AT_ONCE = 8


async def move(
    source: Source, target: Target, nbytes: int, piece: int, staging: Staging, moved: Callable[[int], None]
) -> bool:
    """Move all pieces; False where the target had something that was kept.

    Parameters
    ----------
    source : Source
    target : Target
    nbytes : int, bytes
    piece : int, bytes
        Of all pieces but the last.
    staging : Staging
    moved : callable
        Is told how many bytes a piece had.

    Raises
    ------
    CopyError
        Checksums do not agree, or the source has changed.
    """
    starts = range(0, max(nbytes, 1), piece)
    sums: dict[int, tuple[int, int]] = {}

    async def some(todo: Iterator[int]) -> None:
        for start in todo:
            number, size = start // piece, min(piece, nbytes - start)
            async with staging.lend(size) as staged:
                crc = await target.has(number, staged, start)
                if crc is None:
                    await source.read(staged, start)
                    crc = staged.crc()
                    if len(starts) == 1:
                        await _check(source, crc)
                    await target.write(number, staged, start, crc)
            sums[number] = crc, size
            moved(size)

    await _together([some] * min(AT_ONCE, len(starts)), iter(starts))
    whole = 0
    for number in range(len(starts)):
        whole = combine(whole, *sums[number])
    if len(starts) > 1:
        await _check(source, whole)
    return await target.finish(whole)


async def _check(source: Source, crc: int) -> None:
    await source.check()
    if source.checksum is not None and source.checksum != encoded(crc):
        raise CopyError(f"it arrived damaged: its store states {source.checksum}, and {encoded(crc)} arrived")


async def _together(workers: list[Callable[[Iterator[int]], Coroutine[None, None, None]]], todo: Iterator[int]) -> None:
    try:
        async with asyncio.TaskGroup() as group:
            for worker in workers:
                group.create_task(worker(todo))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
