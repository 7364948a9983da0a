"""The index of a block store; the docstrings that the compiled module leaves to its stub.

``Packed`` keys are what `pack` gives: (n, 40) uint8.
"""

from collections.abc import Iterable
from typing import Final, TypeAlias, final

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

__all__ = [
    "CLEAR",
    "CLOSED",
    "MAX_BLOCKS",
    "MAX_KEY_BYTES",
    "NEXT",
    "OPENED",
    "RECORD_BYTES",
    "SET",
    "UNCHECKED",
    "BlockIndex",
    "live",
    "note",
    "pack",
    "sealed",
]

Packed: TypeAlias = npt.NDArray[np.uint8]
Int64s: TypeAlias = npt.NDArray[np.int64]
Uint32s: TypeAlias = npt.NDArray[np.uint32]
Uint64s: TypeAlias = npt.NDArray[np.uint64]
Bools: TypeAlias = npt.NDArray[np.bool_]

SET: Final[int]
CLEAR: Final[int]
OPENED: Final[int]
CLOSED: Final[int]
NEXT: Final[int]
UNCHECKED: Final[int]
RECORD_BYTES: Final[int]
MAX_KEY_BYTES: Final[int]
MAX_BLOCKS: Final[int]

def live() -> int: ...
def pack(keys: Iterable[bytes]) -> Packed:
    """Give keys the form in which the index takes them: 40 bytes each, whatever their length.

    Raises
    ------
    TypeError
        A key is not bytes.
    ValueError
        A key is empty or too long.
    """

def note(kind: int, sequence: int, salt: int, payload: Buffer, *, flags: int = 0) -> bytes:
    """Give a record that is about the store and no block, with up to 32 bytes of its own."""

def sealed(data: Buffer, salt: int) -> int:
    """Count the records that have their right checksum."""

@final
class BlockIndex:
    """Keys, blocks, and the order of their use.

    Parameters
    ----------
    limit : int
        How many blocks there may be.
    """

    @property
    def clock(self) -> int: ...
    @property
    def sequence(self) -> int: ...
    @property
    def limit(self) -> int: ...
    @property
    def top(self) -> int: ...
    @property
    def count(self) -> int: ...
    @property
    def free(self) -> int: ...
    @property
    def pinned(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def __init__(self, limit: int) -> None: ...
    def __len__(self) -> int: ...
    def contains(self, packed: Packed) -> Bools: ...
    def lookup(self, packed: Packed, *, hold: bool = False) -> tuple[Int64s, Uint64s, Uint32s, Bools]: ...
    def unchanged(self, blocks: Int64s, sequences: Uint64s) -> Bools: ...
    def release(self, blocks: Int64s) -> int: ...
    def pin(self, packed: Packed, change: int) -> Bools: ...
    def remove(self, packed: Packed) -> tuple[Bools, Int64s]: ...
    def remove_blocks(self, blocks: Int64s, sequences: Uint64s) -> Int64s: ...
    def remove_range(self, start: int, stop: int, *, before: int = 0) -> Int64s: ...
    def evict(self, n: int) -> Int64s: ...
    def give(self, blocks: Int64s) -> int: ...
    def allocate(self, n: int, hint: int = -1) -> Int64s: ...
    def install(
        self,
        packed: Packed,
        blocks: Int64s,
        sequences: Uint64s,
        checksums: Uint32s,
        *,
        unchecked: bool = False,
        pin: bool = False,
    ) -> Int64s: ...
    def confine(self, limit: int) -> None: ...
    def records_of_sets(
        self,
        packed: Packed,
        blocks: Int64s,
        checksums: Uint32s,
        sequence: int,
        salt: int,
        *,
        unchecked: bool = False,
    ) -> bytearray: ...
    def records_of_clears(self, blocks: Int64s, sequence: int, salt: int) -> bytearray: ...
    def export(self, start: int, stop: int, salt: int) -> bytearray: ...
    def apply(
        self, data: Buffer, salt: int, limit: int, *, alone: bool = False, snapshot: bool = False, wary: bool = False
    ) -> tuple[int, int, int, list[tuple[int, int, bytes]]]: ...
    def settle(self) -> None: ...
