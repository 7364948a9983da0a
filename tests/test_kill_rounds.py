"""Two hundred rounds of kill -9 at random moments: no hang, no wrong byte accepted, nothing left behind.

Each round brings up a process, moves random rows to or from it, or lets it move them, over random memory, and kills it
at a random moment between its first command and a little after the last. Half of the rounds run on each loop; the
seed is printed, and `KILL_SEED` sets it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from peers import Bytes, Kind, Process, make_region, map_file, pattern
from stage import Cast, Op

from asyncxfer import Agent, Done, Peer, PeerEvent, PeerLostError, Region, Transfer

ROUNDS = 100  # on each loop
ROWS = 64
WIDTHS = (64, 4096, 1 << 16, 1 << 18)
MAPPED_OR_NOT = {"mapped": "shm:mapped", "file": "shm:attach", "ordinary": "shm:attach"}


@dataclass
class Round:
    """What was drawn for one round."""

    number: int
    kind: Kind
    op: Op
    theirs: bool  # the other process posts
    width: int  # bytes a row
    transfers: int
    rows: list[int]
    notify: bool
    delay: float  # seconds from the connection to the kill

    @classmethod
    def draw(cls, number: int, random: random.Random) -> Round:
        """Draw one: as many bytes, now and then, as take some milliseconds."""
        width = random.choice(WIDTHS)
        rows = random.sample(range(ROWS), random.choice((1, 8, ROWS)))
        return cls(
            number,
            kind=random.choice(("mapped", "ordinary", "file")), op=random.choice(("put", "get")),
            theirs=random.random() < 0.4, width=width, transfers=random.choice((1, 4, 30)), rows=rows,
            notify=random.random() < 0.5, delay=random.choice((0, 0.05 * random.random() ** 3)),
        )  # fmt: skip

    @property
    def name(self) -> str:
        """What the other agent is called in this round."""
        return f"there {self.number}"

    def tag(self, transfer: int) -> bytes:
        """What one transfer of this round notifies with."""
        return b"round %d, transfer %d" % (self.number, transfer)


@pytest.fixture
def path() -> Iterator[str]:
    path = f"/dev/shm/asyncxfer-test-{os.getpid()}-{time.monotonic_ns()}"
    yield path
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


async def outcome(transfer: Transfer) -> str:
    """How it ended: a word. Anything that is no proper end raises."""
    try:
        done = await transfer
    except PeerLostError:
        return "lost"
    assert isinstance(done, Done)
    return "done"


async def ours(here: Agent, other: Process, plan: Round, peer: Peer, path: str) -> list[str]:
    """Move rows from here while the other process is killed; how the transfers ended."""
    shape = (ROWS, plan.width)
    near = [pattern(3 + number, shape) for number in range(plan.transfers)]
    regions = [await here.register(array) for array in near]
    remote = await peer.region("far", timeout=8)
    far = surviving(remote, plan, path)
    killing = asyncio.get_running_loop().call_later(plan.delay, other.kill)
    ended: list[str] = []
    transfers: list[Transfer] = []
    call = here.put if plan.op == "put" else here.get
    try:
        for number, region in enumerate(regions):
            notify = plan.tag(number) if plan.notify else None
            transfers.append(
                call(region[plan.rows], remote[plan.rows], notify=notify, backend=MAPPED_OR_NOT[plan.kind])
            )
            if number % 5 == 4:
                await asyncio.sleep(0)
    except PeerLostError:
        ended.append("refused")
    async with asyncio.timeout(8):
        ended += await asyncio.gather(*(outcome(transfer) for transfer in transfers))
    for array, how in zip(near, ended[-len(transfers) :] if transfers else [], strict=False):
        if how == "done" and plan.op == "get":
            assert (array[plan.rows] == pattern(2, shape)[plan.rows]).all(), "wrong bytes accepted"
    if plan.op == "put" and far is not None and ended and set(ended) == {"done"}:
        # They are done in any order, and several at once: each byte is what one of them brought.
        brought = np.stack([pattern(3 + number, shape)[plan.rows] for number in range(plan.transfers)])
        assert (brought == far[plan.rows]).any(axis=0).all(), "wrong bytes accepted"
    killing.cancel()
    async with asyncio.timeout(8):
        for region in regions:
            await region.aclose()
    return ended


def surviving(remote: Any, plan: Round, path: str) -> Bytes | None:
    """The other's memory as it can be seen from here when it is dead; None where it dies with it."""
    shape = (ROWS, plan.width)
    if plan.kind == "file":
        return np.frombuffer(map_file(path, ROWS * plan.width), np.uint8).reshape(shape)
    if plan.kind == "mapped":
        return np.frombuffer(remote.attachments["shm"].mappings[0].buffer, np.uint8).reshape(shape)
    return None


