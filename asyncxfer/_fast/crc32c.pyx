# cython: language_level=3, boundscheck=False, wraparound=False, auto_pickle=False, autotestdict=False
"""CRC-32C of a buffer. Native code includes crc32c.h instead.

References
----------
RFC 3720, Internet Small Computer Systems Interface, appendix B.4.
"""

from libc.stdint cimport uint32_t

cdef extern from "crc32c.h" nogil:
    uint32_t axf_crc32c(uint32_t crc, const void* data, size_t n)
    uint32_t axf_crc32c_by_table(uint32_t crc, const unsigned char* data, size_t n)
    int axf_crc32c_hardware

HARDWARE = axf_crc32c_hardware != 0


def crc32c(const unsigned char[::1] data, uint32_t crc=0, *, bint tables=False) -> int:
    """Give the checksum of `data`, behind bytes whose checksum is `crc`; by `tables` also where there is hardware."""
    cdef size_t n = data.shape[0]
    cdef const unsigned char* at = &data[0] if n else NULL
    with nogil:
        crc = ~axf_crc32c_by_table(~crc, at, n) if tables else axf_crc32c(crc, at, n)
    return crc
