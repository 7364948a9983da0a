"""Stores of KV-cache blocks: of fixed size, found by key, in slab files on local disks, as objects, or in tiers.

`open` and `tiered` are where to begin. A store on disk has one writer, which holds a lock, and any number of readers in
other processes, which see what the writer has acknowledged. Stores move blocks with the agent that they are given,
through `Agent.open`, and so take descriptor lists: paged memory goes in and out without a copy.

Everything is built on the public names of asyncxfer and on the native index, `_fast.blockindex`.
"""

from __future__ import annotations

from asyncxfer._fast.blockindex import MAX_KEY_BYTES

from ._api import Opening, Store
from ._counters import Tier, TierCounters
from ._errors import StoreError, StoreFormatError, StoreFullError, StoreLockedError
from ._journal import Durability
from ._objects import ObjectStore
from ._open import open  # noqa: A004
from ._opening import Mode
from ._report import Report
from ._store import DiskStore
from ._tiered import tiered
from ._tiers import Acknowledge, TieredStore

__all__ = [
    "MAX_KEY_BYTES",
    "Acknowledge",
    "DiskStore",
    "Durability",
    "Mode",
    "ObjectStore",
    "Opening",
    "Report",
    "Store",
    "StoreError",
    "StoreFormatError",
    "StoreFullError",
    "StoreLockedError",
    "Tier",
    "TierCounters",
    "TieredStore",
    "open",
    "tiered",
]

for _name in __all__:
    if isinstance(globals()[_name], type):
        globals()[_name].__module__ = __name__
del _name
