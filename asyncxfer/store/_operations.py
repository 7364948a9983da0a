"""The calls that are under way: closing waits for them, and those that need not wait let the loop turn all the same.

It knows nothing of what they do.
"""

from __future__ import annotations

import asyncio
from types import TracebackType

from ._turns import next_turn

__all__ = ["Operations"]

_TURN_SECONDS = 200e-6


class Operations:
    """``async with`` it around each call."""

    def __init__(self) -> None:
        self._running = 0
        self._idle = asyncio.Event()
        self._turn: float | None = None  # when the loop was found to be turning last

    async def __aenter__(self) -> None:
        self._running += 1

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                await self._let_others()
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def _let_others(self) -> None:
        """Let the loop turn where calls that needed not wait have kept it for a while."""
        loop = asyncio.get_running_loop()
        if self._turn is None:
            self._turn = loop.time()
            loop.call_soon(self._turned)
        elif loop.time() - self._turn > _TURN_SECONDS:
            await next_turn()

    def _turned(self) -> None:
        self._turn = None

    async def ended(self) -> None:
        """Wait until none is under way."""
        while self._running:
            self._idle.clear()
            await self._idle.wait()
