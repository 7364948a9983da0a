/* Matched rows of two lists, and the part of them that is moved in one go. */
#ifndef ASYNCXFER_ROWS_H
#define ASYNCXFER_ROWS_H

#include <stdint.h>

typedef struct {
    uint64_t local, remote, length; /* absolute addresses of the first row, bytes a row */
    int64_t local_stride, remote_stride;
    uint32_t count, local_segment, remote_segment, reserved;
} axf_pair;

typedef struct {
    uint64_t pair;   /* where it begins: pair, row of that pair, bytes into that row */
    uint64_t row;
    uint64_t skip;
    uint64_t nbytes; /* and how far it goes, over as many pairs as that takes */
} axf_chunk;

#endif
