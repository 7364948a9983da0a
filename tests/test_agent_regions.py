"""Regions of an agent: what can be registered and allocated, how they are named, and how they are selected from."""

from __future__ import annotations

import array
import asyncio
import gc
import mmap
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from asyncxfer import Agent, ClosedError, DescriptorError, MemoryKind, RegistrationError

KINDS: dict[str, Any] = {
    "bytearray": lambda: bytearray(range(96)),
    "memoryview": lambda: memoryview(bytearray(range(96))),
    "array": lambda: array.array("H", range(48)),
    "mmap": lambda: mmap.mmap(-1, 96),
    "numpy": lambda: np.arange(48, dtype=np.float16).reshape(4, 12),
    "columns": lambda: np.arange(96, dtype=np.int32).reshape(8, 12)[:, ::2],
    "backwards": lambda: np.arange(96, dtype=np.uint8)[::-2],
    "transposed": lambda: np.arange(96, dtype=np.uint8).reshape(8, 12).T,
    "list of arrays": lambda: [np.full(24, n, np.float32) for n in range(3)],
    "list of unlike arrays": lambda: (np.zeros(5, np.int16), np.ones((3, 7), np.int16)),
}


def values(obj: Any) -> bytes:
    """All elements, in the order in which a region has them."""
    parts = obj if isinstance(obj, (list, tuple)) else [obj]
    return b"".join(np.asarray(memoryview(part)).tobytes() for part in parts)


@pytest.mark.parametrize("kind", KINDS)
async def test_whatever_has_memory_can_be_registered_and_moved(kind: str) -> None:
    source, target = KINDS[kind](), KINDS[kind]()
    for part in target if isinstance(target, (list, tuple)) else [target]:
        np.asarray(memoryview(part))[...] = 0
    async with (
        Agent("a") as a,
        Agent("b") as b,
        a.register(source, name="source") as region,
        b.register(target, name="target"),
    ):
        peer = await a.connect("b")
        remote = peer["target"]
        assert (remote.shape, remote.dtype, remote.kind) == (region.shape, region.dtype, MemoryKind.DRAM)
        assert remote.nbytes == region.nbytes == len(values(source))
        parts = range(len(source)) if isinstance(source, (list, tuple)) and region.shape is None else [...]
        for part in parts:
            await a.put(region[part], remote[part])
        assert values(target) == values(source)


async def test_read_only_memory_registers_read_only() -> None:
    async with Agent("a") as agent, agent.register(bytes(8)) as region:
        assert region.readonly
        assert region.access == "r"
        with pytest.raises(RegistrationError, match="read-only and access is 'w'"):
            await agent.register(bytes(8), access="w")


async def test_memory_stays_as_long_as_its_region_and_no_longer() -> None:
    async with Agent("a") as agent:
        rows = np.zeros(100)
        gone = weakref.ref(rows)
        region = await agent.register(rows)
        del rows
        gc.collect()
        assert gone() is not None
        await region.aclose()
        gc.collect()
        assert gone() is None
        await region.aclose()  # again does nothing


async def test_a_cancelled_close_goes_on_closing() -> None:
    async with Agent("a") as agent:
        region = await agent.register(bytearray(1), name="kv")
        closing = asyncio.create_task(region.aclose())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        await region.aclose()
        assert agent.stats()["regions"] == 0
        await agent.register(bytearray(1), name="kv")


@pytest.mark.parametrize("huge_pages", [False, True])
async def test_allocated_memory_is_an_array_of_zeros(huge_pages: bool) -> None:
    async with Agent("a") as agent:
        async with agent.allocate((3, 1024), "float16", name="kv", huge_pages=huge_pages) as region:
            assert (region.array.shape, region.array.dtype.name) == ((3, 1024), "float16")
            assert not region.array.any()
            assert (region.shape, region.dtype, region.nbytes) == ((3, 1024), "float16", 6144)
            assert repr(region) == "<Region 'kv': float16 (3, 1024), dram, 'rw'>"
            kept = region.array
        with pytest.raises(ClosedError, match="'kv'"):
            region.array  # noqa: B018
        assert "closed" in repr(region)
        kept[...] = 1  # who holds the array may go on with it
        del kept


async def test_opening_can_be_awaited_or_entered() -> None:
    async with Agent("a") as agent:
        region = await agent.allocate(10, np.uint8)
        assert agent.stats()["regions"] == 1
        await region.aclose()
        async with agent.register(bytearray(1)) as region, region:
            pass
        assert agent.stats()["regions"] == 0


async def test_names_are_unique_and_given_where_none_is() -> None:
    async with Agent("a") as agent:
        first = await agent.register(bytearray(1), name="kv")
        with pytest.raises(RegistrationError, match=r"agent 'a' has a region 'kv' already"):
            await agent.register(bytearray(1), name="kv")
        with pytest.raises(RegistrationError, match="'kv' already"):
            await agent.allocate(1, "uint8", name="kv")
        await first.aclose()
        await agent.register(bytearray(1), name="kv")
        unnamed = [await agent.register(bytearray(1)) for _ in range(3)]
        assert len({region.name for region in unnamed}) == 3


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        (3.5, "float"),
        ("text", "str"),
        ([], "empty list"),
        ([np.zeros(2), np.zeros(2, np.int8)], "item 1 of the list has dtype int8"),
        (np.zeros(3, object), "object"),
        (np.broadcast_to(np.zeros(1), (4,)), "repeats elements"),
    ],
)
async def test_what_has_no_describable_memory_is_refused(obj: object, message: str) -> None:
    async with Agent("a") as agent:
        with pytest.raises(RegistrationError, match=message):
            await agent.register(obj)
        assert agent.stats()["regions"] == 0


