"""Backend ``s3``: memory to and from objects of S3, and of what speaks like it.

Who asks and where a bucket is, is known by aiobotocore, which has every source of it. Bytes go over HTTP of our own; by
way of the SDK where that cannot go (``s3:sdk``).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

from ..abc import BackendError, Cost, Objects
from ._object._backend import ObjectBackend, Reached
from ._object._store import ObjectStore
from ._s3_sdk import Account
from ._s3_sdk_store import SdkStore
from ._s3_store import S3Store

if TYPE_CHECKING:
    from .._config import Config

__all__ = ["S3Backend"]


class S3Backend(ObjectBackend):
    """Moves host memory to and from objects of S3."""

    name: ClassVar[str] = "s3"
    scheme: ClassVar[str] = "s3"
    ways: ClassVar[Mapping[str, Cost]] = {
        "http": Cost(setup=1e-3, row=0.2e-3, byte=1 / 0.5e9),
        "sdk": Cost(setup=3e-3, row=2e-3, byte=1 / 0.2e9),
    }

    @classmethod
    def examine(cls, config: Config) -> str:
        """Say that the SDK is there.

        Raises
        ------
        BackendError
            It is not.
        """
        if importlib.util.find_spec("aiobotocore") is None:
            raise BackendError("objects of S3 need aiobotocore: pip install 'asyncxfer[s3]'")
        return "opens s3://"

    async def reach(self, objects: Objects) -> Reached:
        """Have the SDK say who asks and where the bucket is.

        Raises
        ------
        RegistrationError
            It cannot.
        """
        account = await Account.open(objects.bucket, objects.options)

        async def http() -> ObjectStore:
            return S3Store(objects.bucket, account, self.config)

        async def sdk() -> ObjectStore:
            return await SdkStore.open(account, self.config)

        ways: dict[str, Callable[[], Awaitable[ObjectStore]]] = {"http": http, "sdk": sdk}
        refused = {}
        if account.limits:
            del ways["http"]
            refused["http"] = account.limits
        return Reached(ways, refused, account.aclose)
