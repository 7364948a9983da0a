"""A control connection over TCP that breaks: it is made anew, and nothing is lost or comes twice; or it is over."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

import pytest
from lent import until
from network import CONTROL, FAR, GO_ON, LOCAL, Raw, far, framed, until_state
from relay import Relay, relaying
from stage import Cast, within

from asyncxfer import Agent, PeerLostError, PeerState
from asyncxfer._metadata import Hello, decode_frame, encode_frame
from asyncxfer._stream import StreamChannel


def behind(relay: Relay, **more: object) -> Agent:
    """An agent that others reach through the relay; `met` has to follow."""
    return far("b", listen=f"{LOCAL}?advertise=127.0.0.1:{relay.port}", **more)  # type: ignore[arg-type]


def aim(relay: Relay, agent: Agent) -> None:
    """Point the relay at an agent's listener, whose own port is in no metadata."""
    listener = agent._live.peers.acceptor._listeners[-1]  # type: ignore[union-attr]
    relay.target = listener._sock.getsockname()[1]


async def test_letters_are_neither_lost_nor_doubled_nor_out_of_order() -> None:
    async with within(), relaying() as relay, far("a") as a, behind(relay) as b:
        aim(relay, b)
        peer = await a.connect("b")
        events, inbox = a.events(), b.notifications()
        sent, got = [], []
        for round_ in range(5):
            sent += [peer.notify(b"%d before %d" % (round_, n)) for n in range(50)]
            relay.deaf = round_ % 2 == 1  # letters arrive, what acknowledges them does not
            got.append((await anext(inbox)).tag)
            relay.cut()
            relay.deaf = False
            await until_state(events, PeerState.SUSPECT)
            sent += [peer.notify(b"%d during %d" % (round_, n)) for n in range(50)]
            await until_state(events, PeerState.JOINED)
        await asyncio.gather(*sent)
        got += [(await anext(inbox)).tag for _ in sent[len(got) :]]
        expected = [
            b"%d %s %d" % (round_, when, n) for round_ in range(5) for when in (b"before", b"during") for n in range(50)
        ]
        assert got == expected
        await peer.notify(b"last")
        assert (await anext(inbox)).tag == b"last"
        assert relay.count == 6
        assert b.stats()["served"].keys() == {"a"}


async def test_regions_that_changed_meanwhile() -> None:
    async with within(), relaying() as relay, far("a") as a, behind(relay) as b:
        aim(relay, b)
        peer = await a.connect("b")
        stays, goes = await b.register(bytearray(8), name="stays"), await b.register(bytearray(8), name="goes")
        same, old = await peer.region("stays"), await peer.region("goes")
        relay.shut = True
        relay.cut()
        await until(lambda: peer.state is PeerState.SUSPECT)
        assert peer.link.alive
        await goes.aclose()
        await b.register(bytearray(16), name="goes")
        await b.register(bytearray(8), name="comes")
        stays.grant("a", "r")
        relay.shut = False
        await until(lambda: peer.state is PeerState.JOINED)
        assert set(peer.regions) == {"stays", "goes", "comes"}
        assert (peer["stays"] is same, same.access) == (True, "r")
        assert (old.closed is not None, peer["goes"].nbytes) == (True, 16)


async def test_both_sides_see_it_suspect_and_joined_again() -> None:
    async with within(), relaying() as relay, far("a") as a, behind(relay) as b:
        aim(relay, b)
        await a.connect("b")
        for events, name in ((a.events(), "b"), (b.events(), "a")):
            relay.shut = True
            relay.cut()
            await until_state(events, PeerState.SUSPECT, name)
            relay.shut = False
            await until_state(events, PeerState.JOINED, name)


async def test_one_that_does_not_come_back_is_lost_on_both_sides() -> None:
    config = {"lost_after": 0.4, "handshake_timeout": 0.4}
    async with within(), relaying() as relay, far("a", config=config) as a, behind(relay, config=config) as b:
        aim(relay, b)
        peer = await a.connect("b")
        here, there = a.events(), b.events()
        sent = peer.notify(b"first")
        await sent
        relay.shut = True
        relay.cut()
        late = peer.notify(b"never")
        with pytest.raises(PeerLostError, match="notification to 'b' lost its peer"):
            await late
        await until_state(here, PeerState.LOST, "b")
        await until_state(there, PeerState.LOST, "a")
        with pytest.raises(PeerLostError, match=r"could not be reached again within 0.4 s.*lost_after"):
            peer.notify(b"more")
        await until(lambda: a.stats()["peers"] == 0)
        relay.shut = False
        assert (await a.connect("b")) is not peer


