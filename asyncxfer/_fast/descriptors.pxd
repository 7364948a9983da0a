"""The packed rows of descriptor lists, for other Cython modules to cimport."""

from cpython.buffer cimport Py_buffer
from libc.stdint cimport int64_t, uint32_t, uint64_t


cdef struct run_t:
    # Rows k = 0 .. count - 1: bytes [offset + k * stride, + length) of one segment of a region.
    # The stride of a lone row (count 1) means nothing and is 0.
    uint64_t offset
    uint64_t length
    int64_t stride
    uint32_t count
    uint32_t segment


cdef struct pair_t:
    # Rows k = 0 .. count - 1: local bytes [local + k * local_stride, + length) against the remote ones.
    uint64_t local
    uint64_t remote
    uint64_t length
    int64_t local_stride
    int64_t remote_stride
    uint32_t count
    uint32_t local_segment
    uint32_t remote_segment
    uint32_t reserved


cdef class RunView:
    # Borrows the rows of a RUN array: `at[0 .. size)` is valid, without the GIL, while the view lives.
    cdef Py_buffer buffer
    cdef run_t* at
    cdef Py_ssize_t size


cdef class PairView:
    # The same for a PAIR array.
    cdef Py_buffer buffer
    cdef pair_t* at
    cdef Py_ssize_t size
