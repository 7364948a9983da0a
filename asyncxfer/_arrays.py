"""Reading other libraries' arrays: where the first element lies, the shape, the strides, the kind of memory.

Owns the protocols (numpy, the buffer protocol, DLPack, ``__cuda_array_interface__``, torch tensors by their
methods) and turns each into one `Array`. No library is imported for it but numpy. It does not know regions,
and does not judge a layout: strides may be anything here. What has no plain memory behind it (sparse,
quantised, lazy, Python objects) is refused with the reason.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np

from ._descriptors import MemoryKind
from ._errors import RegistrationError

__all__ = ["Array", "c_strides", "element", "read_array"]


class Array(NamedTuple):
    """An array's memory, whatever library made it.

    Attributes
    ----------
    owner : object
        Keeps the memory where it is for as long as it is referenced.
    address : int
        Of the element whose indices are all zero.
    shape : tuple of int
    strides : tuple of int, bytes
    itemsize : int, bytes
    dtype : str
        The name that numpy or torch gives it, such as ``"float16"`` or ``"bfloat16"``.
    kind : MemoryKind
    device : int
        Number of the GPU; 0 for host memory.
    readonly : bool
    """

    owner: object
    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    dtype: str
    kind: MemoryKind = MemoryKind.DRAM
    device: int = 0
    readonly: bool = False


def read_array(obj: Any) -> Array:
    """Return what `obj` says about its memory.

    Raises
    ------
    RegistrationError
        `obj` speaks none of the protocols, or its memory does not hold plain values.
    """
    if hasattr(obj, "data_ptr") and hasattr(obj, "element_size"):
        return _from_torch(obj)
    if isinstance(obj, np.ndarray):
        return _from_numpy(obj, owner=obj.view(np.ndarray), readonly=not obj.flags.writeable)
    if hasattr(obj, "__cuda_array_interface__"):
        return _from_cuda_array_interface(obj)
    view = _view(obj)
    if view is not None:
        return _from_buffer(view)
    if hasattr(obj, "__dlpack__"):
        return _from_dlpack(obj)
    raise RegistrationError(
        f"{_describe_type(obj)} has no memory to register; expected a numpy array, a torch tensor, an object with the "
        "buffer protocol, DLPack or __cuda_array_interface__, or a list of them"
    )


def _describe_type(obj: object) -> str:
    return f"an object of type {type(obj).__module__}.{type(obj).__qualname__}"


def c_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Return the strides, in bytes, of a C-contiguous array."""
    strides, step = [], itemsize
    for count in reversed(shape):
        strides.append(step)
        step *= count
    return tuple(reversed(strides))


def element(dtype: object) -> tuple[str, int]:
    """Return the name of an element type, and its size in bytes.

    Parameters
    ----------
    dtype : data type
        What `numpy.dtype` takes, a torch dtype, or a name that only torch has, such as ``"bfloat16"``.

    Raises
    ------
    RegistrationError
        It is none, or its elements are not plain bytes.
    """
    name = str(dtype).removeprefix("torch.")
    if name == "bfloat16":
        return name, 2
    if name in _DLPACK_NAMES.values():
        return name, 1
    try:
        plain = np.dtype(name if str(dtype) != name else dtype)  # type: ignore[call-overload]
    except TypeError as error:
        raise RegistrationError(f"{dtype!r} is no data type: {error}") from error
    return _dtype_name(plain), plain.itemsize


# ---- numpy and the buffer protocol ---------------------------------------------------------------------------


def _dtype_name(dtype: np.dtype[Any]) -> str:
    if dtype.hasobject:
        raise RegistrationError(f"dtype {dtype} holds references to Python objects; convert it to plain numbers first")
    if dtype.itemsize == 0:
        raise RegistrationError(f"dtype {dtype} has items of zero bytes; expected at least one")
    # numpy's names leave out byte order and the fields of records
    plain = dtype.isnative and not dtype.name.startswith(("void", "str", "bytes"))
    return dtype.name if plain else dtype.str


