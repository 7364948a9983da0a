"""One connection of HTTP/1.1 and the one exchange that it carries at a time: a request out, an answer in.

The socket is not blocking and is watched by the loop itself, for reading as long as it lives: what the server says of
its own accord, its farewell included, is noticed while nothing is asked. Bodies go from the caller's memory to the
kernel and from there to the caller's memory; one turn moves a bounded number of bytes. Once an exchange has ended,
however it ended, nothing of it is touched any more.

Which connection carries what, deadlines and repetition are not known here.
"""

from __future__ import annotations

import asyncio
import enum
import math
import re
from typing import Protocol

from ._errors import PeerLostError, TransferError, TransferTimeout
from ._http_codec import Head, Malformed
from ._http_incoming import Answer, Incoming, Misfit
from ._http_pieces import Pieces
from ._http_streams import PIECE, Stream

__all__ = [
    "BrokenError",
    "Connection",
    "Exchange",
    "HttpError",
    "LateError",
    "LengthError",
    "MalformedError",
    "Owner",
    "Progress",
    "UntrustedError",
]

_PIECES = 256  # a call
_KEPT = re.compile(rb"timeout=([0-9]{1,9})")
_IDEMPOTENT = frozenset({b"GET", b"HEAD", b"PUT", b"DELETE", b"OPTIONS"})


# ---- how it can end -----------------------------------------------------------------------------------------------


class Progress(enum.Enum):
    """How far an exchange came, since that decides whether it can be repeated."""

    NOTHING = "nothing was sent"
    PART = "the request was sent in part"
    SENT = "the request was sent"
    ANSWER = "a part of the answer had come"


class HttpError(TransferError):
    """An exchange that did not end with an answer.

    Attributes
    ----------
    endpoint : str
    progress : Progress
    nbytes : int
        Bytes that had been received into the caller's memory.
    head : Head or None
        That of the answer, where it had come.
    repeated : bool
        The request had been sent twice.
    """

    head: Head | None = None
    repeated: bool = False

    def __init__(self, message: str, *, endpoint: str, progress: Progress, nbytes: int = 0) -> None:
        super().__init__(f"{endpoint}: {message}; {progress.value}", nbytes=nbytes)
        self.endpoint = endpoint
        self.progress = progress


class BrokenError(HttpError, PeerLostError):
    """There is no connection, or it ended or broke before the answer was complete."""


class UntrustedError(HttpError):
    """TLS was not agreed on: a certificate that is not valid here, or for another host, or no TLS at all."""


class LateError(HttpError, TransferTimeout):
    """The deadline passed."""


class MalformedError(HttpError):
    """What came is not HTTP/1.1."""


class LengthError(HttpError):
    """A body has another length than there is room for.

    Attributes
    ----------
    expected, found : int, bytes
        What there was room for; what came, or was announced. Of a body in pieces, that is a lower bound.
    """

    def __init__(
        self, message: str, *, endpoint: str, progress: Progress, nbytes: int, expected: int, found: int
    ) -> None:
        super().__init__(message, endpoint=endpoint, progress=progress, nbytes=nbytes)
        self.expected = expected
        self.found = found


# ---- one exchange -------------------------------------------------------------------------------------------------


