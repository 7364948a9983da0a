"""Notifications on their way over one lane."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from asyncxfer._fast.ucxport cimport port_t


cdef struct note_t              # the module's own


cdef struct notes_t:
    port_t* port
    const unsigned char* key    # of the session, 16 bytes
    int lane
    void (*answered)(void* who) noexcept nogil
    note_t* first
    note_t* last
    uint64_t seq                # of the last
    uint64_t on_way             # bytes that were sent and not answered
    int64_t due, patience       # when what is not answered is sent again; 0 never


cdef note_t* notes_add(notes_t* n, const char* tag, size_t nbytes, void* who) noexcept nogil
cdef void notes_withdraw(note_t* note) noexcept nogil
cdef int notes_send(notes_t* n, void* ep) noexcept nogil
cdef void notes_answer(notes_t* n, uint64_t seq) noexcept nogil
cdef int notes_look(notes_t* n, void* ep, int64_t now) noexcept nogil
cdef void notes_unsent(notes_t* n) noexcept nogil
cdef void notes_free(notes_t* n) noexcept nogil
