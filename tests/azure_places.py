"""Containers of Azurite for tests: made, opened and looked into by means other than those under test.

The SDK makes signatures that are added to URLs; what is done with them is plain HTTP.
"""

from __future__ import annotations

import itertools
import os
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from urllib.parse import quote

import pytest
from servers import Answer, plain_request

__all__ = ["ACCOUNT", "KEY", "Container"]

#: Those of every Azurite.
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="

_numbers = itertools.count()


@dataclass(frozen=True)
class Container:
    """A container of a running Azurite."""

    url: str
    name: str
    tls: ssl.SSLContext | None = None

    @classmethod
    def make(cls, url: str, tls: ssl.SSLContext | None = None) -> Container:
        """Make one that is empty."""
        pytest.importorskip("azure.storage.blob", reason="pip install 'asyncxfer[azure]'")
        container = cls(url, f"c-{os.getpid()}-{next(_numbers)}", tls)
        answer = container.ask("PUT", "?restype=container")
        assert answer.status == 201, answer
        return container

    @property
    def account_url(self) -> str:
        """As the option has it."""
        return f"{self.url}/{ACCOUNT}"

    @property
    def connection_string(self) -> str:
        """As the option has it."""
        scheme = self.url.partition(":")[0]
        return (
            f"DefaultEndpointsProtocol={scheme};AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={self.account_url};"
        )

    def sas(self, *, lasts: float = 3600.0, **may: bool) -> str:
        """What gives access for so many seconds, all of it where nothing is said."""
        from azure.storage.blob import AccountSasPermissions, ResourceTypes, generate_account_sas

        may = may or dict.fromkeys(("read", "write", "delete", "list", "create"), True)
        return str(
            generate_account_sas(
                ACCOUNT, KEY, ResourceTypes(service=True, container=True, object=True), AccountSasPermissions(**may),
                datetime.now(UTC) + timedelta(seconds=lasts), start=datetime.now(UTC) - timedelta(hours=24),
            )
        )  # fmt: skip

    def ask(self, method: str, target: str, *, body: bytes = b"") -> Answer:
        """Make one request about this container, ``/KEY`` or ``?QUERY``."""
        query = "&" if "?" in target else "?"
        return plain_request(
            method, f"{self.account_url}/{self.name}{target}{query}{self.sas()}", body=body,
            headers={"x-ms-version": "2021-12-02", "x-ms-blob-type": "BlockBlob"}, tls=self.tls,
        )  # fmt: skip

    def fetch(self, key: str) -> bytes:
        """Read a blob."""
        answer = self.ask("GET", f"/{quote(key, safe='/~')}")
        assert answer.status == 200, answer
        return answer.body

    def place(self, key: str, data: bytes) -> None:
        """Write a blob."""
        answer = self.ask("PUT", f"/{quote(key, safe='/~')}", body=data)
        assert answer.status == 201, answer
