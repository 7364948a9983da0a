"""A backend with connections of its own, which moves nothing: its service sends back what comes, and tells of it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any, ClassVar

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
    Service,
    Stream,
)


class EchoService(Service):
    """Echoes; remembers what it was shown."""

    def __init__(self, tell: Callable[[int, bytes], None], key: bytes, *, remote: bool) -> None:
        self.key, self.remote = key, remote
        self.open_slots: dict[int, tuple[Registration, str]] = {}
        self.streams: dict[int, socket.socket] = {}
        self.tls: list[Any] = []
        self.closed = False
        self._tell = tell

    def open(self, slot: int, epoch: int, registration: Registration, access: str) -> None:
        assert epoch > 0
        self.open_slots[slot] = registration, access

    def shut(self, slot: int) -> None:
        del self.open_slots[slot]

    def adopt(self, stream: Stream) -> None:
        self._drop(stream.index)
        sock = self.streams[stream.index] = socket.socket(fileno=stream.fd)
        assert sock.gettimeout() is None or sock.gettimeout() == 0.0
        sock.setblocking(False)
        if stream.tls is not None:
            self.tls.append(stream.tls)
        asyncio.get_running_loop().add_reader(sock, self._echo, sock, stream)

    def _echo(self, sock: socket.socket, stream: Stream) -> None:
        try:
            data = sock.recv(65536) if stream.tls is None else stream.tls.read(65536)
        except BlockingIOError:
            return
        except BackendError:
            data = b""  # the other side has gone without a word
        if not data:
            asyncio.get_running_loop().remove_reader(sock)
            return
        if stream.tls is None:
            sock.send(data)
        else:
            stream.tls.write(data)
        if data.startswith(b"tell "):
            self._tell(ord("N"), data.removeprefix(b"tell "))

    def _drop(self, index: int) -> None:
        sock = self.streams.pop(index, None)
        if sock is not None:
            asyncio.get_running_loop().remove_reader(sock)
            sock.close()

    def close(self) -> None:
        self.closed = True
        for index in list(self.streams):
            self._drop(index)
        for tls in self.tls:
            tls.close()
        self.tls.clear()


class EchoBackend(Backend):
    """Remembers the peers and the services that it was given."""

    name: ClassVar[str] = "echo"
    capabilities: ClassVar[Capabilities] = Capabilities(Reach.NETWORK, frozenset({(MemoryKind.DRAM, MemoryKind.DRAM)}))

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.peers: dict[str, PeerInfo] = {}
        self.services: list[EchoService] = []

    def register(self, memory: Memory) -> Registration:
        return Registration(memory)

    def deregister(self, registration: Registration) -> None:
        pass

    async def connect(self, peer: PeerInfo) -> Endpoint:
        if peer.address != b"an echo":
            raise BackendError(f"the peer's backend said {peer.address!r}")
        self.peers[peer.name] = peer
        return Endpoint()

    def address(self) -> bytes:
        return b"an echo"

    def export(self, registration: Registration) -> bytes:
        return b"%d" % len(registration.memory.segments)

    def serve(self, page: Any, tell: Callable[[int, bytes], None], key: bytes, *, remote: bool) -> EchoService:
        self.services.append(EchoService(tell, key, remote=remote))
        return self.services[-1]

    def submit(self, prepared: Any, completion: Any, priority: int = 0) -> None:
        completion.post()
        completion.fail(BackendError("it only echoes"))

    async def aclose(self) -> None:
        pass
