# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: auto_pickle=False, autotestdict=False
"""The index of a block store: which key lies in which block, in what order they were used, and records of that.

A block has a number, and everything known of it is the entry of that number, 64 bytes; keys are found through shards of
open addressing that grow one at a time, so that no single call pays for a table of millions. There is no Python object
a key. What is kept in files are *records*, 64 bytes too, each with a checksum of its own that also says of which store
and which file it is: nothing that a file holds is followed before it has been checked.

Records say what a block holds from now on (SET, CLEAR) under a number that only grows; one that is not newer than what
the index knows of the block changes nothing, so that records may be applied again, over a later state.

It knows no file, no slab and no event loop. Its calls hold the GIL, which is what makes each of them whole, except
`apply` with `alone`, for an index that nobody else has yet.
"""

cimport cython
from libc.stdint cimport UINT16_MAX, UINT32_MAX, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcmp, memcpy, memset

import hashlib
import os

import numpy as np

Packed = Int64s = Uint32s = Uint64s = Bools = np.ndarray

__all__ = [
    "CLEAR", "CLOSED", "MAX_BLOCKS", "MAX_KEY_BYTES", "NEXT", "OPENED", "RECORD_BYTES", "SET", "UNCHECKED", "BlockIndex",
    "live", "note", "pack", "sealed",
]

cdef enum:
    WHOLE = 32           # bytes of a key that are kept as they are
    LONG = WHOLE + 1     # stands for the length of a longer one, of which the SHA-256 is kept
    SHARD_BITS = 10
    SHARDS = 1 << SHARD_BITS
    FIRST_BUCKETS = 16
    RUNS_TRIED = 8
    SPLINTERS = 8        # one in so many blocks may lie free in pieces before they are used

cdef enum:  # states of a block
    FREE = 0
    TAKEN = 1     # given out by `allocate`, and being written
    HELD = 2      # holds the block of a key
    CLEARED = 3   # holds none any more, which no record says yet
    DRAINING = 4  # free as soon as nobody reads it

cdef enum:  # kinds of records
    K_SET = 1
    K_CLEAR = 2
    K_OPENED = 3
    K_CLOSED = 4
    K_NEXT = 5

SET, CLEAR, OPENED, CLOSED, NEXT = K_SET, K_CLEAR, K_OPENED, K_CLOSED, K_NEXT
UNCHECKED = 1  # a flag of records and entries: the block's checksum is not known
RECORD_BYTES = 64
MAX_KEY_BYTES = 1024
MAX_BLOCKS = 2**32 - 2

cdef uint32_t NIL = UINT32_MAX
cdef uint64_t LAST_TICK = (<uint64_t> 1 << 48) - 1

cdef extern from "crc32c.h" nogil:
    uint32_t axf_crc32c(uint32_t crc, const void* data, size_t n)

cdef extern from *:
    """
    #include <stdint.h>
    static inline uint64_t axf_fold(uint64_t a, uint64_t b) {
        unsigned __int128 product = (unsigned __int128)a * b;
        return (uint64_t)product ^ (uint64_t)(product >> 64);
    }
    static long asyncxfer_live_indexes = 0;
    #define asyncxfer_indexes_add(n) __atomic_add_fetch(&asyncxfer_live_indexes, (n), __ATOMIC_RELAXED)
    """
    uint64_t axf_fold(uint64_t a, uint64_t b) nogil
    long asyncxfer_indexes_add(long n) noexcept nogil
    int __builtin_ctzll(unsigned long long bits) noexcept nogil


cdef packed struct key_t:
    uint8_t at[WHOLE]
    uint8_t length
    uint8_t zero[7]


cdef struct entry_t:
    uint8_t key[WHOLE]
    uint64_t sequence  # of the record that made it what it is
    uint32_t checksum
    uint32_t newer
    uint32_t older
    uint16_t readers
    uint16_t pins
    uint8_t length
    uint8_t state      # and UNCHECKED << 7
    uint16_t tick_high # when it was used last, by the clock of this index
    uint32_t tick_low


cdef struct bucket_t:
    uint32_t tag
    uint32_t block  # and one; 0 in an empty bucket


cdef struct shard_t:
    bucket_t* at
    uint32_t mask
    uint32_t count


cdef packed struct record_t:
    uint32_t check  # CRC32C of what follows, begun with the salt of the file
    uint8_t kind
    uint8_t length
    uint16_t flags
    uint32_t block
    uint32_t checksum
    uint64_t sequence
    uint8_t key[WHOLE]
    uint64_t tick


assert sizeof(key_t) == 40
assert sizeof(entry_t) == sizeof(record_t) == RECORD_BYTES


def live():
    """Return how many indexes exist in this process."""
    return asyncxfer_indexes_add(0)


