# cython: language_level=3, boundscheck=False, wraparound=False, auto_pickle=False, autotestdict=False
"""TLS over a non-blocking socket, for native threads: both sides show a certificate and verify the other's.

Python's `ssl` needs the GIL for every piece, so the same library is used without it: the libssl that the process has
loaded already, or the system's. It knows neither agents nor what is sent; whether a certificate speaks for an agent is
asked elsewhere, with `peer_certificate`.

`Records` is for a connection whose two sides Python's `ssl` has brought together, with everything that a context of its
says: what is read and written afterwards goes by here.
"""

import re

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EAGAIN, errno
from libc.stdint cimport uint64_t
from libc.string cimport strerror

from asyncxfer._errors import BackendError, ClosedError

cdef extern from "<dlfcn.h>" nogil:
    void* dlopen(const char* name, int flags)
    void* dlsym(void* library, const char* name)
    int dlclose(void* library)
    const char* dlerror()
    void* RTLD_DEFAULT
    enum: RTLD_NOW, RTLD_NOLOAD, RTLD_LOCAL

cdef extern from "tls.h" nogil:
    enum: AXF_TLS_DONE, AXF_TLS_WANT_READ, AXF_TLS_WANT_WRITE, AXF_TLS_FAILED
    ctypedef struct axf_tls:
        void* ssl
        uint64_t updates
        int failed
        int ended
        size_t at
        size_t end
        char* reason
    struct functions:
        void (*SSL_CTX_free)(void* context) noexcept
        const void* (*SSL_get_current_cipher)(const void* ssl) noexcept
        const char* (*SSL_CIPHER_get_name)(const void* cipher) noexcept
        void* (*BIO_new_mem_buf)(const void* data, int n) noexcept
        int (*BIO_free)(void* bio) noexcept
        void (*X509_free)(void* certificate) noexcept
        int (*i2d_X509)(const void* certificate, unsigned char** to) noexcept
        unsigned long (*ERR_get_error)() noexcept
        void (*ERR_clear_error)() noexcept
        const char* (*ERR_reason_error_string)(unsigned long code) noexcept
        const char* (*OpenSSL_version)(int what) noexcept
        void* (*peer_certificate)(const void* ssl) noexcept
        void* (*SSL_new)(void* context) noexcept
        void* (*SSL_get_ex_data)(const void* ssl, int index) noexcept
    functions axf_ssl
    const char* axf_tls_load(void* library)
    void* axf_tls_context()
    int axf_tls_use_chain(void* context, void* bio)
    int axf_tls_use_key(void* context, void* bio)
    int axf_tls_trust(void* context, void* bio)
    axf_tls* axf_tls_new(void* context, int fd, int server, uint64_t rekey)
    void axf_tls_free(axf_tls* tls)
    int axf_tls_handshake(axf_tls* tls)
    ssize_t axf_tls_read(axf_tls* tls, char* to, size_t n)
    ssize_t axf_tls_write(axf_tls* tls, const char* data, size_t n)
    int axf_tls_pending(axf_tls* tls)
    int axf_tls_end(axf_tls* tls)
    void axf_tls_prepare(void* ssl)
    axf_tls* axf_tls_take(void* ssl, int fd, uint64_t rekey)
    void axf_tls_return(axf_tls* tls)
    ssize_t axf_tls_scatter(axf_tls* tls, const iovec* rows, int count)
    ssize_t axf_tls_gather(axf_tls* tls, const iovec* rows, int count)

DONE = AXF_TLS_DONE
WANT_READ = AXF_TLS_WANT_READ
WANT_WRITE = AXF_TLS_WANT_WRITE

# AES-GCM wants a new key before 2^24.5 full records, 388 GB (RFC 8446, 5.5); OpenSSL leaves that to its users.
_REKEY = 1 << 36

cdef long _live = 0
cdef bint _loaded = False


