cdef class Mapping:
    cdef unsigned char *data        # first byte asked for; a dummy when nbytes is 0
    cdef readonly size_t nbytes
    cdef readonly bint readonly
    cdef void *base                 # what munmap takes: page-aligned, NULL when there is nothing mapped
    cdef size_t span
