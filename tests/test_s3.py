"""Backend ``s3`` against SeaweedFS: the contract, over http and https, by our own HTTP and by the SDK.

By default over http and by our own; ``S3_MATRIX=1`` plays all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
from collections.abc import AsyncIterator
from typing import Any, ClassVar
from urllib.parse import quote

import numpy as np
import pytest
from fault_proxy import FaultProxy, Flip, Stall, StallUpload, another_region, expired_token
from servers import REGION, Identity, S3Server, plain_request

from asyncxfer import Agent, ChecksumError, ObjectError, ObjectMissingError, Region, TransferTimeout
from asyncxfer.backends._object._attempts import Attempts
from asyncxfer.backends._object._pace import priority
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

    async def unfinished(self) -> list[str]:
        where = f"{self._s3.url}/{self._base.partition('/')[0]}?uploads="
        answer = await asyncio.to_thread(plain_request, "GET", where, identity=self._s3.admin)
        assert answer.status == 200, answer
        return answer.body.decode().split("<UploadId>")[1:]


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


def _opening(url: str, who: Identity) -> dict[str, Any]:
    return {
        "endpoint_url": url, "region_name": REGION, "aws_access_key_id": who.access_key,
        "aws_secret_access_key": who.secret_key, "addressing_style": "path",
    }  # fmt: skip


@contextlib.asynccontextmanager
async def _opened(url: str, who: Identity, bucket: str, **config: Any) -> AsyncIterator[tuple[Agent, Region]]:
    async with (
        Agent("a", backends=["local", "s3"], config=config) as agent,
        agent.open(f"s3://{bucket}/folder", "w", options=_opening(url, who)) as objects,
    ):
        yield agent, objects


async def test_damage_to_a_part_of_a_large_object_is_found_and_mended(s3: S3Server, bucket: str) -> None:
    data = np.random.default_rng(3).integers(0, 256, 34 << 20, np.uint8)
    back = np.zeros_like(data)
    with FaultProxy(s3.url) as proxy:
        async with (
            _opened(proxy.url, s3.admin, bucket, object_multipart_bytes=20 << 20) as (agent, objects),
            agent.register(data) as source, agent.register(back) as target,
        ):  # fmt: skip
            await agent.put(source[:], objects["large"])
            proxy.next(Flip(at=1_000_000), when=lambda request: request.method == "GET")
            await agent.get(target[:], objects["large"])
            assert np.array_equal(back, data)
            proxy.always(Flip(at=1_000_000), when=lambda request: request.method == "GET")
            with pytest.raises(ChecksumError, match=f"s3://{bucket}/folder/large arrived damaged, twice"):
                await agent.get(target[:], objects["large"])


async def test_a_small_get_that_is_not_answered_is_asked_for_twice(s3: S3Server, bucket: str) -> None:
    """Nothing ends the wait for the first answer: neither a deadline nor the store."""
    back = np.zeros(16 << 10, np.uint8)
    data = np.random.default_rng(4).integers(0, 256, 16 << 10, np.uint8)
    with FaultProxy(s3.url) as proxy:
        config = {"object_hedge": 0.05, "object_attempt_timeout": 600.0, "object_timeout": 900.0}
        async with (
            _opened(proxy.url, s3.admin, bucket, **config) as (agent, objects),
            agent.register(data) as source, agent.register(back) as target,
        ):  # fmt: skip
            await agent.put(source[:], objects["small"])
            before = len(proxy.requests)
            for stalled in (Stall(), Stall(after=1000)):
                back[:] = 0
                proxy.next(stalled, when=lambda request: request.method == "GET")
                await agent.get(target[:], objects["small"])
                assert np.array_equal(back, data)
            assert [request.method for request in proxy.requests[before:]] == ["GET"] * 4


@pytest.mark.parametrize("off", [-7200.0, 7200.0])
async def test_a_clock_that_is_off_is_corrected(
    s3: S3Server, bucket: str, off: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This host's clock is two hours off, as far as requests say; the store refuses the first, and no other."""
    monkeypatch.setattr("asyncxfer.backends._s3_dialect.time", _Clock(off))
    back = np.zeros(1000, np.uint8)
    with FaultProxy(s3.url) as proxy:
        async with (
            _opened(proxy.url, s3.admin, bucket) as (agent, objects),
            agent.register(np.full(1000, 7, np.uint8)) as source, agent.register(back) as target,
        ):  # fmt: skip
            await agent.put(source[:], objects["key"])
            assert len(proxy.requests) == 2
            await agent.get(target[:], objects["key"])
            assert (await objects.objects.head("key")).nbytes == 1000
            assert len(proxy.requests) == 4
    assert back.tolist() == [7] * 1000


