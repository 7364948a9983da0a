"""What a store is when it is opened: its files read into an index, and what is wrong with them told and left out.

`load` is the writer's way in: it takes the last record that is right for the end of the journal. `Follower` is a
reader's: it stops at a record that is not whole yet, and reads on from there later. Nothing that a file says is
believed unless its checksum is right and its block lies in a slab that exists.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from asyncxfer._fast.blockindex import CLOSED, MAX_BLOCKS, NEXT, OPENED, RECORD_BYTES, BlockIndex, sealed

from ._errors import StoreError, StoreFormatError
from ._format import (
    HEAD_BYTES,
    JOURNAL,
    SNAPSHOT,
    Identity,
    generations,
    journal_name,
    read_head,
    salt_of,
    slabs_of,
    snapshot_name,
)
from ._journal import PIECE_BYTES
from ._report import Report

__all__ = ["Follower", "Loaded", "Opened", "load", "read_identity"]

_CHUNK_BYTES = 4 * 1024 * 1024
_GLANCE_BYTES = 4096
_PATIENCE = 16  # compactions that may go by while a reader opens its files
_FORGIVING = 3  # so often a file that is missing may be one that a compaction has just removed


@dataclass(frozen=True, slots=True)
class Opened:
    """What a writer says of itself when it opens the store, at the head of its records."""

    boot: bytes  # 16: which start of the machine
    trusted: int  # blocks of an earlier sequence may have been lost with the page cache
    durability: int  # 0, 1, 2

    def encode(self) -> bytes:
        """Give the note's payload."""
        return self.boot + self.trusted.to_bytes(8, "little") + bytes([self.durability])

    @classmethod
    def decode(cls, payload: bytes) -> Opened:
        """Read it; of a short one, what is safe to believe."""
        payload = payload.ljust(25, b"\0")
        return cls(payload[:16], int.from_bytes(payload[16:24], "little"), payload[24])


@dataclass(slots=True)
class Loaded:
    """An index as the files give it, and where the journal goes on."""

    index: BlockIndex
    journal: int | None  # its generation; None where there is none that can be gone on with
    end: int
    last: Opened | None
    records: int  # in journals
    continued: bool = False  # that journal says that another goes on


def read_identity(directory: Path) -> Identity | None:
    """Read what the store in a directory is; None where there is none."""
    path = directory / "store"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from error
    return Identity.decode(path, data)


def load(directory: Path, identity: Identity, report: Report) -> Loaded:
    """Read a store that nobody writes to.

    Parameters
    ----------
    directory : Path
    identity : Identity
    report : Report
        Filled in.

    Raises
    ------
    OSError
        A file cannot be read.
    """
    journals, snapshots, report.leftovers = generations(directory)
    for name in report.leftovers:
        (directory / name).unlink()
    index = BlockIndex(MAX_BLOCKS)
    limit = _covered(slabs_of(directory), identity)
    base = _load_snapshot(directory, identity, index, limit, snapshots, report)
    loaded = Loaded(index, None, HEAD_BYTES, None, 0)
    report.clean = False
    for generation in journals:
        if generation >= base:
            _load_journal(directory, identity, loaded, limit, generation, report)
    index.settle()
    absent = _absent(base, [generation for generation in journals if generation >= base], loaded)
    report.damaged_files += [name for name in absent if name not in report.damaged_files]
    for generation in {*journals, *snapshots}:  # a compaction was interrupted before it had cleared up
        if generation < base:
            for name in (journal_name(generation), snapshot_name(generation)):
                if (directory / name).exists():
                    (directory / name).unlink()
                    report.leftovers.append(name)
    return loaded


def _covered(slabs: dict[int, int], identity: Identity) -> int:
    return min((max(slabs, default=-1) + 1) * identity.slab_blocks, MAX_BLOCKS)


def _absent(base: int, journals: list[int], loaded: Loaded) -> list[str]:
    """Name the files that others speak of: each journal goes on where a snapshot or another journal ends."""
    absent = []
    expected = base or 1
    for generation in journals:
        if generation > expected:
            absent.append(journal_name(expected) if base or expected > 1 else snapshot_name(generation))
        expected = generation + 1
    if loaded.continued and loaded.journal is not None:
        absent.append(journal_name(loaded.journal + 1))
    elif base and not journals:
        absent.append(journal_name(base))
    return absent


