"""Opening the files of a store: what was asked for, checked; the lock; what is there, read and healed.

All that touches a file here may block, and is done in a thread, before there is a store. It knows no agent and no
region.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias, get_args
from urllib.parse import unquote, urlsplit

import numpy as np

from asyncxfer import ConfigError, XferError
from asyncxfer._fast.blockindex import MAX_BLOCKS, OPENED, BlockIndex, Int64s, note

from ._errors import StoreError, StoreFormatError, StoreFullError, StoreLockedError
from ._format import Identity, boot_id, generations, slab_name, slabs_of, sync_directory
from ._journal import Durability, Journal
from ._recovery import Follower, Loaded, Opened, load, read_identity
from ._report import Report

__all__ = ["Mode", "Options", "Parts", "absolute", "check", "directory_of", "open_files"]

Mode: TypeAlias = Literal["w", "r"]

_DURABILITIES: tuple[Durability, ...] = get_args(Durability)


@dataclass(frozen=True, slots=True)
class Options:
    """What `open` was given."""

    directory: Path
    block_bytes: int | None
    budget: int | None
    mode: Mode
    durability: Durability
    slab_bytes: int
    direct: bool


def check(mode: object, durability: object, block_bytes: int | None, budget: int | None, slab_bytes: int) -> None:
    allowed: tuple[tuple[str, object, tuple[str, ...]], ...] = (
        ("mode", mode, get_args(Mode)),
        ("durability", durability, _DURABILITIES),
    )
    for what, value, words in allowed:
        if value not in words:
            raise ConfigError(f"{what} is {value!r}; expected one of {', '.join(map(repr, words))}")
    for what, number in (("block_bytes", block_bytes), ("budget", budget), ("slab_bytes", slab_bytes)):
        if number is not None and not 0 < number < 2**62:
            raise ConfigError(f"{what} is {number}; expected at least one byte")
    if block_bytes is not None and budget is not None and budget < block_bytes:
        raise ConfigError(f"a budget of {budget:,} bytes has no room for a single block of {block_bytes:,}")


def directory_of(url: str | os.PathLike[str]) -> Path:
    text = os.fsdecode(url)
    if "://" in text:
        parts = urlsplit(text)
        if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
            raise ConfigError(f"{text!r} is no directory of this host; expected a path or file:///path")
        text = unquote(parts.path)
    if not text or "\0" in text:
        raise ConfigError(f"{text!r} is no path")
    return Path(text)


def absolute(options: Options) -> Options:
    """Give options whose directory no longer depends on where the process is. Asks the system for that."""
    return replace(options, directory=Path(os.path.abspath(options.directory)))


# ---- files: all of it blocks, in a thread ---------------------------------------------------------------------------


class Parts:
    """What opening the files gives; owned by the store once there is one."""

    identity: Identity
    index: BlockIndex
    opened: Opened

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.pool = pool
        self.report = Report()
        self.lock_fd = -1
        self.follower: Follower | None = None
        self.journal: Journal | None = None
        self.records = 0
        self.heal = False

    def close(self) -> None:
        """Let go of the files again."""
        if self.follower is not None:
            self.follower.close()
        if self.journal is not None and self.journal.fd >= 0:
            self.journal.close()
        fd, self.lock_fd = self.lock_fd, -1
        if fd >= 0:
            os.close(fd)


def open_files(options: Options, parts: Parts) -> None:
    started = time.monotonic()
    try:
        if options.mode == "w":
            _open_to_write(options, parts)
        else:
            _open_to_read(options, parts)
    except MemoryError as error:
        raise StoreError(f"there is no memory for the index of {options.directory}") from error
    except OSError as error:
        if isinstance(error, XferError):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreFullError(f"{options.directory} cannot be opened for writing: {error.strerror}") from error
        raise StoreError(f"{options.directory} cannot be opened: {error.strerror}") from error
    parts.report.blocks = len(parts.follower.index if parts.follower else parts.index)
    parts.report.seconds = time.monotonic() - started


def _open_to_read(options: Options, parts: Parts) -> None:
    identity = read_identity(options.directory)
    if identity is None:
        raise StoreError(f"there is no store in {options.directory}; a writer has to make it")
    _check_identity(options, identity)
    parts.identity = identity
    parts.follower = Follower(options.directory, identity)
    parts.follower.open(parts.report)
    parts.opened = Opened(bytes(16), parts.follower.trusted, 0)


def _open_to_write(options: Options, parts: Parts) -> None:
    directory, report = options.directory, parts.report
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    if options.durability != "none":
        for path in missing:
            sync_directory(path.parent)
    parts.lock_fd = _lock(directory)
    parts.identity = identity = _identity(options, report)
    loaded = load(directory, identity, report)
    parts.index = index = loaded.index
    opened = _trust(options, loaded)
    parts.opened = opened
    dropped = _drop(options, identity, loaded, opened, report)
    parts.journal = journal = _journal_of(options, identity, loaded)
    records = [
        bytes(index.records_of_clears(dropped, index.sequence + 1, journal.salt)),
        note(OPENED, index.sequence + 1 + len(dropped), journal.salt, opened.encode()),
    ]
    journal.append(b"".join(records), essential=True)
    journal.sync(options.durability)
    index.give(dropped)
    index.apply(records[1], journal.salt, MAX_BLOCKS)  # the sequence goes on behind it
    limit = _limit(options, identity)
    index.confine(limit)
    _cut_slabs(directory, identity, limit)
    if report.created:
        report.clean = True
    parts.records = loaded.records + len(dropped) + 1
    parts.heal = bool(report.damaged_records or report.damaged_files or loaded.journal is None) and not report.created


def _lock(directory: Path) -> int:
    fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
        os.close(fd)
        if error.errno != errno.EWOULDBLOCK:
            raise
        raise StoreLockedError(
            f"{directory} is open for writing in process {holder or 'unknown'}; a store has one writer, others open it "
            "with mode='r'"
        ) from error
    with contextlib.suppress(OSError):  # a full disk: nobody will be told the number
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _identity(options: Options, report: Report) -> Identity:
    identity = read_identity(options.directory)
    if identity is not None:
        _check_identity(options, identity)
        return identity
    if options.block_bytes is None:
        raise StoreError(f"there is no store in {options.directory}; block_bytes= is needed to make one")
    journals, snapshots, _ = generations(options.directory)
    if journals or snapshots or slabs_of(options.directory):
        raise StoreFormatError(
            f"{options.directory} has files of a store, but not the file 'store' that says which; remove them to begin "
            "anew"
        )
    blocks = max(1, min(options.slab_bytes // options.block_bytes, _limit_of(options.budget, options.block_bytes)))
    identity = Identity(secrets.token_bytes(16), options.block_bytes, blocks)
    path = options.directory / "store"
    aside = path.with_name("store.new")
    with aside.open("wb") as file:
        file.write(identity.encode())
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)
    sync_directory(options.directory)
    report.created = True
    return identity


def _check_identity(options: Options, identity: Identity) -> None:
    if options.block_bytes not in (None, identity.block_bytes):
        raise StoreFormatError(
            f"{options.directory} holds blocks of {identity.block_bytes:,} bytes, not of {options.block_bytes:,}"
        )
    if options.budget is not None and options.budget < identity.block_bytes:
        raise StoreError(
            f"a budget of {options.budget:,} bytes has no room for a single block of {identity.block_bytes:,}"
        )


def _limit_of(budget: int | None, block_bytes: int) -> int:
    return MAX_BLOCKS if budget is None else min(budget // block_bytes, MAX_BLOCKS)


def _limit(options: Options, identity: Identity) -> int:
    return _limit_of(options.budget, identity.block_bytes)


def _trust(options: Options, loaded: Loaded) -> Opened:
    """Say from which sequence on blocks are known to be what was written, whatever became of the machine."""
    boot, last = boot_id(), loaded.last
    trusted = last.trusted if last is not None else 0
    if last is not None and last.boot != boot and last.durability == 0:
        trusted = loaded.index.sequence + 1
    return Opened(boot, trusted, _DURABILITIES.index(options.durability))


def _drop(options: Options, identity: Identity, loaded: Loaded, opened: Opened, report: Report) -> Int64s:
    """Forget blocks that are not there, cannot be believed, or are too many."""
    index, dropped = loaded.index, []
    present = slabs_of(options.directory)
    for number in range(-(-index.top // identity.slab_blocks)):
        whole = present.get(number, 0) // identity.block_bytes
        first = number * identity.slab_blocks
        if whole < identity.slab_blocks:
            dropped.append(index.remove_range(first + whole, first + identity.slab_blocks))
            report.lost_blocks += len(dropped[-1])
    if opened.trusted:
        dropped.append(index.remove_range(0, index.top, before=opened.trusted))
        report.unverifiable_blocks = len(dropped[-1])
    dropped.append(index.remove_range(_limit(options, identity), index.top))
    report.over_budget = len(dropped[-1])
    return np.concatenate(dropped)


def _journal_of(options: Options, identity: Identity, loaded: Loaded) -> Journal:
    if loaded.journal is not None:
        if not loaded.continued:
            return Journal.resume(options.directory, identity, loaded.journal, loaded.end)
        return Journal.create(options.directory, identity, loaded.journal + 1, options.durability)  # readers look there
    journals, snapshots, _ = generations(options.directory)
    return Journal.create(options.directory, identity, max([*journals, *snapshots], default=0) + 1, options.durability)


def _cut_slabs(directory: Path, identity: Identity, limit: int) -> None:
    for number, size in slabs_of(directory).items():
        if size and number * identity.slab_blocks >= limit:
            os.truncate(directory / slab_name(number), 0)
