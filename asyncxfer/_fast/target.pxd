"""The serving side of data connections."""

from libc.stdint cimport uint32_t


cdef struct session_t           # the module's own
cdef struct region_t


cdef class Session:
    cdef session_t* z
    cdef object mailbox
    cdef object page
    cdef dict seats             # by index: the address of what is kept for a connection, and what encrypts it
    cdef void place(self, uint32_t slot, region_t* region)
