"""A Unix socket of whole frames between two agents of one host: sending, receiving, file descriptors, credentials.

SOCK_SEQPACKET keeps frames whole whoever sends them, so native threads write notifications to the same socket without
a lock. Names are random and abstract: nothing stays behind when a process is killed. Only processes of the same user
are talked to. What frames mean is not known here.
"""

from __future__ import annotations

import array
import asyncio
import fcntl
import os
import secrets
import socket
import struct
import termios
from collections import deque
from collections.abc import Callable, Sequence

from ._errors import MetadataError, PeerLostError
from ._metadata import MAX_FRAME_BYTES

__all__ = ["Channel", "Credentials", "connect", "listen"]

_SCHEME = "unix:@"
_MAX_FDS = 253
_BURST = 32  # frames a turn of the loop
_SO_PEERPIDFD = 77  # Linux 6.5; not yet in the socket module


class Credentials:
    """Who is at the other end, by the kernel's word."""

    def __init__(self, sock: socket.socket) -> None:
        self.pid, self.uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))

    def check(self) -> None:
        """Raise PeerLostError when it is another user."""
        if self.uid != os.geteuid():
            raise PeerLostError(
                f"process {self.pid} at the other end belongs to user {self.uid}, this one to {os.geteuid()}; "
                "agents of one host talk to their own user's processes only"
            )


