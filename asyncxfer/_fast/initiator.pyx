# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True, auto_pickle=False, autotestdict=False
"""Puts and gets over TCP, as the side that asks for them.

A group is one peer: a few connections, and the transfers in flight to it. A transfer goes out chunk by chunk, in turns
with others, over whichever connection has room; so the socket's own flow control is all there is. What was sent and
not answered is remembered for each connection, in order, and is sent again over the one that replaces it when it is
lost: a put or a get may be carried out twice, which changes nothing. A chunk never changes its connection: what an old
one still holds could otherwise arrive after what came later.

A transfer ends when nothing of it is under way: when all has been answered, or when it is to end early and what was
sent of a put is answered or its connection cut, and nothing is being received for a get any more.
"""

from libc.errno cimport EAGAIN
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from asyncxfer._fast.completion cimport (
    DENIED, FAILED, FAULT, OK, PEER_GONE, REVOKED, TIMED_OUT, Completion, op_progress, op_settle, op_t,
)
from asyncxfer._fast.engine cimport Work, work_t
from asyncxfer._fast.frames cimport *
from asyncxfer._fast.link cimport Link
from asyncxfer._fast.native cimport *
from asyncxfer._fast.poller cimport *
from asyncxfer._fast.pthread cimport *
from asyncxfer._fast.tls cimport Connection
from asyncxfer._fast.wire cimport *

from asyncxfer._errors import BackendError

LOST = 1                        # message: the connection whose number is the text has been lost

cdef enum:
    MAX_STREAMS = 16
    PRIORITIES = 3
    WINDOW = 1024               # requests of one connection that are not answered
    GET_WINDOW = 8 << 20        # and bytes that they ask for
    INLINE = 65536              # the caller itself sends a transfer of at most so many bytes
    SHARE = 4 << 20             # bytes of a connection's turn
    HEAD_ROOM = 64 + 32 * 1024 + 32 * 1024

cdef int64_t GRACE_NS = 1_000_000_000   # for answers to what was sent of a put that is to end early

cdef struct flight_t:
    op_t* op                    # NULL: it has ended early, and what is left is to tell the receiver of its tag
    const work_t* work
    uint64_t id
    flight_t* ring_next
    flight_t* prev
    flight_t* next              # all of the group, oldest first
    int in_ring, priority, put, checked
    uint32_t chunks, next_chunk, done
    uint32_t asked              # entries of windows that name it
    uint32_t inside             # frames that are read from or written to its memory now
    int note                    # 0: rides with a chunk, or there is none; 1: goes behind all chunks; 2: has gone
    int ending, error           # why it ends early, a status
    int64_t since               # when that began
    unsigned char* again        # one a chunk: 1 where it was asked for twice
    uint32_t mismatch           # the chunk that came wrong twice
    uint32_t tag_bytes
    char* tag                   # its own copy, where there is no op


cdef struct entry_t:
    flight_t* flight            # NULL: nobody is interested any more
    uint32_t chunk
    uint32_t get_bytes


cdef struct lane_t:             # what a group keeps for one connection
    group_t* group
    stream_t* stream
    int up
    entry_t* entries            # a ring: first `sent` that are not answered, then those to be sent
    uint32_t first, count, sent
    uint64_t answers            # that have come, whichever connection it was
    uint64_t getting            # bytes that gets have asked for and that have not come
    output_t out
    flight_t* out_flight
    input_t inp
    int stage                   # of the input: 0 head, 1 payload, 2 tail
    axf_head head
    axf_run* runs               # where the payload goes
    flight_t* in_flight
    uint32_t crc
    int in_status, in_error


cdef struct ring_t:
    flight_t* first
    flight_t* last


cdef struct group_t:
    pthread_mutex_t lock
    ring_t rings[PRIORITIES]
    flight_t* first
    flight_t* last
    lane_t lanes[MAX_STREAMS]
    int nlanes
    uint64_t ids
    ticker_t ticker
    int asked_to_stop           # atomic: some transfer was
    int closed                  # a status, once nothing is sent any more
    axf_link* link
    mailbox_t* mailbox
    uint64_t owner
    uint64_t base[1]            # local rows have absolute addresses: they begin at 0


# ---- the ring of transfers that have something to send; all with the group's lock held --------------------------------

cdef void ring_append(group_t* g, flight_t* f) noexcept nogil:
    cdef ring_t* ring = &g.rings[f.priority]
    f.ring_next = NULL
    f.in_ring = 1
    if ring.last == NULL:
        ring.first = f
    else:
        ring.last.ring_next = f
    ring.last = f


