"""TLS for native threads. What is read and written here is what the socket's peer sees in the clear.

All functions take `Connection.ssl` and return at once. One thread at a time may be in any of them for one connection:
a thread that reads while another writes corrupts it, so whoever shares a connection puts a lock around it.

`tls_read` gives the bytes read, 0 at the end that the peer announced, or -1 with errno: EAGAIN when the socket has no
more, ECONNRESET and the like when it broke (an end without announcement is ECONNRESET), EIO when the protocol failed.
It fills `to` as far as what has arrived reaches, and reads ahead: wait for the socket only after EAGAIN, also right
after the handshake, or while `tls_pending` is 0.

`tls_write` gives the bytes that the kernel has taken, or -1 with errno as above. After fewer than `n`, or EAGAIN, wait
for room in the socket and call again with the bytes that follow those taken, no fewer than were left: some of them may
be encrypted already (EINVAL says that there were fewer).

`tls_reason` says why it failed, in a text that lives as long as the connection.
"""

from libc.stdint cimport uint64_t


cdef class Context:
    cdef void* context


cdef class Connection:
    cdef void* ssl          # NULL once closed


cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void* iov_base
        size_t iov_len


cdef class Rows:
    cdef Py_buffer[256] held
    cdef iovec[256] at
    cdef int count
    cdef int hold(self, list objects, bint writable) except -1
    cdef void release(self) noexcept


cdef class Records:
    cdef void* tls          # NULL before it is begun, and once closed
    cdef object found       # whose SSL it is
    cdef int fd
    cdef Rows rows
    cdef uint64_t rekey


cdef ssize_t tls_read(void* ssl, void* to, size_t n) noexcept nogil
cdef ssize_t tls_write(void* ssl, const void* data, size_t n) noexcept nogil
cdef int tls_pending(void* ssl) noexcept nogil
cdef const char* tls_reason(void* ssl) noexcept nogil
