"""What is moved between memory and a file: cases, where their rows lie, and what must be there afterwards.

Rows lie two lengths apart in memory, in an order drawn from the seed. In the file they follow one another where the
shape is contiguous; otherwise they lie two lengths apart there too, in an order of its own. Nothing here knows a system
or a process.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from ._shapes import Op, Rows, Shape

__all__ = ["FILE_SHAPES", "Bytes", "FileCase", "Way", "blank", "pattern", "problem"]

Way = Literal["cached", "direct"]
Bytes = NDArray[np.uint8]

FILE_SHAPES = (
    Shape(16384, 16 << 10, contiguous=True),
    Shape(16384, 16 << 10),
    Shape(256, 1 << 20),
    Shape(1, 256 << 20),
    Shape(1, 16 << 10),
)

_BLANK = 0xA5
_STEP = np.uint64(0x9E3779B97F4A7C15)  # multiples of it never repeat


@dataclass(frozen=True, slots=True)
class FileCase:
    """One line of the benchmark.

    Attributes
    ----------
    way : {"cached", "direct"}
        Through the page cache, which has all of it, or past it.
    op : {"put", "get"}
        Memory to file, or file to memory.
    """

    shape: Shape
    way: Way
    op: Op
    seed: int

    def to_message(self) -> dict[str, Any]:
        """As plain values, for the pipe to a worker."""
        return asdict(self)

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> FileCase:
        """The reverse of `to_message`."""
        return cls(Shape(**message["shape"]), cast(Way, message["way"]), cast(Op, message["op"]), message["seed"])

    def __str__(self) -> str:
        return f"{self.shape} {self.op} {self.way}"

    @property
    def action(self) -> str:
        """The direction, as tables say it."""
        return self.op

    @property
    def memory_span(self) -> int:
        """Bytes of memory that the rows lie in, gaps included."""
        return 2 * self.shape.nbytes

    @property
    def file_span(self) -> int:
        """The same in the file."""
        return self.shape.span

    def memory_rows(self) -> tuple[Rows, Rows]:
        """Offsets and lengths of the rows in memory, in the order of the transfer: (count,) uint64 each, bytes."""
        return self._rows(np.random.default_rng(self.seed).permutation(self.shape.count), 2 * self.shape.length)

    def file_rows(self) -> tuple[Rows, Rows]:
        """The same in the file."""
        count = self.shape.count
        order = np.arange(count) if self.shape.contiguous else np.random.default_rng(self.seed + 1).permutation(count)
        return self._rows(order, self.shape.stride)

    def _rows(self, order: NDArray[np.int64], stride: int) -> tuple[Rows, Rows]:
        offsets = order.astype(np.uint64) * np.uint64(stride)
        return offsets, np.full(len(order), self.shape.length, dtype=np.uint64)


def pattern(span: int, seed: int) -> Bytes:
    """What a source holds: every word of eight bytes is unique to its place and seed."""
    words = np.arange(-(-span // 8), dtype=np.uint64)
    words *= _STEP
    words += np.uint64(seed)
    return words.view(np.uint8)[:span]


def blank(memory: Bytes) -> None:
    """Write over a destination."""
    memory[:] = _BLANK


def problem(destination: Bytes, case: FileCase) -> str:
    """Compare a destination, which was blank, with what it must hold; say what differs, or an empty string."""
    count, length = case.shape.count, case.shape.length
    spans, places = (case.memory_span, case.file_span), (case.memory_rows()[0], case.file_rows()[0])
    if case.op == "get":
        spans, places = spans[::-1], places[::-1]
    strides = [np.uint64(span // count) for span in spans]
    sources, destinations = (offsets // stride for offsets, stride in zip(places, strides, strict=True))
    expected = np.full((count, int(strides[1])), _BLANK, dtype=np.uint8)
    expected[destinations, :length] = pattern(spans[0], case.seed).reshape(count, -1)[sources, :length]
    wrong = (destination.reshape(expected.shape) != expected).any(axis=1)
    return f"{int(wrong.sum())} of {count} rows, with what follows them, differ" if wrong.any() else ""
