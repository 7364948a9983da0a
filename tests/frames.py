"""What goes over a data connection of the backend ``tcp``, as bytes that a test makes; see `_fast/frames.h`."""

from __future__ import annotations

import struct

__all__ = [
    "DATA", "DONE", "EPOCH", "GET", "HEAD", "MAGIC", "NOTE", "PUT", "RUN", "SLOT", "crc32c", "head", "run",
]  # fmt: skip

SLOT, EPOCH = 3, 7
MAGIC, PUT, GET, NOTE, DONE, DATA = 0x31445841, 1, 2, 3, 4, 5
HEAD = struct.Struct("<IBBHQQIIIIIIQiI")
RUN = struct.Struct("<QQqII")


def head(
    kind: int, *, op: int = 1, runs: int = 1, nbytes: int = 64, chunk: int = 0, chunks: int = 1, flags: int = 0,
    slot: int = SLOT, epoch: int = EPOCH, tag: int = 0, settled: int = 0, magic: int = MAGIC,
) -> bytes:  # fmt: skip
    return HEAD.pack(magic, kind, flags, 0, op, settled, chunk, chunks, slot, epoch, runs, tag, nbytes, 0, 0)


def run(offset: int = 0, length: int = 64, stride: int = 64, count: int = 1, segment: int = 0) -> bytes:
    return RUN.pack(offset, length, stride, count, segment)


def crc32c(data: bytes) -> int:
    """Bit by bit, from its polynomial."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF
