"""What tests of agents over TCP share: agents without Unix sockets, and their ports."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from asyncxfer import Agent, PeerEvent, PeerState
from asyncxfer._metadata import decode

__all__ = ["LOCAL", "addresses", "far", "port_of", "until_state"]

LOCAL = "tcp://127.0.0.1:0"
FAR = {"unix_socket": False, "handshake_timeout": 5.0}


def far(
    name: str, *, listen: str | list[str] | None = LOCAL, config: dict[str, Any] | None = None, **more: Any
) -> Agent:
    """An agent that others reach over TCP only."""
    return Agent(name, listen=listen, config=FAR | (config or {}), **more)


def addresses(metadata: bytes) -> list[str]:
    return list(decode(metadata).addresses)


def port_of(metadata: bytes) -> int:
    return int(addresses(metadata)[0].rpartition(":")[2])


async def until_state(events: AsyncIterator[PeerEvent], state: PeerState, peer: str | None = None) -> PeerEvent:
    """Wait for an event."""
    async for event in events:
        if event.state is state and peer in (None, event.peer):
            return event
    raise AssertionError("the agent was closed")
