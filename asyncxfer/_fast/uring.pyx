# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False, auto_pickle=False, autotestdict=False
"""The ring: what has to wait for a device, many requests at a time, by one thread without the GIL.

It is given whole transfers, of which it does what goes past the page cache; single requests that a reading thread would
have had to wait for; and transfers whose bytes are to reach the device before they count as moved. As many requests are
under way as its window holds, in turns between transfers. A transfer that is to end early has its requests cancelled,
and ends when each has been answered: the kernel then touches its memory no more.

Many small pieces of memory cost a device, or what plays one for a virtual machine, more than a large one. So what goes
past the page cache between the file and small pieces goes by way of a stage, which is one piece: what is read is copied
from there, what is written is copied there first.

The ring belongs to the process and to its thread alone; others leave work on a stack, and wake it by an eventfd. Should
the kernel refuse to go on with the ring (somebody has closed its descriptor, or forbidden the call), what was under way
ends with that error, and no transfer is given to the ring any more.
"""

import errno as _errno
import os

from cpython.ref cimport Py_INCREF
from libc.errno cimport EAGAIN, EBADF, EBUSY, EEXIST, EFAULT, EINTR, EINVAL, EIO, ENOMEM, EOPNOTSUPP, ETIME, errno
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset
from posix.fcntl cimport O_CLOEXEC, O_RDONLY, open
from posix.unistd cimport close, read, write

from asyncxfer._fast.completion cimport OK, Completion, op_t
from asyncxfer._fast.engine cimport guarded
from asyncxfer._fast.fileflight cimport *
from asyncxfer._fast.filework cimport SYNC_DATA, axf_iov_rest, filework_t, iovec, request_t
from asyncxfer._fast.native cimport *
from asyncxfer._fast.pthread cimport *

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int initial, int flags)
    enum: EFD_CLOEXEC

cdef extern from "<unistd.h>" nogil:
    int dup3(int source, int target, int flags)

cdef extern from "uring.h" nogil:
    ctypedef struct axf_sqe:
        unsigned char opcode, flags
        int32_t fd
        uint64_t off, addr
        uint32_t len, op_flags
        uint64_t user_data
    ctypedef struct axf_cqe:
        uint64_t user_data
        int32_t res
    ctypedef struct axf_ring:
        int fd
        char* rings
        axf_sqe* sqes
    int axf_ring_open(axf_ring* r, uint32_t entries)
    int axf_ring_enable(axf_ring* r)
    void axf_ring_close(axf_ring* r)
    axf_sqe* axf_ring_next(axf_ring* r)
    int axf_ring_enter(axf_ring* r, uint32_t least, int64_t nanoseconds)
    int axf_ring_reap(axf_ring* r, axf_cqe* out)
    int axf_in_huge_pages(int pagemap, const void* at, uint64_t nbytes)
    char* axf_stages(size_t nbytes)
    void axf_stages_free(char* stages, size_t nbytes)
    enum:
        AXF_OP_READV, AXF_OP_WRITEV, AXF_OP_FSYNC, AXF_OP_CANCEL, AXF_OP_READ, AXF_OP_WRITE
        AXF_SQE_ASYNC, AXF_FSYNC_DATA

cdef enum:
    PAGE = 4096
    PRIORITIES = 3
    ENTRIES = 256
    MOST_CALLS = 256            # under way
    MOST_TRIES = 64
    STAGES = 32
    STAGE_BYTES = 1 << 20
    MANY_PIECES = 8             # from here on a stage is used, where they are
    SMALL_PIECE = 65536         # smaller than this
    MANY_PAGES = 32             # likewise where a hypervisor plays the device
    FEW_COPIES = 4              # in one go: requests and answers wait meanwhile
    CANCELLED_ = 0              # `user_data` of what is no call: the answer to a cancellation
    WOKEN = 1

cdef uint64_t MOST_BYTES = 64 << 20     # under way


# ---- what is under way -------------------------------------------------------------------------------------------------

cdef struct slot_t:
    slot_t* next                # in a list: of free ones, or of those to be submitted again
    flight_t* flight            # NULL: free
    uint32_t request            # SYNC: the whole flight is brought to the device
    uint32_t got
    char* stage                 # where its bytes go first; NULL: to their place
    iovec* rest                 # what follows what has come; NULL: all of the request
    int patient                 # how often the kernel has said "not now": it is not to try it at once again
    int plain                   # through the page cache, whatever it was to be
    int cancelled


