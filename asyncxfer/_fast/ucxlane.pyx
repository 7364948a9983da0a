# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, autotestdict=False
"""The initiating side over UCX, as Python sees it: peers, keys to their regions, prepared transfers.

A Group is a peer, with a lane for each worker: an endpoint, which Python makes, and makes again when it is told that
it broke. How transfers use them stands in `ucxflight`.
"""

from libc.stdint cimport uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from asyncxfer._fast.completion cimport FAILED, OK, PEER_GONE, Completion, op_settle, op_t
from asyncxfer._fast.engine cimport Work, work_t
from asyncxfer._fast.link cimport Link
from asyncxfer._fast.native cimport *
from asyncxfer._fast.poller cimport Mailbox
from asyncxfer._fast.pthread cimport *
from asyncxfer._fast.ucp cimport *
from asyncxfer._fast.ucxflight cimport (
    DOWN, DRAINED as DRAINED_, GREETING, LOST as LOST_, MAX_LANES, UNUSED as UNUSED_, UP,
    WELCOMED as WELCOMED_, begin, break_lane, drained, flight_t, group_t, hurry, initiator_new, initiator_t,
    initiator_take, keys_t, lane_t, on_stop, piece_t, release_t, told,
)
from asyncxfer._fast.ucxnotes cimport notes_free, notes_send
from asyncxfer._fast.ucxport cimport *

from asyncxfer._errors import BackendError

from asyncxfer._fast import ucp as _ucp

cdef extern from "Python.h":
    unsigned long this_thread "PyThread_get_thread_ident"() nogil

LOST, DRAINED, WELCOMED, UNUSED = LOST_, DRAINED_, WELCOMED_, UNUSED_

cdef long _live = 0


def live() -> int:
    """Groups and keys that exist now (for leak checks)."""
    return _live


cdef int prepare_port(port_t* p) except -1:
    cdef initiator_t* i
    if p.flights == NULL:
        i = initiator_new()
        if i == NULL:
            raise MemoryError("no memory for what is in flight over UCX")
        initiator_take(p, i)
    return 0


cdef inline initiator_t* of(port_t* p) noexcept nogil:
    return <initiator_t*>p.flights


