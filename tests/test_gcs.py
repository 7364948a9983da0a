"""Backend ``gcs`` against fake-gcs-server: the contract, credentials of every kind, what errors say, and faults."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from fault_proxy import Fault, FaultProxy, Flip, Reply, Reset, Stall, Truncate
from s3_accounts import soon
from servers import plain_request

from asyncxfer import ObjectError, ObjectExistsError, RegistrationError
from asyncxfer._config import Config
from asyncxfer._fast.crc32c import crc32c
from asyncxfer.abc import BackendError, Exists
from asyncxfer.backends._gcs_account import GcsAccount
from asyncxfer.backends._gcs_store import GcsStore
from asyncxfer.backends._object._sums import combine_crc32c
from asyncxfer.backends.gcs import GcsBackend
from asyncxfer.testing import ObjectContract

DATA = os.urandom(20_000)

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
    skips: ClassVar[Mapping[str, str]] = dict(ObjectContract.skips) | {
        "keep": "fake-gcs-server composes whatever the condition is"
    }
    many = 40

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

    async def unfinished(self) -> list[str]:
        where = f"{self._at}/storage/v1/b/{_BUCKET}/o?prefix=.asyncxfer-parts%2F"
        answer = await asyncio.to_thread(plain_request, "GET", where)
        return [item["name"] for item in json.loads(answer.body).get("items", ())]


# ---- the store by itself ------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def opened(
    server: str, options: Mapping[str, object] | None = None, *, bucket: str = _BUCKET, **config: Any
) -> AsyncIterator[GcsStore]:
    """A store of a bucket, by these options or by nobody's name."""
    account = await GcsAccount.open(bucket, options or {"endpoint_url": server, "anonymous": True})
    store = GcsStore(account, Config(**config))
    try:
        yield store
    finally:
        await store.aclose()


async def put(store: GcsStore, key: str, data: bytes, exists: Exists = "replace") -> str:
    return await store.write(key, (memoryview(data),), exists=exists, deadline=soon())


async def got(store: GcsStore, key: str, nbytes: int, **more: Any) -> bytes:
    found = bytearray(nbytes)
    settings: dict[str, Any] = {"whole": True, "verify": False, "etag": None, "deadline": soon()}
    await store.read(key, 0, (memoryview(found),), **{**settings, **more})
    return bytes(found)


async def upload(store: GcsStore, key: str, *, exists: Exists = "replace") -> str:
    """Write an object in three parts."""
    begun = await store.begin(key, deadline=soon())
    pieces = [DATA[:1000], DATA[1000:5000], DATA[5000:]]
    parts = [
        await store.part(key, begun, number, (memoryview(piece),), deadline=soon())
        for number, piece in enumerate(pieces, 1)
    ]
    return await store.complete(key, begun, parts, exists=exists, deadline=soon())


def sum_of(data: bytes) -> str:
    return f"crc32c:{base64.b64encode(crc32c(data).to_bytes(4, 'big')).decode()}"


@pytest.fixture(name="key")
def key_fixture() -> str:
    return f"{os.getpid()}/{next(_numbers)}"


@pytest.mark.parametrize("nbytes", [0, 1, 63, 64, 4097])
def test_checksums_of_two_runs_are_put_together(nbytes: int) -> None:
    first, second = DATA[:777], DATA[777 : 777 + nbytes]
    assert combine_crc32c(crc32c(first), crc32c(second), nbytes) == crc32c(first + second)


async def test_what_is_written_has_its_checksum(server: str, key: str) -> None:
    async with opened(server) as store:
        generation = await put(store, key, DATA)
        info = await store.head(key, deadline=soon())
        assert (info.key, info.nbytes, info.etag, info.checksum) == (key, len(DATA), generation, sum_of(DATA))
        assert abs(info.modified - time.time()) < 3600
        assert await got(store, key, len(DATA), etag=generation) == DATA


