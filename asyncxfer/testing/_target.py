"""The other side of a contract test: an agent that is moved to and from, and what a test may ask of it.

`Target` is what a test sees, wherever the agent runs; `AgentTarget` is one in this process. A target keeps the arrays
behind its regions, also after it has closed them: what is in them then is what tests want to know.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from asyncxfer import Agent, Peer, Region, RemoteRegion

__all__ = ["Access", "AgentTarget", "Target", "make_region"]

Access: TypeAlias = Literal["r", "w", "rw"]


async def make_region(
    agent: Agent, shape: Sequence[int], *, name: str | None = None, access: Access = "rw", shared: bool = False
) -> tuple[Region, npt.NDArray[np.uint8]]:
    """Make a region of bytes.

    Parameters
    ----------
    agent : Agent
    shape : tuple of int
    name, access
        As in `Agent.register`.
    shared : bool
        From `Agent.allocate`, which peers of this host can map; otherwise an array of this process's own memory.

    Returns
    -------
    region : Region
    array : (*shape) uint8
        Its memory.

    Raises
    ------
    RegistrationError
        There is not that much memory, or the name is taken.
    """
    if shared:
        region = await agent.allocate(tuple(shape), "uint8", name=name, access=access)
        return region, region.array
    array = np.zeros(tuple(shape), np.uint8)
    return await agent.register(array, name=name, access=access), array


class Target(abc.ABC):
    """The agent at the other side, as a test commands it."""

    @abc.abstractmethod
    def metadata(self) -> bytes:
        """What `Agent.connect` needs to reach it."""

    @abc.abstractmethod
    async def open(self, name: str, shape: Sequence[int], *, access: Access = "rw", shared: bool = False) -> None:
        """Make a region of bytes; parameters as in `make_region`."""

    async def reach(self, name: str, peer: Peer | None) -> Region | RemoteRegion:
        """Give the initiator's view of a region that was opened; by default as its peer shows it."""
        assert peer is not None, f"{type(self).__name__} needs a peer"
        return await peer.region(name, timeout=30)

    @abc.abstractmethod
    async def close(self, name: str) -> None:
        """Close a region; its memory can be read further on."""

    @abc.abstractmethod
    async def write(self, name: str, data: bytes) -> None:
        """Set all bytes of a region."""

    @abc.abstractmethod
    async def read(self, name: str) -> bytes:
        """Give all bytes of a region."""

    @abc.abstractmethod
    async def expect(self, tag: bytes, *, then_read: str | None = None, timeout: float | None = None) -> bytes:
        """Wait for a notification, and give the bytes of a region as they are when it has come."""

    @abc.abstractmethod
    async def stats(self) -> dict[str, Any]:
        """Give `Agent.stats`."""

    @abc.abstractmethod
    async def leave(self) -> None:
        """Close the agent."""


class AgentTarget(Target):
    """An agent of this process as the other side.

    Parameters
    ----------
    agent : Agent
        Started.
    """

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self._regions: dict[str, tuple[Region, npt.NDArray[np.uint8]]] = {}

    def metadata(self) -> bytes:
        """What `Agent.connect` needs to reach it."""
        return self.agent.metadata()

    async def open(self, name: str, shape: Sequence[int], *, access: Access = "rw", shared: bool = False) -> None:
        """Make a region of bytes."""
        self._regions[name] = await make_region(self.agent, shape, name=name, access=access, shared=shared)

    async def close(self, name: str) -> None:
        """Close a region."""
        await self._regions[name][0].aclose()

    async def write(self, name: str, data: bytes) -> None:
        """Set all bytes of a region."""
        array = self._regions[name][1]
        array[...] = np.frombuffer(data, np.uint8).reshape(array.shape)

    async def read(self, name: str) -> bytes:
        """Give all bytes of a region."""
        return self._regions[name][1].tobytes()

    async def expect(self, tag: bytes, *, then_read: str | None = None, timeout: float | None = None) -> bytes:
        """Wait for a notification, and give the bytes of a region as they are when it has come."""
        await self.agent.expect(tag, timeout=timeout)
        return b"" if then_read is None else await self.read(then_read)

    async def stats(self) -> dict[str, Any]:
        """Give `Agent.stats`."""
        return self.agent.stats()

    async def leave(self) -> None:
        """Close the agent."""
        await self.agent.aclose()
