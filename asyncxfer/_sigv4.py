"""Signs a request for S3, and for what speaks like it, by AWS Signature Version 4, in headers.

Pure: it takes the parts of a request and the time, and gives the headers to add. It knows no network, no objects and
no source of credentials; the body is known by its digest only. As S3 has it, the path is signed as it is sent: encoded
once, and not normalised.

The key is derived from the secret by four digests, once for a day; text that depends on the second is kept for that.

References
----------
Amazon S3 API Reference, "Signature Calculations for the Authorization Header: Transferring Payload in a Single Chunk".
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Iterable
from hashlib import sha256
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

__all__ = ["EMPTY_PAYLOAD", "UNSIGNED_PAYLOAD", "Signer", "digest"]

#: Instead of the digest of a body: it is protected by TLS, or by a checksum, or not at all.
UNSIGNED_PAYLOAD = b"UNSIGNED-PAYLOAD"

Header = tuple[bytes, bytes]

_BLOCK = 64  # bytes, of SHA-256


def digest(*pieces: bytes | bytearray | memoryview) -> bytes:
    """Give what stands for a body, in one piece or several."""
    sum_ = sha256()
    for piece in pieces:
        sum_.update(piece)
    return sum_.hexdigest().encode()


#: What stands for a body of nothing.
EMPTY_PAYLOAD = digest()


class _Moment(NamedTuple):
    """What a second has in common, and the day with it."""

    second: int
    stamp: bytes  # 20130524T000000Z
    scope: bytes  # 20130524/us-east-1/s3/aws4_request
    inner: Hash  # of HMAC with the key of the day, that far
    outer: Hash


class Signer:
    """Signs with one set of credentials for one region of one service; used by any number of threads.

    Parameters
    ----------
    access_key, secret_key : str
        As the service has issued them.
    region, service : str
        What the service calls itself in signatures.
    token : str or None
        The session token of credentials that expire.
    """

    def __init__(
        self, access_key: str, secret_key: str, *, region: str, service: str = "s3", token: str | None = None
    ) -> None:
        self._access_key = access_key.encode()
        self._secret = b"AWS4" + secret_key.encode()
        self._region, self._service = region.encode(), service.encode()
        self._token = [(b"x-amz-security-token", token.encode())] if token is not None else []
        self._moment: _Moment | None = None

    def sign(
        self,
        method: bytes,
        target: bytes,
        *,
        host: bytes,
        headers: Iterable[Header] = (),
        payload: bytes = UNSIGNED_PAYLOAD,
        now: float,
    ) -> list[Header]:
        """Give the headers that make a request authentic.

        Parameters
        ----------
        method, target : bytes
            As they are sent; the target is percent-encoded, with its query behind a question mark.
        host : bytes
            What is sent as `Host`, with the port where that is not the one of the scheme.
        headers : iterable of (bytes, bytes)
            Those of the request that are to be signed with it. Not `Host`, and not what is returned.
        payload : bytes
            `digest` of the body, or `UNSIGNED_PAYLOAD`.
        now : float, seconds since the epoch
            By the clock of the service: its difference from the clock here is for the caller to add.

        Returns
        -------
        list of (bytes, bytes)
            To be sent with `headers`, in lower case.
        """
        second = int(now)
        moment = self._moment
        if moment is None or moment.second != second:
            self._moment = moment = self._at(second, moment)
        added = [(b"x-amz-content-sha256", payload), (b"x-amz-date", moment.stamp), *self._token]
        names, lines = _canonical_headers([(b"host", host), *headers, *added])
        path, _, query = target.partition(b"?")
        request = b"%b\n%b\n%b\n%b\n%b\n%b" % (method, path, _canonical_query(query), lines, names, payload)
        text = b"AWS4-HMAC-SHA256\n%b\n%b\n%b" % (moment.stamp, moment.scope, sha256(request).hexdigest().encode())
        added.append(
            (
                b"authorization",
                b"AWS4-HMAC-SHA256 Credential=%b/%b,SignedHeaders=%b,Signature=%b"
                % (self._access_key, moment.scope, names, _finish(moment, text)),
            )
        )
        return added

    def _at(self, second: int, before: _Moment | None) -> _Moment:
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(second)).encode()
        day = stamp[:8]
        if before is not None and before.stamp[:8] == day:
            return before._replace(second=second, stamp=stamp)
        key = self._secret
        for part in (day, self._region, self._service, b"aws4_request"):
            key = hmac.digest(key, part, "sha256")
        padded = key.ljust(_BLOCK, b"\0")
        inner, outer = (sha256(bytes(byte ^ pad for byte in padded)) for pad in (0x36, 0x5C))
        return _Moment(second, stamp, b"/".join((day, self._region, self._service, b"aws4_request")), inner, outer)


def _finish(moment: _Moment, text: bytes) -> bytes:
    """HMAC-SHA256 of a text, in hexadecimal: three times as fast as from the key."""
    inner, outer = moment.inner.copy(), moment.outer.copy()
    inner.update(text)
    outer.update(inner.digest())
    return outer.hexdigest().encode()


def _canonical_headers(headers: list[Header]) -> tuple[bytes, bytes]:
    """Give the names, in order, and a line for each, values of one name joined and spaces in them made single."""
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        if b"  " in value or value[:1].isspace() or value[-1:].isspace():
            value = b" ".join(value.split())  # noqa: PLW2901 - the same value, in its canonical form
        name = name.lower()  # noqa: PLW2901
        found[name] = found[name] + b"," + value if name in found else value
    names = sorted(found)
    return b";".join(names), b"".join([b"%b:%b\n" % (name, found[name]) for name in names])


def _canonical_query(query: bytes) -> bytes:
    """Sort it by name, then value; a name without a value has an empty one."""
    if not query:
        return b""
    pairs = [pair.partition(b"=")[::2] for pair in query.split(b"&") if pair]
    return b"&".join([b"%b=%b" % pair for pair in sorted(pairs)])
