"""Serve conversations from a paged KV cache larger than memory: what does not fit lies in a block store on disk.

Conversations share the blocks of memory, which hold only some of them at a time. When one is asked for, the blocks
that are still in memory are used as they are, others are read from the store straight into free blocks, and what the
store no longer has is computed again and put there. A block's key is the hash of its tokens and all before them, so
that a block is found whoever computed it. Requests come in two rounds: in the first one the store's files are in the
page cache; in the second one the system is asked to forget them before each request, so that blocks come from the
disk. Every block that a request uses is checked against a checksum of what it must be.

    python examples/kv_offload.py --memory 64 --disk 512

It exits with a status other than 0 if a single block is wrong. A progress bar is shown where `rich` is installed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import os
import sys
import tempfile
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from asyncxfer import Agent, Region
from asyncxfer import store as stores

LAYERS, HEADS, DIMENSION, TOKENS = 8, 4, 64, 16  # of the model; tokens a block
BLOCK_SHAPE = (LAYERS, 2, TOKENS, HEADS, DIMENSION)
BLOCK_BYTES = int(np.prod(BLOCK_SHAPE)) * 2
CONVERSATION_BLOCKS = 24


def keys_of(conversation: int) -> list[bytes]:
    """Name the blocks of a conversation: each key depends on all tokens up to the end of its block."""
    keys, key = [], b"kv_offload"
    for number in range(CONVERSATION_BLOCKS):
        tokens = b"tokens %d of conversation %d" % (number, conversation)
        key = hashlib.sha256(key + tokens).digest()
        keys.append(key)
    return keys


def compute(key: bytes) -> NDArray[np.float16]:
    """Stand in for the model: the same keys and values whenever they are computed."""
    words = np.random.default_rng(list(key)).integers(1, 1 << 16, BLOCK_SHAPE, dtype=np.uint16)
    return words.view(np.float16)


@dataclass
class Tier:
    """What came from one place."""

    blocks: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        rate = f", {self.blocks * BLOCK_BYTES / self.seconds / 1e9:.2f} GB/s" if self.seconds else ""
        return f"{self.blocks:6d} blocks{rate}"


@dataclass
class Tally:
    """Where the blocks of all requests came from, and whether they were right."""

    memory: Tier = field(default_factory=Tier)
    page_cache: Tier = field(default_factory=Tier)
    disk: Tier = field(default_factory=Tier)
    computed: Tier = field(default_factory=Tier)
    used: int = 0
    wrong: int = 0


class PagedCache:
    """Blocks of memory with a store behind them. The cache lies in memory layer by layer, as engines have it."""

    def __init__(self, cache: NDArray[np.float16], region: Region, store: stores.Store) -> None:
        self.cache = cache  # layer, block, k/v, token, head, dimension
        self._region = region  # the same memory, indexed by block first
        self._store = store
        self._table: OrderedDict[bytes, int] = OrderedDict()  # which key is in which block; the oldest first
        self._free = list(range(cache.shape[1]))

    async def fetch(self, conversation: int, tally: Tally, tier: Tier) -> list[int]:
        """Bring a conversation into memory; its blocks."""
        keys = keys_of(conversation)
        for key in reversed(keys):
            if key in self._table:
                self._table.move_to_end(key)
        missing = [key for key in keys if key not in self._table]
        tally.memory.blocks += len(keys) - len(missing)
        if missing:
            await self._read(conversation, missing, tally, tier)
        return [self._table[key] for key in keys]

    async def _read(self, conversation: int, keys: list[bytes], tally: Tally, tier: Tier) -> None:
        blocks = self._take(len(keys))
        start = time.perf_counter()
        hits = await self._store.get(keys, self._region[blocks])
        if hits.any():
            tier.seconds += time.perf_counter() - start
            tier.blocks += int(hits.sum())
        lost = np.flatnonzero(~hits).tolist()
        if lost:
            start = time.perf_counter()
            for number in lost:
                self.cache[:, blocks[number]] = await asyncio.to_thread(compute, keys[number])
            tally.computed.seconds += time.perf_counter() - start
            tally.computed.blocks += len(lost)
            rows = self._region[[blocks[number] for number in lost]]
            await self._store.put([keys[number] for number in lost], rows, prefix=b"%d" % conversation)
        self._table.update(zip(keys, blocks, strict=True))

    def _take(self, count: int) -> list[int]:
        """Give free blocks, after dropping from memory what was used longest ago: the store has it."""
        while len(self._free) < count:
            _, block = self._table.popitem(last=False)
            self._free.append(block)
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def check(self, conversation: int, blocks: list[int], sums: dict[bytes, int]) -> int:
        """Count the blocks that are not what they must be."""
        wrong = 0
        for key, block in zip(keys_of(conversation), blocks, strict=True):
            if key not in sums:
                sums[key] = zlib.crc32(compute(key).tobytes())
            wrong += zlib.crc32(np.ascontiguousarray(self.cache[:, block]).tobytes()) != sums[key]
        return wrong


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Give what is called after each request with what it belongs to."""
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield lambda what: None
        return
    columns = (TextColumn("{task.description:>24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda what: bar.update(task, advance=1, description=what)


def forget_files(directory: Path) -> None:
    """Write the store's files to the disk, and ask the system to keep nothing of them in memory."""
    for path in directory.glob("slab-*"):
        fd = os.open(path, os.O_RDWR)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


async def serve(options: argparse.Namespace, directory: Path) -> Tally:
    """Serve all requests."""
    in_memory = options.memory * 2**20 // BLOCK_BYTES
    conversations = max(2, 3 * in_memory // CONVERSATION_BLOCKS)  # three times what memory holds
    cache = np.zeros((LAYERS, in_memory, *BLOCK_SHAPE[1:]), np.float16)
    print(
        f"{conversations} conversations of {CONVERSATION_BLOCKS} blocks; memory holds {in_memory} blocks, the store ",
        end="",
    )
    print(f"{options.disk * 2**20 // BLOCK_BYTES}, {BLOCK_BYTES // 1024} KiB each")
    tally, sums = Tally(), dict[bytes, int]()
    async with (
        Agent("server") as agent,
        agent.register(cache.swapaxes(0, 1), name="kv") as region,
        stores.open(
            directory, agent=agent, block_bytes=BLOCK_BYTES, budget=options.disk * 2**20, durability=options.durability
        ) as store,
    ):
        if store.report.blocks:
            print(f"the store was there already: {store.report}")
        paged = PagedCache(cache, region, store)
        asked = np.random.default_rng(options.seed).zipf(1.2, 2 * options.requests) % conversations
        with progress(2 * options.requests) as tell:
            for number, conversation in enumerate(asked.tolist()):
                first = number < options.requests
                if not first:
                    await asyncio.to_thread(forget_files, directory)
                blocks = await paged.fetch(conversation, tally, tally.page_cache if first else tally.disk)
                tally.wrong += await asyncio.to_thread(paged.check, conversation, blocks, sums)
                tally.used += len(blocks)
                tell("in the page cache" if first else "on the disk")
        print(f"store: {', '.join(f'{value:,} {name}' for name, value in store.stats().items() if value)}")
    return tally


def main() -> int:
    """Serve, and tell where the blocks came from and whether each was right."""
    parser = argparse.ArgumentParser(
        description="Serve conversations from a paged KV cache that is larger than memory."
    )
    parser.add_argument("--path", type=Path, help="directory of the store, kept; a temporary one by default")
    parser.add_argument("--memory", type=int, default=32, metavar="MIB", help="of the paged cache")
    parser.add_argument("--disk", type=int, default=256, metavar="MIB", help="budget of the store")
    parser.add_argument("--requests", type=int, default=150, help="in each of the two rounds")
    parser.add_argument("--durability", choices=("none", "data", "full"), default="none")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.memory * 2**20 < CONVERSATION_BLOCKS * BLOCK_BYTES or options.disk < 1:
        parser.error(f"a conversation takes {-(-CONVERSATION_BLOCKS * BLOCK_BYTES // 2**20)} MiB of memory")
    with tempfile.TemporaryDirectory() as temporary:
        tally = asyncio.run(serve(options, options.path or Path(temporary) / "store"))
    print(f"from memory       {tally.memory}")
    print(f"from page cache   {tally.page_cache}")
    print(f"from disk         {tally.disk}")
    print(f"computed          {tally.computed}")
    print(f"verified: {tally.used - tally.wrong} of {tally.used} blocks", flush=True)
    return int(tally.wrong != 0)


if __name__ == "__main__":
    sys.exit(main())
