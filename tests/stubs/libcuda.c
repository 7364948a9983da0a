/* A CUDA driver without a GPU, for tests: what KvikIO and asyncxfer ask of libcuda.so.1, and no more.
 *
 * Memory of a GPU is of two kinds. Host memory that `stub_device_memory` is told of counts as memory of GPU 0, so that
 * KvikIO takes it for such; copies to and from it are made at once. Memory from `stub_allocate` is of any of the GPUs,
 * and whoever touches it but by a copy of the driver dies: its bytes lie elsewhere, where `stub_shadow` says. Copies to
 * and from that are made when an event behind them is waited for, and no sooner, in a context of its GPU, on a stream of
 * that context, and from and to pinned memory: what a real driver may do late, or badly, is done so here.
 *
 * In a process of its own only: whatever else looks for a GPU there would be misled.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef uint64_t address_t;

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_DEVICE = 101 };
enum { INVALID_CONTEXT = 201, INVALID_HANDLE = 400 };
enum { CONTEXT = 1, MEMORY_TYPE = 2, DEVICE_POINTER = 3, DEVICE_ORDINAL = 9 }; /* CUpointer_attribute */
enum { UNREGISTERED = 0, DEVICE = 2 };                                         /* CUmemorytype */
enum { DEVICES = 8, BLOCKS = 64, DEPTH = 16 };

struct copy {
    struct copy *next;
    void *to;
    const void *from;
    size_t nbytes;
};

struct stream {
    int device;
    struct copy *first, **last;
    long asked, made;
};

struct event {
    int device;
    struct stream *stream;
    long position;
};

struct block {
    address_t begin;
    char *shadow;
    size_t nbytes;
    int device;
};

