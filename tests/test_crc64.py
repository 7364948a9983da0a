"""CRC-64/NVME: its check values, and a slow model for every alignment and length, by each way to compute it."""

from __future__ import annotations

import os
import platform
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncxfer._fast.crc64 import WIDTHS, combine, crc64nvme

# The first is the check value by which catalogues of CRCs know this one; the others stand in the specification of NVMe,
# for 4 KiB of each.
VECTORS = [
    (b"123456789", 0xAE8B14860A799888),
    (bytes(4096), 0x6482D367EB22B64E),
    (b"\xff" * 4096, 0xC0DDBA7302ECA3AC),
    (bytes(range(256)) * 16, 0x3E729F5F6750449C),
    (bytes(reversed(range(256))) * 16, 0x9A2DF64B8E9E517E),
]

SEA = os.urandom(300_000)


def model(data: bytes, crc: int = 0) -> int:
    """One bit at a time."""
    crc ^= (1 << 64) - 1
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x9A6C9329AC4BC9B5 if crc & 1 else 0)
    return crc ^ (1 << 64) - 1


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("data", "expected"), VECTORS)
def test_the_known_vectors(data: bytes, expected: int, width: int) -> None:
    assert crc64nvme(data, width=width) == expected
    assert model(data) == expected


def test_nothing_changes_nothing() -> None:
    assert crc64nvme(b"") == 0
    assert crc64nvme(b"", 0x123456789ABCDEF0) == 0x123456789ABCDEF0
    assert combine(0x123456789ABCDEF0, 0, 0) == 0x123456789ABCDEF0


@pytest.mark.parametrize("offset", [0, 1, 7, 8, 33])
def test_every_length_at_every_alignment(offset: int) -> None:
    """Up to and past where each way takes more at once; the tables are checked against the model."""
    crc, view = model(SEA[offset : offset + 10]), memoryview(SEA)[offset:]
    for length in range(10, 1100):
        assert [crc64nvme(view[:length], width=width) for width in WIDTHS] == [crc] * len(WIDTHS)
        crc = model(SEA[offset + length : offset + length + 1], crc)


@given(data=st.binary(max_size=300), crc=st.integers(0, (1 << 64) - 1))
def test_it_agrees_with_the_model(data: bytes, crc: int) -> None:
    assert {crc64nvme(data, crc, width=width) for width in WIDTHS} == {model(data, crc)}


@given(start=st.integers(0, 64), length=st.integers(0, 250_000), cuts=st.lists(st.integers(0, 250_000), max_size=4))
def test_pieces_give_what_the_whole_gives(start: int, length: int, cuts: list[int]) -> None:
    """One behind the other, and each on its own and put together afterwards."""
    data = memoryview(SEA)[start : start + length]
    whole = crc64nvme(data, width=0)
    crc, together, at = 0, 0, 0
    for cut in [*sorted(min(cut, length) for cut in cuts), length]:
        crc = crc64nvme(data[at:cut], crc)
        together = combine(together, crc64nvme(data[at:cut]), cut - at)
        at = cut
    assert crc == together == whole


@given(first=st.binary(max_size=20), nbytes=st.integers(0, 4000))
def test_a_long_second_piece_is_a_matter_of_its_length(first: bytes, nbytes: int) -> None:
    assert combine(crc64nvme(first), crc64nvme(bytes(nbytes)), nbytes) == crc64nvme(first + bytes(nbytes))


def test_combining_takes_lengths_of_64_bits() -> None:
    half, far = 1 << 62, crc64nvme(b"far away")
    assert combine(combine(far, 0, half), 0, half) == combine(far, 0, 2 * half)


def test_the_widest_way_that_the_processor_has_is_there() -> None:
    if platform.machine() != "x86_64":
        assert WIDTHS == (0,)
        return
    flags = Path("/proc/cpuinfo").read_text().split()
    assert (16 in WIDTHS) == ("pclmulqdq" in flags and "sse4_1" in flags)
    assert (64 in WIDTHS) == ({"vpclmulqdq", "avx512f", "pclmulqdq", "sse4_1"} <= set(flags))


def test_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="width 7"):
        crc64nvme(b"", width=7)


def test_any_contiguous_buffer_is_taken() -> None:
    array: Any = np.arange(1000, dtype=np.float16).reshape(10, 100)
    expected = crc64nvme(array.tobytes())
    array.flags.writeable = False
    assert crc64nvme(array) == crc64nvme(bytearray(array.tobytes())) == crc64nvme(memoryview(array)) == expected


def test_what_is_no_contiguous_buffer_is_refused() -> None:
    for wrong in ("text", memoryview(b"abcdef")[::2], np.zeros((4, 4))[:, 1]):
        with pytest.raises((TypeError, BufferError, ValueError)):
            crc64nvme(wrong)  # type: ignore[arg-type]


def test_other_threads_run_meanwhile() -> None:
    """A thread that asks for the GIL gets it within such a call."""
    data, seen, go = bytes(64 << 20), [], threading.Event()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # only who lets go of it on its own gives it to another

    def other() -> None:
        go.wait()
        seen.append("another thread")

    thread = threading.Thread(target=other)
    thread.start()
    try:
        go.set()
        for _ in range(100):
            crc64nvme(data, width=0)
            if seen:
                break
        seen.append("the checksums")
    finally:
        sys.setswitchinterval(interval)
        thread.join()
    assert seen == ["another thread", "the checksums"]
