"""One endpoint that speaks HTTP/1.1, and many requests to it: connections that are kept, and who waits for one.

Bodies are sent from, and received into, memory that the caller names. Objects, signatures, redirects and retries are
not known here, but for one: a request that finds the connection which it was given closed, before a byte of an answer
came, is sent once more on a new one, if it is one that may be.

A pool belongs to one event loop. Requests that find no connection free wait in order; a connection that becomes free
goes to the first of them at once, else to the next request: the one that was used last is used first, so that the
others grow old and are closed.
"""

from __future__ import annotations

import asyncio
import math
import ssl
from collections import deque
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from . import _address, _sockets
from ._errors import ClosedError, ConfigError
from ._http_codec import Header, encode_head
from ._http_connection import (
    BrokenError,
    Connection,
    Exchange,
    HttpError,
    LateError,
    LengthError,
    MalformedError,
    Progress,
    UntrustedError,
)
from ._http_incoming import Answer
from ._http_pieces import Pieces
from ._http_streams import encrypt, plain

__all__ = [
    "Answer",
    "BrokenError",
    "HttpError",
    "LateError",
    "LengthError",
    "MalformedError",
    "Pool",
    "Progress",
    "UntrustedError",
]

_TICK = 0.002  # seconds; by how much a timer may be early
_PORTS = {"http": 80, "https": 443}


def _parse(url: str) -> tuple[str, _address.Address]:
    scheme, found, place = url.partition("://")
    place = place.removesuffix("/")
    if not found or scheme not in _PORTS:
        raise ConfigError(f"{url!r} is no endpoint; expected 'http://HOST[:PORT]' or 'https://HOST[:PORT]'")
    if place.endswith("]") or ":" not in place:
        place += f":{_PORTS[scheme]}"
    return scheme, _address.parse("tcp://" + place)


def _bytes_of(piece: memoryview | bytes) -> memoryview:
    view = memoryview(piece)
    return view if view.format == "B" and view.ndim == 1 and view.c_contiguous else view.cast("B")


