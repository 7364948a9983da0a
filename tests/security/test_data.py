"""What liars get from an agent's data connections: no byte that was not granted to them, and no one else's attention.

Agents are real, and so are their credentials. A liar here is a connection of the test that has the credentials of an
initiator, or the secret of its session, or both, and then says what no agent would.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import resource
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from authority import Authority
from frames import GET, HEAD, NOTE, PUT, head, run
from lent import until
from network import GO_ON, addresses, far, port_of
from peers import moving, pattern
from relay import Direction, Relay, relaying
from stage import within

from asyncxfer import (
    AccessError,
    Agent,
    Certificates,
    ChecksumError,
    NoRouteError,
    Peer,
    PreSharedKey,
    Region,
    TransferError,
    _address,
    _proof,
    _sockets,
)
from asyncxfer._data import Asked, Sealing, Wire, ask
from asyncxfer._fast import completion as native
from asyncxfer._identity import host, process
from asyncxfer._line import Line
from asyncxfer._metadata import (
    Beat,
    Bye,
    Hello,
    Letter,
    LetterAck,
    Ready,
    Refused,
    RegionRemoved,
    Welcome,
    encode_frame,
)
from asyncxfer._preface import Kind, Preface

Bytes = npt.NDArray[np.uint8]
KEY = PreSharedKey(b"a secret for tests, 32 bytes lng")
AUTHORITY = Authority()
ROOM = 1 << 16  # bytes of the region, and of what lies before and behind it
CONFIG = {"lost_after": 2.0}

pytestmark = pytest.mark.blocking("the test itself connects, and the relay that it waits for is a thread")


# ---- who plays ----------------------------------------------------------------------------------------------------


class Pair:
    """Agents "a" and "b"; b has the region "kv" in the middle of `memory`, whose bytes are all 1."""

    def __init__(self, a: Agent, b: Agent, peer: Peer, memory: Bytes, region: Region) -> None:
        self.a = a
        self.b = b
        self.peer = peer
        self.memory = memory
        self.region = region

    @property
    def line(self) -> Line:
        return line_of(self.a)

    def unharmed(self) -> bool:
        return bool((self.memory == 1).all())

    async def prove(self) -> None:
        """What a is entitled to still works."""
        there = self.peer["kv"].bytes[:]
        local = np.ones(ROOM, np.uint8)
        async with self.a.register(local) as own:
            await self.a.put(own.bytes[:], there, checksum=True)
            local[:] = 0
            await self.a.get(own.bytes[:], there, checksum=True)
        assert (local == 1).all()


def line_of(agent: Agent) -> Line:
    (line,) = agent._live.peers._lines.values()  # type: ignore[union-attr]
    return line


def agent(name: str, credentials: Certificates | PreSharedKey | None = KEY, **config: Any) -> Agent:
    return far(name, credentials=credentials, backends=["local", "tcp"], config=CONFIG | config)


@asynccontextmanager
async def pair_of(mine: Callable[[str], Any] = lambda _: KEY, **config: Any) -> AsyncIterator[Pair]:
    async with agent("a", mine("a"), **config) as a, agent("b", mine("b"), **config) as b:
        memory = np.ones(3 * ROOM, np.uint8)
        async with b.register(memory[ROOM : 2 * ROOM], name="kv") as region:
            peer = await a.connect("b")
            yield Pair(a, b, peer, memory, region)


@asynccontextmanager
async def knocking(port: int, credentials: Certificates | PreSharedKey | None) -> AsyncIterator[Wire]:
    """A data connection on which no session was named yet, encrypted where there are credentials."""
    sock = socket.create_connection(("127.0.0.1", port))
    sock.setblocking(False)
    tls = None
    try:
        await _sockets.write_all(sock, Preface(Kind.DATA, tls=credentials is not None).encode())
        answer = await _sockets.read_exactly(sock, 8)
        assert answer == GO_ON, answer
        if credentials is not None:
            tls = await Sealing(credentials).handshake(sock, server=False)
        yield Wire(sock, tls)
    finally:
        if tls is not None:
            tls.close()
        sock.close()


@asynccontextmanager
async def inside(pair: Pair, *, encrypted: bool = False, index: int = 9) -> AsyncIterator[Wire]:
    """A data connection of a's session with b on which the test says what it likes."""
    async with knocking(port_of(pair.b.metadata()), KEY if encrypted else None) as wire:
        await ask(wire, Asked(pair.line._session, index, "tcp"), pair.line._secret)
        yield wire


async def answered(wire: Wire) -> tuple[int, bytes]:
    """The next answer: its status, and its payload."""
    fields = HEAD.unpack(await wire.read(HEAD.size))
    kind, status, nbytes = fields[1], fields[3], fields[12]
    payload = await wire.read(nbytes + 8) if kind == 5 and status == 0 else b""
    return status, payload[:-8]


both_ways = pytest.mark.parametrize("encrypted", [True, False], ids=["encrypted", "plain"])


# ---- getting in ---------------------------------------------------------------------------------------------------


async def lie(wire: Wire, asked: Asked, proof: Callable[[bytes, bytes], bytes]) -> bytes:
    """Ask for a data connection without looking at what the other side proves; what it says in the end."""
    name, nonce = asked.backend.encode(), bytes(range(16))
    await wire.write(struct.pack(">16s16sHB", asked.session, nonce, asked.number, len(name)) + name)
    theirs = await wire.read(48)
    await wire.write(proof(nonce + theirs[:16], theirs[16:]))
    return await wire.read(1)


@both_ways
async def test_who_lies_about_a_session_gets_no_connection(encrypted: bool) -> None:
    async with within(), pair_of(encrypt_data=encrypted) as pair, agent("c", encrypt_data=encrypted) as c:
        await c.connect("b")
        session, secret, others = pair.line._session, pair.line._secret, line_of(c)._secret

        def proving(secret: bytes, backend: str = "tcp") -> Callable[[bytes, bytes], bytes]:
            return lambda nonces, _: _proof.data(secret, b"client", nonces, 9, backend)

        lies: dict[str, tuple[bytes, Callable[[bytes, bytes], bytes]]] = {
            "no secret": (session, proving(bytes(32))),
            "the secret of another session": (session, proving(others)),
            "no such session": (bytes(16), proving(secret)),
            "what the other side has proven": (session, lambda _, theirs: theirs),
            "another backend": (session, proving(secret, "shm")),
        }
        for what, (named, proof) in lies.items():
            async with knocking(port_of(pair.b.metadata()), KEY if encrypted else None) as wire:
                with pytest.raises(OSError, match=r"closed|ended|reset|TLS"):
                    raise AssertionError(f"{what}: {await lie(wire, Asked(named, 9, 'tcp'), proof)!r}")
        async with knocking(port_of(pair.b.metadata()), KEY if encrypted else None) as wire:
            assert await lie(wire, Asked(session, 9, "tcp"), proving(secret)) == b"\0"
        await pair.prove()


async def test_with_the_secret_and_another_certificate_there_is_no_connection() -> None:
    async with within(), pair_of(AUTHORITY.credentials) as pair:
        asked = Asked(pair.line._session, 9, "tcp")
        async with knocking(port_of(pair.b.metadata()), AUTHORITY.credentials("c")) as wire:
            with pytest.raises(OSError, match=r"closed|ended|reset|TLS"):
                await ask(wire, asked, pair.line._secret)
        async with knocking(port_of(pair.b.metadata()), AUTHORITY.credentials("a")) as wire:
            await ask(wire, asked, pair.line._secret)
        await pair.prove()


class Recorded(Wire):
    """One whose writes are kept."""

    said = b""

    async def write(self, data: bytes) -> None:
        self.said += data
        await super().write(data)


