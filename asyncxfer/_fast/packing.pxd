"""Rows and bytes in a line: what goes into a message, and comes out of it."""

from libc.stdint cimport uint32_t, uint64_t

from asyncxfer._fast.engine cimport axf_chunk, axf_pair
from asyncxfer._fast.ucxport cimport axf_ucx_row


cdef uint32_t count_rows(const axf_pair* pairs, const axf_chunk* chunk) noexcept nogil
cdef void describe_rows(const axf_pair* pairs, const axf_chunk* chunk, axf_ucx_row* rows) noexcept nogil
cdef int gather_rows(const axf_pair* pairs, const axf_chunk* chunk, char* data) noexcept nogil
cdef int scatter_rows(const axf_pair* pairs, const axf_chunk* chunk, const char* data) noexcept nogil
cdef int check_rows(
    const axf_ucx_row* rows, uint32_t count, const uint64_t* sizes, uint32_t nsegments, uint64_t* total
) noexcept nogil
cdef int gather_described(const axf_ucx_row* rows, uint32_t count, const uint64_t* bases, char* data) noexcept nogil
cdef int scatter_described(
    const axf_ucx_row* rows, uint32_t count, const uint64_t* bases, const char* data
) noexcept nogil
