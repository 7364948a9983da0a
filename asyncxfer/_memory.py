"""What a Python object's memory is: addresses, lengths, kind, device, and the layout of the values in it.

Owns the judgement of layouts: a strided array is accepted as long as no byte belongs to two elements, and its
segment is exactly the bytes that it spans. It does not know agents, or how the memory could reach a peer
(`_sharing`), and reads other libraries' arrays only through `_arrays`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from ._arrays import Array, c_strides, read_array
from ._descriptors import Layout, MemoryKind
from ._errors import RegistrationError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Access", "Memory", "Segment", "describe"]

Access = Literal["r", "w", "rw"]


@dataclass(frozen=True, slots=True)
class Segment:
    """A contiguous range of an address space.

    Attributes
    ----------
    address : int
    nbytes : int, bytes
    """

    address: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Memory:
    """An object's memory, kept where it is for as long as this exists.

    Attributes
    ----------
    owner : object
        What keeps the memory alive; opaque.
    kind : MemoryKind
    device : int
        Number of the GPU; 0 for host memory.
    segments : tuple of Segment
        One for each array, in order.
    layout : Layout
        How the elements lie in the segments.
    dtype : str
        Such as ``"float16"`` or ``"bfloat16"``.
    readonly : bool
        The memory must not be written to.
    """

    owner: object
    kind: MemoryKind
    device: int
    segments: tuple[Segment, ...]
    layout: Layout
    dtype: str
    readonly: bool


def describe(obj: object, *, access: Access = "rw") -> Memory:
    """Return where `obj`'s values lie.

    Parameters
    ----------
    obj : array, tensor, buffer, or list or tuple of them
        Anything with the buffer protocol, DLPack or ``__cuda_array_interface__``, or a torch tensor.
        Several make one stacked memory; they must agree in kind, device and dtype.
    access : {"r", "w", "rw"}
        What it is to be used for. Read-only memory is accepted for "rw" and stays read-only.

    Returns
    -------
    Memory

    Raises
    ------
    RegistrationError
        There is no memory, it cannot be described by rows, or it is read-only and `access` is "w".
    """
    if access not in ("r", "w", "rw"):
        raise RegistrationError(f"access is {access!r}; expected 'r', 'w' or 'rw'")
    stacked = isinstance(obj, (list, tuple))
    parts = _read_all(obj) if isinstance(obj, (list, tuple)) else [_place(read_array(obj))]
    arrays = [part.array for part in parts]
    readonly = any(array.readonly for array in arrays)
    if readonly and access == "w":
        raise RegistrationError("the memory is read-only and access is 'w'; register it with access='r'")
    first = arrays[0]
    layout = Layout(
        segment_sizes=tuple(part.segment.nbytes for part in parts),
        shapes=tuple(part.array.shape for part in parts),
        strides=tuple(part.strides for part in parts),
        offsets=tuple(part.offset for part in parts),
        itemsize=first.itemsize,
        stacked=stacked,
    )
    return Memory(
        owner=tuple(array.owner for array in arrays),
        kind=first.kind,
        device=first.device,
        segments=tuple(part.segment for part in parts),
        layout=layout,
        dtype=first.dtype,
        readonly=readonly,
    )


class _Part(NamedTuple):
    """An array with the bytes that it spans; `strides` are those of `array`, tidied."""

    array: Array
    segment: Segment
    strides: tuple[int, ...]
    offset: int  # of element 0 in the segment: past its start where a stride is negative


def _read_all(objects: Sequence[object]) -> list[_Part]:
    if not objects:
        raise RegistrationError("an empty list has no memory to register; expected at least one array")
    parts: list[_Part] = []
    for index, obj in enumerate(objects):
        try:
            part = _place(read_array(obj))
        except RegistrationError as error:
            raise RegistrationError(f"item {index} of the list: {error}") from error
        if parts:
            _check_alike(parts[0].array, part.array, index)
        parts.append(part)
    return parts


def _check_alike(first: Array, other: Array, index: int) -> None:
    for field in ("dtype", "itemsize", "kind", "device"):
        expected, found = getattr(first, field), getattr(other, field)
        if expected != found:
            raise RegistrationError(
                f"item {index} of the list has {field} {found}, item 0 has {expected}; "
                "arrays that make one region must agree, register the others on their own"
            )


def _place(array: Array) -> _Part:
    """Find the bytes that `array` spans, and refuse it when elements share some."""
    if 0 in array.shape:
        return _Part(array, Segment(array.address, 0), c_strides(array.shape, array.itemsize), 0)
    strides = _tidy(array)
    reach = [(count - 1) * stride for count, stride in zip(array.shape, strides, strict=True)]
    low = sum(step for step in reach if step < 0)
    high = sum(step for step in reach if step > 0) + array.itemsize
    _refuse_overlap(array, strides)
    return _Part(array, Segment(array.address + low, high - low), strides, -low)


def _tidy(array: Array) -> tuple[int, ...]:
    """Give axes of length 1, whose strides mean nothing, those that a contiguous array would have."""
    strides, step = [], array.itemsize
    for count, stride in zip(reversed(array.shape), reversed(array.strides), strict=True):
        strides.append(step if count == 1 else stride)
        step = abs(strides[-1]) * count
    return tuple(reversed(strides))


def _refuse_overlap(array: Array, strides: tuple[int, ...]) -> None:
    """Refuse layouts in which elements share bytes: there, the order of writes would show.

    Each axis has to step over all that the finer ones span. That refuses a few layouts of distinct but
    interleaved elements too; none of them comes from slicing or transposing.
    """
    axes = sorted((abs(stride), count) for count, stride in zip(array.shape, strides, strict=True) if count > 1)
    span = array.itemsize
    for stride, count in axes:
        if stride < span:
            what = "repeats elements" if stride == 0 else "has overlapping elements"
            raise RegistrationError(
                f"an array of shape {array.shape} and strides {array.strides} bytes {what}; make a copy of it first"
            )
        span += stride * (count - 1)
