"""A second process for tests: it runs an agent with regions, and does what it is told over a socket pair.

`Server` is one warm interpreter that forks these processes, so that one costs milliseconds; they are its children, not
pytest's, and end with it. `Process` is the test's view of one: commands are the public methods of `Puppet`, metadata
bytes travel as their results, and errors come back as they were raised. What is tested is not known here.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import hashlib
import importlib
import mmap
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from conftest import LOOPS, Snapshot
from hosts import Host, enter

import asyncxfer
from asyncxfer import Agent, Done, Notification, Peer, Region, Transfer

__all__ = ["Kind", "Process", "Server", "make_region", "moving", "pattern"]

Kind = Literal["mapped", "ordinary", "file"]
Bytes = npt.NDArray[np.uint8]
#: The name of a class of asyncxfer and what it is made with: ("Certificates", certificate, key, authorities).
Credentials = tuple[Any, ...]

_FRAME = 1 << 18
_PR_SET_PDEATHSIG = 1


# ---- what both sides use ------------------------------------------------------------------------------------------


def pattern(seed: int, shape: tuple[int, ...]) -> Bytes:
    """Bytes in which no two words are alike, nor those of two seeds."""
    words = np.arange(1, int(np.prod(shape)) // 8 + 2, dtype=np.uint64)
    words *= np.uint64(0x9E3779B97F4A7C15)
    words ^= np.uint64(seed * 0x100000001B3)
    return words.view(np.uint8)[: int(np.prod(shape))].reshape(shape)


async def make_region(
    agent: Agent, name: str, kind: Kind, shape: tuple[int, ...], *, path: str | None = None
) -> tuple[Region, Bytes]:
    """A region of zeros, and its memory."""
    if kind == "mapped":
        region = await agent.allocate(shape, np.uint8, name=name)
        assert region.array is not None
        return region, region.array
    if kind == "file":
        assert path is not None
        array = np.frombuffer(map_file(path, int(np.prod(shape))), np.uint8).reshape(shape)
    else:
        array = np.zeros(shape, np.uint8)
    return await agent.register(array, name=name), array


def map_file(path: str, nbytes: int) -> mmap.mmap:
    """A shared mapping of a file, which is made, or made as large as that, if need be."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if os.fstat(fd).st_size < nbytes:
            os.ftruncate(fd, nbytes)
        return mmap.mmap(fd, nbytes)
    finally:
        os.close(fd)


async def moving(transfer: Transfer) -> None:
    """Wait until the first row has been moved."""
    async with contextlib.aclosing(transfer.__aiter__()) as rows:  # type: ignore[type-var]
        await anext(rows)


# ---- the second process -------------------------------------------------------------------------------------------


@dataclass
class _Held:
    region: Region
    array: Bytes


