"""`S3Store` against SeaweedFS: what its operations do, and what their errors say."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator

import pytest
from http_server import Client, ok, serving
from s3_accounts import FixedAccount, s3_store, soon
from servers import Identity, S3Server, plain_request

from asyncxfer import ObjectError, ObjectExistsError, ObjectMissingError
from asyncxfer._config import Config
from asyncxfer.backends._object._store import ObjectStore
from asyncxfer.backends._s3_store import Credentials, S3Store

SEA = os.urandom(6 << 20)


def sea(nbytes: int, at: int = 0) -> memoryview:
    return memoryview(SEA)[at : at + nbytes]


def place(nbytes: int) -> memoryview:
    return memoryview(bytearray(nbytes))


def uploads(s3: S3Server, bucket: str) -> int:
    """How many multipart uploads have been begun and not ended."""
    answer = plain_request("GET", f"{s3.url}/{bucket}?uploads=", identity=s3.admin)
    assert answer.status == 200
    return answer.body.count(b"<UploadId>")


@pytest.fixture(params=["http", "https"])
async def store(request: pytest.FixtureRequest, s3: S3Server, bucket: str) -> AsyncIterator[S3Store]:
    account = FixedAccount(s3.url, bucket, s3.admin)
    if request.param == "https":
        account = FixedAccount(s3.https_url, bucket, s3.admin, tls=s3.tls)
    async with s3_store(account) as store:
        yield store


def as_a_store(store: S3Store) -> ObjectStore:
    """Hold, for a type checker, that it is one."""
    return store


async def whole(store: S3Store, key: str, nbytes: int) -> memoryview:
    found = place(nbytes)
    await store.read(key, 0, (found,), whole=True, verify=True, etag=None, deadline=soon())
    return found


@pytest.mark.parametrize("nbytes", [0, 1, 16 << 10, 3 << 20])
async def test_what_is_written_is_read(store: S3Store, nbytes: int) -> None:
    third = nbytes // 3
    etag = await store.write("a/b", (sea(third), sea(nbytes - third, third)), exists="replace", deadline=soon())
    found = place(nbytes)
    read = await store.read(
        "a/b", 0, (found[:third], found[third:]), whole=True, verify=False, etag=etag, deadline=soon()
    )
    assert (found, read.etag, read.nbytes) == (sea(nbytes), etag, nbytes)
    info = await store.head("a/b", deadline=soon())
    assert (info.key, info.nbytes, info.etag) == ("a/b", nbytes, etag)
    assert info.checksum is not None
    assert info.checksum.startswith("crc64nvme:")


@pytest.mark.parametrize("key", ["plain", "with space/ü&<>\"'", "a+b%2Fc?x=1#y", "tab\tand\nline"])
async def test_any_key_is_written_found_and_deleted(store: S3Store, key: str) -> None:
    await store.write(key, (sea(10),), exists="replace", deadline=soon())
    assert await whole(store, key, 10) == sea(10)
    assert [info.key async for info in store.list("", deadline=soon())] == [key]
    await store.copy(key, "copy of " + key, deadline=soon())
    await store.delete([key, "copy of " + key, "never was"], deadline=soon())
    assert [info.key async for info in store.list("", deadline=soon())] == []


@pytest.mark.parametrize("verify", [False, True])
async def test_a_range_is_read(store: S3Store, verify: bool) -> None:
    await store.write("k", (sea(3 << 20),), exists="replace", deadline=soon())
    found = place(2 << 20)
    read = await store.read(
        "k", 99, (found[:5], found[5:]), whole=False, verify=verify, etag=None, deadline=soon(), crc=True
    )
    assert found == sea(2 << 20, 99)
    assert read.nbytes == 3 << 20
    assert read.crc is not None


async def test_an_upload_in_parts_becomes_one_object(s3: S3Server, bucket: str, store: S3Store) -> None:
    upload = await store.begin("k", deadline=soon())
    first = await store.part("k", upload, 1, (sea(5 << 20),), deadline=soon())
    second = await store.part("k", upload, 2, (sea(1 << 20, 5 << 20),), deadline=soon())
    etag = await store.complete("k", upload, (first, second), exists="replace", deadline=soon())
    assert await whole(store, "k", 6 << 20) == sea(6 << 20)
    info = await store.head("k", deadline=soon())
    assert (info.etag, info.nbytes) == (etag, 6 << 20)
    assert uploads(s3, bucket) == 0


async def test_an_aborted_upload_leaves_nothing(s3: S3Server, bucket: str, store: S3Store) -> None:
    upload = await store.begin("k", deadline=soon())
    await store.part("k", upload, 1, (sea(5 << 20),), deadline=soon())
    await store.abort("k", upload, deadline=soon())
    assert uploads(s3, bucket) == 0
    with pytest.raises(ObjectError, match=r"put of s3://.*/k: .*NoSuchUpload.*; begin the upload anew"):
        await store.part("k", upload, 2, (sea(1),), deadline=soon())
    await store.abort("k", upload, deadline=soon())


@pytest.mark.parametrize("parts", [False, True])
async def test_what_is_there_is_replaced_kept_or_an_error(
    s3: S3Server, bucket: str, store: S3Store, parts: bool
) -> None:
    async def put(body: memoryview, exists: str) -> str:
        assert exists in ("replace", "keep", "error")
        if not parts:
            return await store.write("k", (body,), exists=exists, deadline=soon())  # type: ignore[arg-type]
        upload = await store.begin("k", deadline=soon())
        part = await store.part("k", upload, 1, (body,), deadline=soon())
        try:
            return await store.complete("k", upload, (part,), exists=exists, deadline=soon())  # type: ignore[arg-type]
        except ObjectError:
            await store.abort("k", upload, deadline=soon())
            raise

    assert await put(sea(10), "error")
    assert await put(sea(10, 50), "keep") == ""
    with pytest.raises(ObjectExistsError, match=r"there is an object of this key.*exists='replace'") as caught:
        await put(sea(10, 50), "error")
    assert (caught.value.status, caught.value.code) == (412, "PreconditionFailed")
    assert caught.value.request_id in str(caught.value)
    assert await whole(store, "k", 10) == sea(10)
    assert await put(sea(10, 50), "replace")
    assert await whole(store, "k", 10) == sea(10, 50)
    assert uploads(s3, bucket) == 0


async def test_a_list_has_all_pages_in_order(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyncxfer.backends._s3_store._PAGE", 3)
    keys = [f"a/{n:02}" for n in range(10)]
    for key in (*keys, "b"):
        await store.write(key, (sea(3),), exists="replace", deadline=soon())
    assert [info.key async for info in store.list("a/", deadline=soon())] == keys
    assert [info.key async for info in store.list("a/", deadline=soon(), after="a/04")] == keys[5:]
    await store.delete(keys, deadline=soon())
    assert [info.key async for info in store.list("", deadline=soon())] == ["b"]


async def test_a_large_object_is_copied_in_parts(
    s3: S3Server, bucket: str, store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(S3Store, "largest_copy", 1 << 20)
    monkeypatch.setattr(S3Store, "copied_part", 5 << 20)
    await store.write("k", (sea(6 << 20),), exists="replace", deadline=soon())
    await store.copy("k", "l", deadline=soon())
    assert await whole(store, "l", 6 << 20) == sea(6 << 20)
    assert uploads(s3, bucket) == 0


# ---- what errors say ----------------------------------------------------------------------------------------------


async def test_a_missing_object_is_named(store: S3Store) -> None:
    for ask in (
        store.head("k", deadline=soon()),
        store.read("k", 0, (place(3),), whole=True, verify=False, etag=None, deadline=soon()),
        store.read("k", 5, (place(3),), whole=False, verify=False, etag=None, deadline=soon()),
        store.copy("k", "l", deadline=soon()),
    ):
        with pytest.raises(
            ObjectMissingError, match=r"of s3://.*/k: there is no such object .*; check the key"
        ) as caught:
            await ask
        error = caught.value
        assert (error.url, error.status, error.backend) == (f"{store.url}/k", 404, "s3")
        assert error.request_id
        assert error.request_id in str(error)


@pytest.mark.parametrize("nbytes", [9, 11])
async def test_an_object_of_another_length_is_an_error(store: S3Store, nbytes: int) -> None:
    await store.write("k", (sea(10),), exists="replace", deadline=soon())
    with pytest.raises(ObjectError, match=rf"/k: the object has 10 bytes, and {nbytes} were expected .*request id"):
        await whole(store, "k", nbytes)


@pytest.mark.parametrize(("offset", "end"), [(9, 11), (10, 11), (12, 20)])
async def test_a_range_behind_the_end_is_an_error(store: S3Store, offset: int, end: int) -> None:
    await store.write("k", (sea(10),), exists="replace", deadline=soon())
    what = rf"/k: the object has 10 bytes, and those from {offset} to {end} were wanted .*request id"
    with pytest.raises(ObjectError, match=what):
        await store.read("k", offset, (place(end - offset),), whole=False, verify=False, etag=None, deadline=soon())


@pytest.mark.parametrize("whole", [False, True])
async def test_a_changed_object_is_an_error(store: S3Store, whole: bool) -> None:
    etag = await store.write("k", (sea(10),), exists="replace", deadline=soon())
    await store.write("k", (sea(10, 50),), exists="replace", deadline=soon())
    with pytest.raises(ObjectError, match=r"/k: the object is not the version .* any more .*request id"):
        await store.read("k", 0, (place(10),), whole=whole, verify=False, etag=etag, deadline=soon())


@pytest.mark.parametrize(
    ("who", "what"),
    [
        ("stranger", r"\(403, AccessDenied, request id \w+\); let these credentials do s3:GetObject"),
        ("nobody", r"\(403, InvalidAccessKeyId, request id \w+\); check aws_access_key_id"),
        ("wrong", r"\(403, SignatureDoesNotMatch, request id \w+\); check aws_secret_access_key"),
        ("anonymous", r"\(403, AccessDenied, request id \w+\)"),
    ],
)
async def test_who_may_not_is_told(s3: S3Server, bucket: str, who: str, what: str) -> None:
    identities = {
        "stranger": s3.stranger, "nobody": Identity("x", "y"), "wrong": Identity(s3.admin.access_key, "y"),
    }  # fmt: skip
    async with s3_store(FixedAccount(s3.url, bucket, identities.get(who))) as store:
        with pytest.raises(ObjectError, match=what):
            await whole(store, "k", 3)


async def test_what_may_not_be_deleted_is_told(s3: S3Server, bucket: str) -> None:
    async with s3_store(FixedAccount(s3.url, bucket, s3.stranger)) as store:
        for keys in (["k"], ["k", "l"]):
            with pytest.raises(
                ObjectError, match=r"delete of .*/k: .*AccessDenied.*; let these credentials do s3:Delete"
            ):
                await store.delete(keys, deadline=soon())


async def test_a_missing_bucket_is_named(s3: S3Server) -> None:
    async with s3_store(FixedAccount(s3.url, "not-there", s3.admin)) as store:
        with pytest.raises(
            ObjectError, match=r"get of s3://not-there/k: .*NoSuchBucket.*; create the bucket"
        ) as caught:
            await whole(store, "k", 3)
        assert not isinstance(caught.value, ObjectMissingError)


# ---- what goes out ------------------------------------------------------------------------------------------------


PAGE = b"<ListBucketResult><IsTruncated>%b</IsTruncated>%b</ListBucketResult>"
NEXT = b"<NextContinuationToken>t</NextContinuationToken><Contents><Key>k</Key><Size>1</Size></Contents>"


@contextlib.asynccontextmanager
async def asked_of(answer: bytes, who: Identity | None) -> AsyncIterator[tuple[FixedAccount, S3Store, list[bytes]]]:
    """A store whose bucket is a host's, which says the same to everything; and what was asked."""
    asked: list[bytes] = []

    async def script(client: Client) -> None:
        while True:
            asked.append(await client.request())
            await client.say(answer)

    async with serving(script) as url:
        account = FixedAccount(url, "bucket", who)
        account.path = ""
        store = S3Store("bucket", account, Config())
        yield account, store, asked
        await store.aclose()


