# cython: language_level=3, boundscheck=False, wraparound=False, auto_pickle=False, autotestdict=False
"""UCX without linking to it: a table of its functions, from the libucp that UCXX has loaded, and registered memory.

Who made the context, the worker and the endpoints is not known here; they come as the numbers that UCXX gives.
"""

cimport cython
from libc.stdint cimport uintptr_t
from libc.string cimport memset

from asyncxfer._errors import BackendError, RegistrationError

cdef long _live = 0


def live() -> int:
    """Registrations with UCX that exist now (for leak checks)."""
    return _live


def bind(str path not None) -> str:
    """Take UCX's functions from a library that is loaded, and give its version. Does nothing the second time.

    Parameters
    ----------
    path : str
        Of a libucp, or its soname.

    Raises
    ------
    BackendError
        It is not loaded, or lacks a function.
    """
    cdef axf_ucp_table found
    cdef const char* missing
    if ucp.library == NULL:
        memset(&found, 0, sizeof(found))
        missing = axf_ucp_bind(&found, path.encode())
        if missing != NULL:
            raise BackendError(f"{path} cannot be used: {missing.decode()} is not in this process; UCX 1.19 or newer has it")
        (&ucp)[0] = found
    return ucp.get_version_string().decode()


def word(int status) -> str:
    """What UCX calls a status."""
    return ucp.status_string(status).decode() if ucp.library != NULL else f"status {status}"


cdef int check_bound() except -1:
    if ucp.library == NULL:
        raise BackendError("UCX has not been bound in this process")
    return 0


@cython.no_gc_clear             # the context is needed to let go of the memory
cdef class Memory:
    """Memory that UCX may read and write, and peers with its key.

    Parameters
    ----------
    context : int
        A ucp_context_h.
    address, nbytes : int
    cuda : bool
        It is a GPU's.
    keep : object
        What must live as long: the context.

    Raises
    ------
    RegistrationError
        UCX cannot use it.
    """

    def __cinit__(self, uintptr_t context, uintptr_t address, size_t nbytes, *, bint cuda=False, keep=None) -> None:
        global _live
        cdef axf_ucp_map_param p
        cdef int status
        check_bound()
        memset(&p, 0, sizeof(p))
        p.mask = 1 | 2 | 16
        p.address, p.length, p.memory_type = <void*>address, nbytes, AXF_MEMORY_CUDA if cuda else AXF_MEMORY_HOST
        with nogil:
            status = ucp.mem_map(<void*>context, &p, &self.handle)
        if status != AXF_UCS_OK:
            self.handle = NULL
            raise RegistrationError(f"UCX cannot register {nbytes:,} bytes at {address:#x}: {word(status)}")
        self.context, self.nbytes, self.keep = <void*>context, nbytes, keep
        _live += 1

    def __dealloc__(self):
        self.close()

    @property
    def open(self) -> bool:
        """Whether it has not been closed."""
        return self.handle != NULL

    def key(self) -> bytes:
        """What a peer needs to reach it: a packed remote key."""
        cdef void* packed = NULL
        cdef size_t n = 0
        cdef int status
        if self.handle == NULL:
            raise RegistrationError("memory that has been closed has no key")
        status = ucp.rkey_pack(self.context, self.handle, &packed, &n)
        if status != AXF_UCS_OK:
            raise RegistrationError(f"UCX gives no remote key: {word(status)}")
        try:
            return (<char*>packed)[:n]
        finally:
            ucp.rkey_buffer_release(packed)

    def close(self) -> None:
        """Take it back. Nothing in flight uses it; keys that peers have become worthless."""
        global _live
        cdef void* handle = self.handle
        if handle != NULL:
            self.handle = NULL
            _live -= 1
            with nogil:
                ucp.mem_unmap(self.context, handle)
            self.keep = None


def transports(uintptr_t endpoint) -> list[tuple[str, str]]:
    """What an endpoint may send over: transport and device."""
    cdef axf_ucp_lane lanes[64]
    cdef axf_ucp_ep_attr attr
    cdef unsigned i
    check_bound()
    memset(&attr, 0, sizeof(attr))
    memset(lanes, 0, sizeof(lanes))
    attr.mask = 8
    attr.transports.lanes, attr.transports.count, attr.transports.lane_bytes = lanes, 64, sizeof(axf_ucp_lane)
    if ucp.ep_query(<void*>endpoint, &attr) != AXF_UCS_OK:
        return []
    return [(lanes[i].transport.decode(), lanes[i].device.decode()) for i in range(min(attr.transports.count, 64u))]


def seconds(uintptr_t endpoint, size_t nbytes) -> float:
    """How long UCX expects a message to take; 0.0 where it does not know."""
    cdef axf_ucp_perf_param p
    cdef axf_ucp_perf perf
    check_bound()
    p.mask, p.nbytes, perf.mask, perf.seconds = 1, nbytes, 1, 0.0
    return perf.seconds if ucp.ep_evaluate_perf(<void*>endpoint, &p, &perf) == AXF_UCS_OK else 0.0