# -- Keys -------------------------------------------------------------------------------------------------------------


def pack(keys) -> Packed:
    """Give keys the form in which the index takes them: 40 bytes each, whatever their length."""
    cdef Py_ssize_t i = 0, n
    cdef key_t* out
    cdef bytes key
    if isinstance(keys, bytes):
        raise TypeError("keys are a sequence of bytes, not one bytes object; give [key]")
    keys = list(keys)
    n = len(keys)
    packed = np.zeros((n, sizeof(key_t)), np.uint8)
    cdef uint8_t[:, ::1] view = packed
    if n == 0:
        return packed
    out = <key_t*> &view[0, 0]
    for item in keys:
        if type(item) is not bytes:
            raise TypeError(f"key {i} is {type(item).__name__}; expected bytes")
        key = item
        if not 1 <= len(key) <= MAX_KEY_BYTES:
            raise ValueError(f"key {i} has {len(key)} bytes; expected 1 to {MAX_KEY_BYTES}")
        if len(key) > WHOLE:
            out[i].length = LONG
            key = hashlib.sha256(key).digest()
        else:
            out[i].length = <uint8_t> len(key)
        memcpy(out[i].at, <const char*> key, len(key))
        i += 1
    return packed


cdef const key_t* _keys(const uint8_t[:, ::1] packed) except? NULL:
    if packed.shape[1] != sizeof(key_t):
        raise ValueError("keys come from pack()")
    return <const key_t*> &packed[0, 0] if packed.shape[0] else NULL


def note(int kind, uint64_t sequence, uint32_t salt, const uint8_t[::1] payload, *, int flags=0) -> bytes:
    """Give a record that is about the store and no block, with up to 32 bytes of its own."""
    cdef record_t record
    if payload.shape[0] > WHOLE:
        raise ValueError("a note has at most 32 bytes")
    memset(&record, 0, sizeof(record))
    record.kind, record.flags, record.sequence, record.block = kind, flags, sequence, NIL
    record.length = <uint8_t> payload.shape[0]
    if payload.shape[0]:
        memcpy(record.key, &payload[0], payload.shape[0])
    _seal(&record, salt)
    return (<char*> &record)[:sizeof(record)]


def sealed(const uint8_t[::1] data, uint32_t salt) -> int:
    """Count the records that have their right checksum."""
    cdef uint64_t n = data.shape[0] // sizeof(record_t), i, found = 0
    for i in range(n):
        found += _sealed(<const record_t*> &data[0] + i, salt)
    return found


cdef inline void _seal(record_t* record, uint32_t salt) noexcept nogil:
    record.check = axf_crc32c(salt, <const char*> record + 4, sizeof(record_t) - 4)


cdef inline bint _sealed(const record_t* record, uint32_t salt) noexcept nogil:
    return record.check == axf_crc32c(salt, <const char*> record + 4, sizeof(record_t) - 4)


# -- The index --------------------------------------------------------------------------------------------------------


