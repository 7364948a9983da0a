/* What moving bytes to and from files needs of the system and Cython does not say. Knows neither transfers nor rings. */
#ifndef ASYNCXFER_FILEIO_H
#define ASYNCXFER_FILEIO_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

#ifndef RWF_NOWAIT
#define RWF_NOWAIT 0x00000008
#endif

/* Gives what is left. */
static inline int axf_down(int *p, int by) { return __atomic_sub_fetch(p, by, __ATOMIC_SEQ_CST); }

/* Whether a file's pages are all there is of it: tmpfs, ramfs. No device is waited for, and the kernel's way of
 * saying "not now" is not offered. */
static inline int axf_file_in_memory(int fd) {
    struct statfs s;
    return fstatfs(fd, &s) == 0 && ((uint32_t)s.f_type == 0x01021994u || (uint32_t)s.f_type == 0x858458f6u);
}

/* Whether it lies on, or is, a device that a hypervisor plays by virtio, as far as sysfs tells. */
static inline int axf_file_emulated(int fd) {
    struct stat s;
    char name[64], path[1024];
    if (fstat(fd, &s) != 0) return 0;
    dev_t device = S_ISBLK(s.st_mode) ? s.st_rdev : s.st_dev;
    snprintf(name, sizeof name, "/sys/dev/block/%u:%u", major(device), minor(device));
    ssize_t n = readlink(name, path, sizeof path - 1);
    path[n < 0 ? 0 : n] = 0;
    return strstr(path, "/virtio") != 0;
}

/* How long it is; UINT64_MAX where that does not change under a transfer, as with a device. */
static inline uint64_t axf_file_size(int fd) {
    struct stat s;
    return fstat(fd, &s) == 0 && S_ISREG(s.st_mode) ? (uint64_t)s.st_size : UINT64_MAX;
}

/* Whether the page cache has all of a range, as far as it may be told; -errno where it may not: before Linux 6.5, or
 * by the rights on the file. */
static inline int axf_file_cached(int fd, uint64_t offset, uint64_t nbytes) {
    uint64_t range[2] = {offset, nbytes}, found[5], page = 4096;
    if (syscall(451, fd, range, found, 0) != 0) return -errno; /* cachestat: the same on every architecture */
    return found[0] >= (offset + nbytes + page - 1) / page - offset / page;
}

/* What follows after the first `got` bytes; `out` has room for n. */
static inline uint32_t axf_iov_rest(const struct iovec *iov, uint32_t n, uint64_t got, struct iovec *out) {
    uint32_t i = 0, k = 0;
    while (i < n && got >= iov[i].iov_len) got -= iov[i++].iov_len;
    for (; i < n; ++i, ++k, got = 0) {
        out[k].iov_base = (char *)iov[i].iov_base + got;
        out[k].iov_len = iov[i].iov_len - got;
    }
    return k;
}

/* One call: bytes, or -errno. */
static inline int64_t axf_file_move(int fd, const struct iovec *iov, uint32_t n, uint64_t offset, int write, int nowait) {
    for (;;) {
        ssize_t rc;
        if (write)
            rc = n == 1 ? pwrite(fd, iov->iov_base, iov->iov_len, offset) : pwritev(fd, iov, n, offset);
        else if (nowait)
            rc = preadv2(fd, iov, n, offset, RWF_NOWAIT);
        else
            rc = n == 1 ? pread(fd, iov->iov_base, iov->iov_len, offset) : preadv(fd, iov, n, offset);
        if (rc >= 0) return rc;
        if (errno != EINTR) return -errno;
    }
}

static inline int axf_file_sync(int fd, int whole) {
    for (;;) {
        if ((whole ? fsync(fd) : fdatasync(fd)) == 0) return 0;
        if (errno != EINTR) return errno;
    }
}

#endif
