"""A writer of a block store for tests that kill it: it says what it begins and what was acknowledged.

Blocks say which key and which version of it they are, and the rest of a block follows from that, so that whoever reads
one knows whether it is whole and how old it is. Each line that this process writes is one thing that has happened:
``+k v`` a put of version v of key k begins, ``-k`` a delete begins, ``=k`` what was begun for k was acknowledged.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import uvloop

from asyncxfer import Agent
from asyncxfer import store as stores

BLOCK = 4096
SLAB = 64 * BLOCK
TASKS = 4
KEYS = 48  # a task

Bytes = npt.NDArray[np.uint8]


def key_of(number: int) -> bytes:
    """The key of a number; every third one is long."""
    return (b"key %d" % number).ljust(40 if number % 3 == 0 else 8, b".")


def block_of(number: int, version: int, nbytes: int = BLOCK) -> Bytes:
    """What a version of a key's block is."""
    head = np.array([number, version], np.int64).tobytes()
    return np.frombuffer(head + hashlib.shake_128(head).digest(nbytes - 16), np.uint8)


def version_of(number: int, block: Bytes) -> int | None:
    """Which version of its key a block is; None where it is no whole block of that key."""
    found, version = np.frombuffer(block[:16].tobytes(), np.int64).tolist()
    return version if found == number and (block == block_of(number, version, len(block))).all() else None


def say(lines: list[str]) -> None:
    """Tell the parent; one write, so that a line is there or not."""
    os.write(1, "".join(line + "\n" for line in lines).encode())


async def work(store: stores.Store, region: Any, task: int, dice: random.Random) -> None:
    """Put and delete the keys of one task, without end."""
    memory = region.array
    first = task * KEYS
    while True:
        numbers = dice.sample(range(first, first + KEYS), dice.choice((1, 1, 3, 16)))
        keys = [key_of(number) for number in numbers]
        if dice.random() < 0.15:
            say([f"-{number}" for number in numbers])
            await store.delete(keys)
        else:
            versions = [dice.getrandbits(40) for _ in numbers]
            rows = first + np.arange(len(numbers))
            for row, number, version in zip(rows, numbers, versions, strict=True):
                memory[row] = block_of(number, version)
            say([f"+{number} {version}" for number, version in zip(numbers, versions, strict=True)])
            await store.put(keys, region[rows], prefix=b"%d" % task if dice.random() < 0.5 else None)
        say([f"={number}" for number in numbers])
        if dice.random() < 0.02:
            await store.compact()


async def main(path: str, durability: str, seed: int, budget: int) -> None:
    """Open the store, say that it is open, and work until killed."""
    dice = random.Random(seed)
    async with (
        Agent("writer") as agent,
        agent.allocate((TASKS * KEYS, BLOCK), np.uint8) as region,
        stores.open(
            path, agent=agent, block_bytes=BLOCK, budget=budget, durability=durability,  # type: ignore[arg-type]
            slab_bytes=SLAB, direct=dice.random() < 0.3,
        ) as store,
    ):  # fmt: skip
        say([f"open {store.report}"])
        await asyncio.gather(*(work(store, region, task, random.Random(dice.random())) for task in range(TASKS)))


if __name__ == "__main__":
    if int(sys.argv[3]) % 2:
        asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
    else:
        uvloop.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
