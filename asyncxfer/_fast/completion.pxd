"""The native half of a transfer in flight, and the queue by which finished ones reach an event loop."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from asyncxfer._fast.link cimport Link
from asyncxfer._fast.native cimport axf_link


cdef enum status_t:
    OK = 0
    CANCELLED = 1
    TIMED_OUT = 2
    PEER_GONE = 3
    REVOKED = 4
    FAULT = 5
    DENIED = 6
    FAILED = 7
    MISMATCH = 100
    NOT_PERMITTED = 101         # by the kernel, where DENIED is by the peer


cdef struct node_t:
    void* next                  # first: what axf_push links by
    op_t* op


cdef struct queue_t:
    void* head
    int fd
    int pushing                 # threads between their push and their wake-up: the fd stays open for them


cdef struct op_t:
    node_t final                # pushed once, when nothing touches the buffers any more
    node_t progress             # pushed after a chunk, while somebody iterates
    int progress_queued
    int watched
    void* owner                 # the Completion, borrowed: it holds itself until drained
    queue_t* queue
    axf_link* link
    const char* note
    size_t note_bytes
    int has_note
    int carried                 # the backend does all that concerns the peer: note, word of a failure, counting
    int letter                  # ended but for the note, which the control channel delivers from the loop
    void (*on_stop)(op_t*) noexcept nogil   # the backend's own: somebody asks for an early end
    void* carrier               # the backend's own
    uint32_t detail             # more on the status: which chunk; with a file, what failed
    uint64_t at, wanted, found  # where in a file, the bytes that were to be moved there, and those that were
    int put
    int inline_                 # ends within the call that posts it: no queue, no wake-up
    int state                   # atomic: 0 in flight, 1 ended
    int stop                    # atomic: why it should end early, a status_t
    int status
    int error                   # errno behind the status
    int64_t started, ended, deadline   # ns, monotonic; deadline 0 is none
    uint64_t nbytes, moved
    # the copy engine's part
    op_t* ring_next
    void* work
    uint32_t chunks, next_chunk, left
    unsigned char* marks        # one a chunk: 1 when moved


# How long one turn of the loop may be spent on settling, or on transfers that end inline; 1 ms is the promise.
cdef enum:
    TURN_NS = 200_000


cdef void op_finish(op_t* op, int status, int error) noexcept nogil
cdef void op_progress(op_t* op) noexcept nogil
cdef void op_settle(op_t* op, int status, int error) noexcept nogil


cdef class CompletionQueue:
    cdef queue_t q
    cdef node_t* backlog
    cdef int64_t inline_ns
    cdef int64_t held_ns        # what transfers that ended inline took since the loop last turned, as far as is known
    cpdef int drain(self) except -1
    cpdef void forget(self)


cdef class Completion:
    cdef op_t op
    cdef object _link
    cdef object _note
    cdef object _error
    cdef object _stopper
    cdef readonly CompletionQueue queue
    cdef object prepared
    cdef bint held
    cdef bint ending            # a backend in Python has ended it

    cdef int begin(
        self, CompletionQueue queue, uint64_t nbytes, bint put, Link link, bytes note, timeout
    ) except -1
    cdef void hold(self)
    cdef void release(self)
    cdef int claim_end(self) except -1


cdef class Prepared:            # what a backend has made ready, where that is done in native code
    cdef bint immediate         # small enough to be done within the call that posts it

    cdef bint run_at_once(self, Completion completion) noexcept
