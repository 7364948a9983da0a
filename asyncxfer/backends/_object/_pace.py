"""How many requests of one store may be under way: fewer when it says that it is asked too much, more while it is not.

Additive increase, multiplicative decrease, as TCP finds its window: what was under way when the store complained
counts as one complaint. Who waits is served by priority, and among equals in order. It knows no requests. Belongs to
one event loop.
"""

from __future__ import annotations

import asyncio
import heapq
from contextvars import ContextVar

__all__ = ["Pace", "priority"]

#: Of what the running task does: above 0 before, below 0 after the rest.
priority: ContextVar[int] = ContextVar("priority", default=0)

_DECREASE = 0.5


class Pace:
    """Turns, taken and given back.

    Parameters
    ----------
    most : int
        Turns at most at a time.

    Attributes
    ----------
    limit : float
        Turns at a time now; at least one.
    taken : int
    """

    __slots__ = ("_asked", "_epoch", "_most", "_waiting", "limit", "taken")

    def __init__(self, most: int) -> None:
        self._most = most
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []  # a heap: what is served first comes first
        self._asked = 0
        self._epoch = 0
        self.limit = float(most)
        self.taken = 0

    @property
    def epoch(self) -> int:
        """How often it has slowed down."""
        return self._epoch

    def take(self) -> bool:
        """Take a turn if one is free and nobody waits."""
        if self._waiting or self.taken + 1 > self.limit:
            return False
        self.taken += 1
        return True

    async def wait(self, deadline: float) -> None:
        """Take a turn when it comes.

        Raises
        ------
        TimeoutError
            It did not come in time.
        """
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._asked += 1
        entry = -priority.get(), self._asked, turn
        heapq.heappush(self._waiting, entry)
        try:
            async with asyncio.timeout_at(deadline):
                await turn
        except BaseException:
            if turn.done() and not turn.cancelled():
                self.give()
            elif entry in self._waiting:
                self._waiting.remove(entry)
                heapq.heapify(self._waiting)
            raise

    def give(self) -> None:
        """Give a turn back."""
        self.taken -= 1
        self._hand_on()

    def well(self) -> None:
        """Hear that a request went well."""
        if self.limit < self._most:
            self.limit = min(self._most, self.limit + 1 / self.limit)
            self._hand_on()

    def slower(self, epoch: int) -> None:
        """Hear that the store was asked too much; `epoch` is what it was when that request began."""
        if epoch == self._epoch:
            self._epoch += 1
            self.limit = max(1.0, self.limit * _DECREASE)

    def _hand_on(self) -> None:
        while self._waiting and self.taken + 1 <= self.limit:
            _, _, turn = heapq.heappop(self._waiting)
            if not turn.done():
                self.taken += 1
                turn.set_result(None)
