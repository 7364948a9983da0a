"""What goes over the pipes between a test and its peer's process: a JSON head and raw bytes, each behind its length."""

from __future__ import annotations

import json
import struct
from typing import IO, Any

__all__ = ["receive", "send"]

_LENGTHS = struct.Struct("<IQ")


def send(pipe: IO[bytes], head: dict[str, Any], body: bytes = b"") -> None:
    """Write one message; blocks."""
    encoded = json.dumps(head).encode()
    pipe.write(_LENGTHS.pack(len(encoded), len(body)) + encoded)
    pipe.write(body)
    pipe.flush()


def receive(pipe: IO[bytes]) -> tuple[dict[str, Any], bytes]:
    """Read one message; blocks.

    Raises
    ------
    EOFError
        The other end has closed.
    """
    lengths = pipe.read(_LENGTHS.size)
    if len(lengths) < _LENGTHS.size:
        raise EOFError("the other end of the pipe was closed")
    head, body = _LENGTHS.unpack(lengths)
    message: dict[str, Any] = json.loads(pipe.read(head))
    return message, pipe.read(body)