cdef void* find_library() except NULL:
    """The libssl of Python's own ssl module if that is a shared library, else any that is loaded, else the system's."""
    cdef void* library
    try:
        import ssl  # noqa: F401  (loads it)
    except ImportError:
        pass
    for name in (b"libssl.so.3", b"libssl.so.1.1"):
        library = dlopen(name, RTLD_NOW | RTLD_NOLOAD)
        if library != NULL:
            return library
    with open("/proc/self/maps", "rb") as maps:
        # As libssl-1f2e3d4c.so.3 where a wheel brings its own; libssl3.so is another library, of NSS.
        paths = dict.fromkeys(re.findall(rb"(/[^\n]*/libssl(?:-\w+)?\.so[^/\n]*)$", maps.read(), re.MULTILINE))
    for path in paths:
        library = dlopen(path, RTLD_NOW | RTLD_NOLOAD)
        if library != NULL:
            return library
    library = dlopen(b"libssl.so.3", RTLD_NOW | RTLD_LOCAL)
    if library == NULL:
        raise BackendError(
            f"TLS needs OpenSSL's libssl.so.3 or libssl.so.1.1, and none is loaded or found: {dlerror().decode()}; "
            "install it (Debian: libssl3, Fedora: openssl-libs)"
        )
    return library


def available() -> str:
    """Load OpenSSL, if that is still to be done, and give its version.

    Raises
    ------
    BackendError
        There is none, or it lacks what is needed.
    """
    global _loaded
    cdef const char* missing
    if not _loaded:
        missing = axf_tls_load(find_library())
        if missing != NULL:
            raise BackendError(f"the libssl that was found has no {missing.decode()}; expected OpenSSL 1.1.1 or newer")
        _loaded = True
    return axf_ssl.OpenSSL_version(0).decode()


def live() -> int:
    """Contexts and connections that exist now (for leak checks)."""
    return _live


cdef str last_error():
    cdef unsigned long code = axf_ssl.ERR_get_error()
    cdef const char* text = axf_ssl.ERR_reason_error_string(code) if code else NULL
    axf_ssl.ERR_clear_error()
    return text.decode(errors="replace") if text != NULL else "unknown reason"


cdef int use_pem(void* context, str what, bytes pem, int (*use)(void*, void*) noexcept nogil) except -1:
    cdef void* bio = axf_ssl.BIO_new_mem_buf(<const char*>pem, len(pem))
    cdef int ok = bio != NULL and use(context, bio)
    if bio != NULL:
        axf_ssl.BIO_free(bio)
    if not ok:
        raise BackendError(f"OpenSSL does not take the {what}: {last_error()}")
    axf_ssl.ERR_clear_error()       # the end of the text counts as one
    return 0


cdef class Context:
    """What connections are made with: TLS 1.3 only, a certificate, and the authorities that a peer's has to lead to.

    Parameters
    ----------
    certificate, key, authorities : bytes, PEM
        The certificate with its chain; its key, not encrypted; the certificates that are trusted.

    Raises
    ------
    BackendError
        OpenSSL is not there, or does not take one of the three.
    """

    def __cinit__(self, bytes certificate not None, bytes key not None, bytes authorities not None):
        global _live
        available()
        axf_ssl.ERR_clear_error()
        self.context = axf_tls_context()
        if self.context == NULL:
            raise BackendError(f"OpenSSL makes no context for TLS 1.3: {last_error()}")
        _live += 1
        use_pem(self.context, "certificate", certificate, axf_tls_use_chain)
        use_pem(self.context, "key", key, axf_tls_use_key)
        use_pem(self.context, "authorities", authorities, axf_tls_trust)

    def __dealloc__(self):
        global _live
        if self.context != NULL:
            axf_ssl.SSL_CTX_free(self.context)
            _live -= 1


cdef axf_tls* opened(Connection connection) except NULL:
    if connection.ssl == NULL:
        raise ClosedError("this TLS connection was closed")
    return <axf_tls*>connection.ssl


