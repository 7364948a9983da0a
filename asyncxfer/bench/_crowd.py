"""Many initiators in one process, each connected to the same target, that do nothing once they are.

Each puts a few bytes first, so that whatever a system connects only when it is needed is connected. It is ours, through
the public API only.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

import numpy as np

from ._ours import agent
from ._side import Message, Side

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncxfer import Agent, Region

    from ._pattern import Bytes
    from ._shapes import Case, Memory

__all__ = ["CrowdSide"]


class CrowdSide(Side):
    """As many agents as `options` ask for."""

    def __init__(self, options: Message) -> None:
        names = [f"{options['name']}-{number}" for number in range(options["agents"])]
        self._agents: list[Agent] = [agent(name, options) for name in names]
        self._array: Bytes = np.zeros(0, dtype=np.uint8)
        self._regions: list[Region] = []
        self._memory: Memory = "ordinary"

    async def open(self, nbytes: int, memories: Sequence[Memory]) -> str:
        self._array = np.zeros(nbytes, dtype=np.uint8)
        (self._memory,) = memories
        for one in self._agents:
            await one.start()
            self._regions.append(await one.register(self._array))
        return ""

    async def connect(self, address: str) -> None:
        for one, region in zip(self._agents, self._regions, strict=True):
            peer = await one.connect(base64.b64decode(address))
            await one.put(region.bytes[:], peer[self._memory].bytes[: len(self._array)])

    async def prepare(self, case: Case) -> None:
        raise ValueError("a crowd moves nothing")

    async def run(self, repeats: int) -> Message:
        raise ValueError("a crowd moves nothing")

    async def release(self) -> None:
        pass

    async def close(self) -> None:
        for one in self._agents:
            await one.aclose()

    def memory(self, memory: Memory) -> Bytes:
        return self._array
