# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False, auto_pickle=False, autotestdict=False
"""Moves bytes between memory and files by threads, without the GIL.

The threads are shared by all agents of the process. Some copy from the page cache, some to it; what would have to wait
for a device is the ring's (see `uring`). Where there is none, further threads do everything by calls that block. A
thread takes a request, or some that are small, and sends the transfer to the back of the queue. Through the page cache
one thread at a time writes to a file: the file system would make the others wait in turns.

What the page cache has is copied from a view of the file, past the processor's caches where it is much: the kernel's
own copy, which knows neither that nor what will be read next, takes twice the time.
"""

from libc.errno cimport EAGAIN, EINVAL, EIO, EOPNOTSUPP
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc
from libc.string cimport memset

from asyncxfer._fast.completion cimport FAILED, OK, Completion, op_finish, op_t
from asyncxfer._fast.engine cimport scatter
from asyncxfer._fast.fileflight cimport *
from asyncxfer._fast.filework cimport (
    MOST_IOVECS, SYNC_FULL, SYNC_NONE, FileWork, axf_file_cached, axf_file_move, axf_file_size, axf_file_sync,
    axf_iov_rest, file_t, filework_t, gate_t, iovec, request_t,
)
from asyncxfer._fast.native cimport *
from asyncxfer._fast.pthread cimport *
from asyncxfer._fast.uring cimport ring_on_stop, ring_push, ring_start

from asyncxfer._fast import engine, uring

cdef extern from "<sys/mman.h>" nogil:
    int madvise(void* addr, size_t length, int advice)

cdef enum:
    MADV_POPULATE_READ = 22     # Linux 5.14; newer than many headers

cdef enum:
    LEAST_SEEN = 16384          # below this the kernel's way is no slower
    LEAST_PREPARED = 262144     # from here on it pays to have the pages mapped at once
    STREAM_BYTES = 4 << 20      # transfers from here on go past the caches
    TURN_BYTES = 262144         # that a thread moves before it looks at other transfers, but for larger requests
    MAX_THREADS = 64
    PRIORITIES = 3              # interactive, normal, background
    POOLS = 3

cdef enum:
    READERS = 0                 # read what is in the page cache
    WRITERS = 1                 # write to it, and so may have to wait
    BLOCKERS = 2                # do all there is to do, and wait for the device

cdef struct queue_t:
    flight_t* first
    flight_t* last


cdef struct pool_t:
    pthread_mutex_t lock
    pthread_cond_t more
    queue_t queues[PRIORITIES]
    pthread_t threads[MAX_THREADS]
    int running, wanted, idle, stopping


cdef pool_t pools[POOLS]
cdef int users = 0


cdef void reset() noexcept nogil:
    cdef int i
    memset(pools, 0, sizeof(pools))
    for i in range(POOLS):
        pthread_mutex_init(&pools[i].lock, NULL)
        pthread_cond_init(&pools[i].more, NULL)


reset()


# ---- queues; all with the pool's lock held -----------------------------------------------------------------------------

cdef void append(pool_t* pool, flight_t* f, bint wake) noexcept nogil:
    """Puts it behind all others of its rank; without `wake`, for the thread that has just had it."""
    cdef queue_t* queue = &pool.queues[f.rank]
    f.next = NULL
    if queue.last == NULL:
        queue.first = f
    else:
        queue.last.next = f
    queue.last = f
    if not wake:
        return
    if pool.idle:
        pthread_cond_signal(&pool.more)
    elif pool.running < pool.wanted and start_thread(&pool.threads[pool.running], worker, b"axf-file", pool) == 0:
        pool.running += 1


cdef flight_t* pop(pool_t* pool) noexcept nogil:
    cdef queue_t* queue
    cdef flight_t* f
    cdef int p
    for p in range(PRIORITIES):
        queue = &pool.queues[p]
        f = queue.first
        if f != NULL:
            queue.first = f.next
            if queue.first == NULL:
                queue.last = NULL
            return f
    return NULL


cdef bint park(gate_t* gate, flight_t* f) noexcept nogil:
    """Sets it aside where another thread writes to its file."""
    if not gate.writing:
        return False
    f.next = NULL
    if gate.parked[f.rank] == NULL:
        gate.parked[f.rank] = f
    else:
        (<flight_t*>gate.parked_last[f.rank]).next = f
    gate.parked_last[f.rank] = f
    return True


cdef void unpark(pool_t* pool, gate_t* gate) noexcept nogil:
    """The next that waits for the file may go on."""
    cdef flight_t* f
    cdef int p
    for p in range(PRIORITIES):
        f = <flight_t*>gate.parked[p]
        if f != NULL:
            gate.parked[p] = f.next
            append(pool, f, False)
            return


# ---- one request -------------------------------------------------------------------------------------------------------