cdef uint32_t SYNC = 0xffffffff


cdef struct calls_t:
    call_t* first
    call_t* last


cdef struct flights_t:
    flight_t* first
    flight_t* last


cdef struct state_t:
    axf_ring ring
    slot_t slots[MOST_CALLS]
    slot_t* idle
    slot_t* again
    uint32_t asked
    uint64_t asked_bytes
    int pagemap                 # tells of pages
    char* stages                # all of them
    char* free_stages[STAGES]
    int nfree
    int copies                  # made since the kernel was last called
    flights_t flights[PRIORITIES]       # what they have past the page cache has not all begun
    calls_t calls[PRIORITIES]           # single requests, and ends
    int64_t due                         # no transfer is out of time before; 0 never
    uint64_t woken
    int listening                       # the eventfd is being read
    int broken                  # atomic: why the kernel no longer takes calls; set once
    # shared with others
    void* arrived               # atomic: a stack of calls
    int wake                    # the eventfd
    int awake                   # atomic: it will look at the stack before it sleeps
    int stops                   # atomic: some transfer is to end early
    int stopping
    int running
    pthread_t thread


cdef state_t state
cdef pthread_mutex_t start_lock
pthread_mutex_init(&start_lock, NULL)
state.ring.fd = state.wake = -1


cdef void rouse() noexcept nogil:
    cdef uint64_t one = 1
    if axf_swap(&state.awake, 1) == 0:
        write(state.wake, &one, 8)


cdef void ring_push(call_t* call) noexcept nogil:
    """Gives it a request, or a flight by its own call: one that begins or, where no request is left, one that ends."""
    axf_push(&state.arrived, &call.next)
    rouse()


cdef void ring_on_stop(op_t* op) noexcept nogil:
    """Some transfer that it may know of is to end early."""
    axf_store(&state.stops, 1)
    rouse()


# ---- lists; the ring's thread alone ------------------------------------------------------------------------------------

cdef void queue_flight(flight_t* f) noexcept nogil:
    cdef flights_t* queue = &state.flights[f.rank]
    f.ring_next = NULL
    if queue.last == NULL:
        queue.first = f
    else:
        queue.last.ring_next = f
    queue.last = f


cdef flight_t* next_flight(int rank) noexcept nogil:
    cdef flights_t* queue = &state.flights[rank]
    cdef flight_t* f = queue.first
    if f != NULL:
        queue.first = f.ring_next
        if queue.first == NULL:
            queue.last = NULL
    return f


cdef void put_back(flight_t* f) noexcept nogil:
    cdef flights_t* queue = &state.flights[f.rank]
    f.ring_next = queue.first
    queue.first = f
    if queue.last == NULL:
        queue.last = f


cdef void queue_call(call_t* call) noexcept nogil:
    cdef calls_t* queue = &state.calls[call.flight.rank]
    call.next = NULL
    if queue.last == NULL:
        queue.first = call
    else:
        queue.last.next = call
    queue.last = call


cdef call_t* next_call(int rank) noexcept nogil:
    cdef calls_t* queue = &state.calls[rank]
    cdef call_t* call = queue.first
    if call != NULL:
        queue.first = <call_t*>call.next
        if queue.first == NULL:
            queue.last = NULL
    return call


cdef void arrive() noexcept nogil:
    """Takes what others have left, oldest first."""
    cdef call_t* call = <call_t*>axf_take(&state.arrived)
    cdef call_t* older
    cdef call_t* oldest = NULL
    cdef flight_t* f
    while call != NULL:
        older = <call_t*>call.next
        call.next = oldest
        oldest, call = call, older
    while oldest != NULL:
        call, oldest = oldest, <call_t*>oldest.next
        f = call.flight
        if f.op.deadline and (state.due == 0 or f.op.deadline < state.due):
            state.due = f.op.deadline
        if call == &f.self_ and axf_load(&f.left):
            queue_flight(f)
        else:
            queue_call(call)


# ---- stages ------------------------------------------------------------------------------------------------------------

cdef struct copy_t:
    const iovec* iov
    char* stage
    uint64_t left
    int write


cdef void copy(void* argument) noexcept nogil:
    cdef copy_t* c = <copy_t*>argument
    cdef uint64_t n
    while c.left:
        n = min(c.left, <uint64_t>c.iov.iov_len)
        if c.write:
            memcpy(c.stage, c.iov.iov_base, n)
        else:
            memcpy(c.iov.iov_base, c.stage, n)
        c.stage += n
        c.left -= n
        c.iov += 1


