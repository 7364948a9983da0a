# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, autotestdict=False
"""The target's side over UCX: what it does for each initiator beside being read and written.

A session is known by its key. It takes notifications, in order and each once, unpacks rows that came packed and packs
rows that are asked for, after it has looked whether they lie in a region that is open to this initiator. Where the
initiator is on another host, nobody but itself knows when it has stopped to touch a region; so the session stands in
the region's gate for it until it says so. Everything that comes is data of a peer: nothing in it is trusted.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcmp, memcpy, memset

from asyncxfer._fast.completion cimport DENIED, FAILED, FAULT, OK, REVOKED
from asyncxfer._fast.link cimport GatePage
from asyncxfer._fast.native cimport *
from asyncxfer._fast.packing cimport check_rows, gather_described, scatter_described
from asyncxfer._fast.poller cimport Mailbox, mail, mailbox_t
from asyncxfer._fast.pthread cimport *
from asyncxfer._fast.ucxport cimport *
from asyncxfer._fast.ucxport cimport Port

import numpy as np

cdef enum:
    MAX_LANES = 16
    MAX_NOTE = 32 * 1024


cdef struct region_t:
    uint32_t slot, epoch, nsegments
    uint64_t number                         # by which the initiator gives it back
    int readable, writable, standing        # standing: in the gate, for an initiator on another host
    uint64_t* bases
    uint64_t* sizes


cdef struct session_t:
    session_t* next[MAX_LANES]              # of each port
    unsigned char key[16]
    pthread_mutex_t lock
    region_t** regions                      # by slot
    uint32_t nregions
    axf_page* page
    mailbox_t* mailbox
    uint64_t owner
    uint64_t noted[MAX_LANES]               # the last note of each lane
    int joined, remote, paused, closed


cdef long _live = 0


def live() -> int:
    """Sessions that exist now (for leak checks)."""
    return _live


# ---- regions ---------------------------------------------------------------------------------------------------------

cdef void stand(session_t* s, region_t* r) noexcept nogil:
    """Enters the gate for an initiator elsewhere, as soon as it may touch the region."""
    if s.remote and s.joined and not r.standing:
        r.standing = axf_gate_enter(axf_gate_at(s.page, r.slot), r.epoch)


cdef void step_out(session_t* s, region_t* r) noexcept nogil:
    if r.standing:
        r.standing = 0
        axf_gate_leave(axf_gate_at(s.page, r.slot))


cdef void free_region(region_t* r) noexcept nogil:
    if r != NULL:
        free(r.bases)
        free(r)


cdef region_t* find(session_t* s, uint32_t slot) noexcept nogil:
    return s.regions[slot] if slot < s.nregions else NULL


# ---- packed rows -----------------------------------------------------------------------------------------------------

cdef int serve_rows(
    session_t* s, const axf_ucx_head* head, const char* data, size_t n, char** answer, uint64_t* answer_bytes
) noexcept nogil:
    """Does what a request asks for: a status. With the session's lock held."""
    cdef region_t* r = find(s, head.slot)
    cdef axf_gate* gate
    cdef axf_ucx_row* rows
    cdef bint put = head.kind == AXF_UCX_PUT
    cdef size_t table = <size_t>head.count * sizeof(axf_ucx_row)
    cdef uint64_t total = 0
    cdef int status, error
    if head.count == 0 or head.count > AXF_UCX_MOST_ROWS or n < table:
        return DENIED
    if r == NULL or r.epoch != head.epoch:
        return REVOKED
    rows = <axf_ucx_row*>malloc(table)      # what came need not be aligned
    if rows == NULL:
        return FAILED
    memcpy(rows, data, table)
    status = OK
    if not (r.writable if put else r.readable) or not check_rows(rows, head.count, r.sizes, r.nsegments, &total):
        status = DENIED
    elif total > AXF_UCX_MOST_BYTES or n - table != (total if put else 0):
        status = DENIED
    if status == OK and not put:
        answer[0] = <char*>malloc(total if total else 1)
        answer_bytes[0] = total
        if answer[0] == NULL:
            status = FAILED
    if status == OK:
        gate = axf_gate_at(s.page, r.slot)
        if axf_gate_enter(gate, r.epoch):
            if put:
                error = scatter_described(rows, head.count, r.bases, data + table)
            else:
                error = gather_described(rows, head.count, r.bases, answer[0])
            status = FAULT if error else OK
            axf_gate_leave(gate)
        else:
            status = REVOKED
    free(rows)
    return status


