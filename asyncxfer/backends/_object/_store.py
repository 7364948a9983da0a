"""One bucket or container as one event loop reaches it: the interface that every store implements, and its words.

It knows no store, no HTTP and no transfers. Keys are whole keys of the bucket; deadlines are by the loop's clock, for
all attempts of a call together. A call that ends, however it ends, touches the caller's memory no more.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import ClassVar, NamedTuple, Protocol

from ...abc import Exists, ObjectInfo

__all__ = ["ObjectStore", "Part", "Read"]


class Read(NamedTuple):
    """What came with bytes that were read.

    Attributes
    ----------
    etag : str
        Of the version that was read.
    nbytes : int
        Of the whole object.
    crc : int or None
        Checksum, by the store's `ObjectStore.algorithm`, of what was received, where it was computed.
    """

    etag: str
    nbytes: int
    crc: int | None


class Part(NamedTuple):
    """A part of a multipart upload that the store has."""

    number: int
    nbytes: int
    etag: str
    crc: int


class ObjectStore(Protocol):
    """One bucket or container.

    Attributes
    ----------
    url : str
        Such as ``s3://bucket``, for messages.
    algorithm : {"crc64nvme", "crc32c"}
        Of the checksums of what is read and of parts.
    smallest_part, largest_write : int, bytes
        Of a multipart upload, a part that is not the last; what can be written without one.
    most_parts : int
    """

    url: str
    algorithm: ClassVar[str]
    smallest_part: ClassVar[int]
    most_parts: ClassVar[int]
    largest_write: ClassVar[int]

    async def read(
        self,
        key: str,
        offset: int,
        into: Sequence[memoryview],
        *,
        whole: bool,
        verify: bool,
        etag: str | None,
        deadline: float,
        crc: bool = False,
    ) -> Read:
        """Read bytes from `offset` on, as many as there is room for in `into`.

        Parameters
        ----------
        whole : bool
            The object has to be exactly that long, and `offset` is 0. It is compared with the store's checksum of it
            where that sends one.
        verify : bool
            The bytes are to be proved: those of a range by TLS, else by a second reading.
        etag : str or None
            The version that is to be read.
        crc : bool
            `Read.crc` is wanted.
        """

    async def write(self, key: str, body: Sequence[memoryview], *, exists: Exists, deadline: float) -> str:
        """Write an object; its etag, or nothing where one was there and was kept."""

    async def begin(self, key: str, *, deadline: float) -> str:
        """Begin a multipart upload; its id."""

    async def part(self, key: str, upload: str, number: int, body: Sequence[memoryview], *, deadline: float) -> Part:
        """Write one part; numbers begin at 1."""

    async def complete(self, key: str, upload: str, parts: Sequence[Part], *, exists: Exists, deadline: float) -> str:
        """Make an object of the parts, in order; its etag, or nothing where one was there and was kept."""

    async def abort(self, key: str, upload: str, *, deadline: float) -> None:
        """Let nothing of an upload be left."""

    async def head(self, key: str, *, deadline: float) -> ObjectInfo:
        """Ask what an object is."""

    def list(self, prefix: str, *, deadline: float, after: str = "") -> AsyncIterator[ObjectInfo]:
        """Give what is there, by keys in order, those behind `after`."""

    async def delete(self, keys: Sequence[str], *, deadline: float) -> None:
        """Delete objects; those that are not there are fine."""

    async def copy(self, source: str, target: str, *, deadline: float) -> None:
        """Copy an object within the store."""

    async def aclose(self) -> None:
        """Close all connections."""
