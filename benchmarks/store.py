"""What the block store costs: ``python benchmarks/store.py [--keys N] [--path DIRECTORY]``.

Of the index, with many keys of 32 bytes: memory a key, lookups in batches, opening after an orderly end and after a
kill. Of the blocks, 16 KiB scattered in memory: puts at each durability, gets from the page cache and, with the cache
dropped (root), from the disk; beside them what the agent does with one file and the same rows, without a store.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
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
        report("memory", f"{store.stats()['index_bytes'] / count:.0f} bytes a key")
        shutil.copytree(path, f"{path}-killed")
        await store.aclose()
        mixed = [keys[k] for k in np.random.default_rng(0).permutation(count)[: BATCH * 16]]
        for name, where in (("in order", path), ("after a kill, all in the journal", Path(f"{path}-killed"))):
            start = time.perf_counter()
            opened = await stores.open(where, **options)  # type: ignore[arg-type]
            report(f"open, {name}", f"{time.perf_counter() - start:.2f} s")
            taken = await seconds_of(lambda: opened.contains(mixed))  # noqa: B023 - awaited at once
            report("contains, in batches", f"{taken / len(mixed) * 1e9:,.0f} ns a key")
            await opened.aclose()
        reader = await stores.open(path, agent=agent, mode="r")
        taken = await seconds_of(lambda: reader.contains(mixed))
        report("contains, of a reader", f"{taken / len(mixed) * 1e9:,.0f} ns a key")
        await reader.aclose()


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
        taken = await seconds_of(lambda: store.get(keys[:1], few))
        report("get of one block, page cache", f"{taken * 1e6:.0f} µs")
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
