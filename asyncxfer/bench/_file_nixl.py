"""Real NIXL between memory and a file: its POSIX plug-in, by libaio or by io_uring, prepared as far as it can be.

Both descriptor lists and the request are prepared before the clock starts; the clock runs from ``transfer`` until
``check_xfer_state`` says DONE, polled without pause, because nothing else moves its queue on.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ._file_side import FileSide, aligned

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ._file_cases import FileCase
    from ._shapes import Rows

__all__ = ["NixlFileSide", "Queue"]

Queue = Literal["aio", "uring"]

_OPERATIONS = {"put": "WRITE", "get": "READ"}
_PLUGIN = "POSIX"


class NixlFileSide(FileSide):
    """A ``nixl_agent`` with the POSIX plug-in.

    Parameters
    ----------
    queue : {"aio", "uring"}
    """

    def __init__(self, queue: Queue) -> None:
        api: Any = importlib.import_module("nixl._api")
        self._agent: Any = api.nixl_agent("bench", api.nixl_agent_config(enable_prog_thread=False, backends=[]))
        modes = {f"use_{mode}": str(mode == queue).lower() for mode in ("aio", "uring")}
        self._agent.create_backend(_PLUGIN, modes)
        self._queue = queue
        self._memory_array = aligned(0)
        self._files: dict[str, int] = {}
        self._registrations: list[Any] = []
        self._prepared: list[Any] = []

    async def open(self, nbytes: int, path: str, file_bytes: int, ways: list[str]) -> NDArray[np.uint8]:
        self._memory_array = aligned(nbytes)
        self._register([(self._memory_array.ctypes.data, nbytes, 0, "")], "DRAM")
        for way in ways:
            self._files[way] = os.open(path, os.O_RDWR | (os.O_DIRECT if way == "direct" else 0))
            self._register([(0, file_bytes, self._files[way], "")], "FILE")
        return self._memory_array

    def _register(self, rows: list[tuple[int, int, int, str]], kind: str) -> None:
        self._registrations.append(self._agent.register_memory(rows, kind, backends=[_PLUGIN]))

    async def prepare(self, case: FileCase) -> str:
        here = _rows(self._memory_array.ctypes.data, 0, *case.memory_rows())
        there = _rows(0, self._files[case.way], *case.file_rows())
        local = self._agent.prep_xfer_dlist("", here, "DRAM", backends=[_PLUGIN])
        remote = self._agent.prep_xfer_dlist(self._agent.name, there, "FILE", backends=[_PLUGIN])
        every = np.arange(case.shape.count, dtype=np.int32)
        operation = _OPERATIONS[case.op]
        request = self._agent.make_prepped_xfer(operation, local, every, remote, every, backends=[_PLUGIN])
        self._prepared = [request, local, remote]
        return f"POSIX, {self._queue}"

    async def move(self, repeats: int) -> None:
        request, post, check = self._prepared[0], self._agent.transfer, self._agent.check_xfer_state
        for _ in range(repeats):
            state = post(request)
            while state == "PROC":
                state = check(request)
            if state != "DONE":
                raise RuntimeError(f"NIXL ended a transfer in state {state}")

    async def release(self) -> None:
        if self._prepared:
            request, *lists = self._prepared
            self._prepared = []
            self._agent.release_xfer_handle(request)
            for prepared in lists:
                self._agent.release_dlist_handle(prepared)

    async def close(self) -> None:
        await self.release()
        for registration in self._registrations:
            self._agent.deregister_memory(registration, backends=[_PLUGIN])
        for fd in self._files.values():
            os.close(fd)


def _rows(start: int, device: int, offsets: Rows, lengths: Rows) -> Rows:
    """Rows of address or offset, length, and device or descriptor, as ``prep_xfer_dlist`` takes them."""
    return np.column_stack((offsets + np.uint64(start), lengths, np.full_like(offsets, device)))
