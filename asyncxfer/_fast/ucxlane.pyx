# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, autotestdict=False
"""The initiating side over UCX: puts and gets posted row by row, flushes, notifications behind them.

A Group is a peer, with a lane for each worker: an endpoint, which is made again when it breaks. A transfer in flight
uses one lane. It is posted a bounded piece a turn, so that no loop is held up and none starves another; its chunks are
counted, a put is flushed, and then a notification goes as an active message from the callback of that flush, which the
target answers. Rows that are small for the transport go packed, in messages that the target unpacks. A transfer whose
endpoint breaks begins again on the next one: a put or a get may be carried out twice, which changes nothing. It ends
when UCX holds on to nothing of it; what does not let go in time has its endpoint closed by force, by Python, which is
told by a message. Whom the bytes are for, and whether they may be touched, is not known here.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy, memset

from asyncxfer._fast.completion cimport (
    CANCELLED, DENIED, FAILED, FAULT, OK, PEER_GONE, REVOKED, TIMED_OUT, Completion, op_finish, op_progress, op_settle,
    op_t,
)
from asyncxfer._fast.engine cimport Work, axf_chunk, axf_pair, copy_bytes, work_t
from asyncxfer._fast.link cimport Link
from asyncxfer._fast.native cimport *
from asyncxfer._fast.poller cimport Mailbox, mail, mailbox_t
from asyncxfer._fast.pthread cimport *
from asyncxfer._fast.ucp cimport *
from asyncxfer._fast.ucp cimport Memory
from asyncxfer._fast.ucxport cimport *
from asyncxfer._fast.ucxport cimport Port

from asyncxfer._errors import BackendError

from asyncxfer._fast import ucp as _ucp

cdef enum message_kind:
    LOST_ = 1                   # a lane's endpoint is broken, or has to be: close it, make another. text: its index
    DRAINED_ = 2                # UCX holds on to nothing of a lane that was taken down. text: its index
    WELCOMED_ = 3               # a lane's endpoint has been answered. text: its index
    UNUSED_ = 4                 # no transfer uses keys that were revoked. text: their number

LOST, DRAINED, WELCOMED, UNUSED = LOST_, DRAINED_, WELCOMED_, UNUSED_

cdef enum:
    MAX_LANES = 16
    SUBMIT_NS = 100_000         # that a call which posts a transfer may take for it
    SHARE_NS = 50_000           # of a turn, before the next transfer has its
    WINDOW_BYTES = 64 << 20     # that UCX holds of one transfer
    WINDOW_POSTS = 8192
    PACKS = 8                   # packed requests of one transfer that wait for their answers
    LOOK_POSTS = 16             # at the clock, after so many posts
    LOOK_BYTES = 256 << 10      # or so many bytes
    GRACE_NS = 250_000_000      # for UCX to let go of what ends early
    NOTES_BYTES = 65536         # on their way, unanswered
    RESEND_NS = 200_000_000
    RESEND_MOST_NS = 2_000_000_000
    TRIES = 8

cdef enum lane_state:
    DOWN = 0
    GREETING = 1
    UP = 2
    BROKEN = 3


cdef struct piece_t:            # a chunk of a transfer
    flight_t* flight
    uint32_t index, left        # left: posts that have not completed
    int posted                  # all of it
    # of a packed one
    uint64_t seq
    piece_t* next
    piece_t* prev


cdef struct note_t:
    note_t* next
    flight_t* flight            # that ends with the answer; NULL: nobody waits
    uint64_t seq
    uint32_t n
    unsigned char what          # 0: taken back
    int sent, reading           # reading: sends whose text UCX still reads


cdef struct release_t:
    release_t* next
    uint64_t number


cdef struct keys_t:
    void** rkeys                # [lane][segment]
    uint32_t nsegments, nlanes
    int revoked, users          # atomic
    mailbox_t* mailbox
    uint64_t owner
    uint64_t number


cdef struct lane_t:
    port_t* port
    lane_t* next                # of the port
    group_t* group
    void* ep
    int index, state
    int silent                  # taken down on purpose: nobody is told
    int stuck                   # holds on to what was to end long ago
    uint64_t life               # grows with each endpoint
    uint64_t holds              # posts that UCX holds on to
    piece_t* asked              # packed requests without an answer
    uint64_t asked_seq
    note_t* first_note
    note_t* last_note
    uint64_t note_seq
    uint64_t notes_bytes        # sent and unanswered
    int64_t resend_at, resend_after
    release_t* releases


cdef struct group_t:
    lane_t lanes[MAX_LANES]
    int nlanes
    int closed                  # atomic: a status, why nothing goes any more
    int turn                    # atomic: the next lane
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
    note_t* note
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


cdef long _live = 0


def live() -> int:
    """Groups and keys that exist now (for leak checks)."""
    return _live


cdef initiator_t* of(port_t* p) noexcept nogil:
    return <initiator_t*>p.flights


# ---- the lists of a port ---------------------------------------------------------------------------------------------

cdef void queue_up(flight_t* f) noexcept nogil:
    cdef initiator_t* i = of(f.port)
    if not f.queued:
        f.queued = 1
        f.todo = NULL
        i.last[f.priority][0] = f
        i.last[f.priority] = &f.todo


cdef void unqueue(flight_t* f) noexcept nogil:
    cdef initiator_t* i = of(f.port)
    cdef flight_t** at = &i.todo[f.priority]
    if not f.queued:
        return
    while at[0] != f:
        at = &at[0].todo
    at[0] = f.todo
    if f.todo == NULL:
        i.last[f.priority] = at
    f.queued = 0


cdef void enter_list(flight_t* f) noexcept nogil:
    cdef initiator_t* i = of(f.port)
    f.prev = NULL
    f.next = i.first
    if i.first != NULL:
        i.first.prev = f
    i.first = f


cdef void leave_list(flight_t* f) noexcept nogil:
    cdef initiator_t* i = of(f.port)
    if f.prev != NULL:
        f.prev.next = f.next
    else:
        i.first = f.next
    if f.next != NULL:
        f.next.prev = f.prev


# ---- ends ------------------------------------------------------------------------------------------------------------

cdef void unuse(keys_t* k) noexcept nogil:
    if k == NULL:
        return
    axf_add(&k.users, -1)
    # Whoever revoked them looks at the count afterwards, we at the mark: one of the two sees the other.
    if axf_load(&k.revoked) and axf_load(&k.users) == 0:
        mail(k.mailbox, k.owner, UNUSED_, &k.number, sizeof(uint64_t))


cdef void finish(flight_t* f) noexcept nogil:
    """Ends a flight of which UCX holds nothing. The flight is gone afterwards."""
    cdef op_t* op = f.op
    cdef int status = f.ending or f.status, error = f.error
    f.port.ended += 1
    if f.gate != NULL and f.entered:
        axf_gate_leave(f.gate)
    unqueue(f)
    leave_list(f)
    unuse(f.keys)
    axf_add(&f.lane.group.flights, -1)
    if f.note != NULL:
        f.note.flight = NULL
        if not f.note.sent or status != OK:
            f.note.what = 0
    free(f.pieces)
    free(f)
    if status == OK:
        status = axf_load(&op.stop)
    if status == OK and op.put and axf_link_gone(op.link):
        status = PEER_GONE
    op.carried = 0              # the rest is the same for all backends
    if status == OK:
        op.has_note = 0         # it is there
    op_finish(op, status, error)


cdef void let_go(flight_t* f, int status, int64_t now) noexcept nogil:
    """Has a flight end early. It is gone afterwards, unless UCX holds on to something of it."""
    if f.ending == OK:
        f.ending = status
        f.since = now
        port_due(f.port, now + GRACE_NS)
        unqueue(f)
    if f.holds == 0 and f.packs == 0:
        finish(f)


cdef void break_lane(lane_t* lane) noexcept nogil:
    """Its endpoint gave an error, or is to be closed: nothing more is posted on it."""
    cdef piece_t* piece
    cdef flight_t* f
    cdef note_t* note = lane.first_note
    if lane.state == DOWN or lane.state == BROKEN:
        return
    lane.state = BROKEN
    while note != NULL:         # sent again over the next endpoint
        note.sent = 0
        note = note.next
    lane.notes_bytes = 0
    if not lane.silent:
        mail(lane.group.mailbox, lane.group.owner, LOST_, &lane.index, sizeof(int))
    while lane.asked != NULL:   # answers that do not come any more
        piece = lane.asked
        f = piece.flight
        take_off(lane, piece)
        f.broke = 1
        settle_flight(f)


cdef void drained(lane_t* lane) noexcept nogil:
    if lane.holds == 0 and lane.state == DOWN:
        mail(lane.group.mailbox, lane.group.owner, DRAINED_, &lane.index, sizeof(int))


cdef bint reusable(int status) noexcept nogil:
    """Whether a status says that this request was wrong, not that its endpoint is."""
    return status in (AXF_UCS_NO_MEMORY,)


cdef void failed(flight_t* f, int status) noexcept nogil:
    """A post of a flight gave an error."""
    if f.lane.life == f.life and not reusable(status):
        break_lane(f.lane)
    if reusable(status):
        f.status, f.error = FAILED, -status
    f.broke = 1


cdef void settle_flight(flight_t* f) noexcept nogil:
    """Sees what is next for a flight after something of it has completed. It may be gone afterwards."""
    if f.holds or f.packs:
        return
    if f.ending:
        finish(f)
    elif f.status:
        finish(f)
    elif f.broke:
        again(f)
    elif all_posted(f):
        if f.put and not f.flushed and not f.packed:
            flush(f)
        elif f.op.has_note:
            tell(f)
        else:
            finish(f)


cdef void again(flight_t* f) noexcept nogil:
    """Begins anew on the lane's next endpoint, or on another lane that is up."""
    cdef group_t* g = f.lane.group
    f.tries += 1
    if axf_link_gone(g.link):
        f.status = PEER_GONE
    elif f.tries > TRIES:
        f.status = FAILED
    if f.status:
        finish(f)
        return
    f.next_chunk = 0
    f.inside = f.broke = f.flushed = 0
    f.bytes_held = 0
    queue_up(f)


