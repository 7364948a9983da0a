"""CRC-32C: the vectors of RFC 3720, and a slow model for every alignment and length."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncxfer._fast.crc32c import HARDWARE, crc32c

# RFC 3720, B.4; the last is the check value by which catalogues of CRCs know this one.
VECTORS = [
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(reversed(range(32))), 0x113FDB5C),
    (bytes.fromhex("01c00000" "00000000" "00000000" "00000000" "14000000" "00000400"
                   "00000014" "00000018" "28000000" "00000000" "02000000" "00000000"), 0xD9963A56),
    (b"123456789", 0xE3069283),
]  # fmt: skip


def model(data: bytes, crc: int = 0) -> int:
    """One bit at a time."""
    crc ^= 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@pytest.mark.parametrize("tables", [False, True])
@pytest.mark.parametrize(("data", "expected"), VECTORS)
def test_the_known_vectors(data: bytes, expected: int, tables: bool) -> None:
    assert crc32c(data, tables=tables) == expected
    assert model(data) == expected


def test_nothing_changes_nothing() -> None:
    assert crc32c(b"") == 0
    assert crc32c(b"", 0x12345678) == 0x12345678


SEA = os.urandom(200_000)


@pytest.mark.parametrize("offset", range(8))
def test_every_length_at_every_alignment(offset: int) -> None:
    """Up to and past where one stream becomes three, short ones first; the tables are checked against the model."""
    crc, view = model(SEA[offset : offset + 100]), memoryview(SEA)[offset:]
    for length in range(100, 2000):
        assert crc32c(view[:length]) == crc == crc32c(view[:length], tables=True)
        crc = model(SEA[offset + length : offset + length + 1], crc)


@given(data=st.binary(max_size=300), crc=st.integers(0, (1 << 32) - 1))
def test_it_agrees_with_the_model(data: bytes, crc: int) -> None:
    assert crc32c(data, crc) == crc32c(data, crc, tables=True) == model(data, crc)


@given(start=st.integers(0, 64), length=st.integers(0, 150_000), cuts=st.lists(st.integers(0, 150_000), max_size=4))
def test_pieces_give_what_the_whole_gives(start: int, length: int, cuts: list[int]) -> None:
    data = memoryview(SEA)[start : start + length]
    whole = crc32c(data, tables=True)
    crc, at = 0, 0
    for cut in [*sorted(min(cut, length) for cut in cuts), length]:
        crc, at = crc32c(data[at:cut], crc), cut
    assert crc == whole


def test_the_instruction_is_used_where_there_is_one() -> None:
    if platform.machine() == "x86_64":
        assert ("sse4_2" in Path("/proc/cpuinfo").read_text().split()) == HARDWARE


def test_what_is_no_plain_buffer_is_refused() -> None:
    for wrong in ("text", memoryview(b"abcdef")[::2]):
        with pytest.raises((TypeError, BufferError)):
            crc32c(wrong)  # type: ignore[arg-type]
