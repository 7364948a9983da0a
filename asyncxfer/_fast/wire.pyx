# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, autotestdict=False
"""Frames over a connection that never blocks: each call moves what the socket takes or has, and remembers the rest.

Payload goes from and to the rows themselves, up to 1,024 a system call; only what was read ahead together with a head,
and what is encrypted, is copied. What a frame means is the business of `initiator` and `target`.
"""

from libc.errno cimport EAGAIN, EFAULT, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from asyncxfer._fast.engine cimport copy_bytes, guarded
from asyncxfer._fast.frames cimport *
from asyncxfer._fast.native cimport *
from asyncxfer._fast.poller cimport READABLE, WRITABLE, stream_recv, stream_send, stream_t

cdef enum:
    STEP = 1 << 20              # payload bytes a system call: so long may a thread be deaf to others
    ZEROS = 65536

cdef unsigned char zeros[ZEROS]
memset(zeros, 0, ZEROS)


cdef struct summed_t:
    axf_cursor rows
    const uint64_t* bases
    uint32_t crc


cdef void add_up(void* argument) noexcept nogil:
    cdef summed_t* s = <summed_t*>argument
    s.crc = axf_cursor_crc(s.rows, s.bases)


cdef int rows_crc(const axf_cursor* rows, const uint64_t* bases, uint32_t* crc) noexcept nogil:
    """The checksum of what lies under a cursor: 0, or EFAULT when the memory is not there."""
    cdef summed_t s
    s.rows, s.bases, s.crc = rows[0], bases, 0
    if guarded(add_up, &s) != 0:
        return EFAULT
    crc[0] = s.crc
    return 0


cdef int input_open(input_t* i) noexcept nogil:
    memset(i, 0, sizeof(input_t))
    i.buf = <unsigned char*>malloc(BUFFER)
    return 0 if i.buf != NULL else -1


cdef void input_close(input_t* i) noexcept nogil:
    free(i.buf)
    i.buf = NULL


cdef ssize_t arrived(stream_t* s, ssize_t got) noexcept nogil:
    """What the result of a receiving call means."""
    if got > 0:
        axf_or(&s.ready, READABLE)
        return got
    if got < 0 and errno == EAGAIN:
        return AGAIN
    if got < 0 and errno == EFAULT:
        axf_or(&s.ready, READABLE)
        return FAULTED
    return OVER


cdef ssize_t fill(stream_t* s, input_t* i) noexcept nogil:
    cdef iovec iov
    cdef ssize_t got
    iov.iov_base, iov.iov_len = i.buf, BUFFER
    axf_and(&s.ready, ~READABLE)        # before the call: what comes after it sets the bit again
    got = arrived(s, stream_recv(s, &iov, 1))
    if got > 0:
        i.at, i.end = 0, <uint32_t>got
    return got


cdef int input_part(stream_t* s, input_t* i, void* to, uint32_t n) noexcept nogil:
    """Fills a fixed part of `n` bytes: 1 when it is complete, else AGAIN or OVER."""
    cdef uint32_t take
    cdef ssize_t got
    while i.have < n:
        if i.at == i.end:
            got = fill(s, i)
            if got <= 0:
                return <int>got
        take = min(n - i.have, i.end - i.at)
        memcpy(<char*>to + i.have, i.buf + i.at, take)
        i.at += take
        i.have += take
    i.have = 0
    return 1


cdef ssize_t from_buffer(input_t* i) noexcept nogil:
    """Copies what was read ahead to the rows."""
    cdef uint64_t take, total = 0
    while i.left and i.at < i.end:
        take = min(min(i.rows.run.length - i.rows.skip, i.left), <uint64_t>(i.end - i.at))
        if copy_bytes(axf_cursor_at(&i.rows, i.bases), i.buf + i.at, take) != 0:
            return FAULTED
        axf_cursor_move(&i.rows, take)
        i.at += <uint32_t>take
        i.left -= take
        total += take
    return <ssize_t>total


