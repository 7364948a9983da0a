# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True, auto_pickle=False, autotestdict=False
"""Puts and gets over TCP, as the side whose regions they reach. No line of Python runs for it.

A session is one initiator: the regions that are open to it, its connections, and what it has announced. Every request
is held against the region that it names: that it is open to this initiator, in this direction, and that each row lies
inside. Memory is touched only inside the gate of the region (see `_fast.link`), at most a megabyte at a time, so that a
region can be taken back under a request. Answers go out in the order of the requests.

A notification that rides with a put is told to Python once all chunks of the put have landed, whichever connections
they came by, and never twice: requests may come again when a connection was lost. What is remembered for that goes when
the initiator says that the transfer has ended.
"""

from libc.errno cimport EAGAIN, EFAULT
from libc.stdint cimport int64_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from asyncxfer._fast.completion cimport DENIED, FAILED, FAULT, OK, REVOKED
from asyncxfer._fast.frames cimport *
from asyncxfer._fast.link cimport GatePage
from asyncxfer._fast.native cimport *
from asyncxfer._fast.poller cimport *
from asyncxfer._fast.pthread cimport *
from asyncxfer._fast.tls cimport Connection
from asyncxfer._fast.wire cimport *

import numpy as np

cdef enum:
    BUCKETS = 256
    MAX_RECORDS = 65536
    MAX_RECORD_BYTES = 64 << 20
    MAX_SEATS = 16              # connections of one initiator
    MAX_REPLIES = 2048          # beyond, nothing is read before some have gone
    MAX_REPLY_BYTES = 4 << 20   # likewise
    SHARE = 4 << 20             # bytes of a connection's turn
    HEADS = 64                  # answers without payload that go together
    OUT_ROOM = 64 * 64

cdef struct region_t:
    uint32_t epoch, segments
    int readable, writable
    uint64_t* bases             # and behind them as many sizes
    uint64_t* sizes


cdef struct record_t:           # a transfer that has a notification
    uint64_t id
    record_t* same              # of the same bucket
    record_t* next              # all, oldest first
    uint32_t chunks, seen
    int told
    char* tag
    uint32_t tag_bytes
    unsigned char bits[1]       # one a chunk that has landed, as many as there are


cdef struct reply_t:
    reply_t* next
    axf_head head
    axf_run runs[1]             # of a get, as many as there are


cdef struct session_t:
    pthread_mutex_t lock
    axf_page* page
    region_t* regions[AXF_SLOTS]
    record_t* buckets[BUCKETS]
    record_t* first
    record_t* last
    uint32_t records
    uint64_t record_bytes, settled
    int held                    # atomic: nothing is read for now
    int over                    # atomic: connections that stopped reading because nobody takes their messages
    mailbox_t* mailbox
    uint64_t owner


cdef struct seat_t:             # what a session keeps for one connection
    session_t* session
    stream_t* stream
    input_t inp
    int stage                   # of the input: 0 head, 1 what stands behind it, 2 payload, 3 tail
    axf_head head
    char* body                  # the runs, then the tag
    int status, error           # of the request that is coming in
    reply_t* first
    reply_t** last
    uint32_t replies
    uint64_t reply_bytes        # of the runs in them
    int stalled                 # nothing is read because of them
    output_t out
    reply_t* sending            # the get that is being answered


# ---- regions ---------------------------------------------------------------------------------------------------------

cdef region_t* find(session_t* z, const axf_head* h) noexcept nogil:
    """The region that a request names; what it points to may be used inside the region's gate only."""
    cdef region_t* region = NULL
    if h.slot < AXF_SLOTS:
        region = z.regions[h.slot]
    return region if region != NULL and region.epoch == h.epoch else NULL


