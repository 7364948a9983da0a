"""The tests of GPU memory and objects over a stub of the CUDA driver, for a process of their own.

`test_objects_gpu.py` runs them: the stub would mislead whatever else looks for a GPU. `LIBCUDA_STUB` names the library
that was built from `stubs/libcuda.c`. Whoever touches the memory of its GPUs but by a copy of the driver's dies, and
copies are made no sooner than an event behind them has been waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import itertools
import os
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from azure_places import KEY, Container
from fault_proxy import FaultProxy, Flip
from lent import until
from ram_store import RAM, RamBackend
from servers import REGION, S3Server, plain_request

from asyncxfer import (
    Agent,
    ChecksumError,
    ConfigError,
    ObjectError,
    ObjectMissingError,
    Region,
    RegistrationError,
    TransferError,
    TransferTimeout,
)
from asyncxfer._config import Config
from asyncxfer.backends import _cuda
from asyncxfer.backends._object._staging import Staging

_stub = ctypes.CDLL(os.environ["LIBCUDA_STUB"])
_stub.stub_allocate.argtypes = (ctypes.c_int, ctypes.c_uint64)
_stub.stub_allocate.restype = ctypes.c_uint64
_stub.stub_shadow.argtypes = _stub.stub_free.argtypes = (ctypes.c_uint64,)
_stub.stub_shadow.restype = ctypes.c_void_p
_stub.stub_fail.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.c_int)

MIB = 1 << 20
POOL = 10 * MIB
_RANDOM = np.random.default_rng(6)
_numbers = itertools.count()


class OnGpu:
    """Bytes of a GPU: what CuPy's arrays say of themselves, and the bytes as the GPU has them."""

    def __init__(self, shape: tuple[int, ...], device: int, *, told: bool = True) -> None:
        nbytes = int(np.prod(shape))
        self.address = int(_stub.stub_allocate(device, max(nbytes, 1)))
        shadow = (ctypes.c_uint8 * nbytes).from_address(_stub.stub_shadow(self.address))
        self.bytes: npt.NDArray[np.uint8] = np.ctypeslib.as_array(shadow).reshape(shape)
        self.__cuda_array_interface__ = {
            "shape": shape, "typestr": "|u1", "data": (self.address, False), "version": 3,
        }  # fmt: skip
        if told:
            self.device = SimpleNamespace(id=device)


@contextlib.contextmanager
def gpu(*shape: int, device: int = 0, **more: Any) -> Iterator[OnGpu]:
    """Memory of a GPU with random bytes."""
    memory = OnGpu(shape, device, **more)
    memory.bytes[...] = _RANDOM.integers(0, 256, shape, np.uint8)
    try:
        yield memory
    finally:
        _stub.stub_free(memory.address)


@pytest.fixture(autouse=True)
def _nothing_is_left(libuv_workers: None) -> Iterator[None]:
    """Contexts, streams, events and pinned memory are given back, and the next test finds nothing in the store."""
    _stub.stub_devices(3)
    RAM.__init__()  # type: ignore[misc]
    yield
    _stub.stub_fail(b"", 0, 0)
    _stub.stub_hold(0)
    assert _stub.stub_live() == 0


@contextlib.asynccontextmanager
async def opened(**config: Any) -> AsyncIterator[tuple[Agent, Region]]:
    """An agent with a small pool, and objects in this process."""
    settings = {"object_staging_bytes": POOL, "object_multipart_bytes": 5 * MIB, "object_part_bytes": 5 * MIB}
    async with (
        Agent("a", backends=["local", RamBackend], config=settings | config) as agent,
        agent.open("ram://bucket", "r+") as objects,
    ):
        yield agent, objects


# ---- moving --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 100_003, 3 * MIB + 1, 5 * MIB, 5 * MIB + 1, 17 * MIB + 3])
async def test_whole_objects_there_and_back(nbytes: int) -> None:
    keys = ["first", "second", "third"]
    with gpu(3, nbytes) as memory:
        before = memory.bytes.copy()
        async with opened() as (agent, objects), agent.register(memory) as region:
            done = await agent.put(region[:], objects[keys])
            assert (done.nbytes, done.backend) == (3 * nbytes, "ram")
            assert [RAM.stored[key] for key in keys] == [row.tobytes() for row in before]
            memory.bytes[...] = 0
            await agent.get(region[::-1], objects[keys])
            assert np.array_equal(memory.bytes[::-1], before)
            assert not RAM.uploads


