"""Plain azure-storage-blob between memory and blobs, by its asynchronous clients, several requests a large blob.

It puts bytes only, so that memory is copied, and writes what a get brings to a stream, which is the memory.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from ._file_side import UnavailableError
from ._object_azure import AzureAt
from ._object_side import ObjectSide, rows_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import numpy as np
    from numpy.typing import NDArray

    from ._object_cases import ObjectCase
    from ._object_store import StoreAt

__all__ = ["AzureSdkSide"]

_AT_ONCE = 8  # requests a blob


class AzureSdkSide(ObjectSide):
    """One client of a container."""

    def __init__(self) -> None:
        self._moves: list[Callable[[], Awaitable[None]]] = []
        self._client: Any = None

    async def open(self, memory: NDArray[np.uint8], store: StoreAt) -> None:
        assert isinstance(store, AzureAt)
        if importlib.util.find_spec("aiohttp") is None:
            raise UnavailableError("its asynchronous clients need aiohttp, which is not installed; pip install aiohttp")
        blob: Any = importlib.import_module("azure.storage.blob.aio")
        more = {} if store.ca is None else {"connection_verify": store.ca}
        self._client = blob.ContainerClient.from_connection_string(store.connection_string, store.bucket, **more)
        self._prefix, self._whole = store.prefix, memory

    async def prepare(self, case: ObjectCase) -> str:
        move = self._put if case.op == "put" else self._get
        rows = zip(case.keys(), rows_of(self._whole, case), strict=True)
        self._moves = [lambda key=key, row=row: move(self._prefix + key, row) for key, row in rows]  # type: ignore[misc]
        return "aiohttp"

    async def _put(self, key: str, row: NDArray[np.uint8]) -> None:
        await self._client.upload_blob(key, row.tobytes(), overwrite=True, max_concurrency=_AT_ONCE)

    async def _get(self, key: str, row: NDArray[np.uint8]) -> None:
        answer = await self._client.download_blob(key, max_concurrency=_AT_ONCE)
        await answer.readinto(_Row(row.data))

    async def move(self, repeats: int) -> None:
        for _ in range(repeats):
            await asyncio.gather(*(move() for move in self._moves))

    async def release(self) -> None:
        self._moves = []

    async def close(self) -> None:
        await self.release()
        if self._client is not None:
            await self._client.close()


class _Row:
    """Memory as a stream that is written."""

    def __init__(self, into: memoryview) -> None:
        self._into = into
        self._at = 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, at: int) -> int:
        self._at = at
        return at

    def write(self, data: bytes) -> int:
        self._into[self._at : self._at + len(data)] = data
        self._at += len(data)
        return len(data)
