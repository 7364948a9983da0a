"""A proxy for tests: stands before an HTTP server and does the harm to single requests that a test has written down.

It knows as much of HTTP/1.1 as it takes to tell one request from the next and to find where bodies begin and end, and
the words in which S3 refuses. All else it carries as it is: what was signed stays signed. Harm to connections, whatever
is in them, is `relay`'s.

A thread of its own carries everything, so tests on any loop, or on none, can use it; no more than a buffer is held for
each direction.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
import threading
import urllib.parse
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar

__all__ = [
    "CutUpload",
    "Fault",
    "FaultProxy",
    "Flip",
    "Length",
    "Reply",
    "Request",
    "Reset",
    "Stall",
    "StallUpload",
    "Truncate",
    "access_denied",
    "another_region",
    "expired_token",
    "internal_error",
    "slow_down",
]

_Outcome = TypeVar("_Outcome")

_BUFFER = 256 << 10
_HEAD = 64 << 10
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


# ---- what can go wrong --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """A request that came: its line, its headers (names in lower case), and which connection brought it, from 0."""

    method: str
    target: str
    headers: Mapping[str, str]
    connection: int


class Fault:
    """What is done to one request. The server gets the request and answers, unless it is said otherwise."""


@dataclass(frozen=True)
class Reset(Fault):
    """Reset the connection when no more than so many bytes of the answer's body have passed.

    With ``after=None`` nothing of the answer passes; with ``reaches_server=False`` the server is not asked either.
    """

    after: int | None = None
    reaches_server: bool = True


@dataclass(frozen=True)
class Truncate(Fault):
    """Close the connection in order after so many bytes of the answer's body."""

    after: int


@dataclass(frozen=True)
class Stall(Fault):
    """Hold the rest of the answer back after so many bytes of its body; all of it, the first byte too, with None.

    It goes on after so many seconds, or, without them, at `FaultProxy.go_on`.
    """

    after: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Flip(Fault):
    """Change one byte of the answer's body."""

    at: int


@dataclass(frozen=True)
class Length(Fault):
    """Announce so many bytes more than the answer's body has, or fewer. All of the body follows; more never comes."""

    by: int


@dataclass(frozen=True)
class CutUpload(Fault):
    """Reset both connections when so many bytes of the request's body have been carried."""

    after: int


@dataclass(frozen=True)
class StallUpload(Fault):
    """Take no more than so many bytes of the request's body, until `FaultProxy.go_on`."""

    after: int


