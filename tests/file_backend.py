"""A third party's backend for files, to show that asyncxfer.abc is enough: a thread that moves piece by piece."""

from __future__ import annotations

import ctypes
import os
from typing import ClassVar

from thread_backend import Job, ThreadBackend

from asyncxfer.abc import (
    BackendError,
    Capabilities,
    Completion,
    Endpoint,
    File,
    Memory,
    MemoryKind,
    PeerInfo,
    Reach,
    Registration,
)

DRAM, FILE = MemoryKind.DRAM, MemoryKind.FILE


class FileBackend(ThreadBackend):
    """Moves between host memory and files, one transfer after the other, in a thread of its own."""

    name: ClassVar[str] = "pieces"
    capabilities: ClassVar[Capabilities] = Capabilities(Reach.PROCESS, frozenset({(DRAM, FILE), (FILE, DRAM)}))

    def register(self, memory: Memory) -> Registration:
        return Registration(memory)

    async def connect(self, peer: PeerInfo) -> Endpoint:
        raise BackendError("files have no peers")

    def _carry_out(self, job: Job, completion: Completion) -> None:
        request = job.request
        local, remote = request.local.memory.owner, request.remote
        assert isinstance(remote, Registration)
        file = local if isinstance(local, File) else remote.memory.owner
        assert isinstance(file, File)
        writes = (request.op == "put") is (file is not local)
        for to, source, nbytes in job.moves:
            if completion.stopping:
                return
            offset, address = (to, source) if writes else (source, to)
            _move(file, offset, address, nbytes, write=writes)
            completion.advance(nbytes)
        if writes and file.durability != "none":
            (os.fsync if file.durability == "full" else os.fdatasync)(file.fd)


def _move(file: File, offset: int, address: int, nbytes: int, *, write: bool) -> None:
    done = 0
    while done < nbytes:
        at, left = offset + done, nbytes - done
        buffer = (ctypes.c_char * left).from_address(address + done)
        try:
            moved = (os.pwritev if write else os.preadv)(_way(file, at, address + done, left), [buffer], at)
        except OSError as error:
            raise file.failed("write" if write else "read", error.errno or 0, offset=at, nbytes=left) from error
        if not moved:
            raise file.too_short(offset, nbytes, done)
        done += moved


def _way(file: File, offset: int, address: int, nbytes: int) -> int:
    aligned = (offset | nbytes) % file.alignment == 0 and address % file.memory_alignment == 0
    return file.direct_fd if file.direct_fd >= 0 and aligned else file.fd