cdef class Group:
    """One peer: a lane on each worker.

    Parameters
    ----------
    ports : sequence of Port
        One a lane.
    mailbox : Mailbox
        For messages ``LOST``, ``DRAINED``, ``WELCOMED``, the text of each the lane's index, and ``UNUSED``.
    owner : int
        Whose messages these are.
    link : Link
        While it is alive, lost endpoints are to be replaced.
    key : bytes
        16: the session.
    """

    def __cinit__(self, ports, Mailbox mailbox not None, uint64_t owner, Link link not None, bytes key not None):
        global _live
        cdef group_t* g
        cdef lane_t* lane
        cdef Port port
        cdef int n
        if len(key) != 16 or not 0 < len(ports) <= MAX_LANES:
            raise ValueError("a group needs a key of 16 bytes and 1 to 16 ports")
        self.ports, self.mailbox, self.link = list(ports), mailbox, link
        for port in self.ports:
            prepare_port(&port.p)
        g = <group_t*>calloc(1, sizeof(group_t))
        if g == NULL:
            raise MemoryError("no memory for a peer's lanes")
        self.g = g
        _live += 1
        g.nlanes, g.link, g.mailbox, g.owner = len(self.ports), &link.c, &mailbox.box, owner
        memcpy(g.key, <const char*>key, 16)
        for n in range(g.nlanes):
            port = self.ports[n]
            lane = &g.lanes[n]
            lane.port, lane.group, lane.index = &port.p, g, n
            lane.notes.port, lane.notes.key, lane.notes.lane = &port.p, g.key, n
            lane.notes.answered = told
            with nogil:
                port_lock(&port.p)
            lane.next = of(&port.p).lanes
            of(&port.p).lanes = lane
            port_unlock(&port.p)

    def __dealloc__(self):
        global _live
        if self.g != NULL:
            free(self.g)
            _live -= 1

    @property
    def lanes(self) -> int:
        """How many there are."""
        return self.g.nlanes

    cdef lane_t* lane(self, int index) except NULL:
        if not 0 <= index < self.g.nlanes:
            raise IndexError(f"lane {index} of {self.g.nlanes}")
        return &self.g.lanes[index]

    def up(self, int index) -> bool:
        """Whether a lane's endpoint has been answered and is not broken."""
        return self.lane(index).state == UP

    def holds(self, int index) -> int:
        """How many posts UCX holds on to, on a lane."""
        return self.lane(index).holds

    def attach(self, int index, uintptr_t endpoint) -> None:
        """Give a lane that is down an endpoint, and greet the peer over it. With the port's lock held."""
        cdef lane_t* lane = self.lane(index)
        cdef axf_ucx_head head
        if lane.state != DOWN:
            raise BackendError("a lane that is not down cannot be given another endpoint")
        memset(&head, 0, sizeof(head))
        memcpy(head.key, self.g.key, 16)
        lane.life += 1
        lane.ep, lane.state, lane.silent = <void*>endpoint, GREETING, 0
        head.version, head.kind, head.lane, head.seq = AXF_UCX_VERSION, AXF_UCX_HELLO, index, lane.life
        status = port_send(lane.port, lane.ep, &head, NULL, 0, NULL, True)
        if status != AXF_UCS_OK:
            lane.state, lane.ep = DOWN, NULL
            raise BackendError(f"UCX cannot send to the peer: {_ucp.word(status)}")

    def go_on(self, int index) -> None:
        """Send over a lane what has waited for it; keys have been unpacked for it. With the port's lock held."""
        cdef lane_t* lane = self.lane(index)
        cdef axf_ucx_head head
        cdef release_t* r
        if lane.state != UP:
            return              # it has broken meanwhile
        memset(&head, 0, sizeof(head))
        memcpy(head.key, self.g.key, 16)
        head.version, head.kind, head.lane = AXF_UCX_VERSION, AXF_UCX_RELEASE, index
        while lane.releases != NULL:
            r = lane.releases
            lane.releases = r.next
            head.seq = r.number
            port_send(lane.port, lane.ep, &head, NULL, 0, NULL, False)
            free(r)
        if notes_send(&lane.notes, lane.ep) != AXF_UCS_OK:
            break_lane(lane)
        axf_store(&lane.port.attention, 1)

    def release(self, uint64_t number) -> None:
        """Tell the peer that nothing of this side touches a region any more."""
        cdef release_t* r
        cdef lane_t* lane = &self.g.lanes[0]
        cdef Port port = self.ports[0]
        if port.closed:
            return
        r = <release_t*>malloc(sizeof(release_t))
        if r == NULL:
            raise MemoryError("no memory for a word to a peer")
        with nogil:
            port_lock(&port.p)
        r.number, r.next = number, lane.releases
        lane.releases = r
        if lane.state == UP:
            self.go_on(0)
        port_unlock(&port.p)
        port.kick()

    def detach(self, int index) -> None:
        """Take down a lane whose endpoint is being closed; ``DRAINED`` follows. With the port's lock held."""
        cdef lane_t* lane = self.lane(index)
        if lane.state == DOWN:
            return
        lane.silent = 1
        break_lane(lane)
        lane.state, lane.ep = DOWN, NULL
        drained(lane)

    def fail(self) -> None:
        """The peer is gone: end what is in flight, as soon as its buffers are quiescent."""
        axf_claim(&self.g.closed, OK, PEER_GONE)
        self.rouse()

    def give_up(self) -> None:
        """No endpoint can be made, though the peer is there: what is in flight ends, and what comes."""
        axf_claim(&self.g.closed, OK, FAILED)
        self.rouse()

    def take_up(self) -> None:
        """An endpoint could be made after all."""
        axf_claim(&self.g.closed, FAILED, OK)

    def rouse(self) -> None:
        """Have what is in flight looked at."""
        for port in self.ports:
            port.rouse()

    @property
    def flights(self) -> int:
        """Transfers in flight."""
        return axf_load(&self.g.flights)

    def close(self) -> None:
        """Forget the peer. Its lanes are down, and nothing is in flight."""
        cdef lane_t* lane
        cdef lane_t** at
        cdef release_t* r
        cdef Port port
        cdef int n
        axf_claim(&self.g.closed, OK, PEER_GONE)
        for n in range(self.g.nlanes):
            port = self.ports[n]
            lane = &self.g.lanes[n]
            with nogil:
                port_lock(&port.p)
            at = &of(&port.p).lanes if port.p.flights != NULL else NULL
            while at != NULL and at[0] != NULL and at[0] != lane:
                at = &at[0].next
            if at != NULL and at[0] == lane:
                at[0] = lane.next
            notes_free(&lane.notes)
            while lane.releases != NULL:
                r = lane.releases
                lane.releases = r.next
                free(r)
            port_unlock(&port.p)


