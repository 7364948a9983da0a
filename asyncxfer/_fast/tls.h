/* TLS 1.3 over a non-blocking socket, by an OpenSSL that is found at run time: a table of its functions, and one
 * connection's state.
 *
 * Included by tls.pyx alone, since the table is one per process. No header of OpenSSL is needed: what is declared here
 * is the same in 1.1.1 and 3. A connection reads the socket in large pieces (OpenSSL's read-ahead) and sends several
 * records by one system call, from a buffer of its own; a socket's SIGPIPE is not raised. A connection that another
 * user of the library has made can be taken over for the time after its handshake. One thread at a time; nothing here
 * knows Python.
 */
#ifndef ASYNCXFER_TLS_H
#define ASYNCXFER_TLS_H

#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include "native.h"

/* ---- the functions ------------------------------------------------------------------------------------------- */

#define AXF_TLS_FUNCTIONS(F)                                                                                     \
    F(const void *, TLS_method, (void))                                                                          \
    F(void *, SSL_CTX_new, (const void *method))                                                                 \
    F(void, SSL_CTX_free, (void *context))                                                                       \
    F(long, SSL_CTX_ctrl, (void *context, int command, long number, void *pointer))                              \
    F(uint64_t, SSL_CTX_set_options, (void *context, uint64_t options))                                          \
    F(void, SSL_CTX_set_verify, (void *context, int mode, void *callback))                                       \
    F(int, SSL_CTX_set_ciphersuites, (void *context, const char *names))                                         \
    F(int, SSL_CTX_set_num_tickets, (void *context, size_t n))                                                   \
    F(void, SSL_CTX_set_default_read_buffer_len, (void *context, size_t n))                                      \
    F(int, SSL_CTX_use_certificate, (void *context, void *certificate))                                          \
    F(int, SSL_CTX_use_PrivateKey, (void *context, void *key))                                                   \
    F(int, SSL_CTX_check_private_key, (const void *context))                                                     \
    F(void *, SSL_CTX_get_cert_store, (const void *context))                                                     \
    F(void *, SSL_new, (void *context))                                                                          \
    F(void, SSL_free, (void *ssl))                                                                               \
    F(void, SSL_set_bio, (void *ssl, void *reading, void *writing))                                              \
    F(void, SSL_set_accept_state, (void *ssl))                                                                   \
    F(void, SSL_set_connect_state, (void *ssl))                                                                  \
    F(int, SSL_do_handshake, (void *ssl))                                                                        \
    F(int, SSL_read, (void *ssl, void *to, int n))                                                               \
    F(int, SSL_write, (void *ssl, const void *from, int n))                                                      \
    F(int, SSL_shutdown, (void *ssl))                                                                            \
    F(int, SSL_key_update, (void *ssl, int kind))                                                                \
    F(int, SSL_get_error, (const void *ssl, int result))                                                         \
    F(int, SSL_has_pending, (const void *ssl))                                                                   \
    F(long, SSL_get_verify_result, (const void *ssl))                                                            \
    F(void *, SSL_get_ex_data, (const void *ssl, int index))                                                     \
    F(int, SSL_version, (const void *ssl))                                                                       \
    F(const char *, SSL_get_cipher_list, (const void *ssl, int rank))                                            \
    F(int, SSL_set_ciphersuites, (void *ssl, const char *names))                                                 \
    F(void, SSL_set_read_ahead, (void *ssl, int on))                                                             \
    F(void, SSL_set_default_read_buffer_len, (void *ssl, size_t n))                                              \
    F(const void *, SSL_get_current_cipher, (const void *ssl))                                                   \
    F(const char *, SSL_CIPHER_get_name, (const void *cipher))                                                   \
    F(int, BIO_get_new_index, (void))                                                                            \
    F(void *, BIO_meth_new, (int type, const char *name))                                                        \
    F(int, BIO_meth_set_read, (void *method, int (*read)(void *, char *, int)))                                  \
    F(int, BIO_meth_set_write, (void *method, int (*write)(void *, const char *, int)))                          \
    F(int, BIO_meth_set_ctrl, (void *method, long (*ctrl)(void *, int, long, void *)))                           \
    F(void *, BIO_new, (const void *method))                                                                     \
    F(void *, BIO_new_mem_buf, (const void *from, int n))                                                        \
    F(int, BIO_free, (void *bio))                                                                                \
    F(void, BIO_set_data, (void *bio, void *data))                                                               \
    F(void *, BIO_get_data, (void *bio))                                                                         \
    F(void, BIO_set_init, (void *bio, int on))                                                                   \
    F(void, BIO_set_flags, (void *bio, int flags))                                                               \
    F(void, BIO_clear_flags, (void *bio, int flags))                                                             \
    F(void *, PEM_read_bio_X509, (void *bio, void **to, void *callback, void *password))                         \
    F(void *, PEM_read_bio_PrivateKey, (void *bio, void **to, void *callback, void *password))                   \
    F(void, X509_free, (void *certificate))                                                                      \
    F(void, EVP_PKEY_free, (void *key))                                                                          \
    F(int, X509_STORE_add_cert, (void *store, void *certificate))                                                \
    F(int, i2d_X509, (const void *certificate, unsigned char **to))                                              \
    F(const char *, X509_verify_cert_error_string, (long code))                                                  \
    F(unsigned long, ERR_get_error, (void))                                                                      \
    F(unsigned long, ERR_peek_last_error, (void))                                                                \
    F(void, ERR_clear_error, (void))                                                                             \
    F(const char *, ERR_reason_error_string, (unsigned long code))                                               \
    F(const char *, OpenSSL_version, (int what))

