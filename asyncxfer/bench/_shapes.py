"""What is moved: shapes, and cases made of a shape, a memory, a direction and a seed.

A shape is a number of rows of one length. Rows lie two lengths apart on both sides, so that no two
of them can be merged, and the remote side takes them in an order drawn from the seed; or they are
contiguous and in order on both sides, so that all of them can; or all of them are the same one row.
Nothing here knows a system, a process or a clock; both processes of a pair derive the same rows from a case.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

__all__ = ["DEFAULT_SHAPES", "UCX_SHAPES", "Case", "Memory", "Op", "Rows", "Shape"]

Memory = Literal["mapped", "ordinary"]
Op = Literal["put", "get"]
Rows = NDArray[np.uint64]

_UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
_CONTIGUOUS = "/contiguous"
_ONE = "/one"
_SHAPE = re.compile(rf"(?P<count>\d+)x(?P<size>\d+)(?P<unit>[KMG]iB|B|)(?P<lie>{_CONTIGUOUS}|{_ONE}|)", re.IGNORECASE)

#: Bytes that a round moves at least, by repeating a small shape, up to this many times and rows.
_ROUND_BYTES = 32 << 20
_LONG_ROUND_BYTES = 512 << 20
_MOST_REPEATS = 2000
_MOST_ROWS = 1 << 16


@dataclass(frozen=True, slots=True)
class Shape:
    """`count` rows of `length` bytes each, with gaps between them or without, or one row as many times."""

    count: int
    length: int
    contiguous: bool = False
    one: bool = False

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read ``"16384x4KiB"``, ``"20000x4KiB/contiguous"`` or ``"32x64KiB/one"``; units are B, KiB, MiB and GiB.

        Raises
        ------
        ValueError
            If `text` is not of that form, or either number is zero.
        """
        match = _SHAPE.fullmatch(text.strip())
        if match is None:
            hint = f"write for instance 16384x4KiB, 20000x4KiB{_CONTIGUOUS} or 32x64KiB{_ONE}"
            raise ValueError(f"shape {text!r} is not COUNTxSIZE; {hint}")
        length, lie = int(match["size"]) * _UNITS[match["unit"].upper()], match["lie"].lower()
        shape = cls(int(match["count"]), length, contiguous=lie == _CONTIGUOUS, one=lie == _ONE)
        if shape.nbytes == 0:
            raise ValueError(f"shape {text!r} has no bytes; both numbers must be at least 1")
        return shape

    def __str__(self) -> str:
        lie = _CONTIGUOUS if self.contiguous else _ONE if self.one else ""
        for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
            if self.length % size == 0:
                return f"{self.count}x{self.length // size}{unit}{lie}"
        return f"{self.count}x{self.length}B{lie}"

    @property
    def nbytes(self) -> int:
        """Bytes that one transfer moves."""
        return self.count * self.length

    @property
    def stride(self) -> int:
        """Bytes from the start of one row to the start of the next."""
        return self.length if self.contiguous else 2 * self.length

    @property
    def span(self) -> int:
        """Bytes of memory that the rows lie in, gaps included."""
        return self.places * self.stride

    @property
    def places(self) -> int:
        """Rows that are not the same."""
        return 1 if self.one else self.count

    @property
    def repeats(self) -> int:
        """Transfers that are awaited one after the other in a round."""
        if self.one:  # as much as ucx_perftest moves, which warms up in every round
            return max(1, _LONG_ROUND_BYTES // self.nbytes)
        return max(1, min(_MOST_REPEATS, _MOST_ROWS // self.count, _ROUND_BYTES // self.nbytes))


DEFAULT_SHAPES = (
    Shape(16384, 4 << 10),
    Shape(4096, 16 << 10),
    Shape(1024, 64 << 10),
    Shape(1, 64 << 20),
    Shape(1, 4 << 10),
)

#: The same, rows that merge, and one row many times, which is what ucx_perftest moves.
UCX_SHAPES = (
    *DEFAULT_SHAPES,
    Shape(20000, 4 << 10, contiguous=True),
    Shape(256, 4 << 10, one=True),
    Shape(32, 64 << 10, one=True),
    Shape(8, 64 << 20, one=True),
)


@dataclass(frozen=True, slots=True)
class Case:
    """One line of a benchmark: a shape in a memory, moved in a direction.

    Attributes
    ----------
    prepared : bool
        Whether the descriptor lists are made, checked and matched before the clock starts; otherwise every transfer
        begins with arrays of offsets and lengths.
    """

    shape: Shape
    memory: Memory
    op: Op
    seed: int
    prepared: bool = True

    @property
    def action(self) -> str:
        """The direction, as tables say it."""
        return self.op if self.prepared else f"{self.op}, unprepared"

    def to_message(self) -> dict[str, Any]:
        """As plain values, for the pipe to a worker."""
        return asdict(self)

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> Case:
        """The reverse of `to_message`."""
        shape = Shape(**message["shape"])
        memory, op = cast(Memory, message["memory"]), cast(Op, message["op"])
        return cls(shape, memory, op, message["seed"], message["prepared"])

    def local_order(self) -> NDArray[np.int64]:
        """Which row of its memory the initiator names k-th: the k-th, or the only one."""
        return np.minimum(np.arange(self.shape.count, dtype=np.int64), self.shape.places - 1)

    def remote_order(self) -> NDArray[np.int64]:
        """Which row of the target's memory the initiator names k-th: the k-th if contiguous, or drawn from the seed."""
        if self.shape.contiguous or self.shape.one:
            return self.local_order()
        return np.random.default_rng(self.seed).permutation(self.shape.count)

    def rows(self, order: NDArray[np.int64]) -> tuple[Rows, Rows]:
        """Byte offsets and lengths of the rows of one side, in the order of the transfer.

        Returns
        -------
        offsets, lengths : (count,) uint64, bytes
        """
        offsets = order.astype(np.uint64) * np.uint64(self.shape.stride)
        return offsets, np.full(len(order), self.shape.length, dtype=np.uint64)