cdef bint waiting(group_t* g) noexcept nogil:
    """Whether something has not been sent; without the lock held."""
    cdef bint any_ = False
    cdef int p
    pthread_mutex_lock(&g.lock)
    for p in range(PRIORITIES):
        any_ = any_ or g.rings[p].first != NULL
    pthread_mutex_unlock(&g.lock)
    return any_


cdef flight_t* ring_pop(group_t* g) noexcept nogil:
    cdef flight_t* f
    cdef int p
    for p in range(PRIORITIES):
        f = g.rings[p].first
        if f != NULL:
            g.rings[p].first = f.ring_next
            if f.ring_next == NULL:
                g.rings[p].last = NULL
            f.in_ring = 0
            return f
    return NULL


cdef void ring_remove(group_t* g, flight_t* f) noexcept nogil:
    cdef ring_t* ring = &g.rings[f.priority]
    cdef flight_t* before = NULL
    cdef flight_t* at = ring.first
    while at != f:
        before, at = at, at.ring_next
    if before == NULL:
        ring.first = f.ring_next
    else:
        before.ring_next = f.ring_next
    if ring.last == f:
        ring.last = before
    f.in_ring = 0


# ---- the end of a transfer ---------------------------------------------------------------------------------------------

cdef bint complete(flight_t* f) noexcept nogil:
    return f.done == f.chunks and f.note != 1


cdef bint tells_of_failure(group_t* g, flight_t* f, flight_t** ended) noexcept nogil:
    """Lists the end of a transfer, and makes of it word to the receiver that its tag will not come. With the lock held.

    It keeps its number, so that a target which has told of the tag already does not tell of a failure as well.
    """
    cdef flight_t* end
    cdef char* tag
    cdef int n
    if f.op == NULL or not f.op.has_note or g.closed or not axf_load(&g.link.alive):
        return False
    end = <flight_t*>calloc(1, sizeof(flight_t))
    tag = <char*>malloc(max(f.op.note_bytes, <size_t>1))
    if end == NULL or tag == NULL:
        free(end)
        free(tag)
        return False
    end.op, end.ending, end.error, end.mismatch, end.ring_next = f.op, f.ending, f.error, f.mismatch, ended[0]
    ended[0] = end
    memcpy(tag, f.op.note, f.op.note_bytes)
    f.tag, f.tag_bytes, f.op, f.work = tag, <uint32_t>f.op.note_bytes, NULL, NULL
    f.put, f.ending, f.note, f.done, f.next_chunk = 1, 0, 1, f.chunks, f.chunks
    ring_append(g, f)
    for n in range(g.nlanes):
        if g.lanes[n].up and g.lanes[n].stream != NULL:
            stream_attend(g.lanes[n].stream)
    return True


cdef void retire(group_t* g, flight_t* f, flight_t** ended) noexcept nogil:
    """Puts a transfer that nothing is under way of on the list of those to be settled. With the lock held."""
    if f.asked or f.inside or not (f.ending or complete(f)):
        return
    if f.in_ring:
        ring_remove(g, f)
    if f.ending and tells_of_failure(g, f, ended):
        return
    if f.prev == NULL:
        g.first = f.next
    else:
        f.prev.next = f.next
    if f.next == NULL:
        g.last = f.prev
    else:
        f.next.prev = f.prev
    f.ring_next = ended[0]
    ended[0] = f


cdef void settle(group_t* g, flight_t* ended) noexcept nogil:
    """Ends what `retire` has listed. Without the lock."""
    cdef flight_t* f
    cdef op_t* op
    while ended != NULL:
        f, ended = ended, ended.ring_next
        op = f.op
        if op != NULL:
            op.detail = f.mismatch
            op_settle(op, f.ending, f.error)
        free(f.tag)
        free(f.again)
        free(f)


cdef void let_go(group_t* g, flight_t* f, int status, int error, int64_t now, flight_t** ended) noexcept nogil:
    """Begins the early end of a transfer: nothing more of it is sent, and nothing received. With the lock held."""
    cdef lane_t* lane
    cdef entry_t* entry
    cdef uint32_t i
    cdef int n
    if f.ending:
        return
    f.ending, f.error, f.since = status, error, now
    if f.in_ring:
        ring_remove(g, f)
    for n in range(g.nlanes):
        lane = &g.lanes[n]
        for i in range(lane.count):
            entry = &lane.entries[(lane.first + i) % WINDOW]
            if entry.flight == f and (i >= lane.sent or not f.put or not lane.up):
                entry.flight = NULL
                f.asked -= 1
        if lane.stream != NULL and (lane.out_flight == f or lane.in_flight == f):
            stream_attend(lane.stream)      # its thread lets go of the memory
    if f.asked:
        ticker_at(&g.ticker, now + GRACE_NS)
    retire(g, f, ended)