#define AXF_TLS_POINTER(type, name, arguments) type(*name) arguments;
static struct {
    AXF_TLS_FUNCTIONS(AXF_TLS_POINTER)
    void *(*peer_certificate)(const void *ssl); /* what 3.0 renamed */
    void *bio;                                  /* our kind of BIO */
} axf_ssl;

/* Constants of OpenSSL's headers that are part of its ABI. */
enum {
    AXF_SSL_ERROR_WANT_READ = 2,
    AXF_SSL_ERROR_WANT_WRITE = 3,
    AXF_SSL_ERROR_SYSCALL = 5,
    AXF_SSL_ERROR_ZERO_RETURN = 6,
    AXF_SSL_CTRL_MODE = 33,
    AXF_SSL_CTRL_READ_AHEAD = 41,
    AXF_SSL_CTRL_SESSION_CACHE = 44,
    AXF_SSL_CTRL_CHAIN_CERT = 89,
    AXF_SSL_CTRL_MIN_VERSION = 123,
    AXF_SSL_MODE = 1 | 2 | 4, /* ENABLE_PARTIAL_WRITE, ACCEPT_MOVING_WRITE_BUFFER, AUTO_RETRY */
    AXF_SSL_VERIFY = 1 | 2,   /* PEER, FAIL_IF_NO_PEER_CERT */
    AXF_SSL_OPTIONS = 1 << 22 | 1 << 14, /* CIPHER_SERVER_PREFERENCE, NO_TICKET */
    AXF_SSL_VERSION_1_3 = 0x0304,
    AXF_BIO_TYPE_SOURCE_SINK = 0x0400,
    AXF_BIO_READ = 1,
    AXF_BIO_WRITE = 2,
    AXF_BIO_RETRY = 8,
    AXF_BIO_CTRL_EOF = 2,
    AXF_BIO_CTRL_FLUSH = 11,
};

/* ---- a connection -------------------------------------------------------------------------------------------- */

#define AXF_TLS_RECORD 16384                 /* RFC 8446, 5.1: the most that one record carries */
#define AXF_TLS_BATCH (8 * AXF_TLS_RECORD)   /* plain bytes encrypted before they are sent */
#define AXF_TLS_OUT (8 * (AXF_TLS_RECORD + 256) + 4096)  /* what those become, and the protocol's own */
#define AXF_TLS_READ_AHEAD (8 * (AXF_TLS_RECORD + 256))

enum { AXF_TLS_DONE = 0, AXF_TLS_WANT_READ = 1, AXF_TLS_WANT_WRITE = 2, AXF_TLS_FAILED = 3 };

typedef struct {
    void *ssl;
    int fd;
    int failed;   /* the errno with which it failed; nothing goes over it any more */
    int ended;    /* the peer said that it sends no more */
    int eof;      /* the socket ended, whatever the peer said */
    int socket_error;
    size_t at, end;       /* records in `out` that the kernel has not taken yet */
    size_t ahead;         /* plain bytes inside them, not yet reported as written */
    uint64_t since;       /* plain bytes since the key for sending was new */
    uint64_t rekey;       /* and how many there may be */
    uint64_t updates;
    int unsendable;       /* the errno with which the socket took no more; what it has may still be read */
    char reason[192];
    unsigned char out[AXF_TLS_OUT];
} axf_tls;