cdef int examine(session_t* z, const axf_head* h, const axf_run* runs, const uint64_t** bases) noexcept nogil:
    """Whether a request may be carried out: a status. Gives where the segments begin."""
    cdef region_t* region
    cdef int status = REVOKED
    pthread_mutex_lock(&z.lock)
    region = find(z, h)
    if region != NULL:
        status = OK
        if not (region.writable if h.kind == AXF_PUT else region.readable):
            status = DENIED
        elif not axf_runs_fit(runs, h.runs, h.nbytes, region.sizes, region.segments):
            status = DENIED
        bases[0] = region.bases
    pthread_mutex_unlock(&z.lock)
    return status


cdef int reach(session_t* z, const axf_head* h, bint write, const uint64_t** bases) noexcept nogil:
    """Whether a request that was examined may still be carried out, and where the segments begin: a status.

    Inside the region's gate only. What was found in an earlier stay there is not to be used any more: the region may
    have been taken back and granted again in between.
    """
    cdef region_t* region
    cdef int status = REVOKED
    pthread_mutex_lock(&z.lock)
    region = find(z, h)
    if region != NULL:
        status = OK if (region.writable if write else region.readable) else DENIED
        bases[0] = region.bases
    pthread_mutex_unlock(&z.lock)
    return status


# ---- what was announced ------------------------------------------------------------------------------------------------

cdef void remove(session_t* z, record_t* r, record_t* before) noexcept nogil:
    """Forgets a transfer; `before` is the next older one. With the lock held."""
    cdef record_t** at = &z.buckets[r.id % BUCKETS]
    while at[0] != r:
        at = &at[0].same
    at[0] = r.same
    if before == NULL:
        z.first = r.next
    else:
        before.next = r.next
    if z.last == r:
        z.last = before
    z.records -= 1
    z.record_bytes -= sizeof(record_t) + r.chunks + r.tag_bytes
    free(r.tag)
    free(r)


cdef void forget(session_t* z, uint64_t settled) noexcept nogil:
    """Lets go of transfers that have ended at the initiator. With the lock held."""
    if settled <= z.settled:
        return
    z.settled = settled
    while z.first != NULL and z.first.id < settled:
        remove(z, z.first, NULL)


cdef bint evict(session_t* z) noexcept nogil:
    """Makes room: forgets the oldest transfer that was told of. Many thousands later, nothing of it will come again."""
    cdef record_t* before = NULL
    cdef record_t* r = z.first
    while r != NULL and not r.told:
        before, r = r, r.next
    if r == NULL:
        return False
    remove(z, r, before)
    return True


cdef record_t* record_of(session_t* z, const axf_head* h) noexcept nogil:
    """What is remembered of a transfer; NULL when there is no room. With the lock held."""
    cdef record_t* r = z.buckets[h.op % BUCKETS]
    while r != NULL and r.id != h.op:
        r = r.same
    if r != NULL:
        return r if r.chunks == h.chunks else NULL
    if (z.records >= MAX_RECORDS or z.record_bytes > MAX_RECORD_BYTES) and not evict(z):
        return NULL
    r = <record_t*>calloc(1, sizeof(record_t) + h.chunks)
    if r == NULL:
        return NULL
    r.id, r.chunks = h.op, h.chunks
    r.same = z.buckets[h.op % BUCKETS]
    z.buckets[h.op % BUCKETS] = r
    if z.last == NULL:
        z.first = r
    else:
        z.last.next = r
    z.last = r
    z.records += 1
    z.record_bytes += sizeof(record_t) + r.chunks
    return r