cdef void leave(group_t* g, flight_t* f, int status, flight_t** ended) noexcept nogil:
    """One frame less touches its memory; with a status, it is to end early. With the lock held."""
    if status and not f.ending:
        let_go(g, f, status, 0, axf_now(), ended)       # which retires it
    else:
        retire(g, f, ended)


cdef void enter(group_t* g, flight_t* f) noexcept nogil:
    """Takes up a transfer. With the lock held."""
    g.ids += 1
    f.id = g.ids
    f.prev = g.last
    if g.last == NULL:
        g.first = f
    else:
        g.last.next = f
    g.last = f
    ring_append(g, f)


cdef void attend_all(group_t* g) noexcept nogil:
    cdef int n
    pthread_mutex_lock(&g.lock)
    for n in range(g.nlanes):
        if g.lanes[n].up and g.lanes[n].stream != NULL:
            stream_attend(g.lanes[n].stream)
    pthread_mutex_unlock(&g.lock)


# ---- sending -------------------------------------------------------------------------------------------------------------

cdef bint choose(group_t* g, lane_t* lane, entry_t* out) noexcept nogil:
    """The next request of a connection: one that has to be sent again, or the next chunk of whose turn it is."""
    cdef flight_t* f
    cdef entry_t* entry
    cdef uint32_t chunk
    while lane.sent < lane.count:
        entry = &lane.entries[(lane.first + lane.sent) % WINDOW]
        if entry.flight == NULL:                        # let go before it was sent: nothing will be answered
            drop_entry(lane, lane.sent)
            continue
        lane.sent += 1
        out[0] = entry[0]
        return True
    if lane.count == WINDOW or lane.getting >= GET_WINDOW:
        return False
    f = ring_pop(g)
    if f == NULL:
        return False
    if f.done == f.chunks:
        chunk = AXF_NOTE_CHUNK
        f.note = 2
    else:
        chunk = f.next_chunk
        f.next_chunk += 1
        if f.next_chunk < f.chunks:
            ring_append(g, f)
    entry = &lane.entries[(lane.first + lane.count) % WINDOW]
    entry.flight, entry.chunk, entry.get_bytes = f, chunk, 0
    if not f.put and chunk != AXF_NOTE_CHUNK:
        entry.get_bytes = <uint32_t>f.work.chunks[chunk].nbytes
        lane.getting += entry.get_bytes
    f.asked += 1
    lane.count += 1
    lane.sent += 1
    out[0] = entry[0]
    return True


cdef void drop_entry(lane_t* lane, uint32_t at) noexcept nogil:
    """Takes one out of the middle of the window."""
    cdef uint32_t i
    lane.getting -= lane.entries[(lane.first + at) % WINDOW].get_bytes
    for i in range(at, lane.count - 1):
        lane.entries[(lane.first + i) % WINDOW] = lane.entries[(lane.first + i + 1) % WINDOW]
    lane.count -= 1