async def test_parts_become_one_object_and_go(server: str, key: str) -> None:
    async with opened(server) as store:
        generation = await upload(store, key)
        info = await store.head(key, deadline=soon())
        assert (info.nbytes, info.etag, info.checksum) == (len(DATA), generation, sum_of(DATA))
        assert await got(store, key, len(DATA)) == DATA
        assert [info.key async for info in store.list(".asyncxfer-parts/", deadline=soon())] == []


async def test_what_is_there_is_kept_by_an_upload_or_is_an_error(server: str, key: str) -> None:
    """The condition is sent, and its answer understood; the server here does not look at it."""
    said = {"error": {"code": 412, "message": "At least one of the pre-conditions you specified did not hold."}}
    with FaultProxy(server) as proxy:
        async with opened(server, {"endpoint_url": proxy.url, "anonymous": True}) as store:
            await put(store, key, b"before")
            exists: Exists
            for exists in ("keep", "error"):
                proxy.next(Reply(412, json.dumps(said).encode()), when=lambda request: "/compose?" in request.target)
                if exists == "keep":
                    assert await upload(store, key, exists=exists) == ""
                else:
                    with pytest.raises(ObjectExistsError, match=key):
                        await upload(store, key, exists=exists)
            await upload(store, key)
        composed = [request.target for request in proxy.requests if "/compose?" in request.target]
        assert ["ifGenerationMatch=0" in target for target in composed] == [True, True, False]


async def test_an_upload_that_is_given_up_leaves_nothing(server: str, key: str) -> None:
    async with opened(server) as store:
        begun = await store.begin(key, deadline=soon())
        await store.part(key, begun, 1, (memoryview(DATA),), deadline=soon())
        assert [info.key async for info in store.list(begun, deadline=soon())] == [f"{begun}01"]
        assert f"{begun}01" not in [info.key async for info in store.list("", deadline=soon())]
        await store.abort(key, begun, deadline=soon())
        assert [info.key async for info in store.list(begun, deadline=soon())] == []


