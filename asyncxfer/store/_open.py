"""Which kind of store a URL names, and what of the arguments is for it; the opening is that kind's own business."""

from __future__ import annotations

import os
from collections.abc import Mapping

from asyncxfer import Agent, ConfigError

from ._api import Opening, Store
from ._journal import Durability
from ._objects import ObjectStore, Place
from ._opening import Mode, Options, check, directory_of
from ._store import DiskStore

__all__ = ["is_of_objects", "open"]

SLAB_BYTES = 1 << 30


def open(  # noqa: A001 - as `Agent.open`, and Python's own
    url: str | os.PathLike[str],
    *,
    agent: Agent,
    block_bytes: int | None = None,
    budget: int | None = None,
    mode: Mode = "w",
    durability: Durability = "none",
    slab_bytes: int = SLAB_BYTES,
    direct: bool = False,
    options: Mapping[str, object] | None = None,
) -> Opening[Store]:
    """Open a store of blocks, or make it: files in a directory, or objects below a prefix.

    Parameters
    ----------
    url : str or path
        A directory of its own: a path or a ``file://`` URL. Or a prefix of its own in an object store, such as
        ``s3://bucket/prefix``: whatever the agent opens.
    agent : Agent
        Moves the blocks. It has to be open longer than the store.
    block_bytes : int or None, bytes
        Of every block; needed to make a store, and compared with the one that is there. Multiples of 4096 can go past
        the page cache.
    budget : int or None, bytes
        Of all blocks together; the ones used longest ago make room for new ones. None: until the disk is full, and of
        objects any number.
    mode : {"w", "r"}
        Write and read: one at a time may, in all processes; with objects, any number without a budget. Or read what
        was acknowledged.
    durability : {"none", "data", "full"}
        What the end of a put or delete outlives: the process; also the machine, by fdatasync; the same by fsync.
        Objects are as lasting as their store makes them.
    slab_bytes : int, bytes
        Of each file of blocks, when a store is made.
    direct : bool
        Go past the page cache where that can be done.
    options : mapping of str to object or None
        For objects: what the client of the store takes, as in `Agent.open`.

    Returns
    -------
    Opening
        ``await`` it for a `Store`, or ``async with`` it.

    Raises
    ------
    ConfigError
        An argument is wrong.
    StoreError
        By the await: and its kinds, what is in that directory cannot be used.
    """
    check(mode, durability, block_bytes, budget, slab_bytes)
    if is_of_objects(url):
        if slab_bytes != SLAB_BYTES or direct:
            raise ConfigError(f"slab_bytes= and direct= are for files, not for {url}")
        place = Place(str(url), block_bytes, budget, mode, dict(options or {}))
        return Opening(lambda: ObjectStore.open(agent, place))
    if options:
        raise ConfigError(f"options= are for objects, not for {os.fsdecode(url)!r}, which is a directory")
    chosen = Options(directory_of(url), block_bytes, budget, mode, durability, slab_bytes, direct)
    return Opening(lambda: DiskStore.open(agent, chosen))


def is_of_objects(url: str | os.PathLike[str]) -> bool:
    """Whether a URL names objects, not a directory."""
    scheme, found, _ = str(url).partition("://")
    return bool(found) and scheme.lower() != "file"
