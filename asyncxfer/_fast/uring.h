/* One io_uring instance, by system calls. The kernel's interface is declared here, in the little of it that is used, so
 * that it can be built on a host whose headers are older than the kernel it runs on. Knows no transfers.
 *
 * References: io_uring_setup(2), io_uring_enter(2), linux/io_uring.h.
 */
#ifndef ASYNCXFER_URING_H
#define ASYNCXFER_URING_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { AXF_SETUP = 425, AXF_ENTER = 426, AXF_REGISTER = 427 }; /* the same on every architecture but alpha */

enum {
    AXF_OP_READV = 1,
    AXF_OP_WRITEV = 2,
    AXF_OP_FSYNC = 3,
    AXF_OP_CANCEL = 14,
    AXF_OP_READ = 22,
    AXF_OP_WRITE = 23,
};
enum { AXF_SQE_ASYNC = 1 << 4, AXF_FSYNC_DATA = 1 };

typedef struct {
    uint8_t opcode, flags;
    uint16_t ioprio;
    int32_t fd;
    uint64_t off, addr;
    uint32_t len, op_flags;
    uint64_t user_data;
    uint64_t rest[3];
} axf_sqe;

typedef struct {
    uint64_t user_data;
    int32_t res;
    uint32_t flags;
} axf_cqe;

typedef struct {
    uint32_t head, tail, ring_mask, ring_entries, flags, dropped, array, resv;
    uint64_t user_addr;
} axf_sq_offsets;

typedef struct {
    uint32_t head, tail, ring_mask, ring_entries, overflow, cqes, flags, resv;
    uint64_t user_addr;
} axf_cq_offsets;

typedef struct {
    uint32_t sq_entries, cq_entries, flags, sq_thread_cpu, sq_thread_idle, features, wq_fd, resv[3];
    axf_sq_offsets sq;
    axf_cq_offsets cq;
} axf_ring_params;

enum {
    AXF_SETUP_CLAMP = 1u << 4,
    AXF_SETUP_DISABLED = 1u << 6,
    AXF_SETUP_SINGLE_ISSUER = 1u << 12,
    AXF_SETUP_DEFER = 1u << 13,
    AXF_FEAT_SINGLE_MMAP = 1u << 0,
    AXF_FEAT_NODROP = 1u << 1,
    AXF_FEAT_FAST_POLL = 1u << 5,
    AXF_FEAT_EXT_ARG = 1u << 8, /* Linux 5.11 */
    AXF_NEEDED = AXF_FEAT_SINGLE_MMAP | AXF_FEAT_NODROP | AXF_FEAT_FAST_POLL | AXF_FEAT_EXT_ARG,
    AXF_ENTER_GETEVENTS = 1u << 0,
    AXF_ENTER_EXT_ARG = 1u << 3,
    AXF_REGISTER_ENABLE = 12,
};
#define AXF_OFF_SQES 0x10000000ll

typedef struct {
    int fd;
    char *rings;
    size_t rings_bytes, sqes_bytes;
    axf_sqe *sqes;
    axf_cqe *cqes;
    uint32_t *sq_head, *sq_tail, *cq_head, *cq_tail;
    uint32_t sq_mask, sq_entries, cq_mask, tail;
} axf_ring;

static inline void axf_ring_close(axf_ring *r) {
    if (r->sqes) munmap(r->sqes, r->sqes_bytes);
    if (r->rings) munmap(r->rings, r->rings_bytes);
    if (r->fd >= 0) close(r->fd);
    memset(r, 0, sizeof *r);
    r->fd = -1;
}

/* 0, or errno; ENOTSUP: the kernel is older than 5.11. It does nothing before axf_ring_enable, by the only thread that
 * will ever use it. A forked child does not have its memory. */
