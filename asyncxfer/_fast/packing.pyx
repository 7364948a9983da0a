# cython: language_level=3, boundscheck=False, wraparound=False, auto_pickle=False, autotestdict=False
"""Rows and bytes in a line: what goes into a message, and comes out of it at the other side.

The sender knows its rows as a chunk of matched pairs; the receiver knows them as a table that came with the message,
which it holds against its region before it touches anything. Memory that goes away under a copy is an error of that
copy. Who sends, and how, is not known here.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from asyncxfer._fast.engine cimport axf_chunk, axf_pair, copy_bytes
from asyncxfer._fast.ucxport cimport axf_ucx_row

import numpy as np

from asyncxfer._errors import DescriptorError


cdef struct walk_t:             # over the rows of a chunk
    const axf_pair* pair
    uint64_t row, skip, left
    char* local                 # of the row that was stepped onto
    uint64_t remote, n


cdef inline void start(walk_t* w, const axf_pair* pairs, const axf_chunk* chunk) noexcept nogil:
    w.pair, w.row, w.skip, w.left = pairs + chunk.pair, chunk.row, chunk.skip, chunk.nbytes


cdef inline bint step(walk_t* w) noexcept nogil:
    if w.left == 0:
        return False
    w.n = min(w.pair.length - w.skip, w.left)
    w.local = <char*>w.pair.local + w.pair.local_stride * <int64_t>w.row + w.skip
    w.remote = w.pair.remote + <uint64_t>(w.pair.remote_stride * <int64_t>w.row) + w.skip
    w.left -= w.n
    return True


cdef inline void turn_over(walk_t* w) noexcept nogil:
    w.skip = 0
    w.row += 1
    if w.row == w.pair.count:
        w.row = 0
        w.pair += 1


# ---- the sender's side -----------------------------------------------------------------------------------------------

cdef uint32_t count_rows(const axf_pair* pairs, const axf_chunk* chunk) noexcept nogil:
    """How many rows a chunk has, cut ones included."""
    cdef walk_t w
    cdef uint32_t rows = 0
    start(&w, pairs, chunk)
    while step(&w):
        rows += 1
        turn_over(&w)
    return rows


cdef void describe_rows(const axf_pair* pairs, const axf_chunk* chunk, axf_ucx_row* rows) noexcept nogil:
    """Writes the table of a chunk's remote rows, whose addresses are offsets in their segments."""
    cdef walk_t w
    start(&w, pairs, chunk)
    while step(&w):
        rows.offset, rows.nbytes, rows.segment = w.remote, <uint32_t>w.n, w.pair.remote_segment
        rows += 1
        turn_over(&w)


cdef int gather_rows(const axf_pair* pairs, const axf_chunk* chunk, char* data) noexcept nogil:
    """Copies a chunk's local rows into a line: 0 or an errno."""
    cdef walk_t w
    cdef int error
    start(&w, pairs, chunk)
    while step(&w):
        error = copy_bytes(data, w.local, w.n)
        if error:
            return error
        data += w.n
        turn_over(&w)
    return 0


cdef int scatter_rows(const axf_pair* pairs, const axf_chunk* chunk, const char* data) noexcept nogil:
    """Copies a line into a chunk's local rows: 0 or an errno."""
    cdef walk_t w
    cdef int error
    start(&w, pairs, chunk)
    while step(&w):
        error = copy_bytes(w.local, data, w.n)
        if error:
            return error
        data += w.n
        turn_over(&w)
    return 0


# ---- the receiver's side ---------------------------------------------------------------------------------------------

cdef int check_rows(
    const axf_ucx_row* rows, uint32_t count, const uint64_t* sizes, uint32_t nsegments, uint64_t* total
) noexcept nogil:
    """Whether all rows of a table lie in the segments of a region, and how many bytes they have."""
    cdef uint64_t size
    cdef uint32_t i
    total[0] = 0
    for i in range(count):
        if rows[i].segment >= nsegments:
            return 0
        size = sizes[rows[i].segment]
        if rows[i].nbytes > size or rows[i].offset > size - rows[i].nbytes:
            return 0
        total[0] += rows[i].nbytes
    return 1


cdef int gather_described(const axf_ucx_row* rows, uint32_t count, const uint64_t* bases, char* data) noexcept nogil:
    """Copies the rows of a table that was checked into a line: 0 or an errno."""
    cdef uint32_t i
    cdef int error
    for i in range(count):
        error = copy_bytes(data, <const char*>bases[rows[i].segment] + rows[i].offset, rows[i].nbytes)
        if error:
            return error
        data += rows[i].nbytes
    return 0


cdef int scatter_described(
    const axf_ucx_row* rows, uint32_t count, const uint64_t* bases, const char* data
) noexcept nogil:
    """Copies a line into the rows of a table that was checked: 0 or an errno."""
    cdef uint32_t i
    cdef int error
    for i in range(count):
        error = copy_bytes(<char*>bases[rows[i].segment] + rows[i].offset, data, rows[i].nbytes)
        if error:
            return error
        data += rows[i].nbytes
    return 0


# ---- for tests -------------------------------------------------------------------------------------------------------

def carry(pairs, chunk, sizes, bases) -> None:
    """Do what two sides do with a put of a chunk, within this process.

    Parameters
    ----------
    pairs : (n,) PAIR
        Local addresses are absolute, remote ones offsets.
    chunk : (4,) uint64
        Pair, row of it, bytes into that, and bytes in all.
    sizes, bases : (segments,) uint64
        Of the remote region.

    Raises
    ------
    DescriptorError
        A row lies outside.
    """
    cdef const unsigned char[::1] raw = np.ascontiguousarray(pairs).view(np.uint8)
    cdef const uint64_t[::1] where = np.ascontiguousarray(chunk, dtype=np.uint64)
    cdef const uint64_t[::1] z = np.ascontiguousarray(sizes, dtype=np.uint64)
    cdef const uint64_t[::1] b = np.ascontiguousarray(bases, dtype=np.uint64)
    cdef const axf_pair* p = <const axf_pair*>&raw[0]
    cdef axf_chunk c
    cdef uint64_t total = 0
    c.pair, c.row, c.skip, c.nbytes = where[0], where[1], where[2], where[3]
    cdef uint32_t count = count_rows(p, &c)
    cdef unsigned char[::1] table = np.zeros(max(count, 1) * sizeof(axf_ucx_row), np.uint8)
    cdef unsigned char[::1] line = np.zeros(max(c.nbytes, 1), np.uint8)
    cdef axf_ucx_row* rows = <axf_ucx_row*>&table[0]
    describe_rows(p, &c, rows)
    if not check_rows(rows, count, &z[0], <uint32_t>z.shape[0], &total) or total != c.nbytes:
        raise DescriptorError("a row lies outside its segment")
    gather_rows(p, &c, <char*>&line[0])
    scatter_described(rows, count, &b[0], <const char*>&line[0])
