"""Backend ``azure`` against Azurite: the contract, credentials of every kind, what errors say, and faults."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from azure_places import ACCOUNT, KEY, Container
from fault_proxy import Fault, FaultProxy, Flip, Reply, Reset, Stall, Truncate
from s3_accounts import soon
from servers import azurite, certificates

from asyncxfer import ChecksumError, ObjectError, ObjectExistsError, ObjectMissingError, RegistrationError
from asyncxfer._config import Config
from asyncxfer._fast.crc64 import crc64nvme
from asyncxfer.abc import BackendError, Exists
from asyncxfer.backends._azure_account import AzureAccount
from asyncxfer.backends._azure_store import AzureStore, _listed, _on_the_wire
from asyncxfer.backends._object._xml import parse
from asyncxfer.backends.azure import AzureBackend
from asyncxfer.testing import ObjectContract

DATA = os.urandom(20_000)

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


# ---- the store by itself ------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def opened(
    container: Container, options: Mapping[str, object] | None = None, *, name: str = "", **config: Any
) -> AsyncIterator[AzureStore]:
    """A store of a container, by these options or by the account's key."""
    options = options or {"account_url": container.account_url, "credential": KEY}
    account = await AzureAccount.open(name or container.name, options)
    store = AzureStore(account, Config(**config))
    try:
        yield store
    finally:
        await store.aclose()
        await account.aclose()


async def put(store: AzureStore, key: str, data: bytes, exists: Exists = "replace") -> str:
    return await store.write(key, (memoryview(data),), exists=exists, deadline=soon())


async def got(store: AzureStore, key: str, nbytes: int, **more: Any) -> bytes:
    found = bytearray(nbytes)
    settings: dict[str, Any] = {"whole": True, "verify": False, "etag": None, "deadline": soon()}
    await store.read(key, 0, (memoryview(found),), **{**settings, **more})
    return bytes(found)


@pytest.fixture(name="key")
def key_fixture() -> str:
    return f"{os.getpid()}/{next(_numbers)}"


def test_the_checksum_on_the_wire_is_as_azure_counts_it() -> None:
    """From the tests of Azure's own clients."""
    assert _on_the_wire(crc64nvme(b"Hello Azure!")) == b"DtjZpL9/o8c="


async def test_what_is_written_has_its_checksum(container: Container, key: str) -> None:
    async with opened(container) as store:
        etag = await put(store, key, DATA)
        info = await store.head(key, deadline=soon())
        assert (info.key, info.nbytes, info.etag) == (key, len(DATA), etag)
        assert info.checksum == f"crc64nvme:{base64.b64encode(crc64nvme(DATA).to_bytes(8, 'big')).decode()}"
        assert [found.nbytes async for found in store.list(key, deadline=soon())] == [len(DATA)]


async def test_blobs_of_others_are_compared_by_their_md5(container: Container, key: str) -> None:
    container.place(key, DATA)
    async with opened(container) as store:
        with FaultProxy(container.url) as proxy:
            async with opened(container, {"account_url": f"{proxy.url}/{ACCOUNT}", "credential": KEY}) as harmed:
                proxy.always(Flip(100))
                with pytest.raises(ChecksumError, match="damaged bytes: their md5"):
                    await got(harmed, key, len(DATA), verify=True)
        assert await got(store, key, len(DATA), verify=True) == DATA


async def test_parts_become_one_blob_with_the_checksum_of_all(container: Container, key: str) -> None:
    async with opened(container) as store:
        upload = await store.begin(key, deadline=soon())
        pieces = [DATA[:1000], DATA[1000:5000], DATA[5000:]]
        parts = [
            await store.part(key, upload, number, (memoryview(piece),), deadline=soon())
            for number, piece in enumerate(pieces, 1)
        ]
        etag = await store.complete(key, upload, parts, exists="error", deadline=soon())
        info = await store.head(key, deadline=soon())
        assert (info.etag, info.nbytes) == (etag, len(DATA))
        assert info.checksum == f"crc64nvme:{base64.b64encode(crc64nvme(DATA).to_bytes(8, 'big')).decode()}"
        assert await got(store, key, len(DATA)) == DATA
        upload = await store.begin(key, deadline=soon())
        part = await store.part(key, upload, 1, (memoryview(b"other"),), deadline=soon())
        assert await store.complete(key, upload, [part], exists="keep", deadline=soon()) == ""
        with pytest.raises(ObjectExistsError, match=key):
            await store.complete(key, upload, [part], exists="error", deadline=soon())
        assert container.fetch(key) == DATA


