# cython: language_level=3, boundscheck=False, wraparound=False, auto_pickle=False, autotestdict=False
"""A worker of UCX and what drives it: turns of an event loop, or a thread without the GIL.

A turn lets UCX make progress, lets transfers be posted, for a fraction of a millisecond, and when there is nothing more
to do arms the worker, whose descriptor then says when there is again. Everything that calls UCX on a worker holds the
lock of its context, callbacks included; memory is registered without, for which UCX has locks of its own. What is
posted, and what messages mean, is not known here (see `ucxlane`, `ucxserve`).
"""

import threading

from cpython.ref cimport Py_INCREF
from libc.stdint cimport int64_t, uint64_t, uintptr_t
from libc.stdlib cimport free
from libc.string cimport memset

from asyncxfer._fast.completion cimport CompletionQueue
from asyncxfer._fast.native cimport *
from asyncxfer._fast.poller cimport Mailbox
from asyncxfer._fast.pthread cimport *
from asyncxfer._fast.ucp cimport *

from asyncxfer._errors import BackendError

from asyncxfer._fast import ucp as _ucp

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events, revents
    int poll(pollfd* p, unsigned long n, int timeout)
    enum: POLLIN

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "Python.h":
    unsigned long PyThread_get_thread_ident() nogil

cdef enum:
    TURN_NS = 200_000           # of a loop; 1 ms is the promise
    THREAD_TURN_NS = 500_000
    LINGER_NS = 100_000         # before it sleeps, for what may come next
    LOOK_NS = 20_000            # a turn, if nothing comes
    LATE_NS = 500_000           # who does not sleep, and is that late, has lost its core
    CROWDED_NS = 100_000_000    # and sleeps at once for so long
    WATCH_NS = 1_000_000_000    # UCX may forget to tell; nobody waits longer than this for it to be noticed

cdef long _live = 0


def live() -> int:
    """Ports that exist now (for leak checks)."""
    return _live


# ---- the lock -----------------------------------------------------------------------------------------------------

cdef void port_lock(port_t* p) noexcept nogil:
    axf_add(&p.lock.wanted, 1)
    pthread_mutex_lock(&p.lock.mutex)
    axf_add(&p.lock.wanted, -1)


cdef void port_unlock(port_t* p) noexcept nogil:
    pthread_mutex_unlock(&p.lock.mutex)


cdef void port_due(port_t* p, int64_t due) noexcept nogil:
    """Has `tick` called at a time. With the lock held."""
    if p.due == 0 or due < p.due:
        p.due = due


# ---- messages -----------------------------------------------------------------------------------------------------

cdef void sent(void* request, int status, void* arg) noexcept nogil:
    free(arg)
    ucp.request_free(request)


cdef void endpoint_closed(void* request, int status, void* closing) noexcept nogil:
    (<int*>closing)[0] = 0
    ucp.request_free(request)


cdef int port_send(
    port_t* p, void* ep, const axf_ucx_head* head, const void* data, size_t n, void* free_later, bint answer
) noexcept nogil:
    """Sends a message: a status. `free_later` is freed once nobody reads `data`; `answer`: the other side will answer."""
    cdef axf_ucp_param param
    cdef void* given
    memset(&param, 0, sizeof(param))
    param.mask = AXF_OP_CALLBACK | AXF_OP_ARG | AXF_OP_FLAGS
    param.flags = AXF_AM_EAGER | AXF_AM_COPY_HEAD | (AXF_AM_REPLY if answer else 0)
    param.done, param.arg = sent, free_later
    given = ucp.am_send_nbx(ep, AXF_UCX_AM, head, sizeof(axf_ucx_head), data, n, &param)
    if given == NULL or axf_ucp_failed(given):
        free(free_later)
        return axf_ucp_status(given)
    return AXF_UCS_OK


cdef int on_message(
    void* arg, const void* head, size_t head_bytes, void* data, size_t n, const axf_ucp_am_param* param
) noexcept nogil:
    cdef port_t* p = <port_t*>arg
    cdef const axf_ucx_head* h = <const axf_ucx_head*>head
    cdef void* reply = param.reply if param.attributes & AXF_AM_HAS_REPLY else NULL
    if head_bytes != sizeof(axf_ucx_head) or param.attributes & AXF_AM_IS_RNDV or h.version != AXF_UCX_VERSION:
        return AXF_UCS_OK       # none of ours
    p.heard += 1
    if h.kind in (AXF_UCX_WELCOME, AXF_UCX_NOTED, AXF_UCX_DONE):
        if p.on_answer != NULL:
            p.on_answer(p, h, <const char*>data, n)
    elif p.on_request != NULL:
        p.on_request(p, h, <const char*>data, n, reply)
    return AXF_UCS_OK


cdef int on_foreign(
    void* arg, const void* head, size_t head_bytes, void* data, size_t n, const axf_ucp_am_param* param
) noexcept nogil:
    return AXF_UCS_OK           # UCXX would keep it for ever


# ---- turns --------------------------------------------------------------------------------------------------------

