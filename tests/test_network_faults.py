"""Rounds of faults on each loop, between two hosts: no hang, no wrong byte, nothing left behind.

A round posts puts and gets to the agent of another host and then loses, delays or parts what is on the cable, pulls it
out, stops or kills the other process, or cancels, at a random moment and in random order. The connections are
encrypted. The seed is printed, and `KILL_SEED` sets it; `FAULT_ROUNDS=250` plays that many on each loop,
as before a release.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hosts import Host, Hosts
from peers import Process, Server, make_region, pattern
from stage import Cast

from asyncxfer import Agent, Done, Peer, PeerLostError, PreSharedKey, Region, Transfer, TransferTimeout

ROUNDS = int(os.environ.get("FAULT_ROUNDS", "60"))  # on each loop
SHAPE = (64, 1 << 14)
SECRET = "what only these two hosts know"
CONFIG = {"suspect_after": 0.5, "close_timeout": 0.5, "lost_after": 5.0}
TIMEOUT = 4.0
SHORT = 0.3  # the timeout where nothing gets through until it is over
LATER = 4.0  # what an end may take beyond the timeout: the grace for what is under way, and a busy machine
FAULTS = ("none", "loss", "slow", "part", "cut", "stop", "kill", "cancel", "deaf")
WEIGHTS = (4, 3, 1, 3, 3, 4, 3, 5, 2)


class Network:
    """An agent here, and one named "there" on another host, which may have to be started again."""

    def __init__(self, cast: Cast, host: Host) -> None:
        self.cast = cast
        self.host = host
        self.other: Process
        self.peer: Peer
        self.region: Region
        self.array: Any

    async def start(self) -> None:
        """Bring up the other agent, and reach it."""
        self.other = self.cast.spawn(self.host)
        metadata = await self.other.call(
            "start", "there", CONFIG, listen=f"tcp://{self.host.ipv4}:0", credentials=("PreSharedKey", SECRET)
        )
        await self.other.call("region", "far", "ordinary", SHAPE, seed=2)
        self.peer = await self.cast.here.connect(metadata)
        await self.peer.region("far", timeout=5)

    async def restart(self) -> None:
        """Put an agent of the same name in the place of one that was killed."""
        await self.cast.part(self.other)
        await self.start()

    def post(self, op: str, rows: list[int], **options: Any) -> Transfer:
        call = self.cast.here.put if op == "put" else self.cast.here.get
        return call(self.region[rows], self.peer["far"][rows], **options)


@pytest.fixture
async def network(server: Server, hosts: Hosts) -> AsyncIterator[Network]:
    listen = f"tcp://{hosts.here.ipv4}:0"
    here = Agent("here", listen=listen, credentials=PreSharedKey(SECRET), config=CONFIG)
    made = Network(Cast(server, await here.start()), hosts[0])
    made.region, made.array = await make_region(here, "near", "ordinary", SHAPE)
    await made.start()
    yield made
    await made.cast.leave()
    vars(made).clear()


async def outcome(transfer: Transfer) -> str:
    """How it ended: a word. Anything that is no proper end raises."""
    try:
        done = await transfer
    except PeerLostError:
        return "lost"
    except TransferTimeout:
        return "late"
    except asyncio.CancelledError:
        return "cancelled"
    assert isinstance(done, Done)
    return "done"


async def strike(network: Network, fault: str, draw: random.Random, posted: list[Transfer]) -> None:
    """Make something go wrong for a moment."""
    host, other = network.host, network.other
    moment = draw.uniform(0.03, 0.2)
    await asyncio.sleep(draw.choice((0, draw.uniform(0, 0.01))))
    if fault == "loss":
        host.loss(1)
    elif fault == "slow":
        host.delay(20)
    elif fault in ("part", "deaf"):
        host.partition()
        await asyncio.sleep(moment if fault == "part" else SHORT + 0.2)
        host.heal()
    elif fault == "cut":
        host.cut()
        await asyncio.sleep(moment)
        host.mend()
    elif fault == "stop":
        other.stop()
        await asyncio.sleep(moment)
        other.resume()
    elif fault == "kill":
        other.kill()
    elif fault == "cancel":
        for transfer in draw.sample(posted, draw.randint(1, len(posted))):
            transfer.cancel()


def mend(host: Host, fault: str) -> None:
    if fault == "loss":
        host.loss(0)
    elif fault == "slow":
        host.delay(0)


async def one(network: Network, number: int, draw: random.Random) -> list[str]:
    """Play one round; how the transfers ended."""
    fault = draw.choices(FAULTS, WEIGHTS)[0]
    op = draw.choice(("put", "get"))
    seed = 3 + number
    rows = draw.sample(range(SHAPE[0]), SHAPE[0])
    network.array[:] = pattern(seed, SHAPE)
    checksum = draw.random() < 0.3
    timeout = SHORT if fault == "deaf" else TIMEOUT
    posted = [
        network.post(
            op, rows * draw.choice((1, 1, 8)), notify=b"%d/%d" % (number, n), checksum=checksum, timeout=timeout
        )
        for n in range(draw.choice((1, 3)))
    ]
    async with asyncio.timeout(TIMEOUT + LATER), asyncio.TaskGroup() as tasks:
        tasks.create_task(strike(network, fault, draw, posted))
        waits = [tasks.create_task(outcome(transfer)) for transfer in posted]
    ended = [wait.result() for wait in waits]
    mend(network.host, fault)
    assert set(ended) <= ALLOWED.get(fault, {"done"}), f"{fault}: {ended}"
    if "done" in ended and op == "get":
        assert (network.array == pattern(2, SHAPE)).all(), "wrong bytes accepted"
    if fault == "kill":
        await network.restart()
        return [fault, *ended]
    for n, how in enumerate(ended):
        if how == "done":
            await network.other.call("expect", b"%d/%d" % (number, n), timeout=10)
    if op == "put" and ended == ["done"] * len(ended):
        assert await network.other.call("matches", "far", seed), "wrong bytes accepted"
    network.array[:] = 7
    await network.other.call("fill", "far", 2)
    await asyncio.sleep(0.002)
    assert await network.other.call("matches", "far", 2), "written to after the end"
    assert (network.array == 7).all(), "written to after the end"
    return [fault, *ended]


ALLOWED = {
    "kill": {"done", "lost"},
    "cancel": {"done", "cancelled"},
    "deaf": {"done", "late"},
    "part": {"done", "late"},
    "cut": {"done", "late"},
    "slow": {"done", "late"},
}


@pytest.mark.slow
@pytest.mark.stress
@pytest.mark.timeout(400)
@pytest.mark.blocking("cables are cut and mended by programs that the test waits for")
async def test_fault_rounds(network: Network, loop_name: str) -> None:
    seed = int(os.environ.get("KILL_SEED", time.time_ns() % 10**6))
    print(f"{loop_name}: KILL_SEED={seed}")  # noqa: T201
    draw = random.Random(f"{seed} {loop_name}")
    tally: Counter[str] = Counter()
    for number in range(ROUNDS):
        try:
            tally.update(await one(network, number, draw))
        except BaseException as error:
            error.add_note(f"in round {number} of seed {seed} on {loop_name}; so far {dict(tally)}")
            raise
    print(f"{loop_name}: {dict(tally)}")  # noqa: T201
    assert tally["done"] > ROUNDS / 2
    if ROUNDS >= 200:
        assert all(tally[word] for word in (*FAULTS, "cancelled", "lost", "late"))
