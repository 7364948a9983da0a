"""How S3 is spoken: where objects are, signatures, what refusals mean and what their reader can do about them.

Payloads are not signed. Over TLS nothing on the way can change them. Over plain HTTP the checksum of the body is a
signed header: who changes the body on its way would have to find another with the same checksum, which protects from
accidents and not from enemies, as for all that goes over plain HTTP. A digest by SHA-256 would cost a hundred times
what the checksum does.

References
----------
Amazon S3 API Reference, "Error responses", "Common request headers".
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import ssl
import time
from dataclasses import replace
from typing import NamedTuple, Protocol
from urllib.parse import quote

from .._errors import ObjectMissingError
from .._http import Answer
from .._sigv4 import Signer
from ._object._attempts import Act, Ask, Header, Verdict
from ._object._times import clock, retry_after
from ._object._xml import Node, Unreadable, parse

__all__ = ["Credentials", "S3Account", "S3Dialect", "content_md5", "quoted"]

_PLAIN = re.compile(r"[A-Za-z0-9/_.~-]*")
_FRESH = 60.0  # seconds that credentials are used without asking for them
_SKEWED = 300.0  # seconds; S3 allows 900

_EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken"})
_SKEW = frozenset({"RequestTimeTooSkewed", "RequestExpired"})
_AGAIN = frozenset(
    {
        "BadDigest", "ConditionalRequestConflict", "IncompleteBody", "InternalError", "OperationAborted",
        "RequestTimeout", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch",
    }
)  # fmt: skip
_SLOWER = frozenset(
    {"RequestLimitExceeded", "ServiceUnavailable", "SlowDown", "SlowDownRead", "SlowDownWrite", "Throttling",
     "ThrottlingException", "TooManyRequests", "TooManyRequestsException"}
)  # fmt: skip
_BY_STATUS = {
    301: "PermanentRedirect", 400: "BadRequest", 403: "Forbidden", 404: "NotFound", 409: "Conflict",
    412: "PreconditionFailed",
}  # fmt: skip
_PERMISSION = {
    "get": "s3:GetObject", "head": "s3:GetObject", "put": "s3:PutObject", "delete": "s3:DeleteObject",
    "list": "s3:ListBucket", "copy": "s3:GetObject and s3:PutObject", "abort": "s3:AbortMultipartUpload",
}  # fmt: skip
_ADVICE = {
    "NoSuchBucket": "create the bucket, or correct its name or the endpoint",
    "InvalidAccessKeyId": "check aws_access_key_id, and that it is one of this endpoint's",
    "SignatureDoesNotMatch": "check aws_secret_access_key, and that nothing on the way changes requests",
    "NoSuchUpload": "begin the upload anew: it was aborted, or completed",
    "EntityTooLarge": "write it in parts",
    "NotImplemented": "this store cannot do it; exists='replace' asks for least",
    "InvalidRequest": "this store cannot do it; exists='replace' asks for least",
}


class Credentials(NamedTuple):
    """What requests are signed with."""

    access_key: str
    secret_key: str
    token: str | None = None


class S3Account(Protocol):
    """Where a bucket is and who asks.

    Attributes
    ----------
    endpoint : str
        ``https://HOST:PORT``.
    path : str
        What precedes the slash of the key: nothing where the host names the bucket, else ``/bucket``.
    region : str
    tls : ssl.SSLContext or None
    """

    endpoint: str
    path: str
    region: str
    tls: ssl.SSLContext | None

    async def credentials(self, *, refresh: bool = False) -> Credentials | None:
        """Give what is valid now; None: requests are not signed."""

    async def elsewhere(self, region: str) -> None:
        """The bucket is in another region: endpoint, path and region are that one's from now on."""


def quoted(key: str) -> bytes:
    """Give the path of an object in its bucket."""
    if _PLAIN.fullmatch(key):
        return b"/" + key.encode()
    return b"/" + quote(key, safe="/-_.~").encode()


def content_md5(body: bytes) -> Header:
    """Give the header that S3 wants with what is no object."""
    return b"content-md5", base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest())


