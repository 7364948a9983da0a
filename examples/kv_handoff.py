"""Hand a paged KV cache from a prefill process to a decode process, layer by layer.

Both processes hold the cache of a named model, cut into blocks of 16 tokens, and each has its own block table for every
request. Prefill puts a layer as soon as it is computed and computes the next one while that travels; decode awaits one
notification a layer, and checks each block against a checksum of what it must be, which it works out by itself.

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

        async def hand_off(request: int, mine: list[int], yours: list[int]) -> list[Done]:
            puts = []
            for layer in range(job.shape[0]):
                await asyncio.to_thread(compute_layer, request, layer, mine)
                # Posted here, awaited below: it travels while the next layer is computed.
                puts.append(agent.put(region[layer, mine], remote[layer, yours], notify=tag(request, layer)))
            return await asyncio.gather(*puts)

        stalls: list[float] = []
        watching = asyncio.create_task(watch_loop(stalls))
        start = time.perf_counter()
        done: list[Done] = []
        for request, (mine, yours) in enumerate(zip(job.block_tables("prefill"), theirs, strict=True)):
            done += await hand_off(request, mine, yours)
        elapsed = time.perf_counter() - start
        watching.cancel()

        # Leave only when the other side has what it needs of this one.
        await asyncio.to_thread(pipe.recv)
        report(done, elapsed, max(stalls))


async def watch_loop(stalls: list[float]) -> None:
    """Ask for a millisecond of sleep again and again; note by how much each one was late."""
    while True:
        asked = time.perf_counter()
        await asyncio.sleep(0.001)
        stalls.append(time.perf_counter() - asked - 0.001)


def report(puts: list[Done], elapsed: float, stall: float) -> None:
    """Print what was moved, and how."""
    nbytes, moving = sum(done.nbytes for done in puts), sum(done.seconds for done in puts)
    backends = ", ".join(sorted({done.backend for done in puts}))
    print(f"prefill: {nbytes / 2**20:.0f} MiB in {len(puts)} puts of {puts[0].nbytes / 2**10:.0f} KiB by {backends}")
    print(f"prefill: {nbytes / moving / 1e9:.1f} GB/s while a put is under way", end="; ")
    print(f"{elapsed:.2f} s from the first computation to the last byte")
    print(f"prefill: longest stall of the event loop {stall * 1e3:.1f} ms")


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

        wrong = sum(await asyncio.gather(*(receive(number, blocks) for number, blocks in enumerate(tables))))
        free = sorted(set(range(job.shape[1])).difference(*tables))
        wrong += int(cache[:, free].any(axis=(2, 3, 4, 5)).sum())  # nothing may be written where nothing was sent
        checked = job.shape[0] * job.shape[1]
        print(f"decode: {checked - wrong} of {checked} blocks verified", flush=True)
        pipe.send("received")
        return wrong


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