class Pool:
    """Connections to one endpoint; ``async with`` closes them, or `aclose`. Made on the loop that uses it.

    Parameters
    ----------
    url : str
        ``http://HOST[:PORT]`` or ``https://HOST[:PORT]``, an IPv6 address in brackets.
    limit : int
        How many connections there may be.
    tls : ssl.SSLContext or None
        For https; None: the authorities of the system are believed, and the host is checked.
    connect_timeout : float, seconds
        For the name, the connection and the handshake of TLS together.
    idle_timeout : float, seconds
        How long a connection is kept that nobody uses; less where the server says so.

    Attributes
    ----------
    endpoint : str
        The URL, with its port.
    host : bytes
        What is sent as `Host`.

    Raises
    ------
    ConfigError
        The URL is something else, or `limit` less than one.
    """

    def __init__(
        self,
        url: str,
        *,
        limit: int = 64,
        tls: ssl.SSLContext | None = None,
        connect_timeout: float = 10.0,
        idle_timeout: float = 15.0,
    ) -> None:
        self._scheme, self._address = _parse(url)
        if limit < 1:
            raise ConfigError(f"a pool with room for {limit} connections; expected one at least")
        place = str(self._address).removeprefix("tcp://")
        self.endpoint = f"{self._scheme}://{place}"
        self.host = (place if self._address.port != _PORTS[self._scheme] else place.rpartition(":")[0]).encode()
        self._limit = limit
        self._tls = tls
        self._connect_timeout = connect_timeout
        self._idle_timeout = idle_timeout
        self._loop = asyncio.get_running_loop()
        self._connections: set[Connection] = set()
        self._idle: list[Connection] = []  # used last, last
        self._waiting: deque[Exchange] = deque()
        self._opening: set[asyncio.Task[None]] = set()
        self._unpromised = 0  # of those that are opened, how many are for whoever waits first
        self._sweeper: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def connected(self) -> int:
        """How many connections there are, idle or not."""
        return len(self._connections)

    async def request(
        self,
        method: bytes,
        target: bytes,
        headers: Iterable[Header] = (),
        *,
        body: Iterable[memoryview | bytes] = (),
        into: Iterable[memoryview] | None = None,
        most: int = 8 << 20,
        deadline: float,
        patience: float = math.inf,
    ) -> Answer:
        """Send a request and receive the answer.

        When it ends, however it ends, nothing more is read from `body` or written to `into`.

        Parameters
        ----------
        method, target : bytes
            The target is percent-encoded.
        headers : iterable of (bytes, bytes)
            `Host` and `Content-Length` are added.
        body : iterable of memoryview or bytes
            What is sent, in order.
        into : iterable of memoryview or None
            Where the body of a success goes, in order. None: it is given as bytes.
        most : int, bytes
            How long the body of a success may be that is given as bytes.
        deadline : float, seconds
            By the loop's clock, for all of it.
        patience : float, seconds
            How long nothing may move; it can take twice that to be noticed.

        Raises
        ------
        BrokenError, UntrustedError
            There is no connection, or it ended or broke.
        LateError
            The deadline passed, or nothing moved, or no connection was made in time.
        MalformedError
            What came is not HTTP/1.1.
        LengthError
            The body of a success is longer or shorter than `into`, or longer than `most`. Of one that is announced to
            be longer, nothing is received.
        ClosedError
            The pool was closed.
        ValueError
            There can be no such request.
        """
        if self._closed:
            raise ClosedError(f"{self.endpoint}: the pool is closed")
        content = [_bytes_of(piece) for piece in body]
        head = encode_head(method, target, self.host, headers, sum([piece.nbytes for piece in content]))
        exchange = Exchange(
            self.endpoint,
            method,
            Pieces((memoryview(head), *content)),
            None if into is None else Pieces([_bytes_of(piece) for piece in into]),
            most,
            self._loop.create_future(),
        )
        until = deadline if patience == math.inf else min(deadline, self._loop.time() + patience)
        exchange.timer = self._loop.call_at(until, self._late, exchange, deadline, patience)
        self._submit(exchange)
        try:
            return await exchange.future
        except asyncio.CancelledError:
            self._drop(exchange)
            raise
        finally:
            exchange.timer.cancel()
            del exchange  # an error and what it is about would hold each other

    async def aclose(self) -> None:
        """Close all connections; requests that are under way fail."""
        self._closed = True
        for exchange in (*self._waiting, *(connection.exchange for connection in self._connections)):
            if exchange is not None:
                exchange.fail(ClosedError(f"{self.endpoint}: the pool was closed; {exchange.progress.value}"))
        self._waiting.clear()
        for connection in list(self._connections):
            connection.close()
        if self._sweeper is not None:
            self._sweeper.cancel()
        opening = list(self._opening)
        for task in opening:
            task.cancel()
        await asyncio.gather(*opening, return_exceptions=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    # -- who gets which connection

    def _submit(self, exchange: Exchange) -> None:
        now = self._loop.time()
        while self._idle:
            connection = self._idle.pop()
            if connection.expires > now:
                connection.start(exchange)
                return
            connection.close()
        self._waiting.append(exchange)
        self._open_for_waiting()

    def _next(self) -> Exchange | None:
        while self._waiting:
            exchange = self._waiting.popleft()
            if not exchange.future.done():
                return exchange
        return None

    def freed(self, connection: Connection) -> None:
        """Give a connection to whoever waits, or keep it."""
        exchange = self._next()
        if exchange is not None:
            connection.start(exchange)
            return
        connection.expires = self._loop.time() + min(self._idle_timeout, connection.patience)
        self._idle.append(connection)
        if self._sweeper is None:
            self._sweeper = self._loop.call_at(connection.expires, self._sweep)

    def ended(self, connection: Connection, exchange: Exchange | None, error: HttpError | None) -> None:
        """Forget a connection; repeat what it carried, or say that it failed."""
        self._connections.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if exchange is not None and error is not None:
            if connection.served and isinstance(error, BrokenError) and exchange.repeatable and not self._closed:
                exchange.repeat()
                self._open(exchange)
            else:
                exchange.fail(error)
        self._open_for_waiting()

    def _sweep(self) -> None:
        """Close what has been idle for long."""
        self._sweeper = None
        now = self._loop.time()
        for connection in [each for each in self._idle if each.expires <= now]:
            connection.close()
        if self._idle:
            self._sweeper = self._loop.call_at(min(each.expires for each in self._idle), self._sweep)

    # -- how a request ends early

    def _late(self, exchange: Exchange, deadline: float, patience: float) -> None:
        now = self._loop.time()
        over = now + _TICK >= deadline
        if not over and exchange.passed != exchange.seen:
            exchange.seen = exchange.passed
            until = min(deadline, now + patience)
            exchange.timer = self._loop.call_at(until, self._late, exchange, deadline, patience)
            return
        why = "the deadline passed" if over else f"nothing moved for {patience:g} s"
        exchange.fail(exchange.error(LateError, why))
        self._drop(exchange)

    def _drop(self, exchange: Exchange) -> None:
        if exchange.connection is not None:
            exchange.connection.close()
        elif exchange in self._waiting:
            self._waiting.remove(exchange)

    # -- opening

    def _open_for_waiting(self) -> None:
        while (
            self._unpromised < len(self._waiting)
            and len(self._connections) + len(self._opening) < self._limit
            and not self._closed
        ):
            self._open(None)

    def _open(self, exchange: Exchange | None) -> None:
        """Open a connection for this exchange, or for whoever waits first once it is there."""
        self._unpromised += exchange is None
        task = self._loop.create_task(self._connect(exchange))
        self._opening.add(task)
        task.add_done_callback(self._opened)

    def _opened(self, task: asyncio.Task[None]) -> None:
        self._opening.discard(task)
        self._open_for_waiting()

    async def _connect(self, exchange: Exchange | None) -> None:
        failure: tuple[type[HttpError], str, Exception] | None = None
        connection = None
        try:
            async with asyncio.timeout(self._connect_timeout):
                connection = await self._connected()
        except TimeoutError as error:
            failure = LateError, f"no connection within {self._connect_timeout:g} s", error
        except ssl.SSLError as error:
            failure = UntrustedError, f"no TLS: {error}", error
        except (OSError, ValueError) as error:
            failure = BrokenError, f"no connection: {error}", error
        finally:
            self._unpromised -= exchange is None
        if exchange is None or exchange.future.done():
            exchange = self._next()
        if connection is not None:
            self._connections.add(connection)
            if exchange is not None:
                connection.start(exchange)
            else:
                self.freed(connection)
        elif exchange is not None and failure is not None:
            kind, message, cause = failure
            failed = exchange.error(kind, message)
            failed.__cause__ = cause.with_traceback(None)
            exchange.fail(failed)

    async def _connected(self) -> Connection:
        if self._scheme == "https" and self._tls is None:
            self._tls = await self._loop.run_in_executor(None, ssl.create_default_context)
        sock = await _sockets.connect(self._address, self._connect_timeout)
        stream = plain(sock)
        try:
            if self._scheme == "https":
                assert self._tls is not None
                stream = await encrypt(sock, self._tls, self._address.host)
            return Connection(stream, self)
        except BaseException:
            stream.close()
            raise
