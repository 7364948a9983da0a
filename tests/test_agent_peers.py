"""Agents find each other: metadata, names, regions of peers, states and events."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator

import numpy as np
import pytest
from lent import until

from asyncxfer import (
    Agent,
    BackendError,
    ClosedError,
    ConfigError,
    MetadataError,
    PeerEvent,
    PeerLostError,
    PeerState,
    RegistrationError,
    TransferTimeout,
)
from asyncxfer._config import Config
from asyncxfer.backends.local import LocalBackend


async def take(events: AsyncIterator[PeerEvent], count: int) -> list[tuple[str, PeerState]]:
    async with asyncio.timeout(10):
        return [(event.peer, event.state) for event in [await anext(events) for _ in range(count)]]


async def test_connecting_by_name_and_by_metadata_is_the_same() -> None:
    async with Agent("a") as a, Agent("b") as b:
        peer = await a.connect("b")
        assert (peer.name, peer.state) == ("b", PeerState.JOINED)
        assert peer.generation > 0
        assert await a.connect(b.metadata()) is peer
        assert await a.connect(bytearray(b.metadata())) is peer  # type: ignore[arg-type]
        assert (await asyncio.gather(*(a.connect("b") for _ in range(5)))) == [peer] * 5
        assert len(b.metadata()) < 65536
        assert repr(peer) == f"<Peer 'b', generation {peer.generation}, joined>"


async def test_an_agent_can_connect_to_itself() -> None:
    async with Agent("a") as agent, agent.register(bytearray(b"12345678"), name="kv") as region:
        peer = await agent.connect("a")
        target = bytearray(8)
        async with agent.register(target) as here:
            await agent.get(here[:], peer["kv"][:])
        assert target == b"12345678"
        assert region.name == "kv"


async def test_connect_waits_for_the_name() -> None:
    async with Agent("a") as a:
        connecting = asyncio.create_task(a.connect("late"))
        await asyncio.sleep(0.01)
        assert not connecting.done()
        async with Agent("late"):
            assert (await connecting).name == "late"


async def test_connect_says_what_it_waited_for() -> None:
    async with Agent("a", config={"connect_timeout": 0.02}) as a:
        with pytest.raises(TransferTimeout, match=r"agent 'nobody' did not appear or answer within 0.02 s"):
            await a.connect("nobody")
        with pytest.raises(TransferTimeout, match=r"within 0.01 s"):
            await a.connect("nobody", timeout=0.01)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await a.connect("nobody", timeout=60)


@pytest.mark.parametrize("data", [b"", b"AXFM", b"no metadata at all", bytes(100)])
async def test_bytes_that_are_no_metadata_are_refused(data: bytes) -> None:
    async with Agent("a") as a:
        with pytest.raises(MetadataError):
            await a.connect(data)


async def test_metadata_of_an_agent_that_has_ended_is_refused() -> None:
    async with Agent("a") as a:
        async with Agent("b") as b:
            stale = b.metadata()
        with pytest.raises(PeerLostError, match=r"agent 'b', generation \d+, has ended or restarted"):
            await a.connect(stale)
        async with Agent("b"):
            with pytest.raises(PeerLostError, match="ended or restarted"):
                await a.connect(stale)
            assert (await a.connect("b")).state is PeerState.JOINED


async def test_regions_of_a_peer_come_and_go() -> None:
    async with Agent("a") as a, Agent("b") as b:
        async with b.register(np.zeros((2, 3), np.float32), name="first", access="r"):
            peer = await a.connect("b")
            assert list(peer.regions) == ["first"]
            remote = peer["first"]
            assert (remote.name, remote.peer, remote.shape, remote.dtype, remote.access) == (
                "first", peer, (2, 3), "float32", "r",
            )  # fmt: skip
            assert repr(remote) == "<RemoteRegion 'first' of 'b': float32 (2, 3), 'r'>"
            waiting = asyncio.create_task(peer.region("second"))
            async with b.register(bytearray(4), name="second"):
                assert (await waiting).nbytes == 4
                assert set(peer.regions) == {"first", "second"}
        with pytest.raises(TransferTimeout, match=r"peer 'b' registered no region 'third' within 0.01 s"):
            await peer.region("third", timeout=0.01)
        with pytest.raises(RegistrationError, match=r"peer 'b' has no region 'third'; its regions are: none.*waits"):
            peer["third"]
        with pytest.raises(ClosedError, match="peer 'b' has deregistered its region 'first'"):
            a.explain("get", (await a.register(bytearray(24)))[:], remote[:])


async def test_waiting_for_a_region_ends_with_the_peer() -> None:
    async with Agent("a") as a:
        async with Agent("b"):
            peer = await a.connect("b")
            waiting = asyncio.create_task(peer.region("kv"))
            await asyncio.sleep(0)
        with pytest.raises(PeerLostError, match="peer 'b'"):
            await waiting
        with pytest.raises(PeerLostError, match="peer 'b'"):
            peer["kv"]


async def test_both_sides_see_events() -> None:
    async with Agent("a") as a:
        events = a.events()
        async with Agent("b") as b:
            theirs = b.events()
            first = await a.connect("b")
            await b.connect("a")
            assert await take(theirs, 1) == [("a", PeerState.JOINED)]
        async with Agent("b"):
            second = await a.connect("b")
            assert second.generation > first.generation
            assert first.state is PeerState.LEFT
            await second.aclose()
            await second.aclose()
        left, restarted = ("b", PeerState.LEFT), ("b", PeerState.RESTARTED)
        assert await take(events, 4) == [("b", PeerState.JOINED), left, restarted, left]
    with pytest.raises(StopAsyncIteration):
        await anext(events)
    with pytest.raises(ClosedError, match="agent 'a' was closed"):
        a.events()


async def test_a_peer_that_leaves_is_left_and_its_plans_say_so() -> None:
    async with Agent("a") as a, a.register(bytearray(8)) as here:
        async with Agent("b") as b, b.register(bytearray(8), name="kv"):
            peer = await a.connect("b")
            plan = a.prepare("put", here[:], peer["kv"][:])
        await until(lambda: a.stats()["peers"] == 0)
        assert peer.state is PeerState.LEFT
        for call in (plan, lambda: peer["kv"], lambda: peer.notify(b"x")):
            with pytest.raises(PeerLostError, match=r"peer 'b', generation \d+, is gone"):
                call()


@pytest.mark.parametrize("name", ["", "a" * 256, "line\nbreak"])
def test_names_have_bounds(name: str) -> None:
    with pytest.raises(ConfigError, match="expected 1 to 255 printable characters"):
        Agent(name)


async def test_a_taken_name_is_refused_and_leaves_nothing() -> None:
    async with Agent("a"):
        with pytest.raises(ConfigError, match="an agent named 'a' runs in this process already"):
            await Agent("a").start()
        async with Agent("b"):
            pass


async def test_what_an_agent_cannot_be_made_with() -> None:
    with pytest.raises(ConfigError, match=r"no configuration key 'chunk_byte'; did you mean 'chunk_bytes'\?"):
        Agent("a", config={"chunk_byte": 1})
    with pytest.raises(ConfigError, match="inline_bytes"):
        Agent("a", config={"inline_bytes": -1})
    with pytest.raises(ConfigError, match="etcd://here"):
        Agent("a", directory="etcd://here")
    with pytest.raises(ConfigError, match="tcp://"):
        Agent("a", listen="127.0.0.1:0")
    with pytest.raises(BackendError, match=r"there is no backend 'carrier-pigeon'; installed are: .*local.*shm"):
        await Agent("a", backends=["local", "carrier-pigeon"]).start()


async def test_an_agent_lives_once() -> None:
    agent = Agent("a")
    assert repr(agent) == "<Agent 'a', new>"
    await agent.aclose()  # not yet started: nothing to close
    with pytest.raises(ClosedError, match="has not been started"):
        await agent.register(bytearray(1))
    with pytest.raises(ClosedError, match="has not been started"):
        agent.metadata()
    async with agent:
        with pytest.raises(ConfigError, match="was started before"):
            await agent.start()
    await agent.aclose()
    for call in (agent.notifications, agent.events):
        with pytest.raises(ClosedError, match="agent 'a' was closed"):
            call()
    for wait in (agent.connect("b"), agent.expect(b"x")):
        with pytest.raises(ClosedError, match="agent 'a' was closed"):
            await wait
    with pytest.raises(ClosedError, match="agent 'a' was closed"):
        await agent.allocate(1, "uint8")
    with pytest.raises(ConfigError, match="was started before"):
        await agent.start()


async def test_a_chosen_backend_is_the_only_one() -> None:
    async with Agent("a", backends=["shm"]) as a, Agent("b") as b, b.register(bytearray(8), name="kv"):
        assert a.stats()["backends"] == ["shm"]
        peer = await a.connect("b")
        async with a.register(bytearray(8)) as here:
            assert (await a.put(here[:], peer["kv"][:])).backend == "shm"


UNCLOSED = """
import asyncio, gc, warnings
from asyncxfer import Agent
async def main():
    agent = await Agent("forgotten").start()
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    asyncio.run(main())
    gc.collect()
