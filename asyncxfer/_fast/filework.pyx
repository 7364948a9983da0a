# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False, auto_pickle=False, autotestdict=False
"""Transfers between memory and a file, made ready: what to read or write where, in as few calls as possible.

The rows are taken in the order of the file, and those that follow one another there become one request, however they
lie in memory: a vector of pieces for one `preadv`. Where a row can go past the page cache, its aligned middle does, and
its ends do not. What is small and in the page cache can be read within the call that posts it, for as long as that
holds up the loop by less than its bound. It opens no file, and knows no threads.
"""

from libc.errno cimport EOPNOTSUPP
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memset

from asyncxfer._fast.completion cimport OK, Completion, op_finish, op_t
from asyncxfer._fast.native cimport *

import numpy as np

cdef extern from "<sys/mman.h>" nogil:
    void* mmap(void* addr, size_t length, int prot, int flags, int fd, long offset)
    int munmap(void* addr, size_t length)
    void* MAP_FAILED
    enum: PROT_READ, MAP_SHARED

cdef enum:
    PAGE = 4096
    LEAST_VIEW = 16384          # smaller files are not worth a mapping

cdef uint64_t MOST_VIEW = 1 << 46        # bytes: half of what a process can have mapped
cdef int MOST_VIEWS = 16384             # a quarter of how many mappings it can have

# How long transfers may hold up the caller between two turns of its loop; 1 ms is the promise.
cdef int64_t HELD_NS = 400_000

cdef long _live = 0
cdef int _views = 0

_DURABILITIES = {"none": SYNC_NONE, "data": SYNC_DATA, "full": SYNC_FULL}
_OPERATIONS = {READING: "read", WRITING: "write", SYNCING: "sync"}


def live():
    """Prepared transfers and open files that exist now (for leak checks)."""
    return _live


cdef class OpenFile:
    """An open file as native code sees it; whoever made it keeps the descriptors open for as long as it is used.

    Parameters
    ----------
    owner : object
        Puts failures into words: ``too_short(offset, expected, found)`` and ``failed(op, errno, offset=, nbytes=)``
        give exceptions.
    fd, direct_fd : int
        Through the page cache, and past it (-1 without).
    alignment, memory_alignment : int, bytes
        Of what goes past it.
    durability : {"none", "data", "full"}
        What the end of a write stands for.
    emulated : bool or None
        A hypervisor plays the device, for which each piece of memory is work, and each page may be one; None: as sysfs
        tells.
    """

    def __init__(
        self, owner, int fd, int direct_fd, *, uint64_t alignment, uint64_t memory_alignment, str durability,
        emulated=None,
    ):
        for value in (alignment, memory_alignment):
            if value & (value - 1) or not value:
                raise ValueError(f"an alignment of {value} bytes; expected a power of 2")
        self.owner = owner
        self.f.fd, self.f.direct = fd, direct_fd
        self.f.grain, self.f.memory_grain = alignment, memory_alignment
        self.f.sync = _DURABILITIES[durability]
        self.f.emulated = axf_file_emulated(fd) if emulated is None else emulated
        self.f.in_memory = axf_file_in_memory(fd)
        self.f.can_refuse = not self.f.in_memory
        self.open_view()

    def __cinit__(self, *args, **kwargs):
        global _live
        _live += 1

    def __dealloc__(self):
        global _live
        _live -= 1
        self.close_view()

    cdef void open_view(self) noexcept:
        """Maps it, where a device is behind it: tmpfs would fill its holes."""
        global _views
        cdef uint64_t end = axf_file_size(self.f.fd)
        cdef void* view
        if self.f.in_memory or not LEAST_VIEW <= end <= MOST_VIEW or _views >= MOST_VIEWS:
            return
        view = mmap(NULL, end, PROT_READ, MAP_SHARED, self.f.fd, 0)
        if view == MAP_FAILED:
            return
        self.f.view, self.f.view_bytes, self.f.can_be_seen = <const char*>view, end, 1
        _views += 1

    cpdef void close_view(self) noexcept:
        """Lets go of what keeps the file in use; nothing is in flight."""
        global _views
        if self.f.view != NULL:
            _views -= 1
            munmap(<void*>self.f.view, self.f.view_bytes)
            self.f.view, self.f.view_bytes = NULL, 0


