"""asyncxfer between memory and a file, through its public API only.

The clock runs from calling a prepared plan to its awaited result. It knows nothing of any other system.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from asyncxfer import Agent, Plan, Region

from ._file_side import FileSide, aligned
from ._ticker import Ticker, percentiles

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ._file_cases import FileCase
    from ._shapes import Memory
    from ._side import Message

__all__ = ["OurFileSide"]


class OurFileSide(FileSide):
    """An agent with its default settings, or that uses one backend only.

    Parameters
    ----------
    backend : str or None
    memory : {"mapped", "ordinary"}
        From `Agent.allocate`, or what the others have.
    """

    def __init__(self, backend: str | None, memory: Memory) -> None:
        self._memory_kind = memory
        self._agent = Agent("bench", backends=None if backend is None else [backend])
        self._files: dict[str, Region] = {}
        self._region: Region | None = None
        self._plan: Plan | None = None

    async def open(self, nbytes: int, path: str, file_bytes: int, ways: list[str]) -> NDArray[np.uint8]:
        await self._agent.start()
        if self._memory_kind == "ordinary":
            memory = aligned(nbytes)
            self._region = await self._agent.register(memory)
        else:
            self._region = await self._agent.allocate(nbytes, np.uint8)
            memory = self._region.array
        for way in ways:
            self._files[way] = await self._agent.open(path, "r+", size=file_bytes, direct=way == "direct")
        return memory

    async def prepare(self, case: FileCase) -> str:
        assert self._region is not None, "a case came before memory was opened"
        here = self._region.descriptors(*case.memory_rows())
        there = self._files[case.way].descriptors(*case.file_rows())
        self._plan = self._agent.prepare(case.op, here, there)
        return self._plan.route.route

    async def move(self, repeats: int) -> None:
        plan = self._prepared()
        for _ in range(repeats):
            await plan()

    async def watch(self, seconds: float) -> Message:
        plan, transfers = self._prepared(), 0
        with Ticker() as ticker:
            start = time.perf_counter()
            while time.perf_counter() < start + seconds:
                await plan()
                transfers += 1
            took = time.perf_counter() - start
        return {"lateness": percentiles(ticker.lateness), "transfers": transfers, "seconds": took}

    async def release(self) -> None:
        self._plan = None

    async def close(self) -> None:
        self._region = None
        await self._agent.aclose()

    def _prepared(self) -> Plan:
        if self._plan is None:
            raise RuntimeError("a run came before its case was prepared")
        return self._plan