cdef int copy_staged(slot_t* slot, uint64_t nbytes) noexcept nogil:
    """Brings so much of a request from its place to the stage, or back: 0, or EFAULT."""
    cdef copy_t c
    cdef const filework_t* w = slot.flight.work
    c.iov, c.stage, c.left, c.write = &w.iov[w.requests[slot.request].iov], slot.stage, nbytes, w.write
    state.copies += 1
    return guarded(copy, &c)


cdef bint better_staged(const filework_t* w, uint32_t request) noexcept nogil:
    cdef const request_t* r = &w.requests[request]
    cdef const iovec* first = &w.iov[r.iov]
    if not r.direct or r.nbytes > STAGE_BYTES or state.stages == NULL:
        return False
    if r.n >= MANY_PIECES and r.nbytes // r.n < SMALL_PIECE:
        return True
    return (w.file.emulated and r.nbytes >= MANY_PAGES * PAGE
            and not axf_in_huge_pages(state.pagemap, first.iov_base, first.iov_len))


cdef void make_stages() noexcept nogil:
    cdef int i
    state.stages = axf_stages(STAGES * STAGE_BYTES)
    state.pagemap = open(b"/proc/self/pagemap", O_RDONLY | O_CLOEXEC)
    if state.stages != NULL:
        for i in range(STAGES):
            state.free_stages[i] = state.stages + i * STAGE_BYTES
        state.nfree = STAGES


cdef int enter_stage(slot_t* slot) noexcept nogil:
    """Takes a stage, and brings there what is to be written: 0, or EFAULT."""
    cdef const filework_t* w = slot.flight.work
    state.nfree -= 1
    slot.stage = state.free_stages[state.nfree]
    return copy_staged(slot, w.requests[slot.request].nbytes) if w.write else 0


cdef int leave_stage(slot_t* slot, uint64_t got) noexcept nogil:
    """Brings what was read to its place, and frees the stage: 0, or EFAULT."""
    cdef int error = copy_staged(slot, got) if got and not slot.flight.work.write else 0
    state.free_stages[state.nfree] = slot.stage
    state.nfree += 1
    slot.stage = NULL
    return error


# ---- requests ----------------------------------------------------------------------------------------------------------

cdef void over(flight_t* f) noexcept nogil:
    """All its requests have ended."""
    if f.work.write and f.work.file.sync and axf_load(&f.op.stop) == OK:
        queue_call(&f.self_)
    else:
        flight_end(f)


cdef void less(flight_t* f, uint32_t n) noexcept nogil:
    if flight_less(f, n):
        over(f)


cdef bint ask(slot_t* slot) noexcept nogil:
    """Prepares the call of a slot; False while the submission queue is full."""
    cdef axf_sqe* sqe = axf_ring_next(&state.ring)
    cdef const filework_t* w = slot.flight.work
    cdef const request_t* r
    cdef const iovec* iov
    cdef uint32_t n
    if sqe == NULL:
        return False
    sqe.user_data = <uint64_t>slot
    if slot.request == SYNC:
        sqe.opcode, sqe.fd = AXF_OP_FSYNC, w.file.fd
        sqe.op_flags = AXF_FSYNC_DATA if w.file.sync == SYNC_DATA else 0
        return True
    r = &w.requests[slot.request]
    if slot.stage != NULL:
        sqe.opcode, sqe.fd, sqe.off = AXF_OP_WRITE if w.write else AXF_OP_READ, w.file.direct, r.offset
        sqe.addr, sqe.len = <uint64_t>slot.stage, r.nbytes
        sqe.flags = AXF_SQE_ASYNC if slot.patient else 0
        return True
    iov, n = &w.iov[r.iov], r.n
    if slot.rest != NULL:
        n = axf_iov_rest(iov, n, slot.got, slot.rest)
        iov = slot.rest
    sqe.fd = w.file.direct if r.direct and not slot.plain else w.file.fd
    sqe.off = r.offset + slot.got
    if n == 1:
        sqe.opcode = AXF_OP_WRITE if w.write else AXF_OP_READ
        sqe.addr, sqe.len = <uint64_t>iov.iov_base, <uint32_t>iov.iov_len
    else:
        sqe.opcode = AXF_OP_WRITEV if w.write else AXF_OP_READV
        sqe.addr, sqe.len = <uint64_t>iov, n
    if slot.patient:
        sqe.flags = AXF_SQE_ASYNC
    return True


