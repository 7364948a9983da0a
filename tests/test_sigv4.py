"""Signatures: the examples that the reference of S3 publishes, and what botocore makes of any other request."""

from __future__ import annotations

import calendar
import string
from datetime import UTC, datetime
from typing import Any
from unittest.mock import patch
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncxfer._sigv4 import EMPTY_PAYLOAD, UNSIGNED_PAYLOAD, Header, Signer, digest

# The access key, the secret, the host and the second of the examples in the Amazon S3 API Reference.
EXAMPLE = Signer("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", region="us-east-1")
HOST = b"examplebucket.s3.amazonaws.com"
THEN = calendar.timegm((2013, 5, 24, 0, 0, 0))
PUBLISHED = [
    pytest.param(
        b"GET", b"/test.txt", [(b"range", b"bytes=0-9")], EMPTY_PAYLOAD,
        b"f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41", id="GET object",
    ),
    pytest.param(
        b"PUT", b"/test%24file.text",
        [(b"Date", b"Fri, 24 May 2013 00:00:00 GMT"), (b"x-amz-storage-class", b"REDUCED_REDUNDANCY")],
        digest(b"Welcome to ", memoryview(b"Amazon S3.")),
        b"98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd", id="PUT object",
    ),
    pytest.param(
        b"GET", b"/?lifecycle", [], EMPTY_PAYLOAD,
        b"fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543", id="GET bucket lifecycle",
    ),
    pytest.param(
        b"GET", b"/?prefix=J&max-keys=2", [], EMPTY_PAYLOAD,
        b"34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7", id="GET bucket",
    ),
]  # fmt: skip


def signature(added: list[Header]) -> bytes:
    return dict(added)[b"authorization"].rpartition(b"Signature=")[2]


@pytest.mark.parametrize(("method", "target", "headers", "payload", "expected"), PUBLISHED)
def test_the_published_examples(
    method: bytes, target: bytes, headers: list[Header], payload: bytes, expected: bytes
) -> None:
    added = EXAMPLE.sign(method, target, host=HOST, headers=headers, payload=payload, now=THEN + 0.9)
    assert signature(added) == expected


def test_the_headers_that_are_added() -> None:
    added = EXAMPLE.sign(b"GET", b"/test.txt", host=HOST, headers=[(b"range", b"bytes=0-9")], now=THEN)
    assert dict(added)[b"authorization"].startswith(
        b"AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request,"
        b"SignedHeaders=host;range;x-amz-content-sha256;x-amz-date,Signature="
    )
    assert added[:-1] == [(b"x-amz-content-sha256", UNSIGNED_PAYLOAD), (b"x-amz-date", b"20130524T000000Z")]


def test_a_session_token_is_sent_and_signed() -> None:
    signer = Signer("A", "S", region="us-east-1", token="a token")
    added = dict(signer.sign(b"GET", b"/", host=HOST, now=THEN))
    assert added[b"x-amz-security-token"] == b"a token"
    assert b"x-amz-date;x-amz-security-token," in added[b"authorization"]


def test_what_is_kept_of_a_second_and_a_day_ends_with_it() -> None:
    """A signer that has signed before gives what a new one gives, whichever way the clock goes."""
    kept = Signer("A", "S", region="eu-west-1")
    for step in (0, 0.5, 1, 86_399, 86_400, 3, 31_536_000, -1):
        new = Signer("A", "S", region="eu-west-1")
        assert kept.sign(b"GET", b"/", host=HOST, now=THEN + step) == new.sign(b"GET", b"/", host=HOST, now=THEN + step)


def test_the_secret_is_not_shown() -> None:
    signer = Signer("A", "very secret", region="us-east-1")
    assert "secret" not in repr(signer)


# ---- next to botocore ---------------------------------------------------------------------------------------------

WORDS = st.text(string.ascii_letters + string.digits + "-", min_size=1, max_size=12)
VALUES = st.text(string.ascii_letters + string.digits + " ,;=/%-", max_size=30)
KEYS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
# What botocore adds or leaves out on its own, and what it reads as another thing than a header to be signed.
SPECIAL = {"host", "expect", "transfer-encoding", "user-agent", "authorization", "date", "connection"}


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    method=st.sampled_from(["GET", "HEAD", "PUT", "POST", "DELETE"]),
    key=KEYS,
    query=st.lists(st.tuples(WORDS, KEYS), max_size=4, unique_by=lambda pair: pair[0]),
    headers=st.dictionaries(WORDS.map(str.lower).filter(lambda name: name not in SPECIAL), VALUES, max_size=4),
    body=st.one_of(st.none(), st.binary(max_size=50)),
    token=st.one_of(st.none(), WORDS),
    second=st.integers(0, 4_000_000_000),
)
def test_botocore_signs_alike(
    method: str,
    key: str,
    query: list[tuple[str, str]],
    headers: dict[str, str],
    body: bytes | None,
    token: str | None,
    second: int,
) -> None:
    pytest.importorskip("botocore", reason="botocore, which signs the same requests, is not installed")
    target = "/bucket/" + quote(key)
    if query:
        target += "?" + "&".join(f"{quote(name, safe='')}={quote(value, safe='')}" for name, value in query)
    payload = UNSIGNED_PAYLOAD if body is None else digest(body)
    theirs = botocore_signs(method, target, headers, payload.decode(), token, second)
    signer = Signer("AKID", "a/secret+key", region="eu-central-1", token=token)
    ours = signer.sign(
        method.encode(), target.encode(), host=b"127.0.0.1:8333",
        headers=[(name.encode(), value.encode()) for name, value in headers.items()], payload=payload, now=second,
    )  # fmt: skip
    assert signature(ours).decode() == theirs


def botocore_signs(
    method: str, target: str, headers: dict[str, str], payload: str, token: str | None, second: int
) -> str:
    """Give its signature of a request that already says what stands for its body."""
    from botocore import auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    class Signing(auth.S3SigV4Auth):  # type: ignore[misc]
        def payload(self, request: Any) -> str:
            return payload

    request = AWSRequest(method, "http://127.0.0.1:8333" + target, dict(headers))
    with patch.object(auth, "get_current_datetime", lambda **_: datetime.fromtimestamp(second, UTC)):
        Signing(Credentials("AKID", "a/secret+key", token), "s3", "eu-central-1").add_auth(request)
    return str(request.headers["Authorization"]).rpartition("Signature=")[2]
