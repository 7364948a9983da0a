# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, autotestdict=False
"""Threads without the GIL that wait for sockets and do what there is to do on them, in turns.

Each connection belongs to one thread. Its owner (see `initiator`, `target`) says what to do by a function, `serve`, which
is called when the socket has become ready, when somebody asks for attention, and again while it says that there is
more. Tickers are called when their time has come. Messages for Python go into a mailbox, a lock-free stack with an
eventfd that an event loop watches. What the bytes mean is not known here.
"""

import os

from libc.errno cimport EAGAIN, EFAULT, EIO, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset
from posix.unistd cimport close, read, write

from asyncxfer._fast.engine cimport copy_bytes
from asyncxfer._fast.native cimport *
from asyncxfer._fast.pthread cimport *
from asyncxfer._fast.tls cimport tls_read, tls_write

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int initial, int flags)
    enum: EFD_CLOEXEC, EFD_NONBLOCK

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        void* ptr
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int flags)
    int epoll_ctl(int epfd, int op, int fd, epoll_event* event)
    int epoll_wait(int epfd, epoll_event* events, int n, int timeout)
    enum: EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLLIN, EPOLLOUT, EPOLLRDHUP, EPOLLHUP, EPOLLERR, EPOLLET

cdef extern from *:
    """
    #include <errno.h>
    static inline void axf_set_errno(int error) { errno = error; }
    """
    void set_errno "axf_set_errno"(int error) noexcept nogil

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "frames.h" nogil:
    struct iovec:
        void* iov_base
        size_t iov_len
    void axf_socket_abort(int fd)
    void axf_socket_ready(int fd)
    ssize_t axf_socket_send(int fd, iovec* iov, int n)
    ssize_t axf_socket_recv(int fd, iovec* iov, int n)

cdef enum:
    MAX_THREADS = 64
    EVENTS = 64
    LINGER_NS = 50_000          # for what may come next, after a visit that was as short as
    SMALL_NS = 30_000
    KEPT_NS = 300_000
    FIRST_PAUSE_NS = 100_000_000
    LONGEST_PAUSE_NS = 1_000_000_000
    STAGE = 65536               # bytes that are encrypted at a time
    MAIL_BYTES = 8 << 20
    MAIL_EACH = 256             # what a message counts as beside its text: about what it becomes in Python


# ---- threads ---------------------------------------------------------------------------------------------------------

cdef struct thread_t:
    pthread_mutex_t lock
    pthread_mutex_t ticking     # held while tickers are called
    pthread_cond_t changed      # a stream has ended
    pthread_t thread
    stream_t* first             # what there is to do, in turn
    stream_t** last
    stream_t* streams           # all
    ticker_t* tickers
    int64_t due                 # atomic: none of them is due before; 0 never
    int epoll, wake
    int awake                   # atomic: it will look at its list before it sleeps
    int stopping, running


cdef thread_t threads[MAX_THREADS]
cdef int users = 0, wanted = 0
cdef pthread_mutex_t start_lock
pthread_mutex_init(&start_lock, NULL)
cdef long _live = 0


cdef void rouse(thread_t* t) noexcept nogil:
    cdef uint64_t one = 1
    if axf_swap(&t.awake, 1) == 0:
        write(t.wake, &one, 8)


cdef void append(thread_t* t, stream_t* s) noexcept nogil:
    # With the lock held.
    if not s.queued:
        s.queued = 1
        s.todo = NULL
        t.last[0] = s
        t.last = &s.todo


cdef void end(thread_t* t, stream_t* s) noexcept nogil:
    """Closes a connection, tells its owner, and forgets it."""
    pthread_mutex_lock(&s.lock)         # nobody writes to the number any more
    axf_store(&s.closing, 1)
    if s.fd >= 0:
        if s.watched:                   # a child that has just been forked may hold the socket open, and so its events
            epoll_ctl(t.epoll, EPOLL_CTL_DEL, s.fd, NULL)
        axf_socket_abort(s.fd)
        s.fd = -1
    pthread_mutex_unlock(&s.lock)
    s.ended(s)
    pthread_mutex_lock(&t.lock)
    if s.prev != NULL:
        s.prev.next = s.next
    else:
        t.streams = s.next
    if s.next != NULL:
        s.next.prev = s.prev
    if s.queued:
        unqueue(t, s)
    axf_store(&s.dead, 1)
    pthread_cond_broadcast(&t.changed)
    pthread_mutex_unlock(&t.lock)


