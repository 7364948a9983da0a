"""One worker of UCX, as the modules that use it see it."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from asyncxfer._fast.poller cimport Mailbox, mailbox_t
from asyncxfer._fast.pthread cimport pthread_mutex_t, pthread_t


cdef extern from "ucxwire.h" nogil:
    enum:
        AXF_UCX_KEY
        AXF_UCX_HELLO
        AXF_UCX_WELCOME
        AXF_UCX_NOTE
        AXF_UCX_NOTED
        AXF_UCX_PUT
        AXF_UCX_GET
        AXF_UCX_DONE
        AXF_UCX_RELEASE
        AXF_UCX_AM
        AXF_UCX_FOREIGN_AM
        AXF_UCX_VERSION
        AXF_UCX_MOST_ROWS
        AXF_UCX_MOST_BYTES

    ctypedef struct axf_ucx_head:
        unsigned char key[16]
        uint64_t seq
        uint32_t slot, epoch, count
        unsigned char kind, what, lane, version

    ctypedef struct axf_ucx_row:
        uint64_t offset
        uint32_t nbytes, segment


cdef struct lock_t:             # of the ports of one context: UCX serves only one thread at a time there
    pthread_mutex_t mutex
    int wanted                  # atomic: who waits for it, so that a thread lets go of it


cdef struct stay_t:             # whether a thread looks for what comes, or sleeps until it is woken
    int64_t until               # it looks; 0: it sleeps
    int64_t left                # when it has looked last
    int64_t crowded             # others want its core, until then


cdef struct port_t:
    void* worker
    int efd, number             # number: of the ports of one agent
    lock_t* lock                # held by who calls UCX on this worker, and over all that hangs on the port
    int attention               # atomic: `tick` is to be called in the next turn
    int64_t due                 # when it is to be called; 0 never
    mailbox_t* mailbox
    # the initiator's side, see ucxlane
    void* lanes
    void* flights
    int (*post)(port_t*, int64_t until) noexcept nogil      # 1: something was posted, or more can be
    void (*tick)(port_t*, int64_t now) noexcept nogil
    void (*on_answer)(port_t*, const axf_ucx_head*, const char* data, size_t n) noexcept nogil
    # the target's, see ucxserve
    void* sessions
    void (*on_request)(port_t*, const axf_ucx_head*, const char* data, size_t n, void* reply) noexcept nogil
    # the thread
    pthread_t thread
    int threaded, stopping      # stopping: atomic
    uint64_t turns, ended       # ended: transfers
    uint64_t heard              # messages of ours


cdef void stay(stay_t* s, int64_t now) noexcept nogil
cdef void port_lock(port_t* p) noexcept nogil
cdef void port_unlock(port_t* p) noexcept nogil
cdef void port_due(port_t* p, int64_t due) noexcept nogil
cdef int port_send(
    port_t* p, void* ep, const axf_ucx_head* head, const void* data, size_t n, void* free_later, bint answer
) noexcept nogil


cdef class Lock:
    cdef lock_t l
    cdef list ports             # that are driven


cdef class Port:
    cdef port_t p
    cdef Lock lock
    cdef object worker
    cdef object loop
    cdef object timer
    cdef object watchdog
    cdef object queue           # of the transfers that this loop has posted last
    cdef readonly Mailbox mailbox
    cdef uint64_t drained       # how many of those that have ended the queue has been asked for
    cdef unsigned long ident    # the loop's thread
    cdef bint counted
    cdef bint scheduled
    cdef stay_t awake
    cdef bint closed

    cpdef object run(self)
    cdef int kick(self) except -1