class Puppet:
    """One agent and its regions; every public method is a command."""

    def __init__(self) -> None:
        gc.collect()
        self._before = Snapshot.take()
        self._agent: Agent | None = None
        self._held: dict[str, _Held] = {}
        self._peers: dict[str, Peer] = {}
        self._transfers: dict[str, Transfer] = {}

    @property
    def _started(self) -> Agent:
        assert self._agent is not None
        return self._agent

    async def start(
        self, name: str, config: dict[str, Any] | None = None, *, credentials: Credentials | None = None, **options: Any
    ) -> bytes:
        """Start an agent with `options` as `Agent` takes them; its metadata."""
        if credentials is not None:
            kind, *arguments = credentials
            options["credentials"] = getattr(asyncxfer, kind)(*arguments)
        self._agent = await Agent(name, config=config, **options).start()
        return self._agent.metadata()

    async def region(
        self, name: str, kind: Kind, shape: tuple[int, ...], *, seed: int | None = None, path: str | None = None
    ) -> None:
        """Make a region, of zeros or with a pattern in it."""
        region, array = await make_region(self._started, name, kind, shape, path=path)
        self._held[name] = _Held(region, array)
        if seed is not None:
            array[:] = pattern(seed, shape)

    async def fill(self, name: str, seed: int) -> None:
        """Overwrite a region, open or closed, with a pattern."""
        array = self._held[name].array
        array[:] = pattern(seed, array.shape)

    async def matches(self, name: str, seed: int) -> bool:
        """Whether a region holds that pattern."""
        array = self._held[name].array
        return bool((array == pattern(seed, array.shape)).all())

    async def close(self, name: str) -> int:
        """Close a region; a checksum of its memory from right after."""
        await self._held[name].region.aclose()
        return await self.checksum(name)

    async def checksum(self, name: str) -> int:
        """Sum of the words of a region, open or closed."""
        return int(self._held[name].array.view(np.uint64).sum(dtype=np.uint64))

    async def truncate(self, path: str) -> None:
        """Cut a file to nothing."""
        os.truncate(path, 0)

    async def connect(self, metadata: bytes) -> str:
        """Connect to an agent by its metadata; its name."""
        peer = await self._started.connect(metadata)
        self._peers[peer.name] = peer
        return peer.name

    async def begin(
        self, key: str, op: str, local: str, rows: list[int], remote: str, remote_rows: list[int], *, peer: str,
        wait: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        """Post a transfer between rows of two regions; with `wait`, return when its first bytes have been moved."""
        there = await self._peers[peer].region(remote, timeout=10)
        call = self._started.put if op == "put" else self._started.get
        self._transfers[key] = call(self._held[local].region[rows], there[remote_rows], **options)
        if wait:
            await moving(self._transfers[key])

    async def outcome(self, key: str) -> Done:
        """Await a transfer that was begun."""
        return await self._transfers.pop(key)

    async def cancel(self, key: str) -> None:
        """Cancel a transfer that was begun, and wait for its end."""
        transfer = self._transfers.pop(key)
        transfer.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await transfer

    async def notify(self, tag: bytes, peer: str) -> Done:
        """Send a bare notification."""
        return await self._peers[peer].notify(tag)

    async def flood(self, tag: bytes, count: int, *, peer: str) -> None:
        """Send many bare notifications, and do not wait for any."""
        for _ in range(count):
            self._peers[peer].notify(tag)

    async def expect(self, tag: bytes, *, peer: str | None = None, timeout: float | None = None) -> Notification:
        """Wait for a notification."""
        return await self._started.expect(tag, peer=peer, timeout=timeout)

    async def collect(self, last: bytes) -> list[bytes]:
        """Take notifications until one has this tag; the SHA-256 of the tags of all before it."""
        tags: list[bytes] = []
        async for note in self._started.notifications():
            if note.tag == last:
                return tags
            tags.append(hashlib.sha256(note.tag).digest())
        raise AssertionError("the agent was closed")

    async def check_rows(self, name: str, *, peer: str) -> list[str]:
        """Look at the row that each notification is about, as it comes, until "last"; what was wrong.

        A tag has a round's number, which every word of the row is to be, the row, how many words, and how many rounds
        were sent at once; when all these have come the peer is told to go on.
        """
        words = self._held[name].array.view(np.uint64)
        wrong, came, seen = [], 0, set()
        async for note in self._started.notifications():
            if note.tag == b"last":
                break
            number, row, count, batch = map(int, note.tag.split())
            if not (words[row, :count] == number).all():
                wrong.append(f"{note.tag!r} came before its bytes")
            if number in seen:
                wrong.append(f"{note.tag!r} came twice")
            seen.add(number)
            came += 1
            if came % batch == 0:
                came = 0
                self._peers[peer].notify(b"go on")
        return wrong

    async def cut_ucx(self) -> int:
        """Shut down UCX's connections: those over IPv4, of which the agents here have none of their own."""
        cut = 0
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if not os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                    continue
                with socket.socket(fileno=os.dup(int(fd))) as sock:
                    if sock.family is socket.AF_INET and sock.type is socket.SOCK_STREAM and sock.getpeername():
                        sock.shutdown(socket.SHUT_RDWR)
                        cut += 1
        return cut

    async def aclose(self) -> None:
        """Close the agent, and everything with it."""
        if self._agent is not None:
            await self._agent.aclose()
        self._agent = None
        self._held.clear()
        self._peers.clear()
        self._transfers.clear()

    async def left(self) -> list[str]:
        """What a closed agent has left behind in this process."""
        await asyncio.get_running_loop().shutdown_default_executor()
        left: list[str] = []
        for _ in range(200):
            gc.collect()
            left = Snapshot.take().since(self._before, frozenset())
            if not left:
                break
            await asyncio.sleep(0.01)  # what ends on its own may take a moment
        return left

    def put_unnoticed(self, local: str, remote: str, tag: bytes, *, peer: str, gate: int) -> None:
        """Hold up the loop, put one row when a byte comes on `gate`, say so there, and never come back."""
        there = self._peers[peer][remote]
        os.write(gate, b"!")
        os.read(gate, 1)
        done = self._started.put(self._held[local].region[:1], there[:1], notify=tag).done()
        os.write(gate, b"y" if done else b"n")
        signal.pause()

    def hold_interpreter(self, *, gate: int) -> None:
        """Say so on `gate`, and let no Python run in this process, in no thread, until a byte comes there."""
        os.write(gate, b"!")
        ctypes.PyDLL(None).read(gate, ctypes.create_string_buffer(1), 1)  # unlike os.read it keeps the lock
        os.close(gate)


class _Link:
    """Pickled messages over a socket of whole frames, watched by the running loop."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._loop = asyncio.get_running_loop()
        self.over = self._loop.create_future()
        self._loop.add_reader(sock, self._readable)

    def on_message(self, message: Any, fds: list[int]) -> None:
        raise NotImplementedError

    def send(self, message: Any, fds: tuple[int, ...] = ()) -> None:
        socket.send_fds(self.sock, [pickle.dumps(message)], list(fds))

    def _readable(self) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(self.sock, _FRAME, 4)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data, fds = b"", []
        if data:
            self.on_message(pickle.loads(data), list(fds))
        elif not self.over.done():
            self.close()

    def close(self) -> None:
        self._loop.remove_reader(self.sock)
        self.sock.close()
        if not self.over.done():
            self.over.set_result(None)


class _Obedience(_Link):
    """The second process's end: runs each command as a task, and answers with what comes of it."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._puppet = Puppet()
        self._tasks: set[asyncio.Task[None]] = set()

    def on_message(self, message: Any, fds: list[int]) -> None:
        number, command, args, kwargs = message
        if fds:
            getattr(self._puppet, command)(*args, gate=fds[0], **kwargs)
            return
        task = asyncio.ensure_future(self._obey(number, command, args, kwargs))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _obey(self, number: int, command: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            answer: tuple[int, bool, Any] = number, True, await getattr(self._puppet, command)(*args, **kwargs)
        except (Exception, asyncio.CancelledError) as error:
            answer = number, False, error
        with contextlib.suppress(OSError):  # the test is gone; so will this process be
            self.send(answer)


def _live(sock: socket.socket, loop_name: str, namespace: str | None) -> None:
    """The whole life of a forked process."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if namespace is not None:
        enter(namespace)

    async def main() -> None:
        await _Obedience(sock).over

    with asyncio.Runner(loop_factory=LOOPS[loop_name]) as runner:
        runner.run(main())


# ---- the server that forks them -----------------------------------------------------------------------------------


def _serve(sock: socket.socket) -> None:
    """Fork on demand, reap what has died, and tell when a process has stopped, until the test run ends."""
    children: dict[int, int] = {}  # pidfd: pid
    while True:
        ready, _, _ = select.select([sock.fileno(), *children], [], [])
        for fd in set(ready) & set(children):
            os.waitpid(children.pop(fd), 0)
            os.close(fd)
        if sock.fileno() not in ready:
            continue
        data, fds, _, _ = socket.recv_fds(sock, _FRAME, 4)
        if not data:
            return
        command, argument = pickle.loads(data)
        if command == "stopped":
            os.waitid(os.P_PID, argument, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            sock.send(b"!")
            continue
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                sock.close()
                for fd in children:
                    os.close(fd)
                _live(socket.socket(fileno=fds[0]), *argument)
                status = 0
            finally:
                os._exit(status)
        os.close(fds[0])
        pidfd = os.pidfd_open(pid)
        children[pidfd] = pid
        socket.send_fds(sock, [str(pid).encode()], [pidfd])


class Server:
    """The warm interpreter that second processes are forked from; what they will all need it imports before.

    Parameters
    ----------
    *modules : str
        Names of them.
    """

    def __init__(self, *modules: str) -> None:
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, __file__, str(theirs.fileno()), *modules]
        with theirs:
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        first, _, pidfd = self.spawn_raw("asyncio")  # answers once everything has been imported
        first.close()
        os.close(pidfd)

    def spawn_raw(self, loop_name: str, namespace: str | None = None) -> tuple[socket.socket, int, int]:
        """Fork a process, in a network namespace if one is named: a socket to it, its pid and a pidfd."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            socket.send_fds(self._sock, [pickle.dumps(("fork", (loop_name, namespace)))], [theirs.fileno()])
        data, fds, _, _ = socket.recv_fds(self._sock, 64, 1)
        if not data:
            raise RuntimeError("the server of second processes has died; its error is above")
        return ours, int(data), fds[0]

    def wait_stopped(self, pid: int) -> None:
        """Return when every thread of a process has stopped."""
        self._sock.send(pickle.dumps(("stopped", pid)))
        self._sock.recv(1)

    def close(self) -> None:
        """End it and all its processes."""
        self._sock.shutdown(socket.SHUT_RDWR)  # a forked child of this process may hold a copy
        self._sock.close()
        self._process.wait(10)


class Process(_Link):
    """A second process, on this host or on another, as a test sees it.

    It is commanded over a pair of sockets, which reaches into any network namespace and through any fault of a network.

    Attributes
    ----------
    pid : int
    """

    def __init__(self, server: Server, loop_name: str, host: Host | None = None) -> None:
        sock, self.pid, self._pidfd = server.spawn_raw(loop_name, None if host is None else host.namespace)
        super().__init__(sock)
        self._server = server
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._count = 0
        self._killed = False

    def post(self, command: str, *args: Any, **kwargs: Any) -> asyncio.Future[Any]:
        """Give a command; its outcome. Ends with ConnectionError when the process dies."""
        self._count += 1
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._answers[self._count] = answer
        self.send((self._count, command, args, kwargs))
        return answer

    async def call(self, command: str, *args: Any, **kwargs: Any) -> Any:
        """Give a command and await its outcome, for ten seconds at most."""
        async with asyncio.timeout(10):
            return await self.post(command, *args, **kwargs)

    @contextlib.contextmanager
    def in_step(self, command: str, *args: Any, **kwargs: Any) -> Iterator[socket.socket]:
        """Give a command that holds up the other process's loop; yields the socket that it steps by."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                self.send((0, command, args, kwargs), (theirs.fileno(),))
            yield ours

    def on_message(self, message: Any, fds: list[int]) -> None:
        """Hand on an answer."""
        number, good, value = message
        answer = self._answers.pop(number)
        if answer.done():
            return
        if good:
            answer.set_result(value)
        else:
            answer.set_exception(value if isinstance(value, Exception) else RuntimeError(repr(value)))

    def close(self) -> None:
        """Let go of the socket, at which the process exits."""
        super().close()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(ConnectionError(f"process {self.pid} has ended"))
                answer.exception()
        self._answers.clear()

    # -- signals

    def kill(self) -> None:
        """Kill -9; returns at once."""
        self._killed = True
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def stop(self) -> None:
        """Stop it, and return when all its threads have stopped."""
        signal.pidfd_send_signal(self._pidfd, signal.SIGSTOP)
        self._server.wait_stopped(self.pid)

    def resume(self) -> None:
        """Let it go on."""
        signal.pidfd_send_signal(self._pidfd, signal.SIGCONT)

    def wait_dead(self) -> None:
        """Hold up this thread until it has died; this process's loop does not get to know."""
        select.select([self._pidfd], [], [], 10)

    async def end(self) -> list[str]:
        """Close its agent, if it lives, and let it exit; what it left behind."""
        left: list[str] = []
        if not self._killed:
            await self.call("aclose")
            left = await self.call("left")
        await self.release()
        return left

    async def release(self) -> None:
        """Kill it, if it lives, and let go of it; again does nothing."""
        if self._pidfd < 0:
            return
        if not self.over.done():
            self.close()
        self.kill()
        dead = asyncio.Event()
        self._loop.add_reader(self._pidfd, dead.set)
        await dead.wait()
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1


if __name__ == "__main__":
    for _module in sys.argv[2:]:
        importlib.import_module(_module)
    _serve(socket.socket(fileno=int(sys.argv[1])))
