"""A writer of a tiered store for tests that kill it: it says what was acknowledged, and how it fared meanwhile.

Each line that it writes is one thing that has happened: ``=first count`` so many blocks from that number on were
acknowledged, ``!name value`` a figure of its own. Blocks say which they are, as those of `store_writer`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from store_writer import block_of, say

from asyncxfer import Agent
from asyncxfer import store as stores

BLOCK = 16 * 1024
BATCH = 16  # blocks of a put
TASKS = 4
MEMORY = 256 * BLOCK
DISK = 1024 * BLOCK
BACKLOG = 256 * BLOCK


def key_of(number: int) -> bytes:
    """The key of a number; every third one is long."""
    return (b"block %d" % number).ljust(40 if number % 3 == 0 else 8, b".")


def resident() -> int:
    """Bytes of memory that this process has."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096


def tiered(agent: Agent, path: str, url: str, options: dict[str, object]) -> stores.Opening[stores.TieredStore]:
    """The store of these tests."""
    return stores.tiered(
        agent=agent, memory=MEMORY, disk=path, objects=url, block_bytes=BLOCK, disk_budget=DISK, backlog=BACKLOG,
        options=options,
    )  # fmt: skip


class Watch:
    """How late the loop comes to what is due each millisecond, and the most memory that the process had."""

    def __init__(self) -> None:
        self._late = np.zeros(20_000, np.int64)  # counts, by tenths of a millisecond
        self.resident = self.begun = resident()
        self._task = asyncio.ensure_future(self._watch())

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        ticks = 0
        while True:
            due = loop.time() + 0.001
            await asyncio.sleep(0.001)
            self._late[min(int((time.monotonic() - due) * 1e4), len(self._late) - 1)] += 1
            ticks += 1
            if ticks % 100 == 0:
                self.resident = max(self.resident, resident())

    def stop(self) -> dict[str, float]:
        """End it; what was seen."""
        self._task.cancel()
        counts = np.cumsum(self._late)
        figures = {
            f"late_{name}_ms": int(np.searchsorted(counts, share * counts[-1])) / 10
            for name, share in (("p50", 0.5), ("p99", 0.99), ("p999", 0.999), ("max", 1))
        }
        return {**figures, "resident": self.resident, "grown": self.resident - self.begun}


async def work(store: stores.TieredStore, region: Any, task: int, todo: list[int]) -> None:
    """Put batches until there are none left."""
    rows = np.arange(task * BATCH, (task + 1) * BATCH)
    while todo:
        first = todo.pop()
        for row in rows:
            region.array[row] = block_of(first + int(row) - task * BATCH, 1, BLOCK)
            await asyncio.sleep(0)  # what the test computes is no work of the store's
        await store.put([key_of(first + number) for number in range(BATCH)], region[rows], prefix=b"%d" % task)
        say([f"={first} {BATCH}"])


async def main(path: str, url: str, options: dict[str, object], first: int, last: int) -> None:
    """Put blocks, until all are objects or somebody kills this."""
    async with (
        Agent("writer", backends=["local", "uring", "s3"]) as agent,
        agent.allocate((TASKS * BATCH, BLOCK), np.uint8) as region,
        tiered(agent, path, url, options) as store,
    ):
        watch = Watch()
        todo = list(range(first, last, BATCH))[::-1]
        await asyncio.gather(*(work(store, region, task, todo) for task in range(TASKS)))
        await store.flush()
        say(["!" + json.dumps(watch.stop() | store.stats())])


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])))
