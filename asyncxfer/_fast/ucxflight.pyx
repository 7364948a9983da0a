# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, autotestdict=False
"""Transfers in flight over UCX: how they are posted, how they end, and what becomes of them when an endpoint breaks.

A transfer uses one lane. It is posted a bounded piece a turn, so that no loop is held up and none starves another; its
chunks are counted, a put is flushed, and then a notification goes as an active message from the callback of that
flush, which the target answers. Rows that are small for the transport go packed, in messages that the target unpacks.
A transfer whose endpoint breaks begins again on the next one: a put or a get may be carried out twice, which changes
nothing. It ends when UCX holds on to nothing of it; what does not let go in time has its endpoint closed by force, by
Python, which is told by a message. Everything here is called with the port's lock held. Who may touch what is not
known here.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy, memset

from asyncxfer._fast.completion cimport (
    DENIED, FAILED, FAULT, OK, PEER_GONE, REVOKED, TIMED_OUT, op_finish, op_progress, op_t,
)
from asyncxfer._fast.engine cimport axf_chunk, axf_pair, work_t
from asyncxfer._fast.native cimport *
from asyncxfer._fast.packing cimport count_rows, describe_rows, gather_rows, scatter_rows
from asyncxfer._fast.poller cimport mail
from asyncxfer._fast.ucp cimport *
from asyncxfer._fast.ucxnotes cimport *
from asyncxfer._fast.ucxport cimport *

cdef enum:
    SUBMIT_NS = 100_000         # that a call which posts a transfer may take for it
    SHARE_NS = 50_000           # of a turn, before the next transfer has its
    WINDOW_BYTES = 64 << 20     # that UCX holds of one transfer
    WINDOW_POSTS = 8192
    PACKS = 8                   # packed requests of one transfer that wait for their answers
    LOOK_POSTS = 16             # at the clock, after so many posts
    LOOK_BYTES = 256 << 10      # or so many bytes
    GRACE_NS = 250_000_000      # for UCX to let go of what ends early
    ASK_NS = 500_000_000        # without an answer to packed requests, until the target is asked for one
    TRIES = 8


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
        mail(k.mailbox, k.owner, UNUSED, &k.number, sizeof(uint64_t))


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
        notes_withdraw(f.note)
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
        if not f.put:
            abandon(f)          # nothing is written for an answer that comes now
    if f.holds == 0 and f.packs == 0:
        finish(f)


cdef void abandon(flight_t* f) noexcept nogil:
    """Waits for no answer any more: nothing of what was asked is UCX's, and no endpoint has to be closed for it."""
    cdef piece_t* piece = f.lane.asked
    cdef piece_t* next_
    while piece != NULL and f.packs:
        next_ = piece.next
        if piece.flight == f:
            take_off(f.lane, piece)
        piece = next_


cdef void break_lane(lane_t* lane) noexcept nogil:
    """Its endpoint gave an error, or is to be closed: nothing more is posted on it."""
    cdef piece_t* piece
    cdef flight_t* f
    if lane.state == DOWN or lane.state == BROKEN:
        return
    lane.state = BROKEN
    notes_unsent(&lane.notes)   # over the next endpoint
    if not lane.silent:
        mail(lane.group.mailbox, lane.group.owner, LOST, &lane.index, sizeof(int))
    while lane.asked != NULL:   # answers that do not come any more
        piece = lane.asked
        f = piece.flight
        take_off(lane, piece)
        f.broke = 1
        settle_flight(f)


cdef void drained(lane_t* lane) noexcept nogil:
    if lane.holds == 0 and lane.state == DOWN:
        mail(lane.group.mailbox, lane.group.owner, DRAINED, &lane.index, sizeof(int))


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
    """Whether a flight may post now. If not it waits for something, or is gone."""
    cdef int status = axf_load(&f.op.stop)
    if status == OK and f.op.deadline and now >= f.op.deadline:
        status = TIMED_OUT
    if status != OK:
        let_go(f, status, now)
        return False
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
    else:
        lane.last_asked = piece.prev
    piece.flight.packs -= 1


