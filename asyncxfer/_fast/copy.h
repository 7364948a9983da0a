/* Moving the bytes of one chunk: plain copies between mapped memory, and batched cross-memory attach.
 *
 * Included by the engine alone, since the SIGBUS guard is one per process: a mapped file that is truncated by its
 * owner while we copy gives SIGBUS, which here becomes an error of the transfer. The handler passes on every signal
 * that is not ours.
 */
#ifndef ASYNCXFER_COPY_H
#define ASYNCXFER_COPY_H

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include "native.h"
#include "rows.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define AXF_CMA_ROWS 1024 /* IOV_MAX: rows a process_vm call */

/* ---- SIGBUS -------------------------------------------------------------------------------------------------- */

static __thread sigjmp_buf *axf_guard __attribute__((tls_model("initial-exec")));
static __thread int axf_passing __attribute__((tls_model("initial-exec")));
static struct sigaction axf_previous;

static void axf_on_sigbus(int number, siginfo_t *info, void *context) {
    if (axf_guard) {
        sigjmp_buf *jump = axf_guard;
        axf_guard = 0;
        siglongjmp(*jump, 1);
    }
    /* Who was installed after us and is now called by us may pass the signal back to us (faulthandler does). */
    int again = axf_passing++;
    if (!again && (axf_previous.sa_flags & SA_SIGINFO))
        axf_previous.sa_sigaction(number, info, context);
    else if (!again && axf_previous.sa_handler != SIG_DFL && axf_previous.sa_handler != SIG_IGN)
        axf_previous.sa_handler(number);
    else {
        signal(number, SIG_DFL);
        raise(number);
    }
    --axf_passing;
}

/* Installs the handler unless it is there; another library may have put its own on top since the last call. */
static inline void axf_guard_install(void) {
    struct sigaction now, ours;
    sigaction(SIGBUS, 0, &now);
    if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == axf_on_sigbus) return;
    axf_previous = now;
    memset(&ours, 0, sizeof ours);
    ours.sa_sigaction = axf_on_sigbus;
    ours.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    sigaction(SIGBUS, &ours, 0);
}

/* ---- plain copies -------------------------------------------------------------------------------------------- */

#if defined(__x86_64__)
/* Past the caches: saves reading the destination before it is overwritten, and keeps the caches for others. */
__attribute__((target("avx"))) static inline void axf_stream(char *to, const char *from, size_t n) {
    size_t head = (size_t)(-(intptr_t)to) & 63;
    if (head) {
        memcpy(to, from, head);
        to += head, from += head, n -= head;
    }
    for (; n >= 128; to += 128, from += 128, n -= 128) {
        __m256i a = _mm256_loadu_si256((const __m256i *)from), b = _mm256_loadu_si256((const __m256i *)(from + 32));
        __m256i c = _mm256_loadu_si256((const __m256i *)(from + 64)), d = _mm256_loadu_si256((const __m256i *)(from + 96));
        if (n > 2176) {
            _mm_prefetch(from + 2048, _MM_HINT_T0);
            _mm_prefetch(from + 2112, _MM_HINT_T0);
        }
        _mm256_stream_si256((__m256i *)to, a), _mm256_stream_si256((__m256i *)(to + 32), b);
        _mm256_stream_si256((__m256i *)(to + 64), c), _mm256_stream_si256((__m256i *)(to + 96), d);
    }
    if (n) memcpy(to, from, n);
}
static inline int axf_can_stream(void) { return __builtin_cpu_supports("avx"); }
static inline void axf_stream_end(void) { _mm_sfence(); }
#else
static inline void axf_stream(char *to, const char *from, size_t n) { memcpy(to, from, n); }
static inline int axf_can_stream(void) { return 0; }
static inline void axf_stream_end(void) {}
#endif

/* Asks for the beginning of the row after this one: no hardware prefetcher follows a jump to another page. */
static inline void axf_prefetch_row(const axf_pair *pair, uint64_t row, int put) {
    if (row == pair->count) ++pair, row = 0;
    const char *from = (const char *)((put ? pair->local : pair->remote) +
                                      (uint64_t)((put ? pair->local_stride : pair->remote_stride) * (int64_t)row));
    const char *to = (const char *)((put ? pair->remote : pair->local) +
                                    (uint64_t)((put ? pair->remote_stride : pair->local_stride) * (int64_t)row));
    uint64_t n = pair->length < 2048 ? pair->length : 2048;
    for (uint64_t i = 0; i < n; i += 64) __builtin_prefetch(from + i);
    __builtin_prefetch(to, 1);
}

