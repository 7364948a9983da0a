"""KvikIO between host memory and a file: one `pread` or `pwrite` a row, all posted before the first is awaited.

It is what its Python API offers for many rows. Its compatibility mode is what moves host memory, and it wants
``libcuda.so.1`` even so.
"""

from __future__ import annotations

import contextlib
import importlib
from typing import TYPE_CHECKING, Any

from ._file_side import FileSide, UnavailableError, aligned

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ._file_cases import FileCase

__all__ = ["KvikioFileSide"]

_DIRECT = ("auto_direct_io_read", "auto_direct_io_write")


class KvikioFileSide(FileSide):
    """KvikIO with its default settings, but for direct transfers."""

    def __init__(self) -> None:
        self._defaults: Any = None
        self._memory_array = aligned(0)
        self._files: dict[str, Any] = {}
        self._rows: list[tuple[NDArray[np.uint8], int]] = []
        self._post: Any = None
        self._settings = contextlib.ExitStack()

    async def open(self, nbytes: int, path: str, file_bytes: int, ways: list[str]) -> NDArray[np.uint8]:
        self._memory_array = aligned(nbytes)
        try:
            kvikio = importlib.import_module("kvikio")
            self._defaults = importlib.import_module("kvikio.defaults")
            self._files = {way: kvikio.CuFile(path, "r+") for way in ways}
            for file in self._files.values():
                file.pread(self._memory_array[:1], file_offset=0).get()  # without what it needs it fails here
        except (ImportError, OSError, RuntimeError) as error:
            raise UnavailableError(str(error)) from error
        return self._memory_array

    async def prepare(self, case: FileCase) -> str:
        direct = dict.fromkeys(_DIRECT, case.way == "direct")
        self._settings.enter_context(self._defaults.set(direct))
        file = self._files[case.way]
        self._post = file.pwrite if case.op == "put" else file.pread
        length, (here, _), (there, _) = case.shape.length, case.memory_rows(), case.file_rows()
        rows = zip(here.tolist(), there.tolist(), strict=True)
        self._rows = [(self._memory_array[at : at + length], offset) for at, offset in rows]
        return "POSIX"

    async def move(self, repeats: int) -> None:
        post = self._post
        for _ in range(repeats):
            futures = [post(row, file_offset=offset) for row, offset in self._rows]
            for future, (row, offset) in zip(futures, self._rows, strict=True):
                if future.get() != len(row):
                    raise RuntimeError(f"KvikIO moved less than {len(row)} bytes at offset {offset}")

    async def release(self) -> None:
        self._rows, self._post = [], None
        self._settings.close()

    async def close(self) -> None:
        await self.release()
        for file in self._files.values():
            file.close()
