"""Declarations of frames.h: what goes over a data connection between two hosts."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from asyncxfer._fast.engine cimport axf_chunk, axf_pair


cdef extern from "frames.h" nogil:
    enum:
        AXF_FRAME_MAGIC
        AXF_MAX_RUNS
        AXF_MAX_PAYLOAD
        AXF_MAX_TAG
        AXF_MAX_CHUNKS
        AXF_NOTE_CHUNK
        AXF_IOV
        AXF_PUT
        AXF_GET
        AXF_NOTE
        AXF_DONE
        AXF_DATA
        AXF_CHECKED
        AXF_FAILED
        AXF_TOLD
        AXF_MISMATCH

    ctypedef struct axf_head:
        uint32_t magic
        uint8_t kind, flags
        uint16_t status
        uint64_t op, settled
        uint32_t chunk, chunks, slot, epoch, runs, tag
        uint64_t nbytes
        int32_t error

    ctypedef struct axf_run:
        uint64_t offset, length
        int64_t stride
        uint32_t count, segment

    ctypedef struct axf_tail:
        uint32_t status, crc

    ctypedef struct axf_cursor:
        const axf_run* run
        uint64_t row, skip, left

    struct iovec:
        void* iov_base
        size_t iov_len

    int axf_runs_fit(const axf_run* runs, uint32_t n, uint64_t nbytes, const uint64_t* sizes, uint32_t segments)
    uint32_t axf_chunk_runs(const axf_pair* pairs, const axf_chunk* chunk, int local, axf_run* out)
    char* axf_cursor_at(const axf_cursor* c, const uint64_t* bases)
    void axf_cursor_move(axf_cursor* c, uint64_t n)
    int axf_cursor_iov(axf_cursor c, const uint64_t* bases, iovec* iov, int room, uint64_t most, uint64_t* bytes)
    uint32_t axf_cursor_crc(axf_cursor c, const uint64_t* bases)
    int axf_socket_reset(int fd)
    ssize_t axf_socket_skip(int fd, size_t n)
