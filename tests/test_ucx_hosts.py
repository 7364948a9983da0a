"""Agents on two hosts over UCX's tcp: no gate is shared, so the owner of a region waits for the initiator's word.

Both are processes of their own: UCX reads the routes once in the life of a process, and finds no host that came later.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hosts import Host, Hosts
from over_ucx import BACKENDS, needs_ucx
from peers import Process, Server
from stage import Cast, both_ops, within

from asyncxfer import Agent, PeerLostError, TransferError, TransferTimeout

pytestmark = [needs_ucx, pytest.mark.blocking("cables are cut and mended by programs that the test waits for")]

SHAPE = (256, 1 << 16)
ROWS = list(range(256))
LONG = ROWS * 64  # a gigabyte


class Two:
    """Agents "near" and "far", each on a host and with a region of its own name; the near one moves bytes."""

    def __init__(self, cast: Cast, hosts: Hosts) -> None:
        self.cast = cast
        self.hosts = hosts
        self.near: Process
        self.far: Process
        self.metadata = b""  # of the one that was started last

    async def begin(self) -> None:
        self.near = await self.start("near", self.hosts[0])
        await self.reach()

    async def start(self, name: str, host: Host) -> Process:
        process = self.cast.spawn(host)
        config = {
            "ucx_transports": "tcp", "ucx_devices": "eth0", "open_listener": True, "handshake_timeout": 5.0,
            "suspect_after": 0.5, "lost_after": 15.0, "close_timeout": 30.0,
        }  # fmt: skip
        listen = f"tcp://{host.ipv4}:0"
        self.metadata = await process.call("start", name, config, backends=BACKENDS, listen=listen)
        await process.call("region", name, "ordinary", SHAPE, seed=1 if name == "near" else 2)
        return process

    async def reach(self) -> None:
        """Start the far one, also in the place of one that has died."""
        self.far = await self.start("far", self.hosts[1])
        await self.near.call("connect", self.metadata)

    async def post(self, op: str, rows: list[int] = ROWS, **options: Any) -> None:
        await self.near.call("begin", "t", op, "near", rows, "far", rows, peer="far", **options)

    async def outcome(self) -> None:
        async with asyncio.timeout(20):
            await self.near.post("outcome", "t")


@pytest.fixture
async def two(ucx_server: Server, hosts: Hosts) -> AsyncIterator[Two]:
    made = Two(Cast(ucx_server, await Agent("cast", backends=["local"]).start()), hosts)
    await made.begin()
    yield made
    await made.cast.leave()
    vars(made).clear()


async def test_bytes_and_notifications(two: Two) -> None:
    async with within():
        await two.post("put", notify=b"put")
        await two.outcome()
        assert await two.far.call("expect", b"put") == ("near", b"put")
        assert await two.far.call("matches", "far", 1)
        await two.far.call("fill", "far", 9)
        await two.post("get", ROWS[::-1], notify=b"got")
        await two.outcome()
        await two.far.call("expect", b"got")
        assert await two.near.call("matches", "near", 9)


@both_ops
async def test_an_owner_closes_a_region_under_a_transfer(two: Two, op: str) -> None:
    await two.post(op, LONG, wait=True)
    closing = two.far.post("close", "far")
    async with within():
        with pytest.raises(TransferError, match="deregistered"):
            await two.outcome()
        checksum = await closing
    await two.near.call("fill", "near", 7)
    await asyncio.sleep(0.1)  # whatever was on its way
    assert await two.far.call("checksum", "far") == checksum, "written to after it was closed"
    assert await two.near.call("matches", "near", 7)


async def test_regions_come_and_go(two: Two) -> None:
    """The initiator says each time that it has left: nobody waits for `close_timeout`, longer than the test."""
    async with within():
        await two.post("put")
        await two.outcome()
        for number in range(5):
            await two.far.call("close", "far")
            await two.far.call("region", "far", "ordinary", SHAPE, seed=10 + number)
            await two.post("get")
            await two.outcome()
            assert await two.near.call("matches", "near", 10 + number)


@both_ops
async def test_a_cable_that_is_cut_and_mended(two: Two, op: str) -> None:
    await two.post(op, LONG, wait=True, timeout=1.0)
    two.hosts[1].partition()
    with pytest.raises(TransferTimeout):
        await two.outcome()
    await two.near.call("fill", "near", 7)
    two.hosts[1].heal()
    await two.post("put", timeout=18)
    await two.outcome()
    assert await two.far.call("matches", "far", 7)


async def test_a_host_that_dies(two: Two) -> None:
    await two.post("put", LONG, wait=True, timeout=8)
    two.far.kill()
    with pytest.raises((TransferTimeout, PeerLostError)):
        await two.outcome()
    await two.cast.part(two.far)
    await two.near.call("fill", "near", 7)
    await two.reach()
    await two.post("put")
    await two.outcome()
    assert await two.far.call("matches", "far", 7)