cdef void again(slot_t* slot) noexcept nogil:
    slot.next = state.again
    state.again = slot


cdef void fail(slot_t* slot, int error) noexcept nogil:
    """Its call has failed, or cannot be made."""
    if slot.request == SYNC:
        flight_sync_trouble(slot.flight, error)
    else:
        flight_trouble(slot.flight, slot.request, slot.got, error)
    finish(slot)


cdef void begin(flight_t* f, uint32_t request, uint32_t got) noexcept nogil:
    """Takes a slot for a call; there is a free one."""
    cdef int error = state.broken
    cdef slot_t* slot = state.idle
    state.idle = slot.next
    slot.flight, slot.request, slot.got = f, request, got
    slot.patient = slot.cancelled = slot.plain = 0
    state.asked += 1
    if request != SYNC:
        state.asked_bytes += f.work.requests[request].nbytes
        if error == 0 and got:
            error = remember(slot)
        elif error == 0 and state.nfree and better_staged(f.work, request):
            error = enter_stage(slot)
    if error:
        fail(slot, error)
    else:
        again(slot)


cdef int remember(slot_t* slot) noexcept nogil:
    """Makes room for what follows the part that has come: 0, or ENOMEM."""
    if slot.rest == NULL:
        slot.rest = <iovec*>malloc(slot.flight.work.requests[slot.request].n * sizeof(iovec))
    return 0 if slot.rest != NULL else ENOMEM


cdef void finish(slot_t* slot) noexcept nogil:
    """Its request has ended, however."""
    cdef flight_t* f = slot.flight
    cdef uint32_t request = slot.request
    if slot.stage != NULL:
        leave_stage(slot, 0)
    free(slot.rest)
    slot.rest, slot.flight = NULL, NULL
    slot.next = state.idle
    state.idle = slot
    state.asked -= 1
    if request == SYNC:
        flight_end(f)
    else:
        state.asked_bytes -= f.work.requests[request].nbytes
        less(f, 1)


cdef void answered(slot_t* slot, int32_t res) noexcept nogil:
    cdef flight_t* f = slot.flight
    cdef const request_t* r
    cdef int error = 0
    if (res == -EINTR or res == -EAGAIN) and slot.patient < MOST_TRIES and flight_status(f) == OK:
        slot.patient += 1
        again(slot)
        return
    if slot.request == SYNC:
        if res < 0:
            fail(slot, -res)
        else:
            finish(slot)
        return
    r = &f.work.requests[slot.request]
    if res == -EINVAL and r.direct and not slot.plain and flight_status(f) == OK:
        slot.plain = 1                  # the file system wants another alignment than it says
        if slot.stage != NULL:
            leave_stage(slot, 0)
        again(slot)
        return
    if res <= 0:
        fail(slot, EIO if res == 0 and f.work.write else -res)
        return
    if slot.stage != NULL:
        error = leave_stage(slot, min(<uint32_t>res, r.nbytes))
    if error == 0:
        slot.got += <uint32_t>res
        slot.plain = 1                  # what follows a part of a request may begin anywhere
        if slot.got >= r.nbytes:
            flight_moved(f, slot.request, r.nbytes)
        elif flight_status(f) == OK:
            error = remember(slot)
            if error == 0:
                again(slot)
                return
    if error:
        fail(slot, error)
    else:
        finish(slot)


cdef bint choose() noexcept nogil:
    """Begins the next request of whose turn it is; False when there is none."""
    cdef call_t* call
    cdef flight_t* f
    cdef int p
    for p in range(PRIORITIES):
        call = next_call(p)
        if call != NULL:
            f = call.flight
            if call == &f.self_:
                if flight_status(f) == OK:
                    begin(f, SYNC, 0)
                else:
                    flight_end(f)
            elif flight_status(f) == OK:
                begin(f, call.request, call.got)
            else:
                less(f, 1)
            return True
        f = next_flight(p)
        if f != NULL:
            if flight_status(f) == OK:
                if state.nfree == 0 and better_staged(f.work, f.ring_at):
                    put_back(f)
                    return False
                if f.ring_at + 1 < f.work.nrequests:
                    queue_flight(f)
                f.ring_at += 1
                begin(f, f.ring_at - 1, 0)
            else:
                less(f, f.work.nrequests - f.ring_at)
            return True
    return False