print(*(f"{w.category.__name__}: {w.message}" for w in seen), sep="\\n")
"""


def test_an_agent_that_is_not_closed_warns() -> None:
    done = subprocess.run([sys.executable, "-c", UNCLOSED], capture_output=True, text=True, timeout=60, check=True)
    assert "ResourceWarning: <Agent 'forgotten', open, 0 regions, 0 peers> was not closed" in done.stdout


async def test_a_cancelled_close_goes_on_closing() -> None:
    agent = await Agent("a").start()
    async with Agent("b") as b, b.register(bytearray(8), name="kv"):
        await agent.connect("b")
        closing = asyncio.create_task(agent.aclose())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        await agent.aclose()
        assert "closed" in repr(agent)
        assert agent.stats()["peers"] == 0
        await until(lambda: not b.stats()["served"])


async def test_backends_are_asked_off_the_loop_which_goes_on_meanwhile() -> None:
    answer = threading.Event()

    class Slow(LocalBackend):
        """It takes until the loop has turned to say what it can do."""

        @classmethod
        def examine(cls, config: Config) -> str:
            assert answer.wait(30)
            return "ready"

    agent = Agent("a", backends=[Slow])
    starting = asyncio.ensure_future(agent.start())
    await asyncio.sleep(0)
    twice = asyncio.ensure_future(agent.start())
    await asyncio.sleep(0)
    answer.set()
    ends = await asyncio.gather(starting, twice, return_exceptions=True)
    (refused,) = (end for end in ends if end is not agent)
    assert isinstance(refused, ConfigError)
    assert "lives once" in str(refused)
    await agent.aclose()


async def test_a_start_that_is_cancelled_while_backends_are_asked_leaves_nothing() -> None:
    asked, answer = threading.Event(), threading.Event()

    class Slow(LocalBackend):
        """It does not answer before it is told to."""

        @classmethod
        def examine(cls, config: Config) -> str:
            asked.set()
            assert answer.wait(30)
            return "ready"

    agent = Agent("a", backends=[Slow])
    starting = asyncio.ensure_future(agent.start())
    await asyncio.to_thread(asked.wait, 30)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    answer.set()
    await agent.aclose()
