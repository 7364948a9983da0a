# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False, auto_pickle=False, autotestdict=False
"""The copy engine: a few threads without the GIL, shared by all agents of the process.

Work is a transfer made ready once: absolute addresses, cut into chunks of about a megabyte. Posting it costs a lock
and a wake-up, or nothing but the copy where it is small. Threads take one chunk at a time and send the transfer to the
back of the ring, so that a long one does not hold up the short, and look between chunks whether it is to stop, is out
of time, or has lost its region or its peer. The last chunk to end settles it. It knows nothing of regions or loops.
"""

from libc.errno cimport EPERM, ESRCH
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset

from asyncxfer._fast.completion cimport (
    FAILED, FAULT, NOT_PERMITTED, OK, PEER_GONE, REVOKED, TIMED_OUT, Completion, op_finish, op_progress, op_t,
)
from asyncxfer._fast.link cimport Link
from asyncxfer._fast.native cimport *
from asyncxfer._fast.pthread cimport *

import numpy as np

cdef extern from "copy.h" nogil:
    void axf_guard_install()
    int axf_can_stream()
    int axf_guarded(void (*call)(void*) noexcept nogil, void* argument)
    int axf_scatter(const iovec* iov, const char* source, uint64_t left, int stream)
    int axf_copy_bytes(void* to, const void* source, size_t n)
    int axf_copy_chunk(const axf_pair* pairs, const axf_chunk* chunk, int put, int stream)
    int axf_cma_chunk(const axf_pair* pairs, const axf_chunk* chunk, int put, int pid, uint64_t* moved)

cdef enum:
    MAX_THREADS = 64
    PRIORITIES = 3              # interactive, normal, background


# ---- prepared work -------------------------------------------------------------------------------------------------

