"""Times as object stores write them: in headers, in lists, and how long they want to be left alone."""

from __future__ import annotations

import calendar
import email.utils
import re
import time
from collections.abc import Mapping

__all__ = ["clock", "http_time", "iso_time", "retry_after"]

_ISO = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d{1,9})?Z")
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")


def iso_time(text: str) -> float:
    """Give seconds since the epoch; 0 where the text is no such time."""
    found = _ISO.fullmatch(text)
    if found is None:
        return 0.0
    try:
        return calendar.timegm(time.strptime(found[1], "%Y-%m-%dT%H:%M:%S")) + float(found[2] or 0)
    except ValueError:
        return 0.0


def http_time(text: bytes) -> float:
    """Give seconds since the epoch; 0 where the text is no such time."""
    try:
        return email.utils.parsedate_to_datetime(text.decode("latin-1")).timestamp()
    except (ValueError, OverflowError):
        return 0.0


def clock(headers: Mapping[bytes, bytes]) -> float:
    """Give the store's time; this host's where an answer does not say."""
    return http_time(headers.get(b"date", b"")) or time.time()


def retry_after(headers: Mapping[bytes, bytes]) -> float | None:
    """Give how many seconds to wait, where an answer says it in seconds or by a time."""
    text = headers.get(b"retry-after", b"")
    if _SECONDS.fullmatch(text.decode("latin-1")):
        return float(text)
    until = http_time(text)
    return max(0.0, until - clock(headers)) if until else None
