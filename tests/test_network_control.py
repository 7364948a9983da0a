"""Agents over TCP: they connect, see each other's regions, notify each other, and notice who is gone."""

from __future__ import annotations

import asyncio
import socket

import numpy as np
import pytest
from lent import until
from network import FAR, LOCAL, addresses, far, port_of, until_state
from stage import Cast, within

from asyncxfer import Agent, ConfigError, PeerLostError, PeerState, RegistrationError, TransferTimeout


async def test_regions_are_seen_and_come_and_go() -> None:
    async with far("a") as a, far("b") as b, within():
        async with b.register(np.zeros((2, 3), np.float32), name="first", access="r"):
            peer = await a.connect("b")
            remote = peer["first"]
            assert (remote.shape, remote.dtype, remote.access) == ((2, 3), "float32", "r")
            assert [s.backing for s in remote.info.segments] == [-1]
            async with b.allocate(8, "uint8", name="second"):
                assert (await peer.region("second")).nbytes == 8
                assert {s.backing for s in peer["second"].info.segments} == {-1}
            await until(lambda: "second" not in peer.regions)
        await until(lambda: not peer.regions)
        assert peer.link.remote
        assert "shm" in peer.refusals


async def test_notifications_arrive_once_and_in_order_both_ways() -> None:
    async with far("a") as a, far("b") as b, within():
        to_b, to_a = await a.connect("b"), await b.connect("a")
        tags = [b"%d" % n for n in range(500)]
        sent = [to_b.notify(tag) for tag in tags]
        inbox = b.notifications()
        assert [(await anext(inbox)).tag for _ in tags] == tags
        done = await sent[-1]
        assert done.backend == "control"
        await to_a.notify(b"back")
        assert (await a.expect(b"back")).peer == "b"
        assert all([await transfer for transfer in sent])
        large = bytes(32768)
        await to_b.notify(large)
        assert (await b.expect(large, peer="a")).tag == large


async def test_a_full_inbox_holds_up_the_sender_and_loses_nothing() -> None:
    async with far("a") as a, far("b", config={"backlog_bytes": 65536}) as b, within():
        peer = await a.connect("b")
        tags = [b"%04d" % n + bytes(20_000) for n in range(60)]
        sent = [peer.notify(tag) for tag in tags]
        await until(lambda: sum(t.done() for t in sent) >= 4)
        for _ in range(20):
            await asyncio.sleep(0)
        assert not sent[-1].done()
        inbox = b.notifications()
        assert [(await anext(inbox)).tag for _ in tags] == tags
        await sent[-1]


@pytest.mark.parametrize("listen", ["tcp://[::1]:0", "tcp://localhost:0", [LOCAL, "tcp://[::1]:0"]])
async def test_addresses_of_all_kinds(listen: str | list[str]) -> None:
    async with far("a", listen=None) as a, far("b", listen=listen) as b, within():
        assert (await a.connect("b")).link.remote
        for address in addresses(b.metadata()):
            assert address.startswith("tcp://")
            assert not address.endswith(":0")


async def test_an_agent_tells_its_addresses_and_the_unix_one_first() -> None:
    async with Agent("a", listen=[LOCAL, "tcp://127.0.0.1:0?advertise=node-1:4711"]) as a:
        unix, first, second = addresses(a.metadata())
        assert unix.startswith("unix:@")
        assert first.startswith("tcp://127.0.0.1:")
        assert second == "tcp://node-1:4711"
        async with Agent("b") as b, far("c") as c:
            assert not (await b.connect("a")).link.remote
            assert (await c.connect("a")).link.remote


async def test_the_next_address_is_tried() -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        closed = nobody.getsockname()[1]
    listen = [f"{LOCAL}?advertise=127.0.0.1:{closed}", LOCAL]
    async with far("a") as a, far("b", listen=listen), within():
        assert (await a.connect("b")).state is PeerState.JOINED


@pytest.mark.parametrize(
    ("listen", "words"),
    [
        ("127.0.0.1:0", "tcp://HOST:PORT"),
        ("tcp://127.0.0.1", "tcp://HOST:PORT"),
        ("tcp://127.0.0.1:65536", "tcp://HOST:PORT"),
        ("tcp://::1:0", "brackets"),
        ("tcp://[1.2.3.4]:0", "brackets"),
        ("tcp://a b:0", "no host"),
        ("tcp://0.0.0.0:0", r"advertise=HOST"),
        ("tcp://[::]:0", r"advertise=HOST"),
        ("tcp://0.0.0.0:0?advertise=0.0.0.0", "wildcard"),
        ("tcp://127.0.0.1:0?announce=x", "advertise=HOST"),
        (["tcp://127.0.0.1:0", 5], "listen has 5"),
    ],
)
def test_addresses_that_cannot_be_listened_on(listen: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Agent("a", listen=listen)


async def test_a_listener_beyond_this_host_needs_credentials_or_a_word() -> None:
    listen = "tcp://0.0.0.0:0?advertise=127.0.0.1"
    with pytest.raises(ConfigError, match=r"credentials=.*open_listener"):
        await Agent("a", listen=listen).start()
    async with far("a") as a, far("b", listen=listen, config={"open_listener": True}), within():
        assert (await a.connect("b")).link.remote


async def test_an_address_that_is_taken_or_not_there() -> None:
    async with far("a") as a:
        with pytest.raises(ConfigError, match="cannot be bound: Address already in use"):
            await Agent("b", listen=addresses(a.metadata())[0]).start()
    with pytest.raises(ConfigError, match=r"cannot be bound: Cannot assign"):
        await Agent("b", listen="tcp://192.0.2.1:0", config={"open_listener": True}).start()
    with pytest.raises(ConfigError, match="has no address"):
        await Agent("b", listen="tcp://nowhere.invalid:0").start()


async def test_metadata_of_an_agent_that_has_ended() -> None:
    async with far("a") as a, within():
        async with far("b") as b:
            stale, port = b.metadata(), port_of(b.metadata())
        with pytest.raises(PeerLostError, match=rf"agent 'b', generation \d+, has ended .*127.0.0.1:{port}: .*refused"):
            await a.connect(stale)
        async with far("b", listen=f"tcp://127.0.0.1:{port}") as b:
            generation = (await a.connect("b")).generation
            with pytest.raises(
                PeerLostError, match=rf"agent 'b', generation \d+, is gone: 'b', generation {generation}"
            ):
                await a.connect(stale)


async def test_what_answers_is_no_agent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mail:
        mail.setblocking(False)
        listen = f"{LOCAL}?advertise=127.0.0.1:{mail.getsockname()[1]}"
        async with far("a") as a, far("b", listen=listen), within():
            connecting = asyncio.ensure_future(a.connect("b"))
            sock, _ = await asyncio.get_running_loop().sock_accept(mail)
            with sock:
                sock.send(b"220 mail.example ESMTP\r\n")
                with pytest.raises(PeerLostError, match="no agent: it begins with b'220 mail'"):
                    await connecting


async def test_a_listener_that_never_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        listen = f"{LOCAL}?advertise=127.0.0.1:{silent.getsockname()[1]}"
        async with far("a", config={"handshake_timeout": 0.2}) as a, far("b", listen=listen), within():
            with pytest.raises(TransferTimeout, match=r"did not answer in 0.2 s"):
                await a.connect("b")


async def test_leaving_is_told_both_ways() -> None:
    async with far("a") as a, within():
        events = a.events()
        async with far("b") as b:
            theirs = b.events()
            peer = await a.connect("b")
            await until_state(theirs, PeerState.JOINED, "a")
            await peer.aclose()
            await until_state(theirs, PeerState.LEFT, "a")
            peer = await a.connect("b")
        await until_state(events, PeerState.LEFT, "b")
        await until(lambda: a.stats()["peers"] == 0)
        assert peer.state is PeerState.LEFT


# ---- between processes --------------------------------------------------------------------------------------------


async def test_a_killed_peer_is_lost_at_once_and_a_restarted_one_is_told_apart(cast: Cast) -> None:
    other = cast.spawn()
    metadata = await other.call("start", "there", FAR, listen=LOCAL)
    await other.call("region", "kv", "mapped", (4, 8))
    peer = await cast.here.connect(metadata)
    assert peer["kv"].shape == (4, 8)
    events = cast.here.events()
    other.kill()
    async with within():
        await until_state(events, PeerState.LOST, "there")
        assert f"generation {peer.generation}, is gone" in str(peer.lost)
        again = cast.spawn()
        metadata = await again.call("start", "there", FAR, listen=f"tcp://127.0.0.1:{port_of(metadata)}")
        second = await cast.here.connect(metadata)
        assert second.generation > peer.generation
        await until_state(events, PeerState.RESTARTED, "there")


async def test_an_initiator_that_was_killed_is_lost_after_a_while(cast: Cast) -> None:
    async with far("b", config={"lost_after": 0.3, "handshake_timeout": 0.3}) as b, within():
        other = cast.spawn()
        await other.call("start", "there", FAR)
        await other.call("connect", b.metadata())
        events = b.events()
        expecting = asyncio.ensure_future(b.expect(b"never", peer="there"))
        other.kill()
        await until_state(events, PeerState.SUSPECT, "there")
        await until_state(events, PeerState.LOST, "there")
        with pytest.raises(PeerLostError, match=r"'there', generation \d+, is gone: .*did not come back within 0.3 s"):
            await expecting


async def test_an_initiator_that_was_killed_is_lost_when_it_comes_back_as_another(cast: Cast) -> None:
    async with far("b", config={"lost_after": 60.0}) as b, within():
        first, second = cast.spawn(), cast.spawn()
        await first.call("start", "there", FAR)
        await first.call("connect", b.metadata())
        events = b.events()
        expecting = asyncio.ensure_future(b.expect(b"never", peer="there"))
        first.kill()
        await until_state(events, PeerState.SUSPECT, "there")
        await second.call("start", "there", FAR)
        await second.call("connect", b.metadata())
        await until_state(events, PeerState.LOST, "there")
        await until_state(events, PeerState.RESTARTED, "there")
        with pytest.raises(PeerLostError, match=r"generation \d+ has taken its place"):
            await expecting


async def test_a_stopped_peer_is_suspect_until_it_is_heard_again(cast: Cast) -> None:
    other = cast.spawn()
    metadata = await other.call("start", "there", FAR, listen=LOCAL)
    async with far("a", config={"suspect_after": 0.2}) as a, within():
        peer = await a.connect(metadata)
        events = a.events()
        other.stop()
        await until_state(events, PeerState.SUSPECT, "there")
        assert peer.state is PeerState.SUSPECT
        sent = peer.notify(b"while it was stopped")
        other.resume()
        await until_state(events, PeerState.JOINED, "there")
        await sent
        await other.call("expect", b"while it was stopped")


async def test_a_stopped_peer_with_much_to_read_is_not_taken_for_a_host_that_is_gone(cast: Cast) -> None:
    other = cast.spawn()
    metadata = await other.call("start", "there", FAR, listen=LOCAL)
    async with far("a", config={"suspect_after": 0.2, "lost_after": 1.0}) as a, within():
        peer = await a.connect(metadata)
        first = a._live.peers._lines[peer].outgoing  # type: ignore[union-attr]
        other.stop()
        sent = [peer.notify(b"%03d" % n + bytes(10_000)) for n in range(100)]
        await asyncio.sleep(3)  # several times what a host that is gone is given
        assert peer.state is PeerState.SUSPECT
        assert a._live.peers._lines[peer].outgoing is first  # type: ignore[union-attr]
        other.resume()
        await asyncio.gather(*sent)
        assert a._live.peers._lines[peer].outgoing is first  # type: ignore[union-attr]


# ---- grants -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["unix", "tcp"])
def over(request: pytest.FixtureRequest) -> dict[str, bool]:
    return {"unix_socket": request.param == "unix"}


async def test_who_is_not_granted_does_not_see_the_region(over: dict[str, bool]) -> None:
    async with (
        Agent("owner", listen=LOCAL, config=over) as owner,
        Agent("reader", config=over) as reader,
        Agent("writer", config=over) as writer,
        Agent("stranger", config=over) as stranger,
        within(),
    ):
        peers = [await agent.connect("owner") for agent in (reader, writer, stranger)]
        grants = {"reader": "r", "writer": "rw"}
        async with owner.register(bytearray(8), name="kv", grants=grants), owner.allocate(8, "u1", name="all"):
            assert [(await peer.region("all")).access for peer in peers] == ["rw"] * 3
            assert [dict(peer.regions)["kv"].access for peer in peers[:2]] == ["r", "rw"]
            assert list(peers[2].regions) == ["all"]
            with pytest.raises(RegistrationError, match="has no region 'kv'"):
                peers[2]["kv"]
            late = Agent("late", config=over)
            async with late:
                assert list((await late.connect("owner")).regions) == ["all"]


async def test_grants_change_later(over: dict[str, bool]) -> None:
    async with Agent("owner", listen=LOCAL, config=over) as owner, Agent("peer", config=over) as agent, within():
        peer = await agent.connect("owner")
        async with owner.register(bytearray(8), name="kv", access="r", grants=["another"]) as region:
            assert region.grants.of("another") == "r"
            region.grant("peer", "r")
            remote = await peer.region("kv")
            assert remote.access == "r"
            region.grant("peer")
            await until(lambda: remote.access == "rw")
            assert peer["kv"] is remote
            await region.revoke("peer")
            await until(lambda: not peer.regions)
            assert remote.closed is not None
            await region.revoke("nobody")
            region.grant("peer", "w")
            assert (await peer.region("kv")).access == "w"
            with pytest.raises(RegistrationError, match="expected 'r', 'w' or 'rw'"):
                region.grant("peer", "x")  # type: ignore[arg-type]
        async with owner.register(bytearray(8), name="open") as region:
            await peer.region("open")
            await region.revoke("peer")
            await until(lambda: "open" not in peer.regions)
        with pytest.raises(RegistrationError, match=r"grants='peer': expected names"):
            await owner.register(bytearray(8), grants="peer")


async def test_memory_that_is_read_only_is_granted_for_reading() -> None:
    async with Agent("owner") as owner, Agent("peer") as agent, within():
        peer = await agent.connect("owner")
        async with owner.register(b"12345678", name="kv", grants={"peer": "rw"}):
            assert (await peer.region("kv")).access == "r"
