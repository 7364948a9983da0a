# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False, auto_pickle=False, autotestdict=False
"""A transfer between memory and a file under way: what has ended of it, how it failed, and its end.

Whoever carries out requests tells it of each one that has ended, or that will never begin; who tells of the last one
is told that it was, and sees to the end. It carries out nothing itself.
"""

from libc.errno cimport EFAULT
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from asyncxfer._fast.completion cimport FAILED, FAULT, OK, TIMED_OUT, op_finish, op_progress, op_t
from asyncxfer._fast.filework cimport (
    READING, SHORT, SYNCING, WRITING, axf_down, axf_file_size, durability_t, filework_t, request_t,
)
from asyncxfer._fast.native cimport *

cdef int _live = 0


def live():
    """Transfers under way (for leak checks)."""
    return _live


cdef flight_t* flight_new(op_t* op, const filework_t* work, int rank, int ringed) noexcept nogil:
    """NULL where there is no memory."""
    cdef flight_t* f = <flight_t*>calloc(1, sizeof(flight_t))
    if f == NULL:
        return NULL
    if ringed and work.ncached and not work.write:
        f.calls = <call_t*>calloc(work.ncached, sizeof(call_t))   # most of them are never touched
        if f.calls == NULL:
            free(f)
            return NULL
    f.op, f.work, f.rank, f.ringed = op, work, rank, ringed
    f.left = <int>work.nrequests
    f.end = work.ncached if ringed else work.nrequests
    f.ring_at = f.end
    f.self_.flight = f
    axf_add(&_live, 1)
    return f


cdef void flight_free(flight_t* f) noexcept nogil:
    axf_add(&_live, -1)
    free(f.calls)
    free(f)


cdef int flight_status(flight_t* f) noexcept nogil:
    """Why nothing more of it should begin; OK where it should."""
    if f.op.deadline and axf_load(&f.op.stop) == OK and axf_now() >= f.op.deadline:
        axf_claim(&f.op.stop, OK, TIMED_OUT)
    return axf_load(&f.op.stop)


cdef void flight_moved(flight_t* f, uint32_t request, uint64_t nbytes) noexcept nogil:
    """A request has done what it should, the last so many bytes of it now."""
    cdef const filework_t* w = f.work
    cdef const request_t* r = &w.requests[request]
    cdef uint32_t i
    for i in range(r.iov, r.iov + r.n):
        f.op.marks[i if w.order == NULL else w.order[i]] = 1
    axf_add64(&f.op.moved, nbytes)
    op_progress(f.op)


cdef void flight_trouble(flight_t* f, uint32_t request, uint64_t got, int error) noexcept nogil:
    """A request has failed after so many bytes; error 0: there were no more. The piece of which that is true is named."""
    cdef op_t* op = f.op
    cdef const request_t* r = &f.work.requests[request]
    cdef uint32_t i = r.iov
    cdef uint64_t at = r.offset
    while i + 1 < r.iov + r.n and got >= f.work.iov[i].iov_len:
        got -= f.work.iov[i].iov_len
        at += f.work.iov[i].iov_len
        i += 1
    if error == EFAULT:
        if axf_claim(&op.stop, OK, FAULT):
            op.error = error
    elif axf_claim(&op.stop, OK, FAILED):
        op.error, op.at, op.wanted, op.found = error, at, f.work.iov[i].iov_len, got
        op.detail = SHORT if error == 0 else WRITING if f.work.write else READING


cdef void flight_sync_trouble(flight_t* f, int error) noexcept nogil:
    """What was written could not be brought to the device."""
    if axf_claim(&f.op.stop, OK, FAILED):
        f.op.error, f.op.detail = error, SYNCING


cdef bint flight_less(flight_t* f, uint32_t n) noexcept nogil:
    """So many requests less; whether none is left. Where some are, the flight may be gone when this returns."""
    return n > 0 and axf_down(&f.left, <int>n) == 0


cdef void check_length(flight_t* f) noexcept nogil:
    """Fails a read of a file that has become shorter: where it was cut, the kernel fills up what it gives with zeros.

    It says how long the file is before it does so.
    """
    cdef const filework_t* w = f.work
    cdef const request_t* r
    cdef uint64_t size = axf_file_size(w.file.fd)
    cdef uint32_t i
    if size >= w.end:
        return
    for i in range(w.nrequests):
        r = &w.requests[i]
        if size < r.offset + r.nbytes:
            flight_trouble(f, i, size - r.offset if size > r.offset else 0, 0)
            return


cdef void flight_end(flight_t* f) noexcept nogil:
    """Nothing of it is under way: ends the transfer."""
    cdef op_t* op = f.op
    if not f.work.write and axf_load(&op.stop) == OK:
        check_length(f)
    flight_free(f)
    op_finish(op, axf_load(&op.stop), op.error)