static inline int axf_ring_open(axf_ring *r, uint32_t entries) {
    axf_ring_params p;
    uint32_t i, *array, best = AXF_SETUP_SINGLE_ISSUER | AXF_SETUP_DEFER; /* Linux 6.1 */
    memset(r, 0, sizeof *r);
    do {
        memset(&p, 0, sizeof p);
        p.flags = AXF_SETUP_CLAMP | AXF_SETUP_DISABLED | best;
        r->fd = (int)syscall(AXF_SETUP, entries, &p);
    } while (r->fd < 0 && errno == EINVAL && best && !(best = 0));
    if (r->fd < 0) return errno;
    int error = ENOTSUP;
    if ((p.features & AXF_NEEDED) != AXF_NEEDED) goto failed;
    size_t sq = p.sq.array + p.sq_entries * sizeof(uint32_t), cq = p.cq.cqes + p.cq_entries * sizeof(axf_cqe);
    r->rings_bytes = sq > cq ? sq : cq;
    r->sqes_bytes = p.sq_entries * sizeof(axf_sqe);
    void *rings = mmap(0, r->rings_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, r->fd, 0);
    if (rings == MAP_FAILED) goto refused;
    r->rings = rings;
    void *sqes = mmap(0, r->sqes_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, r->fd, AXF_OFF_SQES);
    if (sqes == MAP_FAILED) goto refused;
    r->sqes = sqes;
    madvise(rings, r->rings_bytes, MADV_DONTFORK);
    madvise(sqes, r->sqes_bytes, MADV_DONTFORK);
    r->sq_head = (uint32_t *)(r->rings + p.sq.head);
    r->sq_tail = (uint32_t *)(r->rings + p.sq.tail);
    r->cq_head = (uint32_t *)(r->rings + p.cq.head);
    r->cq_tail = (uint32_t *)(r->rings + p.cq.tail);
    r->cqes = (axf_cqe *)(r->rings + p.cq.cqes);
    r->sq_mask = p.sq_entries - 1, r->sq_entries = p.sq_entries, r->cq_mask = p.cq_entries - 1;
    array = (uint32_t *)(r->rings + p.sq.array);
    for (i = 0; i < p.sq_entries; ++i) array[i] = i;
    return 0;
refused:
    error = errno;
failed:
    axf_ring_close(r);
    return error;
}

static inline int axf_ring_enable(axf_ring *r) {
    return syscall(AXF_REGISTER, r->fd, AXF_REGISTER_ENABLE, (void *)0, 0) < 0 ? errno : 0;
}

/* The next free entry, cleared; 0 when all are taken. */
static inline axf_sqe *axf_ring_next(axf_ring *r) {
    if (r->tail - __atomic_load_n(r->sq_head, __ATOMIC_ACQUIRE) >= r->sq_entries) return 0;
    axf_sqe *sqe = &r->sqes[r->tail++ & r->sq_mask];
    memset(sqe, 0, sizeof *sqe);
    return sqe;
}

/* Submits what was prepared and waits for `least` completions, for so long at most (below 0: as long as it takes).
 * 0, or errno; ETIME, EINTR, EAGAIN and EBUSY mean: look at the completions, and come again. */
static inline int axf_ring_enter(axf_ring *r, uint32_t least, int64_t nanoseconds) {
    struct { int64_t sec, nsec; } time = {nanoseconds / 1000000000, nanoseconds % 1000000000};
    struct { uint64_t sigmask; uint32_t sigmask_sz, pad; uint64_t ts; } arg = {0, 0, 0, 0};
    if (nanoseconds >= 0) arg.ts = (uint64_t)(uintptr_t)&time;
    __atomic_store_n(r->sq_tail, r->tail, __ATOMIC_RELEASE);
    uint32_t ready = r->tail - __atomic_load_n(r->sq_head, __ATOMIC_ACQUIRE);
    long rc = syscall(AXF_ENTER, r->fd, ready, least, AXF_ENTER_GETEVENTS | AXF_ENTER_EXT_ARG, &arg, sizeof arg);
    return rc < 0 ? errno : 0;
}

/* The next completion, copied; 0 where there is none. */
static inline int axf_ring_reap(axf_ring *r, axf_cqe *out) {
    uint32_t head = *r->cq_head;
    if (head == __atomic_load_n(r->cq_tail, __ATOMIC_ACQUIRE)) return 0;
    *out = r->cqes[head & r->cq_mask];
    __atomic_store_n(r->cq_head, head + 1, __ATOMIC_RELEASE);
    return 1;
}

/* Whether all of it lies in huge pages, by the PAGEMAP_SCAN of /proc/self/pagemap (Linux 6.7, linux/fs.h); 1 where that
 * cannot be told. */
static inline int axf_in_huge_pages(int pagemap, const void *at, uint64_t nbytes) {
    struct { uint64_t start, end, categories; } found;
    struct {
        uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
        uint64_t inverted, mask, anyof_mask, return_mask;
    } arg;
    uint64_t page = 4096, start = (uint64_t)(uintptr_t)at & -page, end = ((uint64_t)(uintptr_t)at + nbytes) & -page;
    memset(&arg, 0, sizeof arg);
    arg.size = sizeof arg, arg.start = start, arg.end = end;
    arg.vec = (uint64_t)(uintptr_t)&found, arg.vec_len = 1;
    arg.mask = arg.return_mask = 1 << 6; /* PAGE_IS_HUGE */
    int rc = ioctl(pagemap, _IOWR('f', 16, arg), &arg);
    return rc < 0 || (rc == 1 && found.start == start && found.end == end);
}

/* Memory in pieces that are as large as can be had; it takes none before it is used. 0 where there is none. */
static inline char *axf_stages(size_t nbytes) {
    void *p = mmap(0, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return 0;
    madvise(p, nbytes, MADV_HUGEPAGE);
    madvise(p, nbytes, MADV_DONTFORK);
    return p;
}

static inline void axf_stages_free(char *stages, size_t nbytes) { munmap(stages, nbytes); }

#endif
