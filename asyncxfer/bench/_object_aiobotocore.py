"""Plain aiobotocore between memory and objects, tuned: no checksums, nothing validated or signed that need not be.

It takes memory to put as it lies, and gives bytes of its own for a get, which are copied to where they belong.
"""

from __future__ import annotations

import asyncio
import importlib
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from ._object_s3 import S3At
from ._object_side import ObjectSide, rows_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import numpy as np
    from numpy.typing import NDArray

    from ._object_cases import ObjectCase
    from ._object_store import StoreAt

__all__ = ["AiobotocoreSide"]

_PIECE = 1 << 20


class AiobotocoreSide(ObjectSide):
    """One client of aiobotocore."""

    def __init__(self) -> None:
        self._stack = AsyncExitStack()
        self._moves: list[Callable[[], Awaitable[None]]] = []

    async def open(self, memory: NDArray[np.uint8], store: StoreAt) -> None:
        assert isinstance(store, S3At)
        config: Any = importlib.import_module("aiobotocore.config").AioConfig(
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": "path", "payload_signing_enabled": False},
            parameter_validation=False,
            max_pool_connections=64,
        )
        session: Any = importlib.import_module("aiobotocore.session").get_session()
        made = session.create_client(
            "s3",
            endpoint_url=store.endpoint,
            region_name=store.region,
            aws_access_key_id=store.access_key,
            aws_secret_access_key=store.secret_key,
            aws_session_token=store.session_token,
            verify=store.ca,
            config=config,
        )
        self._client: Any = await self._stack.enter_async_context(made)
        self._bucket, self._prefix, self._whole = store.bucket, store.prefix, memory

    async def prepare(self, case: ObjectCase) -> str:
        move = self._put if case.op == "put" else self._get
        rows = zip(case.keys(), rows_of(self._whole, case), strict=True)
        self._moves = [lambda key=key, row=row: move(self._prefix + key, row) for key, row in rows]  # type: ignore[misc]
        return "aiohttp"

    async def _put(self, key: str, row: NDArray[np.uint8]) -> None:
        await self._client.put_object(Bucket=self._bucket, Key=key, Body=row.data)

    async def _get(self, key: str, row: NDArray[np.uint8]) -> None:
        answer = await self._client.get_object(Bucket=self._bucket, Key=key)
        into, at = row.data, 0
        async with answer["Body"] as body:
            while piece := await body.read(_PIECE):
                into[at : at + len(piece)] = piece
                at += len(piece)

    async def move(self, repeats: int) -> None:
        for _ in range(repeats):
            await asyncio.gather(*(move() for move in self._moves))

    async def release(self) -> None:
        self._moves = []

    async def close(self) -> None:
        await self.release()
        await self._stack.aclose()