async def test_a_list_has_all_pages(container: Container, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyncxfer.backends._azure_store._PAGE", 3)
    keys = [f"{key}/{number:02}" for number in range(8)]
    async with opened(container) as store:
        for name in keys:
            await put(store, name, b"abc")
        assert [info.key async for info in store.list(f"{key}/", deadline=soon())] == keys
        assert [info.key async for info in store.list(f"{key}/", after=keys[4], deadline=soon())] == keys[5:]
        await store.delete([*keys, f"{key}/never"], deadline=soon())
        assert [info.key async for info in store.list(f"{key}/", deadline=soon())] == []


async def test_a_changed_blob_is_an_error(container: Container, key: str) -> None:
    async with opened(container) as store:
        etag = await put(store, key, DATA)
        await put(store, key, DATA[::-1])
        with pytest.raises(ObjectError, match=rf"{key}: the object is not the version .* any more"):
            await got(store, key, len(DATA), etag=etag)


def test_a_list_as_azure_itself_writes_it() -> None:
    """With a byte order mark, etags without quotes, and names in percent where XML cannot say them."""
    properties = "<Properties><Last-Modified>Mon, 27 Jul 2026 10:00:00 GMT</Last-Modified><Etag>0x8D</Etag>"
    properties += "<Content-Length>5</Content-Length><Content-MD5/></Properties>"
    names = "<Name>a/b</Name>", '<Name Encoded="true">a%00%EF%BF%BE</Name>'
    blobs = "".join(f"<Blob>{name}{properties}</Blob>" for name in names)
    said = (
        f'\ufeff<?xml version="1.0" encoding="utf-8"?><EnumerationResults><Blobs>{blobs}</Blobs></EnumerationResults>'
    )
    found = [_listed(node) for node in parse(said.encode()).all("Blobs")[0].all("Blob")]
    assert [info.key for info in found] == ["a/b", "a\0\ufffe"]
    assert {(info.nbytes, info.etag, info.modified, info.checksum) for info in found} == {
        (5, '"0x8D"', 1785146400.0, None)
    }


# ---- who asks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["connection_string", "sas", "sas in the url", "sas object", "key object"])
async def test_each_credential_opens(container: Container, key: str, how: str) -> None:
    from azure.core.credentials import AzureNamedKeyCredential, AzureSasCredential

    url, sas = container.account_url, container.sas()
    kinds: dict[str, dict[str, object]] = {
        "connection_string": {"connection_string": container.connection_string},
        "sas": {"account_url": url, "credential": sas},
        "sas in the url": {"account_url": f"{url}?{sas}"},
        "sas object": {"account_url": url, "credential": AzureSasCredential(sas)},
        "key object": {"account_url": url, "credential": AzureNamedKeyCredential(ACCOUNT, KEY)},
    }
    async with opened(container, kinds[how]) as store:
        await put(store, f"{key} ä?", DATA)
        await store.copy(f"{key} ä?", f"{key} copy", deadline=soon())
        assert await got(store, f"{key} copy", len(DATA)) == DATA


class Tokens:
    """A credential as azure.identity has them, whose tokens Azurite takes though nobody has signed them."""

    def __init__(self, *lasting: float) -> None:
        self.lasting = list(lasting)
        self.asked = 0

    def get_token(self, *scopes: str, **more: object) -> Any:
        from azure.core.credentials import AccessToken

        assert scopes == ("https://storage.azure.com/.default",)
        self.asked += 1
        until = int(time.time() + (self.lasting.pop(0) if self.lasting else 3600))
        issuer = "https://sts.windows.net/00000000-0000-0000-0000-000000000000/"
        claims = {"aud": "https://storage.azure.com", "iss": issuer, "iat": 0, "nbf": 0, "exp": until}
        parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in ({"alg": "none"}, claims)]
        return AccessToken(b".".join([*parts, b"c2lnbmVk"]).decode(), until)


@pytest.fixture(name="secure")
def secure_fixture(tmp_path: Path) -> Iterator[tuple[Container, Path]]:
    """A container of an Azurite that speaks TLS, and what its client has to trust."""
    certified = certificates(tmp_path)
    with azurite(certified) as url:
        yield Container.make(url, certified.client_context()), certified.ca


async def test_tokens_are_sent_and_renewed(secure: tuple[Container, Path], key: str) -> None:
    container, ca = secure
    tokens = Tokens(-100.0)
    options = {"account_url": container.account_url, "credential": tokens, "verify": str(ca)}
    async with opened(container, options) as store:
        await put(store, key, DATA)
        assert await got(store, key, len(DATA), verify=True) == DATA
    assert tokens.asked == 2
    tokens = Tokens(-100.0, -100.0)
    async with opened(container, {**options, "credential": tokens}) as store:
        with pytest.raises(ObjectError, match=r"\(401|\(403, AuthenticationFailed"):
            await put(store, key, DATA)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({}, "give the option account_url"),
        ({"account_url": "https://a.blob.core.windows.net", "connection_string": "x"}, "has to be said once"),
        ({"acount_url": "x"}, "'acount_url' is no option of azure; did you mean 'account_url'?"),
        ({"account_url": 5}, "option account_url: 5 will not do; expected text"),
        ({"connection_string": "nonsense"}, "correct the option .*connection_string"),
        (
            {"account_url": "https://a.blob.core.windows.net", "credential": "not base64"},
            "account key is not in base64",
        ),
        ({"account_url": "https://a.blob.core.windows.net", "credential": 5}, "credential: what was given will not do"),
        ({"account_url": "http://127.0.0.1:1/a"}, "no credentials were given, and tokens go over https only"),
        ({"account_url": "http://127.0.0.1:1/a", "credential": Tokens()}, "only supported with HTTPS"),
        ({"account_url": "https://a.blob.core.windows.net", "credential": KEY, "anonymous": True}, "give one"),
        (
            {"account_url": "https://a.blob.core.windows.net", "credential": KEY, "verify": "/no/such"},
            "certificates cannot be read",
        ),
    ],
)
async def test_options_that_are_of_no_use(options: dict[str, object], what: str) -> None:
    pytest.importorskip("azure.storage.blob", reason="pip install 'asyncxfer[azure]'")
    with pytest.raises(RegistrationError, match=what) as caught:
        await AzureAccount.open("container", options)
    assert "az://container" in str(caught.value)
    assert "not base64" not in str(caught.value)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "azure.storage.blob", None)
    with pytest.raises(BackendError, match=r"azure-storage-blob: pip install 'asyncxfer\[azure\]'"):
        AzureBackend.examine(Config())