cdef bint next_frame(group_t* g, lane_t* lane) noexcept nogil:
    """Makes the next request ready to be sent; False when there is none."""
    cdef output_t* o = &lane.out
    cdef axf_head* head = <axf_head*>o.buf
    cdef axf_run* runs = <axf_run*>(o.buf + sizeof(axf_head))
    cdef entry_t entry
    cdef flight_t* f
    cdef const work_t* w
    cdef const axf_chunk* chunk
    cdef const char* tag = NULL
    pthread_mutex_lock(&g.lock)
    if not lane.up or g.closed or not choose(g, lane, &entry):
        pthread_mutex_unlock(&g.lock)
        return False
    f = entry.flight
    w = f.work
    memset(head, 0, sizeof(axf_head))
    head.magic, head.op, head.chunk, head.chunks = AXF_FRAME_MAGIC, f.id, entry.chunk, f.chunks
    head.settled = g.first.id
    if f.op == NULL:
        tag, head.tag, head.flags = f.tag, f.tag_bytes, AXF_FAILED
    elif f.op.has_note and (entry.chunk == AXF_NOTE_CHUNK or (f.put and entry.chunk == 0)):
        tag, head.tag = f.op.note, <uint32_t>f.op.note_bytes
    if tag != NULL or (f.op.has_note and f.put):
        head.flags |= AXF_TOLD
    o.at = o.left = o.has_tail = o.padding = o.tail_at = 0
    if entry.chunk == AXF_NOTE_CHUNK:
        head.kind = AXF_NOTE
    else:
        chunk = &w.chunks[entry.chunk]
        head.kind = AXF_PUT if f.put else AXF_GET
        head.slot, head.epoch, head.nbytes = w.slot, w.epoch, chunk.nbytes
        head.runs = axf_chunk_runs(w.pairs, chunk, 0, runs)
        if f.checked:
            head.flags |= AXF_CHECKED
        if f.put:
            o.has_tail, o.left = 1, chunk.nbytes
            memset(&o.tail, 0, sizeof(axf_tail))
            axf_chunk_runs(w.pairs, chunk, 1, lane_runs(lane))
            o.rows.run, o.rows.row, o.rows.skip, o.rows.left = lane_runs(lane), 0, 0, chunk.nbytes
            o.bases = g.base
            lane.out_flight = f
            f.inside += 1
    o.len = <uint32_t>(sizeof(axf_head) + head.runs * sizeof(axf_run)) + head.tag
    if tag != NULL:
        memcpy(o.buf + o.len - head.tag, tag, head.tag)
    o.active = 1
    pthread_mutex_unlock(&g.lock)
    if o.has_tail and head.flags & AXF_CHECKED and rows_crc(&o.rows, o.bases, &o.tail.crc) != 0:
        leave_output(g, lane, FAULT)
    return True


cdef axf_run* lane_runs(lane_t* lane) noexcept nogil:
    """Where the rows stand that are being sent; those that are being received have the other half."""
    return lane.runs + AXF_MAX_RUNS


cdef void leave_output(group_t* g, lane_t* lane, int status) noexcept nogil:
    """The frame that is being sent touches its memory no more; with a status, the rest of it will be zeros."""
    cdef flight_t* f
    cdef flight_t* ended = NULL
    pthread_mutex_lock(&g.lock)
    f = lane.out_flight
    if f != NULL:
        lane.out_flight = NULL
        f.inside -= 1
        if status:
            lane.out.padding = 1
            lane.out.tail.status = 1
        leave(g, f, status, &ended)
    pthread_mutex_unlock(&g.lock)
    settle(g, ended)


cdef int flushed(stream_t* s) noexcept nogil:
    """Sends what is encrypted and waits; there is nothing else to send."""
    cdef int error
    if s.staged == 0:
        return IDLE
    axf_and(&s.ready, ~WRITABLE)
    error = stream_flush(s)
    if error == 0:
        axf_or(&s.ready, WRITABLE)
    return IDLE if error == 0 or error == EAGAIN else BROKEN


cdef int pump(lane_t* lane, uint64_t share) noexcept nogil:
    """Sends what there is to send: IDLE, BUSY, or BROKEN. The stream's lock is held."""
    cdef group_t* g = lane.group
    cdef stream_t* s = lane.stream
    cdef output_t* o = &lane.out
    cdef flight_t* f
    cdef uint64_t total = 0
    cdef ssize_t sent
    while True:
        if not o.active and not next_frame(g, lane):
            return flushed(s)
        f = lane.out_flight
        if f != NULL and axf_load(&f.ending):
            leave_output(g, lane, f.ending)
        sent = output_step(s, o)
        if sent == FAULTED:
            leave_output(g, lane, FAULT)
            continue
        if sent == AGAIN:
            return IDLE
        if sent < 0:
            return BROKEN
        total += <uint64_t>sent
        if output_done(o):
            o.active = 0
            leave_output(g, lane, 0)
        if total >= share or axf_load(&s.closing):
            return BUSY


cdef int known(uint32_t status) noexcept nogil:
    """What a status from elsewhere stands for here."""
    if status == OK or status == REVOKED or status == FAULT or status == DENIED or status == AXF_MISMATCH:
        return <int>status
    return FAILED


# ---- receiving -----------------------------------------------------------------------------------------------------------

