"""A writer of a tiered store for tests that kill it: it says what was acknowledged, and how it fared meanwhile.

Each line that it writes is one thing that has happened: ``=first count`` so many blocks from that number on were
acknowledged, ``!name value`` a figure of its own. Blocks say which they are, as those of `store_writer`.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from lateness import IdleLoop, Lateness
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


class Growth:
    """The most memory that the process has, and what it had to begin with, in bytes."""

    def __init__(self) -> None:
        self._begun = self._most = resident()

    def look(self) -> None:
        """Take what it has now into account."""
        self._most = max(self._most, resident())

    def figures(self) -> dict[str, float]:
        """What was seen."""
        return {"resident": self._most, "grown": self._most - self._begun}


async def work(store: stores.TieredStore, region: Any, task: int, todo: list[int], growth: Growth) -> None:
    """Put batches until there are none left."""
    rows = np.arange(task * BATCH, (task + 1) * BATCH)
    while todo:
        first = todo.pop()
        for row in rows:
            region.array[row] = block_of(first + int(row) - task * BATCH, 1, BLOCK)
            await asyncio.sleep(0)  # what the test computes is no work of the store's
        await store.put([key_of(first + number) for number in range(BATCH)], region[rows], prefix=b"%d" % task)
        say([f"={first} {BATCH}"])
        growth.look()


async def main(path: str, url: str, options: dict[str, object], first: int, last: int) -> None:
    """Put blocks, until all are objects or somebody kills this."""
    async with (
        Agent("writer", backends=["local", "uring", "s3"]) as agent,
        agent.allocate((TASKS * BATCH, BLOCK), np.uint8) as region,
        tiered(agent, path, url, options) as store,
    ):
        gc.collect()
        gc.freeze()  # as servers do once they are up: what was imported is not looked through again
        todo, growth, idle = list(range(first, last, BATCH))[::-1], Growth(), IdleLoop()
        with Lateness() as lateness:
            await asyncio.gather(*(work(store, region, task, todo, growth) for task in range(TASKS)))
            await store.flush()
        say(["!" + json.dumps(lateness.figures("late") | idle.end() | growth.figures() | store.stats())])


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])))
