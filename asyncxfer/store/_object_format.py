"""Blocks as objects: how they are named, and what stands behind a block's bytes. Nothing here asks a store.

::

    store                 what the store is: version, bytes a block
    5f/6b6579             the block of a key of up to 32 bytes, in hexadecimal
    c3/2ca5...d1.sha256   the block of a longer key, by its SHA-256

The first part, of which there are 256, is the lowest byte of the name's CRC32C: stores spread load by the beginnings of
keys. An object is the block and a trailer of 64 bytes, which says whose block it is and what its checksum is. Numbers
are little-endian.
"""

from __future__ import annotations

import struct
from typing import Final

from asyncxfer._fast.crc32c import crc32c

from ._errors import StoreFormatError

__all__ = [
    "HEAD_BYTES",
    "HEAD_NAME",
    "IDENT_BYTES",
    "TRAILER_BYTES",
    "decode_head",
    "encode_head",
    "name_of",
    "trailer",
]

VERSION = 1
HEAD_NAME: Final = "store"
HEAD_BYTES: Final = 64
TRAILER_BYTES: Final = 64
IDENT_BYTES: Final = 40  # of a key as the index takes it
_LONG = 33
_HEAD_MAGIC, _BLOCK_MAGIC = b"AXFOBJS\0", b"AXFB"
_HEAD = struct.Struct("<8sIIQ36x")  # magic, version, bytes of this head, bytes a block
_TRAILER = struct.Struct("<4sHBxIQ32s8x")  # magic, version, bytes of the key, CRC32C and bytes of the block, key
_CHECK = struct.Struct("<I")


def encode_head(block_bytes: int) -> bytes:
    """Give the object `store`."""
    return _checked(_HEAD.pack(_HEAD_MAGIC, VERSION, HEAD_BYTES, block_bytes))


def decode_head(url: str, data: bytes) -> int:
    """Read the object `store`; bytes of a block.

    Raises
    ------
    StoreFormatError
    """
    if len(data) != HEAD_BYTES or data[:8] != _HEAD_MAGIC:
        raise StoreFormatError(f"{url}{HEAD_NAME} is not the head of a store; give the store a prefix of its own")
    _, version, _, block_bytes = _HEAD.unpack_from(data)
    if version != VERSION:
        raise StoreFormatError(f"{url} is of version {version} of the format; this asyncxfer reads version {VERSION}")
    if data != _checked(data[:-4]) or not block_bytes:
        raise StoreFormatError(f"{url}{HEAD_NAME} is damaged: its checksum does not fit")
    return int(block_bytes)


def name_of(ident: bytes) -> str:
    """Name the object of a key, as the index takes keys: its bytes, filled up to 32, and their number."""
    length = ident[32]
    name = ident[:32].hex() + ".sha256" if length == _LONG else ident[:length].hex()
    return f"{crc32c(name.encode()) & 0xFF:02x}/{name}"


def trailer(ident: bytes, block_bytes: int, checksum: int) -> bytes:
    """Give what stands behind a block in its object."""
    return _checked(_TRAILER.pack(_BLOCK_MAGIC, VERSION, ident[32], checksum, block_bytes, ident[:32]))


def _checked(data: bytes) -> bytes:
    return data + _CHECK.pack(crc32c(data))
