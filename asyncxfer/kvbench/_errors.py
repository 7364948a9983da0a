"""The one error of kvbench: something that was asked for makes no sense or cannot be known."""

from __future__ import annotations

__all__ = ["KvbenchError"]


class KvbenchError(Exception):
    """A configuration, a description or a run that kvbench cannot go on with; the text says why."""