cdef bint seen(const filework_t* w, const request_t* r) noexcept nogil:
    """Copies a request that the page cache has from the view of the file: half the work of having the kernel do it."""
    cdef file_t* file = w.file
    cdef uint64_t first
    cdef int cached
    if r.nbytes < LEAST_SEEN or r.offset + r.nbytes > file.view_bytes or not axf_load(&file.can_be_seen):
        return False
    cached = axf_file_cached(file.fd, r.offset, r.nbytes)
    if cached < 0:
        axf_store(&file.can_be_seen, 0)
    if cached <= 0:
        return False
    if r.nbytes >= LEAST_PREPARED:
        first = r.offset & ~<uint64_t>4095
        madvise(<void*>(file.view + first), r.offset + r.nbytes - first, MADV_POPULATE_READ)
    if scatter(&w.iov[r.iov], file.view + r.offset, r.nbytes, w.nbytes >= STREAM_BYTES):
        return False
    return axf_file_size(file.fd) >= r.offset + r.nbytes      # the rest of its last page is zeros


cdef bint perform(flight_t* f, uint32_t index) noexcept nogil:
    """Carries it out, or as much as can be had at once where the ring does the rest; whether it has ended."""
    cdef const filework_t* w = f.work
    cdef const request_t* r = &w.requests[index]
    cdef file_t* file = w.file
    cdef iovec rest[MOST_IOVECS]
    cdef const iovec* iov = &w.iov[r.iov]
    cdef uint32_t n = r.n
    cdef uint64_t got = 0
    cdef int64_t rc
    cdef int fd = file.fd
    cdef bint refuse = f.ringed and not w.write and not file.in_memory
    if r.direct:
        fd = file.direct
    if not (w.write or r.direct) and flight_status(f) == OK and seen(w, r):
        flight_moved(f, index, r.nbytes)
        return True
    if refuse and not axf_load(&file.can_refuse):
        leave(f, index, 0)
        return False
    while flight_status(f) == OK:
        rc = axf_file_move(fd, iov, n, r.offset + got, w.write, refuse)
        if rc > 0:
            got += <uint64_t>rc
            if got == r.nbytes:
                flight_moved(f, index, got)
                break
            n = axf_iov_rest(&w.iov[r.iov], r.n, got, rest)
            iov = rest
            fd = file.fd                    # what follows a part of a request may begin anywhere
        elif refuse and (rc == -EAGAIN or rc == -EOPNOTSUPP):
            if rc == -EOPNOTSUPP:
                axf_store(&file.can_refuse, 0)
            leave(f, index, got)
            return False
        elif rc == -EINVAL and fd != file.fd:
            fd = file.fd                    # the file system wants another alignment than it says
        else:
            flight_trouble(f, index, got, EIO if rc == 0 and w.write else <int>-rc)
            break
    return True


cdef void leave(flight_t* f, uint32_t index, uint64_t got) noexcept nogil:
    """Prepares a request, or what is left of it, for the ring."""
    cdef call_t* call = &f.calls[index]
    call.flight, call.request, call.got = f, index, <uint32_t>got


cdef void over(flight_t* f) noexcept nogil:
    """All its requests have ended."""
    cdef int error
    if f.work.write and f.work.file.sync and axf_load(&f.op.stop) == OK:
        if f.ringed:
            ring_push(&f.self_)
            return
        error = axf_file_sync(f.work.file.fd, f.work.file.sync == SYNC_FULL)
        if error:
            flight_sync_trouble(f, error)
    flight_end(f)


cdef uint32_t turn(const pool_t* pool, const flight_t* f) noexcept nogil:
    """How many requests a thread does at a time: one where it may have to wait, else some that are small."""
    cdef const request_t* requests = f.work.requests
    cdef uint32_t at = f.at
    cdef uint64_t nbytes = requests[at].nbytes
    at += 1
    while pool != &pools[BLOCKERS] and at < f.end and nbytes + requests[at].nbytes <= TURN_BYTES:
        nbytes += requests[at].nbytes
        at += 1
    return at - f.at


cdef void step(pool_t* pool, flight_t* f) noexcept nogil:
    """The next requests of one transfer. Called and left with the lock held."""
    cdef gate_t* gate = &f.work.file.gates[pool == &pools[BLOCKERS]]
    cdef uint32_t index = f.at, less = 0, end
    cdef bint alone = f.work.write and not f.work.requests[index].direct
    if flight_status(f) != OK:
        less = f.end - f.at
        f.at = f.end
        pthread_mutex_unlock(&pool.lock)
    elif alone and park(gate, f):
        return
    else:
        end = index + turn(pool, f)
        f.at = end
        if alone:
            gate.writing = 1
        elif end < f.end:
            append(pool, f, True)
        pthread_mutex_unlock(&pool.lock)
        for index in range(index, end):
            if perform(f, index):
                less += 1
            else:                       # the ring has the rest of it; and if it was the last, the flight may be gone
                ring_push(&f.calls[index])
        if alone:                       # before it may have ended: the file may go with it
            pthread_mutex_lock(&pool.lock)
            gate.writing = 0
            unpark(pool, gate)
            if f.at < f.end:
                append(pool, f, False)
            pthread_mutex_unlock(&pool.lock)
    if flight_less(f, less):
        over(f)
    pthread_mutex_lock(&pool.lock)


