"""Amounts of bytes as people write them, and percentiles."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from ._errors import KvbenchError

__all__ = ["percentiles", "size"]

_SIZE = re.compile(r"(\d+) ?(B|KiB|MiB|GiB|KB|MB|GB|)", re.IGNORECASE)
_UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def size(text: str | int) -> int:
    """Bytes of ``4MiB``, ``1GB`` or ``4096``.

    Raises
    ------
    KvbenchError
        It is nothing of the kind.
    """
    match = _SIZE.fullmatch(str(text).strip())
    if match is None:
        raise KvbenchError(f"{text!r} is no amount of bytes; write for instance 4096, 64KiB, 4MiB or 1GB")
    return int(match[1]) * _UNITS[match[2].upper()]


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The 50th, 90th and 99th, and the largest; zeros of nothing."""
    if not values:
        return {"p50": 0.0, "p90": 0.0, "p99": 0.0, "max": 0.0}
    found = np.percentile(values, (50, 90, 99, 100))
    return dict(zip(("p50", "p90", "p99", "max"), map(float, found), strict=True))
