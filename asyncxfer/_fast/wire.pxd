"""One frame on its way in, and one on its way out, over a connection that never blocks."""

from libc.stdint cimport uint32_t, uint64_t

from asyncxfer._fast.frames cimport axf_cursor, axf_tail
from asyncxfer._fast.poller cimport stream_t


cdef enum:
    AGAIN = 0                   # the socket has nothing, or no room
    OVER = -1                   # the connection has ended
    FAULTED = -2                # the memory of the rows is not there; nothing has moved
    BUFFER = 16384              # bytes that are read ahead


cdef struct input_t:
    unsigned char* buf
    uint32_t at, end            # what of it has come and is not used
    uint32_t have               # bytes of a fixed part that are there
    axf_cursor rows             # where the payload goes
    const uint64_t* bases
    uint64_t left               # bytes of the payload that have not come
    axf_tail tail


cdef struct output_t:
    unsigned char* buf          # what goes before the payload
    uint32_t len, at
    axf_cursor rows             # where the payload comes from
    const uint64_t* bases
    uint64_t left               # bytes of the payload that have not gone
    int active
    int padding                 # the rest of it is zeros, and the tail says so
    int has_tail
    axf_tail tail
    uint32_t tail_at


cdef int rows_crc(const axf_cursor* rows, const uint64_t* bases, uint32_t* crc) noexcept nogil
cdef int input_open(input_t* i) noexcept nogil
cdef void input_close(input_t* i) noexcept nogil
cdef int input_part(stream_t* s, input_t* i, void* to, uint32_t n) noexcept nogil
cdef ssize_t input_rows(stream_t* s, input_t* i) noexcept nogil
cdef ssize_t input_skip(stream_t* s, input_t* i) noexcept nogil
cdef int output_open(output_t* o, uint32_t room) noexcept nogil
cdef void output_close(output_t* o) noexcept nogil
cdef ssize_t output_step(stream_t* s, output_t* o) noexcept nogil
cdef bint output_done(output_t* o) noexcept nogil
