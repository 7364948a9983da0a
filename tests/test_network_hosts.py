"""Agents on two hosts: bytes arrive whatever the network does to them, and both sides learn how a transfer ended.

The agent "here" lives in this process, "there" on another host, with a region "far". Connections are encrypted unless a
test says otherwise. How the relay and the wire treat single connections is tested elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
import pytest
from hosts import Host, Hosts
from network import port_of, until_state
from peers import Bytes, Process, Server, make_region, moving, pattern
from stage import Cast, Op

from asyncxfer import Agent, Peer, PeerLostError, PeerState, PreSharedKey, Region, Transfer, TransferError

SECRET = "what only these two hosts know"
SHAPE = (64, 1 << 14)
ROWS = list(range(SHAPE[0]))
MANY = ROWS * 256  # 256 MiB: long enough to act in the middle of it
CONFIG = {"suspect_after": 0.4, "close_timeout": 0.5}
LIMIT = 20.0  # what was lost is sent again after a pause that the kernel doubles each time

pytestmark = pytest.mark.blocking("cables are changed by programs that the test waits for")


class Stage:
    """An agent here with a region "near", and others on other hosts."""

    def __init__(self, cast: Cast, home: Host, *, secure: bool, config: dict[str, Any]) -> None:
        self.cast = cast
        self.home = home
        self.config = config
        self._credentials = ("PreSharedKey", SECRET) if secure else None
        self.region: Region
        self.array: Bytes

    @property
    def here(self) -> Agent:
        return self.cast.here

    async def start(self, host: Host, *, port: int = 0, family: str = "ipv4", seed: int = 2) -> tuple[Process, bytes]:
        """Start an agent "there" on a host; its process and its metadata."""
        other = self.cast.spawn(host)
        metadata = await other.call(
            "start", "there", self.config, listen=url(host, family, port), credentials=self._credentials
        )
        await other.call("region", "far", "ordinary", SHAPE, seed=seed)
        return other, metadata

    async def pair(self, host: Host, **options: Any) -> Pair:
        """Start an agent "there", and connect to it."""
        other, metadata = await self.start(host, **options)
        peer = await self.here.connect(metadata)
        await peer.region("far", timeout=5)
        return Pair(self, other, peer, metadata)


class Pair:
    """A connection from here to there."""

    def __init__(self, stage: Stage, other: Process, peer: Peer, metadata: bytes) -> None:
        self.stage = stage
        self.other = other
        self.peer = peer
        self.metadata = metadata

    def post(self, op: Op, rows: list[int] = ROWS, **options: Any) -> Transfer:
        """Move rows of "near" to or from the same rows of "far"."""
        call = self.stage.here.put if op == "put" else self.stage.here.get
        return call(self.stage.region[rows], self.peer["far"][rows], **options)

    async def prove(self, **options: Any) -> None:
        """Get, then put, each with a notification, and compare every byte."""
        seeds = int.from_bytes(np.random.bytes(3), "big")
        await self.other.call("fill", "far", seeds)
        done = await self.post("get", notify=b"got", **options)
        assert done.backend == "tcp"
        await self.other.call("expect", b"got", peer="here", timeout=10)
        assert (self.stage.array == pattern(seeds, SHAPE)).all()
        self.stage.array[:] = pattern(seeds + 1, SHAPE)
        await self.post("put", notify=b"put", **options)
        await self.other.call("expect", b"put", peer="here", timeout=10)
        assert await self.other.call("matches", "far", seeds + 1)


def url(host: Host, family: str, port: int = 0) -> str:
    return f"tcp://{host.ipv4}:{port}" if family == "ipv4" else f"tcp://[{host.ipv6}]:{port}"


Raise = Callable[..., Awaitable[Stage]]


@pytest.fixture
async def stage_of(server: Server, hosts: Hosts) -> AsyncIterator[Raise]:
    """Makes the stage as a test wants it, and takes it down at the end."""
    async with AsyncExitStack() as stack:

        async def make(*, secure: bool = True, family: str = "ipv4", **config: Any) -> Stage:
            config = CONFIG | config | ({} if secure else {"open_listener": True})
            credentials = PreSharedKey(SECRET) if secure else None
            here = Agent("here", listen=url(hosts.here, family), credentials=credentials, config=config)
            stage = Stage(Cast(server, await here.start()), hosts.here, secure=secure, config=config)

            async def leave() -> None:
                await stage.cast.leave()
                vars(stage).clear()

            stack.push_async_callback(leave)
            stage.region, stage.array = await make_region(here, "near", "ordinary", SHAPE)
            stage.array[:] = pattern(1, SHAPE)
            return stage

        yield make


def within() -> asyncio.Timeout:
    return asyncio.timeout(LIMIT)


# ---- whatever the network is like ---------------------------------------------------------------------------------


@pytest.mark.parametrize("secure", [True, False], ids=["encrypted", "plain"])
@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
async def test_transfers_between_hosts(hosts: Hosts, stage_of: Raise, family: str, secure: bool) -> None:
    async with within():
        stage = await stage_of(secure=secure, family=family)
        for mtu in (1500, 9000):
            for host in (hosts.here, hosts[0]):
                host.mtu(mtu)
            pair = await stage.pair(hosts[0], family=family)
            for checksum in (False, True):
                await pair.prove(checksum=checksum)
            await pair.peer.aclose()


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "[::1]"])
async def test_transfers_by_host_name(name: str) -> None:
    config, listen = {"unix_socket": False}, f"tcp://{name}:0"
    async with (
        within(),
        Agent("a", listen=listen, config=config) as a,
        Agent("b", listen=f"{listen}?advertise={name}", config=config) as b,
        b.allocate(SHAPE, np.uint8, name="far") as far,
        a.register(pattern(1, SHAPE)) as near,
    ):
        peer = await a.connect("b")
        assert f"//{name}:".encode() in b.metadata()
        assert (await a.put(near[:], peer["far"][:], notify=b"put", checksum=True)).backend == "tcp"
        await b.expect(b"put")
        assert (far.array == pattern(1, SHAPE)).all()


async def test_transfers_with_loss(hosts: Hosts, stage_of: Raise) -> None:
    async with within():
        pair = await (await stage_of()).pair(hosts[0])
        hosts[0].loss(1)
        for checksum in (False, True):
            await pair.prove(checksum=checksum)


async def test_transfers_with_delay(hosts: Hosts, stage_of: Raise) -> None:
    hosts[0].delay(20)
    async with within():
        pair = await (await stage_of()).pair(hosts[0])
        for checksum in (False, True):
            await pair.prove(checksum=checksum)


# ---- cables that break --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["cut", "partition"])
async def test_a_break_in_mid_transfer_is_waited_out(hosts: Hosts, stage_of: Raise, fault: str) -> None:
    async with within():
        stage = await stage_of()
        pair = await stage.pair(hosts[0])
        events = stage.here.events()
        got = np.zeros(SHAPE, np.uint8)
        async with stage.here.register(got) as own:
            await pair.other.call("region", "source", "ordinary", SHAPE, seed=9)
            source = await pair.peer.region("source", timeout=5)
            put = pair.post("put", MANY, notify=b"put in spite of all")
            get = stage.here.get(own[MANY], source[MANY], notify=b"got in spite of all")
            await asyncio.gather(moving(put), moving(get))
            hosts[0].cut() if fault == "cut" else hosts[0].partition()
            await until_state(events, PeerState.SUSPECT)
            assert not put.done()
            assert not get.done()
            hosts[0].mend() if fault == "cut" else hosts[0].heal()
            await asyncio.gather(put, get)
        for tag in (b"put in spite of all", b"got in spite of all"):
            await pair.other.call("expect", tag, timeout=10)
        assert await pair.other.call("matches", "far", 1)
        assert (got == pattern(9, SHAPE)).all()
        await pair.prove()
        assert pair.peer.state is PeerState.JOINED


async def test_a_partition_that_lasts_too_long_loses_the_peer_and_no_more(hosts: Hosts, stage_of: Raise) -> None:
    async with within():
        stage = await stage_of(lost_after=1.0, handshake_timeout=0.5)
        pair = await stage.pair(hosts[0])
        await pair.other.call("connect", stage.here.metadata())
        expected = pair.other.post("expect", b"never", peer="here")
        here = stage.here.events()
        transfers = [pair.post("put", MANY, notify=b"never"), pair.post("get", MANY)]
        await moving(transfers[1])
        hosts[0].partition()
        for transfer in transfers:
            with pytest.raises(PeerLostError, match=r"lost its peer: peer 'there', generation .*within 1 s"):
                await transfer
        await until_state(here, PeerState.LOST, "there")
        with pytest.raises(PeerLostError, match=r"within 1 s \(configuration key lost_after\)"):
            await expected
        with pytest.raises(PeerLostError, match="could not be reached again within 1 s"):
            pair.post("put")
        hosts[0].heal()
        again = Pair(stage, pair.other, await stage.here.connect(pair.metadata), pair.metadata)
        assert again.peer is not pair.peer
        assert again.peer.generation == pair.peer.generation
        await again.peer.region("far", timeout=5)
        await again.prove(checksum=True)


# ---- two agents with one name -------------------------------------------------------------------------------------


async def test_a_second_start_of_a_name_takes_the_place_of_the_first(hosts: Hosts, stage_of: Raise) -> None:
    async with within():
        stage = await stage_of()
        first = await stage.pair(hosts[0])
        events = stage.here.events()
        transfer = first.post("put", MANY)
        await moving(transfer)
        hosts[0].partition()  # so that nobody says what became of it
        first.other.kill()
        first.other.wait_dead()
        _, metadata = await stage.start(hosts[0], port=port_of(first.metadata), seed=3)
        hosts[0].heal()
        with pytest.raises(PeerLostError) as lost_in_flight:
            await transfer
        newer = await stage.here.connect(metadata)
        restarted = await until_state(events, PeerState.RESTARTED, "there")
        assert restarted.generation == newer.generation > first.peer.generation
        with pytest.raises(PeerLostError) as lost:
            first.post("put")
        for generation in (first.peer.generation, newer.generation):
            assert f"generation {generation}" in str(lost_in_flight.value)
            assert f"generation {generation}" in str(lost.value)
        await newer.region("far", timeout=5)
        await stage.here.get(stage.region[ROWS], newer["far"][ROWS])
        assert (stage.array == pattern(3, SHAPE)).all()


async def test_of_two_with_one_name_the_one_whose_metadata_it_is_answers(hosts: Hosts, stage_of: Raise) -> None:
    async with within():
        stage = await stage_of()
        for seed, host in ((5, hosts[0]), (6, hosts[1])):
            _, metadata = await stage.start(host, seed=seed)
            peer = await stage.here.connect(metadata)
            far = await peer.region("far", timeout=5)
            await stage.here.get(stage.region[ROWS], far[ROWS])
            assert (stage.array == pattern(seed, SHAPE)).all()


async def test_two_of_one_name_may_be_reached_at_once(hosts: Hosts, stage_of: Raise) -> None:
    async with within():
        stage = await stage_of()
        started = [await stage.start(host, seed=seed) for seed, host in ((5, hosts[0]), (6, hosts[1]))]
        peers = await asyncio.gather(*(stage.here.connect(metadata) for _, metadata in started))
        for (other, _), peer in zip(started, peers, strict=True):
            far = await peer.region("far", timeout=5)
            tag = b"%d" % peer.generation
            await stage.here.put(stage.region[ROWS], far[ROWS], notify=tag)
            assert (await other.call("expect", tag, timeout=10)).peer == "here"
            assert await other.call("matches", "far", 1)


# ---- strangers ----------------------------------------------------------------------------------------------------

CLIENT_HELLO = b"\x16\x03\x01\x00\xc8\x01\x00\x00\xc4\x03\x03" + bytes(range(192))
SAID = [b"", b"GET / HTTP/1.1\r\nHost: there\r\n\r\n", CLIENT_HELLO, np.random.default_rng(7).bytes(64 << 10)]


async def scan(host: Host, address: tuple[str, int], rounds: int) -> list[bytes]:
    """Connect again and again, say something, and stay; what was answered until the other side had enough."""
    loop = asyncio.get_running_loop()
    answers = []
    for said in SAID * rounds:
        with host.socket() as sock:
            sock.connect(address)
            sock.setblocking(False)
            try:
                await loop.sock_sendall(sock, said)
                answers.append(await loop.sock_recv(sock, 100))
            except ConnectionError:
                answers.append(b"")
    return answers


@pytest.mark.parametrize("secure", [True, False], ids=["encrypted", "plain"])
async def test_a_port_scanner_harms_nobody(hosts: Hosts, stage_of: Raise, secure: bool) -> None:
    async with within():
        stage = await stage_of(secure=secure, handshake_timeout=0.3)
        pair = await stage.pair(hosts[0])
        scanning = asyncio.ensure_future(scan(hosts[1], (hosts[0].ipv4, port_of(pair.metadata)), 3))
        proven = 0
        while not scanning.done():
            await pair.prove(checksum=True)
            proven += 1
        # Who said nothing is told to come again later, and the others nothing.
        assert set(await scanning) == {b"AXF\x01\x04\x00\x00\x00", b""}
        assert proven > 1
        assert pair.peer.state is PeerState.JOINED


# ---- ends that both sides learn of ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["kill", "cancel"])
async def test_the_receiver_learns_that_the_sender_gave_up(hosts: Hosts, stage_of: Raise, how: str) -> None:
    async with within():
        stage = await stage_of(lost_after=1.0, handshake_timeout=0.5)
        other, _ = await stage.start(hosts[0])
        await other.call("connect", stage.here.metadata())
        waiting = []
        for op in ("put", "get"):
            tag = op.encode()
            await other.call("begin", op, op, "far", MANY, "near", MANY, peer="here", notify=tag, wait=True)
            waiting.append(asyncio.ensure_future(stage.here.expect(tag, peer="there")))
        if how == "kill":
            other.kill()
        for op, told in zip(("put", "get"), waiting, strict=True):
            if how == "cancel":
                await other.call("cancel", op)
            words = "peer 'there', generation" if how == "kill" else f"that was to notify b'{op}' has failed"
            with pytest.raises(PeerLostError if how == "kill" else TransferError, match=words):
                await told
        stage.array[:] = 7
        await asyncio.sleep(0.05)
        assert (stage.array == 7).all(), "written to after the end"


async def test_a_killed_target_ends_transfers(hosts: Hosts, stage_of: Raise) -> None:
    async with within():
        pair = await (await stage_of()).pair(hosts[0])
        transfers = [pair.post("put", MANY), pair.post("get", MANY)]
        await moving(transfers[0])
        pair.other.kill()
        for transfer in transfers:
            with pytest.raises(PeerLostError, match="lost its peer"):
                await transfer


# ---- a target without Python --------------------------------------------------------------------------------------


@pytest.mark.parametrize("secure", [True, False], ids=["encrypted", "plain"])
async def test_a_target_whose_python_stands_still_serves(hosts: Hosts, stage_of: Raise, secure: bool) -> None:
    """Its interpreter is locked until both transfers have ended, so that no line of Python can have helped."""
    async with within():
        stage = await stage_of(secure=secure)
        pair = await stage.pair(hosts[0])
        loop = asyncio.get_running_loop()
        with pair.other.in_step("hold_interpreter") as gate:
            gate.setblocking(False)
            assert await loop.sock_recv(gate, 1) == b"!"
            await pair.post("get", checksum=True)
            assert (stage.array == pattern(2, SHAPE)).all()
            stage.array[:] = pattern(4, SHAPE)
            await pair.post("put", notify=b"meanwhile", checksum=True)
            gate.setblocking(True)
            gate.send(b"!")
        await pair.other.call("expect", b"meanwhile", timeout=10)
        assert await pair.other.call("matches", "far", 4)