cdef int note(session_t* z, const axf_head* h, const char* tag, bint landed) noexcept nogil:
    """Takes a tag, or a chunk that has landed, into account, and tells Python when the time has come; 0, or -1."""
    cdef record_t* r
    cdef int rc = 0
    pthread_mutex_lock(&z.lock)
    forget(z, h.settled)
    if h.flags & AXF_TOLD and h.op >= z.settled:
        r = record_of(z, h)
        if r == NULL:
            rc = -1
        elif h.kind == AXF_NOTE:
            if not r.told:
                r.told = 1
                rc = -mail(z.mailbox, z.owner, c"F" if h.flags & AXF_FAILED else c"N", tag, h.tag)
        else:
            if h.chunk == 0 and not landed and r.tag == NULL and not r.told:
                r.tag = <char*>malloc(max(h.tag, 1))
                if r.tag == NULL:
                    rc = -1
                else:
                    memcpy(r.tag, tag, h.tag)
                    r.tag_bytes = h.tag
                    z.record_bytes += h.tag
                    if h.chunks > 1:
                        rc = -mail(z.mailbox, z.owner, c"I", tag, h.tag)
            if landed and not r.bits[h.chunk]:
                r.bits[h.chunk] = 1
                r.seen += 1
            if rc == 0 and r.seen == r.chunks and r.tag != NULL and not r.told:
                r.told = 1
                rc = -mail(z.mailbox, z.owner, c"N", r.tag, r.tag_bytes)
    pthread_mutex_unlock(&z.lock)
    return rc


# ---- receiving ---------------------------------------------------------------------------------------------------------

cdef bint sound(const axf_head* h) noexcept nogil:
    """Whether a head is one that an initiator may send."""
    if h.magic != AXF_FRAME_MAGIC or h.op == 0 or h.settled > h.op or h.tag > AXF_MAX_TAG:
        return False
    if h.chunks > AXF_MAX_CHUNKS or (h.tag and not h.flags & AXF_TOLD):
        return False
    if h.kind == AXF_NOTE:
        return h.runs == 0 and h.nbytes == 0 and h.flags & AXF_TOLD
    if h.kind != AXF_PUT and h.kind != AXF_GET:
        return False
    return 0 < h.runs <= AXF_MAX_RUNS and 0 < h.nbytes <= AXF_MAX_PAYLOAD and h.chunk < h.chunks


cdef int begin(seat_t* t) noexcept nogil:
    """The head of a request and what stands behind it have come: 0, or BROKEN."""
    cdef session_t* z = t.session
    cdef axf_head* h = &t.head
    cdef axf_run* runs = <axf_run*>t.body
    cdef reply_t* reply
    t.status, t.error = OK, 0
    t.inp.left = 0
    if note(z, h, t.body + h.runs * sizeof(axf_run), False) != 0:
        return BROKEN
    if h.kind == AXF_PUT:
        t.status = examine(z, h, runs, &t.inp.bases)
        t.inp.rows.run, t.inp.rows.row, t.inp.rows.skip, t.inp.rows.left = runs, 0, 0, h.nbytes
        t.inp.left = h.nbytes
        t.stage = 2
        return 0
    reply = <reply_t*>malloc(sizeof(reply_t) + h.runs * sizeof(axf_run))
    if reply == NULL:
        return BROKEN
    memcpy(&reply.head, h, sizeof(axf_head))
    if h.kind == AXF_GET:
        memcpy(reply.runs, runs, h.runs * sizeof(axf_run))
        reply.head.kind = AXF_DATA
    else:
        reply.head.kind = AXF_DONE
    queue(t, reply)
    t.stage = 0
    return 0


cdef void queue(seat_t* t, reply_t* reply) noexcept nogil:
    reply.next = NULL
    t.last[0] = reply
    t.last = &reply.next
    t.replies += 1
    t.reply_bytes += run_bytes(reply)


cdef uint64_t run_bytes(const reply_t* reply) noexcept nogil:
    return reply.head.runs * sizeof(axf_run) if reply.head.kind == AXF_DATA else 0


cdef bint crowded(seat_t* t) noexcept nogil:
    return t.replies >= MAX_REPLIES or t.reply_bytes >= MAX_REPLY_BYTES


