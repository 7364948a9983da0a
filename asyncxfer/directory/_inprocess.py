"""The directory of one process: a table that agents in all its threads share."""

from __future__ import annotations

import asyncio
import threading

from .._errors import ConfigError
from ._base import Directory

__all__ = ["InProcessDirectory"]

_lock = threading.Lock()
_table: dict[str, bytes] = {}
_waiting: dict[str, list[asyncio.Future[None]]] = {}


class InProcessDirectory(Directory):
    """Agents of this process, whatever loop or thread they live in."""

    async def publish(self, name: str, metadata: bytes) -> None:
        """Make an agent known.

        Raises
        ------
        ConfigError
            Another agent of this process holds that name.
        """
        with _lock:
            if name in _table:
                raise ConfigError(f"an agent named {name!r} runs in this process already; names are unique")
            _table[name] = metadata
            waiting = _waiting.pop(name, [])
        for waiter in waiting:
            waiter.get_loop().call_soon_threadsafe(_resolve, waiter)

    async def withdraw(self, name: str, metadata: bytes) -> None:
        """Take back what `publish` made known, unless another has replaced it."""
        with _lock:
            if _table.get(name) == metadata:
                del _table[name]

    async def lookup(self, name: str) -> bytes:
        """Wait until an agent of this name is known; its metadata."""
        while True:
            with _lock:
                if name in _table:
                    return _table[name]
                waiter = asyncio.get_running_loop().create_future()
                _waiting.setdefault(name, []).append(waiter)
            try:
                await waiter
            finally:
                with _lock:
                    if waiter in _waiting.get(name, []):
                        _waiting[name].remove(waiter)
                    if not _waiting.get(name, True):
                        del _waiting[name]


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def forget_all() -> None:
    """In a forked child: the agents are the parent's."""
    _table.clear()
    _waiting.clear()
