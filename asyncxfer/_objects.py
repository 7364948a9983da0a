"""Objects that bytes are moved to and from: what was opened, as an object store is told of it.

An object region is memory of the kind OBJECT without segments: which objects a transfer names stands in its descriptor
list (`_object_rows`), and how the store is reached is the business of the backend of its scheme. Owns the URL, the
joining of prefix and key, and what is said of a single object.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, TypeAlias, get_args
from urllib.parse import urlsplit

from ._descriptors import Layout, MemoryKind
from ._errors import ConfigError, DescriptorError
from ._memory import Memory

__all__ = ["Exists", "ObjectInfo", "ObjectMode", "Objects", "open_objects", "scheme_of"]

Exists: TypeAlias = Literal["replace", "keep", "error"]
ObjectMode: TypeAlias = Literal["r", "r+", "w"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_KEY_BYTES = 1024  # of every store that is known here


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a store says of one object.

    Attributes
    ----------
    key : str
    nbytes : int, bytes
    etag : str
        By which the store tells one version of it from another.
    modified : float, seconds
        Since the epoch.
    checksum : str or None
        Its kind and value, such as ``"crc64nvme:AAAAAAAAAAA="``; None where the store did not say.
    """

    key: str
    nbytes: int
    etag: str
    modified: float
    checksum: str | None = None


@dataclass(frozen=True, slots=True)
class Objects:
    """The objects of one bucket or container below a prefix, as they were opened.

    Attributes
    ----------
    scheme : str
        ``"s3"``, ``"az"``, ``"gs"``.
    bucket : str
        Or container.
    prefix : str
        What all keys begin with: empty, or with a slash at its end.
    readonly : bool
    exists : {"replace", "keep", "error"}
        What a put does with an object that is there: replace it, take it for what was to be put, fail.
    options : mapping of str to object
        For the client of the store, as that names them.
    """

    scheme: str
    bucket: str
    prefix: str
    readonly: bool
    exists: Exists = "replace"
    options: Mapping[str, object] = field(default_factory=dict, repr=False)  # there may be secrets in it

    @property
    def url(self) -> str:
        """As it was opened, for messages."""
        return f"{self.scheme}://{self.bucket}/{self.prefix}"

    def whole_key(self, key: str) -> str:
        """The key in the bucket.

        Raises
        ------
        DescriptorError
            No store has such a key.
        """
        whole = self.prefix + key
        try:
            nbytes = len(whole.encode())
        except UnicodeEncodeError as error:
            raise DescriptorError(f"{key!r} cannot be a key: {error}") from error
        if not key or nbytes > _KEY_BYTES or "\0" in key:
            raise DescriptorError(f"{key!r} cannot be a key: expected 1 to {_KEY_BYTES} bytes with the prefix, none 0")
        return whole


def scheme_of(url: object) -> str:
    """The scheme of a URL in lower case; empty where it is a path."""
    if not isinstance(url, str):
        return ""
    found = _SCHEME.match(url)
    return found[1].lower() if found else ""


def open_objects(
    url: str, mode: ObjectMode, *, exists: Exists = "replace", options: Mapping[str, object] | None = None
) -> Memory:
    """Describe the objects below a URL as memory, whose `owner` is the `Objects`. No store is asked.

    Parameters
    ----------
    url : str
        ``SCHEME://BUCKET`` or ``SCHEME://BUCKET/PREFIX``.
    mode : {"r", "r+", "w"}
        Read; read and write, both of the others.
    exists : {"replace", "keep", "error"}
        What a put does with an object that is there.
    options : mapping of str to object, or None
        For the client of the store.

    Raises
    ------
    ConfigError
        The URL is malformed, or there is no such word.
    """
    for what, word, words in (("mode", mode, ObjectMode), ("exists", exists, Exists)):
        if word not in get_args(words):
            raise ConfigError(f"{what} is {word!r}; expected one of {', '.join(map(repr, get_args(words)))}")
    scheme = scheme_of(url)
    parts = urlsplit(url)
    if not parts.netloc or "?" in url or "#" in url or parts.username is not None:
        raise ConfigError(f"{url!r} names no objects; expected {scheme}://BUCKET/PREFIX, credentials in options=")
    prefix = parts.path.strip("/")
    objects = Objects(
        scheme, parts.netloc, f"{prefix}/" if prefix else "", mode == "r", exists, MappingProxyType(dict(options or {}))
    )
    return Memory(objects, MemoryKind.OBJECT, 0, (), Layout((), (), (), (), 1, stacked=True), "uint8", objects.readonly)
