/* What two backends tell each other in active messages, beside the puts and gets that only the initiator knows of.
 *
 * A message has this head, and data behind it as its kind says. The key stands for the session: both agents know it
 * from their control connection, nobody else does. Everything in a message but the key is checked by who gets it.
 */
#ifndef ASYNCXFER_UCXWIRE_H
#define ASYNCXFER_UCXWIRE_H

#include <stdint.h>

enum {
    AXF_UCX_AM = 16, /* the id of all our messages */
    AXF_UCX_FOREIGN_AM = 0, /* UCXX's own, which nobody here may send */
    AXF_UCX_KEY = 16
};

enum {
    AXF_UCX_HELLO = 1,   /* the initiator has an endpoint; answered by WELCOME */
    AXF_UCX_WELCOME = 2,
    AXF_UCX_NOTE = 3,    /* number `seq` of its lane; `what` is the kind, or 0 for one that was taken back; data: tag */
    AXF_UCX_NOTED = 4,   /* all of the lane up to `seq` have been taken */
    AXF_UCX_PUT = 5,     /* request `seq`, `count` rows of `slot`; data: rows, then their bytes */
    AXF_UCX_GET = 6,     /* likewise; data: rows */
    AXF_UCX_DONE = 7,    /* answer to `seq` with a status in `what`; data: the bytes of a get */
    AXF_UCX_RELEASE = 8  /* the initiator will not touch region number `seq` any more */
};

typedef struct {
    uint8_t key[AXF_UCX_KEY];
    uint64_t seq;
    uint32_t slot, epoch, count;
    uint8_t kind, what, lane, version;
} axf_ucx_head;

#define AXF_UCX_VERSION 1

typedef struct {
    uint64_t offset; /* in the segment */
    uint32_t nbytes, segment;
} axf_ucx_row;

enum { AXF_UCX_MOST_ROWS = 1024, AXF_UCX_MOST_BYTES = 1 << 20 }; /* of one request */

#endif
