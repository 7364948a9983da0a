"""Transfers between memory and a file, made ready: what to read or write where, in as few calls as possible."""

from libc.stdint cimport uint32_t, uint64_t

from asyncxfer._fast.completion cimport Prepared
from asyncxfer._fast.engine cimport axf_pair, iovec


cdef extern from "fileio.h" nogil:
    int axf_down(int* p, int by)
    int axf_file_in_memory(int fd)
    int axf_file_emulated(int fd)
    uint64_t axf_file_size(int fd)
    uint32_t axf_iov_rest(const iovec* iov, uint32_t n, uint64_t got, iovec* out)
    long long axf_file_move(int fd, const iovec* iov, uint32_t n, uint64_t offset, int write, int nowait)
    int axf_file_cached(int fd, uint64_t offset, uint64_t nbytes)
    int axf_file_sync(int fd, int whole)


cdef enum:
    MOST_IOVECS = 1024          # the kernel's IOV_MAX


cdef enum durability_t:
    SYNC_NONE = 0
    SYNC_DATA = 1
    SYNC_FULL = 2


cdef enum trouble_t:            # what an op's `detail` says of a failure with a file
    READING = 1
    WRITING = 2
    SYNCING = 3
    SHORT = 4


cdef struct gate_t:
    int writing                 # a thread writes through the page cache
    void* parked[3]             # flights that wait for it to be done, by rank
    void* parked_last[3]


cdef struct file_t:
    int fd                      # through the page cache
    int direct                  # past it; -1 without
    int in_memory               # no device is behind it
    int can_refuse              # it knows RWF_NOWAIT, as far as has been seen
    int sync                    # a durability_t
    const char* view            # its bytes as memory, for what the page cache has; NULL without
    uint64_t view_bytes
    int can_be_seen             # what the page cache has of it may be told, as far as has been seen
    int emulated                # a hypervisor plays its device, and takes each piece of memory by itself
    uint64_t grain              # of offsets and lengths that go past the page cache, a power of 2
    uint64_t memory_grain       # of addresses, likewise
    gate_t gates[2]             # of those who write to it, and have locks of their own


cdef struct request_t:          # one call
    uint64_t offset
    uint32_t iov, n             # its memory: the first piece, and how many
    uint32_t nbytes
    int direct


cdef struct filework_t:
    file_t* file
    request_t* requests         # first those through the page cache, then those past it
    iovec* iov
    uint32_t* order             # which number each piece has in the stream; NULL: its own
    uint32_t niov, nrequests, ncached
    uint64_t nbytes, rows
    uint64_t end                # of what it needs of the file
    int write
    int ring                    # the ring waits for the device, where there is one


cdef class OpenFile:
    cdef file_t f
    cdef readonly object owner

    cdef void open_view(self) noexcept
    cpdef void close_view(self) noexcept


cdef class FileWork(Prepared):
    cdef filework_t w
    cdef OpenFile file
    cdef object keep

    cdef int cut(self, void* given, uint64_t most_bytes, uint32_t most_rows) except -1
    cdef int number(self, const void* given) except -1
    cdef int part(self) except -1