cdef bint all_posted(const flight_t* f) noexcept nogil:
    return f.next_chunk >= f.w.nchunks and not f.inside


cdef void held(flight_t* f) noexcept nogil:
    f.holds += 1
    f.lane.holds += 1


cdef void released(flight_t* f, int status) noexcept nogil:
    cdef lane_t* lane = f.lane
    f.holds -= 1
    lane.holds -= 1
    if status != AXF_UCS_OK:
        failed(f, status)
    drained(lane)


# ---- posting ---------------------------------------------------------------------------------------------------------

cdef void piece_ended(piece_t* piece) noexcept nogil:
    """All posts of a chunk have completed."""
    cdef flight_t* f = piece.flight
    cdef uint64_t n = f.w.chunks[piece.index].nbytes
    f.bytes_held = f.bytes_held - n if f.bytes_held > n else 0
    if f.op.marks[piece.index] == 0 and not f.broke:
        f.op.marks[piece.index] = 1
        axf_add64(&f.op.moved, n)
        op_progress(f.op)


cdef void on_post(void* request, int status, void* arg) noexcept nogil:
    cdef piece_t* piece = <piece_t*>arg
    cdef flight_t* f = piece.flight
    ucp.request_free(request)
    released(f, status)
    piece.left -= 1
    if piece.left == 0 and piece.posted and not f.broke:
        piece_ended(piece)
    if not all_posted(f) and not f.ending and not f.broke:
        queue_up(f)             # the window may have room again
    settle_flight(f)


