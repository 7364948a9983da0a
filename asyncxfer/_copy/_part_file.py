"""A file that is being written under a temporary name beside its own, which it gets when it is whole.

Beside a file of several pieces lies a journal of those that are in it, so that a copy that was cut off can go on. The
journal is a claim, not a proof: whoever goes on compares each piece with its checksum. Two processes that copy to one
name are kept apart by a lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Literal

from ._names import PART

__all__ = ["PartFile"]

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)


class PartFile:
    """A file that is not whole yet. All calls may block.

    Parameters
    ----------
    path : str
        Of the file when it is whole.
    mode : int
        Permissions, from which the process's umask takes its part.

    Raises
    ------
    OSError
        The folder cannot be written to, or another process copies to the same name.
    """

    def __init__(self, path: str, *, mode: int = 0o666) -> None:
        self.path = path
        folder, name = os.path.split(path)
        digest = hashlib.blake2b(os.fsencode(name), digest_size=6).hexdigest()
        self.data = os.path.join(folder, f".{name[:40]}.{digest}{PART}")
        self._journal_path = f"{self.data}.json"
        self._journal = -1
        self._fd = self._lock(mode)

    def _lock(self, mode: int) -> int:
        while True:
            fd = os.open(self.data, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(fd), os.lstat(self.data)):
                        return fd
            except BlockingIOError as error:
                os.close(fd)
                raise BlockingIOError(error.errno, "another process is copying to it", self.path) from error
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # the one that had it has just ended

    def begin(self, of: Mapping[str, object], *, resume: bool, journal: bool) -> dict[int, int]:
        """Begin, or go on where a copy of the same was cut off.

        Parameters
        ----------
        of : mapping
            What is copied, in which version, in pieces of which size: all has to be as it was.
        resume : bool
        journal : bool
            Keep a journal.

        Returns
        -------
        dict of int to int
            The CRC64NVME of each piece that is said to be there, by its number.
        """
        done, length = self._read(of) if resume and journal else ({}, 0)
        if not done:
            os.ftruncate(self._fd, 0)
            length = 0
        if journal:
            self._journal = os.open(self._journal_path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            os.ftruncate(self._journal, length)
            os.lseek(self._journal, 0, os.SEEK_END)
            if not done:
                os.write(self._journal, json.dumps(of).encode() + b"\n")
        else:
            self._remove(self._journal_path)
        return done

    def _read(self, of: Mapping[str, object]) -> tuple[dict[int, int], int]:
        """What a journal says, and how much of it is whole."""
        try:
            with open(self._journal_path, "rb") as file:
                text = file.read()
            whole = text.rpartition(b"\n")[0]
            head, *lines = [json.loads(line) for line in whole.split(b"\n")]
            if head != of:
                return {}, 0
            return {int(number): int(crc) for number, crc in lines}, len(whole) + 1
        except (OSError, ValueError, TypeError):
            return {}, 0

    def note(self, number: int, crc: int) -> None:
        """Write into the journal that a piece is there."""
        if self._journal >= 0:
            os.write(self._journal, f"[{number}, {crc}]\n".encode())

    def finish(self, exists: Literal["replace", "keep", "error"]) -> bool:
        """Give it its name; False where there was one that is kept.

        Raises
        ------
        FileExistsError
            There is one, and `exists` is "error".
        OSError
            It cannot be.
        """
        kept = False
        if exists == "replace":
            os.replace(self.data, self.path)
        else:
            try:
                self._link()
            except FileExistsError:
                if exists == "error":
                    raise
                kept = True
            self._remove(self.data)
        self._remove(self._journal_path)
        self._close()
        return not kept

    def _link(self) -> None:
        try:
            os.link(self.data, self.path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if os.path.lexists(self.path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), self.path) from error
            os.rename(self.data, self.path)

    def leave(self, *, keep: bool) -> None:
        """End without it; keep what is there for a later copy that goes on, or let nothing of it be left."""
        if self._fd < 0:
            return
        if not keep:
            self._remove(self.data)
            self._remove(self._journal_path)
        self._close()

    def _close(self) -> None:
        for fd in (self._journal, self._fd):
            if fd >= 0:
                os.close(fd)
        self._journal = self._fd = -1

    @staticmethod
    def _remove(path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
