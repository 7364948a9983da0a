"""A TCP connection of whole frames between two agents, encrypted or not: what `_channel` is on one host.

Frames are taken apart by `_framing`. Nothing is kept for a peer without bound: what it does not read ends the
connection, and what is not wanted yet stays in its socket. What frames mean is not known here.
"""

from __future__ import annotations

import asyncio
import fcntl
import select
import socket
import struct
import termios
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from . import _sockets
from ._channel import Channel
from ._errors import MetadataError
from ._framing import Framer, frame

if TYPE_CHECKING:
    import ssl

__all__ = ["AnyChannel", "StreamChannel", "Tls"]

_BURST = 32  # frames a turn of the loop
_READ = 65536
_UNSENT = 64 << 20  # bytes that a peer may leave unread before it is let go; a thousand regions of the largest kind


class Tls:
    """Encryption of one connection, over memory: bytes in, bytes out.

    Parameters
    ----------
    context : ssl.SSLContext
    server : bool
    """

    def __init__(self, context: ssl.SSLContext, *, server: bool) -> None:
        import ssl

        self._errors = ssl.SSLError
        self._wants_more = ssl.SSLWantReadError
        self._in = ssl.MemoryBIO()
        self._out = ssl.MemoryBIO()
        self._ssl = context.wrap_bio(self._in, self._out, server_side=server)

    async def handshake(self, sock: socket.socket) -> None:
        """Agree on keys, and verify each other.

        Raises
        ------
        OSError
            That failed, with OpenSSL's reason, or the connection broke.
        """
        done = False
        while not done:
            try:
                self._ssl.do_handshake()
                done = True
            except self._wants_more:
                pass  # what it has to say first goes out below
            except self._errors as error:
                alert = self._out.read()
                if alert:
                    await _sockets.write_all(sock, alert)
                raise OSError(f"the TLS handshake failed: {error.reason or error}") from error
            await _sockets.write_all(sock, self._out.read())
            if not done:
                self._in.write(await _receive(sock))

    @property
    def certificate(self) -> bytes:
        """The other side's certificate, DER."""
        return self._ssl.getpeercert(binary_form=True) or b""

    def encrypt(self, data: bytes) -> bytes:
        """What to send for these bytes."""
        self._ssl.write(data)
        return self._out.read()

    def decrypt(self, data: bytes) -> bytes:
        """The bytes that have come, as far as they are whole records.

        Raises
        ------
        OSError
            They were tampered with, or the other side has refused the handshake.
        """
        self._in.write(data)
        pieces = []
        try:
            while piece := self._ssl.read(_READ):
                pieces.append(piece)
        except self._wants_more:
            return b"".join(pieces)
        except self._errors as error:
            raise OSError(f"TLS: {error.reason or error}") from error
        return b"".join(pieces)


async def _receive(sock: socket.socket) -> bytes:
    while True:
        try:
            data = sock.recv(_READ)
        except (BlockingIOError, InterruptedError):
            await _sockets.readable(sock)
            continue
        if not data:
            raise ConnectionResetError("the connection was closed during the TLS handshake")
        return data


