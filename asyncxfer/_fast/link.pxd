"""One connection between two agents, as native code sees it."""

from libc.stdint cimport uint32_t

from asyncxfer._fast.native cimport axf_gate, axf_link, axf_page


cdef class Link:
    cdef axf_link c
    cdef object _page
    cdef bint counted
    cdef public object post


cdef class GatePage:
    cdef axf_page* page
    cdef object mapping
    cdef readonly int fd

    cdef axf_gate* gate(self, uint32_t slot) except NULL
