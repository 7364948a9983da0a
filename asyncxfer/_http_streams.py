"""How bytes go to and come from a connected socket: as they are, or by TLS, natively or with Python's `ssl`.

All three take from `Pieces` what can be sent now, fill as much memory as bytes have come for, and never wait: what
cannot be done now is BlockingIOError, what can be done no more is another OSError. Python's `ssl` agrees on TLS in any
case, so that what a context says about certificates, hosts and versions is what happens; it also carries the bytes
where the native code cannot take over, record by record and with the GIL taken anew for each.

What is sent and received is not known here.
"""

from __future__ import annotations

import socket
import ssl
from typing import Protocol

from . import _sockets
from ._fast import tls
from ._http_pieces import Pieces

__all__ = ["PIECE", "Stream", "encrypt", "plain"]

#: A piece takes as long as so many bytes, if it has fewer.
PIECE = 1 << 10
_RECORD = 16 << 10  # bytes, of TLS
_PIECES = 256  # a call


class Stream(Protocol):
    """A socket and how bytes pass it."""

    @property
    def turn(self) -> int:
        """After how many bytes others should have a turn."""

    @property
    def unsent(self) -> bool:
        """Whether something that is taken already waits for room in the socket: then `send` again."""

    def fileno(self) -> int:
        """Give what the loop is to watch."""

    def send(self, outgoing: Pieces) -> None:
        """Take a turn's bytes at most, and advance by them."""

    def receive(self, most: int) -> tuple[bytes, bool]:
        """Give bytes, none at the end; and whether more may be here."""

    def receive_into(self, targets: list[memoryview]) -> tuple[int, bool]:
        """Fill the beginning of what there is; give how many bytes, 0 at the end, and whether more may be here."""

    def close(self) -> None:
        """Close the socket."""


class _Plain:
    """A socket without TLS."""

    __slots__ = ("_sock", "turn", "unsent")

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.turn = 256 << 10
        self.unsent = False

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, outgoing: Pieces) -> None:
        budget = self.turn
        while outgoing.left and budget > 0:
            pieces = outgoing.upcoming(budget, _PIECES)
            n = self._sock.sendmsg(pieces, (), socket.MSG_NOSIGNAL)
            outgoing.advance(n)
            budget -= max(n, len(pieces) * PIECE)

    def receive(self, most: int) -> tuple[bytes, bool]:
        return self._sock.recv(most), True

    def receive_into(self, targets: list[memoryview]) -> tuple[int, bool]:
        if len(targets) == 1:
            return self._sock.recv_into(targets[0]), True
        return self._sock.recvmsg_into(targets)[0], True

    def close(self) -> None:
        self._sock.close()


class _Python:
    """TLS by Python's `ssl`: a record a call."""

    __slots__ = ("_sock", "turn", "unsent")

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self._sock = sock
        self.turn = 64 << 10
        self.unsent = False

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, outgoing: Pieces) -> None:
        """Send records; what did not go is given again, as it was, as OpenSSL demands."""
        budget = self.turn
        self.unsent = False
        while outgoing.left and budget > 0:
            pieces = outgoing.upcoming(_RECORD, _PIECES)
            try:
                n = self._sock.send(pieces[0] if len(pieces) == 1 else b"".join(pieces))
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
                raise BlockingIOError from error
            outgoing.advance(n)
            budget -= max(n, len(pieces) * PIECE)

    def receive(self, most: int) -> tuple[bytes, bool]:
        try:
            return self._sock.recv(most), True
        except ssl.SSLWantReadError as error:
            raise BlockingIOError from error
        except ssl.SSLWantWriteError as error:
            self.unsent = True
            raise BlockingIOError from error

    def receive_into(self, targets: list[memoryview]) -> tuple[int, bool]:
        try:
            return self._sock.recv_into(targets[0]), True
        except ssl.SSLWantReadError as error:
            raise BlockingIOError from error
        except ssl.SSLWantWriteError as error:
            self.unsent = True
            raise BlockingIOError from error

    def close(self) -> None:
        self._sock.close()


class _Native:
    """TLS natively, on a connection of Python's `ssl`: all records of a turn by one call, without the GIL."""

    __slots__ = ("_records", "_sock", "turn")

    def __init__(self, sock: ssl.SSLSocket, records: tls.Records) -> None:
        self._sock = sock
        self._records = records
        self.turn = 256 << 10

    @property
    def unsent(self) -> bool:
        return self._records.unsent

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, outgoing: Pieces) -> None:
        budget = self.turn
        while True:
            pieces = outgoing.upcoming(budget, _PIECES)
            n = self._records.write(pieces)
            outgoing.advance(n)
            budget -= max(n, len(pieces) * PIECE)
            if not outgoing.left or budget <= 0 or self._records.unsent:
                return

    def receive(self, most: int) -> tuple[bytes, bool]:
        data = self._records.read(most)
        return data, len(data) == most or self._records.over

    def receive_into(self, targets: list[memoryview]) -> tuple[int, bool]:
        n = self._records.read_into(targets)
        return n, n == sum([target.nbytes for target in targets]) or self._records.over

    def close(self) -> None:
        self._records.close()
        self._sock.close()


def plain(sock: socket.socket) -> Stream:
    """Send and receive bytes as they are, over a connected socket that does not block and is owned from now on."""
    return _Plain(sock)


async def encrypt(sock: socket.socket, context: ssl.SSLContext, host: str) -> Stream:
    """Agree on TLS over a connected socket, which is owned from now on, with the server of this name.

    Raises
    ------
    ssl.SSLError
        It is not agreed on.
    OSError
        The connection ended or broke.
    """
    encrypted = context.wrap_socket(
        sock, server_hostname=host, do_handshake_on_connect=False, suppress_ragged_eofs=False
    )
    try:
        records = tls.records_of(encrypted)
        while True:
            try:
                encrypted.do_handshake()
            except ssl.SSLWantReadError:
                await _sockets.readable(encrypted)
            except ssl.SSLWantWriteError:
                await _sockets.writable(encrypted)
            else:
                break
        if records is None:
            return _Python(encrypted)
        records.begin()
        return _Native(encrypted, records)
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError) as error:
        encrypted.close()
        raise ConnectionResetError("the connection was closed before TLS was agreed on") from error
    except BaseException:
        encrypted.close()
        raise