cdef class Connection:
    """One connection over a socket that stays the caller's, and open until after `close`.

    One thread at a time: to read in one while another writes is not safe.

    Parameters
    ----------
    context : Context
    fd : int
        A connected socket; it is never waited for.
    server : bool
        Whether this side accepted the connection.
    rekey : int, bytes
        After how many the key for sending is replaced.
    """

    def __cinit__(self, Context context not None, int fd, *, bint server, uint64_t rekey=_REKEY):
        global _live
        self.ssl = axf_tls_new(context.context, fd, server, rekey)
        if self.ssl == NULL:
            raise MemoryError
        _live += 1

    def __dealloc__(self):
        self.close()

    def handshake(self) -> int:
        """Go on with the handshake as far as the socket lets it.

        Returns
        -------
        int
            DONE, or what to wait for before the next call: WANT_READ, WANT_WRITE. After DONE something may have been
            read ahead, so read before waiting. A client's DONE does not say that the server likes its certificate: the
            first read does.

        Raises
        ------
        BackendError
            It failed; the message is OpenSSL's reason.
        """
        cdef axf_tls* tls = opened(self)
        cdef int state
        with nogil:
            state = axf_tls_handshake(tls)
        if state == AXF_TLS_FAILED:
            raise BackendError(f"the TLS handshake failed: {tls.reason.decode(errors='replace')}")
        return state

    def peer_certificate(self) -> bytes:
        """Give the certificate that the peer has shown, in DER; there is one after the handshake."""
        cdef void* certificate = axf_ssl.peer_certificate(opened(self).ssl)
        cdef unsigned char* to
        if certificate == NULL:
            raise BackendError("the peer has shown no certificate yet")
        der = bytearray(max(0, axf_ssl.i2d_X509(certificate, NULL)))
        to = der
        axf_ssl.i2d_X509(certificate, &to)
        axf_ssl.X509_free(certificate)
        return bytes(der)

    def cipher(self) -> str:
        """Name the cipher suite that was agreed on; empty before the handshake."""
        cdef const void* cipher = axf_ssl.SSL_get_current_cipher(opened(self).ssl)
        return axf_ssl.SSL_CIPHER_get_name(cipher).decode() if cipher != NULL else ""

    @property
    def updates(self) -> int:
        """How often the key for sending was replaced."""
        return opened(self).updates

    @property
    def pending(self) -> bool:
        """Whether something has been read ahead: then read before waiting for the socket."""
        return tls_pending(opened(self)) != 0

    def read(self, size_t nbytes) -> bytes:
        """Read what has arrived, `nbytes` at most; empty at the end that the peer announced.

        Raises
        ------
        BlockingIOError
            Nothing has arrived.
        BackendError
            The connection broke or the protocol failed.
        """
        cdef axf_tls* tls = opened(self)
        cdef bytearray to = bytearray(nbytes)
        cdef char* at = to
        cdef ssize_t got
        with nogil:
            got = axf_tls_read(tls, at, nbytes)
        if got < 0:
            raise_errno(tls)
        return bytes(to[:got])

    def write(self, const unsigned char[::1] data) -> int:
        """Write some of `data`; returns how many bytes the kernel has taken.

        The next call has to begin with the bytes that were not taken, and bring no fewer.

        Raises
        ------
        BlockingIOError
            The socket is full.
        BackendError
            The connection broke or the protocol failed.
        """
        cdef axf_tls* tls = opened(self)
        cdef size_t n = data.shape[0]
        cdef const char* at = <const char*>&data[0] if n else NULL
        cdef ssize_t took
        with nogil:
            took = axf_tls_write(tls, at, n)
        if took < 0:
            raise_errno(tls)
        return took

    def end(self) -> bool:
        """Announce that nothing more is sent; False when the socket has no room for that or is broken."""
        return axf_tls_end(opened(self)) == 1

    def close(self) -> None:
        """Free it, without a word to the peer; the socket stays open. A second call does nothing."""
        global _live
        if self.ssl != NULL:
            axf_tls_free(<axf_tls*>self.ssl)
            self.ssl = NULL
            _live -= 1


# ---- connections of Python's ssl ------------------------------------------------------------------------------------

_KERNEL = 1 << 3        # SSL_OP_ENABLE_KTLS: the kernel has the keys, and a BIO of ours would be in its way
_ROWS = 256


