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
        self._writers: set[asyncio.StreamWriter] = set()
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
        reader, writer = await asyncio.open_connection(sock=sock)
        writers = {writer}
        try:
            if self.shut:
                return
            there, back = await asyncio.open_connection("127.0.0.1", self.target)
            writers.add(back)
            self._writers |= writers
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, back, returning=False))
                group.create_task(self._pump(there, writer, returning=True))
        except* OSError:
            pass  # the way that things are cut here
        finally:
            self._writers -= writers
            for each in writers:
                each.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, returning: bool) -> None:
        while data := await reader.read(65536):
            if not (returning and self.deaf):
                writer.write(data)
                await writer.drain()
        raise ConnectionResetError  # which ends the other way too

    def cut(self) -> None:
        """Break every connection."""
        for writer in self._writers:
            writer.transport.abort()

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
