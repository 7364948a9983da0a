"""The writer's journal and its snapshots: what is appended, synced, begun anew. Every call here may block.

A journal grows ahead of what is written to it, so that a disk that others fill leaves room to say that a block was
given up. What could not be written whole is taken back: behind the last record there are only zeros. It does not know
what the records say.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Literal, TypeAlias

from asyncxfer._fast.blockindex import RECORD_BYTES

from ._errors import StoreError, StoreFullError
from ._format import (
    HEAD_BYTES,
    JOURNAL,
    SNAPSHOT,
    Identity,
    journal_name,
    salt_of,
    snapshot_name,
    sync_directory,
    write_head,
)

__all__ = ["PIECE_BYTES", "Durability", "Journal", "Snapshot", "sync_file"]

Durability: TypeAlias = Literal["none", "data", "full"]

PIECE_BYTES = 64 * 1024  # of records in one write; a reader relies on it
_AHEAD_BYTES = 1024 * 1024


def sync_file(fd: int, durability: Durability) -> None:
    """Have what was written to a file reach the device, as far as was asked for."""
    if durability == "data":
        os.fdatasync(fd)
    elif durability == "full":
        os.fsync(fd)


class Journal:
    """A journal that is written to.

    Attributes
    ----------
    generation : int
    salt : int
        Of the checksums of its records.
    end : int, bytes
        Where the next record goes.
    """

    def __init__(self, directory: Path, identity: Identity, generation: int, fd: int, end: int) -> None:
        self.path = directory / journal_name(generation)
        self.generation = generation
        self.salt = salt_of(JOURNAL, identity, generation)
        self.end = end
        self.fd = fd

    @classmethod
    def create(cls, directory: Path, identity: Identity, generation: int, durability: Durability) -> Journal:
        """Begin a journal with nothing in it.

        Raises
        ------
        OSError
        """
        path = directory / journal_name(generation)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            _write(fd, write_head(JOURNAL, identity, generation), 0)
            journal = cls(directory, identity, generation, fd, HEAD_BYTES)
            journal._reserve()
            if durability != "none":
                os.fsync(fd)
                sync_directory(directory)
        except BaseException:
            os.close(fd)
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        return journal

    @classmethod
    def resume(cls, directory: Path, identity: Identity, generation: int, end: int) -> Journal:
        """Go on behind the last good record of a journal; what lay behind it is cut off.

        Raises
        ------
        OSError
        """
        fd = os.open(directory / journal_name(generation), os.O_RDWR)
        try:
            journal = cls(directory, identity, generation, fd, end)
            os.ftruncate(fd, end)
            with contextlib.suppress(OSError):  # a full disk: it is written to without room ahead
                journal._reserve()
        except BaseException:
            os.close(fd)
            raise
        return journal

    def _reserve(self) -> None:
        os.posix_fallocate(self.fd, self.end, _AHEAD_BYTES)

    def append(self, records: bytes | bytearray, *, essential: bool = False) -> None:
        """Write records behind the last one, all or none of them.

        Parameters
        ----------
        records : bytes
        essential : bool
            They give up blocks, and may use the room that was kept for that.

        Raises
        ------
        StoreFullError
            The disk is full.
        StoreError
            The file cannot be written.
        """
        at = self.end
        try:
            if os.fstat(self.fd).st_size < at + len(records) + _AHEAD_BYTES // 2:
                self._grow(at + len(records), essential=essential)
            with memoryview(records) as view:
                for start in range(0, len(view), PIECE_BYTES):
                    at += _write(self.fd, view[start : start + PIECE_BYTES], at)
        except OSError as error:
            try:
                self._take_back()
            except OSError as another:
                raise StoreError(
                    f"{self.path} cannot be written: {error.strerror}; nor can half of it be taken back: "
                    f"{another.strerror}"
                ) from error
            raise _failed(self.path, error) from error
        self.end = at

    def _grow(self, end: int, *, essential: bool) -> None:
        try:
            os.posix_fallocate(self.fd, self.end, end - self.end + _AHEAD_BYTES)
        except OSError:
            if not essential:
                raise

    def _take_back(self) -> None:
        size = os.fstat(self.fd).st_size
        try:
            zeros = bytes(PIECE_BYTES)
            for at in range(self.end, size, PIECE_BYTES):
                _write(self.fd, zeros[: min(PIECE_BYTES, size - at)], at)
        except OSError:
            os.ftruncate(self.fd, self.end)

    def sync(self, durability: Durability) -> None:
        """Have the records reach the device, as far as was asked for.

        Raises
        ------
        StoreError
            The device did not take them. Which of them it has is not known any more.
        """
        try:
            sync_file(self.fd, durability)
        except OSError as error:
            raise StoreError(f"{self.path} cannot be synced: {error.strerror}") from error

    def close(self) -> None:
        """Close the file, without what was kept ahead."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):  # whoever opens it next cuts it off
                os.ftruncate(fd, self.end)
            os.close(fd)


class Snapshot:
    """A snapshot that is being written aside; it counts from `finish` on."""

    def __init__(self, directory: Path, identity: Identity, generation: int) -> None:
        self.generation = generation
        self.salt = salt_of(SNAPSHOT, identity, generation)
        self._directory = directory
        self._identity = identity
        self._path = directory / snapshot_name(generation)
        self._aside = self._path.with_name(self._path.name + ".new")
        self._end = HEAD_BYTES
        self._fd = os.open(self._aside, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)

    def write(self, records: bytes | bytearray) -> None:
        """Add records.

        Raises
        ------
        StoreError
        """
        try:
            self._end += _write(self._fd, records, self._end)
        except OSError as error:
            raise _failed(self._aside, error) from error

    def finish(self) -> None:
        """Put it in its place, on the device.

        Raises
        ------
        StoreError
        """
        count = (self._end - HEAD_BYTES) // RECORD_BYTES
        try:
            _write(self._fd, write_head(SNAPSHOT, self._identity, self.generation, count), 0)
            os.fsync(self._fd)
            self._close()
            os.rename(self._aside, self._path)
            sync_directory(self._directory)
        except OSError as error:
            raise _failed(self._aside, error) from error

    def abandon(self) -> None:
        """Remove what there is of it."""
        self._close()
        with contextlib.suppress(OSError):
            self._aside.unlink()

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _write(fd: int, data: bytes | bytearray | memoryview, at: int) -> int:
    """Write all of it; how many bytes that were."""
    with memoryview(data) as view:
        done = 0
        while done < len(view):
            done += os.pwrite(fd, view[done:], at + done)
        return done


def _failed(path: Path, error: OSError) -> StoreError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreFullError(
            f"{path} cannot grow: {error.strerror}; what was acknowledged is kept. Free space on that file system, or "
            "open the store with a smaller budget"
        )
    return StoreError(f"{path} cannot be written: {error.strerror}; what was acknowledged before is kept")
