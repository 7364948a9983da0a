"""From a request to spans: stretches of one object each, with the rows of memory that belong to them.

It knows no store and moves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..._errors import DescriptorError
from ..._fast.spans import Spans
from ...abc import ObjectRegistration, Registration, Request

__all__ = ["GpuMemory", "Span", "Work"]


@dataclass(slots=True, eq=False)
class GpuMemory(Registration):
    """GPU memory, and which GPU's it is."""

    device: int


class Span(NamedTuple):
    """A stretch of an object.

    Attributes
    ----------
    place : int
        Among those of the work; -1 where it has no bytes.
    key : str
    offset, nbytes : int, bytes
        In the object.
    """

    place: int
    key: str
    offset: int
    nbytes: int


class Work:
    """A transfer between memory and objects, ready to be carried out many times.

    Parameters
    ----------
    request : Request

    Attributes
    ----------
    objects : ObjectRegistration
    write : bool
        From memory to objects.
    whole, verify : bool
        Each span is to be all of its object; its bytes are to be proved.
    spans : list of Span
    chunks : int
        Rows of which is told when they have been moved.
    device : int or None
        The GPU whose memory it is; None: it is the host's.

    Raises
    ------
    DescriptorError
        What is to be put is no whole object.
    """

    __slots__ = ("_keep", "_rows", "chunks", "device", "objects", "spans", "verify", "via", "whole", "write")

    def __init__(self, request: Request) -> None:
        local, remote, keys = request.local, request.remote, request.keys
        near = isinstance(local, ObjectRegistration)  # the objects are the local side
        objects, memory = (local, remote) if near else (remote, local)
        assert isinstance(objects, ObjectRegistration)
        assert isinstance(memory, Registration)
        self.objects: ObjectRegistration = objects
        self.via = request.via
        self.verify = request.checksum
        self.write = (request.op == "put") is not near
        self.whole = request.whole or self.write
        self.device = memory.device if isinstance(memory, GpuMemory) else None
        self._keep = request.keep, memory
        self._rows = Spans(request.pairs, memory.bases, near=near, same=_same(keys))
        self.chunks = self._rows.chunks
        self.spans = [_span(keys, place, *self._rows[place]) for place in range(len(self._rows))]
        if request.whole and not request.nbytes:
            self.spans = [Span(-1, key, 0, 0) for key in keys]
        if self.write:
            _check_whole(self.spans)

    def ends(self) -> npt.NDArray[np.uint64]:
        """Where in the stream each of its rows ends: (n,) uint64, bytes."""
        return self._rows.ends()

    def numbers(self, span: Span) -> list[int]:
        """The rows of a span, by their places in the stream."""
        return self._rows.numbers(span.place) if span.place >= 0 else []

    def buffers(self, span: Span, start: int, nbytes: int) -> list[memoryview]:
        """The host memory of a part of a span, in order: `nbytes` from `start` of the span on."""
        return self._rows.buffers(span.place, start, nbytes, writable=not self.write) if nbytes else []

    def places(self, span: Span, start: int, nbytes: int) -> npt.NDArray[np.uint64]:
        """The same as addresses and lengths, whatever memory it is: (n, 2) uint64."""
        return self._rows.places(span.place, start, nbytes)


def _span(keys: tuple[str, ...], place: int, segment: int, offset: int, nbytes: int) -> Span:
    return Span(place, keys[segment], offset, nbytes)


def _same(keys: tuple[str, ...]) -> npt.NDArray[np.uint32] | None:
    """For each key the first place where it stands in the table; None where it never stands in two."""
    if len(keys) < 2 or len(set(keys)) == len(keys):
        return None
    first: dict[str, int] = {}
    return np.array([first.setdefault(key, number) for number, key in enumerate(keys)], np.uint32)


def _check_whole(spans: list[Span]) -> None:
    """Refuse to put what is a part of an object, or has one byte twice."""
    before = None
    for span in spans:
        if span.offset or span.key == before:
            raise DescriptorError(
                f"a put makes whole objects, and the rows of {span.key!r} are not its bytes from 0 on, each once"
            )
        before = span.key