cdef void on_flush(void* request, int status, void* arg) noexcept nogil:
    cdef flight_t* f = <flight_t*>arg
    ucp.request_free(request)
    released(f, status)
    settle_flight(f)


cdef void flush(flight_t* f) noexcept nogil:
    cdef axf_ucp_param param
    cdef void* given
    memset(&param, 0, sizeof(param))
    param.mask = AXF_OP_CALLBACK | AXF_OP_ARG
    param.done, param.arg = on_flush, f
    f.flushed = 1
    given = ucp.ep_flush_nbx(f.lane.ep, &param)
    if given == NULL:
        settle_flight(f)
    elif axf_ucp_failed(given):
        failed(f, axf_ucp_status(given))
        settle_flight(f)
    else:
        held(f)


cdef bint may_go(flight_t* f, int64_t now) noexcept nogil:
    """Whether a flight may post now; its lane is chosen here."""
    if f.lane.state != UP:
        return False
    if f.next_chunk == 0 and not f.inside:
        f.life = f.lane.life
    elif f.life != f.lane.life:
        f.broke = 1
        settle_flight(f)
        return False
    if not f.packed and f.keys != NULL and f.keys.rkeys[f.lane.index * f.keys.nsegments] == NULL:
        return False
    if f.gate != NULL:
        if not f.entered:
            f.entered = axf_gate_enter(f.gate, f.w.epoch)
        if not f.entered or f.gate.epoch != f.w.epoch:
            let_go(f, PEER_GONE if axf_link_gone(f.op.link) else REVOKED, now)
            return False
    return True


