"""Data connections: how a TCP connection becomes one of a backend's, of a session that exists.

Both sides prove that they know the secret of the session, over native TLS where there are credentials, since native
threads go on with it. Who connects where, and what flows afterwards, is not known here.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from . import _proof, _sockets
from ._errors import BackendError, PeerLostError

if TYPE_CHECKING:
    from ._credentials import Credentials
    from ._fast.tls import Connection, Context

__all__ = ["CONNECTIONS", "Asked", "Sealing", "Wire", "accept", "answer", "ask"]

_HEAD = struct.Struct(f">{_proof.SESSION_BYTES}s{_proof.NONCE_BYTES}sHB")  # and the backend's name
_WELCOME = b"\0"
CONNECTIONS = 16  # of a session, for each backend: what they cost the target has a bound

T = TypeVar("T")


class Sealing:
    """What native TLS needs of an agent's credentials, made when it is first used.

    Parameters
    ----------
    credentials : Credentials
    """

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials
        self._context: Context | None = None

    async def handshake(self, sock: socket.socket, *, server: bool) -> Connection:
        """Encrypt a connection, and verify each other's certificates.

        Raises
        ------
        BackendError
            There is no native TLS here.
        OSError
            The handshake failed, or the connection broke.
        """
        try:
            from ._fast import tls
        except ImportError as error:
            raise BackendError(
                f"this build has no native TLS ({error}); set configuration key encrypt_data to False on both sides, "
                "or install a build that has it"
            ) from error
        if self._context is None:
            self._context = tls.Context(*self._credentials.pem())
        connection = tls.Connection(self._context, sock.fileno(), server=server)
        try:
            while (state := _step(connection.handshake)) != tls.DONE:
                await (_sockets.readable if state == tls.WANT_READ else _sockets.writable)(sock)
        except BaseException:
            connection.close()
            raise
        return connection

    def check_name(self, connection: Connection, agent: str) -> None:
        """Raise PeerLostError when the certificate at the other end does not speak for an agent."""
        self._credentials.check_name(connection.peer_certificate(), agent)


class Wire:
    """Bytes both ways, encrypted or not."""

    def __init__(self, sock: socket.socket, tls: Connection | None) -> None:
        self.sock = sock
        self.tls = tls

    async def read(self, nbytes: int) -> bytes:
        """Read so many bytes, and not one more; OSError when it ends before."""
        if self.tls is None:
            return await _sockets.read_exactly(self.sock, nbytes)
        data = b""
        while len(data) < nbytes:
            try:
                piece = _step(partial(self.tls.read, nbytes - len(data)))
            except BlockingIOError:
                await _sockets.readable(self.sock)
                continue
            if not piece:
                raise ConnectionResetError("the connection was closed")
            data += piece
        return data

    async def write(self, data: bytes) -> None:
        """Write all of it; OSError when the connection broke."""
        if self.tls is None:
            await _sockets.write_all(self.sock, data)
            return
        while data:
            try:
                data = data[_step(partial(self.tls.write, data)) :]
            except BlockingIOError:
                await _sockets.writable(self.sock)


def _step(call: Callable[[], T]) -> T:
    """Do something with a native connection; when it fails, the connection broke, and the backend may have another."""
    try:
        return call()
    except BackendError as error:
        raise OSError(str(error)) from error


class Asked(NamedTuple):
    """What a data connection is for.

    Attributes
    ----------
    session : (16,) bytes
    number : int
        Which of the backend's connections: `Stream.index`.
    backend : str
    """

    session: bytes
    number: int
    backend: str


async def ask(wire: Wire, asked: Asked, secret: bytes) -> None:
    """Open a data connection, as the side that has connected.

    Raises
    ------
    PeerLostError
        The other side does not know the session, or has no such backend.
    OSError
        The connection broke.
    """
    name = asked.backend.encode()
    nonce = os.urandom(_proof.NONCE_BYTES)
    await wire.write(_HEAD.pack(asked.session, nonce, asked.number, len(name)) + name)
    theirs = await wire.read(_proof.NONCE_BYTES + _proof.PROOF_BYTES)
    nonces = nonce + theirs[: _proof.NONCE_BYTES]
    expected = _proof.data(secret, b"server", nonces, asked.number, asked.backend)
    if not _proof.matches(theirs[_proof.NONCE_BYTES :], expected):
        raise PeerLostError("what answers there does not know the secret of this connection")
    await wire.write(_proof.data(secret, b"client", nonces, asked.number, asked.backend))
    if await wire.read(len(_WELCOME)) != _WELCOME:
        raise PeerLostError("it took the connection and said something else than that")


async def answer(wire: Wire, secret_of: Callable[[Asked], bytes]) -> Asked:
    """Answer to `ask`, as the side that was connected to, up to `accept`.

    Parameters
    ----------
    wire : Wire
    secret_of : callable
        Gives the secret of a session, or raises PeerLostError.

    Raises
    ------
    PeerLostError
        The session is not known, has no connection of that number, or the other side does not know its secret.
    OSError
        The connection broke.
    """
    session, nonce, index, length = _HEAD.unpack(await wire.read(_HEAD.size))
    try:
        asked = Asked(session, index, (await wire.read(length)).decode())
    except UnicodeDecodeError as error:
        raise PeerLostError(f"a data connection for no backend: {error}") from error
    if index >= CONNECTIONS:
        raise PeerLostError(f"data connection {index}; there are {CONNECTIONS} of a session")
    secret = secret_of(asked)
    own = os.urandom(_proof.NONCE_BYTES)
    await wire.write(own + _proof.data(secret, b"server", nonce + own, index, asked.backend))
    proof = await wire.read(_proof.PROOF_BYTES)
    if not _proof.matches(proof, _proof.data(secret, b"client", nonce + own, index, asked.backend)):
        raise PeerLostError(f"a data connection for {asked.backend!r} that does not know the secret of its session")
    return asked


async def accept(wire: Wire) -> None:
    """Tell the side that asked that it has the connection; what follows is the backend's."""
    await wire.write(_WELCOME)