cdef int post_packs(flight_t* f, int64_t until) noexcept nogil:
    cdef const work_t* w = f.w
    cdef lane_t* lane = f.lane
    cdef const axf_chunk* chunk
    cdef axf_ucx_head head
    cdef piece_t* piece
    cdef uint32_t rows
    cdef uint64_t n, table
    cdef char* message
    cdef int status
    while not all_posted(f):
        if f.packs >= PACKS:
            return 0
        chunk = &w.chunks[f.next_chunk]
        rows = count_rows(w.pairs, chunk)
        table = rows * sizeof(axf_ucx_row)
        n = table + (chunk.nbytes if f.put else 0)
        message = <char*>malloc(n)
        if message == NULL:
            let_go(f, FAILED, axf_now())
            return 0
        describe_rows(w.pairs, chunk, <axf_ucx_row*>message)
        if f.put and gather_rows(w.pairs, chunk, message + table):
            free(message)
            let_go(f, FAULT, axf_now())
            return 0
        piece = &f.pieces[f.next_chunk]
        piece.flight, piece.index, piece.left, piece.posted = f, f.next_chunk, 0, 1
        lane.asked_seq += 1
        piece.seq = lane.asked_seq
        piece.prev, piece.next = lane.last_asked, NULL
        if piece.prev != NULL:
            piece.prev.next = piece
        else:
            lane.asked = piece
        lane.last_asked = piece
        f.packs += 1
        f.next_chunk += 1
        if piece.prev == NULL:
            lane.ask_at = axf_now() + ASK_NS
            port_due(f.port, lane.ask_at)
        memset(&head, 0, sizeof(head))
        memcpy(head.key, lane.group.key, 16)
        head.version, head.kind, head.lane = AXF_UCX_VERSION, AXF_UCX_PUT if f.put else AXF_UCX_GET, lane.index
        head.seq, head.slot, head.epoch, head.count = piece.seq, w.slot, w.epoch, rows
        status = port_send(f.port, lane.ep, &head, message, n, message, True)
        if status != AXF_UCS_OK:
            take_off(lane, piece)
            f.holds += 1        # or it could end while its lane's requests are given up
            failed(f, status)
            f.holds -= 1
            unqueue(f)
            settle_flight(f)
            return 0
        if axf_now() >= until and not all_posted(f):
            return 1
    unqueue(f)
    settle_flight(f)            # one of nothing but a notification
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
    lane.ask_at = axf_now() + ASK_NS
    chunk = &f.w.chunks[piece.index]
    if head.what != OK:
        f.status = head.what if head.what in (REVOKED, FAULT, DENIED, FAILED) else FAILED
    elif not f.put and not f.ending and not f.status:
        if n != chunk.nbytes:
            f.status = FAILED
        elif scatter_rows(f.w.pairs, chunk, data):
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
    """The data is there: sends the notification."""
    cdef lane_t* lane = f.lane
    if f.note != NULL:
        return                  # it waits for its answer
    if lane.state != UP or lane.life != f.life:
        f.broke = 1
        again(f)
        return
    f.note = notes_add(&lane.notes, f.op.note, f.op.note_bytes, f)
    if f.note == NULL:
        f.status = FAILED
        finish(f)
        return
    send_notes(lane)


cdef void send_notes(lane_t* lane) noexcept nogil:
    if lane.state == UP and notes_send(&lane.notes, lane.ep) != AXF_UCS_OK:
        break_lane(lane)


cdef void told(void* who) noexcept nogil:
    """The receiver has the notification of a flight."""
    cdef flight_t* f = <flight_t*>who
    f.note = NULL
    if f.holds == 0 and f.packs == 0 and not f.broke:
        finish(f)


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
            mail(lane.group.mailbox, lane.group.owner, WELCOMED, &lane.index, sizeof(int))
        elif lane.state == UP:
            look_for_lost(lane, head.seq)
    elif head.kind == AXF_UCX_NOTED:
        notes_answer(&lane.notes, head.seq)
        send_notes(lane)
    else:
        on_done(lane, head, data, n)


cdef void ask(lane_t* lane, int64_t now) noexcept nogil:
    """Says hello where answers do not come: UCX may have closed a connection in silence, and notices when it sends."""
    cdef axf_ucx_head head
    if lane.asked == NULL or lane.state != UP:
        return
    if now >= lane.ask_at:
        memset(&head, 0, sizeof(head))
        memcpy(head.key, lane.group.key, 16)
        head.version, head.kind, head.lane = AXF_UCX_VERSION, AXF_UCX_HELLO, lane.index
        head.seq = lane.asked_seq
        lane.ask_at = now + ASK_NS
        if port_send(lane.port, lane.ep, &head, NULL, 0, NULL, True) != AXF_UCS_OK:
            break_lane(lane)
            return
    port_due(lane.port, lane.ask_at)


cdef void look_for_lost(lane_t* lane, uint64_t seq) noexcept nogil:
    """Answers come in order: that to a hello comes after those to all that was asked before."""
    if lane.asked != NULL and lane.asked.seq <= seq:
        break_lane(lane)


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
        else:
            abandon(f)
            if f.holds == 0:
                finish(f)
            elif f.lane.life == f.life:
                f.lane.stuck = 1
        f = next_
    while lane != NULL:
        if lane.stuck:
            lane.stuck = 0
            break_lane(lane)
        ask(lane, now)
        if lane.state == UP and notes_look(&lane.notes, lane.ep, now) != AXF_UCS_OK:
            break_lane(lane)
        lane = lane.next


cdef void on_stop(op_t* op) noexcept nogil:
    cdef port_t* p = <port_t*>op.carrier
    if axf_swap(&p.attention, 1) == 0:
        ucp.worker_signal(p.worker)


# ---- what ucxlane calls ----------------------------------------------------------------------------------------------

cdef initiator_t* initiator_new() noexcept nogil:
    """What a port keeps for this module; NULL when there is no memory for it."""
    cdef initiator_t* i = <initiator_t*>calloc(1, sizeof(initiator_t))
    cdef int n
    if i != NULL:
        for n in range(3):
            i.last[n] = &i.todo[n]
    return i


cdef void initiator_take(port_t* p, initiator_t* i) noexcept nogil:
    """Has a port call this module."""
    p.flights, p.post, p.tick, p.on_answer = i, post, tick, on_answer


cdef void begin(flight_t* f, bint at_once) noexcept nogil:
    """With the lock held. The flight may be gone afterwards."""
    enter_list(f)
    if f.op.deadline:
        port_due(f.port, f.op.deadline)
    if axf_load(&f.lane.group.closed):
        let_go(f, f.lane.group.closed, axf_now())
    elif not at_once or post_flight(f, axf_now() + SUBMIT_NS):
        queue_up(f)


cdef void hurry(op_t* op, port_t* p) noexcept nogil:
    """Lets UCX make progress while it can, in the hope that a small transfer ends by it. With the lock held."""
    cdef int64_t until = axf_now() + SUBMIT_NS
    while axf_load(&op.state) == 0 and op.letter == 0 and ucp.worker_progress(p.worker) and axf_now() < until:
        pass