# ---- messages --------------------------------------------------------------------------------------------------------

cdef void reply_to(
    port_t* p, void* ep, const axf_ucx_head* asked, int kind, int what, uint64_t seq, char* data, uint64_t n
) noexcept nogil:
    cdef axf_ucx_head head
    if ep == NULL:
        free(data)
        return
    memset(&head, 0, sizeof(head))
    memcpy(head.key, asked.key, 16)
    head.version, head.kind, head.what, head.lane, head.seq = AXF_UCX_VERSION, kind, what, asked.lane, seq
    port_send(p, ep, &head, data, n, data, False)


cdef void take_note(port_t* p, session_t* s, const axf_ucx_head* head, const char* data, size_t n, void* ep) noexcept nogil:
    """Takes a note if it is the next of its lane, and there is room for it. What is not taken is sent again."""
    cdef uint64_t last = s.noted[head.lane]
    if head.seq == last + 1:
        if s.paused or axf_load64(&s.mailbox.nbytes) > s.mailbox.limit:
            return
        if head.what == c'N' and mail(s.mailbox, s.owner, c'N', data, <uint32_t>n) != 0:
            return
        s.noted[head.lane] = last = head.seq
    if head.seq <= last:
        reply_to(p, ep, head, AXF_UCX_NOTED, 0, last, NULL, 0)


cdef void on_request(port_t* p, const axf_ucx_head* head, const char* data, size_t n, void* reply) noexcept nogil:
    cdef session_t* s = <session_t*>p.sessions
    cdef char* answer = NULL
    cdef uint64_t answer_bytes = 0
    cdef uint32_t i
    cdef int status
    while s != NULL and memcmp(s.key, head.key, 16):
        s = s.next[p.number]
    if s == NULL or head.lane >= MAX_LANES:
        return
    pthread_mutex_lock(&s.lock)
    if head.kind == AXF_UCX_HELLO:
        if not s.joined:
            s.joined = 1
            for i in range(s.nregions):
                if s.regions[i] != NULL:
                    stand(s, s.regions[i])
        reply_to(p, reply, head, AXF_UCX_WELCOME, 0, head.seq, NULL, 0)
    elif head.kind == AXF_UCX_NOTE:
        if n <= MAX_NOTE:
            take_note(p, s, head, data, n, reply)
    elif head.kind in (AXF_UCX_PUT, AXF_UCX_GET):
        status = serve_rows(s, head, data, n, &answer, &answer_bytes)
        if status != OK:
            free(answer)
            answer, answer_bytes = NULL, 0
        reply_to(p, reply, head, AXF_UCX_DONE, status, head.seq, answer, answer_bytes)
    elif head.kind == AXF_UCX_RELEASE:
        for i in range(s.nregions):
            if s.regions[i] != NULL and s.regions[i].number == head.seq:
                step_out(s, s.regions[i])
    pthread_mutex_unlock(&s.lock)

# ---- what Python calls -----------------------------------------------------------------------------------------------------

