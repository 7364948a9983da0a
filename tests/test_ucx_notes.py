"""Notifications over each transport of UCX: each comes once, and not before the bytes that it tells of.

`NOTE_ROUNDS=10000` plays that many on each transport and loop, as before a release.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import time
from collections import Counter

import numpy as np
import pytest
from over_ucx import NBYTES, Far, every_transport, needs_ucx
from stage import within

from asyncxfer import DescriptorError, TransferTimeout

pytestmark = [needs_ucx, pytest.mark.stress]

ROUNDS = int(os.environ.get("NOTE_ROUNDS", "300"))  # on each transport and loop
ROWS = 64
ROW_WORDS = NBYTES // ROWS // 8


def digests(tags: list[bytes]) -> Counter[bytes]:
    """What `collect` answers when these have come."""
    return Counter(hashlib.sha256(tag).digest() for tag in tags)


@every_transport
@pytest.mark.parametrize(("progress", "workers"), [("loop", 1), ("thread", 2)])
@pytest.mark.timeout(900)
async def test_no_notification_is_ahead_of_its_bytes(
    far: Far, transports: str, progress: str, workers: int, loop_name: str
) -> None:
    seed = int(os.environ.get("KILL_SEED", time.time_ns() % 10**6))
    print(f"{loop_name}: KILL_SEED={seed}")  # noqa: T201
    draw = random.Random(f"{seed} {loop_name}")
    words = far.array.view(np.uint64).reshape(ROWS, ROW_WORDS)
    await far.other.call("region", "rows", "ordinary", (ROWS, NBYTES // ROWS))
    rows = await far.peer.region("rows", timeout=5)
    await far.other.call("connect", far.cast.here.metadata())
    checking = far.other.post("check_rows", "rows", peer="here")
    number = 0
    while number < ROUNDS:
        batch = draw.choice((1, 1, 2, 8, 32))
        posted = []
        for _ in range(batch):
            number += 1
            row, count = number % ROWS, int(2 ** draw.uniform(0, 15))
            words[row, :count] = number
            here = far.region.descriptors([row * (NBYTES // ROWS)], [count * 8])
            tag = b"%d %d %d %d" % (number, row, count, batch)
            posted.append(far.cast.here.put(here, rows.descriptors([row * (NBYTES // ROWS)], [count * 8]), notify=tag))
        async with asyncio.timeout(10):
            await asyncio.gather(*posted)
            await far.cast.here.expect(b"go on")
    far.peer.notify(b"last")
    assert await checking == []


@every_transport
@pytest.mark.parametrize("workers", [1, 2])
async def test_many_at_once_come_once_each(far: Far, transports: str, workers: int) -> None:
    tags = [b"%d" % number for number in range(600)]
    collecting = far.other.post("collect", b"last")
    async with within():
        # Puts of nothing, of little, of much, and gets: whatever they bring, they tell of it once.
        posted = [
            far.post(op, [8192 * number], length, notify=tag)
            for number, tag in enumerate(tags)
            for op, length in [(("put", "get")[number % 2], (0, 8, 8192)[number % 3])]
        ]
        await asyncio.gather(*posted)
        await far.post("put", [0], 0, notify=b"last")
        assert Counter(await collecting) == digests(tags)


@every_transport
@pytest.mark.parametrize("backlog", [65536])
async def test_a_receiver_that_does_not_read_loses_none(far: Far, transports: str, backlog: int) -> None:
    """More than it keeps: the rest waits at the sender, each until it is taken."""
    tags = [b"%04d" % number + bytes(2000) for number in range(400)]  # about 12 times what it keeps
    posted = [far.post("put", [0], 8, notify=tag) for tag in tags]
    done, late = await asyncio.wait([asyncio.ensure_future(transfer) for transfer in posted], timeout=0.7)
    assert late, "it keeps more than it may"
    with pytest.raises(TransferTimeout):
        await far.post("put", [0], 8, notify=b"given up", timeout=0.1)
    collecting = far.other.post("collect", b"last")
    async with within():
        await asyncio.gather(*late, *done)
        await far.post("put", [0], 0, notify=b"last")
        came = await collecting
    assert Counter(came) == digests(tags), "lost, twice, or of a transfer that was given up"


@every_transport
async def test_a_tag_may_be_as_large_as_is_configured(far: Far, transports: str) -> None:
    tags = [bytes([number]) * 32768 for number in range(6)]
    collecting = far.other.post("collect", b"last")
    async with within():
        await asyncio.gather(*(far.post("put", [0], 8, notify=tag) for tag in tags))
        await far.post("put", [0], 0, notify=b"last")
        assert Counter(await collecting) == digests(tags)
        with pytest.raises(DescriptorError, match=r"32,?769"):
            far.post("put", [0], 8, notify=bytes(32769))


@every_transport
async def test_a_get_tells_that_it_has_read(far: Far, transports: str) -> None:
    async with within():
        await far.post("get", notify=b"read")
        await far.other.call("fill", "far", 9)  # the memory is free again
        assert await far.other.call("expect", b"read", timeout=5) == ("here", b"read")
