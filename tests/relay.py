"""A TCP relay for tests: stands between two agents, carries their bytes, and does harm to them on request.

One thread carries everything; it waits in epoll, and holds no more than a buffer for each way of a connection. What is
in the bytes is not known here: harm is done to connections, which are numbered from 0 as they come, and to bytes, which
are numbered from 0 on each way.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import queue
import selectors
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

__all__ = ["Direction", "Relay", "relaying"]

#: Towards the target, or back to whoever connected.
Direction = Literal["there", "back"]
_Outcome = TypeVar("_Outcome")

_BUFFER = 256 << 10
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class _Way:
    """One direction of a connection: a bounded buffer between two sockets."""

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self.source = source
        self.sink = sink
        self.carried = 0  # bytes that have been taken from the source
        self.held = bytearray()
        self.ended = False  # the source will send no more
        self.done = False  # and the sink has been told
        self.flips: set[int] = set()  # numbers of bits

    @property
    def room(self) -> int:
        return 0 if self.ended else _BUFFER - len(self.held)

    def take(self, most: int) -> int:
        """Read; how many bytes."""
        data = bytearray(self.source.recv(most))
        self.ended = not data
        for bit in list(self.flips):
            place = bit // 8 - self.carried
            if 0 <= place < len(data):
                data[place] ^= 1 << bit % 8
                self.flips.remove(bit)
        self.held += data
        self.carried += len(data)
        return len(data)

    def give(self) -> None:
        """Write what is held, and pass the end on."""
        if self.held:
            del self.held[: self.sink.send(self.held)]
        if self.ended and not self.held and not self.done:
            self.done = True
            self.sink.shutdown(socket.SHUT_WR)


class _Connection:
    def __init__(self, client: socket.socket, target: socket.socket) -> None:
        self.sockets = (client, target)
        self.connecting = True
        self.deaf = False
        self.ways: dict[Direction, _Way] = {"there": _Way(client, target), "back": _Way(target, client)}

    def close(self, *, reset: bool) -> None:
        for sock in self.sockets:
            if reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            sock.close()


class Relay:
    """Listens on loopback, or on `listen`, and connects each that comes to `target`; ``with`` starts and ends it.

    Parameters
    ----------
    target : tuple of str and int, or int
        Host and port, or a port on loopback.
    listen : tuple of str and int
        Port 0 is any free one.
    """

    def __init__(self, target: tuple[str, int] | int, *, listen: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        self._target = ("127.0.0.1", target) if isinstance(target, int) else target
        self._listen = listen
        self._selector = selectors.DefaultSelector()
        self._watched: dict[socket.socket, int] = {}
        self._connections: dict[int, _Connection] = {}
        self._count = 0
        self._flips: dict[tuple[int, Direction], set[int]] = {}
        self._cuts: dict[tuple[int, Direction], int] = {}
        self._stalled = False
        self._shut = False
        self._rate = 0.0
        self._allowed = 0.0
        self._allowed_at = 0.0
        self._orders: queue.SimpleQueue[tuple[Callable[[], Any], concurrent.futures.Future[Any]]] = queue.SimpleQueue()
        self._ending = False
        self._listener: socket.socket | None = None

    def __enter__(self) -> Self:
        self._ours, self._theirs = socket.socketpair()
        self._selector.register(self._theirs, selectors.EVENT_READ)
        self._open()
        self._thread = threading.Thread(target=self._run, name="relay")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._order(self._end)
        self._thread.join()
        for sock in (self._ours, self._theirs):
            sock.close()
        self._selector.close()

    # -- what tests do with it; each returns when it has been done

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens: host and port."""
        return self._listen

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._listen[1]

    @property
    def target(self) -> int:
        """The port that those who come from now on are connected to."""
        return self._target[1]

    @target.setter
    def target(self, port: int) -> None:
        self._order(lambda: setattr(self, "_target", (self._target[0], port)))

    @property
    def deaf(self) -> bool:
        """Whether what comes back to those who are here is taken and thrown away; those who come later are heard."""
        return self._order(lambda: any(connection.deaf for connection in self._connections.values()))

    @deaf.setter
    def deaf(self, deaf: bool) -> None:
        self._order(lambda: self._set_deaf(deaf))

    @property
    def shut(self) -> bool:
        """Whether who comes is sent away at once."""
        return self._shut

    @shut.setter
    def shut(self, shut: bool) -> None:
        self._order(lambda: setattr(self, "_shut", shut))

    @property
    def count(self) -> int:
        """How many connections have come so far."""
        return self._order(lambda: self._count)

    @property
    def open(self) -> int:
        """How many of them are open."""
        return self._order(lambda: len(self._connections))

    def carried(self, connection: int, direction: Direction) -> int:
        """How many bytes an open connection has brought."""
        return self._order(lambda: self._connections[connection].ways[direction].carried)

    def cut(self, connection: int | None = None) -> None:
        """Reset a connection, or all, on both sides."""
        self._order(lambda: self._cut([*self._connections] if connection is None else [connection]))

    def cut_at(self, byte: int, *, connection: int, direction: Direction) -> None:
        """Reset a connection, here already or yet to come, when it has brought that many bytes."""
        self._order(lambda: self._cuts.__setitem__((connection, direction), byte))

    def flip(self, byte: int, *, connection: int, direction: Direction, bit: int = 0) -> None:
        """Change one bit, on a connection that is here or yet to come.

        Raises
        ------
        ValueError
            The byte has already passed.
        """
        self._order(lambda: self._flip(byte * 8 + bit, (connection, direction)))

    def stall(self) -> None:
        """Carry nothing, accept nobody and hold on to everything, until `go_on`."""
        self._order(lambda: setattr(self, "_stalled", True))

    def go_on(self) -> None:
        """End a stall."""
        self._order(lambda: setattr(self, "_stalled", False))

    def refuse(self) -> None:
        """Stop listening: who comes is refused; the connections that are here stay."""
        self._order(self._stop_listening)

    def accept(self) -> None:
        """Listen again, at the same address."""
        self._order(self._open)

    def limit(self, bytes_per_second: float) -> None:
        """Carry no more than this, both ways and all connections together; 0 is no limit."""
        self._order(lambda: self._limit(bytes_per_second))

    def _order(self, do: Callable[[], _Outcome]) -> _Outcome:
        done: concurrent.futures.Future[_Outcome] = concurrent.futures.Future()
        self._orders.put((do, done))
        self._ours.send(b"!")
        return done.result(10)

    # -- the thread

    def _run(self) -> None:
        while not self._ending:
            ordered = False
            for key, events in self._selector.select(self._watch()):
                if key.fileobj is self._theirs:
                    ordered = True
                elif key.fileobj is self._listener:
                    self._welcome()
                else:
                    number, sock = key.data
                    self._carry(number, sock, events)
            if ordered:  # at the end of the turn: an order may close what another event of it was about
                self._obey()

    def _obey(self) -> None:
        self._theirs.recv(1)
        do, done = self._orders.get()
        try:
            done.set_result(do())
        except Exception as error:
            done.set_exception(error)

    def _watch(self) -> float | None:
        """Tell epoll what can be done now; how long until more can, though nothing happens."""
        wanted: dict[socket.socket, tuple[int, Any]] = {}
        allowed, wait = self._allowance()
        if not self._stalled:
            if self._listener is not None:
                wanted[self._listener] = selectors.EVENT_READ, None
            for number, connection in self._connections.items():
                for sock, events in self._events(connection, reading=allowed >= 1):
                    wanted[sock] = events, (number, sock)
        for sock in self._watched.keys() - wanted.keys():
            self._selector.unregister(sock)
        for sock, (events, data) in wanted.items():
            if sock not in self._watched:
                self._selector.register(sock, events, data)
            elif self._watched[sock] != events:
                self._selector.modify(sock, events, data)
        self._watched = {sock: events for sock, (events, _) in wanted.items()}
        return wait

    def _events(self, connection: _Connection, *, reading: bool) -> list[tuple[socket.socket, int]]:
        client, target = connection.sockets
        if connection.connecting:
            return [(target, selectors.EVENT_WRITE)]
        there, back = connection.ways["there"], connection.ways["back"]
        found = []
        for sock, incoming, outgoing in ((client, there, back), (target, back, there)):
            events = selectors.EVENT_READ if reading and incoming.room else 0
            events |= selectors.EVENT_WRITE if outgoing.held else 0
            if events:
                found.append((sock, events))
        return found

    def _allowance(self) -> tuple[float, float | None]:
        """Bytes that may be taken now, and if there are none, when there will be."""
        if not self._rate:
            return float(_BUFFER), None
        now = time.monotonic()
        # What was not used in a twentieth of a second is gone, so that a rate is never exceeded by much.
        self._allowed = min(self._allowed + (now - self._allowed_at) * self._rate, max(1.0, self._rate / 20))
        self._allowed_at = now
        return self._allowed, None if self._allowed >= 1 else (1 - self._allowed) / self._rate

    def _welcome(self) -> None:
        assert self._listener is not None
        try:
            client, _ = self._listener.accept()
        except OSError:  # who came has left again
            return
        number, self._count = self._count, self._count + 1
        if self._shut:
            client.close()
            return
        target = socket.socket(socket.AF_INET6 if ":" in self._target[0] else socket.AF_INET)
        for sock in (client, target):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = _Connection(client, target)
        self._connections[number] = connection
        for direction, way in connection.ways.items():
            way.flips = self._flips.pop((number, direction), set())
        try:
            target.connect(self._target)
        except BlockingIOError:
            pass  # the outcome comes as an event
        except OSError:
            self._cut([number])

    def _carry(self, number: int, sock: socket.socket, events: int) -> None:
        connection = self._connections.get(number)
        if connection is None:  # it ended earlier in this turn
            return
        try:
            if connection.connecting:
                error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if error:
                    raise ConnectionError(error)
                connection.connecting = False
                return
            for direction, way in connection.ways.items():
                if way.source is sock and events & selectors.EVENT_READ:
                    self._take(number, direction, way)
                if way.held or way.ended:
                    with contextlib.suppress(BlockingIOError):
                        way.give()
        except OSError:
            self._cut([number])
            return
        if all(way.done for way in connection.ways.values()):
            self._drop(number, reset=False)
        elif any(connection.ways[d].carried >= self._cuts.get((number, d), 1 << 62) for d in connection.ways):
            self._cut([number])

    def _take(self, number: int, direction: Direction, way: _Way) -> None:
        allowed, _ = self._allowance()
        most = min(way.room, int(allowed), self._cuts.get((number, direction), 1 << 62) - way.carried)
        if most > 0:
            self._allowed -= way.take(most)
            if self._connections[number].deaf and direction == "back":
                way.held.clear()

    # -- what has been ordered

    def _cut(self, numbers: list[int]) -> None:
        for number in numbers:
            self._drop(number, reset=True)

    def _drop(self, number: int, *, reset: bool) -> None:
        connection = self._connections.pop(number)
        for sock in connection.sockets:
            if self._watched.pop(sock, None) is not None:
                self._selector.unregister(sock)
        connection.close(reset=reset)

    def _set_deaf(self, deaf: bool) -> None:
        for connection in self._connections.values():
            connection.deaf = deaf

    def _flip(self, bit: int, where: tuple[int, Direction]) -> None:
        number, direction = where
        if number >= self._count:
            self._flips.setdefault(where, set()).add(bit)
            return
        way = self._connections[number].ways[direction]
        if bit // 8 < way.carried:
            raise ValueError(f"byte {bit // 8} has passed: {way.carried} bytes have been carried")
        way.flips.add(bit)

    def _limit(self, rate: float) -> None:
        self._rate, self._allowed, self._allowed_at = rate, 0.0, time.monotonic()

    def _open(self) -> None:
        family = socket.AF_INET6 if ":" in self._listen[0] else socket.AF_INET
        self._listener = socket.create_server(self._listen, family=family, backlog=128)
        self._listener.setblocking(False)
        self._listen = self._listener.getsockname()[:2]

    def _stop_listening(self) -> None:
        assert self._listener is not None, "it refuses already"
        if self._watched.pop(self._listener, None) is not None:
            self._selector.unregister(self._listener)
        self._listener.close()
        self._listener = None

    def _end(self) -> None:
        self._cut([*self._connections])
        if self._listener is not None:
            self._stop_listening()
        self._ending = True


@contextlib.asynccontextmanager
async def relaying(target: int = 0) -> AsyncIterator[Relay]:
    """A relay to a port of loopback, which may be told later."""
    with Relay(target) as relay:
        yield relay