cdef int post_flight(flight_t* f, int64_t until) noexcept nogil:
    """Posts what fits: 1 when there is more and it may go on, 0 when it waits for something or is gone."""
    cdef int64_t now = axf_now()
    if not may_go(f, now):
        return 0
    return post_packs(f, until) if f.packed else post_rows(f, until)


cdef int post_rows(flight_t* f, int64_t until) noexcept nogil:
    cdef axf_ucp_param param
    cdef const work_t* w = f.w
    cdef const axf_pair* pair
    cdef lane_t* lane = f.lane
    cdef void** rkeys = &f.keys.rkeys[lane.index * f.keys.nsegments]
    cdef piece_t* piece
    cdef void* given
    cdef uint64_t n, looked_bytes = 0
    cdef uint32_t looked = 0
    cdef char* local
    cdef uint64_t remote
    memset(&param, 0, sizeof(param))
    param.mask = AXF_OP_CALLBACK | AXF_OP_ARG | AXF_OP_MEMORY
    param.done = on_post
    while not all_posted(f):
        if not f.inside:
            if f.bytes_held >= WINDOW_BYTES or f.holds >= WINDOW_POSTS:
                return 0
            f.at = w.chunks[f.next_chunk]
            f.inside = 1
            piece = &f.pieces[f.next_chunk]
            piece.flight, piece.index, piece.left, piece.posted = f, f.next_chunk, 0, 0
            f.bytes_held += f.at.nbytes
            f.next_chunk += 1
        piece = &f.pieces[f.next_chunk - 1]
        param.arg = piece
        while f.at.nbytes:
            pair = &w.pairs[f.at.pair]
            n = min(pair.length - f.at.skip, f.at.nbytes)
            local = <char*>pair.local + pair.local_stride * <int64_t>f.at.row + f.at.skip
            remote = pair.remote + <uint64_t>(pair.remote_stride * <int64_t>f.at.row) + f.at.skip
            param.memory = f.memories[pair.local_segment]
            if f.put:
                given = ucp.put_nbx(lane.ep, local, n, remote, rkeys[pair.remote_segment], &param)
            else:
                given = ucp.get_nbx(lane.ep, local, n, remote, rkeys[pair.remote_segment], &param)
            if given != NULL:
                if axf_ucp_failed(given):
                    failed(f, axf_ucp_status(given))
                    unqueue(f)
                    settle_flight(f)
                    return 0
                piece.left += 1
                held(f)
            f.at.nbytes -= n
            f.at.skip += n
            if f.at.skip == pair.length:
                f.at.skip = 0
                f.at.row += 1
                if f.at.row == pair.count:
                    f.at.row = 0
                    f.at.pair += 1
            looked += 1
            looked_bytes += n
            if f.at.nbytes and (looked >= LOOK_POSTS or looked_bytes >= LOOK_BYTES):
                looked, looked_bytes = 0, 0
                if axf_now() >= until:
                    return 1
        f.inside = 0
        piece.posted = 1
        if piece.left == 0:
            piece_ended(piece)
        if (looked >= LOOK_POSTS or looked_bytes >= LOOK_BYTES) and not all_posted(f):
            looked, looked_bytes = 0, 0
            if axf_now() >= until:
                return 1
    unqueue(f)
    if f.put:
        if not f.flushed:
            flush(f)
    else:
        settle_flight(f)
    return 0