async def test_another_generation_answers(cast: Cast) -> None:
    async with within(), relaying() as relay:
        listen = f"{LOCAL}?advertise=127.0.0.1:{relay.port}"
        with socket.create_server(("127.0.0.1", 0)) as free:
            relay.target = free.getsockname()[1]
        listen = f"tcp://127.0.0.1:{relay.target}?advertise=127.0.0.1:{relay.port}"
        first = cast.spawn()
        peer = await cast.here.connect(await first.call("start", "there", FAR, listen=listen))
        relay.shut = True
        first.kill()
        first.wait_dead()
        second = cast.spawn()
        metadata = await second.call("start", "there", FAR, listen=listen)
        relay.shut = False
        await until(lambda: peer.state is PeerState.LOST)
        newer = await cast.here.connect(metadata)
        assert f"generation {peer.generation}, is gone" in str(peer.lost)
        assert f"it is 'there', generation {newer.generation}" in str(peer.lost)


async def test_leaving_while_the_connection_is_down() -> None:
    async with within(), relaying() as relay, far("a") as a, behind(relay, config={"lost_after": 0.3}) as b:
        aim(relay, b)
        peer = await a.connect("b")
        relay.shut = True
        relay.cut()
        await until(lambda: peer.state is PeerState.SUSPECT)
        await peer.aclose()
        assert a.stats()["peers"] == 0
        relay.shut = False
        assert (await a.connect("b")).state is PeerState.JOINED


def _ignore(*_: object) -> None:
    pass


async def test_a_resumption_replaces_a_connection_that_is_still_up() -> None:
    async with within(), relaying() as relay, far("a") as a, behind(relay) as b:
        aim(relay, b)
        peer = await a.connect("b")
        (line,) = a._live.peers._lines.values()  # type: ignore[union-attr]
        first = line.outgoing
        first.follow(_ignore, _ignore, _ignore, _ignore)  # its end may be heard early, and the agent would act on it
        await line._resume()
        assert line.outgoing is not first
        a._live.peers._follow(peer, line)  # type: ignore[union-attr]
        await until(lambda: first.channel.ended)
        first.channel.release()
        await peer.notify(b"over the second")
        assert (await b.expect(b"over the second")).peer == "a"
        assert len(b._live.peers.acceptor.incoming) == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("what", ["again", "proof", "name", "session", "attempt"])
async def test_a_resumption_without_proof_is_refused(what: str) -> None:
    async with within(), relaying() as relay, far("a") as a, behind(relay) as b:
        aim(relay, b)
        peer = await a.connect("b")
        told: list[bytes] = []
        send = StreamChannel.send

        def watched(self: StreamChannel, payload: bytes, fds: Sequence[int] = ()) -> None:
            told.append(payload)
            send(self, payload, fds)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StreamChannel, "send", watched)
            events = a.events()
            relay.cut()
            await until_state(events, PeerState.JOINED)
        (hello,) = [f for f in map(decode_frame, told) if isinstance(f, Hello)]
        changes: dict[str, dict[str, object]] = {
            "again": {},
            "proof": {"attempt": hello.attempt + 1, "proof": bytes(32)},
            "name": {"attempt": hello.attempt + 1, "name": "c"},
            "session": {"attempt": hello.attempt + 1, "resume": bytes(16)},
            "attempt": {"attempt": hello.attempt + 1},
        }
        forged = Hello(**{name: getattr(hello, name) for name in hello.__struct_fields__} | changes[what])
        with Raw(relay.target) as raw:
            await raw.send(CONTROL + framed(encode_frame(forged)))
            answer = await raw.read()
        assert answer.startswith(GO_ON)
        assert b"knows of no such connection" in answer
        await peer.notify(b"still here")
        assert (await b.expect(b"still here")).peer == "a"
        assert peer.state is PeerState.JOINED