class _Clock:
    """The module `time` on a host whose clock is so many seconds off."""

    def __init__(self, off: float) -> None:
        self._off = off

    def time(self) -> float:
        return time.time() + self._off

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


async def test_an_upload_that_is_stopped_leaves_nothing_in_the_store(s3: S3Server, bucket: str) -> None:
    data = np.zeros(34 << 20, np.uint8)
    with FaultProxy(s3.url) as proxy:
        async with (
            _opened(proxy.url, s3.admin, bucket, object_multipart_bytes=20 << 20) as (agent, objects),
            agent.register(data) as source,
        ):
            proxy.next(None, None, StallUpload(after=1 << 20), StallUpload(after=1 << 20))
            with pytest.raises(TransferTimeout):
                await agent.put(source[:], objects["large"], timeout=1.5)
            proxy.go_on()
    left = await asyncio.to_thread(plain_request, "GET", f"{s3.url}/{bucket}?uploads=", identity=s3.admin)
    assert left.status == 200
    assert b"<UploadId>" not in left.body
    listed = await asyncio.to_thread(plain_request, "GET", f"{s3.url}/{bucket}?list-type=2", identity=s3.admin)
    assert b"<Key>" not in listed.body


@pytest.mark.parametrize(
    ("fault", "kind", "told"),
    [
        ("missing", ObjectMissingError, "check the key"),
        ("short", ObjectError, "10 bytes"),
        ("forbidden", ObjectError, "403"),
        ("expired", ObjectError, "ExpiredToken"),
        ("region", ObjectError, "region"),
        ("unreachable", ObjectError, "endpoint"),
    ],
)
async def test_errors_say_what_it_was_about_and_what_to_do(
    s3: S3Server, bucket: str, fault: str, kind: type[ObjectError], told: str
) -> None:
    url = f"{s3.url}/{bucket}/folder/key"
    if fault != "missing":
        await asyncio.to_thread(plain_request, "PUT", url, identity=s3.admin, body=bytes(10))
    who = s3.stranger if fault == "forbidden" else s3.admin
    with FaultProxy(s3.url) as proxy:
        if fault == "expired":
            proxy.always(expired_token())
        elif fault == "region":
            proxy.always(another_region("no-such-region"))
        elif fault == "unreachable":
            proxy.refuse()
        async with (
            _opened(proxy.url, who, bucket, object_timeout=3.0) as (agent, objects),
            agent.register(np.zeros(20, np.uint8)) as target,
        ):
            with pytest.raises(kind) as caught:
                await agent.get(target[:], objects["key"])
        if fault == "unreachable":
            proxy.accept()
    error, text = caught.value, str(caught.value)
    assert f"s3://{bucket}/folder/key" in text
    assert error.url == f"s3://{bucket}/folder/key"
    assert told in text
    assert "; " in text, "what to do comes last"
    assert error.backend == "s3"
    if fault in ("missing", "forbidden", "expired"):
        assert error.request_id
        assert error.request_id in text


async def test_the_priority_of_a_transfer_is_that_of_its_requests(
    s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    run = Attempts.run

    async def watched(self: Attempts, *given: Any, **named: Any) -> Any:
        seen.append(priority.get())
        return await run(self, *given, **named)

    monkeypatch.setattr(Attempts, "run", watched)
    async with (
        _opened(s3.url, s3.admin, bucket) as (agent, objects),
        agent.allocate((3, 100), np.uint8) as region,
    ):
        await agent.put(region[:], objects[["a", "b", "c"]], priority=-2)
        await agent.get(region[0], objects["a"], priority=3)
    assert seen == [-2, -2, -2, 3]
