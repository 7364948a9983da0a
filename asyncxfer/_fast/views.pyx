# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
# cython: auto_pickle=False, autotestdict=False
"""Memory at addresses as buffers of bytes, for what is written in Python and reads or writes it by buffers."""

from cpython.buffer cimport PyBUF_READ, PyBUF_WRITE
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.stdint cimport uint64_t


def views(const uint64_t[::1] addresses, const uint64_t[::1] lengths, *, bint writable):
    cdef Py_ssize_t i
    cdef int mode = PyBUF_WRITE if writable else PyBUF_READ
    if addresses.shape[0] != lengths.shape[0]:
        raise ValueError(f"{addresses.shape[0]} addresses came with {lengths.shape[0]} lengths")
    return [
        PyMemoryView_FromMemory(<char*><size_t>addresses[i], <Py_ssize_t>lengths[i], mode)
        for i in range(addresses.shape[0])
    ]
