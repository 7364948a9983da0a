"""Every fault that a network and a store can have, at every request of every operation of `AzureStore`.

The server is Azurite; `store_faults` says what is asked of it. Nothing deletes the blocks of an upload that was given
up but another write of the same blob, so what must not be left of one is a blob, and blocks where a blob was written.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import pytest
import store_faults
from azure_places import ACCOUNT, KEY, Container
from fault_proxy import Fault, FaultProxy, Reply, Request
from s3_accounts import soon
from store_faults import NBYTES, SEA, StoreFaults, Target, another_key

from asyncxfer._config import Config
from asyncxfer.backends._azure_account import AzureAccount
from asyncxfer.backends._azure_store import AzureStore


@pytest.fixture(name="container", scope="module")
def container_fixture(azurite: str) -> Container:
    return Container.make(azurite)


@contextlib.asynccontextmanager
async def opened(name: str, options: Mapping[str, object], **config: Any) -> AsyncIterator[AzureStore]:
    account = await AzureAccount.open(name, options)
    store = AzureStore(account, Config(**config))
    try:
        yield store
    finally:
        await store.aclose()
        await account.aclose()


def is_(method: str, *words: str, without: tuple[str, ...] = ()) -> store_faults.When:
    """Pick requests by their method and what their targets have in them."""

    def when(asked: Request) -> bool:
        target = asked.target
        return (
            asked.method == method
            and all(word in target for word in words)
            and not any(word in target for word in without)
        )

    return when


def _short(asked: Request) -> bool:
    """Whether this is a block of NBYTES."""
    return is_("PUT", "comp=block&")(asked) and asked.headers.get("content-length") == str(NBYTES)


@dataclass
class Stage(store_faults.Stage):
    """A store behind a proxy, and the same container past it."""

    container: Container

    def left(self, key: str) -> list[str]:
        """Blocks of a blob that are not in it; of what is no blob there may be some, which the next write lets go."""
        kept = [info for info in self._listed(key) if info == key]
        blocks = self.blocks(key)
        return blocks if kept else []

    def blocks(self, key: str) -> list[str]:
        """Blocks that were put and not made a blob."""
        answer = self.container.ask("GET", f"/{quote(key)}?comp=blocklist&blocklisttype=uncommitted")
        assert answer.status in (200, 404), answer
        return [piece.partition("<")[0] for piece in answer.body.decode().split("<Name>")[1:]]

    def _listed(self, key: str) -> list[str]:
        answer = self.container.ask("GET", f"?restype=container&comp=list&prefix={quote(key)}")
        assert answer.status == 200, answer
        return [piece.partition("<")[0] for piece in answer.body.decode().split("<Name>")[1:]]


@contextlib.asynccontextmanager
async def staged(container: Container, **config: Any) -> AsyncIterator[Stage]:
    with FaultProxy(container.url) as proxy:
        reach = functools.partial(opened, container.name)
        behind: dict[str, object] = {"account_url": f"{proxy.url}/{ACCOUNT}", "credential": KEY}
        past: dict[str, object] = {"account_url": container.account_url, "credential": KEY}
        async with reach(behind, **config) as store, reach(past) as direct:
            yield Stage(proxy, store, direct, functools.partial(reach, behind), container)


TARGETS = {
    "get": Target(store_faults.get, is_("GET"), NBYTES),
    "get range": Target(store_faults.get_range, is_("GET"), NBYTES - 10),
    "put": Target(store_faults.put, is_("PUT"), sent=NBYTES),
    "put new": Target(store_faults.put_new, is_("PUT"), sent=NBYTES),
    "part": Target(store_faults.put_two_parts, _short, sent=NBYTES),
    "complete": Target(store_faults.put_parts, is_("PUT", "comp=blocklist"), sent=100),
    "head": Target(store_faults.head, is_("HEAD"), sized=False),  # it tells a length that nothing proves
    "list": Target(store_faults.list_, is_("GET"), 500, sized=False),
    "delete": Target(store_faults.delete, is_("DELETE")),
    "copy": Target(store_faults.copy, is_("PUT")),
    "copy, asking for its source": Target(store_faults.copy, is_("HEAD"), sized=False),
}


class TestAzure(StoreFaults):
    """By our own HTTP."""

    targets = TARGETS
    refusal = r"az://.* \(403, AuthorizationPermissionMismatch, request id an-id\); give who asks the role"

    @pytest.fixture(autouse=True)
    def _server(self, container: Container) -> None:
        self.url = f"az://{container.name}"
        self._open = functools.partial(staged, container)

    def staged(self, scheme: str = "http", **config: Any) -> contextlib.AbstractAsyncContextManager[Stage]:
        return self._open(**config)

    def said(self) -> Iterator[Fault]:
        yield Reply(500, b"", {"x-ms-error-code": "InternalError"})
        yield Reply(500, b"", {"x-ms-error-code": "InternalError"}, reaches_server=True)
        yield Reply(500, b"", {"x-ms-error-code": "OperationTimedOut"}, reaches_server=True)
        yield Reply(503, b"", {"x-ms-error-code": "ServerBusy"})
        yield Reply(503, b"", {"x-ms-error-code": "ServerBusy", "Retry-After": "0.05"})
        yield Reply(400, b"", {"x-ms-error-code": "Md5Mismatch"})

    def denied(self) -> Fault:
        return Reply(403, b"", {"x-ms-error-code": "AuthorizationPermissionMismatch", "x-ms-request-id": "an-id"})


async def test_blocks_that_were_given_up_go_with_the_next_write(container: Container) -> None:
    async with staged(container) as stage:
        key = another_key("given up")
        upload = await stage.store.begin(key, deadline=soon())
        await stage.store.part(key, upload, 1, (memoryview(SEA),), deadline=soon())
        assert len(stage.blocks(key)) == 1
        await stage.store.abort(key, upload, deadline=soon())
        await store_faults.put_parts(stage, key)
        assert stage.blocks(key) == []
