"""The copy engine: prepared work, and the threads that do it."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from asyncxfer._fast.completion cimport Prepared
from asyncxfer._fast.native cimport axf_link


cdef extern from "rows.h" nogil:
    ctypedef struct axf_pair:
        uint64_t local, remote, length
        int64_t local_stride, remote_stride
        uint32_t count, local_segment, remote_segment, reserved

    ctypedef struct axf_chunk:
        uint64_t pair, row, skip, nbytes


cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void* iov_base
        size_t iov_len


cdef int scatter(const iovec* iov, const void* source, uint64_t nbytes, bint stream) noexcept nogil
cdef int guarded(void (*call)(void*) noexcept nogil, void* argument) noexcept nogil
cdef int copy_bytes(void* to, const void* source, size_t n) noexcept nogil


cdef struct work_t:
    axf_pair* pairs             # absolute addresses
    axf_chunk* chunks
    uint64_t npairs, nbytes, rows
    uint32_t nchunks
    int put, attach, stream
    int small                   # ends sooner on the caller than a thread would wake
    axf_link* link              # NULL where both sides are this agent's own
    uint32_t slot, epoch


cdef class Work(Prepared):
    cdef work_t w
    cdef object link
    cdef object keep

    cdef int place(self, const axf_pair* given, const uint64_t[::1] local, const uint64_t[::1] remote) except -1
    cdef int cut(self, uint64_t most_bytes, uint64_t most_rows) except -1
