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
        self.late: list[float] = []
        self.resident = 0
        self._task = asyncio.ensure_future(self._watch())

    async def _watch(self) -> None:
        while True:
            due = time.perf_counter() + 0.001
            await asyncio.sleep(0.001)
            self.late.append(time.perf_counter() - due)
            if len(self.late) % 100 == 0:
                self.resident = max(self.resident, resident())
                self.tell()

    def tell(self) -> None:
        """Say what was seen by now."""
        late = np.array(self.late) * 1000
        figures = {
            "late_p50_ms": np.percentile(late, 50), "late_p99_ms": np.percentile(late, 99),
            "late_p999_ms": np.percentile(late, 99.9), "late_max_ms": late.max(), "resident": self.resident,
        }  # fmt: skip
        say(["!" + json.dumps({name: float(value) for name, value in figures.items()})])

    def stop(self) -> None:
        """End it."""
        self._task.cancel()


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
    ):
        begun = resident()
        async with tiered(agent, path, url, options) as store:
            say([f"open {store.stats()['pending']}"])
            watch = Watch()
            todo = list(range(first, last, BATCH))[::-1]
            await asyncio.gather(*(work(store, region, task, todo) for task in range(TASKS)))
            await store.flush()
            watch.tell()
            watch.stop()
            say(["!" + json.dumps({"begun": begun, "grown": watch.resident - begun, **store.stats()})])


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])))
