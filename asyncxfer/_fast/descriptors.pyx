# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: auto_pickle=False, autotestdict=False
"""Descriptor lists as packed rows: built, checked, reshaped and matched at about a nanosecond a row.

A list is a contiguous array of ``RUN``. One run stands for ``count`` rows of ``length`` bytes, ``stride`` bytes
apart, in one segment of a region, so that regular patterns stay small. ``pair`` matches two lists into ``PAIR``
rows, which are what a backend copies.

Every function takes arrays and gives new ones; none knows a region, a peer or a backend, and none but ``check``
looks at how large a segment is. Arithmetic on offsets is modulo 2**64 and never traps: rows are made safe by
``check``, once, before anything follows them to memory.

The loops hold no GIL. Outputs are ``np.empty`` of the likely size, grown or shrunk in place where that proves
wrong: a block as large as the one freed before comes from the heap, warm, and a fresh one costs its page faults,
which are dearer than the work.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport UINT32_MAX, int64_t, uint32_t, uint64_t
from libc.string cimport memset

import numpy as np

# The names of the stub, so that annotations can be evaluated.
Runs = Pairs = Int64s = Uint64s = np.ndarray
Dim = tuple | np.ndarray

RUN = np.dtype(
    [("offset", "<u8"), ("length", "<u8"), ("stride", "<i8"), ("count", "<u4"), ("segment", "<u4")]
)
PAIR = np.dtype(
    [
        ("local", "<u8"),
        ("remote", "<u8"),
        ("length", "<u8"),
        ("local_stride", "<i8"),
        ("remote_stride", "<i8"),
        ("count", "<u4"),
        ("local_segment", "<u4"),
        ("remote_segment", "<u4"),
        ("reserved", "<u4"),
    ]
)
assert RUN.itemsize == sizeof(run_t) == 32
assert PAIR.itemsize == sizeof(pair_t) == 56

cdef object _RUN = RUN
cdef object _PAIR = PAIR
cdef object _empty = np.empty

cdef enum:
    MAX_DIMS = 66  # numpy's 64, the parts of a stacked region, and one to spare
    SPARE_ROWS = 64

cdef extern from *:
    """
    #define axf_mul_overflows(a, b, to) __builtin_mul_overflow(a, b, to)
    #define axf_add_overflows(a, b, to) __builtin_add_overflow(a, b, to)
    """
    bint axf_mul_overflows(uint64_t a, uint64_t b, uint64_t* to) noexcept nogil
    bint axf_add_overflows(uint64_t a, uint64_t b, uint64_t* to) noexcept nogil


# -- Borrowing arrays -------------------------------------------------------------------------------------------


cdef int _borrow(object array, object dtype, Py_buffer* buffer) except -1:
    # The plain buffer request skips numpy's format string, which costs more than a short list; so compare dtypes.
    cdef object found = getattr(array, "dtype", None)
    if found is not dtype and found != dtype:
        raise TypeError(f"expected a contiguous array of dtype {dtype}, got {found or type(array).__name__}")
    PyObject_GetBuffer(array, buffer, PyBUF_SIMPLE)
    return 0


@cython.final
@cython.freelist(8)
cdef class RunView:
    def __cinit__(self, object array):
        _borrow(array, _RUN, &self.buffer)
        self.at = <run_t*> self.buffer.buf
        self.size = self.buffer.len // <Py_ssize_t> sizeof(run_t)

    def __dealloc__(self):
        PyBuffer_Release(&self.buffer)


@cython.final
@cython.freelist(8)
cdef class PairView:
    def __cinit__(self, object array):
        _borrow(array, _PAIR, &self.buffer)
        self.at = <pair_t*> self.buffer.buf
        self.size = self.buffer.len // <Py_ssize_t> sizeof(pair_t)

    def __dealloc__(self):
        PyBuffer_Release(&self.buffer)


cdef object _cut(object array, Py_ssize_t size):
    # Nothing may look at the array meanwhile: its memory can move. A few spare rows are cheaper kept than given back.
    cdef Py_ssize_t spare = len(array) - size
    if spare <= SPARE_ROWS or spare <= size // 8:
        return array[:size]
    array.resize(size, refcheck=False)
    return array


# -- Single runs ------------------------------------------------------------------------------------------------


cdef inline run_t _row(uint64_t offset, uint64_t length, uint32_t segment) noexcept nogil:
    return run_t(offset=offset, length=length, stride=0, count=1, segment=segment)


cdef inline uint64_t _row_offset(const run_t* run, uint64_t k) noexcept nogil:
    return run.offset + k * <uint64_t> run.stride


cdef inline void _drop_last(run_t* run) noexcept nogil:
    run.count -= 1
    if run.count == 1:
        run.stride = 0


cdef inline void _drop_first(run_t* run) noexcept nogil:
    run.offset = _row_offset(run, 1)
    _drop_last(run)


# -- Building ---------------------------------------------------------------------------------------------------


cdef struct dim_t:
    # One axis of a lattice: affine when `offsets` is NULL, else a table, with its own segments or not.
    uint64_t count
    int64_t stride
    const int64_t* offsets
    const int64_t* segments


cdef run_t* _fill(
    run_t* out, const dim_t* dims, int depth, uint64_t offset, uint32_t segment, uint64_t length
) noexcept nogil:
    cdef uint64_t i, step
    if depth == 0:
        out[0] = _row(offset, length, segment)
        return out + 1
    if depth == 1 and dims.offsets == NULL:
        return _fill_affine(out, dims, offset, segment, length)
    for i in range(dims.count):
        step = <uint64_t> dims.offsets[i] if dims.offsets != NULL else i * <uint64_t> dims.stride
        if dims.segments != NULL:
            segment = <uint32_t> dims.segments[i]
        if depth == 1:
            out[0] = _row(offset + step, length, segment)
            out += 1
        else:
            out = _fill(out, dims + 1, depth - 1, offset + step, segment, length)
    return out


cdef inline run_t* _fill_affine(
    run_t* out, const dim_t* dim, uint64_t offset, uint32_t segment, uint64_t length
) noexcept nogil:
    # One run, but for the lattice with more rows in a line than a run can count.
    cdef uint64_t left = dim.count
    while left > 0:
        out.offset = offset
        out.length = length
        out.count = <uint32_t> min(left, <uint64_t> UINT32_MAX)
        out.stride = dim.stride if out.count > 1 else 0
        out.segment = segment
        offset += <uint64_t> out.count * <uint64_t> dim.stride
        left -= out.count
        out += 1
    return out


def expand(uint64_t length, dims, *, int64_t base=0, uint32_t segment=0):
    cdef dim_t lattice[MAX_DIMS]
    cdef const int64_t[::1] table
    cdef int depth = 0
    cdef uint64_t start = <uint64_t> base
    cdef Py_ssize_t rows
    cdef RunView view
    if len(dims) > MAX_DIMS:
        raise ValueError(f"a lattice has at most {MAX_DIMS} dimensions, got {len(dims)}")
    total = 1
    for dim in dims:
        lattice[depth] = dim_t(count=0, stride=0, offsets=NULL, segments=NULL)
        if isinstance(dim, tuple) and not isinstance(dim[0], np.ndarray):
            lattice[depth].count, lattice[depth].stride = dim
        else:
            offsets, segments = dim if isinstance(dim, tuple) else (dim, None)
            table = offsets
            lattice[depth].count = table.shape[0]
            lattice[depth].offsets = &table[0] if table.shape[0] else NULL
            if segments is not None:
                table = segments
                if <uint64_t> table.shape[0] != lattice[depth].count:
                    raise ValueError(f"{len(offsets)} offsets came with {len(segments)} segments")
                lattice[depth].segments = &table[0] if table.shape[0] else NULL
        total *= lattice[depth].count
        depth += 1
    if total and depth and lattice[depth - 1].offsets == NULL:
        last = lattice[depth - 1].count
        total = total // last * (1 + (last - 1) // UINT32_MAX)
    array = _empty(total, _RUN)
    if total:
        view = RunView(array)
        with nogil:
            _fill(view.at, lattice, depth, start, segment, length)
    return array


def table(const int64_t[::1] indices, *, int64_t size, int64_t stride):
    cdef Py_ssize_t i, n = indices.shape[0], bad = -1
    cdef int64_t index
    cdef int64_t[::1] out
    array = _empty(n, np.int64)
    out = array
    with nogil:
        for i in range(n):
            index = indices[i]
            if index < 0:
                index += size
            if <uint64_t> index >= <uint64_t> size:
                bad = i
                break
            out[i] = <int64_t> (<uint64_t> index * <uint64_t> stride)
    if bad >= 0:
        raise IndexError(indices[bad])
    return array


def from_arrays(const uint64_t[::1] offsets, const uint64_t[::1] lengths, segments=None):
    cdef Py_ssize_t i, n = offsets.shape[0]
    cdef const uint64_t[::1] places
    cdef const uint64_t* place = NULL
    cdef RunView view
    cdef run_t* out
    if lengths.shape[0] != n:
        raise ValueError(f"{n} offsets came with {lengths.shape[0]} lengths")
    if segments is not None:
        places = segments
        if places.shape[0] != n:
            raise ValueError(f"{n} offsets came with {places.shape[0]} segments")
        place = &places[0] if n else NULL
    array = _empty(n, _RUN)
    view = RunView(array)
    out = view.at
    with nogil:
        for i in range(n):
            out[i] = _row(offsets[i], lengths[i], 0 if place == NULL else _segment(place[i]))
    return array


cdef inline uint32_t _segment(uint64_t number) noexcept nogil:
    # A number no segment can have must stay one: cut to 32 bits it could pass for segment 0.
    return <uint32_t> min(number, <uint64_t> UINT32_MAX)


def from_rows(const uint64_t[:, ::1] rows):
    cdef Py_ssize_t i, n = rows.shape[0], width = rows.shape[1]
    cdef RunView view
    cdef run_t* out
    if width != 2 and width != 3:
        raise ValueError(f"a row is (offset, length) or (offset, length, segment), got {width} columns")
    array = _empty(n, _RUN)
    view = RunView(array)
    out = view.at
    with nogil:
        for i in range(n):
            out[i] = _row(rows[i, 0], rows[i, 1], _segment(rows[i, 2]) if width == 3 else 0)
    return array


# -- Reading ----------------------------------------------------------------------------------------------------


cdef uint64_t _count_rows(RunView runs) noexcept nogil:
    cdef uint64_t rows = 0
    cdef Py_ssize_t i
    for i in range(runs.size):
        rows += runs.at[i].count
    return rows


def measure(runs):
    cdef RunView view = RunView(runs)
    cdef uint64_t rows = 0, nbytes = 0, product
    cdef bint overflow = False
    cdef Py_ssize_t i
    with nogil:
        for i in range(view.size):
            rows += view.at[i].count
            overflow |= axf_mul_overflows(view.at[i].length, view.at[i].count, &product)
            overflow |= axf_add_overflows(nbytes, product, &nbytes)
    if overflow:
        raise ValueError(f"the lengths of {rows} rows add up to more than 2**64 bytes")
    return rows, nbytes


cdef inline uint64_t _rows_inside(const run_t* run, uint64_t size) noexcept nogil:
    # How many rows of the run, from its first on, lie inside a segment of `size` bytes. Nothing here can overflow.
    cdef uint64_t last_start
    if run.length > size or run.offset > size - run.length:
        return 0
    if run.stride == 0 or run.count == 1:
        return run.count
    last_start = size - run.length
    if run.stride > 0:
        return min(<uint64_t> run.count, 1 + (last_start - run.offset) // <uint64_t> run.stride)
    return min(<uint64_t> run.count, 1 + run.offset // (0 - <uint64_t> run.stride))


def check(runs, const uint64_t[::1] segment_sizes):
    cdef RunView view = RunView(runs)
    cdef uint64_t row = 0, inside
    cdef uint64_t segments = segment_sizes.shape[0]
    cdef bint bad = False
    cdef Py_ssize_t i
    cdef const run_t* run
    with nogil:
        for i in range(view.size):
            run = view.at + i
            inside = _rows_inside(run, segment_sizes[run.segment]) if run.segment < segments else 0
            if inside < run.count:
                row += inside
                bad = True
                break
            row += run.count
    return row if bad else -1


def to_rows(runs):
    cdef RunView view = RunView(runs)
    cdef uint64_t[:, ::1] out
    cdef Py_ssize_t i, at = 0
    cdef uint32_t k
    cdef const run_t* run
    array = _empty((_count_rows(view), 3), np.uint64)
    out = array
    with nogil:
        for i in range(view.size):
            run = view.at + i
            for k in range(run.count):
                out[at, 0] = _row_offset(run, k)
                out[at, 1] = run.length
                out[at, 2] = run.segment
                at += 1
    return array


def row_ends(runs):
    cdef RunView view = RunView(runs)
    cdef uint64_t[::1] out
    cdef uint64_t end = 0
    cdef Py_ssize_t i, at = 0
    cdef uint32_t k
    array = _empty(_count_rows(view), np.uint64)
    out = array
    with nogil:
        for i in range(view.size):
            for k in range(view.at[i].count):
                end += view.at[i].length
                out[at] = end
                at += 1
    return array


# -- Reshaping --------------------------------------------------------------------------------------------------


def unfold(runs):
    cdef RunView view = RunView(runs), out
    cdef Py_ssize_t i, at = 0
    cdef uint32_t k
    cdef const run_t* run
    array = _empty(_count_rows(view), _RUN)
    out = RunView(array)
    with nogil:
        for i in range(view.size):
            run = view.at + i
            for k in range(run.count):
                out.at[at] = _row(_row_offset(run, k), run.length, run.segment)
                at += 1
    return array


cdef inline bint _follows(const run_t* group, const run_t* run) noexcept nogil:
    # Whether the rows of `run` continue those of `group` at one and the same distance.
    cdef int64_t step
    if run.length != group.length or run.segment != group.segment:
        return False
    if <uint64_t> group.count + run.count > UINT32_MAX:
        return False
    step = <int64_t> (run.offset - _row_offset(group, group.count - 1))
    return (group.count == 1 or step == group.stride) and (run.count == 1 or step == run.stride)


cdef Py_ssize_t _fold(const run_t* runs, Py_ssize_t size, run_t* out) noexcept nogil:
    # Any two equal rows are "regular", so two lone rows are only grouped on trial until a third agrees.
    cdef Py_ssize_t i, n = 0
    cdef bint trial = False
    for i in range(size):
        if runs[i].count == 0:
            continue
        if n and trial and not _follows(out + n - 1, runs + i):
            out[n] = _row(_row_offset(out + n - 1, 1), out[n - 1].length, out[n - 1].segment)
            _drop_last(out + n - 1)
            n += 1
            trial = False
        if n and _follows(out + n - 1, runs + i):
            trial = out[n - 1].count == 1 and runs[i].count == 1
            out[n - 1].stride = <int64_t> (runs[i].offset - _row_offset(out + n - 1, out[n - 1].count - 1))
            out[n - 1].count += runs[i].count
        else:
            out[n] = runs[i]
            n += 1
            trial = False
    if trial:
        out[n] = _row(_row_offset(out + n - 1, 1), out[n - 1].length, out[n - 1].segment)
        _drop_last(out + n - 1)
        n += 1
    return n


def fold(runs):
    cdef RunView view = RunView(runs), out
    cdef Py_ssize_t n
    array = _empty(view.size, _RUN)
    out = RunView(array)
    with nogil:
        n = _fold(view.at, view.size, out.at)
    out = None
    return _cut(array, n)


cdef Py_ssize_t _merge(const run_t* runs, Py_ssize_t size, run_t* out, Py_ssize_t room) noexcept nogil:
    # The last run stays open: where the next begins at its end, the two rows that touch become one.
    # A run writes two at most, and the last one is written at the end; -1 when there may not be the room for that.
    cdef Py_ssize_t i, n = 0
    cdef run_t run, last = _row(0, 0, 0)
    for i in range(size):
        run = runs[i]
        if run.count == 0 or run.length == 0:
            continue
        if n + 3 > room:
            return -1
        if run.count > 1 and run.stride == <int64_t> run.length:
            run = _row(run.offset, run.length * run.count, run.segment)
        if (
            last.length
            and last.segment == run.segment
            and _row_offset(&last, last.count - 1) + last.length == run.offset
        ):
            if last.count > 1:
                out[n] = last
                _drop_last(out + n)
                n += 1
                last = _row(_row_offset(&last, last.count - 1), last.length, last.segment)
            last.length += run.length
            if run.count == 1:
                continue
            _drop_first(&run)
        if last.length:
            out[n] = last
            n += 1
        last = run
    if last.length:
        out[n] = last
        n += 1
    return n


def merge(runs):
    cdef RunView view = RunView(runs), out
    cdef Py_ssize_t n = -1, room = view.size + 2
    while n < 0:
        array = _empty(room, _RUN)
        out = RunView(array)
        with nogil:
            n = _merge(view.at, view.size, out.at, room)
        out = None
        room = 2 * room
    return _cut(array, n)


cdef bint _sorted(const run_t* runs, Py_ssize_t size) noexcept nogil:
    cdef Py_ssize_t i
    cdef const run_t* last = NULL
    for i in range(size):
        if runs[i].count == 0:
            continue
        if runs[i].stride < 0 and runs[i].count > 1:
            return False
        if last != NULL and (
            runs[i].segment < last.segment
            or (runs[i].segment == last.segment and runs[i].offset < _row_offset(last, last.count - 1))
        ):
            return False
        last = runs + i
    return True


def sort(runs):
    cdef RunView view = RunView(runs)
    cdef bint done
    with nogil:
        done = _sorted(view.at, view.size)
    if done:
        return runs.copy()
    rows = unfold(runs)
    if len(rows) and (rows["segment"] == rows["segment"][0]).all():
        return rows[np.argsort(rows["offset"], kind="stable")]
    return rows[np.lexsort((rows["offset"], rows["segment"]))]


cdef Py_ssize_t _pieces(const run_t* run, uint64_t size) noexcept nogil:
    # How many runs a run becomes when no row may be longer than `size`.
    cdef uint64_t whole
    if run.length <= size:
        return 1
    whole = run.length // size
    return run.count * (1 + (whole - 1) // UINT32_MAX + (run.length % size != 0))


cdef run_t* _split(const run_t* run, uint64_t size, run_t* out) noexcept nogil:
    cdef uint32_t k
    cdef uint64_t rest = run.length % size
    cdef dim_t pieces = dim_t(count=run.length // size, stride=<int64_t> size, offsets=NULL, segments=NULL)
    if run.length <= size:
        out[0] = run[0]
        return out + 1
    for k in range(run.count):
        out = _fill_affine(out, &pieces, _row_offset(run, k), run.segment, size)
        if rest:
            out[0] = _row(_row_offset(run, k) + run.length - rest, rest, run.segment)
            out += 1
    return out


def split(runs, uint64_t size):
    cdef RunView view = RunView(runs), out
    cdef Py_ssize_t i, n = 0
    cdef run_t* at
    if size == 0:
        raise ValueError("rows cannot be split into pieces of 0 bytes; give a size of at least 1")
    with nogil:
        for i in range(view.size):
            n += _pieces(view.at + i, size)
    array = _empty(n, _RUN)
    out = RunView(array)
    at = out.at
    with nogil:
        for i in range(view.size):
            at = _split(view.at + i, size, at)
    return array


cdef Py_ssize_t _run_of(const uint64_t[::1] starts, uint64_t row) noexcept nogil:
    # The last run that starts at or before the row; runs without rows start where the next one does.
    cdef Py_ssize_t low = 0, high = starts.shape[0], middle
    while high - low > 1:
        middle = (low + high) // 2
        if starts[middle] <= row:
            low = middle
        else:
            high = middle
    return low


def select(runs, const int64_t[::1] indices):
    cdef RunView view = RunView(runs), out
    cdef Py_ssize_t i, at, bad = -1, n = indices.shape[0]
    cdef uint64_t rows = 0, row
    cdef uint64_t[::1] starts
    cdef bint lone = True
    for i in range(view.size):
        rows += view.at[i].count
        lone &= view.at[i].count == 1
    array = _empty(n, _RUN)
    out = RunView(array)
    starts = _empty(0 if lone else view.size, np.uint64)
    with nogil:
        row = 0
        for i in range(starts.shape[0]):
            starts[i] = row
            row += view.at[i].count
        for i in range(n):
            row = <uint64_t> indices[i]
            if indices[i] < 0:
                row += rows
            if row >= rows:
                bad = i
                break
            at = <Py_ssize_t> row if lone else _run_of(starts, row)
            out.at[i] = _row(
                _row_offset(view.at + at, 0 if lone else row - starts[at]),
                view.at[at].length,
                view.at[at].segment,
            )
    if bad >= 0:
        raise IndexError(f"row {indices[bad]} does not exist: the list has {rows} rows")
    return array


# -- Matching ---------------------------------------------------------------------------------------------------


cdef struct side_t:
    # How far one list has been read: `left` bytes of the current row, which begins `rows` rows before its run ends.
    const run_t* run
    const run_t* end
    uint64_t offset
    uint64_t left
    uint32_t rows


cdef inline void _open(side_t* side) noexcept nogil:
    # Goes to the run at `side.run`, or to the first after it that has any bytes.
    while side.run != side.end and (side.run.count == 0 or side.run.length == 0):
        side.run += 1
    if side.run != side.end:
        side.offset = side.run.offset
        side.left = side.run.length
        side.rows = side.run.count


cdef inline void _begin(side_t* side, RunView runs) noexcept:
    side.run = runs.at
    side.end = runs.at + runs.size
    _open(side)


cdef inline void _take(side_t* side, uint64_t length, uint32_t count, bint whole) noexcept nogil:
    # Moves on by `count` whole rows, or by `count` pieces of `length` bytes inside one row.
    if not whole:
        side.offset += length * count
        side.left -= length * count
        if side.left:
            return
        count = 1
    side.rows -= count
    if side.rows:
        side.offset = _row_offset(side.run, side.run.count - side.rows)
        side.left = side.run.length
    else:
        side.run += 1
        _open(side)


cdef inline pair_t _step(side_t* local, side_t* remote) noexcept nogil:
    # The next pair: whole rows of the side with the shorter row, against whole rows or pieces of a row of the other.
    # A partly read row cannot repeat. A contiguous row is as good as a strided run of any length that divides it.
    cdef pair_t pair
    cdef uint64_t length = min(local.left, remote.left)
    cdef bint local_whole = local.left == length, remote_whole = remote.left == length
    cdef uint64_t count = UINT32_MAX
    if local_whole:
        count = min(count, <uint64_t> local.rows if length == local.run.length else 1)
    else:
        count = min(count, local.left // length)
    if remote_whole:
        count = min(count, <uint64_t> remote.rows if length == remote.run.length else 1)
    else:
        count = min(count, remote.left // length)
    pair.local = local.offset
    pair.remote = remote.offset
    pair.length = length
    pair.local_stride = 0
    pair.remote_stride = 0
    pair.count = <uint32_t> count
    pair.local_segment = local.run.segment
    pair.remote_segment = remote.run.segment
    pair.reserved = 0
    if count > 1:
        pair.local_stride = local.run.stride if local_whole else <int64_t> length
        pair.remote_stride = remote.run.stride if remote_whole else <int64_t> length
    _take(local, length, pair.count, local_whole)
    _take(remote, length, pair.count, remote_whole)
    return pair


cdef inline void _keep_rows(pair_t* pair, uint32_t first, uint32_t count) noexcept nogil:
    pair.local += first * <uint64_t> pair.local_stride
    pair.remote += first * <uint64_t> pair.remote_stride
    pair.count = count
    if count == 1:
        pair.local_stride = 0
        pair.remote_stride = 0


cdef inline bint _touch(const pair_t* last, const pair_t* next) noexcept nogil:
    cdef uint64_t steps = last.count - 1
    return (
        last.local + steps * <uint64_t> last.local_stride + last.length == next.local
        and last.remote + steps * <uint64_t> last.remote_stride + last.length == next.remote
        and last.local_segment == next.local_segment
        and last.remote_segment == next.remote_segment
    )


cdef inline Py_ssize_t _append(pair_t* out, Py_ssize_t n, pair_t* last, pair_t* pair) noexcept nogil:
    # As in _merge: the last pair stays open, and rows that touch on both sides become one. Writes two pairs at most.
    if pair.count > 1 and pair.local_stride == pair.remote_stride == <int64_t> pair.length:
        pair.length *= pair.count
        _keep_rows(pair, 0, 1)
    if last.length and _touch(last, pair):
        if last.count > 1:
            out[n] = last[0]
            _keep_rows(out + n, 0, last.count - 1)
            n += 1
            _keep_rows(last, last.count - 1, 1)
        last.length += pair.length
        if pair.count == 1:
            return n
        _keep_rows(pair, 1, pair.count - 1)
    if last.length:
        out[n] = last[0]
        n += 1
    last[0] = pair[0]
    return n


cdef struct match_t:
    # Both lists, how far each has been read, and the pair that is still open.
    side_t local
    side_t remote
    pair_t last


cdef Py_ssize_t _pair(match_t* match, pair_t* out, Py_ssize_t room, bint merge) noexcept nogil:
    # Until a list ends or fewer than three places are left: two for this pair, one for the last. The copies let the compiler keep them in registers.
    cdef side_t local = match.local, remote = match.remote
    cdef pair_t pair, last = match.last
    cdef Py_ssize_t n = 0
    while local.run != local.end and remote.run != remote.end and n + 3 <= room:
        pair = _step(&local, &remote)
        if merge:
            n = _append(out, n, &last, &pair)
        else:
            out[n] = pair
            n += 1
    match.local = local
    match.remote = remote
    match.last = last
    return n


def pair(local, remote, bint merge=True):
    cdef RunView near = RunView(local), far = RunView(remote)
    cdef match_t match
    cdef Py_ssize_t n = 0, room = max(near.size, far.size) + 3
    cdef PairView out
    array = _empty(room, _PAIR)
    memset(&match, 0, sizeof(match))
    _begin(&match.local, near)
    _begin(&match.remote, far)
    while True:
        out = PairView(array)
        with nogil:
            n += _pair(&match, out.at + n, room - n, merge)
        if match.local.run == match.local.end or match.remote.run == match.remote.end:
            break
        # Lists that are cut in different places make more pairs than either has runs.
        out = None
        room = 2 * room + SPARE_ROWS
        array.resize(room, refcheck=False)
    if match.local.run != match.local.end or match.remote.run != match.remote.end:
        raise ValueError(
            f"the local list holds {measure(local)[1]} bytes and the remote list {measure(remote)[1]}; "
            "a transfer needs the same total on both sides"
        )
    if match.last.length:
        out.at[n] = match.last
        n += 1
    out = None
    return _cut(array, n)
