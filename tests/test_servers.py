"""The object stores that tests run against are real: they store, refuse, and leave nothing behind."""

from __future__ import annotations

import base64
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_proxy import FaultProxy
from servers import Answer, S3Server, azurite, fake_gcs, plain_request, ports, s3_client, seaweedfs

PART = os.urandom(5 << 20)  # S3's smallest, but for the last
DATA = os.urandom(1 << 20)
# The check values of both: those of the nine digits.
DIGITS = b"123456789"
CHECKSUMS = {"crc64nvme": 0xAE8B14860A799888.to_bytes(8), "crc32c": 0xE3069283.to_bytes(4)}


@contextlib.contextmanager
def reached(s3: S3Server, how: str) -> Iterator[str]:
    """Give the URL of the server, with or without TLS and the proxy."""
    if not how.endswith("proxied"):
        yield s3.url if how == "http" else s3.https_url
        return
    tls = s3.certified.server_context() if how.startswith("https") else None
    with FaultProxy(s3.url if tls is None else s3.https_url, tls=tls, target_tls=tls and s3.tls) as proxy:
        yield proxy.url
        assert proxy.requests


def ask(s3: S3Server, method: str, target: str, *, body: bytes = b"", **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return plain_request(method, f"{s3.url}/{target}", identity=s3.admin, headers=named, body=body)


# ---- SeaweedFS ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["http", "https", "http proxied", "https proxied"])
async def test_a_client_puts_gets_lists_and_puts_in_parts(s3: S3Server, bucket: str, how: str) -> None:
    with reached(s3, how) as url:
        async with s3_client(url, s3.admin, ca=s3.certified.ca) as client:
            await client.put_object(Bucket=bucket, Key="whole", Body=memoryview(DATA))
            upload = (await client.create_multipart_upload(Bucket=bucket, Key="parts"))["UploadId"]
            where = {"Bucket": bucket, "Key": "parts", "UploadId": upload}
            sent = [await client.upload_part(**where, PartNumber=n, Body=part) for n, part in ((1, PART), (2, DATA))]
            tags = [{"PartNumber": number, "ETag": answer["ETag"]} for number, answer in enumerate(sent, 1)]
            await client.complete_multipart_upload(**where, MultipartUpload={"Parts": tags})

            for key, expected in (("whole", DATA), ("parts", PART + DATA)):
                answer = await client.get_object(Bucket=bucket, Key=key)
                assert await answer["Body"].read() == expected
            listed = await client.list_objects_v2(Bucket=bucket)
    assert [(row["Key"], row["Size"]) for row in listed["Contents"]] == [("parts", 6 << 20), ("whole", 1 << 20)]


def test_what_is_there_is_not_overwritten_where_that_is_asked(s3: S3Server, bucket: str) -> None:
    assert ask(s3, "PUT", f"{bucket}/key", body=b"first", if_none_match="*").status == 200
    assert ask(s3, "PUT", f"{bucket}/key", body=b"second", if_none_match="*").status == 412
    assert ask(s3, "GET", f"{bucket}/key").body == b"first"


def test_a_range_is_answered_with_that_range(s3: S3Server, bucket: str) -> None:
    ask(s3, "PUT", f"{bucket}/key", body=DATA)
    part = ask(s3, "GET", f"{bucket}/key", range="bytes=1000-70000")
    assert (part.status, part.body) == (206, DATA[1000:70001])
    assert part.headers["content-range"] == f"bytes 1000-70000/{len(DATA)}"
    assert ask(s3, "GET", f"{bucket}/key", range=f"bytes={len(DATA)}-").status == 416


@pytest.mark.parametrize("name", CHECKSUMS)
def test_a_body_that_differs_from_its_checksum_is_refused(s3: S3Server, bucket: str, name: str) -> None:
    header = {f"x_amz_checksum_{name}": base64.b64encode(CHECKSUMS[name]).decode()}
    assert ask(s3, "PUT", f"{bucket}/right", body=DIGITS, **header).status == 200
    wrong = ask(s3, "PUT", f"{bucket}/wrong", body=DIGITS[::-1], **header)
    assert wrong.status == 400
    assert ask(s3, "GET", f"{bucket}/wrong").status == 404


def test_a_stranger_is_refused(s3: S3Server, bucket: str) -> None:
    assert ask(s3, "PUT", f"{bucket}/key", body=b"x").status == 200
    for method in ("PUT", "GET"):
        refused = plain_request(method, f"{s3.url}/{bucket}/key", identity=s3.stranger)
        assert (refused.status, b"<Code>AccessDenied</Code>" in refused.body) == (403, True)


def test_nothing_of_a_server_is_left() -> None:
    with seaweedfs() as server:
        folder, pid = server.certified.ca.parent, server.pid
        port = int(server.url.rpartition(":")[2])
        assert Path(f"/proc/{pid}").exists()
    assert not Path(f"/proc/{pid}").exists()
    assert not folder.exists()
    assert not list(Path("/tmp").glob(f"seaweedfs-*-{port}.sock"))


def test_azurite_asks_who_it_is() -> None:
    with azurite() as url:
        refused = plain_request("GET", f"{url}/devstoreaccount1?comp=list", headers={"x-ms-version": "2021-12-02"})
    assert refused.status == 403
    assert refused.headers["x-ms-error-code"] == "AuthorizationFailure"


def test_fake_gcs_server_stores() -> None:
    with fake_gcs() as url:
        kind = {"Content-Type": "application/json"}
        assert plain_request("POST", f"{url}/storage/v1/b", headers=kind, body=b'{"name": "bucket"}').status == 200
        where = f"{url}/upload/storage/v1/b/bucket/o?uploadType=media&name=key"
        assert plain_request("POST", where, body=DATA).status == 200
        part = plain_request("GET", f"{url}/storage/v1/b/bucket/o/key?alt=media", headers={"Range": "bytes=10-99"})
    assert (part.status, part.body) == (206, DATA[10:100])


# ---- what starts them ---------------------------------------------------------------------------------------------


def test_ports_are_lent_once() -> None:
    with ports(3) as first, ports(3) as second:
        assert len({*first, *second}) == 6


def test_ports_that_somebody_listens_on_are_not_lent() -> None:
    with ports(3) as lent:
        pass
    with socket.create_server(("127.0.0.1", lent[1])), ports(3) as others:
        assert not {*lent} & {*others}


def test_a_server_ends_with_the_tests_that_started_it() -> None:
    program = (
        "import signal\n"
        "from asyncxfer.bench._null_objects import NullServer\n"
        "with NullServer() as server:\n"
        "    print(server.pid, flush=True)\n"
        "    signal.pause()\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        ending = os.pidfd_open(pid)
        process.send_signal(signal.SIGKILL)
    try:
        ended, _, _ = select.select([ending], [], [], 10)
        assert ended
    finally:
        os.close(ending)
