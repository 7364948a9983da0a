"""Transfers in flight over the workers of UCX, and the lanes to peers that they use."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from asyncxfer._fast.completion cimport op_t
from asyncxfer._fast.engine cimport axf_chunk, work_t
from asyncxfer._fast.native cimport axf_gate, axf_link
from asyncxfer._fast.poller cimport mailbox_t
from asyncxfer._fast.ucxnotes cimport note_t, notes_t
from asyncxfer._fast.ucxport cimport port_t


cdef enum:
    MAX_LANES = 16

cdef enum message_kind:
    LOST = 1                    # a lane's endpoint is broken, or has to be: close it, make another. text: its index
    DRAINED = 2                 # UCX holds on to nothing of a lane that was taken down. text: its index
    WELCOMED = 3                # a lane's endpoint has been answered. text: its index
    UNUSED = 4                  # no transfer uses keys that were revoked. text: their number

cdef enum lane_state:
    DOWN = 0
    GREETING = 1
    UP = 2
    BROKEN = 3


cdef struct piece_t:            # a chunk of a transfer
    flight_t* flight
    uint32_t index, left        # left: posts that have not completed
    int posted                  # all of it
    uint64_t seq                # of a packed one: the request's number
    piece_t* next
    piece_t* prev


cdef struct release_t:
    release_t* next
    uint64_t number


cdef struct keys_t:             # of one region of a peer
    void** rkeys                # [lane][segment]
    uint32_t nsegments, nlanes
    int revoked, users          # atomic
    mailbox_t* mailbox
    uint64_t owner, number


cdef struct lane_t:             # an endpoint, and what hangs on it; with the port's lock
    port_t* port
    lane_t* next                # of the port
    group_t* group
    void* ep
    int index, state
    int silent                  # taken down on purpose: nobody is told
    int stuck                   # holds on to what was to end long ago
    uint64_t life               # grows with each endpoint
    uint64_t holds              # posts that UCX holds on to
    piece_t* asked              # packed requests without an answer, oldest first
    piece_t* last_asked
    uint64_t asked_seq
    int64_t ask_at              # when the target is to be asked whether it answers
    notes_t notes
    release_t* releases


cdef struct group_t:            # a peer
    lane_t lanes[MAX_LANES]
    int nlanes
    int closed                  # atomic: a status, why nothing goes any more
    int turn                    # the next lane
    axf_link* link
    mailbox_t* mailbox
    uint64_t owner
    unsigned char key[16]
    int flights                 # atomic


cdef struct flight_t:
    void* inbox                 # first: what axf_push links by
    flight_t* next              # in flight on this port
    flight_t* prev
    flight_t* todo              # to be posted
    int queued
    op_t* op
    const work_t* w
    keys_t* keys
    void** memories
    lane_t* lane
    port_t* port
    axf_gate* gate
    piece_t* pieces
    note_t* note                # that waits for its answer
    uint64_t life               # of the lane when it was posted
    uint32_t next_chunk, packs, holds
    uint64_t bytes_held         # at most
    axf_chunk at                # what is left of the chunk that is being posted
    int inside                  # one is
    int put, packed, priority
    int flushed, broke, ending, status, error, tries
    int entered                 # the gate
    int64_t since


cdef struct initiator_t:        # of one port
    void* inbox                 # of those who found the lock taken
    flight_t* first             # all
    flight_t* todo[3]
    flight_t** last[3]
    lane_t* lanes


cdef initiator_t* initiator_new() noexcept nogil
cdef void initiator_take(port_t* p, initiator_t* i) noexcept nogil
cdef void begin(flight_t* f, bint at_once) noexcept nogil
cdef void hurry(op_t* op, port_t* p) noexcept nogil
cdef void break_lane(lane_t* lane) noexcept nogil
cdef void drained(lane_t* lane) noexcept nogil
cdef void told(void* who) noexcept nogil
cdef void on_stop(op_t* op) noexcept nogil
