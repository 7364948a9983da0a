"""The store on disk as a tier: which of its blocks are objects too, remembered by block and noted in a file.

A block that is no object yet is pinned, so that it is not evicted before it is one. When the store is opened again,
what the note does not speak of is no object: so nothing needs to be written before a put is acknowledged.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import numpy as np

from asyncxfer import DescriptorList
from asyncxfer._fast.blockindex import RECORD_BYTES, Bools, Int64s, Packed, Uint64s

from ._object_format import IDENT_BYTES
from ._store import DiskStore
from ._turns import next_turn
from ._uploaded import Uploaded

__all__ = ["DiskTier"]

_PIECE = 512  # blocks that are looked at without letting the loop turn
_NOTED_AT_ONCE = 256
_LEAST_NOTED = 65_536
_FIRST_BLOCKS = 1 << 20  # the system gives the memory when it is first written to
_RECORD = np.dtype({
    "names": ["length", "block", "sequence", "key"], "formats": ["u1", "<u4", "<u8", ("u1", 32)],
    "offsets": [5, 8, 16, 24], "itemsize": RECORD_BYTES,
})  # fmt: skip


class DiskTier:
    """The blocks on disk of one tiered store.

    Parameters
    ----------
    store : DiskStore
    url : str
        Of the objects.
    """

    def __init__(self, store: DiskStore, url: str) -> None:
        self.store = store
        self._note = Uploaded(store.path, store.identity, url)
        self._objects = np.zeros(_FIRST_BLOCKS, np.uint64)  # by block: the sequence by which it is an object too
        self._to_note: list[int] = []
        self._noting: asyncio.Task[None] | None = None

    async def begin(self) -> AsyncIterator[Packed]:
        """Read the note and write it anew; the keys that are no objects yet, pinned, some at a time."""
        store = self.store
        noted: Uint64s = await store.in_thread(lambda: np.sort(self._note.read()))
        kept = []
        for start in range(0, store.index.top, _PIECE):
            records = np.frombuffer(store.index.export(start, start + _PIECE, 0), _RECORD)
            sequences = records["sequence"]
            places = np.searchsorted(noted, sequences)
            known = places < len(noted)
            known[known] = noted[places[known]] == sequences[known]
            kept.append(sequences[known])
            self._mark(records["block"][known].astype(np.int64), sequences[known])
            missing = records[~known]
            packed = np.zeros((len(missing), IDENT_BYTES), np.uint8)
            packed[:, :32], packed[:, 32] = missing["key"], missing["length"]
            if len(packed):
                store.pin_packed(packed, 1)
                yield packed
            await next_turn()
        await store.in_thread(lambda: self._note.write(np.concatenate([noted[:0], *kept])))

    async def put(self, keys: Packed, which: Int64s, rows: DescriptorList, prefix: bytes | None) -> None:
        """Store those blocks that are not here."""
        await self.store.put_packed(keys, which, rows, prefix)

    async def get(self, keys: Packed, which: Int64s, rows: DescriptorList) -> Bools:
        """Read blocks; which were here."""
        return await self.store.get_packed(keys, which, rows)

    def claim(self, keys: Packed) -> tuple[Bools, Bools]:
        """Pin the blocks that are no objects yet: of each key whether that is so, and whether it is not here at all."""
        blocks, sequences, _, _ = self.store.index.lookup(keys)
        gone = blocks < 0
        pinned = ~gone & (self._marks(blocks) != sequences)
        self.store.pin_packed(keys[pinned], 1)
        return pinned, gone

    def sequences_of(self, keys: Packed) -> Uint64s:
        """What the blocks of keys are known by; 0 where there is none."""
        return self.store.index.lookup(keys)[1]

    def are_objects(self, keys: Packed, sequences: Uint64s) -> None:
        """Take note of blocks that are objects, if they are still those of `sequences`."""
        blocks, found, _, _ = self.store.index.lookup(keys)
        here = (blocks >= 0) & (found == sequences)
        self._mark(blocks[here], sequences[here])
        self._to_note += sequences[here].tolist()
        if len(self._to_note) >= _NOTED_AT_ONCE:
            self.write_note()

    def write_note(self) -> None:
        """Have what has come since be written to the file."""
        if self._to_note and self._noting is None:
            self._noting = asyncio.ensure_future(self._write())

    async def _write(self) -> None:
        try:
            while self._to_note:
                sequences, self._to_note = np.array(self._to_note, np.uint64), []
                if self._note.count > max(_LEAST_NOTED, 2 * self.store.index.count):
                    await self.store.in_thread(lambda: self._note.write(self._objects[self._objects > 0]))
                else:
                    await self.store.in_thread(self._note.append, sequences)
        except OSError:
            self._to_note = []  # the blocks are uploaded once more after the next start
        finally:
            self._noting = None

    def _marks(self, blocks: Int64s) -> Uint64s:
        self._grow(blocks)
        marks: Uint64s = self._objects[blocks]
        return marks

    def _mark(self, blocks: Int64s, sequences: Uint64s) -> None:
        self._grow(blocks)
        self._objects[blocks] = sequences

    def _grow(self, blocks: Int64s) -> None:
        top = int(blocks.max(initial=-1)) + 1
        if top > len(self._objects):
            grown = np.zeros(max(top, 4 * len(self._objects)), np.uint64)
            grown[: len(self._objects)] = self._objects
            self._objects = grown

    async def aclose(self) -> None:
        """Write the rest of the note."""
        self.write_note()
        while self._noting is not None:
            await asyncio.wait([self._noting])
        await self.store.in_thread(self._note.close)
