"""How changes become lasting: gathered, written in the order data, sync, record, sync, and only then told.

Changes that come while a write is under way make up the next one, so that many puts share a sync. The index learns of
a put after its record is where `durability` wants it, and blocks that were given up can be given out again after the
record that says so. Compactions take their turn in the same line: the journal goes on in the next file, and what is
held is written aside meanwhile, a part at a time; what changes in between stands in that next journal.

It does not know rows or regions, and decides nothing about which blocks go.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from asyncxfer._fast.blockindex import CLOSED, NEXT, OPENED, RECORD_BYTES, BlockIndex, Int64s, Packed, Uint32s, note

from ._errors import StoreError, StoreFullError
from ._format import Identity, generations, journal_name, snapshot_name
from ._journal import Durability, Journal, Snapshot
from ._recovery import Opened
from ._slabs import Slabs
from ._turns import next_turn

__all__ = ["Commits"]

_EXPORTED_AT_ONCE = 4096  # blocks: a fraction of a millisecond
_TOLD_AT_ONCE = 1024
_LEAST_RECORDS = 65536  # a shorter journal is not compacted


@dataclass(slots=True, eq=False)
class _Change:
    """Blocks that hold keys from now on, or, without keys, nothing."""

    blocks: Int64s
    done: asyncio.Future[None]
    keys: Packed | None = None
    checksums: Uint32s | None = None
    unchecked: bool = False
    pin: bool = False
    slabs: frozenset[int] = frozenset()


class Commits:
    """The line in which changes of one store wait.

    Parameters
    ----------
    directory : Path
    identity : Identity
    index : BlockIndex
    journal : Journal
    slabs : Slabs
    durability : {"none", "data", "full"}
    opened : Opened
        What stands at the head of each journal.
    records : int
        That the journals have already.
    in_thread : callable
        Runs what may block.
    changed : callable
        Called when blocks may have become free.
    """

    def __init__(
        self, directory: Path, identity: Identity, index: BlockIndex, journal: Journal, slabs: Slabs, *,
        durability: Durability, opened: Opened, records: int, in_thread: Callable[..., Awaitable[Any]],
        changed: Callable[[], None],
    ) -> None:  # fmt: skip
        self._directory = directory
        self._identity = identity
        self._index = index
        self._journal = journal
        self._slabs = slabs
        self._durability: Durability = durability
        self._opened = opened
        self._in_thread = in_thread
        self._changed = changed
        self._queue: list[_Change] = []
        self._owed: list[Int64s] = []  # given up, and no record could be written that says so
        self._running: asyncio.Task[None] | None = None
        self._compacting: asyncio.Task[None] | None = None
        self._rotating: asyncio.Future[Snapshot] | None = None
        self._sequence = index.sequence + 1
        self._bad: str | None = None
        self.records = records
        self.compactions = 0

    @property
    def generation(self) -> int:
        """Number of the journal."""
        return self._journal.generation

    @property
    def owing(self) -> bool:
        """Whether blocks were given up that no record says so of yet."""
        return bool(self._owed)

    def check(self) -> None:
        """Raise StoreError where nothing can become lasting any more."""
        if self._bad is not None:
            raise StoreError(self._bad)

    async def hold(
        self, keys: Packed, blocks: Int64s, checksums: Uint32s, *, unchecked: bool, pin: bool, slabs: frozenset[int]
    ) -> None:
        """Have blocks, whose data is written, hold keys; returns once that is as lasting as was asked for.

        It comes to an end even if the caller is cancelled. If it fails, the blocks are free again.

        Raises
        ------
        StoreFullError
            The disk is full.
        StoreError
        """
        change = _Change(blocks, self._future(), keys, checksums, unchecked, pin, slabs)
        await self._enqueue(change)

    async def clear(self, blocks: Int64s) -> None:
        """Have it recorded that blocks, which the index has forgotten, hold nothing; then they are free.

        Raises
        ------
        StoreFullError, StoreError
            It could not be recorded. It is tried again with the next change.
        """
        if len(blocks):
            await self._enqueue(_Change(blocks, self._future()))

    def forget(self, blocks: Int64s) -> None:
        """Do what `clear` does, for nobody who waits."""
        if len(blocks):
            change = _Change(blocks, self._future())
            change.done.add_done_callback(lambda done: done.exception())
            self._push(change)

    async def settle(self) -> None:
        """Wait until the line is empty."""
        while self._running is not None:
            await asyncio.wait([self._running])

    async def flush(self) -> None:
        """Try again to record what is owed.

        Raises
        ------
        StoreFullError, StoreError
        """
        await self._enqueue(_Change(np.empty(0, np.int64), self._future()))

    def _future(self) -> asyncio.Future[None]:
        return asyncio.get_running_loop().create_future()

    async def _enqueue(self, change: _Change) -> None:
        self._push(change)
        try:
            await asyncio.shield(change.done)
        except asyncio.CancelledError:
            if not change.done.done():
                change.done.add_done_callback(lambda done: done.exception())
            raise

    def _push(self, change: _Change) -> None:
        self._queue.append(change)
        if self._running is None:
            self._running = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        try:
            while self._queue or self._rotating is not None:
                if self._rotating is not None:
                    await self._rotate()
                batch, self._queue = self._queue, []
                if batch:
                    await self._commit_or_stop(batch)
                    self._consider_compacting()
        finally:
            self._running = None

    async def _commit_or_stop(self, batch: list[_Change]) -> None:
        try:
            await self._commit(batch)
        except Exception as error:  # noqa: BLE001 - whatever it is, nobody may be left waiting
            self._stop(f"a change failed half way: {error!r}")
            for change in batch:
                if not change.done.done():
                    failure = StoreError(self._bad)
                    failure.__cause__ = error
                    change.done.set_exception(failure)
            self._changed()

    @contextlib.contextmanager
    def _stopping(self) -> Iterator[None]:
        """Stop at anything but a full disk, which leaves the journal as it was."""
        try:
            yield
        except StoreFullError:
            raise
        except StoreError as error:
            self._stop(str(error))
            raise

    def _stop(self, why: str) -> None:
        """Refuse whatever is still to come: what the files hold is not known any more."""
        if self._bad is None:
            self._bad = f"{self._directory}: {why}; open the store again"

    async def _commit(self, batch: list[_Change]) -> None:
        owed, self._owed = self._owed, []
        sets = [change for change in batch if change.keys is not None]
        clears = owed + [change.blocks for change in batch if change.keys is None and len(change.blocks)]
        first = self._sequence
        given_up = self._records_of_clears(clears)
        holding = self._records_of_sets(sets, first + len(given_up) // RECORD_BYTES)
        slabs: set[int] = set().union(*(change.slabs for change in sets))
        self._sequence += (len(given_up) + len(holding)) // RECORD_BYTES  # whatever becomes of them
        try:
            self.check()
            failure = await self._in_thread(self._write, slabs, given_up, holding)
        except StoreError as error:
            self._owed = clears
            self._fail(batch, error)
        else:
            for blocks in clears:
                self._index.give(blocks)
            if failure is not None:
                self._fail(sets, failure)
                holding.clear()
            self.records += (len(given_up) + len(holding)) // RECORD_BYTES
            if failure is None:
                await self._tell(sets, first + len(given_up) // RECORD_BYTES)
            for change in batch:
                if not change.done.done():
                    change.done.set_result(None)
        self._changed()

    def _records_of_clears(self, clears: list[Int64s]) -> bytearray:
        if not clears:
            return bytearray()
        return self._index.records_of_clears(np.concatenate(clears), self._sequence, self._journal.salt)

    def _records_of_sets(self, sets: list[_Change], sequence: int) -> bytearray:
        records = bytearray()
        for change in sets:
            assert change.keys is not None
            assert change.checksums is not None
            records += self._index.records_of_sets(
                change.keys, change.blocks, change.checksums, sequence, self._journal.salt, unchecked=change.unchecked
            )
            sequence += len(change.blocks)
        return records

    def _write(self, slabs: set[int], given_up: bytearray, holding: bytearray) -> StoreFullError | None:
        """Write both, as lasting as was asked for; why there was room only for what gives up blocks."""
        failure = None
        try:
            self._slabs.sync(slabs)
        except OSError as error:
            self._stop(f"blocks could not be synced: {error.strerror}")
            raise StoreError(self._bad) from error
        with self._stopping():
            self._journal.append(given_up, essential=True)
            try:
                self._journal.append(holding)
            except StoreFullError as error:
                failure = error
            self._journal.sync(self._durability)
        return failure

    async def _tell(self, sets: list[_Change], sequence: int) -> None:
        for change in sets:
            assert change.keys is not None
            assert change.checksums is not None
            sequences = np.arange(sequence, sequence + len(change.blocks), dtype=np.uint64)
            sequence += len(change.blocks)
            replaced = self._index.install(
                change.keys, change.blocks, sequences, change.checksums, unchecked=change.unchecked, pin=change.pin
            )
            self._index.give(replaced)
            if not change.done.done():
                change.done.set_result(None)
            if len(change.blocks) >= _TOLD_AT_ONCE:
                await next_turn()  # each of them costs a part of a millisecond

    def _fail(self, batch: list[_Change], error: StoreError) -> None:
        for change in batch:
            if change.keys is not None:
                self._index.give(change.blocks)
            if not change.done.done():
                change.done.set_exception(error)

    # -- compaction

    def _consider_compacting(self) -> None:
        if self._compacting is None and self.records > max(_LEAST_RECORDS, self._index.count):
            self._start_compacting()

    def _start_compacting(self) -> asyncio.Task[None]:
        self._compacting = asyncio.ensure_future(self._compact())
        self._compacting.add_done_callback(lambda task: task.exception())
        return self._compacting

    async def compact(self) -> None:
        """Write what is held to a new snapshot, and begin a new journal.

        Raises
        ------
        StoreError, OSError
            It could not be written; the old ones count on.
        """
        while self._compacting is not None:
            await asyncio.wait([self._compacting])
        await asyncio.shield(self._start_compacting())

    async def _compact(self) -> None:
        try:
            await self._write_snapshot()
        except (StoreError, OSError):
            self.records = self._index.count  # there is no room for it: by itself not before as many changes again
            raise
        finally:
            self._compacting = None

    async def _write_snapshot(self) -> None:
        self._rotating = asyncio.get_running_loop().create_future()
        if self._running is None:
            self._running = asyncio.ensure_future(self._run())
        snapshot = await self._rotating
        try:
            for start in range(0, self._index.top, _EXPORTED_AT_ONCE):
                records = self._index.export(start, start + _EXPORTED_AT_ONCE, snapshot.salt)
                await self._in_thread(snapshot.write, records)
            await self._in_thread(snapshot.finish)
        except BaseException:
            await self._in_thread(snapshot.abandon)
            raise
        await self._in_thread(self._clear_up, snapshot.generation)
        self.compactions += 1

    async def _rotate(self) -> None:
        waiting, self._rotating = self._rotating, None
        assert waiting is not None
        sequence = self._sequence
        self._sequence += 2  # whatever becomes of them
        try:
            self.check()
            snapshot = await self._in_thread(self._begin_next, sequence)
        except Exception as error:  # noqa: BLE001 - as above
            waiting.set_exception(error)
        else:
            self.records = 1
            waiting.set_result(snapshot)

    def _begin_next(self, sequence: int) -> Snapshot:
        generation = self._journal.generation + 1
        snapshot = Snapshot(self._directory, self._identity, generation)
        try:
            following = Journal.create(self._directory, self._identity, generation, self._durability)
            self._hand_over(following, sequence)
        except BaseException:
            snapshot.abandon()
            raise
        return snapshot

    def _hand_over(self, following: Journal, sequence: int) -> None:
        """Say in the journal that another one goes on, and go on there."""
        before = self._journal
        try:
            with self._stopping():
                before.append(note(NEXT, sequence, before.salt, b""), essential=True)
        except BaseException:
            following.close()
            with contextlib.suppress(OSError):
                following.path.unlink()
            raise
        self._journal = following  # readers go on there already
        try:
            with self._stopping():
                before.sync(self._durability)
                following.append(note(OPENED, sequence + 1, following.salt, self._opened.encode()))
        finally:
            before.close()

    def _clear_up(self, generation: int) -> None:
        journals, snapshots, _ = generations(self._directory)
        names = [journal_name(number) for number in journals if number < generation]
        names += [snapshot_name(number) for number in snapshots if number < generation]
        for name in names:
            (self._directory / name).unlink(missing_ok=True)

    # -- the end

    async def aclose(self, *, snapshot: bool) -> None:
        """Write a last snapshot, say that the store is closed, and close the journal."""
        while self._compacting is not None:
            await asyncio.wait([self._compacting])
        await self.settle()
        try:
            if self._owed:
                with contextlib.suppress(StoreFullError):
                    await self.flush()
            if self._bad is None:
                if snapshot:
                    with contextlib.suppress(StoreError, OSError):  # a full disk: the journals say it all
                        await self.compact()
                    await self.settle()
                with contextlib.suppress(StoreFullError):
                    await self._in_thread(self._say_closed)
        finally:
            await self._in_thread(self._journal.close)

    def _say_closed(self) -> None:
        self._journal.append(note(CLOSED, self._sequence, self._journal.salt, b""), essential=True)
        self._journal.sync(self._durability)
