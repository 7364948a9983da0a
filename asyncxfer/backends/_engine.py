"""What the backends of one host share: prepared work for the copy engine, and the engine's threads."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .._fast import engine
from ..abc import Backend, Completion, Memory, MemoryKind, Registration, RegistrationError, Request

if TYPE_CHECKING:
    from .._config import Config

__all__ = ["EngineBackend"]


class EngineBackend(Backend):
    """A backend whose transfers are done by the copy engine."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        engine.acquire(config.copy_threads or _default_threads())

    def register(self, memory: Memory) -> Registration:
        """Take host memory as it is.

        Raises
        ------
        RegistrationError
            It is not host memory.
        """
        if memory.kind is not MemoryKind.DRAM:
            raise RegistrationError(f"moves host memory only, not {memory.kind}")
        return Registration(memory)

    def deregister(self, registration: Registration) -> None:
        """There is nothing to undo."""

    def submit(self, prepared: engine.Work, completion: Completion, priority: int = 0) -> None:
        """Start a transfer; small ones are done when this returns."""
        engine.submit(prepared, completion, priority)

    async def aclose(self) -> None:
        """Leave the engine."""
        engine.release()

    def work(
        self, request: Request, remote_bases: npt.NDArray[np.uint64], *, attach: bool, keep: object
    ) -> engine.Work:
        """Make a request ready for the engine."""
        config = self.config
        stream = config.nontemporal_bytes
        return engine.Work(
            request.pairs,
            request.local.bases,
            remote_bases,
            put=request.op == "put",
            attach=attach,
            link=request.link,
            slot=request.slot,
            epoch=request.epoch,
            chunk_bytes=config.chunk_bytes,
            chunk_rows=config.chunk_rows,
            small_bytes=config.inline_bytes,
            small_rows=config.inline_rows,
            stream_bytes=_STREAM_BYTES if stream is None else stream,
            keep=(request.local, request.remote, request.keep, keep),
        )


# Copies from here on bypass the caches: larger than what the reader could find there. See docs/performance.md.
_STREAM_BYTES = 4 << 20


def _default_threads() -> int:
    """Enough to fill a memory channel or two, and no core that an event loop would then wait for."""
    cores = len(os.sched_getaffinity(0))
    least = min(2, cores) if _loops_go_first() else 1
    return max(least, min(8, cores // 2))


def _loops_go_first() -> bool:
    """Whether a thread that wakes up takes a core from the engine at once: Linux 6.12 and later."""
    release = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return release is not None and tuple(map(int, release.groups())) >= (6, 12)
