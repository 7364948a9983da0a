"""What strangers and liars get from an agent's listener: nothing, soon, and at no cost to those who belong there."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from authority import Authority
from echo_backend import EchoBackend
from lent import until
from network import CONTROL, DATA, GO_ON, Raw, far, framed, port_of
from stage import within

from asyncxfer import Agent, Certificates, Config, PeerLostError, PeerState, PreSharedKey, _outgoing, _sockets, _stream
from asyncxfer._identity import host, process
from asyncxfer._metadata import Beat, Bye, Hello, Letter, LetterAck, Ready, encode_frame

SECRET = b"a secret for tests, 32 bytes lng"
AUTHORITY = Authority()


def hello(name: str = "stranger") -> bytes:
    return framed(encode_frame(Hello(name=name, generation=1, process=process(), host=host())))


# ---- credentials --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["certificates", "secret"])
async def test_agents_with_the_right_credentials_talk(kind: str) -> None:
    def mine(name: str) -> Certificates | PreSharedKey:
        return AUTHORITY.credentials(name) if kind == "certificates" else PreSharedKey(SECRET)

    async with within(), far("a", credentials=mine("a")) as a, far("b", credentials=mine("b")) as b:
        await b.register(bytearray(8), name="kv")
        peer = await a.connect("b")
        assert peer["kv"].nbytes == 8
        await peer.notify(bytes(32768))
        assert (await b.expect(bytes(32768))).peer == "a"
        back = await b.connect("a")
        await asyncio.gather(*(back.notify(b"%d" % n) for n in range(200)))
        inbox = a.notifications()
        assert [(await anext(inbox)).tag for _ in range(200)] == [b"%d" % n for n in range(200)]


async def test_with_credentials_a_listener_may_be_reached_from_elsewhere() -> None:
    listen = "tcp://0.0.0.0:0?advertise=127.0.0.1"
    key = PreSharedKey(SECRET)
    async with within(), far("a", credentials=key) as a, far("b", listen=listen, credentials=key):
        assert (await a.connect("b")).link.remote


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        (None, "it asks for credentials, and this agent has none"),
        (PreSharedKey(b"another secret of 32 bytes......"), "TLS handshake failed|did not|TLS"),
        (Authority().credentials("a"), "TLS handshake failed"),
    ],
)
async def test_wrong_credentials_get_no_further(theirs: Certificates | PreSharedKey | None, words: str) -> None:
    async with within(), far("b", credentials=AUTHORITY.credentials("b")) as b:
        async with far("a", credentials=theirs) as a:
            with pytest.raises(PeerLostError, match=words):
                await a.connect("b")
        assert not b.stats()["served"]


async def test_credentials_on_one_side_only() -> None:
    async with within(), far("b") as b, far("a", credentials=AUTHORITY.credentials("a")) as a:
        with pytest.raises(PeerLostError, match="it has no credentials, and this agent has"):
            await a.connect(b.metadata())


async def test_a_certificate_speaks_for_its_own_agent_only() -> None:
    as_c = AUTHORITY.credentials("c")
    async with within(), far("b", credentials=AUTHORITY.credentials("b")) as b:
        async with far("a", credentials=as_c) as a:
            with pytest.raises(PeerLostError, match="shown for agent 'a' speaks for 'c'"):
                await a.connect("b")
        async with far("c", credentials=as_c) as c, far("d", credentials=AUTHORITY.credentials("e")):
            with pytest.raises(PeerLostError, match="shown for agent 'd' speaks for 'e'"):
                await c.connect("d")
            assert (await c.connect("b")).state is PeerState.JOINED
        assert not b.stats()["served"] or list(b.stats()["served"]) == ["c"]


async def test_nothing_is_told_without_credentials() -> None:
    async with within(), far("b", credentials=AUTHORITY.credentials("b")) as b:
        await b.register(bytearray(8), name="secret region")
        for preface, answer in ((CONTROL, 1), (DATA, 5)):
            with Raw(port_of(b.metadata())) as raw:
                await raw.send(preface + hello())
                assert await raw.read() == b"AXF\x01" + bytes((answer, 0, 0, 0))


@pytest.mark.parametrize("config", [{}, {"encrypt_data": False}], ids=["encrypted", "plain"])
async def test_data_is_encrypted_unless_that_is_turned_off(config: dict[str, bool]) -> None:
    here, there = EchoBackend(Config()), EchoBackend(Config())
    async with (
        within(),
        far("a", credentials=AUTHORITY.credentials("a"), backends=[here], config=config) as a,
        far("b", credentials=AUTHORITY.credentials("b"), backends=[there], config=config),
    ):
        await a.connect("b")
        dial = here.peers["b"].dial
        assert dial is not None
        stream = await dial(0)
        assert (stream.tls is None) == bool(config)
        sock = socket.socket(fileno=stream.fd)
        if stream.tls is not None:
            assert stream.tls.write(b"ping") == 4
            await _sockets.readable(sock)
            assert stream.tls.read(4) == b"ping"
            stream.tls.close()
        sock.close()
    here.peers.clear()


async def test_a_data_connection_needs_the_certificate_of_its_agent() -> None:
    here, there = EchoBackend(Config()), EchoBackend(Config())
    async with (
        within(),
        far("a", credentials=AUTHORITY.credentials("a"), backends=[here]) as a,
        far("b", credentials=AUTHORITY.credentials("b"), backends=[there]) as b,
        far("c", credentials=AUTHORITY.credentials("c"), backends=[EchoBackend(Config())]) as c,
    ):
        await a.connect("b")
        (line,) = a._live.peers._lines.values()  # type: ignore[union-attr]
        line._dialler = c._live.peers._dialler  # type: ignore[union-attr]
        with pytest.raises(PeerLostError, match="the TLS connection failed: the connection ended"):
            await line.data("echo", 0)
        assert there.services == []
        assert b.stats()["served"].keys() == {"a"}
    here.peers.clear()


# ---- frames that no agent would send ------------------------------------------------------------------------------


async def refused(agent: Agent, data: bytes, *, ending: bool = False) -> bytes:
    """What an agent answers to bytes, until it closes the connection."""
    with Raw(port_of(agent.metadata())) as raw:
        await raw.send(data)
        if ending:
            raw.end()
        return await raw.read()


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: b\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"AXF\x01X\x00\x00\x00",
        b"AXF\x01C\x02\x00\x00",
        b"AXF\x01C\x00\x00\x01",
    ],
)
async def test_what_is_no_preface_is_not_even_answered(data: bytes) -> None:
    async with within(), far("b") as b:
        assert await refused(b, data) == b""


async def test_another_version_is_told_so() -> None:
    async with within(), far("b") as b:
        assert await refused(b, b"AXF\x02C\x00\x00\x00") == b"AXF\x01\x03\x00\x00\x00"


@pytest.mark.parametrize(
    "frames",
    [
        framed(b"M"),
        framed(b"M\xc1"),
        framed(b"Ntag"),
        framed(b"Q"),
        framed(os.urandom(1000)),
        framed(encode_frame(Bye())),
        framed(encode_frame(Letter(1, b"N", b"tag"))),
        framed(encode_frame(Ready())),
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x00",
        (60_001).to_bytes(4, "big") + bytes(60_001),
    ],
)
async def test_a_stranger_that_says_no_hello_is_closed(frames: bytes) -> None:
    async with within(), far("b") as b:
        assert await refused(b, CONTROL + frames) == GO_ON
        assert not b.stats()["served"]


@pytest.mark.parametrize(
    "frames",
    [
        hello("another"),
        framed(b"Ntag"),
        framed(encode_frame(LetterAck(1))),
        framed(encode_frame(Letter(2, b"N", b"tag"))),
        framed(encode_frame(Letter(1, b"X", b"tag"))),
        framed(encode_frame(Letter(1, b"I", b"tag"))),
        framed(b"M" + bytes(100)),
        b"\xff\xff\xff\xff",
    ],
)
async def test_an_initiator_that_breaks_the_rules_is_lost_at_once(frames: bytes) -> None:
    async with within(), far("b") as b:
        events = b.events()
        answer = await refused(b, CONTROL + hello() + frames)
        assert answer.startswith(GO_ON)
        assert [(await anext(events)).state for _ in range(2)] == [PeerState.JOINED, PeerState.LOST]
        assert not b.stats()["served"]


async def test_a_frame_that_is_cut_off_is_the_end() -> None:
    config = {"lost_after": 0.2, "handshake_timeout": 0.2}
    async with within(), far("b", config=config) as b:
        events = b.events()
        await refused(b, CONTROL + hello() + framed(encode_frame(Beat()))[:-1], ending=True)
        states = [(await anext(events)).state for _ in range(3)]
        assert states == [PeerState.JOINED, PeerState.SUSPECT, PeerState.LOST]


async def test_a_replayed_hello_is_another_connection_and_takes_nothing_over() -> None:
    async with within(), far("b") as b, far("a") as a:
        peer = await a.connect("b")
        with Raw(port_of(b.metadata())) as raw:
            await raw.send(CONTROL + hello("a"))
            assert (await raw.read(8)) == GO_ON
            await peer.notify(b"still mine")
            assert (await b.expect(b"still mine")).peer == "a"
            await raw.send(framed(encode_frame(Bye())))
        assert peer.state is PeerState.JOINED


async def test_a_peer_that_reads_nothing_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_stream, "_UNSENT", 1 << 20)
    async with within(), far("b", config={"lost_after": 0.5, "handshake_timeout": 0.5}) as b:
        events = b.events()
        with Raw(port_of(b.metadata())) as raw:
            await raw.send(CONTROL + hello())
            assert (await anext(events)).state is PeerState.JOINED
            parts = [bytearray(8) for _ in range(1500)]
            region = await b.register(parts, name="many")
            for _ in range(600):
                region.grant("stranger", "r")
                await asyncio.sleep(0)
            states = [(await anext(events)).state for _ in range(2)]
            assert states == [PeerState.SUSPECT, PeerState.LOST]


async def test_a_target_that_tells_of_too_many_regions_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_outgoing, "SLOTS", 3)
    async with within(), far("a") as a, far("b") as b:
        regions = [await b.register(bytearray(8)) for _ in range(3)]
        peer = await a.connect("b")
        await regions.pop().aclose()
        await b.register(bytearray(8), name="third")
        await peer.region("third")
        await b.register(bytearray(8))
        await until(lambda: peer.state is PeerState.LOST)
        assert "more than 3 regions" in str(peer.lost)


# ---- many, and slow -----------------------------------------------------------------------------------------------


async def test_who_is_slow_to_say_who_it_is_has_little_time() -> None:
    async with within(), far("b", config={"handshake_timeout": 0.3}) as b:
        with Raw(port_of(b.metadata())) as silent, Raw(port_of(b.metadata())) as slow:
            dripping = asyncio.ensure_future(_drip(slow, CONTROL + hello()))
            await silent.read()
            await slow.read()
            dripping.cancel()
            with pytest.raises((asyncio.CancelledError, OSError)):
                await dripping
        assert not b.stats()["served"]


async def _drip(raw: Raw, data: bytes) -> None:
    for at in range(len(data)):
        await raw.send(data[at : at + 1])
        await asyncio.sleep(0.05)


def _memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


CROWD = """
import resource, signal, socket, sys
port, count = map(int, sys.argv[1:])
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
kept = []
for number in range(count):
    sock = socket.socket()
    sock.setblocking(False)
    sock.bind(("127.0.0.2", 0))  # other tests, which listen again where they did before, keep their ports
    sock.connect_ex(("127.0.0.1", port))
    kept.append(sock)
    if number % 1000 == 999:
        print(number, flush=True)
