"""The index of a block store, and rows as blocks, against models too plain to be wrong."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from asyncxfer._fast import blockindex, blockrows
from asyncxfer._fast import descriptors as fast
from asyncxfer._fast.blockindex import RECORD_BYTES, BlockIndex, pack
from asyncxfer._fast.crc32c import crc32c

SALT = 12345
LIMIT = 12

some_keys = st.lists(st.integers(0, 20).map(lambda n: b"key %d" % n), min_size=1, max_size=6)


class IndexMachine(RuleBasedStateMachine):
    """The index, a dictionary in the order of use, and a second index that only follows the records."""

    def __init__(self) -> None:
        super().__init__()
        self.index = BlockIndex(LIMIT)
        self.follower = BlockIndex(LIMIT)
        self.model: OrderedDict[bytes, tuple[int, int]] = OrderedDict()  # key: block, checksum; the oldest first
        self.pins: dict[bytes, int] = {}
        self.sequence = 1
        self.journal = bytearray()

    def record(self, records: bytearray) -> None:
        self.journal += records
        assert self.follower.apply(records, SALT, LIMIT)[1] == 0
        self.sequence += len(records) // RECORD_BYTES

    def clear(self, blocks: blockindex.Int64s) -> None:
        self.record(self.index.records_of_clears(blocks, self.sequence, SALT))
        self.index.give(blocks)

    def use(self, keys: list[bytes]) -> None:
        for key in reversed(keys):
            if key in self.model and key not in self.pins:
                self.model.move_to_end(key)

    @rule(keys=some_keys, checksum=st.integers(0, 2**32 - 1), pin=st.booleans(), hint=st.integers(-1, LIMIT))
    def put(self, keys: list[bytes], checksum: int, pin: bool, hint: int) -> None:
        keys = list(dict.fromkeys(keys))
        blocks = self.index.allocate(len(keys), hint)
        taken = {block for block, _ in self.model.values()}
        assert len(blocks) == min(len(keys), LIMIT - len(taken))
        assert not taken & set(blocks.tolist())
        keys = keys[: len(blocks)]
        sums = np.full(len(keys), checksum, np.uint32)
        first = self.sequence
        self.record(self.index.records_of_sets(pack(keys), blocks, sums, first, SALT))
        sequences = np.arange(first, self.sequence, dtype=np.uint64)
        replaced = self.index.install(pack(keys), blocks, sequences, sums, pin=pin)
        assert sorted(replaced.tolist()) == sorted(self.model[key][0] for key in keys if key in self.model)
        self.index.give(replaced)
        for key, block in zip(keys, blocks.tolist(), strict=True):
            self.model[key] = (block, checksum)
            if pin:
                self.pins[key] = self.pins.get(key, 0) + 1
            if key not in self.pins:
                self.model.move_to_end(key)
        self.use(keys)

    @rule(keys=some_keys, hold=st.booleans())
    def look_up(self, keys: list[bytes], hold: bool) -> None:
        blocks, sequences, sums, checked = self.index.lookup(pack(keys), hold=hold)
        found = [self.model.get(key) for key in keys]
        assert blocks.tolist() == [-1 if entry is None else entry[0] for entry in found]
        assert [s for s, b in zip(sums.tolist(), blocks, strict=True) if b >= 0] == [e[1] for e in found if e]
        assert checked.tolist() == (blocks >= 0).tolist()
        there = blocks >= 0
        assert self.index.unchanged(blocks, sequences).tolist() == there.tolist()
        if hold:
            self.index.release(blocks)
        self.use(keys)

    @rule(keys=some_keys)
    def contains(self, keys: list[bytes]) -> None:
        assert self.index.contains(pack(keys)).tolist() == [key in self.model for key in keys]

    @rule(keys=some_keys)
    def remove(self, keys: list[bytes]) -> None:
        expected = [key in self.model and key not in keys[:number] for number, key in enumerate(keys)]
        found, blocks = self.index.remove(pack(keys))
        assert found.tolist() == expected
        self.clear(blocks)
        for key in keys:
            self.model.pop(key, None)
            self.pins.pop(key, None)

    @rule(n=st.integers(1, 5))
    def evict(self, n: int) -> None:
        oldest = [key for key in self.model if key not in self.pins][:n]
        blocks = self.index.evict(n)
        assert blocks.tolist() == [self.model[key][0] for key in oldest]
        self.clear(blocks)
        for key in oldest:
            del self.model[key]

    @rule(keys=some_keys, change=st.sampled_from((1, -1)))
    def pin(self, keys: list[bytes], change: int) -> None:
        keys = list(dict.fromkeys(keys))
        done = self.index.pin(pack(keys), change)
        assert done.tolist() == [key in self.model if change > 0 else key in self.pins for key in keys]
        for key, hit in zip(reversed(keys), reversed(done.tolist()), strict=True):
            if not hit:
                continue
            self.pins[key] = self.pins.get(key, 0) + change
            if not self.pins[key]:
                del self.pins[key]
                self.model.move_to_end(key)

    @rule(cut=st.integers(0, LIMIT))
    def snapshot(self, cut: int) -> None:
        """What is exported in two parts, with all of the journal behind it, is the index again, in order of use."""
        restored = BlockIndex(LIMIT)
        for records in (self.index.export(0, cut, SALT), self.index.export(cut, LIMIT, SALT)):
            restored.apply(records, SALT, LIMIT, alone=True, snapshot=True)
        restored.apply(self.journal, SALT, LIMIT, alone=True)
        restored.settle()
        assert restored.count == len(self.model)
        unpinned = [key for key in self.model if key not in self.pins]
        order = [block for block in restored.evict(LIMIT).tolist() if self.key_at(block) in unpinned]
        assert order == [self.model[key][0] for key in unpinned]

    def key_at(self, block: int) -> bytes:
        return next(key for key, (at, _) in self.model.items() if at == block)

    @invariant()
    def agree(self) -> None:
        keys = pack(list(self.model))
        expected = [block for block, _ in self.model.values()]
        blocks = self.follower.lookup(keys)[0]
        assert blocks.tolist() == expected
        assert self.index.count == self.follower.count == len(self.model)
        assert self.index.pinned == len(self.pins)
        assert self.index.free + self.index.limit - self.index.top == LIMIT - len(self.model)


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def install(index: BlockIndex, keys: list[bytes], first: int = 1) -> blockindex.Int64s:
    blocks = index.allocate(len(keys))
    sequences = np.arange(first, first + len(keys), dtype=np.uint64)
    index.give(index.install(pack(keys), blocks, sequences, np.zeros(len(keys), np.uint32)))
    return blocks


def test_keys_of_every_length_are_told_apart() -> None:
    keys = [b"\0" * n for n in range(1, 40)] + [b"x" * 1024, hashlib.sha256(b"x" * 1024).digest(), b"x" * 32]
    index = BlockIndex(100)
    blocks = install(index, keys)
    assert index.lookup(pack(keys))[0].tolist() == blocks.tolist()
    assert index.count == len(keys)
    for wrong in (b"", b"x" * 1025):
        with pytest.raises(ValueError, match="key 1 has"):
            pack([b"fine", wrong])
    for nothing in ("text", bytearray(b"x"), 7):
        with pytest.raises(TypeError, match="key 0 is"):
            pack([nothing])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="give"):
        pack(b"one")  # type: ignore[arg-type]


def test_a_hundred_thousand_keys_come_and_go() -> None:
    index = BlockIndex(1 << 20)
    keys = [os.urandom(32) for _ in range(100_000)]
    install(index, keys)
    assert index.contains(pack(keys)).all()
    assert index.nbytes < 100 * len(keys)
    index.give(index.remove(pack(keys[::2]))[1])
    assert index.contains(pack(keys)).tolist() == [False, True] * 50_000
    install(index, keys[::2], first=200_000)
    assert index.contains(pack(keys)).all()
    assert index.top == 100_000  # what had been given up was used again


def test_blocks_lie_side_by_side_where_they_can() -> None:
    index = BlockIndex(1000)
    first = index.allocate(100)
    assert first.tolist() == list(range(100))
    index.give(first[10:20])
    index.give(first[40:60])
    assert index.allocate(15).tolist() == list(range(40, 55))  # the first run that is long enough
    assert index.allocate(3, 12).tolist() == [12, 13, 14]  # where it was asked for
    assert index.allocate(900).tolist() == list(range(100, 1000))
    rest = index.allocate(1000).tolist()
    assert sorted(rest) == [10, 11, *range(15, 20), *range(55, 60)]
    assert len(index.allocate(1)) == 0


def test_a_block_that_is_read_is_not_given_out() -> None:
    index = BlockIndex(1)
    install(index, [b"a"])
    held = index.lookup(pack([b"a"]), hold=True)[0]
    again = index.lookup(pack([b"a"]), hold=True)[0]
    assert index.give(index.evict(1)) == 0
    assert len(index.allocate(1)) == 0
    assert index.release(held) == 0
    assert len(index.allocate(1)) == 0
    assert index.release(again) == 1
    assert len(index.allocate(1)) == 1
    with pytest.raises(ValueError, match="not being read"):
        index.release(again)


def test_calls_out_of_order_are_refused() -> None:
    index = BlockIndex(4)
    blocks = install(index, [b"a"])
    for call in (index.give, index.release):
        with pytest.raises(ValueError, match="block 0"):
            call(blocks)
        with pytest.raises(ValueError, match="block"):
            call(np.array([3]))
    with pytest.raises(ValueError, match="block 0"):
        index.install(pack([b"b"]), blocks, np.array([9], np.uint64), np.zeros(1, np.uint32))
    with pytest.raises(ValueError, match="for each key"):
        index.install(pack([b"b"]), blocks, np.array([9, 10], np.uint64), np.zeros(1, np.uint32))
    with pytest.raises(ValueError, match="pack"):
        index.contains(np.zeros((1, 8), np.uint8))
    install(index, [b"c"], first=2)
    with pytest.raises(ValueError, match="block 1"):
        index.confine(1)
    index.give(index.remove(pack([b"c"]))[1])
    index.confine(1)
    assert len(index.allocate(1)) == 0
    for limit in (0, 2**32):
        with pytest.raises(ValueError, match="holds 1 to"):
            BlockIndex(limit)


@given(data=st.binary(max_size=RECORD_BYTES * 5), records=st.integers(0, 5), flips=st.lists(st.integers(0, 319)))
def test_damaged_records_do_nothing(data: bytes, records: int, flips: list[int]) -> None:
    keys = [b"%d" % n for n in range(records)]
    source = BlockIndex(10)
    whole = source.records_of_sets(pack(keys), np.arange(records), np.zeros(records, np.uint32), 1, SALT)
    bad = bytearray(whole)
    hit = {flip // RECORD_BYTES for flip in flips if flip < len(bad)}
    for flip in set(flips):
        if flip < len(bad):
            bad[flip] ^= 0x55
    index = BlockIndex(10)
    looked, damaged, _, _ = index.apply(bytes(bad) + data, SALT, 10)
    assert looked == records + len(data) // RECORD_BYTES
    assert index.count == records - len(hit)
    assert damaged == len(hit) + len(data) // RECORD_BYTES
    assert BlockIndex(10).apply(whole, SALT + 1, 10)[1] == records  # of another file
    assert BlockIndex(10).apply(whole, SALT, 2)[1] == max(0, records - 2)  # beyond the slabs


def test_older_records_change_nothing() -> None:
    index, other = BlockIndex(10), BlockIndex(10)
    zero = np.zeros(1, np.uint32)
    old = other.records_of_sets(pack([b"a"]), np.array([3]), zero, 5, SALT)
    moved = other.records_of_sets(pack([b"a"]), np.array([4]), zero, 8, SALT)
    taken = other.records_of_sets(pack([b"b"]), np.array([4]), zero, 9, SALT)
    cleared = other.records_of_clears(np.array([4]), 7, SALT)
    for records in (taken, old, moved, cleared, old):
        index.apply(records, SALT, 10)
    # `a` has left block 3 for block 4, and that holds `b` by now.
    assert index.lookup(pack([b"a", b"b"]))[0].tolist() == [-1, 4]


def test_notes_come_back_and_wariness_stops() -> None:
    index = BlockIndex(10)
    said = blockindex.note(blockindex.OPENED, 3, SALT, b"who", flags=2)
    one = index.records_of_clears(np.array([1]), 4, SALT)
    assert index.apply(said + one, SALT, 10) == (2, 0, 2, [(blockindex.OPENED, 2, b"who")])
    torn = bytes(one[:-1]) + b"?"
    assert index.apply(one + torn + said, SALT, 10, wary=True) == (1, 1, 1, [])
    assert index.apply(one + torn + said, SALT, 10)[:3] == (3, 1, 3)
    assert blockindex.sealed(one + torn + said, SALT) == 2
    with pytest.raises(ValueError, match="32"):
        blockindex.note(blockindex.OPENED, 3, SALT, bytes(33))


# ---- rows as blocks -------------------------------------------------------------------------------------------------


@st.composite
def row_tables(draw: st.DrawFn) -> tuple[fast.Runs, int]:
    """Rows, regular or not, some of them empty, and a size of blocks that divides their total."""
    lengths = draw(st.lists(st.integers(0, 12), min_size=1, max_size=8))
    runs = np.zeros(len(lengths), fast.RUN)
    for run, length in zip(runs, lengths, strict=True):
        run["offset"], run["length"] = draw(st.integers(200, 600)), length
        run["count"] = draw(st.integers(1, 4))
        run["stride"] = draw(st.integers(-40, 40)) if run["count"] > 1 else 0
        run["segment"] = draw(st.integers(0, 1))
    total = int((runs["length"] * runs["count"]).sum())
    sizes = [size for size in range(1, total + 1) if total % size == 0] or [1]
    return runs, draw(st.sampled_from(sizes))


def stream(runs: fast.Runs, memory: list[bytes]) -> bytes:
    return b"".join(
        memory[segment][offset : offset + length] for offset, length, segment in fast.to_rows(runs).tolist()
    )


@given(table=row_tables(), data=st.data())
def test_blocks_are_cut_from_rows_of_any_kind(table: tuple[fast.Runs, int], data: st.DataObject) -> None:
    runs, size = table
    memory = [os.urandom(1000), os.urandom(1000)]
    whole = stream(runs, memory)
    blocks = [whole[start : start + size] for start in range(0, len(whole), size)]
    indices = st.lists(st.integers(0, len(blocks) - 1), max_size=6) if blocks else st.just([])
    chosen = data.draw(indices)
    picked = blockrows.pick(runs, size, np.array(chosen, np.int64))
    assert stream(picked, memory) == b"".join(blocks[k] for k in chosen)
    arrays = [np.frombuffer(part, np.uint8) for part in memory]
    addresses = np.array([array.ctypes.data for array in arrays], np.uint64)
    assert blockrows.checksums(runs, addresses, size).tolist() == [crc32c(block) for block in blocks]


def test_blocks_that_are_not_there_are_refused() -> None:
    runs = fast.from_arrays(np.array([0], np.uint64), np.array([10], np.uint64))
    for bad in (2, -1):
        with pytest.raises(IndexError, match=f"block {bad}"):
            blockrows.pick(runs, 5, np.array([bad]))
    with pytest.raises(ValueError, match="at least one byte"):
        blockrows.pick(runs, 0, np.array([0]))
    with pytest.raises(ValueError, match="no whole blocks"):
        blockrows.checksums(runs, np.zeros(1, np.uint64), 3)
    with pytest.raises(IndexError, match="segment 0 of 0"):
        blockrows.checksums(runs, np.zeros(0, np.uint64), 5)


def test_slots_are_where_blocks_lie_in_their_slabs() -> None:
    slots = blockrows.slots(np.array([0, 4, 5, 13], np.int64), 1000, 5)
    assert fast.to_rows(slots).tolist() == [[0, 1000, 0], [4000, 1000, 0], [0, 1000, 0], [3000, 1000, 0]]
    assert len(blockrows.slots(np.empty(0, np.int64), 1000, 5)) == 0
    with pytest.raises(IndexError, match="no block -1"):
        blockrows.slots(np.array([3, -1], np.int64), 1000, 5)
    for size, each in ((0, 5), (1000, 0)):
        with pytest.raises(ValueError, match="at least one"):
            blockrows.slots(np.array([3], np.int64), size, each)
