"""Files that bytes are moved to and from: opened, sized, synced and closed here, and described as memory.

A file region is memory of the kind FILE with one segment that begins at address 0, so that the offset of a row is its
offset in the file. Owns the descriptors, what has to be asked of the file system, and the words for what can go wrong
with a file; how rows get in and out is the business of backends. Every call here may block, and is made in a thread.
"""

from __future__ import annotations

import ctypes
import errno
import math
import operator
import os
import re
import stat
import struct
import threading
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args
from urllib.parse import unquote, urlsplit

from ._arrays import element
from ._descriptors import MemoryKind
from ._errors import ConfigError, RegistrationError
from ._layout import Layout
from ._memory import Memory, Segment

__all__ = ["Durability", "File", "FileMode", "open_file"]

FileMode: TypeAlias = Literal["r", "r+", "w"]
Durability: TypeAlias = Literal["none", "data", "full"]

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_ALIGNMENT = 4096  # what any file system and device takes
_AT_EMPTY_PATH, _STATX_DIOALIGN = 0x1000, 0x2000  # linux/fcntl.h, linux/stat.h


class File:
    """An open file, owned: closed by `close`, or when the last reference goes.

    Attributes
    ----------
    path : str
        Absolute, for messages.
    fd : int
        For rows of any alignment, through the page cache; -1 once closed.
    direct_fd : int
        The same file, past the page cache; -1 where that was not asked for, or the file system has no such way.
    nbytes : int, bytes
        As it was when it was opened. It may shrink under a transfer: others can truncate it.
    readonly : bool
    durability : {"none", "data", "full"}
        What the end of a put stands for: the bytes can be read back; fdatasync; fsync.
    alignment : int, bytes
        Of offsets and lengths that go through `direct_fd`.
    memory_alignment : int, bytes
        Of addresses in memory for it.
    new : bool
        It was made by opening it, and its name may be gone after a loss of power: no `sync` since.
    """

    def __init__(self, path: str, fd: int, *, readonly: bool, durability: Durability, new: bool = False) -> None:
        self.path = path
        self.fd = fd
        self.direct_fd = -1
        self.nbytes = 0
        self.readonly = readonly
        self.durability = durability
        self.alignment = self.memory_alignment = 1
        self.new = new
        self._identity = _identity(fd)
        self._lock = threading.Lock()  # a descriptor is not closed under a sync

    def sync(self) -> None:
        """Have everything that was written reach the device, and with a new file its name.

        Raises
        ------
        OSError
        """
        with self._lock:
            os.fsync(self.fd)
            if self.new:
                _sync_directory(self.path)
                self.new = False

    def close(self) -> None:
        """Close the descriptors; again does nothing.

        Raises
        ------
        OSError
            The file system had kept bytes back, and could not write them; or the descriptor was closed by others.
        """
        with self._lock:
            fds = [fd for fd in (self.direct_fd, self.fd) if fd >= 0]
            self.direct_fd = self.fd = -1
        errors = [error for fd in fds if (error := self._close(fd)) is not None]
        if errors:
            raise errors[-1]

    def _close(self, fd: int) -> OSError | None:
        try:
            if _identity(fd) != self._identity:  # others closed it, and the number is theirs now
                return OSError(errno.EBADF, os.strerror(errno.EBADF))
            os.close(fd)
        except OSError as error:
            return error
        return None

    def __del__(self) -> None:
        for fd in (self.direct_fd, self.fd):
            if fd >= 0:
                self._close(fd)

    def too_short(self, offset: int, expected: int, found: int) -> EOFError:
        """What a backend fails a transfer with when the file ends before the rows do.

        Parameters
        ----------
        offset : int, bytes
            Where the piece begins in the file.
        expected, found : int, bytes
            Its length, and how much of it there was.
        """
        return EOFError(
            f"{self.path}: {expected:,} bytes expected at offset {offset:,}, {found:,} found: the file is shorter than "
            "the descriptors ask for"
        )

    def failed(self, op: Literal["read", "write", "sync"], error: int, *, offset: int = 0, nbytes: int = 0) -> OSError:
        """What a backend fails a transfer with when the system refuses.

        Parameters
        ----------
        op : {"read", "write", "sync"}
        error : int
            The number of it (errno).
        offset, nbytes : int, bytes
            The piece of the file that it was about.
        """
        what = "sync" if op == "sync" else f"{op} of {nbytes:,} bytes at offset {offset:,}"
        return OSError(error, f"{os.strerror(error)} ({what})", self.path)

    def __repr__(self) -> str:
        return f"<File {self.path!r}, {self.nbytes} bytes, {'read-only' if self.readonly else 'writable'}>"