async def test_a_handshake_that_was_overheard_is_worth_nothing() -> None:
    async with within(), pair_of(encrypt_data=False) as pair:
        async with knocking(port_of(pair.b.metadata()), None) as wire:
            first = Recorded(wire.sock, wire.tls)
            await ask(first, Asked(pair.line._session, 9, "tcp"), pair.line._secret)
            await first.write(head(GET, slot=pair.region.slot, epoch=pair.region.epoch) + run())
            assert await answered(first) == (0, b"\x01" * 64)
        async with knocking(port_of(pair.b.metadata()), None) as wire:
            await wire.write(first.said)
            assert len(await wire.read(48)) == 48
            with pytest.raises(OSError, match=r"closed|reset"):
                await wire.read(1)
        await pair.prove()


async def test_plain_data_where_encryption_is_demanded() -> None:
    async with within(), pair_of() as pair:
        with pytest.raises(AssertionError, match=r"AXF.x01.x05"):
            async with knocking(port_of(pair.b.metadata()), None):
                pass
        async with agent("c", encrypt_data=False) as c, c.register(bytearray(8)) as own:
            peer = await c.connect("b")
            with pytest.raises(NoRouteError, match="it takes encrypted data only"):
                c.get(own.bytes[:], peer["kv"].bytes[:8])
        await pair.prove()


async def test_encryption_where_there_are_no_credentials() -> None:
    async with within(), pair_of(lambda _: None) as pair:
        with pytest.raises(AssertionError, match=r"AXF.x01.x02"):
            async with knocking(port_of(pair.b.metadata()), KEY):
                pass
        await pair.prove()


async def test_encrypted_data_where_it_is_not_demanded() -> None:
    async with within(), agent("a") as a, agent("b", encrypt_data=False) as b:
        memory = np.ones(64, np.uint8)
        async with b.register(memory, name="kv"), a.register(bytearray(64)) as own:
            peer = await a.connect("b")
            assert (await a.put(own.bytes[:], peer["kv"].bytes[:])).backend == "tcp"
            assert not memory.any()


@both_ways
async def test_backends_that_take_no_connection(encrypted: bool) -> None:
    async with within(), pair_of(encrypt_data=encrypted) as pair:
        for backend in ("nothing", "local", "", "x" * 255):
            async with knocking(port_of(pair.b.metadata()), KEY if encrypted else None) as wire:
                with pytest.raises(OSError, match=r"closed|ended|reset|TLS"):
                    await ask(wire, Asked(pair.line._session, 9, backend), pair.line._secret)
        await pair.prove()


async def test_a_session_has_so_many_connections_and_no_more() -> None:
    async with within(), pair_of(encrypt_data=False) as pair:
        async with inside(pair, index=15) as wire:
            await wire.write(head(GET, slot=pair.region.slot, epoch=pair.region.epoch) + run())
            assert (await answered(wire))[0] == 0
        with pytest.raises(OSError, match=r"closed|reset"):
            async with inside(pair, index=16):
                pass
        await pair.prove()


# ---- what was not granted -----------------------------------------------------------------------------------------

OUTSIDE = [
    run(offset=ROOM - 63),
    run(offset=ROOM),
    run(offset=2**64 - 64),
    run(offset=2**63),
    run(offset=0, length=32, stride=-32, count=2),
    run(offset=0, length=32, stride=ROOM, count=2),
    run(offset=64, length=32, stride=-(2**63), count=2),
    run(segment=1),
]