cdef bint fill() noexcept nogil:
    """Prepares calls for as much as the window holds; True where copies have put off some of it."""
    cdef axf_sqe* sqe
    cdef slot_t* slot
    if not state.listening:
        sqe = axf_ring_next(&state.ring)
        if sqe != NULL:
            sqe.opcode, sqe.fd, sqe.addr, sqe.len = AXF_OP_READ, state.wake, <uint64_t>&state.woken, 8
            sqe.user_data = WOKEN
            state.listening = 1
    while True:
        while state.again != NULL:
            slot = state.again
            if flight_status(slot.flight) != OK:
                state.again = slot.next
                finish(slot)
            elif ask(slot):
                state.again = slot.next
            else:
                return False
        if state.copies >= FEW_COPIES:
            return True
        if state.idle == NULL or state.asked_bytes >= MOST_BYTES or not choose():
            return False


cdef void sweep(int64_t now) noexcept nogil:
    """Ends what is out of time or to be stopped: cancels what is under way. What has not begun ends in its turn."""
    cdef slot_t* slot
    cdef axf_sqe* sqe
    cdef flight_t* f
    cdef int64_t due = 0
    cdef int i, p
    for i in range(MOST_CALLS):
        slot = &state.slots[i]
        f = slot.flight
        if f == NULL or slot.cancelled:
            continue
        if flight_status(f) == OK:
            if f.op.deadline and (due == 0 or f.op.deadline < due):
                due = f.op.deadline
            continue
        sqe = axf_ring_next(&state.ring)
        if sqe == NULL:
            axf_store(&state.stops, 1)          # the rest in the next turn
            break
        sqe.opcode, sqe.fd, sqe.addr, sqe.user_data = AXF_OP_CANCEL, -1, <uint64_t>slot, CANCELLED_
        slot.cancelled = 1
    for p in range(PRIORITIES):
        due = sift_flights(&state.flights[p], due)
        due = sift_calls(&state.calls[p], due)
    state.due = due


cdef int64_t sift_flights(flights_t* queue, int64_t due) noexcept nogil:
    """Ends those that are to end, and gives when the next is out of time."""
    cdef flight_t* at = queue.first
    cdef flight_t* f
    queue.first = queue.last = NULL
    while at != NULL:
        f, at = at, at.ring_next
        if flight_status(f) != OK:
            less(f, f.work.nrequests - f.ring_at)
            continue
        if f.op.deadline and (due == 0 or f.op.deadline < due):
            due = f.op.deadline
        queue_flight(f)
    return due


cdef int64_t sift_calls(calls_t* queue, int64_t due) noexcept nogil:
    """The same for single requests."""
    cdef call_t* at = queue.first
    cdef call_t* call
    cdef flight_t* f
    queue.first = queue.last = NULL
    while at != NULL:
        call, at = at, <call_t*>at.next
        f = call.flight
        if flight_status(f) == OK:
            if f.op.deadline and (due == 0 or f.op.deadline < due):
                due = f.op.deadline
            queue_call(call)
        elif call == &f.self_:
            flight_end(f)
        else:
            less(f, 1)
    return due


cdef void reap() noexcept nogil:
    """Takes the answers; where they have to be copied, a few. The kernel does not wait while there are others."""
    cdef axf_cqe cqe
    state.copies = 0
    while state.copies < FEW_COPIES and axf_ring_reap(&state.ring, &cqe):
        if cqe.user_data == WOKEN:
            state.listening = 0
        elif cqe.user_data != CANCELLED_:
            answered(<slot_t*>cqe.user_data, cqe.res)


cdef void break_down(int error) noexcept nogil:
    """The kernel does not go on with the ring: ends all that it was given.

    Nobody can tell when the kernel is done with what it has under way. So memory that it may still touch is never freed.
    """
    cdef slot_t* slot
    cdef int i, wake
    axf_store(&state.broken, error)
    state.again = NULL
    for i in range(MOST_CALLS):
        slot = &state.slots[i]
        if slot.flight != NULL:
            with gil:
                Py_INCREF((<Completion>slot.flight.op.owner).prepared)
            fail(slot, error)
    wake = eventfd(0, EFD_CLOEXEC)
    if wake >= 0:                       # the old one may still be read by the kernel
        dup3(wake, state.wake, O_CLOEXEC)
        close(wake)
    if error == EBADF or error == EOPNOTSUPP or error == EEXIST:
        state.ring.fd = -1              # what has its number, if anything, is not ours to close


