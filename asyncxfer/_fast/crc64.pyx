# cython: language_level=3, boundscheck=False, wraparound=False, auto_pickle=False, autotestdict=False
"""CRC-64/NVME of a buffer, whole or in pieces. How it is computed stands in crc64.h.

References
----------
NVM Express, NVM Command Set Specification, 64b CRC of the extended protection information formats.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint64_t

cdef extern from "crc64.h" nogil:
    uint64_t axf_crc64(uint64_t crc, const void* data, size_t n, int width)
    uint64_t axf_crc64_combine(uint64_t first, uint64_t second, uint64_t length)
    int axf_crc64_best

cdef size_t _LARGE = 64 << 10  # bytes from which on other threads run meanwhile

WIDTHS = tuple(width for width in (64, 16, 0) if width <= axf_crc64_best)


def crc64nvme(data, uint64_t crc=0, *, int width=axf_crc64_best) -> int:
    """Give the checksum of `data`, the bytes of any contiguous buffer, behind bytes whose checksum is `crc`.

    `width` is how many bytes an instruction takes, one of `WIDTHS`; 0 stands for tables.
    """
    if width != axf_crc64_best and width not in WIDTHS:
        raise ValueError(f"width {width} is not one that this processor has: {WIDTHS}")
    cdef Py_buffer view
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    cdef size_t n = view.len
    try:
        if n < _LARGE:
            return axf_crc64(crc, view.buf, n, width)
        with nogil:
            crc = axf_crc64(crc, view.buf, n, width)
        return crc
    finally:
        PyBuffer_Release(&view)


def combine(uint64_t crc1, uint64_t crc2, uint64_t nbytes2) -> int:
    """Give the checksum of two pieces in a row, from the checksum of each and the length of the second in bytes."""
    return axf_crc64_combine(crc1, crc2, nbytes2)
