"""What is moved between memory and objects: cases, their keys, where their rows lie, and what they must hold.

A row of a shape is a whole object, and all of a shape are moved at once: its count is what is in flight. Rows lie two
lengths apart in memory. A null server keeps nothing and answers with its own bytes; elsewhere every object has bytes of
its own. Nothing here knows a system or a process.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from ._file_cases import Bytes, blank, pattern
from ._shapes import Op, Rows, Shape

__all__ = ["OBJECT_SHAPES", "Link", "ObjectCase", "null_bytes"]

Link = Literal["http", "https"]

OBJECT_SHAPES = (Shape(1, 64 << 20), Shape(8, 4 << 20), Shape(16, 64 << 10), Shape(1, 16 << 10))

_MOST_REPEATS = 200  # a request of an SDK takes milliseconds
_PERIOD = np.uint64(2 << 20)  # words after which a null server repeats


@dataclass(frozen=True, slots=True)
class ObjectCase:
    """One line of the benchmark.

    Attributes
    ----------
    link : {"http", "https"}
    op : {"put", "get"}
        Memory to objects, or objects to memory.
    kept : bool
        Whether the store keeps what it is given.
    """

    shape: Shape
    link: Link
    op: Op
    seed: int
    kept: bool

    def to_message(self) -> dict[str, Any]:
        """As plain values, for the pipe to a worker."""
        return asdict(self)

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> ObjectCase:
        """The reverse of `to_message`."""
        shape = Shape(**message["shape"])
        return cls(shape, cast(Link, message["link"]), cast(Op, message["op"]), message["seed"], message["kept"])

    def __str__(self) -> str:
        return f"{self.shape} {self.op} {self.link}"

    @property
    def action(self) -> str:
        """The direction, as tables say it."""
        return self.op

    @property
    def looked_at(self) -> bool:
        """Whether anybody can see afterwards what was moved."""
        return self.kept or self.op == "get"

    @property
    def repeats(self) -> int:
        """Transfers that are awaited one after the other in a round."""
        return min(_MOST_REPEATS, self.shape.repeats)

    def keys(self) -> list[str]:
        """One a row; they end in the size, by which a null server knows it."""
        return [f"{number}-{self.shape.length}" for number in range(self.shape.count)]

    def rows(self) -> tuple[Rows, Rows]:
        """Offsets and lengths of the rows in memory: (count,) uint64 each, bytes."""
        offsets = np.arange(self.shape.count, dtype=np.uint64) * np.uint64(self.shape.stride)
        return offsets, np.full(self.shape.count, self.shape.length, dtype=np.uint64)

    def holds(self, number: int) -> Bytes:
        """The bytes of the object of a row."""
        return pattern(self.shape.length, self.seed + number) if self.kept else null_bytes(self.shape.length)

    def fill(self, memory: Bytes) -> None:
        """Make memory ready: what is to be put, or nothing that a get could be taken to have brought."""
        blank(memory)
        if self.op == "put":
            self._write(memory)

    def problem(self, memory: Bytes) -> str:
        """Compare memory, which was blank before a get, with what it must hold; say what differs, or nothing."""
        expected = np.empty(self.shape.span, np.uint8)
        blank(expected)
        self._write(expected)
        wrong = (memory.reshape(self.shape.count, -1) != expected.reshape(self.shape.count, -1)).any(axis=1)
        return f"{int(wrong.sum())} of {self.shape.count} rows, with what follows them, differ" if wrong.any() else ""

    def _write(self, memory: Bytes) -> None:
        rows = memory.reshape(self.shape.count, -1)
        for number in range(self.shape.count):
            rows[number, : self.shape.length] = self.holds(number)


def null_bytes(size: int) -> NDArray[np.uint8]:
    """What an object of the null server has from its beginning; see its `content`."""
    words = np.arange(-(-size // 8), dtype=np.uint64)
    words %= _PERIOD
    return words.view(np.uint8)[:size]
