# cython: language_level=3, boundscheck=False, wraparound=False, auto_pickle=False, autotestdict=False
"""The two ends of a connection between agents, for native code: Link at the initiator, GatePage at the target.

The page is a sealed memfd that the target makes for each initiator. It knows which regions are open to that initiator
and how many chunks are being moved in each, and counts what the initiator did. What it says is trusted for nothing
but this one connection: an initiator that scribbles on it spoils its own figures and its own revocation.
"""

import fcntl
import os

from libc.errno cimport errno
from libc.stdint cimport int64_t, uint32_t, uintptr_t

from asyncxfer._fast.memory import Mapping
from asyncxfer._fast.native cimport *

SLOTS = AXF_SLOTS
PAGE_BYTES = AXF_PAGE_BYTES

cdef extern from "<sys/prctl.h>" nogil:
    int prctl(int option, unsigned long arg)
    enum: PR_SET_PTRACER, PR_SET_PTRACER_ANY

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void* iov_base
        size_t iov_len
    ssize_t process_vm_readv(int pid, iovec* local, unsigned long nl, iovec* remote, unsigned long nr, unsigned long f)

cdef long _live = 0


def peek(int pid, uintptr_t address, size_t nbytes) -> bytes:
    """Read another process's memory: the test of whether cross-memory attach works here.

    Raises
    ------
    OSError
        EPERM: ptrace access is denied; ESRCH: no such process in this namespace; EFAULT: nothing is mapped there.
    """
    cdef bytearray out = bytearray(nbytes)
    cdef iovec here, there
    here.iov_base, here.iov_len = <char*>out, nbytes
    there.iov_base, there.iov_len = <void*>address, nbytes
    cdef ssize_t got = process_vm_readv(pid, &here, 1, &there, 1, 0)
    if got < 0:
        raise OSError(errno, os.strerror(errno))
    return bytes(out[:got])


def permit_attach(bint on) -> bool:
    """Let processes of this user attach to this one where Yama asks for a declaration; False without Yama."""
    return prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY if on else 0) == 0


def live() -> int:
    """Links and gate pages that exist now (for leak checks)."""
    return _live


cdef class Link:
    """The initiator's end: the socket for notifications, the process to watch, the page with the gates.

    Parameters
    ----------
    fd, pidfd : int
        Control socket and process descriptor, both the caller's and open until after `close`; pidfd may be -1.
    pid : int
        The peer's process, in this process's namespace.
    page : Mapping or None
        The page that the target sent; None for a peer on another host, which guards its regions itself.

    Attributes
    ----------
    post : callable or None
        For a peer on another host: takes the kind of a notification (``b"N"``, ``b"F"``), its tag, and what to call,
        on the loop, with True once it has been delivered or False once it never will be.

    Raises
    ------
    ValueError
        The page is none of this version.
    """

    def __cinit__(self, int fd, int pidfd, int pid, page):
        global _live
        cdef axf_page* p = NULL
        if page is not None:
            p = <axf_page*><uintptr_t>page.address
        if page is None:
            self.c.remote = 1
        elif page.nbytes < AXF_PAGE_BYTES or p.magic != AXF_PAGE_MAGIC or p.slots != AXF_SLOTS:
            raise ValueError("the page that the peer sent is not a link page of this version")
        self._page = page
        self.c.fd, self.c.pidfd, self.c.pid, self.c.page = fd, pidfd, pid, p
        self.c.alive = 1
        self.counted = True
        _live += 1

    def __dealloc__(self):
        global _live
        if self.counted:
            _live -= 1

    @property
    def alive(self) -> bool:
        """Whether neither side has closed, as far as this side has noticed."""
        return axf_load(&self.c.alive) == 1

    @property
    def remote(self) -> bool:
        """Whether the peer is on another host."""
        return self.c.remote == 1

    @property
    def pid(self) -> int:
        """The peer's process."""
        return self.c.pid

    def gone(self) -> bool:
        """Whether the peer has closed its end or has ended: asks the kernel, about a microsecond."""
        return axf_link_gone(&self.c) == 1

    def enter(self, uint32_t slot, uint32_t epoch) -> bool:
        """Pass the gate of a region of the peer; False when it has been taken back. `leave` follows a True.

        A backend in Python that touches the peer's memory itself does so between the two, in pieces that take no
        longer than a fraction of a second: as long as it is inside, the peer waits to let go of the region.
        """
        if slot >= AXF_SLOTS or self.c.page == NULL:
            raise IndexError(f"slot {slot} of {0 if self.c.page == NULL else AXF_SLOTS}")
        return axf_gate_enter(axf_gate_at(self.c.page, slot), epoch) == 1

    def leave(self, uint32_t slot) -> None:
        """Come out again, after `enter` has let in."""
        if slot >= AXF_SLOTS or self.c.page == NULL:
            raise IndexError(f"slot {slot} of {0 if self.c.page == NULL else AXF_SLOTS}")
        axf_gate_leave(axf_gate_at(self.c.page, slot))

    def pulse(self) -> int:
        """Show the target that this side's loop turns; a number that grows as long as the target's does."""
        if self.c.page == NULL:
            raise ValueError("a link without a page has no pulse")
        return axf_pulse(self.c.page, 1)

    def close(self) -> None:
        """From now on nothing is sent or put over it. The descriptors stay the caller's."""
        axf_store(&self.c.alive, 0)


