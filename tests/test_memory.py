"""What an object's memory is: checked by reading the bytes at the addresses that `describe` gives."""

from __future__ import annotations

import array
import ctypes
import gc
import itertools
import mmap
import weakref
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncxfer import _arrays
from asyncxfer._descriptors import MemoryKind
from asyncxfer._errors import RegistrationError
from asyncxfer._memory import Memory, describe

if TYPE_CHECKING:
    from pathlib import Path


def element_bytes(memory: Memory, part: int = 0) -> bytes:
    """Return the bytes of every element, in C order, read at the described addresses."""
    layout, segment = memory.layout, memory.segments[part]
    shape, strides = layout.shapes[part], layout.strides[part]
    pieces = []
    for index in itertools.product(*map(range, shape)):
        offset = layout.offsets[part] + sum(i * step for i, step in zip(index, strides, strict=True))
        assert 0 <= offset <= segment.nbytes - layout.itemsize
        pieces.append(ctypes.string_at(segment.address + offset, layout.itemsize))
    return b"".join(pieces)


def grid(*shape: int, dtype: Any = np.int16) -> np.ndarray[Any, Any]:
    return np.arange(np.prod(shape), dtype=dtype).reshape(shape)


# ---- numpy --------------------------------------------------------------------------------------------------------


def test_a_contiguous_array_is_one_whole_segment() -> None:
    kv = grid(3, 4, 5)
    memory = describe(kv)
    assert (memory.segments[0].address, memory.segments[0].nbytes) == (kv.ctypes.data, kv.nbytes)
    assert (memory.kind, memory.device, memory.dtype, memory.readonly) == (MemoryKind.DRAM, 0, "int16", False)
    assert memory.layout.contiguous
    assert memory.layout.shape == (3, 4, 5)
    assert element_bytes(memory) == kv.tobytes()


