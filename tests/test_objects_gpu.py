"""GPU memory and objects as processes meet them: over a stub of the CUDA driver, and without a driver.

What runs over the stub stands in `objects_gpu_suite.py`; with a GPU, `gpu/test_gpu_objects.py` does the same for real.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import ClassVar

import cuda_stub
import numpy as np
import pytest
from object_backend import MemBackend
from ram_store import RamBackend

from asyncxfer import Agent, NoRouteError, RegistrationError
from asyncxfer._fast.descriptors import PAIR
from asyncxfer._fast.devicecopy import copy_rows
from asyncxfer._fast.spans import Spans
from asyncxfer.abc import Capabilities, MemoryKind, Reach

HERE = Path(__file__).parent


@pytest.mark.timeout(300)
def test_over_the_stub(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    if pytestconfig.getoption("--one-loop"):
        options.append("--one-loop")
    stub = cuda_stub.build(tmp_path)
    done = cuda_stub.run("-m", "pytest", str(HERE / "objects_gpu_suite.py"), *options, LIBCUDA_STUB=stub)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


class Taker(MemBackend):
    """Takes whatever says that it is GPU memory, and moves none of it to objects."""

    name: ClassVar[str] = "taker"
    capabilities: ClassVar[Capabilities] = Capabilities(Reach.PROCESS, frozenset({(MemoryKind.VRAM, MemoryKind.FILE)}))


class Fake:
    """What says that it is GPU memory."""

    __cuda_array_interface__ = {"shape": (4096,), "typestr": "|u1", "data": (1 << 40, False), "version": 3}  # noqa: RUF012


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@pytest.mark.skipif(_has_driver(), reason="this machine has NVIDIA's driver")
async def test_without_a_driver_the_reason_is_told() -> None:
    why = r"GPU memory needs NVIDIA's driver, and there is none that loads: libcuda.so.1"
    async with (
        Agent("a", backends=["local", RamBackend, Taker]) as agent,
        agent.open("ram://bucket", "w") as objects,
        agent.register(Fake()) as region,
    ):
        explained = {each.backend: each for each in agent.explain("put", region[:], objects["key"])}
        assert explained["ram"].seconds is None
        assert why in explained["ram"].reason
        with pytest.raises(NoRouteError, match=why):
            agent.put(region[:], objects["key"])
    async with Agent("a", backends=["local", RamBackend]) as agent:
        with pytest.raises(RegistrationError, match=why):
            await agent.register(Fake())


@pytest.mark.parametrize("seed", range(50))
def test_places_are_the_buffers_with_neighbours_joined(seed: int) -> None:
    random = np.random.default_rng(seed)
    lengths = random.integers(0, 30, 40)
    data = np.zeros(4000, np.uint8)
    pairs = np.zeros(40, PAIR)
    pairs["count"] = 1
    pairs["length"] = lengths
    pairs["local"] = np.cumsum(lengths + random.integers(0, 2, 40)) - lengths
    pairs["remote"] = np.cumsum(lengths) - lengths
    spans = Spans(pairs, np.array([data.ctypes.data], np.uint64), near=False)
    ((_, _, nbytes),) = [spans[place] for place in range(len(spans))]
    start = int(random.integers(0, nbytes))
    some = int(random.integers(0, nbytes - start + 1))
    wanted: list[list[int]] = []
    for view in spans.buffers(0, start, some, writable=True):
        at = ctypes.addressof(ctypes.c_char.from_buffer(view)) if view.nbytes else 0
        if wanted and sum(wanted[-1]) == at:
            wanted[-1][1] += view.nbytes
        elif view.nbytes:
            wanted.append([at, view.nbytes])
    assert spans.places(0, start, some).tolist() == wanted
    with pytest.raises(IndexError):
        spans.places(1, 0, 0)
    with pytest.raises(ValueError, match="are not in a stretch"):
        spans.places(0, 1, nbytes)


@pytest.mark.parametrize("to_device", [True, False])
def test_rows_are_copied_until_the_driver_says_no(to_device: bool) -> None:
    asked = []

    def copy(target: int, source: int, nbytes: int, stream: int) -> int:
        asked.append((target, source, nbytes, stream))
        return 9 if nbytes == 30 else 0

    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p)
    native = kind(copy)
    address = ctypes.cast(native, ctypes.c_void_p).value
    assert address is not None
    rows = np.array([(1000, 10), (2000, 20), (3000, 30), (4000, 40)], np.uint64)
    assert copy_rows(address, rows[:2], 500, 77, to_device=to_device) == 0
    assert copy_rows(address, rows, 500, 77, to_device=to_device) == 9
    wanted = [(1000, 500, 10, 77), (2000, 510, 20, 77), (3000, 530, 30, 77)]
    if not to_device:
        wanted = [(host, device, *rest) for device, host, *rest in wanted]  # type: ignore[misc]
    assert asked == wanted[:2] + wanted
    with pytest.raises(ValueError, match="expected address and length"):
        copy_rows(address, np.zeros((2, 3), np.uint64), 0, 0, to_device=to_device)
