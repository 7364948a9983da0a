"""asyncxfer as one side of a pair, through its public API only.

The clock runs from calling a prepared plan to its awaited result or, where a case is not prepared,
from making both descriptor lists of arrays of offsets and lengths. Besides single rounds an
initiator can be watched: how late its loop is while it moves data back to back, and what thousands
of transfers in flight at once cost in memory. It knows nothing of any other system.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import os
import time
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from asyncxfer import Agent, Certificates, DescriptorList, Peer, Plan, Region, Transfer

from . import _ucx
from ._side import PACE, TELL_WITHIN, Message, Side, tags
from ._ticker import Ticker, percentiles

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ._pattern import Bytes
    from ._shapes import Case, Memory

__all__ = ["OurSide", "agent"]

_LET_GO = 0.1
_ESTABLISHED = "01"  # as /proc/net/tcp writes it


class OurSide(Side):
    """An initiator or a target that is an `Agent` with its default settings, or one that knows TCP or UCX only."""

    def __init__(self, options: Message) -> None:
        self._agent = agent(options["role"], options)
        self._checksum: bool = options["checksum"]
        self._regions: dict[Memory, Region] = {}
        self._arrays: dict[Memory, Bytes] = {}
        self._peer: Peer | None = None
        self._plan: Plan | None = None
        self._post: Callable[[], Transfer] | None = None

    async def open(self, nbytes: int, memories: Sequence[Memory]) -> str:
        await self._agent.start()
        for memory in memories:
            if memory == "mapped":
                region = await self._agent.allocate((nbytes,), np.uint8, name=memory)
                array: Bytes = region.array
            else:
                array = np.zeros(nbytes, dtype=np.uint8)
                region = await self._agent.register(array, name=memory)
            array[:] = 1  # every page is there before anything is timed
            self._regions[memory], self._arrays[memory] = region, array
        return base64.b64encode(self._agent.metadata()).decode()

    async def connect(self, address: str) -> None:
        self._peer = await self._agent.connect(base64.b64decode(address))

    async def prepare(self, case: Case) -> None:
        here = self._regions[case.memory].descriptors(*case.rows(case.local_order()))
        there = self._connected()[case.memory].descriptors(*case.rows(case.remote_order()))
        self._plan = self._agent.prepare(case.op, here, there, checksum=self._checksum)
        self._post = self._plan if case.prepared else self._unprepared(case)

    def _unprepared(self, case: Case) -> Callable[[], Transfer]:
        """A call that makes both lists and posts them; their rows are there already."""
        call = self._agent.put if case.op == "put" else self._agent.get
        region, peer_region = self._regions[case.memory], self._connected()[case.memory]
        here, there = case.rows(case.local_order()), case.rows(case.remote_order())
        checksum = self._checksum
        return lambda: call(region.descriptors(*here), peer_region.descriptors(*there), checksum=checksum)

    async def run(self, repeats: int) -> Message:
        backend, post = self._prepared().backend, self._posting()
        cpu, start = time.process_time(), time.perf_counter()
        for _ in range(repeats):
            await post()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "backend": backend}

    async def post(self, count: int) -> Message:
        post, called, ended, at_once = self._posting(), [], [], 0
        cpu = time.process_time()
        for _ in range(count):
            start = time.perf_counter()
            transfer = post()
            called.append(time.perf_counter() - start)
            at_once += transfer.done()
            await transfer
            ended.append(time.perf_counter() - start)
        used = time.process_time() - cpu
        return {"called": called, "ended": ended, "at_once": at_once, "cpu_seconds": used}

    async def release(self) -> None:
        self._plan = self._post = None

    async def tell(self, count: int) -> list[float]:
        plan, times = self._prepared(), []
        for tag in tags(count):
            times.append(time.perf_counter())
            await plan(notify=tag)
            await asyncio.sleep(PACE)
        return times

    async def listen(self, count: int) -> list[float]:
        times = []
        for tag in tags(count):
            await self._agent.expect(tag, timeout=TELL_WITHIN)
            times.append(time.perf_counter())
        return times

    async def close(self) -> None:
        await self._agent.aclose()

    def memory(self, memory: Memory) -> Bytes:
        return self._arrays[memory]

    async def answer(self, message: Message) -> Message:
        if message["do"] == "streams":
            return {"streams": _connections() - 1}  # one of them is for control
        return await super().answer(message)

    async def answer_more(self, do: str, case: Case, message: Message) -> Message:
        if do == "idle":
            return await _tick_while_idle(message["seconds"])
        if do == "stall":
            return await self._tick_while_moving(message["seconds"])
        if do == "flood":
            return await self._flood(case, message)
        return await super().answer_more(do, case, message)

    async def _tick_while_moving(self, seconds: float) -> Message:
        post, transfers = self._posting(), 0
        with Ticker() as ticker:
            start = time.perf_counter()
            while (elapsed := time.perf_counter() - start) < seconds:
                await post()
                transfers += 1
        return {
            "lateness": percentiles(ticker.lateness),
            "ticks": len(ticker.lateness),
            "transfers": transfers,
            "seconds": elapsed,
        }

    async def _flood(self, case: Case, message: Message) -> Message:
        """Post many transfers before awaiting any; they take turns over the parts that the case falls into."""
        call = self._agent.put if case.op == "put" else self._agent.get
        lists = self._parts(case, message["parts"])
        turns = list(islice(cycle(lists), message["transfers"]))
        posts: list[Callable[[], Transfer]] = [partial(call, *turn) for turn in turns]
        if message["prepared"]:
            posts = [self._agent.prepare(case.op, *turn) for turn in turns]
        before, start = await _private_bytes(), time.perf_counter()
        posted = [post() for post in posts]
        in_flight = sum(not transfer.done() for transfer in posted)
        await asyncio.gather(*posted)
        seconds = time.perf_counter() - start
        during = await _private_bytes()
        del posted
        return {
            "in_flight": in_flight,
            "seconds": seconds,
            "memory": {"before": before, "during": during, "after": await _private_bytes()},
        }

    def _parts(self, case: Case, parts: int) -> list[tuple[DescriptorList, DescriptorList]]:
        """The case cut into `parts` of equally many rows, as pairs of a local and a remote list."""
        here = self._regions[case.memory].descriptors(*case.rows(case.local_order()))
        there = self._connected()[case.memory].descriptors(*case.rows(case.remote_order()))
        rows = np.arange(case.shape.count, dtype=np.int64).reshape(parts, -1)
        return [(here.select(part), there.select(part)) for part in rows]

    def _prepared(self) -> Plan:
        if self._plan is None:
            raise RuntimeError("a run came before its case was prepared")
        return self._plan

    def _posting(self) -> Callable[[], Transfer]:
        if self._post is None:
            raise RuntimeError("a run came before its case was prepared")
        return self._post

    def _connected(self) -> Peer:
        if self._peer is None:
            raise RuntimeError("a case came before the peer was connected")
        return self._peer


def agent(name: str, options: Message) -> Agent:
    """The agent that `options` ask for."""
    folder = options["certificates"]
    if options["over"] == "host":
        return Agent(name)
    if options["over"] == "ucx":
        return Agent(name, backends=["ucx"], config=_ucx.config(options))
    config = {"open_listener": True, "unix_socket": False, "encrypt_data": folder is not None}
    network: dict[str, Any] = {"listen": f"tcp://{options['address']}:0", "backends": ["tcp"], "config": config}
    if folder is not None:
        files = [str(Path(folder, file)) for file in (f"{name}.pem", f"{name}-key.pem", "ca.pem")]
        network["credentials"] = Certificates(*files)
    return Agent(name, **network)


async def _tick_while_idle(seconds: float) -> Message:
    with Ticker() as ticker:
        await asyncio.sleep(seconds)
    return {"lateness": percentiles(ticker.lateness), "ticks": len(ticker.lateness)}


def _connections() -> int:
    """TCP connections that this process has."""
    links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.exists()]
    own = {link.removeprefix("socket:[").removesuffix("]") for link in links if link.startswith("socket:[")}
    tables = [Path("/proc/self/net", name).read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table]
    return sum(row[3] == _ESTABLISHED and row[9] in own for row in rows)


async def _private_bytes() -> int:
    """Resident memory of this process that no mapping shares, once the loop has had time to let go of what ended."""
    await asyncio.sleep(_LET_GO)
    gc.collect()
    return _resident()


def _resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/self/status has no RssAnon line; a Linux of 4.5 or newer has one")
