"""Heads of HTTP/1.1, for a client: that of a request as bytes, and what the bytes of an answer's head say.

What comes in is not trusted: what RFC 9112 calls ambiguous (two lengths, a length beside chunks, folded lines, bare
line feeds) is refused. Bodies are not known here, nor how the bytes come.

References
----------
RFC 9110, HTTP Semantics; RFC 9112, HTTP/1.1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["Head", "Header", "Malformed", "encode_head"]

Header = tuple[bytes, bytes]

_TOKEN = b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_TARGET = re.compile(rb"[\x21-\x7e]+")
_STATUS = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: [^\0]*)?")
_DIGITS = re.compile(rb"[0-9]{1,18}")
_OURS = frozenset({b"host", b"content-length", b"transfer-encoding", b"connection"})
_WITH_LENGTH = frozenset({b"PUT", b"POST", b"PATCH"})


class Malformed(Exception):  # noqa: N818 - whoever knows whose answer it is makes an error of it
    """What came is not HTTP/1.1, or more than it may be."""


# ---- requests -----------------------------------------------------------------------------------------------------


def encode_head(method: bytes, target: bytes, host: bytes, headers: Iterable[Header], length: int) -> bytes:
    """Give what precedes a body of `length` bytes.

    Raises
    ------
    ValueError
        A part has characters that it cannot have, or a header is one that is added here.
    """
    if not method or method.translate(None, _TOKEN) or not _TARGET.fullmatch(target):
        raise ValueError(f"{method!r} {target!r} is no request; expected a method and a percent-encoded target")
    lines = [b"%b %b HTTP/1.1" % (method, target), b"host: %b" % host]
    if length or method in _WITH_LENGTH:
        lines.append(b"content-length: %d" % length)
    for name, value in headers:
        if not name or name.translate(None, _TOKEN) or name.lower() in _OURS:
            raise ValueError(f"header {name!r} is no token, or one that is added to every request")
        lines.append(b"%b: %b" % (name, value))
    head = b"\r\n".join(lines) + b"\r\n\r\n"
    if not head.count(b"\r") == head.count(b"\n") == len(lines) + 1 or b"\0" in head:
        raise ValueError("the value of a header has a line break or a NUL in it")
    return head


# ---- answers ------------------------------------------------------------------------------------------------------


class Head(NamedTuple):
    """The head of an answer; `length` is None where chunks or the end of the connection delimit the body."""

    status: int
    headers: dict[bytes, bytes]
    length: int | None
    chunked: bool
    keep: bool

    @classmethod
    def parse(cls, block: bytes, *, asked_for_head: bool) -> Head:
        """Take a head apart, without the empty line that ends it, or raise Malformed."""
        lines = block.split(b"\r\n")
        if not block.count(b"\r") == block.count(b"\n") == len(lines) - 1 or b"\0" in block:
            raise Malformed("a bare line break or a NUL in the head of an answer")
        first = _STATUS.fullmatch(lines[0])
        if first is None:
            raise Malformed(f"expected a status line of HTTP/1.1, found {lines[0][:80]!r}")
        headers: dict[bytes, bytes] = {}
        for line in lines[1:]:
            name, colon, value = line.partition(b":")
            if not (name and colon) or name.translate(None, _TOKEN):
                raise Malformed(f"expected a header, found {line[:80]!r}")
            name, value = name.lower(), value.strip(b" \t")
            if name in headers:
                value = headers[name] + b", " + value
            headers[name] = value
        status = int(first[2])
        length, chunked = _framing(headers)
        if asked_for_head or status < 200 or status in (204, 304):
            length, chunked = 0, False
        spoken = headers.get(b"connection", b"").lower()
        keep = b"close" not in spoken if first[1] == b"1" else b"keep-alive" in spoken
        return cls(status, headers, length, chunked, keep and (chunked or length is not None))


def _framing(headers: dict[bytes, bytes]) -> tuple[int | None, bool]:
    """Give how long the body is, and whether it comes in chunks."""
    coding, length = headers.get(b"transfer-encoding"), headers.get(b"content-length")
    if coding is not None:
        if coding.lower() != b"chunked" or length is not None:
            raise Malformed(f"a body with transfer-encoding {coding[:80]!r} and content-length {length!r:.80}")
        return None, True
    if length is None:
        return None, False
    told = set(length.split(b", "))
    if len(told) != 1 or not _DIGITS.fullmatch(length := told.pop()):
        raise Malformed(f"a body with content-length {length[:80]!r}")
    return int(length), False
