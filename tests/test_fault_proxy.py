"""The proxy does to each request what a test has written down, and carries all else as it is; so does the null server.

The client is http.client, one connection a request, so that nothing is retried or smoothed over.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from botocore.exceptions import ClientError
from fault_proxy import (
    CutUpload,
    Fault,
    FaultProxy,
    Flip,
    Length,
    Reply,
    Reset,
    Stall,
    StallUpload,
    Truncate,
    access_denied,
    another_region,
    expired_token,
    internal_error,
    slow_down,
)
from servers import Answer, Certified, Identity, S3Server, certificates, plain_request, s3_client

from asyncxfer.bench._null_objects import NullServer, content

SIZE = 300_000
EXPECTED = content(0, SIZE)
WHO = Identity("key", "secret")


@pytest.fixture(name="null", scope="module")
def null_fixture() -> Iterator[NullServer]:
    with NullServer() as server:
        yield server


@pytest.fixture(name="certified", scope="module")
def certified_fixture(tmp_path_factory: pytest.TempPathFactory) -> Certified:
    return certificates(tmp_path_factory.mktemp("certificates"))


class Stage:
    """The proxy before the null server, and requests to it."""

    def __init__(self, proxy: FaultProxy, certified: Certified) -> None:
        self.proxy = proxy
        self._tls = certified.client_context()

    def get(self, *, method: str = "GET", size: int = SIZE, timeout: float = 10) -> Answer:
        return plain_request(method, f"{self.proxy.url}/bucket/{size}", tls=self._tls, timeout=timeout)

    def put(self, body: bytes = EXPECTED) -> Answer:
        return plain_request("PUT", f"{self.proxy.url}/bucket/key", body=body, tls=self._tls, timeout=10)

    def received(self) -> tuple[bytes, bool]:
        """What arrives of an answer's body, and whether the connection was reset then."""
        scheme, _, place = self.proxy.url.partition("://")
        client = http.client.HTTPConnection(place, timeout=10)
        if scheme == "https":
            client = http.client.HTTPSConnection(place, timeout=10, context=self._tls)
        got = bytearray()
        with contextlib.closing(client):
            client.request("GET", f"/bucket/{SIZE}")
            answer = client.getresponse()
            try:
                while data := answer.read1():
                    got += data
            except ConnectionResetError:
                return bytes(got), True
        return bytes(got), False


@pytest.fixture(name="stage", params=["http", "https"])
def stage_fixture(request: pytest.FixtureRequest, null: NullServer, certified: Certified) -> Iterator[Stage]:
    tls = certified.server_context() if request.param == "https" else None
    with FaultProxy(null.url, tls=tls) as proxy:
        yield Stage(proxy, certified)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


# ---- carrying -----------------------------------------------------------------------------------------------------


def test_without_a_fault_all_is_carried_and_noted(stage: Stage) -> None:
    assert stage.get().body == EXPECTED
    assert stage.put().status == 200
    assert stage.get(method="HEAD").headers["content-length"] == str(SIZE)
    assert [(request.method, request.target) for request in stage.proxy.requests] == [
        ("GET", f"/bucket/{SIZE}"),
        ("PUT", "/bucket/key"),
        ("HEAD", f"/bucket/{SIZE}"),
    ]
    assert stage.proxy.requests[1].headers["content-length"] == str(SIZE)
    assert [request.connection for request in stage.proxy.requests] == [0, 1, 2]


def test_a_connection_is_used_again(null: NullServer) -> None:
    with FaultProxy(null.url) as proxy:
        with contextlib.closing(http.client.HTTPConnection(proxy.url.removeprefix("http://"), timeout=10)) as client:
            for method, target, body in (("GET", "/b/70000", None), ("PUT", "/b/x", b"y" * 9), ("GET", "/b/5", None)):
                client.request(method, target, body)
                answer = client.getresponse().read()
                assert answer == (b"" if method == "PUT" else content(0, int(target.rpartition("/")[2])))
            client.request("PUT", "/b/x", iter([b"in", b"pieces"]), encode_chunked=True)
            assert client.getresponse().read() == b""
        assert (len(proxy.requests), proxy.connections) == (4, 1)
        until(lambda: proxy.open == 0)


# ---- each fault ---------------------------------------------------------------------------------------------------


def test_a_reset_leaves_nothing_of_the_answer(stage: Stage) -> None:
    stage.proxy.next(Reset(), Reset(reaches_server=False))
    for _ in range(2):
        with pytest.raises(ConnectionResetError):
            stage.get()
    assert stage.get().body == EXPECTED