cdef int answered(lane_t* lane) noexcept nogil:
    """Looks at the head of an answer: whose it is, and where its payload goes. BROKEN when it is not what was asked."""
    cdef group_t* g = lane.group
    cdef axf_head* h = &lane.head
    cdef entry_t* entry
    cdef flight_t* f
    cdef const axf_chunk* chunk
    cdef int rc = IDLE
    if h.magic != AXF_FRAME_MAGIC or (h.kind != AXF_DONE and h.kind != AXF_DATA):
        return BROKEN
    pthread_mutex_lock(&g.lock)
    lane.in_flight = NULL
    lane.inp.left = 0
    lane.in_status, lane.in_error = known(h.status), h.error
    if lane.sent == 0:
        rc = BROKEN
    else:
        entry = &lane.entries[lane.first]
        f = entry.flight
        if f != NULL and (f.id != h.op or entry.chunk != h.chunk):
            rc = BROKEN
        elif h.kind == AXF_DATA and h.nbytes != (entry.get_bytes if h.status == OK else 0):
            rc = BROKEN
        elif h.kind == AXF_DONE and entry.get_bytes:
            rc = BROKEN
        else:
            lane.inp.left = h.nbytes if h.kind == AXF_DATA else 0
            if f != NULL and lane.inp.left:
                chunk = &f.work.chunks[h.chunk]
                axf_chunk_runs(f.work.pairs, chunk, 1, lane.runs)
                lane.inp.rows.run, lane.inp.rows.row, lane.inp.rows.skip = lane.runs, 0, 0
                lane.inp.rows.left = chunk.nbytes
                lane.inp.bases = g.base
                lane.in_flight = f
                f.inside += 1
    pthread_mutex_unlock(&g.lock)
    return rc


cdef void leave_input(group_t* g, lane_t* lane, int status) noexcept nogil:
    """The frame that is being received touches its memory no more."""
    cdef flight_t* f
    cdef flight_t* ended = NULL
    pthread_mutex_lock(&g.lock)
    f = lane.in_flight
    if f != NULL:
        lane.in_flight = NULL
        f.inside -= 1
        leave(g, f, status, &ended)
    pthread_mutex_unlock(&g.lock)
    settle(g, ended)


cdef void conclude(lane_t* lane) noexcept nogil:
    """An answer has come whole: takes its request off the window, and notes what became of the chunk."""
    cdef group_t* g = lane.group
    cdef flight_t* ended = NULL
    cdef flight_t* f
    cdef entry_t entry
    cdef int status = lane.in_status
    cdef bint again = False
    pthread_mutex_lock(&g.lock)
    entry = lane.entries[lane.first]
    lane.first = (lane.first + 1) % WINDOW
    lane.count -= 1
    lane.sent -= 1
    lane.answers += 1
    lane.getting -= entry.get_bytes
    f = lane.in_flight
    if f != NULL:
        lane.in_flight = NULL
        f.inside -= 1
        if f != entry.flight:
            retire(g, f, &ended)
    f = entry.flight
    if f != NULL:
        if status == AXF_MISMATCH and f.again == NULL:
            status = FAILED                             # nobody asked for a checksum
        f.asked -= 1
        if f.ending or f.op == NULL:
            f.done = f.chunks
            f.note = 2
        elif entry.chunk == AXF_NOTE_CHUNK:
            if status != OK:
                let_go(g, f, status, lane.in_error, axf_now(), &ended)
                f = NULL
        elif status == OK:
            f.done += 1
            f.op.marks[entry.chunk] = 1
            axf_add64(&f.op.moved, f.work.chunks[entry.chunk].nbytes)
            if f.done == f.chunks and f.note == 1:
                ring_append(g, f)
                again = True
            elif not complete(f):
                op_progress(f.op)
        elif status == AXF_MISMATCH and not f.again[entry.chunk]:
            f.again[entry.chunk] = 1
            lane.entries[(lane.first + lane.count) % WINDOW] = entry
            lane.count += 1
            lane.getting += entry.get_bytes
            f.asked += 1
            again = True
        else:
            if status == AXF_MISMATCH:
                f.mismatch = entry.chunk
            let_go(g, f, status, lane.in_error, axf_now(), &ended)
            f = NULL
        if f != NULL:
            retire(g, f, &ended)
    pthread_mutex_unlock(&g.lock)
    settle(g, ended)
    if again:
        attend_all(g)


