"""Backend ``s3`` against SeaweedFS: the contract, over http and https, by our own HTTP and by the SDK.

By default over http and by our own; ``S3_MATRIX=1`` plays all of them.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from typing import Any, ClassVar
from urllib.parse import quote

import pytest
from servers import S3Server, plain_request

from asyncxfer.testing import ObjectContract

_numbers = itertools.count()


class OnSeaweedFS(ObjectContract):
    """What the contract needs to know of the server."""

    secure: ClassVar[bool] = False

    @pytest.fixture(autouse=True)
    def _server(self, s3: S3Server, bucket: str) -> None:
        self._s3 = s3
        self._base = f"{bucket}/{os.getpid()}-{next(_numbers)}"
        self.url = f"s3://{self._base}"
        self.opening: dict[str, Any] = {
            "endpoint_url": s3.https_url if self.secure else s3.url,
            "region_name": "us-east-1",
            "aws_access_key_id": s3.admin.access_key,
            "aws_secret_access_key": s3.admin.secret_key,
            "addressing_style": "path",
        }
        if self.secure:
            self.opening["verify"] = str(s3.certified.ca)

    def backends(self) -> list[Any]:
        return ["local", "s3"]

    async def _plain(self, method: str, key: str, body: bytes = b"") -> bytes:
        where = f"{self._s3.url}/{self._base}/{quote(key, safe='/~')}"
        answer = await asyncio.to_thread(plain_request, method, where, identity=self._s3.admin, body=body)
        assert answer.status == 200, answer
        return answer.body

    async def fetch(self, key: str) -> bytes:
        return await self._plain("GET", key)

    async def place(self, key: str, data: bytes) -> None:
        await self._plain("PUT", key, data)


class TestHttp(OnSeaweedFS):
    route = "s3:http"


_matrix = pytest.mark.skipif(not os.environ.get("S3_MATRIX"), reason="S3_MATRIX=1 plays all ways to reach S3")


@_matrix
class TestHttps(OnSeaweedFS):
    route = "s3:http"
    secure = True


@_matrix
class TestVerified(OnSeaweedFS):
    route = "s3:http"
    checksum = True


@_matrix
class TestSdk(OnSeaweedFS):
    route = "s3:sdk"
