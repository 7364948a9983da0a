"""From a request to spans: stretches of one object each, with the rows of memory that belong to them.

Rows of one object that follow one another there become one span, whatever their order in the lists. It knows no store
and moves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..._errors import DescriptorError
from ..._fast.views import views
from ...abc import ObjectRegistration, Registration, Request

__all__ = ["Span", "Work"]

_Uint64s = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of an object.

    Attributes
    ----------
    key : str
    offset, nbytes : int, bytes
        In the object.
    first, last : int
        Its rows, among those of the work, in the order of their offsets: from one to before the other.
    """

    key: str
    offset: int
    nbytes: int
    first: int
    last: int


class Work:
    """A transfer between memory and objects, ready to be carried out many times.

    Parameters
    ----------
    request : Request

    Attributes
    ----------
    objects : ObjectRegistration
    memory : Registration
    write : bool
        From memory to objects.
    whole, verify : bool
        Each span is to be all of its object; its bytes are to be proved.
    spans : list of Span
    chunks : (n,) int64
        For each row its number in stream order.

    Raises
    ------
    DescriptorError
        What is to be put is no whole object.
    """

    def __init__(self, request: Request) -> None:
        remote = request.remote
        assert isinstance(remote, Registration)
        self.via = request.via
        self.verify = request.checksum
        self.keep = request.keep
        near = isinstance(request.local, ObjectRegistration)  # the objects are the local side
        self.objects, self.memory = (request.local, remote) if near else (remote, request.local)
        self.write = (request.op == "put") is not near
        self.whole = request.whole or self.write
        rows = _rows(request.pairs)
        here, there = ("remote", "local") if near else ("local", "remote")
        self._lengths = rows["length"]
        addresses = self.memory.bases[rows[f"{here}_segment"]] + rows[here]
        segments, offsets = _same(request.keys, rows[f"{there}_segment"]), rows[there]
        self.chunks = _order(segments, offsets)
        self.addresses: _Uint64s = addresses[self.chunks]
        self.lengths: _Uint64s = self._lengths[self.chunks]
        self.ends_in_order: _Uint64s = np.cumsum(self.lengths, dtype=np.uint64)
        self.spans = _spans(request.keys, segments[self.chunks], offsets[self.chunks], self.lengths)
        if not len(rows) and request.whole:
            self.spans = [Span(key, 0, 0, 0, 0) for key in request.keys]
        if self.write:
            _check_whole(self.spans)

    def ends(self) -> _Uint64s:
        """Where in the stream each of its rows ends: (n,) uint64, bytes."""
        return np.cumsum(self._lengths, dtype=np.uint64)

    def buffers(self, span: Span, start: int, nbytes: int) -> list[memoryview]:
        """The memory of a part of a span, in order: `nbytes` from `start` of the span on."""
        if not nbytes:
            return []
        begin = int(self.ends_in_order[span.first - 1]) if span.first else 0
        low, high = begin + start, begin + start + nbytes
        first = int(np.searchsorted(self.ends_in_order, low, side="right"))
        last = int(np.searchsorted(self.ends_in_order, high, side="left")) + 1
        addresses, lengths = self.addresses[first:last].copy(), self.lengths[first:last].copy()
        late = int(self.ends_in_order[last - 1]) - high
        lengths[-1] -= np.uint64(late)
        early = low - (int(self.ends_in_order[first - 1]) if first else 0)
        addresses[0] += np.uint64(early)
        lengths[0] -= np.uint64(early)
        return views(addresses, lengths, writable=not self.write)


def _rows(pairs: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    """The same rows with none that stands for several."""
    counts = pairs["count"]
    if not len(pairs) or counts.max() == 1:
        return pairs
    rows = np.repeat(pairs, counts)
    number = np.arange(len(rows), dtype=np.uint64) - np.repeat(np.cumsum(counts, dtype=np.uint64) - counts, counts)
    for side in ("local", "remote"):
        rows[side] += number * rows[f"{side}_stride"].view(np.uint64)  # modulo 2**64, as strides may be negative
    return rows


def _same(keys: tuple[str, ...], segments: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """The segments with one number a key, where a key stands in the table more than once."""
    first: dict[str, int] = {}
    places = [first.setdefault(key, number) for number, key in enumerate(keys)]
    return segments if len(first) == len(keys) else np.array(places, np.uint32)[segments]


def _order(segments: npt.NDArray[np.uint32], offsets: _Uint64s) -> npt.NDArray[np.int64]:
    """The numbers of the rows by object and offset."""
    behind = (segments[1:] > segments[:-1]) | ((segments[1:] == segments[:-1]) & (offsets[1:] >= offsets[:-1]))
    return np.arange(len(segments)) if behind.all() else np.lexsort((offsets, segments))


def _spans(keys: tuple[str, ...], segments: npt.NDArray[np.uint32], offsets: _Uint64s, lengths: _Uint64s) -> list[Span]:
    if not len(segments):
        return []
    follows = (segments[1:] == segments[:-1]) & (offsets[1:] == offsets[:-1] + lengths[:-1])
    firsts = np.concatenate(([0], np.flatnonzero(~follows) + 1))
    lasts = np.append(firsts[1:], len(segments))
    nbytes = np.add.reduceat(lengths, firsts)
    return [
        Span(keys[segment], *place)
        for segment, *place in zip(
            segments[firsts].tolist(), offsets[firsts].tolist(), nbytes.tolist(), firsts.tolist(), lasts.tolist(),
            strict=True,
        )
    ]  # fmt: skip


def _check_whole(spans: list[Span]) -> None:
    """Refuse to put what is a part of an object, or has one byte twice."""
    before = None
    for span in spans:
        if span.offset or (before is not None and before.key == span.key):
            raise DescriptorError(
                f"a put makes whole objects, and the rows of {span.key!r} are not its bytes from 0 on, each once"
            )
        before = span
