"""Backends whose services are made as soon as an initiator has joined, from this host or over a network."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from echo_backend import EchoBackend
from joining_backend import JoiningBackend, JoiningService
from lent import Lent, until
from network import FAR, LOCAL, far
from peers import Process
from relay import relaying
from stage import Cast, within

from asyncxfer import Agent, Config, PeerLostError, RegistrationError
from asyncxfer.abc import BackendError, Stream


class Meeting:
    """Agent "b" of this process, and another process that is to be its initiator "a"; both with joining backends."""

    def __init__(self, other: Process, backend: JoiningBackend, b: Agent, *, remote: bool) -> None:
        self.other, self.backend, self.b, self.remote = other, backend, b, remote

    @property
    def service(self) -> JoiningService:
        (service,) = self.backend.services
        return service

    async def connect(self) -> None:
        await self.other.call("connect", self.b.metadata())


both_ways = pytest.mark.parametrize("config", [{}, FAR], ids=["unix", "tcp"])


@pytest.fixture
def patience() -> float:
    """How long agent "b" waits for who is inside a region."""
    return 5.0


@pytest.fixture(params=[{}, FAR], ids=["unix", "tcp"])
async def meeting(cast: Cast, request: pytest.FixtureRequest, patience: float) -> AsyncIterator[Lent[Meeting]]:
    config: dict[str, Any] = request.param
    backend, other = JoiningBackend(Config()), cast.spawn()
    await other.call("start", "a", config, backends=["local", JoiningBackend])
    async with Agent("b", listen=LOCAL, config=config | {"close_timeout": patience}, backends=["local", backend]) as b:
        lent = Lent(Meeting(other, backend, b, remote=bool(config)))
        yield lent
        del lent.value
    backend.services.clear()


async def test_a_service_is_made_when_an_initiator_joins(meeting: Lent[Meeting]) -> None:
    on = meeting.value
    async with within():
        await on.connect()
        assert on.service.remote is on.remote
        assert await on.backend.heard.get() == on.service.key
        assert len(on.service.key) == 16
        await on.other.call("aclose")
        await until(lambda: on.service.closed)


async def test_each_session_and_each_backend_has_a_key_of_its_own() -> None:
    joining, echo = JoiningBackend(Config()), EchoBackend(Config())
    first, second = JoiningBackend(Config()), JoiningBackend(Config())
    other = EchoBackend(Config())
    async with (
        within(),
        Agent("a1", backends=[first, other]) as a1,
        Agent("a2", backends=[second]) as a2,
        Agent("b", backends=[joining, echo]) as b,
    ):
        await a1.connect(b.metadata())
        await a2.connect(b.metadata())
        keys = [backend.peers["b"].key for backend in (first, second, other)]
        assert [service.key for service in joining.services] == keys[:2]
        assert len(set(keys)) == 3
        assert repr(keys[0]) not in repr(first.peers["b"])
    for backend in (first, second, other):
        backend.peers.clear()
    joining.services.clear()


@both_ways
async def test_a_service_that_comes_with_a_connection_has_the_key_too(config: dict[str, Any]) -> None:
    here, there = EchoBackend(Config()), EchoBackend(Config())
    async with (
        within(),
        Agent("a", listen=LOCAL, config=config, backends=["local", here]) as a,
        Agent("b", listen=LOCAL, config=config, backends=["local", there]) as b,
    ):
        await a.connect(b.metadata())
        dial = here.peers["b"].dial
        assert dial is not None
        stream = await dial(0)
        (service,) = there.services
        assert (service.key, service.remote) == (here.peers["b"].key, bool(config))
        _socket(stream).close()
    here.peers.clear()


def _socket(stream: Stream) -> socket.socket:
    sock = socket.socket(fileno=stream.fd)
    sock.setblocking(False)
    return sock


async def test_regions_are_shown_to_it_from_the_beginning(meeting: Lent[Meeting]) -> None:
    on = meeting.value
    async with within(), on.b.register(bytearray(8), access="r"):
        await on.connect()
        assert [access for _, access in on.service.open_slots.values()] == ["r"]
        async with on.b.register(bytearray(8), grants=["another"]) as hidden:
            assert len(on.service.open_slots) == 1
            hidden.grant("a", "w")
            assert sorted(access for _, access in on.service.open_slots.values()) == ["r", "w"]
            await hidden.revoke("a")
            assert len(on.service.open_slots) == 1
            hidden.grant("a", "rw")
        assert [access for _, access in on.service.open_slots.values()] == ["r"]


def entered(service: JoiningService, slot: int, epoch: int) -> bool:
    inside = service.page.enter(slot, epoch)
    if inside:
        service.page.leave(slot)
    return inside


async def test_closing_a_region_waits_for_a_service_that_is_inside(meeting: Lent[Meeting]) -> None:
    on = meeting.value
    async with within():
        await on.connect()
        region = await on.b.register(bytearray(8))
        ((slot, (epoch, _)),) = on.service.open_slots.items()
        assert on.service.page.enter(slot, epoch)
        closing = asyncio.ensure_future(region.aclose())
        await until(lambda: not entered(on.service, slot, epoch))
        assert on.service.open_slots
        on.service.page.leave(slot)
        await closing
        assert not on.service.open_slots


@pytest.mark.parametrize("patience", [0.1])
async def test_a_service_that_stays_inside_keeps_the_memory_alive(meeting: Lent[Meeting]) -> None:
    on = meeting.value
    async with within():
        await on.connect()
        region = await on.b.register(bytearray(8))
        ((slot, (epoch, _)),) = on.service.open_slots.items()
        assert on.service.page.enter(slot, epoch)
        with pytest.raises(RegistrationError, match="'a' was stopped inside"):
            await region.aclose()
        assert on.service.open_slots.keys() == {slot}
        async with on.b.register(bytearray(8)):
            assert len(on.service.open_slots) == 2  # its slot is not given away
        on.service.page.leave(slot)
        await until(lambda: not on.service.open_slots)


async def test_it_is_paused_while_notifications_are_not_read(cast: Cast) -> None:
    backend, others = JoiningBackend(Config()), [cast.spawn() for _ in range(2)]
    config = {"backlog_bytes": 65_536}
    async with within(), Agent("b", config=config, backends=["local", backend]) as b:
        for index, other in enumerate(others):
            await other.call("start", f"a{index}", backends=["local", JoiningBackend])
        await others[0].call("connect", b.metadata())
        await others[0].call("flood", bytes(30_000), 3, peer="b")
        await until(lambda: backend.services[0].paused)
        await others[1].call("connect", b.metadata())
        assert backend.services[1].paused
        await anext(b.notifications())
        assert [service.paused for service in backend.services] == [False, False]
    backend.services.clear()


@both_ways
async def test_an_initiator_that_cannot_be_served_is_not_let_in(cast: Cast, config: dict[str, Any]) -> None:
    backend, other = JoiningBackend(Config()), cast.spawn()
    backend.refuses = True
    async with within(), Agent("b", listen=LOCAL, config=config, backends=["local", backend]) as b:
        await other.call("start", "a", config, backends=["local", JoiningBackend])
        with pytest.raises(PeerLostError, match="refused the connection: it has had enough"):
            await other.call("connect", b.metadata())
        assert not b.stats()["served"]
        backend.refuses = False
        await other.call("connect", b.metadata())
        assert len(backend.services) == 1
    backend.services.clear()


async def test_a_service_outlives_a_connection() -> None:
    here, there = JoiningBackend(Config()), JoiningBackend(Config())
    async with (
        within(),
        relaying() as relay,
        far("a", backends=[here]) as a,
        far("b", listen=f"{LOCAL}?advertise=127.0.0.1:{relay.port}", backends=[there]) as b,
    ):
        relay.target = b._live.peers.acceptor._listeners[0]._sock.getsockname()[1]  # type: ignore[union-attr]
        peer = await a.connect("b")
        relay.cut()
        await peer.notify(b"again")
        assert (await b.expect(b"again")).peer == "a"
        assert relay.count == 2
        async with b.register(bytearray(8)):
            (service,) = there.services
            assert service.open_slots
            assert not service.closed
    here.peers.clear()
    there.services.clear()


async def test_no_connections_are_adopted_by_default() -> None:
    here, there = JoiningBackend(Config()), JoiningBackend(Config())
    async with within(), far("a", backends=[here]) as a, far("b", backends=[there]) as b:
        await a.connect(b.metadata())
        dial = here.peers["b"].dial
        assert dial is not None
        stream = await dial(0)
        loop, sock = asyncio.get_running_loop(), _socket(stream)
        with sock:
            assert await loop.sock_recv(sock, 1) == b""
        with pytest.raises(BackendError, match="takes no connections"):
            there.services[0].adopt(stream)
    here.peers.clear()
    there.services.clear()


@both_ways
async def test_an_endpoint_hears_at_once_that_a_region_is_gone(cast: Cast, config: dict[str, Any]) -> None:
    here, other = JoiningBackend(Config()), cast.spawn()
    metadata = await other.call("start", "b", config, listen=LOCAL, backends=["local", JoiningBackend])
    async with within(), Agent("a", config=config, backends=["local", here]) as a:
        peer = await a.connect(metadata)
        await other.call("region", "kept", "ordinary", (8,))
        await other.call("region", "taken", "ordinary", (8,))
        taken = (await peer.region("taken")).attachments["joining"]
        kept = (await peer.region("kept")).attachments["joining"]
        (endpoint,) = here.endpoints
        await other.call("close", "taken")
        await until(lambda: endpoint.detached == [taken])
        await peer.aclose()
        assert endpoint.detached == [taken, kept]
    here.peers.clear()
    here.endpoints.clear()
