"""A shared library that only says which others to load: it lets files be found under a name that they do not carry.

It owns the few hundred bytes of ELF of such a library, which exists in memory only. The dynamic loader knows a loaded
library by its soname; a library that is named here needs the files that it is made from, so who needs the name
gets their symbols, in their own scope. It does not know what the files are.

References
----------
System V ABI, chapters 4 (object files) and 5 (dynamic linking); ``elf.h`` has the numbers.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable
from pathlib import Path

__all__ = ["load_as"]

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_ENTRY = struct.Struct("<QQ")
_SYMBOL_BYTES = 24
_IDENT = b"\x7fELF\x02\x01"  # 64 bits, little-endian: what wheels exist for
_PAGE = 0x10000  # the largest that a supported machine has
_ET_DYN = 3
_PT_LOAD, _PT_DYNAMIC, _PT_GNU_STACK = 1, 2, 0x6474E551
_DT_NEEDED, _DT_STRTAB, _DT_SYMTAB, _DT_STRSZ, _DT_SYMENT, _DT_SONAME = 1, 5, 6, 10, 11, 14
_READ_WRITE = 6


def load_as(soname: str, files: Iterable[Path]) -> None:
    """Load files, together and for good, so that who needs `soname` from now on gets them.

    Parameters
    ----------
    soname : str
    files : iterable of Path
        They are loaded before any of them is linked, so they may need each other in a circle.

    Raises
    ------
    OSError
        One of them cannot be loaded; the message is the dynamic loader's.
    """
    paths = [path.absolute() for path in files]
    fd = os.memfd_create(soname)
    try:
        os.write(fd, _library(soname, paths))
        ctypes.CDLL(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def _library(soname: str, files: Iterable[Path]) -> bytes:
    strings = bytearray(1)
    entries = [(_DT_SONAME, _add(strings, soname.encode()))]
    machine = 0
    for path in files:
        machine = _machine(path)
        entries.append((_DT_NEEDED, _add(strings, os.fsencode(path))))
    dynamic_at = _HEADER.size + 3 * _SEGMENT.size
    dynamic_bytes = (len(entries) + 5) * _ENTRY.size  # four more and the end
    symbols_at = dynamic_at + dynamic_bytes
    strings_at = symbols_at + _SYMBOL_BYTES
    size = strings_at + len(strings)
    entries += [
        (_DT_STRTAB, strings_at),
        (_DT_STRSZ, len(strings)),
        (_DT_SYMTAB, symbols_at),
        (_DT_SYMENT, _SYMBOL_BYTES),
        (0, 0),
    ]
    return b"".join(
        (
            _HEADER.pack(
                _IDENT + b"\x01", _ET_DYN, machine, 1, 0, _HEADER.size, 0, 0, _HEADER.size, _SEGMENT.size, 3, 0, 0, 0
            ),
            _SEGMENT.pack(_PT_LOAD, _READ_WRITE, 0, 0, 0, size, size, _PAGE),
            _SEGMENT.pack(
                _PT_DYNAMIC, _READ_WRITE, dynamic_at, dynamic_at, dynamic_at, dynamic_bytes, dynamic_bytes, 8
            ),
            _SEGMENT.pack(_PT_GNU_STACK, _READ_WRITE, 0, 0, 0, 0, 0, 16),  # or the stack would become executable
            *(_ENTRY.pack(*entry) for entry in entries),
            bytes(_SYMBOL_BYTES),  # the symbol 0, which every table has
            strings,
        )
    )


def _add(strings: bytearray, text: bytes) -> int:
    at = len(strings)
    strings += text + b"\0"
    return at


def _machine(path: Path) -> int:
    """For which machine a library is."""
    with path.open("rb") as file:
        head = file.read(20)
    if len(head) < 20 or not head.startswith(_IDENT):
        raise OSError(f"{path} is not a shared library of a 64-bit little-endian machine")
    return int.from_bytes(head[18:20], "little")