cdef int receive(lane_t* lane) noexcept nogil:
    """Takes what has come: IDLE, BUSY, or BROKEN."""
    cdef group_t* g = lane.group
    cdef stream_t* s = lane.stream
    cdef input_t* i = &lane.inp
    cdef flight_t* f
    cdef uint64_t total = 0
    cdef ssize_t got
    cdef int rc
    while True:
        if lane.stage == 0:
            rc = input_part(s, i, &lane.head, sizeof(axf_head))
            if rc <= 0:
                return IDLE if rc == AGAIN else BROKEN
            if answered(lane) == BROKEN:
                return BROKEN
            lane.crc = 0
            lane.stage = 1 if i.left else 3
        if lane.stage == 1:
            while i.left:
                f = lane.in_flight
                if f != NULL and axf_load(&f.ending):
                    leave_input(g, lane, 0)
                    f = NULL
                got = input_skip(s, i) if f == NULL else input_rows(s, i)
                if got == FAULTED:
                    leave_input(g, lane, FAULT)
                elif got <= 0:
                    return IDLE if got == AGAIN else BROKEN
                else:
                    total += <uint64_t>got
                    if total >= SHARE or axf_load(&s.closing):
                        return BUSY
            lane.stage = 2
        if lane.stage == 2:
            rc = input_part(s, i, &i.tail, sizeof(axf_tail))
            if rc <= 0:
                return IDLE if rc == AGAIN else BROKEN
            if i.tail.status:
                lane.in_status = known(i.tail.status)
            elif lane.in_flight != NULL and lane.in_flight.checked:
                lane.in_status = checked(lane)
            lane.stage = 3
        conclude(lane)
        lane.stage = 0


cdef int checked(lane_t* lane) noexcept nogil:
    """Whether the payload that has been received is what was sent: a status."""
    cdef axf_cursor rows
    cdef uint32_t crc = 0
    rows.run, rows.row, rows.skip, rows.left = lane.runs, 0, 0, lane.head.nbytes
    if rows_crc(&rows, lane.inp.bases, &crc) != 0:
        return FAULT
    return OK if crc == lane.inp.tail.crc else AXF_MISMATCH


# ---- what the poller calls -------------------------------------------------------------------------------------------------

cdef int serve(stream_t* s) noexcept nogil:
    cdef lane_t* lane = <lane_t*>s.io
    cdef int received = IDLE, pumped
    cdef flight_t* f = lane.in_flight
    if s.tls != NULL:
        pthread_mutex_lock(&s.lock)
    if f != NULL and axf_load(&f.ending):
        leave_input(lane.group, lane, 0)
    if axf_load(&s.ready) & READABLE or lane.inp.at < lane.inp.end:
        received = receive(lane)
    if s.tls == NULL:
        pthread_mutex_lock(&s.lock)
    f = lane.out_flight
    if f != NULL and axf_load(&f.ending):
        leave_output(lane.group, lane, f.ending)
    pumped = pump(lane, SHARE) if received != BROKEN and axf_load(&s.ready) & WRITABLE else IDLE
    pthread_mutex_unlock(&s.lock)
    if received == BROKEN or pumped == BROKEN:
        return BROKEN
    return BUSY if received == BUSY or pumped == BUSY else IDLE


cdef void ended(stream_t* s) noexcept nogil:
    """A connection is lost: what it had not answered waits for the one that replaces it, but for what ends early."""
    cdef lane_t* lane = <lane_t*>s.io
    cdef group_t* g = lane.group
    cdef flight_t* gone = NULL
    cdef entry_t* entry
    cdef flight_t* f
    cdef uint32_t i
    cdef int index = s.index
    leave_input(g, lane, 0)
    leave_output(g, lane, 0)
    pthread_mutex_lock(&g.lock)
    lane.up = 0
    lane.sent = 0
    lane.out.active = 0
    lane.stage = 0
    for i in range(lane.count):
        entry = &lane.entries[(lane.first + i) % WINDOW]
        f = entry.flight
        if f != NULL and f.ending:
            entry.flight = NULL
            f.asked -= 1
            retire(g, f, &gone)
    i = 0
    while i < lane.count:
        if lane.entries[(lane.first + i) % WINDOW].flight == NULL:
            drop_entry(lane, i)
        else:
            i += 1
    pthread_mutex_unlock(&g.lock)
    settle(g, gone)
    mail(g.mailbox, g.owner, 1, &index, sizeof(int))


