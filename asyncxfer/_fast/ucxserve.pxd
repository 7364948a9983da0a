"""The target's side over UCX."""

cdef struct session_t           # the module's own


cdef class UcxSession:
    cdef session_t* s
    cdef object ports
    cdef object mailbox
    cdef object page
