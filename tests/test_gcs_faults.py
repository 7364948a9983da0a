"""Every fault that a network and a store can have, at every request of every operation of `GcsStore`.

The server is fake-gcs-server; `store_faults` says what is asked of it. What must not be left of an upload is a part.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import pytest
import store_faults
from fault_proxy import Fault, FaultProxy, Reply, Request
from s3_accounts import soon
from servers import plain_request
from store_faults import NBYTES, SEA, StoreFaults, Target, another_key

from asyncxfer import ObjectError
from asyncxfer._config import Config
from asyncxfer.backends._gcs_account import GcsAccount
from asyncxfer.backends._gcs_store import GcsStore

_BUCKET = "faults"
_PARTS = ".asyncxfer-parts/"


@pytest.fixture(name="server", scope="module")
def server_fixture(fake_gcs: str) -> str:
    body = json.dumps({"name": _BUCKET}).encode()
    answer = plain_request("POST", f"{fake_gcs}/storage/v1/b", headers={"Content-Type": "application/json"}, body=body)
    assert answer.status in (200, 409), answer
    return fake_gcs


@contextlib.asynccontextmanager
async def opened(url: str, **config: Any) -> AsyncIterator[GcsStore]:
    account = await GcsAccount.open(_BUCKET, {"endpoint_url": url, "anonymous": True})
    store = GcsStore(account, Config(**config))
    try:
        yield store
    finally:
        await store.aclose()


@dataclass
class Stage(store_faults.Stage):
    """A store behind a proxy, and the same bucket past it."""

    server: str

    def left(self, key: str) -> list[str]:
        where = f"{self.server}/storage/v1/b/{_BUCKET}/o?prefix={quote(_PARTS, safe='')}"
        return [item["name"] for item in json.loads(plain_request("GET", where).body).get("items", ())]


@contextlib.asynccontextmanager
async def staged(server: str, **config: Any) -> AsyncIterator[Stage]:
    with FaultProxy(server) as proxy:
        async with opened(proxy.url, **config) as store, opened(server) as direct:
            yield Stage(proxy, store, direct, functools.partial(opened, proxy.url), server)


def _reads(asked: Request) -> bool:
    return asked.method == "GET" and "alt=media" in asked.target


def _asks(asked: Request) -> bool:
    return asked.method == "GET" and "alt=media" not in asked.target


def _writes(asked: Request) -> bool:
    return asked.method == "POST" and "/upload/" in asked.target


def _short(asked: Request) -> bool:
    """Whether this writes NBYTES and what tells of them."""
    return _writes(asked) and NBYTES <= int(asked.headers["content-length"]) < 2 * NBYTES


def _composes(asked: Request) -> bool:
    return asked.method == "POST" and "/compose" in asked.target


def _copies(asked: Request) -> bool:
    return asked.method == "POST" and "/rewriteTo/" in asked.target


def _deletes(asked: Request) -> bool:
    return asked.method == "DELETE"


TARGETS = {
    "get": Target(store_faults.get, _reads, NBYTES),
    "get range": Target(store_faults.get_range, _reads, NBYTES - 10),
    "put": Target(store_faults.put, _writes, 100, NBYTES),
    "put new": Target(store_faults.put_new, _writes, 100, NBYTES),
    "part": Target(store_faults.put_two_parts, _short, 100, NBYTES),
    "complete": Target(store_faults.put_parts, _composes, 100, 100),
    "complete, tidying up": Target(store_faults.put_parts, _deletes, told=False),
    "abort": Target(store_faults.abort, _deletes),
    "head": Target(store_faults.head, _asks, 100),
    "list": Target(store_faults.list_, _asks, 300, sized=False),
    "delete": Target(store_faults.delete, _deletes),
    "copy": Target(store_faults.copy, _copies, 100),
}


class TestGcs(StoreFaults):
    """By our own HTTP."""

    targets = TARGETS
    url = f"gs://{_BUCKET}"
    refusal = r"gs://.*: no access \(403, forbidden, request id an-id\); let who asks do storage.objects"

    @pytest.fixture(autouse=True)
    def _server(self, server: str) -> None:
        self._open = functools.partial(staged, server)

    def staged(self, scheme: str = "http", **config: Any) -> contextlib.AbstractAsyncContextManager[Stage]:
        return self._open(**config)

    def said(self) -> Iterator[Fault]:
        yield Reply(500)
        yield Reply(500, reaches_server=True)
        yield Reply(503, reaches_server=True)
        yield Reply(503, b"", {"Retry-After": "0.05"})
        yield Reply(429, _said(429, "rateLimitExceeded", "too much"))
        yield Reply(403, _said(403, "userRateLimitExceeded", "too much"))
        yield Reply(408)

    def denied(self) -> Fault:
        return Reply(403, _said(403, "forbidden", "no access."), {"x-guploader-uploadid": "an-id"})


def _said(status: int, reason: str, message: str) -> bytes:
    return json.dumps({"error": {"code": status, "message": message, "errors": [{"reason": reason}]}}).encode()


@pytest.mark.parametrize("what", ["complete", "abort"])
async def test_parts_that_could_not_be_deleted_go_when_the_store_is_closed(server: str, what: str) -> None:
    async with staged(server, object_attempts=2) as stage:
        key = another_key(what)
        stage.proxy.always(Reply(500), when=_deletes)
        if what == "complete":
            await store_faults.put_parts(stage, key)
        else:
            upload = await stage.store.begin(key, deadline=soon())
            await stage.store.part(key, upload, 1, (memoryview(SEA),), deadline=soon())
            with pytest.raises(ObjectError, match="500"):
                await stage.store.abort(key, upload, deadline=soon())
        assert len(stage.left(key)) == 1
        stage.proxy.always(None)
        await stage.store.aclose()
        assert stage.left(key) == []