cdef class Work(Prepared):
    """A transfer made ready: where each row lies in memory, and how it is cut into chunks.

    Parameters
    ----------
    pairs : (n,) PAIR
        Matched rows, offsets relative to their segments, in stream order.
    local_bases, remote_bases : (segments,) uint64, addresses
        Where each segment begins, in this process or, with `attach`, in the peer's.
    put : bool
        Local to remote.
    attach : bool
        The remote addresses are the peer's own: move by process_vm_readv and writev.
    link, slot, epoch : Link or None, int, int
        The connection and the gate to pass; None when both sides belong to this agent.
    chunk_bytes, chunk_rows : int
        The largest chunk.
    small_bytes, small_rows : int
        Up to here it is done on the caller's thread.
    stream_bytes : int, bytes
        From here on copies bypass the cache; 0 for never.
    keep : object
        What must live as long: regions, mappings.
    """

    def __init__(
        self, pairs, local_bases, remote_bases, *, bint put, bint attach=False, Link link=None, uint32_t slot=0,
        uint32_t epoch=0, uint64_t chunk_bytes=1 << 20, uint64_t chunk_rows=1024, uint64_t small_bytes=0,
        uint64_t small_rows=0, uint64_t stream_bytes=0, keep=None,
    ) -> None:
        cdef const unsigned char[::1] raw = np.ascontiguousarray(pairs).view(np.uint8)
        cdef const uint64_t[::1] local = np.ascontiguousarray(local_bases, dtype=np.uint64)
        cdef const uint64_t[::1] remote = np.ascontiguousarray(remote_bases, dtype=np.uint64)
        cdef work_t* w = &self.w
        w.npairs = raw.shape[0] // sizeof(axf_pair)
        w.put, w.attach = put, attach
        w.link, w.slot, w.epoch = (NULL if link is None else &link.c), slot, epoch
        self.link, self.keep = link, keep
        if attach and link is None:
            raise ValueError("cross-memory attach needs a link to a process")
        if w.npairs:
            self.place(<const axf_pair*>&raw[0], local, remote)
            self.cut(max(chunk_bytes, 1), max(chunk_rows, 1))
        w.small = w.nbytes <= small_bytes and w.rows <= small_rows
        self.immediate = w.small and type(self) is Work     # kinds of it go by other ways
        w.stream = not attach and stream_bytes and w.nbytes >= stream_bytes and axf_can_stream()

    def __dealloc__(self):
        free(self.w.pairs)
        free(self.w.chunks)

    cdef int place(self, const axf_pair* given, const uint64_t[::1] local, const uint64_t[::1] remote) except -1:
        cdef work_t* w = &self.w
        cdef uint64_t i
        w.pairs = <axf_pair*>malloc(w.npairs * sizeof(axf_pair))
        if w.pairs == NULL:
            raise MemoryError(f"no memory for {w.npairs} matched rows")
        for i in range(w.npairs):
            if given[i].local_segment >= <uint64_t>local.shape[0] or given[i].remote_segment >= <uint64_t>remote.shape[0]:
                raise IndexError(f"pair {i} names a segment that its region does not have")
            w.pairs[i] = given[i]
            w.pairs[i].local += local[given[i].local_segment]
            w.pairs[i].remote += remote[given[i].remote_segment]
            w.nbytes += given[i].length * given[i].count
            w.rows += given[i].count
        return 0

    cdef int cut(self, uint64_t most_bytes, uint64_t most_rows) except -1:
        """Cuts the stream where a chunk has grown to either bound; a long row is cut inside."""
        cdef work_t* w = &self.w
        cdef uint64_t cuts = w.nbytes // most_bytes + 1     # each may count one row twice
        cdef uint64_t bound = cuts + (w.rows + cuts) // most_rows + 1
        cdef uint64_t at, row, skip, rows = 0, take
        cdef axf_chunk* chunk
        cdef const axf_pair* pair
        w.chunks = <axf_chunk*>calloc(bound, sizeof(axf_chunk))
        if w.chunks == NULL:
            raise MemoryError(f"no memory for {bound} chunks")
        chunk = w.chunks
        for at in range(w.npairs):
            pair = &w.pairs[at]
            row = skip = 0
            while row < pair.count and pair.length:
                if chunk.nbytes >= most_bytes or rows >= most_rows:
                    chunk += 1
                    chunk.pair, chunk.row, chunk.skip, rows = at, row, skip, 0
                take = min((most_bytes - chunk.nbytes) // pair.length, most_rows - rows)
                if skip == 0 and take:
                    take = min(take, pair.count - row)
                    chunk.nbytes += take * pair.length
                    row += take
                    rows += take
                    continue
                take = min(pair.length - skip, most_bytes - chunk.nbytes)
                chunk.nbytes += take
                skip += take
                rows += 1
                if skip == pair.length:
                    row, skip = row + 1, 0
        w.nchunks = 0 if chunk.nbytes == 0 else <uint32_t>(chunk - w.chunks) + 1
        return 0

    cdef bint run_at_once(self, Completion completion) noexcept:
        """Copies, with the GIL held: to let it go and get it back costs more, when another thread wants it."""
        cdef op_t* op = &completion.op
        cdef uint32_t i
        cdef int status = OK
        completion.prepared = self
        op.work = &self.w
        if not self.w.attach:
            axf_guard_install()
        op.inline_ = 1
        for i in range(self.w.nchunks):
            status = move(op, i)
            if status != OK:
                break
        op_finish(op, status, op.error)
        return True

    @property
    def nbytes(self) -> int:
        """Bytes that it moves."""
        return self.w.nbytes

    @property
    def rows(self) -> int:
        """Rows after matching and merging."""
        return self.w.rows

    @property
    def small(self) -> bool:
        """Whether it is done on the caller's thread."""
        return self.w.small == 1

    def ends(self):
        """Where in the stream each chunk ends.

        Returns
        -------
        (chunks,) uint64, bytes
        """
        out = np.empty(self.w.nchunks, dtype=np.uint64)
        cdef uint64_t[::1] view = out
        cdef uint64_t total = 0
        cdef uint32_t i
        for i in range(self.w.nchunks):
            total += self.w.chunks[i].nbytes
            view[i] = total
        return out


# ---- one chunk -------------------------------------------------------------------------------------------------------

cdef int meaning(const work_t* w, int error) noexcept nogil:
    """What an errno under a copy means for the transfer."""
    if error == ESRCH or (w.link != NULL and axf_link_gone(w.link)):
        return PEER_GONE
    return NOT_PERMITTED if error == EPERM else FAULT


cdef int move(op_t* op, uint32_t index) noexcept nogil:
    """Moves one chunk, or says why not. Passes the region's gate, so that its owner can revoke it."""
    cdef const work_t* w = <const work_t*>op.work
    cdef axf_gate* gate = NULL
    cdef uint64_t moved = 0
    cdef int error
    if op.deadline and axf_now() >= op.deadline:
        return TIMED_OUT
    if w.link != NULL:
        if w.put and not axf_load(&w.link.alive):
            return PEER_GONE
        gate = axf_gate_at(w.link.page, w.slot)
        if not axf_gate_enter(gate, w.epoch):
            return PEER_GONE if axf_link_gone(w.link) else REVOKED
    if not w.attach:
        error = axf_copy_chunk(w.pairs, &w.chunks[index], w.put, w.stream)
        moved = w.chunks[index].nbytes if error == 0 else 0
    elif axf_link_gone(w.link):
        error = ESRCH           # the number may belong to another process by now
    else:
        error = axf_cma_chunk(w.pairs, &w.chunks[index], w.put, w.link.pid, &moved)
    if gate != NULL:
        axf_gate_leave(gate)
    axf_add64(&op.moved, moved)
    if error == 0:
        return OK
    op.error = error
    return meaning(w, error)


cdef int copy_bytes(void* to, const void* source, size_t n) noexcept nogil:
    """Copies what may go away under the copy: 0, or EFAULT. `acquire` or `guard` was called before."""
    return axf_copy_bytes(to, source, n)


cdef int scatter(const iovec* iov, const void* source, uint64_t nbytes, bint stream) noexcept nogil:
    """Copies so many bytes that lie one after another to pieces of memory: 0, or EFAULT; `stream`: past the caches."""
    return axf_scatter(iov, <const char*>source, nbytes, stream and axf_can_stream())


cdef int guarded(void (*call)(void*) noexcept nogil, void* argument) noexcept nogil:
    """Calls what reads such memory and keeps nothing open: 0, or EFAULT."""
    return axf_guarded(call, argument)


def guard() -> None:
    """See to it that memory which goes away under a copy is an error of that copy."""
    axf_guard_install()


# ---- threads ---------------------------------------------------------------------------------------------------------

cdef struct ring_t:
    op_t* first
    op_t* last


cdef struct engine_t:
    pthread_mutex_t lock
    pthread_cond_t more
    ring_t rings[PRIORITIES]
    pthread_t threads[MAX_THREADS]
    int running, wanted, idle, stopping, users


cdef engine_t engine


cdef void reset() noexcept nogil:
    memset(&engine, 0, sizeof(engine))
    pthread_mutex_init(&engine.lock, NULL)
    pthread_cond_init(&engine.more, NULL)


reset()


cdef void ring_append(op_t* op, int priority) noexcept nogil:
    cdef ring_t* ring = &engine.rings[priority]
    op.ring_next = NULL
    if ring.last == NULL:
        ring.first = op
    else:
        ring.last.ring_next = op
    ring.last = op
    if engine.idle:
        pthread_cond_signal(&engine.more)


cdef op_t* ring_pop(int* priority) noexcept nogil:
    cdef op_t* op
    cdef ring_t* ring
    cdef int p
    for p in range(PRIORITIES):
        ring = &engine.rings[p]
        op = ring.first
        if op != NULL:
            ring.first = op.ring_next
            if ring.first == NULL:
                ring.last = NULL
            priority[0] = p
            return op
    return NULL


cdef void step(op_t* op, int priority) noexcept nogil:
    """One chunk of one transfer. Called and left with the lock held."""
    cdef const work_t* w = <const work_t*>op.work
    cdef uint32_t index
    cdef int status
    if axf_load(&op.stop):
        op.left -= w.nchunks - op.next_chunk
        op.next_chunk = w.nchunks
    else:
        index = op.next_chunk
        op.next_chunk += 1
        if op.next_chunk < w.nchunks:
            ring_append(op, priority)
        pthread_mutex_unlock(&engine.lock)
        status = move(op, index)
        if status == OK:
            op.marks[index] = 1
            op_progress(op)
        else:
            axf_claim(&op.stop, 0, status)
        pthread_mutex_lock(&engine.lock)
        op.left -= 1
    if op.left == 0:
        pthread_mutex_unlock(&engine.lock)
        op_finish(op, axf_load(&op.stop), op.error)
        pthread_mutex_lock(&engine.lock)


cdef void* worker(void* arg) noexcept nogil:
    cdef op_t* op
    cdef int priority = 0
    axf_be_patient()            # event loops go first
    pthread_mutex_lock(&engine.lock)
    while True:
        op = ring_pop(&priority)
        if op != NULL:
            step(op, priority)
        elif engine.stopping:
            break
        else:
            engine.idle += 1
            pthread_cond_wait(&engine.more, &engine.lock)
            engine.idle -= 1
    pthread_mutex_unlock(&engine.lock)
    return NULL


# ---- what Python calls ---------------------------------------------------------------------------------------------

def acquire(int threads) -> None:
    """Take part in the engine, with at least so many threads. They start with the first work for them."""
    axf_guard_install()
    engine.users += 1
    engine.wanted = max(engine.wanted, min(max(threads, 1), <int>MAX_THREADS))


def release() -> None:
    """Leave it. The last to do so ends the threads; nothing of theirs is in flight by then."""
    cdef int i
    engine.users -= 1
    if engine.users > 0:
        return
    with nogil:
        pthread_mutex_lock(&engine.lock)
        engine.stopping = 1
        pthread_cond_broadcast(&engine.more)
        pthread_mutex_unlock(&engine.lock)
        for i in range(engine.running):
            pthread_join(engine.threads[i], NULL)
        reset()


def after_fork() -> None:
    """In a child: the threads and what they were doing belong to the parent."""
    reset()


def threads() -> int:
    """Threads that run now."""
    return engine.running


cdef bint post(op_t* op, int rank) noexcept:
    """Hands the op to the threads; False when not one could be started."""
    cdef bint posted = True
    pthread_mutex_lock(&engine.lock)
    while engine.running < engine.wanted:
        if start_thread(&engine.threads[engine.running], worker, b"axf-copy") != 0:
            break
        engine.running += 1
    posted = engine.running > 0     # also 0 when the last agent was closed while another thread came here
    if posted:
        ring_append(op, rank)
    pthread_mutex_unlock(&engine.lock)
    return posted


def submit(Work work not None, Completion completion not None, int priority=0) -> None:
    """Start the work; it ends through the completion. Never blocks: small work is done before it returns.

    Parameters
    ----------
    priority : int
        Above 0 it goes before, below 0 after all that is in flight with 0.
    """
    cdef op_t* op = &completion.op
    cdef work_t* w = &work.w
    if w.small or w.nchunks == 0:
        completion.hold()
        work.run_at_once(completion)
        if op.inline_:                  # else it waits for its note to go out
            completion.release()
        return
    completion.prepared = work
    op.work = w
    if not w.attach:
        axf_guard_install()
    op.chunks = op.left = w.nchunks
    op.marks = <unsigned char*>calloc(w.nchunks, 1)
    if op.marks == NULL:
        raise MemoryError("no memory to follow a transfer")
    completion.hold()
    if not post(op, 0 if priority > 0 else 1 if priority == 0 else 2):
        op.inline_ = 1
        op_finish(op, FAILED, 0)
        completion.release()