@both_ways
async def test_rows_outside_a_region_are_neither_read_nor_written(encrypted: bool) -> None:
    async with within(), pair_of(encrypt_data=encrypted) as pair:
        where = {"slot": pair.region.slot, "epoch": pair.region.epoch}
        async with inside(pair, encrypted=encrypted) as wire:
            for op, outside in enumerate(OUTSIDE, 1):
                await wire.write(head(PUT, op=op, **where) + outside + b"\xff" * 64 + bytes(8))
                assert await answered(wire) == (native.STATUS_DENIED, b"")
                await wire.write(head(GET, op=op, **where) + outside)
                assert await answered(wire) == (native.STATUS_DENIED, b"")
            assert pair.unharmed()
            await wire.write(head(GET, op=99, **where) + run(offset=ROOM - 64))
            assert await answered(wire) == (0, b"\x01" * 64)
        await pair.prove()
        assert pair.unharmed()


async def attempt(wire: Wire, region: Region, op: int) -> list[int]:
    """Put to a region and get from it; the two statuses."""
    found = []
    for kind, payload in ((PUT, b"\xff" * 64 + bytes(8)), (GET, b"")):
        await wire.write(head(kind, op=op, slot=region.slot, epoch=region.epoch) + run() + payload)
        status, got = await answered(wire)
        assert not got.strip(b"\x01")
        found.append(status)
    return found


@both_ways
async def test_a_region_that_was_not_granted_does_not_exist(encrypted: bool) -> None:
    secret = np.ones(ROOM, np.uint8)
    async with within(), pair_of(encrypt_data=encrypted) as pair:
        async with pair.b.register(secret, name="hidden", grants=["someone else"]) as hidden:
            await pair.prove()
            assert set(pair.peer.regions) == {"kv"}
            async with inside(pair, encrypted=encrypted) as wire:
                assert await attempt(wire, hidden, 1) == [native.STATUS_REVOKED] * 2
                hidden.grant("a", "r")
                assert await attempt(wire, hidden, 2) == [native.STATUS_DENIED, native.STATUS_OK]
                hidden.grant("a", "w")
                await hidden.revoke("a")
                assert await attempt(wire, hidden, 3) == [native.STATUS_REVOKED] * 2
        assert (secret == 1).all()
        await pair.prove()


async def test_a_grant_that_was_narrowed_holds_at_once() -> None:
    async with within(), pair_of(encrypt_data=False) as pair:
        async with inside(pair) as wire, pair.a.register(np.zeros(ROOM, np.uint8)) as own:
            there = pair.peer["kv"]
            pair.region.grant("a", "r")
            assert await attempt(wire, pair.region, 1) == [native.STATUS_DENIED, native.STATUS_OK]
            await until(lambda: there.access == "r")
            with pytest.raises(AccessError):
                pair.a.put(own.bytes[:], there.bytes[:])
            await pair.a.get(own.bytes[:], there.bytes[:])
        assert pair.unharmed()


@both_ways
@pytest.mark.parametrize("how", ["revoke", "narrow"])
async def test_a_grant_that_is_withdrawn_in_mid_transfer(how: str, encrypted: bool) -> None:
    rows = list(range(16)) * 4096
    async with within(), pair_of(encrypt_data=encrypted) as pair:
        async with (
            pair.b.allocate((16, 1 << 14), np.uint8, name="much") as region,
            pair.a.register(np.full((16, 1 << 14), 2, np.uint8)) as own,
        ):
            memory = region.array
            there = await pair.peer.region("much")
            transfer = pair.a.put(own[rows], there[rows], notify=b"never")
            await moving(transfer)
            if how == "revoke":
                await region.revoke("a")
                memory[:] = 7
            else:
                region.grant("a", "r")
            with pytest.raises(TransferError) as ended:
                await transfer
            assert not transfer.cancel()
            assert ended.value.nbytes < len(rows) << 14
            memory[:] = 7
            with pytest.raises(TransferError, match=r"notify b'never' has failed"):
                await pair.b.expect(b"never", peer="a")
            assert (memory == 7).all(), "written to after the grant was withdrawn"
        await pair.prove()


