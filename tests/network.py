"""What tests of agents over TCP share: agents without Unix sockets, and their ports."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any, Self

from asyncxfer import Agent, PeerEvent, PeerState
from asyncxfer._metadata import decode

__all__ = ["CONTROL", "DATA", "LOCAL", "Raw", "addresses", "far", "framed", "port_of", "until_state"]

LOCAL = "tcp://127.0.0.1:0"
CONTROL, DATA = b"AXF\x01C\x00\x00\x00", b"AXF\x01D\x00\x00\x00"
GO_ON = b"AXF\x01\x00\x00\x00\x00"
FAR = {"unix_socket": False, "handshake_timeout": 5.0}


def far(
    name: str, *, listen: str | list[str] | None = LOCAL, config: dict[str, Any] | None = None, **more: Any
) -> Agent:
    """An agent that others reach over TCP only, without data connections unless backends are given."""
    return Agent(name, listen=listen, config=FAR | (config or {}), **{"backends": ["local", "shm"], **more})


def addresses(metadata: bytes) -> list[str]:
    return list(decode(metadata).addresses)


def port_of(metadata: bytes) -> int:
    return int(next(text for text in addresses(metadata) if text.startswith("tcp:")).rpartition(":")[2])


async def until_state(events: AsyncIterator[PeerEvent], state: PeerState, peer: str | None = None) -> PeerEvent:
    """Wait for an event."""
    async for event in events:
        if event.state is state and peer in (None, event.peer):
            return event
    raise AssertionError("the agent was closed")


def framed(payload: bytes) -> bytes:
    """A frame with its length before it."""
    return len(payload).to_bytes(4, "big") + payload


class Raw:
    """A bare connection to an agent's listener, for what no agent would say."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self._loop = asyncio.get_running_loop()
        self._sock = socket.create_connection((host, port))
        self._sock.setblocking(False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    async def send(self, data: bytes) -> None:
        await self._loop.sock_sendall(self._sock, data)

    def end(self) -> None:
        """Say that nothing more comes."""
        self._sock.shutdown(socket.SHUT_WR)

    async def read(self, nbytes: int = 1 << 20) -> bytes:
        """So many bytes, or fewer where the connection ends."""
        data = b""
        while len(data) < nbytes:
            try:
                piece = await self._loop.sock_recv(self._sock, nbytes - len(data))
            except ConnectionResetError:
                break
            if not piece:
                break
            data += piece
        return data