async def test_a_bucket_that_the_host_names_is_not_in_the_path() -> None:
    async with asked_of(ok(PAGE % (b"false", b"")), Identity("key", "secret")) as (_, store, asked):
        assert [info async for info in store.list("a b", deadline=soon())] == []
        await store.write("a b", (), exists="replace", deadline=soon())
    assert asked[0].startswith(b"GET /?encoding-type=url&list-type=2&max-keys=1000&prefix=a%20b HTTP/1.1\r\n")
    assert asked[1].startswith(b"PUT /a%20b HTTP/1.1\r\n")
    assert b"SignedHeaders=host;x-amz-checksum-crc64nvme;x-amz-content-sha256;x-amz-date," in asked[1]


async def test_who_has_no_credentials_signs_nothing() -> None:
    async with asked_of(ok(), None) as (_, store, asked):
        await store.write("k", (), exists="replace", deadline=soon())
    assert b"authorization" not in asked[0]
    assert b"x-amz-date" not in asked[0]


async def test_a_session_token_is_sent_and_signed() -> None:
    async with asked_of(ok(), None) as (account, store, asked):
        account.keys = Credentials("key", "secret", "token")
        await store.write("k", (), exists="replace", deadline=soon())
    assert b"x-amz-security-token: token\r\n" in asked[0]
    assert b"x-amz-security-token," in asked[0]


async def test_a_list_without_an_end_is_an_error() -> None:
    async with asked_of(ok(PAGE % (b"true", NEXT)), None) as (_, store, asked):
        with pytest.raises(ObjectError, match="does not lead to the next"):
            async for _ in store.list("", deadline=soon()):
                pass
    assert len(asked) == 2
