"""asyncxfer between memory and objects, through its public API only: `Agent.open`, `put` and `get`.

The clock runs from posting a transfer that was prepared, as NIXL's requests are, to its awaited result. It knows
nothing of any other system.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from asyncxfer import Agent, Region

from ._object_azure import AzureAt
from ._object_s3 import S3At
from ._object_side import ObjectSide

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from asyncxfer import Plan

    from ._object_cases import ObjectCase
    from ._object_store import StoreAt

__all__ = ["OurObjectSide"]


class OurObjectSide(ObjectSide):
    """An agent with its default settings."""

    def __init__(self) -> None:
        self._agent = Agent("bench")
        self._here: Region | None = None
        self._there: Region | None = None
        self._plan: Plan | None = None

    async def open(self, memory: NDArray[np.uint8], store: StoreAt) -> None:
        await self._agent.start()
        scheme, options = _opening(store)
        if store.ca is not None:
            options["verify"] = store.ca
        self._here = await self._agent.register(memory)
        self._there = await self._agent.open(f"{scheme}://{store.bucket}/{store.prefix}", "r+", options=options)

    async def prepare(self, case: ObjectCase) -> str:
        assert self._here is not None, "a case came before memory was opened"
        assert self._there is not None, "a case came before the store was opened"
        self._plan = self._agent.prepare(case.op, self._here.descriptors(*case.rows()), self._there[case.keys()])
        return self._plan.route.route

    async def move(self, repeats: int) -> None:
        if self._plan is None:
            raise RuntimeError("a run came before its case was prepared")
        for _ in range(repeats):
            await self._plan()

    async def release(self) -> None:
        self._plan = None

    async def close(self) -> None:
        self._plan = self._here = self._there = None
        await self._agent.aclose()


def _opening(store: StoreAt) -> tuple[str, dict[str, object]]:
    """The scheme of a store, and what says where it is and who asks."""
    if isinstance(store, AzureAt):
        return "az", {"connection_string": store.connection_string}
    assert isinstance(store, S3At)
    options: dict[str, object] = {"endpoint_url": store.endpoint, "region_name": store.region}
    options |= {"aws_access_key_id": store.access_key, "aws_secret_access_key": store.secret_key}
    if store.session_token is not None:
        options["aws_session_token"] = store.session_token
    return "s3", options | {"addressing_style": "path"}
