"""Hand a paged KV cache from a prefill process to a decode process, layer by layer.

Both processes hold the cache of a named model, cut into blocks of 16 tokens, and each has its own block table for every
request. Prefill puts a layer as soon as it is computed and computes the next one while that travels; decode awaits one
notification a layer, and checks each block against a checksum of what it must be, which it works out by itself. Then
all of it once more in a single put, with nothing else to do.

    python examples/kv_handoff.py --model llama-3.1-8b --memory 256

It exits with a status other than 0 if a single block is wrong.
"""

import argparse
import asyncio
import multiprocessing
import sys
import time
import zlib
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
from numpy.typing import NDArray

from asyncxfer import Agent, Done

BLOCK_TOKENS = 16
MODELS = {  # layers, KV heads, head dimension
    "llama-3.1-8b": (32, 8, 128),
    "llama-3.1-70b": (80, 8, 128),
    "qwen2.5-7b": (28, 4, 128),
    "mistral-7b": (32, 8, 128),
    "tinyllama-1.1b": (22, 4, 64),
}
BlockTables = list[list[int]]  # for each request, its blocks in the order of its tokens


@dataclass(frozen=True)
class Job:
    """What both processes are told at the start: the cache's shape, how many requests, and a seed."""

    shape: tuple[int, int, int, int, int, int]  # layer, block, key or value, token, head, dimension
    requests: int
    seed: int

    def block_tables(self, process: str) -> BlockTables:
        """Deal the blocks of one process out to the requests at random; a few stay free.

        A request has as many blocks in one process as in the other, but not the same ones.
        """
        blocks = self.shape[1]
        lengths = np.full(self.requests, blocks // (self.requests + 1))
        lengths[: blocks % (self.requests + 1)] += 1
        order = np.random.default_rng([self.seed, *process.encode()]).permutation(blocks)
        return [part.tolist() for part in np.split(order, np.cumsum(lengths))[: self.requests]]

    def compute(self, request: int, layer: int, blocks: int) -> NDArray[np.float16]:
        """Stand in for the model: the same keys and values whenever and wherever they are computed."""
        shape = (blocks, *self.shape[2:])
        words = np.random.default_rng([self.seed, request, layer]).integers(1, 1 << 16, shape, dtype=np.uint16)
        return words.view(np.float16)


def tag(request: int, layer: int) -> bytes:
    """Name the notification that a layer of a request has arrived."""
    return f"req-{request}/layer-{layer}".encode()


# ---- prefill ------------------------------------------------------------------------------------------------------


async def prefill(job: Job, pipe: Connection) -> None:
    """Compute every request and put it into the decode process, while watching the loop."""
    async with Agent("prefill-0") as agent, agent.allocate(job.shape, np.float16, name="kv") as region:
        peer = await agent.connect(await asyncio.to_thread(pipe.recv_bytes))
        theirs: BlockTables = await asyncio.to_thread(pipe.recv)
        remote, cache = peer["kv"], region.array

        def compute_layer(request: int, layer: int, blocks: list[int]) -> None:
            cache[layer, blocks] = job.compute(request, layer, len(blocks))

        async def hand_off(request: int, blocks: list[int], remote_blocks: list[int]) -> list[Done]:
            puts = []
            for layer in range(job.shape[0]):
                await asyncio.to_thread(compute_layer, request, layer, blocks)
                # Posted here, awaited below: it travels while the next layer is computed.
                local, target = region[layer, blocks], remote[layer, remote_blocks]
                puts.append(agent.put(local, target, notify=tag(request, layer)))
            computed = time.perf_counter()
            done = await asyncio.gather(*puts)
            waits.append(time.perf_counter() - computed)
            return done

        mine = job.block_tables("prefill")
        stalls: list[float] = []
        waits: list[float] = []
        watching = asyncio.create_task(watch_loop(stalls))

        start = time.perf_counter()
        layers: list[Done] = []
        for request, (blocks, remote_blocks) in enumerate(zip(mine, theirs, strict=True)):
            layers += await hand_off(request, blocks, remote_blocks)
        elapsed = time.perf_counter() - start
        await asyncio.to_thread(pipe.recv)  # decode has checked all of it, and forgotten it

        whole = await agent.put(region[:, np.concatenate(mine)], remote[:, np.concatenate(theirs)], notify=b"whole")
        await asyncio.to_thread(pipe.recv)  # decode has checked again: this side may leave

        watching.cancel()
        report(layers, elapsed - sum(waits), sum(waits), whole)
        print(f"longest stall of the event loop: {max(stalls) * 1e3:.1f} ms")


async def watch_loop(stalls: list[float]) -> None:
    """Ask for a millisecond of sleep again and again; note by how much each one was late."""
    while True:
        asked = time.perf_counter()
        await asyncio.sleep(0.001)
        stalls.append(time.perf_counter() - asked - 0.001)


def report(layers: list[Done], computing: float, waiting: float, whole: Done) -> None:
    """Print what was moved, and how."""
    nbytes = sum(done.nbytes for done in layers)
    backends = ", ".join(sorted({done.backend for done in [*layers, whole]}))
    print(f"layer by layer: {nbytes / 2**20:.0f} MiB in {len(layers)} puts by {backends}", end=", ")
    print(f"{waiting * 1e3:.1f} ms of waiting for them after {computing * 1e3:.0f} ms of computation")
    print(f"all at once: {whole.nbytes / 2**20:.0f} MiB in {whole.descriptors} rows", end=", ")
    print(f"{whole.nbytes / whole.seconds / 1e9:.1f} GB/s")


# ---- decode -------------------------------------------------------------------------------------------------------


async def decode(job: Job, pipe: Connection) -> int:
    """Receive every request; give the number of blocks that are not what they must be."""
    async with Agent("decode-0") as agent, agent.allocate(job.shape, np.float16, name="kv") as region:
        tables, cache = job.block_tables("decode"), region.array
        pipe.send_bytes(agent.metadata())
        pipe.send(tables)

        def check_layer(request: int, layer: int, blocks: list[int]) -> int:
            expected = job.compute(request, layer, len(blocks))
            pairs = zip(blocks, expected, strict=True)
            return sum(zlib.crc32(cache[layer, block]) != zlib.crc32(must_be) for block, must_be in pairs)

        async def receive(request: int, blocks: list[int]) -> int:
            wrong = 0
            for layer in range(job.shape[0]):
                await agent.expect(tag(request, layer), timeout=60)
                wrong += await asyncio.to_thread(check_layer, request, layer, blocks)
            return wrong

        def check_whole() -> int:
            free = sorted(set(range(job.shape[1])).difference(*tables))
            strays = int(cache[:, free].any(axis=(2, 3, 4, 5)).sum())  # nothing is written where nothing was sent
            every = ((request, layer) for request in range(job.requests) for layer in range(job.shape[0]))
            return strays + sum(check_layer(request, layer, tables[request]) for request, layer in every)

        wrong = sum(await asyncio.gather(*(receive(request, blocks) for request, blocks in enumerate(tables))))
        await asyncio.to_thread(cache.fill, 0)
        pipe.send("layers checked")
        await agent.expect(b"whole", timeout=60)
        wrong_again = await asyncio.to_thread(check_whole)
        total = job.shape[0] * sum(map(len, tables))
        print(f"verified: {total - wrong} of {total} blocks layer by layer", end=", ")
        print(f"{total - wrong_again} all at once", flush=True)
        pipe.send("whole checked")
        return wrong + wrong_again


def decode_process(job: Job, pipe: Connection) -> None:
    """Be the decode process."""
    sys.exit(1 if asyncio.run(decode(job, pipe)) else 0)


# ---- both ---------------------------------------------------------------------------------------------------------


def main() -> int:
    """Start decode, be prefill, and tell whether every block arrived."""
    parser = argparse.ArgumentParser(description="Hand a paged KV cache from a prefill process to a decode process.")
    parser.add_argument("--model", choices=MODELS, default="llama-3.1-8b")
    parser.add_argument("--memory", type=int, default=256, metavar="MIB", help="of cache in each process")
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    layers, heads, dimension = MODELS[options.model]
    block_bytes = layers * 2 * BLOCK_TOKENS * heads * dimension * 2
    blocks = options.memory * 2**20 // block_bytes
    if blocks <= options.requests:
        parser.error(f"{options.memory} MiB hold {blocks} blocks, too few for so many requests and a free one")
    job = Job((layers, blocks, 2, BLOCK_TOKENS, heads, dimension), options.requests, options.seed)
    print(f"{options.model}: {layers} layers, {blocks} blocks of {BLOCK_TOKENS} tokens, {options.requests} requests")

    spawning = multiprocessing.get_context("spawn")
    here, there = spawning.Pipe()
    child = spawning.Process(target=decode_process, args=(job, there), name="decode")
    child.start()
    there.close()  # so that this process hears of it when decode ends early
    try:
        asyncio.run(prefill(job, here))
    finally:
        child.join(timeout=10)
        child.kill()
    return int(child.exitcode != 0)


if __name__ == "__main__":
    sys.exit(main())
