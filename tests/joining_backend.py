"""A backend that serves initiators as soon as they join, and hears from theirs over a socket that it has made itself.

It moves nothing. Its `connect` sends the key of the session to the peer's socket, and that is all it ever says.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any, ClassVar

from asyncxfer._fast.link import GatePage
from asyncxfer.abc import (
    Backend,
    BackendError,
    Capabilities,
    Endpoint,
    Memory,
    MemoryKind,
    PeerInfo,
    Reach,
    Registration,
    RemoteRegistration,
    Request,
    Service,
)


class JoiningService(Service):
    """Remembers what it was shown."""

    def __init__(self, page: GatePage, key: bytes, *, remote: bool) -> None:
        self.page, self.key, self.remote = page, key, remote
        self.open_slots: dict[int, tuple[int, str]] = {}
        self.paused = self.closed = False

    def open(self, slot: int, epoch: int, registration: Registration, access: str) -> None:
        self.open_slots[slot] = epoch, access

    def shut(self, slot: int) -> None:
        del self.open_slots[slot]

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def close(self) -> None:
        self.closed = True


class JoiningEndpoint(Endpoint):
    """Remembers which regions it has lost."""

    def __init__(self) -> None:
        self.detached: list[RemoteRegistration] = []

    def detach(self, remote: RemoteRegistration) -> None:
        self.detached.append(remote)


class JoiningBackend(Backend):
    """Remembers the peers and services that it was given, and what came over its socket."""

    name: ClassVar[str] = "joining"
    capabilities: ClassVar[Capabilities] = Capabilities(Reach.NETWORK, frozenset({(MemoryKind.DRAM, MemoryKind.DRAM)}))
    joins: ClassVar[bool] = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.peers: dict[str, PeerInfo] = {}
        self.endpoints: list[JoiningEndpoint] = []
        self.services: list[JoiningService] = []
        self.heard: asyncio.Queue[bytes] = asyncio.Queue()
        self.refuses = False
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._sock.bind("")  # a random abstract name
        asyncio.get_running_loop().add_reader(self._sock, self._hear)

    def _hear(self) -> None:
        self.heard.put_nowait(self._sock.recv(64))

    def address(self) -> bytes:
        return bytes(self._sock.getsockname())

    def register(self, memory: Memory) -> Registration:
        return Registration(memory)

    def deregister(self, registration: Registration) -> None:
        pass

    async def connect(self, peer: PeerInfo) -> Endpoint:
        self.peers[peer.name] = peer
        self._sock.sendto(peer.key, peer.address)
        self.endpoints.append(JoiningEndpoint())
        return self.endpoints[-1]

    def serve(self, page: GatePage, tell: Callable[[int, bytes], None], key: bytes, *, remote: bool) -> JoiningService:
        if self.refuses:
            raise BackendError("it has had enough")
        self.services.append(JoiningService(page, key, remote=remote))
        return self.services[-1]

    def submit(self, prepared: Request, completion: Any, priority: int = 0) -> None:
        completion.post()
        completion.fail(BackendError("it moves nothing"))

    async def aclose(self) -> None:
        asyncio.get_running_loop().remove_reader(self._sock)
        self._sock.close()
