# cython: language_level=3, auto_pickle=False, autotestdict=False
"""Notifications over one lane: in order, each once, and not more than the receiver has room for.

Each has a number, and is kept until the receiver has answered that number. The receiver takes none but the next; what
it had no room for, or what was lost with an endpoint, is sent again. One that was taken back keeps its number, and
goes without its text. Who waits for an answer is not known here, nor is what makes endpoints.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from asyncxfer._fast.native cimport axf_now
from asyncxfer._fast.ucp cimport *
from asyncxfer._fast.ucxport cimport *

cdef enum:
    WINDOW = 65536              # bytes on their way; one note is let through always
    EACH = 64                   # what a note counts as beside its text
    FIRST_PATIENCE_NS = 200_000_000
    LAST_PATIENCE_NS = 2_000_000_000


cdef struct note_t:
    note_t* next
    void* who                   # waits for the answer; NULL: nobody
    uint64_t seq                # 0: answered, or forgotten, while UCX was reading
    uint32_t n
    int void_                   # taken back
    int sent, reading           # reading: sends whose text UCX still reads


cdef note_t* notes_add(notes_t* n, const char* tag, size_t nbytes, void* who) noexcept nogil:
    """Appends a note; NULL when there is no memory for it."""
    cdef note_t* note = <note_t*>malloc(sizeof(note_t) + nbytes)
    if note == NULL:
        return NULL
    memset(note, 0, sizeof(note_t))
    n.seq += 1
    note.seq, note.n, note.who = n.seq, <uint32_t>nbytes, who
    memcpy(note + 1, tag, nbytes)
    if n.last == NULL:
        n.first = note
    else:
        n.last.next = note
    n.last = note
    return note


cdef void notes_withdraw(note_t* note) noexcept nogil:
    """Nobody waits any more, and the receiver should not hear it unless it has."""
    note.who = NULL
    note.void_ = 1


cdef void on_sent(void* request, int status, void* arg) noexcept nogil:
    cdef note_t* note = <note_t*>arg
    ucp.request_free(request)
    note.reading -= 1
    if note.reading == 0 and note.seq == 0:
        free(note)


cdef void let_go(note_t* note) noexcept nogil:
    note.seq = 0
    if note.reading == 0:
        free(note)


cdef int notes_send(notes_t* n, void* ep) noexcept nogil:
    """Sends what has not been sent, as far as the window goes: a status."""
    cdef note_t* note = n.first
    cdef axf_ucp_param param
    cdef axf_ucx_head head
    cdef void* given
    memset(&param, 0, sizeof(param))
    memset(&head, 0, sizeof(head))
    param.mask = AXF_OP_CALLBACK | AXF_OP_ARG | AXF_OP_FLAGS
    param.flags = AXF_AM_EAGER | AXF_AM_COPY_HEAD | AXF_AM_REPLY
    param.done = on_sent
    memcpy(head.key, n.key, 16)
    head.version, head.kind, head.lane = AXF_UCX_VERSION, AXF_UCX_NOTE, n.lane
    while note != NULL:
        if not note.sent:
            if n.on_way and n.on_way + note.n + EACH > WINDOW:
                break
            head.seq, head.what, param.arg = note.seq, 0 if note.void_ else c'N', note
            given = ucp.am_send_nbx(
                ep, AXF_UCX_AM, &head, sizeof(head), note + 1, 0 if note.void_ else note.n, &param
            )
            if axf_ucp_failed(given):
                return axf_ucp_status(given)
            note.reading += given != NULL
            note.sent = 1
            n.on_way += note.n + EACH
            if n.due == 0:
                n.patience = FIRST_PATIENCE_NS
                n.due = axf_now() + n.patience
                port_due(n.port, n.due)
        note = note.next
    return AXF_UCS_OK


cdef void notes_answer(notes_t* n, uint64_t seq) noexcept nogil:
    """The receiver has all up to a number. What is answered here was sent: nothing else is believed."""
    cdef note_t* note
    cdef void* who
    while n.first != NULL and n.first.seq <= seq and n.first.sent:
        note = n.first
        n.first = note.next
        if n.first == NULL:
            n.last = NULL
        n.on_way -= note.n + EACH
        who = note.who
        let_go(note)
        if who != NULL:
            n.answered(who)
    n.patience = FIRST_PATIENCE_NS
    n.due = 0 if n.first == NULL else axf_now() + n.patience
    if n.due:
        port_due(n.port, n.due)


cdef int notes_look(notes_t* n, void* ep, int64_t now) noexcept nogil:
    """Sends again what has waited for its answer too long: a status."""
    cdef int status = AXF_UCS_OK
    if n.due == 0:
        return status
    if now >= n.due:
        notes_unsent(n)
        n.patience = min(2 * n.patience, <int64_t>LAST_PATIENCE_NS)
        n.due = now + n.patience
        status = notes_send(n, ep)
    port_due(n.port, n.due)
    return status


cdef void notes_unsent(notes_t* n) noexcept nogil:
    """What was sent has to be sent again."""
    cdef note_t* note = n.first
    while note != NULL:
        note.sent = 0
        note = note.next
    n.on_way = 0


cdef void notes_free(notes_t* n) noexcept nogil:
    """Forgets all of them. Nobody waits for one."""
    cdef note_t* note
    while n.first != NULL:
        note = n.first
        n.first = note.next
        let_go(note)
    n.last = NULL
    n.due = n.on_way = 0