cdef class Keys:
    """A peer's region as its lanes reach it: remote keys, unpacked once a lane.

    Parameters
    ----------
    group : Group
    packed : sequence of bytes
        One a segment.
    number : int
        Says in ``UNUSED`` which keys are meant.
    """

    def __cinit__(self, Group group not None, packed, uint64_t number) -> None:
        global _live
        cdef keys_t* k
        self.group, self.packed = group, list(packed)
        k = <keys_t*>calloc(1, sizeof(keys_t))
        if k == NULL:
            raise MemoryError("no memory for remote keys")
        self.k = k
        _live += 1
        k.nsegments, k.nlanes, k.number = max(len(self.packed), 1), group.g.nlanes, number
        k.mailbox, k.owner = group.g.mailbox, group.g.owner
        k.rkeys = <void**>calloc(k.nsegments * k.nlanes, sizeof(void*))
        if k.rkeys == NULL:
            raise MemoryError("no memory for remote keys")

    def __dealloc__(self):
        global _live
        if self.k != NULL:
            free(self.k.rkeys)
            free(self.k)
            _live -= 1

    def unpack(self, int index) -> None:
        """Make them usable on a lane, if it has an endpoint. With the port's lock held.

        Raises
        ------
        BackendError
            The endpoint cannot use them.
        """
        cdef lane_t* lane = self.group.lane(index)
        cdef void** rkeys = &self.k.rkeys[index * self.k.nsegments]
        cdef dict same = {}
        cdef uint32_t n
        cdef int status
        if lane.ep == NULL:
            return
        for n, packed in enumerate(self.packed):
            if rkeys[n] != NULL:
                continue
            if packed in same:
                rkeys[n] = <void*><uintptr_t>same[packed]
                continue
            status = ucp.ep_rkey_unpack(lane.ep, <const char*>(<bytes>packed), &rkeys[n])
            if status != AXF_UCS_OK:
                rkeys[n] = NULL
                raise BackendError(f"UCX cannot use the peer's key of this region: {_ucp.word(status)}")
            same[packed] = <uintptr_t>rkeys[n]

    def drop(self, int index) -> None:
        """Destroy those of a lane: its endpoint is gone, or nothing uses them. With the port's lock held."""
        cdef void** rkeys = &self.k.rkeys[index * self.k.nsegments]
        cdef set gone = set()
        cdef uint32_t n
        for n in range(self.k.nsegments):
            if rkeys[n] != NULL and <uintptr_t>rkeys[n] not in gone:
                gone.add(<uintptr_t>rkeys[n])
                ucp.rkey_destroy(rkeys[n])
            rkeys[n] = NULL

    def revoke(self) -> bool:
        """Have transfers that use them end; True when none does, otherwise ``UNUSED`` follows."""
        axf_store(&self.k.revoked, 1)
        if axf_load(&self.k.users) == 0:
            return True
        self.group.rouse()
        return False

    @property
    def users(self) -> int:
        """Transfers that use them."""
        return axf_load(&self.k.users)