cdef int post(port_t* p, int64_t until) noexcept nogil:
    """Has flights post, in turns: 1 when something was posted."""
    cdef initiator_t* i = of(p)
    cdef flight_t* f
    cdef flight_t* stop
    cdef int priority, done = 0, more
    cdef int64_t now
    if i.inbox != NULL:
        take_in(i)
        done = 1
    for priority in range(3):
        stop = NULL
        while i.todo[priority] != NULL and i.todo[priority] != stop:
            f = i.todo[priority]
            unqueue(f)
            now = axf_now()
            if now >= until:
                queue_front(f)
                return 1
            more = post_flight(f, min(until, now + SHARE_NS))
            done = 1            # UCX is to make progress with it before the worker is armed
            if more:
                queue_up(f)
                if stop == NULL:
                    stop = f
        if i.todo[priority] != NULL:
            return 1            # before those of less importance
    return done


cdef void take_in(initiator_t* i) noexcept nogil:
    cdef void* newest = axf_take(&i.inbox)
    cdef flight_t* f
    cdef void* oldest = NULL
    cdef void* next_
    while newest != NULL:
        next_ = (<flight_t*>newest).inbox
        (<flight_t*>newest).inbox = oldest
        oldest, newest = newest, next_
    while oldest != NULL:
        f = <flight_t*>oldest
        oldest = f.inbox
        begin(f, False)


cdef void queue_front(flight_t* f) noexcept nogil:
    cdef initiator_t* i = of(f.port)
    f.todo = i.todo[f.priority]
    i.todo[f.priority] = f
    if f.todo == NULL:
        i.last[f.priority] = &f.todo
    f.queued = 1


# ---- packed rows -----------------------------------------------------------------------------------------------------

cdef void take_off(lane_t* lane, piece_t* piece) noexcept nogil:
    if piece.prev != NULL:
        piece.prev.next = piece.next
    else:
        lane.asked = piece.next
    if piece.next != NULL:
        piece.next.prev = piece.prev
    piece.flight.packs -= 1


cdef int move_packed(const work_t* w, const axf_chunk* chunk, char* data, axf_ucx_row* rows, bint gather) noexcept nogil:
    """Copies between the rows of a chunk and bytes in a line; describes the remote rows if asked: 0 or EFAULT."""
    cdef uint64_t pair_at = chunk.pair, row = chunk.row, skip = chunk.skip, left = chunk.nbytes, n
    cdef const axf_pair* pair
    cdef char* local
    while left:
        pair = &w.pairs[pair_at]
        n = min(pair.length - skip, left)
        local = <char*>pair.local + pair.local_stride * <int64_t>row + skip
        if rows != NULL:
            rows.offset = pair.remote + <uint64_t>(pair.remote_stride * <int64_t>row) + skip
            rows.nbytes, rows.segment = <uint32_t>n, pair.remote_segment
            rows += 1
        if data != NULL:
            if gather:
                if copy_bytes(data, local, n):
                    return 1
            elif copy_bytes(local, data, n):
                return 1
            data += n
        left -= n
        skip = 0
        row += 1
        if row == pair.count:
            row = 0
            pair_at += 1
    return 0


