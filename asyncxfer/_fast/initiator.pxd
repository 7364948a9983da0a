"""The initiating side of data connections."""

from asyncxfer._fast.engine cimport Work


cdef struct group_t             # the module's own
cdef struct lane_t


cdef class Group:
    cdef group_t* g
    cdef object mailbox
    cdef object link
    cdef dict keep              # what encrypts each connection

    cdef int detach(self, lane_t* lane) except -1


cdef class NetWork(Work):
    cdef readonly Group group
    cdef bint checked