@dataclass(frozen=True)
class Reply(Fault):
    """Answer in the server's place; it is asked nevertheless with ``reaches_server=True``."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    reaches_server: bool = False


def internal_error(*, reaches_server: bool = False) -> Reply:
    """500, which S3 asks its clients to retry."""
    return _refusal(500, "InternalError", "We encountered an internal error. Please try again.", reaches_server)


def slow_down(*, retry_after: float | None = None) -> Reply:
    """503, which S3 gives to who asks too much; some servers say when to come again."""
    headers = {} if retry_after is None else {"Retry-After": f"{retry_after:g}"}
    return _refusal(503, "SlowDown", "Please reduce your request rate.", headers=headers)


def expired_token() -> Reply:
    """400: the temporary credentials of the request have ended."""
    return _refusal(400, "ExpiredToken", "The provided token has expired.")


def access_denied() -> Reply:
    """403."""
    return _refusal(403, "AccessDenied", "Access Denied")


def another_region(region: str) -> Reply:
    """301 without a place to go to: the bucket lives in another region, which a header names."""
    message = "The bucket you are attempting to access must be addressed using the specified endpoint."
    return _refusal(301, "PermanentRedirect", message, headers={"x-amz-bucket-region": region})


def _refusal(
    status: int, code: str, message: str, reaches_server: bool = False, headers: Mapping[str, str] | None = None
) -> Reply:
    body = (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f"<Error><Code>{code}</Code><Message>{message}</Message><RequestId>0</RequestId><HostId>0</HostId></Error>"
    )
    return Reply(status, body.encode(), {"Content-Type": "application/xml", **(headers or {})}, reaches_server)


# ---- HTTP, as far as it is needed ---------------------------------------------------------------------------------


class _Reader(asyncio.StreamReader):
    """A stream that tells of its end before it was read so far."""

    def __init__(self) -> None:
        super().__init__(limit=_BUFFER)
        self.gone = asyncio.Event()

    def feed_eof(self) -> None:
        self.gone.set()
        super().feed_eof()

    def set_exception(self, error: Exception) -> None:
        self.gone.set()
        super().set_exception(error)


@dataclass
class _Head:
    """The first line and the headers of a message, as they came."""

    line: str
    fields: list[tuple[str, str]]

    @classmethod
    async def read(cls, reader: asyncio.StreamReader) -> _Head:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
        if sum(map(len, lines)) > _HEAD:
            raise ValueError(f"a head of more than {_HEAD} bytes")
        fields = [line.partition(":") for line in lines[1:]]
        return cls(lines[0], [(name, value.strip()) for name, _, value in fields])

    @property
    def headers(self) -> dict[str, str]:
        return {name.lower(): value for name, value in self.fields}

    @property
    def status(self) -> int:
        return int(self.line.split(" ", 2)[1])

    def replace(self, name: str, value: str) -> None:
        self.fields = [(was, value if was.lower() == name else old) for was, old in self.fields]

    def __bytes__(self) -> bytes:
        lines = [self.line, *(f"{name}: {value}" for name, value in self.fields)]
        return "".join(f"{line}\r\n" for line in (*lines, "")).encode("latin-1")


async def _body(
    reader: asyncio.StreamReader, headers: Mapping[str, str], *, otherwise: int | None
) -> AsyncIterator[tuple[bytes, bool]]:
    """Yield a body in pieces as they are on the wire, and whether each is a part of what was sent or of its frame.

    Where no header tells its length, `otherwise` does; None is until the connection ends.
    """
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while True:
            yield (line := await reader.readuntil(b"\r\n")), False
            size = int(line.split(b";")[0], 16)
            async for piece in _exactly(reader, size):
                yield piece, True
            if size == 0:
                break
            yield await reader.readexactly(2), False
        while line != b"\r\n":
            yield (line := await reader.readuntil(b"\r\n")), False
        return
    length = int(headers["content-length"]) if "content-length" in headers else otherwise
    if length is None:
        while piece := await reader.read(_BUFFER):
            yield piece, True
        return
    async for piece in _exactly(reader, length):
        yield piece, True


async def _exactly(reader: asyncio.StreamReader, count: int) -> AsyncIterator[bytes]:
    while count:
        piece = await reader.read(min(count, _BUFFER))
        if not piece:
            raise asyncio.IncompleteReadError(b"", count)
        count -= len(piece)
        yield piece


def _needed(fault: Fault | None) -> int:
    """How many bytes the body of an answer has to have for a fault."""
    if isinstance(fault, Flip):
        return fault.at + 1
    return (fault.after or 0) if isinstance(fault, Reset | Truncate | Stall) else 0


def _check(fault: Fault | None, needed: int, what: str, length: int) -> None:
    if needed > length:
        raise ValueError(f"{fault} was asked of {what} whose body has {length} bytes")


async def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    if sock is not None and sock.fileno() >= 0:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    writer.transport.abort()


async def _closed(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        await writer.wait_closed()


class _Over(Exception):  # noqa: N818 - it is none
    """The connection has no more to give."""


# ---- one connection -----------------------------------------------------------------------------------------------


class _Connection:
    """A client's connection and the one to the server that goes with it, request after request."""

    def __init__(self, proxy: FaultProxy, number: int, reader: _Reader, writer: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._number = number
        self._reader = reader
        self._writer = writer
        self._server: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        writer.transport.set_write_buffer_limits(high=1, low=0)

    async def run(self) -> None:
        try:
            await self._serve()
            for writer in self._writers():  # what was written is sent, and then the end
                writer.close()
            for writer in self._writers():
                await _closed(writer)
        finally:
            for writer in self._writers():
                writer.transport.abort()
                await _closed(writer)

    def _writers(self) -> list[asyncio.StreamWriter]:
        return [self._writer] if self._server is None else [self._writer, self._server[1]]

    async def _serve(self) -> None:
        try:
            while True:
                await self._exchange(await _Head.read(self._reader))
        except (_Over, asyncio.IncompleteReadError, OSError):
            return  # one of the two sides has left, or the fault has closed the connection
        except Exception as error:
            self._proxy.failed(error)

    async def _exchange(self, head: _Head) -> None:
        method, target, _ = head.line.split(" ")
        fault = self._proxy.take(Request(method, target, head.headers, self._number))
        if isinstance(fault, Reset) and not fault.reaches_server:
            self._give_up()
        if isinstance(fault, Reply) and not fault.reaches_server:
            await self._reply(head, method, fault)
            return
        if self._server is None:
            self._server = await self._proxy.dial()
            self._server[1].transport.set_write_buffer_limits(high=1, low=0)
        if isinstance(fault, CutUpload | StallUpload) and "transfer-encoding" not in head.headers:
            _check(fault, fault.after, "a request", int(head.headers.get("content-length", "0")))
        await _send(self._server[1], bytes(head))
        upload = asyncio.create_task(self._upload(head, fault))
        try:
            await self._answer(head, method, fault, upload)
            if "expect" in head.headers and not upload.done():
                raise _Over  # the server did not want the body, and the client does not send it
            await upload
        finally:
            upload.cancel()
            await asyncio.wait([upload])
            if not upload.cancelled():
                upload.exception()

    async def _upload(self, head: _Head, fault: Fault | None) -> None:
        """Carry the request's body."""
        assert self._server is not None
        server = self._server[1]
        limit = fault.after if isinstance(fault, CutUpload | StallUpload) else None
        carried = 0
        async for piece, counts in _body(self._reader, head.headers, otherwise=0):
            rest = piece
            if counts and limit is not None and carried + len(piece) >= limit >= carried:
                await _send(server, piece[: limit - carried])
                if isinstance(fault, CutUpload):
                    self._give_up()
                await self._proxy.stall(self._reader, None)
                rest = piece[limit - carried :]
                limit = None
            carried += len(piece) if counts else 0
            # A server may have answered and left. A client that still sends gets to read the answer.
            with contextlib.suppress(OSError):
                await _send(server, rest)
        if limit is not None:
            _check(fault, limit, "a request", carried)

    async def _answer(self, asked: _Head, method: str, fault: Fault | None, upload: asyncio.Task[None]) -> None:
        assert self._server is not None
        reader = self._server[0]
        while (head := await self._unless_it_fails(upload, _Head.read(reader))).status < 200:
            await _send(self._writer, bytes(head))
        if isinstance(fault, Stall) and fault.after is None:
            await self._proxy.stall(self._reader, fault.seconds)
        if isinstance(fault, Reset) and fault.after is None:
            self._give_up()
        empty = method == "HEAD" or head.status in (204, 304)
        headers = {} if empty else head.headers
        body = _body(reader, headers, otherwise=0 if empty else None)
        if isinstance(fault, Reply):
            async for _ in body:
                pass
            await self._reply(asked, method, fault, consumed=True)
            return
        if isinstance(fault, Length):
            if "content-length" not in head.headers:
                raise ValueError(f"{fault} was asked of an answer without a Content-Length")
            head.replace("content-length", str(int(head.headers["content-length"]) + fault.by))
        if empty or "content-length" in headers:
            _check(fault, _needed(fault), "an answer", int(headers.get("content-length", "0")))
        await _send(self._writer, bytes(head))
        await self._carry(body, fault)
        if isinstance(fault, Length) or not (empty or headers.keys() & {"content-length", "transfer-encoding"}):
            raise _Over
        if "close" in head.headers.get("connection", "").lower():
            raise _Over

    async def _unless_it_fails(self, upload: asyncio.Task[None], read: Coroutine[Any, Any, _Head]) -> _Head:
        """Wait for the server to answer, or for the client to end in the middle of its request."""
        reading = asyncio.create_task(read)
        try:
            await asyncio.wait([upload, reading], return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                upload.result()
            return await reading
        finally:
            reading.cancel()

    async def _carry(self, body: AsyncIterator[tuple[bytes, bool]], fault: Fault | None) -> None:
        """Carry the answer's body, harmed."""
        at = fault.at if isinstance(fault, Flip) else None
        stop = fault.after if isinstance(fault, Reset | Truncate | Stall) else None
        if stop == 0:
            await self._stop(fault)
            stop = None
        carried = 0
        async for piece, counts in body:
            rest = piece
            if counts:
                if at is not None and carried <= at < carried + len(piece):
                    rest = piece[: at - carried] + bytes([piece[at - carried] ^ 0xFF]) + piece[at - carried + 1 :]
                    at = None
                if stop is not None and carried + len(piece) >= stop:
                    await _send(self._writer, piece[: stop - carried])
                    await self._stop(fault)
                    rest = piece[stop - carried :]
                    stop = None
                carried += len(piece)
            await _send(self._writer, rest)
        _check(fault, _needed(fault), "an answer", carried)

    async def _stop(self, fault: Fault | None) -> None:
        if isinstance(fault, Stall):
            await self._proxy.stall(self._reader, fault.seconds)
        elif isinstance(fault, Reset):
            self._give_up()
        else:
            raise _Over

    async def _reply(self, asked: _Head, method: str, fault: Reply, *, consumed: bool = False) -> None:
        # Who asks whether to send a body is told by the answer, and does not send it.
        unsent = "expect" in asked.headers and not consumed
        if not unsent and not consumed:
            async for _ in _body(self._reader, asked.headers, otherwise=0):
                pass
        fields = [*fault.headers.items(), ("Content-Length", str(len(fault.body)))]
        fields += [("Connection", "close")] if unsent else []
        head = _Head(f"HTTP/1.1 {fault.status} Fault", fields)
        await _send(self._writer, bytes(head) + (b"" if method == "HEAD" else fault.body))
        if unsent:
            raise _Over

    def _give_up(self) -> NoReturn:
        for writer in self._writers():
            _reset(writer)
        raise _Over


# ---- the proxy ----------------------------------------------------------------------------------------------------


class FaultProxy:
    """Listens on loopback and carries to `target`; ``with`` starts and ends it.

    An error in a test's own script, such as the flip of a byte that an answer does not have, is raised when it ends.

    Parameters
    ----------
    target : str
        The server's URL, with a port.
    tls : SSLContext or None
        With what it speaks TLS to clients.
    target_tls : SSLContext or None
        With what it speaks TLS to a target whose URL asks for it.
    """

    def __init__(
        self, target: str, *, tls: ssl.SSLContext | None = None, target_tls: ssl.SSLContext | None = None
    ) -> None:
        parts = urllib.parse.urlsplit(target)
        assert parts.hostname is not None
        assert parts.port is not None
        assert (parts.scheme == "https") == (target_tls is not None), "the target's URL and `target_tls` disagree"
        self._target = parts.hostname, parts.port
        self._tls = tls
        self._target_tls = target_tls
        self._lock = threading.Lock()
        self._requests: list[Request] = []
        self._next: list[tuple[Fault | None, Callable[[Request], bool]]] = []
        self._always: list[tuple[Fault | None, Callable[[Request], bool]]] = []
        self._errors: list[Exception] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._connections = 0
        self._stalled = 0
        self._port = 0

    def __enter__(self) -> Self:
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fault proxy")
        self._thread.start()
        self._started.wait()
        if self._errors:
            self._thread.join()
            raise self._errors[0]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._ending.set)
        self._thread.join()
        if error is None and self._errors:
            raise self._errors[0]

    # -- what tests do with it

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"{'http' if self._tls is None else 'https'}://127.0.0.1:{self._port}"

    @property
    def requests(self) -> list[Request]:
        """Those that came, in the order of their heads."""
        with self._lock:
            return self._requests.copy()

    @property
    def connections(self) -> int:
        """How many have come."""
        return self._connections

    @property
    def open(self) -> int:
        """How many of them are here."""
        return len(self._tasks)

    @property
    def stalled(self) -> int:
        """How many stalls hold now."""
        return self._stalled

    @property
    def waiting(self) -> int:
        """How many faults of `next` no request has met yet."""
        with self._lock:
            return len(self._next)

    def next(self, *faults: Fault | None, when: Callable[[Request], bool] = lambda _: True) -> None:
        """Do these to the requests that come next, one to each; to those that `when` picks, others pass. None: none."""
        with self._lock:
            self._next += [(fault, when) for fault in faults]

    def always(self, fault: Fault | None, *, when: Callable[[Request], bool] = lambda _: True) -> None:
        """Do this to every request from now on that nothing else is left for; None ends what was always done."""
        with self._lock:
            self._always = [] if fault is None else [*self._always, (fault, when)]

    def go_on(self) -> None:
        """End the stalls that hold now."""
        self._order(self._end_stalls())

    def refuse(self) -> None:
        """Listen no more: who comes is refused. Connections that are here stay."""
        self._order(self._close())

    def accept(self) -> None:
        """Listen again, at the same port."""
        self._order(self._open())

    def _order(self, do: Coroutine[Any, Any, _Outcome]) -> _Outcome:
        return asyncio.run_coroutine_threadsafe(do, self._loop).result(10)

    # -- what connections ask of it, in its thread

    def take(self, request: Request) -> Fault | None:
        """Note a request; what is to be done to it."""
        with self._lock:
            self._requests.append(request)
            for number, (fault, when) in enumerate(self._next):
                if when(request):
                    del self._next[number]
                    return fault
            return next((fault for fault, when in reversed(self._always) if when(request)), None)

    async def dial(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect to the target."""
        return await asyncio.open_connection(*self._target, ssl=self._target_tls, limit=_BUFFER)

    async def stall(self, client: _Reader, seconds: float | None) -> None:
        """Return when the stall is over; end the connection when the client leaves before that."""
        waits = [asyncio.create_task(event.wait()) for event in (self._go_on, client.gone)]
        self._stalled += 1
        try:
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._stalled -= 1
            for wait in waits:
                wait.cancel()
        if client.gone.is_set():
            raise _Over

    def failed(self, error: Exception) -> None:
        """Keep an error for who ends the proxy."""
        self._errors.append(error)

    # -- the thread

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
                runner.run(self._serve())
        except Exception as error:
            self.failed(error)
        finally:
            self._started.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ending = asyncio.Event()
        self._go_on = asyncio.Event()
        self._listener: asyncio.Server | None = None
        await self._open()
        self._started.set()
        await self._ending.wait()
        await self._close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(
            lambda: asyncio.StreamReaderProtocol(_Reader(), self._welcome), "127.0.0.1", self._port, ssl=self._tls,
            backlog=1024,
        )  # fmt: skip
        self._port = self._listener.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    async def _end_stalls(self) -> None:
        self._go_on.set()
        self._go_on = asyncio.Event()

    def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert isinstance(reader, _Reader)
        connection = _Connection(self, self._connections, reader, writer)
        self._connections += 1
        task = asyncio.create_task(connection.run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
