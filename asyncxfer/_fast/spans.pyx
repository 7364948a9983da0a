# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: auto_pickle=False, autotestdict=False
"""Matched rows by the objects that they are of: stretches of one object each, and their memory as buffers.

Rows that follow one another in an object become one stretch, whatever their order in the lists. Knows no store, no key
and no transfer; segments and addresses have been checked before.
"""

from cpython.buffer cimport PyBUF_READ, PyBUF_WRITE
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, qsort

from asyncxfer._fast.descriptors cimport PairView, pair_t

import numpy as np

cdef struct row_t:
    uint64_t address, length, offset, end    # `end`: bytes of all rows up to this one, in the order of the stretches
    uint32_t segment
    uint32_t number                          # in stream order

cdef struct span_t:
    uint64_t offset, nbytes
    Py_ssize_t first, last
    uint32_t segment


cdef int _by_place(const void* a, const void* b) noexcept nogil:
    cdef const row_t* x = <const row_t*>a
    cdef const row_t* y = <const row_t*>b
    if x.segment != y.segment:
        return -1 if x.segment < y.segment else 1
    if x.offset != y.offset:
        return -1 if x.offset < y.offset else 1
    return -1 if x.number < y.number else 1


cdef class Spans:
    """Rows by their objects.

    Parameters
    ----------
    pairs : (n,) PAIR
    bases : (segments,) uint64
        Where the segments of the memory begin.
    near : bool
        The objects are the local side.
    same : (keys,) uint32 or None
        For each segment of the objects another that stands for the same object; None: each is its own.
    """

    cdef row_t* row
    cdef span_t* span
    cdef Py_ssize_t rows
    cdef Py_ssize_t spans

    def __cinit__(self, pairs, const uint64_t[::1] bases, *, bint near, const uint32_t[::1] same=None):
        cdef PairView view = PairView(pairs)
        cdef uint64_t total = 0
        cdef Py_ssize_t i
        for i in range(view.size):
            total += view.at[i].count
        if total >= <uint64_t>UINT32_LAST:
            raise ValueError(f"{total} rows are more than can be counted")
        self.rows = total
        self.row = <row_t*>malloc(max(total, 1) * sizeof(row_t))
        if self.row == NULL:
            raise MemoryError
        with nogil:
            self.fill(view, bases, near, same)
        self.span = <span_t*>malloc(max(self.spans, 1) * sizeof(span_t))
        if self.span == NULL:
            raise MemoryError
        with nogil:
            self.join()

    def __dealloc__(self):
        free(self.row)
        free(self.span)

    cdef void fill(self, PairView view, const uint64_t[::1] bases, bint near, const uint32_t[::1] same) noexcept nogil:
        cdef row_t* row = self.row
        cdef const pair_t* pair
        cdef uint32_t k, number = 0, segment
        cdef Py_ssize_t i
        cdef bint ordered = True
        cdef uint64_t end = 0
        for i in range(view.size):
            pair = view.at + i
            segment = pair.local_segment if near else pair.remote_segment
            if same is not None:
                segment = same[segment]
            for k in range(pair.count):
                row.segment = segment
                row.length = pair.length
                row.number = number
                if near:
                    row.offset = pair.local + k * <uint64_t>pair.local_stride
                    row.address = bases[pair.remote_segment] + pair.remote + k * <uint64_t>pair.remote_stride
                else:
                    row.offset = pair.remote + k * <uint64_t>pair.remote_stride
                    row.address = bases[pair.local_segment] + pair.local + k * <uint64_t>pair.local_stride
                ordered = ordered and (number == 0 or _by_place(row - 1, row) < 0)
                number += 1
                row += 1
        if not ordered:
            qsort(self.row, self.rows, sizeof(row_t), &_by_place)
        self.spans = 0
        for i in range(self.rows):
            end += self.row[i].length
            self.row[i].end = end
            if i == 0 or not self.follows(i):
                self.spans += 1

    cdef bint follows(self, Py_ssize_t i) noexcept nogil:
        cdef const row_t* before = self.row + i - 1
        return before.segment == before[1].segment and before.offset + before.length == before[1].offset

    cdef void join(self) noexcept nogil:
        cdef span_t* span = self.span - 1
        cdef Py_ssize_t i
        for i in range(self.rows):
            if i == 0 or not self.follows(i):
                span += 1
                span.segment, span.offset, span.nbytes, span.first = self.row[i].segment, self.row[i].offset, 0, i
            span.nbytes += self.row[i].length
            span.last = i + 1

    def __len__(self) -> int:
        return self.spans

    @property
    def chunks(self) -> int:
        """How many rows there are."""
        return self.rows

    def __getitem__(self, Py_ssize_t index) -> tuple[int, int, int]:
        """Segment, offset and bytes of a stretch."""
        if not 0 <= index < self.spans:
            raise IndexError(index)
        return self.span[index].segment, self.span[index].offset, self.span[index].nbytes

    def numbers(self, Py_ssize_t index) -> list[int]:
        """The places in stream order of the rows of a stretch."""
        cdef Py_ssize_t i
        if not 0 <= index < self.spans:
            raise IndexError(index)
        return [self.row[i].number for i in range(self.span[index].first, self.span[index].last)]

    def ends(self):
        """Where in the stream each row ends: (n,) uint64, bytes."""
        cdef Py_ssize_t i
        cdef uint64_t[::1] lengths
        array = np.empty(self.rows, np.uint64)
        lengths = array
        for i in range(self.rows):
            lengths[self.row[i].number] = self.row[i].length
        return np.cumsum(array, dtype=np.uint64)

    def buffers(self, Py_ssize_t index, uint64_t start, uint64_t nbytes, *, bint writable) -> list[memoryview]:
        """The memory of a part of a stretch, in order: `nbytes` from `start` of it on.

        They keep nothing alive: whoever asks has what the memory belongs to, for longer than these.
        """
        cdef uint64_t at, length
        cdef list found = []
        cdef row_t* row = self.at(index, start, nbytes)
        at = self.begin(index) + start
        while nbytes:
            length = min(row.end - at, nbytes)
            found.append(
                PyMemoryView_FromMemory(
                    <char*><size_t>(row.address + row.length - (row.end - at)), length, PyBUF_WRITE if writable else PyBUF_READ
                )
            )
            at += length
            nbytes -= length
            row += 1
        return found

    def places(self, Py_ssize_t index, uint64_t start, uint64_t nbytes):
        """The memory of a part of a stretch, in order, as addresses and lengths; neighbours are one: (n, 2) uint64."""
        cdef row_t* row = self.at(index, start, nbytes)
        cdef uint64_t at = self.begin(index) + start
        cdef uint64_t address, length
        cdef uint64_t[:, ::1] found
        cdef Py_ssize_t n = -1
        array = np.empty((self.span[index].last - (row - self.row), 2), np.uint64)
        found = array
        while nbytes:
            length = min(row.end - at, nbytes)
            address = row.address + row.length - (row.end - at)
            if n >= 0 and found[n, 0] + found[n, 1] == address:
                found[n, 1] += length
            elif length:
                n += 1
                found[n, 0], found[n, 1] = address, length
            at += length
            nbytes -= length
            row += 1
        return array[: n + 1]

    cdef uint64_t begin(self, Py_ssize_t index) noexcept:
        """How many bytes the stretches before this one have."""
        cdef row_t* first = self.row + self.span[index].first
        return first.end - first.length

    cdef row_t* at(self, Py_ssize_t index, uint64_t start, uint64_t nbytes) except NULL:
        """The row in which so many bytes from `start` of a stretch on begin."""
        cdef Py_ssize_t low, high, middle
        cdef uint64_t at
        if not 0 <= index < self.spans:
            raise IndexError(index)
        if start > self.span[index].nbytes or nbytes > self.span[index].nbytes - start:
            raise ValueError(f"{nbytes} bytes from {start} on are not in a stretch of {self.span[index].nbytes}")
        at = self.begin(index) + start
        low, high = self.span[index].first, self.span[index].last
        while low < high:  # the first row that ends behind `at`
            middle = (low + high) // 2
            if self.row[middle].end > at:
                high = middle
            else:
                low = middle + 1
        return self.row + low


cdef enum:
    UINT32_LAST = 0xFFFFFFFF