def _from_numpy(array: np.ndarray[Any, Any], *, owner: object, readonly: bool) -> Array:
    return Array(
        owner=owner,
        address=array.__array_interface__["data"][0],
        shape=array.shape,
        strides=array.strides,
        itemsize=array.dtype.itemsize,
        dtype=_dtype_name(array.dtype),
        readonly=readonly,
    )


def _view(obj: Any) -> memoryview | None:
    """Return an export of `obj`'s buffer (a bytearray cannot be resized, an mmap not closed, while it lives)."""
    try:
        return memoryview(obj)
    except (TypeError, BufferError):  # no buffer protocol, or none right now: DLPack may still do
        return None
    except ValueError as error:
        raise RegistrationError(f"{_describe_type(obj)} gives no access to its memory: {error}") from error


def _from_buffer(view: memoryview) -> Array:
    try:
        array = np.asarray(view)
    except (TypeError, ValueError, RuntimeError) as error:  # an element type that numpy has no word for
        if not view.c_contiguous:
            raise RegistrationError(
                f"a buffer of format {view.format!r} that is not contiguous cannot be described: {error}"
            ) from error
        array = np.frombuffer(view, dtype=np.uint8)
    return _from_numpy(array, owner=view, readonly=view.readonly)


# ---- torch ---------------------------------------------------------------------------------------------------


def _from_torch(tensor: Any) -> Array:
    layout, device = str(getattr(tensor, "layout", "torch.strided")), tensor.device
    if layout != "torch.strided":
        raise RegistrationError(f"a tensor of layout {layout} has no single memory; call .to_dense() first")
    for flag, advice in (
        ("is_quantized", "register its .int_repr()"),
        ("is_nested", "register its .values()"),
    ):
        if getattr(tensor, flag, False):
            raise RegistrationError(f"a tensor with {flag} set has no plain memory; {advice}")
    for lazy, resolve in (("is_conj", "resolve_conj"), ("is_neg", "resolve_neg")):
        if hasattr(tensor, lazy) and getattr(tensor, lazy)():
            raise RegistrationError(f"a tensor with {lazy}() does not store its values; call .{resolve}() first")
    if device.type not in ("cpu", "cuda"):
        raise RegistrationError(f"a tensor on device {device} has no memory here; expected device cpu or cuda")
    itemsize = tensor.element_size()
    # its storage is held as well, or tensor.set_() would free it under the region
    storage = tensor.untyped_storage() if hasattr(tensor, "untyped_storage") else None
    return Array(
        owner=(tensor, storage),
        address=tensor.data_ptr(),
        shape=tuple(tensor.shape),
        strides=tuple(step * itemsize for step in tensor.stride()),
        itemsize=itemsize,
        dtype=str(tensor.dtype).removeprefix("torch."),
        kind=MemoryKind.DRAM if device.type == "cpu" else MemoryKind.VRAM,
        device=device.index or 0,
    )


# ---- __cuda_array_interface__ --------------------------------------------------------------------------------


def _from_cuda_array_interface(obj: Any) -> Array:
    """Read version 2 or 3 of the protocol.

    References
    ----------
    https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html
    """
    facts = obj.__cuda_array_interface__
    if facts.get("mask") is not None:
        raise RegistrationError("a masked CUDA array cannot be registered; register its data and its mask")
    dtype = np.dtype(facts["typestr"])
    shape = tuple(int(count) for count in facts["shape"])
    strides = facts.get("strides")
    address, readonly = facts["data"]
    # the protocol does not name the device; CuPy's arrays do, and elsewhere it is the first
    device = getattr(getattr(obj, "device", None), "id", 0)
    return Array(
        owner=obj,
        address=int(address or 0),
        shape=shape,
        strides=c_strides(shape, dtype.itemsize) if strides is None else tuple(int(step) for step in strides),
        itemsize=dtype.itemsize,
        dtype=_dtype_name(dtype),
        kind=MemoryKind.VRAM,
        device=int(device),
        readonly=bool(readonly),
    )