def listen() -> tuple[socket.socket, str]:
    """Open a listener under a random name: the socket, and the address to connect to."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    name = f"asyncxfer-{secrets.token_hex(16)}"
    sock.bind("\0" + name)
    sock.listen(1024)
    return sock, _SCHEME + name


async def connect(address: str) -> socket.socket:
    """Connect to an address from `listen`.

    Raises
    ------
    PeerLostError
        Nobody listens there, or it belongs to another user.
    """
    if not address.startswith(_SCHEME):
        raise PeerLostError(f"address {address!r} is not on this host; expected {_SCHEME}...")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        await asyncio.get_running_loop().sock_connect(sock, "\0" + address.removeprefix(_SCHEME))
        Credentials(sock).check()
    except OSError as error:
        sock.close()
        if isinstance(error, PeerLostError):
            raise
        raise PeerLostError(f"nobody answers at {address}: {error.strerror or error}") from error
    except BaseException:
        sock.close()
        raise
    return sock


class Channel:
    """One connection, watched by the running loop.

    Parameters
    ----------
    sock : socket
        Connected; owned from now on.
    on_frame : callable
        Called with each frame and the descriptors that came with it, which it owns.
    on_end : callable
        Called once, with the reason, when the other side has closed or broke the rules. Not after `close`.

    Attributes
    ----------
    heard : float, seconds
        When something was received last, by the loop's clock.
    pulse : callable or None
        Shows the other side, in memory that both see, that this one is alive; gives a number that grows as long as
        the other is. None: there is no such memory.
    where : str
        What is at the other end, for messages.
    offended : bool
        Whether the other side has broken the rules.
    """

    def __init__(
        self,
        sock: socket.socket,
        on_frame: Callable[[bytes, list[int]], None],
        on_end: Callable[[str], None],
    ) -> None:
        self.sock = sock
        self.credentials = Credentials(sock)
        self.where = f"process {self.credentials.pid}"
        self.offended = False
        self.pidfd = _open_pidfd(sock, self.credentials.pid)
        self._loop = asyncio.get_running_loop()
        self.heard = self._loop.time()
        self.pulse: Callable[[], int] | None = None
        self._felt = 0
        self._on_frame = on_frame
        self._on_end = on_end
        self._unsent: deque[tuple[bytes, list[int]]] = deque()
        self._reading = False
        self._dying = False
        self._ended = False
        self._buffer = bytearray(MAX_FRAME_BYTES + 1)
        self.resume()

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
        return not (self._reading or self._ended)

    def pause(self) -> None:
        """Stop receiving until `resume`, or until the other process ends; it is held up once the socket is full."""
        if self._reading and not self._dying:
            self._reading = False
            self._loop.remove_reader(self.sock)
            if self.pidfd >= 0:
                self._loop.add_reader(self.pidfd, self._died)

    def resume(self) -> None:
        """Receive again."""
        if not self._reading and not self._ended:
            self._reading = True
            if self.pidfd >= 0:
                self._loop.remove_reader(self.pidfd)
            self._loop.add_reader(self.sock, self._readable)

    def _died(self) -> None:
        self._dying = True
        self.resume()

    def _readable(self) -> None:
        for _ in range(_BURST):
            if not self._reading or not self._receive():
                return

    def _receive(self) -> bool:
        room = socket.CMSG_SPACE(_MAX_FDS * 4)
        try:
            n, ancillary, flags, _ = self.sock.recvmsg_into([self._buffer], room, socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return False
        except ConnectionResetError:
            return True  # it ended with frames of ours unread; what it had sent before is still to be had
        except OSError as error:
            self._end(f"the connection broke: {error.strerror}")
            return False
        self.heard = self._loop.time()
        fds = array.array("i")
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(data[: len(data) // 4 * 4])
        if n == 0 or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            _close_all(fds)
            self._end("the connection was closed" if n == 0 else "a frame was larger than frames can be")
            return False
        try:
            self._on_frame(bytes(memoryview(self._buffer)[:n]), list(fds))
        except MetadataError as error:
            self.offended = True
            self._end(f"it broke the protocol: {error}")
        return not self._ended

    def _end(self, why: str) -> None:
        if not self._ended:
            self.close()
            self._on_end(why)

    # -- sending

    def send(self, frame: bytes, fds: Sequence[int] = ()) -> None:
        """Send a frame and copies of descriptors, now or as soon as there is room."""
        if self._ended:
            return
        if self._unsent or not self._transmit(frame, fds):
            self._unsent.append((frame, [os.dup(fd) for fd in fds]))
            if len(self._unsent) == 1 and not self._ended:
                self._loop.add_writer(self.sock, self._writable)

    def feel(self) -> None:
        """Look whether the other side is alive, and show it that this one is, where that takes no frame."""
        if self.pulse is not None and not self._ended:
            felt = self.pulse()
            if felt != self._felt:
                self._felt, self.heard = felt, self._loop.time()

    def beat(self, frame: bytes) -> None:
        """Send a frame that says no more than that this side is alive, unless the other has something to read yet."""
        if self._ended or self._unsent:
            return
        unread = struct.unpack("i", fcntl.ioctl(self.sock, termios.TIOCOUTQ, bytes(4)))[0]
        if not unread:
            self._transmit(frame, ())

    def _transmit(self, frame: bytes, fds: Sequence[int]) -> bool:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self.sock.sendmsg([frame], rights, socket.MSG_NOSIGNAL)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            return True  # the reading side learns that the peer is gone, and says so
        return True

    def _writable(self) -> None:
        while self._unsent:
            frame, fds = self._unsent[0]
            if not self._transmit(frame, fds):
                return
            self._unsent.popleft()
            _close_all(fds)
        self._loop.remove_writer(self.sock)

    # -- ending

    def close(self) -> None:
        """Stop watching and tell the other side that this one is gone. `release` closes the descriptors."""
        if self._ended:
            return
        self._ended = True
        self._reading = False
        self.pulse = None
        self._loop.remove_reader(self.sock)
        if self.pidfd >= 0:
            self._loop.remove_reader(self.pidfd)
        if self._unsent:
            self._loop.remove_writer(self.sock)
            for _, fds in self._unsent:
                _close_all(fds)
            self._unsent.clear()
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the other side was first

    def release(self) -> None:
        """Close the descriptors, once native code no longer uses them."""
        self.close()
        self.sock.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    def drop(self) -> None:
        """In a forked child: let go of the descriptors without a word to the peer, whose connection is the parent's."""
        self._ended = True
        self.release()


def _open_pidfd(sock: socket.socket, pid: int) -> int:
    """A descriptor of the peer's process, from the socket where the kernel can; -1 where there is none."""
    try:
        fd = struct.unpack("i", sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4))[0]
        os.set_inheritable(fd, False)
        return int(fd)
    except OSError:
        try:
            return os.pidfd_open(pid)
        except OSError:
            return -1


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
