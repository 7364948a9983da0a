"""What several tests of agents use: a fixture's value that can be taken back, and waiting for what nothing tells of."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Lent", "until"]

T = TypeVar("T")


class Lent(Generic[T]):
    """A fixture's value. pytest keeps what a fixture gave until after it was looked for leaks; this can be emptied."""

    def __init__(self, value: T) -> None:
        self.value = value


async def until(condition: Callable[[], bool]) -> None:
    """Wait, and fail after a long time."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - nothing tells, or what tells is not under test here
            await asyncio.sleep(0.001)
