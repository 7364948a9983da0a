# cython: language_level=3, boundscheck=False, wraparound=False, auto_pickle=False, autotestdict=False
"""The outbox: notifications that found the peer's socket full.

One thread, made on first need, sleeps in poll until a socket has room, its peer is gone, or the transfer behind the
notification is stopped or out of time. So a receiver that does not read holds up only those who write to it.
"""

from libc.errno cimport EAGAIN, ENOBUFS, EPIPE
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset
from posix.unistd cimport close, read, write

from asyncxfer._fast.completion cimport OK, PEER_GONE, TIMED_OUT, op_settle, op_t
from asyncxfer._fast.link cimport Link
from asyncxfer._fast.native cimport *
from asyncxfer._fast.pthread cimport *

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int initial, int flags)
    enum: EFD_CLOEXEC, EFD_NONBLOCK

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd* fds, unsigned long n, int timeout)
    enum: POLLIN, POLLOUT


cdef struct letter_t:
    letter_t* next
    axf_link* link
    op_t* op                    # ends when the letter is sent; NULL for word of a failure
    size_t n
    char kind                   # the tag follows the struct


cdef struct outbox_t:
    pthread_mutex_t lock
    pthread_t thread
    letter_t* first
    letter_t** last
    int running, stopping
    int fd                      # wakes the thread


cdef outbox_t box


cdef void reset() noexcept nogil:
    memset(&box, 0, sizeof(box))
    pthread_mutex_init(&box.lock, NULL)
    box.last = &box.first
    box.fd = -1


reset()


cdef void outbox_wake() noexcept nogil:
    cdef uint64_t one = 1
    if box.running:
        write(box.fd, &one, 8)


cdef int start() noexcept nogil:
    if box.running:
        return 0
    box.fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
    if box.fd < 0:
        return 1
    if start_thread(&box.thread, run, b"axf-outbox") != 0:
        close(box.fd)
        box.fd = -1
        return 1
    box.running = 1
    return 0


cdef int outbox_post(axf_link* link, char kind, const char* tag, size_t n, op_t* op) noexcept nogil:
    """Takes over a notification, and the op that ends with it. 0, or 1 when there is no memory for it."""
    cdef letter_t* letter = <letter_t*>malloc(sizeof(letter_t) + n)
    if letter == NULL:
        return 1
    letter.next, letter.link, letter.op, letter.n, letter.kind = NULL, link, op, n, kind
    memcpy(letter + 1, tag, n)
    pthread_mutex_lock(&box.lock)
    if start() != 0:
        pthread_mutex_unlock(&box.lock)
        free(letter)
        return 1
    box.last[0] = letter
    box.last = &letter.next
    axf_add(&link.queued, 1)
    outbox_wake()
    pthread_mutex_unlock(&box.lock)
    return 0


cdef int deliver(letter_t* letter, int64_t now) noexcept nogil:
    """1 when the letter is done with, sent or not."""
    cdef op_t* op = letter.op
    cdef int status = OK
    cdef int rc = EAGAIN
    if not letter.link.full:        # behind one that waits, all of its link wait: they keep their order
        rc = axf_link_note(letter.link, letter.kind, <char*>(letter + 1), letter.n)
    if rc == EAGAIN or rc == ENOBUFS:
        letter.link.full = 1
        if op == NULL:
            return 0
        status = axf_load(&op.stop)
        if status == OK and op.deadline and now >= op.deadline:
            status = TIMED_OUT
        if status == OK:
            return 0
        op_settle(op, status, rc)
        letter.op, letter.kind = NULL, c'F'     # the receiver was told to expect it, so it hears that it does not come
        return 0
    elif rc != 0:
        status = PEER_GONE
    axf_add(&letter.link.queued, -1)
    if op != NULL:
        op_settle(op, status, rc)
    return 1


cdef int64_t sweep(int* n) noexcept nogil:
    """Tries every letter; leaves how many remain and gives the soonest deadline among them, 0 for none."""
    cdef letter_t** at = &box.first
    cdef letter_t* letter = box.first
    cdef int64_t now = axf_now(), soonest = 0
    n[0] = 0
    while letter != NULL:
        letter.link.full = 0
        letter = letter.next
    while at[0] != NULL:
        letter = at[0]
        if deliver(letter, now):
            at[0] = letter.next
            free(letter)
            continue
        if letter.op != NULL and letter.op.deadline and (soonest == 0 or letter.op.deadline < soonest):
            soonest = letter.op.deadline
        n[0] += 1
        at = &letter.next
    box.last = at
    return soonest


cdef void* run(void* arg) noexcept nogil:
    cdef pollfd* fds = NULL
    cdef letter_t* letter
    cdef int64_t soonest
    cdef uint64_t drained
    cdef int n, room = 0, wait
    while True:
        pthread_mutex_lock(&box.lock)
        if box.stopping:
            pthread_mutex_unlock(&box.lock)
            break
        soonest = sweep(&n)
        if n + 1 > room:
            free(fds)
            room = 2 * (n + 1)
            fds = <pollfd*>malloc(room * sizeof(pollfd))
        fds[0].fd, fds[0].events = box.fd, POLLIN
        letter, n = box.first, 1
        while letter != NULL:
            fds[n].fd, fds[n].events = letter.link.fd, POLLOUT
            letter, n = letter.next, n + 1
        pthread_mutex_unlock(&box.lock)
        wait = -1 if soonest == 0 else max(0, <int>((soonest - axf_now()) // 1_000_000 + 1))
        poll(fds, n, wait)
        read(box.fd, &drained, 8)
    free(fds)
    return NULL


def forget(Link link not None) -> None:
    """End what still waits for a link that is about to be closed."""
    cdef letter_t** at
    cdef letter_t* letter
    pthread_mutex_lock(&box.lock)
    at = &box.first
    while at[0] != NULL:
        letter = at[0]
        if letter.link == &link.c:
            at[0] = letter.next
            axf_add(&link.c.queued, -1)
            if letter.op != NULL:
                op_settle(letter.op, PEER_GONE, EPIPE)
            free(letter)
        else:
            at = &letter.next
    box.last = at
    pthread_mutex_unlock(&box.lock)


def shutdown() -> None:
    """End the thread, if there is one, when the last agent has closed its links."""
    if not box.running:
        return
    pthread_mutex_lock(&box.lock)
    box.stopping = 1
    outbox_wake()
    pthread_mutex_unlock(&box.lock)
    with nogil:
        pthread_join(box.thread, NULL)
    close(box.fd)
    reset()


def after_fork() -> None:
    """In a child: the thread and its letters belong to the parent."""
    if box.fd >= 0:
        close(box.fd)
    reset()
