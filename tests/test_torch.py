"""Torch tensors: described without importing torch, by the methods that they have.

In a file of its own and late in the alphabet: once torch is imported, every later garbage collection is slow.
"""

from __future__ import annotations

import ctypes
import gc
from typing import Any

import numpy as np
import pytest

from asyncxfer._errors import RegistrationError
from asyncxfer._fast.memory import Mapping
from asyncxfer._memory import Memory, describe
from asyncxfer._sharing import backings_of


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch", reason="torch is not installed; pip install torch")


def element_bytes(memory: Memory, part: int = 0) -> bytes:
    """Return the bytes of every element, in C order, read at the described addresses."""
    layout, segment = memory.layout, memory.segments[part]
    starts = layout.offsets[part] + sum(
        np.arange(count).reshape(-1, *[1] * (len(layout.shapes[part]) - axis - 1)) * stride
        for axis, (count, stride) in enumerate(zip(layout.shapes[part], layout.strides[part], strict=True))
    )
    return b"".join(ctypes.string_at(segment.address + int(start), layout.itemsize) for start in np.ravel(starts))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "float8_e5m2", "bool", "int64", "complex64"])
def test_dtypes(torch: Any, dtype: str) -> None:
    tensor = torch.arange(24).reshape(2, 3, 4).to(getattr(torch, dtype))
    memory = describe(tensor)
    assert (memory.dtype, memory.layout.itemsize) == (dtype, tensor.element_size())
    assert (memory.segments[0].address, memory.segments[0].nbytes) == (tensor.data_ptr(), 24 * tensor.element_size())
    assert element_bytes(memory) == tensor.view(torch.uint8).numpy().tobytes()


def test_views(torch: Any) -> None:
    tensor = torch.arange(60, dtype=torch.int16).reshape(3, 4, 5)[1:, ::2].permute(2, 0, 1)
    assert element_bytes(describe(tensor)) == tensor.numpy().tobytes()
    assert element_bytes(describe([tensor, tensor]), 1) == tensor.numpy().tobytes()


def test_storage_is_held(torch: Any) -> None:
    tensor = torch.arange(1000)
    expected = tensor.numpy().tobytes()
    memory = describe(tensor)
    tensor.set_(torch.zeros(3, dtype=torch.int64))
    gc.collect()
    assert element_bytes(memory) == expected


def test_tensors_without_plain_memory_are_refused(torch: Any) -> None:
    cases = {
        "sparse_coo": torch.eye(3).to_sparse(),
        "device meta": torch.zeros(3, device="meta"),
        "is_conj": torch.zeros(3, dtype=torch.complex64).conj(),
        "repeats elements": torch.zeros(1, 3).expand(4, 3),
    }
    for words, tensor in cases.items():
        with pytest.raises(RegistrationError, match=words):
            describe(tensor)


def test_shared_tensors_have_a_file(torch: Any) -> None:
    tensor = torch.arange(1000, dtype=torch.int32).share_memory_()
    memory = describe(tensor)
    with backings_of(memory.segments) as found:
        place = found.places[0]
        assert place is not None
        mapped = Mapping(found.files[place.file].fd, place.offset, tensor.nbytes)
    tensor += 1
    assert bytes(mapped.buffer) == tensor.numpy().tobytes()