cdef void unqueue(thread_t* t, stream_t* s) noexcept nogil:
    cdef stream_t** at = &t.first
    while at[0] != NULL and at[0] != s:
        at = &at[0].todo
    if at[0] == s:
        at[0] = s.todo
        if s.todo == NULL:
            t.last = at
    s.queued = 0


cdef void jump(thread_t* t, stream_t* s) noexcept nogil:
    # Before all others, with the lock held: somebody waits for its end.
    if s.queued:
        unqueue(t, s)
    s.queued = 1
    s.todo = t.first
    if t.first == NULL:
        t.last = &s.todo
    t.first = s


cdef int watch(thread_t* t, stream_t* s) noexcept nogil:
    cdef epoll_event event
    memset(&event, 0, sizeof(event))
    event.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | <uint32_t>EPOLLET
    event.data.ptr = s
    s.watched = 1
    return epoll_ctl(t.epoll, EPOLL_CTL_ADD, s.fd, &event)


cdef void visit(thread_t* t, stream_t* s) noexcept nogil:
    cdef int rc
    if not axf_load(&s.closing):
        rc = 0
        if not s.watched:
            rc = watch(t, s)
        if rc == 0:
            rc = s.serve(s)
        if rc == BUSY:
            pthread_mutex_lock(&t.lock)
            append(t, s)
            pthread_mutex_unlock(&t.lock)
        if rc >= 0 and not axf_load(&s.closing):
            return
    end(t, s)


cdef int64_t tick(thread_t* t) noexcept nogil:
    """Calls the tickers that are due; gives when the next will be."""
    cdef ticker_t* at
    cdef int64_t due = <int64_t>axf_load64(<uint64_t*>&t.due), soonest = 0, now
    if due == 0:
        return 0
    now = axf_now()
    if due > now:
        return due
    axf_claim64(<uint64_t*>&t.due, <uint64_t>due, 0)
    pthread_mutex_lock(&t.ticking)
    at = t.tickers
    while at != NULL:
        due = <int64_t>axf_load64(<uint64_t*>&at.due)
        if due and due <= now:
            axf_claim64(<uint64_t*>&at.due, <uint64_t>due, 0)
            at.tick(at.owner, now)
            due = <int64_t>axf_load64(<uint64_t*>&at.due)
        if due and (soonest == 0 or due < soonest):
            soonest = due
        at = at.next
    pthread_mutex_unlock(&t.ticking)
    if soonest:
        sooner(&t.due, soonest)
    return soonest


