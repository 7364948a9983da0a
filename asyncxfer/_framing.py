"""Frames on a stream: four bytes of length, then as many bytes.

Sans-I/O: bytes in, frames out, and back. What is kept is bounded by one frame and what was fed last. What frames mean,
and where the bytes come from, is not known here.
"""

from __future__ import annotations

import struct

from ._errors import MetadataError
from ._metadata import MAX_FRAME_BYTES

__all__ = ["Framer", "frame"]

_LENGTH = struct.Struct(">I")


def frame(payload: bytes) -> bytes:
    """Put the length before a frame."""
    if not 0 < len(payload) <= MAX_FRAME_BYTES:
        raise MetadataError(f"a frame of {len(payload)} bytes; expected 1 to {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(payload)) + payload


class Framer:
    """Takes a stream apart into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._at = 0

    @property
    def kept(self) -> int:
        """Bytes that wait: of frames that were not taken yet, and of one that is not complete."""
        return len(self._buffer) - self._at

    def feed(self, data: bytes) -> None:
        """Add what has come."""
        if self._at:
            del self._buffer[: self._at]
            self._at = 0
        self._buffer += data

    def take(self) -> bytes | None:
        """Give the next frame; None as long as it is not complete.

        Raises
        ------
        MetadataError
            What follows is no frame.
        """
        if self.kept < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer, self._at)
        if not 0 < length <= MAX_FRAME_BYTES:
            raise MetadataError(f"a frame of {length} bytes; expected 1 to {MAX_FRAME_BYTES}")
        begin = self._at + _LENGTH.size
        if len(self._buffer) < begin + length:
            return None
        self._at = begin + length
        return bytes(memoryview(self._buffer)[begin : self._at])