cdef ssize_t land(seat_t* t) noexcept nogil:
    """Moves some of a put's payload to its rows, or throws it away when that is not to be: as `input_rows`."""
    cdef session_t* z = t.session
    cdef axf_gate* gate
    cdef ssize_t got
    if t.status == OK:
        gate = axf_gate_at(z.page, t.head.slot)
        if not axf_gate_enter(gate, t.head.epoch):
            t.status = REVOKED
            return input_skip(t.stream, &t.inp)
        t.status = reach(z, &t.head, True, &t.inp.bases)
        if t.status == OK and axf_socket_reset(t.stream.fd):
            axf_gate_leave(gate)
            return OVER
        got = input_rows(t.stream, &t.inp) if t.status == OK else FAULTED
        axf_gate_leave(gate)
        if got != FAULTED:
            return got
        if t.status == OK:
            t.status, t.error = FAULT, EFAULT
    return input_skip(t.stream, &t.inp)


cdef int finish(seat_t* t) noexcept nogil:
    """A put has come whole: 0, or BROKEN."""
    cdef session_t* z = t.session
    cdef axf_head* h = &t.head
    cdef axf_gate* gate
    cdef axf_cursor rows
    cdef uint32_t crc = 0
    cdef reply_t* reply
    if t.status == OK and t.inp.tail.status:
        t.status = FAULT                # the initiator gave it up: what has come is not what it should be
    elif t.status == OK and h.flags & AXF_CHECKED:
        gate = axf_gate_at(z.page, h.slot)
        if not axf_gate_enter(gate, h.epoch):
            t.status = REVOKED
        else:
            rows.run, rows.row, rows.skip, rows.left = <axf_run*>t.body, 0, 0, h.nbytes
            t.status = reach(z, h, True, &t.inp.bases)
            if t.status == OK and rows_crc(&rows, t.inp.bases, &crc) != 0:
                t.status, t.error = FAULT, EFAULT
            elif t.status == OK and crc != t.inp.tail.crc:
                t.status = AXF_MISMATCH
            axf_gate_leave(gate)
    if t.status == OK:
        if note(z, h, NULL, True) != 0:
            return BROKEN
        axf_add64(&z.page.put_bytes, h.nbytes)
        axf_add64(&z.page.puts, h.chunk == 0)
    else:
        axf_add64(&z.page.failed, 1)
    reply = <reply_t*>malloc(sizeof(reply_t))
    if reply == NULL:
        return BROKEN
    memcpy(&reply.head, h, sizeof(axf_head))
    reply.head.kind, reply.head.status, reply.head.error, reply.head.nbytes = AXF_DONE, t.status, t.error, 0
    queue(t, reply)
    return 0


cdef int receive(seat_t* t) noexcept nogil:
    """Takes what has come: IDLE, BUSY, or BROKEN."""
    cdef session_t* z = t.session
    cdef stream_t* s = t.stream
    cdef uint64_t total = 0
    cdef ssize_t got
    cdef int rc
    while True:
        if t.stage == 0:
            if crowded(t):
                t.stalled = 1           # until some have gone
                return IDLE
            if axf_load(&z.held):
                return IDLE             # until `Session.go_on`
            if axf_load64(&z.mailbox.nbytes) > z.mailbox.limit:
                axf_store(&z.over, 1)
                if axf_load64(&z.mailbox.nbytes) > z.mailbox.limit:
                    return IDLE         # until `Session.read_on`; whoever takes messages looks at `over` behind that
            rc = input_part(s, &t.inp, &t.head, sizeof(axf_head))
            if rc <= 0:
                return IDLE if rc == AGAIN else BROKEN
            if not sound(&t.head):
                return BROKEN
            t.stage = 1
        if t.stage == 1:
            rc = input_part(s, &t.inp, t.body, <uint32_t>(t.head.runs * sizeof(axf_run)) + t.head.tag)
            if rc <= 0:
                return IDLE if rc == AGAIN else BROKEN
            if begin(t) != 0:
                return BROKEN
        if t.stage == 2:
            while t.inp.left:
                got = land(t)
                if got <= 0:
                    return IDLE if got == AGAIN else BROKEN
                total += <uint64_t>got
                if total >= SHARE or axf_load(&s.closing):
                    return BUSY
            t.stage = 3
        if t.stage == 3:
            rc = input_part(s, &t.inp, &t.inp.tail, sizeof(axf_tail))
            if rc <= 0:
                return IDLE if rc == AGAIN else BROKEN
            if finish(t) != 0:
                return BROKEN
            t.stage = 0