cdef void* run(void* arg) noexcept nogil:
    cdef thread_t* t = <thread_t*>arg
    cdef epoll_event events[EVENTS]
    cdef stream_t* s
    cdef uint64_t drained
    cdef int64_t due, began, now, until = 0, alone = 0, pause = FIRST_PAUSE_NS
    cdef int n, i, wait, bits
    axf_be_patient()            # event loops go first
    while True:
        axf_store(&t.awake, 1)
        pthread_mutex_lock(&t.lock)
        s = t.first
        if s != NULL:
            t.first = s.todo
            if t.first == NULL:
                t.last = &t.first
            s.queued = 0
        elif t.stopping:
            pthread_mutex_unlock(&t.lock)
            break
        pthread_mutex_unlock(&t.lock)
        began = axf_now()
        if s != NULL:
            visit(t, s)
        due = tick(t)
        wait = 0
        now = axf_now()
        if s != NULL:
            until = now + LINGER_NS if now - began < SMALL_NS else 0
        elif now < until and now >= alone:
            # What comes next often comes soon, and a core that sleeps takes longer to wake than this. Who else wants the
            # core gets it, and if it is kept for long, there is no lingering for a while.
            sched_yield()
            if axf_now() - now > KEPT_NS:
                alone = now + pause
                pause = min(4 * pause, LONGEST_PAUSE_NS)
            elif pause > FIRST_PAUSE_NS:
                pause -= pause >> 10
        else:
            # What was asked for before `awake` is 0 is seen now; what comes later writes to the eventfd.
            axf_store(&t.awake, 0)
            pthread_mutex_lock(&t.lock)
            if t.first == NULL and not t.stopping:
                wait = -1
            pthread_mutex_unlock(&t.lock)
            due = tick(t)
            if wait and due:
                wait = max(0, <int>min((due - axf_now()) // 1_000_000 + 1, 1 << 30))
        n = epoll_wait(t.epoll, events, EVENTS, wait)
        axf_store(&t.awake, 1)
        for i in range(n):
            s = <stream_t*>events[i].data.ptr
            if s == NULL:
                read(t.wake, &drained, 8)
                continue
            bits = 0
            if events[i].events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR):
                bits |= READABLE
            if events[i].events & (EPOLLOUT | EPOLLHUP | EPOLLERR):
                bits |= WRITABLE
            axf_or(&s.ready, bits)
            pthread_mutex_lock(&t.lock)
            append(t, s)
            pthread_mutex_unlock(&t.lock)
    return NULL


cdef int start(thread_t* t) noexcept nogil:
    cdef epoll_event event
    memset(&event, 0, sizeof(event))
    pthread_mutex_init(&t.lock, NULL)
    pthread_mutex_init(&t.ticking, NULL)
    pthread_cond_init(&t.changed, NULL)
    t.last = &t.first
    t.epoll = epoll_create1(EPOLL_CLOEXEC)
    t.wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
    event.events = EPOLLIN
    if (t.epoll >= 0 and t.wake >= 0 and epoll_ctl(t.epoll, EPOLL_CTL_ADD, t.wake, &event) == 0
            and start_thread(&t.thread, run, b"axf-net", t) == 0):
        t.running = 1
        return 0
    if t.epoll >= 0:
        close(t.epoll)
    if t.wake >= 0:
        close(t.wake)
    return 1


cdef thread_t* thread_of(int number) noexcept nogil:
    """The thread that takes what has this number; they start with the first work for them."""
    cdef thread_t* t
    pthread_mutex_lock(&start_lock)
    t = &threads[number % max(wanted, 1)]
    if not t.running and start(t) != 0:
        t = &threads[0] if threads[0].running else NULL
    pthread_mutex_unlock(&start_lock)
    return t


# ---- streams ---------------------------------------------------------------------------------------------------------

cdef stream_t* stream_new(int fd, void* tls, int index) noexcept nogil:
    cdef stream_t* s = <stream_t*>calloc(1, sizeof(stream_t))
    if s == NULL:
        return NULL
    if tls != NULL:
        s.stage = <unsigned char*>malloc(STAGE)
        if s.stage == NULL:
            free(s)
            return NULL
    pthread_mutex_init(&s.lock, NULL)
    s.fd, s.tls, s.index = fd, tls, index
    s.ready = READABLE | WRITABLE
    axf_socket_ready(fd)
    return s


cdef void stream_start(stream_t* s, int number) noexcept nogil:
    """Gives it to a thread; owner, serve, ended and io are set."""
    cdef thread_t* t = thread_of(number)
    if t == NULL:
        s.closing = 1
        axf_socket_abort(s.fd)
        s.fd = -1
        s.ended(s)
        s.dead = 1
        return
    pthread_mutex_lock(&t.lock)
    s.thread = t
    s.next = t.streams
    if t.streams != NULL:
        t.streams.prev = s
    t.streams = s
    append(t, s)
    pthread_mutex_unlock(&t.lock)
    rouse(t)


cdef void stream_attend(stream_t* s) noexcept nogil:
    """Has `serve` called soon."""
    cdef thread_t* t = s.thread
    if t == NULL or axf_load(&s.dead):
        return
    pthread_mutex_lock(&t.lock)
    if not s.dead:
        append(t, s)
    pthread_mutex_unlock(&t.lock)
    rouse(t)


cdef void stream_close(stream_t* s) noexcept nogil:
    """Has it ended soon."""
    cdef thread_t* t = s.thread
    axf_store(&s.closing, 1)
    if t == NULL or axf_load(&s.dead):
        return
    pthread_mutex_lock(&t.lock)
    if not s.dead:
        jump(t, s)
    pthread_mutex_unlock(&t.lock)
    rouse(t)


cdef void stream_wait(stream_t* s) noexcept nogil:
    """Waits until it has ended: at most as long as the thread is busy with one other stream."""
    cdef thread_t* t = s.thread
    if t == NULL:
        return
    pthread_mutex_lock(&t.lock)
    while not s.dead:
        pthread_cond_wait(&t.changed, &t.lock)
    pthread_mutex_unlock(&t.lock)


cdef void stream_free(stream_t* s) noexcept nogil:
    """Frees one that has ended."""
    pthread_mutex_destroy(&s.lock)
    free(s.stage)
    free(s)


cdef int stream_flush(stream_t* s) noexcept nogil:
    """Sends what is staged: 0 when nothing is left, or an errno."""
    cdef ssize_t sent
    while s.stage_at < s.staged:
        sent = tls_write(s.tls, s.stage + s.stage_at, s.staged - s.stage_at)
        if sent <= 0:
            return errno if sent < 0 else EIO
        s.stage_at += <uint32_t>sent
    s.staged = s.stage_at = 0
    return 0


cdef ssize_t stream_send(stream_t* s, void* parts, int n) noexcept nogil:
    """As sendmsg. Encrypted, it takes what can be staged, and the rest of that goes before anything new."""
    cdef iovec* iov = <iovec*>parts
    cdef size_t take
    cdef int i, error
    if s.tls == NULL:
        return axf_socket_send(s.fd, iov, n)
    error = stream_flush(s)
    if error:
        set_errno(error)
        return -1
    for i in range(n):
        take = min(iov[i].iov_len, <size_t>(STAGE - s.staged))
        if copy_bytes(s.stage + s.staged, iov[i].iov_base, take) != 0:
            s.staged = 0
            set_errno(EFAULT)
            return -1
        s.staged += <uint32_t>take
        if take < iov[i].iov_len:
            break
    take = s.staged
    error = stream_flush(s)
    if error and error != EAGAIN:
        set_errno(error)
        return -1
    return <ssize_t>take


cdef ssize_t stream_recv(stream_t* s, void* parts, int n) noexcept nogil:
    """As recvmsg; encrypted, into the first part only."""
    cdef iovec* iov = <iovec*>parts
    if s.tls == NULL:
        return axf_socket_recv(s.fd, iov, n)
    return tls_read(s.tls, iov[0].iov_base, iov[0].iov_len)


# ---- tickers ---------------------------------------------------------------------------------------------------------

cdef void ticker_start(ticker_t* t, int number) noexcept nogil:
    cdef thread_t* thread = thread_of(number)
    t.thread = thread
    if thread != NULL:
        pthread_mutex_lock(&thread.ticking)
        t.next = thread.tickers
        thread.tickers = t
        pthread_mutex_unlock(&thread.ticking)


cdef bint sooner(int64_t* at, int64_t due) noexcept nogil:
    """Moves a time forward; False when it was as soon before."""
    cdef int64_t old = <int64_t>axf_load64(<uint64_t*>at)
    while old == 0 or due < old:
        if axf_claim64(<uint64_t*>at, <uint64_t>old, <uint64_t>due):
            return True
        old = <int64_t>axf_load64(<uint64_t*>at)
    return False


cdef void ticker_at(ticker_t* t, int64_t due) noexcept nogil:
    """Has it called at `due`, or before."""
    cdef thread_t* thread = t.thread
    if sooner(&t.due, due) and thread != NULL and sooner(&thread.due, due):
        rouse(thread)


cdef void ticker_stop(ticker_t* t) noexcept nogil:
    """Never called again once this returns."""
    cdef ticker_t** at
    if t.thread == NULL:
        return
    pthread_mutex_lock(&t.thread.ticking)
    at = &t.thread.tickers
    while at[0] != NULL and at[0] != t:
        at = &at[0].next
    if at[0] == t:
        at[0] = t.next
    pthread_mutex_unlock(&t.thread.ticking)
    t.thread = NULL


# ---- messages for Python ----------------------------------------------------------------------------------------------

cdef int mail(mailbox_t* box, uint64_t owner, int kind, const void* text, uint32_t n) noexcept nogil:
    """Leaves a message; 0, or 1 when there is no memory for it."""
    cdef message_t* m = <message_t*>malloc(sizeof(message_t) + n)
    cdef uint64_t one = 1
    if m == NULL:
        return 1
    m.owner, m.kind, m.n = owner, kind, n
    memcpy(m + 1, text, n)
    axf_add64(&box.nbytes, MAIL_EACH + n)
    if axf_push(&box.head, &m.next):
        write(box.fd, &one, 8)
    return 0


cdef class Mailbox:
    """Messages of threads to one event loop: who they are for, a kind, and bytes. Watch `fileno()`, call `take()`."""

    def __cinit__(self) -> None:
        global _live
        self.box.limit = MAIL_BYTES
        self.box.fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.box.fd < 0:
            raise OSError("no eventfd could be made for a mailbox")
        _live += 1

    def __dealloc__(self):
        global _live
        self.close()
        _live -= 1

    def fileno(self) -> int:
        """The eventfd that turns readable when there is a message."""
        return self.box.fd

    def take(self, int most=0) -> list[tuple[int, int, bytes]]:
        """The messages that there are, oldest first and at most so many, 0 for all: owner, kind, text.

        While there are more the eventfd stays readable.
        """
        cdef uint64_t count = 1
        cdef message_t* m
        cdef message_t* next_
        found = []
        while True:
            if self.backlog == NULL:
                if self.box.fd >= 0:
                    read(self.box.fd, &count, 8)
                m = <message_t*>axf_take(&self.box.head)
                while m != NULL:        # the newest first
                    next_ = <message_t*>m.next
                    m.next = self.backlog
                    self.backlog, m = m, next_
            m = self.backlog
            if m == NULL or (most and len(found) == most):
                break
            found.append((m.owner, m.kind, <bytes>(<char*>(m + 1))[: m.n]))
            axf_add64(&self.box.nbytes, -<int64_t>(MAIL_EACH + m.n))
            self.backlog = <message_t*>m.next
            free(m)
        if m != NULL and self.box.fd >= 0:
            count = 1
            write(self.box.fd, &count, 8)
        return found

    def close(self) -> None:
        """Forget what is there. Nobody leaves messages any more."""
        self.take()
        if self.box.fd >= 0:
            close(self.box.fd)
            self.box.fd = -1


# ---- what Python calls -------------------------------------------------------------------------------------------------

def live() -> int:
    """Mailboxes that exist now (for leak checks)."""
    return _live


def acquire(int count) -> None:
    """Take part, with at least so many threads."""
    global users, wanted
    users += 1
    if users == 1 or not running():
        wanted = max(wanted, min(max(count, 1), <int>MAX_THREADS))


def release() -> None:
    """Leave. The last to do so ends the threads; every stream of theirs has ended by then."""
    global users, wanted
    cdef int i
    users -= 1
    if users > 0:
        return
    wanted = 0
    pthread_mutex_lock(&start_lock)     # before anybody else can run: who takes part from now on gets new threads
    with nogil:
        for i in range(MAX_THREADS):
            if threads[i].running:
                pthread_mutex_lock(&threads[i].lock)
                threads[i].stopping = 1
                pthread_mutex_unlock(&threads[i].lock)
                rouse(&threads[i])
                pthread_join(threads[i].thread, NULL)
                close(threads[i].epoll)
                close(threads[i].wake)
        memset(threads, 0, sizeof(threads))
        pthread_mutex_unlock(&start_lock)


def running() -> int:
    """Threads that run now."""
    cdef int i, n = 0
    for i in range(MAX_THREADS):
        n += threads[i].running
    return n


def after_fork() -> None:
    """In a child: threads and connections belong to the parent; let go of the descriptors."""
    global users, wanted
    cdef int i
    cdef stream_t* s
    for i in range(MAX_THREADS):
        if threads[i].running:
            s = threads[i].streams
            while s != NULL:
                if s.fd >= 0:
                    close(s.fd)
                    s.fd = -1
                s.dead = 1
                s = s.next
            close(threads[i].epoll)
            close(threads[i].wake)
    memset(threads, 0, sizeof(threads))
    pthread_mutex_init(&start_lock, NULL)
    users = wanted = 0
