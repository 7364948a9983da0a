# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: auto_pickle=False, autotestdict=False
"""Rows taken as blocks of equal size, one after the other in stream order: which rows some blocks are, their checksums.

It knows rows and, for checksums, where their segments lie in memory; whoever calls has checked that the rows are
inside the segments, and keeps the memory.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t

import numpy as np

from asyncxfer._fast.descriptors cimport RunView, run_t

from asyncxfer._fast import descriptors

Runs = Int64s = Uint32s = Uint64s = np.ndarray

cdef extern from "crc32c.h" nogil:
    uint32_t axf_crc32c(uint32_t crc, const void* data, size_t n)


cdef inline Py_ssize_t _first_beyond(const uint64_t* ends, Py_ssize_t n, uint64_t at) noexcept nogil:
    # The first run that ends behind byte `at` of the stream.
    cdef Py_ssize_t low = 0, high = n, middle
    while low < high:
        middle = (low + high) // 2
        if ends[middle] <= at:
            low = middle + 1
        else:
            high = middle
    return low


cdef Py_ssize_t _cut(RunView runs, const uint64_t* ends, uint64_t begin, uint64_t left, run_t* out) noexcept nogil:
    # The rows of `left` bytes of the stream from byte `begin` on; how many runs that are. Counts only without `out`.
    cdef Py_ssize_t r = _first_beyond(ends, runs.size, begin), n = 0
    cdef uint64_t at, row, skip, take, rows
    cdef const run_t* run
    while left > 0:
        run = &runs.at[r]
        at = begin - (ends[r] - run.length * run.count)
        row, skip = at // run.length, at % run.length
        if skip or left < run.length:
            rows, take = 1, min(run.length - skip, left)
        else:
            rows, take = min(left // run.length, run.count - row), run.length
        if out != NULL:
            out[n].offset = run.offset + row * <uint64_t> run.stride + skip
            out[n].length, out[n].segment = take, run.segment
            out[n].count, out[n].stride = <uint32_t> rows, run.stride if rows > 1 else 0
        n += 1
        begin += rows * take
        left -= rows * take
        while r < runs.size and ends[r] <= begin:
            r += 1
    return n


def pick(runs: Runs, uint64_t block_bytes, const int64_t[::1] blocks) -> Runs:
    """Give the rows of some blocks, in the order in which they are named."""
    cdef RunView view = RunView(runs)
    cdef Py_ssize_t i, n = 0
    cdef uint64_t total = 0
    if block_bytes == 0:
        raise ValueError("a block has at least one byte")
    ends = np.empty(view.size, np.uint64)
    cdef uint64_t[::1] end = ends
    for i in range(view.size):
        total += view.at[i].length * view.at[i].count
        end[i] = total
    for i in range(blocks.shape[0]):
        if not 0 <= blocks[i] < <int64_t> (total // block_bytes):
            raise IndexError(f"block {blocks[i]} is not among the {total // block_bytes} of these rows")
    cdef const uint64_t* ends_at = &end[0] if view.size else NULL
    with nogil:
        for i in range(blocks.shape[0]):
            n += _cut(view, ends_at, <uint64_t> blocks[i] * block_bytes, block_bytes, NULL)
    picked = np.empty(n, descriptors.RUN)
    cdef RunView out = RunView(picked)
    with nogil:
        n = 0
        for i in range(blocks.shape[0]):
            n += _cut(view, ends_at, <uint64_t> blocks[i] * block_bytes, block_bytes, out.at + n)
    return picked


def slots(const int64_t[::1] blocks, uint64_t block_bytes, uint64_t slab_blocks) -> Runs:
    """Give the rows of blocks in their slabs, of `slab_blocks` blocks each: one row a block."""
    cdef Py_ssize_t i
    if block_bytes == 0 or slab_blocks == 0:
        raise ValueError("a block has at least one byte, a slab at least one block")
    rows = np.zeros(blocks.shape[0], descriptors.RUN)
    cdef RunView out = RunView(rows)
    for i in range(blocks.shape[0]):
        if blocks[i] < 0:
            raise IndexError(f"there is no block {blocks[i]}")
        out.at[i].offset = <uint64_t> blocks[i] % slab_blocks * block_bytes
        out.at[i].length, out.at[i].count = block_bytes, 1
    return rows


def checksums(runs: Runs, const uint64_t[::1] addresses, uint64_t block_bytes) -> Uint32s:
    """Give the CRC32C of each block, read where the rows lie: segment k of them begins at the k-th address."""
    cdef RunView view = RunView(runs)
    cdef Py_ssize_t i, n = 0
    cdef uint64_t k, total = 0, at, left, take, room = block_bytes
    cdef uint32_t crc = 0
    cdef const run_t* run
    if block_bytes == 0:
        raise ValueError("a block has at least one byte")
    for i in range(view.size):
        if view.at[i].segment >= <uint64_t> addresses.shape[0]:
            raise IndexError(f"run {i} names segment {view.at[i].segment} of {addresses.shape[0]}")
        total += view.at[i].length * view.at[i].count
    if total % block_bytes:
        raise ValueError(f"{total} bytes of rows are no whole blocks of {block_bytes} bytes")
    found = np.empty(total // block_bytes, np.uint32)
    cdef uint32_t[::1] out = found
    with nogil:
        for i in range(view.size):
            run = &view.at[i]
            for k in range(run.count):
                at = addresses[run.segment] + run.offset + k * <uint64_t> run.stride
                left = run.length
                while left > 0:
                    take = min(left, room)
                    crc = axf_crc32c(crc, <const char*> at, take)
                    at += take
                    left -= take
                    room -= take
                    if room == 0:
                        out[n] = crc
                        n += 1
                        crc, room = 0, block_bytes
    return found
