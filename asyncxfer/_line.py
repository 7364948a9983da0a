"""The line to one peer: the first connection to it, those that replace it when it breaks, and those for data.

A peer of this host is reached over a Unix socket if that can be, any other over TCP. What a connection carries, and
what it means that it has ended, is not known here.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator

from . import _address, _channel, _proof
from ._address import Address
from ._channel import Channel
from ._config import Config
from ._data import CONNECTIONS, Asked
from ._dial import Dialler
from ._errors import BackendError, ConfigError, PeerLostError, TransferTimeout
from ._letters import Letters
from ._metadata import AgentMetadata, Welcome
from ._outgoing import Outgoing
from .abc import Stream

__all__ = ["GoneError", "Line"]

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0  # seconds, between attempts to connect again


class GoneError(PeerLostError):
    """The peer is not there any more: there is no use in trying again."""


class Line:
    """How this agent reaches one start of another.

    Parameters
    ----------
    me : AgentMetadata
    to : AgentMetadata
    dialler : Dialler
    config : Config

    Attributes
    ----------
    outgoing : Outgoing
        The connection of now, or that broke last.
    letters : Letters
        Notifications, where they go over a network.
    redialling : asyncio.Task or None
    """

    outgoing: Outgoing

    def __init__(self, me: AgentMetadata, to: AgentMetadata, dialler: Dialler, config: Config) -> None:
        self.letters = Letters()
        self.redialling: asyncio.Task[None] | None = None
        self._me = me
        self._to = to
        self._dialler = dialler
        self._config = config
        self._session = b""
        self._secret = b""
        self._attempt = 0
        self._over: str | None = None
        self._far = [address for text in to.addresses if (address := _parsed(text)) is not None]

    def __str__(self) -> str:
        return f"agent {self._to.name!r}, generation {self._to.generation},"

    @property
    def networked(self) -> bool:
        """Whether the peer has an address on a network."""
        return bool(self._far)

    # -- control

    async def connect(self) -> Welcome:
        """Make the first connection; what the peer said to it.

        Raises
        ------
        PeerLostError
            It cannot be reached.
        TransferTimeout
            It did not answer.
        """
        if not self._to.addresses:
            raise PeerLostError(f"{self} has no address")
        tried: list[str] = []
        failure: Exception | None = None
        for address in self._ways():
            try:
                return await self._try(address)
            except (PeerLostError, TransferTimeout) as error:
                if isinstance(error, TransferTimeout) and isinstance(address, str):
                    raise  # it is there: it would not answer elsewhere either
                failure = error
                tried.append(str(error))
        why = "; ".join(tried) or f"it is on another host and has no address there, only {self._to.addresses}"
        if isinstance(failure, TransferTimeout):
            raise TransferTimeout(f"{self} cannot be reached: {why}") from failure
        raise PeerLostError(
            f"{self} has ended or restarted since its metadata was made, or cannot be reached from here: {why}"
        ) from failure

    def _ways(self) -> Iterator[str | Address]:
        """Addresses in the order in which they are tried; str: of this host."""
        if self._to.host == self._me.host and self._config.unix_socket:
            yield from (text for text in self._to.addresses if _parsed(text) is None)
        yield from self._far

    async def _try(self, address: str | Address) -> Welcome:
        if isinstance(address, str):
            outgoing = Outgoing(Channel(await _channel.connect(address), _ignore, _ignore))
        else:
            outgoing = Outgoing(await self._dialler.control(address, self._to.name))
        try:
            welcome = await outgoing.greet(self._me, self._config.handshake_timeout)
            self._check(welcome)
        except BaseException:
            outgoing.abandon()
            raise
        self._prefer(address)
        self._session, self._secret = welcome.session, welcome.secret
        self.outgoing = outgoing
        return welcome

    def _check(self, welcome: Welcome) -> None:
        if (welcome.name, welcome.generation) != (self._to.name, self._to.generation):
            raise GoneError(
                f"{self} is gone: {welcome.name!r}, generation {welcome.generation}, answers in its place"
            )  # fmt: skip

    def _prefer(self, address: str | Address) -> None:
        if isinstance(address, Address):
            self._far.remove(address)
            self._far.insert(0, address)

    async def again(self, why: str) -> None:
        """Connect again, after the connection broke, until the peer answers or has been unheard for too long.

        Parameters
        ----------
        why : str
            What ended the connection.

        Raises
        ------
        PeerLostError
            It is gone, or does not answer any more.
        """
        loop = asyncio.get_running_loop()
        broken = self.outgoing
        broken.channel.release()
        until = max(broken.channel.heard + self._config.lost_after, loop.time() + self._config.handshake_timeout)
        pause, last = _FIRST_PAUSE, ""
        try:
            async with asyncio.timeout_at(until):
                while True:
                    try:
                        await self._resume()
                        return
                    except GoneError as error:
                        raise GoneError(f"{why}, and {error}") from error
                    except (PeerLostError, TransferTimeout) as error:
                        last = f"; last: {error}"
                    await asyncio.sleep(pause * (0.5 + random.random() / 2))  # noqa: S311 - no secret
                    pause = min(2 * pause, _LONGEST_PAUSE)
        except TimeoutError as error:
            raise PeerLostError(
                f"{why}, and it could not be reached again within {self._config.lost_after:g} s of when it was heard "
                f"last (configuration key lost_after){last}"
            ) from error

    async def _resume(self) -> None:
        """Try each address once."""
        failure: Exception | None = None
        refused = []
        for address in self._far:
            try:
                await self._resume_at(address)
            except GoneError:
                raise
            except (PeerLostError, TransferTimeout) as error:
                failure = error
                refused.append(isinstance(error.__cause__, ConnectionRefusedError))
            else:
                self._prefer(address)
                return
        if all(refused):
            raise GoneError(f"nobody listens there any more: {failure}") from failure
        assert failure is not None
        raise failure

    async def _resume_at(self, address: Address) -> None:
        outgoing = Outgoing(await self._dialler.control(address, self._to.name))
        self._attempt += 1
        proof = _proof.resume(self._secret, self._session, self._attempt)
        try:
            welcome = await outgoing.greet(
                self._me, self._config.handshake_timeout, resume=self._session, attempt=self._attempt, proof=proof
            )
            self._check(welcome)
        except BaseException as error:
            outgoing.discard()
            outgoing.channel.release()
            if outgoing.refused:
                raise GoneError(str(error)) from error
            raise
        self.outgoing = outgoing

    # -- data

    async def data(self, backend: str, index: int) -> Stream:
        """Make a data connection; this is `PeerInfo.dial` of a backend.

        Raises
        ------
        PeerLostError
            The peer is gone, or cannot be reached now.
        BackendError
            It cannot be encrypted.
        """
        if not 0 <= index < CONNECTIONS:
            raise BackendError(f"data connection {index}; expected an index from 0 to {CONNECTIONS - 1}")
        failure: Exception | None = None
        for address in list(self._far):
            if self._over is not None:
                break
            try:
                asked = Asked(self._session, index, backend)
                return await self._dialler.data(address, self._to.name, asked, self._secret)
            except (PeerLostError, TransferTimeout) as error:
                failure = error
        raise PeerLostError(f"{self} takes no data connection: {self._over or failure}") from failure

    # -- the end

    async def close(self, why: str) -> None:
        """Stop connecting again."""
        self.end(why)
        if self.redialling is not None and self.redialling is not asyncio.current_task():
            await asyncio.wait([self.redialling])

    def end(self, why: str) -> None:
        """Make no connections any more; what was not acknowledged is lost."""
        self._over = why
        self.letters.fail()
        if self.redialling is not None and self.redialling is not asyncio.current_task():
            self.redialling.cancel()


def _parsed(text: str) -> Address | None:
    try:
        return _address.parse(text)
    except ConfigError:
        return None  # an address of this host, or of a kind that another version knows


def _ignore(*_: object) -> None:
    """Nobody follows a channel that has just been made."""