# ---- rows in the order of the file -------------------------------------------------------------------------------------

cdef struct row_t:
    uint64_t offset, address, length
    uint64_t index              # in the stream


cdef int in_order(row_t** rows, uint64_t n) except -1 nogil:
    """Sorts by offset, rows with the same one as they were; by the digits in which any two differ."""
    cdef row_t* source = rows[0]
    cdef row_t* target
    cdef uint64_t counts[256]
    cdef uint64_t i, total, one, differ = 0
    cdef int shift
    for i in range(1, n):
        differ |= source[i].offset ^ source[0].offset
    target = <row_t*>malloc(n * sizeof(row_t))
    if target == NULL:
        raise MemoryError(f"no memory to sort {n} rows")
    for shift in range(0, 64, 8):
        if not (differ >> shift) & 255:
            continue
        memset(counts, 0, sizeof(counts))
        for i in range(n):
            counts[(source[i].offset >> shift) & 255] += 1
        total = 0
        for i in range(256):
            one = counts[i]
            counts[i] = total
            total += one
        for i in range(n):
            one = (source[i].offset >> shift) & 255
            target[counts[one]] = source[i]
            counts[one] += 1
        source, target = target, source
    free(target)
    rows[0] = source
    return 0


cdef uint64_t stretch(const file_t* f, uint64_t grain, const row_t* row, int* direct) noexcept nogil:
    """How many bytes of a row go the same way from its beginning on, and whether that is past the page cache."""
    cdef uint64_t head = (0 - row.offset) & (grain - 1)
    direct[0] = 0
    if f.direct < 0 or row.length < head + grain or (row.address + head) & (f.memory_grain - 1):
        return row.length
    if head:
        return head
    direct[0] = 1
    return row.length & ~(grain - 1)


