"""Backend ``azure`` against Azurite: the contract, credentials of every kind, what errors say, and faults."""

from __future__ import annotations

import asyncio
import itertools
import os
from typing import Any

import pytest
from azure_places import KEY, Container

from asyncxfer.testing import ObjectContract

_numbers = itertools.count()


@pytest.fixture(name="container", scope="session")
def container_fixture(azurite: str) -> Container:
    return Container.make(azurite)


class TestHttp(ObjectContract):
    route = "azure:http"
    many = 40

    @pytest.fixture(autouse=True)
    def _server(self, container: Container) -> None:
        self._container = container
        self._prefix = f"{os.getpid()}-{next(_numbers)}"
        self.url = f"az://{container.name}/{self._prefix}"
        self.opening: dict[str, Any] = {"account_url": container.account_url, "credential": KEY}

    def backends(self) -> list[Any]:
        return ["local", "azure"]

    async def fetch(self, key: str) -> bytes:
        return await asyncio.to_thread(self._container.fetch, f"{self._prefix}/{key}")

    async def place(self, key: str, data: bytes) -> None:
        await asyncio.to_thread(self._container.place, f"{self._prefix}/{key}", data)