cdef int turn(port_t* p, int64_t budget, bint arm) noexcept nogil:
    """1: there is more to do at once. 0: nothing until the descriptor says so, if it was to be armed. Holds the lock."""
    cdef int64_t now = axf_now()
    cdef int64_t until = now + budget
    cdef int64_t look_until = 0 if arm else now + LOOK_NS
    cdef int more, status
    p.turns += 1
    while True:
        if axf_swap(&p.attention, 0) or (p.due and now >= p.due):
            p.due = 0
            if p.tick != NULL:
                p.tick(p, now)
        more = ucp.worker_progress(p.worker) != 0
        if p.post != NULL and p.post(p, until):
            more = 1
        now = axf_now()
        if more and (now >= until or axf_load(&p.lock.wanted)):
            break
        if more:
            look_until = 0
        elif now < look_until and not axf_load(&p.lock.wanted):
            continue
        else:
            status = ucp.worker_arm(p.worker) if arm else AXF_UCS_OK
            if status != AXF_UCS_BUSY:
                break
            more = 1
            if now >= until:
                break
    return more


cdef void stay(stay_t* s, int64_t now) noexcept nogil:
    """Something comes soon: this thread better looks for it for a while than sleeps, if it keeps its core meanwhile."""
    if now >= s.crowded:
        s.until, s.left = now + LINGER_NS, now


cdef bint staying(stay_t* s, int64_t now) noexcept nogil:
    """Whether to look on. One that does, and is late, has lost the core to somebody else, and would again."""
    if s.until and now - s.left > LATE_NS:
        s.crowded, s.until = now + CROWDED_NS, 0
    if now >= s.until:
        s.until = 0
    return s.until != 0