class StreamChannel:
    """One connection, watched by the running loop; the methods and attributes of `Channel`, without descriptors.

    Parameters
    ----------
    sock : socket
        Connected, non-blocking; owned from now on.
    tls : Tls or None
        Encryption, its handshake done.
    on_frame, on_end
        As of `Channel`.
    """

    pidfd = -1

    def __init__(
        self,
        sock: socket.socket,
        tls: Tls | None,
        on_frame: Callable[[bytes, list[int]], None],
        on_end: Callable[[str], None],
    ) -> None:
        self.sock = sock
        self.where = f"what answers at {_name(sock)}"
        self.offended = False
        self.hung_up = False  # the other side, or what stands for it, has ended the connection: nothing timed out
        self._tls = tls
        self._loop = asyncio.get_running_loop()
        self.heard = self._loop.time()
        self._on_frame = on_frame
        self._on_end = on_end
        self._framer = Framer()
        self._unsent = bytearray()
        self._wanted = False  # frames, by whoever follows this
        self._watched = False  # the socket, by the loop
        self._dying = False
        self._ended = False
        self._turn: asyncio.Handle | None = None
        self.resume()
        if tls is not None:
            self._take(b"")  # what came right behind the handshake

    def follow(self, on_frame: Callable[[bytes, list[int]], None], on_end: Callable[[str], None]) -> None:
        """Hand frames and the end on to somebody else from now on."""
        self._on_frame, self._on_end = on_frame, on_end

    # -- receiving

    @property
    def ended(self) -> bool:
        """Whether either side has closed it."""
        return self._ended

    @property
    def paused(self) -> bool:
        """Whether nothing is received for now."""
        return not (self._wanted or self._ended)

    def pause(self) -> None:
        """Stop receiving until `resume`; the peer is held up once the buffers are full."""
        if not self._dying:
            self._wanted = False
            self._watch(False)

    def resume(self) -> None:
        """Receive again."""
        if not self._wanted and not self._ended:
            self._wanted = True
            self._later()

    def _watch(self, on: bool) -> None:
        if on != self._watched:
            self._watched = on
            if on:
                self._loop.add_reader(self.sock, self._readable)
            else:
                self._loop.remove_reader(self.sock)

    def _later(self) -> None:
        if self._turn is None:
            self._turn = self._loop.call_soon(self._deliver)

    def _readable(self) -> None:
        try:
            data = self.sock.recv(_READ)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.hung_up = isinstance(error, ConnectionResetError)
            self._end(f"the connection broke: {error.strerror}")
            return
        if not data:
            self.hung_up = True
            self._end("the connection was closed")
            return
        self.heard = self._loop.time()
        self._take(data)
        if self._watched and _hung_up(self.sock):
            self._loop.call_soon(self._rest)

    def _rest(self) -> None:
        """Read on: uvloop says only once that a socket has an error, which may not be seen before all has been read."""
        if self._watched:
            self._readable()

    def _take(self, data: bytes) -> None:
        try:
            self._framer.feed(data if self._tls is None else self._tls.decrypt(data))
        except OSError as error:
            self._end(str(error))
            return
        if self._turn is None:
            self._deliver()

    def _deliver(self) -> None:
        """Hand on the frames that are complete, a few a turn, before more is read."""
        self._turn = None
        try:
            for _ in range(_BURST):
                if not self._wanted or self._ended:
                    return
                complete = self._framer.take()
                if complete is None:
                    self._watch(True)
                    return
                self._on_frame(complete, [])
        except MetadataError as error:
            self.offended = True
            self._end(f"it broke the protocol: {error}")
            return
        self._watch(False)
        self._later()

    def _end(self, why: str) -> None:
        if not self._ended:
            self.close()
            self._on_end(why)

    # -- sending

    def send(self, payload: bytes, fds: Sequence[int] = ()) -> None:
        """Send a frame, now or as soon as there is room."""
        assert not fds, "descriptors do not travel over a network"
        if self._ended:
            return
        data = frame(payload)
        if self._tls is not None:
            data = self._tls.encrypt(data)
        if not self._unsent:
            data = data[self._transmit(data) :]
            if data and not self._ended:
                self._loop.add_writer(self.sock, self._writable)
        self._unsent += data
        if len(self._unsent) > _UNSENT:
            self._loop.call_soon(self._end, f"it left {len(self._unsent):,} bytes unread")

    def feel(self) -> None:
        """Look whether the other side is alive, where that takes no frame: not here."""

    def beat(self, payload: bytes) -> None:
        """Send a frame that says no more than that this side is alive, unless the other has something to read yet."""
        if self._ended:
            return
        if not self._wanted and _hung_up(self.sock):
            self._dying = True  # what it had sent before is still to be had
            self.resume()
        if not self._unsent and not struct.unpack("i", fcntl.ioctl(self.sock, termios.TIOCOUTQ, bytes(4)))[0]:
            self.send(payload)

    def _transmit(self, data: bytes | bytearray) -> int:
        try:
            return self.sock.send(data, socket.MSG_NOSIGNAL)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            self._loop.call_soon(self._rest)  # the reading side learns that the peer is gone, and says so
            return len(data)

    def _writable(self) -> None:
        del self._unsent[: self._transmit(self._unsent)]
        if not self._unsent:
            self._loop.remove_writer(self.sock)

    # -- ending

    def close(self) -> None:
        """Stop watching and tell the other side that this one is gone. `release` closes the socket."""
        if self._ended:
            return
        self._ended = True
        self._wanted = False
        self._watch(False)
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        if self._unsent:
            self._loop.remove_writer(self.sock)
            self._unsent.clear()
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            return  # the other side was first

    def release(self) -> None:
        """Close the socket."""
        self.close()
        if self.sock.fileno() >= 0:
            _drain(self.sock)
            self.sock.close()

    def drop(self) -> None:
        """In a forked child: let go of the socket without a word to the peer, whose connection is the parent's."""
        self._ended = True
        self.sock.close()


AnyChannel: TypeAlias = Channel | StreamChannel


def _name(sock: socket.socket) -> str:
    try:
        host, port, *_ = sock.getpeername()
    except OSError:
        return "a connection that has ended"
    return f"{host}, port {port}"


def _drain(sock: socket.socket) -> None:
    """Read what has come: a socket that is closed with bytes unread takes back what it has sent last."""
    try:
        for _ in range(_BURST):
            if not sock.recv(_READ):
                return
    except OSError:
        return


def _hung_up(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))
