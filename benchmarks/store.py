"""What the block store costs: ``python benchmarks/store.py [--keys N] [--path DIRECTORY]``.

Of the index, with many keys of 32 bytes: lookups in batches, opening after an orderly end and after a kill, and the
memory a key, as the system counts it of a process of its own that opens the store and does nothing else. Of the
blocks, 16 KiB scattered in memory: puts at each durability, gets from the page cache and from the disk; beside them
what the agent does with one file and the same rows, without a store. Root drops the page cache for what is read from
the disk, and before a store of many keys is opened.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from asyncxfer import Agent, Region
from asyncxfer import store as stores

BLOCK = 16 * 1024
BATCH = 4096
TURNS = 5


async def seconds_of(call: Callable[[], Awaitable[Any]], before: Callable[[], None] | None = None) -> float:
    """The median of a few calls."""
    taken = []
    for _ in range(TURNS):
        if before is not None:
            await asyncio.to_thread(before)
        start = time.perf_counter()
        await call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def report(what: str, figure: str) -> None:
    print(f"{what:<46}{figure:>22}")


def drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("1")


async def index(agent: Agent, path: Path, count: int) -> None:
    """Many keys; their blocks are a byte long, so that only the index is measured."""
    keys = [os.urandom(32) for _ in range(count)]
    options = {"agent": agent, "block_bytes": 1, "slab_bytes": 1 << 24}
    async with agent.allocate(count, np.uint8) as region:
        store = await stores.open(path, **options)  # type: ignore[arg-type]
        start = time.perf_counter()
        await store.put(keys, region[:])
        report(f"put {count:,} keys", f"{(time.perf_counter() - start) / count * 1e9:,.0f} ns a key")
        report("entries and tables of the index", f"{store.stats()['index_bytes'] / count:.0f} bytes a key")
        shutil.copytree(path, f"{path}-killed")
        await store.aclose()
        mixed = [keys[k] for k in np.random.default_rng(0).permutation(count)[: BATCH * 16]]
        for name, where in (("in order", path), ("after a kill, all in the journal", Path(f"{path}-killed"))):
            await grown(where, name, count)
            if os.geteuid() == 0:
                await asyncio.to_thread(drop_caches)
            start = time.perf_counter()
            opened = await stores.open(where, **options)  # type: ignore[arg-type]
            assert len(opened) == count
            report(f"open, {name}", f"{time.perf_counter() - start:.2f} s")
            taken = await seconds_of(lambda: opened.contains(mixed))  # noqa: B023 - awaited at once
            report("contains, in batches", f"{taken / len(mixed) * 1e9:,.0f} ns a key")
            await opened.aclose()
        reader = await stores.open(path, agent=agent, mode="r")
        taken = await seconds_of(lambda: reader.contains(mixed))
        report("contains, of a reader", f"{taken / len(mixed) * 1e9:,.0f} ns a key")
        await reader.aclose()


async def grown(path: Path, name: str, count: int) -> None:
    """Have another process open the store, and tell by how much its memory grew by that."""
    loop, spawn = asyncio.get_running_loop(), multiprocessing.get_context("spawn")
    for mode in ("r", "w") if name == "in order" else ("r",):
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            after, most = await loop.run_in_executor(pool, memory_of, path, mode)
        report(f"memory, mode {mode!r}, {name}", f"{after / count:.0f} bytes a key")
        report("  at most, while it is opened", f"{most / count:.0f} bytes a key")


def memory_of(path: Path, mode: stores.Mode) -> tuple[int, int]:
    """By how many bytes this process grows with a store, and by how many at most: resident memory."""
    return asyncio.run(_memory_of(path, mode))


async def _memory_of(path: Path, mode: stores.Mode) -> tuple[int, int]:
    async with Agent("measured") as agent:
        before = resident("VmRSS")
        async with stores.open(path, agent=agent, mode=mode):
            return resident("VmRSS") - before, resident("VmHWM") - before


def resident(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) * 1024


async def blocks(agent: Agent, path: Path) -> None:
    """Blocks scattered in memory."""
    shape = (BATCH, BLOCK)
    async with agent.allocate(shape, np.uint8) as memory:
        memory.array[:] = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
        scattered = memory[np.random.default_rng(2).permutation(BATCH)]
        await plain_file(agent, path, memory, scattered)
        for durability in ("none", "data", "full"):
            await stored(agent, path / durability, scattered, durability)


async def plain_file(agent: Agent, path: Path, memory: Region, scattered: Any) -> None:
    async with agent.open(path.with_name("plain"), "w", size=memory.nbytes) as file:
        taken = await seconds_of(lambda: agent.put(scattered, file.bytes[:]))
        report("agent.put, one file", rate(taken))
        taken = await seconds_of(lambda: agent.get(scattered, file.bytes[:]))
        report("agent.get, one file, page cache", rate(taken))


async def stored(agent: Agent, path: Path, rows: Any, durability: str) -> None:
    keys = [os.urandom(32) for _ in range(BATCH)]
    budget = 3 * BATCH * BLOCK
    options = {"agent": agent, "block_bytes": BLOCK, "budget": budget, "durability": durability}
    async with stores.open(path, **options) as store:  # type: ignore[arg-type]
        report(f"put, durability {durability!r}", rate(await seconds_of(lambda: store.put(keys, rows))))
        if durability != "none":
            one = rows.select([0])
            taken = await seconds_of(lambda: store.put(keys[:1], one))
            report(f"put of one block, durability {durability!r}", f"{taken * 1e3:.2f} ms")
            return
        assert (await store.get(keys, rows)).all()
        report("get, page cache", rate(await seconds_of(lambda: store.get(keys, rows))))
        few = rows.select([0])

        async def many() -> None:
            for _ in range(200):
                await store.get(keys[:1], few)

        report("get of one block, page cache", f"{await seconds_of(many) / 200 * 1e6:.0f} µs")
        if os.geteuid() == 0:
            report("get, disk", rate(await seconds_of(lambda: store.get(keys, rows), before=drop_caches)))


def rate(seconds: float) -> str:
    return f"{BATCH * BLOCK / seconds / 1e9:.2f} GB/s"


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument(
        "--path", type=Path, default=None, help="on the disk to measure; a temporary directory by default"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.path) as directory:
        async with Agent("bench") as agent:
            await index(agent, Path(directory) / "index", options.keys)
            await blocks(agent, Path(directory) / "blocks")


if __name__ == "__main__":
    asyncio.run(main())