async def test_bytes_for_a_grant_that_was_withdrawn_land_nowhere() -> None:
    """The initiator is a liar that goes on with what it had begun, also when the region is granted to it again."""
    half = ROOM // 2
    async with within(), pair_of(encrypt_data=False) as pair, inside(pair) as wire:
        middle = pair.memory[ROOM : 2 * ROOM]
        where = {"slot": pair.region.slot, "epoch": pair.region.epoch}
        await wire.write(head(PUT, nbytes=ROOM, **where) + run(length=ROOM) + b"\x02" * half)
        await until(lambda: bool((middle[:half] == 2).all()))
        await pair.region.revoke("a")
        middle[:] = 1
        await wire.write(b"\x02" * half + bytes(8))
        assert (await answered(wire))[0] == native.STATUS_REVOKED
        assert pair.unharmed()
        pair.region.grant("a", "rw")
        await wire.write(head(PUT, op=2, nbytes=ROOM, **where) + run(length=ROOM) + b"\x01" * ROOM + bytes(8))
        assert (await answered(wire))[0] == native.STATUS_OK
        assert pair.unharmed()


# ---- noise --------------------------------------------------------------------------------------------------------

EDGES = [0, 1, 2, 63, 64, 65, ROOM - 64, ROOM, 1 << 31, (1 << 32) - 1]
WIDE = [*EDGES, 1 << 32, 1 << 63, (1 << 64) - 64, (1 << 64) - 1]
STRIDES = [0, 1, 64, -1, -64, ROOM, 1 << 62, -(1 << 63), (1 << 63) - 1]
BATCH = 150
DATA_ROUNDS, CONTROL_ROUNDS = 480, 210  # with BATCH frames and one more: a hundred thousand


def bent(frame: bytes, draw: random.Random) -> bytes:
    """A frame with some bits or bytes changed, cut off, or grown."""
    data = bytearray(frame)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data))
        data[at] = draw.choice((0, 0xFF, data[at] ^ 1 << draw.randrange(8), draw.randrange(256)))
    how = draw.random()
    return bytes(data[: draw.randrange(len(data))] if how < 0.1 else data + draw.randbytes(9) if how < 0.2 else data)


def request(draw: random.Random, op: int, regions: list[Region]) -> bytes:
    """A request that asks for what it likes, in a form that the target has to go through with."""
    region = draw.choice(regions)
    slot = draw.choice((region.slot, region.slot, region.slot, 0, 16383, 16384, (1 << 32) - 1))
    epoch = draw.choice((region.epoch, region.epoch, region.epoch, region.epoch + 1, 0))
    kind = draw.choice((PUT, PUT, GET, GET, NOTE))
    told = kind == NOTE or draw.random() < 0.1
    tag = draw.randbytes(draw.randrange(16)) if told else b""
    flags = (4 if told else 0) | draw.randrange(4)
    if kind == NOTE:
        return head(kind, op=op, runs=0, nbytes=0, flags=flags, slot=slot, epoch=epoch, tag=len(tag)) + tag
    runs = [
        run(draw.choice(WIDE), draw.choice(WIDE), draw.choice(STRIDES), draw.choice(EDGES), draw.randrange(2))
        if draw.random() < 0.5
        else run(draw.randrange(ROOM - 64), 64)
        for _ in range(draw.choice((1, 1, 1, 3)))
    ]
    settled = draw.choice((0, op - 1, op))
    start = head(
        kind, op=op, runs=len(runs), flags=flags, slot=slot, epoch=epoch, tag=len(tag), settled=settled
    )  # fmt: skip
    payload = draw.randbytes(64) + struct.pack("<II", draw.randrange(2), draw.randrange(1 << 32))
    return start + b"".join(runs) + tag + (payload if kind == PUT else b"")


