"""Backend ``azure``: memory to and from blobs of Azure Blob Storage.

Who asks and where a container is, is known by azure-storage-blob and azure-identity. Bytes go over HTTP of our own
only: by way of the SDK the same requests would be made, at a multiple of the cost.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from ..abc import BackendError, Cost, Objects
from ._azure_account import INSTALL, AzureAccount
from ._azure_store import AzureStore
from ._object._backend import ObjectBackend, Reached
from ._object._store import ObjectStore

if TYPE_CHECKING:
    from .._config import Config

__all__ = ["AzureBackend"]


class AzureBackend(ObjectBackend):
    """Moves host memory to and from blobs of Azure."""

    name: ClassVar[str] = "azure"
    scheme: ClassVar[str] = "az"
    ways: ClassVar[Mapping[str, Cost]] = {"http": Cost(setup=1e-3, row=0.2e-3, byte=1 / 0.5e9)}

    @classmethod
    def examine(cls, config: Config) -> str:
        """Say that the SDK is there.

        Raises
        ------
        BackendError
            It is not.
        """
        try:
            found = importlib.util.find_spec("azure.storage.blob")
        except ModuleNotFoundError:
            found = None
        if found is None:
            raise BackendError(f"blobs of Azure need azure-storage-blob: {INSTALL}")
        return "opens az://"

    async def reach(self, objects: Objects) -> Reached:
        """Have the SDK say who asks and where the container is.

        Raises
        ------
        RegistrationError
            It cannot.
        """
        account = await AzureAccount.open(objects.bucket, objects.options)

        async def http() -> ObjectStore:
            return AzureStore(account, self.config)

        return Reached({"http": http}, {}, account.aclose)
