# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: auto_pickle=False, autotestdict=False
"""Matched rows in fewer, larger pieces, for backends that pay for each row and promise no order among them.

Two rows are one where the second begins at the end of the first on both sides. In a list that is ascending on either
side, and does not overlap there, these are neighbours, and one pass finds them. Any other list is sorted first, by
both segments and the remote offset: a radix sort over those bits alone in which rows differ, so that blocks of 4 KiB in
a few hundred MiB take two passes.

It knows nothing of streams: the bytes of the result come in another order than those of the lists, so how far a
transfer has come can be said in bytes, and no longer in rows.
"""

from libc.stdint cimport UINT64_MAX, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

import numpy as np

from asyncxfer._fast.descriptors cimport PairView, pair_t

from asyncxfer._fast import descriptors

Pairs = np.ndarray

cdef enum:
    DIGIT_BITS = 8
    DIGITS = 1 << DIGIT_BITS

cdef extern from *:
    int __builtin_ctzll(unsigned long long bits) noexcept nogil


cdef struct place_t:
    uint64_t key
    uint64_t at  # which row


cdef inline bint _dense(const pair_t* pair) noexcept nogil:
    return (
        pair.count > 1
        and <uint64_t> pair.local_stride == pair.length
        and <uint64_t> pair.remote_stride == pair.length
    )


cdef inline bint _single(const pair_t* pair) noexcept nogil:
    return pair.count == 1 or _dense(pair)


cdef inline uint64_t _nbytes(const pair_t* pair) noexcept nogil:
    return pair.length * pair.count


cdef inline bint _touch(const pair_t* last, const pair_t* next) noexcept nogil:
    cdef uint64_t nbytes = _nbytes(last)
    return (
        last.remote + nbytes == next.remote
        and last.local + nbytes == next.local
        and last.remote_segment == next.remote_segment
        and last.local_segment == next.local_segment
    )


cdef inline bint _follows(uint64_t offset, uint64_t nbytes, uint32_t segment, uint64_t next, uint32_t next_segment) noexcept nogil:
    return segment < next_segment or (segment == next_segment and offset <= next and next - offset >= nbytes)


cdef Py_ssize_t _gather(const pair_t* pairs, Py_ssize_t size, place_t* places, bint* ordered, bint* dense) noexcept nogil:
    # Note the single rows. They are in order when nothing can lie between two that touch.
    cdef bint by_local = True, by_remote = True
    cdef const pair_t* last = NULL
    cdef const pair_t* pair
    cdef Py_ssize_t i, n = 0
    for i in range(size):
        pair = pairs + i
        if not _single(pair):
            continue
        dense[0] |= pair.count > 1
        if last != NULL:
            by_remote &= _follows(last.remote, _nbytes(last), last.remote_segment, pair.remote, pair.remote_segment)
            by_local &= _follows(last.local, _nbytes(last), last.local_segment, pair.local, pair.local_segment)
        places[n].at = i
        n += 1
        last = pair
    ordered[0] = by_local or by_remote
    return n


cdef place_t* _sort(place_t* places, place_t* spare, Py_ssize_t n) noexcept nogil:
    # Stable, least digit first; gives whichever of the two arrays the outcome is in.
    cdef uint64_t differ = 0, total, count
    cdef uint64_t[DIGITS] counts
    cdef Py_ssize_t i
    cdef int shift, digit
    for i in range(1, n):
        differ |= places[i].key ^ places[0].key
    while differ:
        shift = __builtin_ctzll(differ)
        memset(counts, 0, sizeof(counts))
        for i in range(n):
            counts[(places[i].key >> shift) & (DIGITS - 1)] += 1
        total = 0
        for digit in range(DIGITS):
            count = counts[digit]
            counts[digit] = total
            total += count
        for i in range(n):
            digit = (places[i].key >> shift) & (DIGITS - 1)
            spare[counts[digit]] = places[i]
            counts[digit] += 1
        places, spare = spare, places
        differ &= UINT64_MAX << shift << DIGIT_BITS
    return places


cdef place_t* _arrange(const pair_t* pairs, place_t* places, place_t* spare, Py_ssize_t n) noexcept nogil:
    # By segments, then by remote offset: the lesser key first.
    cdef place_t* first
    cdef Py_ssize_t i
    for i in range(n):
        places[i].key = pairs[places[i].at].remote
    first = _sort(places, spare, n)
    spare = spare if first == places else places
    for i in range(n):
        first[i].key = <uint64_t> pairs[first[i].at].remote_segment << 32 | pairs[first[i].at].local_segment
    return _sort(first, spare, n)


cdef Py_ssize_t _joints(const pair_t* pairs, const place_t* places, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i, joints = 0
    for i in range(1, n):
        joints += _touch(pairs + places[i - 1].at, pairs + places[i].at)
    return joints


cdef void _write(const pair_t* pairs, Py_ssize_t size, const place_t* places, Py_ssize_t n, pair_t* out) noexcept nogil:
    cdef Py_ssize_t i, k = -1
    cdef const pair_t* pair
    for i in range(n):
        pair = pairs + places[i].at
        if i and _touch(pairs + places[i - 1].at, pair):
            out[k].length += _nbytes(pair)
            continue
        k += 1
        out[k] = pair[0]
        out[k].length = _nbytes(pair)
        out[k].count = 1
        out[k].local_stride = out[k].remote_stride = 0
    for i in range(size):
        if not _single(pairs + i):
            k += 1
            out[k] = pairs[i]


def consolidate(pairs):
    cdef PairView view = PairView(pairs), out
    cdef Py_ssize_t n, joints
    cdef bint ordered = True, dense = False
    cdef place_t* arranged
    cdef place_t* places
    if view.size == 0:
        return pairs
    places = <place_t*> malloc(2 * view.size * sizeof(place_t))
    if places == NULL:
        raise MemoryError(f"no memory to sort {view.size} rows")
    try:
        with nogil:
            n = _gather(view.at, view.size, places, &ordered, &dense)
            arranged = places if ordered else _arrange(view.at, places, places + view.size, n)
            joints = _joints(view.at, arranged, n)
        if not joints and not dense:
            return pairs
        array = np.empty(view.size - joints, descriptors.PAIR)
        out = PairView(array)
        with nogil:
            _write(view.at, view.size, arranged, n, out.at)
    finally:
        free(places)
    return array
