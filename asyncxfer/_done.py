"""What a transfer that went well gives whoever awaits it."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Done"]


class Done(NamedTuple):
    """What a transfer did.

    Attributes
    ----------
    nbytes : int, bytes
    seconds : float, seconds
        From the post until the data, and the notification, had gone out.
    backend : str
    descriptors : int
        Rows of the local list.
    """

    nbytes: int
    seconds: float
    backend: str
    descriptors: int
