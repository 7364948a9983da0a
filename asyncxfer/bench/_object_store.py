"""Where objects of the bench are: the stores that it knows, and what every one of them has to be asked.

A kind of store says where a server that keeps nothing is of its kind, how one that keeps is found, and makes, reads and
deletes objects by the store's own client, past every system that is measured. How a system moves bytes is not known.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from ._pair import BenchError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._object_cases import ObjectCase
    from ._side import Message

__all__ = ["Cloud", "KeptObjects", "StoreAt", "store_kind"]

Cloud = Literal["s3", "azure"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreAt(ABC):
    """Where objects are, and who asks for them.

    Attributes
    ----------
    endpoint : str
    bucket : str
        Or container.
    prefix : str
        What all keys begin with, with a slash at its end.
    ca : str or None
        File with the certificate that its own is trusted by; None: those of the system, or no TLS.
    """

    endpoint: str
    bucket: str
    prefix: str
    ca: str | None = None

    @classmethod
    @abstractmethod
    def of_null_server(cls, url: str, bucket: str, prefix: str, ca: str | None) -> Self:
        """A server that keeps nothing, and asks nobody who he is."""

    @classmethod
    @abstractmethod
    def found(cls, endpoint: str, bucket: str, prefix: str) -> Self:
        """A store, with the credentials that are where its users have them.

        Raises
        ------
        BenchError
            There are none.
        """

    @abstractmethod
    def objects(self) -> KeptObjects:
        """What it has, as its own client sees it."""

    def to_message(self) -> Message:
        """As plain values, for the pipe to a worker."""
        return asdict(self)


class KeptObjects(ABC):
    """The objects that every system uses, as the store's own client sees them. What it fails at is a BenchError."""

    #: What the client raises.
    failures: tuple[type[Exception], ...]

    def __init__(self, store: StoreAt) -> None:
        self._at = store
        self._keys: set[str] = set()

    @abstractmethod
    def _reach(self) -> None:
        """Make the bucket where there is none."""

    @abstractmethod
    def _put(self, key: str, data: bytes) -> None: ...

    @abstractmethod
    def _get(self, key: str) -> bytes: ...

    @abstractmethod
    def _delete(self, key: str) -> None:
        """Delete it; it may not be there."""

    @abstractmethod
    def _close(self) -> None: ...

    async def reach(self) -> None:
        """Make the bucket where there is none."""
        await self._asked(self._reach)

    async def fill(self, case: ObjectCase) -> None:
        """Make what a get is to read, and leave nothing where a put is to write."""
        await self._asked(self._fill, case)

    async def problem(self, case: ObjectCase) -> str:
        """Check what a put has written."""
        wrong: int = await self._asked(self._differing, case)
        return f"{wrong} of {case.shape.count} objects differ" if wrong else ""

    async def close(self) -> None:
        """Remove them."""
        await self._asked(self._remove)

    async def _asked(self, call: Callable[..., Any], *arguments: object) -> Any:
        try:
            return await asyncio.to_thread(call, *arguments)
        except self.failures as error:
            raise BenchError(f"{self._at.endpoint} cannot be used: {error}") from error

    def _fill(self, case: ObjectCase) -> None:
        for number, key in enumerate(case.keys()):
            whole = self._at.prefix + key
            self._keys.add(whole)
            if case.op == "get":
                self._put(whole, case.holds(number).tobytes())
            else:
                self._delete(whole)

    def _differing(self, case: ObjectCase) -> int:
        wrong = 0
        for number, key in enumerate(case.keys()):
            content = np.frombuffer(self._get(self._at.prefix + key), np.uint8)
            wrong += not np.array_equal(content, case.holds(number))
        return wrong

    def _remove(self) -> None:
        for key in self._keys:
            self._delete(key)
        self._close()


def store_kind(cloud: Cloud) -> type[StoreAt]:
    """What is known of the stores of a cloud; imported here so that none needs the library of another."""
    if cloud == "azure":
        from ._object_azure import AzureAt

        return AzureAt
    from ._object_s3 import S3At

    return S3At
