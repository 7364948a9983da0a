"""obstore between memory and objects, as its asynchronous functions offer it.

It takes memory to put as it lies, and gives bytes of its own for a get, which are copied to where they belong.
"""

from __future__ import annotations

import asyncio
import importlib
from typing import TYPE_CHECKING, Any

from ._object_azure import AzureAt
from ._object_s3 import S3At
from ._object_side import ObjectSide, rows_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import numpy as np
    from numpy.typing import NDArray

    from ._object_cases import ObjectCase
    from ._object_store import StoreAt

__all__ = ["INSTALL", "ObstoreSide"]

INSTALL = "pip install obstore"

_STREAMED = 1 << 20


class ObstoreSide(ObjectSide):
    """An ``obstore`` store with its default settings."""

    async def open(self, memory: NDArray[np.uint8], store: StoreAt) -> None:
        stores: Any = importlib.import_module("obstore.store")
        client = {"allow_http": True}
        if store.ca is not None:
            client["allow_invalid_certificates"] = True  # it takes no authority of one's own
        made = {"prefix": store.prefix.rstrip("/"), "client_options": client}
        self._store: Any = _store(stores, store, made)
        self._whole = memory
        self._moves: list[Callable[[], Awaitable[None]]] = []

    async def prepare(self, case: ObjectCase) -> str:
        get = self._stream if case.shape.length >= _STREAMED else self._get
        move = self._put if case.op == "put" else get
        rows = zip(case.keys(), rows_of(self._whole, case), strict=True)
        self._moves = [lambda key=key, row=row: move(key, row) for key, row in rows]  # type: ignore[misc]
        return "obstore"

    async def _put(self, key: str, row: NDArray[np.uint8]) -> None:
        await self._store.put_async(key, row.data)

    async def _get(self, key: str, row: NDArray[np.uint8]) -> None:
        answer = await self._store.get_async(key)
        row.data[:] = memoryview(await answer.bytes_async())

    async def _stream(self, key: str, row: NDArray[np.uint8]) -> None:
        answer, into, at = await self._store.get_async(key), row.data, 0
        async for piece in answer.stream(min_chunk_size=_STREAMED):
            into[at : at + len(piece)] = memoryview(piece)
            at += len(piece)

    async def move(self, repeats: int) -> None:
        for _ in range(repeats):
            await asyncio.gather(*(move() for move in self._moves))

    async def release(self) -> None:
        self._moves = []

    async def close(self) -> None:
        await self.release()


def _store(stores: Any, store: StoreAt, settings: dict[str, Any]) -> Any:
    """Its own name for where a store is and who asks."""
    settings["endpoint"] = store.endpoint
    if isinstance(store, AzureAt):
        settings |= {"account_name": store.account, "account_key": store.key}
        return stores.AzureStore(store.bucket, **settings)
    assert isinstance(store, S3At)
    settings |= {"region": store.region, "virtual_hosted_style_request": False}
    settings |= {"access_key_id": store.access_key, "secret_access_key": store.secret_key}
    if store.session_token is not None:
        settings["session_token"] = store.session_token
    return stores.S3Store(store.bucket, **settings)
