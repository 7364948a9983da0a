"""Where the blocks of a tiered store come from, and what has come from each place."""

from __future__ import annotations

import enum
from dataclasses import dataclass

__all__ = ["Tier", "TierCounters"]


class Tier(enum.IntEnum):
    """Where a block was found."""

    NOWHERE = 0
    MEMORY = 1
    DISK = 2
    OBJECTS = 3


@dataclass(slots=True)
class TierCounters:
    """What one tier has served since the store was opened.

    Attributes
    ----------
    hits, misses : int
        Blocks that were found there, and that were looked for in vain.
    nbytes : int, bytes
        Of the hits.
    seconds : float, seconds
        That calls have spent on hits there; those that ran at the same time count each for itself.
    """

    hits: int = 0
    misses: int = 0
    nbytes: int = 0
    seconds: float = 0.0

    def add(self, hits: int, misses: int, nbytes: int, seconds: float) -> None:
        """Count what one call has found there."""
        self.hits += hits
        self.misses += misses
        self.nbytes += nbytes
        if hits:
            self.seconds += seconds
