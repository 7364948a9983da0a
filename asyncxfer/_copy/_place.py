"""Where something is copied from or to, or listed: what a URL or path says. Nothing is looked at."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

__all__ = ["Place", "UsageError", "parse"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


class UsageError(Exception):
    """The command line asks for what makes no sense."""


@dataclass(frozen=True, slots=True)
class Place:
    """A file, directory, object or prefix.

    Attributes
    ----------
    scheme : str
        Of a store; empty for what is in the file system.
    bucket : str
    path : str
        An absolute path, or what keys begin with.
    folder : bool
        It was written as one: with a slash at its end, or a bucket alone.
    """

    scheme: str
    bucket: str
    path: str
    folder: bool

    @property
    def local(self) -> bool:
        """Whether it is in the file system."""
        return not self.scheme

    @property
    def name(self) -> str:
        """The last part of its path."""
        return os.path.basename(self.path.rstrip("/"))

    def at(self, path: str) -> str:
        """The URL, or path, of something in the same bucket or file system."""
        return path if self.local else f"{self.scheme}://{self.bucket}/{path}"

    @property
    def url(self) -> str:
        """Its own."""
        return self.at(self.path)


def parse(text: str) -> Place:
    """Read a URL or path.

    Raises
    ------
    UsageError
        It is neither. What it says is not repeated where there may be a password in it.
    """
    if not text or "\0" in text:
        raise UsageError(f"{text!r} is neither a path nor a URL")
    found = _SCHEME.match(text)
    if found is None:
        return _in_file_system(text)
    scheme, rest = found[1].lower(), text[found.end() :]
    if scheme == "file":
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost") or parts.query or parts.fragment or not parts.path:
            raise UsageError(f"{text!r} is no file of this host; expected file:///absolute/path")
        return _in_file_system(unquote(parts.path))
    bucket, _, key = rest.partition("/")
    if "@" in bucket:
        raise UsageError(f"credentials do not belong in a URL: {scheme}://BUCKET/KEY, and -o NAME=VALUE or a profile")
    if not bucket:
        raise UsageError(f"{text!r} names no bucket; expected {scheme}://BUCKET/KEY")
    if "?" in bucket or "#" in bucket:
        raise UsageError(f"{text!r}: {bucket!r} can be no bucket")
    return Place(scheme, bucket, key, not key or key.endswith("/"))


def _in_file_system(path: str) -> Place:
    return Place("", "", os.path.abspath(path), path.endswith("/") or os.path.basename(path) in (".", ".."))
