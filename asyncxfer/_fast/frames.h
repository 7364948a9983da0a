/* What goes over a data connection between two hosts, and how rows of memory become parts of system calls.
 *
 * A request is a head, the runs of rows that it names in the target's region, a tag, and for a put its payload with a tail
 * behind it. A reply is a head, and for a get the payload with its tail. Replies come in the order of their requests. All
 * numbers are little-endian. Nothing that arrives is believed: `axf_runs_fit` holds runs against the region they name.
 */
#ifndef ASYNCXFER_FRAMES_H
#define ASYNCXFER_FRAMES_H

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include "crc32c.h"
#include "native.h"
#include "rows.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the data connections speak little-endian, and so must this machine"
#endif

#define AXF_FRAME_MAGIC 0x31445841u /* "AXD1" */
#define AXF_MAX_RUNS 1024       /* of a request, and rows in all of them */
#define AXF_MAX_PAYLOAD (16u << 20) /* of a request: so long may one keep its thread with a checksum */
#define AXF_MAX_TAG (32 * 1024)
#define AXF_MAX_CHUNKS (1u << 24)
#define AXF_NOTE_CHUNK 0xffffffffu /* stands for the notification of a transfer, where it goes alone */
#define AXF_IOV 1024
#define AXF_NEAR_US 1000         /* round trip within a data centre */
#define AXF_NEAR_BUFFER (192 * 1024)

enum { AXF_PUT = 1, AXF_GET = 2, AXF_NOTE = 3, AXF_DONE = 4, AXF_DATA = 5 };
enum { AXF_CHECKED = 1, AXF_FAILED = 2, AXF_TOLD = 4 }; /* flags: a checksum is wanted; the note tells of a failure; a note comes */

typedef struct {
    uint32_t magic;
    uint8_t kind, flags;
    uint16_t status;        /* of a reply: a status_t of completion.pxd, or AXF_MISMATCH */
    uint64_t op;            /* number of the transfer in its session, from 1 */
    uint64_t settled;       /* of a request: every transfer below this number has ended at the initiator */
    uint32_t chunk, chunks; /* which part of the transfer, of how many */
    uint32_t slot, epoch;   /* of the region */
    uint32_t runs, tag;     /* how many runs, and bytes of the tag, follow */
    uint64_t nbytes;        /* of the payload */
    int32_t error;          /* of a reply: the errno behind the status */
    uint32_t reserved;
} axf_head;

typedef struct {
    uint64_t offset, length; /* bytes in the segment, bytes a row */
    int64_t stride;
    uint32_t count, segment;
} axf_run;

typedef struct {
    uint32_t status; /* 0: the payload is what it should be */
    uint32_t crc;    /* CRC32C of the payload where AXF_CHECKED */
} axf_tail;

#define AXF_MISMATCH 100 /* status: the checksum did not agree */

_Static_assert(sizeof(axf_head) == 64 && sizeof(axf_run) == 32 && sizeof(axf_tail) == 8, "the wire format");

/* ---- runs ----------------------------------------------------------------------------------------------------- */

/* Whether runs lie in their segments, come to `nbytes`, and are of no more rows than a request may have. */
static inline int axf_runs_fit(const axf_run *runs, uint32_t n, uint64_t nbytes, const uint64_t *sizes, uint32_t segments) {
    uint64_t total = 0;
    uint32_t rows = 0;
    for (uint32_t i = 0; i < n; ++i) {
        const axf_run *r = runs + i;
        if (r->segment >= segments || r->count == 0 || r->length == 0 || r->count > AXF_MAX_RUNS - rows) return 0;
        rows += r->count;
        uint64_t size = sizes[r->segment];
        if (r->length > size || r->offset > size - r->length) return 0;
        __int128 last = (__int128)r->offset + (__int128)r->stride * (r->count - 1);
        if (last < 0 || last > (__int128)(size - r->length)) return 0;
        unsigned __int128 bytes = (unsigned __int128)r->length * r->count;
        if (bytes > nbytes - total) return 0;
        total += (uint64_t)bytes;
    }
    return total == nbytes;
}

/* The rows of one chunk on the remote side, as runs; at most `chunk rows` of them, which is at most AXF_MAX_RUNS. */
static inline uint32_t axf_chunk_runs(const axf_pair *pairs, const axf_chunk *chunk, int local, axf_run *out) {
    const axf_pair *pair = pairs + chunk->pair;
    uint64_t row = chunk->row, skip = chunk->skip, left = chunk->nbytes;
    uint32_t n = 0;
    while (left) {
        uint64_t at = local ? pair->local : pair->remote;
        int64_t stride = local ? pair->local_stride : pair->remote_stride;
        uint64_t take, rows = 1;
        if (skip || left < pair->length) { /* a part of a row */
            take = pair->length - skip;
            if (take > left) take = left;
        } else {
            take = pair->length;
            rows = left / pair->length;
            if (rows > pair->count - row) rows = pair->count - row;
        }
        out[n].offset = at + (uint64_t)(stride * (int64_t)row) + skip;
        out[n].length = take;
        out[n].stride = stride;
        out[n].count = (uint32_t)rows;
        out[n].segment = local ? 0 : pair->remote_segment;
        ++n;
        left -= take * rows;
        skip += take;
        if (skip == pair->length) skip = 0, row += rows;
        if (row == pair->count) ++pair, row = 0;
    }
    return n;
}

