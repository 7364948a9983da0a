"""Backend ``gcs`` against fake-gcs-server: the contract, credentials of every kind, what errors say, and faults."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
from typing import Any
from urllib.parse import quote

import pytest
from servers import plain_request

from asyncxfer.testing import ObjectContract

_numbers = itertools.count()
_BUCKET = "bucket"


@pytest.fixture(name="server", scope="session")
def server_fixture(fake_gcs: str) -> str:
    body = json.dumps({"name": _BUCKET}).encode()
    answer = plain_request("POST", f"{fake_gcs}/storage/v1/b", headers={"Content-Type": "application/json"}, body=body)
    assert answer.status in (200, 409), answer
    return fake_gcs


def fetched(server: str, key: str) -> bytes:
    """Read an object by plain HTTP."""
    answer = plain_request("GET", f"{server}/storage/v1/b/{_BUCKET}/o/{quote(key, safe='')}?alt=media")
    assert answer.status == 200, answer
    return answer.body


def placed(server: str, key: str, data: bytes) -> None:
    """Write an object by plain HTTP."""
    where = f"{server}/upload/storage/v1/b/{_BUCKET}/o?uploadType=media&name={quote(key, safe='')}"
    answer = plain_request("POST", where, body=data)
    assert answer.status == 200, answer


class TestHttp(ObjectContract):
    route = "gcs:http"
    many = 120

    @pytest.fixture(autouse=True)
    def _server(self, server: str) -> None:
        self._at = server
        self._prefix = f"{os.getpid()}-{next(_numbers)}"
        self.url = f"gs://{_BUCKET}/{self._prefix}"
        self.opening: dict[str, Any] = {"endpoint_url": server, "anonymous": True}

    def backends(self) -> list[Any]:
        return ["local", "gcs"]

    async def fetch(self, key: str) -> bytes:
        return await asyncio.to_thread(fetched, self._at, f"{self._prefix}/{key}")

    async def place(self, key: str, data: bytes) -> None:
        await asyncio.to_thread(placed, self._at, f"{self._prefix}/{key}", data)
