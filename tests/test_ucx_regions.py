"""Regions and endpoints over each transport of UCX that come to an end, or are made again, under transfers."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import Any

import numpy as np
import pytest
from over_ucx import BACKENDS, NBYTES, Far, every_transport, needs_ucx
from peers import make_region, moving, pattern
from stage import both_ops, within

from asyncxfer import PeerLostError, Transfer, TransferError
from asyncxfer._fast import ucp

pytestmark = needs_ucx

LENGTHS = {"large": NBYTES, "pieces": 65536, "small": 4096}
every_length = pytest.mark.parametrize("length", list(LENGTHS.values()), ids=list(LENGTHS))


def long(far: Far, op: str, length: int, **options: Any) -> Transfer:
    """Half a gigabyte through the two regions: long enough to act in the middle of it."""
    return far.post(op, np.tile(np.arange(0, NBYTES, length), 32), length, **options)


# ---- regions ------------------------------------------------------------------------------------------------------


@every_transport
@every_length
@both_ops
async def test_an_owner_closes_a_region_under_transfers(far: Far, transports: str, length: int, op: str) -> None:
    transfers = [long(far, op, length, notify=b"never") for _ in range(2)]
    await moving(transfers[0])
    closing = far.other.post("close", "far")
    async with within():
        for transfer in transfers:
            with pytest.raises(TransferError, match="deregistered") as caught:
                await transfer
            assert not isinstance(caught.value, PeerLostError)
        checksum = await closing
    far.array[:] = 7
    await asyncio.sleep(0.05)  # whatever was on its way
    assert await far.other.call("checksum", "far") == checksum, "written to after it was closed"
    assert (far.array == 7).all()
    await far.other.call("region", "far", "ordinary", (NBYTES,), seed=5)
    far.remote = await far.peer.region("far", timeout=5)
    async with within():
        await far.post("get")
    assert (far.array == pattern(5, (NBYTES,))).all()


@every_transport
@every_length
async def test_an_initiator_dies_and_the_region_is_ours_alone(far: Far, transports: str, length: int) -> None:
    """The one that is left goes on; what the dead one had sent is not written any more once the region is closed."""
    here = far.cast.here
    dying = far.cast.spawn()
    await dying.call("start", "dying", far.config, backends=BACKENDS)
    await dying.call("region", "its", "ordinary", (NBYTES,), seed=3)
    await dying.call("connect", here.metadata())
    await far.other.call("connect", here.metadata())
    region, array = await make_region(here, "shared", "ordinary", (NBYTES // 4096, 4096))
    rows = list(range(NBYTES // 4096)) if length == NBYTES else list(range(0, NBYTES // 4096, 2))
    await dying.call("region", "mine", "ordinary", (NBYTES // 4096, 4096), seed=3)
    await far.other.call("region", "mine", "ordinary", (NBYTES // 4096, 4096), seed=4)
    await far.other.call("begin", "its", "get", "mine", rows * 8, "shared", rows * 8, peer="here")
    await dying.call("begin", "t", "put", "mine", rows * 8, "shared", rows * 8, peer="here", wait=True)
    dying.kill()
    await asyncio.sleep(0)
    async with within():
        await far.other.call("outcome", "its")
        await region.aclose()
        array[:] = 7
        await far.cast.part(dying)
        await asyncio.sleep(0.05)  # whatever was on its way
    assert (array == 7).all(), "written to after it was closed"
    async with within():
        await far.post("put")
        assert await far.other.call("matches", "far", 1)


@every_transport
async def test_access_that_is_taken_back(far: Far, transports: str) -> None:
    """The other agent puts to us, and may no longer."""
    here = far.cast.here
    region, array = await make_region(here, "granted", "ordinary", (256, 65536))
    await far.other.call("region", "mine", "ordinary", (256, 65536), seed=3)
    await far.other.call("connect", here.metadata())
    rows = list(range(256)) * 32
    await far.other.call("begin", "t", "put", "mine", rows, "granted", rows, peer="here", wait=True)
    async with within():
        await region.revoke("there")
        array[:] = 7
        with pytest.raises(TransferError, match="deregistered"):
            await far.other.call("outcome", "t")
        await asyncio.sleep(0.05)
        assert (array == 7).all(), "written to after it was taken back"
        region.grant("there")
        await far.other.call("begin", "t", "put", "mine", rows[:256], "granted", rows[:256], peer="here")
        await far.other.call("outcome", "t")
    assert (array == pattern(3, (256, 65536))).all()


@every_transport
async def test_regions_come_and_go(far: Far, transports: str) -> None:
    before = ucp.live()
    array = np.zeros(1 << 16, np.uint8)
    for number in range(300):
        array[:] = number % 256
        async with far.cast.here.register(array) as region:
            there = far.remote.descriptors([(number % 16) << 16], [1 << 16])
            await far.cast.here.put(region.descriptors([0], [1 << 16]), there)
    assert ucp.live() == before
    for number in range(60):
        await far.other.call("region", f"r{number % 3}", "ordinary", (1 << 16,), seed=number)
        remote = await far.peer.region(f"r{number % 3}", timeout=5)
        await far.cast.here.get(far.region.descriptors([0], [1 << 16]), remote.descriptors([0], [1 << 16]))
        assert (far.array[: 1 << 16] == pattern(number, (1 << 16,))).all()
        await far.other.call("close", f"r{number % 3}")


@every_transport
@pytest.mark.parametrize("workers", [1, 3])
async def test_a_region_of_several_segments(far: Far, transports: str, workers: int) -> None:
    parts = [np.zeros((8, 30011 + 8 * k), np.uint8) for k in range(5)]
    region = await far.cast.here.register(parts)
    for k, part in enumerate(parts):
        part[:] = pattern(20 + k, part.shape)
    for k in range(5):
        await far.other.call("region", f"part{k}", "ordinary", parts[k].shape)
        remote = await far.peer.region(f"part{k}", timeout=5)
        await far.cast.here.put(region[k], remote[:])
        assert await far.other.call("matches", f"part{k}", 20 + k)
        part = parts[k].copy()
        parts[k][:] = 0
        await far.cast.here.get(region[k], remote[:])
        assert (parts[k] == part).all()


# ---- endpoints ----------------------------------------------------------------------------------------------------


IN_MATRIX = pytest.mark.skipif("UCX_MATRIX" not in os.environ, reason="one of the combinations of `make test-ucx`")


@every_transport
@pytest.mark.parametrize(("progress", "workers"), [("loop", 1), pytest.param("thread", 2, marks=IN_MATRIX)])
@pytest.mark.parametrize("length", [65536, 4096], ids=["pieces", "small"])
@both_ops
async def test_a_broken_connection_is_made_again(
    far: Far, transports: str, progress: str, workers: int, length: int, op: str
) -> None:
    """UCX's sockets in the other process are shut down in the middle of it, again and again; nobody notices."""
    far.array[:] = pattern(6, (NBYTES,))
    for number in range(2):
        tag = b"%d" % number
        transfer = long(far, op, length, notify=tag, timeout=60)
        with contextlib.suppress(StopAsyncIteration):
            await moving(transfer)
        assert await far.other.call("cut_ucx") > 0
        async with asyncio.timeout(70):  # on a busy machine what takes half a second here took ten
            await transfer
        await far.other.call("expect", tag, peer="here", timeout=5)
    if op == "put":
        assert await far.other.call("matches", "far", 6)
    else:
        assert (far.array == pattern(2, (NBYTES,))).all()


@every_transport
@pytest.mark.parametrize("lost", [0.5])
async def test_a_peer_that_stands_still_for_long_is_used_again(far: Far, transports: str, lost: float) -> None:
    """No endpoint is answered meanwhile, for longer than `lost_after`; its process lives, so it is not lost."""
    far.other.stop()
    late = [far.post("get", timeout=0.3, notify=b"late") for _ in range(3)]
    async with within():
        for transfer in late:
            with contextlib.suppress(TimeoutError):
                await transfer
    await asyncio.sleep(3)
    far.other.resume()
    far.array[:] = pattern(1, (NBYTES,))
    async with within():
        await far.post("put", timeout=6)
    assert await far.other.call("matches", "far", 1)