@st.composite
def views(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    """Slice, reverse and transpose an array in any way."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    whole = grid(*shape, dtype=draw(st.sampled_from(["u1", "i2", "f8"])))
    keys = tuple(slice(draw(st.integers(0, n - 1)), None, draw(st.sampled_from([-3, -2, -1, 1, 2, 3]))) for n in shape)
    return whole[keys].transpose(draw(st.permutations(range(len(shape)))))


@given(views())
def test_any_view_is_described_exactly(view: np.ndarray[Any, Any]) -> None:
    memory = describe(view)
    assert memory.layout.shapes == (view.shape,)
    assert element_bytes(memory) == view.tobytes()
    low, high = np.lib.array_utils.byte_bounds(view)
    assert (memory.segments[0].address, memory.segments[0].nbytes) == (low, high - low)


@given(views())
def test_one_long_axes_do_not_make_a_layout_strided(view: np.ndarray[Any, Any]) -> None:
    assert describe(view).layout.contiguous == view.flags.c_contiguous


@pytest.mark.parametrize("value", [np.float32(1.5), np.zeros(()), np.zeros((3, 0, 2)), np.zeros((4, 0))[::-1]])
def test_scalars_and_empty_arrays(value: Any) -> None:
    memory = describe(value)
    assert memory.layout.shape == np.shape(value)
    assert memory.segments[0].nbytes == np.asarray(value).nbytes
    assert element_bytes(memory) == np.asarray(value).tobytes()


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        ("float16", "float16"),
        (">i4", ">i4"),
        ("S5", "|S5"),
        ([("a", "i4"), ("b", "f4")], "|V8"),
        ("M8[ns]", "datetime64[ns]"),
    ],
)
def test_dtype_names_say_everything_numpy_needs(dtype: Any, name: str) -> None:
    memory = describe(np.zeros(3, dtype=dtype))
    assert memory.dtype == name
    assert np.dtype(memory.dtype).itemsize == memory.layout.itemsize == np.dtype(dtype).itemsize


@pytest.mark.parametrize(
    ("obj", "words"),
    [
        (np.broadcast_to(np.arange(3), (4, 3)), "repeats elements"),
        (np.lib.stride_tricks.sliding_window_view(np.arange(9), 3), "overlapping elements"),
        (np.array([object()]), "references to Python objects"),
        (np.zeros(3, dtype="V0"), "zero bytes"),
        ("text", "builtins.str has no memory"),
        (None, "NoneType has no memory"),
        ([], "empty list"),
        ([np.zeros(3), 7], "item 1 of the list: .*builtins.int"),
        ([np.zeros(3), [np.zeros(3)]], "item 1 of the list: .*builtins.list"),
        ([np.zeros(3), np.zeros(3, dtype="f4")], "item 1 of the list has dtype float32, item 0 has float64"),
    ],
)
def test_what_cannot_be_described_is_refused(obj: object, words: str) -> None:
    with pytest.raises(RegistrationError, match=words):
        describe(obj)


def test_several_arrays_are_stacked() -> None:
    layers = [grid(3, 4), grid(3, 4)[::-1], grid(5, 4)]
    memory = describe(layers)
    assert memory.layout.stacked
    assert memory.layout.shape is None  # the third is longer
    assert describe([layers[0], layers[0].copy()]).layout.shape == (2, 3, 4)
    for index, layer in enumerate(layers):
        assert element_bytes(memory, index) == layer.tobytes()


def test_strides_of_one_long_axes_do_not_set_parts_apart() -> None:
    wide = grid(5, 8)[::5, :4]
    assert wide.strides != grid(1, 4).strides
    assert describe([grid(1, 4), wide]).layout.shape == (2, 1, 4)


def test_a_list_of_one_is_still_stacked() -> None:
    assert describe((grid(3),)).layout.shape == (1, 3)


# ---- access -------------------------------------------------------------------------------------------------------


def frozen(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    values.flags.writeable = False
    return values


@pytest.mark.parametrize(
    "obj", [b"bytes", frozen(grid(3)), memoryview(bytearray(3)).toreadonly(), [grid(3), frozen(grid(3))]]
)
def test_readonly_memory(obj: object) -> None:
    assert describe(obj).readonly
    assert describe(obj, access="r").readonly
    with pytest.raises(RegistrationError, match="read-only and access is 'w'"):
        describe(obj, access="w")


def test_writable_memory_stays_writable_whatever_the_access() -> None:
    assert not describe(bytearray(3), access="r").readonly
    assert not describe(bytearray(3), access="w").readonly


def test_unknown_access_is_refused() -> None:
    with pytest.raises(RegistrationError, match="access is 'rwx'; expected 'r', 'w' or 'rw'"):
        describe(bytearray(3), access="rwx")  # type: ignore[arg-type]


# ---- buffers, and who keeps whom alive ------------------------------------------------------------------------------


class Record(ctypes.Structure):
    _fields_ = [("a", ctypes.c_int32), ("p", ctypes.c_void_p)]


@pytest.mark.parametrize(
    ("obj", "shape", "dtype"),
    [
        (bytearray(b"abcdef"), (6,), "uint8"),
        (array.array("d", [1.0, 2.0]), (2,), "float64"),
        (memoryview(bytearray(12)).cast("B", (3, 4)), (3, 4), "uint8"),
        (memoryview(bytearray(range(12)))[::-3], (4,), "uint8"),
        ((ctypes.c_uint16 * 3)(7, 8, 9), (3,), "uint16"),
        (bytearray(), (0,), "uint8"),
    ],
)
def test_buffers(obj: Any, shape: tuple[int, ...], dtype: str) -> None:
    memory = describe(obj)
    assert (memory.layout.shape, memory.dtype) == (shape, dtype)
    assert element_bytes(memory) == bytes(memoryview(obj))


def test_a_buffer_of_a_format_that_numpy_lacks_is_bytes() -> None:
    records = (Record * 2)(Record(1, 2), Record(3, 4))
    memory = describe(records)
    assert memory.segments[0].nbytes == ctypes.sizeof(records)
    assert element_bytes(memory) == bytes(records)


def test_a_bytearray_cannot_be_resized_while_described() -> None:
    buffer = bytearray(100)
    memory = describe(buffer)
    with pytest.raises(BufferError):
        buffer.extend(b"more")
    del memory
    buffer.extend(b"more")


def test_a_mapping_cannot_be_closed_while_described() -> None:
    pages = mmap.mmap(-1, 4096)
    memory = describe(pages)
    with pytest.raises(BufferError):
        pages.close()
    del memory
    pages.close()
    with pytest.raises(RegistrationError, match=r"mmap.mmap gives no access to its memory"):
        describe(pages)


def test_an_array_lives_as_long_as_its_memory() -> None:
    kv: np.ndarray[Any, Any] | None = grid(1000)
    assert kv is not None
    alive, expected = weakref.ref(kv), kv.tobytes()
    memory = describe([kv])
    kv = None
    gc.collect()
    assert element_bytes(memory) == expected
    del memory
    gc.collect()
    assert alive() is None


def test_memmap_of_a_file(tmp_path: Path) -> None:
    pages = np.memmap(tmp_path / "pages", dtype="u1", mode="w+", shape=(5000,))
    pages[:] = np.arange(5000) % 251
    assert element_bytes(describe(pages)) == pages.tobytes()


# ---- DLPack and __cuda_array_interface__ ---------------------------------------------------------------------------


class Exporter:
    """An object that speaks DLPack and nothing else."""

    def __init__(self, source: np.ndarray[Any, Any], *, versioned: bool) -> None:
        self.source = source
        self.versioned = versioned

    def __dlpack__(self, **options: Any) -> Any:
        if options and not self.versioned:
            raise TypeError("unexpected keyword")
        return self.source.__dlpack__(**options)


@pytest.mark.parametrize("versioned", [True, False])
@pytest.mark.parametrize("key", [np.s_[:], np.s_[::-1, ::2], np.s_[1:2, 3], np.s_[:0]])
@pytest.mark.parametrize("dtype", ["float16", "uint8", "complex64", "bool"])
def test_dlpack(versioned: bool, key: Any, dtype: str) -> None:
    source = grid(4, 6, dtype=np.int32).astype(dtype)[key]
    memory = describe(Exporter(source, versioned=versioned))
    assert (memory.dtype, memory.layout.shape, memory.readonly) == (dtype, source.shape, False)
    assert element_bytes(memory) == source.tobytes()


def test_dlpack_read_only_flag() -> None:
    assert describe(Exporter(frozen(grid(3)), versioned=True)).readonly


def test_dlpack_gives_the_memory_back() -> None:
    source = grid(1000)
    exporter = Exporter(source[:], versioned=True)
    alive = weakref.ref(exporter.source)
    memory = describe(exporter)
    exporter.source = source
    gc.collect()
    assert alive() is not None
    del memory
    gc.collect()
    assert alive() is None


def edited(source: np.ndarray[Any, Any], **fields: Any) -> SimpleNamespace:
    """Return an exporter of `source` whose DLPack tensor says something else."""
    capsule = source.__dlpack__()
    tensor, _ = _arrays._open_capsule(capsule)
    for name, value in fields.items():
        setattr(tensor, name, value)
    return SimpleNamespace(__dlpack__=lambda **_: capsule)


def test_dlpack_byte_offset_and_implied_strides() -> None:
    source = grid(4, 6)
    memory = describe(edited(source, byte_offset=24, ndim=1, strides=None))
    assert element_bytes(memory) == source.reshape(-1)[12:16].tobytes()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"device_type": 8}, "device type 8 is unknown"),
        ({"lanes": 4}, "4 lanes"),
        ({"bits": 4}, "4 bits"),
        ({"code": 99}, "code 99"),
    ],
)
def test_dlpack_of_what_we_do_not_know_is_refused(fields: dict[str, int], words: str) -> None:
    with pytest.raises(RegistrationError, match=words):
        describe(edited(grid(3), **fields))


def test_dlpack_on_a_gpu() -> None:
    memory = describe(edited(grid(3), device_type=2, device_id=3, code=4))
    assert (memory.kind, memory.device, memory.dtype) == (MemoryKind.VRAM, 3, "bfloat16")


def test_dlpack_that_refuses_or_lies() -> None:
    with pytest.raises(RegistrationError, match="does not export its memory"):
        describe(Exporter(frozen(grid(3)), versioned=False))  # numpy: no read-only without the version
    with pytest.raises(RegistrationError, match="expected a fresh DLPack capsule"):
        describe(SimpleNamespace(__dlpack__=lambda: 7))
    used = grid(3).__dlpack__()
    np.from_dlpack(SimpleNamespace(__dlpack__=lambda **_: used, __dlpack_device__=lambda: (1, 0)))
    with pytest.raises(RegistrationError, match="expected a fresh DLPack capsule"):
        describe(SimpleNamespace(__dlpack__=lambda **_: used))


def test_cuda_array_interface() -> None:
    facts = {"shape": (3, 4), "typestr": "<f2", "data": (0x7F0000000000, True), "version": 3, "strides": None}
    memory = describe(SimpleNamespace(__cuda_array_interface__=facts, device=SimpleNamespace(id=2)))
    assert (memory.kind, memory.device, memory.readonly, memory.dtype) == (MemoryKind.VRAM, 2, True, "float16")
    assert (memory.segments[0].address, memory.segments[0].nbytes) == (0x7F0000000000, 24)
    strided = SimpleNamespace(__cuda_array_interface__={**facts, "strides": (-16, 2)})
    memory = describe(strided)
    assert (memory.segments[0].address, memory.segments[0].nbytes) == (0x7F0000000000 - 32, 40)
    assert memory.layout.offsets == (32,)


def test_masked_cuda_arrays_are_refused() -> None:
    facts = {"shape": (3,), "typestr": "<f2", "data": (4096, False), "version": 3, "mask": object()}
    with pytest.raises(RegistrationError, match="masked"):
        describe(SimpleNamespace(__cuda_array_interface__=facts))


def test_host_and_gpu_memory_do_not_make_one_region() -> None:
    facts = {"shape": (3,), "typestr": "<f8", "data": (4096, False), "version": 3}
    with pytest.raises(RegistrationError, match="item 1 of the list has kind vram, item 0 has dram"):
        describe([np.zeros(3), SimpleNamespace(__cuda_array_interface__=facts)])


def test_a_quantised_tensor_is_refused() -> None:
    fake = SimpleNamespace(data_ptr=int, element_size=int, device=None, is_quantized=True)
    with pytest.raises(RegistrationError, match=r"is_quantized.*int_repr"):
        describe(fake)


def test_importing_torch_is_not_our_doing() -> None:
    import subprocess
    import sys

    code = "import sys, asyncxfer._memory as m; m.describe(bytearray(3)); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