cdef class UcxWork(Work):
    """A transfer made ready to go over UCX; parameters as of `Work`, and these.

    Parameters
    ----------
    group : Group
    keys : Keys
        Of the remote region.
    memories : sequence of Memory
        Of each local segment.
    packed : bool
        Rows go in messages; the remote bases are 0 then.
    """

    def __init__(
        self, Group group not None, Keys keys not None, memories, pairs, local_bases, remote_bases, *,
        bint packed=False, **options
    ) -> None:
        cdef Memory memory
        cdef int n
        super().__init__(pairs, local_bases, remote_bases, **options)
        self.group, self.keys, self.packed = group, keys, packed
        self.held_memories = list(memories)
        self.nmemories = len(self.held_memories)
        self.memories = <void**>calloc(max(self.nmemories, 1), sizeof(void*))
        if self.memories == NULL:
            raise MemoryError("no memory to prepare a transfer")
        for n in range(self.nmemories):
            memory = self.held_memories[n]
            self.memories[n] = memory.handle

    def __dealloc__(self):
        free(self.memories)


cdef lane_t* choose(group_t* g) noexcept nogil:
    """Lanes take turns; one that is down is passed over while another is up."""
    cdef int n, first
    if g.nlanes == 1:
        return &g.lanes[0]
    first = g.turn
    g.turn = (first + 1) % g.nlanes
    for n in range(g.nlanes):
        if g.lanes[(first + n) % g.nlanes].state == UP:
            return &g.lanes[(first + n) % g.nlanes]
    return &g.lanes[first]


def submit(UcxWork work not None, Completion completion not None, int priority=0) -> None:
    """Start the work; it ends through the completion. Never blocks: what UCX does at once is done when this returns.

    Parameters
    ----------
    priority : int
        Above 0 it goes before, below 0 after all that is in flight with 0.
    """
    cdef op_t* op = &completion.op
    cdef work_t* w = &work.w
    cdef group_t* g = work.group.g
    cdef lane_t* lane = choose(g)
    cdef Port port = work.group.ports[lane.index]
    cdef flight_t* f
    completion.prepared = work
    op.carrier, op.chunks = &port.p, w.nchunks
    if w.nchunks == 0 and not op.has_note:
        op.carried, op.inline_ = 1, 1
        completion.hold()
        op_settle(op, OK, 0)
        completion.release()
        return
    f = <flight_t*>calloc(1, sizeof(flight_t))
    op.marks = <unsigned char*>calloc(max(w.nchunks, 1), 1)
    if f != NULL:
        f.pieces = <piece_t*>calloc(max(w.nchunks, 1), sizeof(piece_t))
    if f == NULL or op.marks == NULL or f.pieces == NULL:
        if f != NULL:
            free(f.pieces)
        free(f)
        raise MemoryError("no memory to follow a transfer")
    f.op, f.w, f.keys, f.memories, f.lane, f.port = op, w, work.keys.k, work.memories, lane, &port.p
    f.put, f.packed, f.priority = op.put, work.packed, 0 if priority > 0 else 1 if priority == 0 else 2
    if w.link.page != NULL and w.nchunks:
        f.gate = axf_gate_at(w.link.page, w.slot)
    op.carried, op.on_stop = 1, on_stop
    completion.hold()
    axf_add(&f.keys.users, 1)
    axf_add(&g.flights, 1)
    if not port.p.threaded and port.ident == this_thread():
        port.queue = completion.queue
    if pthread_mutex_trylock(&port.p.lock.mutex) != 0:
        axf_push(&of(&port.p).inbox, &f.inbox)
        port.kick()
        return
    op.inline_ = 1
    begin(f, True)
    if w.small:
        hurry(op, &port.p)
    if axf_load(&op.state) == 0 and op.letter == 0:
        op.inline_ = 0
    port_unlock(&port.p)
    if op.inline_:
        completion.release()
        return
    if not port.p.threaded and port.ident == this_thread():
        stay(&port.awake, axf_now())
    port.kick()
