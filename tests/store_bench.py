"""What tests of the block store share: an agent with memory, blocks that say which they are, and a small disk."""

from __future__ import annotations

import ctypes
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from store_writer import block_of, key_of, version_of

from asyncxfer import Agent, Region
from asyncxfer import store as stores
from asyncxfer.store import Store

BLOCK = 4096
COUNT = 64  # blocks of memory
Bytes = npt.NDArray[np.uint8]


class Bench:
    """An agent with memory, and a directory for stores."""

    def __init__(self, agent: Agent, region: Region, path: Path) -> None:
        self.agent = agent
        self.region = region
        self.memory: Bytes = region.array
        self.path = path

    def open(self, **options: Any) -> stores.Opening[Store]:
        """Open the store; a writer by default, whose blocks are those of the memory."""
        if options.get("mode", "w") == "w":
            options = {"block_bytes": BLOCK, "slab_bytes": 100 * BLOCK} | options
        return stores.open(options.pop("path", self.path), agent=self.agent, **options)

    async def put(self, store: Store, versions: dict[int, int], **options: Any) -> None:
        """Put versions of numbered blocks."""
        for row, (number, version) in enumerate(versions.items()):
            self.memory[row] = block_of(number, version, BLOCK)
        await store.put([key_of(number) for number in versions], self.region[: len(versions)], **options)

    async def get(self, store: Store, numbers: list[int], *, damaged: bool = False) -> dict[int, int | None]:
        """Get numbered blocks: their versions; None for what is no whole block. Misses leave their rows alone."""
        rows = np.arange(COUNT - len(numbers), COUNT)
        self.memory[rows] = 0xAB
        hits = await store.get([key_of(number) for number in numbers], self.region[rows])
        for row, hit in zip(rows, hits, strict=True):
            assert hit or damaged or (self.memory[row] == 0xAB).all()
        found = zip(numbers, rows, hits, strict=True)
        return {number: version_of(number, self.memory[row]) for number, row, hit in found if hit}


@asynccontextmanager
async def bench_in(path: Path) -> AsyncIterator[Bench]:
    async with Agent("bench") as agent, agent.allocate((COUNT, BLOCK), np.uint8) as region:
        made = Bench(agent, region, path)
        yield made
        vars(made).clear()  # pytest keeps the value of a fixture, and with it the memory


def versions(*numbers: int, version: int = 1) -> dict[int, int]:
    return dict.fromkeys(numbers, version)


def mounted(place: Path, size: str) -> Iterator[Path]:
    """Mount a file system of that size, and take it away again."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    libc = ctypes.CDLL(None, use_errno=True)
    place.mkdir()
    if libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", 0, f"size={size}".encode()) != 0:
        pytest.skip(f"a tmpfs cannot be mounted: {os.strerror(ctypes.get_errno())}")
    try:
        yield place
    finally:
        assert libc.umount2(os.fsencode(place), 2) == 0
