"""Names below a source: which of them are wanted, and which can be a path below a destination folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fnmatch import fnmatchcase

__all__ = ["PART", "Wanted", "shown", "unsafe"]

#: What the names end in under which files are written until they are whole.
PART = ".asyncxfer-part"


class Wanted:
    """Which names are to be copied or listed.

    Parameters
    ----------
    include, exclude : sequence of str
        Globs in which ``*`` takes slashes too. One without a slash is compared with the last part of a name, one with
        a slash with all of it. A name is wanted if it is included, or nothing says what is, and not excluded.
    """

    def __init__(self, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> None:
        self._include = tuple(include)
        self._exclude = tuple(exclude)

    def __contains__(self, name: str) -> bool:
        if self._include and not any(_matches(name, glob) for glob in self._include):
            return False
        return not any(_matches(name, glob) for glob in self._exclude)


def _matches(name: str, glob: str) -> bool:
    return fnmatchcase(name if "/" in glob else name.rpartition("/")[2], glob)


def unsafe(name: str) -> str:
    """Why a name from a store can be no path below a folder; or nothing."""
    if "\0" in name:
        return "there is a NUL in its name"
    if name.startswith("/"):
        return "its name is absolute"
    parts = name.split("/")
    if ".." in parts:
        return "its name leads out of the destination"
    if "." in parts or "" in parts:
        return "its name has a part that no file can have"
    if parts[-1].endswith(PART):
        return f"its name ends in {PART}, which is for files that are not whole"
    return ""


def shown(name: str) -> str:
    """Give a name as it can be printed: what would steer a terminal, or is no text, is escaped."""
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in os.fsdecode(os.fsencode(name)))