cdef class GatePage:
    """The target's end: which regions one initiator may reach, and whether it is inside one now."""

    def __cinit__(self):
        global _live
        self.fd = os.memfd_create("asyncxfer-link", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        _live += 1
        os.ftruncate(self.fd, AXF_PAGE_BYTES)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self.mapping = Mapping(self.fd, 0, AXF_PAGE_BYTES, writable=True)
        self.page = <axf_page*><uintptr_t>self.mapping.address
        self.page.slots = AXF_SLOTS
        self.page.magic = AXF_PAGE_MAGIC

    def __dealloc__(self):
        global _live
        _live -= 1

    def close_fd(self) -> None:
        """Close the memfd, once the initiator has its own; the mapping stays until the object goes."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    cdef axf_gate* gate(self, uint32_t slot) except NULL:
        if slot >= AXF_SLOTS:
            raise IndexError(f"slot {slot} of {AXF_SLOTS}")
        return axf_gate_at(self.page, slot)

    def open(self, uint32_t slot, uint32_t epoch) -> None:
        """Let the initiator into the region of this slot. `epoch` is never 0."""
        axf_gate_set(self.gate(slot), epoch)

    def enter(self, uint32_t slot, uint32_t epoch) -> bool:
        """Pass a gate in place of an initiator that has no page; False when the region is not open. `leave` follows a True.

        As long as a service is inside, the region is not let go of, so it comes out within a fraction of a second.
        """
        return axf_gate_enter(self.gate(slot), epoch) == 1

    def leave(self, uint32_t slot) -> None:
        """Come out again, after `enter` has let in."""
        axf_gate_leave(self.gate(slot))

    def shut(self, uint32_t slot) -> bool:
        """Let nobody in any more; True when nobody is inside either."""
        axf_gate_set(self.gate(slot), 0)
        return axf_gate_inside(self.gate(slot)) == 0

    def wait(self, uint32_t slot, double seconds) -> bool:
        """Wait, without the GIL, until nobody is inside; False when the time ran out or `wake` was called."""
        cdef axf_gate* gate = self.gate(slot)
        cdef int empty
        cdef int64_t ns = <int64_t>(seconds * 1e9)
        with nogil:
            empty = axf_gate_wait(gate, ns)
        return empty == 1

    def wake(self, uint32_t slot) -> None:
        """End a `wait`: the initiator is known to be gone."""
        axf_gate_wake(self.gate(slot))

    def pulse(self) -> int:
        """Show the initiator that this side's loop turns; a number that grows as long as the initiator's does."""
        return axf_pulse(self.page, 0)

    def counts(self) -> dict[str, int]:
        """What the initiator has done over this link: transfers and bytes, by direction, and failures."""
        p = self.page
        return {
            "puts": p.puts,
            "put_bytes": p.put_bytes,
            "gets": p.gets,
            "get_bytes": p.get_bytes,
            "failed": p.failed,
        }
