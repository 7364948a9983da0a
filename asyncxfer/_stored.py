"""What can be asked of objects without moving their bytes: list, head, delete, copy.

Owns the joining of prefixes and keys and what the mode allows; the asking is done by the backend of the region.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ._errors import AccessError
from ._objects import ObjectInfo

if TYPE_CHECKING:
    from ._objects import Objects
    from ._region import Region
    from .abc import ObjectRegistration

__all__ = ["StoredObjects"]


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

    def _check_writable(self, what: str) -> None:
        self._region.check_open()
        if self._opened.readonly:
            raise AccessError(f"{what} would change {self._opened.url}, which was opened in mode 'r'")

    def _relative(self, info: ObjectInfo) -> ObjectInfo:
        return replace(info, key=info.key.removeprefix(self._opened.prefix))

    def __repr__(self) -> str:
        return f"<StoredObjects of {self._opened.url}>"