signal.pause()
"""


@pytest.mark.stress
@pytest.mark.skipif(
    resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 10_100, reason="10,000 connections need as many descriptors"
)
async def test_ten_thousand_half_open_connections_hold_up_nobody() -> None:
    """Another process makes them and says nothing on them; who has joined is served, who comes is let in."""
    async with within(), far("a") as a, far("b") as b:
        peer = await a.connect("b")
        (listener,) = b._live.peers.acceptor._listeners  # type: ignore[union-attr]
        before = _memory()
        command = (sys.executable, "-c", CROWD, str(port_of(b.metadata())), "10000")
        crowd = await asyncio.to_thread(subprocess.Popen, command, stdout=subprocess.PIPE)
        assert crowd.stdout is not None
        for number in range(10):
            await asyncio.to_thread(crowd.stdout.readline)
            await peer.notify(b"%d" % number)
            assert (await b.expect(b"%d" % number)).peer == "a"
            assert len(listener._strangers) <= 256
        assert peer.state is PeerState.JOINED
        assert _memory() - before < 64 << 20
        async with far("c") as c:
            assert (await c.connect("b")).state is PeerState.JOINED
        crowd.kill()
        await asyncio.to_thread(crowd.communicate)
        await until(lambda: not listener._strangers)


async def test_who_comes_too_late_is_told_and_tries_again() -> None:
    async with within(), far("b", config={"handshake_timeout": 60.0}) as b:
        port = port_of(b.metadata())
        with Raw(port) as first:
            listener = b._live.peers.acceptor._listeners[0]  # type: ignore[union-attr]
            await until(lambda: len(listener._strangers) == 1)
            others = [Raw(port) for _ in range(256)]
            assert await first.read() == b"AXF\x01\x04\x00\x00\x00"
            for other in others:
                other.__exit__()


async def test_without_descriptors_the_listener_rests_and_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    async with within(), far("b") as b:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with Raw(port_of(b.metadata())) as raw:
            await raw.send(CONTROL)
            assert await raw.read(8) == GO_ON
        late = socket.socket()
        loop = asyncio.get_running_loop()
        told: list[str] = []
        loop.set_exception_handler(lambda _, context: told.append(context["message"]))
        resource.setrlimit(resource.RLIMIT_NOFILE, (_lowest_free(), hard))
        try:
            late.setblocking(False)
            late.connect_ex(("127.0.0.1", port_of(b.metadata())))
            await until(lambda: bool(told))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await loop.sock_sendall(late, CONTROL)
        assert await loop.sock_recv(late, 8) == GO_ON
        late.close()
        assert told == ["a connection could not be accepted"]


def _lowest_free() -> int:
    fd = os.open("/dev/null", os.O_RDONLY)
    os.close(fd)
    return fd