cdef void tick(void* owner, int64_t now) noexcept nogil:
    """Looks who is out of time, was asked to stop, or has waited long enough for answers."""
    cdef group_t* g = <group_t*>owner
    cdef flight_t* f
    cdef flight_t* next_
    cdef flight_t* gone = NULL
    cdef int64_t soonest = 0, due
    cdef int gone_link, status, n
    axf_store(&g.asked_to_stop, 0)
    pthread_mutex_lock(&g.lock)
    gone_link = not axf_load(&g.link.alive)
    f = g.first
    while f != NULL:
        next_ = f.next
        status = OK
        if not f.ending:
            if f.op != NULL:
                status = axf_load(&f.op.stop)
                if status == OK and f.op.deadline:
                    if now >= f.op.deadline:
                        status = TIMED_OUT
                    elif soonest == 0 or f.op.deadline < soonest:
                        soonest = f.op.deadline
            if status == OK and (g.closed or gone_link):
                status = g.closed or PEER_GONE
            if status != OK:
                let_go(g, f, status, 0, now, &gone)
        else:
            due = f.since + GRACE_NS
            if now >= due and f.asked:
                for n in range(g.nlanes):
                    if waits_for(&g.lanes[n], f):
                        stream_close(g.lanes[n].stream)
            elif f.asked and (soonest == 0 or due < soonest):
                soonest = due
        f = next_
    pthread_mutex_unlock(&g.lock)
    settle(g, gone)
    if soonest:
        ticker_at(&g.ticker, soonest)


cdef bint waits_for(lane_t* lane, flight_t* f) noexcept nogil:
    cdef uint32_t i
    for i in range(lane.count):
        if lane.entries[(lane.first + i) % WINDOW].flight == f:
            return lane.stream != NULL
    return False


cdef void on_stop(op_t* op) noexcept nogil:
    cdef group_t* g = <group_t*>op.carrier
    if axf_swap(&g.asked_to_stop, 1) == 0:
        ticker_at(&g.ticker, axf_now())


# ---- what Python calls -----------------------------------------------------------------------------------------------------

cdef long _live = 0


def live() -> int:
    """Groups that exist now (for leak checks)."""
    return _live


cdef class Group:
    """One peer: its connections, and the transfers in flight to it.

    Parameters
    ----------
    mailbox : Mailbox
        Where it is said that a connection was lost: kind ``LOST``, the text is the connection's index as a C int.
    owner : int
        Whose message that is.
    link : Link
        While it is alive, lost connections are to be replaced.
    streams : int
        Connections at most.
    """

    def __cinit__(self, Mailbox mailbox not None, uint64_t owner, Link link not None, int streams) -> None:
        global _live
        cdef int n
        cdef lane_t* lane
        self.mailbox, self.link, self.keep = mailbox, link, {}
        self.g = <group_t*>calloc(1, sizeof(group_t))
        if self.g == NULL:
            raise MemoryError("no memory for a peer's connections")
        _live += 1
        pthread_mutex_init(&self.g.lock, NULL)
        self.g.link, self.g.mailbox, self.g.owner = &link.c, &mailbox.box, owner
        self.g.nlanes = min(max(streams, 1), <int>MAX_STREAMS)
        for n in range(self.g.nlanes):
            lane = &self.g.lanes[n]
            lane.group = self.g
            lane.entries = <entry_t*>calloc(WINDOW, sizeof(entry_t))
            lane.runs = <axf_run*>malloc(2 * AXF_MAX_RUNS * sizeof(axf_run))
            if (lane.entries == NULL or lane.runs == NULL or input_open(&lane.inp) != 0
                    or output_open(&lane.out, HEAD_ROOM) != 0):
                raise MemoryError("no memory for a peer's connections")
        self.g.ticker.tick, self.g.ticker.owner = tick, self.g
        ticker_start(&self.g.ticker, 0)
        if self.g.ticker.thread == NULL:
            raise BackendError("no thread could be started for data connections; is a limit on them or on memory reached?")

    def __dealloc__(self):
        global _live
        cdef int n
        if self.g == NULL:
            return
        for n in range(self.g.nlanes):
            free(self.g.lanes[n].entries)
            free(self.g.lanes[n].runs)
            input_close(&self.g.lanes[n].inp)
            output_close(&self.g.lanes[n].out)
        pthread_mutex_destroy(&self.g.lock)
        free(self.g)
        _live -= 1

    def attach(self, int index, int fd, Connection tls=None) -> None:
        """Use a connection, which is the group's from now on, as the one of this index; the one before was lost."""
        cdef lane_t* lane
        cdef stream_t* s
        if not 0 <= index < self.g.nlanes:
            raise IndexError(f"connection {index} of {self.g.nlanes}")
        lane = &self.g.lanes[index]
        self.detach(lane)
        s = stream_new(fd, NULL if tls is None else tls.ssl, index)
        if s == NULL:
            raise MemoryError("no memory for a connection")
        self.keep[index] = tls
        s.owner, s.io, s.serve, s.ended = self.g, lane, serve, ended
        pthread_mutex_lock(&self.g.lock)
        lane.inp.at = lane.inp.end = lane.inp.have = 0
        lane.stream, lane.up, lane.sent, lane.stage = s, 1, 0, 0
        pthread_mutex_unlock(&self.g.lock)
        stream_start(s, index)

    cdef int detach(self, lane_t* lane) except -1:
        """Ends a connection that may still be there, and waits for that."""
        cdef stream_t* s = lane.stream
        if s == NULL:
            return 0
        with nogil:
            stream_close(s)
            stream_wait(s)
        pthread_mutex_lock(&self.g.lock)
        lane.stream = NULL
        pthread_mutex_unlock(&self.g.lock)
        stream_free(s)
        return 0

    def up(self) -> list[int]:
        """The indices of the connections that are there."""
        return [n for n in range(self.g.nlanes) if self.g.lanes[n].up]

    def answers(self, int index) -> int:
        """How many requests have been answered over the connections of this index."""
        if not 0 <= index < self.g.nlanes:
            raise IndexError(f"connection {index} of {self.g.nlanes}")
        return self.g.lanes[index].answers

    def fail(self) -> None:
        """The peer is gone: end what is in flight, as soon as its buffers are quiescent."""
        ticker_at(&self.g.ticker, axf_now())

    def close(self) -> None:
        """End all connections. Nothing that was posted is in flight any more."""
        cdef int n
        self.g.closed = PEER_GONE
        for n in range(self.g.nlanes):
            self.detach(&self.g.lanes[n])
        with nogil:
            tick(self.g, axf_now())
            ticker_stop(&self.g.ticker)
        self.keep.clear()