cdef bint is_of_python() except -1:
    """Whether what is called here is the very library that Python's `ssl` calls."""
    import _ssl
    path = getattr(_ssl, "__file__", None)      # none: it is a part of the program, with a library of its own
    if path is None:
        return False
    cdef void* module = dlopen(path.encode(), RTLD_NOW | RTLD_NOLOAD)
    if module == NULL:
        return False
    cdef void* linked = dlsym(module, b"SSL_new")
    dlclose(module)
    cdef void* first = dlsym(RTLD_DEFAULT, b"SSL_new")      # which would be taken instead, if there is one
    return linked == <void*>axf_ssl.SSL_new and (first == NULL or first == linked)


cdef void* ssl_of(object found) except? NULL:
    """The SSL of an `_ssl._SSLSocket`: its head, a reference to the socket, the SSL, the context. NULL: it is not so."""
    import _ssl
    if type(found) is not _ssl._SSLSocket or type(found).__basicsize__ < object.__basicsize__ + 3 * sizeof(void*):
        return NULL
    cdef size_t head = object.__basicsize__ // sizeof(void*)
    cdef void** words = <void**><void*>found
    if words[head + 2] != <void*>found.context:
        return NULL
    cdef void* ssl = words[head + 1]
    if ssl == NULL or axf_ssl.SSL_get_ex_data(ssl, 0) != <void*>found:
        return NULL
    return ssl


cdef object _ours = None        # whether Python's ssl calls the same library


def records_of(sock, *, uint64_t rekey=_REKEY):
    """Prepare an `ssl.SSLSocket`, before its handshake, to be read and written here after it.

    Parameters
    ----------
    sock : ssl.SSLSocket
    rekey : int, bytes
        After how many the key for sending is replaced, of TLS 1.3.

    Returns
    -------
    Records or None
        None: this Python calls another OpenSSL than is called here, or keeps its connections in another way, or the
        kernel is to do it.
    """
    global _ours
    found = getattr(sock, "_sslobj", None)
    if found is None or found.context.options & _KERNEL:
        return None
    if _ours is None:
        try:
            available()
        except BackendError:
            _ours = False
        else:
            _ours = is_of_python()
    if not _ours or ssl_of(found) == NULL:
        return None
    axf_tls_prepare(ssl_of(found))
    return Records.__new__(Records, found, sock.fileno(), rekey)


cdef axf_tls* taken(Records records) except NULL:
    if records.tls == NULL:
        raise ClosedError("this TLS connection was not begun, or was closed")
    return <axf_tls*>records.tls