async def theirs(here: Agent, other: Process, plan: Round, path: str) -> list[str]:
    """Let the other process move rows, and kill it; how our waits for its notifications ended."""
    shape = (ROWS, plan.width)
    region, array = await make_region(here, "near", plan.kind, shape, path=path)
    array[:] = pattern(1, shape)
    killing = asyncio.get_running_loop().call_later(plan.delay, other.kill)
    waits = [asyncio.ensure_future(here.expect(plan.tag(number), peer=plan.name)) for number in range(plan.transfers)]
    joined = asyncio.ensure_future(joins(here.events(), plan.name))
    with contextlib.suppress(ConnectionError):
        await other.call("connect", here.metadata())
        for number in range(plan.transfers):
            await other.call(
                "begin", str(number), plan.op, "far", plan.rows, "near", plan.rows, peer="here",
                notify=plan.tag(number), backend=MAPPED_OR_NOT[plan.kind],
            )  # fmt: skip
    async with asyncio.timeout(8):
        await other.over
    ended = await notified(waits, joined)
    if plan.op == "put" and "done" in ended:
        assert (array[plan.rows] == pattern(2, shape)[plan.rows]).all(), "notified before the bytes were there"
    await close_quiescent(region, array)
    killing.cancel()
    return ended


async def joins(events: AsyncIterator[PeerEvent], name: str) -> None:
    """Return once an agent of this name has connected."""
    async for event in events:
        if event.peer == name:
            return


async def notified(waits: list[asyncio.Task[Any]], joined: asyncio.Task[None]) -> list[str]:
    """How waits for notifications of a process that has died end."""
    done, late = await asyncio.wait(waits, timeout=0.1)
    if late and joined.done():
        done, late = await asyncio.wait(waits, timeout=8)
        assert not late, f"{len(late)} of {len(waits)} waits hang although the sender is gone"
    for task in (joined, *late):  # it died before it had connected: nobody knows that it was to
        task.cancel()
        await asyncio.wait([task])
    ended = []
    for wait in done:
        error = wait.exception()
        assert error is None or isinstance(error, PeerLostError), error
        ended.append("done" if error is None else "lost")
    return ended + ["unknown"] * len(late)


async def close_quiescent(region: Region, array: Bytes) -> None:
    """Close a region whose user is dead or dying, and see that its memory is ours alone."""
    async with asyncio.timeout(8):
        await region.aclose()
    array[:] = 7
    await asyncio.sleep(0)
    assert (array == 7).all(), "written to after the region was closed"


async def one(cast: Cast, plan: Round, path: str) -> list[str]:
    """Play one round."""
    other = cast.spawn()
    shape = (ROWS, plan.width)
    metadata = await other.call("start", plan.name, {"copy_threads": 2})
    kind: Kind = "ordinary" if plan.theirs else plan.kind
    await other.call("region", "far", kind, shape, seed=2, path=path)
    if plan.theirs:
        ended = await theirs(cast.here, other, plan, path)
    else:
        peer = await cast.here.connect(metadata)
        ended = await ours(cast.here, other, plan, peer, path)
        other.kill()
        async with asyncio.timeout(8):
            while peer.lost is None:  # noqa: ASYNC110 - this is the only place that asks
                await asyncio.sleep(0.001)
    await cast.part(other)
    return ended


@pytest.mark.slow
@pytest.mark.stress
@pytest.mark.timeout(180)
async def test_kill_rounds(cast: Cast, path: str, loop_name: str) -> None:
    seed = int(os.environ.get("KILL_SEED", time.time_ns() % 10**6))
    print(f"{loop_name}: KILL_SEED={seed}")  # noqa: T201
    draw = random.Random(f"{seed} {loop_name}")
    tally: Counter[str] = Counter()
    for number in range(ROUNDS):
        plan = Round.draw(number, draw)
        try:
            tally.update(await one(cast, plan, f"{path}-{number}"))
        except BaseException as error:
            error.add_note(f"in round {number} of seed {seed} on {loop_name}: {plan}")
            raise
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{path}-{number}")
    print(f"{loop_name}: {dict(tally)}")  # noqa: T201
    assert min(tally["done"], tally["lost"]) > ROUNDS / 10  # neither end has become the only one
