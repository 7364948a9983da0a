"""What can be asked of objects without moving their bytes: list, head, delete, copy.

Owns the joining of prefixes and keys and what the mode allows; the asking is done by the backend of the region.
"""

from __future__ import annotations

import ctypes
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Self

from ._descriptors import DescriptorList, MemoryKind
from ._errors import AccessError, ClosedError, DescriptorError
from ._objects import ObjectInfo

if TYPE_CHECKING:
    from ._objects import Objects
    from ._region import Region
    from .abc import ObjectRegistration, ObjectUpload

__all__ = ["StoredObjects", "Upload"]


class StoredObjects:
    """The objects of a region: ``region.objects``. Keys are those by which the region is indexed.

    All calls raise ObjectError where the store refuses or does not answer, and ClosedError once the region was closed.

    Parameters
    ----------
    region : Region
    opened : Objects
    registration : ObjectRegistration
        Of a backend that reaches them.
    """

    def __init__(self, region: Region, opened: Objects, registration: ObjectRegistration) -> None:
        self._region = region
        self._opened = opened
        self._registration = registration

    @property
    def url(self) -> str:
        """As it was opened."""
        return self._opened.url

    async def head(self, key: str) -> ObjectInfo:
        """Tell what the store knows of an object.

        Raises
        ------
        ObjectMissingError
            There is none.
        """
        self._region.check_open()
        return self._relative(await self._registration.head(self._opened.whole_key(key)))

    async def list(self, prefix: str = "", *, after: str = "") -> AsyncIterator[ObjectInfo]:
        """Yield the objects whose keys begin with `prefix`, in the order of their keys.

        Parameters
        ----------
        prefix : str
            Of a key, not only of whole parts between slashes.
        after : str
            Begin behind this key.
        """
        self._region.check_open()
        whole = self._opened.prefix
        async for info in self._registration.list(whole + prefix, after=whole + after if after else ""):
            if info.key != whole:  # which is what some tools leave for a folder
                yield self._relative(info)

    async def delete(self, keys: str | Sequence[str]) -> None:
        """Delete objects; one that is not there is as good as deleted.

        Raises
        ------
        AccessError
            The region was opened in mode "r".
        """
        self._check_writable("delete")
        named = (keys,) if isinstance(keys, str) else keys
        await self._registration.delete([self._opened.whole_key(key) for key in named])

    async def copy(self, source: str, target: str) -> None:
        """Copy an object within the store; what is there under the new key is replaced.

        Raises
        ------
        AccessError
            The region was opened in mode "r".
        ObjectMissingError
            There is no such object.
        """
        self._check_writable("copy")
        await self._registration.copy(self._opened.whole_key(source), self._opened.whole_key(target))

    def upload(self, key: str) -> Upload:
        """Write an object part by part: one that is longer than there is memory for.

        Parameters
        ----------
        key : str

        Returns
        -------
        Upload
            ``async with`` it. Leaving it without `Upload.complete` leaves nothing in the store.

        Raises
        ------
        AccessError
            The region was opened in mode "r".
        """
        self._check_writable("upload")
        return Upload(self._registration, self._opened.whole_key(key))

    def _check_writable(self, what: str) -> None:
        self._region.check_open()
        if self._opened.readonly:
            raise AccessError(f"{what} would change {self._opened.url}, which was opened in mode 'r'")

    def _relative(self, info: ObjectInfo) -> ObjectInfo:
        return replace(info, key=info.key.removeprefix(self._opened.prefix))

    def __repr__(self) -> str:
        return f"<StoredObjects of {self._opened.url}>"


class Upload:
    """An object that is being written part by part: ``region.objects.upload(key)``.

    Parameters
    ----------
    registration : ObjectRegistration
    key : str
        The whole key, in the bucket.
    """

    def __init__(self, registration: ObjectRegistration, key: str) -> None:
        self._registration = registration
        self._key = key
        self._begun: ObjectUpload | None = None
        self._left = False

    async def __aenter__(self) -> Self:
        self._begun = await self._registration.upload(self._key)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._left:
            under_way = self._under_way()
            self._left = True
            await under_way.abort()

    async def put(self, number: int, local: DescriptorList) -> None:
        """Write a part; several at a time, in any order.

        Parameters
        ----------
        number : int
            From 1: by which the parts are put together.
        local : DescriptorList
            Host memory, whose region stays open until this has ended. Stores want parts of at least 5 MiB, but for
            the last, and not more than 10,000 of them.

        Raises
        ------
        DescriptorError
            It is no host memory, or there can be no such part.
        ObjectError
            The store refused it, or did not answer.
        ClosedError
            The upload has ended.
        """
        under_way, region = self._under_way(), local.region
        memory = getattr(region, "memory", None)  # which a peer's region does not have
        if memory is None or memory.kind is not MemoryKind.DRAM or number < 1:
            raise DescriptorError(
                f"part {number} of {region!r}: expected a number from 1, and host memory of this agent"
            )
        rows = local.merged().rows().tolist()
        body = [_bytes_at(memory.segments[segment].address + offset, length) for offset, length, segment in rows]
        await under_way.part(number, body)

    async def complete(self) -> str:
        """Make an object of the parts; what then counts is how its region was opened (``exists=``).

        Returns
        -------
        str
            Its etag; empty where there was one that was kept.

        Raises
        ------
        ObjectError
            The store refused, or did not answer.
        ClosedError
            The upload has ended.
        """
        etag = await self._under_way().complete()
        self._left = True
        return etag

    def _under_way(self) -> ObjectUpload:
        if self._begun is None or self._left:
            raise ClosedError(f"the upload of {self._key!r} {'has ended' if self._left else 'needs `async with`'}")
        return self._begun

    def __repr__(self) -> str:
        return f"<Upload of {self._key!r}>"


def _bytes_at(address: int, nbytes: int) -> memoryview:
    """Memory that somebody else keeps."""
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B").toreadonly()
