"""Ports of programs that are started to be connected to: one that is free, and when it is listened on.

It watches the kernel's tables of the process's own network, because connecting would count as a client. It knows
nothing of what runs there.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from ._pair import BenchError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = ["free_port", "in_time", "until_listening"]

_WITHIN = 60.0
_LISTENING = "0A"  # as /proc/net/tcp writes it


@contextlib.asynccontextmanager
async def in_time(what: str) -> AsyncIterator[None]:
    """Give the block a minute; `what` says what it did not do in that time."""
    try:
        async with asyncio.timeout(_WITHIN):
            yield
    except TimeoutError as error:
        raise BenchError(f"{what} in {_WITHIN:.0f} s") from error


async def until_listening(process: asyncio.subprocess.Process, port: int, name: str) -> None:
    """Return when `process`, which reports call `name`, can be connected to.

    Raises
    ------
    BenchError
        If it ends before that.
    """
    while process.returncode is None:
        if _listens(process.pid, port):
            return
        await asyncio.sleep(0.005)
    raise BenchError(f"{name} ended before it listened")


def _listens(pid: int, port: int) -> bool:
    tables = [Path(f"/proc/{pid}/net", name) for name in ("tcp", "tcp6")]
    lines = [line for table in tables if table.exists() for line in table.read_text().splitlines()[1:]]
    rows = [line.split() for line in lines]
    return any(row[3] == _LISTENING and row[1].endswith(f":{port:04X}") for row in rows)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port
