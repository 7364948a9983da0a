"""Backend ``gcs``: memory to and from objects of Google Cloud Storage.

Who asks is known by google-auth. Bytes go over HTTP of our own only: by way of an SDK the same requests would be made,
at a multiple of the cost.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from ..abc import BackendError, Cost, Objects
from ._gcs_account import INSTALL, GcsAccount
from ._gcs_store import GcsStore
from ._object._backend import ObjectBackend, Reached
from ._object._store import ObjectStore

if TYPE_CHECKING:
    from .._config import Config

__all__ = ["GcsBackend"]


class GcsBackend(ObjectBackend):
    """Moves host memory to and from objects of Google Cloud Storage."""

    name: ClassVar[str] = "gcs"
    scheme: ClassVar[str] = "gs"
    ways: ClassVar[Mapping[str, Cost]] = {"http": Cost(setup=1e-3, row=0.2e-3, byte=1 / 0.5e9)}

    @classmethod
    def examine(cls, config: Config) -> str:
        """Say that what finds credentials is there.

        Raises
        ------
        BackendError
            It is not.
        """
        for name, package in (("google.auth", "google-auth"), ("requests", "requests")):
            try:
                found = importlib.util.find_spec(name)
            except ModuleNotFoundError:
                found = None
            if found is None:
                raise BackendError(f"objects of Google Cloud Storage need {package}: {INSTALL}")
        return "opens gs://"

    async def reach(self, objects: Objects) -> Reached:
        """Find out who asks.

        Raises
        ------
        RegistrationError
            Nobody is found.
        """
        account = await GcsAccount.open(objects.bucket, objects.options)

        async def http() -> ObjectStore:
            return GcsStore(account, self.config)

        return Reached({"http": http})