@cython.final
cdef class BlockIndex:
    """Keys, blocks, and the order of their use.

    Parameters
    ----------
    limit : int
        How many blocks there may be.
    """

    cdef entry_t* entries
    cdef uint64_t* free_bits    # a bit for each block below `top`
    cdef shard_t shards[SHARDS]
    cdef uint64_t secrets[5]
    cdef readonly uint64_t clock
    cdef uint32_t newest, oldest
    cdef bint ordered           # whether the list of use is kept; `apply` builds an index without
    cdef readonly uint64_t sequence
    cdef readonly uint64_t limit
    cdef readonly uint64_t top  # blocks from here on were never used
    cdef uint64_t room
    cdef readonly uint64_t count
    cdef readonly uint64_t free
    cdef readonly uint64_t pinned

    def __cinit__(self):
        asyncxfer_indexes_add(1)

    def __init__(self, uint64_t limit):
        if not 1 <= limit <= MAX_BLOCKS:
            raise ValueError(f"an index holds 1 to {MAX_BLOCKS} blocks, not {limit}")
        seed = os.urandom(sizeof(self.secrets))  # whoever chooses keys shall not choose where they collide
        memcpy(self.secrets, <const char*> <bytes> seed, sizeof(self.secrets))
        self.limit = limit
        self.newest = self.oldest = NIL
        self.ordered = True

    def __dealloc__(self):
        cdef int k
        asyncxfer_indexes_add(-1)
        for k in range(SHARDS):
            free(self.shards[k].at)
        free(self.entries)
        free(self.free_bits)

    def __len__(self):
        return self.count

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the entries and the tables take."""
        cdef uint64_t total = self.room * sizeof(entry_t) + self.room // 8
        cdef int k
        for k in range(SHARDS):
            if self.shards[k].at != NULL:
                total += (<uint64_t> self.shards[k].mask + 1) * sizeof(bucket_t)
        return total

    # -- finding a key

    cdef inline uint64_t _hash(self, const uint8_t* key, uint8_t length) noexcept nogil:
        cdef uint64_t words[4]
        memcpy(words, key, WHOLE)
        return axf_fold(
            axf_fold(words[0] ^ self.secrets[0], words[1] ^ self.secrets[1])
            ^ axf_fold(words[2] ^ self.secrets[2], words[3] ^ self.secrets[3])
            ^ length,
            self.secrets[4] | 1,
        )

    cdef inline int64_t _find(self, const uint8_t* key, uint8_t length, uint64_t hashed) noexcept nogil:
        cdef shard_t* shard = &self.shards[hashed >> (64 - SHARD_BITS)]
        cdef uint32_t tag = <uint32_t> hashed, at
        cdef entry_t* entry
        if shard.at == NULL:
            return -1
        at = tag & shard.mask
        while shard.at[at].block:
            if shard.at[at].tag == tag:
                entry = &self.entries[shard.at[at].block - 1]
                if entry.length == length and memcmp(entry.key, key, WHOLE) == 0:
                    return <int64_t> shard.at[at].block - 1
            at = (at + 1) & shard.mask
        return -1

    cdef int _enter(self, uint64_t hashed, uint32_t block) noexcept nogil:
        cdef shard_t* shard = &self.shards[hashed >> (64 - SHARD_BITS)]
        cdef bucket_t bucket
        if shard.at == NULL or shard.count >= (shard.mask // 4 + 1) * 3:
            if self._grow_shard(shard) < 0:
                return -1
        bucket.tag, bucket.block = <uint32_t> hashed, block + 1
        _place(shard, bucket)
        shard.count += 1
        return 0

    cdef int _grow_shard(self, shard_t* shard) noexcept nogil:
        cdef bucket_t* before = shard.at
        cdef uint64_t size = <uint64_t> shard.mask + 1 if before != NULL else 0, k
        cdef uint64_t wider = size * 2 if size else FIRST_BUCKETS
        cdef bucket_t* after = <bucket_t*> calloc(wider, sizeof(bucket_t))
        if after == NULL:
            return -1
        shard.at, shard.mask = after, <uint32_t> (wider - 1)
        for k in range(size):
            if before[k].block:
                _place(shard, before[k])
        free(before)
        return 0

    cdef void _leave(self, uint64_t hashed, uint32_t block) noexcept nogil:
        cdef shard_t* shard = &self.shards[hashed >> (64 - SHARD_BITS)]
        cdef uint32_t mask = shard.mask, hole = <uint32_t> hashed & mask, at
        while shard.at[hole].block != block + 1:
            hole = (hole + 1) & mask
        at = (hole + 1) & mask
        while shard.at[at].block:  # what a probe would no longer reach over the hole moves into it
            if ((at - shard.at[at].tag) & mask) >= ((at - hole) & mask):
                shard.at[hole] = shard.at[at]
                hole = at
            at = (at + 1) & mask
        shard.at[hole].block = 0
        shard.count -= 1

    # -- the order of use

    cdef inline void _link(self, uint32_t block) noexcept nogil:
        cdef entry_t* entry = &self.entries[block]
        entry.newer, entry.older = NIL, self.newest
        if self.newest != NIL:
            self.entries[self.newest].newer = block
        else:
            self.oldest = block
        self.newest = block

    cdef inline void _unlink(self, uint32_t block) noexcept nogil:
        cdef entry_t* entry = &self.entries[block]
        if entry.newer != NIL:
            self.entries[entry.newer].older = entry.older
        else:
            self.newest = entry.older
        if entry.older != NIL:
            self.entries[entry.older].newer = entry.newer
        else:
            self.oldest = entry.newer

    cdef inline void _stamp(self, entry_t* entry, uint64_t tick) noexcept nogil:
        entry.tick_high, entry.tick_low = <uint16_t> (tick >> 32), <uint32_t> tick

    cdef inline void _touch(self, uint32_t block) noexcept nogil:
        cdef entry_t* entry = &self.entries[block]
        self.clock += 1
        self._stamp(entry, self.clock)
        if self.ordered and not entry.pins and self.newest != block:
            self._unlink(block)
            self._link(block)

    # -- what a block holds

    cdef inline void _mark_free(self, uint32_t block) noexcept nogil:
        self.entries[block].state = FREE
        self.free_bits[block >> 6] |= <uint64_t> 1 << (block & 63)
        self.free += 1

    cdef inline void _mark_used(self, uint32_t block, uint8_t state) noexcept nogil:
        self.entries[block].state = state
        self.free_bits[block >> 6] &= ~(<uint64_t> 1 << (block & 63))
        self.free -= 1

    cdef int _reach(self, uint64_t top) noexcept nogil:
        # Make room for blocks below `top`, which begin as free ones.
        cdef uint64_t room, block
        cdef void* grown
        if top > self.room:
            room = (max(top, self.room + self.room // 8, 1024) + 63) & ~<uint64_t> 63
            grown = realloc(self.entries, room * sizeof(entry_t))
            if grown == NULL:
                return -1
            self.entries = <entry_t*> grown
            memset(self.entries + self.room, 0, (room - self.room) * sizeof(entry_t))
            grown = realloc(self.free_bits, room // 8)
            if grown == NULL:
                return -1
            self.free_bits = <uint64_t*> grown
            memset(<char*> self.free_bits + self.room // 8, 0, (room - self.room) // 8)
            self.room = room
        while self.top < top:
            block = self.top
            self.top += 1
            self._mark_free(<uint32_t> block)
        return 0

    cdef int _hold(self, uint32_t block, const uint8_t* key, uint8_t length, uint64_t hashed, uint64_t sequence,
                   uint32_t checksum, bint unchecked, uint64_t tick, uint16_t pins) noexcept nogil:
        # The block is neither free nor held; its place in the list of use is the newest.
        cdef entry_t* entry = &self.entries[block]
        if self._enter(hashed, block) < 0:
            return -1
        memcpy(entry.key, key, WHOLE)
        entry.length, entry.sequence, entry.checksum, entry.pins = length, sequence, checksum, pins
        entry.state = HELD | (<uint8_t> unchecked << 7)
        self._stamp(entry, tick)
        if self.ordered and not pins:
            self._link(block)
        self.count += 1
        self.pinned += pins != 0
        return 0

    cdef uint16_t _let_go(self, uint32_t block, uint8_t state) noexcept nogil:
        # The block no longer holds its key; how often that was pinned.
        cdef entry_t* entry = &self.entries[block]
        cdef uint16_t pins = entry.pins
        self._leave(self._hash(entry.key, entry.length), block)
        if self.ordered and not pins:
            self._unlink(block)
        self.pinned -= pins != 0
        entry.pins, entry.length, entry.state = 0, 0, state
        self.count -= 1
        return pins

    cdef inline bint _is_held(self, int64_t block) noexcept nogil:
        return 0 <= block < <int64_t> self.top and (self.entries[block].state & 0x7F) == HELD

    cdef int _check_state(self, int64_t block, int state) except -1:
        if not 0 <= block < <int64_t> self.top or (self.entries[block].state & 0x7F) != state:
            raise ValueError(f"block {block} is not in the state that this call is for")
        return 0

    # -- looking up

    def contains(self, const uint8_t[:, ::1] packed) -> Bools:
        """Tell of each key whether it is here: (n,) bool."""
        cdef Py_ssize_t n = packed.shape[0], i
        cdef const key_t* keys = _keys(packed)
        found = np.empty(n, np.bool_)
        cdef uint8_t[::1] out = found.view(np.uint8)
        for i in range(n):
            out[i] = self._find(keys[i].at, keys[i].length, self._hash(keys[i].at, keys[i].length)) >= 0
        return found

    def lookup(self, const uint8_t[:, ::1] packed, *, bint hold=False) -> tuple[Int64s, Uint64s, Uint32s, Bools]:
        """Give of each key its block (-1 where it is not here), sequence, checksum, and whether that is known.

        Looking up is use, and the first of the keys counts as used last: of a prefix, the end goes first. With `hold`
        none of the blocks is given out anew before it was released.
        """
        cdef Py_ssize_t n = packed.shape[0], i
        cdef const key_t* keys = _keys(packed)
        cdef int64_t block
        cdef entry_t* entry
        blocks, sequences = np.full(n, -1, np.int64), np.zeros(n, np.uint64)
        checksums, checked = np.zeros(n, np.uint32), np.zeros(n, np.bool_)
        cdef int64_t[::1] block_at = blocks
        cdef uint64_t[::1] sequence_at = sequences
        cdef uint32_t[::1] checksum_at = checksums
        cdef uint8_t[::1] checked_at = checked.view(np.uint8)
        for i in range(n - 1, -1, -1):
            block = self._find(keys[i].at, keys[i].length, self._hash(keys[i].at, keys[i].length))
            if block < 0:
                continue
            entry = &self.entries[block]
            if hold:
                if entry.readers == UINT16_MAX:
                    continue  # so many readers at once: for this one it is a miss
                entry.readers += 1
            block_at[i], sequence_at[i], checksum_at[i] = block, entry.sequence, entry.checksum
            checked_at[i] = not entry.state >> 7
            self._touch(<uint32_t> block)
        return blocks, sequences, checksums, checked

    def unchanged(self, const int64_t[::1] blocks, const uint64_t[::1] sequences) -> Bools:
        """Tell of each block whether it still holds what it held under that sequence: (n,) bool."""
        cdef Py_ssize_t i
        if blocks.shape[0] != sequences.shape[0]:
            raise ValueError("expected a sequence for each block")
        same = np.empty(blocks.shape[0], np.bool_)
        cdef uint8_t[::1] out = same.view(np.uint8)
        for i in range(blocks.shape[0]):
            out[i] = self._is_held(blocks[i]) and self.entries[blocks[i]].sequence == sequences[i]
        return same

    def release(self, const int64_t[::1] blocks) -> int:
        """Let go of blocks that `lookup` held; how many have become free by it. Those of number -1 are passed over."""
        cdef Py_ssize_t i
        cdef int64_t block
        cdef uint64_t before = self.free
        for i in range(blocks.shape[0]):
            block = blocks[i]
            if block < 0:
                continue
            if block >= <int64_t> self.top or self.entries[block].readers == 0:
                raise ValueError(f"block {block} is not being read")
            self.entries[block].readers -= 1
            if self.entries[block].readers == 0 and self.entries[block].state == DRAINING:
                self._mark_free(<uint32_t> block)
        return self.free - before

    def pin(self, const uint8_t[:, ::1] packed, int change) -> Bools:
        """Add 1 to the pins of keys, or take 1 away; of each whether it is here and that was possible: (n,) bool."""
        cdef Py_ssize_t n = packed.shape[0], i
        cdef const key_t* keys = _keys(packed)
        cdef int64_t block
        cdef entry_t* entry
        if change not in (1, -1):
            raise ValueError("pins change by 1 or -1")
        done = np.zeros(n, np.bool_)
        cdef uint8_t[::1] out = done.view(np.uint8)
        for i in range(n):
            block = self._find(keys[i].at, keys[i].length, self._hash(keys[i].at, keys[i].length))
            if block < 0:
                continue
            entry = &self.entries[block]
            if entry.pins == (UINT16_MAX if change > 0 else 0):
                continue
            if entry.pins == 0:
                self._unlink(<uint32_t> block)
                self.pinned += 1
            entry.pins += change
            if entry.pins == 0:
                self.pinned -= 1
                self._link(<uint32_t> block)
            out[i] = True
        for i in range(n - 1, -1, -1):
            if out[i]:
                self._touch(<uint32_t> self._find(keys[i].at, keys[i].length, self._hash(keys[i].at, keys[i].length)))
        return done

    # -- taking away

    def remove(self, const uint8_t[:, ::1] packed) -> tuple[Bools, Int64s]:
        """Forget keys, pinned ones too; of each whether it was here, and the blocks, of which no record says so yet."""
        cdef Py_ssize_t n = packed.shape[0], i, m = 0
        cdef const key_t* keys = _keys(packed)
        cdef int64_t block
        found, blocks = np.zeros(n, np.bool_), np.empty(n, np.int64)
        cdef uint8_t[::1] found_at = found.view(np.uint8)
        cdef int64_t[::1] out = blocks
        for i in range(n):
            block = self._find(keys[i].at, keys[i].length, self._hash(keys[i].at, keys[i].length))
            if block >= 0:
                self._let_go(<uint32_t> block, CLEARED)
                found_at[i] = True
                out[m] = block
                m += 1
        return found, blocks[:m]

    def remove_blocks(self, const int64_t[::1] blocks, const uint64_t[::1] sequences) -> Int64s:
        """Forget what blocks hold, where they hold it still; the blocks, whose records are to be written."""
        cdef Py_ssize_t i, m = 0
        if blocks.shape[0] != sequences.shape[0]:
            raise ValueError("expected a sequence for each block")
        removed = np.empty(blocks.shape[0], np.int64)
        cdef int64_t[::1] out = removed
        for i in range(blocks.shape[0]):
            if self._is_held(blocks[i]) and self.entries[blocks[i]].sequence == sequences[i]:
                self._let_go(<uint32_t> blocks[i], CLEARED)
                out[m] = blocks[i]
                m += 1
        return removed[:m]

    def remove_range(self, uint64_t start, uint64_t stop, *, uint64_t before=0) -> Int64s:
        """Forget what blocks of a range hold, or only what has no checksum and is from before that sequence."""
        cdef uint64_t block
        cdef Py_ssize_t m = 0
        stop = min(stop, self.top)
        removed = np.empty(stop - start if stop > start else 0, np.int64)
        cdef int64_t[::1] out = removed
        for block in range(start, stop):
            if not self._is_held(block):
                continue
            if before and not (self.entries[block].state >> 7 and self.entries[block].sequence < before):
                continue
            self._let_go(<uint32_t> block, CLEARED)
            out[m] = block
            m += 1
        return removed[:m].copy()

    def evict(self, uint64_t n) -> Int64s:
        """Forget the keys that were used longest ago and are not pinned, up to `n`; the blocks, as `remove` does."""
        cdef Py_ssize_t m = 0
        blocks = np.empty(min(n, self.count - self.pinned), np.int64)
        cdef int64_t[::1] out = blocks
        while m < out.shape[0] and self.oldest != NIL:
            out[m] = self.oldest
            self._let_go(self.oldest, CLEARED)
            m += 1
        return blocks[:m]

    def give(self, const int64_t[::1] blocks) -> int:
        """Make blocks free that were allocated or forgotten, those being read later; how many are free by it now."""
        cdef Py_ssize_t i
        cdef uint64_t before = self.free
        for i in range(blocks.shape[0]):
            if not 0 <= blocks[i] < <int64_t> self.top or self.entries[blocks[i]].state not in (TAKEN, CLEARED):
                raise ValueError(f"block {blocks[i]} is neither allocated nor forgotten")
            if self.entries[blocks[i]].readers:
                self.entries[blocks[i]].state = DRAINING
            else:
                self._mark_free(<uint32_t> blocks[i])
        return self.free - before

    # -- giving out

    def allocate(self, uint64_t n, int64_t hint=-1) -> Int64s:
        """Take up to `n` free blocks, side by side as far as that goes; from `hint` on, if that one is free."""
        cdef Py_ssize_t m = 0
        cdef int tried = 0
        cdef uint64_t want, length, start = 0
        n = min(n, self.free + (self.limit - self.top))
        blocks = np.empty(n, np.int64)
        cdef int64_t[::1] out = blocks
        if hint >= 0:
            m = self._take(out, m, <uint64_t> hint, n)
        while m < <Py_ssize_t> n and tried < RUNS_TRIED:
            want = n - m
            length = self._free_run(want, &start)
            if length < want and self.limit - self.top >= want and self.free <= self.top // SPLINTERS:
                m = self._take(out, m, self.top, want)
                break
            if length * 4 < want:
                break  # what is free lies in pieces: take them as they come
            m = self._take(out, m, start, min(length, want))
            tried += 1
        start = 0
        while m < <Py_ssize_t> n and start < self.top:
            m = self._take(out, m, start, 1)
            start += 1
            while start < self.top and self.free_bits[start >> 6] == 0:
                start = (start | 63) + 1
        if m < <Py_ssize_t> n:
            m = self._take(out, m, self.top, n - m)
        return blocks[:m]

    cdef Py_ssize_t _take(self, int64_t[::1] out, Py_ssize_t m, uint64_t start, uint64_t most) except -1:
        # Up to `most` free blocks in a line from `start`, from beyond `top` too.
        cdef uint64_t block = start
        while m < out.shape[0] and block - start < most and block < self.limit:
            if block > self.top:
                break
            if block == self.top and self._reach(block + 1) < 0:
                raise MemoryError("no memory for entries of the index")
            if self.entries[block].state != FREE:
                break
            self._mark_used(<uint32_t> block, TAKEN)
            out[m] = block
            m += 1
            block += 1
        return m

    cdef uint64_t _free_run(self, uint64_t want, uint64_t* start) noexcept nogil:
        # The first run of `want` free blocks, or else the longest.
        cdef uint64_t words = (self.top + 63) // 64, w, bits, run = 0, best = 0
        cdef int b, same
        if self.free == 0:
            return 0
        for w in range(words):
            bits = self.free_bits[w]
            if bits == 0:
                run = 0
                continue
            b = 0
            while b < 64:
                if bits >> b & 1:
                    same = __builtin_ctzll(~(bits >> b)) if ~(bits >> b) else 64
                    run += same
                    b += same
                    if run > best:
                        best, start[0] = run, w * 64 + b - run
                        if best >= want:
                            return best
                else:
                    run = 0
                    b += __builtin_ctzll(bits >> b) if bits >> b else 64
        return best

    def install(self, const uint8_t[:, ::1] packed, const int64_t[::1] blocks, const uint64_t[::1] sequences,
                const uint32_t[::1] checksums, *, bint unchecked=False, bint pin=False) -> Int64s:
        """Have allocated blocks hold these keys from now on; the blocks that held one of them before, now forgotten."""
        cdef Py_ssize_t n = packed.shape[0], i, m = 0
        cdef const key_t* keys = _keys(packed)
        cdef uint64_t hashed
        cdef int64_t old
        cdef uint16_t pins
        if not n == blocks.shape[0] == sequences.shape[0] == checksums.shape[0]:
            raise ValueError("expected a block, a sequence and a checksum for each key")
        replaced = np.empty(n, np.int64)
        cdef int64_t[::1] out = replaced
        for i in range(n):
            self._check_state(blocks[i], TAKEN)
        for i in range(n):
            hashed = self._hash(keys[i].at, keys[i].length)
            old = self._find(keys[i].at, keys[i].length, hashed)
            pins = 0
            if old >= 0:
                pins = self._let_go(<uint32_t> old, CLEARED)
                out[m] = old
                m += 1
            if pin and pins < UINT16_MAX:
                pins += 1
            self.clock += 1
            if self._hold(<uint32_t> blocks[i], keys[i].at, keys[i].length, hashed, sequences[i], checksums[i],
                          unchecked, self.clock, pins) < 0:
                raise MemoryError("no memory for the tables of the index")
            self.sequence = max(self.sequence, sequences[i])
        for i in range(n - 1, -1, -1):  # of a prefix, the end goes first
            if self._is_held(blocks[i]):
                self._touch(<uint32_t> blocks[i])
        return replaced[:m]

    def confine(self, uint64_t limit) -> None:
        """Use no block of number `limit` or more from now on; none of them is in use."""
        cdef uint64_t block
        if not 1 <= limit <= MAX_BLOCKS:
            raise ValueError(f"an index holds 1 to {MAX_BLOCKS} blocks, not {limit}")
        for block in range(limit, self.top):
            self._check_state(block, FREE)
        for block in range(limit, self.top):
            self._mark_used(<uint32_t> block, FREE)
        self.top = min(self.top, limit)
        self.limit = limit

    # -- records

    def records_of_sets(self, const uint8_t[:, ::1] packed, const int64_t[::1] blocks, const uint32_t[::1] checksums,
                        uint64_t sequence, uint32_t salt, *, bint unchecked=False) -> bytearray:
        """Give the records that say what these blocks hold from now on, numbered from `sequence` on."""
        cdef Py_ssize_t n = packed.shape[0], i
        cdef const key_t* keys = _keys(packed)
        cdef record_t* record
        if not n == blocks.shape[0] == checksums.shape[0]:
            raise ValueError("expected a block and a checksum for each key")
        records = bytearray(n * sizeof(record_t))
        cdef char* out = records
        for i in range(n):
            record = <record_t*> out + i
            memcpy(record.key, keys[i].at, WHOLE)
            record.kind, record.length, record.flags = K_SET, keys[i].length, <uint16_t> unchecked
            record.block, record.checksum, record.sequence = <uint32_t> blocks[i], checksums[i], sequence + i
            _seal(record, salt)
        return records

    def records_of_clears(self, const int64_t[::1] blocks, uint64_t sequence, uint32_t salt) -> bytearray:
        """Give the records that say that these blocks hold nothing from now on, numbered from `sequence` on."""
        cdef Py_ssize_t n = blocks.shape[0], i
        cdef record_t* record
        records = bytearray(n * sizeof(record_t))
        cdef char* out = records
        for i in range(n):
            record = <record_t*> out + i
            record.kind, record.block, record.sequence = K_CLEAR, <uint32_t> blocks[i], sequence + i
            _seal(record, salt)
        return records

    def export(self, uint64_t start, uint64_t stop, uint32_t salt) -> bytearray:
        """Give the records of what the blocks of a range hold, with when they were used, for a snapshot."""
        cdef uint64_t block
        cdef Py_ssize_t n = 0
        cdef record_t* record
        cdef entry_t* entry
        stop = min(stop, self.top)
        records = bytearray((stop - start if stop > start else 0) * sizeof(record_t))
        cdef char* out = records
        for block in range(start, stop):
            entry = &self.entries[block]
            if (entry.state & 0x7F) != HELD:
                continue
            record = <record_t*> out + n
            memcpy(record.key, entry.key, WHOLE)
            record.kind, record.length, record.flags = K_SET, entry.length, entry.state >> 7
            record.block, record.checksum, record.sequence = <uint32_t> block, entry.checksum, entry.sequence
            record.tick = (<uint64_t> entry.tick_high << 32) + entry.tick_low
            _seal(record, salt)
            n += 1
        del records[n * sizeof(record_t):]
        return records

    def apply(self, const uint8_t[::1] data, uint32_t salt, uint64_t limit, *, bint alone=False,
              bint snapshot=False, bint wary=False) -> tuple[int, int, int, list[tuple[int, int, bytes]]]:
        """Follow records of a file.

        Gives how many records were looked at, how many of them are damaged, the number behind the last one that is
        not, and the notes among them as (kind, flags, payload). A record of a block of number `limit` or more is a
        damaged one. With `wary` nothing behind a damaged one is looked at: it may be one that is being written. With
        `alone` nobody else may use the index meanwhile, the GIL is let go, and the order of use is
        not kept: `settle` is called when all records are in.
        """
        cdef uint64_t n = data.shape[0] // sizeof(record_t), good = 0, damaged = 0, i
        cdef const record_t* at = <const record_t*> &data[0] if n else NULL
        cdef int status = 0
        notes = []
        limit = min(limit, self.limit)
        if alone:
            self.ordered = False
        i = 0
        while i < n:
            if wary and damaged:
                break
            if alone:
                with nogil:
                    status = self._follow(at, n, salt, limit, snapshot, wary, &i, &good, &damaged)
            else:
                status = self._follow(at, n, salt, limit, snapshot, wary, &i, &good, &damaged)
            if status < 0:
                raise MemoryError("no memory for the index")
            if status > 0:
                notes.append((at[i].kind, at[i].flags, (<const char*> at[i].key)[:min(at[i].length, WHOLE)]))
                i += 1
        return i, damaged, good, notes

    cdef int _follow(self, const record_t* at, uint64_t n, uint32_t salt, uint64_t limit, bint snapshot,
                     bint wary, uint64_t* i, uint64_t* good, uint64_t* damaged) noexcept nogil:
        # As far as the next note (1), the end (0), or the end of memory (-1).
        cdef const record_t* record
        while i[0] < n:
            record = at + i[0]
            if not _sealed(record, salt) or not self._plausible(record, limit):
                damaged[0] += 1
                if wary:
                    return 0
                i[0] += 1
                continue
            good[0] = i[0] + 1
            self.sequence = max(self.sequence, record.sequence)
            if record.kind == K_SET:
                if self._apply_set(record, snapshot) < 0:
                    return -1
            elif record.kind == K_CLEAR:
                if self._apply_clear(record) < 0:
                    return -1
            else:
                return 1
            i[0] += 1
        return 0

    cdef inline bint _plausible(self, const record_t* record, uint64_t limit) noexcept nogil:
        if record.kind == K_SET:
            return record.block < limit and 1 <= record.length <= LONG
        if record.kind == K_CLEAR:
            return record.block < limit
        return K_OPENED <= record.kind <= K_NEXT and record.length <= WHOLE

    cdef int _apply_set(self, const record_t* record, bint snapshot) noexcept nogil:
        cdef uint64_t hashed = self._hash(record.key, record.length), tick
        cdef int64_t old
        cdef entry_t* entry
        if self._reach(<uint64_t> record.block + 1) < 0:
            return -1
        entry = &self.entries[record.block]
        old = self._find(record.key, record.length, hashed)
        if old >= 0 and self.entries[old].sequence > record.sequence:
            return 0
        if old >= 0 and old != record.block:
            # The key has left that block, even where this one holds something else by now.
            self._let_go(<uint32_t> old, FREE)
            self._mark_free(<uint32_t> old)
            self.entries[old].sequence = record.sequence
        if entry.sequence >= record.sequence:
            return 0
        if self._is_held(record.block):
            self._let_go(record.block, FREE)
            self._mark_free(record.block)
        self._mark_used(record.block, TAKEN)
        if snapshot:
            tick = record.tick & LAST_TICK
            self.clock = max(self.clock, tick)
        else:
            self.clock += 1
            tick = self.clock
        return self._hold(record.block, record.key, record.length, hashed, record.sequence, record.checksum,
                          record.flags & 1, tick, 0)

    cdef int _apply_clear(self, const record_t* record) noexcept nogil:
        cdef entry_t* entry
        if self._reach(<uint64_t> record.block + 1) < 0:
            return -1
        entry = &self.entries[record.block]
        if entry.sequence >= record.sequence:
            return 0
        if self._is_held(record.block):
            self._let_go(record.block, FREE)
            self._mark_free(record.block)
        entry.sequence = record.sequence
        return 0

    def settle(self) -> None:
        """Work out the order of use, after `apply` with `alone`."""
        cdef uint64_t block
        cdef Py_ssize_t m = 0
        if self.ordered:
            return
        blocks, ticks = np.empty(self.count, np.uint32), np.empty(self.count, np.uint64)
        cdef uint32_t[::1] block_at = blocks
        cdef uint64_t[::1] tick_at = ticks
        for block in range(self.top):
            if self._is_held(block):
                block_at[m] = <uint32_t> block
                tick_at[m] = (<uint64_t> self.entries[block].tick_high << 32) + self.entries[block].tick_low
                m += 1
        blocks = blocks[np.argsort(ticks)]
        block_at = blocks
        self.newest = self.oldest = NIL
        for m in range(block_at.shape[0]):
            self._link(block_at[m])
        self.ordered = True


cdef inline void _place(shard_t* shard, bucket_t bucket) noexcept nogil:
    cdef uint32_t at = bucket.tag & shard.mask
    while shard.at[at].block:
        at = (at + 1) & shard.mask
    shard.at[at] = bucket
