"""What a directory can do."""

from __future__ import annotations

import abc

__all__ = ["Directory"]


class Directory(abc.ABC):
    """Names of agents, and how each is reached."""

    @abc.abstractmethod
    async def publish(self, name: str, metadata: bytes) -> None:
        """Make an agent known.

        Raises
        ------
        ConfigError
            Another agent holds that name.
        """

    @abc.abstractmethod
    async def withdraw(self, name: str, metadata: bytes) -> None:
        """Take back what `publish` made known, unless another has replaced it."""

    @abc.abstractmethod
    async def lookup(self, name: str) -> bytes:
        """Wait until an agent of this name is known; its metadata."""