def open_file(
    url: str | os.PathLike[str], mode: FileMode, *, size: int | None = None,
    shape: int | Sequence[int] | None = None, dtype: object = None, direct: bool = False,
    durability: Durability = "none",
) -> Memory:  # fmt: skip
    """Open a file and describe it as memory, whose `owner` is the `File`.

    Parameters
    ----------
    url : str or path
        A path, or ``file://``.
    mode : {"r", "r+", "w"}
        Read; read and write what exists; create or resize, then read and write.
    size : int or None, bytes
        None: what `shape` takes, else the whole file.
    shape : int, tuple of int, or None
        None: one dimension.
    dtype : data type or None
        None: bytes.
    direct : bool
        Past the page cache where rows are aligned.
    durability : {"none", "data", "full"}
        What the end of a put stands for.

    Raises
    ------
    ConfigError
        There is no such mode, durability or scheme.
    RegistrationError
        The file cannot be opened or is too short, or the numbers do not fit each other.
    """
    _check_word("mode", mode, FileMode)
    _check_word("durability", durability, Durability)
    path = _local_path(url)
    name, itemsize = element("uint8" if dtype is None else dtype)
    dims = None if shape is None else _dimensions(shape)
    wanted = _wanted(path, size, dims, itemsize)
    if mode == "w" and wanted is None:
        raise RegistrationError(f"{path}: mode 'w' needs size= or shape=, which say how long the file is to be")
    if wanted is not None:
        _check_whole(path, wanted, name, itemsize)  # before anything is done to the file
    file = _open(path, mode, durability)
    try:
        _prepare(file, mode, wanted, direct=direct)
        nbytes = file.nbytes if wanted is None else wanted
        _check_whole(path, nbytes, name, itemsize)
    except BaseException:
        file.close()
        raise
    layout = Layout.of((nbytes // itemsize,) if dims is None else dims, itemsize)
    return Memory(file, MemoryKind.FILE, 0, (Segment(0, nbytes),), layout, name, file.readonly)


# ---- what was asked for -------------------------------------------------------------------------------------------


def _check_word(what: str, word: object, words: Any) -> None:
    if word not in get_args(words):
        raise ConfigError(f"{what} is {word!r}; expected one of {', '.join(map(repr, get_args(words)))}")


def _check_whole(path: str, nbytes: int, name: str, itemsize: int) -> None:
    if nbytes % itemsize:
        raise RegistrationError(f"{path}: {nbytes:,} bytes are not a multiple of {name}'s {itemsize}; give shape=")


def _local_path(url: str | os.PathLike[str]) -> str:
    """The absolute path that a path or URL names."""
    if not isinstance(url, str | os.PathLike):
        raise ConfigError(f"{url!r} names no file; expected a path or a file:// URL")
    path = os.fsdecode(url)
    if not path or "\0" in path:
        raise ConfigError(f"{path!r} names no file; expected a path or a file:// URL")
    if isinstance(url, str) and _SCHEME.match(path):
        parts = urlsplit(path)
        if parts.scheme != "file":
            raise ConfigError(f"{path!r}: nothing here opens {parts.scheme}://; expected a path or a file:// URL")
        if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
            raise ConfigError(f"{path!r} is no file of this host; expected file:///absolute/path")
        path = unquote(parts.path)
    return os.path.abspath(path)


def _dimensions(shape: int | Sequence[int]) -> tuple[int, ...]:
    try:
        dims = tuple(operator.index(n) for n in (shape if isinstance(shape, Sequence) else (shape,)))
    except TypeError as error:
        raise RegistrationError(f"shape {shape!r} is no tuple of integers: {error}") from error
    if any(n < 0 for n in dims):
        raise RegistrationError(f"shape {dims} has a negative size")
    return dims


def _wanted(path: str, size: int | None, dims: tuple[int, ...] | None, itemsize: int) -> int | None:
    """The bytes that were asked for; None: as many as the file has."""
    needed = None if dims is None else math.prod(dims) * itemsize
    if size is None:
        wanted = needed
    else:
        try:
            wanted = operator.index(size)
        except TypeError as error:
            raise RegistrationError(f"{path}: size {size!r} is no integer") from error
        if needed not in (None, wanted):
            raise RegistrationError(
                f"{path}: size {wanted:,} was asked for, but the shape {dims} takes {needed:,} bytes"
            )
    if wanted is not None and not 0 <= wanted < 2**63:
        raise RegistrationError(f"{path}: a size of {wanted:,} bytes was asked for; expected 0 to {2**63 - 1:,}")
    return wanted


# ---- the file -----------------------------------------------------------------------------------------------------


def _open(path: str, mode: FileMode, durability: Durability) -> File:
    flags = (os.O_RDONLY if mode == "r" else os.O_RDWR) | os.O_NOCTTY | os.O_NONBLOCK  # a pipe may have no writer
    new = False
    try:
        if mode != "w":
            fd = os.open(path, flags)
        else:
            try:
                fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666)
                new = True
            except FileExistsError:
                fd = os.open(path, flags | os.O_CREAT, 0o666)
    except OSError as error:
        raise _unusable(path, mode, error) from error
    return File(path, fd, readonly=mode == "r", durability=durability, new=new)


def _prepare(file: File, mode: FileMode, wanted: int | None, *, direct: bool) -> None:
    """Give a file its size, or find it out."""
    kind = os.fstat(file.fd).st_mode
    if not stat.S_ISREG(kind) and not stat.S_ISBLK(kind):
        raise RegistrationError(f"{file.path} is neither a file nor a block device")
    os.set_blocking(file.fd, True)
    try:
        file.nbytes = os.lseek(file.fd, 0, os.SEEK_END)
        if mode == "w" and stat.S_ISREG(kind) and wanted is not None:
            _resize(file, wanted)
        if file.new and file.durability != "none":
            file.sync()
    except OSError as error:
        raise _unusable(file.path, mode, error) from error
    if wanted is not None and file.nbytes < wanted:
        hint = "; mode 'w' makes a file longer" if stat.S_ISREG(kind) else ""
        raise RegistrationError(f"{file.path} has {file.nbytes:,} bytes, {wanted:,} were asked for{hint}")
    if direct:
        _open_direct(file)


def _resize(file: File, nbytes: int) -> None:
    try:
        os.ftruncate(file.fd, nbytes)
    except OSError:
        if file.new:
            os.unlink(file.path)
        raise
    file.nbytes = nbytes


def _unusable(path: str, mode: FileMode, error: OSError) -> RegistrationError:
    return RegistrationError(f"{path} cannot be opened in mode {mode!r}: {error.strerror}")


def _open_direct(file: File) -> None:
    """Open the same file once more, past the page cache, where its file system has such a way."""
    flags = os.O_RDONLY if file.readonly else os.O_RDWR
    try:
        file.direct_fd = os.open(f"/proc/self/fd/{file.fd}", flags | os.O_DIRECT)
    except OSError:  # no /proc here, or a file system that keeps its files in memory
        return
    file.memory_alignment, file.alignment = _direct_alignment(file.direct_fd)


def _direct_alignment(fd: int) -> tuple[int, int]:
    """What direct transfers have to be aligned to: in memory, and in the file.

    References
    ----------
    statx(2), STATX_DIOALIGN: Linux 6.1 and later.
    """
    statx = getattr(ctypes.CDLL(None), "statx", None)
    told = ctypes.create_string_buffer(256)
    if statx is not None and statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, told) == 0:
        mask, memory, offset = struct.unpack_from("=I148xII", told)
        if mask & _STATX_DIOALIGN and offset:
            return max(memory, 1), offset
    return _ALIGNMENT, _ALIGNMENT


def _sync_directory(path: str) -> None:
    fd = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino
