# cython: language_level=3, boundscheck=False, wraparound=False, auto_pickle=False, autotestdict=False
"""Copies between rows of a device's memory and one stretch of host memory, asked for without holding the GIL.

The driver's function is given; nothing here knows which driver. A call for each row from Python would take and give back
the GIL as often, and wait for it each time behind whoever has it.
"""

from libc.stdint cimport uint64_t

ctypedef int (*copy_t)(uint64_t target, uint64_t source, size_t nbytes, void* stream) noexcept nogil


def copy_rows(uint64_t function, const uint64_t[:, ::1] rows, uint64_t host, uint64_t stream, *, bint to_device) -> int:
    """Ask for a copy of each row, on a stream; what the driver said to the last: 0, or the first error.

    Parameters
    ----------
    function : int
        Address of ``int copy(target, source, nbytes, stream)``.
    rows : (n, 2) uint64
        Addresses on the device, and lengths in bytes.
    host : int
        Where the bytes of all rows lie on the host, one behind the other.
    stream : int
    to_device : bool
        To the rows, and not from them.
    """
    cdef copy_t copy = <copy_t><void*>function
    cdef int status = 0
    cdef Py_ssize_t i
    if rows.shape[1] != 2:
        raise ValueError(f"rows of {rows.shape[1]} numbers; expected address and length")
    with nogil:
        for i in range(rows.shape[0]):
            if to_device:
                status = copy(rows[i, 0], host, rows[i, 1], <void*>stream)
            else:
                status = copy(host, rows[i, 0], rows[i, 1], <void*>stream)
            if status:
                break
            host += rows[i, 1]
    return status
