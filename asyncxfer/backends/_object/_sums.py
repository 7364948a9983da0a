"""Checksums of bodies in pieces, a bounded time a turn of the loop, and what they look like in headers."""

from __future__ import annotations

import asyncio
import base64
import binascii
import functools
import hashlib
from collections.abc import Callable, Sequence

from ..._fast.crc32c import crc32c
from ..._fast.crc64 import crc64nvme

__all__ = [
    "AT_ONCE",
    "as_header",
    "combine_crc32c",
    "crc32c_of",
    "crc64_of",
    "crc64_of_small",
    "from_header",
    "md5_of",
    "sum_of",
]

#: Bytes that are summed in one turn: a quarter of a millisecond where they come from memory.
AT_ONCE = 1 << 20

_CRC32C = 0x82F63B78  # its polynomial, the highest power left out


def crc64_of_small(views: Sequence[memoryview]) -> int:
    """CRC64NVME of what has no more than `AT_ONCE` bytes."""
    crc = 0
    for view in views:
        crc = crc64nvme(view, crc)
    return crc


async def crc64_of(views: Sequence[memoryview]) -> int:
    """CRC64NVME of bytes that stay as they are meanwhile."""
    return await _summed(crc64nvme, views)


async def crc32c_of(views: Sequence[memoryview]) -> int:
    """CRC32C of bytes that stay as they are meanwhile."""
    return await _summed(crc32c, views)


async def md5_of(views: Sequence[memoryview]) -> int:
    """MD5 of bytes that stay as they are meanwhile, its bytes in order as one number."""
    digest = hashlib.md5(usedforsecurity=False)

    def add(piece: memoryview, _: int) -> int:
        digest.update(piece)
        return 0

    await _summed(add, views)
    return int.from_bytes(digest.digest(), "big")


async def sum_of(algorithm: str, views: Sequence[memoryview]) -> int:
    """Give ``crc64nvme``, ``crc32c`` or ``md5`` of bytes that stay as they are meanwhile."""
    return await {"crc64nvme": crc64_of, "crc32c": crc32c_of, "md5": md5_of}[algorithm](views)


async def _summed(sum_: Callable[[memoryview, int], int], views: Sequence[memoryview]) -> int:
    crc, done = 0, 0
    for view in views:
        for at in range(0, view.nbytes, AT_ONCE):
            piece = view[at : at + AT_ONCE]
            done += piece.nbytes
            if done > AT_ONCE:
                await asyncio.sleep(0)
                done = piece.nbytes
            crc = sum_(piece, crc)
    return crc


def combine_crc32c(crc1: int, crc2: int, nbytes2: int) -> int:
    """Give the CRC32C of two runs of bytes, one behind the other, of which the second has so many."""
    return _product(_shift(nbytes2), crc1) ^ crc2


def _product(a: int, b: int) -> int:
    """Multiply polynomials whose highest power is the lowest bit, modulo that of CRC32C."""
    found = 0
    for power in range(32):
        if a >> (31 - power) & 1:
            found ^= b
        b = b >> 1 ^ (_CRC32C if b & 1 else 0)
    return found


@functools.lru_cache(64)
def _shift(nbytes: int) -> int:
    """Give what a CRC32C is multiplied by when so many bytes follow: a power of x, by squaring."""
    found, square = 1 << 31, 1 << 23
    while nbytes:
        if nbytes & 1:
            found = _product(found, square)
        square = _product(square, square)
        nbytes >>= 1
    return found


def as_header(crc: int, nbytes: int = 8) -> bytes:
    """Give a checksum of so many bytes as headers have it."""
    return base64.b64encode(crc.to_bytes(nbytes, "big"))


def from_header(text: bytes) -> int | None:
    """Give the checksum that a header has; None where it has none."""
    try:
        return int.from_bytes(base64.b64decode(text, validate=True), "big") if text else None
    except binascii.Error:
        return None
