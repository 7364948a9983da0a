"""Notifications that found the peer's socket full."""

from asyncxfer._fast.completion cimport op_t
from asyncxfer._fast.native cimport axf_link


cdef int outbox_post(axf_link* link, char kind, const char* tag, size_t n, op_t* op) noexcept nogil
cdef void outbox_wake() noexcept nogil
