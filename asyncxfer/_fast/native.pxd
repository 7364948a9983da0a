"""Declarations of native.h and copy.h for the Cython modules."""

from libc.stdint cimport int64_t, uint32_t, uint64_t


cdef extern from "native.h" nogil:
    int64_t axf_now()
    int axf_load(const int* p)
    void axf_store(int* p, int v)
    void axf_add(int* p, int by)
    int axf_swap(int* p, int v)
    int axf_claim(int* p, int old, int new)
    void axf_or(int* p, int bits)
    void axf_and(int* p, int bits)
    int axf_claim64(uint64_t* p, uint64_t old, uint64_t new)
    uint64_t axf_load64(const uint64_t* p)
    void axf_add64(uint64_t* p, uint64_t v)
    int axf_push(void** head, void** node)
    void* axf_take(void** head)

    enum:
        AXF_PAGE_MAGIC
        AXF_PAGE_BYTES
        AXF_SLOTS

    ctypedef struct axf_gate:
        uint32_t epoch
        uint32_t inside

    ctypedef struct axf_page:
        uint64_t magic, slots, puts, put_bytes, gets, get_bytes, failed

    axf_gate* axf_gate_at(axf_page* page, uint32_t slot)
    int axf_gate_enter(axf_gate* gate, uint32_t epoch)
    void axf_gate_leave(axf_gate* gate)
    void axf_gate_set(axf_gate* gate, uint32_t epoch)
    uint32_t axf_gate_inside(axf_gate* gate)
    void axf_gate_wake(axf_gate* gate)
    int axf_gate_wait(axf_gate* gate, int64_t nanoseconds)

    ctypedef struct axf_link:
        int fd, pidfd, pid, alive, queued, full, remote
        axf_page* page

    uint64_t axf_pulse(axf_page* page, int side)
    int axf_link_gone(const axf_link* link)
    int axf_link_note(const axf_link* link, char kind, const char* tag, size_t n)
