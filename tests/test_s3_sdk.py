"""The SDK's sources of credentials and endpoints, real ones on loopback, and its data path on a real S3 server."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import socket
import stat
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import (
    Fault,
    FaultProxy,
    Flip,
    Length,
    Reset,
    Stall,
    Truncate,
    expired_token,
    internal_error,
    slow_down,
)
from servers import REGION, Identity, S3Server, plain_request

from asyncxfer import (
    ChecksumError,
    Config,
    ObjectError,
    ObjectExistsError,
    ObjectMissingError,
    RegistrationError,
    TransferTimeout,
)  # fmt: skip
from asyncxfer._fast.crc64 import crc64nvme
from asyncxfer.backends._object._store import Read
from asyncxfer.backends._s3_dialect import Credentials
from asyncxfer.backends._s3_sdk import Account
from asyncxfer.backends._s3_sdk_store import SdkStore

pytest.importorskip("aiobotocore", reason="aiobotocore is not installed: pip install 'asyncxfer[s3]'")

DATA = os.urandom(1 << 20) + b"more"
BUCKET = "a-bucket"
KEYS = {"aws_access_key_id": "an-id", "aws_secret_access_key": "a-secret"}


@pytest.fixture(autouse=True)
def only_what_the_test_sets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The SDK looks into files and the environment: what is there is the test's."""
    for name in os.environ:
        if name.startswith("AWS_") or name.lower().endswith("_proxy") or name == "REQUESTS_CA_BUNDLE":
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@contextlib.asynccontextmanager
async def opened(bucket: str = BUCKET, **options: object) -> AsyncIterator[Account]:
    account = await Account.open(bucket, options)
    try:
        yield account
    finally:
        await account.aclose()


def profiles(folder: Path, text: str, *, name: str = "config") -> None:
    (folder / name).write_text(text)