static inline void axf_copy_rows(const axf_pair *pair, const axf_chunk *chunk, int put, int stream) {
    uint64_t row = chunk->row, skip = chunk->skip, left = chunk->nbytes;
    for (; left; ++pair, row = 0) {
        for (; left && row < pair->count; ++row, skip = 0) {
            uint64_t n = pair->length - skip;
            if (n > left) n = left;
            char *local = (char *)(pair->local + (uint64_t)(pair->local_stride * (int64_t)row) + skip);
            char *remote = (char *)(pair->remote + (uint64_t)(pair->remote_stride * (int64_t)row) + skip);
            char *to = put ? remote : local, *from = put ? local : remote;
            if (row + 1 < pair->count || left > n) axf_prefetch_row(pair, row + 1, put);
            if (stream && n >= 1024)
                axf_stream(to, from, n);
            else if (to + n <= from || from + n <= to)
                memcpy(to, from, n);
            else
                memmove(to, from, n);
            left -= n;
        }
    }
}

/* 0, or EFAULT when memory went away under the copy. */
static int axf_copy_chunk(const axf_pair *pairs, const axf_chunk *chunk, int put, int stream) {
    sigjmp_buf jump;
    if (sigsetjmp(jump, 0)) return EFAULT;
    axf_guard = &jump;
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    axf_copy_rows(pairs + chunk->pair, chunk, put, stream);
    if (stream) axf_stream_end();
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    axf_guard = 0;
    return 0;
}

/* Bytes that lie one after another, to pieces of memory, likewise. */
static int axf_scatter(const struct iovec *iov, const char *from, uint64_t left, int stream) {
    sigjmp_buf jump;
    if (sigsetjmp(jump, 0)) return EFAULT;
    axf_guard = &jump;
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    for (uint64_t n; left; ++iov, from += n, left -= n) {
        n = iov->iov_len < left ? iov->iov_len : left;
        if (stream && n >= 1024)
            axf_stream(iov->iov_base, from, n);
        else
            memcpy(iov->iov_base, from, n);
    }
    if (stream) axf_stream_end();
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    axf_guard = 0;
    return 0;
}

/* A few bytes, likewise. */
static int axf_copy_bytes(void *to, const void *from, size_t n) {
    sigjmp_buf jump;
    if (sigsetjmp(jump, 0)) return EFAULT;
    axf_guard = &jump;
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    memcpy(to, from, n);
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    axf_guard = 0;
    return 0;
}

/* Whatever else reads such memory, likewise. */
static int axf_guarded(void (*call)(void *), void *argument) {
    sigjmp_buf jump;
    if (sigsetjmp(jump, 0)) return EFAULT;
    axf_guard = &jump;
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    call(argument);
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    axf_guard = 0;
    return 0;
}

/* ---- cross-memory attach ------------------------------------------------------------------------------------- */

/* 0, or errno: ESRCH (the process is gone), EPERM, EFAULT (one side is not mapped). `moved` counts what arrived. */
static int axf_cma_chunk(const axf_pair *pairs, const axf_chunk *chunk, int put, int pid, uint64_t *moved) {
    struct iovec local[AXF_CMA_ROWS], remote[AXF_CMA_ROWS];
    const axf_pair *pair = pairs + chunk->pair;
    uint64_t row = chunk->row, skip = chunk->skip, left = chunk->nbytes;
    *moved = 0;
    while (left) {
        /* One call's worth, remembered by where it ends so that a partial call can go on. */
        unsigned n = 0;
        uint64_t want = 0;
        while (left > want && n < AXF_CMA_ROWS) {
            uint64_t bytes = pair->length - skip;
            if (bytes > left - want) bytes = left - want;
            local[n].iov_base = (void *)(pair->local + (uint64_t)(pair->local_stride * (int64_t)row) + skip);
            remote[n].iov_base = (void *)(pair->remote + (uint64_t)(pair->remote_stride * (int64_t)row) + skip);
            local[n].iov_len = remote[n].iov_len = bytes;
            want += bytes, ++n, skip = 0;
            if (++row == pair->count) ++pair, row = 0;
        }
        for (unsigned first = 0; first < n;) {
            ssize_t got = put ? process_vm_writev(pid, local + first, n - first, remote + first, n - first, 0)
                              : process_vm_readv(pid, local + first, n - first, remote + first, n - first, 0);
            if (got < 0) {
                if (errno == EINTR) continue;
                return errno;
            }
            if (got == 0) return EFAULT;
            *moved += got;
            while (first < n && (size_t)got >= local[first].iov_len) got -= local[first++].iov_len;
            if (first < n) {
                local[first].iov_base = (char *)local[first].iov_base + got, local[first].iov_len -= got;
                remote[first].iov_base = (char *)remote[first].iov_base + got, remote[first].iov_len -= got;
            }
        }
        left -= want;
    }
    return 0;
}

#endif
