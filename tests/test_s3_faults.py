"""Every fault that a network and a store can have, at every request of every operation of `S3Store`.

The server is SeaweedFS; `store_faults` says what is asked of it. What only S3 has is tested one by one.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ssl
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import cast

import pytest
import store_faults
from fault_proxy import (
    Fault,
    FaultProxy,
    Reply,
    Reset,
    Stall,
    access_denied,
    another_region,
    expired_token,
    internal_error,
    slow_down,
)
from s3_accounts import FixedAccount, rounds, s3_store, soon
from servers import S3Server, plain_request
from store_faults import NBYTES, SEA, StoreFaults, Target, another_key, put

from asyncxfer import ObjectError
from asyncxfer.backends._s3_store import S3Store


@pytest.fixture(name="shared", scope="module")
def shared_fixture(s3: S3Server) -> Iterator[str]:
    """A bucket for all tests here: a new one takes a second to have room for much."""
    with s3.bucket() as name:
        yield name


@dataclass
class Stage(store_faults.Stage):
    """A store behind a proxy, and the same bucket past it."""

    account: FixedAccount
    s3: S3Server
    bucket: str

    @property
    def s3_store(self) -> S3Store:
        """The store, as what it is."""
        return cast(S3Store, self.store)

    def uploads(self) -> list[str]:
        """Multipart uploads that were begun and have not ended."""
        answer = plain_request("GET", f"{self.s3.url}/{self.bucket}?uploads=", identity=self.s3.admin)
        assert answer.status == 200
        return [piece.partition("<")[0] for piece in answer.body.decode().split("<UploadId>")[1:]]

    def left(self, key: str) -> list[str]:
        return self.uploads()


@contextlib.asynccontextmanager
async def staged(s3: S3Server, bucket: str, *, scheme: str = "http", **config: object) -> AsyncIterator[Stage]:
    tls, target = (None, s3.url) if scheme == "http" else (s3.tls, s3.https_url)
    server_tls = None if tls is None else s3.certified.server_context()
    with FaultProxy(target, tls=server_tls, target_tls=tls) as proxy:
        account = FixedAccount(proxy.url, bucket, s3.admin, tls=tls)
        async with s3_store(account, **config) as store, s3_store(FixedAccount(s3.url, bucket, s3.admin)) as direct:
            yield Stage(proxy, store, direct, functools.partial(s3_store, account), account, s3, bucket)


TARGETS = {
    "get": Target(store_faults.get, lambda asked: asked.method == "GET", NBYTES),
    "get range": Target(store_faults.get_range, lambda asked: asked.method == "GET", NBYTES - 10),
    "put": Target(put, lambda asked: asked.method == "PUT", sent=NBYTES),
    "put new": Target(store_faults.put_new, lambda asked: asked.method == "PUT", sent=NBYTES),
    "begin": Target(
        store_faults.put_parts, lambda asked: asked.method == "POST" and "uploads=" in asked.target, 200
    ),
    "part": Target(
        store_faults.put_two_parts, lambda asked: asked.method == "PUT" and "partNumber=2" in asked.target, sent=NBYTES
    ),
    "complete": Target(
        store_faults.put_parts, lambda asked: asked.method == "POST" and "uploadId=" in asked.target, 200, 200
    ),
    # HEAD tells a length that nothing proves; the answers to the others tell none.
    "abort": Target(
        store_faults.abort, lambda asked: asked.method == "DELETE" and "uploadId=" in asked.target, sized=False
    ),
    "head": Target(store_faults.head, lambda asked: asked.method == "HEAD", sized=False),
    "list": Target(store_faults.list_, lambda asked: asked.method == "GET", 500),
    "delete": Target(store_faults.delete, lambda asked: asked.method == "POST", 60, 100),
    "delete one": Target(store_faults.delete_one, lambda asked: asked.method == "DELETE", sized=False),
    "copy": Target(store_faults.copy, lambda asked: asked.method == "PUT", 100),
}  # fmt: skip


class TestS3(StoreFaults):
    """By our own HTTP."""

    targets = TARGETS
    ways = (("get", "https"), ("put", "https"))
    refusal = r"s3://.* \(403, .*request id|s3://.* \(403, Forbidden\); let"

    @pytest.fixture(autouse=True)
    def _server(self, s3: S3Server, shared: str) -> None:
        self.url = f"s3://{shared}"
        self._open = functools.partial(staged, s3, shared)

    def staged(self, scheme: str = "http", **config: object) -> contextlib.AbstractAsyncContextManager[Stage]:
        return self._open(scheme=scheme, **config)

    def said(self) -> Iterator[Fault]:
        yield internal_error()
        yield internal_error(reaches_server=True)
        yield slow_down()
        yield slow_down(retry_after=0.05)
        yield expired_token()
        yield another_region(another_key("region"))

    def denied(self) -> Fault:
        return access_denied()

    def met(self, stage: store_faults.Stage) -> None:
        account = cast(Stage, stage).account
        assert account.refreshed
        assert account.moves


# ---- one by one ---------------------------------------------------------------------------------------------------


async def test_nothing_is_left_of_an_upload_whose_id_was_damaged(s3: S3Server, shared: str) -> None:
    """It may not be seen from the answer; what was begun is found by its time when the other is aborted."""
    async with staged(s3, shared) as stage:
        for _ in rounds():
            key = another_key("damaged")
            body = "<InitiateMultipartUploadResult><UploadId>1_2</UploadId></InitiateMultipartUploadResult>"
            stage.proxy.next(Reply(200, body.encode(), reaches_server=True), when=TARGETS["begin"].when)
            upload = await stage.store.begin(key, deadline=soon())
            assert len(stage.uploads()) == 1
            with pytest.raises(ObjectError):
                await stage.store.part(key, upload, 1, (memoryview(SEA),), deadline=soon())
            await stage.store.abort(key, upload, deadline=soon())
            assert stage.uploads() == []


async def test_nothing_is_left_of_uploads_that_were_begun_unheard(s3: S3Server, shared: str) -> None:
    async with staged(s3, shared, object_attempts=2) as stage:
        key = another_key("unheard")
        stage.proxy.next(Reset(), Reset(), when=TARGETS["begin"].when)
        with pytest.raises(ObjectError, match="put of"):
            await stage.store.begin(key, deadline=soon())
        assert stage.uploads() == []
        stage.proxy.next(Reset(), Reset(), when=TARGETS["begin"].when)
        stage.proxy.always(internal_error(), when=lambda asked: asked.method == "GET")
        with pytest.raises(ObjectError, match="put of"):
            await stage.store.begin(key, deadline=soon())
        assert len(stage.uploads()) == 2
        stage.proxy.always(None)
        await stage.store.aclose()
        assert stage.uploads() == []


async def test_uploads_of_one_key_at_once_leave_one_another_alone(s3: S3Server, shared: str) -> None:
    async with staged(s3, shared) as stage:
        key = another_key("together")
        stage.proxy.next(Reset(), Stall(seconds=0.3), Reset(), when=TARGETS["begin"].when)
        await asyncio.gather(*[put_over(stage, key) for _ in range(6)])
        await stage.store.aclose()
        assert stage.uploads() == []


async def put_over(stage: Stage, key: str) -> None:
    upload = await stage.store.begin(key, deadline=soon())
    part = await stage.store.part(key, upload, 1, (memoryview(SEA),), deadline=soon())
    await stage.store.complete(key, upload, (part,), exists="replace", deadline=soon())


async def test_an_upload_of_another_is_left_alone(s3: S3Server, shared: str) -> None:
    async with staged(s3, shared) as stage:
        key = another_key("shared")
        others = await stage.direct.begin(key, deadline=soon())
        await stage.direct.part(key, others, 1, (memoryview(SEA),), deadline=soon())
        stage.proxy.next(Reset(), when=TARGETS["begin"].when)
        mine = await stage.store.begin(key, deadline=soon())
        await stage.store.abort(key, mine, deadline=soon())
        assert stage.uploads() == [others]
        await stage.direct.abort(key, others, deadline=soon())


@pytest.mark.parametrize("off", [-7200.0, 7200.0])
async def test_a_clock_that_is_off_is_corrected(s3: S3Server, shared: str, off: float) -> None:
    async with staged(s3, shared) as stage:
        for name in ("get", "head", "put"):
            stage.s3_store.dialect.skew = off
            await TARGETS[name].do(stage, another_key(name))
            assert abs(stage.s3_store.dialect.skew) < 60


@pytest.mark.parametrize("name", ["copy", "complete", "delete", "list"])
async def test_a_success_that_turns_out_to_be_none_is_asked_for_again(s3: S3Server, shared: str, name: str) -> None:
    error = b"<Error><Key>k</Key><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
    body = b"<DeleteResult>" + error + b"</DeleteResult>" if name == "delete" else error
    async with staged(s3, shared) as stage:
        stage.proxy.next(Reply(200, body), when=TARGETS[name].when)
        await TARGETS[name].do(stage, another_key(name))
        assert stage.store.attempts.pace.limit < 64
        stage.proxy.next(Reply(200, body.replace(b"SlowDown", b"AccessDenied")), when=TARGETS[name].when)
        with pytest.raises(ObjectError, match=r"\(200, AccessDenied.*let these credentials do s3:"):
            await TARGETS[name].do(stage, another_key(name))
        assert stage.uploads() == []


async def test_credentials_that_stay_expired_are_told(s3: S3Server, shared: str) -> None:
    async with staged(s3, shared) as stage:
        stage.proxy.always(expired_token())
        with pytest.raises(ObjectError, match=r"\(400, ExpiredToken, .*; get new credentials"):
            await put(stage, "k")
        assert stage.account.refreshed == 1


async def test_a_region_that_is_not_found_is_told(s3: S3Server, shared: str) -> None:
    async with staged(s3, shared) as stage:
        stage.proxy.next(another_region("a"), another_region("b"))
        with pytest.raises(
            ObjectError, match=r"in region b, not a \(301, PermanentRedirect, .*; name the bucket's region"
        ):
            await put(stage, "k")
        assert stage.account.moves == ["a"]
        await put(stage, "k")


async def test_a_server_that_is_not_trusted_is_told(s3: S3Server, shared: str) -> None:
    account = FixedAccount(s3.https_url, shared, s3.admin, tls=ssl.create_default_context())
    async with s3_store(account) as store:
        with pytest.raises(ObjectError, match=r"no TLS.*; name the authority"):
            await store.head("k", deadline=soon())