def until(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


@pytest.fixture
def program(tmp_path: Path) -> Callable[[float], Path]:
    """A program that gives numbered credentials for so many seconds; a line in the file ``asked`` for each time."""

    def write(seconds: float) -> Path:
        path = tmp_path / "program"
        path.write_text(
            f"#!{sys.executable} -IS\n"
            "import datetime, json, pathlib\n"
            f"asked = pathlib.Path({str(tmp_path / 'asked')!r})\n"
            "with asked.open('a') as file:\n"
            "    file.write('again\\n')\n"
            "number = len(asked.read_text().splitlines())\n"
            f"end = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds={seconds})\n"
            "print(json.dumps({'Version': 1, 'AccessKeyId': f'id-{number}', 'SecretAccessKey': 'secret',\n"
            "                  'SessionToken': 'token', 'Expiration': end.isoformat()}))\n"
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        profiles(tmp_path, f"[default]\ncredential_process = {path}\n")
        return tmp_path / "asked"

    return write


class Metadata:
    """An HTTP server that answers what a container or an instance is told about itself."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.lifetime = 3600.0
        metadata = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.tell()

            def do_PUT(self) -> None:
                self.tell()

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.tell()

            def tell(self) -> None:
                metadata.asked.append(self.path)
                body = metadata.answer(self.path)
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def answer(self, path: str) -> bytes:
        if path == "/":
            return (
                "<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials>"
                "<AccessKeyId>id-web</AccessKeyId><SecretAccessKey>secret</SecretAccessKey>"
                f"<SessionToken>token</SessionToken><Expiration>{until(self.lifetime)}</Expiration>"
                "</Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
            ).encode()
        if path.endswith("/token"):
            return b"a-token"
        if path.endswith("/security-credentials/"):
            return b"a-role"
        given = {
            "Code": "Success",
            "AccessKeyId": f"id-{len(self.asked)}",
            "SecretAccessKey": "secret",
            "Token": "token",
            "Expiration": until(self.lifetime).replace("+00:00", "Z"),
        }
        return json.dumps(given).encode()

    @contextlib.contextmanager
    def serving(self) -> Iterator[Metadata]:
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            thread.join()
            self._server.server_close()


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    with Metadata().serving() as serving:
        yield serving


# ---- where credentials come from -----------------------------------------------------------------------------------


async def test_credentials_are_those_of_the_options() -> None:
    async with opened(**KEYS, aws_session_token="a-token") as account:
        given = await account.credentials()
        assert given == Credentials("an-id", "a-secret", "a-token")
        assert await account.credentials() is given
        assert await account.credentials(refresh=True) is given


async def test_credentials_are_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("ACCESS_KEY_ID", "id"), ("SECRET_ACCESS_KEY", "secret"), ("SESSION_TOKEN", "token")):
        monkeypatch.setenv(f"AWS_{name}", value)
    async with opened() as account:
        assert await account.credentials() == Credentials("id", "secret", "token")
        monkeypatch.setenv("AWS_SESSION_TOKEN", "another")
        assert await account.credentials(refresh=True) == Credentials("id", "secret", "another")


async def test_credentials_are_those_of_the_profile(tmp_path: Path) -> None:
    profiles(tmp_path, "[one]\naws_access_key_id = id-1\naws_secret_access_key = s\n", name="credentials")
    profiles(tmp_path, "[profile two]\naws_access_key_id = id-2\naws_secret_access_key = s\nregion = eu-west-3\n")
    async with opened(profile_name="one") as one, opened(profile_name="two") as two:
        assert await one.credentials() == Credentials("id-1", "s", None)
        assert await two.credentials() == Credentials("id-2", "s", None)
        assert (one.region, two.region) == (REGION, "eu-west-3")


async def test_credentials_of_a_container_are_asked_for_where_it_says(
    metadata: Metadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{metadata.url}/mine")
    async with opened() as account:
        first = await account.credentials()
        assert first == Credentials("id-1", "secret", "token")
        assert await account.credentials() is first
        assert metadata.asked == ["/mine"]
        assert await account.credentials(refresh=True) == Credentials("id-2", "secret", "token")


async def test_credentials_of_an_instance_are_asked_of_it(metadata: Metadata, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "false")
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", metadata.url)
    async with opened() as account:
        given = await account.credentials()
        assert given == Credentials("id-3", "secret", "token")
        assert metadata.asked[-1].endswith("/security-credentials/a-role")


async def test_credentials_of_a_role_are_exchanged_for_a_token(
    metadata: Metadata, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("a-token")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/one")
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", metadata.url)
    async with opened(region_name=REGION) as account:
        assert await account.credentials() == Credentials("id-web", "secret", "token")


async def test_credentials_of_a_program_are_renewed_once_before_they_expire(program: Callable[[float], Path]) -> None:
    asked = program(5.0)
    async with opened() as account:
        given = first = await account.credentials()
        times = len(asked.read_text().splitlines())
        while given is first:
            assert first is not None
            await asyncio.sleep(0.01)
            given, *_ = await asyncio.gather(*(account.credentials() for _ in range(50)))
        assert given == Credentials(f"id-{times + 1}", "secret", "token")
    assert len(asked.read_text().splitlines()) == times + 1


async def test_fifty_that_wait_for_credentials_ask_once(program: Callable[[float], Path]) -> None:
    asked = program(3600.0)
    async with opened() as account:
        found = await asyncio.gather(*(account.credentials(refresh=True) for _ in range(50)))
        assert {given.access_key for given in found if given is not None} == {"id-2"}
        # Those who were refused with the old ones as well, and say so later, cause no third.
        assert await account.credentials(refresh=True) is found[0]
    assert len(asked.read_text().splitlines()) == 2


async def test_credentials_that_cannot_be_renewed_are_given_until_they_expire(
    program: Callable[[float], Path], tmp_path: Path
) -> None:
    program(3.0)
    async with opened() as account:
        first = await account.credentials()
        (tmp_path / "program").unlink()

        async def use_them() -> None:
            while True:
                assert await account.credentials() is first
                await asyncio.sleep(0.01)

        with pytest.raises(ObjectError, match=rf"s3://{BUCKET}: credentials have expired.*program") as caught:
            await use_them()
        assert (caught.value.url, caught.value.backend) == (f"s3://{BUCKET}", "s3")


async def test_nobody_has_no_credentials() -> None:
    async with opened(anonymous=True) as account:
        assert await account.credentials() is None
        assert await account.credentials(refresh=True) is None


# ---- where a bucket is ----------------------------------------------------------------------------------------------


PLACES: list[tuple[str, dict[str, object], str, str, str]] = [
    ("one", {}, "https://one.s3.amazonaws.com:443", "", "us-east-1"),
    ("one", {"region_name": "eu-west-3"}, "https://one.s3.eu-west-3.amazonaws.com:443", "", "eu-west-3"),
    ("one", {"region_name": "cn-north-1"}, "https://one.s3.cn-north-1.amazonaws.com.cn:443", "", "cn-north-1"),
    ("a.b", {"region_name": "eu-west-3"}, "https://s3.eu-west-3.amazonaws.com:443", "/a.b", "eu-west-3"),
    ("one", {"addressing_style": "path"}, "https://s3.amazonaws.com:443", "/one", "us-east-1"),
    ("one", {"endpoint_url": "http://127.0.0.1:8333"}, "http://127.0.0.1:8333", "/one", "us-east-1"),
    ("one", {"endpoint_url": "http://[::1]:83/base/"}, "http://[::1]:83", "/base/one", "us-east-1"),
    (
        "one",
        {"endpoint_url": "https://s3.example.com", "addressing_style": "virtual", "region_name": "here"},
        "https://one.s3.example.com:443",
        "",
        "here",
    ),
]


async def test_a_bucket_is_where_the_sdk_says() -> None:
    for bucket, options, endpoint, path, region in PLACES:
        async with opened(bucket, **KEYS, **options) as account:
            assert (account.endpoint, account.path, account.region) == (endpoint, path, region)
            assert (account.tls is not None) == endpoint.startswith("https:")
            assert account.limits == ""


async def test_the_profile_says_where_a_bucket_is(tmp_path: Path) -> None:
    profiles(
        tmp_path,
        "[default]\nregion = eu-west-3\ns3 =\n  addressing_style = path\nservices = mine\n"
        "[services mine]\ns3 =\n  endpoint_url = http://127.0.0.1:9000\n",
    )
    async with opened(**KEYS) as account:
        assert (account.endpoint, account.path) == ("http://127.0.0.1:9000", f"/{BUCKET}")
        assert account.region == "eu-west-3"


@pytest.mark.parametrize(
    ("names", "host"),
    [
        (["FIPS"], "s3-fips.eu-west-3"),
        (["DUALSTACK"], "s3.dualstack.eu-west-3"),
        (["FIPS", "DUALSTACK"], "s3-fips.dualstack.eu-west-3"),
    ],
)
async def test_the_environment_says_where_a_bucket_is(
    names: list[str], host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in names:
        monkeypatch.setenv(f"AWS_USE_{name}_ENDPOINT", "true")
    async with opened(**KEYS, region_name="eu-west-3") as account:
        assert account.endpoint == f"https://{BUCKET}.{host}.amazonaws.com:443"


async def test_a_bucket_that_is_elsewhere_is_found_there() -> None:
    async with opened(**KEYS) as account:
        await asyncio.gather(*(account.elsewhere("eu-west-3") for _ in range(9)))
        assert account.endpoint == f"https://{BUCKET}.s3.eu-west-3.amazonaws.com:443"
        assert account.region == "eu-west-3"
        with pytest.raises(ObjectError, match="which is none"):
            await account.elsewhere("eu west.example.com/")
        assert account.region == "eu-west-3"


LIMITS = [
    ("arn:aws:s3:us-west-2:123456789012:accesspoint/one", "", "access point"),
    ("one--usw2-az1--x-s3", "", "S3 Express"),
    ("one", "s3 =\n  use_accelerate_endpoint = true\n", "Acceleration"),
    ("one", "s3 =\n  signature_version = s3\n", "version s3"),
    ("one", "s3 =\n  payload_signing_enabled = true\n", "signed payloads"),
]


async def test_what_takes_more_than_one_endpoint_is_for_the_sdk(tmp_path: Path) -> None:
    for bucket, text, reason in LIMITS:
        profiles(tmp_path, f"[default]\n{text}")
        async with opened(bucket, **KEYS) as account:
            assert reason in account.limits


async def test_a_proxy_is_for_the_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "s3.example.com")
    async with opened(**KEYS) as account, opened(**KEYS, endpoint_url="https://s3.example.com") as near:
        assert "proxy" in account.limits
        assert near.limits == ""


# ---- what is wrong --------------------------------------------------------------------------------------------------


MISTAKES: list[tuple[dict[str, object], str]] = [
    ({"profil_name": "x"}, "'profil_name' is no option of s3; did you mean 'profile_name'"),
    ({"profile_name": "nobody"}, "profile .nobody. could not be found; look at the option profile_name"),
    ({}, "there are no credentials; .*'anonymous': True"),
    ({"aws_access_key_id": "x"}, "option aws_secret_access_key is missing"),
    ({"aws_session_token": "x"}, "option aws_.*key.* is missing"),
    ({**KEYS, "anonymous": True}, "option anonymous"),
    ({**KEYS, "region_name": "not a region"}, "'not a region'.*option region_name"),
    ({**KEYS, "endpoint_url": "nowhere"}, "Invalid endpoint: nowhere"),
    ({**KEYS, "addressing_style": "other"}, "option addressing_style: 'other' will not do; expected 'auto' or"),
    ({**KEYS, "verify": "/nowhere/ca.pem"}, "certificates cannot be read from /nowhere/ca.pem.*option verify"),
    ({"aws_secret_access_key": 17}, "option aws_secret_access_key: what was given will not do; expected text"),
]


async def test_what_is_wrong_is_told_when_a_bucket_is_opened() -> None:
    for options, message in MISTAKES:
        with pytest.raises(RegistrationError, match=rf"(?s)s3://{BUCKET}: .*{message}"):
            await Account.open(BUCKET, options)


async def test_a_source_that_fails_is_told_when_a_bucket_is_opened(tmp_path: Path) -> None:
    profiles(tmp_path, "[default]\ncredential_process = /nowhere/program\n")
    with pytest.raises(RegistrationError, match=rf"s3://{BUCKET}: cannot find credentials: .*/nowhere/program"):
        await Account.open(BUCKET, {})


# ---- the SDK's own data path ---------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def store(
    s3: S3Server, bucket: str, *, url: str | None = None, who: Identity | None = None, **settings: Any
) -> AsyncIterator[SdkStore]:
    who = s3.admin if who is None else who
    options = {
        "endpoint_url": s3.url if url is None else url,
        "aws_access_key_id": who.access_key,
        "aws_secret_access_key": who.secret_key,
        "region_name": REGION,
        "verify": str(s3.certified.ca),
    }
    async with opened(bucket, **options) as account:
        made = await SdkStore.open(account, Config(**settings))
        try:
            yield made
        finally:
            await made.aclose()


def soon() -> float:
    return asyncio.get_running_loop().time() + 30


def rows(data: bytes, count: int = 3) -> list[memoryview]:
    """The same bytes as pieces of memory."""
    step = max(1, -(-len(data) // count))
    return [memoryview(data)[at : at + step] for at in range(0, len(data), step)]


def room(nbytes: int) -> tuple[bytearray, list[memoryview]]:
    memory = bytearray(b"\xa5" * (nbytes + 16))  # what comes stays within its bounds
    view = memoryview(memory)
    return memory, [view[: nbytes // 3], view[nbytes // 3 : nbytes]]


async def got(made: SdkStore, key: str, nbytes: int, offset: int = 0, **how: Any) -> tuple[bytes, Read]:
    memory, into = room(nbytes)
    asked = {"whole": True, "verify": False, "etag": None, "deadline": soon(), **how}
    found = await made.read(key, offset, into, **asked)
    assert memory[nbytes:] == b"\xa5" * 16
    return bytes(memory[:nbytes]), found


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_bytes_come_back_as_they_were_put(s3: S3Server, bucket: str, scheme: str) -> None:
    async with store(s3, bucket, url=s3.url if scheme == "http" else s3.https_url) as made:
        etag = ""
        for data in (b"", b"x", DATA):
            etag = await made.write("a key/ü", rows(data), exists="replace", deadline=soon())
            assert await got(made, "a key/ü", len(data), crc=True) == (data, Read(etag, len(data), crc64nvme(data)))
        part, found = await got(made, "a key/ü", 70000, 1000, whole=False, verify=True, etag=etag)
        assert (part, found.nbytes, found.etag) == (DATA[1000:71000], len(DATA), etag)
        assert await got(made, "a key/ü", 0, 5, whole=False) == (b"", Read(etag, len(DATA), 0))


async def test_what_is_there_is_replaced_kept_or_an_error(s3: S3Server, bucket: str) -> None:
    async with store(s3, bucket) as made:
        assert await made.write("key", rows(b"first"), exists="error", deadline=soon())
        assert await made.write("key", rows(b"second"), exists="keep", deadline=soon()) == ""
        with pytest.raises(ObjectExistsError, match=rf"put of s3://{bucket}/key: there is an object.*412.*exists="):
            await made.write("key", rows(b"third"), exists="error", deadline=soon())
        assert (await got(made, "key", 5))[0] == b"first"
        assert await made.write("key", rows(b"fourth"), exists="replace", deadline=soon())
        assert (await got(made, "key", 6))[0] == b"fourth"


async def test_parts_become_an_object(s3: S3Server, bucket: str) -> None:
    bodies = [os.urandom(SdkStore.smallest_part), DATA]
    whole = b"".join(bodies)
    async with store(s3, bucket) as made:
        upload = await made.begin("key", deadline=soon())
        parts = await asyncio.gather(
            *(made.part("key", upload, number, rows(body), deadline=soon()) for number, body in enumerate(bodies, 1))
        )
        assert [part.crc for part in parts] == [crc64nvme(body) for body in bodies]
        etag = await made.complete("key", upload, parts, exists="error", deadline=soon())
        assert await got(made, "key", len(whole), crc=True) == (whole, Read(etag, len(whole), crc64nvme(whole)))


async def test_an_upload_that_is_aborted_leaves_nothing(s3: S3Server, bucket: str) -> None:
    async with store(s3, bucket) as made:
        upload = await made.begin("key", deadline=soon())
        part = await made.part("key", upload, 1, rows(DATA), deadline=soon())
        await made.abort("key", upload, deadline=soon())
        await made.abort("key", upload, deadline=soon())
        with pytest.raises(ObjectError, match="begin the upload anew") as caught:
            await made.complete("key", upload, [part], exists="replace", deadline=soon())
        assert caught.value.code == "NoSuchUpload"
    left = plain_request("GET", f"{s3.url}/{bucket}?uploads=", identity=s3.admin)
    assert b"<UploadId>" not in left.body


async def test_objects_are_listed_described_copied_and_deleted(s3: S3Server, bucket: str) -> None:
    names = [f"a/{number:04}" for number in range(12)]
    async with store(s3, bucket) as made:
        before = time.time()
        await asyncio.gather(*(made.write(name, rows(DATA[:100]), exists="replace", deadline=soon()) for name in names))
        await made.write("b", rows(DATA), exists="replace", deadline=soon())
        listed = [info async for info in made.list("a/", deadline=soon(), after=names[1])]
        assert [(info.key, info.nbytes) for info in listed] == [(name, 100) for name in names[2:]]

        info = await made.head("b", deadline=soon())
        assert (info.key, info.nbytes) == ("b", len(DATA))
        assert abs(info.modified - before) < 60
        assert info.checksum == f"crc64nvme:{base64.b64encode(crc64nvme(DATA).to_bytes(8)).decode()}"

        await made.copy("b", "copied", deadline=soon())
        assert (await got(made, "copied", len(DATA)))[0] == DATA

        await made.delete([*names, "missing"], deadline=soon())
        await made.delete(["b"], deadline=soon())
        await made.delete(["missing"], deadline=soon())
        assert [info.key async for info in made.list("", deadline=soon())] == ["copied"]


async def test_a_large_object_is_copied_in_parts(s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SdkStore, "largest_copy", 6 << 20)
    monkeypatch.setattr(SdkStore, "copied_part", 5 << 20)
    data = DATA * 12
    async with store(s3, bucket) as made:
        await made.write("source", rows(data), exists="replace", deadline=soon())
        await made.copy("source", "target", deadline=soon())
        assert (await got(made, "target", len(data)))[0] == data


async def test_what_is_not_as_it_was_expected_is_told(s3: S3Server, bucket: str) -> None:
    async with store(s3, bucket) as made:
        await made.write("key", rows(b"0123456789"), exists="replace", deadline=soon())
        url = f"s3://{bucket}/key"
        for nbytes, offset, whole, text in (
            (11, 0, True, "has 10 bytes, and 11 were expected"),
            (9, 0, True, "has 10 bytes, and 9 were expected"),
            (5, 8, False, "has 10 bytes, and those from 8 to 13 were wanted"),
            (5, 20, False, "has fewer bytes than 25"),
            (0, 20, False, "has 10 bytes, not 20"),
        ):
            with pytest.raises(ObjectError, match=rf"get of {url}: the object {text}.*; read what is there"):
                await got(made, "key", nbytes, offset, whole=whole)
        with pytest.raises(ObjectError, match="is not the version") as caught:
            await got(made, "key", 10, etag='"another"')
        assert (caught.value.status, caught.value.code) == (412, "PreconditionFailed")


async def test_refusals_name_the_object_the_request_and_what_to_do(s3: S3Server, bucket: str) -> None:
    async with store(s3, bucket) as made:
        for missing in (
            got(made, "missing", 1), got(made, "missing", 1, whole=False), made.head("missing", deadline=soon()),
        ):  # fmt: skip
            with pytest.raises(
                ObjectMissingError, match=rf"of s3://{bucket}/missing: there is no.*; check the key"
            ) as no:
                await missing
            assert (no.value.status, no.value.url) == (404, f"s3://{bucket}/missing")
            assert no.value.request_id
    async with store(s3, bucket, who=s3.stranger) as made:
        for refused in (
            made.write("key", rows(b"x"), exists="replace", deadline=soon()),
            made.copy("key", "other", deadline=soon()),
            made.begin("key", deadline=soon()),
            made.delete(["a", "b"], deadline=soon()),
        ):
            with pytest.raises(ObjectError, match=rf"of s3://{bucket}/.*403.*request id.*; let these cred") as caught:
                await refused
            assert (caught.value.status, caught.value.backend) == (403, "s3")
    async with store(s3, "no-such-bucket") as made:
        with pytest.raises(ObjectError, match="create the bucket") as caught:
            await got(made, "key", 1)
        assert caught.value.code == "NoSuchBucket"


async def test_an_endpoint_that_does_not_answer_is_an_error_in_time(s3: S3Server, bucket: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        async with store(s3, bucket, url=url) as made:
            with pytest.raises(TransferTimeout, match=rf"head of s3://{bucket}/key: not done in time"):
                await made.head("key", deadline=asyncio.get_running_loop().time() + 0.3)
    async with store(s3, bucket, url=url, object_attempts=1) as made:
        with pytest.raises(ObjectError, match=rf"head of s3://{bucket}/key: .*no answer.*; check endpoint_url"):
            await made.head("key", deadline=soon())


FAULTS: list[Fault] = [
    Truncate(after=500_000),
    Reset(after=500_000), Reset(reaches_server=False), Flip(at=500_000), Length(by=9), Length(by=-9),
    Stall(after=500_000), internal_error(), slow_down(),
]  # fmt: skip


async def test_nobody_is_refused_what_is_not_public(s3: S3Server, bucket: str) -> None:
    async with opened(bucket, anonymous=True, endpoint_url=s3.url, region_name=REGION) as account:
        made = await SdkStore.open(account, Config())
        try:
            with pytest.raises(ObjectError, match="403, AccessDenied"):
                await got(made, "key", 1)
        finally:
            await made.aclose()


async def test_a_proxy_is_gone_through(s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultProxy(s3.url) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        async with store(s3, bucket) as made:
            await made.write("key", rows(DATA), exists="replace", deadline=soon())
            assert (await got(made, "key", len(DATA)))[0] == DATA
        assert [request.method for request in proxy.requests] == ["PUT", "GET"]


async def test_a_body_that_is_harmed_is_made_good(s3: S3Server, bucket: str) -> None:
    with FaultProxy(s3.url) as proxy:
        async with store(s3, bucket, url=proxy.url, object_attempts=4, object_attempt_timeout=1.0) as made:
            await made.write("key", rows(DATA), exists="replace", deadline=soon())
            for fault in FAULTS:
                for whole in (True, False):
                    proxy.next(fault)
                    data, _ = await got(made, "key", len(DATA), whole=whole, verify=True)
                    assert data == DATA, (fault, whole)


async def test_a_body_that_is_always_harmed_is_an_error(s3: S3Server, bucket: str) -> None:
    with FaultProxy(s3.url) as proxy:
        async with store(s3, bucket, url=proxy.url, object_attempts=2) as made:
            await made.write("key", rows(DATA), exists="replace", deadline=soon())
            proxy.always(Flip(at=500_000))
            with pytest.raises(ChecksumError, match=rf"get of s3://{bucket}/key: their CRC64NVME"):
                await got(made, "key", len(DATA))
            proxy.always(Truncate(after=0))
            with pytest.raises(ObjectError, match=rf"get of s3://{bucket}/key: no attempt was right; the last"):
                await got(made, "key", len(DATA))
            proxy.always(None)


async def test_a_write_whose_answer_is_lost_is_a_success(s3: S3Server, bucket: str) -> None:
    with FaultProxy(s3.url) as proxy:
        async with store(s3, bucket, url=proxy.url) as made:
            proxy.next(internal_error(reaches_server=True))
            etag = await made.write("key", rows(DATA), exists="error", deadline=soon())
            assert (await made.head("key", deadline=soon())).etag == etag

            upload = await made.begin("parts", deadline=soon())
            part = await made.part("parts", upload, 1, rows(DATA), deadline=soon())
            proxy.next(internal_error(reaches_server=True))
            etag = await made.complete("parts", upload, [part], exists="replace", deadline=soon())
            assert (await made.head("parts", deadline=soon())).etag == etag


async def test_credentials_that_have_expired_are_replaced_once(
    s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "an-old-one")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "an-old-one")
    with FaultProxy(s3.url) as proxy:
        async with opened(bucket, endpoint_url=proxy.url, region_name=REGION) as account:
            made = await SdkStore.open(account, Config())
            try:
                proxy.next(expired_token())
                monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.admin.access_key)
                monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.admin.secret_key)
                assert await made.write("key", rows(b"x"), exists="replace", deadline=soon())
                proxy.always(expired_token())
                with pytest.raises(ObjectError, match="get new credentials") as caught:
                    await made.write("key", rows(b"x"), exists="replace", deadline=soon())
                assert caught.value.code == "ExpiredToken"
            finally:
                await made.aclose()
