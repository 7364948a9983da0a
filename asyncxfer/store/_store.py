"""The store on disk: what its user calls, and in what order the parts do it.

A put takes blocks, moves the rows and works out their checksums at the same time, and then commits. A get looks up and
holds blocks, moves them, and looks at them before it tells of them: at their checksum, and in a reader at whether the
writer has given them to something else meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from asyncxfer import AccessError, Agent, ClosedError, DescriptorError, DescriptorList, XferError
from asyncxfer._fast.blockindex import BlockIndex, Bools, Int64s, Packed, Uint32s, Uint64s, pack

from ._api import Store, check_rows
from ._commits import Commits
from ._errors import StoreError, StoreFullError
from ._journal import Durability
from ._opening import Mode, Options, Parts, absolute, open_files
from ._operations import Operations
from ._slabs import Slabs, in_host_memory
from ._space import Space
from ._turns import next_turn
from ._view import View

__all__ = ["DiskStore", "to_the_end"]

_PIECE = 4096  # keys that are handled at once
_PIECE_BYTES = 256 * 1024 * 1024
_ATTEMPTS = 4  # of a reader, at blocks that the writer keeps moving


class DiskStore(Store):
    """Blocks of one size under keys, on disk. `open` makes one.

    Keys are bytes, 1 to `MAX_KEY_BYTES` of them: those of up to 32 bytes are kept as they are, of longer ones their
    SHA-256. Rows are a descriptor list of a region of the agent, in which block ``i`` is the ``i``-th `block_bytes`
    bytes, in whatever rows these lie. Its calls belong to the event loop that it was opened on.

    Attributes
    ----------
    path : Path
        Its directory.
    block_bytes : int, bytes
    mode : {"w", "r"}
    durability : {"none", "data", "full"}
    report : Report
        What opening it found and healed.
    """

    def __init__(self, options: Options, parts: Parts, agent: Agent) -> None:
        self.path = options.directory
        self.url = str(options.directory)
        self.mode: Mode = options.mode
        self.durability: Durability = options.durability
        self.block_bytes = parts.identity.block_bytes
        self.report = parts.report
        self._identity = parts.identity
        self._pool = parts.pool
        self._lock_fd = parts.lock_fd
        self._view = View(options.directory, parts.follower or parts.index, parts.opened.trusted, self._in_thread)
        self._first_clock, self._first_sequence = self._index.clock, self._index.sequence
        self._slabs = Slabs(
            agent, options.directory, parts.identity, writable=options.mode == "w", durability=options.durability,
            direct=options.direct, in_thread=self._in_thread,
        )  # fmt: skip
        self._commits: Commits | None = None
        self._space: Space | None = None
        if parts.journal is not None:
            self._commits = Commits(
                options.directory, parts.identity, self._index, parts.journal, self._slabs,
                durability=options.durability, opened=parts.opened, records=parts.records, in_thread=self._in_thread,
                changed=self._changed,
            )  # fmt: skip
            self._space = Space(self._index, self._commits, self.block_bytes)
        self._operations = Operations()
        self._closed = False
        self._ending: asyncio.Task[None] | None = None
        self._counters = dict.fromkeys(("puts", "hits", "misses", "deleted", "damaged", "moved_away"), 0)

    # ---- life ----------------------------------------------------------------------------------------------------

    @classmethod
    async def open(cls, agent: Agent, options: Options) -> DiskStore:
        """Open what `options` name."""
        pool = ThreadPoolExecutor(4, thread_name_prefix="axf-store")
        parts = Parts(pool)
        loop = asyncio.get_running_loop()
        try:
            options = await to_the_end(loop.run_in_executor(pool, absolute, options))
            await to_the_end(loop.run_in_executor(pool, open_files, options, parts))
            store = cls(options, parts, agent)
        except BaseException:
            parts.close()
            pool.shutdown(wait=False)
            raise
        try:
            if parts.heal:
                with contextlib.suppress(StoreError):  # the damage is passed over next time too
                    await store.compact()
        except BaseException:
            await store.aclose()
            raise
        return store

    async def aclose(self) -> None:
        """Let what is in flight end, write down what was used when, and close the files. Again does nothing.

        Who is cancelled meanwhile is told so when it is done, so that the store can be opened again at once.

        Raises
        ------
        StoreError
            The last records could not be written.
        """
        if self._ending is None:
            self._closed = True
            self._ending = asyncio.ensure_future(self._end())
        await to_the_end(self._ending)

    async def _end(self) -> None:
        await self._operations.ended()
        try:
            if self._commits is not None:
                used = (self._index.clock, self._index.sequence) != (self._first_clock, self._first_sequence)
                await self._commits.aclose(snapshot=used)
        finally:
            try:
                await self._slabs.aclose()
            finally:
                await self._view.aclose()
                if self._lock_fd >= 0:
                    os.close(self._lock_fd)
                self._pool.shutdown(wait=False)

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._index):,} blocks of {self.block_bytes:,} bytes"
        return f"<DiskStore {str(self.path)!r}, {self.mode!r}, {state}>"

    def __len__(self) -> int:
        return len(self._index)

    # ---- blocks --------------------------------------------------------------------------------------------------

    async def put(
        self, keys: Sequence[bytes], rows: DescriptorList, *, prefix: bytes | None = None, pin: bool = False,
        replace: bool = True,
    ) -> None:  # fmt: skip
        """Store blocks; returns once they are as lasting as the store's `durability`.

        A reader, and a get from here, finds a block from then on. The rows must not be written to meanwhile. If it
        fails or is cancelled, some of the blocks may have been stored, whole, and pinned if that was asked for.

        Parameters
        ----------
        keys : sequence of bytes
            What a key held before is given up for what it is put with last.
        rows : DescriptorList
            One block a key.
        prefix : bytes or None
            Which sequence they belong to: they are laid behind those that were put with the same one before, so that
            they are read together.
        pin : bool
            Pin them too.
        replace : bool
            False: blocks of keys that are here are not written again. For keys that are hashes of the content.

        Raises
        ------
        StoreFullError
            The disk is full, or there is no room that is not pinned. Nothing that was acknowledged is lost by it.
        StoreError
            It could not be made lasting.
        DescriptorError
            The rows are not one block a key, or a key is wrong.
        AccessError
            The store was opened for reading.
        ClosedError
            The store is closed.
        TransferError
            The blocks could not be written.
        """
        commits, space = self._writer("put")
        check_rows(keys, rows, self.block_bytes)
        async with self._operations:
            for piece, which in self._pieces(keys):
                await self._put(commits, space, piece, which, rows, prefix, pin=pin, replace=replace)

    async def _put(
        self, commits: Commits, space: Space, keys: Packed, which: Int64s, rows: DescriptorList, prefix: bytes | None,
        *, pin: bool, replace: bool,
    ) -> None:  # fmt: skip
        if not replace:
            here = self._index.pin(keys, 1) if pin else self._index.lookup(keys)[0] >= 0
            keys, which = keys[~here], which[~here]
        if not len(keys):
            return
        commits.check()
        blocks = await space.take(len(keys), prefix)
        try:
            found = await self._slabs.put(rows, which, blocks)
        except BaseException as error:
            space.give(blocks)
            if _is_full(error):
                raise StoreFullError(
                    f"the disk under {self.path} is full; what was acknowledged is kept. Free space, or open the store "
                    f"with a smaller budget ({error})"
                ) from error
            raise
        slabs = frozenset(np.unique(blocks // self._identity.slab_blocks).tolist())
        known = found is not None
        sums = found if found is not None else np.zeros(len(blocks), np.uint32)
        await commits.hold(keys, blocks, sums, unchecked=not known, pin=pin, slabs=slabs)
        self._counters["puts"] += len(blocks)

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
            Which keys were here. The rows of those that were not are left as they are. Also False where a block
            proves damaged, or a reader finds that the writer has just given it up, while it is read: such a block is
            never served, and its rows hold nothing of use.

        Raises
        ------
        DescriptorError
            The rows are not one block a key, or a key is wrong.
        AccessError
            The rows must not be written to.
        StoreError
            The journal cannot be read.
        ClosedError
            The store is closed.
        TransferError
            The blocks could not be read.
        """
        self._check_open()
        check_rows(keys, rows, self.block_bytes)
        hits = np.zeros(len(keys), np.bool_)
        async with self._operations:
            for piece, which in self._pieces(keys):
                hits[which] = await self._get(piece, which, rows)
        count = int(np.count_nonzero(hits))
        self._counters["hits"] += count
        self._counters["misses"] += len(hits) - count
        return hits

    async def _get(self, keys: Packed, which: Int64s, rows: DescriptorList) -> Bools:
        hits = np.zeros(len(keys), np.bool_)
        asked = np.arange(len(keys))
        for attempt in range(_ATTEMPTS):
            await self._view.follow()
            got, again = await self._try_to_get(keys, which, rows, last=attempt == _ATTEMPTS - 1)
            hits[asked[got]] = True
            if not len(again):
                break
            self._counters["moved_away"] += len(again)
            asked, keys, which = asked[again], keys[again], which[again]
        return hits

    async def _try_to_get(
        self, keys: Packed, which: Int64s, rows: DescriptorList, *, last: bool
    ) -> tuple[Int64s, Int64s]:
        """Read blocks once; the numbers of the keys that were got, and of those that the writer has moved meanwhile."""
        index = self._index
        blocks, sequences, sums, checked = index.lookup(keys, hold=True)
        try:
            found = (blocks >= 0).nonzero()[0]
            if not in_host_memory(rows):  # nobody can look at these
                trusted = sequences[found] >= self._view.trusted
                found = found[trusted]
            if not len(found):
                return found, found
            parts = (which, blocks, sequences, sums, checked)
            if len(blocks) > 1:
                found = found[np.argsort(blocks[found], kind="stable")]
                parts = tuple(part[found] for part in parts)  # type: ignore[assignment]
            good, same = await self._read_blocks(rows, *parts, last=last)
            return found[good & same], found[~same]
        finally:
            if index.release(blocks):
                self._changed()

    async def _read_blocks(
        self, rows: DescriptorList, which: Int64s, blocks: Int64s, sequences: Uint64s, sums: Uint32s, checked: Bools, *,
        last: bool,
    ) -> tuple[Bools, Bools]:  # fmt: skip
        try:
            seen = await self._slabs.get(rows, which, blocks)
        except XferError:
            # A reader may be reading a slab that has been cut; where nothing has moved, the error is one.
            same = await self._view.still(blocks, sequences)
            if same.all() or last:
                raise
            return np.zeros(len(blocks), np.bool_), np.zeros(len(blocks), np.bool_)
        same = await self._view.still(blocks, sequences)
        good = np.ones(len(blocks), np.bool_) if seen is None else (seen == sums) | ~checked
        damaged = same & ~good
        if damaged.any():
            self._counters["damaged"] += int(damaged.sum())
            if self._commits is not None:
                self._commits.forget(self._index.remove_blocks(blocks[damaged], sequences[damaged]))
        return good, same

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
        StoreError
            The journal cannot be read.
        ClosedError
            The store is closed.
        """
        self._check_open()
        found = np.zeros(len(keys), np.bool_)
        async with self._operations:
            await self._view.follow()
            for piece, which in self._pieces(keys):
                found[which] = self._index.contains(piece)
                await self._pause(which)
        return found

    async def delete(self, keys: Sequence[bytes]) -> Bools:
        """Give up blocks, pinned ones too; returns once that is as lasting as the store's `durability`.

        Parameters
        ----------
        keys : sequence of bytes

        Returns
        -------
        (n,) bool
            Which keys were here.

        Raises
        ------
        StoreFullError, StoreError
            It could not be recorded: after the end of the process the blocks may be there again.
        DescriptorError
            A key is wrong.
        AccessError
            The store was opened for reading.
        ClosedError
            The store is closed.
        """
        commits, _ = self._writer("delete")
        found = np.zeros(len(keys), np.bool_)
        async with self._operations:
            for piece, which in self._pieces(keys):
                found[which], blocks = self._index.remove(piece)
                self._counters["deleted"] += len(blocks)
                await commits.clear(blocks)
        return found

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
        DescriptorError
            A key is wrong.
        AccessError
            The store was opened for reading.
        ClosedError
            The store is closed.
        """
        return await self._pin(keys, 1)

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
        DescriptorError
            A key is wrong.
        AccessError
            The store was opened for reading.
        ClosedError
            The store is closed.
        """
        return await self._pin(keys, -1)

    async def _pin(self, keys: Sequence[bytes], change: int) -> Bools:
        self._writer("pin")
        done = np.zeros(len(keys), np.bool_)
        async with self._operations:
            for piece, which in self._pieces(keys):
                done[which] = self._index.pin(piece, change)
                await self._pause(which)
        self._changed()
        return done

    async def compact(self) -> None:
        """Write the index anew, without what the journal has gathered. It happens by itself too.

        Raises
        ------
        StoreFullError, StoreError
            It could not be written; the journal counts on.
        AccessError
            The store was opened for reading.
        ClosedError
            The store is closed.
        """
        commits, _ = self._writer("compact")
        async with self._operations:
            try:
                await commits.compact()
            except OSError as error:
                kind = StoreFullError if _is_full(error) else StoreError
                raise kind(f"{self.path} cannot be compacted: {error.strerror}") from error

    def stats(self) -> dict[str, int]:
        """Counters since it was opened, and what there is.

        Returns
        -------
        dict
            ``"blocks"``, ``"bytes"``, ``"limit"`` (blocks that the budget allows), ``"pinned"``, ``"evicted"``,
            ``"puts"``, ``"hits"``, ``"misses"``, ``"deleted"``, ``"damaged"`` (blocks that proved to be),
            ``"moved_away"`` (blocks that the writer gave up under a reader), ``"slabs"`` (open here),
            ``"index_bytes"``, ``"compactions"``, ``"generation"`` (of the journal).
        """
        index, commits = self._index, self._commits
        return {
            "blocks": index.count,
            "bytes": index.count * self.block_bytes,
            "limit": index.limit,
            "pinned": index.pinned,
            "evicted": self._space.evicted if self._space else 0,
            **self._counters,
            "slabs": len(self._slabs),
            "index_bytes": index.nbytes,
            "compactions": commits.compactions if commits else 0,
            "generation": commits.generation if commits else 0,
        }

    # ---- keys as the index takes them, for tiers -------------------------------------------------------------------

    @property
    def index(self) -> BlockIndex:
        """What it knows of its blocks, as of now."""
        return self._index

    @property
    def identity(self) -> bytes:
        """By which its files know one another."""
        return self._identity.id

    async def put_packed(self, keys: Packed, which: Int64s, rows: DescriptorList, prefix: bytes | None) -> None:
        """Store those of some blocks of `rows` that are not here."""
        commits, space = self._writer("put")
        async with self._operations:
            await self._put(commits, space, keys, which, rows, prefix, pin=False, replace=False)

    async def get_packed(self, keys: Packed, which: Int64s, rows: DescriptorList) -> Bools:
        """Read some blocks of `rows`; which keys were here."""
        self._check_open()
        async with self._operations:
            hits = await self._get(keys, which, rows)
        count = int(np.count_nonzero(hits))
        self._counters["hits"] += count
        self._counters["misses"] += len(hits) - count
        return hits

    async def delete_packed(self, keys: Packed) -> Bools:
        """Give up blocks; which keys were here."""
        commits, _ = self._writer("delete")
        async with self._operations:
            found, blocks = self._index.remove(keys)
            self._counters["deleted"] += len(blocks)
            await commits.clear(blocks)
        return found

    def pin_packed(self, keys: Packed, change: int) -> None:
        """Add 1 to the pins of keys, or take 1 away."""
        self._index.pin(keys, change)
        if change < 0:
            self._changed()

    async def in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run what may block."""
        return await self._in_thread(function, *arguments)

    # ---- parts of it ---------------------------------------------------------------------------------------------

    @property
    def _index(self) -> BlockIndex:
        return self._view.index

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the store {self.path} was closed")

    def _writer(self, what: str) -> tuple[Commits, Space]:
        self._check_open()
        if self._commits is None or self._space is None:
            raise AccessError(f"{what} needs a store opened with mode 'w'; {self.path} was opened with mode 'r'")
        return self._commits, self._space

    def _pieces(self, keys: Sequence[bytes]) -> Generator[tuple[Packed, Int64s], None, None]:
        """Give keys in the form that the index takes, and their numbers, as many as are handled at once."""
        most = max(1, min(_PIECE, _PIECE_BYTES // self.block_bytes))
        for start in range(0, len(keys), most):
            part = keys[start : start + most]
            try:
                packed = pack(part)
            except (TypeError, ValueError) as error:
                raise DescriptorError(f"{error} (counted from key {start})" if start else str(error)) from error
            yield packed, np.arange(start, start + len(part))

    async def _pause(self, which: Int64s) -> None:
        """Let the loop turn between pieces of a long list."""
        if len(which) == _PIECE:
            await next_turn()

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run what may block; to its end, also if nobody waits for it any more."""
        return await to_the_end(asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments))

    def _changed(self) -> None:
        if self._space is not None:
            self._space.changed()


async def to_the_end(future: asyncio.Future[Any]) -> Any:
    """Wait for the end of something, also if whoever waits is cancelled meanwhile."""
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        future.exception()
        raise cancelled
    return future.result()


def _is_full(error: BaseException) -> bool:
    """Whether a full disk is behind it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        cause = cause.__cause__
    return False