static address_t device_begin, device_end;
static int contexts[DEVICES], devices = 1, copies, held, waiting, live;
static struct block blocks[BLOCKS], pinned[BLOCKS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static __thread int pushed, stack[DEPTH];

/* ---- what tests say and ask */

static char failing[64];
static int spared, failure;

void stub_devices(int count) { devices = count; }
void stub_device_memory(address_t begin, uint64_t nbytes) { device_begin = begin, device_end = begin + nbytes; }
int stub_copies(void) { return __atomic_load_n(&copies, __ATOMIC_SEQ_CST); }
/* Contexts, streams, events and pinned memory that have not been given back. */
int stub_live(void) { return __atomic_load_n(&live, __ATOMIC_SEQ_CST); }
/* How many threads wait for an event that is held back. */
int stub_waiting(void) { return __atomic_load_n(&waiting, __ATOMIC_SEQ_CST); }

/* A function does what it is for so many times more, then says this; no name: all do. */
void stub_fail(const char *name, int times, int error) {
    pthread_mutex_lock(&lock);
    strncpy(failing, name, sizeof failing - 1);
    spared = times, failure = error;
    pthread_mutex_unlock(&lock);
}

/* Hold back all events, or let them come. */
void stub_hold(int on) {
    pthread_mutex_lock(&lock);
    held = on;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

address_t stub_allocate(int device, uint64_t nbytes) {
    int fd = memfd_create("stub of a GPU", 0);
    for (struct block *block = blocks; fd >= 0 && block < blocks + BLOCKS; block++) {
        if (block->nbytes || ftruncate(fd, nbytes))
            continue;
        block->begin = (address_t)mmap(NULL, nbytes, PROT_NONE, MAP_SHARED, fd, 0);
        block->shadow = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        block->nbytes = nbytes, block->device = device;
        close(fd);
        return block->begin;
    }
    return 0;
}

static struct block *find(struct block *among, address_t at) {
    for (struct block *block = among; block < among + BLOCKS; block++)
        if (block->begin <= at && at < block->begin + block->nbytes)
            return block;
    return NULL;
}

void *stub_shadow(address_t at) { return find(blocks, at)->shadow; }

void stub_free(address_t at) {
    struct block *block = find(blocks, at);
    munmap((void *)block->begin, block->nbytes);
    munmap(block->shadow, block->nbytes);
    memset(block, 0, sizeof *block);
}

static int fails(const char *name) {
    pthread_mutex_lock(&lock);
    int error = strcmp(failing, name) || spared-- > 0 ? SUCCESS : failure;
    pthread_mutex_unlock(&lock);
    return error;
}

#define MAY_FAIL                 \
    int error = fails(__func__); \
    if (error)                   \
        return error

static void count(int more) { __atomic_add_fetch(&live, more, __ATOMIC_SEQ_CST); }

/* ---- the driver */

int cuInit(unsigned flags) {
    MAY_FAIL;
    return flags ? INVALID_VALUE : SUCCESS;
}
int cuDriverGetVersion(int *version) { return *version = 12040, SUCCESS; }
int cuGetErrorName(int error, const char **name) { return *name = error ? "CUDA_ERROR" : "CUDA_SUCCESS", SUCCESS; }
int cuGetErrorString(int error, const char **text) { return *text = error ? "stub" : "no error", SUCCESS; }

int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, ordinal < devices ? SUCCESS : INVALID_DEVICE; }
int cuDeviceGetCount(int *count) { return *count = devices, SUCCESS; }
int cuDeviceGetAttribute(int *value, int which, int device) { return *value = 0, SUCCESS; }
int cuDevicePrimaryCtxRetain(void **ctx, int device) {
    MAY_FAIL;
    return *ctx = contexts + device, count(1), SUCCESS;
}
int cuDevicePrimaryCtxRelease_v2(int device) { return count(-1), SUCCESS; }

int cuCtxCreate_v2(void **ctx, unsigned flags, int device) { return *ctx = contexts + device, SUCCESS; }
int cuCtxCreate_v4(void **ctx, void *params, unsigned flags, int device) { return *ctx = contexts + device, SUCCESS; }
int cuCtxDestroy_v2(void *ctx) { return SUCCESS; }
int cuCtxPushCurrent_v2(void *ctx) {
    MAY_FAIL;
    if ((int *)ctx < contexts || (int *)ctx >= contexts + devices || pushed == DEPTH)
        return INVALID_CONTEXT;
    return stack[pushed++] = (int *)ctx - contexts, SUCCESS;
}
int cuCtxPopCurrent_v2(void **ctx) {
    if (!pushed)
        return INVALID_CONTEXT;
    return *ctx = contexts + stack[--pushed], SUCCESS;
}
static int current(void) { return pushed ? stack[pushed - 1] : -1; }
int cuCtxGetCurrent(void **ctx) { return *ctx = pushed ? contexts + current() : NULL, SUCCESS; }
int cuCtxGetDevice(int *device) { return *device = current(), pushed ? SUCCESS : INVALID_CONTEXT; }

static int on_device(address_t at) { return device_begin <= at && at < device_end; }

int cuPointerGetAttribute(void *value, int which, address_t at) {
    struct block *block = find(blocks, at);
    int of_gpu = block || on_device(at), device = block ? block->device : 0;
    if (which == MEMORY_TYPE) {
        *(int *)value = of_gpu ? DEVICE : UNREGISTERED;
        return SUCCESS;
    }
    if (!of_gpu)
        return INVALID_VALUE;
    switch (which) {
    case CONTEXT: *(void **)value = contexts + device; return SUCCESS;
    case DEVICE_POINTER: *(address_t *)value = at; return SUCCESS;
    case DEVICE_ORDINAL: *(int *)value = device; return SUCCESS;
    }
    return INVALID_VALUE;
}

int cuPointerGetAttributes(unsigned count, const int *which, void **values, address_t at) {
    for (unsigned i = 0; i < count; i++) {
        int status = cuPointerGetAttribute(values[i], which[i], at);
        if (status != SUCCESS)
            return status;
    }
    return SUCCESS;
}

int cuMemGetAddressRange_v2(address_t *base, size_t *nbytes, address_t at) {
    if (!on_device(at) || !pushed)
        return INVALID_VALUE;
    return *base = device_begin, *nbytes = device_end - device_begin, SUCCESS;
}

int cuMemHostAlloc(void **at, size_t nbytes, unsigned flags) {
    MAY_FAIL;
    if (!pushed)
        return INVALID_CONTEXT;
    if (posix_memalign(at, 4096, nbytes))
        return OUT_OF_MEMORY;
    pthread_mutex_lock(&lock);
    struct block *block = pinned;
    while (block < pinned + BLOCKS - 1 && block->nbytes)
        block++;
    *block = (struct block){.begin = (address_t)*at, .nbytes = nbytes};
    pthread_mutex_unlock(&lock);
    return count(1), SUCCESS;
}
int cuMemFreeHost(void *at) {
    pthread_mutex_lock(&lock);
    struct block *block = find(pinned, (address_t)at);
    if (block)
        memset(block, 0, sizeof *block);
    pthread_mutex_unlock(&lock);
    return free(at), count(-1), block && pushed ? SUCCESS : INVALID_VALUE;
}
int cuMemHostRegister_v2(void *at, size_t nbytes, unsigned flags) { return SUCCESS; }
int cuMemHostUnregister(void *at) { return SUCCESS; }

int cuStreamCreate(void **made, unsigned flags) {
    MAY_FAIL;
    struct stream *stream = calloc(1, sizeof *stream);
    stream->device = current(), stream->last = &stream->first;
    return *made = stream, count(1), SUCCESS;
}

/* Make the copies of a stream, those up to a position. */
static void make(struct stream *stream, long position) {
    while (stream->made < position) {
        struct copy *copy = stream->first;
        stream->first = copy->next;
        if (!stream->first)
            stream->last = &stream->first;
        memcpy(copy->to, copy->from, copy->nbytes);
        free(copy);
        stream->made++;
        __atomic_add_fetch(&copies, 1, __ATOMIC_SEQ_CST);
    }
}

int cuStreamSynchronize(void *which) {
    struct stream *stream = which;
    pthread_mutex_lock(&lock);
    make(stream, stream->asked);
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}
int cuStreamDestroy_v2(void *which) { return cuStreamSynchronize(which), free(which), count(-1), SUCCESS; }

int cuEventCreate(void **made, unsigned flags) {
    MAY_FAIL;
    struct event *event = calloc(1, sizeof *event);
    event->device = current();
    return *made = event, count(1), pushed ? SUCCESS : INVALID_CONTEXT;
}
int cuEventDestroy_v2(void *event) { return free(event), count(-1), SUCCESS; }
int cuEventRecord(void *which, void *in) {
    MAY_FAIL;
    struct event *event = which;
    event->stream = in;
    if (!in)
        return SUCCESS;
    if (event->device != event->stream->device)
        return INVALID_HANDLE;
    pthread_mutex_lock(&lock);
    event->position = event->stream->asked;
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}
int cuEventQuery(void *event) { return SUCCESS; }
int cuEventSynchronize(void *which) {
    struct event *event = which;
    pthread_mutex_lock(&lock);
    __atomic_add_fetch(&waiting, 1, __ATOMIC_SEQ_CST);
    while (held)
        pthread_cond_wait(&changed, &lock);
    __atomic_add_fetch(&waiting, -1, __ATOMIC_SEQ_CST);
    if (event->stream)
        make(event->stream, event->position);
    pthread_mutex_unlock(&lock);
    MAY_FAIL;
    return SUCCESS;
}
int cuThreadExchangeStreamCaptureMode(int *mode) { return *mode = 0, SUCCESS; }
int cuLaunchHostFunc(void *in, void (*call)(void *), void *with) { return call(with), SUCCESS; }

/* A copy has the GPU on one side, all of it, and a context to be made in. */
static int at_once(address_t to, address_t from, size_t nbytes) {
    address_t device = on_device(to) ? to : from;
    if (!pushed || !on_device(device) || (nbytes && !on_device(device + nbytes - 1)))
        return INVALID_VALUE;
    memcpy((void *)to, (void *)from, nbytes);
    __atomic_add_fetch(&copies, 1, __ATOMIC_SEQ_CST);
    return SUCCESS;
}

static int later(struct block *gpu, address_t at, address_t host, size_t nbytes, struct stream *stream, int to_gpu) {
    if (at + nbytes > gpu->begin + gpu->nbytes)
        return INVALID_VALUE;
    if (current() != gpu->device)
        return INVALID_CONTEXT;
    if (!stream || stream->device != gpu->device)
        return INVALID_HANDLE;
    char *there = gpu->shadow + (at - gpu->begin);
    struct copy *copy = calloc(1, sizeof *copy);
    pthread_mutex_lock(&lock);
    struct block *buffer = find(pinned, host);
    int fits = buffer && host + nbytes <= buffer->begin + buffer->nbytes;
    if (fits) {
        *copy = (struct copy){.to = to_gpu ? there : (char *)host, .from = to_gpu ? (char *)host : there, .nbytes = nbytes};
        *stream->last = copy, stream->last = &copy->next;
        stream->asked++;
    } else {
        free(copy);
    }
    pthread_mutex_unlock(&lock);
    return fits ? SUCCESS : INVALID_VALUE;
}

int cuMemcpyAsync(address_t to, address_t from, size_t nbytes, void *in) { return at_once(to, from, nbytes); }
int cuMemcpyHtoDAsync_v2(address_t to, void *from, size_t nbytes, void *in) {
    MAY_FAIL;
    struct block *gpu = find(blocks, to);
    return gpu ? later(gpu, to, (address_t)from, nbytes, in, 1) : at_once(to, (address_t)from, nbytes);
}
int cuMemcpyDtoHAsync_v2(void *to, address_t from, size_t nbytes, void *in) {
    MAY_FAIL;
    struct block *gpu = find(blocks, from);
    return gpu ? later(gpu, from, (address_t)to, nbytes, in, 0) : at_once((address_t)to, from, nbytes);
}