async def data_noise(pair: Pair, liar: Agent, regions: list[Region], draw: random.Random) -> int:
    """Send requests of all kinds in the session of `liar`, and behind them one that is broken; how many were sent."""
    line, sent, op = line_of(liar), 0, 0
    statuses = set()
    for round_ in range(DATA_ROUNDS):
        async with knocking(port_of(pair.b.metadata()), None) as wire:
            await ask(wire, Asked(line._session, 8 + round_ % 8, "tcp"), line._secret)
            batch = []
            for _ in range(BATCH):
                op += 1
                batch.append(request(draw, op, regions))
            await wire.write(b"".join(batch))
            for _ in batch:
                statuses.add((await answered(wire))[0])
            with contextlib.suppress(OSError):
                await wire.write(bent(request(draw, op + 1, regions), draw) + bytes(4096))
                wire.sock.shutdown(socket.SHUT_WR)
                while await wire.read(1):
                    pass
            sent += BATCH + 1
    assert statuses >= {native.STATUS_OK, native.STATUS_DENIED, native.STATUS_REVOKED, native.STATUS_FAULT}
    return sent


def letters(draw: random.Random) -> list[bytes]:
    """Frames that an initiator may send, in an order in which it may send them."""
    frames: list[bytes] = []
    seq = 0
    for _ in range(BATCH):
        what = draw.random()
        if what < 0.4:
            seq += 1
            frames.append(encode_frame(Letter(seq, draw.choice((b"N", b"F")), draw.randbytes(draw.randrange(40)))))
        elif what < 0.7 and seq:
            frames.append(encode_frame(Letter(draw.randint(0, seq), b"N", draw.randbytes(8))))
        else:
            frames.append(encode_frame(Beat(asks=draw.random() < 0.5)))
    return frames


async def control_noise(pair: Pair, liar: Agent, draw: random.Random) -> int:
    """Say hello as an initiator, or something like it, then frames of all kinds, and at last a broken one."""
    address = _address.parse(addresses(pair.b.metadata())[0])
    dialler, sent = line_of(liar)._dialler, 0
    hello = encode_frame(Hello(name="liar", generation=1, process=process(), host=host()))
    odd = [
        hello,
        encode_frame(Letter(1, b"N", b"tag")),
        encode_frame(LetterAck(1 << 40)),
        encode_frame(Ready()),
        encode_frame(Bye("bye")),
        encode_frame(Refused("no")),
        encode_frame(Beat()),
        encode_frame(RegionRemoved(1)),
        encode_frame(
            Welcome(
                name="b", generation=1, process=process(), host=host(), session=bytes(16), secret=bytes(32), slots=1
            )
        ),
        encode_frame(
            Hello(
                name="a", generation=1, process=process(), host=host(), resume=line_of(pair.a)._session,
                attempt=1 << 60, proof=bytes(32),
            )
        ),
    ]  # fmt: skip
    for _ in range(CONTROL_ROUNDS):
        channel = await dialler.control(address, "b")
        over = asyncio.get_running_loop().create_future()
        channel.follow(lambda frame, fds: None, over.set_result)
        frames = [hello, *letters(draw)] if draw.random() < 0.9 else []
        for frame in frames:
            channel.send(frame)
        channel.send(bent(draw.choice(odd), draw) or b"?")
        channel.send(b"nonsense")
        await over
        channel.release()
        sent += len(frames) + 1
    return sent


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.stress
async def test_a_hundred_thousand_lies_change_nothing() -> None:
    draw = random.Random(20_260)
    readable, hidden, room = np.ones(ROOM, np.uint8), np.ones(ROOM, np.uint8), np.ones((3, ROOM), np.uint8)
    async with asyncio.timeout(60), pair_of(encrypt_data=False) as pair, agent("liar", encrypt_data=False) as liar:
        async with (
            pair.b.register(room[1], name="mine", grants=["liar"]) as mine,
            pair.b.register(readable, name="readable", grants={"liar": "r"}) as shown,
            pair.b.register(hidden, name="hidden", grants=["a"]) as unseen,
        ):
            await liar.connect("b")
            regions = [mine, shown, unseen]
            lying = asyncio.gather(
                data_noise(pair, liar, regions, random.Random(draw.random())),
                control_noise(pair, liar, random.Random(draw.random())),
            )
            proven, early = 0, 0
            while not lying.done():
                await pair.prove()
                proven += 1
                early = early or (resident() if proven == 20 else 0)
                await asyncio.sleep(0.01)
            assert sum(await lying) >= 100_000
            assert proven > 20
            assert resident() - early < 64 << 20
            assert pair.unharmed()
            for untouched in (readable, hidden, room[0], room[2]):
                assert (untouched == 1).all()
            assert (room[1] != 1).any()
            async with agent("c", encrypt_data=False) as c, c.register(bytearray(ROOM)) as own:
                peer = await c.connect("b")
                await c.get(own.bytes[:], peer["kv"].bytes[:], checksum=True)
        await pair.prove()