def _load_snapshot(
    directory: Path, identity: Identity, index: BlockIndex, limit: int, snapshots: list[int], report: Report
) -> int:
    """Load the latest snapshot that can be read; its generation, 0 without one."""
    for generation in reversed(snapshots):
        path = directory / snapshot_name(generation)
        with path.open("rb") as file:
            count = read_head(SNAPSHOT, identity, generation, file.read(HEAD_BYTES))
            if count is None:
                report.damaged_files.append(path.name)
                continue
            salt = salt_of(SNAPSHOT, identity, generation)
            seen = 0
            while seen < count and (chunk := file.read(min(_CHUNK_BYTES, (count - seen) * RECORD_BYTES))):
                looked, damaged, _, _ = index.apply(chunk, salt, limit, alone=True, snapshot=True)
                report.damaged_records += damaged
                seen += looked
                if not looked:
                    break
            report.damaged_records += count - seen
        return generation
    return 0


def _load_journal(
    directory: Path, identity: Identity, loaded: Loaded, limit: int, generation: int, report: Report
) -> None:
    path = directory / journal_name(generation)
    with path.open("rb") as file:
        if read_head(JOURNAL, identity, generation, file.read(HEAD_BYTES)) is None:
            # An empty one was about to be begun. Nothing can be gone on with behind it either way.
            if os.fstat(file.fileno()).st_size > HEAD_BYTES:
                report.damaged_files.append(path.name)
            return
        salt = salt_of(JOURNAL, identity, generation)
        position = end = HEAD_BYTES
        pending = 0  # damaged records since the last good one
        tail_bytes = 0  # behind the last good one, up to the last byte that is not zero
        last_kind = 0
        while chunk := file.read(_CHUNK_BYTES):
            looked, damaged, good, notes = loaded.index.apply(chunk, salt, limit, alone=True)
            for kind, _, payload in notes:
                if kind == OPENED:
                    loaded.last = Opened.decode(payload)
            if good:
                behind = looked - good
                report.damaged_records += pending + damaged - behind
                pending, tail_bytes = behind, 0
                loaded.records += good
                end = position + good * RECORD_BYTES
                last_kind = notes[-1][0] if notes and _is_note(chunk, good) else 0
            else:
                pending += damaged
            written = len(chunk.rstrip(b"\0"))
            if position + written > end:
                tail_bytes = position + written - end
            position += len(chunk)
    report.torn_bytes += tail_bytes
    if end == HEAD_BYTES and loaded.journal is not None and not loaded.continued and not tail_bytes:
        path.unlink()  # begun, but the one before does not say so yet, and readers follow that one
        return
    report.clean = last_kind == CLOSED and not tail_bytes
    loaded.journal, loaded.end, loaded.continued = generation, end, last_kind == NEXT


def _is_note(chunk: bytes, good: int) -> bool:
    """Whether the last good record of a chunk is a note; its kind is the fifth byte."""
    return chunk[(good - 1) * RECORD_BYTES + 4] in (OPENED, CLOSED, NEXT)


class _MovedOnError(Exception):
    """The files that a reader follows are no longer those that the writer goes on with."""


