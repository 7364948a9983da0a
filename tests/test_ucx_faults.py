"""Rounds of faults over each transport of UCX: every transfer ends, properly, and nothing is touched afterwards.

A round posts puts and gets and then stops or kills the target, or cancels, at a random moment. The seed is printed, and
`KILL_SEED` sets it; `FAULT_ROUNDS=200` plays that many on each transport and loop, as before a release.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter

import numpy as np
import pytest
from over_ucx import NBYTES, Far, every_transport, needs_ucx
from peers import pattern

from asyncxfer import Done, PeerLostError, Transfer, TransferTimeout

pytestmark = [needs_ucx, pytest.mark.stress]

ROUNDS = int(os.environ.get("FAULT_ROUNDS", "6"))  # on each transport and loop
TIMEOUT = 6.0
SHORT = 0.2  # the timeout where the other side takes nothing in until it is over
LATER = 4.0  # what an end may take beyond the timeout: the grace for what is under way, and a busy machine
FAULTS = ("none", "stop", "freeze", "kill", "cancel")
WEIGHTS = (1, 3, 3, 5, 3)
ALLOWED = {
    "none": {"done"},
    "stop": {"done"},
    "freeze": {"done", "late"},
    "kill": {"done", "lost"},
    "cancel": {"done", "cancelled"},
}
LENGTHS = (NBYTES, 64 << 10, 4 << 10)  # one large piece; pieces that go one by one; pieces that go packed over tcp


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


def post(far: Far, number: int, fault: str, draw: random.Random) -> tuple[str, list[bytes], list[Transfer]]:
    """Post what a round is about: the direction, the tags of those that notify, and all."""
    op = draw.choice(("put", "get"))
    length = draw.choice(LENGTHS)
    offsets = np.random.default_rng(draw.getrandbits(32)).permutation(np.arange(0, NBYTES, length))
    offsets = np.tile(offsets, draw.choice((1, 1, 4)))
    count = draw.choice((1, 3))
    tags = [b"%d/%d" % (number, n) for n in range(count)] if draw.random() < 0.7 else []
    far.array[:] = pattern(3 + number, (NBYTES,))
    nothing: list[bytes | None] = [None] * count
    timeout = SHORT if fault == "freeze" else TIMEOUT
    return op, tags, [far.post(op, offsets, length, notify=tag, timeout=timeout) for tag in tags or nothing]


async def strike(far: Far, fault: str, draw: random.Random, posted: list[Transfer]) -> None:
    """Make something go wrong."""
    await asyncio.sleep(draw.choice((0, draw.uniform(0, 0.005), draw.uniform(0, 0.05))))
    if fault == "kill":
        far.other.kill()
    elif fault == "cancel":
        for transfer in draw.sample(posted, draw.randint(1, len(posted))):
            transfer.cancel()
    elif fault in ("stop", "freeze"):
        far.other.stop()
        if fault == "stop":
            await asyncio.sleep(draw.uniform(0.01, 0.15))
            far.other.resume()


async def one(far: Far, number: int, draw: random.Random) -> list[str]:
    """Play one round; how the transfers ended."""
    fault = draw.choices(FAULTS, WEIGHTS)[0]
    op, tags, posted = post(far, number, fault, draw)
    async with asyncio.timeout(TIMEOUT + LATER), asyncio.TaskGroup() as tasks:
        tasks.create_task(strike(far, fault, draw, posted))
        waits = [tasks.create_task(outcome(transfer)) for transfer in posted]
    ended = [wait.result() for wait in waits]
    if fault == "freeze":
        far.other.resume()
    assert set(ended) <= ALLOWED[fault], f"{fault} {op}: {ended}"
    if op == "get" and "done" in ended:
        assert (far.array == pattern(2, (NBYTES,))).all(), "wrong bytes accepted"
    if op == "put" and set(ended) == {"done"} and fault != "kill":
        assert await far.other.call("matches", "far", 3 + number), "wrong bytes accepted"
    far.array[:] = 7
    if fault == "kill":
        await far.restart()
    else:
        for tag, how in zip(tags, ended, strict=False):
            if how == "done":
                await far.other.call("expect", tag, timeout=10)
        await far.post("get", timeout=TIMEOUT)  # it goes on with the same peer
        far.array[:] = 7
        await far.other.call("fill", "far", 2)
    await asyncio.sleep(0.002)
    assert await far.other.call("matches", "far", 2), "written to after the end"
    assert (far.array == 7).all(), "written to after the end"
    return [fault, *ended]


@every_transport
@pytest.mark.parametrize("progress", ["loop", "thread"])
@pytest.mark.timeout(1800)
async def test_fault_rounds(far: Far, transports: str, progress: str, loop_name: str) -> None:
    seed = int(os.environ.get("KILL_SEED", time.time_ns() % 10**6))
    print(f"{loop_name}, {transports}: KILL_SEED={seed}")  # noqa: T201
    draw = random.Random(f"{seed} {loop_name} {transports} {progress}")
    tally: Counter[str] = Counter()
    for number in range(ROUNDS):
        try:
            tally.update(await one(far, number, draw))
        except BaseException as error:
            error.add_note(f"in round {number} of seed {seed} on {loop_name}; so far {dict(tally)}")
            raise
    print(f"{loop_name}, {transports}: {dict(tally)}")  # noqa: T201
    if ROUNDS >= 100:
        assert all(tally[word] for word in (*FAULTS, "done", "cancelled", "lost", "late"))
