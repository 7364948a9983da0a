"""What a peer is told of a region: identity, access, layout, and where each segment lies.

Owns the form in which that travels and its validity: a RegionInfo that exists is consistent, every part inside
its segment, whoever sent it. `_metadata` packs it. It does not know how descriptors of files travel, and what
a backend wants its counterpart to know (`exports`) is just bytes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from msgspec import Meta, Struct

from ._descriptors import Layout, MemoryKind
from ._errors import MetadataError
from ._sharing import MAX_FILES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Index", "Name", "RegionInfo", "SegmentInfo", "Unsigned"]

_MAX_PARTS = 4096
_MAX_DIMS = 64  # numpy's own limit

Index = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Unsigned = Annotated[int, Meta(ge=0)]  # MessagePack has no integer above 2**64 - 1
Name = Annotated[str, Meta(min_length=1, max_length=255, pattern=r"\A[^\x00-\x1f\x7f]+\Z")]
_Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
_Stride = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
_Shape = Annotated[tuple[_Count, ...], Meta(max_length=_MAX_DIMS)]
_Strides = Annotated[tuple[_Stride, ...], Meta(max_length=_MAX_DIMS)]
_T = TypeVar("_T")


class SegmentInfo(Struct, frozen=True, array_like=True):
    """One contiguous range of a region's memory, and the file behind it if a peer may map that.

    Attributes
    ----------
    address : int
        Where it lies in its owner's address space.
    nbytes : int, bytes
    backing : int
        Index into the descriptors that came with the frame; -1 when there is no file to map.
    backing_offset : int, bytes
        Where the segment starts in that file.
    sealed : bool
        The file can never shrink, so a mapping of it can never fault.
    """

    address: Unsigned
    nbytes: Unsigned
    backing: Annotated[int, Meta(ge=-1, lt=MAX_FILES)] = -1
    backing_offset: Unsigned = 0
    sealed: bool = False


class RegionInfo(Struct, frozen=True, kw_only=True):
    """A region as its peers see it: identity, access, layout and segments.

    `shapes`, `strides` and `offsets` have one entry per segment, or a single one when all parts are alike;
    `RegionInfo.of` makes the short form and `layout` undoes it. `exports` has what each backend of the owner wants
    its counterpart to know, by backend name.

    Raises
    ------
    MetadataError
        The parts do not fit their segments (checked whenever one is made or decoded).
    """

    id: Unsigned
    slot: Index
    epoch: Unsigned
    name: Name
    kind: MemoryKind
    device: Annotated[int, Meta(ge=-1, le=2**16)] = 0
    access: Literal["r", "w", "rw"]
    dtype: Annotated[str, Meta(min_length=1, max_length=64)]
    itemsize: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    shapes: Annotated[tuple[_Shape, ...], Meta(min_length=1, max_length=_MAX_PARTS)]
    strides: Annotated[tuple[_Strides, ...], Meta(min_length=1, max_length=_MAX_PARTS)]
    offsets: Annotated[tuple[Unsigned, ...], Meta(min_length=1, max_length=_MAX_PARTS)]
    stacked: bool = False
    exports: Annotated[dict[Name, bytes], Meta(max_length=64)] = {}  # msgspec makes a new one each time
    segments: Annotated[tuple[SegmentInfo, ...], Meta(min_length=1, max_length=_MAX_PARTS)]

    def __post_init__(self) -> None:
        parts = len(self.segments)
        if not self.stacked and parts != 1:
            raise MetadataError(f"region {self.name!r} is not stacked and has {parts} segments; expected 1")
        for field in ("shapes", "strides", "offsets"):
            count = len(getattr(self, field))
            if count not in (1, parts):
                raise MetadataError(f"region {self.name!r} has {count} {field}; expected 1, or {parts} as segments")
        for index, (segment, part) in enumerate(zip(self.segments, self._parts(), strict=True)):
            fault = _fault(segment, *part, self.itemsize)
            if fault:
                raise MetadataError(f"region {self.name!r}, part {index}: {fault}")

    @classmethod
    def of(
        cls,
        layout: Layout,
        segments: Sequence[SegmentInfo],
        *,
        id: int,
        slot: int,
        epoch: int,
        name: str,
        kind: MemoryKind,
        device: int,
        access: Literal["r", "w", "rw"],
        dtype: str,
        exports: Mapping[str, bytes] | None = None,
    ) -> RegionInfo:
        """Describe a region of this `layout` whose bytes lie in `segments`."""
        parts = list(zip(layout.shapes, layout.strides, layout.offsets, strict=True))
        if len(set(parts)) == 1:
            del parts[1:]
        return cls(
            id=id, slot=slot, epoch=epoch, name=name, kind=kind, device=device, access=access, dtype=dtype,
            itemsize=layout.itemsize,
            shapes=tuple(shape for shape, _, _ in parts),
            strides=tuple(strides for _, strides, _ in parts),
            offsets=tuple(offset for _, _, offset in parts),
            stacked=layout.stacked, exports=dict(exports or {}), segments=tuple(segments),
        )  # fmt: skip

    def layout(self) -> Layout:
        """Return the layout that the region is indexed by."""
        parts = self._parts()
        return Layout(
            segment_sizes=tuple(segment.nbytes for segment in self.segments),
            shapes=tuple(shape for shape, _, _ in parts),
            strides=tuple(strides for _, strides, _ in parts),
            offsets=tuple(offset for _, _, offset in parts),
            itemsize=self.itemsize,
            stacked=self.stacked,
        )

    def _parts(self) -> list[tuple[_Shape, _Strides, int]]:
        """Shape, strides and offset of each segment's part, written out."""
        times = len(self.segments)
        return list(
            zip(_spread(self.shapes, times), _spread(self.strides, times), _spread(self.offsets, times), strict=True)
        )


def _spread(entries: tuple[_T, ...], times: int) -> tuple[_T, ...]:
    """Undo the short form of entries that are all alike."""
    return entries * times if len(entries) == 1 else entries


def _fault(segment: SegmentInfo, shape: _Shape, strides: _Strides, offset: int, itemsize: int) -> str | None:
    """Say what is wrong with a part of a region, in exact integers of any size."""
    if segment.address + segment.nbytes > 2**64:
        return f"{segment.nbytes} bytes at address {segment.address:#x} pass the end of the address space"
    if segment.backing_offset + segment.nbytes > 2**63 - 1:
        return f"{segment.nbytes} bytes at {segment.backing_offset} of its file pass the largest file offset"
    if len(shape) != len(strides):
        return f"{len(shape)} dimensions and {len(strides)} strides"
    if itemsize * math.prod(shape) > segment.nbytes:
        return f"shape {shape} of {itemsize}-byte items is larger than its segment of {segment.nbytes} bytes"
    low = high = offset
    if 0 not in shape:
        steps = [(count - 1) * stride for count, stride in zip(shape, strides, strict=True)]
        low += sum(step for step in steps if step < 0)
        high += sum(step for step in steps if step > 0) + itemsize
    if low < 0 or high > segment.nbytes:
        return f"bytes {low} to {high} are outside its segment of {segment.nbytes} bytes"
    return None