async def test_a_list_has_all_pages(server: str, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyncxfer.backends._gcs_store._PAGE", 3)
    keys = [f"{key}/{number:02}" for number in range(8)]
    async with opened(server) as store:
        for name in keys:
            await put(store, name, b"abc")
        assert [info.key async for info in store.list(f"{key}/", deadline=soon())] == keys
        assert [info.key async for info in store.list(f"{key}/", after=keys[4], deadline=soon())] == keys[5:]
        await store.delete([*keys, f"{key}/never"], deadline=soon())
        assert [info.key async for info in store.list(f"{key}/", deadline=soon())] == []


async def test_a_changed_object_is_an_error(server: str, key: str) -> None:
    async with opened(server) as store:
        generation = await put(store, key, DATA)
        await put(store, key, DATA[::-1])
        with pytest.raises(ObjectError, match=rf"{key}: the object is not the version {generation} any more"):
            await got(store, key, len(DATA), etag=generation)


# ---- who asks -----------------------------------------------------------------------------------------------------


class Issuer(ThreadingHTTPServer):
    """Gives tokens to whoever comes with an assertion, as Google does for service accounts."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Issuing)
        self.issued = 0
        self.refuses = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/token"


class _Issuing(BaseHTTPRequestHandler):
    server: Issuer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        assert b"assertion=" in body
        self.server.issued += 1
        status, said = 200, {"access_token": f"token-{self.server.issued}", "expires_in": 3600, "token_type": "Bearer"}
        if self.server.refuses:
            status, said = 400, {"error": "invalid_grant", "error_description": "Account not found"}
        answer = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture(name="issuer")
def issuer_fixture() -> Iterator[Issuer]:
    with Issuer() as issuer:
        thread = threading.Thread(target=issuer.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield issuer
        issuer.shutdown()
        thread.join()


@pytest.fixture(name="service_file")
def service_file_fixture(issuer: Issuer, tmp_path: Path) -> Path:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = tmp_path / "service.json"
    path.write_text(
        json.dumps(
            {
                "type": "service_account", "project_id": "test", "private_key_id": "1", "private_key": pem.decode(),
                "client_email": "who@test.iam.gserviceaccount.com", "client_id": "1", "token_uri": issuer.url,
            }
        )
    )  # fmt: skip
    return path


@pytest.fixture(autouse=True)
def only_what_the_test_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """What google-auth looks into is the test's."""
    for name in list(os.environ):
        if name.startswith(("GOOGLE_", "CLOUDSDK_", "STORAGE_EMULATOR")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("CLOUDSDK_CONFIG", "/no/such/folder")
    monkeypatch.setenv("NO_GCE_CHECK", "true")


async def test_a_service_account_gets_tokens_and_others_when_they_are_refused(
    server: str, key: str, issuer: Issuer, service_file: Path
) -> None:
    with FaultProxy(server) as proxy:
        options = {"endpoint_url": proxy.url, "service_file": service_file, "project": "payer"}
        async with opened(server, options) as store:
            await put(store, key, DATA)
            proxy.next(Reply(401, b'{"error": {"code": 401, "message": "Invalid Credentials"}}'))
            assert await got(store, key, len(DATA)) == DATA
            issuer.refuses = True
            proxy.next(Reply(401))
            with pytest.raises(ObjectError, match=r"there is no token any more: .*Account not found"):
                await got(store, key, len(DATA))
        sent = [request.headers["authorization"] for request in proxy.requests]
        assert sent == ["Bearer token-1", "Bearer token-1", "Bearer token-2", "Bearer token-2"]
        assert {request.headers["x-goog-user-project"] for request in proxy.requests} == {"payer"}


async def test_the_application_default_credentials_are_found(
    server: str, key: str, service_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(service_file))
    with FaultProxy(server) as proxy:
        async with opened(server, {"endpoint_url": proxy.url}) as store:
            await put(store, key, DATA)
        assert proxy.requests[0].headers["authorization"] == "Bearer token-1"


async def test_a_token_is_sent_as_it_is(server: str, key: str) -> None:
    with FaultProxy(server) as proxy:
        async with opened(server, {"endpoint_url": proxy.url, "token": "abc"}) as store:
            await put(store, key, DATA)
            proxy.always(Reply(401))
            with pytest.raises(ObjectError, match=r"\(401, unauthorized\); get a new token"):
                await put(store, key, DATA)
        assert [request.headers["authorization"] for request in proxy.requests] == ["Bearer abc"] * 2


async def test_an_emulator_is_found_and_asks_nobody(server: str, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.removeprefix("http://"))
    account = await GcsAccount.open(_BUCKET, {})
    assert (account.endpoint, await account.grant()) == (server, None)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({}, "no credentials were found: .*gcloud auth application-default login"),
        ({"tokens": "x"}, "'tokens' is no option of gcs; did you mean 'token'"),
        ({"token": 5}, "option token: what was given will not do; expected text"),
        ({"endpoint_url": "storage"}, "option endpoint_url: 'storage' will not do; expected 'https://HOST'"),
        ({"token": "x", "anonymous": True}, "options token and anonymous: each says who asks; give one"),
        ({"service_file": "/no/such/file"}, "option service_file: .*No such file"),
        ({"credentials": "x"}, "expected credentials of google.auth"),
        ({"anonymous": "yes"}, "expected True or False"),
        ({"anonymous": True, "verify": "/no/such"}, "certificates cannot be read"),
    ],
)
async def test_options_that_are_of_no_use(options: dict[str, object], what: str) -> None:
    pytest.importorskip("google.auth", reason="pip install 'asyncxfer[gcs]'")
    with pytest.raises(RegistrationError, match=what) as caught:
        await GcsAccount.open(_BUCKET, options)
    assert f"gs://{_BUCKET}" in str(caught.value)


