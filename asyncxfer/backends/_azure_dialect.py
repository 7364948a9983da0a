"""How Azure Blob Storage is spoken: signatures, what refusals mean and what their reader can do about them.

Bodies are not signed. What protects them on their way is TLS, and the CRC64 that they carry, which is a signed header.

References
----------
Azure Storage REST API Reference, "Authorize with Shared Key", "Status and error codes", "Versioning".
"""

from __future__ import annotations

import asyncio
import base64
import email.utils
import hmac
import re
import ssl
import time
from dataclasses import replace
from hashlib import sha256
from typing import Protocol
from urllib.parse import quote, unquote_to_bytes

from .._errors import ObjectMissingError
from .._http import Answer
from ._azure_account import Bearer, Grant, Sas, SharedKey
from ._object._attempts import Act, Ask, Header, Verdict
from ._object._times import clock, retry_after
from ._object._xml import Node, Unreadable, parse

__all__ = ["UNKNOWN", "Account", "AzureDialect", "quoted"]

#: What Azurite says of headers that it does not know.
UNKNOWN = "FeatureNotSupported"

_PLAIN = re.compile(r"[A-Za-z0-9/_.~-]*")
_FRESH = 60.0  # seconds that a grant is used without asking for it
_SKEWED = 300.0  # seconds; Azure allows 900
_SIGNED = (
    b"content-encoding", b"content-language", b"content-length", b"content-md5", b"content-type", b"date",
    b"if-modified-since", b"if-match", b"if-none-match", b"if-unmodified-since", b"range",
)  # fmt: skip
_AGAIN = frozenset({"Crc64Mismatch", "InternalError", "Md5Mismatch", "OperationTimedOut"})
_MISSING = frozenset({"BlobNotFound", "ResourceNotFound"})
_BY_STATUS = {
    400: "BadRequest", 401: "Unauthorized", 403: "Forbidden", 404: "ResourceNotFound", 409: "Conflict",
    412: "ConditionNotMet", 416: "InvalidRange",
}  # fmt: skip
_ROLE = {"get": "Storage Blob Data Reader", "head": "Storage Blob Data Reader", "list": "Storage Blob Data Reader"}
_ADVICE = {
    "AuthenticationFailed": "check the account key or the SAS token, when it ends, and that nothing on the way changes "
    "requests",
    "BlobArchived": "bring the blob back from the archive tier first",
    "BlockCountExceedsLimit": "raise object_part_bytes",
    "ContainerBeingDeleted": "wait until the container is gone, and create it again",
    "ContainerNotFound": "create the container, or correct its name or the account",
    "InvalidBlockList": "write it again: another upload of the same key took its blocks away",
    "LeaseIdMissing": "end the lease that another has on the blob",
    "NoAuthenticationInformation": "give the option credential",
    "RequestBodyTooLarge": "write it in parts",
    "SnapshotsPresent": "delete its snapshots first",
}


class Account(Protocol):
    """Where a container is and who asks: see `AzureAccount`."""

    url: str
    endpoint: str
    path: str
    tls: ssl.SSLContext | None
    api_version: str
    renewable: bool

    async def grant(self) -> Grant | None:
        """Give what gives access now."""


def quoted(key: str) -> bytes:
    """Give the path of a blob in its container."""
    if _PLAIN.fullmatch(key):
        return b"/" + key.encode()
    return b"/" + quote(key, safe="/-_.~").encode()