cdef void end_all() noexcept nogil:
    """Ends what is still left to a ring that has broken down, until it is released."""
    while True:
        axf_store(&state.awake, 1)
        arrive()
        while choose():
            pass
        axf_store(&state.awake, 0)
        if axf_load(&state.stopping):
            return
        if not axf_load64(<uint64_t*>&state.arrived):
            read(state.wake, &state.woken, 8)


cdef bint fatal(int error) noexcept nogil:
    return error != 0 and error != ETIME and error != EINTR and error != EAGAIN and error != EBUSY


cdef void* run(void* arg) noexcept nogil:
    cdef int64_t now, wait
    cdef uint32_t least
    cdef int error
    cdef bint more
    axf_be_patient()            # event loops go first
    axf_ring_enable(&state.ring)
    make_stages()
    while True:
        axf_store(&state.awake, 1)
        arrive()
        if axf_swap(&state.stops, 0) or (state.due and axf_now() >= state.due):
            sweep(axf_now())
        state.copies = 0
        more = fill()
        if axf_load(&state.stopping) and state.asked == 0:
            break
        # What was left before `awake` is 0 is seen now; what comes later writes to the eventfd.
        axf_store(&state.awake, 0)
        least = 1
        if more or axf_load64(<uint64_t*>&state.arrived) or axf_load(&state.stops) or axf_load(&state.stopping):
            least = 0
        wait = -1
        if state.due:
            now = axf_now()
            wait = max(state.due - now, <int64_t>0)
        error = axf_ring_enter(&state.ring, least, wait)
        reap()
        if fatal(error):
            break_down(error)
            end_all()
            break
    return NULL


cdef int ring_start() noexcept nogil:
    """Has the ring and its thread ready; 0, or errno."""
    cdef int error = axf_load(&state.broken), i
    pthread_mutex_lock(&start_lock)
    if not state.running:
        memset(&state, 0, sizeof(state))
        for i in range(MOST_CALLS):
            state.slots[i].next = state.idle
            state.idle = &state.slots[i]
        state.wake = eventfd(0, EFD_CLOEXEC)
        error = errno if state.wake < 0 else axf_ring_open(&state.ring, ENTRIES)
        if error == 0:
            error = start_thread(&state.thread, run, b"axf-ring")
            if error:
                axf_ring_close(&state.ring)
        if error and state.wake >= 0:
            close(state.wake)
        state.running = error == 0
    pthread_mutex_unlock(&start_lock)
    return error


# ---- what Python calls ---------------------------------------------------------------------------------------------

def refusal() -> str | None:
    """Say why there can be no ring here; None where there can."""
    cdef axf_ring ring
    cdef int error
    with nogil:
        error = axf_ring_open(&ring, 4)
        if error == 0:
            error = axf_ring_enable(&ring)
            if error == 0:
                error = axf_ring_enter(&ring, 0, 0)
            axf_ring_close(&ring)
    if error == 0:
        return None
    if error == _errno.ENOTSUP:
        return "io_uring lacks what Linux 5.11 brought"
    return f"io_uring: {os.strerror(error)}{_HINTS.get(error, '')}"


_HINTS = {
    _errno.EPERM: " (forbidden by the sysctl kernel.io_uring_disabled, or by a seccomp filter as containers have it)",
    _errno.ENOSYS: " (a kernel without it, or a seccomp filter)",
    _errno.ENOMEM: " (the limit on locked memory, `ulimit -l`, is too low for this kernel)",
}


def running() -> bool:
    """Whether there is a ring."""
    return state.running == 1


def release() -> None:
    """End the ring and its thread; nothing of theirs is in flight by then."""
    if not state.running:
        return
    with nogil:
        axf_store(&state.stopping, 1)
        rouse()
        pthread_join(state.thread, NULL)
        forget()


cdef void forget() noexcept nogil:
    axf_ring_close(&state.ring)
    if state.stages != NULL:
        axf_stages_free(state.stages, STAGES * STAGE_BYTES)
    if state.pagemap > 0:
        close(state.pagemap)
    close(state.wake)
    memset(&state, 0, sizeof(state))
    state.ring.fd = state.wake = -1


def after_fork() -> None:
    """In a child: the ring and its thread belong to the parent; let go of the descriptors."""
    if state.running:
        state.ring.rings = NULL     # the child has no such memory
        state.ring.sqes = NULL
        state.stages = NULL
        forget()
    pthread_mutex_init(&start_lock, NULL)
