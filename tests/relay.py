"""A TCP relay between two agents, which a test can cut, redirect, or have swallow what comes back."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

__all__ = ["Relay", "relaying"]


class Relay:
    """Hands bytes on both ways.

    Attributes
    ----------
    port : int
        Where it listens, on 127.0.0.1.
    target : int
        The port that new connections are handed on to.
    deaf : bool
        Nothing comes back from the target, now and until the connection is cut.
    shut : bool
        New connections are closed at once.
    count : int
        Connections that were made.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.deaf = False
        self.shut = False
        self.count = 0
        self._sock = socket.create_server(("127.0.0.1", 0))
        self._sock.setblocking(False)
        self.port: int = self._sock.getsockname()[1]
        self._socks: set[socket.socket] = set()
        self._handlers: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        asyncio.get_running_loop().add_reader(self._sock, self._accept)

    def _accept(self) -> None:
        sock, _ = self._sock.accept()
        self.count += 1
        task = asyncio.ensure_future(self._handle(sock))
        self._handlers.add(task)
        task.add_done_callback(self._handlers.discard)

    async def _handle(self, sock: socket.socket) -> None:
        with sock, socket.socket() as there:
            try:
                if self.shut:
                    return
                there.connect(("127.0.0.1", self.target))
                for each in (sock, there):
                    each.setblocking(False)
                self._socks |= {sock, there}
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._pump(sock, there, returning=False))
                    group.create_task(self._pump(there, sock, returning=True))
            except* OSError:
                pass  # the way that things are cut here
            finally:
                self._socks -= {sock, there}

    async def _pump(self, source: socket.socket, to: socket.socket, *, returning: bool) -> None:
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(source, 65536):
            if not (returning and self.deaf):
                await loop.sock_sendall(to, data)
        raise ConnectionResetError  # which ends the other way too

    def cut(self) -> None:
        """Break every connection."""
        for sock in self._socks:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    async def aclose(self) -> None:
        asyncio.get_running_loop().remove_reader(self._sock)
        self._sock.close()
        self.cut()
        for task in list(self._handlers):
            task.cancel()
        if self._handlers:
            await asyncio.wait(self._handlers)


@contextlib.asynccontextmanager
async def relaying(target: int = 0) -> AsyncIterator[Relay]:
    relay = Relay(target)
    relay.start()
    try:
        yield relay
    finally:
        await relay.aclose()
