# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, autotestdict=False
"""Completions: how a transfer ends, whoever carried it, and how that reaches the event loop that waits for it.

A Completion is one transfer in flight. A backend ends it once, from any thread, with or without the GIL. What ending
means is decided here for all of them: the peer must still be there, the notification goes out behind the data, the
counters that both sides read are advanced, and only then does the transfer count as ended.

A CompletionQueue belongs to one event loop: a lock-free stack and one eventfd, written only when the stack was empty,
so that many completions cost one wake-up. It knows nothing of futures; draining calls back into the Completion.
"""

from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.errno cimport EAGAIN, ENOBUFS
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from posix.unistd cimport close, read, write

from asyncxfer._fast.link cimport Link
from asyncxfer._fast.native cimport *
from asyncxfer._fast.outbox cimport outbox_post, outbox_wake

from asyncxfer._errors import BackendError

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int initial, int flags)
    enum: EFD_CLOEXEC, EFD_NONBLOCK

STATUS_OK = OK
STATUS_CANCELLED = CANCELLED
STATUS_TIMED_OUT = TIMED_OUT
STATUS_PEER_GONE = PEER_GONE
STATUS_REVOKED = REVOKED
STATUS_FAULT = FAULT
STATUS_DENIED = DENIED
STATUS_FAILED = FAILED
STATUS_MISMATCH = MISMATCH
STATUS_NOT_PERMITTED = NOT_PERMITTED

cdef long _live = 0


def live() -> int:
    """Completions and queues that exist now (for leak checks)."""
    return _live


# ---- ending ------------------------------------------------------------------------------------------------------

cdef void enqueue(queue_t* q, node_t* node) noexcept nogil:
    # Once pushed, neither op nor queue may be touched, but for the fd, which `pushing` keeps open.
    cdef uint64_t one = 1
    axf_add(&q.pushing, 1)
    if axf_push(&q.head, &node.next):
        write(q.fd, &one, 8)
    axf_add(&q.pushing, -1)


cdef void op_progress(op_t* op) noexcept nogil:
    """Tells an iterating reader that chunks have ended; only before the op's own end."""
    if axf_load(&op.watched) and axf_swap(&op.progress_queued, 1) == 0:
        enqueue(op.queue, &op.progress)


cdef void op_settle(op_t* op, int status, int error) noexcept nogil:
    """The last thing that native code does with an op."""
    cdef axf_page* page
    cdef queue_t* queue = NULL if op.inline_ else op.queue
    op.status = status
    op.error = error
    if op.link != NULL and op.nbytes and not op.carried and op.link.page != NULL:
        page = op.link.page
        if status != OK:
            axf_add64(&page.failed, 1)
        elif op.put:
            axf_add64(&page.puts, 1)
            axf_add64(&page.put_bytes, op.nbytes)
        else:
            axf_add64(&page.gets, 1)
            axf_add64(&page.get_bytes, op.nbytes)
    op.ended = axf_now()
    axf_store(&op.state, 1)
    if queue != NULL:
        enqueue(queue, &op.final)


cdef void op_finish(op_t* op, int status, int error) noexcept nogil:
    """Ends a transfer whose buffers are quiescent: once an op, from any thread."""
    cdef int rc
    if status == OK:
        status = axf_load(&op.stop)
    if status == OK and op.put and op.link != NULL and axf_link_gone(op.link):
        status = PEER_GONE
    if op.has_note and not op.carried and op.link.remote:
        op.status, op.error, op.letter, op.inline_ = status, error, 1, 0
        enqueue(op.queue, &op.final)
        return
    if op.has_note and not op.carried:
        rc = EAGAIN
        if not axf_load(&op.link.queued):
            rc = axf_link_note(op.link, c'N' if status == OK else c'F', op.note, op.note_bytes)
        if rc == EAGAIN or rc == ENOBUFS:
            if status == OK:
                op.inline_ = 0
                if outbox_post(op.link, c'N', op.note, op.note_bytes, op) == 0:
                    return
                status, error = FAILED, ENOBUFS
            else:
                outbox_post(op.link, c'F', op.note, op.note_bytes, NULL)
        elif rc != 0 and status == OK:
            status, error = PEER_GONE, rc
    op_settle(op, status, error)


# ---- the queue of one loop -----------------------------------------------------------------------------------------

