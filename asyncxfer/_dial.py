"""Making connections over TCP: the preface, encryption, and who is at the other end.

It knows one address at a time; which to try, how often and what for is decided elsewhere.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from . import _sockets
from ._address import Address
from ._config import Config
from ._data import Asked, Sealing, Wire, ask
from ._errors import PeerLostError, TransferTimeout
from ._preface import PREFACE_BYTES, Kind, Preface, Status, check_answer
from ._stream import StreamChannel, Tls
from .abc import Stream

if TYPE_CHECKING:
    from ._credentials import Credentials

__all__ = ["Dialler"]

_CROWDED_PAUSE = 0.05  # seconds


class Dialler:
    """Connects to agents over TCP, as one agent.

    Parameters
    ----------
    credentials : Credentials or None
    sealing : Sealing or None
        The same, for native TLS.
    config : Config
    """

    def __init__(self, credentials: Credentials | None, sealing: Sealing | None, config: Config) -> None:
        self._credentials = credentials
        self._sealing = sealing
        self._config = config

    async def control(self, address: Address, agent: str) -> StreamChannel:
        """Make a control connection, on which nothing has been said yet.

        Parameters
        ----------
        address : Address
        agent : str
            The agent that has to be there, if certificates can tell.

        Raises
        ------
        PeerLostError
            Nobody answers there (caused by ConnectionRefusedError where no agent listens), or it is somebody else.
        TransferTimeout
            It took too long.
        """
        credentials = self._credentials
        async with self._connected(address, Preface(Kind.CONTROL, tls=credentials is not None)) as sock:
            tls = None
            if credentials is not None:
                tls = Tls(credentials.client(), server=False)
                await tls.handshake(sock)
                credentials.check_name(tls.certificate, agent)
            return StreamChannel(sock, tls, _ignore, _ignore)

    async def data(self, address: Address, agent: str, asked: Asked, secret: bytes) -> Stream:
        """Make a data connection of a session, for a backend.

        Raises
        ------
        PeerLostError
            Nobody answers there, or it does not know the session.
        TransferTimeout
            It took too long.
        BackendError
            It cannot be encrypted.
        """
        sealing = self._sealing if self._config.encrypt_data else None
        async with self._connected(address, Preface(Kind.DATA, tls=sealing is not None)) as sock:
            connection = None if sealing is None else await sealing.handshake(sock, server=False)
            try:
                if sealing is not None and connection is not None:
                    sealing.check_name(connection, agent)
                await ask(Wire(sock, connection), asked, secret)
            except BaseException:
                if connection is not None:
                    connection.close()
                raise
            _sockets.be_patient(sock)
            return Stream(sock.detach(), asked.number, connection)

    @asynccontextmanager
    async def _connected(self, address: Address, preface: Preface) -> AsyncIterator[socket.socket]:
        """Connect; what follows inside has the rest of the time, and closes the connection when it raises."""
        patience = self._config.handshake_timeout
        sock: socket.socket | None = None
        try:
            async with asyncio.timeout(patience):
                sock = await self._accepted(address, preface)
                yield sock
        except BaseException as error:
            if sock is not None:
                sock.close()
            if isinstance(error, TimeoutError) and not isinstance(error, TransferTimeout):
                raise TransferTimeout(
                    f"{address} did not answer in {patience} s (configuration key handshake_timeout)"
                ) from error
            if isinstance(error, OSError) and not isinstance(error, PeerLostError):
                raise PeerLostError(f"{address}: {error.strerror or error}") from error
            if isinstance(error, PeerLostError):
                raise PeerLostError(f"{address}: {error}") from error
            raise

    async def _accepted(self, address: Address, preface: Preface) -> socket.socket:
        while True:
            sock = await _sockets.connect(address, self._config.lost_after / 2)
            try:
                await _sockets.write_all(sock, preface.encode())
                if check_answer(await _sockets.read_exactly(sock, PREFACE_BYTES)) is Status.GO_ON:
                    return sock
            except BaseException:
                sock.close()
                raise
            sock.close()
            await asyncio.sleep(_CROWDED_PAUSE * (1 + random.random()))  # noqa: S311 - no secret


def _ignore(*_: object) -> None:
    """Nobody follows a channel that has just been made."""
