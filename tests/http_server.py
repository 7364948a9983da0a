"""A server for tests of HTTP that does on each connection what the test says, byte by byte, on the test's own loop."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TypeVar

T = TypeVar("T")

__all__ = ["Client", "Script", "ok", "serving", "unanswering"]

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


def ok(body: bytes = b"", *headers: bytes, status: bytes = b"200 OK") -> bytes:
    """Give an answer whose length is told."""
    return b"\r\n".join((b"HTTP/1.1 " + status, b"content-length: %d" % len(body), *headers, b"", body))


class Client:
    """One connection, as the server sees it; connections are numbered from 0 as they come.

    It steps on its socket and has no transport: those of uvloop leave a descriptor open as long as the loop lives.
    """

    def __init__(self, number: int, sock: socket.socket, tls: ssl.SSLContext | None) -> None:
        self.number = number
        self._sock = sock
        self._unread = b""
        self._bytes_in, self._bytes_out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = None if tls is None else tls.wrap_bio(self._bytes_in, self._bytes_out, server_side=True)

    async def handshake(self) -> None:
        """Agree on TLS, where there is any."""
        if self._tls is not None:
            await self._step(self._tls.do_handshake)

    async def _step(self, call: Callable[[], T]) -> T:
        """Do something with TLS, as often as it wants bytes."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                return call()
            except ssl.SSLWantReadError:
                await self._flush()
                data = await loop.sock_recv(self._sock, 1 << 16)
                if not data:
                    raise ConnectionResetError("it has gone") from None
                self._bytes_in.write(data)
            finally:
                await self._flush()

    async def _flush(self) -> None:
        await asyncio.get_running_loop().sock_sendall(self._sock, self._bytes_out.read())

    async def some(self) -> bytes:
        """Take what there is, b"" at the end."""
        tls = self._tls
        if self._unread:
            found, self._unread = self._unread, b""
            return found
        if tls is not None:
            return await self._step(lambda: tls.read(1 << 16))
        return await asyncio.get_running_loop().sock_recv(self._sock, 1 << 16)

    async def _more(self) -> None:
        data = await self.some() if not self._unread else await self._beside()
        if not data:
            raise ConnectionResetError("it has gone")
        self._unread += data

    async def _beside(self) -> bytes:
        held, self._unread = self._unread, b""
        try:
            return await self.some()
        finally:
            self._unread = held

    async def head(self) -> bytes:
        """Take the line and the headers of a request."""
        while b"\r\n\r\n" not in self._unread:
            await self._more()
        head, end, self._unread = self._unread.partition(b"\r\n\r\n")
        return head + end

    async def exactly(self, n: int) -> bytes:
        """Take so many bytes."""
        while len(self._unread) < n:
            await self._more()
        found, self._unread = self._unread[:n], self._unread[n:]
        return found

    async def request(self) -> bytes:
        """Take a request, with its body; gives its head. A ConnectionError: the other side has gone."""
        head = await self.head()
        _, found, rest = head.partition(b"content-length: ")
        if found:
            await self.exactly(int(rest.partition(b"\r\n")[0]))
        return head

    async def say(self, data: bytes) -> None:
        """Send all of it."""
        tls = self._tls
        if tls is None:
            await asyncio.get_running_loop().sock_sendall(self._sock, data)
            return
        for at in range(0, len(data), 1 << 14):
            await self._step(lambda at=at: tls.write(data[at : at + (1 << 14)]))  # type: ignore[misc]

    async def farewell(self) -> None:
        """Say, as TLS does, that nothing more is sent; the connection stays open."""
        assert self._tls is not None
        with contextlib.suppress(ssl.SSLWantReadError):
            self._tls.unwrap()
        await self._flush()

    async def say_unencrypted(self, data: bytes) -> None:
        """Send bytes past TLS."""
        await asyncio.get_running_loop().sock_sendall(self._sock, data)

    async def gone(self) -> None:
        """Wait until the other side has closed the connection."""
        with contextlib.suppress(ConnectionError):
            while await self.some():
                pass

    def reset(self) -> None:
        """Break the connection off."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self._sock.close()


Script = Callable[[Client], Awaitable[None]]


@contextlib.asynccontextmanager
async def serving(script: Script, *, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> AsyncIterator[str]:
    """Do `script` on each connection, which is closed after it; gives the URL."""
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()

    async def serve(number: int, sock: socket.socket) -> None:
        with sock, contextlib.suppress(ConnectionError, ssl.SSLError):
            client = Client(number, sock, tls)
            await client.handshake()
            await script(client)

    async def accept(listener: socket.socket) -> None:
        for number in itertools.count():
            sock, _ = await loop.sock_accept(listener)
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else a reset overtakes what was said
            task = loop.create_task(serve(number, sock))
            tasks.add(task)

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listener:
        listener.setblocking(False)
        accepting = loop.create_task(accept(listener))
        try:
            yield f"http{'s' if tls else ''}://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        finally:
            for task in (accepting, *tasks):
                task.cancel()
            await asyncio.gather(accepting, *tasks, return_exceptions=True)


@contextlib.contextmanager
def unanswering() -> Iterator[str]:
    """Listen where a connection is never made: whoever comes first fills the queue. Gives the URL."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
