"""Threads that wait for sockets, and the connections that they own."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from asyncxfer._fast.pthread cimport pthread_mutex_t


cdef enum:
    READABLE = 1                # what a stream may have to do; bits stay until the socket says "not now"
    WRITABLE = 2
    BROKEN = -1                 # what `serve` gives: the connection is over
    IDLE = 0                    # nothing to do until the socket says so
    BUSY = 1                    # its share of the turn is used up; there is more


cdef struct thread_t            # the poller's own

cdef struct stream_t:
    int fd
    void* tls                   # an SSL, or NULL
    int index
    void* owner
    int (*serve)(stream_t*) noexcept nogil      # what there is to do; only on the stream's thread
    void (*ended)(stream_t*) noexcept nogil     # the last call; the connection has been closed
    void* io                    # what the owner keeps for it
    pthread_mutex_t lock        # held by who writes; with TLS also by who reads
    int ready                   # READABLE and WRITABLE, atomic
    int closing                 # atomic: to be ended
    int dead                    # atomic: it has ended, the thread knows it no more
    # the poller's
    thread_t* thread
    stream_t* todo
    int queued, watched
    stream_t* prev
    stream_t* next
    # encrypted bytes that wait for room in the socket
    unsigned char* stage
    uint32_t staged, stage_at


cdef struct ticker_t:
    int64_t due                 # ns, monotonic; 0 never
    void (*tick)(void* owner, int64_t now) noexcept nogil
    void* owner
    thread_t* thread
    ticker_t* next


cdef struct message_t:
    void* next
    uint64_t owner
    int kind
    uint32_t n                  # bytes of text behind the struct


cdef struct mailbox_t:
    void* head
    int fd
    uint64_t nbytes             # atomic: of messages that nobody has taken
    uint64_t limit              # beyond which nothing should be added


cdef stream_t* stream_new(int fd, void* tls, int index) noexcept nogil
cdef void stream_start(stream_t* s, int number) noexcept nogil
cdef void stream_attend(stream_t* s) noexcept nogil
cdef void stream_close(stream_t* s) noexcept nogil
cdef void stream_wait(stream_t* s) noexcept nogil
cdef void stream_free(stream_t* s) noexcept nogil
cdef ssize_t stream_send(stream_t* s, void* iov, int n) noexcept nogil
cdef ssize_t stream_recv(stream_t* s, void* iov, int n) noexcept nogil
cdef int stream_flush(stream_t* s) noexcept nogil
cdef void ticker_start(ticker_t* t, int number) noexcept nogil
cdef void ticker_at(ticker_t* t, int64_t due) noexcept nogil
cdef void ticker_stop(ticker_t* t) noexcept nogil
cdef int mail(mailbox_t* box, uint64_t owner, int kind, const void* text, uint32_t n) noexcept nogil


cdef class Mailbox:
    cdef mailbox_t box
    cdef message_t* backlog
