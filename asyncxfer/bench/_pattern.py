"""Bytes that can be recognised: what a source holds, and what a destination must hold afterwards.

Every eight-byte word of a source is unique to its place and seed, and a destination is blanked
before the rounds, so a row that is missing, misplaced or torn shows, and so does a byte written
between the rows. The destination's process works out what it must hold from the case alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ._shapes import Case

__all__ = ["Bytes", "blank", "fill", "problem"]

Bytes = NDArray[np.uint8]

_BLANK = 0xA5
# The odd constant nearest to 2**64 divided by the golden ratio: multiples of it never repeat.
_STEP = np.uint64(0x9E3779B97F4A7C15)


def fill(memory: Bytes, case: Case) -> None:
    """Write the source pattern of `case` into `memory`."""
    memory[: case.shape.span] = _source(case)


def blank(memory: Bytes, case: Case) -> None:
    """Write over all that a transfer of `case` may have left in `memory`."""
    memory[: case.shape.span] = _BLANK


def problem(memory: Bytes, case: Case) -> str:
    """Compare a destination with what it must hold; say what differs, or an empty string."""
    shape = case.shape
    sources, destinations = case.local_order(), case.remote_order()
    if case.op == "get":
        sources, destinations = destinations, sources
    expected = np.full((shape.places, shape.stride), _BLANK, dtype=np.uint8)
    source = _source(case).reshape(shape.places, shape.stride)
    expected[destinations, : shape.length] = source[sources, : shape.length]
    actual = memory[: shape.span].reshape(shape.places, shape.stride)
    if np.array_equal(actual, expected):
        return ""
    rows, gaps = (
        int((actual[:, part] != expected[:, part]).any(axis=1).sum())
        for part in (slice(shape.length), slice(shape.length, None))
    )
    return f"{rows} of {shape.places} rows differ, and bytes after {gaps} rows were written over"


def _source(case: Case) -> Bytes:
    words = np.arange(-(-case.shape.span // 8), dtype=np.uint64)
    words *= _STEP
    words += np.uint64(case.seed)
    return words.view(np.uint8)[: case.shape.span]