def test_a_reset_within_the_body_lets_no_more_than_that_pass(stage: Stage) -> None:
    stage.proxy.next(Reset(after=100_000))
    got, was_reset = stage.received()
    assert got == EXPECTED[: len(got)]
    assert len(got) <= 100_000
    assert was_reset or stage.proxy.url.startswith("https:")  # Python's TLS calls any end without notice an end


def test_a_body_is_cut_off(stage: Stage) -> None:
    stage.proxy.next(Truncate(after=1000))
    with pytest.raises(http.client.IncompleteRead) as raised:
        stage.get()
    assert raised.value.partial == EXPECTED[:1000]


def test_one_byte_is_changed(stage: Stage) -> None:
    stage.proxy.next(Flip(at=SIZE - 1))
    assert stage.get().body == EXPECTED[:-1] + bytes([EXPECTED[-1] ^ 0xFF])


@pytest.mark.parametrize("after", [None, 0, 1000])
def test_a_stall_lasts_until_it_is_ended(stage: Stage, after: int | None) -> None:
    stage.proxy.next(Stall(after=after))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(stage.get)
        until(lambda: stage.proxy.stalled == 1)
        assert not answer.done()
        stage.proxy.go_on()
        assert answer.result(10).body == EXPECTED


def test_a_stall_ends_by_itself_where_that_is_asked(stage: Stage) -> None:
    stage.proxy.next(Stall(seconds=0.05))
    assert stage.get().body == EXPECTED


def test_a_stall_ends_when_the_client_leaves(stage: Stage) -> None:
    stage.proxy.next(Stall(after=0))
    with pytest.raises(TimeoutError):
        stage.get(timeout=0.2)
    until(lambda: stage.proxy.open == 0)


def test_more_is_announced_than_comes(stage: Stage) -> None:
    stage.proxy.next(Length(by=7))
    with pytest.raises(http.client.IncompleteRead) as raised:
        stage.get()
    assert (raised.value.partial, raised.value.expected) == (EXPECTED, 7)


def test_less_is_announced_than_comes(stage: Stage) -> None:
    stage.proxy.next(Length(by=-7))
    assert stage.get().body == EXPECTED[:-7]


def test_an_upload_is_reset_within_its_body(stage: Stage) -> None:
    stage.proxy.next(CutUpload(after=100_000))
    with pytest.raises((ConnectionError, ssl.SSLEOFError)):
        stage.put()


def test_an_upload_is_held(stage: Stage) -> None:
    stage.proxy.next(StallUpload(after=100_000))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(stage.put)
        until(lambda: stage.proxy.stalled == 1)
        assert not answer.done()
        stage.proxy.go_on()
        assert answer.result(10).status == 200


def test_who_comes_is_refused_until_it_listens_again(stage: Stage) -> None:
    stage.proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        stage.get()
    stage.proxy.accept()
    assert stage.get().body == EXPECTED


@pytest.mark.parametrize(
    ("reply", "status", "code", "header"),
    [
        (internal_error(), 500, "InternalError", None),
        (internal_error(reaches_server=True), 500, "InternalError", None),
        (slow_down(retry_after=2), 503, "SlowDown", ("retry-after", "2")),
        (expired_token(), 400, "ExpiredToken", None),
        (access_denied(), 403, "AccessDenied", None),
        (another_region("eu-west-1"), 301, "PermanentRedirect", ("x-amz-bucket-region", "eu-west-1")),
    ],
)
@pytest.mark.parametrize("method", ["GET", "PUT", "HEAD"])
def test_it_answers_for_the_server(
    stage: Stage, reply: Reply, status: int, code: str, header: tuple[str, str] | None, method: str
) -> None:
    stage.proxy.next(reply)
    answer = stage.put() if method == "PUT" else stage.get(method=method)
    assert answer.status == status
    assert (f"<Code>{code}</Code>" in answer.body.decode()) == (method != "HEAD")
    assert header is None or answer.headers[header[0]] == header[1]


# ---- which requests are harmed ------------------------------------------------------------------------------------


def test_faults_are_taken_in_turn_and_then_what_is_always_done(null: NullServer, certified: Certified) -> None:
    with FaultProxy(null.url) as proxy:
        stage = Stage(proxy, certified)
        proxy.next(slow_down(), None)
        proxy.always(internal_error())
        assert [stage.get().status for _ in range(4)] == [503, 200, 500, 500]
        proxy.always(None)
        assert stage.get().status == 200


def test_a_fault_waits_for_its_request(null: NullServer, certified: Certified) -> None:
    with FaultProxy(null.url) as proxy:
        stage = Stage(proxy, certified)
        proxy.next(slow_down(), when=lambda request: request.method == "PUT")
        assert [stage.get().status, stage.put().status, stage.put().status] == [200, 503, 200]