static int axf_tls_bio_read(void *bio, char *to, int n) {
    axf_tls *tls = axf_ssl.BIO_get_data(bio);
    ssize_t got;
    axf_ssl.BIO_clear_flags(bio, AXF_BIO_READ | AXF_BIO_WRITE | AXF_BIO_RETRY);
    do
        got = recv(tls->fd, to, n, MSG_DONTWAIT);
    while (got < 0 && errno == EINTR);
    if (got == 0) tls->eof = 1;
    if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
        axf_ssl.BIO_set_flags(bio, AXF_BIO_READ | AXF_BIO_RETRY);
    else if (got < 0)
        tls->socket_error = errno;
    return (int)got;
}

/* Never fails for want of room on a correct path: what is encrypted at once fits, and a handshake is flushed. */
static int axf_tls_bio_write(void *bio, const char *from, int n) {
    axf_tls *tls = axf_ssl.BIO_get_data(bio);
    size_t room = AXF_TLS_OUT - tls->end;
    axf_ssl.BIO_clear_flags(bio, AXF_BIO_READ | AXF_BIO_WRITE | AXF_BIO_RETRY);
    if (!room) {
        axf_ssl.BIO_set_flags(bio, AXF_BIO_WRITE | AXF_BIO_RETRY);
        return -1;
    }
    if ((size_t)n > room) n = (int)room;
    memcpy(tls->out + tls->end, from, n);
    tls->end += n;
    return n;
}

static long axf_tls_bio_ctrl(void *bio, int command, long number, void *pointer) {
    axf_tls *tls = axf_ssl.BIO_get_data(bio);
    if (command == AXF_BIO_CTRL_EOF) return tls->eof;
    return command == AXF_BIO_CTRL_FLUSH;
}