# ---- DLPack --------------------------------------------------------------------------------------------------
# https://dmlc.github.io/dlpack/latest/c_api.html

_DLPACK_KINDS = {
    1: MemoryKind.DRAM,  # kDLCPU
    2: MemoryKind.VRAM,  # kDLCUDA
    3: MemoryKind.DRAM,  # kDLCUDAHost, pinned
    10: MemoryKind.VRAM,  # kDLROCM
    11: MemoryKind.DRAM,  # kDLROCMHost
    13: MemoryKind.VRAM,  # kDLCUDAManaged
}
_DLPACK_NUMBERS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex"}
_DLPACK_NAMES = {
    6: "bool",
    7: "float8_e3m4",
    8: "float8_e4m3",
    9: "float8_e4m3b11fnuz",
    10: "float8_e4m3fn",
    11: "float8_e4m3fnuz",
    12: "float8_e5m2",
    13: "float8_e5m2fnuz",
    14: "float8_e8m0fnu",
}
_PYTHON = ctypes.pythonapi
_READ_ONLY = 1  # DLPACK_FLAG_BITMASK_READ_ONLY


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _DLManagedTensorVersioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _DLTensor),
    ]


def _capsule_pointer(capsule: object, name: bytes) -> int | None:
    """Return what a capsule of this name points to, or None when it has another name."""
    # prototypes of our own: the functions in ctypes.pythonapi belong to everyone
    is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_IsValid", _PYTHON))
    get = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", _PYTHON))
    return get(capsule, name) if is_valid(capsule, name) else None


def _open_capsule(capsule: object) -> tuple[_DLTensor, bool]:
    """Return the tensor in a capsule, and whether it is read-only.

    The capsule is not consumed: it keeps its name, and its destructor gives the memory back.
    """
    pointer = _capsule_pointer(capsule, b"dltensor_versioned")
    if pointer is not None:
        managed = _DLManagedTensorVersioned.from_address(pointer)
        if managed.major != 1:
            raise RegistrationError(f"DLPack {managed.major}.{managed.minor} is not understood; expected version 1")
        return managed.tensor, bool(managed.flags & _READ_ONLY)
    pointer = _capsule_pointer(capsule, b"dltensor")
    if pointer is None:
        raise RegistrationError(f"__dlpack__ returned {capsule!r}; expected a fresh DLPack capsule")
    return _DLTensor.from_address(pointer), False


def _from_dlpack(obj: Any) -> Array:
    try:
        try:
            capsule = obj.__dlpack__(max_version=(1, 0), copy=False)
        except TypeError:  # from before version 1 of the protocol
            capsule = obj.__dlpack__()
    except (BufferError, ValueError, RuntimeError) as error:
        raise RegistrationError(f"{_describe_type(obj)} does not export its memory: {error}") from error
    tensor, readonly = _open_capsule(capsule)
    kind = _DLPACK_KINDS.get(tensor.device_type)
    if kind is None:
        raise RegistrationError(f"DLPack device type {tensor.device_type} is unknown; expected host, CUDA or ROCm")
    name = _DLPACK_NAMES.get(tensor.code) or f"{_DLPACK_NUMBERS.get(tensor.code, '')}{tensor.bits}"
    if tensor.lanes != 1 or tensor.bits % 8 or not name[:1].isalpha():
        raise RegistrationError(
            f"DLPack type (code {tensor.code}, {tensor.bits} bits, {tensor.lanes} lanes) is not supported; "
            "expected whole bytes and one lane"
        )
    itemsize = tensor.bits // 8
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = tuple(step * itemsize for step in tensor.strides[: tensor.ndim]) if tensor.strides else None
    return Array(
        owner=capsule,
        address=(tensor.data or 0) + tensor.byte_offset,
        shape=shape,
        strides=c_strides(shape, itemsize) if strides is None else strides,
        itemsize=itemsize,
        dtype=name,
        kind=kind,
        device=tensor.device_id if kind is MemoryKind.VRAM else 0,
        readonly=readonly,
    )