cdef class Records:
    """What an `ssl.SSLSocket` carries after its handshake; from `records_of`.

    The socket stays the caller's. After `begin`, nothing else may read or write it, until `close`.
    """

    def __cinit__(self, found, int fd, uint64_t rekey):
        self.found = found
        self.fd = fd
        self.rekey = rekey

    def __dealloc__(self):
        self.close()

    def begin(self) -> None:
        """Take it over; the handshake is done."""
        global _live
        cdef void* ssl = ssl_of(self.found)
        if ssl == NULL or self.tls != NULL:
            raise ClosedError("this TLS connection cannot be begun: it was closed, or begun before")
        self.tls = axf_tls_take(ssl, self.fd, self.rekey)
        if self.tls == NULL:
            raise MemoryError
        self.rows = Rows()
        _live += 1

    def close(self) -> None:
        """Let go of it, without a word to the peer; the socket stays open, but nothing more goes over it."""
        global _live
        if self.tls != NULL:
            axf_tls_return(<axf_tls*>self.tls)
            self.tls = NULL
            _live -= 1
        self.found = None

    @property
    def pending(self) -> bool:
        """Whether something can be read that the socket does not tell of; perhaps only a part of a record is here."""
        return self.over or axf_tls_pending(taken(self)) != 0

    @property
    def over(self) -> bool:
        """Whether the next read says how it ended."""
        cdef axf_tls* tls = taken(self)
        return tls.ended != 0 or tls.failed != 0

    @property
    def unsent(self) -> bool:
        """Whether something waits for room in the socket: then `send` again, if need be nothing."""
        cdef axf_tls* tls = taken(self)
        return tls.at < tls.end

    def cipher(self) -> str:
        """Name the cipher suite that was agreed on."""
        return axf_ssl.SSL_CIPHER_get_name(axf_ssl.SSL_get_current_cipher(taken(self).ssl)).decode()

    @property
    def updates(self) -> int:
        """How often the key for sending was replaced."""
        return taken(self).updates

    def read(self, size_t nbytes) -> bytes:
        """Read what has arrived, `nbytes` at most; empty at the end that the peer announced.

        Raises
        ------
        BlockingIOError
            Nothing has arrived.
        OSError
            The connection broke or the protocol failed.
        """
        cdef axf_tls* tls = taken(self)
        cdef bytes to = PyBytes_FromStringAndSize(NULL, nbytes)
        cdef char* at = PyBytes_AS_STRING(to)
        cdef ssize_t got
        with nogil:
            got = axf_tls_read(tls, at, nbytes)
        if got < 0:
            raise_broken(tls)
        return to if <size_t>got == nbytes else to[:got]

    def read_into(self, list targets not None) -> int:
        """Fill the targets in order as far as what has arrived reaches; only the first 256 of them.

        Returns how many bytes came, 0 at the end that the peer announced. Where they are fewer than there is room for,
        nothing is left that could be read now, unless it is `over`.

        Raises
        ------
        BlockingIOError, OSError
            As `read`.
        """
        cdef axf_tls* tls = taken(self)
        cdef Rows rows = self.rows
        cdef ssize_t got
        try:
            rows.hold(targets, True)
            with nogil:
                got = axf_tls_scatter(tls, rows.at, rows.count)
            if got < 0:
                raise_broken(tls)
        finally:
            rows.release()
        return got

    def write(self, list pieces not None) -> int:
        """Encrypt pieces in order, the first 256 of them, and send what the socket has room for.

        Returns how many bytes are taken: they are not looked at again. Fewer than were given, or `unsent`: wait for
        room in the socket.

        Raises
        ------
        OSError
            The socket takes no more; what has arrived can still be read.
        """
        cdef axf_tls* tls = taken(self)
        cdef Rows rows = self.rows
        cdef ssize_t took
        try:
            rows.hold(pieces, False)
            with nogil:
                took = axf_tls_gather(tls, rows.at, rows.count)
            if took < 0:
                raise_broken(tls)
        finally:
            rows.release()
        return took


cdef class Rows:
    """The memory of some objects, held for a call."""

    cdef int hold(self, list objects, bint writable) except -1:
        cdef int flags = PyBUF_WRITABLE if writable else PyBUF_SIMPLE
        for found in objects[:_ROWS] if len(objects) > _ROWS else objects:
            PyObject_GetBuffer(found, &self.held[self.count], flags)
            self.at[self.count].iov_base = self.held[self.count].buf
            self.at[self.count].iov_len = self.held[self.count].len
            self.count += 1
        return 0

    cdef void release(self) noexcept:
        while self.count:
            self.count -= 1
            PyBuffer_Release(&self.held[self.count])


cdef int raise_broken(axf_tls* tls) except -1:
    cdef int code = errno
    if code == EAGAIN:
        raise BlockingIOError(EAGAIN, "the TLS connection would block")
    raise OSError(code, tls.reason.decode(errors="replace") if tls.reason[0] else strerror(code).decode())


cdef int raise_errno(axf_tls* tls) except -1:
    if errno == EAGAIN:
        raise BlockingIOError(EAGAIN, "the TLS connection would block")
    if tls.reason[0] == 0:
        raise ValueError("fewer bytes than a write before this one left over")
    raise BackendError(f"the TLS connection failed: {tls.reason.decode(errors='replace')}")


cdef ssize_t tls_read(void* ssl, void* to, size_t n) noexcept nogil:
    return axf_tls_read(<axf_tls*>ssl, <char*>to, n)


cdef ssize_t tls_write(void* ssl, const void* data, size_t n) noexcept nogil:
    return axf_tls_write(<axf_tls*>ssl, <const char*>data, n)


cdef int tls_pending(void* ssl) noexcept nogil:
    return axf_tls_pending(<axf_tls*>ssl)


cdef const char* tls_reason(void* ssl) noexcept nogil:
    return (<axf_tls*>ssl).reason
