"""How Google Cloud Storage is spoken, by its JSON API: tokens, what refusals mean and what can be done about them.

References
----------
Cloud Storage JSON API, "HTTP status and error codes", "Request endpoints".
"""

from __future__ import annotations

import asyncio
import json
import ssl
from dataclasses import replace
from typing import Any, Protocol
from urllib.parse import quote

from .._errors import ObjectMissingError
from .._http import Answer
from ._gcs_account import Bearer
from ._object._attempts import Act, Ask, Header, Verdict
from ._object._times import retry_after

__all__ = ["Account", "GcsDialect", "parsed"]

_FRESH = 60.0  # seconds that a token is used without asking for it
_BY_STATUS = {
    400: "badRequest", 401: "unauthorized", 403: "forbidden", 404: "notFound", 409: "conflict",
    412: "conditionNotMet", 416: "requestedRangeNotSatisfiable",
}  # fmt: skip
_SLOWER = frozenset({"rateLimitExceeded", "userRateLimitExceeded"})
_PERMISSION = {
    "get": "storage.objects.get", "head": "storage.objects.get", "list": "storage.objects.list",
    "put": "storage.objects.create and storage.objects.delete", "delete": "storage.objects.delete",
    "copy": "storage.objects.get and storage.objects.create",
}  # fmt: skip


class Account(Protocol):
    """Where a bucket is and who asks: see `GcsAccount`."""

    url: str
    bucket: str
    endpoint: str
    path: str
    tls: ssl.SSLContext | None
    renewable: bool

    async def grant(self, *, refresh: bool = False) -> Bearer | None:
        """Give what is valid now."""


def parsed(body: bytes) -> dict[str, Any] | None:
    """Give an object of JSON; None where it is none."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


class GcsDialect:
    """Implements `Dialect`. The paths of its requests are those of the API."""

    backend = "gcs"

    def __init__(self, account: Account) -> None:
        self._account = account
        self._grant: Bearer | None = None
        self._asked = -_FRESH
        self._loop = asyncio.get_running_loop()
        self._path = account.path.encode()
        self._added: list[Header] = []
        self._objects = f"/storage/v1/b/{quote(account.bucket, safe='')}/o".encode()
        self.url = account.url
        self.endpoint = account.endpoint
        self.tls = account.tls
        self.era = 0
        self.skew = 0.0

    def object(self, key: str) -> bytes:
        """Give the path of an object; that of all of them without its key."""
        return b"%b/%b" % (self._objects, quote(key, safe="-_.~").encode()) if key else self._objects

    @property
    def uploads(self) -> bytes:
        """The path where objects are made."""
        return b"/upload" + self._objects

    async def sign(self, ask: Ask, host: bytes, deadline: float) -> tuple[bytes, list[Header]]:
        """Give the target and all headers."""
        if self._loop.time() - self._asked >= _FRESH:
            async with asyncio.timeout_at(deadline):
                await self._take()
        ask.era = self.era
        target = self._path + ask.path
        return (b"%b?%b" % (target, ask.query) if ask.query else target), ask.headers + self._added

    async def _take(self, *, refresh: bool = False) -> None:
        grant = await self._account.grant(refresh=refresh)
        self._asked = self._loop.time()
        if grant == self._grant:
            return
        self._grant = grant
        self.era += 1
        self._added = []
        if grant is not None:
            self._added.append((b"authorization", b"Bearer " + grant.token))
            if grant.project:
                self._added.append((b"x-goog-user-project", grant.project))

    async def renew(self, era: int) -> None:
        """Get another token."""
        if era == self.era:
            await self._take(refresh=True)

    async def move(self, region: str, era: int) -> None:
        """Stay: buckets are found by their name."""

    # -- what answers mean

    def judge(self, ask: Ask, answer: Answer) -> Verdict:
        """Say what a refusal means."""
        status, headers = answer.status, answer.headers
        code, message = _said(answer.body)
        code = code or _BY_STATUS.get(status, "")
        request_id = headers.get(b"x-guploader-uploadid", b"").decode("latin-1")
        no_bucket = status == 404 and (ask.op == "list" or "bucket does not exist" in message)
        verdict = Verdict(
            Act.END, message.rstrip(".") or "the store refused", self._advice(ask, status, no_bucket), status, code,
            request_id,
        )  # fmt: skip
        act = self._act(status, code, message)
        if act in (Act.AGAIN, Act.SLOWER):
            return replace(verdict, act=act, after=retry_after(headers))
        if status == 404 and not no_bucket and ask.op != "put":
            return replace(verdict, kind=ObjectMissingError, what="there is no such object")
        return replace(verdict, act=act)

    def _act(self, status: int, code: str, message: str) -> Act:
        if status == 401 and self._account.renewable:
            return Act.RENEW
        if status in (429, 503) or code in _SLOWER:
            return Act.SLOWER
        if (status >= 500 and status not in (501, 505)) or status == 408 or (status == 400 and "CRC32C" in message):
            return Act.AGAIN
        return Act.END

    def _advice(self, ask: Ask, status: int, no_bucket: bool) -> str:
        if status == 401:
            return "get a new token, or give the credentials that can"
        if status == 403:
            return f"let who asks do {_PERMISSION.get(ask.op, 'this')}, or use other credentials"
        if no_bucket or (status == 404 and ask.op == "put"):
            return "create the bucket, or correct its name or the endpoint"
        if status == 404:
            return "check the key"
        if status in (429, 503):
            return "lower object_concurrency, or give it more time"
        return "try again later; tell who runs the store the request id" if status >= 500 else ""


def _said(body: bytes) -> tuple[str, str]:
    """Give the code and the message of a refusal; empty where it says none."""
    error = (parsed(body) or {}).get("error")
    if not isinstance(error, dict):
        text = body[:500].decode(errors="replace").strip()
        return "", text.splitlines()[0] if text and not text.startswith("<") else ""
    errors = error.get("errors")
    first = errors[0] if isinstance(errors, list) and errors and isinstance(errors[0], dict) else {}
    message = str(error.get("message") or "").strip()
    return str(first.get("reason") or ""), message.splitlines()[0] if message else ""
