"""What every store of blocks is to its user, wherever the blocks lie; nothing here stores any."""

from __future__ import annotations

import abc
from collections.abc import Awaitable, Callable, Generator, Sequence
from types import TracebackType
from typing import Generic, Self, TypeVar

from asyncxfer import DescriptorError, DescriptorList, Region
from asyncxfer._fast.blockindex import Bools

from ._journal import Durability
from ._opening import Mode
from ._report import Report

__all__ = ["Opening", "Store", "check_rows"]

S = TypeVar("S", bound="Store")


class Store(abc.ABC):
    """Blocks of one size under keys. `open` and `tiered` make one.

    Keys are bytes, 1 to `MAX_KEY_BYTES` of them: those of up to 32 bytes are kept as they are, of longer ones their
    SHA-256. Rows are a descriptor list of a region of the agent, in which block ``i`` is the ``i``-th `block_bytes`
    bytes, in whatever rows these lie. Its calls belong to the event loop that it was opened on.

    Attributes
    ----------
    url : str
        Where it is, for messages.
    block_bytes : int, bytes
    mode : {"w", "r"}
    durability : {"none", "data", "full"}
        What the end of a put outlives.
    report : Report
        What opening it found and healed.
    """

    url: str
    block_bytes: int
    mode: Mode
    durability: Durability
    report: Report

    @abc.abstractmethod
    async def put(
        self, keys: Sequence[bytes], rows: DescriptorList, *, prefix: bytes | None = None, pin: bool = False,
        replace: bool = True,
    ) -> None:  # fmt: skip
        """Store blocks; returns once they are as lasting as the store's `durability`.

        Parameters
        ----------
        keys : sequence of bytes
        rows : DescriptorList
            One block a key; they must not be written to meanwhile.
        prefix : bytes or None
            Which sequence they belong to.
        pin : bool
            Pin them too.
        replace : bool
            What becomes of keys that are here: they get what is put, or keep what they have.

        Raises
        ------
        StoreFullError, StoreError
            There is no room, or it could not be made lasting.
        DescriptorError
            The rows are not one block a key, or a key is wrong.
        AccessError
            The store was opened for reading.
        ClosedError
            The store is closed.
        TransferError
            The blocks could not be written.
        """

    @abc.abstractmethod
    async def get(self, keys: Sequence[bytes], rows: DescriptorList) -> Bools:
        """Read blocks.

        Parameters
        ----------
        keys : sequence of bytes
        rows : DescriptorList
            One block a key, to be written to.

        Returns
        -------
        (n,) bool
            Which keys were here, whole.

        Raises
        ------
        DescriptorError
            The rows are not one block a key, or a key is wrong.
        AccessError
            The rows must not be written to.
        ClosedError
            The store is closed.
        TransferError
            The blocks could not be read.
        """

    @abc.abstractmethod
    async def contains(self, keys: Sequence[bytes]) -> Bools:
        """Tell of each key whether it is here; that is no use of it.

        Parameters
        ----------
        keys : sequence of bytes

        Returns
        -------
        (n,) bool

        Raises
        ------
        DescriptorError
            A key is wrong.
        ClosedError
            The store is closed.
        """

    @abc.abstractmethod
    async def delete(self, keys: Sequence[bytes]) -> Bools:
        """Give up blocks.

        Parameters
        ----------
        keys : sequence of bytes

        Returns
        -------
        (n,) bool
            Which keys were here.

        Raises
        ------
        DescriptorError
            A key is wrong.
        AccessError
            The store was opened for reading.
        ClosedError
            The store is closed.
        """

    @abc.abstractmethod
    async def pin(self, keys: Sequence[bytes]) -> Bools:
        """Keep blocks from being evicted until they are unpinned as often, or the store is closed.

        Parameters
        ----------
        keys : sequence of bytes

        Returns
        -------
        (n,) bool
            Which keys are here, and so are pinned now.

        Raises
        ------
        StoreError
            This kind of store pins nothing.
        """

    @abc.abstractmethod
    async def unpin(self, keys: Sequence[bytes]) -> Bools:
        """Take back one `pin` of each key.

        Parameters
        ----------
        keys : sequence of bytes

        Returns
        -------
        (n,) bool
            Which keys were pinned.

        Raises
        ------
        StoreError
            This kind of store pins nothing.
        """

    @abc.abstractmethod
    async def compact(self) -> None:
        """Write anew what the store knows of its blocks, where that can be made smaller."""

    @abc.abstractmethod
    def stats(self) -> dict[str, int]:
        """Counters since it was opened."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many blocks there are, where the store knows."""

    def __bool__(self) -> bool:
        return True

    @abc.abstractmethod
    async def aclose(self) -> None:
        """Let what is in flight end, and close it. Again does nothing."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class Opening(Awaitable[S], Generic[S]):
    """A store that is being opened: ``await`` it, or ``async with`` it to have it closed at the end."""

    def __init__(self, make: Callable[[], Awaitable[S]]) -> None:
        self._make = make
        self._store: S | None = None

    def __await__(self) -> Generator[object, None, S]:
        return self._make().__await__()

    async def __aenter__(self) -> S:
        self._store = await self._make()
        return self._store

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        store, self._store = self._store, None
        if store is not None:
            await store.aclose()


def check_rows(keys: Sequence[bytes], rows: DescriptorList, block_bytes: int) -> None:
    """Raise DescriptorError where rows are not one block a key."""
    if not isinstance(getattr(rows, "region", None), Region):
        raise DescriptorError(f"rows are {rows!r}; expected descriptors of a region of the store's agent")
    if rows.nbytes != len(keys) * block_bytes:
        raise DescriptorError(
            f"{len(keys):,} keys need rows of {len(keys) * block_bytes:,} bytes, blocks of "
            f"{block_bytes:,} each; these have {rows.nbytes:,}"
        )
