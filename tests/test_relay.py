"""The relay that tests put between agents: it carries every byte as it is but for the harm that was ordered."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
from collections.abc import Iterator

import pytest
from hosts import Hosts
from relay import Direction, Relay

DATA = bytes(range(256)) * (4 << 10)  # 1 MiB
BOTH_WAYS = pytest.mark.parametrize("direction", ["there", "back"])
Ends = tuple[socket.socket, socket.socket]


class Stage:
    """A target that accepts, and the relay in front of it."""

    def __init__(self, relay: Relay, listener: socket.socket) -> None:
        self.relay = relay
        self._listener = listener

    @contextlib.contextmanager
    def connection(self, direction: Direction = "there") -> Iterator[Ends]:
        """Both ends of a connection through the relay, the sender in `direction` first."""
        with socket.create_connection(self.relay.address, timeout=10) as near:
            far, _ = self._listener.accept()
            with far:
                far.settimeout(10)
                yield (near, far) if direction == "there" else (far, near)


@pytest.fixture
def stage() -> Iterator[Stage]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        with Relay(listener.getsockname()) as relay:
            yield Stage(relay, listener)


def carry(source: socket.socket, sink: socket.socket, data: bytes) -> bytes:
    """Send `data`; what arrives in its place."""
    source.setblocking(False)
    sent, got = 0, bytearray()
    while len(got) < len(data):
        readable, writable, _ = select.select([sink], [source] if sent < len(data) else [], [], 10)
        assert readable or writable, f"{len(got)} bytes have arrived, then none for 10 s"
        if writable:
            sent += source.send(data[sent : sent + (1 << 18)])
        if readable:
            got += sink.recv(1 << 18)
    source.settimeout(10)
    return bytes(got)


def drain(sink: socket.socket) -> bytes:
    """What arrives until the connection is reset."""
    got = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while data := sink.recv(1 << 16):
            got += data
        pytest.fail("the connection was closed in order")
    return bytes(got)


# ---- carrying -----------------------------------------------------------------------------------------------------


@BOTH_WAYS
def test_every_byte_is_carried(stage: Stage, direction: Direction) -> None:
    with stage.connection(direction) as (source, sink):
        assert carry(source, sink, DATA) == DATA
        assert carry(sink, source, DATA) == DATA
        assert stage.relay.carried(0, direction) == len(DATA)


def test_each_side_ends_by_itself(stage: Stage) -> None:
    with stage.connection() as (near, far):
        near.sendall(b"question")
        near.shutdown(socket.SHUT_WR)
        assert far.recv(100) == b"question"
        assert far.recv(100) == b""
        far.sendall(b"answer")
        assert near.recv(100) == b"answer"
        far.close()
        assert near.recv(100) == b""
    assert stage.relay.open == 0


def test_connections_are_counted(stage: Stage) -> None:
    with stage.connection() as first:
        assert carry(*first, b"one") == b"one"
        with stage.connection() as second:
            assert carry(*second, b"two") == b"two"
            assert (stage.relay.count, stage.relay.open) == (2, 2)
    assert stage.relay.count == 2


def test_a_reader_that_stops_stops_the_writer(stage: Stage) -> None:
    with stage.connection() as (near, far):
        near.setblocking(False)
        sent = 0
        while select.select([], [near], [], 0.2)[1]:
            sent += near.send(DATA)
        # What the kernel's four socket buffers hold is the kernel's business; the relay holds no more than its own.
        assert stage.relay.carried(0, "there") < sent
        got = 0
        while got < sent:
            got += len(far.recv(1 << 20))


def test_nobody_at_the_target() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    # As early as in connecting, or in reading.
    with Relay(address) as relay, pytest.raises(ConnectionResetError), socket.create_connection(relay.address) as near:
        near.recv(1)


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
def test_between_hosts(hosts: Hosts, family: str) -> None:
    """A relay of this process stands between two hosts that it has cables to."""
    kind = socket.AF_INET6 if family == "ipv6" else socket.AF_INET
    a, b, here = (getattr(host, family) for host in (*hosts, hosts.here))
    with hosts[1].socket(kind) as listener, hosts[0].socket(kind) as near:
        listener.bind((b, 0))
        listener.listen()
        near.bind((a, 0))
        with Relay(listener.getsockname()[:2], listen=(here, 0)) as relay:
            near.connect(relay.address)
            far, _ = listener.accept()
            with far:
                assert carry(near, far, DATA) == DATA


# ---- harm ---------------------------------------------------------------------------------------------------------


def test_cut_resets_both_sides_of_all(stage: Stage) -> None:
    with stage.connection() as first, stage.connection() as second:
        stage.relay.cut()
        for sock in (*first, *second):
            assert drain(sock) == b""
        assert stage.relay.open == 0
    with stage.connection() as third:
        assert carry(*third, DATA) == DATA


def test_cut_one(stage: Stage) -> None:
    with stage.connection() as first, stage.connection() as second:
        stage.relay.cut(0)
        assert drain(first[1]) == b""
        assert carry(*second, DATA) == DATA


@BOTH_WAYS
def test_cut_at_a_byte(stage: Stage, direction: Direction) -> None:
    stage.relay.cut_at(1000, connection=1, direction=direction)
    with stage.connection(direction) as first:
        assert carry(*first, DATA) == DATA
    with stage.connection(direction) as (source, sink):
        source.sendall(DATA[:999])
        assert carry(sink, source, b"in the other direction there is no limit" * 100)
        assert stage.relay.open == 1
        source.sendall(DATA[999:2000])
        assert len(drain(sink)) <= 1000


@BOTH_WAYS
def test_flip_one_bit(stage: Stage, direction: Direction) -> None:
    stage.relay.flip(700_000, bit=3, connection=1, direction=direction)
    with stage.connection(direction) as first, stage.connection(direction) as second:
        assert carry(*first, DATA) == DATA
        got = carry(*second, DATA)
        assert [k for k in range(len(DATA)) if got[k] != DATA[k]] == [700_000]
        assert got[700_000] == DATA[700_000] ^ 8
        stage.relay.flip(len(DATA) + 5, connection=0, direction=direction)
        assert carry(*first, b"once more") == b"once lore"
        with pytest.raises(ValueError, match="has passed"):
            stage.relay.flip(5, connection=0, direction=direction)


def test_stall_and_go_on(stage: Stage) -> None:
    with stage.connection() as (near, far), stage.connection() as (there, back):
        stage.relay.stall()
        near.sendall(b"held")
        back.sendall(b"held too")
        with socket.create_connection(stage.relay.address, timeout=10):  # the kernel welcomes it
            assert stage.relay.count == 2
            assert not select.select([far, there], [], [], 0.1)[0]
            stage.relay.go_on()
            assert far.recv(100) == b"held"
            assert there.recv(100) == b"held too"


def test_refuse_and_accept(stage: Stage) -> None:
    with stage.connection() as first:
        stage.relay.refuse()
        with pytest.raises(ConnectionRefusedError) as caught:
            socket.create_connection(stage.relay.address, timeout=10)
        assert caught.value.errno == errno.ECONNREFUSED
        assert carry(*first, DATA) == DATA
        stage.relay.accept()
        with stage.connection() as second:
            assert carry(*second, DATA) == DATA


def test_a_deaf_relay_swallows_what_comes_back(stage: Stage) -> None:
    with stage.connection() as (near, far):
        stage.relay.deaf = True
        far.sendall(DATA)
        assert carry(near, far, DATA) == DATA  # by then all of it has been swallowed, or will be
        while stage.relay.carried(0, "back") < len(DATA):
            select.select([near], [], [], 0.01)
        stage.relay.deaf = False
        far.sendall(b"heard")
        assert near.recv(100) == b"heard"


def test_a_shut_relay_sends_away(stage: Stage) -> None:
    stage.relay.shut = True
    with socket.create_connection(stage.relay.address, timeout=10) as near:
        assert near.recv(100) == b""
    stage.relay.shut = False
    with stage.connection() as ends:
        assert carry(*ends, DATA) == DATA
    assert stage.relay.count == 2


def test_another_target(stage: Stage) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, stage.connection() as first:
        stage.relay.target = other.getsockname()[1]
        with socket.create_connection(stage.relay.address, timeout=10) as near:
            far, _ = other.accept()
            with far:
                assert carry(near, far, DATA) == DATA
        assert carry(*first, DATA) == DATA


def test_limit(stage: Stage) -> None:
    with stage.connection() as (near, far):
        stage.relay.limit(1 << 16)
        near.sendall(DATA[: 1 << 15])
        assert len(far.recv(1 << 20)) <= 1 << 13  # what has come until now
        stage.relay.limit(0)
        assert carry(near, far, DATA)
