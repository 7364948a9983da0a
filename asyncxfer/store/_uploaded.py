"""A note of which blocks of a store on disk are objects too: a file in its directory, ``uploaded``.

Blocks are named by the sequence of the record that made them what they are, which no other block of a store ever has.
What a note does not speak of is put among the objects once more, which changes nothing; so a note may be lost, torn or
late, and is never synced. It must only not speak of what is no object: it is written anew whenever the store is opened,
with none but blocks that are there.

The file is a head of 64 bytes (magic, version, the identity of the store on disk, what the URL of the objects hashes
to, CRC32C) and then pieces: magic, how many sequences, their CRC32C, the sequences, of 8 bytes each. All of it is
little-endian. All functions block.
"""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path

import numpy as np

from asyncxfer._fast.blockindex import Uint64s
from asyncxfer._fast.crc32c import crc32c

__all__ = ["Uploaded"]

NAME = "uploaded"
_MAGIC, _PIECE_MAGIC = b"AXFUPLD\0", b"AXFU"
_HEAD = struct.Struct("<8sI16s32s")
_PIECE = struct.Struct("<4sII")
_CHECK = struct.Struct("<I")
_MOST = 65_536  # sequences of a piece


class Uploaded:
    """The note of one store.

    Parameters
    ----------
    directory : Path
    identity : bytes
        Of the store on disk.
    url : str
        Of the objects.
    """

    def __init__(self, directory: Path, identity: bytes, url: str) -> None:
        self._path = directory / NAME
        head = _HEAD.pack(_MAGIC, 1, identity, hashlib.sha256(url.encode()).digest())
        self._head = head + _CHECK.pack(crc32c(head))
        self._fd = -1
        self.count = 0

    def read(self) -> Uint64s:
        """Give the sequences of blocks that were objects; none where the file speaks of other stores."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            data = b""
        found, at = [], len(self._head)
        while data.startswith(self._head) and at + _PIECE.size <= len(data):
            magic, count, check = _PIECE.unpack_from(data, at)
            body = data[at + _PIECE.size : at + _PIECE.size + 8 * count]
            if magic != _PIECE_MAGIC or not 0 < count <= _MOST or len(body) < 8 * count or check != crc32c(body):
                break
            found.append(np.frombuffer(body, "<u8"))
            at += _PIECE.size + 8 * count
        return np.concatenate(found) if found else np.empty(0, np.uint64)

    def write(self, sequences: Uint64s) -> None:
        """Begin the file anew, with these.

        Raises
        ------
        OSError
        """
        aside = self._path.with_name(f"{NAME}.new")
        fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
        try:
            _write_all(fd, self._head)
            for start in range(0, len(sequences), _MOST):
                _write_all(fd, _piece(sequences[start : start + _MOST]))
            os.rename(aside, self._path)
        except BaseException:
            os.close(fd)
            raise
        self.close()
        self._fd = fd
        self.count = len(sequences)

    def append(self, sequences: Uint64s) -> None:
        """Add some.

        Raises
        ------
        OSError
        """
        _write_all(self._fd, _piece(sequences))
        self.count += len(sequences)

    def close(self) -> None:
        """Let go of the file."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _piece(sequences: Uint64s) -> bytes:
    body = sequences.astype("<u8").tobytes()
    return _PIECE.pack(_PIECE_MAGIC, len(sequences), crc32c(body)) + body


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