class Exchange:
    """A request, and the answer to it.

    Parameters
    ----------
    endpoint : str
        For messages.
    method : bytes
    outgoing : Pieces
        Head and body.
    into : Pieces or None
        Where the body of a success goes.
    most : int, bytes
        How long it may be where it is gathered.
    future : Future of Answer
    """

    __slots__ = (
        "_into", "_method", "_most", "connection", "endpoint", "future", "incoming", "outgoing", "repeated", "seen",
        "timer",
    )  # fmt: skip

    def __init__(
        self,
        endpoint: str,
        method: bytes,
        outgoing: Pieces,
        into: Pieces | None,
        most: int,
        future: asyncio.Future[Answer],
    ) -> None:
        self.endpoint = endpoint
        self._method = method
        self.outgoing = outgoing
        self._into = into
        self._most = most
        self.future = future
        self.incoming = Incoming(asked_for_head=method == b"HEAD", into=into, most=most)
        self.connection: Connection | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.seen = 0  # what had moved when the timer went last
        self.repeated = False

    @property
    def progress(self) -> Progress:
        """How far it came."""
        if self.incoming.begun:
            return Progress.ANSWER
        if not self.outgoing.passed:
            return Progress.NOTHING
        return Progress.PART if self.outgoing.left else Progress.SENT

    @property
    def passed(self) -> int:
        """Bytes that have moved, either way."""
        return self.outgoing.passed + self.incoming.passed

    @property
    def repeatable(self) -> bool:
        """Whether it does no harm to send it again, and no byte of an answer has come."""
        return not (self.incoming.begun or self.repeated) and self._method in _IDEMPOTENT

    def repeat(self) -> None:
        """Begin again, for the second and last time."""
        self.repeated = True
        self.outgoing.rewind()

    def error(self, kind: type[HttpError], message: str) -> HttpError:
        """Say in which way it did not end with an answer."""
        error = kind(
            message,
            endpoint=self.endpoint,
            progress=self.progress,
            nbytes=self._into.passed if self._into is not None else 0,
        )
        error.head = self.incoming.head
        error.repeated = self.repeated
        return error

    def misfit(self, error: Misfit) -> LengthError:
        """Say that the body has another length than there is room for."""
        misfit = LengthError(
            f"the body has another length than there is room for: {error}",
            endpoint=self.endpoint,
            progress=self.progress,
            nbytes=self._into.passed if self._into is not None else 0,
            expected=error.expected,
            found=error.found,
        )
        misfit.head = self.incoming.head
        return misfit

    def succeed(self, answer: Answer) -> None:
        """Tell whoever waits."""
        if not self.future.done():
            self.future.set_result(answer._replace(repeated=True) if self.repeated else answer)

    def fail(self, error: Exception) -> None:
        """Tell whoever waits."""
        if not self.future.done():
            self.future.set_exception(error)


# ---- one connection -----------------------------------------------------------------------------------------------


class Owner(Protocol):
    """Who has connections and is told what becomes of them."""

    def freed(self, connection: Connection) -> None:
        """Take a connection back whose exchange has ended."""

    def ended(self, connection: Connection, exchange: Exchange | None, error: HttpError | None) -> None:
        """Learn that a connection is closed; with `error`, the exchange that it carried has not been told."""


