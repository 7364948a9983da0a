"""The files of a store: their names and heads. What stands in them, the records, is `_fast.blockindex`'s.

::

    store                 what the store is: version, identity, bytes a block, blocks a slab
    lock                  held by the writer
    slab-00000000 ...     blocks, nothing else: block k of slab s is number s * blocks a slab + k
    snapshot-G            records of all that was held when journal G began, or later
    journal-G             records since, in order; journal G + 1 goes on where it ends

Numbers are little-endian. Each head has a checksum, and the checksum of each record begins with a salt made of the
store's identity and the file's kind and number, so that no record counts in a file that it was not written to.
Nothing here keeps a file open.
"""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from asyncxfer._fast.crc32c import crc32c

from ._errors import StoreFormatError

__all__ = [
    "HEAD_BYTES",
    "JOURNAL",
    "SNAPSHOT",
    "Identity",
    "boot_id",
    "generations",
    "journal_name",
    "read_head",
    "salt_of",
    "slab_name",
    "slabs_of",
    "snapshot_name",
    "sync_directory",
    "write_head",
]

VERSION = 1
HEAD_BYTES = 64
JOURNAL, SNAPSHOT = b"AXFJRNL\0", b"AXFSNAP\0"
_STORE = b"AXFSTORE"
_IDENTITY = struct.Struct("<8sII16sQI16x")  # magic, version, bytes of this head, identity, bytes a block, blocks a slab
_HEAD = struct.Struct("<8sII16sQQ12x")  # magic, version, bytes a record, identity, generation, records of a snapshot
_CHECK = struct.Struct("<I")
_FILE = re.compile(r"(journal|snapshot)-([0-9a-f]{16})(\.new)?")
_SLAB = re.compile(r"slab-([0-9a-f]{8})")


@dataclass(frozen=True, slots=True)
class Identity:
    """What a store is from its first day on."""

    id: bytes  # 16
    block_bytes: int
    slab_blocks: int

    def encode(self) -> bytes:
        """Give the file `store`."""
        return _checked(_IDENTITY.pack(_STORE, VERSION, HEAD_BYTES, self.id, self.block_bytes, self.slab_blocks))

    @classmethod
    def decode(cls, path: Path, data: bytes) -> Identity:
        """Read the file `store`.

        Raises
        ------
        StoreFormatError
        """
        if len(data) < HEAD_BYTES or data[:8] != _STORE:
            raise StoreFormatError(f"{path} is not the head of a store")
        _, version, _, identity, block_bytes, slab_blocks = _IDENTITY.unpack_from(data)
        if version != VERSION:
            raise StoreFormatError(
                f"{path} is of version {version} of the format; this asyncxfer reads version {VERSION}"
            )
        if not _is_checked(data) or not block_bytes or not slab_blocks:
            raise StoreFormatError(f"{path} is damaged: its checksum does not fit")
        return cls(identity, block_bytes, slab_blocks)

    @property
    def slab_bytes(self) -> int:
        """Bytes of a slab."""
        return self.block_bytes * self.slab_blocks


def _checked(head: bytes) -> bytes:
    return head + _CHECK.pack(crc32c(head))


def _is_checked(head: bytes) -> bool:
    (check,) = _CHECK.unpack_from(head, HEAD_BYTES - 4)
    return bool(check == crc32c(head[: HEAD_BYTES - 4]))


def write_head(kind: bytes, identity: Identity, generation: int, count: int = 0) -> bytes:
    """Give the head of a journal or a snapshot."""
    return _checked(_HEAD.pack(kind, VERSION, HEAD_BYTES, identity.id, generation, count))


def read_head(kind: bytes, identity: Identity, generation: int, data: bytes) -> int | None:
    """Give how many records the head of a file speaks of; None where it is not the head of that file."""
    if len(data) < HEAD_BYTES or not _is_checked(data[:HEAD_BYTES]):
        return None
    found, version, record_bytes, owner, number, count = _HEAD.unpack_from(data)
    expected = (kind, VERSION, HEAD_BYTES, identity.id, generation)
    return int(count) if (found, version, record_bytes, owner, number) == expected else None


def salt_of(kind: bytes, identity: Identity, generation: int) -> int:
    """Give what the checksums of a file's records begin with."""
    return crc32c(kind + identity.id + generation.to_bytes(8, "little"))


def journal_name(generation: int) -> str:
    """Name a journal."""
    return f"journal-{generation:016x}"


def snapshot_name(generation: int) -> str:
    """Name a snapshot."""
    return f"snapshot-{generation:016x}"


def slab_name(number: int) -> str:
    """Name a slab."""
    return f"slab-{number:08x}"


def generations(directory: Path) -> tuple[list[int], list[int], list[str]]:
    """List the generations that have a journal, those that have a snapshot, and the names of unfinished files."""
    journals: list[int] = []
    snapshots: list[int] = []
    unfinished: list[str] = []
    for name in os.listdir(directory):
        found = _FILE.fullmatch(name)
        if name == "store.new" or (found and found[3]):
            unfinished.append(name)
        elif found:
            (journals if found[1] == "journal" else snapshots).append(int(found[2], 16))
    return sorted(journals), sorted(snapshots), sorted(unfinished)


def slabs_of(directory: Path) -> dict[int, int]:
    """Give the bytes of each slab that there is."""
    found = {}
    with os.scandir(directory) as entries:
        for entry in entries:
            name = _SLAB.fullmatch(entry.name)
            if name and entry.is_file():
                found[int(name[1], 16)] = entry.stat().st_size
    return found


def boot_id() -> bytes:
    """Give what is another after each start of the machine: 16 bytes."""
    text = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    return bytes.fromhex(text.replace("-", "").strip())


def sync_directory(directory: Path) -> None:
    """Have the names in a directory reach the device."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
