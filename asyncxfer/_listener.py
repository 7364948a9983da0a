"""A listening socket, and the strangers that have connected to it and not yet said who they are.

Strangers are few and have little time: beyond a bound the one that has waited longest has to go. So what they do costs
little, and those who have been let in do not notice. How they are greeted is not known here.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import Any

from . import _sockets
from ._address import Address, Listening, is_loopback
from ._errors import ConfigError, XferError

__all__ = ["Listener", "bind"]

_BURST = 16  # connections a turn of the loop
_REST = 0.1  # seconds, when the process or the system is out of descriptors
_STRANGERS = 256
_BACKLOG = 1024


async def bind(listening: Listening, *, beyond_host: bool) -> tuple[socket.socket, str]:
    """Open a TCP listener: the socket, and the address to tell others.

    Parameters
    ----------
    listening : Listening
    beyond_host : bool
        Whether it may be reached from other hosts.

    Raises
    ------
    ConfigError
        It cannot be bound, or may not.
    """
    wanted = listening.bind
    try:
        family, place = (await _sockets.resolve(wanted))[0]
    except OSError as error:
        raise ConfigError(f"listen address '{wanted}': {wanted.host!r} has no address: {error}") from error
    if not beyond_host and not is_loopback(str(place[0])):
        raise ConfigError(
            f"listen address '{wanted}' can be reached from other hosts, and anyone there would be let in; give "
            "Agent(credentials=...), or set configuration key open_listener where the network itself is trusted"
        )
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(place)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigError(f"listen address '{wanted}' cannot be bound: {error.strerror or error}") from error
    host, port, *_ = sock.getsockname()
    return sock, str(listening.seen(Address(host, port)))


class Listener:
    """One listening socket.

    Parameters
    ----------
    sock : socket
        Listening; owned from now on.
    greet : callable
        Finds out who a connection is, and takes it over; when it raises, the connection is closed.
    patience : float, seconds
        How long that may take.
    """

    def __init__(
        self, sock: socket.socket, greet: Callable[[socket.socket], Coroutine[Any, Any, None]], patience: float
    ) -> None:
        self._sock = sock
        self._greet = greet
        self._patience = patience
        self._loop = asyncio.get_running_loop()
        self._strangers: dict[asyncio.Task[None], socket.socket] = {}  # in the order in which they came
        self._leaving: set[asyncio.Task[None]] = set()
        self._resting: asyncio.Handle | None = None
        self._crowded = False

    def start(self) -> None:
        """Accept from now on."""
        self._resting = None
        self._loop.add_reader(self._sock, self._accept)

    def _accept(self) -> None:
        for _ in range(_BURST):
            try:
                sock, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:
                self._rest(error)
                return
            self._crowded = False
            sock.setblocking(False)
            if len(self._strangers) >= _STRANGERS:
                self._drop_oldest()
            task = self._loop.create_task(self._meet(sock))
            self._strangers[task] = sock
            task.add_done_callback(self._done)

    def _rest(self, error: OSError) -> None:
        """Out of descriptors: let a stranger go, and try again in a moment; until then connections wait."""
        if not self._crowded:
            self._crowded = True
            self._loop.call_exception_handler({"message": "a connection could not be accepted", "exception": error})
        if self._strangers:
            self._drop_oldest()
        self._loop.remove_reader(self._sock)
        self._resting = self._loop.call_later(_REST, self.start)

    def _drop_oldest(self) -> None:
        task = next(iter(self._strangers))
        del self._strangers[task]
        self._leaving.add(task)
        task.cancel()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._strangers.pop(task, None)
        self._leaving.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._loop.call_exception_handler({"message": "greeting a connection failed", "exception": error})

    async def _meet(self, sock: socket.socket) -> None:
        try:
            async with asyncio.timeout(self._patience):
                await self._greet(sock)
        except (OSError, XferError):
            sock.close()  # a stranger that does not know the way in is no news
        except BaseException:
            sock.close()
            raise

    async def aclose(self) -> None:
        """Stop listening, and send the strangers away."""
        if self._resting is not None:
            self._resting.cancel()
        self._loop.remove_reader(self._sock)
        self._sock.close()
        while self._strangers:
            self._drop_oldest()
        if self._leaving:
            await asyncio.wait(self._leaving)

    def drop(self) -> None:
        """In a forked child: let go of the sockets."""
        self._sock.close()
        for sock in self._strangers.values():
            sock.close()