# ---- sending -------------------------------------------------------------------------------------------------------------

cdef bint next_frame(seat_t* t) noexcept nogil:
    """Makes the next answer ready to be sent, or several without payload; False when there is none."""
    cdef output_t* o = &t.out
    cdef reply_t* reply = t.first
    cdef int n = 0
    if reply == NULL:
        return False
    o.at = o.left = o.has_tail = o.padding = o.tail_at = 0
    if reply.head.kind == AXF_DATA:
        take(t)
        open_answer(t, reply)
    else:
        while reply != NULL and reply.head.kind == AXF_DONE and n < HEADS:
            take(t)
            memcpy(o.buf + n * sizeof(axf_head), &reply.head, sizeof(axf_head))
            free(reply)
            reply, n = t.first, n + 1
        o.len = n * <uint32_t>sizeof(axf_head)
    o.active = 1
    return True


cdef void take(seat_t* t) noexcept nogil:
    t.reply_bytes -= run_bytes(t.first)
    t.first = t.first.next
    if t.first == NULL:
        t.last = &t.first
    t.replies -= 1


cdef void open_answer(seat_t* t, reply_t* reply) noexcept nogil:
    """The answer to a get: its head, and where its payload comes from."""
    cdef session_t* z = t.session
    cdef output_t* o = &t.out
    cdef axf_head* h = &reply.head
    cdef axf_gate* gate = axf_gate_at(z.page, h.slot % AXF_SLOTS)
    cdef int status
    h.kind = AXF_GET
    status = examine(z, h, reply.runs, &o.bases)
    h.kind = AXF_DATA
    o.rows.run, o.rows.row, o.rows.skip, o.rows.left = reply.runs, 0, 0, h.nbytes
    memset(&o.tail, 0, sizeof(axf_tail))
    if status == OK and not axf_gate_enter(gate, h.epoch):
        status = REVOKED
    elif status == OK:
        status = reach(z, h, False, &o.bases)
        if status == OK and h.flags & AXF_CHECKED and rows_crc(&o.rows, o.bases, &o.tail.crc) != 0:
            status = FAULT
        axf_gate_leave(gate)
    if status == OK:
        o.left, o.has_tail = h.nbytes, 1
        axf_add64(&z.page.get_bytes, h.nbytes)
        axf_add64(&z.page.gets, h.chunk == 0)
    else:
        axf_add64(&z.page.failed, 1)
        h.nbytes = 0
    h.status, h.error = status, 0
    memcpy(o.buf, h, sizeof(axf_head))
    o.len = sizeof(axf_head)
    t.sending = reply


cdef ssize_t send_some(seat_t* t) noexcept nogil:
    """Sends some of the frame, as `output_step`, inside the gate where memory is read."""
    cdef output_t* o = &t.out
    cdef axf_gate* gate
    cdef ssize_t sent
    cdef int status
    if o.left == 0 or o.padding:
        return output_step(t.stream, o)
    gate = axf_gate_at(t.session.page, t.sending.head.slot)
    if not axf_gate_enter(gate, t.sending.head.epoch):
        o.padding, o.tail.status = 1, REVOKED
        return output_step(t.stream, o)
    status = reach(t.session, &t.sending.head, False, &o.bases)
    if status != OK:
        o.padding, o.tail.status = 1, status
    sent = output_step(t.stream, o)
    axf_gate_leave(gate)
    if sent == FAULTED:
        o.padding, o.tail.status = 1, FAULT
        return output_step(t.stream, o)
    return sent


