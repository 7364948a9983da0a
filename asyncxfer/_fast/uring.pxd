"""The ring: what has to wait for a device, many requests at a time."""

from asyncxfer._fast.completion cimport op_t
from asyncxfer._fast.fileflight cimport call_t


cdef int ring_start() noexcept nogil
cdef void ring_push(call_t* call) noexcept nogil
cdef void ring_on_stop(op_t* op) noexcept nogil
