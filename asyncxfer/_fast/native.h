/* What Cython cannot say: atomics, futexes, the clock, and the words shared between two processes.
 *
 * A link is one connection from an initiator (who puts and gets) to a target (who owns the regions). Its page is a
 * small shared mapping that the target made. In it every region has a gate: the target writes `epoch` (0 is closed),
 * the initiator counts itself into `inside` around each chunk that it moves. So the target can revoke a region and
 * know when the last reader or writer has gone, also when no Python of either process runs.
 *
 * Nothing here allocates, blocks (except gate_wait) or knows Python.
 */
#ifndef ASYNCXFER_NATIVE_H
#define ASYNCXFER_NATIVE_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <linux/futex.h>
#include <poll.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static inline int64_t axf_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* ---- atomics, sequentially consistent: none of them stands on a per-row path -------------------------------- */

static inline int axf_load(const int *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
static inline void axf_store(int *p, int v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
static inline void axf_add(int *p, int by) { __atomic_fetch_add(p, by, __ATOMIC_SEQ_CST); }
static inline int axf_swap(int *p, int v) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); }
static inline int axf_claim(int *p, int from, int to) {
    return __atomic_compare_exchange_n(p, &from, to, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}
static inline void axf_or(int *p, int bits) { __atomic_fetch_or(p, bits, __ATOMIC_SEQ_CST); }
static inline void axf_and(int *p, int bits) { __atomic_fetch_and(p, bits, __ATOMIC_SEQ_CST); }
static inline uint64_t axf_load64(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
static inline int axf_claim64(uint64_t *p, uint64_t from, uint64_t to) {
    return __atomic_compare_exchange_n(p, &from, to, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}
static inline void axf_add64(uint64_t *p, uint64_t v) { __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }

/* A stack that many threads push to and one takes whole: `head` is the stack, `node` the first word of the item.
 * Returns 1 when it was empty, so that exactly one pusher wakes the consumer. */
static inline int axf_push(void **head, void **node) {
    void *old = __atomic_load_n(head, __ATOMIC_RELAXED);
    do {
        *node = old;
    } while (!__atomic_compare_exchange_n(head, &old, (void *)node, 1, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED));
    return old == 0;
}
static inline void *axf_take(void **head) { return __atomic_exchange_n(head, (void *)0, __ATOMIC_SEQ_CST); }

/* ---- the link page ------------------------------------------------------------------------------------------ */

#define AXF_PAGE_MAGIC 0x6b6e696c66786131ull
#define AXF_GATES_AT 4096
#define AXF_SLOTS 16384

typedef struct {
    uint32_t epoch;  /* written by the target: which registration is open in this slot; 0 when none */
    uint32_t inside; /* written by the initiator: chunks being moved now */
} axf_gate;

typedef struct {
    uint64_t magic, slots;
    uint64_t puts, put_bytes, gets, get_bytes, failed; /* written by the initiator, so that the target can count too */
    uint64_t pulses[2]; /* each is advanced by one side as long as its loop turns: the target, the initiator */
} axf_page;

#define AXF_PAGE_BYTES (AXF_GATES_AT + AXF_SLOTS * sizeof(axf_gate))

static inline axf_gate *axf_gate_at(axf_page *page, uint32_t slot) {
    return (axf_gate *)((char *)page + AXF_GATES_AT) + slot;
}

/* Advances the pulse of one side, and gives the other's. */
static inline uint64_t axf_pulse(axf_page *page, int side) {
    axf_add64(&page->pulses[side], 1);
    return axf_load64(&page->pulses[!side]);
}

static inline long axf_futex(uint32_t *word, int op, uint32_t value, const struct timespec *timeout) {
    return syscall(SYS_futex, word, op, value, timeout, (void *)0, 0);
}

static inline void axf_gate_leave(axf_gate *gate) {
    if (__atomic_sub_fetch(&gate->inside, 1, __ATOMIC_SEQ_CST) == 0 &&
        __atomic_load_n(&gate->epoch, __ATOMIC_SEQ_CST) == 0)
        axf_futex(&gate->inside, FUTEX_WAKE, INT32_MAX, 0);
}

/* 1 when inside; 0 when the region that the caller knows is no longer open. */
static inline int axf_gate_enter(axf_gate *gate, uint32_t epoch) {
    __atomic_fetch_add(&gate->inside, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&gate->epoch, __ATOMIC_SEQ_CST) == epoch) return 1;
    axf_gate_leave(gate);
    return 0;
}

static inline void axf_gate_set(axf_gate *gate, uint32_t epoch) {
    __atomic_store_n(&gate->epoch, epoch, __ATOMIC_SEQ_CST);
}

static inline uint32_t axf_gate_inside(axf_gate *gate) { return __atomic_load_n(&gate->inside, __ATOMIC_SEQ_CST); }

/* Wakes whoever waits on the gate without opening it: used when the initiator is known to be gone. */
static inline void axf_gate_wake(axf_gate *gate) { axf_futex(&gate->inside, FUTEX_WAKE, INT32_MAX, 0); }

/* Waits until nobody is inside. 1: empty; 0: the time ran out or somebody called axf_gate_wake. */
static inline int axf_gate_wait(axf_gate *gate, int64_t nanoseconds) {
    int64_t end = axf_now() + nanoseconds;
    for (;;) {
        uint32_t inside = axf_gate_inside(gate);
        if (!inside) return 1;
        int64_t left = end - axf_now();
        if (left <= 0) return 0;
        struct timespec t = {left / 1000000000, left % 1000000000};
        if (axf_futex(&gate->inside, FUTEX_WAIT, inside, &t) == 0 && axf_gate_inside(gate) == inside) return 0;
    }
}

/* ---- the link, as the initiator's native code sees it --------------------------------------------------------- */

typedef struct {
    int fd;     /* the control socket: SOCK_SEQPACKET, so that a frame is whole whoever sends it */
    int pidfd;  /* the peer's process, -1 where the kernel has none */
    int pid;
    int alive;  /* 0 once either side has closed */
    int queued; /* notifications that wait in the outbox; while there are any, none overtakes them */
    int full;   /* the outbox's own: found full in this sweep */
    int remote; /* the peer is on another host: there is no socket to write to here, and no page */
    axf_page *page;
} axf_link;

/* 1 when the peer has closed its end, has become another program or has ended. The socket tells the first two (an
 * inherited copy in a forked child could hold it open), the pidfd the last. */
static inline int axf_link_gone(const axf_link *link) {
    if (!axf_load(&link->alive)) return 1;
    if (link->remote) return 0; /* the control channel and the backend's own connections tell */
    struct pollfd p[2] = {{link->fd, POLLRDHUP, 0}, {link->pidfd, POLLIN, 0}};
    if (poll(p, link->pidfd < 0 ? 1 : 2, 0) <= 0) return 0;
    return (p[0].revents & (POLLRDHUP | POLLHUP | POLLERR | POLLNVAL)) || (p[1].revents & POLLIN);
}

/* Sends one notification frame: 0, or errno. Never blocks. */
static inline int axf_link_note(const axf_link *link, char kind, const char *tag, size_t n) {
    struct iovec iov[2] = {{&kind, 1}, {(void *)tag, n}};
    struct msghdr message;
    if (!axf_load(&link->alive)) return EPIPE;
    memset(&message, 0, sizeof message);
    message.msg_iov = iov;
    message.msg_iovlen = n ? 2 : 1;
    for (;;) {
        if (sendmsg(link->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0) return 0;
        if (errno != EINTR) return errno;
    }
}

#endif