class Connection:
    """A connected socket, watched by the running loop.

    Parameters
    ----------
    stream : Stream
        Owned from now on.
    owner : Owner

    Attributes
    ----------
    expires : float, seconds
        Until when it may be used again, by the loop's clock.
    patience : float, seconds
        How long the server keeps it where nothing is asked; infinite where it does not say.
    served : int
        Exchanges that have ended well on it.
    """

    __slots__ = (
        "_behind", "_exchange", "_fd", "_loop", "_owner", "_stream", "_unsendable", "_writing", "expires",
        "patience", "served",
    )  # fmt: skip

    def __init__(self, stream: Stream, owner: Owner) -> None:
        self._stream = stream
        self._owner = owner
        self._exchange: Exchange | None = None
        self._behind = False  # bytes that are here have not been looked at
        self._unsendable: OSError | None = None
        self._writing = False
        self.expires = 0.0
        self.patience = math.inf
        self.served = 0
        self._loop = asyncio.get_running_loop()
        self._fd = stream.fileno()
        self._loop.add_reader(self._fd, self._readable)

    @property
    def exchange(self) -> Exchange | None:
        """What it carries."""
        return self._exchange

    def start(self, exchange: Exchange) -> None:
        """Begin an exchange; there is none."""
        self._exchange = exchange
        exchange.connection = self
        self._send(exchange)

    def close(self, error: HttpError | None = None) -> None:
        """Let go of the socket; its owner hears of it, and of what the exchange should hear."""
        if self._fd < 0:
            return
        self._loop.remove_reader(self._fd)
        self._watch_writing(wanted=False)
        self._fd = -1
        self._stream.close()
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.connection = None
        self._owner.ended(self, exchange, error)

    # -- sending

    def _send(self, exchange: Exchange) -> None:
        try:
            self._stream.send(exchange.outgoing)
        except (BlockingIOError, InterruptedError):
            self._watch_writing(wanted=True)
        except OSError as error:
            # It takes no more. It may have said why.
            self._unsendable = error
            self._watch_writing(wanted=False)
            self._readable()
        else:
            self._watch_writing(wanted=exchange.outgoing.left > 0 or self._stream.unsent)

    def _writable(self) -> None:
        exchange = self._exchange
        assert exchange is not None
        unfinished = exchange.outgoing.left or self._stream.unsent
        if unfinished and self._unsendable is None and exchange.incoming.head is None:
            self._send(exchange)
            if self._exchange is exchange and not exchange.outgoing.left:
                self._readable()  # which may be what had something to send
        else:
            self._watch_writing(wanted=False)
            self._readable()

    def _watch_writing(self, *, wanted: bool) -> None:
        if wanted and not self._writing:
            self._loop.add_writer(self._fd, self._writable)
        elif self._writing and not wanted:
            self._loop.remove_writer(self._fd)
        self._writing = wanted

    # -- receiving

    def _readable(self) -> None:
        exchange = self._exchange
        if exchange is None:
            self._listen()
            return
        incoming = exchange.incoming
        try:
            self._receive(incoming)
        except (BlockingIOError, InterruptedError):
            pass  # the loop tells when there is more
        except Malformed as error:
            self.close(exchange.error(MalformedError, str(error)))
            return
        except Misfit as error:
            self.close(exchange.misfit(error))
            return
        except OSError as error:
            self._broken(exchange, self._unsendable or error)
            return
        if incoming.done:
            self._end(exchange)
        elif self._stream.unsent:
            self._watch_writing(wanted=True)
        elif self._writing and incoming.head is not None:
            self._watch_writing(wanted=False)  # it has answered without the rest

    def _receive(self, incoming: Incoming) -> None:
        """Receive until the answer is complete, nothing more is here, or others should have a turn."""
        stream = self._stream
        budget = stream.turn
        if self._behind:
            self._behind = incoming.feed(b"")
        more = True
        while not (incoming.done or self._behind):
            if incoming.direct:
                targets = incoming.targets(budget, _PIECES)
                n, more = stream.receive_into(targets)
                if n:
                    incoming.received(n)
                budget -= max(0, len(targets) * PIECE - n)
            else:
                data, more = stream.receive(incoming.ask)
                n = len(data)
                if n:
                    self._behind = incoming.feed(data)
            if not n and not incoming.end():
                raise ConnectionResetError("the connection was closed")
            budget -= n
            if budget <= 0 or not more:
                break  # the loop tells when there is more, of what is not here yet
        # uvloop says only once that a socket has an error, which may not be seen before all has been read.
        if not incoming.done and (self._behind or more):
            self._loop.call_soon(self._go_on, self._exchange)

    def _go_on(self, exchange: Exchange | None) -> None:
        if self._exchange is exchange:
            self._readable()

    def _listen(self) -> None:
        """Hear what a server says that was not asked: nothing, as a rule, or that it goes."""
        try:
            self._stream.receive(1)
        except (BlockingIOError, InterruptedError):
            return  # tickets, of TLS
        except OSError:
            self.close()
        else:
            self.close()

    # -- ending

    def _hear(self, incoming: Incoming) -> None:
        """Note how long the server says that it keeps the connection; be gone before that."""
        assert incoming.head is not None
        said = _KEPT.search(incoming.head.headers.get(b"keep-alive", b""))
        if said is not None:
            self.patience = max(0, int(said[1]) - 1)

    def _broken(self, exchange: Exchange, error: OSError) -> None:
        why = error.strerror or str(error)
        broken = exchange.error(BrokenError, f"the connection broke: {why}")
        broken.__cause__ = error.with_traceback(None)  # which would hold the exchange, and the caller's memory
        self.close(broken)

    def _end(self, exchange: Exchange) -> None:
        incoming = exchange.incoming
        sent = not (exchange.outgoing.left or self._stream.unsent or self._unsendable)
        keep = incoming.keep and sent
        try:
            exchange.succeed(incoming.answer())
        except Misfit as error:
            exchange.fail(exchange.misfit(error))
        self._exchange = exchange.connection = None
        if keep:
            self.served += 1
            self._hear(incoming)
            self._owner.freed(self)
        else:
            self.close()