cdef class NetWork(Work):
    """A transfer made ready to go over a group's connections; parameters as of `Work`, and these.

    Parameters
    ----------
    group : Group
    checked : bool
        With checksums.
    """

    def __init__(
        self, Group group not None, pairs, local_bases, remote_bases, *, bint checked=False, **options
    ) -> None:
        super().__init__(pairs, local_bases, remote_bases, **options)
        self.group = group
        self.checked = checked


def submit(NetWork work not None, Completion completion not None, int priority=0) -> None:
    """Start the work; it ends through the completion. Never blocks: what is small is sent at once if there is room.

    Parameters
    ----------
    priority : int
        Above 0 it goes before, below 0 after all that is in flight with 0.
    """
    cdef op_t* op = &completion.op
    cdef work_t* w = &work.w
    cdef group_t* g = work.group.g
    cdef lane_t* lane = &g.lanes[0]
    cdef stream_t* s
    cdef flight_t* f = <flight_t*>calloc(1, sizeof(flight_t))
    cdef int rc
    op.marks = <unsigned char*>calloc(max(w.nchunks, 1), 1)
    if f == NULL or op.marks == NULL:
        free(f)
        raise MemoryError("no memory to follow a transfer")
    f.op, f.work, f.put, f.checked, f.chunks = op, w, op.put, work.checked, w.nchunks
    f.priority = 0 if priority > 0 else 1 if priority == 0 else 2
    f.note = 1 if op.has_note and (not op.put or w.nchunks == 0) else 0
    if work.checked:
        f.again = <unsigned char*>calloc(max(w.nchunks, 1), 1)
        if f.again == NULL:
            free(f)
            raise MemoryError("no memory to follow a transfer")
    completion.prepared = work
    op.carried, op.carrier, op.on_stop, op.chunks = 1, g, on_stop, w.nchunks
    completion.hold()
    if w.nchunks == 0 and not op.has_note:
        free(f.again)
        free(f)
        op.inline_ = 1
        op_settle(op, OK, 0)
        completion.release()
        return
    pthread_mutex_lock(&g.lock)
    enter(g, f)
    pthread_mutex_unlock(&g.lock)
    if op.deadline:
        ticker_at(&g.ticker, op.deadline)
    if g.closed:                        # by another thread since the caller looked; nobody ticks any more
        with nogil:
            tick(g, axf_now())
        return
    if not axf_load(&g.link.alive):
        ticker_at(&g.ticker, axf_now())
        return
    s = lane.stream
    if w.nbytes <= INLINE and s != NULL and lane.up and pthread_mutex_trylock(&s.lock) == 0:
        rc = IDLE
        if not axf_load(&s.closing):
            rc = pump(lane, INLINE)
        pthread_mutex_unlock(&s.lock)
        if rc == BROKEN:
            stream_close(s)
        elif rc == BUSY:
            stream_attend(s)
        if not waiting(g):
            return
    with nogil:
        attend_all(g)