class S3Dialect:
    """Implements `Dialect`."""

    backend = "s3"

    def __init__(self, bucket: str, account: S3Account) -> None:
        self._account = account
        self._signer: Signer | None = None
        self._credentials: Credentials | None = None
        self._asked = -_FRESH
        self._loop = asyncio.get_running_loop()
        self.bucket = bucket
        self.url = f"s3://{bucket}"
        self.era = 0
        self.skew = 0.0
        self._settle()

    def _settle(self) -> None:
        """Take over where the bucket is."""
        self.endpoint = self._account.endpoint
        self.tls = self._account.tls
        self._path = self._account.path.encode()
        self.region = self._account.region
        self._sign_with(self._credentials)

    def _sign_with(self, credentials: Credentials | None) -> None:
        self._credentials = credentials
        self._signer = None
        self.era += 1
        if credentials is not None:
            access_key, secret_key, token = credentials
            self._signer = Signer(access_key, secret_key, region=self.region, token=token)

    async def sign(self, ask: Ask, host: bytes, deadline: float) -> tuple[bytes, list[Header]]:
        """Give the target and all headers."""
        if self._loop.time() - self._asked >= _FRESH:
            async with asyncio.timeout_at(deadline):
                self._take(await self._account.credentials())
        ask.era = self.era
        target = self._path + ask.path
        if ask.query:
            target += b"?" + ask.query
        if self._signer is None:
            return target, ask.headers
        added = self._signer.sign(ask.method, target, host=host, headers=ask.headers, now=time.time() + self.skew)
        return target, ask.headers + added

    def _take(self, credentials: Credentials | None) -> None:
        self._asked = self._loop.time()
        if credentials != self._credentials:
            self._sign_with(credentials)

    async def renew(self, era: int) -> None:
        """Get other credentials."""
        if era == self.era:
            self._take(await self._account.credentials(refresh=True))

    async def move(self, region: str, era: int) -> None:
        """Go to another region."""
        if era == self.era:
            await self._account.elsewhere(region)
            self._settle()

    # -- what answers mean

    def judge(self, ask: Ask, answer: Answer) -> Verdict:
        """Say what a refusal means."""
        node = _error(answer.body)
        return self.verdict(ask, answer, node)

    def verdict(self, ask: Ask, answer: Answer, node: Node | None) -> Verdict:
        """Say what a refusal means whose text is this."""
        status, headers = answer.status, answer.headers
        code = node.text("Code") if node is not None else ""
        what = (node.text("Message").strip().rstrip(".") if node is not None else "") or "the store refused"
        code = code or _BY_STATUS.get(status, "")
        request_id = headers.get(b"x-amz-request-id", b"").decode("latin-1")
        request_id = request_id or (node.text("RequestId") if node is not None else "")
        verdict = Verdict(Act.END, what, self._advice(ask, status, code), status, code, request_id)
        region = headers.get(b"x-amz-bucket-region", b"").decode("latin-1")
        region = region or (node.text("Region") if node is not None else "")
        act = self._act(ask, status, code, region, answer)
        if act is Act.MOVE:
            return _with(verdict, act=act, region=region, what=f"the bucket is in region {region}, not {self.region}")
        if act is Act.CLOCK:
            return _with(verdict, act=act, skew=clock(answer.headers) - time.time())
        if act in (Act.AGAIN, Act.SLOWER):
            return _with(verdict, act=act, after=retry_after(answer.headers))
        if status == 404 and code in ("NoSuchKey", "NotFound"):
            return _with(verdict, kind=ObjectMissingError, what="there is no such object")
        return _with(verdict, act=act)

    def _act(self, ask: Ask, status: int, code: str, region: str, answer: Answer) -> Act:
        if status in (301, 307, 400) and region and region != self.region:
            return Act.MOVE
        # HEAD has no body that could say that a token has expired.
        if code in _EXPIRED or (status == 400 and ask.method == b"HEAD"):
            return Act.RENEW
        if code in _SKEW or (status == 403 and abs(clock(answer.headers) - time.time() - self.skew) > _SKEWED):
            return Act.CLOCK
        if status in (429, 503) or code in _SLOWER:
            return Act.SLOWER
        if (status >= 500 and status not in (501, 505)) or status == 408 or code in _AGAIN:
            return Act.AGAIN
        return Act.END

    def _advice(self, ask: Ask, status: int, code: str) -> str:
        if code in _EXPIRED:
            return "get new credentials: those that the account gives have ended"
        if code in _SKEW:
            return "set the clock of this host"
        if status in (301, 307) or code == "AuthorizationHeaderMalformed":
            return f"name the bucket's region: region_name is {self.region!r} now"
        if code in _ADVICE:
            return _ADVICE[code]
        if status == 403 or code == "AccessDenied":
            return f"let these credentials do {_PERMISSION.get(ask.op, 'this')}, or use others"
        if status == 404:
            return "check the key"
        if status in (429, 503):
            return "lower object_concurrency, or give it more time"
        return "try again later; tell who runs the store the request id" if status >= 500 else ""


def _with(verdict: Verdict, **changes: object) -> Verdict:
    return replace(verdict, **changes)  # type: ignore[arg-type]


def _error(body: bytes) -> Node | None:
    try:
        node = parse(body)
    except Unreadable:
        return None
    return node if node.name == "Error" else None