@pytest.mark.parametrize("fault", [Flip(at=SIZE), Truncate(after=SIZE + 1), CutUpload(after=1)])
def test_a_fault_that_does_not_fit_is_told(null: NullServer, certified: Certified, fault: Fault) -> None:
    proxy = FaultProxy(null.url)
    proxy.next(fault)
    with pytest.raises(ValueError, match="was asked of"):  # noqa: SIM117 - the end of the proxy raises it
        with proxy, contextlib.suppress(OSError, http.client.HTTPException):
            Stage(proxy, certified).get()


def test_a_server_that_is_not_there_is_a_closed_connection(certified: Certified) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with FaultProxy(f"http://127.0.0.1:{port}") as proxy, pytest.raises(http.client.RemoteDisconnected):
        Stage(proxy, certified).get()


# ---- before a real store ------------------------------------------------------------------------------------------


async def test_a_client_of_s3_reads_the_refusals(s3: S3Server, bucket: str) -> None:
    with FaultProxy(s3.url) as proxy:
        async with s3_client(proxy.url, s3.admin, read_timeout=10) as client:
            for fault, code in ((expired_token(), "ExpiredToken"), (slow_down(), "SlowDown")):
                proxy.next(fault)
                with pytest.raises(ClientError) as raised:
                    await client.put_object(Bucket=bucket, Key="key", Body=b"x")
                assert raised.value.response["Error"]["Code"] == code


def test_an_answer_is_lost_and_what_was_asked_is_done(s3: S3Server, bucket: str) -> None:
    def put() -> int:
        headers = {"If-None-Match": "*"}
        url = f"{proxy.url}/{bucket}/key"
        return plain_request("PUT", url, identity=s3.admin, headers=headers, body=b"once").status

    with FaultProxy(s3.url) as proxy:
        proxy.next(internal_error(reaches_server=True))
        assert [put(), put()] == [500, 412]


# ---- the null server ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("libuv_workers")
async def test_a_client_of_s3_gets_and_puts_with_the_null_server(null: NullServer) -> None:
    async with s3_client(null.url, WHO) as client:
        got = await client.get_object(Bucket="bucket", Key="block-5000", Range="bytes=1001-2000")
        assert await got["Body"].read() == content(1001, 1000)
        assert got["ContentRange"] == "bytes 1001-2000/5000"
        assert (await client.head_object(Bucket="bucket", Key="block-5000"))["ContentLength"] == 5000
        await client.put_object(Bucket="bucket", Key="key", Body=memoryview(EXPECTED))
        upload = (await client.create_multipart_upload(Bucket="bucket", Key="key"))["UploadId"]
        where = {"Bucket": "bucket", "Key": "key", "UploadId": upload}
        part = await client.upload_part(**where, PartNumber=1, Body=EXPECTED)
        parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
        await client.complete_multipart_upload(**where, MultipartUpload=parts)
        await client.delete_object(Bucket="bucket", Key="key")
        with pytest.raises(ClientError, match="NoSuchKey"):
            await client.get_object(Bucket="bucket", Key="no-size")
        with pytest.raises(ClientError, match="InvalidRange"):
            await client.get_object(Bucket="bucket", Key="block-5000", Range="bytes=5000-")


def test_bytes_repeat_where_the_file_of_the_null_server_ends(null: NullServer) -> None:
    first, last = (16 << 20) - 11, (16 << 20) + 88
    answer = plain_request("GET", f"{null.url}/b/{1 << 40}", headers={"Range": f"bytes={first}-{last}"})
    assert answer.body == content(first, 100)


def test_the_null_server_says_the_same_over_https(tmp_path: Path, certified: Certified) -> None:
    both = tmp_path / "both.pem"
    both.write_bytes(certified.certificate.read_bytes() + certified.key.read_bytes())
    tls = certified.client_context()
    with NullServer(both) as server:
        place = server.url.removeprefix("https://")
        with contextlib.closing(http.client.HTTPSConnection(place, timeout=10, context=tls)) as client:
            for first, size in ((0, 5), (0, 70_000), ((16 << 20) - 11, 100_000)):
                client.request("GET", f"/b/{1 << 40}", headers={"Range": f"bytes={first}-{first + size - 1}"})
                assert client.getresponse().read() == content(first, size)
                client.request("PUT", "/b/x", bytes(size))
                assert client.getresponse().read() == b""


def test_who_does_not_speak_http_is_sent_away_by_the_null_server(null: NullServer) -> None:
    with socket.create_connection(("127.0.0.1", int(null.url.rpartition(":")[2])), timeout=10) as sock:
        sock.sendall(b"nonsense\r\n\r\n")
        assert sock.recv(1) == b""
    assert Path(f"/proc/{null.pid}").exists()