cdef uint32_t count_rows(const work_t* w, const axf_chunk* chunk) noexcept nogil:
    cdef uint64_t pair_at = chunk.pair, row = chunk.row, skip = chunk.skip, left = chunk.nbytes, take
    cdef const axf_pair* pair
    cdef uint32_t rows = 0
    while left:
        pair = &w.pairs[pair_at]
        if skip or left < pair.length:
            left -= min(pair.length - skip, left)
            take = 1
        else:
            take = min(pair.count - row, left // pair.length)
            left -= take * pair.length
        rows += <uint32_t>take
        skip = 0
        row += take
        if row == pair.count:
            row = 0
            pair_at += 1
    return rows


cdef int post_packs(flight_t* f, int64_t until) noexcept nogil:
    cdef const work_t* w = f.w
    cdef lane_t* lane = f.lane
    cdef const axf_chunk* chunk
    cdef axf_ucx_head head
    cdef piece_t* piece
    cdef uint32_t rows
    cdef uint64_t n
    cdef char* message
    cdef int status
    while not all_posted(f):
        if f.packs >= PACKS:
            return 0
        chunk = &w.chunks[f.next_chunk]
        rows = count_rows(w, chunk)
        n = rows * sizeof(axf_ucx_row) + (chunk.nbytes if f.put else 0)
        message = <char*>malloc(n)
        if message == NULL or move_packed(
            w, chunk, message + rows * sizeof(axf_ucx_row) if f.put else NULL, <axf_ucx_row*>message, True
        ):
            free(message)
            let_go(f, FAULT if message != NULL else FAILED, axf_now())
            return 0
        piece = &f.pieces[f.next_chunk]
        piece.flight, piece.index, piece.left, piece.posted = f, f.next_chunk, 0, 1
        lane.asked_seq += 1
        piece.seq = lane.asked_seq
        piece.prev, piece.next = NULL, lane.asked
        if lane.asked != NULL:
            lane.asked.prev = piece
        lane.asked = piece
        f.packs += 1
        f.next_chunk += 1
        memset(&head, 0, sizeof(head))
        memcpy(head.key, lane.group.key, 16)
        head.version, head.kind, head.lane = AXF_UCX_VERSION, AXF_UCX_PUT if f.put else AXF_UCX_GET, lane.index
        head.seq, head.slot, head.epoch, head.count = piece.seq, w.slot, w.epoch, rows
        status = port_send(f.port, lane.ep, &head, message, n, message, True)
        if status != AXF_UCS_OK:
            take_off(lane, piece)
            failed(f, status)
            unqueue(f)
            settle_flight(f)
            return 0
        if axf_now() >= until and not all_posted(f):
            return 1
    unqueue(f)
    return 0


cdef void on_done(lane_t* lane, const axf_ucx_head* head, const char* data, size_t n) noexcept nogil:
    cdef piece_t* piece = lane.asked
    cdef flight_t* f
    cdef const axf_chunk* chunk
    while piece != NULL and piece.seq != head.seq:
        piece = piece.next
    if piece == NULL:
        return
    f = piece.flight
    take_off(lane, piece)
    chunk = &f.w.chunks[piece.index]
    if head.what != OK:
        f.status = head.what if head.what in (REVOKED, FAULT, DENIED, FAILED) else FAILED
    elif not f.put and not f.ending and not f.status:
        if n != chunk.nbytes:
            f.status = FAILED
        elif move_packed(f.w, chunk, <char*>data, NULL, False):
            f.status = FAULT
    if f.status == OK:
        piece_ended(piece)
        if not all_posted(f) and not f.ending:
            queue_up(f)
    else:
        unqueue(f)
        f.next_chunk, f.inside = f.w.nchunks, 0
    settle_flight(f)


# ---- notifications ---------------------------------------------------------------------------------------------------

cdef void tell(flight_t* f) noexcept nogil:
    """The data is there: queues the notification."""
    cdef lane_t* lane = f.lane
    cdef op_t* op = f.op
    cdef note_t* note
    if f.note != NULL:
        return                  # it waits for its answer
    if lane.state != UP or lane.life != f.life and f.w.nchunks:
        f.broke = 1
        again(f)
        return
    note = <note_t*>malloc(sizeof(note_t) + op.note_bytes)
    if note == NULL:
        f.status = FAILED
        finish(f)
        return
    memset(note, 0, sizeof(note_t))
    note.flight, note.n, note.what = f, <uint32_t>op.note_bytes, c'N'
    memcpy(note + 1, op.note, op.note_bytes)
    lane.note_seq += 1
    note.seq = lane.note_seq
    f.note = note
    if lane.last_note == NULL:
        lane.first_note = note
    else:
        lane.last_note.next = note
    lane.last_note = note
    send_notes(lane)


cdef void on_note_sent(void* request, int status, void* arg) noexcept nogil:
    cdef note_t* note = <note_t*>arg
    ucp.request_free(request)
    note.reading -= 1
    if note.reading == 0 and note.seq == 0:
        free(note)              # it was answered before UCX had done with it


cdef void send_notes(lane_t* lane) noexcept nogil:
    """Sends what has not been sent, as far as the window goes. In order: the target takes no other."""
    cdef note_t* note = lane.first_note
    cdef axf_ucp_param param
    cdef axf_ucx_head head
    cdef void* given
    if lane.state != UP:
        return
    memset(&param, 0, sizeof(param))
    memset(&head, 0, sizeof(head))
    param.mask = AXF_OP_CALLBACK | AXF_OP_ARG | AXF_OP_FLAGS
    param.flags = AXF_AM_EAGER | AXF_AM_COPY_HEAD | AXF_AM_REPLY
    param.done = on_note_sent
    memcpy(head.key, lane.group.key, 16)
    head.version, head.kind, head.lane = AXF_UCX_VERSION, AXF_UCX_NOTE, lane.index
    while note != NULL:
        if not note.sent:
            if lane.notes_bytes and lane.notes_bytes + note.n + 64 > NOTES_BYTES:
                break
            head.seq, head.what = note.seq, note.what
            param.arg = note
            given = ucp.am_send_nbx(
                lane.ep, AXF_UCX_AM, &head, sizeof(head), note + 1, note.n if note.what else 0, &param
            )
            if axf_ucp_failed(given):
                break_lane(lane)
                return
            if given != NULL:
                note.reading += 1
            note.sent = 1
            lane.notes_bytes += note.n + 64
            if lane.resend_at == 0:
                lane.resend_after = RESEND_NS
                lane.resend_at = axf_now() + RESEND_NS
                port_due(lane.port, lane.resend_at)
        note = note.next


cdef void on_noted(lane_t* lane, uint64_t seq) noexcept nogil:
    cdef note_t* note = lane.first_note
    cdef flight_t* f
    while note != NULL and note.seq <= seq and note.sent:
        lane.first_note = note.next
        if lane.first_note == NULL:
            lane.last_note = NULL
        lane.notes_bytes -= note.n + 64
        f = note.flight
        note.seq = 0
        if note.reading == 0:
            free(note)
        if f != NULL:
            f.note = NULL
            if f.holds == 0 and f.packs == 0 and not f.broke:
                finish(f)
        note = lane.first_note
    lane.resend_after = RESEND_NS
    lane.resend_at = 0 if lane.first_note == NULL else axf_now() + RESEND_NS
    if lane.resend_at:
        port_due(lane.port, lane.resend_at)
    send_notes(lane)


cdef void look_at_notes(lane_t* lane, int64_t now) noexcept nogil:
    """Sends again what has waited too long: the target has not taken it."""
    cdef note_t* note = lane.first_note
    if lane.resend_at == 0 or lane.state != UP:
        return
    if now >= lane.resend_at:
        while note != NULL:
            note.sent = 0
            note = note.next
        lane.notes_bytes = 0
        lane.resend_after = min(2 * lane.resend_after, <int64_t>RESEND_MOST_NS)
        lane.resend_at = now + lane.resend_after
        send_notes(lane)
    port_due(lane.port, lane.resend_at)


# ---- what the port calls -----------------------------------------------------------------------------------------------

cdef void on_answer(port_t* p, const axf_ucx_head* head, const char* data, size_t n) noexcept nogil:
    cdef lane_t* lane = of(p).lanes
    while lane != NULL and (memcmp(lane.group.key, head.key, 16) or lane.index != head.lane):
        lane = lane.next
    if lane == NULL or lane.state == DOWN or lane.state == BROKEN:
        return
    if head.kind == AXF_UCX_WELCOME:
        if lane.state == GREETING and head.seq == lane.life:
            lane.state = UP
            mail(lane.group.mailbox, lane.group.owner, WELCOMED_, &lane.index, sizeof(int))
    elif head.kind == AXF_UCX_NOTED:
        on_noted(lane, head.seq)
    else:
        on_done(lane, head, data, n)


cdef void tick(port_t* p, int64_t now) noexcept nogil:
    """Looks who is out of time, was asked to stop, or has had its region taken back; and at notes."""
    cdef initiator_t* i = of(p)
    cdef flight_t* f = i.first
    cdef flight_t* next_
    cdef lane_t* lane = i.lanes
    cdef int status
    while f != NULL:
        next_ = f.next
        if not f.ending:
            status = axf_load(&f.op.stop)
            if status == OK and f.op.deadline:
                if now >= f.op.deadline:
                    status = TIMED_OUT
                else:
                    port_due(p, f.op.deadline)
            if status == OK:
                status = axf_load(&f.lane.group.closed)
            if status == OK and f.keys != NULL and axf_load(&f.keys.revoked):
                status = REVOKED
            if status == OK and not axf_load(&f.lane.group.link.alive):
                status = PEER_GONE
            if status == OK and f.holds == 0 and f.packs == 0 and not f.queued and f.note == NULL:
                queue_up(f)     # its lane may be up again
            if status != OK:
                let_go(f, status, now)
        elif now < f.since + GRACE_NS:
            port_due(p, f.since + GRACE_NS)
        elif f.lane.life == f.life:
            f.lane.stuck = 1
        f = next_
    while lane != NULL:
        if lane.stuck:
            lane.stuck = 0
            break_lane(lane)
        look_at_notes(lane, now)
        lane = lane.next


cdef void on_stop(op_t* op) noexcept nogil:
    cdef port_t* p = <port_t*>op.carrier
    if axf_swap(&p.attention, 1) == 0:
        ucp.worker_signal(p.worker)


# ---- what Python calls -----------------------------------------------------------------------------------------------------

cdef int prepare_port(port_t* p) except -1:
    cdef initiator_t* i
    cdef int n
    if p.flights != NULL:
        return 0
    i = <initiator_t*>calloc(1, sizeof(initiator_t))
    if i == NULL:
        raise MemoryError("no memory for what is in flight over UCX")
    for n in range(3):
        i.last[n] = &i.todo[n]
    p.flights, p.post, p.tick, p.on_answer = i, post, tick, on_answer
    return 0


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
        """Send over a lane what has waited for it: it is up, and keys have been unpacked for it. With the lock held."""
        cdef lane_t* lane = self.lane(index)
        cdef axf_ucx_head head
        cdef release_t* r
        memset(&head, 0, sizeof(head))
        memcpy(head.key, self.g.key, 16)
        head.version, head.kind, head.lane = AXF_UCX_VERSION, AXF_UCX_RELEASE, index
        while lane.releases != NULL:
            r = lane.releases
            lane.releases = r.next
            head.seq = r.number
            port_send(lane.port, lane.ep, &head, NULL, 0, NULL, False)
            free(r)
        send_notes(lane)
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
        """No endpoint can be made any more, though the peer is there."""
        axf_claim(&self.g.closed, OK, FAILED)
        self.rouse()

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
        cdef note_t* note
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
            while lane.first_note != NULL:
                note = lane.first_note
                lane.first_note = note.next
                note.seq = 0
                if note.reading == 0:
                    free(note)
            lane.last_note = NULL
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
        """Make them usable on a lane that has an endpoint. With the port's lock held.

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


cdef void begin(flight_t* f, bint at_once) noexcept nogil:
    """With the lock held. The flight may be gone afterwards."""
    enter_list(f)
    if f.op.deadline:
        port_due(f.port, f.op.deadline)
    if axf_load(&f.lane.group.closed):
        let_go(f, f.lane.group.closed, axf_now())
    elif not at_once or post_flight(f, axf_now() + SUBMIT_NS):
        queue_up(f)


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
    if pthread_mutex_trylock(&port.p.lock) != 0:
        axf_push(&of(&port.p).inbox, &f.inbox)
        port.kick()
        return
    op.inline_ = 1
    begin(f, True)
    if axf_load(&op.state) == 0 and op.letter == 0:
        op.inline_ = 0
    port_unlock(&port.p)
    if op.inline_:
        completion.release()
    else:
        port.kick()


cdef extern from "Python.h":
    unsigned long this_thread "PyThread_get_thread_ident"() nogil