cdef class FileWork(Prepared):
    """A transfer made ready.

    Parameters
    ----------
    pairs : (n,) PAIR
        Matched rows in stream order, offsets relative to their segments.
    bases : (segments,) uint64, addresses
        Where each segment of the memory begins.
    file : OpenFile
    local : bool
        The file is the local side of the pairs.
    write : bool
        Memory to file.
    request_bytes, request_rows : int
        The largest request.
    inline_bytes, inline_rows : int
        Up to here it is tried on the caller's thread.
    ring : bool
        The ring may wait for the device; else threads do.
    keep : object
        What must live as long.
    """

    def __init__(
        self, pairs, bases, OpenFile file not None, *, bint local, bint write, uint64_t request_bytes=1 << 20,
        uint64_t request_rows=1024, uint64_t inline_bytes=0, uint64_t inline_rows=0, bint ring=False, keep=None,
    ):
        cdef const unsigned char[::1] raw = np.ascontiguousarray(pairs).view(np.uint8)
        cdef const uint64_t[::1] starts = np.ascontiguousarray(bases, dtype=np.uint64)
        cdef filework_t* w = &self.w
        cdef uint64_t npairs = raw.shape[0] // sizeof(axf_pair), i
        cdef row_t* rows = NULL
        cdef bint sorted_ = True
        self.file, self.keep = file, keep
        w.file, w.write, w.ring = &file.f, write, ring
        for i in range(npairs):
            w.rows += (<const axf_pair*>&raw[0])[i].count
        if w.rows >= 1 << 31:
            raise ValueError(f"{w.rows} rows in one transfer; expected fewer than {1 << 31}")
        try:
            if w.rows:
                rows = spread(<const axf_pair*>&raw[0], npairs, starts, local, w.rows, &sorted_)
                if not sorted_:
                    in_order(&rows, w.rows)
                self.cut(rows, max(request_bytes // PAGE * PAGE, PAGE), min(max(request_rows, 1), <uint64_t>MOST_IOVECS))
                if not sorted_:
                    self.number(rows)
                self.part()
        finally:
            free(rows)
        self.immediate = (
            0 < w.nbytes <= inline_bytes and w.niov <= inline_rows and w.ncached == w.nrequests
            and (file.f.in_memory if write else True) and not (write and file.f.sync)
        )

    def __cinit__(self, *args, **kwargs):
        global _live
        _live += 1

    def __dealloc__(self):
        global _live
        _live -= 1
        free(self.w.requests)
        free(self.w.iov)
        free(self.w.order)

    cdef int cut(self, void* given, uint64_t most_bytes, uint32_t most_rows) except -1:
        """Makes requests of rows that follow one another, and several of one that is too long."""
        cdef filework_t* w = &self.w
        # A page that is written past the cache must not be the neighbour of one that is written through it.
        cdef uint64_t grain = max(w.file.grain, <uint64_t>(PAGE if w.write else 1))
        cdef uint64_t i, take, past, room_requests = 0, room_iov = 0
        cdef request_t* request = NULL
        cdef const row_t* rows = <const row_t*>given
        cdef row_t row
        cdef int direct
        cdef bint full
        for i in range(w.rows):
            row = rows[i]
            w.nbytes += row.length
            w.end = max(w.end, row.offset + row.length)
            while row.length:
                take = stretch(w.file, grain, &row, &direct)
                if (request == NULL or request.direct != direct or request.offset + request.nbytes != row.offset
                        or request.nbytes >= most_bytes or request.n >= most_rows):
                    if w.nrequests == room_requests:
                        room_requests = max(2 * room_requests, <uint64_t>16)
                        w.requests = <request_t*>enlarge(w.requests, room_requests * sizeof(request_t))
                    request = &w.requests[w.nrequests]
                    w.nrequests += 1
                    request.offset, request.iov, request.n, request.nbytes = row.offset, w.niov, 0, 0
                    request.direct = direct
                full = take > most_bytes - request.nbytes
                if full:
                    take = most_bytes - request.nbytes
                    past = (row.offset + take) & (PAGE - 1)
                    if past < take:
                        take -= past            # what follows begins with a page
                if w.niov == room_iov:
                    if w.niov >= 1 << 31:
                        raise ValueError(f"a transfer of more than {1 << 31} pieces")
                    room_iov = max(2 * room_iov, max(w.rows, <uint64_t>16))
                    w.iov = <iovec*>enlarge(w.iov, room_iov * sizeof(iovec))
                w.iov[w.niov].iov_base, w.iov[w.niov].iov_len = <void*>row.address, take
                w.niov += 1
                request.n += 1
                request.nbytes += <uint32_t>take
                row.offset += take
                row.address += take
                row.length -= take
                if full:
                    request = NULL
        return 0

    cdef int number(self, const void* given) except -1:
        """Gives each piece its number in the stream."""
        cdef filework_t* w = &self.w
        cdef const row_t* rows = <const row_t*>given
        cdef uint64_t i, left
        cdef uint32_t at = 0, total = 0, n
        cdef uint32_t* first = <uint32_t*>calloc(w.rows + 1, sizeof(uint32_t))
        w.order = <uint32_t*>malloc((w.niov + 1) * sizeof(uint32_t))
        if first == NULL or w.order == NULL:
            free(first)
            raise MemoryError(f"no memory for {w.niov} pieces")
        for i in range(w.rows):
            left = rows[i].length
            n = 0
            while left:
                left -= w.iov[at + n].iov_len
                n += 1
            first[rows[i].index] = n
            at += n
        for i in range(w.rows):
            n = first[i]
            first[i] = total
            total += n
        at = 0
        for i in range(w.rows):
            left = rows[i].length
            n = 0
            while left:
                left -= w.iov[at].iov_len
                w.order[at] = first[rows[i].index] + n
                n += 1
                at += 1
        free(first)
        return 0

    cdef int part(self) except -1:
        """Puts the requests through the page cache first."""
        cdef filework_t* w = &self.w
        cdef request_t* parted
        cdef uint32_t i, at = 0
        cdef int direct
        for i in range(w.nrequests):
            w.ncached += not w.requests[i].direct
        if w.ncached == 0 or w.ncached == w.nrequests:
            return 0
        parted = <request_t*>malloc(w.nrequests * sizeof(request_t))
        if parted == NULL:
            raise MemoryError(f"no memory for {w.nrequests} requests")
        for direct in range(2):
            for i in range(w.nrequests):
                if w.requests[i].direct == direct:
                    parted[at] = w.requests[i]
                    at += 1
        free(w.requests)
        w.requests = parted
        return 0

    cdef bint run_at_once(self, Completion completion) noexcept:
        """Does it, with the GIL held, where nothing has to be waited for; whether it has ended."""
        cdef const filework_t* w = &self.w
        cdef op_t* op = &completion.op
        cdef const request_t* r
        cdef uint32_t i
        cdef int64_t rc = 0
        if completion.queue.held_ns >= HELD_NS or not (w.file.in_memory or axf_load(&w.file.can_refuse)):
            return False
        if op.deadline and axf_now() >= op.deadline:
            return False
        for i in range(w.nrequests):
            r = &w.requests[i]
            rc = axf_file_move(w.file.fd, &w.iov[r.iov], r.n, r.offset, w.write, not w.file.in_memory)
            if rc != r.nbytes:              # whatever the reason is, a thread will find it again
                if rc == -EOPNOTSUPP:
                    axf_store(&w.file.can_refuse, 0)
                completion.queue.held_ns += axf_now() - op.started
                return False
        if not w.write and axf_file_size(w.file.fd) < w.end:
            return False                    # cut meanwhile: what was read of its last page may be zeros
        op.inline_ = 1
        op_finish(op, OK, 0)
        completion.queue.held_ns += op.ended - op.started
        return True

    @property
    def nbytes(self):
        """Bytes that it moves."""
        return self.w.nbytes

    @property
    def requests(self):
        """Calls that it takes: through the page cache, and past it."""
        return self.w.ncached, self.w.nrequests - self.w.ncached

    def ends(self):
        """Where in the stream each piece ends.

        Returns
        -------
        (pieces,) uint64, bytes
        """
        out = np.empty(self.w.niov, dtype=np.uint64)
        cdef uint64_t[::1] view = out
        cdef uint32_t i
        for i in range(self.w.niov):
            view[i if self.w.order == NULL else self.w.order[i]] = self.w.iov[i].iov_len
        return np.cumsum(out, dtype=np.uint64)

    def failure(self, uint32_t trouble, int error, uint64_t offset, uint64_t expected, uint64_t found):
        """Put into words why the file failed a transfer."""
        owner = self.file.owner
        if trouble == SHORT:
            return owner.too_short(offset, expected, found)
        return owner.failed(_OPERATIONS[trouble], error, offset=offset, nbytes=expected)


cdef row_t* spread(
    const axf_pair* pairs, uint64_t npairs, const uint64_t[::1] bases, bint local, uint64_t n, bint* sorted_,
) except NULL:
    """Every row on its own."""
    cdef row_t* rows = <row_t*>malloc(n * sizeof(row_t))
    cdef row_t* row = rows
    cdef const axf_pair* pair
    cdef uint64_t i, k, offset, address, before = 0
    cdef uint32_t segment
    if rows == NULL:
        raise MemoryError(f"no memory for {n} rows")
    for i in range(npairs):
        pair = &pairs[i]
        segment = pair.remote_segment if local else pair.local_segment
        if segment >= <uint64_t>bases.shape[0] or (pair.local_segment if local else pair.remote_segment):
            free(rows)
            raise IndexError(f"pair {i} names a segment that its region does not have")
        offset = pair.local if local else pair.remote
        address = bases[segment] + (pair.remote if local else pair.local)
        for k in range(pair.count):
            row.offset, row.address, row.length, row.index = offset, address, pair.length, row - rows
            if offset < before:
                sorted_[0] = False
            before = offset
            row += 1
            offset += <uint64_t>(pair.local_stride if local else pair.remote_stride)
            address += <uint64_t>(pair.remote_stride if local else pair.local_stride)
    return rows


cdef void* enlarge(void* old, uint64_t nbytes) except NULL:
    cdef void* new = realloc(old, nbytes)
    if new == NULL:
        raise MemoryError(f"no memory for {nbytes} bytes of requests")
    return new