class Follower:
    """A reader's view of the journal: it reads what the writer has appended since.

    Parameters
    ----------
    directory : Path
    identity : Identity
    """

    def __init__(self, directory: Path, identity: Identity) -> None:
        self._directory = directory
        self._identity = identity
        self._fd = -1
        self._generation = 0
        self._salt = 0
        self._at = HEAD_BYTES
        self._last = b""  # the record before, which stands there for as long as this is the writer's journal
        self._limit = 0
        self._next = 0  # the journal that goes on where this one has ended
        self.index = BlockIndex(MAX_BLOCKS)
        self.trusted = 0
        self.damaged = 0
        self._was_closed = False

    def open(self, report: Report) -> None:
        """Read all that there is. Blocks; nobody uses the index yet.

        Raises
        ------
        StoreError
            Its files change too fast, or cannot be read.
        """
        try:
            for attempt in range(_PATIENCE):
                report.damaged_records, report.damaged_files, self.damaged = 0, [], 0
                try:
                    self._begin(report, forgiving=attempt >= _FORGIVING)
                    while self._read_some():
                        pass
                except (FileNotFoundError, _MovedOnError):  # a compaction went by
                    self.index = BlockIndex(MAX_BLOCKS)
                    continue
                self.index.settle()
                report.damaged_records += self.damaged
                report.clean = self._was_closed
                return
        except BaseException:
            self.close()
            raise
        self.close()
        raise StoreError(f"{self._directory}: its journal could not be found {_PATIENCE} times in a row")

    def _begin(self, report: Report, *, forgiving: bool) -> None:
        journals, snapshots, _ = generations(self._directory)
        self._limit = _covered(slabs_of(self._directory), self._identity)
        base = _load_snapshot(self._directory, self._identity, self.index, self._limit, snapshots, report)
        first = next((generation for generation in journals if generation >= base), 1)
        if first != (base or 1) and not forgiving:
            raise _MovedOnError  # a list of files that is made while they change need not have all of them
        self._follow(first)

    def _follow(self, generation: int) -> None:
        fd = os.open(self._directory / journal_name(generation), os.O_RDONLY)
        head = os.pread(fd, HEAD_BYTES, 0)
        if read_head(JOURNAL, self._identity, generation, head) is None:
            os.close(fd)
            raise StoreFormatError(f"{self._directory / journal_name(generation)} is not the journal of this store")
        self.close()
        self._fd, self._generation, self._at, self._last, self._next = fd, generation, HEAD_BYTES, head, 0
        self._salt = salt_of(JOURNAL, self._identity, generation)

    def glance(self) -> bool | None:
        """Apply the few records that may have come, without waiting for a device; None where only waiting can tell.

        Gives whether there may be more.
        """
        if self._next != 0:
            return None
        buffer = bytearray(_GLANCE_BYTES)
        try:
            size = os.preadv(self._fd, [buffer], self._at - RECORD_BYTES, os.RWF_NOWAIT)
            if size < len(buffer) and self._at - RECORD_BYTES + size < os.fstat(self._fd).st_size:
                return None  # the rest is not in the page cache
        except OSError:
            return None
        if buffer[:RECORD_BYTES] != self._last:
            return None
        written = len(buffer.rstrip(b"\0"))
        if written <= RECORD_BYTES:
            return False
        looked = self._apply(buffer[RECORD_BYTES : size - size % RECORD_BYTES])
        if self._next != 0:
            return None
        if written > (1 + looked) * RECORD_BYTES:
            return None  # something that is no record, or not yet
        return size == (1 + looked) * RECORD_BYTES

    def read_some(self) -> bool:
        """Apply some of the records that have come; whether there may be more. May block.

        Raises
        ------
        OSError
        """
        try:
            return self._read_some()
        except _MovedOnError:
            self._begin_anew()
            return False

    def _read_some(self) -> bool:
        if self._next != 0:
            try:
                self._follow(self._next)
            except FileNotFoundError as error:
                journals, snapshots, _ = generations(self._directory)
                if max((*journals, *snapshots), default=0) > self._generation:
                    raise _MovedOnError from error
                return False  # it was lost with the machine; the next writer makes it
        data = os.pread(self._fd, RECORD_BYTES + 4 * PIECE_BYTES, self._at - RECORD_BYTES)
        if data[:RECORD_BYTES] != self._last:
            raise _MovedOnError  # taken back, and something else written there
        data = data[RECORD_BYTES : len(data) - len(data) % RECORD_BYTES]
        if not data:
            return False
        looked = self._apply(data)
        if self._next != 0:
            return True
        if looked == len(data) // RECORD_BYTES:
            return len(data) == 4 * PIECE_BYTES
        return self._at_a_bad_one(data[looked * RECORD_BYTES :])

    def _apply(self, data: bytes | bytearray) -> int:
        """Apply records as far as they are right; how many that were."""
        looked, _, _, notes = self.index.apply(data, self._salt, self._limit, wary=True)
        for kind, _, payload in notes:
            if kind == OPENED:
                self.trusted = Opened.decode(payload).trusted
            self._was_closed = kind == CLOSED
            if kind == NEXT:
                self._next = self._generation + 1
        if looked:
            self._pass(data[: looked * RECORD_BYTES])
        return looked

    def _pass(self, data: bytes | bytearray) -> None:
        self._at += len(data)
        self._last = bytes(data[-RECORD_BYTES:])

    def _begin_anew(self) -> None:
        """Read everything again: so many compactions went by that the journals in between are gone."""
        fresh = Follower(self._directory, self._identity)
        fresh.open(Report())
        self.close()
        fresh.damaged += self.damaged
        self.__dict__.update(fresh.__dict__)  # all at once: whoever looks up meanwhile has the old index or the new one

    def _at_a_bad_one(self, rest: bytes) -> bool:
        """Judge a record that is not right: not written yet, in a slab that is new, or damaged. Whether to go on."""
        limit = _covered(slabs_of(self._directory), self._identity)
        if limit > self._limit:
            self._limit = limit
            return True
        # What is so far behind it was written by a later call: this one will not become right any more.
        if sealed(rest[PIECE_BYTES:], self._salt):
            self.damaged += 1
            self._pass(rest[:RECORD_BYTES])
            return True
        return False

    def close(self) -> None:
        """Let go of the journal."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