cdef class CompletionQueue:
    """Finished transfers on their way to one event loop.

    Watch `fileno()` for reading and call `drain()`.
    """

    def __cinit__(self) -> None:
        global _live
        self.q.fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.q.fd < 0:
            raise OSError("no eventfd could be made for the completion queue")
        _live += 1

    def __dealloc__(self):
        global _live
        self.forget()
        _live -= 1

    def fileno(self) -> int:
        """The eventfd that turns readable when something has finished."""
        return self.q.fd

    def close(self) -> None:
        """Settle what has finished, and close the eventfd. Nothing that was posted with this queue may be in flight."""
        while axf_load(&self.q.pushing):
            pass  # a few instructions and one write away from 0
        try:
            while self.q.fd >= 0 and self.drain():
                pass  # it settles a fraction of a millisecond's worth at a time
        finally:
            self.forget()

    cpdef void forget(self):
        """Close the eventfd and leave all else as it is: in a forked child, what is in flight is the parent's."""
        if self.q.fd >= 0:
            close(self.q.fd)
            self.q.fd = -1

    cpdef int drain(self) except -1:
        """Settle what has finished, for a fraction of a millisecond at most; gives the number settled."""
        cdef uint64_t count = 1
        cdef node_t* node
        cdef node_t* next_
        cdef int settled = 0
        cdef int64_t end = axf_now() + TURN_NS
        self.held_ns = 0
        if self.backlog == NULL:
            read(self.q.fd, &count, 8)
            node = <node_t*>axf_take(&self.q.head)
            while node != NULL:  # the stack is newest first; settle in order
                next_ = <node_t*>node.next
                node.next = self.backlog
                self.backlog, node = node, next_
        try:
            while self.backlog != NULL:
                node = self.backlog
                self.backlog = <node_t*>node.next
                dispatch(node)
                settled += 1
                if settled % 8 == 0 and axf_now() > end:
                    break
        finally:  # also behind an exception: what is left has nobody else to wake the loop for it
            if self.backlog != NULL:
                count = 1
                write(self.q.fd, &count, 8)
        return settled

    def overdue(self, int64_t nanoseconds) -> bool:
        """Whether transfers that ended inline have by now taken their share of a turn, this one included."""
        self.inline_ns += nanoseconds
        if self.inline_ns < TURN_NS:
            return False
        self.inline_ns = self.held_ns = 0
        return True


cdef int dispatch(node_t* node) except -1:
    cdef op_t* op = node.op
    cdef Completion completion = <Completion>op.owner
    if node == &op.progress:
        axf_store(&op.progress_queued, 0)
        completion._progressed()
    elif op.letter == 1:
        op.letter = 2
        completion._post_note(completion._told)
    else:
        op.letter = 0
        completion.release()
        completion._settled()
    return 0


# ---- one transfer ----------------------------------------------------------------------------------------------------