# ---- those that take their time -----------------------------------------------------------------------------------


async def drip(wire: Wire, data: bytes) -> None:
    """Say something a byte at a time, until the other side has had enough."""
    with contextlib.suppress(OSError):
        for at in range(len(data)):
            await wire.write(data[at : at + 1])
            await asyncio.sleep(0.02)
        await wire.read(1000)
        raise AssertionError("it was heard out")


@both_ways
async def test_strangers_that_drip_hold_up_nobody(encrypted: bool) -> None:
    async with within(), pair_of(encrypt_data=encrypted, handshake_timeout=1.0) as pair:
        said = struct.pack(">16s16sHB", pair.line._session, bytes(16), 9, 3) + b"tcp" + bytes(200)
        (listener,) = pair.b._live.peers.acceptor._listeners  # type: ignore[union-attr]
        async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as dripping:
            for _ in range(30):
                knock = knocking(port_of(pair.b.metadata()), KEY if encrypted else None)
                dripping.create_task(drip(await stack.enter_async_context(knock), said))
            for _ in range(3):
                await pair.prove()
            async with agent("c", encrypt_data=encrypted) as c, c.register(bytearray(8)) as own:
                peer = await c.connect("b")
                await c.get(own.bytes[:], peer["kv"].bytes[:8])
            assert listener._strangers
        await until(lambda: not listener._strangers)
        await pair.prove()


async def test_a_request_that_never_ends_holds_up_nobody() -> None:
    """Neither other connections, nor other sessions, nor the end of the region, nor that of the agent."""
    async with within(), pair_of(encrypt_data=False) as pair, agent("c", encrypt_data=False) as c:
        await c.connect("b")
        where = {"slot": pair.region.slot, "epoch": pair.region.epoch}
        async with inside(pair, index=8) as slow, inside(pair, index=9) as slower:
            await slow.write(head(PUT, nbytes=ROOM, **where) + run(length=ROOM) + b"\x01" * 1000)
            await slower.write(head(GET, **where)[:-1])
            await pair.prove()
            async with c.register(bytearray(8)) as own:
                await c.get(own.bytes[:], line_peer(c)["kv"].bytes[:8])
            await pair.region.aclose()
            pair.memory[:] = 1
            await slow.write(b"\xff" * (ROOM - 1000) + bytes(8))
            assert (await answered(slow))[0] == native.STATUS_REVOKED
            assert pair.unharmed()
            await pair.b.aclose()


def line_peer(agent: Agent) -> Peer:
    (peer,) = agent._live.peers._lines  # type: ignore[union-attr]
    return peer


async def test_who_asks_and_does_not_read_costs_little() -> None:
    async with within(), pair_of(encrypt_data=False) as pair:
        question = head(GET, nbytes=ROOM, slot=pair.region.slot, epoch=pair.region.epoch) + run(length=ROOM)
        async with inside(pair) as wire:
            before = resident()
            with contextlib.suppress(TimeoutError):
                while True:  # until it is not heard any more
                    async with asyncio.timeout(0.3):
                        await wire.write(question * 64)
            assert resident() - before < 32 << 20
            await pair.prove()
            await pair.region.aclose()
        assert pair.unharmed()