@pytest.mark.parametrize(("module", "package"), [("google.auth", "google-auth"), ("requests", "requests")])
def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, module: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BackendError, match=rf"{package}: pip install 'asyncxfer\[gcs\]'"):
        GcsBackend.examine(Config())


async def test_a_missing_bucket_is_named(server: str) -> None:
    async with opened(server, bucket="not-there") as store:
        with pytest.raises(ObjectError, match=r"put of gs://not-there/k: .*\(404.*create the bucket"):
            await put(store, "k", DATA)
        with pytest.raises(ObjectError, match=r"list of gs://not-there/: .*\(404.*create the bucket"):
            [info async for info in store.list("", deadline=soon())]


async def test_who_may_not_is_told(server: str, key: str) -> None:
    said = {"error": {"code": 403, "message": "who@test does not have access.", "errors": [{"reason": "forbidden"}]}}
    with FaultProxy(server) as proxy:
        async with opened(server, {"endpoint_url": proxy.url, "anonymous": True}) as store:
            proxy.always(Reply(403, json.dumps(said).encode(), {"x-guploader-uploadid": "an-id"}))
            with pytest.raises(
                ObjectError,
                match=r"get of gs://bucket/.*: who@test does not have access \(403, forbidden, request id an-id\); "
                "let who asks do storage.objects.get",
            ):
                await got(store, key, 3)


# ---- faults -------------------------------------------------------------------------------------------------------

FAULTS: dict[str, Fault] = {
    "busy": Reply(503, b"", {"Retry-After": "0.01"}),
    "too many": Reply(429, b'{"error": {"code": 429, "message": "Too many requests"}}'),
    "internal error": Reply(500),
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
async def harmed(server: str) -> AsyncIterator[tuple[GcsStore, FaultProxy]]:
    with FaultProxy(server) as proxy:
        options = {"endpoint_url": proxy.url, "anonymous": True}
        async with opened(server, options, object_attempt_timeout=0.3) as store:
            yield store, proxy


@pytest.mark.parametrize("fault", FAULTS)
async def test_each_operation_survives(server: str, key: str, fault: str) -> None:
    async with harmed(server) as (store, proxy):
        await put(store, key, DATA)

        async def listed() -> None:
            assert key in [info.key async for info in store.list(key, deadline=soon())]

        async def read() -> None:
            assert await got(store, key, len(DATA)) == DATA

        async def composed() -> None:
            proxy.next(FAULTS[fault], when=lambda request: "/compose" in request.target)
            await upload(store, key)

        for operation in (
            lambda: put(store, key, DATA),
            lambda: put(store, f"{key} new", DATA, "error"),
            read,
            lambda: store.head(key, deadline=soon()),
            listed,
            lambda: store.copy(key, f"{key} copy", deadline=soon()),
            composed,
            lambda: store.delete([f"{key} new", f"{key} copy"], deadline=soon()),
        ):
            proxy.next(FAULTS[fault])
            await operation()
            proxy.go_on()
        assert await got(store, key, len(DATA)) == DATA
        assert [info.key async for info in store.list(key, deadline=soon())] == [key]
        assert [info.key async for info in store.list(".asyncxfer-parts/", deadline=soon())] == []


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("fault", BODY_FAULTS)
async def test_a_body_that_suffers_arrives(server: str, key: str, fault: str, verify: bool) -> None:
    async with harmed(server) as (store, proxy):
        await put(store, key, DATA)
        proxy.next(BODY_FAULTS[fault], when=lambda request: request.method == "GET")
        assert await got(store, key, len(DATA), verify=verify) == DATA
        proxy.go_on()


async def test_bytes_that_the_store_has_differently_are_written_again(server: str, key: str) -> None:
    other = {"name": key, "size": str(len(DATA)), "generation": "1", "crc32c": "AAAAAA=="}
    async with harmed(server) as (store, proxy):
        proxy.next(Reply(200, json.dumps(other).encode()))
        await put(store, key, DATA)
        assert len(proxy.requests) == 2
        assert await got(store, key, len(DATA)) == DATA