/* Fills the table; 0, or the name of what the library does not have. */
static const char *axf_tls_load(void *library) {
#define AXF_TLS_FIND(type, name, arguments) \
    if (!(*(void **)&axf_ssl.name = dlsym(library, #name))) return #name;
    AXF_TLS_FUNCTIONS(AXF_TLS_FIND)
#undef AXF_TLS_FIND
    *(void **)&axf_ssl.peer_certificate = dlsym(library, "SSL_get1_peer_certificate");
    if (!axf_ssl.peer_certificate) *(void **)&axf_ssl.peer_certificate = dlsym(library, "SSL_get_peer_certificate");
    if (!axf_ssl.peer_certificate) return "SSL_get1_peer_certificate";
    axf_ssl.bio = axf_ssl.BIO_meth_new(axf_ssl.BIO_get_new_index() | AXF_BIO_TYPE_SOURCE_SINK, "asyncxfer socket");
    if (!axf_ssl.bio || !axf_ssl.BIO_meth_set_read(axf_ssl.bio, axf_tls_bio_read) ||
        !axf_ssl.BIO_meth_set_write(axf_ssl.bio, axf_tls_bio_write) ||
        !axf_ssl.BIO_meth_set_ctrl(axf_ssl.bio, axf_tls_bio_ctrl))
        return "a BIO of our own";
    return 0;
}

/* Passes what is encrypted to the kernel: 1 when all of it went, 0 when the socket is full, -1 when it broke. */
static int axf_tls_flush(axf_tls *tls) {
    while (tls->at < tls->end) {
        ssize_t sent = send(tls->fd, tls->out + tls->at, tls->end - tls->at, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent >= 0)
            tls->at += sent;
        else if (errno == EAGAIN || errno == EWOULDBLOCK)
            return 0;
        else if (errno != EINTR) {
            tls->socket_error = errno;
            return -1;
        }
    }
    tls->at = tls->end = 0;
    return 1;
}

/* Keeps why it failed, for good: a socket's error as itself, an end that was not announced as ECONNRESET, anything
 * that is wrong with the protocol or a certificate as EIO. */
static void axf_tls_fail(axf_tls *tls) {
    unsigned long code = axf_ssl.ERR_peek_last_error(); /* those before it say what led to it */
    const char *text = code ? axf_ssl.ERR_reason_error_string(code) : 0;
    long verdict = axf_ssl.SSL_get_verify_result(tls->ssl);
    if (tls->socket_error) {
        tls->failed = tls->socket_error;
        snprintf(tls->reason, sizeof tls->reason, "%s", strerror(tls->socket_error));
    } else if (tls->eof) {
        tls->failed = ECONNRESET;
        snprintf(tls->reason, sizeof tls->reason, "the connection ended without the end that TLS announces");
    } else {
        tls->failed = EIO;
        snprintf(tls->reason, sizeof tls->reason, "%s%s%s", text ? text : "protocol failure", verdict ? ": " : "",
                 verdict ? axf_ssl.X509_verify_cert_error_string(verdict) : "");
    }
    if (!tls->socket_error) axf_tls_flush(tls); /* the alert that tells the peer why */
    axf_ssl.ERR_clear_error();                  /* the queue is the thread's, and Python's ssl reads it too */
}

static axf_tls *axf_tls_new(void *context, int fd, int server, uint64_t rekey) {
    axf_tls *tls = calloc(1, sizeof *tls);
    void *bio = tls ? axf_ssl.BIO_new(axf_ssl.bio) : 0;
    if (tls) tls->ssl = axf_ssl.SSL_new(context);
    if (!bio || !tls->ssl) {
        if (bio) axf_ssl.BIO_free(bio);
        if (tls && tls->ssl) axf_ssl.SSL_free(tls->ssl);
        free(tls);
        return 0;
    }
    tls->fd = fd;
    tls->rekey = rekey;
    axf_ssl.BIO_set_data(bio, tls);
    axf_ssl.BIO_set_init(bio, 1);
    axf_ssl.SSL_set_bio(tls->ssl, bio, bio);
    if (server)
        axf_ssl.SSL_set_accept_state(tls->ssl);
    else
        axf_ssl.SSL_set_connect_state(tls->ssl);
    return tls;
}

static void axf_tls_free(axf_tls *tls) {
    axf_ssl.SSL_free(tls->ssl);
    free(tls);
}

static int axf_tls_handshake(axf_tls *tls) {
    if (tls->failed) return AXF_TLS_FAILED;
    for (;;) {
        axf_ssl.ERR_clear_error();
        int result = axf_ssl.SSL_do_handshake(tls->ssl);
        int error = result == 1 ? 0 : axf_ssl.SSL_get_error(tls->ssl, result);
        if (error && error != AXF_SSL_ERROR_WANT_READ && error != AXF_SSL_ERROR_WANT_WRITE) break;
        int flushed = axf_tls_flush(tls);
        if (flushed < 0) break;
        if (!flushed) return AXF_TLS_WANT_WRITE;
        if (!error) return AXF_TLS_DONE;
        if (error == AXF_SSL_ERROR_WANT_READ) return AXF_TLS_WANT_READ;
    }
    axf_tls_fail(tls);
    return AXF_TLS_FAILED;
}

static ssize_t axf_tls_read(axf_tls *tls, char *to, size_t n) {
    size_t total = 0;
    axf_ssl.ERR_clear_error();
    while (total < n && !tls->failed && !tls->ended) {
        size_t ask = n - total;
        int got = axf_ssl.SSL_read(tls->ssl, to + total, ask < INT_MAX ? (int)ask : INT_MAX);
        if (got > 0) {
            total += got;
            continue;
        }
        int error = axf_ssl.SSL_get_error(tls->ssl, got);
        if (error == AXF_SSL_ERROR_WANT_READ || error == AXF_SSL_ERROR_WANT_WRITE) {
            if (!tls->ahead) axf_tls_flush(tls); /* an answer that the protocol itself had to give */
            break;
        }
        if (error == AXF_SSL_ERROR_ZERO_RETURN)
            tls->ended = 1;
        else
            axf_tls_fail(tls);
    }
    if (total) return total;
    if (tls->failed) {
        errno = tls->failed;
        return -1;
    }
    if (tls->ended || !n) return 0;
    errno = EAGAIN;
    return -1;
}

/* Encrypts records into the empty buffer, a batch at most. 0, or -1 after a failure. */
static int axf_tls_encrypt(axf_tls *tls, const char *from, size_t n) {
    if (n > AXF_TLS_BATCH) n = AXF_TLS_BATCH;
    axf_ssl.ERR_clear_error();
    if (tls->since >= tls->rekey) {
        if (axf_ssl.SSL_key_update(tls->ssl, 0) != 1) return -1; /* 0: the peer need not change its own */
        tls->since = 0;
        tls->updates++;
    }
    while (tls->ahead < n) {
        size_t left = n - tls->ahead;
        int took = axf_ssl.SSL_write(tls->ssl, from + tls->ahead, left < AXF_TLS_RECORD ? (int)left : AXF_TLS_RECORD);
        if (took <= 0) return -1;
        tls->ahead += took;
    }
    tls->since += n;
    return 0;
}

static ssize_t axf_tls_write(axf_tls *tls, const char *from, size_t n) {
    size_t total = 0;
    if (tls->failed || n < tls->ahead) {
        errno = tls->failed ? tls->failed : EINVAL;
        return -1;
    }
    for (;;) {
        int flushed = axf_tls_flush(tls);
        if (!flushed) break;
        if (flushed > 0) {
            total += tls->ahead;
            tls->ahead = 0;
            if (total == n) return total;
        }
        if (flushed < 0 || axf_tls_encrypt(tls, from + total, n - total) < 0) {
            axf_tls_fail(tls);
            errno = tls->failed;
            return -1;
        }
    }
    if (total) return total;
    errno = EAGAIN;
    return -1;
}

/* ---- one that Python's ssl made -------------------------------------------------------------------------------- */

/* Before the handshake: what OpenSSL reads at once, and which cipher it would like. */
static void axf_tls_prepare(void *ssl) {
    static const char *const usual[] = {
        "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256", "TLS_AES_128_GCM_SHA256", 0};
    int rank = 0;
    const char *name;
    axf_ssl.SSL_set_read_ahead(ssl, 1);
    axf_ssl.SSL_set_default_read_buffer_len(ssl, AXF_TLS_READ_AHEAD);
    while (usual[rank] && (name = axf_ssl.SSL_get_cipher_list(ssl, rank)) && !strcmp(name, usual[rank])) ++rank;
    name = axf_ssl.SSL_get_cipher_list(ssl, rank);
    if (usual[rank] || (name && !strncmp(name, "TLS_AES_", 8))) return; /* somebody has chosen */
    axf_ssl.SSL_set_ciphersuites(ssl, "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256");
}

/* After the handshake; `ssl` stays its owner's, who has to keep it until axf_tls_return. */
static axf_tls *axf_tls_take(void *ssl, int fd, uint64_t rekey) {
    axf_tls *tls = calloc(1, sizeof *tls);
    void *bio = tls ? axf_ssl.BIO_new(axf_ssl.bio) : 0;
    if (!bio) {
        free(tls);
        return 0;
    }
    tls->ssl = ssl;
    tls->fd = fd;
    tls->rekey = axf_ssl.SSL_version(ssl) == AXF_SSL_VERSION_1_3 ? rekey : UINT64_MAX;
    axf_ssl.BIO_set_data(bio, tls);
    axf_ssl.BIO_set_init(bio, 1);
    axf_ssl.SSL_set_bio(ssl, bio, bio);
    return tls;
}

static void axf_tls_return(axf_tls *tls) {
    axf_ssl.SSL_set_bio(tls->ssl, 0, 0);
    free(tls);
}

/* Fills the rows in order as far as what has arrived reaches; else as axf_tls_read. */
static ssize_t axf_tls_scatter(axf_tls *tls, const struct iovec *rows, int count) {
    size_t total = 0;
    for (int row = 0; row < count; ++row) {
        ssize_t got = axf_tls_read(tls, rows[row].iov_base, rows[row].iov_len);
        if (got < 0) return total ? (ssize_t)total : got;
        total += got;
        if ((size_t)got < rows[row].iov_len) break;
    }
    return total;
}

/* Encrypts the rows, in full records whatever their lengths, and sends what the kernel takes. Gives how many bytes were
 * encrypted: they are not needed again, even if they are not all sent; or -1 with errno. Rows that are empty only send
 * what is left. */
static ssize_t axf_tls_gather(axf_tls *tls, const struct iovec *rows, int count) {
    unsigned char record[AXF_TLS_RECORD];
    size_t total = 0, at = 0;
    int row = 0;
    while (!tls->failed && !tls->unsendable) {
        int flushed = axf_tls_flush(tls);
        if (flushed < 0) {
            tls->unsendable = tls->socket_error;
            tls->socket_error = 0;
            tls->at = tls->end = 0;
            break;
        }
        if (!flushed) return total;
        for (size_t batch = 0; batch < AXF_TLS_BATCH;) {
            const void *from = record;
            size_t n = 0;
            while (row < count && at == rows[row].iov_len) ++row, at = 0;
            if (row < count && rows[row].iov_len - at >= AXF_TLS_RECORD) {
                from = (const char *)rows[row].iov_base + at;
                at += n = AXF_TLS_RECORD;
            }
            while (row < count && n < AXF_TLS_RECORD) {
                size_t left = rows[row].iov_len - at, part = left < AXF_TLS_RECORD - n ? left : AXF_TLS_RECORD - n;
                memcpy(record + n, (const char *)rows[row].iov_base + at, part);
                n += part;
                at += part;
                if (part == left) ++row, at = 0;
            }
            if (!n) break;
            if (axf_tls_encrypt(tls, from, n) < 0) {
                axf_tls_fail(tls);
                break;
            }
            tls->ahead = 0; /* the caller counts them now */
            batch += n;
            total += n;
        }
        if (!tls->failed && tls->at == tls->end) return total;
    }
    errno = tls->failed ? tls->failed : tls->unsendable;
    return -1;
}

/* 1 when something was read ahead of what has been asked for. */
static int axf_tls_pending(const axf_tls *tls) { return axf_ssl.SSL_has_pending(tls->ssl); }

/* Says that nothing more is sent: 1 when the kernel has taken that. */
static int axf_tls_end(axf_tls *tls) {
    if (tls->failed || axf_tls_flush(tls) != 1) return 0;
    axf_ssl.ERR_clear_error();
    int said = axf_ssl.SSL_shutdown(tls->ssl);
    axf_ssl.ERR_clear_error();
    return said >= 0 && axf_tls_flush(tls) == 1;
}

/* ---- a context ----------------------------------------------------------------------------------------------- */

static int axf_tls_use_chain(void *context, void *bio) {
    int n = 0;
    for (void *found; (found = axf_ssl.PEM_read_bio_X509(bio, 0, 0, "")); ++n) {
        int ok = n ? axf_ssl.SSL_CTX_ctrl(context, AXF_SSL_CTRL_CHAIN_CERT, 1, found) == 1
                   : axf_ssl.SSL_CTX_use_certificate(context, found) == 1;
        axf_ssl.X509_free(found);
        if (!ok) return 0;
    }
    return n;
}

/* The password is an empty text, or OpenSSL would ask for one on the terminal. */
static int axf_tls_use_key(void *context, void *bio) {
    void *key = axf_ssl.PEM_read_bio_PrivateKey(bio, 0, 0, "");
    int ok = key && axf_ssl.SSL_CTX_use_PrivateKey(context, key) == 1 && axf_ssl.SSL_CTX_check_private_key(context) == 1;
    if (key) axf_ssl.EVP_PKEY_free(key);
    return ok;
}

static int axf_tls_trust(void *context, void *bio) {
    int n = 0;
    for (void *found; (found = axf_ssl.PEM_read_bio_X509(bio, 0, 0, "")); ++n) {
        int ok = axf_ssl.X509_STORE_add_cert(axf_ssl.SSL_CTX_get_cert_store(context), found) == 1;
        axf_ssl.X509_free(found);
        if (!ok) return 0;
    }
    return n;
}

static void *axf_tls_context(void) {
    void *context = axf_ssl.SSL_CTX_new(axf_ssl.TLS_method());
    if (!context) return 0;
    if (axf_ssl.SSL_CTX_ctrl(context, AXF_SSL_CTRL_MIN_VERSION, AXF_SSL_VERSION_1_3, 0) != 1 ||
        axf_ssl.SSL_CTX_set_ciphersuites(
            context, "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256") != 1 ||
        axf_ssl.SSL_CTX_set_num_tickets(context, 0) != 1) {
        axf_ssl.SSL_CTX_free(context);
        return 0;
    }
    axf_ssl.SSL_CTX_set_options(context, AXF_SSL_OPTIONS);
    axf_ssl.SSL_CTX_ctrl(context, AXF_SSL_CTRL_MODE, AXF_SSL_MODE, 0);
    axf_ssl.SSL_CTX_ctrl(context, AXF_SSL_CTRL_SESSION_CACHE, 0, 0);
    axf_ssl.SSL_CTX_ctrl(context, AXF_SSL_CTRL_READ_AHEAD, 1, 0);
    axf_ssl.SSL_CTX_set_default_read_buffer_len(context, AXF_TLS_READ_AHEAD);
    axf_ssl.SSL_CTX_set_verify(context, AXF_SSL_VERIFY, 0);
    return context;
}

#endif
