"""Opening a tiered store: its tiers, one after the other, and closing those that were opened when one cannot be."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import get_args

from asyncxfer import Agent, ConfigError

from ._api import Opening, Store
from ._journal import Durability
from ._memory_tier import MemoryTier
from ._objects import BATCH, ObjectStore
from ._open import is_of_objects, open  # noqa: A004
from ._store import DiskStore
from ._tiers import Acknowledge, TieredStore, Tiers, close_all

__all__ = ["tiered"]

_BACKLOG = 1 << 30


def tiered(
    *,
    agent: Agent,
    memory: int,
    disk: str | os.PathLike[str] | Store,
    objects: str | Store,
    block_bytes: int | None = None,
    disk_budget: int | None = None,
    objects_budget: int | None = None,
    acknowledge: Acknowledge = "disk",
    durability: Durability = "none",
    backlog: int = _BACKLOG,
    uploads: int = 32,
    options: Mapping[str, object] | None = None,
) -> Opening[TieredStore]:
    """Open a store whose blocks are in memory, on disk and objects, or make it.

    A block is looked for in that order. A put is acknowledged by one of the tiers, and the block becomes an object
    behind it; after the end of the process, however it came, that goes on when the store is opened again.

    Parameters
    ----------
    agent : Agent
        Moves the blocks. It has to be open longer than the store.
    memory : int, bytes
        Of the blocks in memory, allocated at once; 0 for none.
    disk : str, path or Store
        A directory, or a store in one that is open for writing, which nobody else uses and the caller closes.
    objects : str or Store
        A URL such as ``s3://bucket/prefix``, or a store of objects that is open for writing, which the caller closes.
    block_bytes : int or None, bytes
        Of every block; needed to make a store.
    disk_budget, objects_budget : int or None, bytes
        Of the blocks in a directory, and of the objects below a URL, as in `open`.
    acknowledge : {"memory", "disk", "objects"}
        Which tier has to have a block before a put returns. In memory, blocks end with the process; on disk, they
        outlive what `durability` says.
    durability : {"none", "data", "full"}
        Of the blocks in a directory, as in `open`.
    backlog : int, bytes
        Of the blocks that wait to become objects, at most: puts wait for room. On disk they stay pinned meanwhile, so
        it is never more than half of what the disk's budget has room for.
    uploads : int
        How many become objects at a time.
    options : mapping of str to object or None
        What the client of the object store takes, as in `Agent.open`.

    Returns
    -------
    Opening
        ``await`` it for a `TieredStore`, or ``async with`` it.

    Raises
    ------
    ConfigError
        An argument is wrong.
    StoreError
        By the await: and its kinds, a tier cannot be used, or the blocks of two are not of one size.
    """
    if acknowledge not in get_args(Acknowledge):
        allowed = ", ".join(map(repr, get_args(Acknowledge)))
        raise ConfigError(f"acknowledge is {acknowledge!r}; expected one of {allowed}")
    for what, number, least in (("memory", memory, 0), ("backlog", backlog, 1), ("uploads", uploads, 1)):
        if not least <= number < 2**62:
            raise ConfigError(f"{what} is {number}; expected at least {least}")
    for what, place, kind in (("disk", disk, DiskStore), ("objects", objects, ObjectStore)):
        wrong = not isinstance(place, kind) if isinstance(place, Store) else is_of_objects(place) != (what == "objects")
        if wrong or (isinstance(place, Store) and place.mode != "w"):
            raise ConfigError(f"{what} is {place!r}, which is no place for that tier")

    async def make() -> TieredStore:
        owned: list[Store] = []
        kept: list[MemoryTier] = []
        try:
            below = await _opened(
                disk, owned, agent=agent, block_bytes=block_bytes, budget=disk_budget, durability=durability
            )
            lowest = await _opened(
                objects, owned, agent=agent, block_bytes=below.block_bytes, budget=objects_budget, options=options
            )
            if lowest.block_bytes != below.block_bytes:
                raise ConfigError(f"{below.url} and {lowest.url} hold blocks of different sizes")
            kept.append(await MemoryTier.make(agent, memory, below.block_bytes))
            assert isinstance(below, DiskStore)
            assert isinstance(lowest, ObjectStore)
            most = max(1, min(backlog // below.block_bytes, below.stats()["limit"] // 2))
            batch = min(uploads, BATCH, max(1, len(lowest.staging) // 4))
            width = max(1, min(uploads, len(lowest.staging) // 2) // batch)
            tiers = Tiers(kept[0], below, lowest, tuple(owned), acknowledge, most, width, batch)
        except BaseException:
            await close_all(*kept, *owned)
            raise
        return await TieredStore.open(agent, tiers)

    return Opening(make)


async def _opened(place: str | os.PathLike[str] | Store, owned: list[Store], **options: object) -> Store:
    """The store of a tier; one that is opened here is closed here."""
    if isinstance(place, Store):
        return place
    store = await open(place, **options)  # type: ignore[arg-type]
    owned.append(store)
    return store