/* ---- a position in runs ----------------------------------------------------------------------------------------- */

typedef struct {
    const axf_run *run;
    uint64_t row, skip, left;
} axf_cursor;

static inline char *axf_cursor_at(const axf_cursor *c, const uint64_t *bases) {
    return (char *)(bases[c->run->segment] + c->run->offset + (uint64_t)(c->run->stride * (int64_t)c->row) + c->skip);
}

static inline void axf_cursor_move(axf_cursor *c, uint64_t n) {
    c->left -= n;
    while (n) {
        uint64_t rest = c->run->length - c->skip;
        if (n < rest) {
            c->skip += n;
            return;
        }
        n -= rest, c->skip = 0;
        uint64_t rows = n / c->run->length; /* whole rows at once */
        if (rows > c->run->count - c->row - 1) rows = c->run->count - c->row - 1;
        n -= rows * c->run->length;
        c->row += rows + 1;
        if (c->row == c->run->count) ++c->run, c->row = 0;
    }
}

/* Parts of a system call from here on, neighbours joined; gives how many, and how many bytes they are. */
static inline int axf_cursor_iov(axf_cursor c, const uint64_t *bases, struct iovec *iov, int room, uint64_t most, uint64_t *bytes) {
    int n = 0;
    *bytes = 0;
    if (most > c.left) most = c.left;
    while (*bytes < most) {
        uint64_t take = c.run->length - c.skip;
        if (take > most - *bytes) take = most - *bytes;
        char *at = axf_cursor_at(&c, bases);
        if (n && (char *)iov[n - 1].iov_base + iov[n - 1].iov_len == at)
            iov[n - 1].iov_len += take;
        else {
            if (n == room) break;
            iov[n].iov_base = at, iov[n].iov_len = take, ++n;
        }
        *bytes += take;
        c.skip += take;
        if (c.skip == c.run->length) {
            c.skip = 0;
            if (++c.row == c.run->count) ++c.run, c.row = 0;
        }
    }
    return n;
}

/* The checksum of what lies under a cursor. */
static inline uint32_t axf_cursor_crc(axf_cursor c, const uint64_t *bases) {
    uint32_t crc = 0;
    while (c.left) {
        uint64_t take = c.run->length - c.skip;
        if (take > c.left) take = c.left;
        crc = axf_crc32c(crc, axf_cursor_at(&c, bases), take);
        axf_cursor_move(&c, take);
    }
    return crc;
}

/* ---- sockets ----------------------------------------------------------------------------------------------------- */

/* 1 when the other side has reset the connection: what is still to be read from it is not to be believed. */
static inline int axf_socket_reset(int fd) {
    struct pollfd p = {fd, 0, 0};
    return poll(&p, 1, 0) > 0 && (p.revents & (POLLERR | POLLNVAL));
}

/* Small frames leave at once. On a near network the send buffer is kept to what the way there holds at 5 GB/s, and what
 * two turns of a thread fill: beyond that the kernel's copies of the data fall out of the caches before they are read.
 * On a far one the kernel goes on choosing it. */
static inline void axf_socket_ready(int fd) {
    int on = 1;
    struct tcp_info info;
    socklen_t size = sizeof info;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size) != 0 || info.tcpi_rtt > AXF_NEAR_US) return;
    int bytes = AXF_NEAR_BUFFER + (int)info.tcpi_rtt * 2500; /* the kernel takes twice what it is given */
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
}

/* Closes without a word on what is still unsent: the other side sees a reset. */
static inline void axf_socket_abort(int fd) {
    struct linger l = {1, 0};
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &l, sizeof l);
    close(fd);
}

static inline ssize_t axf_socket_send(int fd, struct iovec *iov, int n) {
    struct msghdr m;
    memset(&m, 0, sizeof m);
    m.msg_iov = iov, m.msg_iovlen = n;
    for (;;) {
        ssize_t sent = sendmsg(fd, &m, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent >= 0 || errno != EINTR) return sent;
    }
}

static inline ssize_t axf_socket_recv(int fd, struct iovec *iov, int n) {
    struct msghdr m;
    memset(&m, 0, sizeof m);
    m.msg_iov = iov, m.msg_iovlen = n;
    for (;;) {
        ssize_t got = recvmsg(fd, &m, MSG_DONTWAIT);
        if (got >= 0 || errno != EINTR) return got;
    }
}

/* Throws away what has come, without a copy. */
static inline ssize_t axf_socket_skip(int fd, size_t n) {
    for (;;) {
        ssize_t got = recv(fd, 0, n, MSG_DONTWAIT | MSG_TRUNC);
        if (got >= 0 || errno != EINTR) return got;
    }
}

#endif