cdef class Completion:
    """One transfer in flight, as a backend sees it.

    A backend that is written in Python calls `post` when it starts, and `succeed` or `fail` once, from any thread,
    when nothing reads the source or writes the destination any more. While `stopping` is true the transfer is to end
    early: what has not begun need not begin.

    Parameters
    ----------
    queue : CompletionQueue
        Where the end is announced.
    nbytes : int, bytes
        What the transfer moves.
    put : bool
        Direction: local to remote.
    link : Link or None
        The connection whose peer has to be there for a put to have succeeded.
    note : bytes or None
        A notification that goes out behind the data.
    timeout : float or None, seconds
        After which it ends with a time-out.
    """

    def __cinit__(self) -> None:
        global _live
        _live += 1

    def __init__(
        self, CompletionQueue queue not None, uint64_t nbytes, bint put, Link link=None, bytes note=None, timeout=None,
    ) -> None:
        self.begin(queue, nbytes, put, link, note, timeout)

    cdef int begin(
        self, CompletionQueue queue, uint64_t nbytes, bint put, Link link, bytes note, timeout
    ) except -1:
        cdef op_t* op = &self.op
        self.queue = queue
        self._link = link
        self._note = note
        op.owner = <void*>self
        op.final.op = op.progress.op = op
        op.queue = &queue.q
        op.link = NULL if link is None else &link.c
        op.nbytes = nbytes
        op.put = put
        if note is not None:
            if link is None:
                raise ValueError("a notification needs a link to go over")
            op.has_note, op.note, op.note_bytes = 1, note, len(note)
        op.started = axf_now()
        if timeout is not None:
            op.deadline = op.started + <int64_t>(<double>timeout * 1e9) + 1
        return 0

    def __dealloc__(self):
        global _live
        _live -= 1
        free(self.op.marks)

    cdef void hold(self):
        # In flight a completion keeps itself: user code may drop it, native code still points to it.
        if not self.held:
            self.held = True
            Py_INCREF(self)

    cdef void release(self):
        if self.held:
            self.held = False
            Py_DECREF(self)

    # -- for core

    def done(self) -> bool:
        """Whether the transfer has ended. Any thread may ask."""
        return axf_load(&self.op.state) == 1

    def announce(self) -> None:
        """Tell the receiver that a notification is on its way, so that it learns when the sender is lost."""
        if self.op.has_note and axf_load(&self.op.state) == 0 and not self.op.link.remote:
            axf_link_note(self.op.link, c'I', self.op.note, self.op.note_bytes)

    def stop(self, int status) -> bool:
        """Ask for an early end; False when it had ended or been asked before."""
        if axf_load(&self.op.state) or not axf_claim(&self.op.stop, 0, status):
            return False
        outbox_wake()
        if self.op.on_stop != NULL:
            self.op.on_stop(&self.op)
        stopper, self._stopper = self._stopper, None
        if stopper is not None:
            stopper()
        return True

    def watch(self, bint on) -> None:
        """Switch progress reports on or off."""
        axf_store(&self.op.watched, on)

    @property
    def status(self) -> int:
        """How it ended, one of the ``STATUS_`` numbers; -1 while it is in flight."""
        return self.op.status if axf_load(&self.op.state) else -1

    @property
    def errno(self) -> int:
        """The system's word for why it failed; 0 where there is none."""
        return self.op.error

    @property
    def detail(self) -> int:
        """More on the status: with ``STATUS_MISMATCH`` the chunk whose bytes came wrong."""
        return self.op.detail

    @property
    def error(self) -> BaseException | None:
        """The exception that a backend failed it with."""
        if self._error is None and self.op.detail and axf_load(&self.op.state) and self.op.status == FAILED:
            op = &self.op
            self._error = self.prepared.failure(op.detail, op.error, op.at, op.wanted, op.found)
        return self._error

    @property
    def moved(self) -> int:
        """Bytes moved so far."""
        if axf_load(&self.op.state) and self.op.status == OK:
            return self.op.nbytes
        return axf_load64(&self.op.moved)

    @property
    def elapsed(self) -> int:
        """Nanoseconds from post to end, or until now."""
        return (self.op.ended if axf_load(&self.op.state) else axf_now()) - self.op.started

    @property
    def inlined(self) -> bool:
        """Whether it ended within the call that posted it, so that no queue will tell."""
        return self.op.inline_ == 1

    def marks(self) -> bytes:
        """One byte a chunk of the engine's work, 1 where it has been moved; empty where there are no chunks."""
        return b"" if self.op.marks == NULL else <bytes>(<char*>self.op.marks)[: self.op.chunks]

    def _post_note(self, told) -> None:
        """Called on the loop of the queue when all but the note to a peer on another host is done; `told` ends it."""
        if self._link.post is None:
            told(False)
        else:
            self._link.post(b"N" if self.op.status == OK else b"F", self._note, told)

    def _told(self, bint delivered) -> None:
        # Once: after the delivery, its failure, or the early end of what waits for it, whichever is first.
        cdef int status = self.op.status
        if self.op.letter == 2:
            self.op.letter = 3
            self._stopper = None
            if status == OK and not delivered:
                status = axf_load(&self.op.stop) or PEER_GONE
            op_settle(&self.op, status, self.op.error)

    def _settled(self) -> None:
        """Called on the loop of the queue, once, when a transfer that did not end inline has ended."""

    def _progressed(self) -> None:
        """Called on the loop of the queue when chunks have ended since the last call, while watched."""

    # -- for backends written in Python

    @property
    def stopping(self) -> bool:
        """Whether the transfer is to end early: it was stopped, or is out of time."""
        if self.op.deadline and axf_load(&self.op.stop) == OK and axf_now() >= self.op.deadline:
            axf_claim(&self.op.stop, OK, TIMED_OUT)
        return axf_load(&self.op.stop) != OK

    @property
    def remaining(self) -> float | None:
        """Seconds that are left of its time limit; None where it has none."""
        return max(self.op.deadline - axf_now(), 0) / 1e9 if self.op.deadline else None

    def post(self, stopper=None, uint32_t chunks=0) -> None:
        """Say that the transfer is in flight; `stopper()` is called, from any thread, when it should end early.

        `chunks` is how many numbers `advance` will name: as many as `ends` of what was prepared has.
        """
        self._stopper = stopper
        if chunks:
            self.op.marks = <unsigned char*>calloc(chunks, 1)
            if self.op.marks == NULL:
                raise MemoryError
            self.op.chunks = chunks
        self.hold()

    def advance(self, uint64_t nbytes, int64_t chunk=-1) -> None:
        """Add to the bytes moved so far; with `chunk`, all of that one are."""
        axf_add64(&self.op.moved, nbytes)
        if 0 <= chunk < self.op.chunks:
            self.op.marks[chunk] = 1
        op_progress(&self.op)

    def end_now(self) -> None:
        """End it within this call: there is nothing to move, only something to say."""
        self.hold()
        self.op.inline_ = 1
        op_finish(&self.op, OK, 0)
        if self.op.inline_:
            self.release()

    def succeed(self) -> None:
        """The data is where it should be and the buffers are quiescent. It counts as stopped if it was to stop."""
        self.claim_end()
        with nogil:
            op_finish(&self.op, OK, 0)

    def fail(self, error: BaseException) -> None:
        """The transfer did not succeed and the buffers are quiescent."""
        self.claim_end()
        self._error = error
        with nogil:
            op_finish(&self.op, FAILED, 0)

    cdef int claim_end(self) except -1:
        # A second end would put the node on the stack twice. The GIL is held: no two threads pass.
        if self.ending or axf_load(&self.op.state):
            raise BackendError("a completion was ended twice; a backend calls succeed() or fail() once a transfer")
        self.ending = True
        self._stopper = None  # which as a rule holds this: only the collector of garbage would find the two
        self.hold()
        return 0


# ---- what is posted ----------------------------------------------------------------------------------------------------

cdef class Prepared:
    """What a backend has made ready, where that is done in native code."""

    cdef bint run_at_once(self, Completion completion) noexcept:
        """Does it, with the GIL held, where nothing has to be waited for; whether it has ended. Only if `immediate`."""
        return False
