# cython: language_level=3, embedsignature=True, freethreading_compatible=True
"""Shared mappings of files in memory, with exact lifetimes.

Owns mmap, munmap and madvise: a `Mapping` is unmapped when the last buffer over it is gone, never before,
and `live` counts those that exist, so that a leak can be asserted against. It does not know who made the
file, who else maps it, or what the bytes mean. The standard library's mmap object would serve, but keeps a
duplicate of the descriptor open for every mapping and hides its address.
"""

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from libc.errno cimport EINTR, EINVAL, errno
from libc.stdint cimport int64_t
from posix.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, PROT_NONE, PROT_READ, PROT_WRITE,
    madvise, mmap, munmap,
)
from posix.types cimport off_t
from posix.unistd cimport _SC_PAGESIZE, sysconf

import os

__all__ = ["HUGETLBFS", "TMPFS", "Mapping", "filesystem", "live"]

cdef extern from *:
    """
    #include <sys/mman.h>
    #include <sys/vfs.h>
    #ifndef MADV_POPULATE_READ     /* linux/mman.h of 5.14; older C libraries lack the names */
    #define MADV_POPULATE_READ 22
    #define MADV_POPULATE_WRITE 23
    #endif
    #ifndef MADV_COLLAPSE          /* of 6.1 */
    #define MADV_COLLAPSE 25
    #endif
    """
    const int MADV_COLLAPSE
    const int MADV_POPULATE_READ
    const int MADV_POPULATE_WRITE
    struct statfs:
        long f_type
        long f_bsize
    int fstatfs(int fd, statfs *buf) nogil

cdef extern from *:
    """
    static long asyncxfer_live_mappings = 0;
    #define asyncxfer_live_add(n) __atomic_add_fetch(&asyncxfer_live_mappings, (n), __ATOMIC_RELAXED)
    static inline void asyncxfer_touch(const void *page) { (void)*(const volatile char *)page; }
    """
    long asyncxfer_live_add(long n) noexcept nogil
    void asyncxfer_touch(const void *page) noexcept nogil

TMPFS = 0x01021994       # linux/magic.h; memfd and /dev/shm are tmpfs too
HUGETLBFS = 0x958458F6

cdef unsigned char nothing = 0

cdef enum:
    HUGE = 1 << 21              # a huge page, where pages have 4 KiB


def live():
    """Return how many mappings exist in this process."""
    return asyncxfer_live_add(0)


cdef statfs about(int fd) except *:
    cdef statfs info
    if fstatfs(fd, &info) != 0:
        raise OSError(errno, os.strerror(errno), f"descriptor {fd}")
    return info


def filesystem(int fd):
    """Return the kernel's magic number of the file system that a descriptor's file lies on."""
    return about(fd).f_type & 0xFFFFFFFF


