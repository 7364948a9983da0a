"""Declarations of ucp.h, and the table of functions that all users of UCX in this process share."""

from libc.stdint cimport uint64_t


cdef extern from "ucp.h" nogil:
    enum:
        AXF_UCS_OK
        AXF_UCS_INPROGRESS
        AXF_UCS_NO_MEMORY
        AXF_UCS_UNREACHABLE
        AXF_UCS_BUSY
        AXF_UCS_CANCELED
        AXF_OP_CALLBACK
        AXF_OP_ARG
        AXF_OP_FLAGS
        AXF_OP_MEMORY
        AXF_AM_REPLY
        AXF_AM_EAGER
        AXF_AM_COPY_HEAD
        AXF_AM_HAS_REPLY
        AXF_AM_IS_RNDV
        AXF_CLOSE_FORCE
        AXF_MEMORY_HOST
        AXF_MEMORY_CUDA


    ctypedef struct axf_ucp_param:
        unsigned mask, flags
        void (*done)(void* request, int status, void* arg) noexcept nogil
        void* arg
        void* memory

    ctypedef struct axf_ucp_map_param:
        uint64_t mask
        void* address
        size_t length
        int memory_type

    ctypedef struct axf_ucp_am_param:
        uint64_t attributes
        void* reply

    ctypedef struct axf_ucp_am_handler:
        uint64_t mask
        unsigned id
        int (*on_am)(
            void* arg, const void* head, size_t head_bytes, void* data, size_t n, const axf_ucp_am_param* param
        ) noexcept nogil
        void* arg

    ctypedef struct axf_ucp_lane:
        const char* transport
        const char* device

    ctypedef struct axf_ucp_transports:
        axf_ucp_lane* lanes
        unsigned count
        size_t lane_bytes

    ctypedef struct axf_ucp_ep_attr:
        uint64_t mask
        axf_ucp_transports transports

    ctypedef struct axf_ucp_perf_param:
        uint64_t mask
        size_t nbytes

    ctypedef struct axf_ucp_perf:
        uint64_t mask
        double seconds

    ctypedef struct axf_ucp_table:
        void* library
        const char* (*status_string)(int status) noexcept nogil
        const char* (*get_version_string)() noexcept nogil
        int (*mem_map)(void* context, const axf_ucp_map_param* param, void** memory) noexcept nogil
        int (*mem_unmap)(void* context, void* memory) noexcept nogil
        int (*rkey_pack)(void* context, void* memory, void** key, size_t* n) noexcept nogil
        void (*rkey_buffer_release)(void* key) noexcept nogil
        int (*ep_rkey_unpack)(void* ep, const void* key, void** rkey) noexcept nogil
        void (*rkey_destroy)(void* rkey) noexcept nogil
        void* (*put_nbx)(void* ep, const void* source, size_t n, uint64_t to, void* rkey, const axf_ucp_param* p) noexcept nogil
        void* (*get_nbx)(void* ep, void* to, size_t n, uint64_t source, void* rkey, const axf_ucp_param* p) noexcept nogil
        void* (*ep_flush_nbx)(void* ep, const axf_ucp_param* p) noexcept nogil
        void* (*ep_close_nbx)(void* ep, const axf_ucp_param* p) noexcept nogil
        int (*ep_query)(void* ep, axf_ucp_ep_attr* attr) noexcept nogil
        int (*ep_evaluate_perf)(void* ep, const axf_ucp_perf_param* param, axf_ucp_perf* perf) noexcept nogil
        void* (*am_send_nbx)(
            void* ep, unsigned id, const void* head, size_t head_bytes, const void* data, size_t n,
            const axf_ucp_param* p
        ) noexcept nogil
        int (*worker_set_am_recv_handler)(void* worker, const axf_ucp_am_handler* handler) noexcept nogil
        unsigned (*worker_progress)(void* worker) noexcept nogil
        int (*worker_arm)(void* worker) noexcept nogil
        int (*worker_get_efd)(void* worker, int* fd) noexcept nogil
        int (*worker_signal)(void* worker) noexcept nogil
        void (*request_free)(void* request) noexcept nogil

    const char* axf_ucp_bind(axf_ucp_table* table, const char* path)
    bint axf_ucp_failed(const void* given)
    int axf_ucp_status(const void* given)


cdef axf_ucp_table ucp


cdef class Memory:
    cdef void* context
    cdef readonly size_t nbytes
    cdef object keep
    cdef void* handle