@pytest.mark.parametrize(
    ("shape", "dtype", "kind", "message"),
    [
        ((4,), "uint8", "vram", "'vram' cannot be allocated"),
        ((1 << 55,), "uint8", "dram", "36,028,797,018,963,968 bytes"),
        ((1 << 62, 8), "uint8", "dram", "36,893,488,147,419,103,232 bytes"),
        ((-3,), "uint8", "dram", r"-3"),
        ((4,), "no-such-type", "dram", "no-such-type"),
        ((4,), object, "dram", "object"),
    ],
)
async def test_what_cannot_be_allocated_is_refused(shape: Any, dtype: Any, kind: str, message: str) -> None:
    async with Agent("a") as agent:
        with pytest.raises(RegistrationError, match=message):
            await agent.allocate(shape, dtype, kind=kind)
        assert agent.stats()["regions"] == 0


async def test_no_bytes_at_all_can_be_registered_and_allocated() -> None:
    async with Agent("a") as agent:
        for region in (await agent.register(np.zeros((0, 4))), await agent.allocate((0, 4), "float64")):
            assert (region.shape, region.nbytes, len(region[:])) == ((0, 4), 0, 0)


async def test_views_of_a_region_become_descriptors() -> None:
    memory = np.arange(120, dtype=np.uint16).reshape(10, 12)
    async with Agent("a") as agent, agent.register(memory) as region:
        rows = region.of([memory[3], memory[7, 2:5], memory[::3, 1]])
        expected = np.concatenate([memory[3], memory[7, 2:5], memory[::3, 1]]).tobytes()
        flat = memory.tobytes()
        assert b"".join(flat[o : o + n] for o, n, _ in rows.rows().tolist()) == expected
        assert region.of(memory) == region[:]
        with pytest.raises(DescriptorError, match=r"item 1: 24 bytes at 0x.* are not inside region"):
            region.of([memory[0], memory[1].copy()])


async def test_views_of_a_stacked_region_become_descriptors() -> None:
    layers = [np.zeros((4, 8), np.uint8) for _ in range(3)]
    async with Agent("a") as agent, agent.register(layers) as region:
        assert region.shape == (3, 4, 8)
        assert region.of([layers[2][1], layers[0][3]]) == region[2, 1] + region[0, 3]


async def test_bytes_and_columns_of_a_region() -> None:
    async with Agent("a") as agent, agent.register(bytearray(100), name="kv") as region:
        assert region.bytes[10:30].rows().tolist() == [[10, 20, 0]]
        assert region.descriptors([5, 90], [3, 10]).rows().tolist() == [[5, 3, 0], [90, 10, 0]]
        with pytest.raises(
            DescriptorError, match=r"row 1 \(offset 95, length 6\) is not inside the region of 100 bytes"
        ):
            region.descriptors([5, 95], [3, 6])
        with pytest.raises(DescriptorError, match="100"):
            region[100]


async def test_a_closed_region_is_not_used() -> None:
    async with Agent("a") as agent, agent.register(bytearray(8)) as other:
        region = await agent.register(bytearray(8), name="kv")
        rows = region[:]
        plan = agent.prepare("put", rows, other[:])
        await region.aclose()
        calls: list[Callable[[], object]] = [plan, lambda: agent.put(rows, other[:]), lambda: agent.get(other[:], rows)]
        for call in calls:
            with pytest.raises(ClosedError, match="region 'kv' of agent 'a' was closed"):
                call()
        async with agent.register(bytearray(8), name="kv"):
            with pytest.raises(ClosedError, match="'kv'"):
                agent.put(rows, other[:])


async def test_slots_are_used_again() -> None:
    async with Agent("a") as a, Agent("b") as b:
        peer = await a.connect("b")
        async with a.register(bytearray(b"12345678")) as source:
            for _ in range(3):
                regions = [await b.register(bytearray(8), name=f"kv-{n}") for n in range(5)]
                for region in (regions[1], regions[3]):
                    await region.aclose()
                more = await b.register(bytearray(8), name="more")
                assert len({region.slot for region in (*regions[::2], more)}) == 4
                remote = await peer.region("more", timeout=10)
                await a.put(source[:], remote[:])
                for region in (*regions[::2], more):
                    await region.aclose()


async def test_a_put_between_two_regions_of_one_agent() -> None:
    async with Agent("a") as agent:
        source, target = np.arange(64, dtype=np.uint8).reshape(8, 8), np.zeros((8, 8), np.uint8)
        async with agent.register(source) as here, agent.register(target) as there:
            done = await agent.put(here[::2], there[:4])
            assert (done.backend, done.nbytes) == ("local", 32)
            assert np.array_equal(target[:4], source[::2])
            await agent.get(here[:], there[:])
            assert not source[4:].any()
            assert agent.stats()["sent"]["a"]["local"]["put"]["nbytes"] == 32
            with pytest.raises(DescriptorError, match="notify= needs a peer"):
                agent.put(here[:], there[:], notify=b"to whom")