# ---- bits that flip -----------------------------------------------------------------------------------------------

CHUNK = 8192  # bytes: of four, and eight rows, a transfer consists here
HEADS: dict[str, int] = {"put": HEAD.size + 32, "get": HEAD.size}  # before a chunk, on the way of the payload
TAIL = 8


@asynccontextmanager
async def flipping(relay: Relay) -> AsyncIterator[Pair]:
    """Agents whose one data connection, number 1, goes through the relay in plain text."""
    listen = f"tcp://127.0.0.1:0?advertise=127.0.0.1:{relay.port}"
    config = CONFIG | {"encrypt_data": False, "tcp_streams": 1, "chunk_bytes": CHUNK}
    backends = ["local", "tcp"]
    async with (
        far("b", listen=listen, credentials=KEY, backends=backends, config=config) as b,
        far("a", credentials=KEY, backends=backends, config=config) as a,
    ):
        (listener,) = b._live.peers.acceptor._listeners  # type: ignore[union-attr]
        relay.target = listener._sock.getsockname()[1]
        memory = np.ones((64, 1024), np.uint8)
        async with b.register(memory, name="kv") as region:
            yield Pair(a, b, await a.connect("b"), memory, region)


def flip_last_chunk(relay: Relay, op: str, *, times: int) -> None:
    """Flip a bit in row 26 of 32, each time that it comes by from now on."""
    direction: Direction = "there" if op == "put" else "back"
    at = relay.carried(1, direction)
    for coming in range(3, 3 + times):
        place = at + coming * (HEADS[op] + CHUNK + TAIL) + HEADS[op] + 2 * 1024 + 100
        relay.flip(place, connection=1, direction=direction, bit=3)


def ends(op: str, here: Bytes, there: Bytes) -> tuple[Bytes, Bytes]:
    """Where the bytes come from, and where they go: every other row here, the first rows there."""
    return (here[::2], there[:32]) if op == "put" else (there[:32], here[::2])


@pytest.mark.parametrize("op", ["put", "get"])
@pytest.mark.parametrize("times", [0, 1, 2])
async def test_a_flipped_bit_is_noticed_where_that_is_asked_for(op: str, times: int) -> None:
    async with within(), relaying() as relay, flipping(relay) as pair:
        local = np.zeros((64, 1024), np.uint8)
        source, target = ends(op, local, pair.memory)
        async with pair.a.register(local) as own:
            source[:] = pattern(3, (32, 1024))
            post = pair.a.put if op == "put" else pair.a.get
            flip_last_chunk(relay, op, times=times)
            transfer = post(own[::2], pair.peer["kv"][:32], checksum=True)
            if times < 2:
                await transfer
            else:
                with pytest.raises(ChecksumError, match="arrived damaged, twice: rows 24 to 31 of the local list"):
                    await transfer
                await post(own[::2], pair.peer["kv"][:32], checksum=True, notify=b"whole")
                assert (await pair.b.expect(b"whole")).peer == "a"
            assert (target == source).all()


@pytest.mark.parametrize("op", ["put", "get"])
async def test_a_flipped_bit_passes_where_nobody_asks(op: str) -> None:
    async with within(), relaying() as relay, flipping(relay) as pair:
        local = np.zeros((64, 1024), np.uint8)
        source, target = ends(op, local, pair.memory)
        async with pair.a.register(local) as own:
            source[:] = pattern(3, (32, 1024))
            post = pair.a.put if op == "put" else pair.a.get
            flip_last_chunk(relay, op, times=1)
            await post(own[::2], pair.peer["kv"][:32])
            assert np.argwhere(target != source).tolist() == [[26, 100]]
            assert target[26, 100] ^ source[26, 100] == 8
