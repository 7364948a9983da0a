"""GPU memory and files for real: what `kvikio_suite.py` does over a stub, with KvikIO as this machine is set up."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from lent import Lent

from asyncxfer import Agent, BackendError, Region, TransferError
from asyncxfer._config import Config
from asyncxfer.backends.kvikio import KvikioBackend

# Threads of CUDA, of libcufile and of KvikIO live as long as the process, and so do their devices and mappings.
pytestmark = pytest.mark.leaks("threads", "fds", "maps", reason="CUDA and KvikIO keep what they have started")

MIB = 1 << 20


@pytest.fixture(scope="module", autouse=True)
def cupy() -> Iterator[Any]:
    """CuPy, where it has a GPU and KvikIO works."""
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed: pip install 'asyncxfer[kvikio-cu12]'")
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"there is no GPU: {error}")
    if count == 0:
        pytest.skip("there is no GPU")
    try:
        KvikioBackend.examine(Config())
    except BackendError as error:
        pytest.skip(str(error))
    yield cupy
    cupy.get_default_memory_pool().free_all_blocks()


class Stage(NamedTuple):
    """A region of GPU memory and one of a file."""

    agent: Agent
    memory: Region
    array: Any
    file: Region
    path: Path


@pytest.fixture
async def stage(cupy: Any, tmp_path: Path) -> AsyncIterator[Lent[Stage]]:
    path = tmp_path / "file"
    random = np.random.default_rng(1)
    path.write_bytes(random.bytes(64 * MIB))
    array = cupy.asarray(np.frombuffer(random.bytes(64 * MIB), np.uint8))
    cupy.cuda.get_current_stream().synchronize()
    async with Agent("gpu") as agent, agent.register(array) as memory, agent.open(path, "r+") as file:
        lent = Lent(Stage(agent, memory, array, file, path))
        yield lent
    del lent.value


def test_doctor_says_what_there_is() -> None:
    found = {name: (ok, detail) for name, ok, detail in KvikioBackend.details(Config())}
    assert found["CUDA driver"][0], found
    assert found["package"][0], found
    assert found["libcufile"][0], found


@pytest.mark.parametrize("rows", [1, 4096])
async def test_there_and_back(cupy: Any, stage: Lent[Stage], rows: int) -> None:
    agent, memory, array, file, path = stage.value
    length = 64 * MIB // rows
    order = np.random.default_rng(rows).permutation(rows)
    here = memory.descriptors(order * length, np.full(rows, length))
    there = file.descriptors(np.arange(rows) * length, np.full(rows, length))
    before = cupy.asnumpy(array).reshape(rows, length)
    assert (await agent.put(here, there)).backend == "kvikio"
    assert np.array_equal(np.fromfile(path, np.uint8).reshape(rows, length), before[order])
    array[...] = 0
    cupy.cuda.get_current_stream().synchronize()
    done = await agent.get(here, there)
    assert (done.nbytes, done.backend) == (64 * MIB, "kvikio")
    assert np.array_equal(cupy.asnumpy(array).reshape(rows, length), before)


async def test_odd_lengths_at_unaligned_offsets(cupy: Any, stage: Lent[Stage]) -> None:
    agent, memory, array, file, path = stage.value
    random = np.random.default_rng(2)
    lengths = np.concatenate([random.integers(1, 40_000, 300), [9 * MIB + 1]])
    in_memory = np.cumsum(lengths + 7) - lengths
    in_file = np.cumsum(lengths + 13) - lengths
    here, there = memory.descriptors(in_memory, lengths), file.descriptors(in_file, lengths)
    model, content = cupy.asnumpy(array), np.fromfile(path, np.uint8)
    await agent.get(here, there)
    for at, offset, length in zip(in_memory, in_file, lengths, strict=True):
        model[at : at + length] = content[offset : offset + length]
    assert np.array_equal(cupy.asnumpy(array), model)
    array[::2] = 5
    model[::2] = 5
    cupy.cuda.get_current_stream().synchronize()
    await agent.put(here, there)
    for at, offset, length in zip(in_memory, in_file, lengths, strict=True):
        content[offset : offset + length] = model[at : at + length]
    assert np.array_equal(np.fromfile(path, np.uint8), content)


async def test_a_short_file_is_an_error_and_nothing_moves_after_it(cupy: Any, stage: Lent[Stage]) -> None:
    agent, memory, array, file, path = stage.value
    os.truncate(path, 60 * MIB)
    offsets, lengths = [60 * MIB, *range(0, 60 * MIB, 4 * MIB)], [4 * MIB] * 16
    here = memory.descriptors(range(0, 64 * MIB, 4 * MIB), lengths)
    with pytest.raises(TransferError, match="62,914,560, 0 found"):
        await agent.get(here, file.descriptors(offsets, lengths))
    array[...] = 0
    cupy.cuda.get_current_stream().synchronize()
    host = np.zeros(4 * MIB, np.uint8)
    async with agent.register(host) as other:
        for _ in range(16):
            await agent.get(other[:], file.bytes[: 4 * MIB], backend="kvikio")
    assert not cupy.asnumpy(array).any()


async def test_host_memory_goes_another_way(stage: Lent[Stage]) -> None:
    agent, file = stage.value.agent, stage.value.file
    async with agent.register(np.zeros(MIB, np.uint8)) as host:
        assert (await agent.get(host[:], file.bytes[:MIB])).backend != "kvikio"
        assert (await agent.get(host[:], file.bytes[:MIB], backend="kvikio")).backend == "kvikio"