cdef int pump(seat_t* t) noexcept nogil:
    """Sends the answers that there are: IDLE, BUSY, or BROKEN. The stream's lock is held."""
    cdef stream_t* s = t.stream
    cdef uint64_t total = 0
    cdef ssize_t sent
    cdef int error
    while True:
        if not t.out.active and not next_frame(t):
            if s.staged:
                axf_and(&s.ready, ~WRITABLE)
                error = stream_flush(s)
                if error == 0:
                    axf_or(&s.ready, WRITABLE)
                elif error != EAGAIN:
                    return BROKEN
            return IDLE
        sent = send_some(t)
        if sent == AGAIN:
            return IDLE
        if sent < 0:
            return BROKEN
        total += <uint64_t>sent
        if output_done(&t.out):
            t.out.active = 0
            free(t.sending)
            t.sending = NULL
        if total >= SHARE or axf_load(&s.closing):
            return BUSY


# ---- what the poller calls -------------------------------------------------------------------------------------------------

cdef int serve(stream_t* s) noexcept nogil:
    cdef seat_t* t = <seat_t*>s.io
    cdef int received = IDLE, pumped = IDLE
    pthread_mutex_lock(&s.lock)
    if axf_load(&s.ready) & READABLE or t.inp.at < t.inp.end:
        received = receive(t)
    if received != BROKEN and axf_load(&s.ready) & WRITABLE:
        pumped = pump(t)
        if t.stalled and not crowded(t):
            t.stalled = 0
            received = BUSY
    pthread_mutex_unlock(&s.lock)
    if received == BROKEN or pumped == BROKEN:
        return BROKEN
    return BUSY if received == BUSY or pumped == BUSY else IDLE


cdef void ended(stream_t* s) noexcept nogil:
    cdef seat_t* t = <seat_t*>s.io
    cdef reply_t* reply
    while t.first != NULL:
        reply = t.first
        t.first = reply.next
        free(reply)
    free(t.sending)
    t.sending = NULL
    t.last = &t.first


# ---- what Python calls -----------------------------------------------------------------------------------------------------

cdef long _live = 0


def live() -> int:
    """Sessions that exist now (for leak checks)."""
    return _live


cdef void unseat(seat_t* t) noexcept:
    input_close(&t.inp)
    output_close(&t.out)
    free(t.body)
    free(t)


