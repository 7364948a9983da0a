/* The part of UCX's binary interface that we use, in our own words: nothing of UCX is needed to build.
 *
 * The functions come from the libucp that UCXX has brought into the process. Every structure begins with a mask that
 * says which of its fields are set, so later versions, which only add fields and bits, understand ours. Taken from the
 * documentation of UCX 1.19 to 1.22; tests/test_ucp.py holds it against the headers of the installed build.
 */
#ifndef ASYNCXFER_UCP_H
#define ASYNCXFER_UCP_H

#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum {
    AXF_UCS_OK = 0,
    AXF_UCS_INPROGRESS = 1,
    AXF_UCS_NO_MEMORY = -4,
    AXF_UCS_UNREACHABLE = -6,
    AXF_UCS_BUSY = -15,
    AXF_UCS_CANCELED = -16,
    AXF_UCS_LAST = -100
};

enum { AXF_OP_CALLBACK = 1 << 1, AXF_OP_ARG = 1 << 2, AXF_OP_FLAGS = 1 << 4, AXF_OP_MEMORY = 1 << 8 };
enum { AXF_AM_REPLY = 1 << 0, AXF_AM_EAGER = 1 << 1, AXF_AM_COPY_HEAD = 1 << 3 };
enum { AXF_AM_HAS_REPLY = 1 << 0, AXF_AM_IS_RNDV = 1 << 17 };
enum { AXF_CLOSE_FORCE = 1 << 0 };
enum { AXF_MEMORY_HOST = 0, AXF_MEMORY_CUDA = 1 };

typedef struct { /* of a put, a get, a flush, a message, a close */
    uint32_t mask, flags;
    void *request;
    void (*done)(void *request, int status, void *arg);
    uint64_t datatype;
    void *arg, *reply_buffer;
    int memory_type;
    void *received, *memory;
    uint64_t later[4]; /* what newer versions have added here; never in our masks */
} axf_ucp_param;

typedef struct {
    uint64_t mask; /* 1 address, 2 length, 16 memory type */
    void *address;
    size_t length;
    unsigned flags, prot;
    int memory_type;
    const void *exported;
} axf_ucp_map_param;

typedef struct {
    uint64_t attributes;
    void *reply;
} axf_ucp_am_param;

typedef int (*axf_ucp_on_am)(void *arg, const void *head, size_t head_bytes, void *data, size_t n,
                             const axf_ucp_am_param *param);

typedef struct {
    uint64_t mask; /* 1 id, 4 callback, 8 argument */
    unsigned id;
    uint32_t flags;
    axf_ucp_on_am on_am;
    void *arg;
} axf_ucp_am_handler;

typedef struct {
    const char *transport, *device;
} axf_ucp_lane;

typedef struct {
    uint64_t mask; /* 8 transports */
    char name[32];
    char addresses[2][128]; /* struct sockaddr_storage */
    struct {
        axf_ucp_lane *lanes;
        unsigned count;
        size_t lane_bytes;
    } transports;
    void *arg;
} axf_ucp_ep_attr;

typedef struct {
    uint64_t mask; /* 1 */
    size_t nbytes;
} axf_ucp_perf_param;

typedef struct {
    uint64_t mask; /* 1 */
    double seconds;
} axf_ucp_perf;

/* One entry a function: its type here, its name in UCX. */
#define AXF_UCP_FUNCTIONS(F)                                                                                          \
    F(const char *, get_version_string, (void))                                                                       \
    F(int, mem_map, (void *context, const axf_ucp_map_param *param, void **memory))                                   \
    F(int, mem_unmap, (void *context, void *memory))                                                                  \
    F(int, rkey_pack, (void *context, void *memory, void **key, size_t *n))                                           \
    F(void, rkey_buffer_release, (void *key))                                                                         \
    F(int, ep_rkey_unpack, (void *ep, const void *key, void **rkey))                                                  \
    F(void, rkey_destroy, (void *rkey))                                                                               \
    F(void *, put_nbx, (void *ep, const void *from, size_t n, uint64_t to, void *rkey, const axf_ucp_param *p))       \
    F(void *, get_nbx, (void *ep, void *to, size_t n, uint64_t from, void *rkey, const axf_ucp_param *p))             \
    F(void *, ep_flush_nbx, (void *ep, const axf_ucp_param *p))                                                       \
    F(void *, ep_close_nbx, (void *ep, const axf_ucp_param *p))                                                       \
    F(int, ep_query, (void *ep, axf_ucp_ep_attr *attr))                                                               \
    F(int, ep_evaluate_perf, (void *ep, const axf_ucp_perf_param *param, axf_ucp_perf *perf))                         \
    F(void *, am_send_nbx,                                                                                            \
      (void *ep, unsigned id, const void *head, size_t head_bytes, const void *data, size_t n,                        \
       const axf_ucp_param *p))                                                                                       \
    F(int, worker_set_am_recv_handler, (void *worker, const axf_ucp_am_handler *handler))                             \
    F(unsigned, worker_progress, (void *worker))                                                                      \
    F(int, worker_arm, (void *worker))                                                                                \
    F(int, worker_get_efd, (void *worker, int *fd))                                                                   \
    F(int, worker_signal, (void *worker))                                                                             \
    F(void, request_free, (void *request))

#define AXF_UCP_FIELD(result, name, arguments) result(*name) arguments;
typedef struct {
    void *library;
    const char *(*status_string)(int status); /* of libucs */
    AXF_UCP_FUNCTIONS(AXF_UCP_FIELD)
} axf_ucp_table;
#undef AXF_UCP_FIELD

/* Fills the table from a library that is loaded already: NULL, or the name of what it lacks. */
static inline const char *axf_ucp_bind(axf_ucp_table *t, const char *path) {
    t->library = dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
    if (!t->library) return "the library itself";
    *(void **)&t->status_string = dlsym(t->library, "ucs_status_string");
    if (!t->status_string) return "ucs_status_string";
#define AXF_UCP_LOOK_UP(result, name, arguments)                                                                      \
    *(void **)&t->name = dlsym(t->library, "ucp_" #name);                                                             \
    if (!t->name) return "ucp_" #name;
    AXF_UCP_FUNCTIONS(AXF_UCP_LOOK_UP)
#undef AXF_UCP_LOOK_UP
    return 0;
}

/* What a call that may go on gives: NULL when it is done, a request, or a status in disguise. */
static inline int axf_ucp_failed(const void *given) { return (uintptr_t)given >= (uintptr_t)(intptr_t)AXF_UCS_LAST; }
static inline int axf_ucp_status(const void *given) { return (int)(intptr_t)given; }

#endif