cdef void *map_aligned(size_t span, int protection, int fd, off_t start) noexcept nogil:
    """Maps it where huge pages can begin; what there was too much of the address space is given back."""
    cdef char *room = <char *>mmap(NULL, span + HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    cdef size_t head
    cdef void *base
    if room == <char *>MAP_FAILED:
        return MAP_FAILED
    head = -<size_t>room & (HUGE - 1)
    base = mmap(room + head, span, protection, MAP_SHARED | MAP_FIXED, fd, start)
    if base == MAP_FAILED:
        munmap(room, span + HUGE)
        return base
    if head:
        munmap(room, head)
    munmap(room + head + span, HUGE - head)
    return base


@cython.final
cdef class Mapping:
    """A range of a file, mapped shared; supports the buffer protocol.

    Parameters
    ----------
    fd : int
        Descriptor of the file. It is not kept: it may be closed as soon as the mapping exists.
    offset : int, bytes
        Where the range starts in the file; any value, aligned or not.
    nbytes : int, bytes
    writable : bool

    Raises
    ------
    ValueError
        The range does not lie inside the file.
    OSError
        The kernel refused.
    """

    def __init__(self, int fd, int64_t offset, int64_t nbytes, bint writable=True):
        cdef int64_t granule, end
        cdef off_t start
        cdef size_t span
        cdef int protection = PROT_READ | PROT_WRITE if writable else PROT_READ
        cdef void *base
        if self.data != NULL:
            raise TypeError("a Mapping cannot be made again")
        end = os.fstat(fd).st_size
        if offset < 0 or nbytes < 0 or nbytes > end or offset > end - nbytes:
            raise ValueError(f"{nbytes} bytes at {offset} are not inside the file, which has {end} bytes")
        self.data = &nothing
        self.readonly = not writable
        if nbytes == 0:
            return
        granule = sysconf(_SC_PAGESIZE)
        info = about(fd)
        if info.f_type & 0xFFFFFFFF == HUGETLBFS:
            granule = info.f_bsize
        start = offset - offset % granule
        # munmap of huge pages wants whole pages
        span = <size_t>((offset - start + nbytes + granule - 1) // granule * granule)
        with nogil:
            if span >= HUGE and start % HUGE == 0 and granule < HUGE:
                base = map_aligned(span, protection, fd, start)
            else:
                base = mmap(NULL, span, protection, MAP_SHARED, fd, start)
        if base == MAP_FAILED:
            raise OSError(errno, os.strerror(errno), f"mapping {nbytes} bytes of descriptor {fd}")
        self.base = base
        self.span = span
        self.data = <unsigned char *>base + (offset - start)
        self.nbytes = <size_t>nbytes
        asyncxfer_live_add(1)

    def __dealloc__(self):
        if self.base != NULL:
            with nogil:  # giving back gigabytes takes the kernel a while
                munmap(self.base, self.span)
                asyncxfer_live_add(-1)

    @property
    def address(self):
        """Where the first byte lies in this process; 0 when there are no bytes."""
        return <size_t>self.data if self.base != NULL else 0

    @property
    def buffer(self):
        """A memoryview of the bytes; it keeps the mapping, as does any array made of it."""
        return memoryview(self)

    def __len__(self):
        return self.nbytes

    def __repr__(self):
        mode = "read-only" if self.readonly else "writable"
        return f"<Mapping of {self.nbytes} bytes at {self.address:#x}, {mode}>"

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.data, <Py_ssize_t>self.nbytes, self.readonly, flags)

    def gather(self):
        """Take the memory of a new file now, in huge pages as far as the kernel can put them together.

        It takes a fifth of the time that touching it would take in small pages, with the GIL released.

        Returns
        -------
        bool
            Whether all of it that is whole huge pages lies in such. False also before Linux 6.1.
        """
        cdef size_t whole = self.span & ~<size_t>(HUGE - 1), at = 0
        cdef int error = EINTR
        if whole == 0 or <size_t>self.base & (HUGE - 1) or self.readonly:
            return False
        with nogil:
            while at < whole:           # of what is nothing but a hole the kernel makes no huge page
                asyncxfer_touch(<char *>self.base + at)
                at += HUGE
            while error == EINTR:
                error = 0 if madvise(self.base, whole, MADV_COLLAPSE) == 0 else errno
        return error == 0

    def populate(self):
        """Make every page present, with the GIL released.

        Returns
        -------
        bool
            False when the kernel (before 5.14) cannot, and nothing has happened.

        Raises
        ------
        OSError
            Memory ran out, or the file no longer has all of these bytes.
        """
        cdef int advice = MADV_POPULATE_READ if self.readonly else MADV_POPULATE_WRITE
        cdef int error = EINTR
        if self.base == NULL:
            return True
        with nogil:
            while error == EINTR:
                error = 0 if madvise(self.base, self.span, advice) == 0 else errno
        if error == EINVAL:
            return False
        if error:
            raise OSError(error, os.strerror(error), f"populating {self.nbytes} bytes")
        return True
