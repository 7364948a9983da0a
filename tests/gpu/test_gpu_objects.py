"""GPU memory and objects for real: some of what `objects_gpu_suite.py` does over a stub, with this machine's driver."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from ram_store import RAM, RamBackend
from servers import REGION, S3Server, plain_request

from asyncxfer import Agent, BackendError
from asyncxfer.backends import _cuda

# Threads of CUDA live as long as the process, and so do its devices and mappings.
pytestmark = pytest.mark.leaks("threads", "fds", "maps", reason="CUDA keeps what it has started")

MIB = 1 << 20
Bytes = npt.NDArray[np.uint8]


class Gpus(NamedTuple):
    """A library with arrays on GPUs: how many of them, and how bytes get there and back."""

    devices: int
    put: Callable[[Bytes, int], Any]
    get: Callable[[Any], Bytes]


@pytest.fixture(scope="module", params=["cupy", "torch"])
def gpus(request: pytest.FixtureRequest) -> Iterator[Gpus]:
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    library: Any = pytest.importorskip(request.param)
    try:
        _cuda.examine()
    except BackendError as error:
        pytest.skip(str(error))
    if request.param == "torch":
        if not library.cuda.is_available():
            pytest.skip("this torch has no CUDA")
        yield Gpus(
            library.cuda.device_count(),
            lambda array, device: library.from_numpy(array).to(f"cuda:{device}"),
            lambda tensor: tensor.cpu().numpy(),
        )
        return

    def put(array: Bytes, device: int) -> Any:
        with library.cuda.Device(device):
            there = library.asarray(array)
            library.cuda.get_current_stream().synchronize()
            return there

    yield Gpus(library.cuda.runtime.getDeviceCount(), put, library.asnumpy)
    library.get_default_memory_pool().free_all_blocks()


@pytest.fixture
async def agent(libuv_workers: None) -> AsyncIterator[Agent]:
    RAM.__init__()  # type: ignore[misc]
    config = {"object_staging_bytes": 16 * MIB, "object_multipart_bytes": 8 * MIB, "object_part_bytes": 5 * MIB}
    async with Agent("gpu", backends=["local", RamBackend], config=config) as agent:
        yield agent


def random(*shape: int) -> Bytes:
    return np.random.default_rng(shape).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("nbytes", [1, 100_003, 5 * MIB, 45 * MIB + 7])
async def test_there_and_back(gpus: Gpus, agent: Agent, nbytes: int) -> None:
    data = random(3, nbytes)
    for device in range(gpus.devices):
        there, back = gpus.put(data, device), gpus.put(np.zeros_like(data), device)
        async with (
            agent.open("ram://bucket", "w") as objects,
            agent.register(there) as source,
            agent.register(back) as target,
        ):
            await agent.put(source[:], objects[["a", "b", "c"]])
            assert [RAM.stored[key] for key in "abc"] == [row.tobytes() for row in data]
            await agent.get(target[::-1], objects[["a", "b", "c"]])
        assert np.array_equal(gpus.get(back)[::-1], data)


async def test_small_rows_in_any_order(gpus: Gpus, agent: Agent) -> None:
    rows, length = 8192, 4096
    data = random(rows * length)
    RAM.stored["key"] = data.tobytes()
    order = np.random.default_rng(1).permutation(rows)
    back = gpus.put(np.zeros_like(data), 0)
    async with agent.open("ram://bucket") as objects, agent.register(back) as target:
        here = target.descriptors(order * length, [length] * rows)
        await agent.get(here, objects.descriptors(range(0, rows * length, length), [length] * rows, keys="key"))
    assert np.array_equal(gpus.get(back).reshape(rows, length)[order], data.reshape(rows, length))


async def test_s3(gpus: Gpus, s3: S3Server, bucket: str) -> None:
    data = random(70 * MIB + 3)
    options = {
        "endpoint_url": s3.url, "region_name": REGION, "aws_access_key_id": s3.admin.access_key,
        "aws_secret_access_key": s3.admin.secret_key, "addressing_style": "path",
    }  # fmt: skip
    there, back = gpus.put(data, 0), gpus.put(np.zeros_like(data), 0)
    async with (
        Agent("gpu", backends=["local", "s3"]) as agent,
        agent.open(f"s3://{bucket}/folder", "w", options=options) as objects,
        agent.register(there) as source,
        agent.register(back) as target,
    ):
        await agent.put(source[:], objects["key"])
        answer = await asyncio.to_thread(plain_request, "GET", f"{s3.url}/{bucket}/folder/key", identity=s3.admin)
        assert answer.body == data.tobytes()
        await agent.get(target[:], objects["key"], checksum=True)
    assert np.array_equal(gpus.get(back), data)