async def test_rows_of_any_size_of_any_range() -> None:
    random = np.random.default_rng(5)
    lengths = np.concatenate([random.integers(1, 40_000, 300), [1, 4096, 6 * MIB + 1]])
    in_memory = np.cumsum(lengths + random.integers(0, 3, len(lengths))) - lengths
    order = random.permutation(len(lengths))
    in_object = np.empty_like(in_memory)
    in_object[order] = np.cumsum(lengths[order] + random.integers(0, 2, len(lengths))) - lengths[order]
    data = random.integers(0, 256, int(in_object.max()) + 7 * MIB, np.uint8)
    RAM.stored["key"] = data.tobytes()
    with gpu(16 * MIB) as memory:
        model = memory.bytes.copy()
        async with opened() as (agent, objects), agent.register(memory) as region:
            there = objects.descriptors(in_object, lengths, keys="key")
            await agent.get(region.descriptors(in_memory, lengths), there)
            for at, offset, length in zip(in_memory, in_object, lengths, strict=True):
                model[at : at + length] = data[offset : offset + length]
            assert np.array_equal(memory.bytes, model)


async def test_scattered_layers_of_many_blocks_and_a_list_larger_than_the_pool() -> None:
    layers, blocks = 4, 40
    keys = [f"block-{number}" for number in range(blocks)]
    chosen = np.random.default_rng(1).permutation(blocks)
    with gpu(layers, blocks, MIB // layers) as memory:
        before = memory.bytes.copy()
        async with opened() as (agent, objects), agent.register(memory) as region:
            step = before[0, 0].nbytes
            at = [(layer * blocks + block) * step for block in chosen for layer in range(layers)]
            here = region.descriptors(at, [step] * len(at))
            there = objects.descriptors(
                [layer * step for _ in keys for layer in range(layers)], [step] * len(at),
                keys=keys, segments=[number for number in range(blocks) for _ in range(layers)],
            )  # fmt: skip
            await agent.put(here, there)
            for key, block in zip(keys, chosen, strict=True):
                assert RAM.stored[key] == before[:, block].tobytes()
            memory.bytes[...] = 0
            await agent.get(here, there)
            assert np.array_equal(memory.bytes, before)
            assert 1 < RAM.most <= POOL // MIB, "requests that have memory at once"


async def test_objects_may_be_the_local_side() -> None:
    with gpu(2, 70_000) as memory:
        before = memory.bytes.copy()
        async with opened() as (agent, objects), agent.register(memory) as region:
            await agent.get(objects[["a", "b"]], region[:])
            assert RAM.stored["b"] == before[1].tobytes()
            memory.bytes[...] = 0
            await agent.put(objects[["a", "b"]], region[:])
            assert np.array_equal(memory.bytes, before)


async def test_gpus_by_their_own_contexts_whether_an_array_says_which_or_not() -> None:
    with gpu(2 * MIB, device=0) as first, gpu(2 * MIB, device=2) as third, gpu(2 * MIB, device=1, told=False) as second:
        memories = [first, second, third]
        before = [memory.bytes.copy() for memory in memories]
        async with opened() as (agent, objects), contextlib.AsyncExitStack() as stack:
            regions = [await stack.enter_async_context(agent.register(memory)) for memory in memories]
            keys = [f"gpu-{number}" for number in range(3)]
            await asyncio.gather(*(agent.put(here[:], objects[key]) for here, key in zip(regions, keys, strict=True)))
            for memory in memories:
                memory.bytes[...] = 0
            turned = keys[1:] + keys[:1]
            await asyncio.gather(*(agent.get(here[:], objects[key]) for here, key in zip(regions, turned, strict=True)))
            for memory, was in zip(memories, before[1:] + before[:1], strict=True):
                assert np.array_equal(memory.bytes, was)


async def test_host_memory_needs_no_gpu() -> None:
    async with opened() as (agent, objects), agent.register(np.zeros(MIB, np.uint8)) as region:
        await agent.put(region[:], objects["key"])
        assert _stub.stub_live() == 0
    with gpu(MIB) as memory:
        async with opened() as (agent, objects), agent.register(memory) as region:
            assert _stub.stub_live() == 0, "taken before it was needed"
            await agent.put(region[:], objects["key"])
            assert _stub.stub_live() > 0


async def test_requests_go_on_while_others_are_copied() -> None:
    with gpu(20 * MIB) as memory:
        data = memory.bytes.tobytes()
        RAM.stored["key"] = data
        memory.bytes[...] = 0
        async with opened() as (agent, objects), agent.register(memory) as region:
            await agent.get(region[:1], objects["key", :1])
            _stub.stub_hold(1)
            RAM.begun = 0
            transfer = agent.get(region[:], objects["key"])
            await until(lambda: RAM.begun == 2 and not RAM.under_way and _stub.stub_waiting() == 1)
            assert not memory.bytes[MIB:].any()
            _stub.stub_hold(0)
            await transfer
            assert RAM.begun == 4
            assert memory.bytes.tobytes() == data


# ---- ends ----------------------------------------------------------------------------------------------------------


async def all_of_the_pool(agent: Agent, region: Region, objects: Region) -> None:
    """All of it can be lent, twice over."""
    await agent.put(region.bytes[: 2 * POOL], objects["whole pool"])
    await agent.get(region.bytes[: 2 * POOL], objects["whole pool"])


async def test_a_request_that_fails_ends_the_transfer_and_keeps_nothing() -> None:
    with gpu(40, MIB) as memory:
        before = memory.bytes.copy()
        async with opened() as (agent, objects), agent.register(memory) as region:
            keys = [f"key-{number}" for number in range(40)]
            await agent.put(region[:], objects[keys])
            RAM.failing.add("key-20")
            for call in (agent.put, agent.get):
                with pytest.raises(ObjectError, match="ram://key-20 failed") as caught:
                    await call(region[:], objects[keys])
                assert caught.value.backend == "ram"
                assert 0 < caught.value.nbytes < 40 * MIB
            del RAM.stored["key-7"]
            with pytest.raises(ObjectMissingError, match="key-7"):
                await agent.get(region[:20], objects[keys[:20]])
            assert np.array_equal(memory.bytes, before)
            await all_of_the_pool(agent, region, objects)


@pytest.mark.parametrize("nbytes", [MIB, 20 * MIB])
@pytest.mark.parametrize(
    "function", ["cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "cuEventCreate", "cuEventRecord", "cuEventSynchronize"]
)
async def test_a_copy_that_fails_says_what_the_driver_says(function: str, nbytes: int) -> None:
    with gpu(2 * POOL, device=1) as memory:
        async with opened() as (agent, objects), agent.register(memory) as region:
            await all_of_the_pool(agent, region, objects)
            here = region.descriptors(range(0, nbytes, nbytes // 64), [nbytes // 128] * 64)
            call = agent.put if "DtoH" in function else agent.get
            RAM.stored["key"] = bytes(nbytes // 2)
            _stub.stub_fail(function.encode(), 3 if "Memcpy" in function else 0, 700)
            named = rf"GPU 1: {function.removesuffix('_v2')}.*: CUDA_ERROR \(700: stub\)"
            with pytest.raises(TransferError, match=named) as caught:
                await call(here, objects["key"])
            assert caught.value.backend == "ram"
            await until(lambda: not RAM.uploads)  # given up behind the end
            _stub.stub_fail(b"", 0, 0)
            await call(here, objects["key"])
            await all_of_the_pool(agent, region, objects)


@pytest.mark.parametrize(
    "function", ["cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2", "cuStreamCreate", "cuMemHostAlloc"]
)
async def test_memory_that_cannot_be_pinned_is_tried_anew_by_the_next(function: str) -> None:
    with gpu(2 * POOL) as memory:
        async with opened() as (agent, objects), agent.register(memory) as region:
            _stub.stub_fail(function.encode(), 0, 2)
            for _ in range(2):
                told = r"10,485,760 bytes of host memory could not be pinned for GPU 0: cu.*\(2.*object_staging_bytes"
                with pytest.raises(TransferError, match=told):
                    await agent.put(region[:], objects["key"])
            _stub.stub_fail(b"", 0, 0)
            await all_of_the_pool(agent, region, objects)


async def test_a_part_that_cannot_fit_is_refused_before_it_begins() -> None:
    with gpu(41 * MIB) as memory:  # in at most four parts
        async with opened() as (agent, objects), agent.register(memory) as region:
            with pytest.raises(
                TransferError, match=r"do not fit into 10,485,760 bytes.*set object_staging_bytes to more"
            ):
                await agent.put(region[:], objects["key"])
            assert RAM.begun == 0
            assert not RAM.uploads
            await agent.put(region[: 40 * MIB], objects["key"])
            await agent.get(region[: 40 * MIB], objects["key"])


async def test_the_pool_has_a_least_size() -> None:
    with pytest.raises(ConfigError, match="object_staging_bytes"):
        Agent("a", config={"object_staging_bytes": 10 * MIB - 1})


@pytest.mark.parametrize("op", ["put", "get"])
@pytest.mark.parametrize("nbytes", [MIB, 20 * MIB])
async def test_cancelled_while_it_is_copied(op: str, nbytes: int) -> None:
    with gpu(2 * POOL) as memory:
        async with opened() as (agent, objects), agent.register(memory) as region:
            await all_of_the_pool(agent, region, objects)
            RAM.stored["key"] = bytes(nbytes)
            call = agent.put if op == "put" else agent.get
            _stub.stub_hold(1)
            transfer = call(region[:nbytes], objects["key"])
            await until(lambda: _stub.stub_waiting() == 1)
            transfer.cancel()
            assert not (await asyncio.wait([asyncio.ensure_future(_ended(transfer))], timeout=0.1))[0], "a copy goes on"
            _stub.stub_hold(0)
            with pytest.raises(asyncio.CancelledError):
                await transfer
            memory.bytes[...] = 1
            await all_of_the_pool(agent, region, objects)
            assert (memory.bytes == 1).all(), "something was copied after the end"
            await until(lambda: not RAM.uploads)


async def _ended(transfer: Any) -> None:
    with contextlib.suppress(asyncio.CancelledError):
        await transfer


@pytest.mark.parametrize("how", ["cancelled", "out of time"])
async def test_ended_early_while_some_wait_for_room(how: str) -> None:
    keys = [f"key-{number}" for number in range(40)]
    with gpu(40, MIB) as memory:
        async with opened() as (agent, objects), agent.register(memory) as region:
            await agent.put(region[:], objects[keys])
            RAM.hold()
            transfer = agent.get(region[:], objects[keys], timeout=0.2 if how == "out of time" else None)
            await until(lambda: RAM.under_way == POOL // MIB)
            other = agent.get(region[:5], objects[keys[:5]])
            if how == "cancelled":
                transfer.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await transfer
            else:
                with pytest.raises(TransferTimeout):
                    await transfer
            await until(lambda: RAM.under_way == 5)
            RAM.go_on()
            await other
            await all_of_the_pool(agent, region, objects)


@pytest.mark.parametrize("where", ["copied", "requested"])
async def test_closed_during_a_transfer(where: str) -> None:
    keys = [f"key-{number}" for number in range(40)]
    with gpu(40, MIB) as memory:
        async with opened(close_timeout=0.1) as (agent, objects), agent.register(memory) as region:
            RAM.hold()
            if where == "copied":
                _stub.stub_hold(1)
            transfer = agent.put(region[:], objects[keys])
            await until(lambda: _stub.stub_waiting() == 1 or RAM.under_way == POOL // MIB)
            closing = asyncio.ensure_future(agent.aclose())
            if where == "copied":
                assert not (await asyncio.wait([closing], timeout=0.3))[0], "a copy goes on until it has ended"
                _stub.stub_hold(0)
            await closing
            with pytest.raises(TransferError, match="its agent closed"):
                await transfer
            assert _stub.stub_live() == 0
            assert not RAM.stored


async def test_pieces_are_lent_once_and_come_back_whatever_becomes_of_who_asked() -> None:
    random = np.random.default_rng(3)
    staging = Staging(64 << 10)

    async def borrow(number: int, nbytes: int) -> None:
        async with staging.lend(nbytes, 0) as piece:
            mine = np.frombuffer(piece, np.uint8)
            assert not mine.any(), f"{number} got what somebody has"
            mine[:] = number
            try:
                await asyncio.sleep(0)
                assert (mine == number).all()
            finally:
                mine[:] = 0

    async with staging.lend(64 << 10, 0) as all_of_it:
        np.frombuffer(all_of_it, np.uint8)[:] = 0
    for _ in range(20):
        async with asyncio.timeout(10):
            tasks = [asyncio.create_task(borrow(n, int(random.integers(1, 40 << 10)))) for n in range(1, 100)]
            while not all(task.done() for task in tasks):
                tasks[int(random.integers(len(tasks)))].cancel()
                await asyncio.sleep(0)
        assert not any(task.exception() for task in tasks if not task.cancelled())
        async with asyncio.timeout(10), staging.lend(64 << 10, 0):
            pass
    await asyncio.to_thread(staging.close)


# ---- what cannot go ------------------------------------------------------------------------------------------------


async def test_memory_that_the_driver_does_not_know() -> None:
    host = np.zeros(MIB, np.uint8)
    fake = SimpleNamespace(
        __cuda_array_interface__={"shape": (MIB,), "typestr": "|u1", "data": (host.ctypes.data, False), "version": 3}
    )
    async with opened() as (agent, _):
        with pytest.raises(RegistrationError, match=r"ram: 0x[0-9a-f]+ is no memory that the CUDA driver knows"):
            await agent.register(fake)


async def test_a_region_of_several_gpus() -> None:
    with gpu(MIB, device=0, told=False) as one, gpu(MIB, device=1, told=False) as other:
        async with opened() as (agent, _):
            with pytest.raises(RegistrationError, match=r"memory of GPUs \[0, 1\] cannot be one region"):
                await agent.register([one, other])


@pytest.mark.parametrize("why", ["no GPU", "does not start"])
async def test_without_a_gpu_the_route_says_why(why: str) -> None:
    _cuda._driver.cache_clear()
    if why == "no GPU":
        _stub.stub_devices(0)
    else:
        _stub.stub_fail(b"cuInit", 0, 100)
    with gpu(MIB) as memory:
        async with opened() as (agent, _):
            assert next(iter(RamBackend.details(Config())))[:2] == ("GPU memory", False)
            with pytest.raises(RegistrationError, match=f"ram: NVIDIA's driver .*{why}.*nvidia-smi"):
                await agent.register(memory)


# ---- real stores ---------------------------------------------------------------------------------------------------


def _options(url: str, s3: S3Server) -> dict[str, Any]:
    return {
        "endpoint_url": url, "region_name": REGION, "aws_access_key_id": s3.admin.access_key,
        "aws_secret_access_key": s3.admin.secret_key, "addressing_style": "path",
    }  # fmt: skip


@pytest.mark.parametrize("way", ["http", "sdk"])
async def test_s3(s3: S3Server, bucket: str, way: str) -> None:
    config = {"object_staging_bytes": POOL}
    keys = [f"key-{number}" for number in range(30)]
    with gpu(12 * MIB + 5) as large, gpu(30, 100_000) as many:
        before = large.bytes.copy(), many.bytes.copy()
        async with (
            Agent("a", backends=["local", "s3"], config=config) as agent,
            agent.open(f"s3://{bucket}/folder", "w", options=_options(s3.url, s3)) as objects,
            agent.register(large) as one, agent.register(many) as rows,
        ):  # fmt: skip
            await agent.put(one[:], objects["large"], backend=f"s3:{way}")
            await agent.put(rows[:], objects[keys], backend=f"s3:{way}")
            where = f"{s3.url}/{bucket}/folder"
            answer = await asyncio.to_thread(plain_request, "GET", f"{where}/large", identity=s3.admin)
            assert answer.body == before[0].tobytes()
            answer = await asyncio.to_thread(plain_request, "GET", f"{where}/key-7", identity=s3.admin)
            assert answer.body == before[1][7].tobytes()
            for checksum in (False, True):
                large.bytes[...] = many.bytes[...] = 0
                await agent.get(one[:], objects["large"], backend=f"s3:{way}", checksum=checksum)
                await agent.get(rows[::2], objects[keys[::2]], backend=f"s3:{way}", checksum=checksum)
                await agent.get(
                    rows[1::2, 10:50_000], objects[keys[1::2], 10:50_000], backend=f"s3:{way}", checksum=checksum
                )
                assert np.array_equal(large.bytes, before[0])
                assert np.array_equal(many.bytes[::2], before[1][::2])
                assert np.array_equal(many.bytes[1::2, 10:50_000], before[1][1::2, 10:50_000])
                assert not many.bytes[1::2, 50_000:].any()


async def test_damage_is_found_in_what_was_pinned_and_does_not_reach_the_gpu(s3: S3Server, bucket: str) -> None:
    with gpu(3 * MIB) as memory, FaultProxy(s3.url) as proxy:
        before = memory.bytes.copy()
        async with (
            Agent("a", backends=["local", "s3"]) as agent,
            agent.open(f"s3://{bucket}/folder", "w", options=_options(proxy.url, s3)) as objects,
            agent.register(memory) as region,
        ):
            await agent.put(region[:], objects["key"])
            memory.bytes[...] = 0
            proxy.next(Flip(at=100_000), when=lambda request: request.method == "GET")
            await agent.get(region[:], objects["key"])
            assert np.array_equal(memory.bytes, before)
            memory.bytes[...] = 7
            proxy.always(Flip(at=100_000), when=lambda request: request.method == "GET")
            with pytest.raises(ChecksumError):
                await agent.get(region[:], objects["key"])
            assert (memory.bytes == 7).all()


async def _there_and_back(backend: str, url: str, options: dict[str, Any]) -> None:
    keys = [f"key-{number}" for number in range(5)]
    with gpu(12 * MIB + 5) as large, gpu(5, 50_001) as many:
        before = large.bytes.copy(), many.bytes.copy()
        async with (
            Agent("a", backends=["local", backend], config={"object_staging_bytes": POOL}) as agent,
            agent.open(url, "w", options=options) as objects,
            agent.register(large) as one, agent.register(many) as rows,
        ):  # fmt: skip
            await agent.put(one[:], objects["large"])
            await agent.put(rows[:], objects[keys])
            large.bytes[...] = many.bytes[...] = 0
            await agent.get(one[:], objects["large"])
            await agent.get(rows[:], objects[keys])
            assert np.array_equal(large.bytes, before[0])
            assert np.array_equal(many.bytes, before[1])


async def test_gcs(fake_gcs: str) -> None:
    pytest.importorskip("google.auth", reason="pip install 'asyncxfer[gcs]'")
    bucket = f"bucket-{os.getpid()}-{next(_numbers)}"
    answer = await asyncio.to_thread(
        plain_request, "POST", f"{fake_gcs}/storage/v1/b", headers={"Content-Type": "application/json"},
        body=f'{{"name": "{bucket}"}}'.encode(),
    )  # fmt: skip
    assert answer.status == 200, answer
    await _there_and_back("gcs", f"gs://{bucket}/folder", {"endpoint_url": fake_gcs, "anonymous": True})


async def test_azure(azurite: str) -> None:
    pytest.importorskip("azure.storage.blob", reason="pip install 'asyncxfer[azure]'")
    container = await asyncio.to_thread(Container.make, azurite)
    url = f"az://{container.name}/{os.getpid()}-{next(_numbers)}"
    await _there_and_back("azure", url, {"account_url": container.account_url, "credential": KEY})