cdef ssize_t input_rows(stream_t* s, input_t* i) noexcept nogil:
    """Moves some of the payload to its rows: how many bytes, or AGAIN, OVER, FAULTED."""
    cdef iovec iov[AXF_IOV]
    cdef uint64_t bytes = 0
    cdef ssize_t got
    cdef int n
    if i.at < i.end:
        return from_buffer(i)
    if s.tls != NULL:
        got = fill(s, i)
        return from_buffer(i) if got > 0 else got
    n = axf_cursor_iov(i.rows, i.bases, iov, AXF_IOV - 1, STEP, &bytes)
    if bytes == i.left:                 # and what follows it
        iov[n].iov_base, iov[n].iov_len = i.buf, BUFFER
        n += 1
    axf_and(&s.ready, ~READABLE)
    got = arrived(s, stream_recv(s, iov, n))
    if got <= 0:
        return got
    if <uint64_t>got > bytes:
        i.at, i.end = 0, <uint32_t>(<uint64_t>got - bytes)
        got = <ssize_t>bytes
    axf_cursor_move(&i.rows, got)
    i.left -= got
    return got


cdef ssize_t input_skip(stream_t* s, input_t* i) noexcept nogil:
    """Throws some of the payload away: how many bytes, or AGAIN, OVER."""
    cdef uint64_t take
    cdef ssize_t got
    if i.at == i.end and s.tls != NULL:
        got = fill(s, i)
        if got <= 0:
            return got
    if i.at < i.end:
        take = min(i.left, <uint64_t>(i.end - i.at))
        i.at += <uint32_t>take
        i.left -= take
        return <ssize_t>take
    axf_and(&s.ready, ~READABLE)
    got = arrived(s, axf_socket_skip(s.fd, min(i.left, <uint64_t>STEP)))
    if got > 0:
        i.left -= got
    return got


cdef int output_open(output_t* o, uint32_t room) noexcept nogil:
    memset(o, 0, sizeof(output_t))
    o.buf = <unsigned char*>malloc(room)
    return 0 if o.buf != NULL else -1


cdef void output_close(output_t* o) noexcept nogil:
    free(o.buf)
    o.buf = NULL


cdef bint output_done(output_t* o) noexcept nogil:
    return o.at == o.len and o.left == 0 and (not o.has_tail or o.tail_at == sizeof(axf_tail))


cdef ssize_t output_step(stream_t* s, output_t* o) noexcept nogil:
    """Sends some of the frame: how many bytes, or AGAIN, OVER, FAULTED. The stream's lock is held."""
    cdef iovec iov[AXF_IOV + 2]
    cdef uint64_t payload = 0, take
    cdef ssize_t sent, rest
    cdef int n = 0
    if o.at < o.len:
        iov[0].iov_base, iov[0].iov_len = o.buf + o.at, o.len - o.at
        n = 1
    if o.left and o.padding:
        payload = min(o.left, <uint64_t>ZEROS)
        iov[n].iov_base, iov[n].iov_len = zeros, payload
        n += 1
    elif o.left:
        n += axf_cursor_iov(o.rows, o.bases, &iov[n], AXF_IOV - 2, STEP, &payload)
    if o.has_tail and payload == o.left:
        iov[n].iov_base, iov[n].iov_len = <char*>&o.tail + o.tail_at, sizeof(axf_tail) - o.tail_at
        n += 1
    axf_and(&s.ready, ~WRITABLE)
    sent = stream_send(s, iov, n)
    if sent < 0:
        if errno == EAGAIN:
            return AGAIN
        if errno == EFAULT:
            axf_or(&s.ready, WRITABLE)
            return FAULTED
        return OVER
    axf_or(&s.ready, WRITABLE)
    rest = sent
    take = min(<uint64_t>rest, <uint64_t>(o.len - o.at))
    o.at += <uint32_t>take
    rest -= take
    take = min(<uint64_t>rest, payload)
    if take:
        if not o.padding:
            axf_cursor_move(&o.rows, take)
        o.left -= take
        rest -= take
    o.tail_at += <uint32_t>rest
    return sent