async def test_who_may_not_is_told(container: Container, key: str) -> None:
    other = base64.b64encode(b"another key").decode()
    cases: list[tuple[dict[str, object], str]] = [
        ({"credential": other}, r"\(403, AuthorizationFailure|\(403, AuthenticationFailed"),
        (
            {"credential": container.sas(read=True)},
            r"\(403, AuthorizationPermissionMismatch.*Storage Blob Data Contributor",
        ),
        ({"credential": container.sas(lasts=-60.0)}, r"\(403, AuthenticationFailed|\(403, AuthorizationFailure"),
        ({"anonymous": True}, r"\((401|403|404|409), "),
    ]
    for options, what in cases:
        async with opened(container, {"account_url": container.account_url, **options}) as store:
            with pytest.raises(ObjectError, match=what) as caught:
                await put(store, key, DATA)
            assert caught.value.request_id in str(caught.value)
            assert f"az://{container.name}/{key}" in str(caught.value)


async def test_a_missing_container_is_named(container: Container) -> None:
    async with opened(container, name="not-there") as store:
        for ask in (put(store, "k", DATA), got(store, "k", 3)):
            with pytest.raises(
                ObjectError, match=r"az://not-there/k: .*ContainerNotFound.*create the container"
            ) as caught:
                await ask
            assert not isinstance(caught.value, ObjectMissingError)


# ---- faults -------------------------------------------------------------------------------------------------------

FAULTS: dict[str, Fault] = {
    "busy": Reply(503, b"", {"x-ms-error-code": "ServerBusy", "Retry-After": "0.01"}),
    "internal error": Reply(500, b"", {"x-ms-error-code": "InternalError"}),
    "reset": Reset(),
    "reset before": Reset(reaches_server=False),
    "stalled": Stall(),
}
BODY_FAULTS: dict[str, Fault] = {
    "truncated": Truncate(after=5000),
    "reset in the middle": Reset(after=5000),
    "stalled in the middle": Stall(after=5000),
    "flipped": Flip(5000),
}


@contextlib.asynccontextmanager
async def harmed(container: Container) -> AsyncIterator[tuple[AzureStore, FaultProxy]]:
    with FaultProxy(container.url) as proxy:
        options: dict[str, object] = {"account_url": f"{proxy.url}/{ACCOUNT}", "credential": KEY}
        async with opened(container, options, object_attempt_timeout=0.3) as store:
            yield store, proxy


@pytest.mark.parametrize("fault", FAULTS)
async def test_each_operation_survives(container: Container, key: str, fault: str) -> None:
    async with harmed(container) as (store, proxy):
        await put(store, key, DATA)  # it knows what the server can do by now

        async def parts() -> None:
            upload = await store.begin(key, deadline=soon())
            proxy.next(FAULTS[fault])
            part = await store.part(key, upload, 1, (memoryview(DATA),), deadline=soon())
            proxy.next(FAULTS[fault])
            await store.complete(key, upload, [part], exists="replace", deadline=soon())

        async def listed() -> None:
            assert key in [info.key async for info in store.list(key, deadline=soon())]

        async def read() -> None:
            assert await got(store, key, len(DATA)) == DATA

        for operation in (
            lambda: put(store, key, DATA),
            lambda: put(store, f"{key} new", DATA, "error"),
            read,
            lambda: store.head(key, deadline=soon()),
            listed,
            lambda: store.copy(key, f"{key} copy", deadline=soon()),
            parts,
            lambda: store.delete([f"{key} new", f"{key} copy"], deadline=soon()),
        ):
            proxy.next(FAULTS[fault])
            await operation()
            proxy.go_on()
        assert await got(store, key, len(DATA)) == DATA
        assert [info.key async for info in store.list(key, deadline=soon())] == [key]


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("fault", BODY_FAULTS)
async def test_a_body_that_suffers_arrives(container: Container, key: str, fault: str, verify: bool) -> None:
    async with harmed(container) as (store, proxy):
        await put(store, key, DATA)
        proxy.next(BODY_FAULTS[fault], when=lambda request: request.method == "GET")
        assert await got(store, key, len(DATA), verify=verify) == DATA
        proxy.go_on()
