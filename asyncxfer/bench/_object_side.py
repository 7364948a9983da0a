"""The process of one system that moves between memory and objects, as the bench commands it.

Filling and checking memory is the same for every system and lives here; opening memory and the store, and moving, is
what a system adds. It knows nothing of pipes or of the process that commands it, which looks after the objects itself.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from ._file_side import UnavailableError, aligned
from ._object_cases import ObjectCase
from ._object_store import store_kind
from ._ticker import Ticker, percentiles

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ._object_store import StoreAt
    from ._side import Message

__all__ = ["ObjectSide", "rows_of"]


class ObjectSide(ABC):
    """One system, its memory, and a bucket."""

    @abstractmethod
    async def open(self, memory: NDArray[np.uint8], store: StoreAt) -> None:
        """Start, make memory ready, and reach the store.

        Raises
        ------
        UnavailableError
            The system does not work here.
        """

    @abstractmethod
    async def prepare(self, case: ObjectCase) -> str:
        """Get everything ready that can be ready before the clock starts; by what it will move."""

    @abstractmethod
    async def move(self, repeats: int) -> None:
        """Move the prepared case `repeats` times, one after the other."""

    @abstractmethod
    async def release(self) -> None:
        """Let go of what `prepare` made."""

    @abstractmethod
    async def close(self) -> None:
        """Leave nothing behind."""

    async def answer(self, message: Message) -> Message:
        """Do one command and give its answer.

        Raises
        ------
        ValueError
            If the command is not known.
        """
        do = message["do"]
        if do == "open":
            return await self._open(message["nbytes"], store_kind(message["cloud"])(**message["store"]))
        if do == "begin":
            await self._begin(ObjectCase.from_message(message["case"]), message["warmup"])
        elif do == "run":
            return await self._run(message["repeats"])
        elif do == "watch":
            return await self._watch(message["seconds"])
        elif do == "idle":
            with Ticker() as ticker:
                await asyncio.sleep(message["seconds"])
            return {"lateness": percentiles(ticker.lateness)}
        elif do == "finish":
            return {"problem": await self._finish(ObjectCase.from_message(message["case"]))}
        else:
            raise ValueError(f"{type(self).__name__} does not know the command {do!r}")
        return {}

    async def _open(self, nbytes: int, store: StoreAt) -> Message:
        self._memory = aligned(nbytes)
        self._memory[:] = 1  # every page is there before anything is timed
        try:
            await self.open(self._memory, store)
        except UnavailableError as error:
            return {"unavailable": str(error)}
        return {}

    async def _begin(self, case: ObjectCase, warmup: int) -> None:
        case.fill(self._memory[: case.shape.span])
        self._by = await self.prepare(case)
        await self.move(warmup)

    async def _run(self, repeats: int) -> Message:
        cpu, start = time.process_time(), time.perf_counter()
        await self.move(repeats)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "backend": self._by}

    async def _watch(self, seconds: float) -> Message:
        """Move back to back for so long, and see how late the loop is meanwhile."""
        transfers = 0
        with Ticker() as ticker:
            start = time.perf_counter()
            while time.perf_counter() < start + seconds:
                await self.move(1)
                transfers += 1
            took = time.perf_counter() - start
        return {"lateness": percentiles(ticker.lateness), "transfers": transfers, "seconds": took}

    async def _finish(self, case: ObjectCase) -> str:
        """Move once more, to what is blank, and check what has come to memory."""
        memory = self._memory[: case.shape.span]
        case.fill(memory)
        await self.move(1)
        await self.release()
        return case.problem(memory) if case.op == "get" else ""


def rows_of(memory: NDArray[Any], case: ObjectCase) -> list[NDArray[Any]]:
    """The memory of each row."""
    return [memory[at : at + case.shape.length] for at in case.rows()[0].tolist()]
