"""A transfer between memory and a file under way: what has ended of it, how it failed, and its end."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from asyncxfer._fast.completion cimport op_t
from asyncxfer._fast.filework cimport filework_t, iovec


cdef struct call_t:             # a request that a thread has left to the ring, or the end of the transfer
    void* next                  # first: what axf_push links by
    flight_t* flight
    uint32_t request
    uint32_t got                # bytes of it that have been moved


cdef struct flight_t:
    op_t* op
    const filework_t* work
    flight_t* next              # in a thread's queue
    flight_t* ring_next         # in the ring's
    int rank
    int ringed                  # a ring has what threads cannot do at once
    int left                    # atomic: requests that have not ended
    int syncing                 # all of them have, and what was written is on its way to the device
    uint32_t at, end            # of the requests: which of them threads do, and are next
    uint32_t ring_at            # likewise the ring
    uint32_t asked              # calls of the ring that are under way for it
    int inside                  # it is in the ring's queue
    call_t self_                # the whole
    call_t* calls               # one a request through the page cache, where there is a ring


cdef flight_t* flight_new(op_t* op, const filework_t* work, int rank, int ringed) noexcept nogil
cdef void flight_free(flight_t* f) noexcept nogil
cdef int flight_status(flight_t* f) noexcept nogil
cdef void flight_moved(flight_t* f, uint32_t request, uint64_t nbytes) noexcept nogil
cdef void flight_trouble(flight_t* f, uint32_t request, uint64_t got, int error) noexcept nogil
cdef void flight_sync_trouble(flight_t* f, int error) noexcept nogil
cdef bint flight_less(flight_t* f, uint32_t n) noexcept nogil
cdef void flight_end(flight_t* f) noexcept nogil
