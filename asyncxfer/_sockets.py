"""Steps on non-blocking TCP sockets, awaited: connect, read so many bytes, write them all; and how they are set up.

It knows no frames, no encryption and no agents.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

from ._address import Address

__all__ = ["be_patient", "connect", "prepare", "read_exactly", "readable", "resolve", "writable", "write_all"]


async def readable(sock: socket.socket) -> None:
    """Wait until there is something to read."""
    loop = asyncio.get_running_loop()
    await _ready(sock, loop.add_reader, loop.remove_reader)


async def writable(sock: socket.socket) -> None:
    """Wait until there is room."""
    loop = asyncio.get_running_loop()
    await _ready(sock, loop.add_writer, loop.remove_writer)


async def _ready(sock: socket.socket, add: Callable[..., object], remove: Callable[..., object]) -> None:
    waiter = asyncio.get_running_loop().create_future()
    add(sock, _resolve, waiter)
    try:
        await waiter
    finally:
        remove(sock)


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


async def read_exactly(sock: socket.socket, nbytes: int) -> bytes:
    """Read so many bytes, and not one more.

    Raises
    ------
    OSError
        The connection broke or ended before.
    """
    data = b""
    while len(data) < nbytes:
        try:
            piece = sock.recv(nbytes - len(data))
        except (BlockingIOError, InterruptedError):
            await readable(sock)
            continue
        if not piece:
            raise ConnectionResetError("the connection was closed")
        data += piece
    return data


async def write_all(sock: socket.socket, data: bytes) -> None:
    """Write all of it.

    Raises
    ------
    OSError
        The connection broke.
    """
    while data:
        try:
            data = data[sock.send(data, socket.MSG_NOSIGNAL) :]
        except (BlockingIOError, InterruptedError):
            await writable(sock)


def prepare(sock: socket.socket, patience: float) -> None:
    """Set up a connection: small frames leave at once, and a host that no longer answers is found within `patience`."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    interval = max(1, min(int(patience / 4), 60))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, interval)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, int(patience * 1000)))


def be_patient(sock: socket.socket) -> None:
    """Let a peer that is stopped leave as much unread as it likes: whether its host is gone is found elsewhere."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 0)


async def resolve(address: Address) -> list[tuple[int, Any]]:
    """Families and socket addresses of a host, in the system's order.

    Raises
    ------
    OSError
        There is no such host.
    """
    try:
        found = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
        )
    except socket.gaierror:
        ask = partial(socket.getaddrinfo, address.host, address.port, type=socket.SOCK_STREAM)
        found = await asyncio.get_running_loop().run_in_executor(None, ask)
    return [(int(family), place) for family, _, _, _, place in found]


async def _connect(sock: socket.socket, place: Any) -> None:
    code = sock.connect_ex(place)
    if code == errno.EINPROGRESS:
        await writable(sock)
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise OSError(code, os.strerror(code))


async def connect(address: Address, patience: float) -> socket.socket:
    """Connect to the first of a host's addresses that answers.

    Raises
    ------
    OSError
        None does.
    """
    failure: OSError = OSError(f"{address.host} has no address")
    for family, place in await resolve(address):
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            prepare(sock, patience)
            await _connect(sock, place)
        except OSError as error:
            sock.close()
            failure = error
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise failure