cdef class UcxSession:
    """One initiator.

    Parameters
    ----------
    ports : sequence of Port
    mailbox : Mailbox
        For its notifications: kind ``N``, the text is the tag.
    owner : int
        Whose they are.
    page : GatePage
        The gates of this agent's regions as they are open to this initiator.
    key : bytes
        16, by which it is known.
    remote : bool
        It is on another host.
    """

    def __cinit__(
        self, ports, Mailbox mailbox not None, uint64_t owner, GatePage page not None, bytes key not None, *,
        bint remote
    ) -> None:
        global _live
        cdef session_t* s
        cdef Port port
        if len(key) != 16 or len(ports) > MAX_LANES:
            raise ValueError("a session needs a key of 16 bytes and 16 ports at most")
        s = <session_t*>calloc(1, sizeof(session_t))
        if s == NULL:
            raise MemoryError("no memory for a session")
        self.s, self.ports, self.mailbox, self.page = s, list(ports), mailbox, page
        _live += 1
        pthread_mutex_init(&s.lock, NULL)
        memcpy(s.key, <const char*>key, 16)
        s.page, s.mailbox, s.owner, s.remote = page.page, &mailbox.box, owner, remote
        for port in self.ports:
            with nogil:
                port_lock(&port.p)
            s.next[port.p.number] = <session_t*>port.p.sessions
            port.p.sessions, port.p.on_request = s, on_request
            port_unlock(&port.p)

    def __dealloc__(self):
        global _live
        cdef uint32_t i
        if self.s == NULL:
            return
        for i in range(self.s.nregions):
            free_region(self.s.regions[i])
        free(self.s.regions)
        pthread_mutex_destroy(&self.s.lock)
        free(self.s)
        _live -= 1

    @property
    def joined(self) -> bool:
        """Whether it has said hello over UCX."""
        return self.s.joined == 1

    def open(self, uint32_t slot, uint32_t epoch, uint64_t number, bases, sizes, *, bint readable, bint writable) -> None:
        """Serve a region from now on; also in place of one of the same slot."""
        cdef const uint64_t[::1] b = np.ascontiguousarray(bases, dtype=np.uint64)
        cdef const uint64_t[::1] z = np.ascontiguousarray(sizes, dtype=np.uint64)
        cdef session_t* s = self.s
        cdef region_t* r
        cdef region_t* old
        cdef region_t** grown
        cdef uint32_t i, n = b.shape[0], wanted
        if slot >= AXF_SLOTS or z.shape[0] != n:
            raise ValueError("a region has a slot, and a base for each size")
        r = <region_t*>calloc(1, sizeof(region_t))
        if r != NULL:
            r.bases = <uint64_t*>malloc(max(2 * n, 1) * sizeof(uint64_t))
        if r == NULL or r.bases == NULL:
            free_region(r)
            raise MemoryError("no memory to serve a region")
        r.sizes = r.bases + n
        r.slot, r.epoch, r.number, r.nsegments = slot, epoch, number, n
        r.readable, r.writable = readable, writable
        for i in range(n):
            r.bases[i], r.sizes[i] = b[i], z[i]
        with nogil:
            pthread_mutex_lock(&s.lock)
        if slot >= s.nregions:
            wanted = max(slot + 1, min(2 * s.nregions, <uint32_t>AXF_SLOTS))
            grown = <region_t**>realloc(s.regions, wanted * sizeof(region_t*))
            if grown == NULL:
                pthread_mutex_unlock(&s.lock)
                free_region(r)
                raise MemoryError("no memory to serve a region")
            memset(grown + s.nregions, 0, (wanted - s.nregions) * sizeof(region_t*))
            s.regions, s.nregions = grown, wanted
        old = s.regions[slot]
        if old != NULL and old.epoch == epoch:
            r.standing = old.standing
        elif old != NULL:
            step_out(s, old)
        s.regions[slot] = r
        stand(s, r)
        pthread_mutex_unlock(&s.lock)
        free_region(old)

    def shut(self, uint32_t slot) -> None:
        """Forget a region."""
        cdef session_t* s = self.s
        cdef region_t* old = NULL
        with nogil:
            pthread_mutex_lock(&s.lock)
        if slot < s.nregions:
            old = s.regions[slot]
            s.regions[slot] = NULL
        if old != NULL:
            step_out(s, old)
        pthread_mutex_unlock(&s.lock)
        free_region(old)

    def hold(self) -> None:
        """Take no further notification until `go_on`."""
        self.s.paused = 1

    def go_on(self) -> None:
        """Take them again; the initiator sends what was not taken."""
        self.s.paused = 0

    def close(self) -> None:
        """Forget the initiator; when this returns, nothing of it touches any region but by UCX itself."""
        cdef session_t* s = self.s
        cdef session_t** at
        cdef Port port
        cdef uint32_t i
        if s.closed:
            return
        s.closed = 1
        for port in self.ports:
            with nogil:
                port_lock(&port.p)
            at = <session_t**>&port.p.sessions
            while at[0] != NULL and at[0] != s:
                at = &at[0].next[port.p.number]
            if at[0] == s:
                at[0] = s.next[port.p.number]
            port_unlock(&port.p)
        for i in range(s.nregions):
            if s.regions[i] != NULL:
                step_out(s, s.regions[i])
                free_region(s.regions[i])
                s.regions[i] = NULL