class AzureDialect:
    """Implements `Dialect`.

    Attributes
    ----------
    sas : bytes
        What is added to URLs, nothing where it is no such signature that gives access.
    """

    backend = "azure"

    def __init__(self, account: Account) -> None:
        self._account = account
        self._grant: Grant | None = None
        self._asked = -_FRESH
        self._loop = asyncio.get_running_loop()
        self._path = account.path.encode()
        self._version: Header = (b"x-ms-version", account.api_version.encode())
        self.url = account.url
        self.endpoint = account.endpoint
        self.tls = account.tls
        self.era = 0
        self.skew = 0.0

    @property
    def sas(self) -> bytes:
        """What is added to URLs."""
        return self._grant.query if isinstance(self._grant, Sas) else b""

    def where(self, key: str) -> bytes:
        """Give the URL of a blob, without what gives access."""
        return self.endpoint.encode() + self._path + quoted(key)

    async def sign(self, ask: Ask, host: bytes, deadline: float) -> tuple[bytes, list[Header]]:
        """Give the target and all headers."""
        if self._loop.time() - self._asked >= _FRESH:
            async with asyncio.timeout_at(deadline):
                await self._take()
        ask.era = self.era
        path, query, grant = self._path + ask.path, ask.query, self._grant
        headers = [*ask.headers, self._version]
        if isinstance(grant, SharedKey):
            date = email.utils.formatdate(time.time() + self.skew, usegmt=True).encode()
            headers.append((b"x-ms-date", date))
            headers.append((b"authorization", _shared_key(grant, ask, path, headers)))
        elif isinstance(grant, Bearer):
            headers.append((b"authorization", b"Bearer " + grant.token))
        elif isinstance(grant, Sas):
            query = b"%b&%b" % (query, grant.query) if query else grant.query
        return (b"%b?%b" % (path, query) if query else path), headers

    async def _take(self) -> None:
        grant = await self._account.grant()
        self._asked = self._loop.time()
        if grant != self._grant:
            self._grant = grant
            self.era += 1

    async def renew(self, era: int) -> None:
        """Ask for another grant."""
        if era == self.era:
            await self._take()

    async def move(self, region: str, era: int) -> None:
        """Stay: an account is where its name says."""

    # -- what answers mean

    def judge(self, ask: Ask, answer: Answer) -> Verdict:
        """Say what a refusal means."""
        status, headers, node = answer.status, answer.headers, _error(answer.body)
        code = headers.get(b"x-ms-error-code", b"").decode("latin-1")
        code = code or (node.text("Code") if node is not None else "") or _BY_STATUS.get(status, "")
        message = node.text("Message").strip() if node is not None else ""
        what = (message.splitlines()[0].strip().rstrip(".") if message else "") or "the store refused"
        request_id = headers.get(b"x-ms-request-id", b"").decode("latin-1")
        verdict = Verdict(Act.END, what, self._advice(ask, status, code), status, code, request_id)
        act = self._act(status, code, answer)
        if act is Act.CLOCK:
            return replace(verdict, act=act, skew=clock(headers) - time.time())
        if act in (Act.AGAIN, Act.SLOWER):
            return replace(verdict, act=act, after=retry_after(headers))
        if status == 404 and code in _MISSING:
            return replace(verdict, kind=ObjectMissingError, what="there is no such object")
        return replace(verdict, act=act)

    def _act(self, status: int, code: str, answer: Answer) -> Act:
        if status == 403 and abs(clock(answer.headers) - time.time() - self.skew) > _SKEWED:
            return Act.CLOCK
        if self._account.renewable and (status == 401 or code == "AuthenticationFailed"):
            return Act.RENEW
        if status in (429, 503):
            return Act.SLOWER
        if (status >= 500 and status not in (501, 505) and code != UNKNOWN) or status == 408 or code in _AGAIN:
            return Act.AGAIN
        return Act.END

    def _advice(self, ask: Ask, status: int, code: str) -> str:
        if code in _ADVICE:
            return _ADVICE[code]
        if status in (401, 403):
            role = _ROLE.get(ask.op, "Storage Blob Data Contributor")
            return f"give who asks the role {role!r}, or use other credentials"
        if status == 404:
            return "check the key"
        if status in (429, 503):
            return "lower object_concurrency, or give it more time"
        return "try again later; tell who runs the store the request id" if status >= 500 else ""


def _shared_key(grant: SharedKey, ask: Ask, path: bytes, headers: list[Header]) -> bytes:
    """Give what proves that the key is known."""
    said = dict(headers)
    length = sum([memoryview(piece).nbytes for piece in ask.body])
    if length:
        said[b"content-length"] = b"%d" % length
    lines = [ask.method, *(said.get(name, b"") for name in _SIGNED)]
    lines += [b"%b:%b" % (name, said[name]) for name in sorted(said) if name.startswith(b"x-ms-")]
    lines.append(b"/%b%b" % (grant.account.encode(), path))
    if ask.query:
        pairs = [pair.partition(b"=") for pair in ask.query.split(b"&")]
        lines += sorted([b"%b:%b" % (name, unquote_to_bytes(value)) for name, _, value in pairs])
    proof = hmac.digest(grant.key, b"\n".join(lines), sha256)
    return b"SharedKey %b:%b" % (grant.account.encode(), base64.b64encode(proof))


def _error(body: bytes) -> Node | None:
    try:
        node = parse(body)
    except Unreadable:
        return None
    return node if node.name == "Error" else None
