"""Connections of backends between agents: each belongs to a session, to one backend and to whoever knows the secret."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator

import pytest
from echo_backend import EchoBackend, EchoService
from lent import Lent, until
from network import DATA, GO_ON, LOCAL, Raw, addresses, far
from relay import relaying
from stage import within

from asyncxfer import Agent, Config, PeerLostError
from asyncxfer.abc import BackendError, PeerInfo, Stream


class Pair:
    """Agents "a" and "b" with echo backends; a is connected to b."""

    def __init__(self, a: Agent, b: Agent, here: EchoBackend, there: EchoBackend) -> None:
        self.a, self.b = a, b
        self.here, self.there = here, there

    @property
    def info(self) -> PeerInfo:
        return self.here.peers["b"]

    @property
    def service(self) -> EchoService:
        (service,) = self.there.services
        return service

    async def dial(self, index: int = 0) -> Stream:
        assert self.info.dial is not None
        return await self.info.dial(index)


@pytest.fixture(params=[True, False], ids=["unix", "tcp"])
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Lent[Pair]]:
    config = {"unix_socket": request.param, "lost_after": 0.3, "handshake_timeout": 5.0}
    here, there = EchoBackend(Config()), EchoBackend(Config())
    async with (
        Agent("a", listen=LOCAL, config=config, backends=["local", here]) as a,
        Agent("b", listen=LOCAL, config=config, backends=["local", there]) as b,
    ):
        await a.connect("b")
        lent = Lent(Pair(a, b, here, there))
        yield lent
        del lent.value
    here.peers.clear()


async def echoed(stream: Stream, data: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    sock = socket.socket(fileno=stream.fd)
    sock.setblocking(False)
    await loop.sock_sendall(sock, data)
    back = b""
    while len(back) < len(data):
        back += await loop.sock_recv(sock, len(data) - len(back))
    sock.detach()
    return back


def closed(stream: Stream) -> None:
    socket.socket(fileno=stream.fd).close()


async def test_a_stream_reaches_the_service_of_the_backend(pair: Lent[Pair]) -> None:
    on = pair.value
    assert on.there.services == []  # made by the first connection
    async with within():
        streams = [await on.dial(index) for index in (0, 3)]
        for stream in streams:
            assert await echoed(stream, b"%d" % stream.index * 1000) == b"%d" % stream.index * 1000
    assert sorted(on.service.streams) == [0, 3]
    for stream in streams:
        closed(stream)


async def test_notifications_that_come_with_data_are_delivered(pair: Lent[Pair]) -> None:
    on = pair.value
    async with within():
        stream = await on.dial()
        await echoed(stream, b"tell something")
        assert (await on.b.expect(b"something")).peer == "a"
    closed(stream)


async def test_a_service_is_shown_the_regions_that_are_granted(pair: Lent[Pair]) -> None:
    on = pair.value
    async with (
        within(),
        on.b.register(bytearray(8), name="before", access="r"),
        on.b.register(bytearray(8), grants=["another"]) as hidden,
    ):
        stream = await on.dial()
        (shown,) = on.service.open_slots.values()
        assert shown[1] == "r"
        hidden.grant("a", "w")
        assert sorted(access for _, access in on.service.open_slots.values()) == ["r", "w"]
        await hidden.revoke("a")
        assert len(on.service.open_slots) == 1
        async with on.b.register(bytearray(8), name="later"):
            assert len(on.service.open_slots) == 2
        assert len(on.service.open_slots) == 1
    closed(stream)


async def test_a_new_connection_replaces_the_old_of_its_index(pair: Lent[Pair]) -> None:
    on = pair.value
    async with within():
        first, second = await on.dial(1), await on.dial(1)
        assert await echoed(second, b"x") == b"x"
        assert len(on.service.streams) == 1
    closed(first)
    closed(second)


async def test_services_end_with_the_initiator(pair: Lent[Pair]) -> None:
    on = pair.value
    async with within():
        stream = await on.dial()
        service, dial = on.service, on.info.dial
        assert dial is not None
        (peer,) = on.a._live.peers._lines  # type: ignore[union-attr]
        await peer.aclose()
        await until(lambda: service.closed)
        with pytest.raises(PeerLostError, match="has left peer 'b'"):
            await dial(0)
    closed(stream)


async def test_a_backend_that_the_peer_lacks(pair: Lent[Pair]) -> None:
    on = pair.value
    async with within():
        (line,) = on.a._live.peers._lines.values()  # type: ignore[union-attr]
        with pytest.raises(PeerLostError, match=r"takes no data connection.*closed"):
            await line.data("local", 0)
        with pytest.raises(PeerLostError, match=r"takes no data connection.*closed"):
            await line.data("nothing", 0)
        with pytest.raises(BackendError, match="from 0 to 15"):
            await line.data("echo", 64)


@pytest.mark.parametrize("forged", ["session", "secret", "short", "name"])
async def test_who_does_not_know_the_secret_gets_no_stream(pair: Lent[Pair], forged: str) -> None:
    on = pair.value
    (line,) = on.a._live.peers._lines.values()  # type: ignore[union-attr]
    name = b"\xff" if forged == "name" else b"echo"
    session = bytes(16) if forged == "session" else line._session
    async with within():
        with Raw(_tcp_port(on.b)) as raw:
            head = struct.pack(">16s16sHB", session, bytes(16), 0, len(name)) + name
            await raw.send(DATA + (head[:20] if forged == "short" else head))
            assert await raw.read(8) == GO_ON
            if forged == "secret":
                assert len(await raw.read(48)) == 48
                await raw.send(bytes(32))
            if forged == "short":
                raw.end()
            assert await raw.read(1) == b""
    assert on.there.services == []


def _tcp_port(agent: Agent) -> int:
    return int(addresses(agent.metadata())[-1].rpartition(":")[2])


async def test_peers_without_an_address_on_the_network_cannot_be_dialled() -> None:
    here = EchoBackend(Config())
    async with Agent("a", backends=[here]) as a, Agent("b", backends=[EchoBackend(Config())]):
        await a.connect("b")
        assert here.peers["b"].dial is None
    here.peers.clear()


async def test_data_goes_on_while_control_is_down() -> None:
    here, there = EchoBackend(Config()), EchoBackend(Config())
    async with within(), relaying() as relay, far("a", backends=[here]) as a:
        listen = [f"{LOCAL}?advertise=127.0.0.1:{relay.port}", LOCAL]
        async with far("b", listen=listen, backends=[there]) as b:
            relay.target = b._live.peers.acceptor._listeners[0]._sock.getsockname()[1]  # type: ignore[union-attr]
            peer = await a.connect("b")
            relay.shut = True
            relay.cut()
            dial = here.peers["b"].dial
            assert dial is not None
            stream = await dial(0)
            assert await echoed(stream, b"x") == b"x"
            assert peer.link.alive
            closed(stream)
    here.peers.clear()
