"""The process of one system that moves between memory and a file, as the bench commands it.

Filling and checking memory is the same for every system and lives here; opening memory and files, and moving, is what
a system adds. It knows nothing of pipes or of the process that commands it, which looks after the file itself.
"""

from __future__ import annotations

import asyncio
import mmap
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np

from ._file_cases import FileCase, blank, pattern, problem
from ._ticker import Ticker, percentiles

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ._side import Message

__all__ = ["FileSide", "UnavailableError", "aligned"]


class UnavailableError(Exception):
    """A system that does not work here, and need not."""


def aligned(nbytes: int) -> NDArray[np.uint8]:
    """Zeroed memory that begins with a page, as direct transfers want it."""
    return np.frombuffer(mmap.mmap(-1, max(nbytes, 1)), dtype=np.uint8)[:nbytes]


class FileSide(ABC):
    """One system, its memory, and a file that is open in each way."""

    @abstractmethod
    async def open(self, nbytes: int, path: str, file_bytes: int, ways: list[str]) -> NDArray[np.uint8]:
        """Start, make `nbytes` of memory ready, open the file in each way; the memory.

        Raises
        ------
        UnavailableError
            The system does not work here.
        """

    @abstractmethod
    async def prepare(self, case: FileCase) -> str:
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

    async def watch(self, seconds: float) -> Message:
        """Move the prepared case back to back; how late the loop was, and what was moved in how many seconds."""
        raise ValueError(f"{type(self).__name__} has no loop to be late")

    async def answer(self, message: Message) -> Message:
        """Do one command and give its answer.

        Raises
        ------
        ValueError
            If the command is not known.
        """
        do = message["do"]
        if do == "open":
            return await self._open(message)
        if do == "begin":
            await self._begin(FileCase.from_message(message["case"]), message["warmup"])
        elif do == "run":
            return await self._run(message["repeats"])
        elif do == "watch":
            return await self.watch(message["seconds"])
        elif do == "idle":
            with Ticker() as ticker:
                await asyncio.sleep(message["seconds"])
            return {"lateness": percentiles(ticker.lateness)}
        elif do == "finish":
            return {"problem": await self._finish(FileCase.from_message(message["case"]))}
        else:
            raise ValueError(f"{type(self).__name__} does not know the command {do!r}")
        return {}

    async def _open(self, message: Message) -> Message:
        options: dict[str, Any] = {key: message[key] for key in ("nbytes", "path", "file_bytes", "ways")}
        try:
            self._memory = await self.open(**options)
        except UnavailableError as error:
            return {"unavailable": str(error)}
        self._memory[:] = 1  # every page is there before anything is timed
        return {}

    async def _begin(self, case: FileCase, warmup: int) -> None:
        memory = self._memory[: case.memory_span]
        if case.op == "put":
            memory[:] = pattern(case.memory_span, case.seed)
        else:
            blank(memory)
        self._by = await self.prepare(case)
        await self.move(warmup)

    async def _run(self, repeats: int) -> Message:
        cpu, start = time.process_time(), time.perf_counter()
        await self.move(repeats)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "backend": self._by}

    async def _finish(self, case: FileCase) -> str:
        """Move it once more, to what is blank, and check what has come to memory."""
        memory = self._memory[: case.memory_span]
        if case.op == "get":
            blank(memory)
        await self.move(1)
        await self.release()
        return problem(memory, case) if case.op == "get" else ""