cdef void* worker(void* arg) noexcept nogil:
    cdef pool_t* pool = <pool_t*>arg
    cdef flight_t* f
    axf_be_patient()            # event loops go first
    pthread_mutex_lock(&pool.lock)
    while True:
        f = pop(pool)
        if f != NULL:
            step(pool, f)
        elif pool.stopping:
            break
        else:
            pool.idle += 1
            pthread_cond_wait(&pool.more, &pool.lock)
            pool.idle -= 1
    pthread_mutex_unlock(&pool.lock)
    return NULL


# ---- what Python calls ---------------------------------------------------------------------------------------------

def acquire(int readers, int blockers) -> None:
    """Take part, with at least so many threads that read, and that do all there is to do. They start with the work."""
    global users
    engine.guard()
    users += 1
    want(READERS, readers)
    want(WRITERS, 4)            # files that are written to at a time
    want(BLOCKERS, blockers)


cdef void want(int number, int count) noexcept:
    pools[number].wanted = max(pools[number].wanted, min(max(count, 1), <int>MAX_THREADS))


def release() -> None:
    """Leave. The last to do so ends the threads; nothing of theirs is in flight by then."""
    global users
    cdef pool_t* pool
    cdef int number, i
    users -= 1
    if users > 0:
        return
    with nogil:
        for number in range(POOLS):
            pool = &pools[number]
            pthread_mutex_lock(&pool.lock)
            pool.stopping = 1
            pthread_cond_broadcast(&pool.more)
            pthread_mutex_unlock(&pool.lock)
            for i in range(pool.running):
                pthread_join(pool.threads[i], NULL)
        reset()
    uring.release()


def after_fork() -> None:
    """In a child: the threads and what they were doing belong to the parent."""
    global users
    users = 0
    reset()
    uring.after_fork()


def threads() -> int:
    """Threads that run now."""
    cdef int number, n = 0
    for number in range(POOLS):
        n += pools[number].running
    return n


cdef void end_inline(Completion completion, int status) noexcept:
    completion.hold()
    completion.op.inline_ = 1
    op_finish(&completion.op, status, 0)
    if completion.op.inline_:
        completion.release()


cdef bint post(pool_t* pool, flight_t* f) noexcept:
    """Hands it to the threads; False when not one could be started."""
    cdef bint posted
    pthread_mutex_lock(&pool.lock)
    append(pool, f, True)
    posted = pool.running > 0
    if not posted:
        pop(pool)
    pthread_mutex_unlock(&pool.lock)
    return posted


def submit(FileWork work not None, Completion completion not None, int priority=0) -> None:
    """Start a transfer; it ends through the completion.

    Parameters
    ----------
    priority : int
        Above 0 it goes before, below 0 after all that is in flight with 0.
    """
    cdef op_t* op = &completion.op
    cdef const filework_t* w = &work.w
    cdef int rank = 0 if priority > 0 else 1 if priority == 0 else 2
    cdef flight_t* f
    cdef bint direct
    completion.prepared = work
    if w.nrequests == 0:
        end_inline(completion, OK)
        return
    op.marks = <unsigned char*>calloc(w.niov, 1)
    f = NULL if op.marks == NULL else flight_new(op, w, rank, waits(w) and ring_start() == 0)
    if f == NULL:
        raise MemoryError("no memory to follow a transfer")
    op.chunks = w.niov
    if f.ringed:
        op.on_stop = ring_on_stop
    completion.hold()
    direct = f.ringed and w.ncached < w.nrequests       # asked now: a flight whose requests have ended is gone
    if f.at < f.end and not post(pool_of(f), f):
        flight_free(f)
        end_inline(completion, FAILED)
    elif direct:
        ring_push(&f.self_)


cdef bint waits(const filework_t* w) noexcept nogil:
    """Whether there is anything that the ring is for."""
    if not w.ring:
        return False
    if w.ncached < w.nrequests:
        return True
    return w.file.sync != SYNC_NONE if w.write else w.file.in_memory == 0


cdef pool_t* pool_of(const flight_t* f) noexcept nogil:
    if f.ringed or (f.work.ring and not waits(f.work)):
        return &pools[WRITERS if f.work.write else READERS]
    return &pools[BLOCKERS]
