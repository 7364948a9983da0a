/* A CUDA driver without a GPU, for tests: what KvikIO asks of libcuda.so.1, and no more.
 *
 * Host memory that `stub_device_memory` is told of counts as memory of GPU 0, so that KvikIO takes it for such: it has
 * a context pushed, and is copied to and from by way of a pinned buffer. All else is host memory. Copies are counted.
 *
 * In a process of its own only: whatever else looks for a GPU there would be misled.
 */
#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t address_t;

enum { SUCCESS = 0, INVALID_VALUE = 1, NOT_INITIALIZED = 3, NO_DEVICE = 100 };
enum { CONTEXT = 1, MEMORY_TYPE = 2, DEVICE_POINTER = 3, DEVICE_ORDINAL = 9 }; /* CUpointer_attribute */
enum { UNREGISTERED = 0, DEVICE = 2 };                                         /* CUmemorytype */

static address_t device_begin, device_end;
static int context, stream, copies;
static __thread int pushed;

void stub_device_memory(address_t begin, uint64_t nbytes) { device_begin = begin, device_end = begin + nbytes; }
int stub_copies(void) { return __atomic_load_n(&copies, __ATOMIC_SEQ_CST); }

static int on_device(address_t at) { return device_begin <= at && at < device_end; }

int cuInit(unsigned flags) { return flags ? INVALID_VALUE : SUCCESS; }
int cuDriverGetVersion(int *version) { return *version = 12040, SUCCESS; }
int cuGetErrorName(int error, const char **name) { return *name = error ? "CUDA_ERROR" : "CUDA_SUCCESS", SUCCESS; }
int cuGetErrorString(int error, const char **text) { return *text = error ? "stub" : "no error", SUCCESS; }

int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, ordinal ? NO_DEVICE : SUCCESS; }
int cuDeviceGetCount(int *count) { return *count = 1, SUCCESS; }
int cuDeviceGetAttribute(int *value, int which, int device) { return *value = 0, SUCCESS; }
int cuDevicePrimaryCtxRetain(void **ctx, int device) { return *ctx = &context, SUCCESS; }
int cuDevicePrimaryCtxRelease_v2(int device) { return SUCCESS; }

int cuCtxCreate_v2(void **ctx, unsigned flags, int device) { return *ctx = &context, SUCCESS; }
int cuCtxCreate_v4(void **ctx, void *params, unsigned flags, int device) { return *ctx = &context, SUCCESS; }
int cuCtxDestroy_v2(void *ctx) { return SUCCESS; }
int cuCtxPushCurrent_v2(void *ctx) { return pushed++, ctx == &context ? SUCCESS : INVALID_VALUE; }
int cuCtxPopCurrent_v2(void **ctx) { return pushed--, *ctx = &context, SUCCESS; }
int cuCtxGetCurrent(void **ctx) { return *ctx = pushed ? &context : NULL, SUCCESS; }
int cuCtxGetDevice(int *device) { return *device = 0, pushed ? SUCCESS : INVALID_VALUE; }

int cuPointerGetAttribute(void *value, int which, address_t at) {
    if (which == MEMORY_TYPE) {
        *(int *)value = on_device(at) ? DEVICE : UNREGISTERED;
        return SUCCESS;
    }
    if (!on_device(at))
        return INVALID_VALUE;
    switch (which) {
    case CONTEXT: *(void **)value = &context; return SUCCESS;
    case DEVICE_POINTER: *(address_t *)value = at; return SUCCESS;
    case DEVICE_ORDINAL: *(int *)value = 0; return SUCCESS;
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

int cuMemHostAlloc(void **at, size_t nbytes, unsigned flags) { return posix_memalign(at, 4096, nbytes) ? 2 : SUCCESS; }
int cuMemFreeHost(void *at) { return free(at), SUCCESS; }
int cuMemHostRegister_v2(void *at, size_t nbytes, unsigned flags) { return SUCCESS; }
int cuMemHostUnregister(void *at) { return SUCCESS; }

/* A copy has the GPU on one side, all of it, and a context to be made in. */
int cuMemcpyAsync(address_t to, address_t from, size_t nbytes, void *in) {
    address_t device = on_device(to) ? to : from;
    if (!pushed || !on_device(device) || (nbytes && !on_device(device + nbytes - 1)))
        return INVALID_VALUE;
    memcpy((void *)to, (void *)from, nbytes);
    __atomic_add_fetch(&copies, 1, __ATOMIC_SEQ_CST);
    return SUCCESS;
}
int cuMemcpyHtoDAsync_v2(address_t to, void *from, size_t n, void *in) { return cuMemcpyAsync(to, (address_t)from, n, in); }
int cuMemcpyDtoHAsync_v2(void *to, address_t from, size_t n, void *in) { return cuMemcpyAsync((address_t)to, from, n, in); }

int cuStreamCreate(void **made, unsigned flags) { return *made = &stream, SUCCESS; }
int cuStreamDestroy_v2(void *which) { return SUCCESS; }
int cuStreamSynchronize(void *which) { return SUCCESS; }
int cuEventCreate(void **event, unsigned flags) { return *event = &stream, SUCCESS; }
int cuEventDestroy_v2(void *event) { return SUCCESS; }
int cuEventRecord(void *event, void *in) { return SUCCESS; }
int cuEventQuery(void *event) { return SUCCESS; }
int cuEventSynchronize(void *event) { return SUCCESS; }
int cuLaunchHostFunc(void *in, void (*call)(void *), void *with) { return call(with), SUCCESS; }
