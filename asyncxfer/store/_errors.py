"""What a store raises on its own account, besides the errors of asyncxfer."""

from __future__ import annotations

from asyncxfer import XferError

__all__ = ["StoreError", "StoreFormatError", "StoreFullError", "StoreLockedError"]


class StoreError(XferError):
    """A store that cannot be opened, or cannot do what was asked of it."""


class StoreFormatError(StoreError):
    """Files that are no store, a store of another version, or one with other blocks than were asked for."""


class StoreFullError(StoreError):
    """There is no room: the disk is full, or what the budget leaves is pinned or in use."""


class StoreLockedError(StoreError):
    """Another writer has the store open."""
