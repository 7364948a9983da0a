"""Blobs of Azure for the bench, as the SDK by itself finds, makes and reads them."""

from __future__ import annotations

import contextlib
import importlib
import os
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

from ._object_store import KeptObjects, StoreAt
from ._pair import BenchError

__all__ = ["AzureAt"]

_CONNECTION = "AZURE_STORAGE_CONNECTION_STRING"
_NULL_KEY = "bnVsbA=="


@dataclass(frozen=True, slots=True, kw_only=True)
class AzureAt(StoreAt):
    """A container, and the key of its account, whose URL is the endpoint."""

    account: str
    key: str

    @classmethod
    def of_null_server(cls, url: str, bucket: str, prefix: str, ca: str | None) -> Self:
        return cls(endpoint=f"{url}/null", bucket=bucket, prefix=prefix, ca=ca, account="null", key=_NULL_KEY)

    @classmethod
    def found(cls, endpoint: str, bucket: str, prefix: str) -> Self:
        """With the account and its key out of the connection string that the environment has."""
        fields = [field.partition("=") for field in os.environ.get(_CONNECTION, "").split(";")]
        said = {name.strip().lower(): value.strip() for name, _, value in fields}
        if not (said.get("accountname") and said.get("accountkey")):
            raise BenchError(f"nothing says who asks {endpoint}; set {_CONNECTION}, with AccountName and AccountKey")
        ca = os.environ.get("REQUESTS_CA_BUNDLE") if endpoint.startswith("https") else None
        return cls(
            endpoint=endpoint.rstrip("/"), bucket=bucket, prefix=prefix, ca=ca, account=said["accountname"],
            key=said["accountkey"],
        )  # fmt: skip

    @property
    def connection_string(self) -> str:
        """As every client of Azure takes it."""
        protocol = urlsplit(self.endpoint).scheme
        return (
            f"DefaultEndpointsProtocol={protocol};AccountName={self.account};AccountKey={self.key};"
            f"BlobEndpoint={self.endpoint};"
        )

    def objects(self) -> KeptObjects:
        return _AzureObjects(self)


class _AzureObjects(KeptObjects):
    def __init__(self, store: AzureAt) -> None:
        super().__init__(store)
        self._store = store
        self._client: Any = None
        self._core: Any = importlib.import_module("azure.core.exceptions")
        self.failures = (self._core.AzureError, ValueError)  # the latter of a connection string

    def _reach(self) -> None:
        blob: Any = importlib.import_module("azure.storage.blob")
        more = {} if self._store.ca is None else {"connection_verify": self._store.ca}
        self._client = blob.ContainerClient.from_connection_string(
            self._store.connection_string, self._store.bucket, **more
        )
        with contextlib.suppress(self._core.ResourceExistsError):
            self._client.create_container()

    def _put(self, key: str, data: bytes) -> None:
        self._client.upload_blob(key, data, overwrite=True)

    def _get(self, key: str) -> bytes:
        content: bytes = self._client.download_blob(key).readall()
        return content

    def _delete(self, key: str) -> None:
        with contextlib.suppress(self._core.ResourceNotFoundError):
            self._client.delete_blob(key)

    def _close(self) -> None:
        self._client.close()
