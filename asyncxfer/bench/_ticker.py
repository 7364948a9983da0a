"""How late the event loop is: a ticker on the loop itself, and what its lateness comes to.

A tick asks to run again after a millisecond; by how much later it runs is how long the loop was
held by something else, or the machine by somebody else. It knows nothing of transfers.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Self

import numpy as np

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Ticker", "percentiles"]

_PERIOD = 0.001
_PERCENTILES = {"p50": 50.0, "p99": 99.0, "p99.9": 99.9, "max": 100.0}


class Ticker:
    """Ticks every millisecond on the running loop while its ``with`` block runs.

    Attributes
    ----------
    lateness : list of float, seconds
        One entry a tick: how much later than asked for it ran.
    """

    def __init__(self) -> None:
        self.lateness: list[float] = []
        self._loop = asyncio.get_running_loop()
        self._asked = 0.0
        self._next: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        self._ask()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._next is not None:
            self._next.cancel()
        # A block that held the loop to its end left no tick to show it.
        self._note()

    def _ask(self) -> None:
        self._asked = time.monotonic()
        self._next = self._loop.call_later(_PERIOD, self._tick)

    def _tick(self) -> None:
        self._note()
        self._ask()

    def _note(self) -> None:
        self.lateness.append(max(0.0, time.monotonic() - self._asked - _PERIOD))


def percentiles(lateness: list[float]) -> dict[str, float]:
    """The percentiles that are reported, in seconds, by name."""
    if not lateness:
        return dict.fromkeys(_PERCENTILES, 0.0)
    values = np.percentile(np.asarray(lateness), list(_PERCENTILES.values()))
    return dict(zip(_PERCENTILES, (float(value) for value in values), strict=True))