cdef void* worker_thread(void* arg) noexcept nogil:
    cdef port_t* p = <port_t*>arg
    cdef int64_t now, wait
    cdef pollfd event
    cdef stay_t s
    cdef int more
    cdef bint awake
    memset(&s, 0, sizeof(s))
    axf_be_patient()            # event loops go first
    event.fd, event.events = p.efd, POLLIN
    while not axf_load(&p.stopping):
        now = axf_now()
        awake = staying(&s, now)
        pthread_mutex_lock(&p.lock.mutex)
        more = turn(p, THREAD_TURN_NS, not awake)
        pthread_mutex_unlock(&p.lock.mutex)
        if not more and not awake:
            wait = WATCH_NS if p.due == 0 else min(max(p.due - now, 0), <int64_t>WATCH_NS)
            poll(&event, 1, <int>((wait + 999_999) // 1_000_000))
            more = event.revents != 0
        s.left = axf_now()
        if more:
            stay(&s, s.left)
        while axf_load(&p.lock.wanted):
            sched_yield()
        if s.until:
            sched_yield()
    return NULL


# ---- what Python calls --------------------------------------------------------------------------------------------

def keep_forever(thing) -> None:
    """See to it that something is never freed, not even when the process ends: native code may come back to it."""
    Py_INCREF(thing)


cdef class Lock:
    """What the ports of one context share: UCX lets one thread at a time into a context that UCXX has made."""

    def __cinit__(self) -> None:
        pthread_mutex_init(&self.l.mutex, NULL)
        self.ports = []

    def __dealloc__(self):
        pthread_mutex_destroy(&self.l.mutex)


cdef class Port:
    """A worker, and what drives it; ``with port:`` holds its lock, for calls of UCXX on this worker.

    Parameters
    ----------
    worker : int
        A ucp_worker_h with events.
    number : int
        Which of the agent's, from 0 to 15.
    lock : Lock
        Of the worker's context.
    mailbox : Mailbox
        Where it is said what Python has to do something about.
    keep : object
        What must live as long.
    """

    def __cinit__(self, uintptr_t worker, int number, Lock lock not None, Mailbox mailbox not None, keep) -> None:
        global _live
        cdef axf_ucp_am_handler handler
        if ucp.library == NULL:
            raise BackendError("UCX has not been bound in this process")
        self.worker, self.mailbox = keep, mailbox
        self.p.worker, self.p.number, self.p.mailbox = <void*>worker, number, &mailbox.box
        self.lock, self.p.lock = lock, &lock.l
        memset(&handler, 0, sizeof(handler))
        handler.mask = 1 | 4 | 8
        handler.id, handler.on_am, handler.arg = AXF_UCX_AM, on_message, &self.p
        status = ucp.worker_set_am_recv_handler(self.p.worker, &handler)
        if status == AXF_UCS_OK:
            handler.id, handler.on_am = AXF_UCX_FOREIGN_AM, on_foreign
            status = ucp.worker_set_am_recv_handler(self.p.worker, &handler)
        if status == AXF_UCS_OK:
            status = ucp.worker_get_efd(self.p.worker, &self.p.efd)
        if status != AXF_UCS_OK:
            raise BackendError(f"a worker of UCX cannot be used: {_ucp.word(status)}")
        self.counted = True
        _live += 1

    def __dealloc__(self):
        global _live
        if self.counted:
            _live -= 1

    def __enter__(self) -> None:
        with nogil:
            port_lock(&self.p)

    def __exit__(self, *_) -> None:
        cdef Port port
        port_unlock(&self.p)
        for port in self.lock.ports:
            port.kick()         # a turn may have found the lock taken

    @property
    def threaded(self) -> bool:
        """Whether a thread drives it."""
        return self.p.threaded == 1

    @property
    def turns(self) -> int:
        """How many turns it has had."""
        return self.p.turns

    def start(self, loop, *, bint thread=False) -> None:
        """Be driven from now on, by a loop that is running in this thread, or by a thread of its own."""
        self.loop, self.ident = loop, PyThread_get_thread_ident()
        self.lock.ports = [*self.lock.ports, self]
        if thread:
            if start_thread(&self.p.thread, worker_thread, b"axf-ucx", &self.p) != 0:
                raise BackendError("no thread could be started for UCX; is a limit on them or on memory reached?")
            self.p.threaded = 1
            return
        loop.add_reader(self.p.efd, self.run)
        self.watch()

    def watch(self) -> None:
        """Look whether UCX has forgotten to tell of something, now and every second."""
        if not self.closed:
            self.run()
            self.watchdog = self.loop.call_later(WATCH_NS / 1e9, self.watch)

    cpdef object run(self):
        """Take a turn of the loop that drives this port."""
        cdef int64_t now = axf_now()
        cdef uint64_t heard = self.p.heard
        cdef bint awake
        cdef int more
        if self.closed:
            return
        self.scheduled = False
        with nogil:
            if pthread_mutex_trylock(&self.p.lock.mutex) != 0:
                more = -1
            else:
                awake = staying(&self.awake, now)
                more = turn(&self.p, TURN_NS, not awake) or awake
                pthread_mutex_unlock(&self.p.lock.mutex)
                self.awake.left = axf_now()
                if self.p.heard != heard:
                    stay(&self.awake, self.awake.left)
                    more = more or self.awake.until != 0
        if more < 0:
            return              # who holds the lock for long asks for a turn afterwards
        if self.queue is not None and self.p.ended != self.drained:
            self.drained = self.p.ended
            (<CompletionQueue>self.queue).drain()   # what has ended is settled in this turn of the loop
        if self.closed:
            return
        if more:
            self.schedule()
        elif self.p.due:
            self.remind()

    def schedule(self) -> None:
        """Take another turn soon. On the loop's own thread."""
        if not self.scheduled and not self.closed:
            self.scheduled = True
            self.loop.call_soon(self.run)

    def remind(self) -> None:
        """Take a turn when something is due."""
        cdef double when = self.loop.time() + max(self.p.due - axf_now(), 0) / 1e9 + 0.001
        if self.timer is not None:
            if self.timer.when() <= when and self.timer.when() > self.loop.time():
                return
            self.timer.cancel()
        self.timer = self.loop.call_at(when, self.run)

    cdef int kick(self) except -1:
        """See to it that a turn is taken soon, whichever thread this is."""
        if self.closed:
            return 0
        if not self.p.threaded and PyThread_get_thread_ident() == self.ident:
            self.schedule()
        else:
            ucp.worker_signal(self.p.worker)
        return 0

    def rouse(self) -> None:
        """See to it that a turn is taken soon, and that flights are looked at in it."""
        axf_store(&self.p.attention, 1)
        self.kick()

    def close_endpoint(self, uintptr_t endpoint) -> None:
        """Close an endpoint by force, whatever UCX holds of it, and wait for that. With the lock held."""
        cdef axf_ucp_param param
        cdef void* given
        cdef int closing = 1
        memset(&param, 0, sizeof(param))
        param.mask = AXF_OP_CALLBACK | AXF_OP_ARG | AXF_OP_FLAGS
        param.flags, param.done, param.arg = AXF_CLOSE_FORCE, endpoint_closed, &closing
        given = ucp.ep_close_nbx(<void*>endpoint, &param)
        if axf_ucp_failed(given):
            raise BackendError(f"UCX does not close an endpoint: {_ucp.word(axf_ucp_status(given))}")
        with nogil:
            while given != NULL and closing:
                ucp.worker_progress(self.p.worker)

    def free(self) -> None:
        """Let go of the worker. It has been closed, and nothing else holds the worker."""
        self.worker = None
        free(self.p.flights)
        self.p.flights = NULL

    def close(self) -> None:
        """End the turns. No endpoint is open any more."""
        if self.closed:
            return
        self.closed = True
        self.queue = None
        self.lock.ports = [port for port in self.lock.ports if port is not self]
        if self.p.threaded:
            axf_store(&self.p.stopping, 1)
            ucp.worker_signal(self.p.worker)
            with nogil:
                pthread_join(self.p.thread, NULL)
            self.p.threaded = 0
        elif self.loop is not None:
            self.loop.remove_reader(self.p.efd)
        for timer in (self.timer, self.watchdog):
            if timer is not None:
                timer.cancel()
        self.timer = self.watchdog = self.loop = None

    def forget(self) -> None:
        """In a forked child: leave everything as it is; the thread and the connections are the parent's."""
        self.closed = True
        self.p.threaded = 0
