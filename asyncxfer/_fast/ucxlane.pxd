"""The initiating side over UCX."""

from asyncxfer._fast.engine cimport Work


from asyncxfer._fast.ucxflight cimport group_t, keys_t, lane_t


cdef class Group:
    cdef group_t* g
    cdef object ports
    cdef object mailbox
    cdef object link

    cdef lane_t* lane(self, int index) except NULL


cdef class Keys:
    cdef keys_t* k
    cdef readonly Group group
    cdef list packed


cdef class UcxWork(Work):
    cdef readonly Group group
    cdef Keys keys
    cdef void** memories
    cdef int nmemories
    cdef bint packed
    cdef object held_memories