cdef class Session:
    """One initiator, as it is served.

    Parameters
    ----------
    mailbox : Mailbox
        Where notifications are left: the kind is the first byte of a note (``N``, ``I``, ``F``), the text its tag.
    owner : int
        Whose messages those are.
    page : GatePage
        The gates of the regions.
    """

    def __cinit__(self, Mailbox mailbox not None, uint64_t owner, GatePage page not None) -> None:
        global _live
        self.mailbox, self.page = mailbox, page
        self.seats = {}
        self.z = <session_t*>calloc(1, sizeof(session_t))
        if self.z == NULL:
            raise MemoryError("no memory for an initiator's session")
        pthread_mutex_init(&self.z.lock, NULL)
        self.z.page, self.z.mailbox, self.z.owner = page.page, &mailbox.box, owner
        _live += 1

    def __dealloc__(self):
        global _live
        cdef record_t* r
        cdef int slot
        if self.z == NULL:
            return
        for slot in range(AXF_SLOTS):
            free(self.z.regions[slot])
        while self.z.first != NULL:
            r = self.z.first
            self.z.first = r.next
            free(r.tag)
            free(r)
        pthread_mutex_destroy(&self.z.lock)
        free(self.z)
        _live -= 1

    def open(self, uint32_t slot, uint32_t epoch, bases, sizes, *, bint readable, bint writable) -> None:
        """Serve a region: (segments,) uint64 addresses and bytes of its segments; what an epoch stands for stays."""
        cdef const uint64_t[::1] b = np.ascontiguousarray(bases, dtype=np.uint64)
        cdef const uint64_t[::1] z = np.ascontiguousarray(sizes, dtype=np.uint64)
        cdef Py_ssize_t n = b.shape[0], i
        cdef region_t* region
        if slot >= AXF_SLOTS or z.shape[0] != n:
            raise IndexError(f"slot {slot} of {AXF_SLOTS}, {n} addresses and {z.shape[0]} sizes")
        region = <region_t*>malloc(sizeof(region_t) + 2 * n * sizeof(uint64_t))
        if region == NULL:
            raise MemoryError("no memory for a region's table")
        region.epoch, region.segments = epoch, <uint32_t>n
        region.readable, region.writable = readable, writable
        region.bases = <uint64_t*>(region + 1)
        region.sizes = region.bases + n
        for i in range(n):
            region.bases[i], region.sizes[i] = b[i], z[i]
        self.place(slot, region)

    def shut(self, uint32_t slot) -> None:
        """Forget a region whose gate is shut, with nobody inside."""
        if slot < AXF_SLOTS:
            self.place(slot, NULL)

    cdef void place(self, uint32_t slot, region_t* region):
        cdef region_t* old
        pthread_mutex_lock(&self.z.lock)
        old = self.z.regions[slot]
        if old != NULL and region != NULL and old.epoch == region.epoch:
            # The same region, with another access perhaps: who is inside its gate goes on with the table that there is.
            old.readable, old.writable = region.readable, region.writable
            old = region
        else:
            self.z.regions[slot] = region
        pthread_mutex_unlock(&self.z.lock)
        free(old)

    def adopt(self, int index, int fd, Connection tls=None) -> None:
        """Serve a connection, which is the session's once this returns; the one of the same index ends first."""
        cdef seat_t* t
        cdef stream_t* s
        if not 0 <= index < MAX_SEATS:
            raise IndexError(f"connection {index}; expected an index from 0 to {MAX_SEATS - 1}")
        self.leave(index)
        t = <seat_t*>calloc(1, sizeof(seat_t))
        if t == NULL:
            raise MemoryError("no memory for a connection")
        s = stream_new(fd, NULL if tls is None else tls.ssl, index)
        t.session, t.stream, t.last = self.z, s, &t.first
        t.body = <char*>malloc(AXF_MAX_RUNS * sizeof(axf_run) + AXF_MAX_TAG)
        if s == NULL or t.body == NULL or input_open(&t.inp) != 0 or output_open(&t.out, OUT_ROOM) != 0:
            if s != NULL:
                stream_free(s)
            unseat(t)
            raise MemoryError("no memory for a connection")
        s.owner, s.io, s.serve, s.ended = self.z, t, serve, ended
        self.seats[index] = (<uintptr_t>t, tls)
        stream_start(s, index)

    def leave(self, int index) -> None:
        """End a connection, if there is one of this index."""
        cdef seat_t* t
        if index not in self.seats:
            return
        seat = self.seats.pop(index)    # with what encrypts it, until the thread has let go
        t = <seat_t*><uintptr_t>seat[0]
        with nogil:
            stream_close(t.stream)
            stream_wait(t.stream)
        stream_free(t.stream)
        unseat(t)

    def hold(self) -> None:
        """Read nothing more for now; what has begun is finished."""
        axf_store(&self.z.held, 1)

    def go_on(self) -> None:
        """Read again, after `hold`."""
        axf_store(&self.z.held, 0)
        self.read_on()

    def read_on(self) -> None:
        """Read again, unless it is held, after messages have been taken that were too many."""
        axf_store(&self.z.over, 0)
        for address, _ in self.seats.values():
            stream_attend((<seat_t*><uintptr_t>address).stream)

    @property
    def waits(self) -> bool:
        """Whether it reads nothing because messages are not taken."""
        return axf_load(&self.z.over) == 1

    def close(self) -> None:
        """End all connections; when this returns, nothing of the session touches any region."""
        for index in list(self.seats):
            self.leave(index)
